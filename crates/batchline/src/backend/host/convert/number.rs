//! The ten element types as numbers: what an element is worth, and which element is nearest.
//!
//! Each conversion rounds once. To see to that without a hundred functions, an element is first
//! read as the smallest of `f32`, `f64` and `i64` that holds it exactly ([`Number::Exact`]), and
//! each type says how it is made of those three.
//!
//! All of it is integer and float arithmetic without branches, so that the compiler can make
//! vector loops of it. That is why the 16-bit floats are done by hand; besides, `half` 2.7 converts
//! `f64` to `f16` by way of `f32` where the processor has F16C, and elsewhere without looking at
//! the lower 32 bits, which are both wrong near a tie.

use half::{bf16, f16};

/// An element type. `Bytes` is one element in memory, in the machine's order.
pub(super) trait Number {
    /// `[u8; size]`, so that elements need no alignment.
    type Bytes: bytemuck::Pod;
    /// The smallest of `f32`, `f64`, `i64` that holds each value.
    type Exact: Exact;

    /// What the element is worth.
    fn value(bytes: Self::Bytes) -> Self::Exact;

    /// The element nearest to the value, ties to even; integers saturate and make 0 of NaN.
    fn round_f32(value: f32) -> Self::Bytes;

    /// As [`Number::round_f32`]. This one is for types with 22 bits or fewer.
    #[inline(always)]
    fn round_f64(value: f64) -> Self::Bytes {
        Self::round_f32(odd(value))
    }

    /// As [`Number::round_f32`]. This one is for types with 42 bits or fewer.
    #[inline(always)]
    fn round_i64(value: i64) -> Self::Bytes {
        Self::round_f64(sticky(value))
    }
}

/// A value read from an element, without loss.
pub(super) trait Exact: Copy {
    /// The element of `N` that is nearest.
    fn round<N: Number>(self) -> N::Bytes;
}

impl Exact for f32 {
    fn round<N: Number>(self) -> N::Bytes {
        N::round_f32(self)
    }
}

impl Exact for f64 {
    fn round<N: Number>(self) -> N::Bytes {
        N::round_f64(self)
    }
}

impl Exact for i64 {
    fn round<N: Number>(self) -> N::Bytes {
        N::round_i64(self)
    }
}

macro_rules! integer {
    ($($int:ty => $exact:ty),* $(,)?) => {$(
        // Casts from floats saturate and make 0 of NaN; the others lose nothing.
        #[allow(clippy::cast_possible_truncation, reason = "clamped, or saturating")]
        impl Number for $int {
            type Bytes = [u8; size_of::<$int>()];
            type Exact = $exact;

            #[inline(always)]
            fn value(bytes: Self::Bytes) -> $exact {
                <$int>::from_ne_bytes(bytes) as $exact
            }

            #[inline(always)]
            fn round_f32(value: f32) -> Self::Bytes {
                Self::round_f64(f64::from(value))
            }

            #[inline(always)]
            fn round_f64(value: f64) -> Self::Bytes {
                (whole(value) as $int).to_ne_bytes()
            }

            #[inline(always)]
            fn round_i64(value: i64) -> Self::Bytes {
                (value.clamp(<$int>::MIN as i64, <$int>::MAX as i64) as $int).to_ne_bytes()
            }
        }
    )*};
}

integer! { i8 => f32, i16 => f32, u8 => f32, i32 => f64, i64 => i64 }

/// [`DType::Bool`](crate::DType::Bool).
pub(super) enum Bool {}

impl Number for Bool {
    type Bytes = [u8; 1];
    type Exact = f32;

    #[inline(always)]
    fn value(bytes: [u8; 1]) -> f32 {
        f32::from(u8::from(bytes[0] != 0))
    }

    // NaN is not equal to 0, and so becomes 1.
    #[inline(always)]
    fn round_f32(value: f32) -> [u8; 1] {
        [u8::from(value != 0.0)]
    }
}

impl Number for f32 {
    type Bytes = [u8; 4];
    type Exact = f32;

    #[inline(always)]
    fn value(bytes: [u8; 4]) -> f32 {
        f32::from_ne_bytes(bytes)
    }

    #[inline(always)]
    fn round_f32(value: f32) -> [u8; 4] {
        canonical(value).to_ne_bytes()
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "rounds to nearest, ties to even")]
    fn round_f64(value: f64) -> [u8; 4] {
        canonical(value as f32).to_ne_bytes()
    }
}

impl Number for f64 {
    type Bytes = [u8; 8];
    type Exact = f64;

    #[inline(always)]
    fn value(bytes: [u8; 8]) -> f64 {
        f64::from_ne_bytes(bytes)
    }

    #[inline(always)]
    fn round_f32(value: f32) -> [u8; 8] {
        Self::round_f64(f64::from(value))
    }

    #[inline(always)]
    fn round_f64(value: f64) -> [u8; 8] {
        let bits = if value.is_nan() { 0x7ff8_0000_0000_0000 } else { value.to_bits() };
        bits.to_ne_bytes()
    }

    #[inline(always)]
    fn round_i64(value: i64) -> [u8; 8] {
        // To nearest, ties to even.
        (value as f64).to_ne_bytes()
    }
}

impl Number for f16 {
    type Bytes = [u8; 2];
    type Exact = f32;

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        /// 2^-14, the smallest normal `f16`.
        const NORMAL: u32 = 113 << 23;
        let half = u32::from(u16::from_ne_bytes(bytes));
        let magnitude = half & 0x7fff;
        let shifted = magnitude << 13;
        let float = if magnitude >= 0x7c00 {
            // Infinity or NaN: all bits of the exponent are set in both.
            shifted | 0x7f80_0000
        } else if magnitude < 0x0400 {
            // Subnormal: the significand of a float in 2^-14..2^-13, less its implied 1. Exact.
            (f32::from_bits(NORMAL | shifted) - f32::from_bits(NORMAL)).to_bits()
        } else {
            shifted + ((127 - 15) << 23)
        };
        f32::from_bits(float | (half & 0x8000) << 16)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the upper half is zero")]
    fn round_f32(value: f32) -> [u8; 2] {
        /// 0.5, where the last place of a float is 2^-24, the smallest `f16`.
        const SUBNORMAL: u32 = 126 << 23;
        let bits = value.to_bits();
        let magnitude = bits & 0x7fff_ffff;
        let half = if magnitude >= 0x4780_0000 {
            // 2^16 and more, infinity, NaN.
            if magnitude > 0x7f80_0000 { 0x7e00 } else { 0x7c00 }
        } else if magnitude < 0x3880_0000 {
            // Below 2^-14: the addition rounds to a multiple of 2^-24, and leaves it in the lower
            // bits.
            let sum = f32::from_bits(magnitude) + f32::from_bits(SUBNORMAL);
            sum.to_bits() - SUBNORMAL
        } else {
            // A carry into the exponent is right, also that from the largest number to infinity.
            round_off(magnitude - ((127 - 15) << 23), 13)
        };
        // The canonical NaN has no sign.
        let sign = if magnitude > 0x7f80_0000 { 0 } else { bits >> 16 & 0x8000 };
        ((sign | half) as u16).to_ne_bytes()
    }
}

impl Number for bf16 {
    type Bytes = [u8; 2];
    type Exact = f32;

    #[inline(always)]
    fn value(bytes: [u8; 2]) -> f32 {
        f32::from_bits(u32::from(u16::from_ne_bytes(bytes)) << 16)
    }

    #[inline(always)]
    #[allow(clippy::cast_possible_truncation, reason = "the upper half is zero")]
    fn round_f32(value: f32) -> [u8; 2] {
        let bits = value.to_bits();
        let is_nan = bits & 0x7fff_ffff > 0x7f80_0000;
        // No overflow but for NaN, and then the result isn't used.
        let rounded = round_off(bits, 16);
        ((if is_nan { 0x7fc0 } else { rounded }) as u16).to_ne_bytes()
    }
}

/// Any NaN to the one that results have, whatever the processor makes of payloads.
#[inline(always)]
pub(super) fn canonical(value: f32) -> f32 {
    if value.is_nan() { f32::from_bits(0x7fc0_0000) } else { value }
}

/// `bits / 2^places`, to nearest, ties to even.
#[inline(always)]
fn round_off(bits: u32, places: u32) -> u32 {
    bits.wrapping_add((1 << (places - 1)) - 1 + (bits >> places & 1)) >> places
}

/// The nearest whole number, ties to even: from 2^52 on a float has no fraction, so that the sum is
/// rounded to a whole number. (`round_ties_even` is a call where the target has no SSE 4.1.)
#[inline(always)]
fn whole(value: f64) -> f64 {
    const LIMIT: f64 = 4_503_599_627_370_496.0;
    let magnitude = value.abs();
    if magnitude < LIMIT { ((magnitude + LIMIT) - LIMIT).copysign(value) } else { value }
}

/// The value as `f32`, rounded to odd: where it lies between two floats, the one whose last bit is
/// set. That is neither a number nor a tie of a type with 22 bits or fewer, so rounding it to such
/// a type is as if the value itself were rounded. (S. Boldo and G. Melquiond, "Emulation of FMA and
/// correctly rounded sums: proved algorithms using rounding to odd", IEEE Transactions on Computers
/// 57(4), 2008.)
#[inline(always)]
#[allow(clippy::cast_possible_truncation, reason = "what is lost is looked at")]
fn odd(value: f64) -> f32 {
    let near = value as f32;
    let (bits, back) = (near.to_bits(), f64::from(near));
    let exact = back == value || value.is_nan();
    if exact || bits & 1 == 1 {
        near
    } else if back.abs() > value.abs() {
        // Also from infinity to the largest number.
        f32::from_bits(bits - 1)
    } else {
        f32::from_bits(bits + 1)
    }
}

/// The value as `f64` if it fits, else a number between the same two multiples of 2^11, so that it
/// is rounded to the same element of a type with 42 bits or fewer.
#[inline(always)]
fn sticky(value: i64) -> f64 {
    let rest = value & 0x7ff;
    if value.unsigned_abs() < 1 << 53 || rest == 0 {
        value as f64
    } else {
        // 53 bits at most are set.
        (value - rest + 0x400) as f64
    }
}
