// What the kernels stand on: threads, and memory that is only read. This is all that differs between
// the device and the CPU, besides what numbers.cuh says.

#pragma once

#ifdef BATCHLINE_NATIVE
#define KERNEL(BLOCKS) extern "C" void
#define INLINE inline
#define SHARED inline
#else
// BLOCKS of 256 threads fit on a multiprocessor, at least.
#define KERNEL(BLOCKS)                                                                             \
    extern "C" __attribute__((global)) __attribute__((launch_bounds(256, BLOCKS))) void
#define INLINE inline __attribute__((device)) __attribute__((always_inline))
// One piece of code for several kernels.
#define SHARED inline __attribute__((device)) __attribute__((noinline))
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

namespace {

struct Index {
    u32 x, y;
};

#ifdef BATCHLINE_NATIVE
// Set by whoever runs the kernels on the CPU.
thread_local Index native_thread, native_block, native_block_size, native_grid_size;
INLINE Index thread_index() { return native_thread; }
INLINE Index block_index() { return native_block; }
INLINE Index block_size() { return native_block_size; }
INLINE Index grid_size() { return native_grid_size; }
#else
INLINE Index thread_index() {
    return {(u32)__nvvm_read_ptx_sreg_tid_x(), (u32)__nvvm_read_ptx_sreg_tid_y()};
}
INLINE Index block_index() {
    return {(u32)__nvvm_read_ptx_sreg_ctaid_x(), (u32)__nvvm_read_ptx_sreg_ctaid_y()};
}
INLINE Index block_size() {
    return {(u32)__nvvm_read_ptx_sreg_ntid_x(), (u32)__nvvm_read_ptx_sreg_ntid_y()};
}
INLINE Index grid_size() {
    return {(u32)__nvvm_read_ptx_sreg_nctaid_x(), (u32)__nvvm_read_ptx_sreg_nctaid_y()};
}
#endif

// A thread's part of a loop: first, first + step, ...
struct Span {
    u64 first, step;
};

// Of a loop that the whole grid shares.
INLINE Span span_of_grid() {
    return {(u64)block_index().x * block_size().x + thread_index().x,
            (u64)grid_size().x * block_size().x};
}

// How a gather's blocks share out its parts: grid.y goes over the parts first. Where there are
// fewer blocks than parts, each has several parts; else a part has several blocks, its slices.
struct Shares {
    u32 part, slice, slices;

    INLINE explicit Shares(u32 parts)
        : step(parts < grid_size().y ? parts : grid_size().y) {
        part = block_index().y % step;
        slice = block_index().y / step;
        slices = (grid_size().y - 1 - part) / step + 1;
    }

    INLINE void advance() { part += step; }

private:
    u32 step;
};

// A thread's part of the rows of one part, each `units` long: as many threads of a block as are
// worth it go along a row, and the others take the rows beside it.
struct Rows {
    Span rows, in_row;

    INLINE Rows(u32 slice, u32 slices, u64 units) {
        u32 threads = block_size().x * block_size().y;
        u32 thread = thread_index().y * block_size().x + thread_index().x;
        u32 along = units <= 1 ? 1 : units > 128 ? 256 : 1u << (32 - __builtin_clz((u32)units - 1));
        if (along > threads) along = threads;
        u32 beside = threads / along, row = thread / along;
        rows = {(u64)block_index().x * beside + row, (u64)grid_size().x * beside};
        in_row = {(u64)slice * along + thread % along, (u64)slices * along};
        // Threads that are too few for a row of their own.
        if (row >= beside) rows.first = ~0ull;
    }
};

// An index that grows by a fixed step, and its digits:
// index = (high * middles + middle) * lows + low.
struct Position {
    u64 index, low, middle, high;

    INLINE Position(Span span, u64 lows, u64 middles)
        : index(span.first), low(span.first % lows), middle(span.first / lows % middles),
          high(span.first / lows / middles), lows(lows), middles(middles), step(span.step),
          step_low(span.step % lows), step_middle(span.step / lows % middles),
          step_high(span.step / lows / middles) {}

    INLINE void advance() {
        index += step;
        low += step_low;
        middle += step_middle;
        high += step_high;
        if (low >= lows) {
            low -= lows;
            middle += 1;
        }
        if (middle >= middles) {
            middle -= middles;
            high += 1;
        }
    }

private:
    u64 lows, middles, step, step_low, step_middle, step_high;
};

#ifdef BATCHLINE_NATIVE
template <u32 COUNT>
struct alignas(4 * COUNT) Words {
    u32 word[COUNT];
    u32 operator[](u32 i) const { return word[i]; }
    u32 &operator[](u32 i) { return word[i]; }
};
typedef Words<2> Words2;
typedef Words<4> Words4;

template <class W>
inline W fetch(const W *at) {
    return *at;
}
#else
typedef u32 Words2 __attribute__((ext_vector_type(2)));
typedef u32 Words4 __attribute__((ext_vector_type(4)));

// From memory that no thread of the grid writes, so that later loads may come before earlier stores.
INLINE u8 fetch(const u8 *at) { return __nvvm_ldg_uc(at); }
INLINE u16 fetch(const u16 *at) { return __nvvm_ldg_us(at); }
INLINE u32 fetch(const u32 *at) { return __nvvm_ldg_ui(at); }
INLINE u64 fetch(const u64 *at) { return __nvvm_ldg_ull(at); }
INLINE float fetch(const float *at) { return __nvvm_ldg_f(at); }
INLINE Words2 fetch(const Words2 *at) { return __nvvm_ldg_ui2(at); }
INLINE Words4 fetch(const Words4 *at) { return __nvvm_ldg_ui4(at); }
#endif

} // namespace
