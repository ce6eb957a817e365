//! Locks, threads and the clock: those of `std`, or of `loom` under `--cfg loom`.
//!
//! No other file knows which of the two it uses. A lock whose holder panicked is simply taken: each
//! critical section leaves its state valid at every step, and panics of user code never happen
//! under a lock.
#![allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "this is the file that wraps them"
)]

#[cfg(loom)]
use loom::sync as imp;
#[cfg(not(loom))]
use std::sync as imp;

use std::time::{Duration, Instant};

use imp::atomic::{AtomicUsize, Ordering};

pub(crate) use imp::MutexGuard;

/// A mutual-exclusion lock without lock poisoning.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(imp::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) fn new(value: T) -> Self {
        Self(imp::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A condition variable for [`Mutex`], which must be the same one at every wait. Who notifies has
/// changed the condition under that lock; where nobody waits, it is no call of the system.
#[derive(Debug, Default)]
pub(crate) struct Condvar {
    inner: imp::Condvar,
    /// Threads that wait. It is changed under the lock, so whoever changes the condition after such
    /// a thread has looked at it finds the thread counted.
    waiting: AtomicUsize,
    /// Counts notifications, for threads that look for one before they sleep.
    notified: AtomicUsize,
    /// Waits in a row before which looking was of no use, or was left out.
    misses: AtomicUsize,
    /// Threads that look for a notification and that no one has counted on yet: each is good for
    /// one notification that needs no call of the system. It is raised under the lock, and a thread
    /// that finds itself counted on looks at the condition again before it sleeps.
    looking: AtomicUsize,
}

/// Whether a wait has looked for a notification already.
#[derive(Debug, Default)]
pub(crate) struct Looked(bool);

/// How long a thread looks before it sleeps. Putting it to sleep and waking it takes about as long.
const LOOK: Duration = Duration::from_micros(10);

impl Condvar {
    pub(crate) fn new() -> Self {
        let none = || AtomicUsize::new(0);
        Self {
            inner: imp::Condvar::new(),
            waiting: none(),
            notified: none(),
            misses: none(),
            looking: none(),
        }
    }

    /// As [`wait_at_most`](Self::wait_at_most), for news that mostly comes within microseconds: the
    /// first call of a wait looks for it without sleeping, where that has been of use lately.
    pub(crate) fn wait_eagerly<'a, T>(
        &self,
        mutex: &'a Mutex<T>,
        guard: MutexGuard<'a, T>,
        looked: &mut Looked,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, T> {
        if std::mem::replace(&mut looked.0, true) {
            return self.wait_at_most(guard, timeout);
        }
        // A model has no time to lose: it looks each time, and for no time at all.
        if cfg!(loom) {
            self.looking.fetch_add(1, Ordering::Relaxed);
            drop(guard);
            self.look_no_more();
            return mutex.lock();
        }
        // After a few misses only now and then.
        let misses = self.misses.fetch_add(1, Ordering::Relaxed);
        if misses > 4 && !misses.is_multiple_of(16) {
            return self.wait_at_most(guard, timeout);
        }
        let before = self.notified.load(Ordering::Relaxed);
        self.looking.fetch_add(1, Ordering::Relaxed);
        drop(guard);
        let began = now();
        for round in 0.. {
            if self.notified.load(Ordering::Relaxed) != before {
                self.misses.store(0, Ordering::Relaxed);
                break;
            }
            // Without giving the processor away: on a busy machine it would not come back for long.
            if round % 16 == 15 && began.elapsed() >= LOOK {
                break;
            }
            std::hint::spin_loop();
        }
        self.look_no_more();
        // Not asleep yet: the caller looks at its condition first.
        mutex.lock()
    }

    /// One thread less that looks; or it was counted on, and is not counted any more.
    ///
    /// Without an order of its own: where this comes behind a notifier that counts on it, the lock
    /// that follows comes behind the notifier's, too. Else that one's would have come behind, and
    /// with it what it does to the count.
    fn look_no_more(&self) -> bool {
        let less = |looking: usize| looking.checked_sub(1);
        self.looking.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).is_ok()
    }

    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let guard = self.inner.wait(guard).unwrap_or_else(std::sync::PoisonError::into_inner);
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// Waits at most `timeout`; callers look at their own condition and clock afterwards.
    pub(crate) fn wait_timeout<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Duration,
    ) -> MutexGuard<'a, T> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        let waited = self.inner.wait_timeout(guard, timeout);
        let guard = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        self.waiting.fetch_sub(1, Ordering::Relaxed);
        guard
    }

    /// Waits, at most for `timeout` where there is one.
    pub(crate) fn wait_at_most<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        timeout: Option<Duration>,
    ) -> MutexGuard<'a, T> {
        match timeout {
            Some(timeout) => self.wait_timeout(guard, timeout),
            None => self.wait(guard),
        }
    }

    /// How many threads sleep, as it was a moment ago.
    pub(crate) fn sleeping(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// Has one of the threads that wait look at the condition again.
    pub(crate) fn notify_one(&self) {
        self.notified.fetch_add(1, Ordering::Relaxed);
        if !self.look_no_more() && self.waiting.load(Ordering::Relaxed) > 0 {
            self.inner.notify_one();
        }
    }

    pub(crate) fn notify_all(&self) {
        self.notified.fetch_add(1, Ordering::Relaxed);
        if self.waiting.load(Ordering::Relaxed) > 0 {
            self.inner.notify_all();
        }
    }
}

/// The time, from the one place that knows it.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Processor time that the calling thread has taken so far; `None` where the system does not tell.
pub(crate) fn processor_time() -> Option<Duration> {
    #[cfg(unix)]
    {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        let nanos = u32::try_from(time.tv_nsec).ok()?;
        Some(Duration::new(u64::try_from(time.tv_sec).ok()?, nanos))
    }
    #[cfg(not(unix))]
    None
}

/// Starts a thread named after what it is. The name shows in debuggers, profilers and panics.
pub(crate) fn spawn_named<F>(name: String, body: F) -> std::io::Result<std::thread::JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    let body = move || {
        OWN_THREAD.set(true);
        body();
    };
    std::thread::Builder::new().name(name).spawn(body)
}

thread_local! {
    static OWN_THREAD: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
}

/// Whether the calling thread is one of this library's.
#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "for the CUDA device"))]
pub(crate) fn is_own_thread() -> bool {
    OWN_THREAD.get()
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    const ROUNDS: usize = 5000;

    #[derive(Default)]
    struct Shared {
        tasks: Mutex<usize>,
        work: Condvar,
        /// Tasks that were taken so far.
        taken: AtomicUsize,
    }

    impl Shared {
        /// Takes one task of each round.
        fn take_all(&self) {
            for round in 0..ROUNDS {
                // Nobody takes the other one's.
                while self.taken.load(Ordering::SeqCst) < 2 * round {
                    std::thread::yield_now();
                }
                let mut looked = Looked::default();
                let mut tasks = self.tasks.lock();
                while *tasks == 0 {
                    tasks = self.work.wait_eagerly(&self.tasks, tasks, &mut looked, None);
                }
                *tasks -= 1;
                drop(tasks);
                self.taken.fetch_add(1, Ordering::SeqCst);
            }
        }
    }

    /// A notification that counts on a thread which looks is not one less for a thread that sleeps.
    #[test]
    fn of_two_that_wait_none_sleeps_for_ever() {
        let shared = Arc::new(Shared::default());
        // Not joined where the test fails: one of them sleeps then.
        for name in ["one", "two"] {
            let shared = Arc::clone(&shared);
            spawn_named(name.to_owned(), move || shared.take_all()).unwrap();
        }
        for round in 0..ROUNDS {
            // So that they look, sleep, or are just about to.
            let (began, pause) = (now(), LOOK * u32::try_from(round % 8).unwrap() / 4);
            while began.elapsed() < pause {
                std::hint::spin_loop();
            }
            for _ in 0..2 {
                *shared.tasks.lock() += 1;
                shared.work.notify_one();
            }
            let began = now();
            while shared.taken.load(Ordering::SeqCst) < 2 * (round + 1) {
                assert!(began.elapsed() < Duration::from_secs(5), "one sleeps in round {round}");
                std::thread::yield_now();
            }
        }
    }
}
