//! Round trips on whatever adapter there is: a software one is enough.

#![allow(unsafe_code, reason = "writes to staging memory by address, as the pools do")]
#![allow(clippy::cast_possible_truncation, reason = "small numbers, or cut on purpose")]

mod gather;

use std::time::Duration;

use super::*;
use crate::DType;
use crate::backend::host::convert::convert;
use crate::backend::{ChannelOrder, Command, ConvertSpec, Custom, Region, RegisteredMemory};

const LONG: Duration = Duration::from_secs(30);

/// A device, with a counter of segments.
struct Bench {
    backend: WgpuBackend,
    value: u64,
}

fn bench() -> Option<Bench> {
    match WgpuBackend::open(false) {
        Ok(backend) => Some(Bench { backend, value: 0 }),
        Err(error) => {
            let required = std::env::var_os("BATCHLINE_REQUIRE_WGPU").is_some_and(|v| v == "1");
            assert!(!required, "{}", error.chain());
            // Past the capture of the test harness, so that it is seen.
            let line = b"skipped: no wgpu adapter\n";
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
            None
        }
    }
}

impl Bench {
    fn submit(&mut self, commands: Vec<Command<'_>>) -> Result<Fence, SubmitError> {
        let fence = Fence { stream: 0, value: self.value + 1 };
        let commands = &mut commands.into_iter();
        self.backend.submit(Segment { fence, after: &[], commands, kept: None })?;
        self.value += 1;
        Ok(fence)
    }

    fn run(&mut self, commands: Vec<Command<'_>>) {
        let fence = self.submit(commands).unwrap();
        assert!(self.backend.wait(fence, LONG).unwrap());
    }

    fn memory(&self, bytes: u64) -> Box<dyn DeviceMemory> {
        self.backend.allocate(bytes).unwrap()
    }

    fn upload(&mut self, memory: &dyn DeviceMemory, offset: u64, bytes: &[u8]) {
        let staging = self.staging(Direction::Upload, bytes.len());
        write(&*staging, 0, bytes);
        let dst = Region { memory, offset, len: bytes.len() as u64 };
        self.run(vec![Command::Upload { src: &*staging, src_offset: 0, dst }]);
    }

    fn staging(&self, direction: Direction, bytes: usize) -> Box<dyn StagingMemory> {
        self.backend.allocate_staging(bytes as u64, direction).unwrap()
    }

    fn download(&mut self, memory: &dyn DeviceMemory, offset: u64, len: u64) -> Vec<u8> {
        let staging = self.staging(Direction::Download, len as usize);
        let src = Region { memory, offset, len };
        self.run(vec![Command::Download { src, dst: &*staging, dst_offset: 0 }]);
        read(&*staging, 0, len as usize)
    }
}

/// Registered memory of no device.
#[derive(Debug)]
struct HostsOwn;

// SAFETY: there are no bytes.
unsafe impl RegisteredMemory for HostsOwn {
    fn len(&self) -> u64 {
        0
    }
}

fn write(staging: &dyn StagingMemory, offset: usize, bytes: &[u8]) {
    assert_eq!(staging.ptr().as_ptr() as usize % 256, 0);
    assert!(offset + bytes.len() <= staging.len());
    // SAFETY: no segment in flight names the memory, and the place is in bounds.
    let start = unsafe { staging.ptr().add(offset) };
    // SAFETY: as above; nobody else knows the memory.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), start.as_ptr(), bytes.len()) }
}

fn read(staging: &dyn StagingMemory, offset: usize, len: usize) -> Vec<u8> {
    assert_eq!(staging.ptr().as_ptr() as usize % 256, 0);
    assert!(offset + len <= staging.len());
    // SAFETY: no segment in flight names the memory, and the place is in bounds.
    let start = unsafe { staging.ptr().add(offset) };
    // SAFETY: initialised, and nobody else knows the memory.
    unsafe { std::slice::from_raw_parts(start.as_ptr(), len) }.to_vec()
}

/// Numbers that look random and are the same each time.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn region(memory: &dyn DeviceMemory, offset: u64, len: u64) -> Region<'_> {
    Region { memory, offset, len }
}

#[test]
fn what_goes_up_comes_down() {
    let Some(mut bench) = bench() else { return };
    for (len, offset) in [(1, 0), (3, 4), (1000, 12), (4097, 256), (1 << 20, 8)] {
        let bytes = noise(len, len as u64);
        let memory = bench.memory(offset + len as u64);
        bench.upload(&*memory, offset, &bytes);
        assert_eq!(bench.download(&*memory, offset, len as u64), bytes, "{len} at {offset}");
    }
}

#[test]
fn offsets_into_staging_memory_count() {
    let Some(mut bench) = bench() else { return };
    let (up, down) =
        (bench.staging(Direction::Upload, 4096), bench.staging(Direction::Download, 4096));
    let memory = bench.memory(64);
    let bytes = noise(64, 5);
    write(&*up, 1028, &bytes);
    let part = region(&*memory, 0, 64);
    bench.run(vec![
        Command::Upload { src: &*up, src_offset: 1028, dst: part },
        Command::Download { src: part, dst: &*down, dst_offset: 516 },
    ]);
    assert_eq!(read(&*down, 516, 64), bytes);
    // What lies beside is as new.
    assert_eq!(read(&*down, 0, 516), vec![0; 516]);
    assert_eq!(read(&*down, 580, 100), vec![0; 100]);
}

#[test]
fn staging_memory_goes_round() {
    let Some(mut bench) = bench() else { return };
    let (up, down) =
        (bench.staging(Direction::Upload, 1000), bench.staging(Direction::Download, 1000));
    let memory = bench.memory(1000);
    for round in 0..50 {
        let bytes = noise(1000, round);
        write(&*up, 0, &bytes);
        let part = region(&*memory, 0, 1000);
        let first = bench.submit(vec![Command::Upload { src: &*up, src_offset: 0, dst: part }]);
        let second =
            bench.submit(vec![Command::Download { src: part, dst: &*down, dst_offset: 0 }]);
        // Waiting for the last is waiting for all.
        assert!(bench.backend.wait(second.unwrap(), LONG).unwrap());
        assert!(bench.backend.wait(first.unwrap(), Duration::ZERO).unwrap());
        assert_eq!(read(&*down, 0, 1000), bytes);
    }
}

/// Two segments on their way name the same memory: it comes back with the later one.
#[test]
fn two_segments_share_staging_memory() {
    let Some(mut bench) = bench() else { return };
    let up = bench.staging(Direction::Upload, 2048);
    let memory = bench.memory(2048);
    for round in 0..10 {
        let bytes = noise(2048, round);
        write(&*up, 0, &bytes);
        let fences: Vec<_> = [0u64, 1024]
            .into_iter()
            .map(|at| {
                let dst = region(&*memory, at, 1024);
                bench.submit(vec![Command::Upload { src: &*up, src_offset: at, dst }]).unwrap()
            })
            .collect();
        for fence in fences {
            assert!(bench.backend.wait(fence, LONG).unwrap());
        }
        assert_eq!(bench.download(&*memory, 0, 2048), bytes);
    }
}

#[test]
fn zero_timeout_asks_until_it_is_done() {
    let Some(mut bench) = bench() else { return };
    let memory = bench.memory(1 << 20);
    let fill = Command::Fill { dst: region(&*memory, 0, 1 << 20), element: &[7] };
    let fence = bench.submit(vec![fill]).unwrap();
    let start = std::time::Instant::now();
    while !bench.backend.wait(fence, Duration::ZERO).unwrap() {
        assert!(start.elapsed() < LONG);
        std::thread::yield_now();
    }
    assert_eq!(bench.backend.consumer_position(0).unwrap(), fence);
    // Number 0 has always passed; a number that was never given is an error, not a hang.
    assert!(bench.backend.wait(Fence { stream: 0, value: 0 }, LONG).unwrap());
    assert!(bench.backend.wait(Fence { stream: 0, value: 99 }, LONG).is_err());
}

#[test]
fn copies_also_within_one_buffer() {
    let Some(mut bench) = bench() else { return };
    let bytes = noise(6 << 20, 1);
    let (a, b) = (bench.memory(16 << 20), bench.memory(6 << 20));
    bench.upload(&*a, 4, &bytes);
    let len = bytes.len() as u64 - 1;
    bench.run(vec![
        Command::Copy { src: region(&*a, 4, len), dst: region(&*a, 8 << 20, len) },
        Command::Copy { src: region(&*a, 8 << 20, len), dst: region(&*b, 0, len) },
    ]);
    assert_eq!(bench.download(&*b, 0, len), bytes[..len as usize]);
}

#[test]
fn fills_repeat_the_element_and_nothing_else() {
    let Some(mut bench) = bench() else { return };
    let before = noise(4096, 3);
    let memory = bench.memory(4096);
    for element in [&[0][..], &[9], &[1, 2], &[1, 2, 3, 4], &[0; 4], &[1, 2, 3, 4, 5, 6, 7, 8]] {
        for (offset, len) in [(0, 4096), (4, 8), (260, 1024), (508, 256)] {
            bench.upload(&*memory, 0, &before);
            bench.run(vec![Command::Fill { dst: region(&*memory, offset, len), element }]);
            let mut expected = before.clone();
            let (start, len) = (offset as usize, len as usize);
            for piece in expected[start..start + len].chunks_exact_mut(element.len()) {
                piece.copy_from_slice(element);
            }
            assert_eq!(bench.download(&*memory, 0, 4096), expected, "{element:?} at {offset}");
        }
    }
}

#[test]
fn a_large_fill_needs_several_rows_of_groups() {
    let Some(mut bench) = bench() else { return };
    // More than 65535 groups of 256 words.
    let len = 70 << 20;
    let memory = bench.memory(len + 4);
    let tail = [1, 2, 3, 4];
    bench.upload(&*memory, len, &tail);
    bench.run(vec![Command::Fill { dst: region(&*memory, 0, len), element: &[5, 6] }]);
    let bytes = bench.download(&*memory, len - 4, 8);
    assert_eq!(bytes, [5, 6, 5, 6, 1, 2, 3, 4]);
    assert_eq!(bench.download(&*memory, 67_108_860, 8), [5, 6, 5, 6, 5, 6, 5, 6]);
}

/// Elements that are hard to convert, and noise.
fn elements(dtype: DType, count: usize) -> Vec<u8> {
    let mut bytes = noise(count * dtype.size(), dtype.size() as u64 + 77);
    #[rustfmt::skip]
    let floats = [
        0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 127.5, 128.5, 255.5, 256.0, -128.5,
        -129.0, 32767.5, -32768.5, 65504.0, 65519.9, 65520.0, 2_147_483_647.5, -2_147_483_649.0,
        9.3e18, -9.3e18, 1e39, -1e39, 1e300, 3.0e38, 3.4e38, 3.39e38, 3.4028235677973366e38, 6e-8,
        2.9e-8, 1.0 / f64::from(1 << 25), 1e-40, -1e-40, 7e-46, 7.1e-46, 1.17549435e-38, 5.9e-39,
        5e-324, 1e-310, 0.1, -0.3, 16_777_217.0, 1.00390625, 1.01171875, f64::NAN, -f64::NAN,
        f64::INFINITY, f64::NEG_INFINITY, 9_007_199_254_740_993.0, 0.499_999_999_999_999_94,
    ];
    #[rustfmt::skip]
    let integers = [
        0, 1, -1, 127, 128, 255, 256, -128, -129, 32_767, -32_768, 65_535, 16_777_217, 33_554_435,
        i64::from(i32::MAX), i64::from(i32::MIN), i64::MAX, i64::MIN, i64::MAX - 512,
        9_007_199_254_740_993, -9_007_199_254_740_995, (1 << 62) + 1, 0x7fff_ffbf_ffff_ffff,
    ];
    let mut at = 0;
    let mut put = |element: &[u8]| {
        bytes[at..at + element.len()].copy_from_slice(element);
        at += element.len();
    };
    if dtype.is_float() {
        for value in floats {
            match dtype {
                DType::F32 => put(&(value as f32).to_ne_bytes()),
                DType::F16 => put(&half::f16::from_f64(value).to_ne_bytes()),
                DType::BF16 => put(&half::bf16::from_f64(value).to_ne_bytes()),
                _ => put(&value.to_ne_bytes()),
            }
        }
    } else {
        for value in integers {
            put(&value.to_ne_bytes()[..dtype.size()]);
        }
    }
    if dtype == DType::Bool {
        bytes.iter_mut().skip(20).for_each(|byte| *byte &= 1);
    }
    bytes
}

/// Converts on the device and on the host, and compares every byte.
fn compare(bench: &mut Bench, spec: &ConvertSpec, one_buffer: bool) {
    let src = elements(spec.from, spec.elements as usize);
    let len = spec.elements * spec.to.size() as u64;
    let mut expected = vec![0; len as usize];
    convert(&src, &mut expected, spec);

    // Neither place is aligned to a binding, and what lies around must stay.
    let (at, gap) = (12, 4 << 10);
    let room = (src.len() as u64).max(len) + gap;
    let a = bench.memory(if one_buffer { 3 * room } else { room });
    let b = bench.memory(room);
    let (dst, start) = if one_buffer { (&a, room / 4 * 4 + 20) } else { (&b, 20) };
    bench.upload(&*a, at, &src);
    let guard = [0xdb; 64];
    let end = start + len.next_multiple_of(4);
    bench.upload(&**dst, start - 4, &guard[..4]);
    bench.upload(&**dst, end, &guard);
    let (src, dst_region) = (region(&*a, at, src.len() as u64), region(&**dst, start, len));
    bench.run(vec![Command::Convert { src, dst: dst_region, spec }]);
    let found = bench.download(&**dst, start, len);
    if found != expected {
        let size = spec.to.size();
        let wrong = (0..spec.elements as usize)
            .find(|i| found[i * size..][..size] != expected[i * size..][..size])
            .unwrap();
        let from = spec.source_index(wrong as u64) as usize * spec.from.size();
        panic!(
            "{} to {}, affine {}, {:?} to {:?}: element {wrong} of {:x?} is {:x?}, not {:x?}",
            spec.from,
            spec.to,
            spec.is_affine(),
            spec.source_order,
            spec.target_order,
            &elements(spec.from, spec.elements as usize)[from..][..spec.from.size()],
            &found[wrong * size..][..size],
            &expected[wrong * size..][..size],
        );
    }
    assert_eq!(bench.download(&**dst, end, 64), guard);
    assert_eq!(bench.download(&**dst, start - 4, 4), guard[..4]);
}

fn plain(from: DType, to: DType, elements: u64) -> ConvertSpec {
    ConvertSpec {
        from,
        to,
        elements,
        channels: 1,
        pixels: 1,
        source_order: ChannelOrder::Nhwc,
        target_order: ChannelOrder::Nhwc,
        scale: [].into(),
        bias: [].into(),
    }
}

fn with_factors(spec: ConvertSpec, channels: u64) -> ConvertSpec {
    let scales = [1.0 / 255.0, -3.7e-39, 2.5e20, 1.0, f32::INFINITY, 0.017_124_754, 1e-38, 0.0];
    let biases = [-0.5, 1e-45, -2.5, 0.0, f32::NEG_INFINITY, -2.117_904, -0.0, f32::NAN];
    let take = |of: [f32; 8]| of.into_iter().cycle().take(channels as usize).collect();
    ConvertSpec { channels, scale: take(scales), bias: take(biases), ..spec }
}

#[test]
fn every_pair_of_types_as_on_the_host() {
    let Some(mut bench) = bench() else { return };
    for from in DType::ALL {
        for to in DType::ALL {
            compare(&mut bench, &plain(from, to, 4003), false);
        }
    }
}

/// The way to `f32`, the map, and the way from `f32` are joined, so each is tried alone.
#[test]
fn every_type_with_factors_as_on_the_host() {
    let Some(mut bench) = bench() else { return };
    let to_f32 = DType::ALL.map(|from| (from, DType::F32));
    let from_f32 = DType::ALL.map(|to| (DType::F32, to));
    for (from, to) in to_f32.into_iter().chain(from_f32) {
        compare(&mut bench, &with_factors(plain(from, to, 40_007), 8), false);
    }
    // Channels-first, where a channel is a run of elements.
    let spec = with_factors(plain(DType::U8, DType::F16, 8 * 25 * 21), 8);
    let first = ChannelOrder::Nchw;
    let spec = ConvertSpec { pixels: 25, source_order: first, target_order: first, ..spec };
    compare(&mut bench, &spec, false);
}

#[test]
fn layouts_as_on_the_host() {
    let Some(mut bench) = bench() else { return };
    let orders = [ChannelOrder::Nhwc, ChannelOrder::Nchw];
    for (from, to) in [
        (DType::U8, DType::F32),
        (DType::I16, DType::U8),
        (DType::F32, DType::BF16),
        (DType::F64, DType::F64),
    ] {
        for (source_order, target_order) in orders.iter().flat_map(|s| orders.map(|t| (*s, t))) {
            for (images, channels, pixels) in [(11, 3, 35), (7, 3, 49), (500, 1, 4), (2, 5, 1)] {
                let spec = ConvertSpec {
                    elements: images * channels * pixels,
                    channels,
                    pixels,
                    source_order,
                    target_order,
                    ..plain(from, to, 0)
                };
                if spec.elements < 60 {
                    continue;
                }
                compare(&mut bench, &spec, images == 7);
                compare(&mut bench, &with_factors(spec, channels), images == 7);
            }
        }
    }
}

/// A device with bindings of 16 KiB, of which it runs few groups at a time.
fn small_bench() -> Option<Bench> {
    let bench = bench()?;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = pollster::block_on(instance.request_adapter(&Default::default())).unwrap();
    let descriptor = wgpu::DeviceDescriptor {
        required_limits: wgpu::Limits {
            max_storage_buffer_binding_size: 16 << 10,
            max_compute_workgroups_per_dimension: 5,
            ..Default::default()
        },
        ..Default::default()
    };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    drop(bench);
    Some(Bench { backend: WgpuBackend::adopt(device, queue).unwrap(), value: 0 })
}

/// A device with small bindings does the same in parts.
#[test]
fn small_bindings_make_chunks() {
    let Some(mut bench) = small_bench() else { return };
    let (hwc, chw) = (ChannelOrder::Nhwc, ChannelOrder::Nchw);
    for (source_order, target_order) in [(hwc, hwc), (chw, chw), (hwc, chw), (chw, hwc)] {
        for (from, to) in [(DType::U8, DType::F32), (DType::F64, DType::I8)] {
            let spec = ConvertSpec {
                elements: 3 * 35 * 501,
                channels: 3,
                pixels: 35,
                source_order,
                target_order,
                ..plain(from, to, 0)
            };
            compare(&mut bench, &spec, false);
            compare(&mut bench, &with_factors(spec, 3), true);
        }
    }
    let memory = bench.memory(100_008);
    bench.run(vec![
        Command::Fill { dst: region(&*memory, 0, 100_008), element: &[1] },
        Command::Fill { dst: region(&*memory, 4, 100_000), element: &[1, 2, 3, 4, 5, 6, 7, 8] },
    ]);
    let mut expected = vec![1; 4];
    expected.extend([1, 2, 3, 4, 5, 6, 7, 8].repeat(12_500));
    expected.extend([1; 4]);
    assert!(bench.download(&*memory, 0, 100_008) == expected);
    // An image that fits no binding.
    let large = ConvertSpec {
        elements: 3 * 20_000,
        channels: 3,
        pixels: 20_000,
        target_order: chw,
        ..plain(DType::U8, DType::U8, 0)
    };
    let (a, b) = (bench.memory(60_000), bench.memory(60_000));
    let (src, dst) = (region(&*a, 0, 60_000), region(&*b, 0, 60_000));
    let error = bench.submit(vec![Command::Convert { src, dst, spec: &large }]).unwrap_err().error;
    assert!(error.to_string().contains("in parts"), "{error}");
}

/// Each `f16` and `bf16`, through `f32` products of all sizes.
#[test]
fn half_precision_exhaustively() {
    let Some(mut bench) = bench() else { return };
    let all: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_ne_bytes).collect();
    let src = bench.memory(1 << 17);
    let dst = bench.memory(1 << 18);
    bench.upload(&*src, 0, &all);
    for from in [DType::F16, DType::BF16] {
        for scale in [None, Some(1.0), Some(0.7), Some(5.9e-38), Some(0.99999994)] {
            let mut spec = plain(from, DType::F32, 1 << 16);
            spec.scale = scale.into_iter().collect();
            spec.bias = scale.iter().map(|_| -0.0).collect();
            let (from, to) = (region(&*src, 0, 1 << 17), region(&*dst, 0, 1 << 18));
            bench.run(vec![Command::Convert { src: from, dst: to, spec: &spec }]);
            let mut expected = vec![0; 1 << 18];
            convert(&all, &mut expected, &spec);
            assert!(bench.download(&*dst, 0, 1 << 18) == expected, "{spec:?}");
        }
    }
}

#[test]
fn custom_work_runs_in_its_place() {
    let Some(mut bench) = bench() else { return };
    let (a, b) = (bench.memory(256), bench.memory(256));
    let work = Custom::Wgpu(Box::new(|custom: crate::WgpuCustom<'_>| {
        let (from, to) = (&custom.reads[0], &custom.writes[0]);
        let size = from.size.map(std::num::NonZero::get);
        assert_eq!(size, Some(12));
        custom.encoder.copy_buffer_to_buffer(from.buffer, from.offset, to.buffer, to.offset, size);
        Ok(())
    }));
    bench.run(vec![
        Command::Fill { dst: region(&*a, 0, 256), element: &[3] },
        Command::Custom {
            work: &mut Some(work),
            reads: vec![region(&*a, 8, 11)],
            writes: vec![region(&*b, 16, 12)],
        },
        Command::Fill { dst: region(&*a, 0, 256), element: &[4] },
    ]);
    assert_eq!(bench.download(&*b, 12, 20)[4..16], [3; 12]);
}

/// Nothing is submitted, the staging memory is the host's at once, and the device goes on.
#[test]
fn custom_work_that_fails_takes_nothing_along() {
    let Some(mut bench) = bench() else { return };
    let (up, memory) = (bench.staging(Direction::Upload, 64), bench.memory(64));
    let stranger = WgpuBackend::buffer(&*memory).unwrap().clone();
    type Work = Box<dyn FnOnce(crate::WgpuCustom<'_>) -> Result<(), crate::BoxError> + Send>;
    let works: Vec<Work> = vec![
        Box::new(|_| Err("no".into())),
        Box::new(|_| panic!("no")),
        // Out of bounds: found when the commands are finished.
        Box::new(move |custom| {
            custom.encoder.clear_buffer(&stranger, 60, Some(64));
            Ok(())
        }),
    ];
    let mapped = bench.backend.device().create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 64,
        usage: wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: true,
    });
    let still_mapped = mapped.clone();
    let late: Work = Box::new(move |custom| {
        // Found when the commands are submitted.
        custom.encoder.clear_buffer(&still_mapped, 0, None);
        Ok(())
    });
    for work in works.into_iter().chain([late]) {
        write(&*up, 0, &noise(64, 8));
        let error = bench
            .submit(vec![
                Command::Upload { src: &*up, src_offset: 0, dst: region(&*memory, 0, 64) },
                Command::Custom {
                    work: &mut Some(Custom::Wgpu(work)),
                    reads: Vec::new(),
                    writes: Vec::new(),
                },
            ])
            .unwrap_err();
        assert!(!error.enqueued, "{:?}", error.error);
        assert!(!error.error.is_device_lost(), "{:?}", error.error);
        assert_eq!(bench.download(&*memory, 0, 64), [0; 64]);
    }
    bench.upload(&*memory, 0, &noise(64, 9));
    assert_eq!(bench.download(&*memory, 0, 64), noise(64, 9));
}

#[test]
fn misuse_is_an_error() {
    let Some(mut bench) = bench() else { return };
    let memory = bench.memory(64);
    let (up, down) = (bench.staging(Direction::Upload, 64), bench.staging(Direction::Download, 64));
    let host = crate::backend::host::HostMemory::new("host", 64).unwrap();
    let wrong = [
        Command::Fill { dst: region(&*memory, 2, 4), element: &[1] },
        Command::Fill { dst: region(&*memory, 0, 68), element: &[1] },
        Command::Fill { dst: region(&*memory, 0, 6), element: &[1, 2, 3] },
        Command::Fill { dst: region(&host, 0, 4), element: &[1] },
        Command::Upload { src: &*down, src_offset: 0, dst: region(&*memory, 0, 64) },
        Command::Upload { src: &*up, src_offset: 4, dst: region(&*memory, 0, 64) },
        Command::Upload { src: &host, src_offset: 0, dst: region(&*memory, 0, 64) },
    ];
    for command in wrong {
        let error = bench.submit(vec![command]).unwrap_err();
        assert!(matches!(error.error, Error::Record { .. }), "{:?}", error.error);
        assert!(!error.enqueued);
    }
    assert!(WgpuBackend::buffer(&host).is_none());
    let limit = bench.backend.info().max_allocation;
    let error = bench.backend.allocate(limit + 1).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    let error = bench.backend.allocate_staging(u64::MAX - 3, Direction::Upload).unwrap_err();
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
}

/// More than any machine has: an error, and the device lives on.
#[test]
fn out_of_memory_is_an_error() {
    let Some(bench) = bench() else { return };
    let size = bench.backend.info().max_allocation;
    let mut held = Vec::new();
    // Not on hardware whose memory others may need.
    if bench.backend.info().hardware || size > 4 << 30 {
        return;
    }
    for _ in 0..2 {
        match bench.backend.allocate(size) {
            Ok(memory) => held.push(memory),
            Err(error) => assert!(matches!(error, Error::Device { .. }), "{error}"),
        }
    }
    drop(held);
    assert!(bench.backend.allocate(64).is_ok());
}

#[test]
fn errors_outside_of_our_calls_are_reported_once() {
    let Some(mut bench) = bench() else { return };
    let memory = bench.memory(64);
    let mut encoder = bench.backend.device().create_command_encoder(&Default::default());
    encoder.clear_buffer(WgpuBackend::buffer(&*memory).unwrap(), 2, None);
    let _ = encoder.finish();
    let fill = || Command::Fill { dst: region(&*memory, 0, 64), element: &[1] };
    let error = bench.submit(vec![fill()]).unwrap_err();
    assert!(error.error.chain().contains("outside"), "{}", error.error.chain());
    bench.run(vec![fill()]);
}

#[test]
fn an_adopted_device_is_shared() {
    let Some(owner) = bench() else { return };
    let (device, queue) = (owner.backend.device().clone(), owner.backend.queue().clone());
    let backend = WgpuBackend::adopt(device.clone(), queue.clone()).unwrap();
    assert_eq!(backend.info().name, owner.backend.info().name);
    let mut bench = Bench { backend, value: 0 };
    let memory = bench.memory(64);
    bench.run(vec![Command::Fill { dst: region(&*memory, 0, 64), element: &[1] }]);
    // The user's own work, submitted and not waited for, comes before ours.
    let mut encoder = device.create_command_encoder(&Default::default());
    encoder.clear_buffer(WgpuBackend::buffer(&*memory).unwrap(), 0, Some(32));
    queue.submit([encoder.finish()]);
    let bytes = bench.download(&*memory, 0, 64);
    assert_eq!((&bytes[..32], &bytes[32..]), (&[0; 32][..], &[1; 32][..]));
}

/// A device that is gone: errors at once, no hangs, no panics; on both kinds of device.
#[test]
fn a_lost_device_says_so() {
    for adopted in [false, true] {
        let Some(mut bench) = bench() else { return };
        if adopted {
            let (device, queue) = (bench.backend.device().clone(), bench.backend.queue().clone());
            bench.backend = WgpuBackend::adopt(device, queue).unwrap();
        }
        let memory = bench.memory(64);
        let up = bench.staging(Direction::Upload, 64);
        let upload = || Command::Upload { src: &*up, src_offset: 0, dst: region(&*memory, 0, 64) };
        bench.run(vec![upload()]);
        bench.backend.device().destroy();
        let start = std::time::Instant::now();
        let lost = match bench.submit(vec![upload()]) {
            Ok(fence) => bench.backend.wait(fence, LONG).unwrap_err(),
            Err(error) => error.error,
        };
        assert!(lost.is_device_lost(), "{lost}");
        let past = Fence { stream: 0, value: 1 };
        let calls = [
            bench.backend.wait(past, LONG).unwrap_err(),
            bench.backend.wait(past, Duration::ZERO).unwrap_err(),
            bench.backend.allocate(64).unwrap_err(),
            bench.backend.allocate_staging(64, Direction::Upload).unwrap_err(),
            bench.backend.consumer_position(0).unwrap_err(),
            bench.submit(vec![upload()]).unwrap_err().error,
        ];
        for error in calls {
            assert!(error.is_device_lost(), "{error}");
        }
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}

#[test]
fn a_lost_device_is_noticed_by_an_allocation() {
    for direction in [None, Some(Direction::Upload), Some(Direction::Download)] {
        let Some(bench) = bench() else { return };
        bench.backend.device().destroy();
        let error = match direction {
            None => bench.backend.allocate(64).map(drop),
            Some(direction) => bench.backend.allocate_staging(64, direction).map(drop),
        };
        let error = error.unwrap_err();
        assert!(error.is_device_lost(), "{direction:?}: {}", error.chain());
    }
}

/// The loss wakes a thread that waits already.
#[test]
fn a_loss_wakes_who_waits() {
    let Some(bench) = bench() else { return };
    let backend = &bench.backend;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(50));
            backend.health.lose("pulled out");
        });
        // A wait that can't end otherwise: as if the staging memory never came back.
        backend.flights.block_for_test();
        let start = std::time::Instant::now();
        let error = backend.wait(Fence { stream: 0, value: 1 }, LONG).unwrap_err();
        assert!(error.is_device_lost() && start.elapsed() < Duration::from_secs(2), "{error}");
    });
}

/// Submitting while another thread waits, as submitter and reaper do.
#[test]
fn one_submits_while_another_waits() {
    let Some(mut bench) = bench() else { return };
    let memory = bench.memory(1 << 16);
    let staging: Vec<_> = (0..3).map(|_| bench.staging(Direction::Upload, 1 << 16)).collect();
    let (send, receive) = std::sync::mpsc::sync_channel::<Fence>(3);
    let (free, reuse) = std::sync::mpsc::channel::<()>();
    let Bench { backend, value } = &mut bench;
    let backend = &*backend;
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for fence in receive {
                assert!(backend.wait(fence, LONG).unwrap());
                free.send(()).unwrap();
            }
        });
        for round in 0..200usize {
            if round >= staging.len() {
                reuse.recv().unwrap();
            }
            let up = &*staging[round % staging.len()];
            write(up, 0, &[round as u8; 1 << 16]);
            *value += 1;
            let fence = Fence { stream: 0, value: *value };
            let upload =
                Command::Upload { src: up, src_offset: 0, dst: region(&*memory, 0, 1 << 16) };
            let commands = &mut std::iter::once(upload);
            backend.submit(Segment { fence, after: &[], commands, kept: None }).unwrap();
            send.send(fence).unwrap();
        }
        drop(send);
    });
    assert_eq!(bench.download(&*memory, 0, 1 << 16), [199u8; 1 << 16]);
}

#[test]
fn devices_are_listed() {
    let listed = WgpuBackend::adapters();
    if let Some(bench) = bench() {
        assert_eq!(listed[0].name, bench.backend.info().name);
        assert!(listed[0].name.starts_with("wgpu: "), "{}", listed[0].name);
    }
}
