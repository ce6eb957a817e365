//! Streams of the `cudarc` crate: devices for them, tensors bound to them, and views for its copies
//! and kernels.
#![allow(unsafe_code, reason = "cudarc asks for a promise about kernel arguments")]

use std::marker::PhantomData;
use std::sync::Arc;

use cudarc::driver::sys::CUdeviceptr;
use cudarc::driver::{
    CudaStream as Stream, DevicePtr, DeviceSlice, LaunchArgs, PushKernelArg, SyncOnDrop,
};

use super::lane::PER_THREAD;
use super::queue::{CudaBinding, CudaStream};
use super::{CudaBackend, driver};
use crate::memory::{ConsumerQueue, Tensor};
use crate::{Element, Error, Result};

/// The stream, as the driver knows it.
fn raw(stream: &Stream) -> CudaStream {
    CudaStream::kept(driver::Stream(stream.cu_stream().cast()))
}

impl CudaBackend {
    /// Opens the device of a stream, for that stream.
    pub(crate) fn open_for(stream: &Arc<Stream>) -> Result<Self> {
        let ordinal = stream.context().ordinal();
        let mut backend = Self::open(ordinal, Some(raw(stream)))?;
        if !backend.has_context_of(stream) {
            return Err(Error::NoDevice {
                wanted: format!("cuda:{ordinal}"),
                reason: "the stream is not in the GPU's primary context".to_owned(),
                remedy: "make its context with `CudaContext::new`".to_owned(),
            });
        }
        backend._consumer = Some(Arc::<Stream>::clone(stream));
        Ok(backend)
    }

    fn has_context_of(&self, stream: &Stream) -> bool {
        stream.context().cu_ctx().cast() == self.context.raw.0
    }
}

/// A stream is kept for as long as a tensor that was bound to it.
impl ConsumerQueue for Arc<Stream> {
    type Handle<'t> = CudarcBinding<'t>;

    fn bind<'t>(&self, tensor: &'t Tensor) -> Result<CudarcBinding<'t>> {
        let (CudaBinding { address, .. }, backend) = CudaBinding::of(tensor)?;
        if !backend.has_context_of(self) {
            return Err(Error::record(
                "a binding to a CUDA stream",
                format!("it is not in the context of {}", tensor.device().info().name),
            ));
        }
        if self.cu_stream().addr() == PER_THREAD {
            // cudarc takes it for the same stream on each thread.
            return Err(Error::record(
                "a binding to a CUDA stream",
                "cudarc's per-thread stream is another one on each thread: bind to a stream of \
                 `CudaContext::new_stream`",
            ));
        }
        let kept = Arc::<Stream>::clone(self);
        let (number, using) = raw(self).wait_for(tensor, backend, Some(kept))?;
        tensor.share().use_by(number, using);
        Ok(CudarcBinding { tensor, stream: Arc::clone(self), address })
    }
}

/// A tensor as work on a stream of `cudarc`'s sees it. Enqueue that work before the tensor's last
/// handle is dropped: the next writer then comes behind it.
#[derive(Debug, Clone)]
pub struct CudarcBinding<'t> {
    tensor: &'t Tensor,
    stream: Arc<Stream>,
    address: u64,
}

impl<'t> CudarcBinding<'t> {
    /// The address on the device, for `cudarc`'s `sys` and `result`.
    pub fn address(&self) -> CUdeviceptr {
        self.address
    }

    /// The elements, to pass to `cudarc` where it takes a `CudaView`.
    ///
    /// # Errors
    /// `T` is not their type.
    pub fn view<T: Element>(&self) -> Result<CudarcView<'t, T>> {
        self.tensor.expect::<T>()?;
        let len = usize::try_from(self.tensor.elements())
            .map_err(|_| Error::Overflow { what: "a view".to_owned() })?;
        let (address, stream) = (self.address, Arc::clone(&self.stream));
        Ok(CudarcView { address, len, stream, _elements: PhantomData })
    }
}

/// The elements of a tensor that is bound to a stream of `cudarc`'s: a source of copies
/// ([`DevicePtr`]), and an argument of kernels, which take it as a pointer.
///
/// A copy on another stream is ordered behind the bound one, and the host waits for it. A kernel
/// must be launched on the bound stream, and, as other handles may see the same memory, only read;
/// both are part of what `LaunchArgs::launch` has its caller promise.
#[derive(Debug, Clone)]
pub struct CudarcView<'t, T> {
    address: CUdeviceptr,
    len: usize,
    stream: Arc<Stream>,
    _elements: PhantomData<&'t [T]>,
}

impl<T> DeviceSlice<T> for CudarcView<'_, T> {
    fn len(&self) -> usize {
        self.len
    }

    fn stream(&self) -> &Arc<Stream> {
        &self.stream
    }
}

impl<T> DevicePtr<T> for CudarcView<'_, T> {
    fn device_ptr<'a>(&'a self, stream: &'a Stream) -> (CUdeviceptr, SyncOnDrop<'a>) {
        if stream == &*self.stream {
            return (self.address, SyncOnDrop::Record(None));
        }
        // Only the bound stream's position is noted when the tensor goes.
        stream.context().record_err(stream.join(&self.stream));
        (self.address, SyncOnDrop::sync_stream(stream))
    }
}

// SAFETY: what is pushed is the address of a device pointer, which the launch borrows.
unsafe impl<'a, 'v: 'a, 't: 'v, T> PushKernelArg<&'v CudarcView<'t, T>> for LaunchArgs<'a> {
    #[inline(always)]
    fn arg(&mut self, view: &'v CudarcView<'t, T>) -> &mut Self {
        self.arg(&view.address)
    }
}
