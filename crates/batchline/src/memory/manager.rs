//! The memory of one device, under byte limits.

use std::mem::ManuallyDrop;
use std::sync::Arc;

use super::block::{DeviceBlock, StagingBlock};
use super::pool::Patience;
use super::shelf::{Lease, Reservation, Shelf};
use super::storage::{Share, Storage};
use super::tensor::Tensor;
use crate::backend::Direction;
use crate::sync::spawn_named;
use crate::{DType, Device, Element, Error, Result, Shape};

/// How much memory a [`MemoryManager`] may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryLimits {
    /// Bytes of device memory: tensors and what is kept to be used again. 4 GiB by default.
    pub device_limit: u64,
    /// Bytes of page-locked memory, for either direction. 1 GiB by default.
    pub staging_limit: u64,
}

impl Default for MemoryLimits {
    fn default() -> Self {
        Self { device_limit: 4 << 30, staging_limit: 1 << 30 }
    }
}

impl MemoryLimits {
    /// Sets the bytes of device memory.
    #[must_use]
    pub fn device_limit(mut self, bytes: u64) -> Self {
        self.device_limit = bytes;
        self
    }

    /// Sets the bytes of page-locked memory.
    #[must_use]
    pub fn staging_limit(mut self, bytes: u64) -> Self {
        self.staging_limit = bytes;
        self
    }
}

/// Device memory and page-locked memory of one device, pooled, counted to the byte, and bounded.
/// Clones are handles to the same manager.
///
/// ```
/// use batchline::{Device, DType, MemoryManager};
/// let memory = MemoryManager::new(&Device::host());
/// let tensor = memory.tensor(&[2, 3], DType::F32)?;
/// drop(tensor);
/// let stats = memory.stats();
/// assert_eq!(stats.device_in_use, 0);
/// assert!(stats.device_cached >= 24);
/// memory.trim();
/// assert_eq!(memory.stats().device_cached, 0);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct MemoryManager {
    shared: Arc<Shared>,
}

pub(crate) type DeviceLease = Lease<DeviceBlock>;
pub(crate) type StagingLease = Lease<StagingBlock>;
pub(crate) type StagingReservation = Reservation<StagingBlock>;

#[derive(Debug)]
struct Shared {
    blocks: Arc<Shelf<DeviceBlock>>,
    staging: Arc<Shelf<StagingBlock>>,
    limits: MemoryLimits,
    /// Last: the device must outlive its memory.
    device: Device,
}

/// Bytes and events of a [`MemoryManager`], since it was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[non_exhaustive]
pub struct MemoryStats {
    /// Bytes of device memory that tensors hold.
    pub device_in_use: u64,
    /// Bytes of device memory kept to be used again.
    pub device_cached: u64,
    /// The limit for both together.
    pub device_limit: u64,
    /// Bytes of page-locked memory in buffers.
    pub staging_in_use: u64,
    /// Bytes of page-locked memory kept to be used again.
    pub staging_cached: u64,
    /// The limit for both together.
    pub staging_limit: u64,
    /// Bytes given up because it can't be proven that the device is done with them.
    pub quarantined: u64,
    /// Allocations made by the device or the system. It stands still in a steady state.
    pub allocations: u64,
}

impl MemoryManager {
    /// A manager with the default [`MemoryLimits`].
    pub fn new(device: &Device) -> Self {
        Self::with_limits(device, MemoryLimits::default())
    }

    /// A manager with limits of your own.
    pub fn with_limits(device: &Device, limits: MemoryLimits) -> Self {
        let max = device.info().max_allocation;
        let (device_limit, staging_limit) = (limits.device_limit, limits.staging_limit);
        let blocks = Shelf::new("device memory", "device_limit", device_limit, max);
        let staging = Shelf::new("page-locked memory", "staging_limit", staging_limit, max);
        Self {
            shared: Arc::new(Shared {
                blocks: Arc::new(blocks),
                staging: Arc::new(staging),
                limits,
                device: device.clone(),
            }),
        }
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// The limits.
    pub fn limits(&self) -> MemoryLimits {
        self.shared.limits
    }

    /// A tensor with any content.
    ///
    /// # Errors
    /// [`Error::TooLarge`] when it can never fit; [`Error::LimitReached`] when it does not fit now;
    /// a size that overflows; the device's own error.
    pub fn tensor(&self, shape: &[u64], dtype: DType) -> Result<Tensor> {
        let shape = Shape::new(shape)?;
        let bytes = shape.bytes(dtype)?;
        let block = self.block(bytes, Patience::None)?;
        Ok(Tensor::new(Share::new(Storage::new(block, self)), 0, shape, dtype))
    }

    /// A tensor of these elements. Returns when they are on the device.
    ///
    /// # Errors
    /// As [`tensor`](Self::tensor); or `data` is longer or shorter than `shape` says.
    pub fn upload<T: Element>(&self, data: &[T], shape: &[u64]) -> Result<Tensor> {
        let elements = Shape::new(shape)?.elements()?;
        if elements != data.len() as u64 {
            let (expected, found) = (elements, data.len() as u64);
            let what = format!("the data of a tensor of shape {}", Shape::new(shape)?);
            return Err(Error::Length { what, expected, found, unit: "elements" });
        }
        let tensor = self.tensor(shape, T::DTYPE)?;
        tensor.write(data)?;
        Ok(tensor)
    }

    /// What is in use at this moment.
    pub fn stats(&self) -> MemoryStats {
        let device = self.shared.blocks.counts();
        let staging = self.shared.staging.counts();
        MemoryStats {
            device_in_use: device.in_use,
            device_cached: device.cached,
            device_limit: self.shared.limits.device_limit,
            staging_in_use: staging.in_use,
            staging_cached: staging.cached,
            staging_limit: self.shared.limits.staging_limit,
            quarantined: device.quarantined + staging.quarantined,
            allocations: device.allocations + staging.allocations,
        }
    }

    /// Frees what is kept to be used again and no longer used by the device; returns the bytes.
    pub fn trim(&self) -> u64 {
        self.shared.blocks.trim() + self.shared.staging.trim()
    }

    /// Lets go of the manager without a wait for the device, as it takes to free memory: if this
    /// was the last handle, that is the work of another thread.
    pub(crate) fn let_go(self) {
        let Some(shared) = Arc::into_inner(self.shared) else { return };
        // A thread that is refused must not leave the work to this one.
        let shared = ManuallyDrop::new(shared);
        let free = move || drop(ManuallyDrop::into_inner(shared));
        let _ = spawn_named("free memory".to_owned(), free);
    }

    pub(crate) fn block(&self, bytes: u64, patience: Patience) -> Result<DeviceLease> {
        let core = self.device().core();
        let shelf = &self.shared.blocks;
        let lend = || shelf.lend(bytes, 0, patience, |capacity| DeviceBlock::new(core, capacity));
        or_after_trimming(lend, || shelf.trim())
    }

    pub(crate) fn staging(
        &self,
        bytes: u64,
        direction: Direction,
        patience: Patience,
    ) -> Result<StagingLease> {
        let core = self.device().core();
        let make = |capacity| StagingBlock::new(core, capacity, direction);
        let shelf = &self.shared.staging;
        or_after_trimming(|| shelf.lend(bytes, direction as u8, patience, make), || shelf.trim())
    }

    /// Counts memory of others as page-locked.
    pub(crate) fn reserve_staging(&self, bytes: u64) -> Result<StagingReservation> {
        self.shared.staging.reserve(bytes)
    }

    /// How many upload buffers of `bytes` fit at most, an eighth being left for reading back.
    pub(crate) fn fitting_staging(&self, bytes: u64) -> Result<u64> {
        let capacity = self.shared.staging.capacity_for(bytes)?;
        let limit = self.shared.staging.limit();
        Ok(((limit - limit / 8) / capacity).max(1))
    }

    /// The largest piece in which bytes are best moved through staging memory: a good size for a
    /// link, as far as the limit allows it.
    pub(crate) fn piece(&self) -> u64 {
        const GOOD: u64 = 4 << 20;
        let most = (self.shared.staging.limit() / 4).min(self.device().info().max_allocation);
        GOOD.min(most).max(256) & !255
    }
}

/// Where the device has less than the limits say, what is kept to be used again makes room.
fn or_after_trimming<L>(lend: impl Fn() -> Result<L>, trim: impl FnOnce() -> u64) -> Result<L> {
    match lend() {
        Err(Error::Device { .. }) if trim() > 0 => lend(),
        other => other,
    }
}
