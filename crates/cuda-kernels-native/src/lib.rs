//! Runs batchline's CUDA kernels on the CPU: `kernels.cu` of the CUDA device, compiled as C++.
//!
//! [`launch`] has the convention of `cuLaunchKernel`. The other functions check what they are
//! given, and name memory by slices.
#![allow(unsafe_code, reason = "calls the kernels, which name memory by address")]

use std::ffi::{CString, c_char, c_void};
use std::ptr;

use batchline::DType;
use batchline::backend::{ChannelOrder, ConvertSpec};

/// Whether there was a C++ compiler. Without it no kernel is known.
pub const BUILT: bool = cfg!(native);

#[cfg(native)]
unsafe extern "C" {
    fn batchline_native_launch(
        name: *const c_char,
        grid: *const u32,
        block: *const u32,
        parameters: *const *mut c_void,
    ) -> bool;
}

/// # Safety
/// Nothing is asked for, as nothing is done.
#[cfg(not(native))]
unsafe fn batchline_native_launch(
    _: *const c_char,
    _: *const u32,
    _: *const u32,
    _: *const *mut c_void,
) -> bool {
    false
}

/// Runs the kernel of this name, one thread after another; false where there is none.
///
/// # Panics
/// The grid or the block is not one that the kernels can be launched with.
///
/// # Safety
/// `parameters` points to as many pointers as the kernel has parameters, each to a value of the
/// parameter's type; addresses among these, and what they say of their memory, are right.
pub unsafe fn launch(
    name: &str,
    grid: [u32; 3],
    block: [u32; 3],
    shared: u32,
    parameters: *const *mut c_void,
) -> bool {
    let threads = block.iter().map(|&side| u64::from(side)).product::<u64>();
    assert!((1..=256).contains(&threads), "a block of {block:?} threads");
    assert!(grid[1] <= 65_535 && !grid.contains(&0), "a grid of {grid:?} blocks");
    assert_eq!((grid[2], block[2], shared), (1, 1, 0), "what no kernel uses");
    let Ok(name) = CString::new(name) else { return false };
    // SAFETY: by the contract of this function.
    unsafe { batchline_native_launch(name.as_ptr(), grid.as_ptr(), block.as_ptr(), parameters) }
}

/// How many threads run a kernel: the `x` and `y` of its grid and of each block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    /// Blocks.
    pub grid: [u32; 2],
    /// Threads of each.
    pub block: [u32; 2],
}

impl Geometry {
    /// What is fast for this many elements to fill or to convert.
    pub fn of_elements(elements: u64, multiprocessors: u32) -> Self {
        let blocks = elements.div_ceil(4096).clamp(1, 4 * u64::from(multiprocessors));
        Self { grid: [small(blocks), 1], block: [256, 1] }
    }

    /// What is fast for this many rows to gather, of `units` each ([`row_units`],
    /// [`converted_units`]; the longest part's).
    pub fn of_rows(rows: u64, units: u64, parts: u32, multiprocessors: u32) -> Self {
        let along = units.clamp(1, 256).next_power_of_two();
        let across = rows.div_ceil(256 / along).clamp(1, u64::from(u32::MAX >> 1));
        let slices = match units {
            ..1024 => 1,
            _ => (4 * u64::from(multiprocessors)).div_ceil(across).clamp(4, units.div_ceil(256)),
        };
        let slices = small(slices.min(65_535 / u64::from(parts)));
        Self { grid: [small(across), parts * slices], block: [256, 1] }
    }
}

/// Units of a row to gather, where all addresses are multiples of `alignment`.
pub fn row_units(row_bytes: u64, alignment: u64) -> u64 {
    let word = [16, 8, 4].into_iter().find(|word| (row_bytes | alignment).is_multiple_of(*word));
    row_bytes / word.unwrap_or(if row_bytes < 64 { 1 } else { 16 })
}

/// Units of a row of this many elements to gather and convert.
pub fn converted_units(elements: u64, to: DType) -> u64 {
    // Short rows are made in pieces of as many bytes of the source.
    elements / if elements <= 16_384 { 16 } else { 16 / to.size() as u64 }
}

fn small(count: u64) -> u32 {
    u32::try_from(count).expect("clamped")
}

/// The kernels' code of an element type.
pub fn code(dtype: DType) -> u32 {
    dtype as u32
}

/// The kernels' `flags`.
pub fn flags(spec: &ConvertSpec) -> u32 {
    u32::from(spec.is_affine())
        | u32::from(spec.source_order == ChannelOrder::Nchw) << 1
        | u32::from(spec.target_order == ChannelOrder::Nchw) << 2
}

/// The kernel that is specialised for a pair of types, if there is one.
pub fn specialised(from: DType, to: DType) -> Option<String> {
    known(format!("batchline_convert_{from}_{to}"))
}

/// The kernel that gathers and converts this pair of types, if there is one.
pub fn gathering(from: DType, to: DType) -> Option<String> {
    known(format!("batchline_gather_convert_{from}_{to}"))
}

fn known(name: String) -> Option<String> {
    let text = CString::new(name.as_str()).expect("no zeros");
    // SAFETY: without parameters nothing is run.
    let known =
        unsafe { batchline_native_launch(text.as_ptr(), ptr::null(), ptr::null(), ptr::null()) };
    known.then_some(name)
}

/// A parameter by its address, as the driver takes it.
fn by_address<T>(value: &T) -> *mut c_void {
    ptr::from_ref(value).cast_mut().cast()
}

fn run(name: &str, geometry: Geometry, parameters: &[*mut c_void]) {
    let Geometry { grid: [gx, gy], block: [bx, by] } = geometry;
    // SAFETY: the functions below pass what the kernel takes, and check lengths and alignment.
    let known = unsafe { launch(name, [gx, gy, 1], [bx, by, 1], 0, parameters.as_ptr()) };
    assert!(known, "a kernel named {name}");
}

/// Overwrites `dst` with `value`.
pub fn fill_u64(geometry: Geometry, dst: &mut [u64], value: u64) {
    let (address, count) = (dst.as_mut_ptr(), dst.len() as u64);
    run(
        "batchline_fill_u64",
        geometry,
        &[by_address(&address), by_address(&count), by_address(&value)],
    );
}

/// Converts with the kernel for any pair of types.
pub fn convert(geometry: Geometry, src: &[u8], dst: &mut [u8], spec: &ConvertSpec) {
    check(src, dst, 1, spec.elements, spec);
    let (src, dst, from, to) = (src.as_ptr(), dst.as_mut_ptr(), code(spec.from), code(spec.to));
    let tail = Tail::new(spec);
    let mut parameters = vec![
        by_address(&src),
        by_address(&dst),
        by_address(&spec.elements),
        by_address(&from),
        by_address(&to),
    ];
    parameters.extend(tail.parameters());
    run("batchline_convert", geometry, &parameters);
}

/// Converts with the [`specialised`] kernel of the pair, of which there must be one.
pub fn convert_specialised(geometry: Geometry, src: &[u8], dst: &mut [u8], spec: &ConvertSpec) {
    check(src, dst, 1, spec.elements, spec);
    let name = specialised(spec.from, spec.to).expect("a kernel for the pair");
    let (src, dst, tail) = (src.as_ptr(), dst.as_mut_ptr(), Tail::new(spec));
    let mut parameters = vec![by_address(&src), by_address(&dst), by_address(&spec.elements)];
    parameters.extend(tail.parameters());
    run(&name, geometry, &parameters);
}

/// A tensor of a batch, whose rows are gathered as they are.
#[derive(Debug)]
pub struct Part<'a> {
    /// All rows.
    pub src: &'a [u8],
    /// The rows of the batch.
    pub dst: &'a mut [u8],
    /// Bytes of a row.
    pub row_bytes: u64,
}

/// Gathers the rows of up to four tensors.
pub fn gather_rows(geometry: Geometry, indices: &[u64], parts: &mut [Part<'_>]) {
    let plain = Plain::new(indices, parts);
    let (rows, count) = (indices.len() as u64, small(parts.len() as u64));
    let indices = indices.as_ptr();
    let mut parameters = vec![by_address(&indices), by_address(&rows), by_address(&count)];
    parameters.extend(plain.parameters(4));
    run("batchline_gather_rows", geometry, &parameters);
}

/// Gathers rows of `elements` elements and converts each, with the [`gathering`] kernel of the
/// pair, of which there must be one; and up to three other tensors' rows. `spec` is that of one row,
/// which is one image or several.
pub fn gather_convert(
    geometry: Geometry,
    indices: &[u64],
    (src, dst, spec): (&[u8], &mut [u8], &ConvertSpec),
    parts: &mut [Part<'_>],
) {
    let (name, rows) = (gathering(spec.from, spec.to).expect("a kernel"), indices.len() as u64);
    assert!(spec.elements.is_multiple_of(spec.channels * spec.pixels), "whole images");
    check_rows(src, indices, spec.elements);
    check(&src[..0], dst, rows, 0, spec);
    let plain = Plain::new(indices, parts);
    let (count, indices) = (small(parts.len() as u64 + 1), indices.as_ptr());
    let (src, dst) = (src.as_ptr(), dst.as_mut_ptr());
    let tail = Tail::new(spec);
    let mut parameters = vec![
        by_address(&indices),
        by_address(&rows),
        by_address(&count),
        by_address(&src),
        by_address(&dst),
        by_address(&spec.elements),
    ];
    parameters.extend(tail.parameters());
    parameters.extend(plain.parameters(3));
    run(&name, geometry, &parameters);
}

/// What a kernel is told of the parts that it gathers as they are; zeros of those that are none.
struct Plain([(*const u8, *mut u8, u64); 4]);

impl Plain {
    fn new(indices: &[u64], parts: &mut [Part<'_>]) -> Self {
        let mut all = [(ptr::null(), ptr::null_mut(), 0); 4];
        for (place, part) in all.iter_mut().zip(parts) {
            check_rows(part.src, indices, part.row_bytes);
            let bytes = indices.len() as u64 * part.row_bytes;
            assert_eq!(part.dst.len() as u64, bytes, "the target's length");
            *place = (part.src.as_ptr(), part.dst.as_mut_ptr(), part.row_bytes);
        }
        Self(all)
    }

    fn parameters(&self, count: usize) -> impl Iterator<Item = *mut c_void> {
        self.0[..count]
            .iter()
            .flat_map(|(src, dst, bytes)| [by_address(src), by_address(dst), by_address(bytes)])
    }
}

/// The parameters that all conversions end with.
struct Tail<'a> {
    spec: &'a ConvertSpec,
    flags: u32,
    scale: *const f32,
    bias: *const f32,
}

impl<'a> Tail<'a> {
    fn new(spec: &'a ConvertSpec) -> Self {
        Self { spec, flags: flags(spec), scale: spec.scale.as_ptr(), bias: spec.bias.as_ptr() }
    }

    fn parameters(&self) -> [*mut c_void; 5] {
        [
            by_address(&self.spec.channels),
            by_address(&self.spec.pixels),
            by_address(&self.flags),
            by_address(&self.scale),
            by_address(&self.bias),
        ]
    }
}

/// Checks what a conversion touches: `elements` of the source, and `rows` times those of the
/// target.
fn check(src: &[u8], dst: &[u8], rows: u64, elements: u64, spec: &ConvertSpec) {
    let (from, to) = (spec.from.size(), spec.to.size());
    assert_eq!(src.len() as u64, elements * from as u64, "the source's length");
    assert_eq!(dst.len() as u64, rows * spec.elements * to as u64, "the target's length");
    assert!(src.as_ptr().addr().is_multiple_of(from), "the source's alignment");
    assert!(dst.as_ptr().addr().is_multiple_of(to), "the target's alignment");
    assert!(spec.channels > 0 && spec.pixels > 0, "at least one");
    if spec.is_affine() {
        assert_eq!(spec.scale.len() as u64, spec.channels, "a factor per channel");
        assert_eq!(spec.bias.len() as u64, spec.channels, "a summand per channel");
    }
}

fn check_rows(src: &[u8], indices: &[u64], row_bytes: u64) {
    let rows = (src.len() as u64).checked_div(row_bytes).unwrap_or(u64::MAX);
    assert!(indices.iter().all(|&index| index < rows), "a row beyond the source");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_kernel_is_said_to_be_unknown() {
        // SAFETY: there is no such kernel that could take parameters.
        assert!(!unsafe { launch("batchline_nothing", [1; 3], [1; 3], 0, ptr::null()) });
    }
}
