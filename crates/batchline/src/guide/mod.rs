//! How to do one thing, in chapters of a page each; every example runs.
//!
//! | chapter | about |
//! | --- | --- |
//! | [`closures`] | a closure or an iterator as a source |
//! | [`datasets`] | files of your own, read straight into the batch |
//! | [`orders`] | a sampler of your own |
//! | [`tensors`] | label, masks and weights beside the input |
//! | [`errors`] | bad samples, retries, panics |
//! | [`resume`] | to go on after a restart |
//! | [`ranks`] | several processes |
//! | [`paths`] | which way batches take to the device, and how to get a faster one |
//! | [`bottlenecks`] | where the time goes, and what to do about it |
//! | [`pools`] | staging buffers, command buffers and tensors without a loader |
//! | [`cuda`] | your own CUDA streams, `cudarc`, and DLPack |
//! | [`own_wgpu_device`] | a wgpu device shared with your own compute passes |
//! | [`streams`] | batches in asynchronous code |
//! | [`tests`] | to test a source or a backend |

#[doc = include_str!("closures.md")]
pub mod closures {}

#[doc = include_str!("datasets.md")]
pub mod datasets {}

#[doc = include_str!("orders.md")]
pub mod orders {}

#[doc = include_str!("tensors.md")]
pub mod tensors {}

#[doc = include_str!("errors.md")]
pub mod errors {}

#[doc = include_str!("resume.md")]
pub mod resume {}

#[doc = include_str!("ranks.md")]
pub mod ranks {}

#[doc = include_str!("bottlenecks.md")]
pub mod bottlenecks {}

#[doc = include_str!("paths.md")]
pub mod paths {}

#[doc = include_str!("pools.md")]
pub mod pools {}

#[cfg_attr(feature = "cuda", doc = include_str!("cuda.md"))]
#[cfg_attr(not(feature = "cuda"), doc = "This chapter needs the feature `cuda`.")]
pub mod cuda {}

#[cfg_attr(feature = "wgpu", doc = include_str!("own_wgpu_device.md"))]
#[cfg_attr(not(feature = "wgpu"), doc = "This chapter needs the feature `wgpu`.")]
pub mod own_wgpu_device {}

#[cfg_attr(feature = "async", doc = include_str!("streams.md"))]
#[cfg_attr(not(feature = "async"), doc = "This chapter needs the feature `async`.")]
pub mod streams {}

#[cfg_attr(feature = "testing", doc = include_str!("tests.md"))]
#[cfg_attr(not(feature = "testing"), doc = "This chapter needs the feature `testing`.")]
pub mod tests {}
