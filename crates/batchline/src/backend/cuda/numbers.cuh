// The ten element types as numbers, as ../host/convert/number.rs has them.

#pragma once

#include "device.cuh"

// The codes of element types: those of `DType` (../../dtype.rs).
enum : u32 {
    CODE_F32 = 0,
    CODE_F16 = 1,
    CODE_BF16 = 2,
    CODE_F64 = 3,
    CODE_I8 = 4,
    CODE_I16 = 5,
    CODE_I32 = 6,
    CODE_I64 = 7,
    CODE_U8 = 8,
    CODE_BOOL = 9,
};

namespace {

INLINE u32 bits_of(float x) { return __builtin_bit_cast(u32, x); }
INLINE u64 bits_of(double x) { return __builtin_bit_cast(u64, x); }
INLINE float float_of(u32 bits) { return __builtin_bit_cast(float, bits); }
INLINE double double_of(u64 bits) { return __builtin_bit_cast(double, bits); }

// Any NaN to the one that results have.
INLINE float canonical(float x) { return x != x ? float_of(0x7fc00000) : x; }

// bits / 2^places, to nearest, ties to even.
INLINE u32 round_off(u32 bits, u32 places) {
    return (bits + ((1u << (places - 1)) - 1 + (bits >> places & 1))) >> places;
}

#ifdef BATCHLINE_NATIVE
INLINE float flush_by_bits(float x) {
    u32 bits = bits_of(x);
    return float_of((bits & 0x7f800000) == 0 ? bits & 0x80000000 : bits);
}

INLINE float add_flushed(float a, float b) {
    return flush_by_bits(flush_by_bits(a) + flush_by_bits(b));
}

INLINE u32 half_of(float x) {
    u32 bits = bits_of(x), magnitude = bits & 0x7fffffff, sign = bits >> 16 & 0x8000;
    if (magnitude > 0x7f800000) return 0x7e00;
    // 2^16 and more.
    if (magnitude >= 0x47800000) return sign | 0x7c00;
    // Below 2^-14: the last place of 0.5 is 2^-24, so the sum is rounded to a multiple of that.
    if (magnitude < 0x38800000) return sign | (bits_of(float_of(magnitude) + 0.5f) - bits_of(0.5f));
    return sign | round_off(magnitude - (112 << 23), 13);
}

INLINE float float_of_half(u32 half) {
    u32 magnitude = half & 0x7fff, sign = (half & 0x8000) << 16;
    if (magnitude >= 0x7c00) return float_of(sign | 0x7f800000 | magnitude << 13);
    // Subnormal: a multiple of 2^-24.
    if (magnitude < 0x0400) return float_of(sign | bits_of((float)magnitude * float_of(103 << 23)));
    return float_of(sign | ((magnitude << 13) + (112 << 23)));
}
#else
// The sum, with subnormal numbers taken as zeros of the same sign, both operands and the result. A
// sum in the range of subnormals is exact, so it does not matter whether the result is looked at
// before it is rounded or after.
INLINE float add_flushed(float a, float b) { return __nvvm_add_rn_ftz_f(a, b); }

// To nearest, ties to even; subnormals are kept.
INLINE u32 half_of(float x) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return x != x ? 0x7e00 : half;
}

INLINE float float_of_half(u32 half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"((u16)half));
    return x;
}
#endif

// A zero of the same sign for a subnormal number.
INLINE float flush(float x) { return add_flushed(x, -0.0f); }

INLINE u32 bfloat_of(float x) { return x != x ? 0x7fc0 : round_off(bits_of(x), 16); }

// x and scale are flushed already. The product is rounded with gradual underflow and flushed as an
// operand of the sum. Nothing is fused: -ffp-contract=off. The result may be any NaN.
INLINE float affine(float x, float scale, float bias) { return add_flushed(x * scale, bias); }

// The element types of the specialised kernels. `read` makes the number of the element's bits,
// `write` makes the bits of the element nearest to a number.
struct F32 {
    static constexpr u32 size = 4;
    static constexpr bool may_be_subnormal = true;
    static INLINE float read(u32 bits) { return float_of(bits); }
    static INLINE u32 write(float x) { return bits_of(canonical(x)); }
};
struct F16 {
    static constexpr u32 size = 2;
    // As an f32, none of them is.
    static constexpr bool may_be_subnormal = false;
    static INLINE float read(u32 bits) { return float_of_half(bits); }
    static INLINE u32 write(float x) { return half_of(x); }
};
struct BF16 {
    static constexpr u32 size = 2;
    static INLINE u32 write(float x) { return bfloat_of(x); }
};
struct U8 {
    static constexpr u32 size = 1;
    static constexpr bool may_be_subnormal = false;
    static INLINE float read(u32 bits) { return (float)bits; }
};
struct I8 {
    static constexpr u32 size = 1;
    static constexpr bool may_be_subnormal = false;
    static INLINE float read(u32 bits) { return (float)(signed char)bits; }
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// ---- Any type -------------------------------------------------------------------------------

// The value of an element, without loss: an f64, or an i64 where that says more.
struct Value {
    bool integer;
    double number;
    i64 whole;
};

INLINE Value number(double x) { return {false, x, 0}; }

INLINE Value read_any(u32 code, u64 bits) {
    switch (code) {
    case CODE_F32: return number(float_of((u32)bits));
    case CODE_F16: return number(float_of_half((u32)bits));
    case CODE_BF16: return number(float_of((u32)bits << 16));
    case CODE_F64: return number(double_of(bits));
    case CODE_I8: return number((signed char)bits);
    case CODE_I16: return number((short)bits);
    case CODE_I32: return number((int)bits);
    case CODE_I64: return {true, 0, (i64)bits};
    case CODE_U8: return number((double)(u32)bits);
    default: return number(bits != 0 ? 1 : 0);
    }
}

// As an f32, rounded to odd: where it lies between two floats, the one whose last bit is set. That
// is no tie of a type with 22 bits or fewer, so rounding it to such a type rounds the value itself.
INLINE float odd(double x) {
    float near = (float)x;
    double back = near;
    u32 bits = bits_of(near);
    if (back == x || x != x || (bits & 1)) return near;
    // Also from infinity to the largest number.
    bool further = (back < 0 ? -back : back) > (x < 0 ? -x : x);
    return float_of(further ? bits - 1 : bits + 1);
}

// As an f64 if it fits, else a number between the same multiples of 2^11, which is rounded alike.
INLINE double sticky(i64 x) {
    const i64 fits = 1ll << 53;
    i64 rest = x & 0x7ff;
    return (x > -fits && x < fits) || rest == 0 ? (double)x : (double)(x - rest + 0x400);
}

INLINE float narrow(const Value &value) {
    return odd(value.integer ? sticky(value.whole) : value.number);
}

INLINE float nearest_float(const Value &value) {
    return canonical(value.integer ? (float)value.whole : (float)value.number);
}

INLINE i64 clamp(const Value &value, i64 least, i64 most) {
    if (value.integer) {
        return value.whole < least ? least : value.whole > most ? most : value.whole;
    }
    // From 2^52 on there is no fraction, so that the sum is a whole number; ties go to even.
    const double places = 4503599627370496.0;
    double x = value.number, magnitude = x < 0 ? -x : x;
    if (x != x) return 0;
    if (magnitude < places) {
        magnitude = (magnitude + places) - places;
        x = x < 0 ? -magnitude : magnitude;
    }
    // 2^63 is a number, the largest i64 is none.
    if (x >= 9223372036854775808.0) return most;
    if (x < -9223372036854775808.0) return least;
    i64 whole = (i64)x;
    return whole < least ? least : whole > most ? most : whole;
}

INLINE u64 write_any(u32 code, const Value &value) {
    switch (code) {
    case CODE_F32: return bits_of(nearest_float(value));
    case CODE_F16: return half_of(narrow(value));
    case CODE_BF16: return bfloat_of(narrow(value));
    case CODE_F64: {
        double x = value.integer ? (double)value.whole : value.number;
        return x != x ? 0x7ff8000000000000 : bits_of(x);
    }
    case CODE_I8: return (u64)clamp(value, -0x80, 0x7f);
    case CODE_I16: return (u64)clamp(value, -0x8000, 0x7fff);
    case CODE_I32: return (u64)clamp(value, -0x80000000ll, 0x7fffffff);
    case CODE_I64: return (u64)clamp(value, -0x7fffffffffffffffll - 1, 0x7fffffffffffffffll);
    case CODE_U8: return (u64)clamp(value, 0, 0xff);
    default: return value.integer ? value.whole != 0 : value.number != 0;
    }
}

} // namespace
