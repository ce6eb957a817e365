//! The ring of tickets: which batch is being filled, by whom, and which is next to go.
//!
//! A ticket is one batch on its way from the plan to the device: *filling* until all its rows have
//! come back, then *full*, or *aborted* where a row failed. Ticket and slot are handed out in one
//! step and in order: at any time at most one worker is opening the next ticket, and it waits for
//! the slot before any later ticket can ask for one. So the lowest unfinished ticket always owns a
//! slot, and the ring can't come to a standstill.
//!
//! Tickets leave in order too: whoever completes the one in front takes the turn to submit, and
//! keeps it until the one in front is not full. Who completes a ticket meanwhile leaves it to him.
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
    /// Counted from 0: the batch's number in this generation.
    pub(crate) number: u64,
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
    /// Workers wait here for rows, or for their turn to open a ticket. Who takes a task wakes one or
    /// two others where there is more to do; with all of them at once, most would find nothing.
    work: Condvar,
    /// Workers wait here for time to pass before they try a sample again.
    stopping: Condvar,
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
    /// Whether a worker has the turn to submit.
    submitting: bool,
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
                submitting: false,
                ended: false,
                failure: None,
                trailing: Vec::new(),
                stopped: false,
            }),
            work: Condvar::new(),
            stopping: Condvar::new(),
            stopped: AtomicBool::new(false),
        }
    }

    /// What the calling worker is to do: at most `most` rows, or a ticket to open. Waits while
    /// there is neither. Of the workers that sleep, `spare` are not woken for what is left.
    pub(crate) fn next_task(&self, most: u64, spare: usize) -> Task {
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
                    // There are rows left, or a ticket to open.
                    let (rows_left, more) = (end < place.rows.rows, !state.ended);
                    drop(state);
                    let wake = || {
                        if spare == 0 || self.work.sleeping() > spare {
                            self.work.notify_one();
                        }
                    };
                    if rows_left || more {
                        wake();
                    }
                    // Each wakes two, so that all are awake soon.
                    if rows_left {
                        wake();
                    }
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
        let number = state.front + state.tickets.len() as u64;
        let ticket = Ticket {
            number,
            place,
            slot,
            layout: Arc::clone(layout),
            claimed: if claimed { rows } else { 0 },
            returned: 0,
            failure: None,
            skipped,
        };
        // SAFETY: as in `next_task`; all rows count as claimed, so nobody else gets them.
        let claim = claimed.then(|| unsafe { Claim::new(number, &ticket.slot, layout, 0, rows) });
        state.tickets.push_back(ticket);
        drop(state);
        // Else the caller asks for a task next, and wakes others itself.
        if claimed {
            self.work.notify_one();
        }
        claim
    }

    /// Takes the turn to open back without a ticket: there are no more, or the source failed. The
    /// caller then [submits](Self::next_to_submit) the end. `skipped` is what a pull source left out behind its last batch.
    pub(crate) fn end(&self, failure: Option<Error>, skipped: Vec<SkippedRow>) {
        let mut state = self.state.lock();
        state.opening = false;
        state.ended = true;
        state.failure = failure;
        state.trailing = skipped;
        drop(state);
        self.work.notify_all();
    }

    /// Hands a claim back; true if that completed the ticket in front, which is then to be
    /// [submitted](Self::next_to_submit).
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
        full
    }

    /// The ticket in front, if it is full or has failed: in order, `Ok(None)` after the last, then
    /// the source's error behind it. With it the caller has the turn to submit, noted in `turn`,
    /// and asks again when that is done. `None` takes the turn back: there is nothing to submit
    /// now, or another thread has the turn and will see to it, or all was stopped.
    pub(crate) fn next_to_submit(
        &self,
        turn: &mut bool,
    ) -> Option<Result<Option<Ticket<S>>, Error>> {
        let mut state = self.state.lock();
        if state.submitting && !*turn {
            return None;
        }
        let next = if state.stopped { None } else { state.next_full() };
        *turn = next.is_some();
        state.submitting = *turn;
        next
    }

    /// Whether the ticket in front can go with the one before it: full, with rows, none of them left
    /// out. Who has the turn asks; it stays so until he [takes](Self::take_plain) it, or all is
    /// stopped.
    pub(crate) fn has_plain(&self) -> bool {
        let state = self.state.lock();
        !state.stopped && state.tickets.front().is_some_and(Ticket::is_plain)
    }

    /// Takes the ticket that [`has_plain`](Self::has_plain) told of, unless all was stopped.
    pub(crate) fn take_plain(&self) -> Option<Ticket<S>> {
        let mut state = self.state.lock();
        if state.stopped || !state.tickets.front().is_some_and(Ticket::is_plain) {
            return None;
        }
        state.front += 1;
        state.tickets.pop_front()
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
        self.stopping.notify_all();
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
            state = self.stopping.wait_at_most(state, left);
        }
        state.stopped
    }
}

impl<S> State<S> {
    /// See [`Ring::next_to_submit`].
    fn next_full(&mut self) -> Option<Result<Option<Ticket<S>>, Error>> {
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

    /// Whether it is full of rows, and nothing is to be said about any of them.
    fn is_plain(&self) -> bool {
        let is_whole = self.failure.is_none() && self.skipped.is_empty();
        self.is_full() && is_whole && self.returned > 0
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
        /// Numbers, in the order in which the batches left.
        submitted: Mutex<Vec<u64>>,
        layout: Arc<BatchLayout>,
    }

    impl Model {
        fn new(slots: usize) -> Arc<Self> {
            let spec = SampleSpec::new(DType::U8, &[]).unwrap();
            Arc::new(Self {
                ring: Ring::new(slots),
                slots: Pool::new("slots", slots),
                next: Mutex::new(0),
                submitted: Mutex::new(Vec::new()),
                layout: Arc::new(BatchLayout::new(&spec, ROWS).unwrap()),
            })
        }

        /// What a worker does, for so many batches in all.
        fn work(&self, batches: u64) {
            loop {
                let full = match self.ring.next_task(1, 0) {
                    Task::End => return,
                    Task::Open => self.open(batches),
                    Task::Fill(place, mut claim) => {
                        let row = claim.first;
                        let value = u8::try_from(10 * place.batch + row + 1).unwrap();
                        claim.rows().all(0).fill(value);
                        self.ring.hand_back(claim, Outcome::default())
                    }
                };
                if full {
                    self.submit();
                }
            }
        }

        /// Opens the next ticket, or ends; true if that is to be submitted.
        fn open(&self, batches: u64) -> bool {
            let mut next = self.next.lock();
            if *next == batches {
                self.ring.end(None, Vec::new());
                return true;
            }
            match self.slots.acquire(Patience::Forever, || Ok(Box::new([0; 32]))) {
                Ok(slot) => {
                    let rows = BatchRows { first: 0, rows: ROWS, padding: 0 };
                    let place = Place { epoch: 0, batch: *next, rows, last: false };
                    *next += 1;
                    self.ring.open(place, slot, &self.layout, false, Vec::new());
                    false
                }
                Err(error) => {
                    self.ring.end(Some(error), Vec::new());
                    true
                }
            }
        }

        /// What whoever has the turn does: each batch checked, its slot given back.
        fn submit(&self) {
            let mut turn = false;
            while let Some(next) = self.ring.next_to_submit(&mut turn) {
                let Ok(Some(ticket)) = next else {
                    // As the loader does at the end.
                    self.ring.stop();
                    continue;
                };
                self.check(ticket);
                // What is full behind it goes along.
                if self.ring.has_plain()
                    && let Some(ticket) = self.ring.take_plain()
                {
                    self.check(ticket);
                }
            }
        }

        fn check(&self, mut ticket: Ticket<Loan<Memory>>) {
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut ticket.slot[..]);
            let batch = u8::try_from(ticket.place.batch).unwrap();
            assert_eq!(bytes[..2], [10 * batch + 1, 10 * batch + 2]);
            bytes.fill(0xDB);
            assert_eq!(ticket.number, ticket.place.batch);
            self.submitted.lock().push(ticket.number);
        }
    }

    fn model(preemptions: usize, body: impl Fn() + Send + Sync + 'static) {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound.get_or_insert(preemptions);
        builder.check(body);
    }

    /// Two workers share the rows of two batches through so many slots: in order, whole, each
    /// submitted once by whoever has the turn, and nobody sleeps for ever.
    fn batches_come_in_order_and_whole(slots: usize) {
        model(2, move || {
            let model = Model::new(slots);
            let worker = {
                let model = Arc::clone(&model);
                thread::spawn(move || model.work(2))
            };
            model.work(2);
            worker.join().unwrap();
            assert_eq!(*model.submitted.lock(), [0, 1]);
            assert!(model.ring.is_stopped(), "the end was seen");
        });
    }

    #[test]
    fn loom_batches_come_in_order_and_whole() {
        batches_come_in_order_and_whole(1);
    }

    #[test]
    fn loom_batches_that_overtake_come_in_order() {
        batches_come_in_order_and_whole(2);
    }

    /// A stop at any moment: everybody leaves, and every slot comes back.
    #[test]
    fn loom_stop_ends_every_wait() {
        model(2, || {
            let model = Model::new(1);
            let workers = [(); 2].map(|()| {
                let model = Arc::clone(&model);
                thread::spawn(move || model.work(3))
            });
            model.ring.stop();
            model.slots.close(Error::Closed { what: "slots" });
            for worker in workers {
                worker.join().unwrap();
            }
            let submitted = model.submitted.lock();
            assert!(submitted.iter().copied().eq(0..submitted.len() as u64));
            model.ring.clear();
            assert_eq!(model.slots.counts().total, 0);
        });
    }
}
