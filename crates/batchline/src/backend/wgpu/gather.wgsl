
// Rows by their numbers, in front of a conversion: what it takes as its source are the rows that
// `numbers` names, one behind the other; they lie somewhere in `src`.

// Lower and upper half.
@group(0) @binding(3) var<storage, read> numbers: array<vec2<u32>>;

// params 8: elements of a row, 9: place of the first element in its row, 10: its row's place in
// `numbers`, 11: elements of the window of the source that is bound, or 0 if that is all of it, 12 and
// 13: the window's first element, lower and upper half.

// Whether the last element asked for lies in another window.
var<private> outside: bool;

// The upper half of a product.
fn upper(a: u32, b: u32) -> u32 {
    let low = (a & 0xffffu) * (b & 0xffffu);
    let one = (a >> 16u) * (b & 0xffffu) + (low >> 16u);
    let other = (a & 0xffffu) * (b >> 16u) + (one & 0xffffu);
    return (a >> 16u) * (b >> 16u) + (one >> 16u) + (other >> 16u);
}

// Where the element `index` of the rows picked lies in what is bound.
fn picked(index: u32) -> u32 {
    let place = index + params[9];
    let row = place / params[8];
    let column = place - row * params[8];
    let number = numbers[params[10] + row];
    let product = number.x * params[8];
    let low = product + column;
    if params[11] == 0u {
        return low;
    }
    let carry = select(0u, 1u, low < column);
    let high = upper(number.x, params[8]) + number.y * params[8] + carry;
    let borrow = select(0u, 1u, low < params[12]);
    let here = low - params[12];
    outside = high - params[13] - borrow != 0u || here >= params[11];
    return select(here, 0u, outside);
}

// ---- What a thread writes: as in a conversion, but for elements that lie outside.

fn put(place: u32, bits: u32, mask: u32) {
    if mask == 0xffffffffu {
        dst[place] = bits;
    } else if mask != 0u {
        dst[place] = (dst[place] & ~mask) | bits;
    }
}

fn gather_1(thread: u32) {
    var bits = 0u;
    var mask = 0u;
    for (var i = 0u; i < 4u && thread * 4u + i < params[0]; i += 1u) {
        let value = element(thread * 4u + i).y;
        if !outside {
            bits |= value << (i * 8u);
            mask |= 0xffu << (i * 8u);
        }
    }
    put(params[3] + thread, bits, mask);
}

fn gather_2(thread: u32) {
    var bits = 0u;
    var mask = 0u;
    for (var i = 0u; i < 2u && thread * 2u + i < params[0]; i += 1u) {
        let value = element(thread * 2u + i).y;
        if !outside {
            bits |= value << (i * 16u);
            mask |= 0xffffu << (i * 16u);
        }
    }
    put(params[3] + thread, bits, mask);
}

fn gather_4(thread: u32) {
    let value = element(thread).y;
    if !outside {
        dst[params[3] + thread] = value;
    }
}

fn gather_8(thread: u32) {
    let value = element(thread);
    if !outside {
        dst[params[3] + thread * 2u] = value.y;
        dst[params[3] + thread * 2u + 1u] = value.x;
    }
}
