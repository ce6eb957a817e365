//! One generation of a loader: the threads, what they share, and how it all ends.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::{Duration, Instant};

use super::buffers::{Buffers, NUMBERS};
use super::config::AsyncDataLoaderConfig;
use super::deliver::{Deliver, Ending, Ready, Taken};
use super::feed::Feed;
use super::route::Route;
use super::stop::Threads;
use super::ticket::Ring;
use crate::device::LossListener;
use crate::memory::{Held, Patience};
use crate::stats::{Doing, StageClock};
use crate::sync::{self, Mutex};
use crate::{Delivery, Error, Result, SampleSpec, Skipped};

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Pipeline {
    pub(super) config: Arc<AsyncDataLoaderConfig>,
    pub(super) feed: Arc<Feed>,
    /// How batches get to the device.
    pub(super) route: Arc<Route>,
    pub(super) ring: Ring,
    pub(super) deliver: Deliver,
    /// Set before the first ticket is opened.
    pub(super) buffers: OnceLock<Buffers>,
    /// What is opened next. Only the worker whose turn it is locks it.
    pub(super) opener: Mutex<Opener>,
    threads: Threads,
    /// What was delivered.
    cursor: Mutex<Cursor>,
    /// What a pull source left out behind its last batch.
    pub(super) trailing: Mutex<Vec<Skipped>>,
    pub(super) generation: u64,
    started: Instant,
    ended: OnceLock<Instant>,
    first_batch: OnceLock<Duration>,
    pub(super) counters: Counters,
}

/// The next batch to open.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Opener {
    pub(crate) epoch: u64,
    /// Within the epoch.
    pub(crate) batch: u64,
    /// Pull sources: whether the epoch's `reset` has been made.
    pub(crate) begun: bool,
    /// Pull sources: whether the epoch's last batch was short.
    pub(crate) short: bool,
}

/// How far the consumer is.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cursor {
    pub(crate) epoch: u64,
    /// Batches of this epoch that were delivered.
    pub(crate) position: u64,
    pub(crate) skipped: Vec<Skipped>,
    /// When the consumer last left `get_batch`.
    left: Option<Instant>,
}

/// What happened so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) workers: StageClock,
    pub(crate) submitter: StageClock,
    pub(crate) consumer: StageClock,
    pub(crate) produced: AtomicU64,
    pub(crate) delivered: AtomicU64,
    pub(crate) samples: AtomicU64,
    pub(crate) bytes: AtomicU64,
    pub(crate) transferred: AtomicU64,
    pub(crate) skipped: AtomicU64,
    pub(crate) retries: AtomicU64,
    /// Nanoseconds of processor time of the workers, each as it last told.
    pub(crate) processor: AtomicU64,
}

impl Counters {
    /// Processor time of the workers, where the system tells.
    pub(crate) fn processor_time(&self) -> Option<Duration> {
        sync::processor_time()?;
        Some(Duration::from_nanos(self.processor.load(Ordering::Relaxed)))
    }
}

impl Pipeline {
    /// Allocates, where the samples' kind is known, and starts the threads.
    pub(crate) fn start(
        config: Arc<AsyncDataLoaderConfig>,
        feed: Arc<Feed>,
        route: Arc<Route>,
        generation: u64,
        started: Instant,
    ) -> Result<Arc<Self>> {
        config.memory.device().check()?;
        let resume = config.resume.as_ref();
        let (epoch, position) = resume.map_or((0, 0), |state| (state.epoch, state.position));
        let skipped = resume.map_or_else(Vec::new, |state| state.skipped.clone());
        let outputs = config.prefetch_depth + config.max_held;
        let slots = if route.is_staged() { outputs } else { NUMBERS * outputs };
        let pipeline = Arc::new(Self {
            ring: Ring::new(slots),
            deliver: Deliver::new(outputs, config.max_held),
            buffers: OnceLock::new(),
            opener: Mutex::new(Opener { epoch, batch: position, ..Opener::default() }),
            threads: Threads::default(),
            cursor: Mutex::new(Cursor { epoch, position, skipped, left: None }),
            trailing: Mutex::new(Vec::new()),
            generation,
            started,
            ended: OnceLock::new(),
            first_batch: OnceLock::new(),
            counters: Counters::default(),
            config,
            feed,
            route,
        });
        pipeline.counters.skipped.store(resume_skips(&pipeline.config), Ordering::Relaxed);
        if let Feed::Dataset { dataset, .. } = &*pipeline.feed {
            pipeline.allocate(dataset.spec())?;
        }
        let listener: std::sync::Weak<Self> = Arc::downgrade(&pipeline);
        pipeline.config.memory.device().core().on_loss(listener);
        if let Err(error) = pipeline.spawn() {
            pipeline.stop()?;
            return Err(error);
        }
        Ok(pipeline)
    }

    fn spawn(self: &Arc<Self>) -> Result<()> {
        for worker in 0..self.config.workers {
            self.spawn_thread(format!("worker-{worker}"), "a worker", Self::run_worker)?;
        }
        Ok(())
    }

    fn spawn_thread(
        self: &Arc<Self>,
        name: String,
        who: &'static str,
        run: impl FnOnce(&Self) + Send + 'static,
    ) -> Result<()> {
        let (body, panicked) = (Arc::clone(self), Arc::clone(self));
        self.threads.spawn(
            name,
            move || run(&body),
            move |panic| panicked.fail(Error::panicked(who, panic)),
        )
    }

    /// Whether a filled slot is the batch, so that there is nothing for the device to do.
    pub(super) fn slots_are_batches(&self) -> bool {
        self.config.memory.device().info().unified && self.config.convert.is_none()
    }

    /// Allocates the buffers for samples of this kind.
    pub(super) fn allocate(&self, spec: &SampleSpec) -> Result<&Buffers> {
        let buffers = Buffers::allocate(spec, &self.config, &self.route)?;
        self.deliver.set_outputs(buffers.output_count());
        let buffers = self.buffers.get_or_init(|| buffers);
        if self.ring.is_stopped() {
            // Whoever stopped it found nothing to close.
            buffers.close(&over());
        }
        Ok(buffers)
    }

    /// The buffers; there are some once the first ticket is being opened.
    pub(super) fn buffers(&self) -> &Buffers {
        self.buffers.get().expect("allocated before the first ticket is opened")
    }

    /// Hands a batch to the consumer's queue.
    pub(super) fn push(&self, ready: Ready) {
        self.first_batch.get_or_init(|| self.started.elapsed());
        self.counters.produced.fetch_add(1, Ordering::Relaxed);
        self.deliver.push(ready);
    }

    /// Ends the stream behind the batches that are ready; all threads leave.
    pub(super) fn finish(&self, ending: Ending) {
        let _ = self.ended.set(sync::now());
        let error = match &ending {
            Ending::Failed(error) => error.clone(),
            Ending::End => over(),
        };
        self.deliver.end(ending);
        self.release(&error);
    }

    /// Ends the stream with an error, behind the batches that are ready.
    pub(super) fn fail(&self, error: Error) {
        self.finish(Ending::Failed(error));
    }

    /// Wakes every thread and lets go of the memory that nobody writes to.
    fn release(&self, error: &Error) {
        self.ring.stop();
        if let Some(buffers) = self.buffers.get() {
            buffers.close(error);
        }
    }

    /// Ends everything and joins the threads.
    ///
    /// # Errors
    /// [`Error::Detached`]: a source does not return; [`Error::Timeout`]: the device does not.
    pub(crate) fn stop(&self) -> Result<()> {
        let _ = self.ended.set(sync::now());
        let stopped =
            Error::Lifecycle { state: "stopped", remedy: "call `start` to begin a new generation" };
        // The ending first: who finds the ring stopped relies on it.
        self.deliver.abandon(stopped.clone());
        self.release(&stopped);
        let timeout = self.config.stop_timeout;
        let workers = self.threads.join(timeout);
        self.ring.clear();
        if workers > 0 {
            return Err(Error::Detached { workers, after: timeout });
        }
        if self.buffers.get().is_some_and(|buffers| !buffers.wait_landed(timeout)) {
            return Err(Error::Timeout { what: "the end of a transfer in flight", after: timeout });
        }
        Ok(())
    }

    /// Whether a thread of it has not ended.
    pub(crate) fn is_alive(&self) -> bool {
        self.threads.alive() > 0
    }

    /// The next batch, or why there is none.
    pub(crate) fn next(&self, patience: Patience, waker: Option<&Waker>) -> Result<Delivery> {
        let called = sync::now();
        let clock = &self.counters.consumer;
        if let Some(left) = self.cursor.lock().left.take() {
            clock.add(Doing::Working, called - left);
        }
        let patience = self.config.memory.device().core().patience(patience);
        let taken = self.deliver.take(patience, waker, |ready| self.advance(ready));
        let delivery = match taken {
            Ok(Taken::Ready(ready, held)) => self.hand_over(ready, held),
            Ok(Taken::NotYet) => Ok(Delivery::NotYet),
            Ok(Taken::Over(Ending::End)) => {
                let trailing = std::mem::take(&mut *self.trailing.lock());
                self.cursor.lock().skipped.extend(trailing);
                Ok(Delivery::End)
            }
            Ok(Taken::Over(Ending::Failed(error))) | Err(error) => Err(error),
        };
        let now = sync::now();
        clock.add(Doing::WaitingForInput, now - called);
        self.cursor.lock().left = Some(now);
        delivery
    }

    /// Notes a delivery. Called in order.
    fn advance(&self, ready: &Ready) {
        let mut cursor = self.cursor.lock();
        let place = ready.place;
        (cursor.epoch, cursor.position) =
            if place.last { (place.epoch + 1, 0) } else { (place.epoch, place.batch + 1) };
        cursor.skipped.extend_from_slice(&ready.skipped);
    }

    /// Makes the consumer's queue wait for the batch.
    fn hand_over(&self, ready: Ready, held: Held) -> Result<Delivery> {
        let Ready { batch, place, .. } = ready;
        if let Some(source) = batch.failure() {
            return Err(self.refuse(place, source));
        }
        let core = self.config.memory.device().core();
        let stream = core.backend().consumer_stream();
        let written = batch.written();
        let ordered = core.check().and_then(|()| {
            core.health().notice(core.backend().consumer_after(stream, written.as_slice()))
        });
        if let Err(source) = ordered {
            return Err(self.refuse(place, source));
        }
        batch.hand_to(stream, held);
        self.counters.delivered.fetch_add(1, Ordering::Relaxed);
        self.counters.samples.fetch_add(batch.len(), Ordering::Relaxed);
        self.counters.bytes.fetch_add(batch.byte_len(), Ordering::Relaxed);
        Ok(Delivery::Ready(batch))
    }

    /// A batch that was submitted did not arrive: the stream ends here.
    fn refuse(&self, place: super::ticket::Place, source: Error) -> Error {
        let error = Error::Stage {
            stage: "reaper",
            epoch: place.epoch,
            batch: place.batch,
            sample: None,
            source: Arc::new(source),
        };
        // It was counted when it was taken; with several consumers one further on may have been too.
        let mut cursor = self.cursor.lock();
        if (place.epoch, place.batch) < (cursor.epoch, cursor.position) {
            (cursor.epoch, cursor.position) = (place.epoch, place.batch);
            let before = |skip: &Skipped| (skip.epoch, skip.batch) < (place.epoch, place.batch);
            cursor.skipped.retain(before);
        }
        drop(cursor);
        let first = self.deliver.abandon(error.clone());
        self.fail(error);
        first
    }

    pub(crate) fn cursor(&self) -> Cursor {
        self.cursor.lock().clone()
    }

    pub(crate) fn is_running(&self) -> bool {
        self.ended.get().is_none()
    }

    /// Time since the start, up to the end.
    pub(crate) fn elapsed(&self) -> Duration {
        self.ended.get().map_or_else(|| self.started.elapsed(), |ended| *ended - self.started)
    }

    pub(crate) fn time_to_first_batch(&self) -> Option<Duration> {
        self.first_batch.get().copied()
    }
}

impl LossListener for Pipeline {
    fn device_lost(&self, error: &Error) {
        self.fail(error.clone());
    }
}

/// What closed pools answer after the last batch; nobody waits for them any more.
fn over() -> Error {
    Error::Lifecycle { state: "at its end", remedy: "call `stop`, then `start` to begin anew" }
}

fn resume_skips(config: &AsyncDataLoaderConfig) -> u64 {
    config.resume.as_ref().map_or(0, |state| state.skipped.len() as u64)
}
