//! The pool of staging buffers.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::buffer::StagingBuffer;
use crate::backend::Direction;
use crate::device::LossListener;
use crate::memory::{Patience, Pool, StagingLease};
use crate::{Device, Error, MemoryManager, Result};

/// A bounded pool of [`StagingBuffer`]s. A transfer that finds none free waits for one: that is
/// the back-pressure. Clones are handles to the same pool.
///
/// ```
/// use batchline::{Device, DType, MemoryManager, StagingBufferPool};
/// let memory = MemoryManager::new(&Device::host());
/// let pool = StagingBufferPool::new(&memory, 3)?;
/// let tensor = memory.tensor(&[10_000_000], DType::U8)?;
/// // Larger than a buffer of 4 MiB: it goes through three.
/// pool.transfer_to_gpu(&vec![7u8; 10_000_000], &tensor)?.wait()?;
/// assert_eq!(tensor.to_vec::<u8>()?[9_999_999], 7);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct StagingBufferPool {
    pub(super) inner: Arc<Inner>,
}

#[derive(Debug)]
pub(super) struct Inner {
    pool: Pool<StagingLease>,
    buffer_size: u64,
    pub(super) memory: MemoryManager,
    pub(super) transfers: AtomicU64,
    pub(super) bytes: AtomicU64,
}

impl LossListener for Inner {
    fn device_lost(&self, error: &Error) {
        self.pool.close(error.clone());
    }
}

/// The counts of a [`StagingBufferPool`] at one moment: `available + in_use = total ≤ max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[non_exhaustive]
pub struct StagingPoolStats {
    /// Buffers made and free.
    pub available: usize,
    /// Buffers being filled or in flight.
    pub in_use: usize,
    /// Buffers made.
    pub total: usize,
    /// The most that will be made.
    pub max: usize,
    /// Bytes of each.
    pub buffer_size: u64,
    /// Transfers started with [`StagingBufferPool::transfer_to_gpu`].
    pub transfers: u64,
    /// Bytes of those transfers.
    pub bytes: u64,
}

impl StagingBufferPool {
    /// Bytes of a buffer unless told otherwise: from 4 MiB on, the fixed cost of a copy no longer
    /// shows on a PCIe link.
    pub const DEFAULT_BUFFER_SIZE: u64 = 4 << 20;

    /// A pool of at most `max_buffers` buffers of 4 MiB. They are made when they are first needed.
    ///
    /// # Errors
    /// `max_buffers` is 0; a buffer can never fit under `staging_limit`; the device is lost.
    pub fn new(memory: &MemoryManager, max_buffers: usize) -> Result<Self> {
        Self::with_buffer_size(memory, max_buffers, Self::DEFAULT_BUFFER_SIZE)
    }

    /// A pool of at most `max_buffers` buffers of at least `buffer_size` bytes.
    ///
    /// # Errors
    /// As [`new`](Self::new), and for a `buffer_size` of 0.
    pub fn with_buffer_size(
        memory: &MemoryManager,
        max_buffers: usize,
        buffer_size: u64,
    ) -> Result<Self> {
        for (setting, value) in [("max_buffers", max_buffers as u64), ("buffer_size", buffer_size)]
        {
            if value == 0 {
                return Err(Error::config(setting, "is 0", "give at least 1"));
            }
        }
        memory.fitting_staging(buffer_size)?;
        let device = memory.device();
        device.check()?;
        let inner = Arc::new(Inner {
            pool: Pool::new("staging buffer pool", max_buffers),
            buffer_size: buffer_size.next_multiple_of(256),
            memory: memory.clone(),
            transfers: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
        });
        let listener: Weak<Inner> = Arc::downgrade(&inner);
        device.core().on_loss(listener);
        Ok(Self { inner })
    }

    /// A pool for one transfer of so many bytes: two buffers, one filled while the other is read.
    pub(crate) fn for_transfer(memory: &MemoryManager, bytes: u64) -> Result<Self> {
        Self::with_buffer_size(memory, 2, memory.piece().min(bytes.max(1)))
    }

    /// The device that the buffers are for.
    pub fn device(&self) -> &Device {
        self.inner.memory.device()
    }

    /// A buffer; waits while all are in use.
    ///
    /// # Errors
    /// The pool is closed, the device lost, or there is no memory for a first buffer.
    pub fn get_buffer(&self) -> Result<StagingBuffer> {
        self.get(Patience::Forever)
    }

    /// A buffer, or `None` while all are in use.
    ///
    /// # Errors
    /// As [`get_buffer`](Self::get_buffer).
    pub fn try_get_buffer(&self) -> Result<Option<StagingBuffer>> {
        match self.get(Patience::None) {
            Err(Error::Timeout { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    /// A buffer; waits for at most `timeout` while all are in use.
    ///
    /// # Errors
    /// As [`get_buffer`](Self::get_buffer), and [`Error::Timeout`].
    pub fn get_buffer_timeout(&self, timeout: Duration) -> Result<StagingBuffer> {
        self.get(Patience::within(timeout))
    }

    fn get(&self, patience: Patience) -> Result<StagingBuffer> {
        let Inner { pool, memory, buffer_size, .. } = &*self.inner;
        self.device().check()?;
        let patience = self.device().core().patience(patience);
        let make = || memory.staging(*buffer_size, Direction::Upload, Patience::None);
        Ok(StagingBuffer::new(pool.acquire(patience, make)?, memory.device().clone()))
    }

    /// Makes one more buffer now, so that it need not be made later; false where no more is to be
    /// had.
    pub(crate) fn grow(&self) -> Result<bool> {
        let counts = self.inner.pool.counts();
        if counts.total == counts.max {
            return Ok(false);
        }
        // All that there are, so that the next one is new.
        let mut taken = Vec::new();
        for _ in 0..=counts.total {
            match self.get(Patience::None) {
                Ok(buffer) => taken.push(buffer),
                Err(Error::Timeout { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    /// The counts at this moment.
    pub fn stats(&self) -> StagingPoolStats {
        let counts = self.inner.pool.counts();
        StagingPoolStats {
            available: counts.available,
            in_use: counts.in_use,
            total: counts.total,
            max: counts.max,
            buffer_size: self.inner.buffer_size,
            transfers: self.inner.transfers.load(Ordering::Relaxed),
            bytes: self.inner.bytes.load(Ordering::Relaxed),
        }
    }

    /// Waits until every transfer that was started so far is done. Buffers being filled are not
    /// waited for.
    ///
    /// # Errors
    /// The device is lost. What a transfer failed with, its own [`Transfer`](super::Transfer)
    /// tells.
    pub fn wait_for_transfer_completion(&self) -> Result<()> {
        self.device().check()?;
        let patience = self.device().core().patience(Patience::Forever);
        if !self.inner.pool.wait_landed(patience) {
            let problem = "a completion cannot wait for other work: it would wait for itself";
            return Err(Error::record("a wait", problem));
        }
        self.device().check()
    }

    /// Closes the pool: waits for every buffer in flight; each later call is an error. Buffers
    /// being filled stay usable and are not taken back. Called from a completion it closes the pool
    /// and does not wait, since completions run one after another.
    pub fn cleanup(&self) {
        self.close(Error::Closed { what: "staging buffer pool" });
        let patience = self.device().core().patience(Patience::Forever);
        self.inner.pool.wait_landed(patience);
    }

    /// Ends every wait with `error`, without waiting for what is in flight.
    pub(crate) fn close(&self, error: Error) {
        self.inner.pool.close(error);
    }
}
