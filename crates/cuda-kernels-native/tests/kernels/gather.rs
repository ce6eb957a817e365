//! Gathering rows, plain and converted.

use batchline::DType;
use batchline::backend::ChannelOrder::{Nchw, Nhwc};
use batchline::backend::ConvertSpec;
use cuda_kernels_native::{
    Geometry, converted_units, gather_convert, gather_rows, gathering, row_units,
};
use memmap2::MmapOptions;

use super::{Memory, compare, expected, random, spec, words};

/// Rows to gather out of so many, some twice.
fn indices(rows: u64, of: u64) -> Vec<u64> {
    words(of).take(usize::try_from(rows).unwrap()).map(|word| word % of).collect()
}

fn geometries(rows: u64, units: u64) -> [Geometry; 4] {
    [
        Geometry::of_rows(rows, units),
        Geometry { grid: [1, 1], block: [1, 1] },
        Geometry { grid: [2, 3], block: [5, 3] },
        Geometry { grid: [7, 1], block: [32, 8] },
    ]
}

fn row(bytes: &[u8], index: u64, len: u64) -> &[u8] {
    let len = usize::try_from(len).unwrap();
    &bytes[usize::try_from(index).unwrap() * len..][..len]
}

#[test]
fn the_launch_follows_the_row() {
    let of = |grid, block| Geometry { grid, block };
    assert_eq!(Geometry::of_rows(256, row_units(150_528, 256)), of([256, 4], [256, 1]));
    assert_eq!(Geometry::of_rows(1024, row_units(4096, 256)), of([1024, 1], [256, 1]));
    assert_eq!(Geometry::of_rows(4095, row_units(784, 256)), of([1024, 1], [64, 4]));
    assert_eq!(Geometry::of_rows(1000, row_units(1, 256)), of([4, 1], [1, 256]));
    assert_eq!(row_units(24, 256), 3);
    assert_eq!(row_units(28, 256), 7);
    assert_eq!(row_units(32, 4), 8);
    assert_eq!(row_units(27, 256), 27);
    assert_eq!(converted_units(150_528, DType::F16), 18_816);
    assert_eq!(Geometry::of_elements(38_535_168, 132), of([528, 1], [256, 1]));
    assert_eq!(Geometry::of_elements(4097, 132), of([2, 1], [256, 1]));
}

#[test]
fn rows_of_any_length_at_any_address() {
    for row_bytes in [1, 2, 3, 4, 7, 12, 16, 24, 28, 784, 1001, 4096, 20_000] {
        for shift in [0, 1, 4, 8] {
            let source = Memory::of(&random(DType::U8, 31 * row_bytes), shift);
            for rows in [0, 1, 5, 40] {
                let indices = indices(rows, 31);
                let geometries = geometries(rows, row_units(row_bytes, 16 | shift as u64));
                let dear = row_bytes > 1001 && shift > 0;
                for &geometry in &geometries[..if dear { 1 } else { 4 }] {
                    let len = usize::try_from(rows * row_bytes).unwrap();
                    let mut target = Memory::new(len, shift);
                    gather_rows(geometry, source.bytes(), target.bytes_mut(), &indices, row_bytes);
                    for (at, &index) in (0..).zip(&indices) {
                        assert_eq!(
                            row(target.bytes(), at, row_bytes),
                            row(source.bytes(), index, row_bytes),
                            "row {at} of {row_bytes} bytes, {geometry:?}",
                        );
                    }
                    assert!(target.margins_are_untouched(), "{row_bytes} bytes, {geometry:?}");
                }
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
    let geometry = Geometry::of_rows(3, row_units(ROW, 256));
    gather_rows(geometry, &source, target.bytes_mut(), &indices, ROW);
    for (byte, row) in (1..).zip(target.bytes().chunks(784)) {
        assert!(row.iter().all(|&found| found == byte));
    }
    let spec = spec((DType::U8, DType::F32), (1, ROW, 1), (Nhwc, Nhwc), false);
    let mut target = Memory::new(3 * 784 * 4, 0);
    gather_convert(geometry, &source, target.bytes_mut(), &indices, &spec);
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
                        for geometry in geometries(rows, converted_units(one.elements, to)) {
                            let mut target = Memory::new(expected.len(), 0);
                            gather_convert(
                                geometry,
                                source.bytes(),
                                target.bytes_mut(),
                                &indices,
                                &one,
                            );
                            compare(&name, geometry, &target, &expected, &one);
                        }
                    }
                }
            }
        }
    }
    assert!(gathering(DType::F16, DType::F32).is_none());
}
