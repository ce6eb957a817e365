//! Blocks of device and page-locked memory, and what is known about their use.

use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

use super::shelf::{Block, Update};
use crate::backend::{DeviceMemory, Direction, Fence, StagingMemory};
use crate::device::DeviceCore;
use crate::source::TENSOR_ALIGNMENT;
use crate::sync::Mutex;
use crate::{Error, Result};

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

    /// Notes a write, which comes after the reads that `is_before` tells of. Others were noted while
    /// it was being submitted, and go on.
    pub(crate) fn note_write(&mut self, fence: Fence, is_before: impl Fn(&Fence) -> bool) {
        self.written = Some(fence);
        self.read.retain(|read| !is_before(read));
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
    /// `None` only while it is being dropped.
    memory: Option<Box<dyn DeviceMemory>>,
    pub(crate) usage: Mutex<Usage>,
    capacity: u64,
    /// Last: the device must outlive its memory.
    core: Arc<DeviceCore>,
}

impl DeviceBlock {
    pub(crate) fn new(core: &Arc<DeviceCore>, capacity: u64) -> Result<Self> {
        core.check()?;
        let memory = core.health().notice(core.backend().allocate(capacity))?;
        let unified = core.backend().info().unified;
        let start = memory.host_ptr();
        check(core, memory.len(), capacity, start)?;
        if unified && start.is_none() {
            return Err(broken(core, "unified memory without an address"));
        }
        let memory = Some(memory);
        let read = Vec::with_capacity(8);
        let usage = Mutex::new(Usage { read, ..Usage::default() });
        Ok(Self { memory, usage, capacity, core: Arc::clone(core) })
    }

    pub(crate) fn memory(&self) -> &dyn DeviceMemory {
        self.memory.as_deref().expect("memory until it is dropped")
    }

    /// Waits, on the host, until nothing on the device uses the block.
    pub(crate) fn wait_idle(&self) -> Result<()> {
        while let Some(fence) = self.pending() {
            self.core.health().wait(fence)?;
        }
        Ok(())
    }

    /// A fence of those that use the block, unless all are known to have passed.
    fn pending(&self) -> Option<Fence> {
        let known = |fence: &Fence| self.core.health().known_passed(*fence);
        self.usage.lock().before_write().find(|fence| !known(fence))
    }
}

impl Drop for DeviceBlock {
    /// Frees the memory once nothing uses it any more, and leaks it where that can't be known or
    /// does not come about.
    fn drop(&mut self) {
        let Some(memory) = self.memory.take() else { return };
        // Asked again and again: another thread may be the one that waits for this device.
        for _ in 0..10_000 {
            if self.core.check().is_err() {
                break;
            }
            match self.update() {
                None => return,
                Some(update) => update(),
            }
            if self.is_idle() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        std::mem::forget(memory);
    }
}

/// Checks what a backend handed out.
fn check(core: &DeviceCore, len: u64, asked: u64, start: Option<NonNull<u8>>) -> Result<()> {
    if len < asked {
        return Err(broken(core, "less memory than was asked for"));
    }
    let aligned = |start: NonNull<u8>| {
        start.addr().get().is_multiple_of(usize::try_from(TENSOR_ALIGNMENT).unwrap_or(256))
    };
    if start.is_some_and(|start| !aligned(start)) {
        return Err(broken(core, "memory that is not aligned to 256 bytes"));
    }
    Ok(())
}

fn broken(core: &DeviceCore, problem: &'static str) -> Error {
    Error::Device {
        device: core.backend().info().name.clone(),
        operation: "allocating",
        source: Arc::new(std::io::Error::other(format!("the backend gave {problem}"))),
    }
}

impl Block for DeviceBlock {
    fn capacity(&self) -> u64 {
        self.capacity
    }

    fn is_idle(&self) -> bool {
        self.pending().is_none()
    }

    fn update(&self) -> Option<Update> {
        if self.is_idle() {
            return None;
        }
        let fences: Vec<Fence> = self.usage.lock().before_write().collect();
        let core = Arc::clone(&self.core);
        Some(Box::new(move || {
            fences.into_iter().for_each(|fence| {
                core.has_passed(fence);
            });
            // A loss that is found there is only marked.
            core.health().tell_lost();
        }))
    }

    fn leak(mut self) {
        // The memory alone: the block's hold on the device must not keep its threads for ever.
        std::mem::forget(self.memory.take());
    }
}

/// A block of page-locked memory. It is only ever dropped or lent when no segment names it.
#[derive(Debug)]
pub(crate) struct StagingBlock {
    /// `None` only while it is being given up.
    memory: Option<Box<dyn StagingMemory>>,
    direction: Direction,
    capacity: u64,
    /// Last: the device must outlive its memory.
    _core: Arc<DeviceCore>,
}

impl StagingBlock {
    pub(crate) fn new(core: &Arc<DeviceCore>, capacity: u64, direction: Direction) -> Result<Self> {
        core.check()?;
        let memory = core.health().notice(core.backend().allocate_staging(capacity, direction))?;
        check(core, memory.len() as u64, capacity, Some(memory.ptr()))?;
        Ok(Self { memory: Some(memory), direction, capacity, _core: Arc::clone(core) })
    }

    pub(crate) fn memory(&self) -> &dyn StagingMemory {
        self.memory.as_deref().expect("memory until it is given up")
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

    fn leak(mut self) {
        std::mem::forget(self.memory.take());
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn a_write_ends_only_the_reads_that_it_comes_after() {
        let fence = |stream, value| Fence { stream, value };
        let mut usage = Usage::default();
        usage.note_read(fence(1, 3));
        usage.note_read(fence(4, 7));
        // The last one was noted while the write was on its way.
        usage.note_write(fence(0, 9), |read| read.stream == 1);
        assert_eq!(usage.before_write().collect::<Vec<_>>(), [fence(0, 9), fence(4, 7)]);
    }
}
