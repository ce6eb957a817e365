//! A gate in the test's own code: a source, a sampler or a completion stands in it until the test
//! says how the call is to end.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use batchline::BoxError;

use crate::threads;

/// How the call in the gate ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    Go,
    Fail,
    Panic,
}

/// Holds the one call for `place`.
#[derive(Debug)]
pub(crate) struct Gate {
    place: u64,
    /// Calls so far, for any place.
    calls: AtomicUsize,
    entered: mpsc::SyncSender<()>,
    verdict: std::sync::OnceLock<Verdict>,
    /// Whoever stands in the gate.
    waiting: std::sync::OnceLock<std::thread::Thread>,
}

/// The test's end of a gate.
#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) gate: Arc<Gate>,
    entered: mpsc::Receiver<()>,
}

impl Keeper {
    /// A gate that holds the first call for `place`.
    pub(crate) fn at(place: u64) -> Self {
        let (sender, entered) = mpsc::sync_channel(1);
        let gate = Arc::new(Gate {
            place,
            calls: AtomicUsize::new(0),
            entered: sender,
            verdict: std::sync::OnceLock::new(),
            waiting: std::sync::OnceLock::new(),
        });
        Self { gate, entered }
    }

    /// Waits until a call stands in the gate.
    pub(crate) fn entered(&self) {
        self.entered.recv_timeout(Duration::from_secs(10)).expect("a call that enters the gate");
    }

    /// Lets go of the call; the first verdict counts.
    pub(crate) fn open(&self, verdict: Verdict) {
        let _ = self.gate.verdict.set(verdict);
        if let Some(waiting) = self.gate.waiting.get() {
            waiting.unpark();
        }
    }

    /// Whether a call stands in the gate.
    pub(crate) fn is_inside(&self) -> bool {
        self.gate.waiting.get().is_some() && self.gate.verdict.get().is_none()
    }

    pub(crate) fn calls(&self) -> usize {
        self.gate.calls.load(Ordering::SeqCst)
    }
}

impl Gate {
    /// A call of the test's code, from a thread of the library. Only the first one for the gate's
    /// place is held.
    pub(crate) fn call(&self, place: u64) -> Result<(), BoxError> {
        threads::mark();
        self.calls.fetch_add(1, Ordering::SeqCst);
        if place != self.place || self.waiting.set(std::thread::current()).is_err() {
            return Ok(());
        }
        self.entered.try_send(())?;
        loop {
            match self.verdict.get() {
                None => std::thread::park(),
                Some(Verdict::Go) => return Ok(()),
                Some(Verdict::Fail) => return Err("no such luck".into()),
                Some(Verdict::Panic) => panic!("no such luck"),
            }
        }
    }
}
