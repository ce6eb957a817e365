//! What becomes of each value.

use batchline::DType;
use batchline::backend::ChannelOrder;
use cuda_kernels_native::{Geometry, code};

use super::{bytes_of, check, plain, spec, words};

#[test]
fn codes_are_those_of_the_kernels() {
    // As kernels.cu has them.
    let names = ["f32", "f16", "bf16", "f64", "i8", "i16", "i32", "i64", "u8", "bool"];
    for (number, name) in (0..).zip(names) {
        assert_eq!(code(name.parse().unwrap()), number);
    }
    assert_eq!(DType::ALL.map(code), [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]);
}

/// The value of each 16-bit float, and the middle between it and the next, in `f64`.
fn narrow_floats() -> impl Iterator<Item = f64> {
    let halves = (0..=u16::MAX).map(|bits| {
        let value = |bits| half::f16::from_bits(bits).to_f64();
        (value(bits), value(bits.wrapping_add(1)))
    });
    let bfloats = (0..=u16::MAX).map(|bits| {
        let value = |bits| half::bf16::from_bits(bits).to_f64();
        (value(bits), value(bits.wrapping_add(1)))
    });
    halves.chain(bfloats).flat_map(|(value, next)| [value, f64::midpoint(value, next)])
}

/// Numbers at the bounds of integers, and halves between them.
fn about_integers() -> impl Iterator<Item = f64> {
    let centers = [0.0, 32_768.0, 8_388_608.0, 2_147_483_648.0, 4_503_599_627_370_496.0];
    let halves = centers.into_iter().flat_map(|center| {
        (-600..600).flat_map(move |i| [center, -center].map(|c| c + f64::from(i) / 2.0))
    });
    let huge = (-600..600).flat_map(|i| {
        [1.0, -1.0].map(|sign| sign * 9_223_372_036_854_775_808.0 + f64::from(i) * 1024.0)
    });
    halves.chain(huge)
}

/// In turn the value, the one below and the one above.
fn one_of_three(centers: impl Iterator<Item = u64>) -> impl Iterator<Item = u64> {
    centers.zip([0, u64::MAX, 1].into_iter().cycle()).map(|(center, by)| center.wrapping_add(by))
}

/// Elements at which conversions go wrong: all there are, or each that is at or next to a number or
/// a tie of another type, and random ones.
fn hard(from: DType) -> Vec<u8> {
    if from.size() <= 2 {
        return bytes_of(from, 0..1 << (8 * from.size()));
    }
    let random = words(3).take(20_000);
    // Of every magnitude.
    let random =
        random.flat_map(|word| [word, (word.cast_signed() >> (word % 64)).cast_unsigned()]);
    match from {
        DType::F32 => {
            #[allow(clippy::cast_possible_truncation, reason = "rounded")]
            let centers = narrow_floats()
                .step_by(3)
                .chain(about_integers())
                .map(|x| u64::from((x as f32).to_bits()));
            bytes_of(from, one_of_three(centers).chain(random))
        }
        DType::F64 => {
            // Floats, the ties between them, and where f32 ends.
            let floats = words(9).take(20_000).flat_map(|word| {
                let bits = u32::try_from(word >> 32).unwrap();
                let values =
                    [bits, bits.wrapping_add(1)].map(|bits| f64::from(f32::from_bits(bits)));
                [values[0], f64::midpoint(values[0], values[1])]
            });
            let ends = [f64::from(f32::MAX), 2f64.powi(128), 2f64.powi(-126), 2f64.powi(-150)];
            let centers = narrow_floats().step_by(7).chain(floats).chain(about_integers());
            let centers = centers.chain(ends).map(f64::to_bits);
            bytes_of(from, one_of_three(centers).chain(random))
        }
        _ => {
            let powers = (0..64).flat_map(|top| {
                (0..=top).flat_map(move |low| {
                    let set = 1u64 << top | 1 << low;
                    [set, set | 1 << low >> 1, (1 << top) - 1 + (1 << low), 1 << top >> low]
                })
            });
            let signed = powers.flat_map(|power| [power, power.wrapping_neg()]);
            bytes_of(from, one_of_three(signed).chain(random))
        }
    }
}

#[test]
fn all_pairs_round_alike() {
    for from in DType::ALL {
        let src = hard(from);
        let elements = (src.len() / from.size()) as u64;
        for to in DType::ALL {
            check(&src, &plain(from, to, elements), &[Geometry::of_elements(elements, 2)]);
        }
    }
}

#[test]
fn the_affine_map_is_the_same() {
    for from in DType::ALL {
        let mut src = hard(from);
        // Few elements meet each of the factors if there are few.
        while src.len() < 72 * 64 * from.size() {
            src.extend_from_within(..);
        }
        let elements = (src.len() / from.size() / 72 * 72) as u64;
        src.truncate(usize::try_from(elements).unwrap() * from.size());
        for to in DType::ALL {
            let orders = (ChannelOrder::Nhwc, ChannelOrder::Nhwc);
            let spec = spec((from, to), (72, elements / 72, 1), orders, true);
            check(&src, &spec, &[Geometry::of_elements(elements, 4)]);
        }
    }
}
