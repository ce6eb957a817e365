//! A CUDA driver for tests: `libcuda` without a GPU.
//!
//! The crate is two things. As a C library (`libfake_cuda.so`) it has the driver's functions that
//! batchline calls. As a Rust library it loads that and steers it: [`Fake`]. All state is in the
//! loaded C library, of which a process has one. Linux only.
//!
//! # How a test uses it
//!
//! ```ignore
//! let fake = Fake::start("devices=1,random_latency_us=200,seed=7");
//! let device = Device::cuda(0)?; // asks for libcuda.so.1 and gets the fake
//! fake.fail(Some("cuMemAlloc_v2"), 3, codes::OUT_OF_MEMORY, When::Before);
//! // ... what is to be tested ...
//! drop(device);
//! assert_eq!(fake.violations(), [""; 0]);
//! assert_eq!(fake.live(), Live::default());
//! ```
//!
//! With this crate among its dev-dependencies a package has the C library built before its tests
//! run. [`Fake::start`] loads it by its path; it bears the name `libcuda.so.1`, so the system
//! answers later requests for that name with it, also where a real driver is installed. This must
//! come before the first request. Another program is given the folder [`folder`] in
//! `LD_LIBRARY_PATH`, and its settings in `FAKE_CUDA`.
//!
//! # Settings
//!
//! `key=value`, with commas between them:
//!
//! | key | | without it |
//! | --- | --- | --- |
//! | `devices` | how many there are; with 0, `cuInit` finds none | 2 |
//! | `memory_mib` | memory of each | 1024 |
//! | `version` | what `cuDriverGetVersion` says; it also decides which PTX and symbols are known | 13000 |
//! | `init` | the error of `cuInit` | 0 |
//! | `latency_us` | how long each piece of work takes | 0 |
//! | `random_latency_us` | at most how much longer, by the seed | 0 |
//! | `seed` | of delays, of the order between streams, and within batches | 0 |
//! | `patience_ms` | how long a call waits for all streams, before that is a violation | 10000 |
//! | `missing` | symbols, with `+` between them, that `cuGetProcAddress` does not find | none |
//! | `no_batch` | 1: `cuMemcpyBatchAsync` and its `_v2` are missing | 0 |
//! | `pageable` | 1: copies that go on after the call take ordinary memory too | 0 |
//! | `held` | 1: streams start nothing till they are released | 0 |
//! | `trace` | 1: the work that is done is noted ([`Fake::trace`]) | 0 |
//! | `print` | 1: violations are printed when they happen | 0 |
//! | `attribute` | `NUMBER:VALUE`: an attribute of the devices, `99:0` for no registration | |
//! | `fail` | `SYMBOL:NTH:CODE:MANNER`: a call that fails; `*` for any symbol; the manner is `before` (if left out), `after` or `lose` | none |
//!
//! # What it does like the driver
//!
//! Work runs later, on another thread, in the order of its stream and of the events waited for; the
//! legacy default stream and blocking streams wait for each other. Without latencies the next piece
//! of work is that of any stream that may go on, at random; with them it is the one that is done
//! first, and its effect comes at the end of its time. Either order depends on the seed alone, for
//! work that was queued while the streams were held.
//!
//! `cuModuleLoadData` and `cuMemFree` return only when all that was queued in the context before, on
//! any stream, is over: so a driver of version 580 did on an H100. What allocates, registers,
//! creates, looks up or launches does not wait.
//!
//! An event is where it was recorded last, and has passed if it never was; who waits takes the
//! point it has at the call. A kernel that touches what it must not loses the context: all later
//! calls in it fail with the same code, but for those that ask for the context or for an address,
//! and for `cuDevicePrimaryCtxRelease`. What was queued is not done, and the host's functions are
//! not called.
//!
//! # What it does besides
//!
//! It notes violations ([`Fake::violations`]), where the driver would go on or do anything at all:
//! memory that is freed while queued work names it; freed memory that is named, freed or written
//! again; writing behind the end of memory; copies with addresses that are not the device's, not
//! page-locked or out of bounds; memory of another device; handles that were destroyed; calls in a
//! destroyed context; a context that is destroyed with work queued, or released too often; a graph
//! that is destroyed while its work is queued, or launched though its memory was freed or its
//! kernels unloaded; a stream that is destroyed while it is captured; a call that waits for all
//! streams longer than `patience_ms`, as when the test holds one (the call then goes on). A child of
//! a fork that calls it is ended.
//! Freed memory is full of 0xDB, new memory of 0xCD. Of registered memory a kernel is taken to read
//! the piece that a parameter points to and all that follow it without a gap.
//!
//! It is stricter than the driver in three things: each call that concerns a context needs one that
//! is current to the thread, though the driver takes copies, events and frees without; ordinary
//! memory is refused by copies that go on after the call, without `pageable`; a context that was released and is made
//! again has a new handle.
//!
//! # What it lacks
//!
//! Captures are of one stream. Kernels are the functions in `driver/kernels.rs`; out-of-bounds
//! access by them is seen where it ends in freed memory or right behind the end of what a parameter
//! points to. What a kernel reaches through a pointer in memory is not known. The settings can't hide
//! symbols from `dlsym`; a copy of the library can ([`without`]).
#![allow(unsafe_code, reason = "a C library, and what loads it")]

mod arguments;
pub mod codes;
mod driver;
mod fake;

/// Whether the kernels of batchline are known: not where there was no C++ compiler.
pub const KERNELS: bool = cuda_kernels_native::BUILT;

pub use fake::{Fake, Live, Stream, When, folder, without};
