// Conversion between element types and layouts, bit for bit as the host's kernel does it
// (backend/host/convert.rs, which defines it).
//
// WGSL has neither narrow nor 64-bit types, and lets a device flush subnormals, fuse a product
// with a sum, and ignore NaN and infinity. So numbers are taken apart and put together as integers.
// Floating-point hardware is used for one product and one sum only, of operands for which all
// devices agree: finite, not zero, normal, and with a product that is far from underflow.
//
// A thread makes one word of the target, or two for a type of 8 bytes.

// Element types, in the order of `DType::ALL`.
const F32: u32 = 0u;
const F16: u32 = 1u;
const BF16: u32 = 2u;
const F64: u32 = 3u;
const I8: u32 = 4u;
const I16: u32 = 5u;
const I32: u32 = 6u;
const I64: u32 = 7u;
const U8: u32 = 8u;
const BOOL: u32 = 9u;

override FROM: u32;
override TO: u32;
// Whether scale and bias are applied.
override AFFINE: bool;
// Whether the channels move: to channels-first, unless they come from there.
override RELAYOUT: bool;
override SOURCE_NCHW: bool;

// 0: elements, 1: threads, 2: first word of the source, 3: first word of the target, 4: channels,
// 5: pixels, 6: place of the first element in its image, 7: zero; from 8: scales, then biases.
@group(0) @binding(0) var<storage, read> params: array<u32>;
@group(0) @binding(1) var<storage, SOURCE_ACCESS> src: array<u32>;
@group(0) @binding(2) var<storage, read_write> dst: array<u32>;

// ---- Pairs of words as 64-bit integers: x is the upper half.

fn shift_left(m: vec2<u32>, n: u32) -> vec2<u32> {
    if n == 0u {
        return m;
    }
    if n >= 32u {
        return vec2(m.y << (n - 32u), 0u);
    }
    return vec2((m.x << n) | (m.y >> (32u - n)), m.y << n);
}

fn shift_right(m: vec2<u32>, n: u32) -> vec2<u32> {
    if n == 0u {
        return m;
    }
    if n >= 32u {
        return vec2(0u, m.x >> (n - 32u));
    }
    return vec2(m.x >> n, (m.y >> n) | (m.x << (32u - n)));
}

fn negate(m: vec2<u32>) -> vec2<u32> {
    let low = ~m.y + 1u;
    return vec2(~m.x + select(0u, 1u, low == 0u), low);
}

// m / 2^n, rounded to nearest, ties to even.
fn round_off(m: vec2<u32>, n: u32) -> vec2<u32> {
    if n == 0u {
        return m;
    }
    if n > 64u {
        return vec2(0u, 0u);
    }
    // What is cut off, with the half at the top bit.
    var rest = m;
    var kept = vec2(0u, 0u);
    if n < 64u {
        rest = shift_left(m, 64u - n);
        kept = shift_right(m, n);
    }
    let more = (rest.x & 0x7fffffffu) != 0u || rest.y != 0u || (kept.y & 1u) != 0u;
    if (rest.x >> 31u) != 0u && more {
        kept.y += 1u;
        kept.x += select(0u, 1u, kept.y == 0u);
    }
    return kept;
}

// ---- Numbers taken apart.

const ZERO: u32 = 0u;
const FINITE: u32 = 1u;
const INFINITE: u32 = 2u;
const NAN: u32 = 3u;

struct Number {
    kind: u32,
    // 1 if it is negative, else 0.
    sign: u32,
    // A finite number is mantissa · 2^(exponent - 63), with the mantissa's top bit set.
    exponent: i32,
    mantissa: vec2<u32>,
}

fn finite(sign: u32, exponent: i32, mantissa: vec2<u32>) -> Number {
    var zeros = countLeadingZeros(mantissa.x);
    if mantissa.x == 0u {
        zeros = 32u + countLeadingZeros(mantissa.y);
    }
    if zeros == 64u {
        return Number(ZERO, sign, 0, vec2(0u, 0u));
    }
    return Number(FINITE, sign, exponent - i32(zeros), shift_left(mantissa, zeros));
}

fn take_f32(bits: u32) -> Number {
    let sign = bits >> 31u;
    let field = (bits >> 23u) & 0xffu;
    let fraction = bits & 0x7fffffu;
    if field == 0xffu {
        return Number(select(NAN, INFINITE, fraction == 0u), sign, 0, vec2(0u, 0u));
    }
    let hidden = select(0x800000u, 0u, field == 0u);
    return finite(sign, i32(max(field, 1u)) - 127, vec2((fraction | hidden) << 8u, 0u));
}

fn take_f64(bits: vec2<u32>) -> Number {
    let sign = bits.x >> 31u;
    let field = (bits.x >> 20u) & 0x7ffu;
    let fraction = vec2(bits.x & 0xfffffu, bits.y);
    if field == 0x7ffu {
        let kind = select(NAN, INFINITE, (fraction.x | fraction.y) == 0u);
        return Number(kind, sign, 0, vec2(0u, 0u));
    }
    let hidden = select(0x100000u, 0u, field == 0u);
    let mantissa = shift_left(vec2(fraction.x | hidden, fraction.y), 11u);
    return finite(sign, i32(max(field, 1u)) - 1023, mantissa);
}

fn take_i64(value: vec2<u32>) -> Number {
    let sign = value.x >> 31u;
    if sign == 1u {
        return finite(1u, 63, negate(value));
    }
    return finite(0u, 63, value);
}

// ---- Numbers put together.

// A float of `digits` binary digits (with the hidden one) whose smallest normal number is
// 2^least and whose exponent field is `top` for infinity. Without its sign.
fn put_float(n: Number, digits: u32, least: i32, top: u32) -> vec2<u32> {
    let infinity = shift_left(vec2(0u, top), digits - 1u);
    if n.kind == ZERO {
        return vec2(0u, 0u);
    }
    if n.kind == INFINITE {
        return infinity;
    }
    if n.kind == NAN {
        return infinity | shift_left(vec2(0u, 1u), digits - 2u);
    }
    let field = max(n.exponent - least, 0);
    if field + 1 >= i32(top) {
        return infinity;
    }
    let kept = round_off(n.mantissa, 64u - digits + u32(max(least - n.exponent, 0)));
    // The hidden digit, where there is one, counts the field up; so does a carry, to infinity too.
    let start = shift_left(vec2(0u, u32(field)), digits - 1u);
    let low = start.y + kept.y;
    return vec2(start.x + kept.x + select(0u, 1u, low < kept.y), low);
}

fn sign_of(n: Number) -> u32 {
    return select(n.sign, 0u, n.kind == NAN);
}

fn put_f32(n: Number) -> u32 {
    return put_float(n, 24u, -126, 0xffu).y | (sign_of(n) << 31u);
}

// An integer of `bits` bits with a sign, saturated.
fn put_signed(n: Number, bits: u32) -> vec2<u32> {
    // The magnitude of the smallest number, and the largest one.
    let least = shift_left(vec2(0u, 1u), bits - 1u);
    let most = vec2(least.x - select(0u, 1u, least.y == 0u), least.y - 1u);
    if n.kind == ZERO || n.kind == NAN {
        return vec2(0u, 0u);
    }
    var size = vec2(0xffffffffu, 0xffffffffu);
    if n.kind == FINITE && n.exponent < 63 {
        size = round_off(n.mantissa, u32(63 - n.exponent));
    }
    if n.sign == 1u {
        let fits = size.x < least.x || (size.x == least.x && size.y <= least.y);
        return negate(select(least, size, fits));
    }
    let fits = size.x < most.x || (size.x == most.x && size.y <= most.y);
    return select(most, size, fits);
}

fn put_u8(n: Number) -> u32 {
    if n.kind == ZERO || n.kind == NAN || n.sign == 1u {
        return 0u;
    }
    if n.kind == INFINITE || n.exponent > 7 {
        return 255u;
    }
    return min(round_off(n.mantissa, u32(63 - n.exponent)).y, 255u);
}

fn put(n: Number) -> vec2<u32> {
    if TO == F32 {
        return vec2(0u, put_f32(n));
    }
    if TO == F16 {
        return vec2(0u, put_float(n, 11u, -14, 0x1fu).y | (sign_of(n) << 15u));
    }
    if TO == BF16 {
        return vec2(0u, put_float(n, 8u, -126, 0xffu).y | (sign_of(n) << 15u));
    }
    if TO == F64 {
        return put_float(n, 53u, -1022, 0x7ffu) | vec2(sign_of(n) << 31u, 0u);
    }
    if TO == I8 {
        return vec2(0u, put_signed(n, 8u).y & 0xffu);
    }
    if TO == I16 {
        return vec2(0u, put_signed(n, 16u).y & 0xffffu);
    }
    if TO == I32 {
        return vec2(0u, put_signed(n, 32u).y);
    }
    if TO == I64 {
        return put_signed(n, 64u);
    }
    if TO == U8 {
        return vec2(0u, put_u8(n));
    }
    return vec2(0u, select(1u, 0u, n.kind == ZERO));
}

// ---- The affine map, on the bits of f32.

fn is_nan(bits: u32) -> bool {
    return (bits & 0x7fffffffu) > 0x7f800000u;
}

fn is_infinite(bits: u32) -> bool {
    return (bits & 0x7fffffffu) == 0x7f800000u;
}

fn flush(bits: u32) -> u32 {
    return select(bits, bits & 0x80000000u, (bits & 0x7f800000u) == 0u);
}

// Both are flushed, and so is the result.
fn times(a: u32, b: u32) -> u32 {
    let sign = (a ^ b) & 0x80000000u;
    let x = a & 0x7fffffffu;
    let y = b & 0x7fffffffu;
    if x > 0x7f800000u || y > 0x7f800000u {
        return 0x7fc00000u;
    }
    if x == 0u || y == 0u {
        return select(sign, 0x7fc00000u, max(x, y) == 0x7f800000u);
    }
    if max(x, y) == 0x7f800000u {
        return sign | 0x7f800000u;
    }
    let exponent = i32(x >> 23u) + i32(y >> 23u) - 254;
    if exponent < -120 {
        // Devices differ in when they take a result as subnormal: before rounding, after, never.
        let p = (x & 0x7fffffu) | 0x800000u;
        let q = (y & 0x7fffffu) | 0x800000u;
        // The product of 48 bits, from pieces of 12.
        let low = (p & 0xfffu) * (q & 0xfffu);
        let middle = (p & 0xfffu) * (q >> 12u) + (p >> 12u) * (q & 0xfffu);
        let high = (p >> 12u) * (q >> 12u);
        let some = low + (middle << 12u);
        let all = some + (high << 24u);
        let carry = select(0u, 1u, some < low) + select(0u, 1u, all < some);
        let mantissa = vec2((high >> 8u) + (middle >> 20u) + carry, all);
        return flush(put_f32(finite(sign >> 31u, exponent + 17, mantissa)));
    }
    return bitcast<u32>(bitcast<f32>(a) * bitcast<f32>(b));
}

// Likewise.
fn plus(a: u32, b: u32) -> u32 {
    if is_nan(a) || is_nan(b) || (is_infinite(a) && is_infinite(b) && a != b) {
        return 0x7fc00000u;
    }
    if is_infinite(a) {
        return a;
    }
    if is_infinite(b) {
        return b;
    }
    if (a & 0x7fffffffu) == 0u {
        return select(b, a & b, (b & 0x7fffffffu) == 0u);
    }
    if (b & 0x7fffffffu) == 0u {
        return a;
    }
    if (a ^ b) == 0x80000000u {
        return 0u;
    }
    return flush(bitcast<u32>(bitcast<f32>(a) + bitcast<f32>(b)));
}

fn affine(bits: u32, channel: u32) -> u32 {
    let scale = params[8u + channel];
    let bias = params[8u + params[4] + channel];
    // Nothing is fused over an operation on bits whose outcome is known at run time only.
    let product = times(flush(bits), flush(scale)) ^ params[7];
    return plus(product, flush(bias));
}

// ---- Elements.

// The source's element as it is stored.
fn stored(index: u32) -> vec2<u32> {
    let start = params[2];
    if FROM == F64 || FROM == I64 {
        return vec2(src[start + index * 2u + 1u], src[start + index * 2u]);
    }
    if FROM == F32 || FROM == I32 {
        return vec2(0u, src[start + index]);
    }
    if FROM == F16 || FROM == BF16 || FROM == I16 {
        return vec2(0u, (src[start + (index >> 1u)] >> ((index & 1u) * 16u)) & 0xffffu);
    }
    return vec2(0u, (src[start + (index >> 2u)] >> ((index & 3u) * 8u)) & 0xffu);
}

// An element of a type that f32 holds exactly, as the bits of an f32.
fn narrow(bits: u32) -> u32 {
    if FROM == U8 {
        return bitcast<u32>(f32(bits));
    }
    if FROM == BOOL {
        return select(0x3f800000u, 0u, bits == 0u);
    }
    if FROM == I8 {
        return bitcast<u32>(f32(bitcast<i32>(bits << 24u) >> 24u));
    }
    if FROM == I16 {
        return bitcast<u32>(f32(bitcast<i32>(bits << 16u) >> 16u));
    }
    if FROM == F16 {
        let sign = (bits & 0x8000u) << 16u;
        let field = (bits >> 10u) & 0x1fu;
        let fraction = bits & 0x3ffu;
        if field == 0x1fu {
            return select(0x7fc00000u, sign | 0x7f800000u, fraction == 0u);
        }
        if field != 0u {
            return sign | ((field + 112u) << 23u) | (fraction << 13u);
        }
        if fraction == 0u {
            return sign;
        }
        // fraction · 2^-24, a normal f32.
        return sign | (bitcast<u32>(f32(fraction)) - (24u << 23u));
    }
    let whole = select(bits, bits << 16u, FROM == BF16);
    return select(whole, 0x7fc00000u, is_nan(whole));
}

// An element of the other types.
fn wide(bits: vec2<u32>) -> Number {
    if FROM == F64 {
        return take_f64(bits);
    }
    if FROM == I32 {
        let value = bitcast<i32>(bits.y);
        return take_i64(vec2(bitcast<u32>(value >> 31u), bits.y));
    }
    return take_i64(bits);
}

fn put_narrow(bits: u32) -> vec2<u32> {
    if TO == F32 {
        return vec2(0u, bits);
    }
    if TO == BF16 {
        let rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
        return vec2(0u, select(rounded, 0x7fc0u, is_nan(bits)));
    }
    return put(take_f32(bits));
}

// The target's element `index`.
fn element(index: u32) -> vec2<u32> {
    var place = index;
    var channel = 0u;
    if RELAYOUT {
        let channels = params[4];
        let pixels = params[5];
        let image = index / (channels * pixels);
        let within = index - image * channels * pixels;
        let start = image * channels * pixels;
        if SOURCE_NCHW {
            let pixel = within / channels;
            channel = within - pixel * channels;
            place = start + channel * pixels + pixel;
        } else {
            channel = within / pixels;
            place = start + (within - channel * pixels) * channels + channel;
        }
    } else if AFFINE {
        let within = index + params[6];
        if SOURCE_NCHW {
            channel = (within / params[5]) % params[4];
        } else {
            channel = within % params[4];
        }
    }
    let bits = stored(place);
    if FROM == TO && !AFFINE {
        return bits;
    }
    let is_wide = FROM == F64 || FROM == I64 || FROM == I32;
    if !AFFINE {
        if is_wide {
            return put(wide(bits));
        }
        return put_narrow(narrow(bits.y));
    }
    var x = 0u;
    if is_wide {
        x = put_f32(wide(bits));
    } else {
        x = narrow(bits.y);
    }
    return put_narrow(affine(x, channel));
}

@compute @workgroup_size(256)
fn main(
    @builtin(workgroup_id) group: vec3<u32>,
    @builtin(num_workgroups) groups: vec3<u32>,
    @builtin(local_invocation_index) local: u32,
) {
    let thread = (group.y * groups.x + group.x) * 256u + local;
    if thread >= params[1] {
        return;
    }
    let count = params[0];
    let start = params[3];
    if TO == F64 || TO == I64 {
        let bits = element(thread);
        dst[start + thread * 2u] = bits.y;
        dst[start + thread * 2u + 1u] = bits.x;
    } else if TO == F32 || TO == I32 {
        dst[start + thread] = element(thread).y;
    } else if TO == F16 || TO == BF16 || TO == I16 {
        let first = thread * 2u;
        var word = element(first).y;
        if first + 1u < count {
            word |= element(first + 1u).y << 16u;
        }
        dst[start + thread] = word;
    } else {
        let first = thread * 4u;
        var word = element(first).y;
        if first + 1u < count {
            word |= element(first + 1u).y << 8u;
        }
        if first + 2u < count {
            word |= element(first + 2u).y << 16u;
        }
        if first + 3u < count {
            word |= element(first + 3u).y << 24u;
        }
        dst[start + thread] = word;
    }
}
