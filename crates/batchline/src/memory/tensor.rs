//! Tensors: shapes on pooled device memory, reference-counted.

use std::fmt;

use super::manager::MemoryManager;
use super::storage::{Share, Storage};
use super::view::{ConsumerQueue, Host};
use crate::command::{CommandBuffer, Conversion};
use crate::staging::StagingBufferPool;
use crate::{DType, Device, Element, Error, Result, Shape};

/// A dense tensor on a device. Clones share its memory; the last one to go gives it back, to be
/// used again once the device is done with it.
///
/// ```
/// use batchline::{Device, DType, MemoryManager};
/// let memory = MemoryManager::new(&Device::host());
/// let tensor = memory.upload(&[0.4f32, 1.5, 300.0], &[3])?;
/// // To nearest, ties to even, saturating.
/// assert_eq!(tensor.convert_to(DType::U8)?.to_vec::<u8>()?, [0, 2, 255]);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Clone)]
pub struct Tensor {
    share: Share,
    /// First byte in the storage, a multiple of 256.
    offset: u64,
    shape: Shape,
    dtype: DType,
}

impl Tensor {
    pub(crate) fn new(share: Share, offset: u64, shape: Shape, dtype: DType) -> Self {
        Self { share, offset, shape, dtype }
    }

    /// The user's part in the memory, which the tensors of a batch have in common.
    pub(crate) fn share(&self) -> &Share {
        &self.share
    }

    pub(crate) fn storage(&self) -> &Storage {
        self.share.storage()
    }

    pub(crate) fn memory(&self) -> &MemoryManager {
        self.storage().memory()
    }

    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The device that holds it.
    pub fn device(&self) -> &Device {
        self.memory().device()
    }

    /// The number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.elements().expect("checked when the tensor was made")
    }

    /// Bytes of the elements.
    pub fn byte_len(&self) -> u64 {
        self.shape.bytes(self.dtype).expect("checked when the tensor was made")
    }

    /// Overwrites the tensor with these elements, outermost dimension first. Returns when they are
    /// on the device.
    ///
    /// # Errors
    /// `T` is not its type, `data` has another length, or the device failed.
    pub fn write<T: Element>(&self, data: &[T]) -> Result<()> {
        let pool = StagingBufferPool::for_transfer(self.memory(), self.byte_len())?;
        pool.transfer_to_gpu_sync(data, self)
    }

    /// Overwrites the tensor with another one of the same device, type and size. Returns when it
    /// is done.
    ///
    /// # Errors
    /// The two don't match, overlap, or the device failed.
    pub fn copy_from(&self, other: &Tensor) -> Result<()> {
        let mut commands = CommandBuffer::single(self.memory())?;
        commands.copy(other, self)?;
        commands.execute()?.wait()
    }

    /// Reads the elements back, outermost dimension first.
    ///
    /// # Errors
    /// `T` is not its type ([`u8`] also reads [`DType::Bool`]), or the device failed.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        self.expect::<T>()?;
        let len = usize::try_from(self.elements())
            .map_err(|_| Error::Overflow { what: "a vector".to_owned() })?;
        let mut data = vec![T::zeroed(); len];
        self.read_into(bytemuck::cast_slice_mut(&mut data))?;
        Ok(data)
    }

    /// Reads the bytes back, in the machine's byte order.
    ///
    /// # Errors
    /// The device failed.
    pub fn to_bytes(&self) -> Result<Vec<u8>> {
        let len = usize::try_from(self.byte_len())
            .map_err(|_| Error::Overflow { what: "a vector".to_owned() })?;
        let mut bytes = vec![0; len];
        self.read_into(&mut bytes)?;
        Ok(bytes)
    }

    /// Reads the bytes back into a buffer of their length.
    fn read_into(&self, bytes: &mut [u8]) -> Result<()> {
        if self.device().info().unified {
            bytes.copy_from_slice(Host.bind(self)?.bytes());
            return Ok(());
        }
        let mut piece = usize::try_from(self.memory().piece()).unwrap_or(usize::MAX);
        let mut start = 0;
        while start < bytes.len() {
            let end = start.saturating_add(piece).min(bytes.len());
            let mut commands = CommandBuffer::single(self.memory())?;
            match commands.download_range(self, start as u64..end as u64) {
                Ok(readback) => {
                    commands.execute()?.wait()?;
                    readback.with_bytes(|arrived| bytes[start..end].copy_from_slice(arrived))?;
                    start = end;
                }
                // Others hold most of the page-locked memory: go through what is left of it.
                Err(Error::LimitReached { .. }) if piece > 4096 => piece /= 2,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A new tensor of another type: rounded to nearest, ties to even; saturated where the target
    /// is an integer, with NaN as 0. Returns when it is done.
    ///
    /// # Errors
    /// There is no memory for it, or the device failed.
    pub fn convert_to(&self, dtype: DType) -> Result<Tensor> {
        self.convert(dtype, &Conversion::new())
    }

    /// A new tensor of another type, scaled and reordered as `conversion` says. Returns when it is
    /// done.
    ///
    /// # Errors
    /// The conversion does not fit the shape, there is no memory, or the device failed.
    pub fn convert(&self, dtype: DType, conversion: &Conversion) -> Result<Tensor> {
        let shape = conversion.shape(self.shape)?;
        let converted = self.memory().tensor(shape.dims(), dtype)?;
        let mut commands = CommandBuffer::single(self.memory())?;
        commands.convert(self, &converted, conversion)?;
        commands.execute()?.wait()?;
        Ok(converted)
    }

    /// Makes `queue` wait for the tensor, and hands out what that queue's work needs to use it:
    /// a slice for [`Host`], a buffer for a `wgpu::Queue`.
    ///
    /// # Errors
    /// The queue is not one of the tensor's device, or the device is lost.
    pub fn bind<'t, Q: ConsumerQueue>(&'t self, queue: &Q) -> Result<Q::Handle<'t>> {
        queue.bind(self)
    }

    /// Checks that elements may be seen as `T`.
    pub(crate) fn expect<T: Element>(&self) -> Result<()> {
        if T::matches(self.dtype) {
            return Ok(());
        }
        let what = format!("a tensor of shape {}", self.shape);
        Err(Error::DType { what, expected: self.dtype, found: T::DTYPE })
    }
}

impl fmt::Debug for Tensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tensor({} {} on {})", self.dtype, self.shape, self.device().info().name)
    }
}
