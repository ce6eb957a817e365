//! A device on the host's memory that behaves like the worst of real ones: asynchronous, on several
//! streams that overtake each other, slow at random, and failing on demand.
#![allow(unsafe_code, reason = "works on memory by address, as a device does")]

use std::collections::VecDeque;
use std::ptr::NonNull;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::host::execute::Bytes;
use crate::backend::host::{HostMemory, HostRegistered, Job};
use crate::backend::{
    Backend, CommandKind, DeviceInfo, DeviceKind, DeviceMemory, Direction, Fence, Gathers, Region,
    RegisteredMemory, Segment, StagingMemory, StreamId, SubmitError,
};
use crate::memory::Tensor;
use crate::sync::{Condvar, Mutex, spawn_named};
use crate::{DType, Device, Error, Result};

/// What goes wrong, and when. Everything is counted from 1 and happens once.
#[derive(Debug, Clone, Default)]
pub struct FaultPlan {
    /// Of delays and of the order in which streams run.
    pub seed: u64,
    /// The most that a segment is delayed.
    pub max_delay: Duration,
    /// Whether the device's memory is the host's, so that slots become batches.
    pub unified: bool,
    /// Whether the device fetches rows by itself, from the host's memory and its own: by copies
    /// from 64 bytes on. A unified device never does.
    pub gathers: bool,
    /// This registration of memory of the host fails.
    pub fail_registration: Option<u64>,
    /// This submission fails before anything reaches the device.
    pub fail_submit: Option<u64>,
    /// This submission fails after it may have reached the device.
    pub fail_after_enqueue: Option<u64>,
    /// The driver panics in this submission.
    pub panic_in_submit: Option<u64>,
    /// This allocation, of either kind, fails.
    pub fail_allocation: Option<u64>,
    /// The device is lost instead of running this segment.
    pub lose_at: Option<u64>,
}

/// What [`FaultControl::inject`] makes go wrong, once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The next submission fails before anything reaches the device.
    Submit,
    /// The driver panics in the next submission.
    PanicInSubmit,
    /// The next wait for a fence fails, or the one under way.
    Wait,
    /// The driver panics in the next wait for a fence, or in the one under way.
    PanicInWait,
}

/// Streams: one for transfers, one for kernels, one for the consumer.
const COPY: StreamId = 0;
const PREPARE: StreamId = 1;
const CONSUMER: StreamId = 2;
const STREAMS: usize = 3;

/// What freed slots are overwritten with.
const SCRIBBLE: u8 = 0xDB;

/// A device that follows `plan`, and the handle that steers it.
///
/// ```
/// use batchline::MemoryManager;
/// use batchline::testing::{FaultPlan, faulty_device};
/// let (device, control) = faulty_device(FaultPlan::default());
/// let tensor = MemoryManager::new(&device).upload(&[1u8, 2, 3], &[3])?;
/// assert_eq!(tensor.to_vec::<u8>()?, [1, 2, 3]);
/// control.lose();
/// assert!(tensor.to_vec::<u8>().unwrap_err().is_device_lost());
/// # Ok::<(), batchline::Error>(())
/// ```
///
/// # Panics
/// The system refuses the device's thread.
pub fn faulty_device(plan: FaultPlan) -> (Device, FaultControl) {
    let state = State {
        streams: Default::default(),
        passed: [0; STREAMS],
        consumer: 0,
        random: plan.seed,
        held: [false; STREAMS],
        running: false,
        held_submissions: false,
        injected: None,
        lost: false,
        closed: false,
        submissions: 0,
        allocations: 0,
        registrations: 0,
        registered: 0,
        ran: 0,
        mismatches: 0,
    };
    let shared = Arc::new(Shared { plan, state: Mutex::new(state), changed: Condvar::new() });
    let engine = Arc::clone(&shared);
    let thread = spawn_named("faulty-device".to_owned(), move || engine.run())
        .expect("a test needs its device's thread");
    let info = DeviceInfo {
        kind: DeviceKind::Other,
        name: "faulty".to_owned(),
        driver: String::new(),
        hardware: false,
        max_allocation: 1 << 40,
        // Stricter than the host, so that rounding is exercised too.
        copy_alignment: if shared.plan.unified { 1 } else { 4 },
        unified: shared.plan.unified,
    };
    let backend = FaultyBackend { info, shared: Arc::clone(&shared), thread: Some(thread) };
    (Device::from_backend(Box::new(backend)), FaultControl { shared })
}

/// Steers a [`faulty_device`] and tells what it saw.
#[derive(Debug, Clone)]
pub struct FaultControl {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct FaultyBackend {
    info: DeviceInfo,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    plan: FaultPlan,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug)]
struct State {
    streams: [VecDeque<Queued>; STREAMS],
    passed: [u64; STREAMS],
    /// The last number given out on the consumer's stream.
    consumer: u64,
    random: u64,
    held: [bool; STREAMS],
    /// Whether the thread is at work, without the lock.
    running: bool,
    held_submissions: bool,
    injected: Option<Fault>,
    lost: bool,
    closed: bool,
    submissions: u64,
    allocations: u64,
    /// Registrations asked for, and those that are there.
    registrations: u64,
    registered: u64,
    ran: u64,
    mismatches: u64,
}

#[derive(Debug)]
struct Queued {
    value: u64,
    after: Vec<Fence>,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Jobs(Vec<Job>),
    /// The consumer looks at memory that it was given.
    Check {
        bytes: Bytes,
        expected: Vec<u8>,
    },
    Nothing,
}

impl FaultControl {
    /// Loses the device: whatever is queued is never run.
    pub fn lose(&self) {
        self.shared.state.lock().lost = true;
        self.shared.changed.notify_all();
    }

    /// Keeps transfers from running until [`release`](Self::release).
    pub fn hold_transfers(&self) {
        self.shared.state.lock().held[usize::from(COPY)] = true;
    }

    /// Keeps the consumer's work from running until [`release`](Self::release).
    pub fn hold_consumer(&self) {
        self.shared.state.lock().held[usize::from(CONSUMER)] = true;
    }

    /// Keeps submissions inside the driver's call until [`release`](Self::release).
    pub fn hold_submissions(&self) {
        self.shared.state.lock().held_submissions = true;
    }

    /// Lets everything run.
    pub fn release(&self) {
        let mut state = self.shared.state.lock();
        state.held = [false; STREAMS];
        state.held_submissions = false;
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Makes the next call of that kind go wrong; one that is held counts as the next.
    pub fn inject(&self, fault: Fault) {
        self.shared.state.lock().injected = Some(fault);
        self.shared.changed.notify_all();
    }

    /// Enqueues work on the consumer's stream that compares the tensor's bytes with `expected` when
    /// its turn comes. Nothing keeps the tensor: dropping it must be enough to order its reuse
    /// behind this work.
    ///
    /// # Panics
    /// The tensor is not on this device.
    pub fn consume(&self, tensor: &Tensor, expected: Vec<u8>) {
        let memory = tensor.storage().block().memory();
        let region = Region { memory, offset: tensor.offset(), len: tensor.byte_len() };
        let bytes = crate::backend::host::execute::device(region).expect("the device's own memory");
        self.shared.enqueue_consumer(Vec::new(), Work::Check { bytes, expected });
    }

    /// Waits until all that was enqueued has run, or the device is lost. Nothing may be held.
    pub fn settle(&self) {
        let mut state = self.shared.state.lock();
        while !state.lost && (state.running || state.streams.iter().any(|queue| !queue.is_empty()))
        {
            state = self.shared.changed.wait(state);
        }
    }

    /// Pieces of the host's memory that the device reads by itself.
    pub fn registered(&self) -> u64 {
        self.shared.state.lock().registered
    }

    /// How often [`consume`](Self::consume)d bytes were not the expected ones, or memory of the host
    /// was taken back while work that reads it was queued.
    pub fn mismatches(&self) -> u64 {
        self.shared.state.lock().mismatches
    }

    /// Segments that have run.
    pub fn segments_run(&self) -> u64 {
        self.shared.state.lock().ran
    }

    /// Submissions asked for so far.
    pub fn submissions(&self) -> u64 {
        self.shared.state.lock().submissions
    }

    /// Whether the last handle to the device was dropped, so that its thread ends.
    pub fn is_closed(&self) -> bool {
        self.shared.state.lock().closed
    }

    /// Allocations asked for so far.
    pub fn allocations(&self) -> u64 {
        self.shared.state.lock().allocations
    }
}

impl Shared {
    /// The device's thread: picks any stream whose next segment may run, waits a little, runs it.
    fn run(&self) {
        let mut state = self.state.lock();
        loop {
            if state.lost || state.closed {
                return;
            }
            let ready: Vec<usize> = (0..STREAMS).filter(|stream| state.is_ready(*stream)).collect();
            if ready.is_empty() {
                state = self.changed.wait(state);
                continue;
            }
            let pick = state.random(ready.len() as u64);
            #[allow(clippy::cast_possible_truncation, reason = "below the number of streams")]
            let stream = ready[pick as usize];
            if self.plan.lose_at == Some(state.ran + 1) {
                state.lost = true;
                self.changed.notify_all();
                return;
            }
            let most = u64::try_from(self.plan.max_delay.as_micros()).unwrap_or(u64::MAX);
            // Half of the time at once, so that fast and slow devices are both met.
            let delay = if state.random(2) == 0 { 0 } else { state.random(most.max(1)) };
            let queued = state.streams[stream].pop_front().expect("it was ready");
            state.running = true;
            drop(state);
            if delay > 0 {
                std::thread::sleep(Duration::from_micros(delay));
            }
            let outcome = queued.work.run();
            state = self.state.lock();
            state.running = false;
            match outcome {
                Outcome::Done => {}
                Outcome::Mismatch => state.mismatches += 1,
                // As with a fault in a kernel, nothing can be said of what comes after.
                Outcome::Failed => {
                    state.lost = true;
                    self.changed.notify_all();
                    return;
                }
            }
            state.ran += 1;
            state.passed[stream] = queued.value;
            self.changed.notify_all();
        }
    }

    fn lost(&self) -> Error {
        Error::DeviceLost { device: "faulty".to_owned(), reason: "a test lost it".to_owned() }
    }

    fn enqueue_consumer(&self, after: Vec<Fence>, work: Work) {
        let mut state = self.state.lock();
        state.consumer += 1;
        let value = state.consumer;
        state.streams[usize::from(CONSUMER)].push_back(Queued { value, after, work });
        drop(state);
        self.changed.notify_all();
    }

    fn allocate(&self, bytes: u64) -> Result<Box<HostMemory>> {
        let mut state = self.state.lock();
        state.allocations += 1;
        if state.lost {
            return Err(self.lost());
        }
        if self.plan.fail_allocation == Some(state.allocations) {
            return Err(failure("allocating"));
        }
        Ok(Box::new(HostMemory::new("faulty", bytes)?))
    }

    /// Memory of the host is taken back.
    fn unregister(&self, memory: Bytes) {
        let mut state = self.state.lock();
        state.registered -= 1;
        let named = |queued: &Queued| match &queued.work {
            Work::Jobs(jobs) => jobs.iter().any(|job| job.gathers_from(memory)),
            _ => false,
        };
        if !state.lost && state.streams.iter().flatten().any(named) {
            state.mismatches += 1;
        }
    }
}

impl State {
    fn is_ready(&self, stream: usize) -> bool {
        !self.held[stream]
            && self.streams[stream].front().is_some_and(|queued| {
                queued
                    .after
                    .iter()
                    .all(|fence| self.passed[usize::from(fence.stream)] >= fence.value)
            })
    }

    /// Whether this fault is the one to happen now.
    fn take(&mut self, fault: Fault) -> bool {
        self.injected.take_if(|injected| *injected == fault).is_some()
    }

    /// A number below `bound`.
    fn random(&mut self, bound: u64) -> u64 {
        self.random = self.random.wrapping_add(1);
        crate::plan::mix(&[self.random, 0xfa17]) % bound
    }
}

fn failure(operation: &'static str) -> Error {
    let source = Arc::new(std::io::Error::other("a test made it fail"));
    Error::Device { device: "faulty".to_owned(), operation, source }
}

/// What came of a segment.
enum Outcome {
    Done,
    /// The consumer found other bytes than it expected.
    Mismatch,
    Failed,
}

impl Work {
    fn run(self) -> Outcome {
        match self {
            Work::Nothing => Outcome::Done,
            Work::Jobs(jobs) => {
                // SAFETY: the submitter keeps all memory until the fence has passed, or leaks it.
                // That this is so is what the tests on this device are about.
                let run = |job: Job| unsafe { job.run() };
                match jobs.into_iter().try_for_each(run) {
                    Ok(()) => Outcome::Done,
                    Err(_) => Outcome::Failed,
                }
            }
            Work::Check { bytes, expected } => {
                // SAFETY: the block is not freed while its last use, this work, has not passed.
                let found = unsafe { bytes.read() };
                if found == expected { Outcome::Done } else { Outcome::Mismatch }
            }
        }
    }
}

// SAFETY: jobs run once, in order of their stream and after the fences named, on the memory that
// their commands named; a fence passes when its jobs have run.
unsafe impl Backend for FaultyBackend {
    fn info(&self) -> &DeviceInfo {
        &self.info
    }

    fn allocate(&self, bytes: u64) -> Result<Box<dyn DeviceMemory>> {
        Ok(self.shared.allocate(bytes)?)
    }

    fn allocate_staging(&self, bytes: u64, _: Direction) -> Result<Box<dyn StagingMemory>> {
        Ok(self.shared.allocate(bytes)?)
    }

    fn gathers(&self) -> Gathers {
        if !self.shared.plan.gathers || self.info.unified {
            return Gathers::default();
        }
        Gathers {
            from_host: true,
            from_device: self.info.max_allocation,
            copies_from: Some(64),
            fused: &[(DType::U8, DType::F32), (DType::U8, DType::BF16)],
        }
    }

    unsafe fn register(&self, memory: NonNull<[u8]>) -> Result<Box<dyn RegisteredMemory>> {
        let mut state = self.shared.state.lock();
        state.registrations += 1;
        if state.lost {
            return Err(self.shared.lost());
        }
        if !self.shared.plan.gathers
            || self.shared.plan.fail_registration == Some(state.registrations)
        {
            return Err(failure("registering"));
        }
        state.registered += 1;
        let shared = Arc::clone(&self.shared);
        // SAFETY: promised by the caller.
        let registered =
            unsafe { HostRegistered::new(memory, move |bytes| shared.unregister(bytes)) };
        Ok(Box::new(registered))
    }

    fn stream_of(&self, kind: CommandKind) -> StreamId {
        match kind {
            CommandKind::Upload | CommandKind::Download | CommandKind::GatherCopies => COPY,
            _ => PREPARE,
        }
    }

    fn consumer_stream(&self) -> StreamId {
        CONSUMER
    }

    fn submit(&self, segment: Segment<'_, '_>) -> Result<(), SubmitError> {
        let Segment { fence, after, commands, .. } = segment;
        let mut state = self.shared.state.lock();
        state.submissions += 1;
        let number = Some(state.submissions);
        while state.held_submissions && !state.lost {
            state = self.shared.changed.wait(state);
        }
        if state.lost {
            return Err(self.shared.lost().into());
        }
        let plan = &self.shared.plan;
        if plan.fail_submit == number || state.take(Fault::Submit) {
            return Err(failure("submitting").into());
        }
        let panics = plan.panic_in_submit == number || state.take(Fault::PanicInSubmit);
        assert!(!panics, "a test made the driver panic");
        let jobs = commands.map(Job::new).collect::<Result<_>>()?;
        let (value, after) = (fence.value, after.to_vec());
        let queued = Queued { value, after, work: Work::Jobs(jobs) };
        state.streams[usize::from(fence.stream)].push_back(queued);
        self.shared.changed.notify_all();
        if plan.fail_after_enqueue == number {
            return Err(SubmitError { error: failure("submitting"), enqueued: true });
        }
        Ok(())
    }

    fn wait(&self, fence: Fence, timeout: Duration) -> Result<bool> {
        let deadline = Instant::now() + timeout;
        let mut state = self.shared.state.lock();
        loop {
            if state.lost {
                return Err(self.shared.lost());
            }
            // A mere question is no wait.
            if !timeout.is_zero() {
                if state.take(Fault::Wait) {
                    return Err(failure("waiting"));
                }
                assert!(!state.take(Fault::PanicInWait), "a test made the driver panic");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            let passed = state.passed[usize::from(fence.stream)] >= fence.value;
            if passed || left.is_zero() {
                return Ok(passed);
            }
            state = self.shared.changed.wait_timeout(state, left);
        }
    }

    fn consumer_after(&self, _: StreamId, fences: &[Fence]) -> Result<()> {
        if self.shared.state.lock().lost {
            return Err(self.shared.lost());
        }
        if self.info.unified {
            // The consumer is the program itself.
            for fence in fences {
                while !self.wait(*fence, Duration::from_millis(100))? {}
            }
        }
        self.shared.enqueue_consumer(fences.to_vec(), Work::Nothing);
        Ok(())
    }

    fn consumer_position(&self, stream: StreamId) -> Result<Fence> {
        let state = self.shared.state.lock();
        if state.lost {
            return Err(self.shared.lost());
        }
        Ok(Fence { stream, value: state.consumer })
    }

    fn slot_freed(&self, bytes: &mut [u8]) {
        bytes.fill(SCRIBBLE);
    }
}

impl Drop for FaultyBackend {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.changed.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
