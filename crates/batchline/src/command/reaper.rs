//! The reaper: one thread per device that watches the fences of what is in flight, in order, and
//! sends everything home.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{JoinHandle, ThreadId};

use super::submission::{Fences, Progress, Record, Work};
use crate::device::Health;
use crate::process::Process;
use crate::sync::{Condvar, Looked, Mutex, spawn_named};
use crate::{Error, Result};

/// Records that are done and kept to be used again.
const SPENT: usize = 64;

/// What is in flight, and the thread that watches it. The thread starts with the first submission.
pub(crate) struct Reaper {
    queue: Arc<Queue>,
    thread: Mutex<Option<JoinHandle<()>>>,
    /// The process that has the thread, and not a child of it.
    process: Process,
}

struct Queue {
    state: Mutex<State>,
    /// Records that are done, oldest first. Handles of users may still name them.
    spent: Mutex<VecDeque<Arc<Record>>>,
    /// Signalled when a record was linked, has left `Recorded`, or the queue was closed.
    changed: Condvar,
}

struct State {
    /// In order of submission. A record stays in front until it is done.
    records: VecDeque<Arc<Record>>,
    closed: bool,
}

impl Reaper {
    pub(crate) fn new() -> Self {
        let process = Process::current();
        Self { queue: Arc::new(Queue::new()), thread: Mutex::new(None), process }
    }

    /// A record of this work: a spent one that nobody has a handle to, else a new one.
    pub(crate) fn record(&self, work: Work) -> Arc<Record> {
        let mut spent = self.queue.spent.lock();
        match spent.front_mut().and_then(Arc::get_mut) {
            Some(record) => {
                record.reuse(work);
                spent.pop_front().expect("it was there above")
            }
            None => Record::new(work),
        }
    }

    /// Links a record, before the driver hears of it.
    pub(crate) fn link(&self, record: &Arc<Record>, health: &Arc<Health>) -> Result<()> {
        record.set_reaper(self.start(health)?);
        self.queue.push(record);
        Ok(())
    }

    /// Tells the thread that a linked record has left `Recorded`.
    pub(crate) fn notify(&self) {
        self.queue.notify();
    }

    /// Whether the calling thread is the reaper.
    pub(crate) fn is_current(&self) -> bool {
        let thread = self.thread.lock();
        thread.as_ref().is_some_and(|thread| thread.thread().id() == std::thread::current().id())
    }

    fn start(&self, health: &Arc<Health>) -> Result<ThreadId> {
        let mut thread = self.thread.lock();
        if let Some(thread) = &*thread {
            return Ok(thread.thread().id());
        }
        let (queue, health) = (Arc::clone(&self.queue), Arc::clone(health));
        let name = "reaper".to_owned();
        let handle = spawn_named(name.clone(), move || queue.run(&health))
            .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
        Ok(thread.insert(handle).thread().id())
    }
}

impl Drop for Reaper {
    /// Records own handles to their device, so none is left when the device's last handle goes.
    fn drop(&mut self) {
        if self.process.is_gone() {
            std::mem::forget(self.thread.lock().take());
            return;
        }
        self.queue.close();
        if let Some(thread) = self.thread.lock().take() {
            // The last handle may go with the last record, on the reaper itself; it is then about
            // to end and needs nobody to wait for it.
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Queue {
    fn new() -> Self {
        let state = Mutex::new(State { records: VecDeque::new(), closed: false });
        Self { state, spent: Mutex::new(VecDeque::new()), changed: Condvar::new() }
    }

    fn push(&self, record: &Arc<Record>) {
        self.state.lock().records.push_back(Arc::clone(record));
    }

    fn notify(&self) {
        // A record's progress has a lock of its own. Without this one, the news could come between
        // the reaper's look at the record and its wait.
        drop(self.state.lock());
        self.changed.notify_one();
    }

    fn close(&self) {
        self.state.lock().closed = true;
        self.changed.notify_one();
    }

    fn run(&self, health: &Health) {
        while let Some(record) = self.next() {
            // The thread must outlive any panic: that of a backend, or of something that a record
            // owned and that is dropped with it.
            let finish = AssertUnwindSafe(|| finish(&record, health));
            if let Err(panic) = catch_unwind(finish) {
                let error = Error::panicked("the end of a submission", &*panic);
                health.lose(error.clone());
                record.abandon(error);
            }
            self.state.lock().records.pop_front();
            self.keep(record);
        }
    }

    fn keep(&self, record: Arc<Record>) {
        let mut spent = self.spent.lock();
        if spent.len() == SPENT {
            spent.pop_front();
        }
        spent.push_back(record);
    }

    /// The record in front, once it has left `Recorded`; `None` when all is over.
    fn next(&self) -> Option<Arc<Record>> {
        let mut looked = Looked::default();
        let mut state = self.state.lock();
        loop {
            if let Some(record) = state.records.front() {
                if !matches!(record.progress(), Progress::Recorded) {
                    return Some(Arc::clone(record));
                }
            } else if state.closed {
                return None;
            }
            state = self.changed.wait_eagerly(&self.state, state, &mut looked, None);
        }
    }
}

/// Waits for a record and ends it.
fn finish(record: &Record, health: &Health) {
    // A fence of a lost device proves nothing, so the memory is given up.
    let wait = |fences: Fences| fences.into_iter().try_for_each(|fence| health.wait(fence));
    match record.progress() {
        Progress::InFlight(fences) => {
            let outcome = wait(fences);
            let quarantine = outcome.is_err();
            record.finish(outcome, quarantine);
        }
        Progress::Refused(error, fences) => record.finish(Err(error), wait(fences).is_err()),
        Progress::Quarantined(error) => record.finish(Err(error), true),
        Progress::Recorded | Progress::Done(_) => {
            unreachable!("`next` gives records that are submitted and not done")
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;

    /// A record leaves `Recorded` at any moment of the reaper's: it is always finished.
    #[test]
    fn loom_every_record_is_finished() {
        loom::model(|| {
            let queue = Arc::new(Queue::new());
            let device = crate::Device::host();
            let health = Arc::clone(device.core().health());
            let reaper = {
                let queue = Arc::clone(&queue);
                thread::spawn(move || queue.run(&health))
            };
            let record = Record::of_nothing();
            queue.push(&record);
            record.set_progress(Progress::InFlight(Default::default()));
            queue.notify();
            record.wait_done();
            queue.close();
            reaper.join().unwrap();
        });
    }
}
