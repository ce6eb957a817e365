//! The ring of tickets: which batch is being filled, by whom, and which is next to go.
//!
//! A ticket is one batch on its way from the plan to the submitter: *filling* until all its rows
//! have come back, then *full*, or *aborted* where a row failed. Ticket and slot are handed out in
//! one step and in order: at any time at most one worker is opening the next ticket, and it waits
//! for the slot before any later ticket can ask for one. So the lowest unfinished ticket always
//! owns a slot, and the ring can't come to a standstill.
#![allow(unsafe_code, reason = "claims are disjoint because this file deals them out once")]

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::slot::{Claim, Fillable, Slot};
use crate::memory::Patience;
use crate::plan::BatchRows;
use crate::source::BatchLayout;
use crate::sync::{Condvar, Looked, Mutex};
use crate::{Error, Skipped};

/// Which batch a ticket is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) epoch: u64,
    /// Within the epoch.
    pub(crate) batch: u64,
    pub(crate) rows: BatchRows,
    /// Whether it is the last of its epoch.
    pub(crate) last: bool,
}

/// A batch that is filled, or failed.
#[derive(Debug)]
pub(crate) struct Ticket<S = Slot> {
    pub(crate) place: Place,
    pub(crate) slot: S,
    pub(crate) layout: Arc<BatchLayout>,
    /// Rows dealt out to workers: those before this one.
    claimed: u64,
    /// Rows that came back.
    returned: u64,
    /// The error of the lowest row that failed, with that row.
    pub(crate) failure: Option<(u64, Error)>,
    /// What is to be left out, in no particular order.
    pub(crate) skipped: Vec<SkippedRow>,
}

/// A row that is to be left out.
#[derive(Debug)]
pub(crate) struct SkippedRow {
    /// `None` where a pull source could not give a batch: nothing of this ticket is left out.
    pub(crate) row: Option<u64>,
    pub(crate) skipped: Skipped,
    pub(crate) error: Error,
}

/// What a worker is to do next.
#[derive(Debug)]
pub(crate) enum Task {
    /// Fill these rows, and hand the claim back.
    Fill(Place, Claim),
    /// Get a slot for the next ticket, and open it. Nobody else is told to meanwhile.
    Open,
    /// Nothing: all is over.
    End,
}

/// What came of a claim.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub(crate) failure: Option<(u64, Error)>,
    pub(crate) skipped: Vec<SkippedRow>,
}

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Ring<S = Slot> {
    state: Mutex<State<S>>,
    /// Workers wait here for rows, or for their turn to open a ticket.
    work: Condvar,
    /// The submitter waits here for the ticket in front.
    full: Condvar,
    /// A copy of the state's flag that can be read without the lock.
    stopped: AtomicBool,
}

#[derive(Debug)]
struct State<S> {
    /// Open tickets in order. The front one is the next to be submitted.
    tickets: VecDeque<Ticket<S>>,
    /// The number of the front ticket.
    front: u64,
    /// Whether a worker is opening a ticket.
    opening: bool,
    /// Whether the last ticket has been opened.
    ended: bool,
    /// An error of the source that belongs to no ticket; it comes behind all of them.
    failure: Option<Error>,
    /// What a pull source left out behind its last batch.
    trailing: Vec<SkippedRow>,
    /// A level: who looks at the ring later sees it too.
    stopped: bool,
}

impl<S: Fillable> Ring<S> {
    /// A ring for at most `slots` tickets at a time.
    pub(crate) fn new(slots: usize) -> Self {
        Self {
            state: Mutex::new(State {
                tickets: VecDeque::with_capacity(slots.min(1024)),
                front: 0,
                opening: false,
                ended: false,
                failure: None,
                trailing: Vec::new(),
                stopped: false,
            }),
            work: Condvar::new(),
            full: Condvar::new(),
            stopped: AtomicBool::new(false),
        }
    }

    /// What the calling worker is to do: at most `most` rows, or a ticket to open. Waits while
    /// there is neither.
    pub(crate) fn next_task(&self, most: u64) -> Task {
        let mut looked = Looked::default();
        let mut state = self.state.lock();
        loop {
            if state.stopped {
                return Task::End;
            }
            let front = state.front;
            // Tickets are opened when all rows before are dealt out: only the last can have any.
            if let Some(ticket) = state.tickets.back_mut() {
                let first = ticket.claimed;
                let end = ticket.place.rows.rows.min(first.saturating_add(most.max(1)));
                if first < end {
                    ticket.claimed = end;
                    let place = ticket.place;
                    let number = front + state.tickets.len() as u64 - 1;
                    let ticket = state.tickets.back().expect("it was there above");
                    // SAFETY: the ticket, and so the slot, stays in the ring until these rows have
                    // come back, and rows below `claimed` are never dealt out again.
                    let claim =
                        unsafe { Claim::new(number, &ticket.slot, &ticket.layout, first, end) };
                    return Task::Fill(place, claim);
                }
            }
            if state.ended {
                return Task::End;
            }
            if !state.opening {
                state.opening = true;
                return Task::Open;
            }
            state = self.work.wait_eagerly(&self.state, state, &mut looked, None);
        }
    }

    /// Opens the next ticket, with the slot that the worker got for it. `claimed` says that the
    /// worker itself fills all of it, and returns the claim.
    pub(crate) fn open(
        &self,
        place: Place,
        slot: S,
        layout: &Arc<BatchLayout>,
        claimed: bool,
        skipped: Vec<SkippedRow>,
    ) -> Option<Claim> {
        let mut state = self.state.lock();
        debug_assert!(state.opening, "a ticket was opened out of turn");
        state.opening = false;
        if state.stopped {
            drop(state);
            self.work.notify_all();
            return None;
        }
        let rows = place.rows.rows;
        let ticket = Ticket {
            place,
            slot,
            layout: Arc::clone(layout),
            claimed: if claimed { rows } else { 0 },
            returned: 0,
            failure: None,
            skipped,
        };
        let number = state.front + state.tickets.len() as u64;
        // SAFETY: as in `next_task`; all rows count as claimed, so nobody else gets them.
        let claim = claimed.then(|| unsafe { Claim::new(number, &ticket.slot, layout, 0, rows) });
        state.tickets.push_back(ticket);
        drop(state);
        self.work.notify_all();
        if rows == 0 {
            self.full.notify_one();
        }
        claim
    }

    /// Takes the turn to open back without a ticket: there are no more, or the source failed.
    /// `skipped` is what a pull source left out behind its last batch.
    pub(crate) fn end(&self, failure: Option<Error>, skipped: Vec<SkippedRow>) {
        let mut state = self.state.lock();
        state.opening = false;
        state.ended = true;
        state.failure = failure;
        state.trailing = skipped;
        drop(state);
        self.work.notify_all();
        self.full.notify_one();
    }

    /// Hands a claim back; true if that completed the ticket in front.
    pub(crate) fn hand_back(&self, claim: Claim, outcome: Outcome) -> bool {
        let mut state = self.state.lock();
        let place = claim.ticket - state.front;
        #[allow(clippy::cast_possible_truncation, reason = "the place in a queue in memory")]
        let ticket = &mut state.tickets[place as usize];
        ticket.returned += claim.end - claim.first;
        ticket.skipped.extend(outcome.skipped);
        let failed = outcome.failure.is_some();
        if let Some((row, error)) = outcome.failure {
            // The lowest row that fails decides, whoever comes first. Rows that nobody has begun
            // are not begun any more.
            if ticket.failure.as_ref().is_none_or(|(lowest, _)| row < *lowest) {
                ticket.failure = Some((row, error));
            }
            ticket.returned += ticket.place.rows.rows - ticket.claimed;
            ticket.claimed = ticket.place.rows.rows;
        }
        let full = place == 0 && ticket.is_full();
        if failed {
            state.ended = true;
        }
        // Whoever stopped the ring could not let go of a slot that was being written.
        let idle = if state.stopped { state.take_idle() } else { Vec::new() };
        drop(state);
        drop(idle);
        if failed {
            self.work.notify_all();
        }
        if full {
            self.full.notify_one();
        }
        full
    }

    /// The next ticket, once it is full or has failed: in order. `Ok(None)` after the last.
    ///
    /// # Errors
    /// The source's error behind the last ticket.
    pub(crate) fn next_full(&self) -> Result<Option<Ticket<S>>, Error> {
        let mut looked = Looked::default();
        let mut state = self.state.lock();
        loop {
            if let Some(next) = state.next_full() {
                return next;
            }
            state = self.full.wait_eagerly(&self.state, state, &mut looked, None);
        }
    }

    /// As [`next_full`](Self::next_full); `None` where it would wait.
    pub(crate) fn try_next_full(&self) -> Option<Result<Option<Ticket<S>>, Error>> {
        self.state.lock().next_full()
    }

    /// What was left out behind the last ticket.
    pub(crate) fn take_trailing(&self) -> Vec<SkippedRow> {
        std::mem::take(&mut self.state.lock().trailing)
    }

    /// Ends all waits. Tickets whose rows are still being written stay until those come back.
    pub(crate) fn stop(&self) {
        self.state.lock().stopped = true;
        self.stopped.store(true, Ordering::Release);
        self.work.notify_all();
        self.full.notify_all();
    }

    /// Whether it was stopped. Workers ask before each row.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Drops the tickets of a stopped ring that no worker writes to any more.
    pub(crate) fn clear(&self) {
        drop(self.state.lock().take_idle());
    }

    /// Waits for `time`, or until the ring is stopped; true if it was.
    pub(crate) fn sleep(&self, time: Duration) -> bool {
        let patience = Patience::within(time);
        let mut state = self.state.lock();
        while !state.stopped
            && let Some(left) = patience.left()
        {
            state = self.work.wait_at_most(state, left);
        }
        state.stopped
    }
}

impl<S> State<S> {
    /// See [`Ring::next_full`].
    fn next_full(&mut self) -> Option<Result<Option<Ticket<S>>, Error>> {
        if self.stopped {
            return Some(Ok(None));
        }
        if self.tickets.front().is_some_and(Ticket::is_full) {
            self.front += 1;
            return Some(Ok(self.tickets.pop_front()));
        }
        if self.tickets.is_empty() && self.ended && !self.opening {
            return Some(self.failure.take().map_or(Ok(None), Err));
        }
        None
    }

    /// Takes the tickets out that no worker writes to any more, at both ends: those between keep
    /// their number, by which claims find their ticket.
    fn take_idle(&mut self) -> Vec<Ticket<S>> {
        let mut idle = Vec::new();
        while self.tickets.front().is_some_and(Ticket::is_idle) {
            idle.extend(self.tickets.pop_front());
            self.front += 1;
        }
        while self.tickets.back().is_some_and(Ticket::is_idle) {
            idle.extend(self.tickets.pop_back());
        }
        idle
    }
}

impl<S> Ticket<S> {
    fn is_idle(&self) -> bool {
        self.returned == self.claimed
    }

    fn is_full(&self) -> bool {
        self.returned == self.place.rows.rows
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::ptr::NonNull;

    use loom::thread;

    use super::*;
    use crate::memory::{Loan, Pool};
    use crate::{DType, SampleSpec};

    /// A slot of a model: memory for one batch.
    type Memory = Box<[u64; 32]>;

    impl Fillable for Loan<Memory> {
        fn base(&self) -> NonNull<u8> {
            NonNull::from(&***self).cast()
        }
    }

    const ROWS: u64 = 2;

    struct Model {
        ring: Ring<Loan<Memory>>,
        slots: Pool<Memory>,
        next: Mutex<u64>,
        layout: Arc<BatchLayout>,
    }

    impl Model {
        fn new(slots: usize) -> Arc<Self> {
            let spec = SampleSpec::new(DType::U8, &[]).unwrap();
            Arc::new(Self {
                ring: Ring::new(slots),
                slots: Pool::new("slots", slots),
                next: Mutex::new(0),
                layout: Arc::new(BatchLayout::new(&spec, ROWS).unwrap()),
            })
        }

        /// What a worker does, for so many batches in all.
        fn work(&self, batches: u64) {
            self.work_and(batches, |_| {});
        }

        /// The same, and tells each time whether the ticket in front was completed.
        fn work_and(&self, batches: u64, completed: impl Fn(bool)) {
            loop {
                match self.ring.next_task(1) {
                    Task::End => return,
                    Task::Open => {
                        let mut next = self.next.lock();
                        if *next == batches {
                            self.ring.end(None, Vec::new());
                            continue;
                        }
                        match self.slots.acquire(Patience::Forever, || Ok(Box::new([0; 32]))) {
                            Ok(slot) => {
                                let rows = BatchRows { first: 0, rows: ROWS, padding: 0 };
                                let place = Place { epoch: 0, batch: *next, rows, last: false };
                                *next += 1;
                                self.ring.open(place, slot, &self.layout, false, Vec::new());
                            }
                            Err(error) => self.ring.end(Some(error), Vec::new()),
                        }
                    }
                    Task::Fill(place, mut claim) => {
                        let row = claim.first;
                        let value = u8::try_from(10 * place.batch + row + 1).unwrap();
                        claim.rows().all(0).fill(value);
                        completed(self.ring.hand_back(claim, Outcome::default()));
                    }
                }
            }
        }

        /// What the submitter does: the numbers of the batches, each checked.
        fn submit(&self) -> Vec<u64> {
            let mut seen = Vec::new();
            while let Ok(Some(mut ticket)) = self.ring.next_full() {
                let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut ticket.slot[..]);
                let batch = u8::try_from(ticket.place.batch).unwrap();
                assert_eq!(bytes[..2], [10 * batch + 1, 10 * batch + 2]);
                bytes.fill(0xDB);
                seen.push(ticket.place.batch);
            }
            seen
        }
    }

    fn model(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(preemptions);
        builder.check(body);
    }

    /// Two workers share the rows of two batches through one slot: in order, whole, and nobody
    /// sleeps for ever.
    #[test]
    fn loom_batches_come_in_order_and_whole() {
        model(2, || {
            let model = Model::new(1);
            let worker = {
                let model = Arc::clone(&model);
                thread::spawn(move || model.work(2))
            };
            let submitter = {
                let model = Arc::clone(&model);
                thread::spawn(move || assert_eq!(model.submit(), [0, 1]))
            };
            model.work(2);
            worker.join().unwrap();
            submitter.join().unwrap();
        });
    }

    /// Without a submitter, whoever completes the ticket in front hands it on: each once, in order.
    #[test]
    fn loom_tickets_leave_in_order_without_a_submitter() {
        model(2, || {
            let model = Model::new(2);
            let seen = Arc::new(Mutex::new(Vec::new()));
            let work = |model: &Model, seen: &Mutex<Vec<u64>>| {
                let leave = |full: bool| {
                    if full {
                        let mut seen = seen.lock();
                        while let Some(Ok(Some(ticket))) = model.ring.try_next_full() {
                            seen.push(ticket.place.batch);
                        }
                    }
                };
                model.work_and(2, leave);
            };
            let worker = {
                let (model, seen) = (Arc::clone(&model), Arc::clone(&seen));
                thread::spawn(move || work(&model, &seen))
            };
            work(&model, &seen);
            worker.join().unwrap();
            assert_eq!(*seen.lock(), [0, 1]);
        });
    }

    /// A stop at any moment: everybody leaves, and every slot comes back.
    #[test]
    fn loom_stop_ends_every_wait() {
        model(2, || {
            let model = Model::new(1);
            let worker = {
                let model = Arc::clone(&model);
                thread::spawn(move || model.work(3))
            };
            let submitter = {
                let model = Arc::clone(&model);
                thread::spawn(move || {
                    let seen = model.submit();
                    assert!(seen.iter().copied().eq(0..seen.len() as u64));
                })
            };
            model.ring.stop();
            model.slots.close(Error::Closed { what: "slots" });
            worker.join().unwrap();
            submitter.join().unwrap();
            model.ring.clear();
            assert_eq!(model.slots.counts().total, 0);
        });
    }
}
