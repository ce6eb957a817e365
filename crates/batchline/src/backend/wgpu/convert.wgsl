// Conversion between element types and layouts, bit for bit as the host's kernel does it
// (backend/host/convert.rs, which defines it).
//
// WGSL has neither narrow nor 64-bit types, and lets a device flush subnormals, fuse a product
// with a sum, and ignore NaN and infinity. So numbers are taken apart and put together as integers.
// Floating-point hardware is used for one product and one sum only, of operands for which all
// devices agree: finite, not zero, normal, and with a product that is far from underflow.
//
// `element`, which makes one element of the target, is put together for each pair of types and
// layouts from the functions here (convert.rs), so that no kernel carries the code of the others.

// 0: elements, 1: threads, 2: first word of the source, 3: first word of the target, 4: channels,
// 5: pixels, 6: place of the first element in its image, 7: zero, 8 to 13: see gather.wgsl; from 14:
// scales, then biases.
@group(0) @binding(0) var<storage, read> params: array<u32>;
@group(0) @binding(1) var<storage, SOURCE_ACCESS> src: array<u32>;
@group(0) @binding(2) var<storage, read_write> dst: array<u32>;

// ---- Pairs of words as 64-bit integers: x is the upper half.

fn shift_left(m: vec2<u32>, n: u32) -> vec2<u32> {
    if n == 0u {
        return m;
    }
    if n >= 32u {
        return vec2(m.y << (n - 32u), 0u);
    }
    return vec2((m.x << n) | (m.y >> (32u - n)), m.y << n);
}

fn shift_right(m: vec2<u32>, n: u32) -> vec2<u32> {
    if n == 0u {
        return m;
    }
    if n >= 32u {
        return vec2(0u, m.x >> (n - 32u));
    }
    return vec2(m.x >> n, (m.y >> n) | (m.x << (32u - n)));
}

fn negate(m: vec2<u32>) -> vec2<u32> {
    let low = ~m.y + 1u;
    return vec2(~m.x + select(0u, 1u, low == 0u), low);
}

// m / 2^n, rounded to nearest, ties to even.
fn round_off(m: vec2<u32>, n: u32) -> vec2<u32> {
    if n == 0u {
        return m;
    }
    if n > 64u {
        return vec2(0u, 0u);
    }
    // What is cut off, with the half at the top bit.
    var rest = m;
    var kept = vec2(0u, 0u);
    if n < 64u {
        rest = shift_left(m, 64u - n);
        kept = shift_right(m, n);
    }
    let more = (rest.x & 0x7fffffffu) != 0u || rest.y != 0u || (kept.y & 1u) != 0u;
    if (rest.x >> 31u) != 0u && more {
        kept.y += 1u;
        kept.x += select(0u, 1u, kept.y == 0u);
    }
    return kept;
}

// ---- Numbers taken apart.

const ZERO: u32 = 0u;
const FINITE: u32 = 1u;
const INFINITE: u32 = 2u;
const NAN: u32 = 3u;

struct Number {
    kind: u32,
    // 1 if it is negative, else 0.
    sign: u32,
    // A finite number is mantissa · 2^(exponent - 63), with the mantissa's top bit set.
    exponent: i32,
    mantissa: vec2<u32>,
}

fn finite(sign: u32, exponent: i32, mantissa: vec2<u32>) -> Number {
    var zeros = countLeadingZeros(mantissa.x);
    if mantissa.x == 0u {
        zeros = 32u + countLeadingZeros(mantissa.y);
    }
    if zeros == 64u {
        return Number(ZERO, sign, 0, vec2(0u, 0u));
    }
    return Number(FINITE, sign, exponent - i32(zeros), shift_left(mantissa, zeros));
}

fn take_f32(bits: u32) -> Number {
    let sign = bits >> 31u;
    let field = (bits >> 23u) & 0xffu;
    let fraction = bits & 0x7fffffu;
    if field == 0xffu {
        return Number(select(NAN, INFINITE, fraction == 0u), sign, 0, vec2(0u, 0u));
    }
    let hidden = select(0x800000u, 0u, field == 0u);
    return finite(sign, i32(max(field, 1u)) - 127, vec2((fraction | hidden) << 8u, 0u));
}

fn take_f64(bits: vec2<u32>) -> Number {
    let sign = bits.x >> 31u;
    let field = (bits.x >> 20u) & 0x7ffu;
    let fraction = vec2(bits.x & 0xfffffu, bits.y);
    if field == 0x7ffu {
        let kind = select(NAN, INFINITE, (fraction.x | fraction.y) == 0u);
        return Number(kind, sign, 0, vec2(0u, 0u));
    }
    let hidden = select(0x100000u, 0u, field == 0u);
    let mantissa = shift_left(vec2(fraction.x | hidden, fraction.y), 11u);
    return finite(sign, i32(max(field, 1u)) - 1023, mantissa);
}

fn take_i64(value: vec2<u32>) -> Number {
    let sign = value.x >> 31u;
    if sign == 1u {
        return finite(1u, 63, negate(value));
    }
    return finite(0u, 63, value);
}

// ---- Numbers put together.

// A float of `digits` binary digits (with the hidden one) whose smallest normal number is
// 2^least and whose exponent field is `top` for infinity. Without its sign.
fn put_float(n: Number, digits: u32, least: i32, top: u32) -> vec2<u32> {
    let infinity = shift_left(vec2(0u, top), digits - 1u);
    if n.kind == ZERO {
        return vec2(0u, 0u);
    }
    if n.kind == INFINITE {
        return infinity;
    }
    if n.kind == NAN {
        return infinity | shift_left(vec2(0u, 1u), digits - 2u);
    }
    let field = max(n.exponent - least, 0);
    if field + 1 >= i32(top) {
        return infinity;
    }
    let kept = round_off(n.mantissa, 64u - digits + u32(max(least - n.exponent, 0)));
    // The hidden digit, where there is one, counts the field up; so does a carry, to infinity too.
    let start = shift_left(vec2(0u, u32(field)), digits - 1u);
    let low = start.y + kept.y;
    return vec2(start.x + kept.x + select(0u, 1u, low < kept.y), low);
}

fn sign_of(n: Number) -> u32 {
    return select(n.sign, 0u, n.kind == NAN);
}

// An integer of `bits` bits with a sign, saturated.
fn put_signed(n: Number, bits: u32) -> vec2<u32> {
    // The magnitude of the smallest number, and the largest one.
    let least = shift_left(vec2(0u, 1u), bits - 1u);
    let most = vec2(least.x - select(0u, 1u, least.y == 0u), least.y - 1u);
    if n.kind == ZERO || n.kind == NAN {
        return vec2(0u, 0u);
    }
    var size = vec2(0xffffffffu, 0xffffffffu);
    if n.kind == FINITE && n.exponent < 63 {
        size = round_off(n.mantissa, u32(63 - n.exponent));
    }
    if n.sign == 1u {
        let fits = size.x < least.x || (size.x == least.x && size.y <= least.y);
        return negate(select(least, size, fits));
    }
    let fits = size.x < most.x || (size.x == most.x && size.y <= most.y);
    return select(most, size, fits);
}

fn put_f32(n: Number) -> vec2<u32> {
    return vec2(0u, put_float(n, 24u, -126, 0xffu).y | (sign_of(n) << 31u));
}

fn put_f16(n: Number) -> vec2<u32> {
    return vec2(0u, put_float(n, 11u, -14, 0x1fu).y | (sign_of(n) << 15u));
}

fn put_bf16(n: Number) -> vec2<u32> {
    return vec2(0u, put_float(n, 8u, -126, 0xffu).y | (sign_of(n) << 15u));
}

fn put_f64(n: Number) -> vec2<u32> {
    return put_float(n, 53u, -1022, 0x7ffu) | vec2(sign_of(n) << 31u, 0u);
}

fn put_i8(n: Number) -> vec2<u32> {
    return vec2(0u, put_signed(n, 8u).y & 0xffu);
}

fn put_i16(n: Number) -> vec2<u32> {
    return vec2(0u, put_signed(n, 16u).y & 0xffffu);
}

fn put_i32(n: Number) -> vec2<u32> {
    return vec2(0u, put_signed(n, 32u).y);
}

fn put_i64(n: Number) -> vec2<u32> {
    return put_signed(n, 64u);
}

fn put_u8(n: Number) -> vec2<u32> {
    if n.kind == ZERO || n.kind == NAN || n.sign == 1u {
        return vec2(0u, 0u);
    }
    if n.kind == INFINITE || n.exponent > 7 {
        return vec2(0u, 255u);
    }
    return vec2(0u, min(round_off(n.mantissa, u32(63 - n.exponent)).y, 255u));
}

fn put_bool(n: Number) -> vec2<u32> {
    return vec2(0u, select(1u, 0u, n.kind == ZERO));
}

// ---- The affine map, on the bits of f32.

fn is_nan(bits: u32) -> bool {
    return (bits & 0x7fffffffu) > 0x7f800000u;
}

fn is_infinite(bits: u32) -> bool {
    return (bits & 0x7fffffffu) == 0x7f800000u;
}

fn flush(bits: u32) -> u32 {
    return select(bits, bits & 0x80000000u, (bits & 0x7f800000u) == 0u);
}

// Both are flushed, and so is the result.
fn times(a: u32, b: u32) -> u32 {
    let sign = (a ^ b) & 0x80000000u;
    let x = a & 0x7fffffffu;
    let y = b & 0x7fffffffu;
    if x > 0x7f800000u || y > 0x7f800000u {
        return 0x7fc00000u;
    }
    if x == 0u || y == 0u {
        return select(sign, 0x7fc00000u, max(x, y) == 0x7f800000u);
    }
    if max(x, y) == 0x7f800000u {
        return sign | 0x7f800000u;
    }
    let exponent = i32(x >> 23u) + i32(y >> 23u) - 254;
    if exponent < -120 {
        // Devices differ in when they take a result as subnormal: before rounding, after, never.
        let p = (x & 0x7fffffu) | 0x800000u;
        let q = (y & 0x7fffffu) | 0x800000u;
        // The product of 48 bits, from pieces of 12.
        let low = (p & 0xfffu) * (q & 0xfffu);
        let middle = (p & 0xfffu) * (q >> 12u) + (p >> 12u) * (q & 0xfffu);
        let high = (p >> 12u) * (q >> 12u);
        let some = low + (middle << 12u);
        let all = some + (high << 24u);
        let carry = select(0u, 1u, some < low) + select(0u, 1u, all < some);
        let mantissa = vec2((high >> 8u) + (middle >> 20u) + carry, all);
        return flush(put_f32(finite(sign >> 31u, exponent + 17, mantissa)).y);
    }
    return bitcast<u32>(bitcast<f32>(a) * bitcast<f32>(b));
}

// Likewise.
fn plus(a: u32, b: u32) -> u32 {
    if is_nan(a) || is_nan(b) || (is_infinite(a) && is_infinite(b) && a != b) {
        return 0x7fc00000u;
    }
    if is_infinite(a) {
        return a;
    }
    if is_infinite(b) {
        return b;
    }
    if (a & 0x7fffffffu) == 0u {
        return select(b, a & b, (b & 0x7fffffffu) == 0u);
    }
    if (b & 0x7fffffffu) == 0u {
        return a;
    }
    if (a ^ b) == 0x80000000u {
        return 0u;
    }
    return flush(bitcast<u32>(bitcast<f32>(a) + bitcast<f32>(b)));
}

fn affine(bits: u32, channel: u32) -> u32 {
    let scale = params[14u + channel];
    let bias = params[14u + params[4] + channel];
    // Nothing is fused over an operation on bits whose outcome is known at run time only.
    let product = times(flush(bits), flush(scale)) ^ params[7];
    return plus(product, flush(bias));
}

// ---- Elements of the source, as they are stored.

fn stored_1(index: u32) -> vec2<u32> {
    let word = src[params[2] + (index >> 2u)];
    return vec2(0u, (word >> ((index & 3u) * 8u)) & 0xffu);
}

fn stored_2(index: u32) -> vec2<u32> {
    let word = src[params[2] + (index >> 1u)];
    return vec2(0u, (word >> ((index & 1u) * 16u)) & 0xffffu);
}

fn stored_4(index: u32) -> vec2<u32> {
    return vec2(0u, src[params[2] + index]);
}

fn stored_8(index: u32) -> vec2<u32> {
    let word = params[2] + index * 2u;
    return vec2(src[word + 1u], src[word]);
}

// ---- Elements that f32 holds exactly, as the bits of an f32.

fn exact_u8(bits: vec2<u32>) -> u32 {
    return bitcast<u32>(f32(bits.y));
}

fn exact_bool(bits: vec2<u32>) -> u32 {
    return select(0x3f800000u, 0u, bits.y == 0u);
}

fn exact_i8(bits: vec2<u32>) -> u32 {
    return bitcast<u32>(f32(bitcast<i32>(bits.y << 24u) >> 24u));
}

fn exact_i16(bits: vec2<u32>) -> u32 {
    return bitcast<u32>(f32(bitcast<i32>(bits.y << 16u) >> 16u));
}

fn exact_f16(bits: vec2<u32>) -> u32 {
    let sign = (bits.y & 0x8000u) << 16u;
    let field = (bits.y >> 10u) & 0x1fu;
    let fraction = bits.y & 0x3ffu;
    if field == 0x1fu {
        return select(0x7fc00000u, sign | 0x7f800000u, fraction == 0u);
    }
    if field != 0u {
        return sign | ((field + 112u) << 23u) | (fraction << 13u);
    }
    // fraction · 2^-24, a normal f32.
    return sign | select(bitcast<u32>(f32(fraction)) - (24u << 23u), 0u, fraction == 0u);
}

fn exact_bf16(bits: vec2<u32>) -> u32 {
    return exact_f32(bits << vec2(16u, 16u));
}

fn exact_f32(bits: vec2<u32>) -> u32 {
    return select(bits.y, 0x7fc00000u, is_nan(bits.y));
}

// ---- Other elements, taken apart.

fn wide_i32(bits: vec2<u32>) -> Number {
    return take_i64(vec2(bitcast<u32>(bitcast<i32>(bits.y) >> 31u), bits.y));
}

fn wide_i64(bits: vec2<u32>) -> Number {
    return take_i64(bits);
}

fn wide_f64(bits: vec2<u32>) -> Number {
    return take_f64(bits);
}

// ---- An f32 as an element of the target, where there is a shorter way than taking it apart.

fn short_f32(bits: u32) -> vec2<u32> {
    return vec2(0u, bits);
}

fn short_bf16(bits: u32) -> vec2<u32> {
    let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
    return vec2(0u, select(rounded, 0x7fc0u, is_nan(bits)));
}

// ---- Where the target's element comes from: its place in the source, and its channel.

fn same_nhwc(index: u32) -> vec2<u32> {
    return vec2(index, (index + params[6]) % params[4]);
}

fn same_nchw(index: u32) -> vec2<u32> {
    return vec2(index, ((index + params[6]) / params[5]) % params[4]);
}

fn nhwc_to_nchw(index: u32) -> vec2<u32> {
    let channels = params[4];
    let pixels = params[5];
    let start = index / (channels * pixels) * (channels * pixels);
    let channel = (index - start) / pixels;
    let pixel = index - start - channel * pixels;
    return vec2(start + pixel * channels + channel, channel);
}

fn nchw_to_nhwc(index: u32) -> vec2<u32> {
    let channels = params[4];
    let pixels = params[5];
    let start = index / (channels * pixels) * (channels * pixels);
    let pixel = (index - start) / channels;
    let channel = index - start - pixel * channels;
    return vec2(start + channel * pixels + pixel, channel);
}

// ---- What a thread writes: one word, or two for elements of 8 bytes.

fn write_1(thread: u32) {
    let first = thread * 4u;
    let count = params[0];
    var word = element(first).y;
    if first + 1u < count {
        word |= element(first + 1u).y << 8u;
    }
    if first + 2u < count {
        word |= element(first + 2u).y << 16u;
    }
    if first + 3u < count {
        word |= element(first + 3u).y << 24u;
    }
    dst[params[3] + thread] = word;
}

fn write_2(thread: u32) {
    let first = thread * 2u;
    var word = element(first).y;
    if first + 1u < params[0] {
        word |= element(first + 1u).y << 16u;
    }
    dst[params[3] + thread] = word;
}

fn write_4(thread: u32) {
    dst[params[3] + thread] = element(thread).y;
}

fn write_8(thread: u32) {
    let bits = element(thread);
    dst[params[3] + thread * 2u] = bits.y;
    dst[params[3] + thread * 2u + 1u] = bits.x;
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let thread = (group.y * groups.x + group.x) * 256u + local;
    if thread < params[1] {
        WRITE(thread);
    }
}
