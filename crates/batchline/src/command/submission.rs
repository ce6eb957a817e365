//! A command buffer on its way: the record that owns all that the device uses, and the handle that
//! waits for it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use super::buffer::Recording;
use super::frozen::Chain;
use super::operation::Operation;
use smallvec::SmallVec;

use crate::backend::{Fence, Kept};
use crate::memory::{MemoryManager, Patience};
use crate::process::Process;
use crate::staging::StagingBuffer;
use crate::sync::{Condvar, Mutex};
use crate::{Error, Result};

/// At most one fence per stream; of more than a few only where many streams of users are about.
pub(crate) type Fences = SmallVec<[Fence; 8]>;

/// Called once when an operation or a command buffer is done, with its error if there was one.
pub(crate) type Completion = Box<dyn FnOnce(Result<()>) + Send>;

/// A handle to work that was submitted. It can be waited for, asked, or awaited; dropping it
/// cancels nothing.
#[derive(Clone)]
#[must_use = "a submission tells whether the work succeeded"]
pub struct Submission {
    record: Arc<Record>,
}

/// Work that was handed to a device: linked into the list of what is in flight *before* the first
/// call to the driver, and taken out of it only when its own fences have passed.
pub(crate) struct Record {
    state: Mutex<State>,
    done: Condvar,
    /// The operations, with the memory that they own. Locked while they are being enqueued.
    pub(crate) work: Mutex<Option<Work>>,
    /// The thread that completes records: waiting for one there would never end.
    reaper: Mutex<Option<std::thread::ThreadId>>,
    /// The process that has this thread, and not a child of it.
    process: Process,
}

/// What a record owns until it is done.
pub(crate) struct Work {
    /// So that the reaper is not the one who frees it all: that may wait for the whole device.
    pub(crate) memory: MemoryManager,
    pub(crate) commands: Commands,
    pub(crate) completions: Vec<Completion>,
}

/// Where a record has its operations from.
pub(crate) enum Commands {
    /// Recorded for this one execution.
    Once(Recording),
    /// Frozen; others may be executing it as well.
    Again(Arc<Chain>),
}

/// What there is to enqueue.
pub(crate) struct Parts<'p> {
    pub(crate) operations: &'p mut [Operation],
    /// Slots that the operations name.
    pub(crate) slots: &'p [StagingBuffer],
    /// For operations that come again one for each: that of the first stands for a segment.
    pub(crate) kept: &'p [Kept],
}

struct State {
    progress: Progress,
    wakers: Vec<Waker>,
}

/// How far a record is.
#[derive(Debug, Clone)]
pub(crate) enum Progress {
    /// Linked; the driver is being called.
    Recorded,
    /// The device works on it until all these fences have passed.
    InFlight(Fences),
    /// It did not reach the device, but for segments that these fences end.
    Refused(Error, Fences),
    /// Part of it may have reached the device, which can't be known: its memory is given up.
    Quarantined(Error),
    /// Everything is over and the memory is home, or given up.
    Done(Result<()>),
}

impl Record {
    pub(crate) fn new(work: Work) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State { progress: Progress::Recorded, wakers: Vec::new() }),
            done: Condvar::new(),
            work: Mutex::new(Some(work)),
            reaper: Mutex::new(None),
            process: Process::current(),
        })
    }

    /// Makes a record that is done ready for other work.
    pub(crate) fn reuse(&mut self, work: Work) {
        *self.state.lock() = State { progress: Progress::Recorded, wakers: Vec::new() };
        *self.work.lock() = Some(work);
    }

    pub(crate) fn progress(&self) -> Progress {
        self.state.lock().progress.clone()
    }

    pub(crate) fn set_progress(&self, progress: Progress) {
        self.state.lock().progress = progress;
    }

    /// Ends the record: memory goes home (or is given up), completions run, waiters wake. Runs on
    /// the reaper's thread, without any lock of this library.
    pub(crate) fn finish(&self, result: Result<()>, quarantine: bool) {
        *self.reaper.lock() = Some(std::thread::current().id());
        let mut panicked = None;
        let work = self.work.lock().take();
        if let Some(Work { memory, commands, completions }) = work {
            panicked = commands.end(&result, quarantine);
            for completion in completions {
                let outcome = result.clone();
                panicked = panicked.or(contain("a completion", || completion(outcome)));
            }
            memory.let_go();
        }
        self.done_with(result.and(panicked.map_or(Ok(()), Err)));
    }

    /// Ends a record whose end panicked: what it owned is given up.
    pub(crate) fn abandon(&self, error: Error) {
        let work = self.work.lock().take();
        if let Some(Work { memory, commands, completions }) = work {
            commands.end(&Err(error.clone()), true);
            refuse(completions, &error);
            memory.let_go();
        }
        self.done_with(Err(error));
    }

    fn done_with(&self, result: Result<()>) {
        let mut state = self.state.lock();
        state.progress = Progress::Done(result);
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.done.notify_all();
        for waker in wakers {
            // A waker that panics is its owner's trouble; the others must wake.
            contain("a waker", || waker.wake());
        }
    }

    fn on_reaper(&self) -> bool {
        *self.reaper.lock() == Some(std::thread::current().id())
    }

    /// Names the thread that will finish the record.
    pub(crate) fn set_reaper(&self, thread: std::thread::ThreadId) {
        *self.reaper.lock() = Some(thread);
    }
}

impl Commands {
    /// Notes that a submission owns them from now on.
    pub(crate) fn take_off(&mut self) {
        match self {
            Commands::Once(recording) => recording.take_off(),
            // Its handle goes on counting as a user of the tensors.
            Commands::Again(_) => {}
        }
    }

    pub(crate) fn with<R>(&mut self, enqueue: impl FnOnce(Parts<'_>) -> R) -> R {
        match self {
            Commands::Once(recording) => {
                let (operations, slots) = recording.parts();
                enqueue(Parts { operations, slots, kept: &[] })
            }
            Commands::Again(chain) => chain.with(enqueue),
        }
    }

    /// Sends what they own home, or gives it up. Returns the first panic of what was dropped.
    fn end(self, result: &Result<()>, quarantine: bool) -> Option<Error> {
        let lost = result.as_ref().err().filter(|_| quarantine);
        match self {
            Commands::Once(mut recording) => {
                let mut panicked = None;
                for operation in recording.operations().drain(..) {
                    // What the user gave may panic when it is dropped.
                    panicked = panicked.or(contain("a dropped operation", || match lost {
                        Some(error) => operation.quarantine(error),
                        None => operation.finish(result),
                    }));
                }
                if lost.is_some() {
                    recording.quarantine_slots();
                }
                panicked
            }
            Commands::Again(chain) => {
                if lost.is_some() {
                    chain.quarantine();
                }
                // Here it may be the last one, and drops what a backend kept.
                contain("a frozen chain", || drop(chain))
            }
        }
    }
}

#[cfg(all(test, loom))]
impl Record {
    pub(crate) fn of_nothing() -> Arc<Self> {
        let pool = crate::memory::Pool::new("command buffer", 1);
        let recorder = pool.acquire(Patience::None, || Ok(Default::default())).unwrap();
        let commands = Commands::Once(Recording::new(recorder));
        let memory = MemoryManager::new(&crate::Device::host());
        Self::new(Work { memory, commands, completions: Vec::new() })
    }

    /// As [`Submission::wait`], for models, whose threads are one to the system.
    pub(crate) fn wait_done(&self) {
        let mut state = self.state.lock();
        while !matches!(state.progress, Progress::Done(_)) {
            state = self.done.wait(state);
        }
    }
}

/// Calls what belongs to the user; returns its panic as an error.
fn contain(who: &'static str, call: impl FnOnce()) -> Option<Error> {
    let panic = std::panic::catch_unwind(std::panic::AssertUnwindSafe(call)).err()?;
    Some(Error::panicked(who, &*panic))
}

impl Submission {
    pub(crate) fn new(record: Arc<Record>) -> Self {
        Self { record }
    }

    /// Waits until the work is done and its completions have run.
    ///
    /// # Errors
    /// What the work failed with: the device's error, that of a custom operation, or
    /// [`Error::Panicked`] for a completion that panicked. Called from a completion it is an error
    /// at once, because completions run one after another.
    pub fn wait(&self) -> Result<()> {
        self.wait_for(Patience::Forever).unwrap_or_else(|| unreachable!("no deadline was given"))
    }

    /// As [`wait`](Self::wait), for at most `timeout`; `None` when it was not enough.
    pub fn wait_timeout(&self, timeout: Duration) -> Option<Result<()>> {
        self.wait_for(Patience::within(timeout))
    }

    fn wait_for(&self, patience: Patience) -> Option<Result<()>> {
        if let Err(error) = self.check_process() {
            return Some(Err(error));
        }
        let mut state = self.record.state.lock();
        loop {
            if let Progress::Done(result) = &state.progress {
                return Some(result.clone());
            }
            if self.record.on_reaper() {
                let problem = "a completion cannot wait for other work: it would wait for itself";
                return Some(Err(Error::record("a wait", problem)));
            }
            state = self.record.done.wait_at_most(state, patience.left()?);
        }
    }

    /// A child of a fork has no thread that ends the work, and may find the record locked for ever.
    fn check_process(&self) -> Result<()> {
        if self.record.process.is_gone() {
            let problem = "it was submitted before this process was forked";
            return Err(Error::record("a wait", problem));
        }
        Ok(())
    }

    /// Whether the work is done, with or without an error.
    pub fn is_done(&self) -> bool {
        self.check_process().is_ok()
            && matches!(self.record.state.lock().progress, Progress::Done(_))
    }
}

impl Future for Submission {
    type Output = Result<()>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        self.check_process()?;
        let mut state = self.record.state.lock();
        if let Progress::Done(result) = &state.progress {
            return Poll::Ready(result.clone());
        }
        if !state.wakers.iter().any(|waker| waker.will_wake(context.waker())) {
            state.wakers.push(context.waker().clone());
        }
        Poll::Pending
    }
}

impl fmt::Debug for Submission {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Submission").field("done", &self.is_done()).finish()
    }
}

/// Operations that never reached the device, for whom the completions run here and now.
pub(crate) fn refuse(completions: Vec<Completion>, error: &Error) {
    for completion in completions {
        // The call fails with the error that matters more than a panic here.
        contain("a completion", || completion(Err(error.clone())));
    }
}

impl Operation {
    /// The device is done with the operation.
    pub(crate) fn finish(self, result: &Result<()>) {
        if let Operation::Download { dst, arrive, .. } = self {
            arrive.arrive(result.clone().map(|()| Arc::new(dst)));
        }
    }
}
