//! A loader that was brought to a certain point, and the consumer's calls.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use batchline::testing::FaultControl;
use batchline::{AsyncDataLoader, DType, Delivery, Error, GpuBatch, MemoryManager, Submission};
use futures_core::Stream;

use crate::gate::{Keeper, Verdict};
use crate::threads;

/// Samples of a batch.
pub(crate) const ROWS: i64 = 4;
/// Batches of a stream.
pub(crate) const BATCHES: u64 = 10;
/// Longer than any wait that is not meant to last.
pub(crate) const LONG: Duration = Duration::from_secs(10);

/// The ways to ask for a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Get,
    Timed(Duration),
    Poll,
    Stream,
}

/// What a consumer is told.
#[derive(Debug)]
pub(crate) enum Answer {
    Batch(GpuBatch),
    NotYet,
    End,
    Error(Error),
}

impl Way {
    pub(crate) fn ask(self, loader: &AsyncDataLoader) -> Answer {
        let delivery = match self {
            Way::Get => {
                loader.get_batch().map(|batch| batch.map_or(Delivery::End, Delivery::Ready))
            }
            Way::Timed(timeout) => loader.get_batch_timeout(timeout),
            Way::Poll => loader.try_get_batch(),
            Way::Stream => {
                let mut stream = loader.stream();
                let mut next =
                    || pollster::block_on(poll_fn(|waker| Pin::new(&mut stream).poll_next(waker)));
                match next() {
                    Some(Ok(batch)) => Ok(Delivery::Ready(batch)),
                    Some(Err(error)) => {
                        assert!(next().is_none(), "a stream ends after an error");
                        Err(error)
                    }
                    None => Ok(Delivery::End),
                }
            }
        };
        match delivery {
            Ok(Delivery::Ready(batch)) => Answer::Batch(batch),
            Ok(Delivery::NotYet) => Answer::NotYet,
            Ok(Delivery::End) => Answer::End,
            Err(error) => Answer::Error(error),
        }
    }
}

/// A completion on the reaper's thread.
pub(crate) struct Completion {
    /// Where it stands.
    pub(crate) keeper: Keeper,
    /// What it drops when it goes on.
    pub(crate) drops: mpsc::Sender<AsyncDataLoader>,
    pub(crate) submission: Submission,
}

/// See the [module](self).
pub(crate) struct Scene {
    /// `None` once it was dropped.
    pub(crate) loader: Option<Arc<AsyncDataLoader>>,
    pub(crate) memory: MemoryManager,
    pub(crate) control: FaultControl,
    /// Where the source, or the sampler, stands or stood.
    pub(crate) source: Keeper,
    /// A completion of the test's own.
    pub(crate) completion: Option<Completion>,
    /// A consumer that waits in a call.
    pub(crate) waiting: Option<JoinHandle<Answer>>,
    /// A waker that a stream has registered, and that must be let go of.
    pub(crate) waker: Option<std::sync::Weak<dyn Send + Sync>>,
    /// Batches that the consumer has taken.
    pub(crate) taken: u64,
    /// Those that it holds, the oldest first.
    pub(crate) held: VecDeque<GpuBatch>,
    /// Batches of an epoch.
    pub(crate) per_epoch: u64,
    /// Makes another loader like this one.
    pub(crate) make: Box<dyn Fn() -> AsyncDataLoader + Send>,
}

impl Scene {
    pub(crate) fn loader(&self) -> &Arc<AsyncDataLoader> {
        self.loader.as_ref().expect("a loader until it is dropped")
    }

    /// The next batch, which must be the right one. The consumer holds it.
    pub(crate) fn take(&mut self) {
        match Way::Get.ask(self.loader()) {
            Answer::Batch(batch) => {
                assert_eq!(batch.batch_id(), self.taken);
                assert_eq!(values(&batch), expected(self.taken % self.per_epoch));
                self.held.push_back(batch);
                self.taken += 1;
            }
            other => panic!("{other:?} instead of batch {}", self.taken),
        }
    }

    /// The consumer keeps only this many batches, the newest.
    pub(crate) fn keep(&mut self, batches: usize) {
        while self.held.len() > batches {
            self.held.pop_front();
        }
    }

    /// What the consumer holds is what it was when it was taken.
    pub(crate) fn assert_held_are_good(&self) {
        for (batch, number) in self.held.iter().rev().zip((0..self.taken).rev()) {
            assert_eq!(values(batch), expected(number % self.per_epoch));
        }
    }

    /// However the consumer asks, and as often, it is told this.
    pub(crate) fn assert_told(&self, text: &str) {
        assert_told(self.loader(), text);
        assert_eq!((self.loader().state().epoch, self.loader().state().position), (0, self.taken));
    }

    /// The consumer that waits, if there is one, is told this.
    pub(crate) fn assert_waiting_is_told(&mut self, text: &str) {
        if let Some(waiting) = self.waiting.take() {
            eventually("the consumer that waits to be woken", || waiting.is_finished());
            assert_error(waiting.join().unwrap(), text);
        }
    }

    /// Loses the device, and sees to it that the loss is noticed.
    pub(crate) fn lose(&self, is_in_use: bool) {
        self.control.lose();
        if !is_in_use {
            // Of a size that nothing else has, so that the device must be asked.
            let error = self.memory.tensor(&[77_777], DType::U8).unwrap_err();
            assert!(error.is_device_lost(), "{error}");
        }
        self.wait_for_the_loss();
    }

    /// Waits until the device is lost and everybody was told.
    pub(crate) fn wait_for_the_loss(&self) {
        eventually("the loss to be noticed", || !self.loader().stats().is_running);
        threads::settle();
        assert!(self.memory.device().check().unwrap_err().is_device_lost());
    }

    /// Lets everything go on that the scene holds up.
    pub(crate) fn let_go(&self) {
        self.source.open(Verdict::Go);
        if let Some(completion) = &self.completion {
            completion.keeper.open(Verdict::Go);
        }
        self.control.release();
    }

    /// Runs `call`, which waits for something, on this thread, and `meanwhile` on another one as
    /// soon as it does.
    pub(crate) fn meanwhile<R>(
        &mut self,
        call: impl FnOnce() -> R,
        meanwhile: impl FnOnce(&mut Self) + Send,
    ) -> R {
        let number = threads::own_number();
        let over = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let other = std::thread::Builder::new().name("meanwhile".to_owned());
            let helper = other.spawn_scoped(scope, || {
                threads::wait_until_asleep(number.as_deref(), || over.load(Ordering::SeqCst));
                meanwhile(self);
            });
            let result = call();
            over.store(true, Ordering::SeqCst);
            helper.unwrap().join().unwrap();
            result
        })
    }
}

/// However one asks, and as often, the answer is this error.
pub(crate) fn assert_told(loader: &AsyncDataLoader, text: &str) {
    for way in [Way::Get, Way::Timed(LONG), Way::Poll, Way::Stream, Way::Get] {
        assert_error(way.ask(loader), text);
    }
    assert!(!loader.stats().is_running);
}

pub(crate) fn assert_error(answer: Answer, text: &str) {
    match answer {
        Answer::Error(error) => assert_eq!(error.chain(), text),
        other => panic!("{other:?} instead of {text:?}"),
    }
}

pub(crate) fn values(batch: &GpuBatch) -> Vec<i64> {
    batch.input_tensor().to_vec().unwrap()
}

/// The numbers of a batch of an epoch.
pub(crate) fn expected(batch: u64) -> Vec<i64> {
    let first = batch.cast_signed() * ROWS;
    (first..first + ROWS).collect()
}

pub(crate) fn eventually(what: &str, condition: impl Fn() -> bool) {
    // A little less than a scene may take, so that it says what did not come.
    let deadline = Instant::now() + Duration::from_secs(4);
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Nothing is in use any more: it was given back, or given up.
pub(crate) fn assert_home(memory: &MemoryManager) {
    eventually("all memory to come home", || {
        let stats = memory.stats();
        stats.device_in_use == 0 && stats.staging_in_use == 0
    });
}
