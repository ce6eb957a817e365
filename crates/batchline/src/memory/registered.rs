//! Memory of a data set that the device reads by itself.
#![allow(unsafe_code, reason = "promises a backend that memory stays where it is")]

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::manager::{MemoryManager, StagingReservation};
use crate::backend::RegisteredMemory;
use crate::source::Dataset;
use crate::{Error, Result};

/// All rows of one tensor of a data set, registered with a device. Page-locked memory, and counted
/// as such. It goes when nobody has it any more: no loader, and no operation in flight.
#[derive(Debug)]
pub(crate) struct Registered {
    /// `None` only while it is being dropped; before what it rests on.
    memory: Option<Box<dyn RegisteredMemory>>,
    reservation: Option<StagingReservation>,
    /// Whose memory it is.
    dataset: Option<Owner>,
    /// Whether the device may go on reading it for ever.
    quarantined: AtomicBool,
    /// Last: the device must outlive what is registered with it.
    manager: MemoryManager,
}

/// Keeps a data set.
struct Owner(Arc<dyn Dataset>);

impl std::fmt::Debug for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a data set of {} samples", self.0.len())
    }
}

impl Registered {
    /// Registers a tensor of a data set.
    ///
    /// # Errors
    /// It does not lie in memory as a whole; it does not fit under the limit; or the device does not
    /// take it.
    pub(crate) fn new(
        manager: &MemoryManager,
        dataset: &Arc<dyn Dataset>,
        tensor: usize,
    ) -> Result<Arc<Self>> {
        let Some(memory) = dataset.contiguous(tensor) else {
            return Err(Error::record("a registration", "the data set does not lie in memory"));
        };
        let reservation = manager.reserve_staging(memory.len() as u64)?;
        let core = manager.device().core();
        core.check()?;
        // SAFETY: the data set gave a slice that lives as long as it is borrowed, and it is from
        // here on until `memory` is dropped: `dataset` below is a share in it, so nobody can have
        // it for himself. A slice that is borrowed is neither moved nor written.
        let memory = unsafe { core.backend().register(NonNull::from(memory)) };
        Ok(Arc::new(Self {
            memory: Some(core.health().notice(memory)?),
            reservation: Some(reservation),
            dataset: Some(Owner(Arc::clone(dataset))),
            quarantined: AtomicBool::new(false),
            manager: manager.clone(),
        }))
    }

    pub(crate) fn memory(&self) -> &dyn RegisteredMemory {
        self.memory.as_deref().expect("memory until it is dropped")
    }

    /// Gives it up: the device may go on reading.
    pub(crate) fn quarantine(&self) {
        self.quarantined.store(true, Ordering::Release);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        // What a lost device has registered stays so, whoever might read it.
        let lost = self.manager.device().check().is_err();
        if lost || self.quarantined.load(Ordering::Acquire) {
            std::mem::forget(self.memory.take());
            std::mem::forget(self.dataset.take());
            if let Some(reservation) = self.reservation.take() {
                reservation.quarantine();
            }
        }
    }
}
