//! Rows by their numbers, as a device with any limits picks them.

use super::*;
use crate::backend::{GatherBy, GatherPart, GatherSpec, RowSource};
use crate::plan::mix;

/// One tensor of a gather: its rows, and what becomes of them.
struct Part {
    rows: u64,
    row_bytes: u64,
    convert: Option<ConvertSpec>,
    one_buffer: bool,
}

impl Part {
    fn plain(rows: u64, row_bytes: u64) -> Self {
        Self { rows, row_bytes, convert: None, one_buffer: false }
    }

    /// Bytes of the target for `picked` rows.
    fn target_len(&self, picked: u64) -> u64 {
        let plain = picked * self.row_bytes;
        self.convert.as_ref().map_or(plain, |spec| spec.elements * spec.to.size() as u64)
    }
}

/// A part on the device, with what is to be found around and in its target.
struct Placed<'p> {
    part: &'p Part,
    source: Box<dyn DeviceMemory>,
    target: Option<Box<dyn DeviceMemory>>,
    start: u64,
    expected: Vec<u8>,
}

/// Neither place is aligned to a binding, and what lies around must stay.
const SOURCE_AT: u64 = 12;
const GUARD: [u8; 16] = [0xdb; 16];

fn place<'p>(bench: &mut Bench, part: &'p Part, numbers: &[u64]) -> Placed<'p> {
    let data = noise((part.rows * part.row_bytes) as usize, part.row_bytes);
    let row = |number: &u64| &data[(number * part.row_bytes) as usize..][..part.row_bytes as usize];
    let rows: Vec<u8> = numbers.iter().flat_map(row).copied().collect();
    let len = part.target_len(numbers.len() as u64);
    let mut expected = vec![0; len as usize];
    match &part.convert {
        Some(spec) => convert(&rows, &mut expected, spec),
        None => expected.copy_from_slice(&rows),
    }
    let end = SOURCE_AT + (data.len() as u64).next_multiple_of(4);
    let room = 64 + len + 64;
    let source = bench.memory(if part.one_buffer { end + room } else { end });
    let target = (!part.one_buffer).then(|| bench.memory(room));
    bench.upload(&*source, SOURCE_AT, &data);
    let start = 20 + if part.one_buffer { end } else { 0 };
    let memory = target.as_ref().unwrap_or(&source);
    bench.upload(&**memory, start - 16, &GUARD);
    bench.upload(&**memory, start + len.next_multiple_of(4), &GUARD);
    Placed { part, source, target, start, expected }
}

/// Gathers on the device and by hand, and compares every byte.
fn compare(bench: &mut Bench, parts: &[Part], numbers: &[u64]) {
    let at = 256;
    let indices = bench.staging(Direction::Upload, at + numbers.len() * 8);
    write(&*indices, at, bytemuck::cast_slice(numbers));
    let placed: Vec<Placed<'_>> = parts.iter().map(|part| place(bench, part, numbers)).collect();
    let specs = placed.iter().map(|placed| {
        let part = placed.part;
        let len = part.rows * part.row_bytes;
        GatherPart {
            source: RowSource::Device(region(&*placed.source, SOURCE_AT, len)),
            row_bytes: part.row_bytes,
            dst: region(placed.memory(), placed.start, placed.expected.len() as u64),
            convert: part.convert.as_ref(),
        }
    });
    let spec = GatherSpec {
        by: GatherBy::Kernel,
        indices: &*indices,
        indices_offset: at as u64,
        rows: numbers.len() as u64,
        parts: specs.collect(),
    };
    bench.run(vec![Command::Gather(spec)]);
    for placed in &placed {
        let Placed { part, start, expected, .. } = placed;
        let len = expected.len() as u64;
        let found = bench.download(placed.memory(), *start, len);
        let wrong = found.iter().zip(expected).position(|(found, expected)| found != expected);
        assert_eq!(wrong, None, "{} rows of {} bytes", numbers.len(), part.row_bytes);
        assert_eq!(bench.download(placed.memory(), start - 16, 16), GUARD);
        assert_eq!(bench.download(placed.memory(), start + len.next_multiple_of(4), 16), GUARD);
    }
}

impl Placed<'_> {
    fn memory(&self) -> &dyn DeviceMemory {
        &**self.target.as_ref().unwrap_or(&self.source)
    }
}

/// `count` numbers below `rows`, the first and the last row among them.
fn numbers(count: u64, rows: u64) -> Vec<u64> {
    let random = (2..count).map(|i| mix(&[count, rows, i]) % rows);
    [rows - 1, 0].into_iter().chain(random).take(count as usize).collect()
}

/// Rows of every length that words may begin in the middle of, in one dispatch and in many.
#[test]
fn rows_of_any_length() {
    for bench in [bench, small_bench] {
        let Some(mut bench) = bench() else { return };
        for row_bytes in (1..=20).chain([31, 40, 62, 1001, 4096, 4099]) {
            let rows = 1 + (60 << 10) / row_bytes;
            for count in [1, 3, 257] {
                compare(&mut bench, &[Part::plain(rows, row_bytes)], &numbers(count, rows));
            }
        }
    }
}

/// Longer than a binding, so that each goes in parts.
#[test]
fn rows_longer_than_a_binding() {
    let Some(mut bench) = small_bench() else { return };
    for row_bytes in [20_000, 20_001, 16 << 10, 40_002] {
        compare(&mut bench, &[Part::plain(5, row_bytes)], &[4, 0, 3, 3, 1]);
    }
}

/// More numbers than a binding holds.
#[test]
fn many_short_rows() {
    let Some(mut bench) = small_bench() else { return };
    for row_bytes in [1, 2, 3, 8] {
        compare(&mut bench, &[Part::plain(30_000, row_bytes)], &numbers(7001, 30_000));
    }
}

#[test]
fn several_tensors_at_once() {
    for bench in [bench, small_bench] {
        let Some(mut bench) = bench() else { return };
        let parts = [784, 8, 1, 37].map(|row_bytes| Part::plain(300, row_bytes));
        compare(&mut bench, &parts, &numbers(100, 300));
    }
}

#[test]
fn source_and_target_in_one_buffer() {
    for bench in [bench, small_bench] {
        let Some(mut bench) = bench() else { return };
        for row_bytes in [3, 100] {
            let part = Part { one_buffer: true, ..Part::plain(500, row_bytes) };
            compare(&mut bench, &[part], &numbers(150, 500));
        }
    }
}

/// Every pair that is offered, plain and with all that a conversion does, also where an element of
/// the target has its word in common with one from another window.
#[test]
fn conversions_on_the_way() {
    for bench in [bench, small_bench] {
        let Some(mut bench) = bench() else { return };
        let (hwc, chw) = (ChannelOrder::Nhwc, ChannelOrder::Nchw);
        for (from, to) in bench.backend.gathers().fused.iter().copied() {
            for (channels, pixels) in [(3, 35), (1, 105)] {
                let (rows, picked) = (700, 33);
                let row = channels * pixels;
                let spec = ConvertSpec { channels, pixels, ..plain(from, to, picked * row) };
                let orders = [(hwc, hwc), (hwc, chw), (chw, hwc), (chw, chw)];
                for (source_order, target_order) in orders {
                    let spec = ConvertSpec { source_order, target_order, ..spec.clone() };
                    for spec in [spec.clone(), with_factors(spec, channels)] {
                        let row_bytes = row * from.size() as u64;
                        let part = Part { convert: Some(spec), ..Part::plain(rows, row_bytes) };
                        compare(&mut bench, &[part, Part::plain(rows, 8)], &numbers(picked, rows));
                    }
                }
            }
        }
    }
}

/// Several gathers of one segment, each with its own numbers, and the same numbers twice.
#[test]
fn numbers_do_not_mix() {
    let Some(mut bench) = bench() else { return };
    let source = bench.memory(4000);
    let data = noise(4000, 1);
    bench.upload(&*source, 0, &data);
    let indices = bench.staging(Direction::Upload, 1024);
    let (one, other) = ([999u64, 0, 7], [1u64, 2, 3, 4, 5, 6]);
    write(&*indices, 0, bytemuck::cast_slice(&one));
    write(&*indices, 256, bytemuck::cast_slice(&other));
    let targets: Vec<_> = (0..3).map(|_| bench.memory(64)).collect();
    let gather = |offset: u64, rows: u64, target: usize| {
        let part = GatherPart {
            source: RowSource::Device(region(&*source, 0, 4000)),
            row_bytes: 4,
            dst: region(&*targets[target], 0, rows * 4),
            convert: None,
        };
        Command::Gather(GatherSpec {
            by: GatherBy::Kernel,
            indices: &*indices,
            indices_offset: offset,
            rows,
            parts: [part].into_iter().collect(),
        })
    };
    let commands = vec![gather(0, 3, 0), gather(256, 6, 1), gather(0, 3, 2)];
    bench.run(commands);
    for (target, numbers) in [(0, &one[..]), (1, &other[..]), (2, &one[..])] {
        let row = |number: &u64| &data[*number as usize * 4..][..4];
        let expected: Vec<u8> = numbers.iter().flat_map(row).copied().collect();
        assert_eq!(bench.download(&*targets[target], 0, expected.len() as u64), expected);
    }
}

/// Where a row lies is computed in 64 bits: the kernel's own function, for sources that no machine
/// here has room for.
#[test]
fn places_beyond_32_bits() {
    let Some(mut bench) = bench() else { return };
    // Elements of a row, the row's number, the window's first element, whether it lies inside.
    let window = 1u64 << 31;
    let cases = [
        (784u64, 6_000_000u64, 784 * 6_000_000 - 5, true),
        (784, 6_000_000, 784 * 6_000_001, false),
        (784, 6_000_000, 784 * 6_000_000 - (window - 3), true),
        (784, 6_000_000, 784 * 6_000_000 - (window - 2), false),
        (4, (1 << 33) + 4, 1 << 35, true),
        (4, 4, 1 << 35, false),
        (5, 858_993_459, 1 << 32, true),
        (4, (1 << 33) + 4, 0, false),
        ((1 << 31) - 7, 0xffff_fff1, 0xffff_fff1 * ((1 << 31) - 7), true),
        (0x0001_ffff, 0xffff_ffff, 0xffff_ffff * 0x0001_ffff - 0x7000_0000, true),
        (0x0001_ffff, 0xffff_ffff, (0xffff_ffff * 0x0001_ffff) ^ (1 << 40), false),
    ];
    let device = bench.backend.device().clone();
    let text = "@group(0) @binding(0) var<storage, read> params: array<u32>;
        @group(0) @binding(2) var<storage, read_write> dst: array<u32>;
        fn element(index: u32) -> vec2<u32> { return vec2(0u, picked(index)); }
        @compute @workgroup_size(1) fn main() {
            dst[0] = picked(2u);
            dst[1] = select(0u, 1u, outside);
        }"
    .to_owned()
        + include_str!("../gather.wgsl");
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
        label: None,
        source: wgpu::ShaderSource::Wgsl(text.into()),
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some("main"),
        compilation_options: Default::default(),
        cache: None,
    });
    for (row, number, first, inside) in cases {
        let mut params = [0u32; 14];
        params[8] = row as u32;
        params[11] = window as u32;
        (params[12], params[13]) = (first as u32, (first >> 32) as u32);
        let memory = [bench.memory(256), bench.memory(256), bench.memory(256)];
        bench.upload(&*memory[0], 0, bytemuck::cast_slice(&params));
        bench.upload(&*memory[1], 0, bytemuck::bytes_of(&number));
        let buffers = memory.each_ref().map(|memory| WgpuBackend::buffer(&**memory).unwrap());
        let entries =
            [(0, buffers[0]), (2, buffers[2]), (3, buffers[1])].map(|(binding, buffer)| {
                wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() }
            });
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &entries,
        });
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
        drop(pass);
        bench.backend.queue().submit([encoder.finish()]);
        let found = bench.download(&*memory[2], 0, 8);
        let place = (number * row + 2).wrapping_sub(first);
        assert_eq!(place < window, inside, "row {number} of {row} from {first} on");
        let expected = if inside { [place as u32, 0] } else { [0, 1] };
        assert_eq!(found, bytemuck::cast_slice::<u32, u8>(&expected), "row {number} of {row}");
    }
}

#[test]
fn what_it_can_not_gather_is_an_error() {
    let Some(mut bench) = bench() else { return };
    let gathers = bench.backend.gathers();
    assert!(!gathers.from_host && gathers.copies_from.is_none());
    assert_eq!(gathers.from_device, bench.backend.info().max_allocation);
    let memory = [bench.memory(256), bench.memory(256)];
    let (up, down) =
        (bench.staging(Direction::Upload, 256), bench.staging(Direction::Download, 256));
    let source = RowSource::Device(region(&*memory[0], 0, 256));
    let part = |source, row_bytes, len| GatherPart {
        source,
        row_bytes,
        dst: region(&*memory[1], 0, len),
        convert: None,
    };
    let gather = |by, indices, rows, part| {
        let parts = [part].into_iter().collect();
        vec![Command::Gather(GatherSpec { by, indices, indices_offset: 0, rows, parts })]
    };
    let kernel = GatherBy::Kernel;
    let unit = ConvertSpec { elements: 2, ..plain(DType::F32, DType::F16, 0) };
    let wrong = [
        gather(GatherBy::Copies, &*up, 4, part(source, 8, 32)),
        gather(kernel, &*up, 4, part(RowSource::Host(&HostsOwn), 8, 32)),
        gather(kernel, &*down, 4, part(source, 8, 32)),
        gather(kernel, &*up, 33, part(source, 1, 33)),
        gather(kernel, &*up, u64::MAX, part(source, 8, 32)),
        gather(kernel, &*up, 4, part(source, 8, 31)),
        gather(kernel, &*up, 4, part(source, 1 << 63, 32)),
        gather(kernel, &*up, 4, GatherPart { convert: Some(&unit), ..part(source, 2, 4) }),
    ];
    for commands in wrong {
        let what = format!("{commands:?}");
        let error = bench.submit(commands).unwrap_err();
        assert!(matches!(error.error, Error::Record { .. }), "{what}: {:?}", error.error);
        assert!(!error.enqueued);
    }
    bench.run(gather(kernel, &*up, 0, part(source, 8, 0)));
}
