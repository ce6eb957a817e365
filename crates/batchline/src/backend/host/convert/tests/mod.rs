//! Against an oracle that shares no code with the kernels: exact integers, one rounding.

#![allow(clippy::cast_possible_truncation, reason = "bits are cut to size throughout")]

use std::sync::Arc;

use super::*;

/// A number as it is: `(-1)^negative * significand * 2^exponent`.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Value {
    Nan,
    Infinite { negative: bool },
    Finite { negative: bool, significand: u64, exponent: i32 },
}

/// Bits of the exponent and of the stored significand.
fn format(dtype: DType) -> Option<(u32, u32)> {
    match dtype {
        DType::F64 => Some((11, 52)),
        DType::F32 => Some((8, 23)),
        DType::BF16 => Some((8, 7)),
        DType::F16 => Some((5, 10)),
        _ => None,
    }
}

/// The range of an integer type.
fn range(dtype: DType) -> (i128, i128) {
    match dtype {
        DType::I8 => (-0x80, 0x7f),
        DType::I16 => (-0x8000, 0x7fff),
        DType::I32 => (-0x8000_0000, 0x7fff_ffff),
        DType::I64 => (i64::MIN.into(), i64::MAX.into()),
        DType::U8 => (0, 0xff),
        _ => unreachable!(),
    }
}

/// The element's bits, zero-extended.
fn bits_of(bytes: &[u8]) -> u64 {
    match *bytes {
        [a] => a.into(),
        [a, b] => u16::from_ne_bytes([a, b]).into(),
        [a, b, c, d] => u32::from_ne_bytes([a, b, c, d]).into(),
        _ => u64::from_ne_bytes(bytes.try_into().unwrap()),
    }
}

/// The lower bytes of `bits` as elements.
fn bytes_of(dtype: DType, bits: impl IntoIterator<Item = u64>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for bits in bits {
        match dtype.size() {
            1 => bytes.push(bits as u8),
            2 => bytes.extend((bits as u16).to_ne_bytes()),
            4 => bytes.extend((bits as u32).to_ne_bytes()),
            _ => bytes.extend(bits.to_ne_bytes()),
        }
    }
    bytes
}

fn decode(dtype: DType, bits: u64) -> Value {
    let Some((ebits, mbits)) = format(dtype) else {
        let width = 8 * dtype.size() as u32;
        let value = match dtype {
            DType::Bool => i64::from(bits != 0),
            DType::U8 => bits as i64,
            _ => (bits << (64 - width)) as i64 >> (64 - width),
        };
        let significand = value.unsigned_abs();
        return Value::Finite { negative: value < 0, significand, exponent: 0 };
    };
    let negative = bits >> (ebits + mbits) & 1 == 1;
    let fraction = bits & ((1 << mbits) - 1);
    let exponent = (bits >> mbits & ((1 << ebits) - 1)) as i32;
    let bias = (1 << (ebits - 1)) - 1;
    if exponent == (1 << ebits) - 1 {
        return if fraction == 0 { Value::Infinite { negative } } else { Value::Nan };
    }
    let significand = if exponent == 0 { fraction } else { fraction | 1 << mbits };
    Value::Finite { negative, significand, exponent: exponent.max(1) - bias - mbits as i32 }
}

/// `significand * 2^exponent` in units of `2^unit`, to nearest, ties to even. None: 2^127 or more.
fn units(significand: u64, exponent: i32, unit: i32) -> Option<u128> {
    let wide = u128::from(significand);
    let shift = exponent - unit;
    if wide == 0 {
        return Some(0);
    }
    if shift >= 0 {
        return (shift as u32 + 1 < wide.leading_zeros()).then(|| wide << shift);
    }
    let shift = -shift as u32;
    if shift > 66 {
        return Some(0);
    }
    let (whole, rest, half) = (wide >> shift, wide & ((1 << shift) - 1), 1 << (shift - 1));
    Some(whole + u128::from(rest > half || rest == half && whole & 1 == 1))
}

fn encode(dtype: DType, value: Value) -> u64 {
    if dtype == DType::Bool {
        return u64::from(!matches!(value, Value::Finite { significand: 0, .. }));
    }
    let Some((ebits, mbits)) = format(dtype) else {
        let (low, high) = range(dtype);
        let clamped = match value {
            Value::Nan => 0,
            Value::Infinite { negative } => {
                if negative {
                    low
                } else {
                    high
                }
            }
            Value::Finite { negative, significand, exponent } => {
                let whole = units(significand, exponent, 0).map_or(i128::MAX, |u| u as i128);
                (if negative { -whole } else { whole }).clamp(low, high)
            }
        };
        return clamped as u64 & (u64::MAX >> (64 - 8 * dtype.size() as u32));
    };
    let infinity = ((1u64 << ebits) - 1) << mbits;
    let sign = |negative: bool| u64::from(negative) << (ebits + mbits);
    match value {
        Value::Nan => infinity | 1 << (mbits - 1),
        Value::Infinite { negative } => sign(negative) | infinity,
        Value::Finite { negative, significand, exponent } => {
            let bias = (1 << (ebits - 1)) - 1;
            let least = 1 - bias - mbits as i32;
            // The place of the last bit: that of the subnormals, or further up.
            let top = exponent + 63 - significand.leading_zeros() as i32;
            let unit = if significand == 0 { least } else { least.max(top - mbits as i32) };
            let units = units(significand, exponent, unit).expect("few bits") as u64;
            // With the implied bit, if any, added to the exponent's field; so is a carry.
            let bits = ((unit - least) as u64 * (1 << mbits)) + units;
            sign(negative) | bits.min(infinity)
        }
    }
}

fn is_subnormal(bits: u64) -> bool {
    bits & 0x7f80_0000 == 0
}

fn flushed(bits: u64) -> f64 {
    let bits = if is_subnormal(bits) { bits & 0x8000_0000 } else { bits };
    f64::from(f32::from_bits(bits as u32))
}

/// The element by the definition. Sums and products of `f32` may be rounded by way of `f64`: it
/// has more than twice the bits.
fn expected(spec: &ConvertSpec, index: u64, bits: u64) -> u64 {
    if !spec.is_affine() {
        return if spec.from == spec.to { bits } else { encode(spec.to, decode(spec.from, bits)) };
    }
    let round = |x: f64| encode(DType::F32, decode(DType::F64, x.to_bits()));
    let c = spec.channel_of(index) as usize;
    let factor = |list: &[f32]| flushed(list[c].to_bits().into());
    let x = flushed(encode(DType::F32, decode(spec.from, bits)));
    let p = flushed(round(x * factor(&spec.scale)));
    let s = flushed(round(p + factor(&spec.bias)));
    encode(spec.to, decode(DType::F64, s.to_bits()))
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

/// Converts the elements and compares each with the oracle.
fn check(spec: &ConvertSpec, src: &[u8]) {
    let (from, to) = (spec.from.size(), spec.to.size());
    assert_eq!(src.len(), length(spec.elements) * from);
    // One byte more in front: elements need no alignment.
    let mut dst = vec![0xa5; src.len() / from * to + 1];
    let odd = [&[0], src].concat();
    convert(&odd[1..], &mut dst[1..], spec);
    for (i, found) in dst[1..].chunks_exact(to).enumerate() {
        let source = spec.source_index(i as u64);
        let bits = bits_of(&src[length(source) * from..][..from]);
        let (expected, found) = (expected(spec, source, bits), bits_of(found));
        assert_eq!(
            found, expected,
            "{bits:#x} of {} became {found:#x}, not {expected:#x} of {}: {spec:?}",
            spec.from, spec.to,
        );
    }
}

fn check_plain(from: DType, to: DType, bits: &[u64]) {
    check(&plain(from, to, bits.len() as u64), &bytes_of(from, bits.iter().copied()));
}

/// A fixed sequence of random-looking words.
fn words(seed: u64) -> impl Iterator<Item = u64> {
    (1..).map(move |i: u64| {
        let x = (seed ^ i.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ x >> 29).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ x >> 32
    })
}

/// Elements of `from` where conversions go wrong: each number near a boundary of another type (a
/// number of it, a tie between two, a bound, a power of two) and both its neighbours.
fn hard(from: DType) -> Vec<u64> {
    if from.size() <= 2 {
        return (0..1 << (8 * from.size())).collect();
    }
    let mut bits = Vec::new();
    let mut near = |center: u64| {
        bits.extend([center.wrapping_sub(1), center, center.wrapping_add(1)]);
    };
    if let Some((ebits, mbits)) = format(from) {
        let sign = 1u64 << (ebits + mbits);
        // Every exponent, with significands at which the narrower types have numbers and ties.
        let middle = 1u64 << (ebits - 1);
        for exponent in 0..1u64 << ebits {
            // Far out only f64 has numbers, and it is enough to look at some.
            if exponent.abs_diff(middle) > 160 && exponent % 32 > 0 && exponent != 2 * middle - 1 {
                continue;
            }
            for kept in [0, 7, 8, 10, 11, 23, 24, 31, 32] {
                let Some(last) = mbits.checked_sub(kept) else { continue };
                let end = 1u64 << kept;
                for fraction in [0, 1, 2, 3, end.saturating_sub(2), end - 1, end >> 1] {
                    let fraction = (fraction << last) & ((1 << mbits) - 1);
                    near(exponent << mbits | fraction);
                    near(sign | exponent << mbits | fraction);
                }
            }
        }
        // Halves, and the bounds of integers, of which some have no room for a half.
        let encoded = |x: f64| encode(from, decode(DType::F64, x.to_bits()));
        for i in -600..600 {
            near(encoded(f64::from(i) / 2.0));
            near(encoded(f64::from(i) / 2.0 + 32_768.0));
            near(encoded(f64::from(i) / 2.0 - 32_768.0));
            near(encoded(f64::from(i) / 2.0 + 2_147_483_648.0));
            near(encoded(f64::from(i) / 2.0 - 2_147_483_648.0));
            near(encoded(f64::from(i) / 2.0 + 8_388_608.0));
            near(encoded(f64::from(i) / 2.0 + 4_503_599_627_370_496.0));
            near(encoded(f64::from(i) * 1024.0 + 9_223_372_036_854_775_808.0));
            near(encoded(f64::from(i) * 1024.0 - 9_223_372_036_854_775_808.0));
        }
    } else {
        for top in 0..64 {
            for low in 0..=top {
                for base in [1u64 << top | 1 << low, (1 << top) - 1 + (1 << low), 1 << top >> low] {
                    near(base);
                    near(base.wrapping_neg());
                }
                near(1 << top | 1 << low | 1 << low >> 1);
                near((1u64 << top | 3 << low >> 1).wrapping_neg());
            }
        }
    }
    bits.extend(words(from.size() as u64).take(5000));
    // Random words are huge as integers: some of every magnitude.
    bits.extend(words(7).take(5000).map(|word| (word as i64 >> (word % 64)) as u64));
    bits
}

#[test]
fn all_pairs_round_the_exact_value_once() {
    for from in DType::ALL {
        let bits = hard(from);
        for to in DType::ALL {
            check_plain(from, to, &bits);
        }
    }
}

/// What the oracle itself is checked by: results known from elsewhere.
#[test]
fn known_results() {
    let one = |from: DType, to: DType, bits| {
        let mut dst = vec![0; to.size()];
        convert(&bytes_of(from, [bits]), &mut dst, &plain(from, to, 1));
        bits_of(&dst)
    };
    use DType::*;
    let from_f64 = |to, x: f64| one(F64, to, x.to_bits());
    let from_f32 = |to, x: f32| one(F32, to, x.to_bits().into());
    let from_i64 = |to, x: i64| one(I64, to, x as u64);

    // The tie between 1 and the next f16, and just above: less than an f32 can tell.
    let tie = 1.0 + 2f64.powi(-11);
    assert_eq!(from_f64(F16, tie), 0x3c00);
    assert_eq!(from_f64(F16, tie + f64::EPSILON), 0x3c01);
    assert_eq!(from_f64(F16, -tie - f64::EPSILON), 0xbc01);
    assert_eq!(from_f64(F16, 2f64.powi(-25)), 0);
    assert_eq!(from_f64(F16, 2f64.powi(-25) * (1.0 + f64::EPSILON)), 1);
    assert_eq!(from_f64(F16, 65_519.999_999_999_99), 0x7bff);
    assert_eq!(from_f64(F16, 65520.0), 0x7c00);
    assert_eq!(from_f64(BF16, 1.0 + 2f64.powi(-8)), 0x3f80);
    assert_eq!(from_f64(BF16, 1.0 + 2f64.powi(-8) + f64::EPSILON), 0x3f81);
    assert_eq!(from_f64(BF16, 2f64.powi(-134)), 0);
    assert_eq!(from_f64(BF16, 2f64.powi(-134) * (1.0 + f64::EPSILON)), 1);
    assert_eq!(from_f64(F32, 1e300), 0x7f80_0000);
    assert_eq!(from_f64(F32, -1e-300), 0x8000_0000);
    assert_eq!(from_f64(F16, -f64::INFINITY), 0xfc00);

    assert_eq!(from_f32(U8, 0.5), 0);
    assert_eq!(from_f32(U8, 1.5), 2);
    assert_eq!(from_f32(U8, 254.5), 254);
    assert_eq!(from_f32(U8, 255.5), 255);
    assert_eq!(from_f32(U8, -1.0), 0);
    assert_eq!(from_f32(I8, -128.6), 0x80);
    assert_eq!(from_f32(I32, 2_147_483_648.0), 0x7fff_ffff);
    assert_eq!(from_f32(I64, f32::INFINITY), 0x7fff_ffff_ffff_ffff);
    assert_eq!(from_f64(I64, -2.5), -2i64 as u64);
    assert_eq!(from_f64(I32, 2_147_483_647.5), 0x7fff_ffff);
    assert_eq!(from_f64(I32, -2_147_483_649.0), 0x8000_0000);
    for to in [I8, I16, I32, I64, U8] {
        assert_eq!(from_f32(to, -f32::NAN), 0);
        assert_eq!(from_f64(to, f64::NAN), 0);
    }

    // By way of f64 this would be the tie, and go down to even.
    assert_eq!(from_i64(F32, (1 << 62) + (1 << 38) + 1), u64::from(2f32.powi(62).to_bits()) + 1);
    assert_eq!(from_i64(F32, (1 << 53) + 1), u64::from(2f32.powi(53).to_bits()));
    assert_eq!(from_i64(F64, (1 << 53) + 1), 2f64.powi(53).to_bits());
    assert_eq!(from_i64(F64, (1 << 53) + 3), 2f64.powi(53).to_bits() + 2);
    assert_eq!(from_i64(BF16, (1 << 62) + (1 << 54) + 1), 0x5e81);
    assert_eq!(from_i64(BF16, -(1 << 62) - (1 << 54)), 0xde80);
    assert_eq!(from_i64(F16, i64::MIN), 0xfc00);
    assert_eq!(one(I32, F32, 0x7fff_ffff), u64::from(2f32.powi(31).to_bits()));

    assert_eq!(from_f32(Bool, -0.0), 0);
    assert_eq!(from_f32(Bool, f32::from_bits(1)), 1);
    assert_eq!(from_f64(Bool, f64::NAN), 1);
    assert_eq!(one(Bool, I8, 0xff), 1);
    assert_eq!(one(Bool, Bool, 0xff), 0xff);
    assert_eq!(from_f32(F64, -f32::NAN), 0x7ff8_0000_0000_0000);
    assert_eq!(from_f64(F32, -f64::NAN), 0x7fc0_0000);
    assert_eq!(from_f64(F16, -f64::NAN), 0x7e00);
    assert_eq!(one(F32, BF16, 0xff80_0001), 0x7fc0);
    // Not canonical: nothing was converted.
    assert_eq!(one(F32, F32, 0xff80_0001), 0xff80_0001);
}

/// One `f32` in so many, spread over all of them, against the oracle. With
/// `BATCHLINE_EVERY_F32=1` and a release build, every one: that takes minutes.
#[test]
fn f32_all_over() {
    let step = if std::env::var_os("BATCHLINE_EVERY_F32").is_some() { 1 } else { 65_521 };
    for to in [DType::F16, DType::BF16, DType::I16] {
        for top in 0..1u64 << 12 {
            let bits: Vec<u64> = ((top << 20).next_multiple_of(step)..(top + 1) << 20)
                .step_by(step as usize)
                .collect();
            check_plain(DType::F32, to, &bits);
        }
    }
}

/// Factors and summands that pass through all ranges, zeros, subnormals and what isn't finite.
fn factors(channels: u64) -> (Arc<[f32]>, Arc<[f32]>) {
    let scale = [0.017_124_753, 1.0, -3.5, 1e-40, f32::MIN_POSITIVE, 0.0, 1e38, f32::INFINITY];
    let bias = [-2.117_904, 0.0, -0.0, f32::MIN_POSITIVE, 1e-40, -1e-38, f32::NAN, 0.5, 1e38];
    let entries = channels as usize;
    (
        scale.into_iter().cycle().take(entries).collect(),
        bias.into_iter().cycle().take(entries).collect(),
    )
}

#[test]
fn the_affine_map_rounds_and_flushes_at_each_step() {
    for from in DType::ALL {
        let mut bits = hard(from);
        // Enough, as the channels differ.
        let step = bits.len().div_ceil(6000) | 1;
        bits = bits.into_iter().step_by(step).collect();
        bits.truncate(bits.len() / 72 * 72);
        for to in DType::ALL {
            let mut spec = plain(from, to, bits.len() as u64);
            spec.channels = 72;
            (spec.scale, spec.bias) = factors(72);
            check(&spec, &bytes_of(from, bits.iter().copied()));
        }
    }
}

#[test]
fn flushing_looks_at_the_rounded_number() {
    let mut spec = plain(DType::F32, DType::F32, 4);
    spec.scale = [0.5].into();
    spec.bias = [0.0].into();
    let least = f32::MIN_POSITIVE;
    // 2^-126 (2 - 2^-23) / 2 rounds up to 2^-126, which is not flushed.
    let src = [least * (2.0 - f32::EPSILON), least * 1.5, -least, -least * 2.0];
    let mut dst = [f32::NAN; 4];
    convert(bytemuck::cast_slice(&src), bytemuck::cast_slice_mut(&mut dst), &spec);
    assert_eq!(dst, [least, 0.0, 0.0, -least]);
    // A zero product keeps its sign, but a sum with +0 does not.
    assert!(dst[2].is_sign_positive());
    spec.bias = [-0.0].into();
    convert(bytemuck::cast_slice(&src), bytemuck::cast_slice_mut(&mut dst), &spec);
    assert!(dst[2] == 0.0 && dst[2].is_sign_negative());
}

#[test]
fn layouts_and_channels() {
    use ChannelOrder::{Nchw, Nhwc};
    let shapes = [
        (1, 1, 5),
        (3, 1, 700),
        (1, 50, 40),
        (3, 49, 3),
        (3, 5000, 1),
        (2, 1025, 1),
        (16, 600, 2),
        (64, 900, 1),
        (1500, 2, 2),
        (2, 513, 2),
        (33, 31, 3),
        (70, 90, 1),
        (1100, 1030, 1),
    ];
    for (channels, pixels, images) in shapes {
        for (source_order, target_order) in [(Nhwc, Nhwc), (Nhwc, Nchw), (Nchw, Nhwc), (Nchw, Nchw)]
        {
            let elements = channels * pixels * images;
            let large = elements > 100_000;
            for (from, to) in [
                (DType::U8, DType::F32),
                (DType::F32, DType::F16),
                (DType::F64, DType::F64),
                (DType::BF16, DType::BF16),
                (DType::U8, DType::I8),
                (DType::I8, DType::F16),
                (DType::Bool, DType::F64),
                (DType::I16, DType::I64),
            ] {
                for affine in [false, true] {
                    if large && (from != DType::U8 || affine) {
                        continue;
                    }
                    let mut spec = plain(from, to, elements);
                    (spec.channels, spec.pixels) = (channels, pixels);
                    (spec.source_order, spec.target_order) = (source_order, target_order);
                    if affine {
                        (spec.scale, spec.bias) = factors(channels);
                    }
                    check(&spec, &bytes_of(from, words(3).take(length(elements))));
                }
            }
        }
    }
}

#[test]
fn all_pairs_with_map_and_layout() {
    for from in DType::ALL {
        for to in DType::ALL {
            let mut spec = plain(from, to, 2 * 5 * 77);
            (spec.channels, spec.pixels) = (5, 77);
            spec.target_order = ChannelOrder::Nchw;
            (spec.scale, spec.bias) = factors(5);
            check(&spec, &bytes_of(from, words(5).take(770)));
            (spec.source_order, spec.target_order) = (spec.target_order, spec.source_order);
            check(&spec, &bytes_of(from, words(5).take(770)));
        }
    }
}

#[test]
fn nothing_to_convert() {
    let mut spec = plain(DType::U8, DType::F32, 0);
    convert(&[], &mut [], &spec);
    (spec.channels, spec.pixels) = (3, 4);
    spec.target_order = ChannelOrder::Nchw;
    (spec.scale, spec.bias) = factors(3);
    convert(&[], &mut [], &spec);
    (spec.channels, spec.pixels) = (0, 0);
    (spec.scale, spec.bias) = factors(0);
    convert(&[], &mut [], &spec);
}
