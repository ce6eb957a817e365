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
//! most of them scalar. With a source of bytes, a table of what becomes of each takes the place of
//! the three: pictures are bytes, and this is three times faster. A change of layout is a
//! transposition of the block as it is stored.

mod number;

use std::ops::Range;

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

    let kernel = Kernel::new(spec);
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
            for (column, dst) in dst[left * rows + top..].chunks_mut(rows).take(width).enumerate() {
                for (to, row) in dst.iter_mut().zip(block.chunks_exact(width)) {
                    *to = row[column];
                }
            }
        }
    }
}

/// What is done to a block, wherever its elements go then.
enum Kernel {
    /// Straight to the target.
    Cast(Cast),
    /// To `f32`, the map, to the target.
    Map { size: usize, read: Cast, map: Map, write: Cast },
    /// What becomes of each byte is known.
    Table(Table),
}

impl Kernel {
    fn new(spec: &ConvertSpec) -> Self {
        if !spec.is_affine() {
            Kernel::Cast(cast_of(spec.from, spec.to))
        } else if let Some(table) = Table::new(spec) {
            Kernel::Table(table)
        } else {
            let (read, write) = (cast_of(spec.from, DType::F32), cast_of(DType::F32, spec.to));
            Kernel::Map { size: spec.from.size(), read, map: Map::new(spec), write }
        }
    }

    /// Converts at most [`BLOCK`] elements, adjacent in the source, of which the first has the
    /// index `first` there.
    fn run(&self, first: usize, src: &[u8], dst: &mut [u8]) {
        match self {
            Kernel::Cast(cast) => cast(src, dst),
            Kernel::Map { size, read, map, write } => {
                let mut floats = [0f32; BLOCK];
                let floats = &mut floats[..src.len() / size];
                read(src, bytemuck::cast_slice_mut(floats));
                map.apply(first, floats);
                write(bytemuck::cast_slice(floats), dst);
            }
            Kernel::Table(table) => match dst.len() / src.len().max(1) {
                1 => table.look_up::<[u8; 1]>(first, src, dst),
                2 => table.look_up::<[u8; 2]>(first, src, dst),
                4 => table.look_up::<[u8; 4]>(first, src, dst),
                _ => table.look_up::<[u8; 8]>(first, src, dst),
            },
        }
    }
}

/// Which channel the source's elements are of.
#[derive(Clone, Copy)]
struct Channels {
    count: usize,
    /// Elements of the same channel one after another.
    run: usize,
}

impl Channels {
    fn new(spec: &ConvertSpec) -> Self {
        let run = match spec.source_order {
            ChannelOrder::Nhwc => 1,
            ChannelOrder::Nchw => length(spec.pixels.max(1)),
        };
        Self { count: length(spec.channels), run }
    }

    /// The channel of the element with this index.
    fn of(self, index: usize) -> usize {
        index / self.run % self.count
    }

    /// Calls `each` for the runs among `len` elements of which the first has the index `first`:
    /// with the channel, and where the run is, counted from `first`.
    fn runs(self, first: usize, len: usize, mut each: impl FnMut(usize, Range<usize>)) {
        let (mut channel, mut start, mut run) = (self.of(first), 0, self.run - first % self.run);
        while start < len {
            let end = len.min(start + run);
            each(channel, start..end);
            (channel, start, run) = ((channel + 1) % self.count, end, self.run);
        }
    }
}

/// `scale` and `bias`, ready for blocks.
struct Map {
    channels: Channels,
    /// Flushed, per channel. Where runs are of one element they are repeated, so that whatever the
    /// channel of a block's first element, the block's factors lie beside each other.
    scale: Vec<f32>,
    bias: Vec<f32>,
}

impl Map {
    fn new(spec: &ConvertSpec) -> Self {
        debug_assert_eq!(spec.scale.len() as u64, spec.channels, "a factor per channel");
        debug_assert_eq!(spec.bias.len() as u64, spec.channels, "a summand per channel");
        let channels = Channels::new(spec);
        let block = length(spec.elements).min(BLOCK);
        let entries = channels.count + if channels.run == 1 { block } else { 0 };
        let ready =
            |factors: &[f32]| factors.iter().copied().map(flush).cycle().take(entries).collect();
        Self { channels, scale: ready(&spec.scale), bias: ready(&spec.bias) }
    }

    /// Maps the floats in place; `first` is the index of the first of them in the source.
    fn apply(&self, first: usize, floats: &mut [f32]) {
        if self.channels.run == 1 {
            let channel = self.channels.of(first);
            let factors = self.scale[channel..].iter().zip(&self.bias[channel..]);
            for (x, (scale, bias)) in floats.iter_mut().zip(factors) {
                *x = affine(*x, *scale, *bias);
            }
        } else {
            self.channels.runs(first, floats.len(), |channel, run| {
                let (scale, bias) = (self.scale[channel], self.bias[channel]);
                floats[run].iter_mut().for_each(|x| *x = affine(*x, scale, bias));
            });
        }
    }
}

/// For a source of bytes: what becomes of each of the 256, per channel.
struct Table {
    channels: Channels,
    /// Elements of the target.
    entries: Vec<u8>,
}

impl Table {
    /// None where it isn't worth it: it is to stay in the first-level cache, and making it is to be
    /// the lesser part of the work.
    fn new(spec: &ConvertSpec) -> Option<Self> {
        let entries = 256 * length(spec.channels);
        if spec.from.size() > 1
            || entries * spec.to.size() > 16 << 10
            || length(spec.elements) < 2 * entries
        {
            return None;
        }
        // Made by the definition, of an image whose channels have each byte once. (It is small, so
        // that this doesn't make another table.)
        let mut image = spec.clone();
        (image.elements, image.pixels) = (entries as u64, 256);
        (image.source_order, image.target_order) = (ChannelOrder::Nchw, ChannelOrder::Nchw);
        let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(entries).collect();
        let mut table = vec![0; entries * spec.to.size()];
        convert(&bytes, &mut table, &image);
        Some(Self { channels: Channels::new(spec), entries: table })
    }

    /// As [`Kernel::run`]; `T` is as large as an element of the target.
    fn look_up<T: bytemuck::Pod>(&self, first: usize, src: &[u8], dst: &mut [u8]) {
        let dst: &mut [T] = bytemuck::cast_slice_mut(dst);
        let tables: &[[T; 256]] = bytemuck::cast_slice::<u8, T>(&self.entries).as_chunks().0;
        let count = self.channels.count;
        if self.channels.run == 1 {
            let channel = self.channels.of(first);
            let table = |i: usize| &tables[(channel + i) % count];
            for i in 0..count {
                let table = table(i);
                for (to, bytes) in dst.chunks_exact_mut(count).zip(src.chunks_exact(count)) {
                    to[i] = table[usize::from(bytes[i])];
                }
            }
            let whole = src.len() / count * count;
            for (i, (to, byte)) in dst[whole..].iter_mut().zip(&src[whole..]).enumerate() {
                *to = table(i)[usize::from(*byte)];
            }
        } else {
            self.channels.runs(first, src.len(), |channel, run| {
                for (to, byte) in dst[run.clone()].iter_mut().zip(&src[run]) {
                    *to = tables[channel][usize::from(*byte)];
                }
            });
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
    let bits = x.to_bits();
    let keep = if bits & 0x7f80_0000 == 0 { 0x8000_0000 } else { u32::MAX };
    f32::from_bits(bits & keep)
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
