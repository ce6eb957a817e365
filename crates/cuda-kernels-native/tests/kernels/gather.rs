//! Gathering rows, plain and converted.

use std::sync::LazyLock;

use batchline::DType;
use batchline::backend::ChannelOrder::{Nchw, Nhwc};
use batchline::backend::ConvertSpec;
use cuda_kernels_native::{
    Geometry, Part, converted_units, gather_convert, gather_rows, gathering, row_units,
};
use memmap2::MmapOptions;

use super::{Memory, compare, expected, random, spec, words};

/// Rows to gather out of so many, some twice.
fn indices(rows: u64, of: u64) -> Vec<u64> {
    words(of).take(usize::try_from(rows).unwrap()).map(|word| word % of).collect()
}

fn geometries(rows: u64, units: u64, parts: u32) -> [Geometry; 5] {
    [
        Geometry::of_rows(rows, units, parts, 2),
        Geometry { grid: [1, 1], block: [1, 1] },
        // Parts that have different numbers of slices.
        Geometry { grid: [2, 3], block: [5, 3] },
        Geometry { grid: [7, 1], block: [32, 8] },
        Geometry { grid: [1, 9], block: [64, 1] },
    ]
}

fn row(bytes: &[u8], index: u64, len: u64) -> &[u8] {
    let len = usize::try_from(len).unwrap();
    &bytes[usize::try_from(index).unwrap() * len..][..len]
}

#[test]
fn the_launch_follows_the_row() {
    let rows = |rows, units, parts| Geometry::of_rows(rows, units, parts, 132);
    let of = |grid| Geometry { grid, block: [256, 1] };
    assert_eq!(rows(256, row_units(150_528, 256), 1), of([256, 4]));
    assert_eq!(rows(256, row_units(150_528, 256), 2), of([256, 8]));
    // Few rows, which are long.
    assert_eq!(rows(8, row_units(6 << 20, 256), 1), of([8, 66]));
    assert_eq!(rows(1, 1100, 3), of([1, 15]));
    assert_eq!(rows(1, 1 << 40, 4), of([1, 4 * 528]));
    assert_eq!(rows(1024, row_units(4096, 256), 1), of([1024, 1]));
    assert_eq!(rows(4095, row_units(784, 256), 2), of([1024, 2]));
    assert_eq!(rows(1000, row_units(1, 256), 4), of([4, 4]));
    assert_eq!(rows(0, 0, 1), of([1, 1]));
    assert_eq!(row_units(24, 256), 3);
    assert_eq!(row_units(28, 256), 7);
    assert_eq!(row_units(32, 4), 8);
    assert_eq!(row_units(27, 256), 27);
    assert_eq!(row_units(3073, 256), 192);
    assert_eq!(converted_units(150_528, DType::F16), 18_816);
    assert_eq!(converted_units(784, DType::F32), 49);
    assert_eq!(Geometry::of_elements(38_535_168, 132), of([528, 1]));
    assert_eq!(Geometry::of_elements(4097, 132), of([2, 1]));
}

/// Gathers and compares. Tensors are told by the bytes of a row and by how far beyond multiples of
/// 16 source and target begin.
fn check_parts(rows: u64, tensors: &[(u64, usize, usize)], geometry: Geometry) {
    const OF: u64 = 31;
    let indices = indices(rows, OF);
    // Made once: the tests gather from some ten thousand sources.
    static RANDOM: LazyLock<Vec<u8>> = LazyLock::new(|| random(DType::U8, OF * 20_001 + 300));
    let source = |&(bytes, shift, _): &(u64, usize, usize)| {
        let len = usize::try_from(OF * bytes).unwrap();
        Memory::of(&RANDOM[17 * shift..][..len], shift)
    };
    let target = |&(bytes, _, shift): &(u64, usize, usize)| {
        Memory::new(usize::try_from(rows * bytes).unwrap(), shift)
    };
    let sources: Vec<_> = tensors.iter().map(source).collect();
    let mut targets: Vec<_> = tensors.iter().map(target).collect();
    let parts = tensors.iter().zip(&sources).zip(&mut targets);
    let mut parts: Vec<_> = parts
        .map(|((&(row_bytes, ..), source), target)| Part {
            src: source.bytes(),
            dst: target.bytes_mut(),
            row_bytes,
        })
        .collect();
    gather_rows(geometry, &indices, &mut parts);
    for ((tensor, source), target) in tensors.iter().zip(&sources).zip(&targets) {
        for (at, &index) in (0..).zip(&indices) {
            assert_eq!(
                row(target.bytes(), at, tensor.0),
                row(source.bytes(), index, tensor.0),
                "row {at} of {tensor:?} among {tensors:?}, {geometry:?}",
            );
        }
        assert!(target.margins_are_untouched(), "{tensor:?} among {tensors:?}, {geometry:?}");
    }
}

#[test]
fn rows_of_any_length_at_any_address() {
    for row_bytes in (1..=200).chain([784, 1001, 3073]) {
        for from in 0..16 {
            for to in 0..16 {
                let units = row_units(row_bytes, 16 | (from | to) as u64);
                // Of the geometries each length and alignment sees another.
                let at = (from * 3 + to) % 5;
                let geometry = geometries(5, units, 1)[at];
                check_parts(5, &[(row_bytes, from, to)], geometry);
            }
        }
    }
}

#[test]
fn any_number_of_rows_in_any_geometry() {
    for row_bytes in [1, 2, 3, 4, 7, 12, 16, 24, 28, 784, 4096, 20_000, 20_001] {
        for rows in [0, 1, 5, 40] {
            for shift in [0, 1, 4, 8] {
                let units = row_units(row_bytes, 16 | shift as u64);
                for geometry in geometries(rows, units, 1) {
                    check_parts(rows, &[(row_bytes, shift, 0)], geometry);
                }
            }
        }
    }
}

#[test]
fn up_to_four_tensors_at_a_time() {
    let all = [(784, 0, 0), (8, 0, 0), (1, 3, 5), (3073, 1, 0), (12, 4, 8), (20_000, 0, 0)];
    for first in 0..all.len() {
        for count in 1..=4u32 {
            let tensors: Vec<_> =
                all.iter().cycle().skip(first).take(count as usize).copied().collect();
            let longest = tensors.iter().map(|tensor| tensor.0 / 16).max().unwrap();
            for geometry in geometries(23, longest, count) {
                check_parts(23, &tensors, geometry);
            }
        }
    }
}

#[test]
fn rows_beyond_four_gibibytes() {
    const ROW: u64 = 784;
    // Zeros, of which no page is there until it is written.
    let mut source = MmapOptions::new().len(6 << 30).no_reserve_swap().map_anon().unwrap();
    let last = source.len() as u64 / ROW - 1;
    let indices = [last, 0, (4 << 30) / ROW + 1];
    for (byte, index) in (1..).zip(indices) {
        let start = usize::try_from(index * ROW).unwrap();
        source[start..][..784].fill(byte);
    }
    let mut target = Memory::new(3 * 784, 0);
    let geometry = Geometry::of_rows(3, row_units(ROW, 256), 1, 2);
    let part = Part { src: &source, dst: target.bytes_mut(), row_bytes: ROW };
    gather_rows(geometry, &indices, &mut [part]);
    for (byte, row) in (1..).zip(target.bytes().chunks(784)) {
        assert!(row.iter().all(|&found| found == byte));
    }
    let spec = spec((DType::U8, DType::F32), (1, ROW, 1), (Nhwc, Nhwc), false);
    let mut target = Memory::new(3 * 784 * 4, 0);
    gather_convert(geometry, &indices, (&source, target.bytes_mut(), &spec), &mut []);
    for (byte, row) in (1u8..).zip(target.bytes().chunks(784 * 4)) {
        assert!(row.chunks(4).all(|found| found == f32::from(byte).to_ne_bytes()));
    }
}

#[test]
fn rows_are_converted_on_the_way() {
    for to in [DType::F32, DType::F16, DType::BF16] {
        let name = gathering(DType::U8, to).unwrap();
        for (channels, pixels) in [(1, 784), (1, 30), (3, 64), (3, 49), (3, 1), (4, 16), (50, 3)] {
            for orders in [(Nhwc, Nhwc), (Nhwc, Nchw), (Nchw, Nhwc), (Nchw, Nchw)] {
                for affine in [false, true] {
                    let one = spec((DType::U8, to), (channels, pixels, 1), orders, affine);
                    let all = ConvertSpec { elements: 31 * one.elements, ..one.clone() };
                    let source = Memory::of(&random(DType::U8, all.elements), 0);
                    let converted = expected(source.bytes(), &all);
                    let bytes = one.elements * to.size() as u64;
                    for rows in [1, 9] {
                        let indices = indices(rows, 31);
                        let expected: Vec<u8> = indices
                            .iter()
                            .flat_map(|&index| row(&converted, index, bytes))
                            .copied()
                            .collect();
                        let units = converted_units(one.elements, to);
                        for geometry in geometries(rows, units, 1) {
                            let mut target = Memory::new(expected.len(), 0);
                            let first = (source.bytes(), target.bytes_mut(), &one);
                            gather_convert(geometry, &indices, first, &mut []);
                            compare(&name, geometry, &target, &expected, &one);
                        }
                    }
                }
            }
        }
    }
    assert!(gathering(DType::F16, DType::F32).is_none());
}

/// Images whose channels keep their place are told apart by them alone, however many pixels they
/// have.
#[test]
fn rows_of_several_images_and_other_tensors_beside_them() {
    let to = DType::F32;
    let name = gathering(DType::U8, to).unwrap();
    for (channels, pixels, images) in [(3, 1, 64), (3, 16, 4), (1, 1, 30), (5, 7, 3)] {
        for orders in [(Nhwc, Nhwc), (Nhwc, Nchw), (Nchw, Nchw)] {
            let one = spec((DType::U8, to), (channels, pixels, images), orders, true);
            let all = ConvertSpec { elements: 31 * one.elements, ..one.clone() };
            let source = Memory::of(&random(DType::U8, all.elements), 0);
            let converted = expected(source.bytes(), &all);
            let (indices, labels) = (indices(9, 31), Memory::of(&random(DType::U8, 31 * 8), 0));
            let weights = Memory::of(&random(DType::U8, 31 * 333), 1);
            let bytes = one.elements * to.size() as u64;
            let expected: Vec<u8> =
                indices.iter().flat_map(|&index| row(&converted, index, bytes)).copied().collect();
            for geometry in geometries(9, converted_units(one.elements, to), 3) {
                let mut target = Memory::new(expected.len(), 0);
                let (mut own_labels, mut own_weights) = (Memory::new(72, 0), Memory::new(2997, 0));
                let first = (source.bytes(), target.bytes_mut(), &one);
                let label = Part { src: labels.bytes(), dst: own_labels.bytes_mut(), row_bytes: 8 };
                let weight =
                    Part { src: weights.bytes(), dst: own_weights.bytes_mut(), row_bytes: 333 };
                gather_convert(geometry, &indices, first, &mut [label, weight]);
                compare(&name, geometry, &target, &expected, &one);
                for (at, &index) in (0..).zip(&indices) {
                    assert_eq!(row(own_labels.bytes(), at, 8), row(labels.bytes(), index, 8));
                    assert_eq!(row(own_weights.bytes(), at, 333), row(weights.bytes(), index, 333));
                }
                assert!(own_labels.margins_are_untouched());
                assert!(own_weights.margins_are_untouched());
            }
        }
    }
}
