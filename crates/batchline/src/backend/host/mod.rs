//! The host as a device: the reference for every other one.
//!
//! Memory is ordinary memory, and a segment runs on the thread that submits it, so its fence has
//! passed when `submit` returns. In the loader a filled slot becomes the batch itself.
#![allow(unsafe_code, reason = "runs commands on memory")]

pub(crate) mod convert;
pub(crate) mod execute;
mod memory;
mod registered;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{
    Backend, CommandKind, DeviceInfo, DeviceKind, DeviceMemory, Direction, Fence, Segment,
    StagingMemory, StreamId, SubmitError,
};
use crate::Result;

pub(crate) use execute::Job;
pub(crate) use memory::HostMemory;
#[cfg(feature = "testing")]
pub(crate) use registered::HostRegistered;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct HostBackend {
    info: DeviceInfo,
    /// Segments done.
    passed: AtomicU64,
}

impl HostBackend {
    pub(crate) fn new() -> Self {
        Self {
            info: DeviceInfo {
                kind: DeviceKind::Host,
                name: "host".to_owned(),
                driver: String::new(),
                hardware: false,
                max_allocation: isize::MAX as u64,
                copy_alignment: 1,
                unified: true,
            },
            passed: AtomicU64::new(0),
        }
    }
}

// SAFETY: a segment runs to its end within `submit`, on the memory that it names.
unsafe impl Backend for HostBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn allocate(&self, bytes: u64) -> Result<Box<dyn DeviceMemory>> {
        Ok(Box::new(HostMemory::new(&self.info.name, bytes)?))
    }

    fn allocate_staging(&self, bytes: u64, _: Direction) -> Result<Box<dyn StagingMemory>> {
        Ok(Box::new(HostMemory::new(&self.info.name, bytes)?))
    }

    fn stream_of(&self, _: CommandKind) -> StreamId {
        0
    }

    fn consumer_stream(&self) -> StreamId {
        0
    }

    fn submit(&self, segment: Segment<'_, '_>) -> Result<(), SubmitError> {
        for command in segment.commands {
            let job = Job::new(command)?;
            // SAFETY: it runs before `submit` returns, while the segment borrows all its memory;
            // submissions are made one at a time, and views of the host keep writers away.
            unsafe { job.run() }?;
        }
        self.passed.store(segment.fence.value, Ordering::Release);
        Ok(())
    }

    fn wait(&self, fence: Fence, _: Duration) -> Result<bool> {
        Ok(fence.value <= self.passed.load(Ordering::Acquire))
    }

    fn consumer_after(&self, _: StreamId, _: &[Fence]) -> Result<()> {
        Ok(())
    }

    fn consumer_position(&self, _: StreamId) -> Result<Fence> {
        Ok(Fence { stream: 0, value: 0 })
    }
}
