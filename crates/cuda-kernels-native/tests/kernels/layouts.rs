//! Where elements go, and which factors they get.

use batchline::DType;
use batchline::backend::ChannelOrder::{self, Nchw, Nhwc};
use batchline::backend::ConvertSpec;
use cuda_kernels_native::{Geometry, convert, convert_specialised, specialised};

use super::{Memory, UNTOUCHED, check, check_at, compare, expected, plain, random, spec};

const ORDERS: [(ChannelOrder, ChannelOrder); 4] =
    [(Nhwc, Nhwc), (Nhwc, Nchw), (Nchw, Nhwc), (Nchw, Nchw)];

/// One thread; few that are no power of two; more than there is work for.
fn geometries(elements: u64) -> [Geometry; 4] {
    let of = |blocks, threads| Geometry { grid: [blocks, 1], block: [threads, 1] };
    [Geometry::of_elements(elements, 1), of(1, 1), of(3, 7), of(5, 96)]
}

fn pairs() -> impl Iterator<Item = (DType, DType)> {
    DType::ALL.into_iter().flat_map(|from| DType::ALL.map(|to| (from, to)))
}

#[test]
fn all_pairs_in_all_orders() {
    for pair in pairs() {
        for orders in ORDERS {
            for affine in [false, true] {
                for shape in [(3, 17, 3), (5, 8, 2)] {
                    let spec = spec(pair, shape, orders, affine);
                    let src = random(pair.0, spec.elements);
                    check(&src, &spec, &geometries(spec.elements)[..3]);
                }
            }
        }
    }
}

/// Channels, pixels, images: one and many of each; whole groups of 4 and of 8 pixels, and not.
const SHAPES: [(u64, u64, u64); 16] = [
    (1, 1, 1),
    (1, 1, 77),
    (1, 50, 4),
    (2, 513, 2),
    (3, 1, 70),
    (3, 2, 9),
    (3, 20, 5),
    (3, 49, 3),
    (3, 64, 3),
    (3, 1024, 2),
    (4, 24, 2),
    (7, 16, 3),
    (33, 31, 2),
    (70, 9, 2),
    (600, 8, 1),
    (1500, 2, 2),
];

#[test]
fn specialised_kernels_in_all_shapes() {
    let pairs: Vec<_> = pairs().filter(|&(from, to)| specialised(from, to).is_some()).collect();
    assert_eq!(pairs.len(), 12);
    for pair in pairs {
        for orders in ORDERS {
            for affine in [false, true] {
                for shape in SHAPES {
                    let spec = spec(pair, shape, orders, affine);
                    let src = random(pair.0, spec.elements);
                    check(&src, &spec, &geometries(spec.elements));
                }
            }
        }
    }
}

#[test]
fn any_kernel_in_all_shapes() {
    for pair in [(DType::I16, DType::I64), (DType::BF16, DType::BF16), (DType::F64, DType::Bool)] {
        for orders in ORDERS {
            for shape in SHAPES {
                let spec = spec(pair, shape, orders, true);
                check(&random(pair.0, spec.elements), &spec, &geometries(spec.elements));
            }
        }
    }
}

#[test]
fn every_length() {
    for from in [DType::U8, DType::F16, DType::F32] {
        for to in [DType::F32, DType::F16, DType::BF16] {
            for elements in (1..100).chain([4095, 4096, 4097, 20_011]) {
                let spec = plain(from, to, elements);
                check(&random(from, elements), &spec, &geometries(elements)[..3]);
            }
        }
    }
}

#[test]
fn addresses_that_are_multiples_of_their_element_alone() {
    for (from, to) in [(DType::U8, DType::F16), (DType::F16, DType::F32), (DType::F32, DType::F32)]
    {
        let shift = from.size().max(to.size());
        for orders in ORDERS {
            let spec = spec((from, to), (3, 64, 3), orders, true);
            check_at(&random(from, spec.elements), &spec, &geometries(spec.elements), shift);
        }
    }
}

#[test]
fn the_most_channels_that_there_may_be() {
    for orders in &ORDERS[..2] {
        let spec = spec((DType::U8, DType::BF16), (1 << 20, 2, 1), *orders, true);
        let src = random(DType::U8, spec.elements);
        check(&src, &spec, &[Geometry::of_elements(spec.elements, 2)]);
    }
}

#[test]
fn nothing_to_convert_is_no_access() {
    for pair in [(DType::U8, DType::F32), (DType::I64, DType::F64)] {
        for orders in ORDERS {
            let mut spec = spec(pair, (3, 4, 0), orders, true);
            spec.elements = 0;
            check(&[], &spec, &geometries(0));
        }
    }
}

/// A length that ends in the middle of an image: in another order only whole images are made, in
/// the same one every element.
#[test]
fn part_of_an_image() {
    let pair = (DType::U8, DType::F32);
    for orders in ORDERS {
        let whole = spec(pair, (3, 16, 3), orders, true);
        let src = random(pair.0, whole.elements);
        let all = expected(&src, &whole);
        let cut = ConvertSpec { elements: whole.elements - 5, ..whole.clone() };
        let kept = if orders.0 == orders.1 { cut.elements } else { 2 * 48 };
        let mut wanted = all[..usize::try_from(kept).unwrap() * 4].to_vec();
        wanted.resize(usize::try_from(cut.elements).unwrap() * 4, UNTOUCHED);
        for geometry in geometries(cut.elements) {
            for run in [convert, convert_specialised] {
                let source = Memory::of(&src[..src.len() - 5], 0);
                let mut target = Memory::new(wanted.len(), 0);
                run(geometry, source.bytes(), target.bytes_mut(), &cut);
                compare("a kernel", geometry, &target, &wanted, &cut);
            }
        }
    }
}
