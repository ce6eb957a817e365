//! The thread that does what is queued, in one of the orders that the driver might.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::Instant;

use super::stream::Operation;
use super::work::Work;
use super::{CHANGED, State, lock};
use crate::codes::ILLEGAL_ADDRESS;

/// Starts the thread where there is none.
pub(crate) fn start(state: &mut State) {
    if !state.executor {
        state.executor = true;
        spawn("fake-cuda-executor", run);
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) {
    let spawned = thread::Builder::new().name(name.into()).spawn(body);
    spawned.expect("the system starts a thread");
}

/// A number of the calling thread.
pub(crate) fn thread_number() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    thread_local! {
        static OWN: u64 = NEXT.fetch_add(1, Ordering::Relaxed);
    }
    OWN.with(|own| *own)
}

fn run() {
    let mut state = lock();
    loop {
        let now = Instant::now();
        state = match state.choose() {
            None => CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner),
            Some((_, due)) if due > now => {
                CHANGED.wait_timeout(state, due - now).unwrap_or_else(PoisonError::into_inner).0
            }
            Some((stream, due)) => {
                let begun = state.begin(stream);
                let Some((operation, seed)) = begun else { continue };
                if let Work::Host(call) = operation.work {
                    // A function that blocks must not hold up other streams.
                    spawn("fake-cuda-host-function", move || {
                        call.call();
                        lock().finish(stream, due, &operation, Ok(()));
                    });
                    continue;
                }
                drop(state);
                // A kernel that panics must not end this thread.
                let run = AssertUnwindSafe(|| operation.work.run(seed));
                let result = catch_unwind(run).unwrap_or_else(|_| Err("it panicked".into()));
                state = lock();
                state.finish(stream, due, &operation, result);
                state
            }
        };
    }
}

impl State {
    /// The stream to go on with, and when. Without latencies any that can go on, at random; with
    /// them the one whose work is done first, so that the order does not depend on this thread.
    fn choose(&mut self) -> Option<(usize, Instant)> {
        let due = self.streams.iter().filter_map(|(handle, stream)| {
            let due = self.due(stream)?;
            Some((*handle, due))
        });
        let ready: Vec<(usize, Instant)> = due.collect();
        if self.settings.latency_us > 0 || self.settings.random_latency_us > 0 {
            return ready.into_iter().min_by_key(|(_, due)| *due);
        }
        match ready.len() {
            0 => None,
            1 => Some(ready[0]),
            several => Some(ready[self.random.index(several)]),
        }
    }

    /// Takes the first of a stream's queue to be done; it stays in the queue till it is.
    fn begin(&mut self, handle: usize) -> Option<(Arc<Operation>, u64)> {
        let seed = self.random.below(u64::MAX);
        let stream = self.streams.get_mut(&handle)?;
        let operation = Arc::clone(stream.queue.front()?);
        let (number, context) = (stream.number, stream.context);
        if operation.work.is_effective() {
            self.executed += 1;
            let executed = self.executed;
            if let Some(at) = self.faults.iter().position(|(at, _)| *at == executed) {
                let (_, code) = self.faults.remove(at);
                self.lose(context, code);
                return None;
            }
            if self.settings.trace {
                let device = self.contexts.get(&context).map_or(0, |context| context.device);
                let what = operation.work.describe();
                self.trace.push(format!("device {device} stream {number}: {what}"));
            }
        }
        self.streams.get_mut(&handle)?.running = true;
        Some((operation, seed))
    }

    fn finish(
        &mut self,
        handle: usize,
        due: Instant,
        operation: &Operation,
        result: Result<(), String>,
    ) {
        // A reset may have come in between.
        let Some(stream) = self.streams.get_mut(&handle) else { return };
        let context = stream.context;
        stream.running = false;
        stream.queue.pop_front();
        stream.completed += 1;
        stream.clock = stream.clock.max(due);
        if stream.destroyed && stream.queue.is_empty() {
            self.streams.remove(&handle);
        }
        if let Err(what) = result {
            self.violation(format!("{}: {what}", operation.work.describe()));
            self.lose(context, ILLEGAL_ADDRESS);
        }
        CHANGED.notify_all();
    }
}
