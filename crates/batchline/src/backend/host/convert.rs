//! Conversion between element types and layouts: the reference that every device matches bit for
//! bit.
//!
//! # Definition
//!
//! Element `i` of the target is made of element [`spec.source_index(i)`](ConvertSpec::source_index)
//! of the source. All numbers are in the machine's byte order.
//!
//! Same type on both sides, and no `scale` and `bias`: the element's bytes, unchanged; this holds
//! for the payload of a NaN, and for a `bool` that is neither 0 nor 1.
//!
//! Else, without `scale` and `bias`: the exact value of the source's element, **rounded once** to
//! the target's type, to nearest, ties to even. In detail:
//!
//! * A `bool` is worth 0 if its byte is 0, else 1.
//! * To an integer: halves go to the even neighbour, what is out of range (also infinity) becomes
//!   the nearest bound, NaN becomes 0.
//! * To a float: subnormal elements and results are kept; zeros and what becomes zero keep their
//!   sign; what is at least half a unit beyond the largest number becomes infinity; NaN becomes
//!   the quiet NaN without sign and payload: `0x7ff8_0000_0000_0000`, `0x7fc0_0000`, `0x7e00`
//!   (`f16`), `0x7fc0` (`bf16`).
//! * To `bool`: 0 if the value is 0 (also −0), else 1 (also NaN, and values that no other type
//!   would keep apart from 0).
//!
//! With `scale` and `bias`, in `f32`, where `flush` makes a zero of the same sign of a subnormal
//! number and leaves all others alone:
//!
//! ```text
//! x = flush(the element, rounded to f32 as above)
//! p = flush(round(x · flush(scale[c])))           c = spec.channel_of(source index)
//! s = flush(round(p + flush(bias[c])))            never fused with the line before
//! ```
//!
//! `round` is that of IEEE 754, to nearest, ties to even, with gradual underflow: flushing looks
//! at the rounded number. `s`, with any NaN made the canonical one, is rounded to the target's
//! type as above. (That may give a subnormal `f16`, which is kept.)
//!
//! # How
//!
//! A block of [`BLOCK`] elements at a time goes through up to three loops while it is in the
//! first-level cache: to `f32`, times scale plus bias, to the target's type. Each is a plain loop
//! over slices that the compiler vectorises; a loop per pair and layout at once would be hundreds,
//! most of them scalar. A change of layout is a transposition of the block as it is stored.

mod number;

use half::{bf16, f16};

use crate::DType;
use crate::backend::{ChannelOrder, ConvertSpec};
use number::{Bool, Exact, Number, canonical};

/// Elements that go through all loops together: 4 KiB as `f32`, and 8 KiB at most as the target.
const BLOCK: usize = 1024;

/// Least length of a piece of a row where whole rows are too long for a block. Half a cache line
/// at least.
const PIECE: usize = 32;

/// Makes `dst` of `src`. What `spec` describes must fit both; if not, the rest of `dst` is left.
pub(crate) fn convert(src: &[u8], dst: &mut [u8], spec: &ConvertSpec) {
    let (from, to) = (spec.from.size(), spec.to.size());
    let elements = length(spec.elements);
    debug_assert_eq!(src.len(), elements * from, "the source's length");
    debug_assert_eq!(dst.len(), elements * to, "the target's length");
    let elements = elements.min(src.len() / from).min(dst.len() / to);
    let (src, dst) = (&src[..elements * from], &mut dst[..elements * to]);

    let kernel = Kernel::new(spec, elements);
    let (pixels, channels) = (length(spec.pixels.max(1)), length(spec.channels.max(1)));
    // With one pixel or one channel the two layouts are the same.
    let relayout = spec.source_order != spec.target_order && pixels > 1 && channels > 1;
    if !relayout {
        if spec.from == spec.to && !spec.is_affine() {
            dst.copy_from_slice(src);
            return;
        }
        let blocks = src.chunks(BLOCK * from).zip(dst.chunks_mut(BLOCK * to));
        for (i, (src, dst)) in blocks.enumerate() {
            kernel.run(i * BLOCK, src, dst);
        }
        return;
    }

    // An image is a matrix, [pixels, channels] or [channels, pixels], to be transposed.
    let (rows, columns) = match spec.source_order {
        ChannelOrder::Nhwc => (pixels, channels),
        ChannelOrder::Nchw => (channels, pixels),
    };
    let image = rows * columns;
    debug_assert_eq!(elements % image, 0, "whole images");
    let images = src.chunks_exact(image * from).zip(dst.chunks_exact_mut(image * to));
    for (i, (src, dst)) in images.enumerate() {
        let matrix = Matrix { first: i * image, rows, columns };
        match to {
            1 => transpose::<[u8; 1]>(&kernel, matrix, src, dst),
            2 => transpose::<[u8; 2]>(&kernel, matrix, src, dst),
            4 => transpose::<[u8; 4]>(&kernel, matrix, src, dst),
            _ => transpose::<[u8; 8]>(&kernel, matrix, src, dst),
        }
    }
}

/// Where an image of the source is, and of how many rows and columns.
#[derive(Clone, Copy)]
struct Matrix {
    /// The source's index of its first element.
    first: usize,
    rows: usize,
    columns: usize,
}

/// Converts an image and stores its columns as rows. `T` is as large as an element of the target.
fn transpose<T: bytemuck::Pod>(kernel: &Kernel, matrix: Matrix, src: &[u8], dst: &mut [u8]) {
    let Matrix { first, rows, columns } = matrix;
    let from = src.len() / (rows * columns);
    let dst: &mut [T] = bytemuck::cast_slice_mut(dst);
    let mut block = [T::zeroed(); BLOCK];
    // A block is `height` pieces of `width` from rows below each other: all columns if they are
    // few, all rows if those are, else a tile.
    let width = columns.min((BLOCK / rows).max(PIECE));
    let height = rows.min(BLOCK / width);
    for top in (0..rows).step_by(height) {
        for left in (0..columns).step_by(width) {
            let (height, width) = (height.min(rows - top), width.min(columns - left));
            let block = &mut block[..height * width];
            // Whole rows are in one piece.
            let piece = if width == columns { height * width } else { width };
            for (i, piece) in block.chunks_exact_mut(piece).enumerate() {
                let start = (top + i) * columns + left;
                let src = &src[start * from..][..piece.len() * from];
                kernel.run(first + start, src, bytemuck::cast_slice_mut(piece));
            }
            store(block, width, &mut dst[left * rows + top..], rows);
        }
    }
}

/// Stores the block's columns as the starts of rows of `dst`, which are `stride` apart.
fn store<T: Copy>(block: &[T], width: usize, dst: &mut [T], stride: usize) {
    let height = block.len() / width;
    // The longer loop is the inner one.
    if height >= width {
        for (column, dst) in dst.chunks_mut(stride).take(width).enumerate() {
            for (to, from) in dst.iter_mut().zip(block[column..].iter().step_by(width)) {
                *to = *from;
            }
        }
    } else {
        for (row, block) in block.chunks_exact(width).enumerate() {
            for (to, from) in dst[row..].iter_mut().step_by(stride).zip(block) {
                *to = *from;
            }
        }
    }
}

/// What is done to a block, wherever its elements go then.
struct Kernel {
    /// Bytes of an element of the source.
    from: usize,
    /// To the target, or to `f32` if there is a map.
    read: Cast,
    /// The map, and from `f32` to the target.
    affine: Option<(Affine, Cast)>,
}

impl Kernel {
    fn new(spec: &ConvertSpec, elements: usize) -> Self {
        let (read, affine) = if spec.is_affine() {
            let map = Affine::new(spec, elements.min(BLOCK));
            (cast_of(spec.from, DType::F32), Some((map, cast_of(DType::F32, spec.to))))
        } else {
            (cast_of(spec.from, spec.to), None)
        };
        Self { from: spec.from.size(), read, affine }
    }

    /// Converts at most [`BLOCK`] elements, adjacent in the source, of which the first has the
    /// index `first` there.
    fn run(&self, first: usize, src: &[u8], dst: &mut [u8]) {
        let Some((map, write)) = &self.affine else { return (self.read)(src, dst) };
        let mut floats = [0f32; BLOCK];
        let floats = &mut floats[..src.len() / self.from];
        (self.read)(src, bytemuck::cast_slice_mut(floats));
        map.apply(first, floats);
        write(bytemuck::cast_slice(floats), dst);
    }
}

/// `scale` and `bias`, ready for blocks.
struct Affine {
    channels: usize,
    /// Elements with the same channel one after another.
    run: usize,
    /// Flushed, per channel. Where `run` is 1 they are repeated, so that whatever the channel of a
    /// block's first element, the block's factors lie beside each other.
    scale: Vec<f32>,
    bias: Vec<f32>,
}

impl Affine {
    /// For blocks of `block` elements at most.
    fn new(spec: &ConvertSpec, block: usize) -> Self {
        debug_assert_eq!(spec.scale.len() as u64, spec.channels, "a factor per channel");
        debug_assert_eq!(spec.bias.len() as u64, spec.channels, "a summand per channel");
        let channels = spec.scale.len();
        let run = match spec.source_order {
            ChannelOrder::Nhwc => 1,
            ChannelOrder::Nchw => length(spec.pixels.max(1)),
        };
        let entries = if run == 1 { channels + block } else { channels };
        let repeated =
            |factors: &[f32]| factors.iter().copied().map(flush).cycle().take(entries).collect();
        Self { channels, run, scale: repeated(&spec.scale), bias: repeated(&spec.bias) }
    }

    /// Maps the floats in place; `first` is the index of the first of them in the source.
    fn apply(&self, first: usize, floats: &mut [f32]) {
        let channel = first / self.run % self.channels;
        if self.run == 1 {
            let factors = self.scale[channel..].iter().zip(&self.bias[channel..]);
            for (x, (scale, bias)) in floats.iter_mut().zip(factors) {
                *x = affine(*x, *scale, *bias);
            }
            return;
        }
        let factors = self.scale.iter().zip(&self.bias).cycle().skip(channel);
        let mut rest = floats;
        let mut run = self.run - first % self.run;
        for (scale, bias) in factors {
            let (now, later) = rest.split_at_mut(run.min(rest.len()));
            now.iter_mut().for_each(|x| *x = affine(*x, *scale, *bias));
            if later.is_empty() {
                return;
            }
            (rest, run) = (later, self.run);
        }
    }
}

/// The map of one number, as the [module](self) defines it; `scale` and `bias` are flushed already.
#[inline(always)]
fn affine(x: f32, scale: f32, bias: f32) -> f32 {
    let product = flush(flush(x) * scale);
    canonical(flush(product + bias))
}

/// A zero of the same sign for a subnormal number; all others, also NaN, as they are.
#[inline(always)]
fn flush(x: f32) -> f32 {
    if x.abs() < f32::MIN_POSITIVE { 0f32.copysign(x) } else { x }
}

/// Converts elements, as many as there are, without map and change of layout.
type Cast = fn(&[u8], &mut [u8]);

fn cast<S: Number, D: Number>(src: &[u8], dst: &mut [u8]) {
    let src: &[S::Bytes] = bytemuck::cast_slice(src);
    let dst: &mut [D::Bytes] = bytemuck::cast_slice_mut(dst);
    for (to, from) in dst.iter_mut().zip(src) {
        *to = S::value(*from).round::<D>();
    }
}

fn cast_of(from: DType, to: DType) -> Cast {
    if from == to {
        return |src, dst| dst.copy_from_slice(src);
    }
    match from {
        DType::F32 => cast_from::<f32>(to),
        DType::F16 => cast_from::<f16>(to),
        DType::BF16 => cast_from::<bf16>(to),
        DType::F64 => cast_from::<f64>(to),
        DType::I8 => cast_from::<i8>(to),
        DType::I16 => cast_from::<i16>(to),
        DType::I32 => cast_from::<i32>(to),
        DType::I64 => cast_from::<i64>(to),
        DType::U8 => cast_from::<u8>(to),
        DType::Bool => cast_from::<Bool>(to),
    }
}

fn cast_from<S: Number>(to: DType) -> Cast {
    match to {
        DType::F32 => cast::<S, f32>,
        DType::F16 => cast::<S, f16>,
        DType::BF16 => cast::<S, bf16>,
        DType::F64 => cast::<S, f64>,
        DType::I8 => cast::<S, i8>,
        DType::I16 => cast::<S, i16>,
        DType::I32 => cast::<S, i32>,
        DType::I64 => cast::<S, i64>,
        DType::U8 => cast::<S, u8>,
        DType::Bool => cast::<S, Bool>,
    }
}

#[allow(clippy::cast_possible_truncation, reason = "elements that exist in memory")]
fn length(elements: u64) -> usize {
    elements as usize
}

#[cfg(test)]
mod tests;
