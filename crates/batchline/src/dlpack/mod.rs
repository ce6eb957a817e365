//! Tensors for other programs in this process, through
//! [DLPack](https://dmlc.github.io/dlpack/latest/): numpy, PyTorch, JAX, CuPy and others take them
//! without a copy.
//!
//! [`Tensor::to_dlpack`] exports a tensor of a CUDA device or of the host. An export keeps the
//! tensor's memory, as a clone of the tensor does, until its deleter runs: also when the batch, the
//! loader and the device's handles are gone. A batch counts as held by its consumer until then.
//! wgpu's memory has no address, so its tensors can't be exported; copy them
//! ([`Tensor::to_vec`]).
//!
//! # Who waits for whom
//!
//! **On a CUDA device** an export is for a stream of the consumer's ([`DlpackStream`]), which
//! waits, on the device, until the tensor is written. The next batch is written to the memory
//! behind all that is on that stream when the deleter runs. A consumer that goes on to other
//! streams orders these behind the one it named, and that one behind them before it calls the
//! deleter.
//!
//! **On the host** the export itself waits until the tensor is written.
//!
//! The deleter may be called by any thread, and never waits for the device. What it would take to
//! free memory, where nobody else has the manager any more, is done by a thread of its own. On a
//! device that was lost, the memory is given up.
//!
//! # Who may write
//!
//! Nobody: an export is marked as read-only, since clones of the tensor, views of the host and
//! operations in flight may see the same memory. While a tensor on the host is exported, nothing
//! can be submitted that writes to its memory ([`Error::Borrowed`]), as with a
//! [`HostView`](crate::HostView). A caller who knows that he has the only handle may take the mark
//! away ([`DlpackTensor::writable`]).
#![allow(unsafe_code, reason = "gives out addresses, and takes them back")]

mod abi;

use std::ffi::c_void;
use std::fmt;
use std::mem::ManuallyDrop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

pub use abi::*;

#[cfg(feature = "cuda")]
use crate::backend::{Backend, StreamId, cuda::CudaBackend};
#[cfg(feature = "cuda")]
use crate::memory::StreamUse;
use crate::memory::View;
use crate::shape::MAX_RANK;
#[cfg(feature = "cuda")]
use crate::{CudaBinding, CudaStream};
use crate::{Error, Result, Tensor};

const WHAT: &str = "an export through DLPack";

/// The stream that the consumer of an export works on: the `stream` of Python's `__dlpack__`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum DlpackStream {
    /// The consumer did not say (`None`): the legacy default stream of a CUDA device. The host has
    /// no streams.
    #[default]
    Unspecified,
    /// No stream waits for the tensor (`-1`). The consumer's work is on the stream that the device
    /// was opened for ([`Device::cuda_for`](crate::Device::cuda_for)), or in the order of that one:
    /// as it is for a batch, which [`get_batch`](crate::AsyncDataLoader::get_batch) orders before
    /// that stream's work. The host waits all the same.
    Unsynchronised,
    /// This stream of a CUDA device.
    #[cfg(feature = "cuda")]
    Cuda(CudaStream),
}

impl DlpackStream {
    /// The stream by the number that Python's `__dlpack__` is given: `None`; -1; 1, the legacy
    /// default stream; 2, the per-thread default stream; or a stream's handle.
    ///
    /// # Errors
    /// 0, which the standard forbids as it could mean any of three; another number below -1; or a
    /// stream, in a build without the feature `cuda`.
    ///
    /// # Safety
    /// A handle is that of a stream in the primary context of the tensor's device, which exists
    /// until the deleter of the export has run.
    pub unsafe fn from_number(stream: Option<i64>) -> Result<Self> {
        let refused = |problem: String| Err(Error::record(WHAT, problem));
        match stream {
            None => Ok(Self::Unspecified),
            Some(-1) => Ok(Self::Unsynchronised),
            Some(0) => refused(
                "stream 0 can mean several: pass 1 for the legacy default stream, 2 for the \
                 per-thread default stream"
                    .to_owned(),
            ),
            #[cfg(feature = "cuda")]
            Some(handle @ 1..) => {
                let handle = usize::try_from(handle)
                    .map_err(|_| Error::Overflow { what: "a stream's handle".to_owned() })?;
                let handle = std::ptr::with_exposed_provenance_mut(handle);
                // SAFETY: by the contract of this function.
                Ok(Self::Cuda(unsafe { CudaStream::from_raw(handle) }))
            }
            Some(number) => refused(format!("{number} is no stream")),
        }
    }
}

impl Tensor {
    /// Exports the tensor to another program in this process, for work on `stream`. See
    /// [`dlpack`](crate::dlpack).
    ///
    /// ```
    /// use batchline::dlpack::{DL_CPU, DL_FLOAT, DlpackStream};
    /// use batchline::{Device, MemoryManager};
    /// let tensor = MemoryManager::new(&Device::host()).upload(&[1.0f32, 2.0], &[2, 1])?;
    /// let export = tensor.to_dlpack(DlpackStream::Unspecified)?;
    /// drop(tensor); // the export has its own share
    /// let seen = export.tensor();
    /// assert_eq!((seen.device.device_type, seen.dtype.code, seen.ndim), (DL_CPU, DL_FLOAT, 2));
    /// // A Python package puts this into a capsule called "dltensor_versioned".
    /// let raw = export.into_raw();
    /// // Whoever has it calls the deleter once, from any thread.
    /// // SAFETY: the export is not used again.
    /// unsafe { (*raw).deleter.unwrap()(raw) };
    /// # Ok::<(), batchline::Error>(())
    /// ```
    ///
    /// # Errors
    /// The device's memory has no address for others; the stream is not one of the device; an
    /// extent does not fit 63 bits; or the device is lost.
    pub fn to_dlpack(&self, stream: DlpackStream) -> Result<DlpackTensor> {
        let device = self.dlpack_device()?;
        let (mut shape, mut strides) = ([0; MAX_RANK], [0; MAX_RANK]);
        let mut stride = 1i64;
        for (place, &dim) in self.shape().dims().iter().enumerate().rev() {
            shape[place] = i64::try_from(dim)
                .map_err(|_| Error::Overflow { what: format!("an extent of {}", self.shape()) })?;
            strides[place] = stride;
            // It overflows only where there are no elements, and no stride matters.
            stride = stride.saturating_mul(shape[place].max(1));
        }
        let (data, consumer) = Consumer::wait(self, stream)?;
        let data = if self.byte_len() == 0 { std::ptr::null_mut() } else { data };
        let dl_tensor = DLTensor {
            data,
            device,
            #[allow(clippy::cast_possible_truncation, reason = "at most MAX_RANK")]
            ndim: self.shape().rank() as i32,
            dtype: self.dtype().into(),
            // Filled in where they will stay.
            shape: std::ptr::null_mut(),
            strides: std::ptr::null_mut(),
            byte_offset: 0,
        };
        let manager_ctx = std::ptr::null_mut();
        let versioned = DLManagedTensorVersioned {
            version: VERSION,
            manager_ctx,
            deleter: Some(delete_versioned),
            flags: FLAG_READ_ONLY,
            dl_tensor,
        };
        let legacy = DLManagedTensor { dl_tensor, manager_ctx, deleter: Some(delete_legacy) };
        let tensor = self.clone();
        let export = Export { versioned, legacy, shape, strides, tensor, consumer };
        Ok(DlpackTensor::new(Box::new(export)))
    }

    /// The device as `__dlpack_device__` gives it.
    ///
    /// # Errors
    /// The tensor can't be exported.
    pub fn dlpack_device(&self) -> Result<DLDevice> {
        let device = self.device();
        if device.info().unified {
            return Ok(DLDevice { device_type: DL_CPU, device_id: 0 });
        }
        #[cfg(feature = "cuda")]
        if let Some((ordinal, _)) = device.as_cuda() {
            let device_id = i32::try_from(ordinal).unwrap_or(i32::MAX);
            return Ok(DLDevice { device_type: DL_CUDA, device_id });
        }
        Err(Error::record(
            WHAT,
            format!(
                "memory of {} has no address for others: copy it (`to_vec`)",
                device.info().name
            ),
        ))
    }
}

/// Who uses an exported tensor, and what is to be done when it ends.
#[derive(Debug)]
enum Consumer {
    /// Programs on the host: a view is open.
    Host,
    /// A stream, whose position is to be noted.
    #[cfg(feature = "cuda")]
    Stream(StreamId, #[allow(dead_code, reason = "it is kept")] Option<StreamUse>),
    /// The stream that the device was opened for, which the memory's share knows.
    #[cfg(feature = "cuda")]
    OwnStream,
}

impl Consumer {
    /// Waits for the tensor, as is right for the stream. Returns its address, too.
    fn wait(tensor: &Tensor, stream: DlpackStream) -> Result<(*mut c_void, Self)> {
        if tensor.device().info().unified {
            #[cfg(feature = "cuda")]
            if let DlpackStream::Cuda(_) = stream {
                return Err(Error::record(WHAT, "the tensor is on the host, which has no streams"));
            }
            return Ok((View::open(tensor)?.into_start().as_ptr().cast(), Self::Host));
        }
        Self::wait_on_device(tensor, stream)
    }

    #[cfg(feature = "cuda")]
    fn wait_on_device(tensor: &Tensor, stream: DlpackStream) -> Result<(*mut c_void, Self)> {
        let (binding, backend) = CudaBinding::of(tensor)?;
        let consumer = match stream {
            DlpackStream::Unsynchronised => {
                tensor.device().check()?;
                tensor.share().use_on(backend.consumer_stream());
                Self::OwnStream
            }
            DlpackStream::Unspecified => Self::on(CudaStream::LEGACY, tensor, backend)?,
            DlpackStream::Cuda(stream) => Self::on(stream, tensor, backend)?,
        };
        let address = usize::try_from(binding.address)
            .map_err(|_| Error::Overflow { what: "an address of the device".to_owned() })?;
        // Of the device's memory, which Rust knows nothing of.
        Ok((std::ptr::without_provenance_mut(address), consumer))
    }

    #[cfg(feature = "cuda")]
    fn on(stream: CudaStream, tensor: &Tensor, backend: &CudaBackend) -> Result<Self> {
        let (number, using) = stream.wait_for(tensor, backend, None)?;
        Ok(Self::Stream(number, using))
    }

    #[cfg(not(feature = "cuda"))]
    fn wait_on_device(_: &Tensor, _: DlpackStream) -> Result<(*mut c_void, Self)> {
        unreachable!("`dlpack_device` refuses other devices")
    }
}

/// An export. The structures that are given out point into it, so it stays where it is.
#[derive(Debug)]
struct Export {
    versioned: DLManagedTensorVersioned,
    legacy: DLManagedTensor,
    shape: [i64; MAX_RANK],
    strides: [i64; MAX_RANK],
    tensor: Tensor,
    consumer: Consumer,
}

impl Drop for Export {
    fn drop(&mut self) {
        match &self.consumer {
            Consumer::Host => View::close(&self.tensor),
            #[cfg(feature = "cuda")]
            Consumer::Stream(number, _) => self.tensor.share().note_position(*number),
            #[cfg(feature = "cuda")]
            Consumer::OwnStream => {}
        }
    }
}

/// An exported tensor: see [`Tensor::to_dlpack`]. Dropping it is the same as calling the deleter.
pub struct DlpackTensor {
    /// Owned, until it is given out.
    export: NonNull<Export>,
}

// SAFETY: it owns a tensor, and plain memory that is not written any more.
unsafe impl Send for DlpackTensor {}
// SAFETY: as above.
unsafe impl Sync for DlpackTensor {}

impl DlpackTensor {
    /// Points the structures to where they are.
    fn new(export: Box<Export>) -> Self {
        let owned = Box::into_raw(export);
        // SAFETY: just made, and seen by nobody else.
        let export = unsafe { &mut *owned };
        let (shape, strides) = (export.shape.as_mut_ptr(), export.strides.as_mut_ptr());
        for tensor in [&mut export.versioned.dl_tensor, &mut export.legacy.dl_tensor] {
            (tensor.shape, tensor.strides) = (shape, strides);
        }
        export.versioned.manager_ctx = owned.cast();
        export.legacy.manager_ctx = owned.cast();
        Self { export: NonNull::new(owned).expect("a box is somewhere") }
    }

    /// What is exported.
    pub fn tensor(&self) -> &DLTensor {
        // SAFETY: owned, and not written while it is borrowed.
        unsafe { &(*self.export.as_ptr()).versioned.dl_tensor }
    }

    /// Takes the mark away by which the consumer must not write to the tensor.
    ///
    /// # Safety
    /// Until the deleter has run, nobody else reads or writes the tensor's elements: through the
    /// tensor or a clone of it, another export, a view of the host or an operation.
    #[must_use]
    pub unsafe fn writable(self) -> Self {
        // SAFETY: owned.
        unsafe { (*self.export.as_ptr()).versioned.flags = 0 };
        self
    }

    /// Hands the export out. Whoever has it calls its deleter once, from any thread.
    pub fn into_raw(self) -> *mut DLManagedTensorVersioned {
        let export = ManuallyDrop::new(self).export.as_ptr();
        // SAFETY: it exists; only an address is computed.
        unsafe { &raw mut (*export).versioned }
    }

    /// As [`into_raw`](Self::into_raw), for a consumer that only knows the structure from before
    /// version 1.0. It has no mark for who must not write: the consumer has to know.
    pub fn into_legacy_raw(self) -> *mut DLManagedTensor {
        let export = ManuallyDrop::new(self).export.as_ptr();
        // SAFETY: it exists; only an address is computed.
        unsafe { &raw mut (*export).legacy }
    }
}

impl Drop for DlpackTensor {
    fn drop(&mut self) {
        // SAFETY: owned, and not given out.
        unsafe { end(self.export.as_ptr().cast()) }
    }
}

impl fmt::Debug for DlpackTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DlpackTensor").field(self.tensor()).finish()
    }
}

/// The deleter.
unsafe extern "C" fn delete_versioned(exported: *mut DLManagedTensorVersioned) {
    if !exported.is_null() {
        // SAFETY: `into_raw` gave it out, and this is the only call.
        let export = unsafe { (*exported).manager_ctx };
        // SAFETY: as above.
        unsafe { end(export) }
    }
}

/// The deleter.
unsafe extern "C" fn delete_legacy(exported: *mut DLManagedTensor) {
    if !exported.is_null() {
        // SAFETY: `into_legacy_raw` gave it out, and this is the only call.
        let export = unsafe { (*exported).manager_ctx };
        // SAFETY: as above.
        unsafe { end(export) }
    }
}

/// Ends an export, without a wait for the device, and without a panic.
///
/// # Safety
/// It is an [`Export`] that the caller owns.
unsafe fn end(export: *mut c_void) {
    // SAFETY: it was a box, and is the caller's.
    let export = unsafe { Box::from_raw(export.cast::<Export>()) };
    let end = AssertUnwindSafe(|| {
        let memory = export.tensor.memory().clone();
        drop(export);
        memory.let_go();
    });
    if let Err(panic) = catch_unwind(end) {
        // A backend's. What it was thrown with may panic, too, when it is dropped.
        std::mem::forget(panic);
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::backend::host::HostBackend;
    use crate::backend::{
        Backend, CommandKind, DeviceInfo, DeviceMemory, Direction, Fence, Segment, StagingMemory,
        StreamId, SubmitError,
    };
    use crate::{DType, Device, MemoryManager};

    /// The host, with a fault in what a last drop calls.
    #[derive(Debug)]
    struct Panicking(HostBackend);

    // SAFETY: the host's backend does all.
    unsafe impl Backend for Panicking {
        fn info(&self) -> &DeviceInfo {
            self.0.info()
        }

        fn allocate(&self, bytes: u64) -> Result<Box<dyn DeviceMemory>> {
            self.0.allocate(bytes)
        }

        fn allocate_staging(&self, bytes: u64, to: Direction) -> Result<Box<dyn StagingMemory>> {
            self.0.allocate_staging(bytes, to)
        }

        fn stream_of(&self, kind: CommandKind) -> StreamId {
            self.0.stream_of(kind)
        }

        fn consumer_stream(&self) -> StreamId {
            self.0.consumer_stream()
        }

        fn submit(&self, segment: Segment<'_, '_>) -> Result<(), SubmitError> {
            self.0.submit(segment)
        }

        fn wait(&self, fence: Fence, timeout: Duration) -> Result<bool> {
            self.0.wait(fence, timeout)
        }

        fn consumer_after(&self, stream: StreamId, fences: &[Fence]) -> Result<()> {
            self.0.consumer_after(stream, fences)
        }

        fn consumer_position(&self, _: StreamId) -> Result<Fence> {
            panic!("a fault of the backend");
        }
    }

    /// C code can't be unwound through: a panic in it would end the program.
    #[test]
    fn no_panic_leaves_a_deleter() {
        let device = Device::from_backend(Box::new(Panicking(HostBackend::new())));
        let tensor = MemoryManager::new(&device).tensor(&[4], DType::U8).unwrap();
        tensor.share().use_on(0);
        let raw = tensor.to_dlpack(DlpackStream::Unspecified).unwrap().into_raw();
        drop(tensor);
        // SAFETY: given out above, and not used again.
        let deleter = unsafe { (*raw).deleter.unwrap() };
        // SAFETY: as above.
        unsafe { deleter(raw) };
    }

    #[test]
    fn a_deleter_of_nothing_does_nothing() {
        // SAFETY: it is allowed.
        unsafe { delete_versioned(std::ptr::null_mut()) };
        // SAFETY: as above.
        unsafe { delete_legacy(std::ptr::null_mut()) };
    }
}
