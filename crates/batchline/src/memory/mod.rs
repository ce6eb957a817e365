//! Memory: blocks under byte limits, tensors on them, and the bounded pool that lends.

mod block;
mod manager;
mod pool;
mod registered;
mod shelf;
mod storage;
mod tensor;
mod view;

pub use manager::{MemoryLimits, MemoryManager, MemoryStats};
pub use tensor::Tensor;
#[cfg(feature = "wgpu")]
pub use view::WgpuBinding;
pub use view::{ConsumerQueue, Host, HostView};

pub(crate) use block::DeviceBlock;
pub(crate) use manager::StagingLease;
pub(crate) use pool::{Loan, Patience, Pool};
pub(crate) use registered::Registered;
#[cfg(feature = "cuda")]
pub(crate) use storage::StreamUse;
pub(crate) use storage::{Held, Hold, Share, Storage};
pub(crate) use view::View;
