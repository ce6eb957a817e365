//! Blocks of device and page-locked memory, and what is known about their use.

use std::sync::Arc;

use super::shelf::Block;
use crate::Result;
use crate::backend::{DeviceMemory, Direction, Fence, MAX_STREAMS, StagingMemory};
use crate::device::DeviceCore;
use crate::sync::Mutex;

/// Who used a block last. All that decides when it may be read, written or freed.
///
/// The states of the protocol are read off it: a block is *filling* until `written` has passed,
/// *ready* from then on, *leased* while a batch holds it, *retired* once the consumer's position is
/// among `read`, and *free* for the next writer, whose stream waits for all of them.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    /// The last segment that writes it.
    pub(crate) written: Option<Fence>,
    /// On each stream the last segment that reads it since then; at most one per stream.
    pub(crate) read: Vec<Fence>,
    /// Views of the host that are open.
    pub(crate) views: usize,
}

impl Usage {
    /// Notes a read; reads need not wait for one another.
    pub(crate) fn note_read(&mut self, fence: Fence) {
        match self.read.iter_mut().find(|read| read.stream == fence.stream) {
            Some(read) => read.value = read.value.max(fence.value),
            None => self.read.push(fence),
        }
    }

    /// Notes a write, which comes after all that was before.
    pub(crate) fn note_write(&mut self, fence: Fence) {
        self.written = Some(fence);
        self.read.clear();
    }

    /// What a reader must come after.
    pub(crate) fn before_read(&self) -> impl Iterator<Item = Fence> + '_ {
        self.written.iter().copied()
    }

    /// What a writer must come after.
    pub(crate) fn before_write(&self) -> impl Iterator<Item = Fence> + '_ {
        self.written.iter().chain(&self.read).copied()
    }
}

/// A block of device memory.
#[derive(Debug)]
pub(crate) struct DeviceBlock {
    pub(crate) memory: Box<dyn DeviceMemory>,
    pub(crate) usage: Mutex<Usage>,
    capacity: u64,
    /// Last: the device must outlive its memory.
    core: Arc<DeviceCore>,
}

impl DeviceBlock {
    pub(crate) fn new(core: &Arc<DeviceCore>, capacity: u64) -> Result<Self> {
        core.check()?;
        let memory = core.health().notice(core.backend().allocate(capacity))?;
        let read = Vec::with_capacity(MAX_STREAMS);
        let usage = Mutex::new(Usage { read, ..Usage::default() });
        Ok(Self { memory, usage, capacity, core: Arc::clone(core) })
    }

    /// Waits, on the host, for a fence of the block's device.
    pub(crate) fn wait(&self, fence: Fence) -> Result<()> {
        if self.core.has_passed(fence) { Ok(()) } else { self.core.health().wait(fence) }
    }
}

impl Block for DeviceBlock {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn is_idle(&self) -> bool {
        self.usage.lock().before_write().all(|fence| self.core.has_passed(fence))
    }
}

/// A block of page-locked memory. It is only ever dropped or lent when no segment names it.
#[derive(Debug)]
pub(crate) struct StagingBlock {
    pub(crate) memory: Box<dyn StagingMemory>,
    direction: Direction,
    capacity: u64,
    /// Last: the device must outlive its memory.
    _core: Arc<DeviceCore>,
}

impl StagingBlock {
    pub(crate) fn new(core: &Arc<DeviceCore>, capacity: u64, direction: Direction) -> Result<Self> {
        core.check()?;
        let memory = core.health().notice(core.backend().allocate_staging(capacity, direction))?;
        Ok(Self { memory, direction, capacity, _core: Arc::clone(core) })
    }
}

impl Block for StagingBlock {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn class(&self) -> u8 {
        self.direction as u8
    }

    fn is_idle(&self) -> bool {
        true
    }
}
