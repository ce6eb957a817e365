// Writes a pattern of two words over a range of words.

// 0: words to write, 1: the first word, 2 and 3: the pattern.
@group(0) @binding(0) var<storage, read> params: array<u32>;
@group(0) @binding(2) var<storage, read_write> dst: array<u32>;

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let word = (group.y * groups.x + group.x) * 256u + local;
    if word < params[0] {
        dst[params[1] + word] = params[2u + (word & 1u)];
    }
}
