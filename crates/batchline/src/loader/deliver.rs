//! The last queue: batches in order, then how the stream ends. It is bounded by the outputs.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Waker;

use super::ticket::Place;
use crate::memory::{Held, Patience};
use crate::sync::{Condvar, Looked, Mutex};
use crate::{Error, GpuBatch, Skipped};

/// A batch that was submitted, in front of the consumer. Its transfer may still be on its way.
#[derive(Debug)]
pub(crate) struct Ready {
    pub(crate) batch: GpuBatch,
    pub(crate) place: Place,
    /// What was left out of it.
    pub(crate) skipped: Vec<Skipped>,
}

/// How a stream is over.
#[derive(Debug, Clone)]
pub(crate) enum Ending {
    /// Everything was delivered.
    End,
    /// It failed; every later call says so again.
    Failed(Error),
}

/// What [`Deliver::take`] finds.
#[derive(Debug)]
pub(crate) enum Taken<R = Ready> {
    /// The next batch, which counts as held from now on.
    Ready(R, Held),
    NotYet,
    Over(Ending),
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Deliver<R = Ready> {
    state: Mutex<State<R>>,
    changed: Condvar,
    /// Outputs that the consumer holds.
    held: Arc<AtomicUsize>,
    /// Outputs that there are.
    outputs: AtomicUsize,
    max_held: usize,
}

#[derive(Debug)]
struct State<R> {
    ready: VecDeque<R>,
    ending: Option<Ending>,
    wakers: Vec<Waker>,
}

impl<R> Deliver<R> {
    pub(crate) fn new(outputs: usize, max_held: usize) -> Self {
        Self {
            state: Mutex::new(State {
                ready: VecDeque::with_capacity(outputs.min(1024)),
                ending: None,
                wakers: Vec::new(),
            }),
            changed: Condvar::new(),
            held: Arc::new(AtomicUsize::new(0)),
            outputs: AtomicUsize::new(outputs),
            max_held,
        }
    }

    /// Says how many outputs there really are, once memory was found for them.
    pub(crate) fn set_outputs(&self, outputs: usize) {
        self.outputs.store(outputs, Ordering::Release);
    }

    /// Batches that wait for the consumer.
    pub(crate) fn queued(&self) -> usize {
        self.state.lock().ready.len()
    }

    /// Adds the next batch. It is dropped where the stream is over already.
    pub(crate) fn push(&self, ready: R) {
        let mut state = self.state.lock();
        if state.ending.is_none() {
            state.ready.push_back(ready);
        }
        self.wake(state);
    }

    /// Ends the stream, behind the batches that are there. The first ending counts.
    pub(crate) fn end(&self, ending: Ending) {
        let mut state = self.state.lock();
        state.ending.get_or_insert(ending);
        self.wake(state);
    }

    /// Ends the stream at once with an error: the batches that nobody took are dropped. Returns the
    /// error that counts, which is the first. That the data are at their end does not count: the
    /// consumer has not got there.
    pub(crate) fn abandon(&self, error: Error) -> Error {
        let mut state = self.state.lock();
        let dropped = std::mem::take(&mut state.ready);
        let first = match state.ending.take() {
            Some(Ending::Failed(first)) => first,
            Some(Ending::End) | None => error,
        };
        state.ending = Some(Ending::Failed(first.clone()));
        self.wake(state);
        drop(dropped);
        first
    }

    fn wake(&self, mut state: crate::sync::MutexGuard<'_, State<R>>) {
        let wakers = std::mem::take(&mut state.wakers);
        drop(state);
        self.changed.notify_all();
        for waker in wakers {
            // A waker that panics is its owner's trouble; the others must wake.
            let _ = catch_unwind(AssertUnwindSafe(|| waker.wake()));
        }
    }

    /// The next batch, waiting for it as long as `patience` lasts. `waker` is woken when it is
    /// worth asking again.
    ///
    /// # Errors
    /// [`Error::TooManyHeld`]: the consumer holds every output, so none can come.
    pub(crate) fn take(
        &self,
        patience: Patience,
        waker: Option<&Waker>,
        note: impl FnOnce(&R),
    ) -> Result<Taken<R>, Error> {
        let mut looked = Looked::default();
        let mut state = self.state.lock();
        loop {
            if let Some(ready) = state.ready.pop_front() {
                // Under the lock, so that what is noted is in order for several consumers too.
                note(&ready);
                let held = Held::new(&self.held);
                if self.all_held().is_some() {
                    // Others that wait learn that nothing can come.
                    self.wake(state);
                }
                return Ok(Taken::Ready(ready, held));
            }
            if let Some(ending) = &state.ending {
                return Ok(Taken::Over(ending.clone()));
            }
            if let Some(held) = self.all_held() {
                return Err(Error::TooManyHeld { held, max_held: self.max_held });
            }
            if let Some(waker) = waker
                && !state.wakers.iter().any(|known| known.will_wake(waker))
            {
                state.wakers.push(waker.clone());
            }
            let Some(left) = patience.left() else { return Ok(Taken::NotYet) };
            state = self.changed.wait_eagerly(&self.state, state, &mut looked, left);
        }
    }

    /// How many outputs the consumer holds, if that is all of them.
    fn all_held(&self) -> Option<usize> {
        let held = self.held.load(Ordering::Acquire);
        (held >= self.outputs.load(Ordering::Acquire)).then_some(held)
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;

    /// A batch, an ending and a consumer that waits, in any order: the batch, then the end.
    #[test]
    fn loom_batches_come_before_the_end() {
        loom::model(|| {
            let deliver = Arc::new(Deliver::<u32>::new(2, 1));
            let producer = {
                let deliver = Arc::clone(&deliver);
                thread::spawn(move || {
                    deliver.push(1);
                    deliver.push(2);
                    deliver.end(Ending::End);
                    // Too late: nobody gets it.
                    deliver.push(3);
                })
            };
            for expected in [1, 2] {
                match deliver.take(Patience::Forever, None, |_| {}).unwrap() {
                    Taken::Ready(value, _) => assert_eq!(value, expected),
                    other => panic!("{other:?}"),
                }
            }
            let last = deliver.take(Patience::Forever, None, |_| {}).unwrap();
            assert!(matches!(last, Taken::Over(Ending::End)));
            producer.join().unwrap();
            assert_eq!(deliver.queued(), 0);
        });
    }

    /// A stop meets a batch and a consumer that waits: he wakes, with the batch or the ending.
    #[test]
    fn loom_a_stop_wakes_the_consumer() {
        loom::model(|| {
            let deliver = Arc::new(Deliver::<u32>::new(2, 1));
            let producer = {
                let deliver = Arc::clone(&deliver);
                thread::spawn(move || deliver.push(1))
            };
            let stopper = {
                let deliver = Arc::clone(&deliver);
                thread::spawn(move || {
                    deliver.abandon(Error::Closed { what: "loader" });
                })
            };
            match deliver.take(Patience::Forever, None, |_| {}).unwrap() {
                Taken::Ready(value, _) => assert_eq!(value, 1),
                Taken::Over(Ending::Failed(_)) => {}
                other => panic!("{other:?}"),
            }
            producer.join().unwrap();
            stopper.join().unwrap();
        });
    }
}
