//! A bounded pool that lends its items: empty means wait, dropping the loan returns the item.

use std::collections::VecDeque;
use std::fmt;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::sync::{self, Condvar, Looked, Mutex, MutexGuard};
use crate::{Error, Result};

/// How long a call may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Patience {
    /// Not at all.
    None,
    /// Until this moment.
    Until(Instant),
    /// For as long as it takes; closing the pool ends it.
    Forever,
}

impl Patience {
    /// For so long from now on; a time beyond the clock's range is for ever.
    pub(crate) fn within(timeout: Duration) -> Self {
        sync::now().checked_add(timeout).map_or(Self::Forever, Self::Until)
    }

    /// What is left: `None` when it is over, else how long to wait at most, if there is a limit.
    pub(crate) fn left(self) -> Option<Option<Duration>> {
        match self {
            Patience::None => None,
            Patience::Forever => Some(None),
            Patience::Until(deadline) => {
                let left = deadline.saturating_duration_since(sync::now());
                (!left.is_zero()).then_some(Some(left))
            }
        }
    }
}

/// A bounded, closable pool of at most `max` items, made when they are first needed.
pub(crate) struct Pool<T> {
    shared: Arc<Shared<T>>,
}

struct Shared<T> {
    what: &'static str,
    max: usize,
    /// Whether the item that came back last is lent first: its memory is still in the caches. Else
    /// the one that has been free for longest: whatever a device still did with it is then most
    /// likely over.
    newest_first: bool,
    state: Mutex<State<T>>,
    /// Signalled when an item comes back, a place becomes free, or the pool closes.
    returned: Condvar,
    /// Signalled when the last loan in flight has landed.
    landed: Condvar,
}

struct State<T> {
    /// Items that nobody uses; the first is lent next.
    free: VecDeque<T>,
    /// Items in existence, free or lent, and places promised to an item being made.
    total: usize,
    /// Loans that an unfinished submission owns.
    in_flight: usize,
    /// Set once; all waiters then leave with this error, and items that come back are dropped.
    closed: Option<Error>,
}

/// The counts of a pool at one moment: `available + in_use = total ≤ max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counts {
    pub(crate) available: usize,
    pub(crate) in_use: usize,
    pub(crate) total: usize,
    pub(crate) max: usize,
}

impl<T> Clone for Pool<T> {
    fn clone(&self) -> Self {
        Self { shared: Arc::clone(&self.shared) }
    }
}

impl<T> fmt::Debug for Pool<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pool")
            .field("what", &self.shared.what)
            .field("counts", &self.counts())
            .finish()
    }
}

impl<T> Pool<T> {
    pub(crate) fn new(what: &'static str, max: usize) -> Self {
        Self::with_order(what, max, false)
    }

    fn with_order(what: &'static str, max: usize, newest_first: bool) -> Self {
        Self {
            shared: Arc::new(Shared {
                what,
                max,
                newest_first,
                state: Mutex::new(State {
                    free: VecDeque::with_capacity(max.min(1024)),
                    total: 0,
                    in_flight: 0,
                    closed: None,
                }),
                returned: Condvar::new(),
                landed: Condvar::new(),
            }),
        }
    }

    /// A pool of just these items.
    pub(crate) fn stocked(what: &'static str, items: Vec<T>, newest_first: bool) -> Self {
        let pool = Self::with_order(what, items.len(), newest_first);
        let mut state = pool.shared.state.lock();
        state.total = items.len();
        state.free = items.into();
        drop(state);
        pool
    }

    /// Lends an item: a free one, else a new one from `make`, else one that comes back in time.
    ///
    /// Where `make` fails with [`Error::LimitReached`] while this pool has items out, it waits for
    /// one of those.
    ///
    /// # Errors
    /// Closed; not in time ([`Error::Timeout`]); or what `make` failed with.
    pub(crate) fn acquire(
        &self,
        patience: Patience,
        make: impl Fn() -> Result<T>,
    ) -> Result<Loan<T>> {
        let started = sync::now();
        let mut looked = Looked::default();
        let mut may_make = true;
        let mut state = self.shared.state.lock();
        loop {
            if let Some(error) = &state.closed {
                return Err(error.clone());
            }
            if let Some(item) = state.free.pop_front() {
                return Ok(self.lend(item));
            }
            if may_make && state.total < self.shared.max {
                state.total += 1;
                drop(state);
                let made = make();
                state = self.shared.state.lock();
                match made {
                    // A pool that was closed meanwhile takes the item back when the loan is dropped.
                    Ok(item) => return Ok(self.lend(item)),
                    Err(error) => {
                        state.total -= 1;
                        self.shared.returned.notify_one();
                        if !matches!(error, Error::LimitReached { .. }) || state.total == 0 {
                            return Err(error);
                        }
                        may_make = false;
                        continue;
                    }
                }
            }
            let Some(left) = patience.left() else { return Err(self.too_late(started)) };
            let Shared { returned, state: lock, .. } = &*self.shared;
            state = returned.wait_eagerly(lock, state, &mut looked, left);
            may_make = true;
        }
    }

    fn lend(&self, item: T) -> Loan<T> {
        Loan { item: Some(item), pool: Arc::clone(&self.shared), in_flight: false }
    }

    fn too_late(&self, started: Instant) -> Error {
        Error::Timeout { what: self.shared.what, after: started.elapsed() }
    }

    pub(crate) fn counts(&self) -> Counts {
        let state = self.shared.state.lock();
        Counts {
            available: state.free.len(),
            in_use: state.total - state.free.len(),
            total: state.total,
            max: self.shared.max,
        }
    }

    /// Closes the pool: every waiter and every later call gets `error` (the first one given), free
    /// items are dropped, lent ones when they come back.
    pub(crate) fn close(&self, error: Error) {
        let mut state = self.shared.state.lock();
        state.closed.get_or_insert(error);
        state.total -= state.free.len();
        let free = std::mem::take(&mut state.free);
        drop(state);
        self.shared.returned.notify_all();
        self.shared.landed.notify_all();
        drop(free);
    }

    /// Waits until no submission owns an item of this pool; false when the patience was over
    /// before.
    pub(crate) fn wait_landed(&self, patience: Patience) -> bool {
        let mut state = self.shared.state.lock();
        while state.in_flight > 0 {
            let Some(left) = patience.left() else { return false };
            state = self.shared.landed.wait_at_most(state, left);
        }
        true
    }
}

impl<T> Shared<T> {
    fn land(&self, state: &mut MutexGuard<'_, State<T>>) {
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.landed.notify_all();
        }
    }
}

/// An item on loan. Dropping it returns the item.
pub(crate) struct Loan<T> {
    /// `None` only while it is being taken apart.
    item: Option<T>,
    pool: Arc<Shared<T>>,
    /// Whether a submission owns the loan.
    in_flight: bool,
}

impl<T> Loan<T> {
    /// Notes that a submission owns the loan from now on.
    pub(crate) fn take_off(&mut self) {
        if !std::mem::replace(&mut self.in_flight, true) {
            self.pool.state.lock().in_flight += 1;
        }
    }

    /// Takes the item out of the pool for good: its place becomes free.
    pub(crate) fn keep(mut self) -> T {
        let item = self.item.take().expect("an item until it is taken");
        let mut state = self.pool.state.lock();
        state.total -= 1;
        if std::mem::take(&mut self.in_flight) {
            self.pool.land(&mut state);
        }
        drop(state);
        self.pool.returned.notify_one();
        item
    }
}

impl<T> Drop for Loan<T> {
    fn drop(&mut self) {
        let Some(item) = self.item.take() else { return };
        let mut state = self.pool.state.lock();
        if self.in_flight {
            self.pool.land(&mut state);
        }
        if state.closed.is_some() {
            state.total -= 1;
            drop(state);
            drop(item);
            return;
        }
        if self.pool.newest_first {
            state.free.push_front(item);
        } else {
            state.free.push_back(item);
        }
        drop(state);
        self.pool.returned.notify_one();
    }
}

impl<T> Deref for Loan<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.item.as_ref().expect("an item until it is taken")
    }
}

impl<T> DerefMut for Loan<T> {
    fn deref_mut(&mut self) -> &mut T {
        self.item.as_mut().expect("an item until it is taken")
    }
}

impl<T: fmt::Debug> fmt::Debug for Loan<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.item, f)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    fn pool(max: usize) -> Pool<u32> {
        Pool::new("item", max)
    }

    #[test]
    fn it_is_bounded_and_counts_add_up() {
        let pool = pool(2);
        let one = pool.acquire(Patience::None, || Ok(1)).unwrap();
        let two = pool.acquire(Patience::None, || Ok(2)).unwrap();
        assert!(matches!(pool.acquire(Patience::None, || Ok(3)), Err(Error::Timeout { .. })));
        drop(one);
        let counts = pool.counts();
        assert_eq!((counts.available, counts.in_use, counts.total, counts.max), (1, 1, 2, 2));
        drop(two);
        // First in, first out.
        assert_eq!(*pool.acquire(Patience::None, || Ok(9)).unwrap(), 1);
    }

    #[test]
    fn a_return_wakes_a_waiter() {
        let pool = pool(1);
        let loan = pool.acquire(Patience::None, || Ok(1)).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| *pool.acquire(Patience::Forever, || Ok(2)).unwrap());
            drop(loan);
            assert_eq!(waiter.join().unwrap(), 1);
        });
    }

    #[test]
    fn closing_wakes_waiters_and_loans_come_home_to_nobody() {
        let pool = pool(1);
        let loan = pool.acquire(Patience::None, || Ok(1)).unwrap();
        std::thread::scope(|scope| {
            let waiter =
                scope.spawn(|| pool.acquire(Patience::Forever, || Ok(2)).map(|loan| *loan));
            pool.close(Error::Closed { what: "pool" });
            assert!(matches!(waiter.join().unwrap(), Err(Error::Closed { .. })));
        });
        drop(loan);
        assert_eq!(pool.counts().total, 0);
    }

    #[test]
    fn a_reached_limit_waits_for_an_own_item_and_other_errors_do_not() {
        let pool = pool(2);
        let limit = || {
            let (requested, in_use, limit, limit_name) = (1, 1, 1, "staging_limit");
            Err(Error::LimitReached { what: "x".into(), requested, in_use, limit, limit_name })
        };
        assert!(matches!(pool.acquire(Patience::Forever, limit), Err(Error::LimitReached { .. })));
        let loan = pool.acquire(Patience::None, || Ok(7)).unwrap();
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| *pool.acquire(Patience::Forever, limit).unwrap());
            std::thread::sleep(Duration::from_millis(5));
            drop(loan);
            assert_eq!(waiter.join().unwrap(), 7);
        });
        let counts = pool.counts();
        assert_eq!((counts.total, counts.available), (1, 1));
    }

    #[test]
    fn landing_is_waited_for() {
        let pool = pool(2);
        let mut loan = pool.acquire(Patience::None, || Ok(1)).unwrap();
        loan.take_off();
        loan.take_off();
        std::thread::scope(|scope| {
            scope.spawn(|| assert!(pool.wait_landed(Patience::Forever)));
            assert!(!pool.wait_landed(Patience::None));
            drop(loan);
        });
        let mut kept = pool.acquire(Patience::None, || Ok(1)).unwrap();
        kept.take_off();
        assert_eq!(kept.keep(), 1);
        assert!(pool.wait_landed(Patience::None));
        assert_eq!(pool.counts().total, 0);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;

    /// Two borrowers, one item: each gets it, whoever comes first, and nobody sleeps for ever.
    #[test]
    fn loom_every_borrower_is_served() {
        loom::model(|| {
            let pool = Pool::new("item", 1);
            let other = pool.clone();
            let borrower = thread::spawn(move || {
                let loan = other.acquire(Patience::Forever, || Ok(0)).unwrap();
                assert_eq!(other.counts().in_use, 1);
                drop(loan);
            });
            let loan = pool.acquire(Patience::Forever, || Ok(0)).unwrap();
            assert_eq!(pool.counts().in_use, 1);
            drop(loan);
            borrower.join().unwrap();
            assert_eq!(pool.counts().available, 1);
        });
    }

    /// A close meets a waiter and a return at any moment: the waiter ends, nothing stays.
    #[test]
    fn loom_close_ends_every_wait() {
        loom::model(|| {
            let pool = Pool::new("item", 1);
            let mut loan = pool.acquire(Patience::Forever, || Ok(0)).unwrap();
            loan.take_off();
            let (waiting, returning) = (pool.clone(), loan);
            let waiter = thread::spawn(move || {
                let _ = waiting.acquire(Patience::Forever, || Ok(1));
            });
            let holder = thread::spawn(move || drop(returning));
            pool.close(Error::Closed { what: "pool" });
            pool.wait_landed(Patience::Forever);
            waiter.join().unwrap();
            holder.join().unwrap();
            assert_eq!(pool.counts().total, 0);
        });
    }
}
