//! NVIDIA GPUs, through the CUDA driver.
//!
//! The driver's library is loaded at run time, so the same program runs where there is none.
//!
//! # Streams
//!
//! | number | stream | what runs on it |
//! | --- | --- | --- |
//! | 0 | copy | host to device, and nothing else: a kernel between two copies would cost the link |
//! | 1 | prepare | conversions, fills, copies within the device, gathers by a kernel, custom work |
//! | 2 | read back | device to host |
//! | 3 | consumer | the consumer's work: a stream of ours, or the one that the device was opened for |
//! | 4 to 31 | users' | streams that tensors are bound to, or exported for |
//!
//! Streams wait for one another on the device, through events (`lane.rs`); the host never waits to
//! submit. A fence has passed when an event that was recorded behind it is found to have passed.
//! Events are asked for, never called back from: a callback does not come once a context is in
//! error.
//!
//! # Who keeps what
//!
//! The life of a batch's memory, by the states of the protocol: a slot is *in flight* from its
//! submission until the copy stream's event has passed, *free* after; an output is *filling* until
//! its last event, *ready* and *leased* while a batch has it, and *retired* once the position of
//! each stream that used it was recorded, behind which the next writer's stream waits. Where the
//! driver fails between the first command and the event behind the last one, the memory is
//! *quarantined*.
//!
//! # Failures
//!
//! Most errors of the driver say that the context is beyond repair; the first of them is kept
//! (`context.rs`), and from then on every call says so, nothing is freed, and nothing is reused.
//! A child of a fork is told that it cannot use the device.
//!
//! # Files
//!
//! `driver` is the library's entry points; `context` a process's part in a device; `lane` streams
//! and events; `memory` device and page-locked memory (`numa` places it); `registered` memory of
//! data sets that the device reads by itself; `execute` turns commands into calls, `gather` those
//! for single rows, and `graph` those that come again; `kernels` loads what `kernels.cu` was compiled
//! to; `queue` is users' streams, `cudarc` those of that crate.
#![allow(unsafe_code, reason = "promises to do as commanded")]

mod context;
#[cfg(feature = "cudarc")]
mod cudarc;
mod driver;
mod execute;
mod gather;
mod graph;
mod kernels;
mod lane;
mod memory;
mod numa;
mod queue;
mod registered;

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::{
    Backend, CommandKind, DeviceInfo, DeviceMemory, Direction, Fence, Gathers, RegisteredMemory,
    Segment, StagingMemory, StreamId, SubmitError,
};
use crate::sync::Mutex;
use crate::{Error, Result};

use context::Context;
use driver::Driver;
use gather::Copies;
use kernels::Kernels;
use lane::Lanes;
use memory::{CudaMemory, CudaStaging};
use registered::CudaRegistered;

#[cfg(feature = "cudarc")]
pub use self::cudarc::{CudarcBinding, CudarcView};
pub use queue::{CudaBinding, CudaCustom, CudaStream};

const COPY: StreamId = 0;
const PREPARE: StreamId = 1;
const READ_BACK: StreamId = 2;
const CONSUMER: StreamId = 3;

/// How long events are looked at without a pause, where that was enough the last time, and where it
/// was not. A pause takes the system some 60 us, however short it is asked to be; small batches take
/// the device less.
const LONG_LOOK: Duration = Duration::from_micros(100);
const LOOK: Duration = Duration::from_micros(20);

/// The longest pause between two looks at an event.
const LONGEST_PAUSE: Duration = Duration::from_micros(200);

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct CudaBackend {
    lanes: Lanes,
    kernels: Kernels,
    copies: Mutex<Copies>,
    /// Whether the last wait for an event ended within [`LONG_LOOK`].
    was_short: AtomicBool,
    /// Keeps the consumer's stream, where that is possible.
    _consumer: Option<Arc<dyn Any + Send + Sync>>,
    /// Last: everything else is on it.
    context: Arc<Context>,
}

impl CudaBackend {
    /// Opens a device by its number, with a consumer's stream of its own or a user's.
    ///
    /// # Errors
    /// [`Error::NoDevice`] says what is missing.
    pub(crate) fn open(ordinal: usize, consumer: Option<CudaStream>) -> Result<Self> {
        if consumer.is_some_and(CudaStream::is_ours) {
            return Err(Error::NoDevice {
                wanted: format!("cuda:{ordinal}"),
                reason: "the stream is another device's own, and goes with it".to_owned(),
                remedy: "open the device for a stream of yours".to_owned(),
            });
        }
        let context = Arc::new(Context::open(ordinal)?);
        let entered = context.enter()?;
        let lanes = Lanes::new(&context, &entered, consumer.map(CudaStream::raw))?;
        let (kernels, copies) = (Kernels::new(&context, &entered)?, Mutex::default());
        drop(entered);
        let was_short = AtomicBool::new(false);
        Ok(Self { lanes, kernels, copies, was_short, _consumer: None, context })
    }

    /// The devices that the driver shows.
    ///
    /// # Errors
    /// [`Error::NoDevice`] says what is missing.
    pub(crate) fn devices() -> Result<Vec<DeviceInfo>> {
        let driver = Driver::get()?;
        let count = context::count(driver)?;
        (0..count).map(|ordinal| Ok(context::describe(driver, ordinal)?.1)).collect()
    }

    /// The consumer's stream.
    pub(crate) fn consumer(&self) -> CudaStream {
        let lane = self.lanes.get(CONSUMER);
        lane.show();
        CudaStream::of_device(lane.stream())
    }

    /// The device's number.
    pub(crate) fn ordinal(&self) -> usize {
        self.context.ordinal
    }
}

// SAFETY: commands name memory by its owner, whose bounds the recorder has checked; a fence has
// passed only when the driver says that an event recorded behind it has.
unsafe impl Backend for CudaBackend {
    fn info(&self) -> &DeviceInfo {
        &self.context.info
    }

    fn allocate(&self, bytes: u64) -> Result<Box<dyn DeviceMemory>> {
        Ok(Box::new(CudaMemory::new(&self.context, bytes)?))
    }

    fn allocate_staging(&self, bytes: u64, _: Direction) -> Result<Box<dyn StagingMemory>> {
        Ok(Box::new(CudaStaging::new(&self.context, bytes)?))
    }

    fn gathers(&self) -> Gathers {
        gather::abilities(&self.context)
    }

    unsafe fn register(&self, memory: NonNull<[u8]>) -> Result<Box<dyn RegisteredMemory>> {
        // SAFETY: promised by the caller.
        let registered = unsafe { CudaRegistered::new(&self.context, memory) };
        Ok(Box::new(registered?))
    }

    fn stream_of(&self, kind: CommandKind) -> StreamId {
        match kind {
            CommandKind::Upload | CommandKind::GatherCopies => COPY,
            CommandKind::Download => READ_BACK,
            CommandKind::Copy
            | CommandKind::Fill
            | CommandKind::Convert
            | CommandKind::Gather
            | CommandKind::Custom => PREPARE,
        }
    }

    fn consumer_stream(&self) -> StreamId {
        CONSUMER
    }

    fn submit(&self, segment: Segment<'_, '_>) -> Result<(), SubmitError> {
        execute::submit(self, segment)
    }

    fn wait(&self, fence: Fence, timeout: Duration) -> Result<bool> {
        self.context.check()?;
        let lane = self.lanes.get(fence.stream);
        if lane.known_passed(fence.value) {
            return Ok(true);
        }
        let entered = self.context.enter()?;
        let began = Instant::now();
        let was_short = self.was_short.load(Ordering::Relaxed);
        let look = if was_short { LONG_LOOK } else { LOOK };
        let mut pause = Duration::from_micros(5);
        loop {
            let passed = lane.has_passed(&entered, fence.value)?;
            let elapsed = began.elapsed();
            // Who does not wait tells nothing about how long it takes.
            if !timeout.is_zero() && (passed || elapsed > LONG_LOOK) {
                self.was_short.store(elapsed < LONG_LOOK, Ordering::Relaxed);
            }
            if passed {
                return Ok(true);
            }
            let left = timeout.saturating_sub(elapsed);
            if left.is_zero() {
                return Ok(false);
            }
            if elapsed < look {
                // Who fills or submits the next batch may need the processor, and the driver's lock.
                std::thread::yield_now();
                (0..32).for_each(|_| std::hint::spin_loop());
                continue;
            }
            std::thread::sleep(pause.min(left));
            pause = (pause * 2).min(LONGEST_PAUSE);
            // Another thread may have learned of a loss.
            self.context.check()?;
        }
    }

    fn consumer_after(&self, stream: StreamId, fences: &[Fence]) -> Result<()> {
        self.context.check()?;
        let ahead = |fence: &&Fence| !self.lanes.get(fence.stream).known_passed(fence.value);
        let consumer = self.lanes.get(stream);
        for fence in fences.iter().filter(ahead) {
            let entered = self.context.enter_for_events()?;
            self.lanes.get(fence.stream).hold_back(&entered, consumer, fence.value)?;
        }
        Ok(())
    }

    fn consumer_position(&self, stream: StreamId) -> Result<Fence> {
        let entered = self.context.enter_for_events()?;
        let value = self.lanes.get(stream).mark(&entered)?;
        Ok(Fence { stream, value })
    }
}
