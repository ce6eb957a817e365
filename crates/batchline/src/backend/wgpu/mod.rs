//! Metal, Vulkan and DX12, through wgpu.
//!
//! # One queue
//!
//! wgpu has one queue a device, so there is one stream, number 0, and the consumer's work is on it
//! as well. A segment is one encoder and one submission; what it must come after is ahead of it on
//! the queue anyway. Uploads therefore don't overlap with kernels on the device, only with the
//! host's work.
//!
//! **What a user enqueues on a batch's buffers he must submit before he drops the batch**: then it
//! is ahead of whatever rewrites them, and no host waits. Work that is recorded but submitted
//! after the drop would read the next batch.
//!
//! # Staging memory
//!
//! Each staging buffer is a wgpu buffer that is mapped whenever it is the host's:
//!
//! ```text
//! mapped ──submit──▶ unmapped, in flight ──done──▶ mapping asked for ──callback──▶ mapped
//!   ▲  the host reads and writes at `ptr()`                                           │
//!   └──────────────────────────── the fence passes here ──────────────────────────────┘
//! ```
//!
//! So a fence passes when the submission is done *and* all staging buffers that it named are
//! mapped again (`memory.rs`, `flight.rs`). On a discrete GPU with a large BAR the driver may put
//! such a buffer into the GPU's memory: writing it is the transfer already, and reading it slow.
//!
//! # Gathers
//!
//! Rows are gathered out of device memory only: wgpu has no call that lets a device read memory of
//! the program, and no kernel reads a staging buffer. So the numbers of the rows are copied to the
//! device first. A source may be as large as a buffer can be (`gather.rs`).
//!
//! # Who polls
//!
//! wgpu does nothing by itself: submissions are retired, and callbacks run, inside `Device::poll`
//! and `Queue::submit`. The thread that calls [`Backend::wait`] with a timeout (the reaper) polls,
//! for one submission, in slices. A call with zero timeout reads a counter while another thread
//! polls, and else takes one look itself. Callbacks set a flag and nothing more.
//!
//! # Failures
//!
//! Every call runs in error scopes, so errors become values; devices opened here also get a
//! handler for what their owner does outside of our calls, which the next submission reports. A
//! lost device is noticed through its callback (only on devices opened here: on an adopted one it
//! stays the owner's), a submission that did not get a number, a mapping that fails, or a panic of
//! `Device::poll`, which is caught; from then on each call says so and nothing polls any more.
//!
//! Not detectable: wgpu reports a command buffer that failed on Metal as completed.
//!
//! Not preventable: after `wgpu::Device::destroy`, the next poll by anybody frees the memory under
//! buffers that are mapped, and a worker that fills one crashes. (wgpu's own views have the same
//! hole; a device that is lost by itself keeps them.) Who destroys a device must have stopped its
//! loaders and dropped its staging buffers.
//!
//! # Files
//!
//! `open` finds devices; `health` keeps the loss and catches errors; `memory` is buffers and
//! mappings; `flight` is submissions and the wait; `record` turns a segment into a submission;
//! `kernels` keeps pipelines, `convert` and `gather` plan their dispatches, the `.wgsl` files compute.

mod convert;
mod flight;
mod gather;
mod health;
mod kernels;
mod memory;
mod open;
mod record;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use super::{
    Backend, CommandKind, DeviceInfo, DeviceMemory, Direction, Fence, Gathers, Segment,
    StagingMemory, StreamId, SubmitError,
};
use crate::sync::Mutex;
use crate::{Error, Result};

use flight::Flights;
use health::Health;
use kernels::Kernels;
use memory::{WgpuMemory, WgpuStaging};

/// What a custom operation on a wgpu device works with: see
/// [`Custom::Wgpu`](crate::backend::Custom::Wgpu).
///
/// A binding's size is its tensor's, rounded up to a multiple of 4. Commands that are recorded here
/// run in their place among the segment's other commands, on the same queue.
#[derive(Debug)]
#[non_exhaustive]
pub struct WgpuCustom<'a> {
    /// Records the segment. Leave it open: finishing it is the backend's business.
    pub encoder: &'a mut wgpu::CommandEncoder,
    /// The tensors to read, in the order they were declared in.
    pub reads: Vec<wgpu::BufferBinding<'a>>,
    /// The tensors to write, likewise.
    pub writes: Vec<wgpu::BufferBinding<'a>>,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct WgpuBackend {
    info: DeviceInfo,
    health: Arc<Health>,
    flights: Flights,
    kernels: Mutex<Kernels>,
    queue: wgpu::Queue,
    device: wgpu::Device,
}

impl WgpuBackend {
    /// The best adapter, or the best that is no software rasteriser.
    ///
    /// # Errors
    /// [`Error::NoDevice`] says what is missing.
    pub(crate) fn open(hardware_only: bool) -> Result<Self> {
        let (device, queue) = open::open(hardware_only)?;
        let backend = Self::new(device, queue);
        backend.health.watch(&backend.device);
        Ok(backend)
    }

    /// A device and queue of the user's, shared with him. Its error handler and its device-lost
    /// callback stay his.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub(crate) fn adopt(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let backend = Self::new(device, queue);
        memory::probe(&backend.device, &backend.health)?;
        Ok(backend)
    }

    fn new(device: wgpu::Device, queue: wgpu::Queue) -> Self {
        let info = open::describe(&device.adapter_info(), device.limits().max_buffer_size);
        Self {
            health: Health::new(info.name.clone()),
            info,
            flights: Flights::default(),
            kernels: Mutex::new(Kernels::default()),
            queue,
            device,
        }
    }

    /// What there is to open, the best first. Empty where no driver is installed.
    pub(crate) fn adapters() -> Vec<DeviceInfo> {
        open::adapters()
    }

    /// The device, to create the user's own pipelines on.
    pub(crate) fn device(&self) -> &wgpu::Device {
        &self.device
    }

    /// The queue, to submit the user's own work to.
    pub(crate) fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    /// The buffer behind device memory, if it is wgpu's.
    pub(crate) fn buffer(memory: &dyn DeviceMemory) -> Option<&wgpu::Buffer> {
        WgpuMemory::of(memory).map(|memory| &memory.buffer)
    }
}

// SAFETY: wgpu checks every command against its buffer's bounds; `flight` says that a fence has
// passed only when the queue has finished the submission and its staging buffers are mapped again.
unsafe impl Backend for WgpuBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn allocate(&self, bytes: u64) -> Result<Box<dyn DeviceMemory>> {
        self.health.check()?;
        Ok(Box::new(WgpuMemory::new(&self.device, &self.health, bytes)?))
    }

    fn allocate_staging(&self, bytes: u64, direction: Direction) -> Result<Box<dyn StagingMemory>> {
        self.health.check()?;
        Ok(Box::new(WgpuStaging::new(&self.device, &self.health, bytes, direction)?))
    }

    fn gathers(&self) -> Gathers {
        Gathers {
            from_device: self.info.max_allocation,
            fused: gather::FUSED,
            ..Gathers::default()
        }
    }

    fn stream_of(&self, _: CommandKind) -> StreamId {
        0
    }

    fn consumer_stream(&self) -> StreamId {
        0
    }

    fn submit(&self, segment: Segment<'_, '_>) -> Result<(), SubmitError> {
        record::submit(self, segment)
    }

    fn wait(&self, fence: Fence, timeout: Duration) -> Result<bool> {
        self.flights.wait(&self.device, &self.health, fence.value, timeout)
    }

    fn consumer_after(&self, _: StreamId, _: &[Fence]) -> Result<()> {
        self.health.check()
    }

    fn consumer_position(&self, _: StreamId) -> Result<Fence> {
        self.health.check()?;
        // The consumer's own work comes before any later segment by the order of the queue.
        Ok(Fence { stream: 0, value: self.flights.submitted() })
    }
}

impl Drop for WgpuBackend {
    fn drop(&mut self) {
        if self.health.lost().is_some() {
            // The last queue handle waits for the device and asserts that all went well.
            std::mem::forget(self.queue.clone());
        }
    }
}

/// Rounds a length up to what wgpu copies: there is room for it ([`Region::len`](super::Region)).
fn padded(len: u64) -> u64 {
    len.next_multiple_of(wgpu::COPY_BUFFER_ALIGNMENT)
}

fn foreign() -> Error {
    Error::record("a command", "its memory belongs to another device")
}
