//! A user's streams: binding tensors to them, and custom work on ours.
#![allow(unsafe_code, reason = "takes a raw handle on a promise")]

use std::ffi::c_void;

use super::{CudaBackend, CudaMemory, driver};
use crate::backend::Backend;
use crate::memory::{ConsumerQueue, Tensor};
use crate::{Error, Result};

/// A stream of the CUDA driver (`CUstream`, `cudaStream_t`).
///
/// Binding a batch to it orders its work behind the batch; dropping the batch orders the memory's
/// next use behind the work that was on the stream until then.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaStream(driver::Stream);

impl CudaStream {
    /// A stream by its raw handle. Null is the legacy default stream.
    ///
    /// # Safety
    /// The stream belongs to the primary context of the device that it is used with, and exists for
    /// as long as a device that knows it: one that was opened for it, or one of whose tensors was
    /// bound to it.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Self(driver::Stream(stream))
    }

    /// The raw handle.
    pub fn as_raw(self) -> *mut c_void {
        self.0.0
    }

    pub(super) fn of(stream: driver::Stream) -> Self {
        Self(stream)
    }

    pub(super) fn raw(self) -> driver::Stream {
        self.0
    }
}

/// A tensor as work on a CUDA stream sees it. Enqueue that work before the tensor's last handle is
/// dropped: the next writer then comes behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaBinding {
    /// The address on the device (`CUdeviceptr`), a multiple of 256 plus the tensor's offset.
    pub address: u64,
    /// Bytes of the tensor.
    pub bytes: u64,
}

/// What a custom operation on a CUDA device works with: see
/// [`Custom::Cuda`](crate::backend::Custom::Cuda).
///
/// The context is current on the thread. Work that is enqueued on the stream runs in its place
/// among the segment's other commands; the operation must not wait for the stream.
#[derive(Debug)]
pub struct CudaCustom {
    /// Where to enqueue the work.
    pub stream: CudaStream,
    /// The tensors to read, in the order they were declared in.
    pub reads: Vec<CudaBinding>,
    /// The tensors to write, likewise.
    pub writes: Vec<CudaBinding>,
}

impl ConsumerQueue for CudaStream {
    type Handle<'t> = CudaBinding;

    fn bind(&self, tensor: &Tensor) -> Result<CudaBinding> {
        let core = tensor.device().core();
        core.check()?;
        let backend: &dyn std::any::Any = core.backend();
        let block = tensor.storage().block();
        let (Some(backend), Some(memory)) =
            (backend.downcast_ref::<CudaBackend>(), CudaMemory::of(block.memory()))
        else {
            return Err(Error::record(
                "a binding to a CUDA stream",
                format!("the tensor is on {}", tensor.device().info().name),
            ));
        };
        let stream = backend.lanes.of_user(self.0)?;
        let written = block.usage.lock().written;
        core.health().notice(backend.consumer_after(stream, written.as_slice()))?;
        tensor.share().use_on(stream);
        Ok(CudaBinding { address: memory.address + tensor.offset(), bytes: tensor.byte_len() })
    }
}
