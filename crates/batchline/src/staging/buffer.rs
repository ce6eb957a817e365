//! A staging buffer: page-locked memory that the host fills and the device reads.
#![allow(unsafe_code, reason = "makes slices of page-locked memory")]

use std::fmt;
use std::ptr::NonNull;

use crate::backend::StagingMemory;
use crate::memory::{Loan, StagingLease};
use crate::{Device, Element, Error, Result};

/// Page-locked memory on loan from a [`StagingBufferPool`](super::StagingBufferPool).
///
/// One value, one state: while there is a `StagingBuffer` the host may write it (*filling*). It is
/// given away when it is recorded for an upload and then belongs to the command buffer (*in
/// flight*) until the device has read it, when it is *free* again. So it can't be written while
/// the device reads it:
///
/// ```compile_fail,E0382
/// # use batchline::{CommandBufferPool, Device, DType, MemoryManager, StagingBufferPool};
/// # let memory = MemoryManager::new(&Device::host());
/// # let tensor = memory.tensor(&[4], DType::U8)?;
/// # let mut commands = CommandBufferPool::new(&memory, 1)?.get_buffer()?;
/// let mut buffer = StagingBufferPool::new(&memory, 2)?.get_buffer()?;
/// commands.upload(buffer, &tensor)?;
/// buffer.as_mut_slice()[0] = 1; // it was given away
/// # Ok::<(), batchline::Error>(())
/// ```
///
/// It goes back to its own pool when dropped, or by [`return_buffer`](Self::return_buffer), which
/// names no pool:
///
/// ```compile_fail,E0061
/// # use batchline::{Device, MemoryManager, StagingBufferPool};
/// # let memory = MemoryManager::new(&Device::host());
/// # let (pool, other) = (StagingBufferPool::new(&memory, 1)?, StagingBufferPool::new(&memory, 1)?);
/// let buffer = pool.get_buffer()?;
/// buffer.return_buffer(&other);
/// # Ok::<(), batchline::Error>(())
/// ```
pub struct StagingBuffer {
    /// `None` only while it is being given up.
    loan: Option<Loan<StagingLease>>,
    device: Device,
}

impl StagingBuffer {
    pub(crate) fn new(loan: Loan<StagingLease>, device: Device) -> Self {
        Self { loan: Some(loan), device }
    }

    /// Bytes that fit.
    pub fn capacity(&self) -> usize {
        self.memory().len()
    }

    /// The device that the buffer is for.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The memory, to be written. Reading it may be slow: some devices make it write-combined.
    /// It holds whatever it held last.
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        let (start, len) = (self.base(), self.capacity());
        // SAFETY: valid and initialised by the backend's promise, since no segment in flight names
        // it: the buffer would have been given away. Exclusive by `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) }
    }

    /// Copies elements to byte `offset`.
    ///
    /// # Errors
    /// [`Error::Length`]: they don't fit.
    pub fn write<T: Element>(&mut self, offset: usize, data: &[T]) -> Result<()> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let capacity = self.capacity();
        let window = offset.checked_add(bytes.len()).filter(|end| *end <= capacity);
        let Some(end) = window else {
            return Err(Error::Length {
                what: format!("a staging buffer written at byte {offset}"),
                expected: (offset as u64).saturating_add(bytes.len() as u64),
                found: capacity as u64,
                unit: "bytes",
            });
        };
        self.as_mut_slice()[offset..end].copy_from_slice(bytes);
        Ok(())
    }

    /// Gives the buffer back unused. Dropping it does the same.
    pub fn return_buffer(self) {
        drop(self);
    }

    /// The first byte.
    pub(crate) fn base(&self) -> NonNull<u8> {
        self.memory().ptr()
    }

    pub(crate) fn memory(&self) -> &dyn StagingMemory {
        self.loan.as_ref().expect("a loan until it is given up").memory()
    }

    /// Notes that a submission owns the buffer from now on.
    pub(crate) fn take_off(&mut self) {
        if let Some(loan) = &mut self.loan {
            loan.take_off();
        }
    }

    /// Gives the memory up: the device may go on reading it.
    pub(crate) fn quarantine(mut self) {
        if let Some(loan) = self.loan.take() {
            loan.keep().quarantine();
        }
    }
}

impl Drop for StagingBuffer {
    fn drop(&mut self) {
        if self.loan.is_some() {
            let device = self.device.clone();
            // A lost device's memory may be gone from under us.
            if device.check().is_ok() {
                device.core().backend().slot_freed(self.as_mut_slice());
            }
        }
    }
}

impl fmt::Debug for StagingBuffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "StagingBuffer({} bytes on {})", self.capacity(), self.device.info().name)
    }
}

/// The first `len` bytes of a download that has arrived.
pub(crate) fn arrived_bytes(lease: &StagingLease, len: u64) -> &[u8] {
    let memory = lease.memory();
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(memory.len());
    // SAFETY: valid and initialised by the backend's promise, since the only segment that names it
    // is done; the borrowed lease keeps it, and nobody else has the lease.
    unsafe { std::slice::from_raw_parts(memory.ptr().as_ptr(), len) }
}
