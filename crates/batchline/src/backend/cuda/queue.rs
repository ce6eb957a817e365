//! A user's streams: binding tensors to them, and custom work on ours.
#![allow(unsafe_code, reason = "takes a raw handle on a promise")]

use std::any::Any;
use std::ffi::c_void;
use std::sync::Arc;

use super::{CudaBackend, CudaMemory, driver};
use crate::backend::{Backend, StreamId};
use crate::memory::{ConsumerQueue, StreamUse, Tensor};
use crate::{Error, Result};

/// A stream of the CUDA driver (`CUstream`, `cudaStream_t`).
///
/// Binding a batch to it orders its work behind the batch; dropping the batch orders the memory's
/// next use behind the work that was on the stream until then. Don't drop it while the stream is
/// being captured into a graph: where the stream is cannot be known then, and the memory is given
/// up. For the legacy and the per-thread default stream, that is while any blocking stream of the
/// context is captured.
#[derive(Debug, Clone, Copy)]
pub struct CudaStream {
    raw: driver::Stream,
    /// Whether it is a device's own, and not one that a user has made a promise about.
    ours: bool,
}

/// Whether both are the same handle.
impl PartialEq for CudaStream {
    fn eq(&self, other: &Self) -> bool {
        self.raw == other.raw
    }
}

impl Eq for CudaStream {}

impl CudaStream {
    /// The legacy default stream, which every context has.
    pub(crate) const LEGACY: Self = Self { raw: driver::Stream::NULL, ours: false };

    /// A stream by its raw handle. Null is the legacy default stream, as 1 is; 2 is the per-thread
    /// default stream of whoever calls.
    ///
    /// # Safety
    /// The stream belongs to the primary context of the device that it is used with. It exists for
    /// as long as a device that was opened for it; until a tensor that was bound to it, and all
    /// tensors of its batch, are dropped, and no export, command buffer or frozen chain names one of
    /// them; and until the deleter of an export for it has run.
    pub unsafe fn from_raw(stream: *mut c_void) -> Self {
        Self { raw: driver::Stream(stream), ours: false }
    }

    /// The raw handle.
    pub fn as_raw(self) -> *mut c_void {
        self.raw.0
    }

    /// A device's own stream, which goes with it: a handle to it is not taken on trust.
    pub(super) fn of_device(raw: driver::Stream) -> Self {
        Self { raw, ours: true }
    }

    /// A stream that is kept by what names it.
    #[cfg(feature = "cudarc")]
    pub(super) fn kept(raw: driver::Stream) -> Self {
        Self { raw, ours: false }
    }

    pub(super) fn raw(self) -> driver::Stream {
        self.raw
    }

    pub(super) fn is_ours(self) -> bool {
        self.ours
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

impl CudaBinding {
    /// Where a tensor is, and the device that it is on.
    ///
    /// # Errors
    /// It is not on a CUDA device.
    pub(crate) fn of(tensor: &Tensor) -> Result<(Self, &CudaBackend)> {
        let backend: &dyn Any = tensor.device().core().backend();
        let memory = CudaMemory::of(tensor.storage().block().memory());
        let (Some(backend), Some(memory)) = (backend.downcast_ref(), memory) else {
            return Err(Error::record(
                "a binding to a CUDA stream",
                format!("the tensor is on {}", tensor.device().info().name),
            ));
        };
        let address = memory.address + tensor.offset();
        Ok((Self { address, bytes: tensor.byte_len() }, backend))
    }
}

impl CudaStream {
    /// Makes the stream wait for a tensor; the number that it has, and what keeps it and, where
    /// there is one, `stream` for as long as the tensor is used.
    pub(crate) fn wait_for(
        self,
        tensor: &Tensor,
        backend: &CudaBackend,
        stream: Option<Arc<dyn Any + Send + Sync>>,
    ) -> Result<(StreamId, Option<StreamUse>)> {
        let core = tensor.device().core();
        core.check()?;
        let (number, token) = core.health().notice(backend.lanes.of_user(self))?;
        let written = tensor.storage().block().usage.lock().written;
        core.health().notice(backend.consumer_after(number, written.as_slice()))?;
        Ok((number, token.map(|token| StreamUse { _number: token, _stream: stream })))
    }
}

impl ConsumerQueue for CudaStream {
    type Handle<'t> = CudaBinding;

    fn bind(&self, tensor: &Tensor) -> Result<CudaBinding> {
        let (binding, backend) = CudaBinding::of(tensor)?;
        let (number, using) = self.wait_for(tensor, backend, None)?;
        tensor.share().use_by(number, using);
        Ok(binding)
    }
}
