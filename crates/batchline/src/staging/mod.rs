//! Staging: page-locked buffers on their way to the device, and the pool that lends them.

mod buffer;
mod pool;
mod transfer;

pub use buffer::StagingBuffer;
pub use pool::{StagingBufferPool, StagingPoolStats};
pub use transfer::Transfer;

pub(crate) use buffer::arrived_bytes;
