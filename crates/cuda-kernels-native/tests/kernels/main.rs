//! The CUDA kernels against the host's, bit for bit. Nothing where there is no C++ compiler, which
//! the build says.
#![cfg(native)]

mod fill;
mod gather;
mod layouts;
mod numbers;

use batchline::backend::{ChannelOrder, ConvertSpec};
use batchline::{Conversion, DType, Device, Element, MemoryManager, Tensor};
use cuda_kernels_native::{Geometry, convert, convert_specialised, specialised};

/// Bytes at a multiple of 16 plus `shift`, with a margin on both sides that must stay as it is.
struct Memory {
    blocks: Vec<u128>,
    start: usize,
    len: usize,
}

const UNTOUCHED: u8 = 0xa5;

impl Memory {
    fn new(len: usize, shift: usize) -> Self {
        let start = 32 + shift;
        let blocks = vec![u128::from_ne_bytes([UNTOUCHED; 16]); (start + len).div_ceil(16) + 2];
        Self { blocks, start, len }
    }

    fn of(bytes: &[u8], shift: usize) -> Self {
        let mut memory = Self::new(bytes.len(), shift);
        memory.bytes_mut().copy_from_slice(bytes);
        memory
    }

    fn bytes(&self) -> &[u8] {
        &bytemuck::cast_slice(&self.blocks)[self.start..][..self.len]
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        &mut bytemuck::cast_slice_mut(&mut self.blocks)[self.start..][..self.len]
    }

    fn margins_are_untouched(&self) -> bool {
        let all: &[u8] = bytemuck::cast_slice(&self.blocks);
        let margins = all[..self.start].iter().chain(&all[self.start + self.len..]);
        margins.into_iter().all(|&byte| byte == UNTOUCHED)
    }
}

/// A conversion of whole images.
fn spec(
    (from, to): (DType, DType),
    (channels, pixels, images): (u64, u64, u64),
    (source_order, target_order): (ChannelOrder, ChannelOrder),
    affine: bool,
) -> ConvertSpec {
    let (scale, bias) = if affine { factors(channels) } else { (Vec::new(), Vec::new()) };
    ConvertSpec {
        from,
        to,
        elements: channels * pixels * images,
        channels,
        pixels,
        source_order,
        target_order,
        scale: scale.into(),
        bias: bias.into(),
    }
}

/// Elements one after another.
fn plain(from: DType, to: DType, elements: u64) -> ConvertSpec {
    let order = (ChannelOrder::Nhwc, ChannelOrder::Nhwc);
    spec((from, to), (1, 1, elements), order, false)
}

/// Scales and biases that pass through all ranges that a conversion may be asked for.
fn factors(channels: u64) -> (Vec<f32>, Vec<f32>) {
    let scale = [0.017_124_753, 1.0, -3.5, 1e-40, f32::MIN_POSITIVE, 0.0, 1e38, -f32::MAX];
    let bias = [-2.117_904, 0.0, -0.0, f32::MIN_POSITIVE, 1e-40, -1e-38, f32::INFINITY, 0.5, -1e38];
    let entries = usize::try_from(channels).unwrap();
    (
        scale.into_iter().cycle().take(entries).collect(),
        bias.into_iter().cycle().take(entries).collect(),
    )
}

/// What the host makes of it.
fn expected(src: &[u8], spec: &ConvertSpec) -> Vec<u8> {
    let images = spec.elements / (spec.channels * spec.pixels);
    let dims = match spec.source_order {
        ChannelOrder::Nhwc => [images, 1, spec.pixels, spec.channels],
        ChannelOrder::Nchw => [images, spec.channels, 1, spec.pixels],
    };
    let tensor = MemoryManager::new(&Device::host()).tensor(&dims, spec.from).unwrap();
    match spec.from {
        DType::F32 => write::<f32>(&tensor, src),
        DType::F16 => write::<half::f16>(&tensor, src),
        DType::BF16 => write::<half::bf16>(&tensor, src),
        DType::F64 => write::<f64>(&tensor, src),
        DType::I8 => write::<i8>(&tensor, src),
        DType::I16 => write::<i16>(&tensor, src),
        DType::I32 => write::<i32>(&tensor, src),
        DType::I64 => write::<i64>(&tensor, src),
        _ => write::<u8>(&tensor, src),
    }
    let mut conversion = Conversion::new();
    if spec.is_affine() {
        conversion = conversion.scale_and_bias(&spec.scale, &spec.bias);
    }
    conversion = if spec.source_order == spec.target_order {
        conversion.channels(spec.source_order)
    } else {
        conversion.reorder(spec.source_order, spec.target_order)
    };
    tensor.convert(spec.to, &conversion).unwrap().to_bytes().unwrap()
}

fn write<T: Element>(tensor: &Tensor, bytes: &[u8]) {
    tensor.write::<T>(&bytemuck::pod_collect_to_vec(bytes)).unwrap();
}

/// Compares what a kernel makes with what the host does.
fn compare(kernel: &str, geometry: Geometry, found: &Memory, expected: &[u8], spec: &ConvertSpec) {
    assert!(found.margins_are_untouched(), "{kernel} wrote beyond its target: {spec:?}");
    if found.bytes() == expected {
        return;
    }
    let size = spec.to.size();
    let elements = found.bytes().chunks(size).zip(expected.chunks(size));
    let (index, (found, expected)) =
        elements.enumerate().find(|(_, (found, expected))| found != expected).unwrap();
    panic!(
        "{kernel} made {found:x?} of element {index}, not {expected:x?} (lowest byte first), \
         run as {geometry:?}: {spec:?}"
    );
}

/// Runs the kernels that can do it, with each geometry, and compares with the host.
fn check(src: &[u8], spec: &ConvertSpec, geometries: &[Geometry]) {
    check_at(src, spec, geometries, 0);
}

/// As [`check`], with source and target at `shift` bytes beyond a multiple of 16.
fn check_at(src: &[u8], spec: &ConvertSpec, geometries: &[Geometry], shift: usize) {
    let expected = expected(src, spec);
    let source = Memory::of(src, shift);
    for &geometry in geometries {
        let mut target = Memory::new(expected.len(), shift);
        convert(geometry, source.bytes(), target.bytes_mut(), spec);
        compare("batchline_convert", geometry, &target, &expected, spec);
        if let Some(name) = specialised(spec.from, spec.to) {
            let mut target = Memory::new(expected.len(), shift);
            convert_specialised(geometry, source.bytes(), target.bytes_mut(), spec);
            compare(&name, geometry, &target, &expected, spec);
        }
    }
}

/// Random-looking words, the same in each run.
fn words(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |i: u64| batchline::mix(&[seed, i]))
}

/// The lowest bytes of the words, as elements.
fn bytes_of(dtype: DType, words: impl IntoIterator<Item = u64>) -> Vec<u8> {
    words.into_iter().flat_map(|word| word.to_le_bytes().into_iter().take(dtype.size())).collect()
}

/// Random bytes for so many elements.
fn random(dtype: DType, elements: u64) -> Vec<u8> {
    bytes_of(dtype, words(elements).take(usize::try_from(elements).unwrap()))
}
