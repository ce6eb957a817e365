// The kernels of the CUDA device. `ci/ptx.sh` makes kernels.ptx of this file and those it includes;
// it is committed and handed to the driver as text, so that building batchline needs neither clang
// nor the CUDA toolkit.
//
// What a conversion computes is defined by the host's kernel (../host/convert.rs), bit for bit.
// Compiled as C++ with BATCHLINE_NATIVE, the same kernels run on the CPU and are compared with it
// (crates/cuda-kernels-native).
//
// # Launching
//
// All kernels are right for any grid and block of up to 256 threads; what is said here is what is
// fast. None uses shared memory. Addresses are multiples of their element's size (those of rows that
// are gathered as they are may be any), and source and target don't overlap; 16-byte accesses are
// used where both are multiples of 16.
//
//   batchline_fill_u64, batchline_convert*:
//       block (256), grid (min(ceil(elements / 4096), 4 * multiprocessors)), at least 1
//   batchline_gather_rows, batchline_gather_convert_*: grid.x shares out rows; grid.y shares out the
//   parts, and what is more than there are parts shares out each row. A row is `units` long, those
//   of the longest part: row_bytes / 16 (/ 8, / 4 where that, or an address, is no multiple; / 1 for
//   rows of less than 64 bytes that are no multiple of 4 either), or where it is converted
//   elements / (16 / size of the target's element), but elements / 16 up to 16,384 of them.
//       block (256); with `along` = units rounded up to a power of two, at most 256:
//       grid (ceil(rows / (256 / along)), parts * slices), where slices are 1 if units < 1024; else
//       4, or more to have 4 blocks on each multiprocessor, of at least 256 units each
//
// # Why it is done this way
//
// A conversion is bound by memory. A thread makes 16 bytes of the target at a time, beside those of
// its neighbours, so that a warp's stores are whole lines. Blocks of 256 threads, 4 on each
// multiprocessor, with 12 bytes or more on the way for each thread, keep some 12 KiB per
// multiprocessor on the way; at 3.35 TB/s and 1 us, of which u8 to f32 reads a fifth, 5 KiB are
// needed. Sources that are read in strides rely on the first-level cache. Threads stay and loop:
// where they are is divided out once, and then counted up.

#include "device.cuh"
#include "numbers.cuh"

// The bits of `flags`.
enum : u32 {
    // Scale and bias are applied, one of each per channel of the source's element.
    FLAG_AFFINE = 1,
    // The source's channels come before its pixels.
    FLAG_SOURCE_NCHW = 2,
    // The target's do.
    FLAG_TARGET_NCHW = 4,
};

namespace {

// Whether a conversion without map differs from one with scale 1 and bias -0: that one flushes, and
// makes NaN canonical.
template <class S, class D>
constexpr bool plain_differs = same<S, D> || (same<S, F32> && same<D, BF16>);

// One element, from its bits to the target's.
template <class S, class D, bool MAP>
INLINE u32 convert_bits(u32 bits, float scale, float bias) {
    if constexpr (MAP) {
        float x = S::read(bits);
        return D::write(affine(S::may_be_subnormal ? flush(x) : x, scale, bias));
    } else if constexpr (same<S, D>) {
        return bits;
    } else {
        return D::write(S::read(bits));
    }
}

// Scales and biases, or none of them, which stands for 1 and -0.
struct Factors {
    const float *scales, *biases;

    INLINE float scale(u64 channel) const { return scales ? flush(fetch(scales + channel)) : 1.0f; }
    INLINE float bias(u64 channel) const { return biases ? fetch(biases + channel) : -0.0f; }
};

// ---- Adjacent elements ----------------------------------------------------------------------

template <class W, u32 WIDTH, u32 COUNT>
INLINE void load_words(const u8 *at, u32 (&words)[COUNT]) {
#pragma unroll
    for (u32 i = 0; i < COUNT / WIDTH; ++i) {
        W wide = fetch((const W *)at + i);
#pragma unroll
        for (u32 j = 0; j < WIDTH; ++j) words[i * WIDTH + j] = wide[j];
    }
}

// The bits of adjacent elements, in accesses as wide as the length allows.
template <class S, u32 COUNT>
INLINE void load(const u8 *at, u32 (&bits)[COUNT]) {
    if constexpr (COUNT * S::size % 4 != 0) {
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            if constexpr (S::size == 1) bits[i] = fetch(at + i);
            if constexpr (S::size == 2) bits[i] = fetch((const u16 *)at + i);
        }
    } else {
        constexpr u32 WORDS = COUNT * S::size / 4, EACH = 4 / S::size;
        u32 words[WORDS];
        if constexpr (WORDS % 4 == 0) {
            load_words<Words4, 4>(at, words);
        } else if constexpr (WORDS % 2 == 0) {
            load_words<Words2, 2>(at, words);
        } else {
#pragma unroll
            for (u32 i = 0; i < WORDS; ++i) words[i] = fetch((const u32 *)at + i);
        }
#pragma unroll
        for (u32 i = 0; i < COUNT; ++i) {
            u32 shifted = words[i / EACH] >> (i % EACH * 8 * S::size);
            bits[i] = S::size == 4 ? shifted : shifted & ((1u << (8 * S::size % 32)) - 1);
        }
    }
}

// Stores one element, or 16 bytes of them.
template <class D, u32 COUNT>
INLINE void store(u8 *at, const u32 (&bits)[COUNT]) {
    static_assert(COUNT == 1 || COUNT * D::size == 16, "one element or 16 bytes");
    if constexpr (COUNT == 1) {
        if constexpr (D::size == 2) *(u16 *)at = (u16)bits[0];
        if constexpr (D::size == 4) *(u32 *)at = bits[0];
    } else {
        Words4 wide;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            wide[i] = D::size == 4 ? bits[i] : bits[2 * i % COUNT] | bits[(2 * i + 1) % COUNT] << 16;
        }
        *(Words4 *)at = wide;
    }
}

INLINE bool aligned(const void *a, const void *b, u64 bytes) {
    return (((u64)a | (u64)b) & (bytes - 1)) == 0;
}

// ---- Specialised conversions ----------------------------------------------------------------

// What is to be converted, and how. `from_planes`, `to_planes`: source, target are NCHW.
struct Job {
    const u8 *src;
    u8 *dst;
    u64 elements, channels, pixels;
    bool from_planes, to_planes;
    Factors factors;
};

// Elements that are 16 bytes of the target.
template <class D>
constexpr u64 group = 16 / D::size;

// Any job, one element at a time, from the target's element `begin` on.
template <class S, class D, bool MAP>
INLINE void convert_each(Span span, const Job &job, u64 begin) {
    u64 lows = job.to_planes ? job.pixels : job.channels;
    u64 middles = job.to_planes ? job.channels : job.pixels;
    Position at({begin + span.first, span.step}, lows, middles);
    for (; at.index < job.elements; at.advance()) {
        u64 source = at.index;
        if (job.from_planes != job.to_planes) source = (at.high * lows + at.low) * middles + at.middle;
        u64 channel = job.to_planes ? at.middle : at.low;
        u32 bits[1];
        load<S>(job.src + source * S::size, bits);
        float scale = MAP ? job.factors.scale(channel) : 0, bias = MAP ? job.factors.bias(channel) : 0;
        u32 converted[1] = {convert_bits<S, D, MAP>(bits[0], scale, bias)};
        store<D>(job.dst + at.index * D::size, converted);
    }
}

// Elements stay in order, and a channel's are `channels` apart. Returns how many are done.
template <class S, class D, bool MAP>
INLINE u64 convert_in_order(Span span, const Job &job) {
    constexpr u32 G = group<D>;
    // Groups of a thread at a time: 16 bytes of the source, so that enough is on the way.
    constexpr u32 DEPTH = G * S::size < 16 ? 16 / (G * S::size) : 1;
    u64 groups = job.elements / G;
    // As many threads as make each one's channels the same in every round.
    u64 step = span.step - span.step % job.channels;
    if (span.first >= step) return groups * G;

    float scale[G] = {}, bias[G] = {};
    if constexpr (MAP) {
        u64 channel = span.first * G % job.channels;
#pragma unroll
        for (u32 i = 0; i < G; ++i) {
            scale[i] = job.factors.scale(channel);
            bias[i] = job.factors.bias(channel);
            channel = channel + 1 == job.channels ? 0 : channel + 1;
        }
    }
    for (u64 first = span.first; first < groups; first += DEPTH * step) {
        u32 bits[DEPTH][G];
        // Where there are no more groups the first is loaded again: with a branch around it, a load
        // would wait for the one before.
#pragma unroll
        for (u32 k = 0; k < DEPTH; ++k) {
            u64 at = first + k * step < groups ? first + k * step : first;
            load<S>(job.src + at * G * S::size, bits[k]);
        }
#pragma unroll
        for (u32 k = 0; k < DEPTH; ++k) {
            if (first + k * step >= groups) break;
#pragma unroll
            for (u32 i = 0; i < G; ++i) {
                bits[k][i] = convert_bits<S, D, MAP>(bits[k][i], scale[i], bias[i]);
            }
            store<D>(job.dst + (first + k * step) * G * D::size, bits[k]);
        }
    }
    return groups * G;
}

// Elements stay in order, and a channel's lie in a plane that is a multiple of 16 bytes long.
// Returns how many are done.
template <class S, class D>
INLINE u64 convert_planes(Span span, const Job &job) {
    constexpr u32 G = group<D>;
    u64 groups = job.elements / G;
    for (Position at(span, job.pixels / G, job.channels); at.index < groups; at.advance()) {
        float scale = job.factors.scale(at.middle), bias = job.factors.bias(at.middle);
        u32 bits[G];
        load<S>(job.src + at.index * G * S::size, bits);
#pragma unroll
        for (u32 i = 0; i < G; ++i) bits[i] = convert_bits<S, D, true>(bits[i], scale, bias);
        store<D>(job.dst + at.index * G * D::size, bits);
    }
    return groups * G;
}

// Images of three channels change their order, G pixels of a plane at a time.
template <class S, class D, bool MAP, u32 G>
INLINE void convert_images(Span span, const Job &job) {
    constexpr u32 C = 3;
    float scale[C] = {}, bias[C] = {};
    if constexpr (MAP) {
#pragma unroll
        for (u32 c = 0; c < C; ++c) {
            scale[c] = job.factors.scale(c);
            bias[c] = job.factors.bias(c);
        }
    }
    u64 in_image = job.pixels / G, groups = job.elements / C / G;
    for (Position at(span, in_image, ~0ull); at.index < groups; at.advance()) {
        // Of the pixels that lie together, and of those in the first plane.
        u64 packed = at.index * G * C, plane = at.middle * C * job.pixels + at.low * G;
        u32 bits[C * G];
        if (job.to_planes) {
            load<S>(job.src + packed * S::size, bits);
#pragma unroll
            for (u32 c = 0; c < C; ++c) {
                u32 converted[G];
#pragma unroll
                for (u32 i = 0; i < G; ++i) {
                    converted[i] = convert_bits<S, D, MAP>(bits[i * C + c], scale[c], bias[c]);
                }
                store<D>(job.dst + (plane + c * job.pixels) * D::size, converted);
            }
        } else {
#pragma unroll
            for (u32 c = 0; c < C; ++c) {
                u32 loaded[G];
                load<S>(job.src + (plane + c * job.pixels) * S::size, loaded);
#pragma unroll
                for (u32 i = 0; i < G; ++i) {
                    bits[i * C + c] = convert_bits<S, D, MAP>(loaded[i], scale[c], bias[c]);
                }
            }
#pragma unroll
            for (u32 k = 0; k < C; ++k) {
                u32 converted[G];
#pragma unroll
                for (u32 i = 0; i < G; ++i) converted[i] = bits[k * G + i];
                store<D>(job.dst + (packed + k * G) * D::size, converted);
            }
        }
    }
}

template <class S, class D, bool MAP>
INLINE void convert_job(Span span, const Job &job) {
    bool wide = aligned(job.src, job.dst, 16), whole = job.pixels % group<D> == 0;
    if (job.from_planes != job.to_planes) {
        if (job.channels != 3) {
            convert_each<S, D, MAP>(span, job, 0);
        } else if (wide && whole) {
            convert_images<S, D, MAP, group<D>>(span, job);
        } else {
            convert_images<S, D, MAP, 1>(span, job);
        }
        return;
    }
    u64 done = 0;
    if (wide && !job.from_planes && job.channels <= span.step / 8) {
        done = convert_in_order<S, D, MAP>(span, job);
    }
    if constexpr (MAP) {
        if (wide && job.from_planes && whole) done = convert_planes<S, D>(span, job);
    }
    convert_each<S, D, MAP>(span, job, done);
}

// What a kernel was told to convert; `elements` is not 0.
INLINE Job job_of(const u8 *src, u8 *dst, u64 elements, u64 channels, u64 pixels, u32 flags,
                  const float *scale, const float *bias) {
    bool map = flags & FLAG_AFFINE;
    Job job = {src, dst, elements, channels, pixels, (flags & FLAG_SOURCE_NCHW) != 0,
               (flags & FLAG_TARGET_NCHW) != 0, {map ? scale : nullptr, map ? bias : nullptr}};
    // With one channel or one pixel all orders are the same, and with no map that of source and
    // target is of no matter.
    if (channels == 1 || pixels == 1) job.from_planes = job.to_planes = false;
    if (job.from_planes == job.to_planes && !map) {
        job.from_planes = job.to_planes = false;
        job.channels = 1;
    }
    // Only whole images can be put in another order.
    if (job.from_planes != job.to_planes) job.elements -= elements % (channels * pixels);
    return job;
}

template <class S, class D>
INLINE void convert(Span span, const u8 *src, u8 *dst, u64 elements, u64 channels, u64 pixels,
                    u32 flags, const float *scale, const float *bias) {
    if (elements == 0) return;
    Job job = job_of(src, dst, elements, channels, pixels, flags, scale, bias);
    if constexpr (plain_differs<S, D>) {
        if (!(flags & FLAG_AFFINE)) return convert_job<S, D, false>(span, job);
    }
    convert_job<S, D, true>(span, job);
}

// ---- Any conversion -------------------------------------------------------------------------

INLINE u32 size_of(u32 code) {
    switch (code) {
    case CODE_I8:
    case CODE_U8:
    case CODE_BOOL: return 1;
    case CODE_F16:
    case CODE_BF16:
    case CODE_I16: return 2;
    case CODE_F32:
    case CODE_I32: return 4;
    default: return 8;
    }
}

INLINE u64 load_any(const u8 *src, u64 index, u32 size) {
    switch (size) {
    case 1: return fetch(src + index);
    case 2: return fetch((const u16 *)src + index);
    case 4: return fetch((const u32 *)src + index);
    default: return fetch((const u64 *)src + index);
    }
}

INLINE void store_any(u8 *dst, u64 index, u32 size, u64 bits) {
    switch (size) {
    case 1: dst[index] = (u8)bits; break;
    case 2: ((u16 *)dst)[index] = (u16)bits; break;
    case 4: ((u32 *)dst)[index] = (u32)bits; break;
    default: ((u64 *)dst)[index] = bits;
    }
}

// ---- Gathering ------------------------------------------------------------------------------

// What `fetch` gets of aligned words, to be stored as they are.
template <class W>
struct Straight {
    typedef W Word;
    typedef W Loaded;
    const W *src;

    INLINE Loaded load(u64 i) const { return fetch(src + i); }
    INLINE Word word(const Loaded &loaded) const { return loaded; }
};

// 16 bytes that lie across two aligned blocks, `bytes` (1 to 15) into the first.
struct Shifted {
    typedef Words4 Word;
    struct Loaded {
        Words4 low, high;
    };
    const Words4 *src;
    u32 bytes;

    INLINE Loaded load(u64 i) const { return {fetch(src + i), fetch(src + i + 1)}; }
    INLINE Word word(const Loaded &loaded) const {
        u32 words[6];
#pragma unroll
        for (u32 i = 0; i < 6; ++i) {
            u32 near = i < 4 ? loaded.low[i % 4] : loaded.high[i % 4];
            u32 far = i + 2 < 4 ? loaded.low[(i + 2) % 4] : loaded.high[(i + 2) % 4];
            words[i] = bytes & 8 ? far : near;
        }
#pragma unroll
        for (u32 i = 0; i < 5; ++i) {
            u32 near = words[i], far = words[i + 1];
            words[i] = bytes & 4 ? far : near;
        }
        Words4 made;
#pragma unroll
        for (u32 i = 0; i < 4; ++i) {
            made[i] = (u32)(((u64)words[i + 1] << 32 | words[i]) >> (bytes % 4 * 8));
        }
        return made;
    }
};

// COUNT words of a thread, all of them on the way before the first is stored: a load may take
// microseconds where the source is memory of the host.
template <u32 COUNT, class S>
INLINE void copy_words(const S &src, typename S::Word *dst, u64 first, u64 step) {
    typename S::Loaded loaded[COUNT];
#pragma unroll
    for (u32 k = 0; k < COUNT; ++k) loaded[k] = src.load(first + k * step);
#pragma unroll
    for (u32 k = 0; k < COUNT; ++k) dst[first + k * step] = src.word(loaded[k]);
}

template <class S>
INLINE void copy_row(Span span, const S &src, typename S::Word *dst, u64 words) {
    u64 i = span.first, step = span.step;
    for (; i + 3 * step < words; i += 4 * step) copy_words<4>(src, dst, i, step);
    if (i + 2 * step < words) {
        copy_words<3>(src, dst, i, step);
    } else if (i + step < words) {
        copy_words<2>(src, dst, i, step);
    } else if (i < words) {
        copy_words<1>(src, dst, i, step);
    }
}

template <class W>
INLINE void copy_aligned(Span span, const u8 *src, u8 *dst, u64 bytes) {
    copy_row(span, Straight<W>{(const W *)src}, (W *)dst, bytes / sizeof(W));
}

// Rows of which words of 16 bytes can be stored, at whatever addresses: what is before and behind
// these words goes byte by byte.
constexpr u64 LONG_ENOUGH = 64;

INLINE void copy_unaligned(Span span, const u8 *src, u8 *dst, u64 bytes) {
    u64 head = -(u64)dst % 16;
    u32 shift = (u32)((u64)(src + head) % 16);
    // Only blocks that lie in the row with all their bytes are loaded.
    if (shift > head) head += 16;
    u64 words = (bytes - head + shift) / 16 - (shift != 0);
    const Words4 *from = (const Words4 *)(src + head - shift);
    Words4 *to = (Words4 *)(dst + head);
    if (shift == 0) {
        copy_row(span, Straight<Words4>{from}, to, words);
    } else {
        copy_row(span, Shifted{from, shift}, to, words);
    }
    for (u64 i = span.first; i < bytes - words * 16; i += span.step) {
        u64 at = i < head ? i : i + words * 16;
        dst[at] = fetch(src + at);
    }
}

// Rows without conversion, in accesses as wide as the alignment of all of them allows.
SHARED void gather_rows(u32 slice, u32 slices, const u64 *indices, u64 rows, const u8 *src, u8 *dst,
                        u64 row_bytes) {
    u64 common = (u64)src | (u64)dst | row_bytes;
    // Bytes of an access, as a power of two.
    u32 width = common % 16 == 0 ? 4 : common % 8 == 0 ? 3 : common % 4 == 0 ? 2 : 0;
    bool unaligned = width == 0 && row_bytes >= LONG_ENOUGH;
    Rows some(slice, slices, row_bytes >> (unaligned ? 4 : width));
    Span in_row = some.in_row;
    if (in_row.first >= row_bytes) return;
    for (u64 row = some.rows.first; row < rows; row += some.rows.step) {
        const u8 *from = src + fetch(indices + row) * row_bytes;
        u8 *to = dst + row * row_bytes;
        if (width == 4) {
            copy_aligned<Words4>(in_row, from, to, row_bytes);
        } else if (width == 3) {
            copy_aligned<u64>(in_row, from, to, row_bytes);
        } else if (width == 2) {
            copy_aligned<u32>(in_row, from, to, row_bytes);
        } else if (unaligned) {
            copy_unaligned(in_row, from, to, row_bytes);
        } else {
            copy_aligned<u8>(in_row, from, to, row_bytes);
        }
    }
}

// Elements of a row that a thread makes at a time where rows are short: 16 bytes of the source.
constexpr u32 SHORT_UNIT = 16;
// The longest of these rows.
constexpr u64 SHORT = 16384;

// Short rows whose elements stay in order, as if they were one: what is worked out once for a row
// would take longer than the row. `ONE`: there is one channel.
template <class D, bool ONE>
INLINE void gather_short(Shares shares, const u64 *indices, u64 rows, const Job &job) {
    constexpr u32 G = group<D>;
    u32 units = (u32)job.elements / SHORT_UNIT, channels = (u32)job.channels;
    u32 threads = block_size().x * block_size().y;
    u32 thread = thread_index().y * block_size().x + thread_index().x;
    u64 first = ((u64)block_index().x * shares.slices + shares.slice) * threads + thread;
    u64 step = (u64)grid_size().x * shares.slices * threads;
    float one_scale = ONE ? job.factors.scale(0) : 0, one_bias = ONE ? job.factors.bias(0) : 0;
    for (u64 at = first; at < rows * units; at += step) {
        u32 row = (u32)at / units, unit = (u32)at % units;
        u32 bits[SHORT_UNIT];
        load<U8>(job.src + fetch(indices + row) * job.elements + unit * SHORT_UNIT, bits);
        u8 *to = job.dst + (row * job.elements + unit * SHORT_UNIT) * D::size;
        u32 channel = ONE ? 0 : unit * SHORT_UNIT % channels;
#pragma unroll
        for (u32 k = 0; k < SHORT_UNIT / G; ++k) {
            u32 made[G];
#pragma unroll
            for (u32 i = 0; i < G; ++i) {
                float scale = ONE ? one_scale : job.factors.scale(channel);
                float bias = ONE ? one_bias : job.factors.bias(channel);
                made[i] = convert_bits<U8, D, true>(bits[k * G + i], scale, bias);
                if (!ONE) channel = channel + 1 == channels ? 0 : channel + 1;
            }
            store<D>(to + k * G * D::size, made);
        }
    }
}

// Rows of `elements` bytes, which are whole images.
template <class D>
INLINE void gather_convert(Shares shares, const u64 *indices, u64 rows, const u8 *src, u8 *dst,
                           u64 elements, u64 channels, u64 pixels, u32 flags, const float *scale,
                           const float *bias) {
    if (elements == 0) return;
    Job job = job_of(src, dst, elements, channels, pixels, flags, scale, bias);
    bool is_short = elements <= SHORT && elements % SHORT_UNIT == 0 && aligned(src, dst, 16);
    if (is_short && !job.from_planes && !job.to_planes && rows * elements >> 32 == 0) {
        if (job.channels == 1) return gather_short<D, true>(shares, indices, rows, job);
        return gather_short<D, false>(shares, indices, rows, job);
    }
    Rows some(shares.slice, shares.slices, elements / group<D>);
    for (u64 row = some.rows.first; row < rows; row += some.rows.step) {
        job.src = src + fetch(indices + row) * elements;
        job.dst = dst + row * elements * D::size;
        convert_job<U8, D, true>(some.in_row, job);
    }
}

} // namespace

// ---- Kernels --------------------------------------------------------------------------------

// `count` words become `value`.
KERNEL(4) batchline_fill_u64(u64 *dst, u64 count, u64 value) {
    Span span = span_of_grid();
    for (u64 i = span.first; i < count; i += span.step) dst[i] = value;
}

// Any conversion. `from` and `to` are codes. With FLAG_AFFINE, `scale` and `bias` hold `channels`
// floats each; else they are not looked at. `channels` and `pixels` are at least 1. Where the order
// changes, `elements` is a multiple of both together; what is beyond it is left.
KERNEL(4) batchline_convert(const void *__restrict__ src, void *__restrict__ dst, u64 elements, u32 from,
                         u32 to, u64 channels, u64 pixels, u32 flags,
                         const float *__restrict__ scale, const float *__restrict__ bias) {
    if (elements == 0) return;
    bool map = flags & FLAG_AFFINE, from_planes = flags & FLAG_SOURCE_NCHW;
    bool to_planes = flags & FLAG_TARGET_NCHW, moved = from_planes != to_planes;
    u32 from_size = size_of(from), to_size = size_of(to);
    u64 lows = to_planes ? pixels : channels, middles = to_planes ? channels : pixels;
    if (moved) elements -= elements % (channels * pixels);
    Factors factors = {scale, bias};
    for (Position at(span_of_grid(), lows, middles); at.index < elements; at.advance()) {
        u64 source = moved ? (at.high * lows + at.low) * middles + at.middle : at.index;
        u64 bits = load_any((const u8 *)src, source, from_size);
        if (map || from != to) {
            Value value = read_any(from, bits);
            if (map) {
                u64 channel = to_planes ? at.middle : at.low;
                float x = flush(nearest_float(value));
                value = number(affine(x, factors.scale(channel), factors.bias(channel)));
            }
            bits = write_any(to, value);
        }
        store_any((u8 *)dst, at.index, to_size, bits);
    }
}

// The same for the pairs that training uses, faster: where the order stays (if it is NHWC with a map,
// with at most an eighth as many channels as there are threads; if NCHW, with planes of whole groups
// of 16 bytes in the target), and where it changes with three channels (best with such planes). All
// else goes element by element.
#define CONVERT(FROM, TO, S, D)                                                                    \
    KERNEL(4) batchline_convert_##FROM##_##TO(const void *__restrict__ src, void *__restrict__ dst,   \
                                           u64 elements, u64 channels, u64 pixels, u32 flags,      \
                                           const float *__restrict__ scale,                        \
                                           const float *__restrict__ bias) {                       \
        convert<S, D>(span_of_grid(), (const u8 *)src, (u8 *)dst, elements, channels, pixels,      \
                      flags, scale, bias);                                                         \
    }
CONVERT(u8, f32, U8, F32)
CONVERT(u8, f16, U8, F16)
CONVERT(u8, bf16, U8, BF16)
CONVERT(i8, f32, I8, F32)
CONVERT(i8, f16, I8, F16)
CONVERT(i8, bf16, I8, BF16)
CONVERT(f16, f32, F16, F32)
CONVERT(f16, f16, F16, F16)
CONVERT(f16, bf16, F16, BF16)
CONVERT(f32, f32, F32, F32)
CONVERT(f32, f16, F32, F16)
CONVERT(f32, bf16, F32, BF16)

// Gathers up to four tensors of a batch, of which there are `parts`: row i of each becomes row
// indices[i] of its source. Indices and sources may be mapped memory of the host. Lengths of rows
// and addresses may be any.
KERNEL(2) batchline_gather_rows(const u64 *__restrict__ indices, u64 rows, u32 parts, const u8 *src0,
                             u8 *dst0, u64 bytes0, const u8 *src1, u8 *dst1, u64 bytes1,
                             const u8 *src2, u8 *dst2, u64 bytes2, const u8 *src3, u8 *dst3,
                             u64 bytes3) {
    for (Shares shares(parts); shares.part < parts; shares.advance()) {
        const u8 *src = src0;
        u8 *dst = dst0;
        u64 bytes = bytes0;
        if (shares.part == 1) src = src1, dst = dst1, bytes = bytes1;
        if (shares.part == 2) src = src2, dst = dst2, bytes = bytes2;
        if (shares.part == 3) src = src3, dst = dst3, bytes = bytes3;
        gather_rows(shares.slice, shares.slices, indices, rows, src, dst, bytes);
    }
}

// As batchline_gather_rows, converting the first part on the way: its rows are `elements` bytes, a
// multiple of `channels` and `pixels` together.
#define GATHER_CONVERT(FROM, TO, D)                                                                \
    KERNEL(2) batchline_gather_convert_##FROM##_##TO(                                              \
        const u64 *__restrict__ indices, u64 rows, u32 parts, const u8 *src0, u8 *dst0,            \
        u64 elements, u64 channels, u64 pixels, u32 flags, const float *__restrict__ scale,        \
        const float *__restrict__ bias, const u8 *src1, u8 *dst1, u64 bytes1, const u8 *src2,      \
        u8 *dst2, u64 bytes2, const u8 *src3, u8 *dst3, u64 bytes3) {                              \
        Shares shares(parts);                                                                      \
        if (shares.part == 0) {                                                                    \
            gather_convert<D>(shares, indices, rows, src0, dst0, elements, channels, pixels,       \
                              flags, scale, bias);                                                 \
            shares.advance();                                                                      \
        }                                                                                          \
        for (; shares.part < parts; shares.advance()) {                                            \
            const u8 *src = src1;                                                                  \
            u8 *dst = dst1;                                                                        \
            u64 bytes = bytes1;                                                                    \
            if (shares.part == 2) src = src2, dst = dst2, bytes = bytes2;                          \
            if (shares.part == 3) src = src3, dst = dst3, bytes = bytes3;                          \
            gather_rows(shares.slice, shares.slices, indices, rows, src, dst, bytes);              \
        }                                                                                          \
    }
GATHER_CONVERT(u8, f32, F32)
GATHER_CONVERT(u8, f16, F16)
GATHER_CONVERT(u8, bf16, BF16)
