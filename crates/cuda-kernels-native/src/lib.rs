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
    /// [`converted_units`]).
    pub fn of_rows(rows: u64, units: u64) -> Self {
        let most = u64::from(u32::MAX >> 1);
        if units >= 1024 {
            return Self { grid: [small(rows.clamp(1, most)), 4], block: [256, 1] };
        }
        let along = units.max(1).next_power_of_two().min(256);
        let rows = rows.div_ceil(256 / along);
        Self { grid: [small(rows.clamp(1, most)), 1], block: [small(along), small(256 / along)] }
    }
}

/// Units of a row to gather, where all addresses are multiples of `alignment`.
pub fn row_units(row_bytes: u64, alignment: u64) -> u64 {
    let word = [16, 8, 4].into_iter().find(|word| (row_bytes | alignment).is_multiple_of(*word));
    row_bytes / word.unwrap_or(1)
}

/// Units of a row of this many elements to gather and convert.
pub fn converted_units(elements: u64, to: DType) -> u64 {
    elements / (16 / to.size() as u64)
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

/// Gathers rows of `row_bytes` bytes.
pub fn gather_rows(
    geometry: Geometry,
    src: &[u8],
    dst: &mut [u8],
    indices: &[u64],
    row_bytes: u64,
) {
    let rows = indices.len() as u64;
    check_rows(src, indices, row_bytes);
    assert_eq!(dst.len() as u64, rows * row_bytes, "the target's length");
    let (src, dst, indices) = (src.as_ptr(), dst.as_mut_ptr(), indices.as_ptr());
    run(
        "batchline_gather_rows",
        geometry,
        &[
            by_address(&src),
            by_address(&dst),
            by_address(&indices),
            by_address(&rows),
            by_address(&row_bytes),
        ],
    );
}

/// Gathers rows and converts each, with the [`gathering`] kernel of the pair, of which there must
/// be one. `spec` is that of one row, which is one image.
pub fn gather_convert(
    geometry: Geometry,
    src: &[u8],
    dst: &mut [u8],
    indices: &[u64],
    spec: &ConvertSpec,
) {
    let (name, rows) = (gathering(spec.from, spec.to).expect("a kernel"), indices.len() as u64);
    assert_eq!(spec.elements, spec.channels * spec.pixels, "an image a row");
    check_rows(src, indices, spec.elements);
    check(&src[..0], dst, rows, 0, spec);
    let (src, dst, indices) = (src.as_ptr(), dst.as_mut_ptr(), indices.as_ptr());
    let tail = Tail::new(spec);
    let mut parameters =
        vec![by_address(&src), by_address(&dst), by_address(&indices), by_address(&rows)];
    parameters.extend(tail.parameters());
    run(&name, geometry, &parameters);
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
