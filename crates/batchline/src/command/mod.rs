//! Command buffers: recorded lists of operations, the pool that lends them, and their way to the
//! device and back. Frozen ones (`frozen.rs`) take that way any number of times.
//!
//! ```text
//! CommandBufferPool ─▶ CommandBuffer ── execute ──▶ Record, linked ──▶ segments, by stream
//!        ▲              (recorded,                        │                  │ driver
//!        │               checked)                         ▼                  ▼
//!        └───────── recorder, staging, tensors ◀────── reaper ◀──────── fences passed
//! ```

mod buffer;
mod convert;
mod execute;
mod frozen;
mod gather;
mod operation;
mod pool;
mod readback;
pub(crate) mod reaper;
mod submission;

pub use buffer::CommandBuffer;
pub use convert::Conversion;
pub use frozen::FrozenCommands;
pub use pool::{BatchOperation, CommandBufferPool, CommandPoolStats};
pub use readback::Readback;
pub use submission::Submission;

pub(crate) use gather::{GatherParts, Source};
