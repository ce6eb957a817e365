//! **batchline keeps a GPU fed.** A loader reads training samples with several threads, packs them
//! into batches in page-locked memory, moves them to the device while the device computes, and
//! hands out batches that lie on the device: in order, each once, the same for any number of
//! threads.
//!
//! ```text
//!                    plan: (seed, epoch, rank) ─▶ which samples are in batch k
//!                      │ ticket k and a staging slot, handed out together, in order
//!                      ▼
//! DataSource ─┐     workers ── fill disjoint windows of one slot ──▶ slot k, full
//! Dataset   ──┘     read → decode → transform, written in place          │
//!                                                                        ▼  in ticket order
//!                                           command buffer: copy ─▶ convert ─▶ fence
//!                                                                        │
//!          slot back to its pool ◀── reaper: fence passed ◀──────────────┤
//!                                                                        ▼
//! memory back ◀── last drop, behind the consumer's work ◀── GpuBatch k ◀── get_batch
//! ```
//!
//! # An example
//!
//! ```
//! use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Device, HostTensor, InMemory};
//!
//! // A thousand images of 28×28 and their classes; any source will do.
//! let images = HostTensor::new(vec![0u8; 1000 * 784], &[1000, 28, 28])?;
//! let labels = HostTensor::new(vec![7u8; 1000], &[1000])?;
//! let dataset = InMemory::new(images)?.labels(labels)?;
//!
//! let config = AsyncDataLoaderConfig::builder()
//!     .batch_size(64)
//!     .shuffle(true)
//!     .epochs(2)
//!     .device(Device::host()) // or Device::auto(), Device::wgpu()?
//!     .build()?;
//! let loader = AsyncDataLoader::new(dataset, config)?;
//! loader.start()?;
//! while let Some(batch) = loader.get_batch()? {
//!     let (_images, _labels) = (batch.input_tensor(), batch.label_tensor());
//!     // …enqueue your work on them; dropping the batch gives its memory back.
//! }
//! println!("{}", loader.stats().verdict());
//! # Ok::<(), batchline::Error>(())
//! ```
//!
//! # Where to go from here
//!
//! | you want | look at | chapter |
//! | --- | --- | --- |
//! | samples from your own files, read by all threads at once | [`Dataset`], [`FnDataset`] | [`guide::datasets`] |
//! | samples that come one after another | [`DataSource`], [`IterSource`] | [`guide::closures`] |
//! | data sets on disk | `formats` (feature `formats`) | |
//! | several tensors per sample, masks, weights | [`SampleSpec`] | [`guide::tensors`] |
//! | an order of your own | [`Sampler`] | [`guide::orders`] |
//! | several processes | [`ConfigBuilder::shard`] | [`guide::ranks`] |
//! | to go on after a restart | [`LoaderState`], [`ConfigBuilder::resume_from`] | [`guide::resume`] |
//! | bad samples not to end the run | [`ErrorPolicy`] | [`guide::errors`] |
//! | pixels as `u8` over the link and as floats on the device | [`ConfigBuilder::convert`] | |
//! | the device to fetch samples by itself | [`ConfigBuilder::gather`], [`ConfigBuilder::residency`] | [`guide::paths`] |
//! | to know what holds the run up | [`AsyncDataLoader::stats`] | [`guide::bottlenecks`] |
//! | to use a batch in your own kernels | [`GpuBatch::bind`] | [`guide::cuda`], [`guide::own_wgpu_device`] |
//! | a batch in numpy, PyTorch or JAX, without a copy | [`Tensor::to_dlpack`] | [`guide::cuda`] |
//! | batches in asynchronous code | `AsyncDataLoader::stream` (feature `async`) | [`guide::streams`] |
//! | only the pools | [`StagingBufferPool`], [`CommandBufferPool`], [`MemoryManager`] | [`guide::pools`] |
//! | another kind of device, or to test your source | [`backend`], `testing` (feature `testing`) | [`guide::tests`] |
//!
//! # Features
//!
//! | feature | default | what it brings |
//! | --- | --- | --- |
//! | `cuda` | yes | the CUDA device: NVIDIA GPUs; the driver is looked for at run time |
//! | `cudarc` | no | streams and kernels of the `cudarc` crate, with `cuda` |
//! | `wgpu` | yes | the wgpu device: Metal, Vulkan, DX12 |
//! | `formats` | yes | IDX, npy and headerless files, and `synthetic:` data to measure with |
//! | `async` | no | [`AsyncDataLoader::stream`](AsyncDataLoader), a `Stream` that wakes without polling |
//! | `tracing` | no | spans and warnings of the `tracing` crate |
//! | `testing` | no | the conformance suite and the fault-injecting device |

pub mod backend;

mod batch;
mod command;
mod device;
pub mod dlpack;
mod dtype;
mod error;
#[cfg(feature = "formats")]
pub mod formats;
pub mod guide;
mod loader;
mod memory;
mod plan;
mod process;
mod shape;
mod source;
mod staging;
mod state;
mod stats;
mod sync;
#[cfg(feature = "testing")]
pub mod testing;
mod trace;

#[cfg(feature = "cuda")]
pub use backend::cuda::{CudaBinding, CudaCustom, CudaStream};
#[cfg(feature = "cudarc")]
pub use backend::cuda::{CudarcBinding, CudarcView};
#[cfg(feature = "wgpu")]
pub use backend::wgpu::WgpuCustom;
pub use backend::{ChannelOrder, Custom, DeviceInfo, DeviceKind, HostCustom};
pub use batch::{BoundBatch, GpuBatch};
pub use command::{
    BatchOperation, CommandBuffer, CommandBufferPool, CommandPoolStats, Conversion, FrozenCommands,
    Readback, Submission,
};
pub use device::{Device, Found};
pub use dtype::{DType, Element, UnknownDType};
pub use error::{BoxError, Cause, Error, Result};
#[cfg(feature = "async")]
pub use loader::BatchStream;
pub use loader::{
    AsyncDataLoader, AsyncDataLoaderConfig, Batches, ConfigBuilder, Delivery, ErrorPolicy, Gather,
    LoadPath, Residency,
};
#[cfg(feature = "wgpu")]
pub use memory::WgpuBinding;
pub use memory::{ConsumerQueue, Host, HostView, MemoryLimits, MemoryManager, MemoryStats, Tensor};
pub use plan::{LastBatch, Permutation, Sampler, Sequential, Shard, Shuffled, mix};
pub use shape::{MAX_RANK, Shape};
pub use source::{
    DataSource, Dataset, FnDataset, FnSource, HostTensor, InMemory, IterSource, Sample,
    SampleBuffer, SampleMut, SampleSpec, TensorSpec,
};
pub use staging::{StagingBuffer, StagingBufferPool, StagingPoolStats, Transfer};
pub use state::{LoaderState, Skipped};
pub use stats::{AsyncDataLoaderStats, Bottleneck, StageTimes, Stages};
