//! How a consumer gets at a tensor: by binding it to the queue that its work runs on.
#![allow(unsafe_code, reason = "makes slices of memory that the tensor keeps alive")]

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::block::DeviceBlock;
use super::shelf::Block;
use super::tensor::Tensor;
use crate::{Device, Element, Error, Result};

/// A queue that a consumer's work runs on. Binding orders the work after the tensor is ready; what
/// it hands out lives no longer than the tensor.
///
/// This trait is sealed.
pub trait ConsumerQueue: sealed::Sealed {
    /// What work on this queue needs in order to use a tensor.
    type Handle<'t>;

    /// Makes the queue wait for the tensor.
    ///
    /// # Errors
    /// The queue is not one of the tensor's device, or the device is lost.
    fn bind<'t>(&self, tensor: &'t Tensor) -> Result<Self::Handle<'t>>;
}

mod sealed {
    #[allow(unnameable_types, reason = "nobody else may implement it")]
    pub trait Sealed {}

    impl Sealed for super::Host {}
    #[cfg(feature = "cuda")]
    impl Sealed for crate::CudaStream {}
    #[cfg(feature = "cudarc")]
    impl Sealed for std::sync::Arc<cudarc::driver::CudaStream> {}
    #[cfg(feature = "wgpu")]
    impl Sealed for wgpu::Queue {}
}

/// The host's own queue: the program. Binding gives a slice.
///
/// ```
/// use batchline::{Device, Host, MemoryManager};
/// let memory = MemoryManager::new(&Device::host());
/// let tensor = memory.upload(&[1.0f32, 2.0], &[2])?;
/// assert_eq!(tensor.bind(&Host)?.as_slice::<f32>()?, [1.0, 2.0]);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug, Clone, Copy, Default)]
pub struct Host;

impl ConsumerQueue for Host {
    type Handle<'t> = HostView<'t>;

    fn bind<'t>(&self, tensor: &'t Tensor) -> Result<HostView<'t>> {
        let view = View::open(tensor)?;
        #[allow(clippy::cast_possible_truncation, reason = "within memory that exists")]
        let len = tensor.byte_len() as usize;
        Ok(HostView { view, len, _bytes: PhantomData })
    }
}

/// While it is there, nothing can be submitted that writes to a tensor's block.
#[derive(Debug)]
pub(crate) struct View<'t> {
    start: NonNull<u8>,
    tensor: &'t Tensor,
}

impl<'t> View<'t> {
    /// Returns when all is done that was submitted to write to the block.
    pub(crate) fn open(tensor: &'t Tensor) -> Result<Self> {
        let device = tensor.device();
        let block = tensor.storage().block();
        let Some(base) = block.memory().host_ptr().filter(|_| device.info().unified) else {
            let problem = format!("{} has memory of its own: use `to_vec`", device.info().name);
            return Err(Error::record("a binding to the host", problem));
        };
        #[allow(clippy::cast_possible_truncation, reason = "within memory that exists")]
        let offset = tensor.offset() as usize;
        // SAFETY: a tensor lies within its block.
        let start = unsafe { base.add(offset) };
        // A child of a fork may find the lock taken for ever.
        device.check()?;
        // Under the submission lock, so that no writer is between its check and its submission.
        let submit = device.core().lock_submit()?;
        device.check()?;
        let mut usage = block.usage.lock();
        usage.views += 1;
        let written = usage.written;
        drop(usage);
        drop(submit);
        // From here on the view is counted, and dropping it counts back.
        let view = Self { start, tensor };
        if let Some(fence) = written {
            device.core().health().wait(fence)?;
        }
        Ok(view)
    }

    /// The tensor's first byte. The view is kept open until [`close`](Self::close).
    pub(crate) fn into_start(self) -> NonNull<u8> {
        std::mem::ManuallyDrop::new(self).start
    }

    /// Closes a view of the tensor, which was kept until now.
    pub(crate) fn close(tensor: &Tensor) {
        tensor.storage().block().usage.lock().views -= 1;
    }
}

impl Drop for View<'_> {
    fn drop(&mut self) {
        Self::close(self.tensor);
    }
}

/// A tensor's elements, as a slice. While it is there, nothing can be submitted that writes to the
/// tensor's memory.
#[derive(Debug)]
pub struct HostView<'t> {
    view: View<'t>,
    len: usize,
    _bytes: PhantomData<&'t [u8]>,
}

// SAFETY: it is a shared borrow of plain bytes.
unsafe impl Send for HostView<'_> {}
// SAFETY: as above.
unsafe impl Sync for HostView<'_> {}

impl HostView<'_> {
    /// The bytes, in the machine's byte order.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: initialised memory of the block, which the borrowed tensor keeps; no segment
        // that writes it was in flight when the view was handed out, and none is submitted while
        // the view is counted.
        unsafe { std::slice::from_raw_parts(self.view.start.as_ptr(), self.len) }
    }

    /// The elements.
    ///
    /// # Errors
    /// `T` is not their type.
    pub fn as_slice<T: Element>(&self) -> Result<&[T]> {
        self.view.tensor.expect::<T>()?;
        // Tensors start at multiples of 256.
        Ok(bytemuck::cast_slice(self.bytes()))
    }
}

/// Tells a unified device that an output has become free, unless work on it is still on its way.
pub(super) fn output_freed(block: &DeviceBlock, device: &Device) {
    let Some(base) = block.memory().host_ptr().filter(|_| device.info().unified) else { return };
    block.update().into_iter().for_each(|update| update());
    if !block.is_idle() {
        return;
    }
    #[allow(clippy::cast_possible_truncation, reason = "memory that exists")]
    let len = block.memory().len() as usize;
    // SAFETY: valid and initialised by the backend's promise. The last tensor on the block is being
    // dropped, so no view and no operation has it, and nothing that was submitted is unfinished.
    let bytes = unsafe { std::slice::from_raw_parts_mut(base.as_ptr(), len) };
    device.core().backend().slot_freed(bytes);
}

#[cfg(feature = "wgpu")]
mod wgpu_queue {
    use super::{ConsumerQueue, Tensor};
    use crate::backend::wgpu::WgpuBackend;
    use crate::{Error, Result};

    /// A tensor as work on a wgpu queue sees it. Submit that work before the tensor's last handle
    /// is dropped: the queue itself then keeps the next writer behind it.
    #[derive(Debug, Clone, Copy)]
    #[non_exhaustive]
    pub struct WgpuBinding<'t> {
        /// The buffer. Tensors of one batch share it.
        pub buffer: &'t wgpu::Buffer,
        /// First byte of the tensor, a multiple of 256.
        pub offset: u64,
        /// Bytes of the tensor, rounded up to a multiple of 4.
        pub size: u64,
    }

    impl<'t> WgpuBinding<'t> {
        /// The binding for a bind group; `None` for a tensor of no bytes.
        pub fn as_buffer_binding(&self) -> Option<wgpu::BufferBinding<'t>> {
            let size = Some(wgpu::BufferSize::new(self.size)?);
            Some(wgpu::BufferBinding { buffer: self.buffer, offset: self.offset, size })
        }
    }

    /// wgpu compares queues by their numbers within an instance, so a queue of another
    /// `wgpu::Instance` may be taken for the device's own. Use one instance.
    impl ConsumerQueue for wgpu::Queue {
        type Handle<'t> = WgpuBinding<'t>;

        fn bind<'t>(&self, tensor: &'t Tensor) -> Result<WgpuBinding<'t>> {
            tensor.device().check()?;
            let own = tensor.device().as_wgpu().is_some_and(|(_, queue)| queue == self);
            let memory = tensor.storage().block().memory();
            match WgpuBackend::buffer(memory).filter(|_| own) {
                Some(buffer) => Ok(WgpuBinding {
                    buffer,
                    offset: tensor.offset(),
                    size: tensor.byte_len().next_multiple_of(4),
                }),
                None => Err(Error::record(
                    "a binding to a wgpu queue",
                    format!("it is not the queue of {}", tensor.device().info().name),
                )),
            }
        }
    }
}

#[cfg(feature = "wgpu")]
pub use wgpu_queue::WgpuBinding;
