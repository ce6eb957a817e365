//! Submissions on their way, and the wait for them.
//!
//! [`SubmissionIndex`](wgpu::SubmissionIndex) is wgpu's number, shared with all who submit to the
//! device; the segment's number is ours. One thread (the reaper) polls; the others read a counter.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::health::Health;
use super::memory::{Answer, Mapping};
use crate::sync::Mutex;
use crate::{Error, Result};

/// Longest wait inside wgpu: how long a loss that another thread noticed may stay unseen.
const SLICE: Duration = Duration::from_millis(100);

/// Pause between looks for mappings whose submission is done: their callbacks run in another
/// thread at that time (`submit`, or a poll of the device's owner).
const PAUSE: Duration = Duration::from_micros(50);

/// So many panics of `Device::poll` in a row, and the device counts as lost.
const PANICS: u32 = 3;

/// A submission, and the staging memory that comes back with it.
#[derive(Debug)]
pub(super) struct Flight {
    pub(super) value: u64,
    pub(super) index: wgpu::SubmissionIndex,
    pub(super) staging: Vec<(Arc<Mapping>, Answer)>,
}

/// All that was submitted and not waited for, oldest first.
#[derive(Debug, Default)]
pub(super) struct Flights {
    queue: Mutex<VecDeque<Flight>>,
    /// The last segment submitted.
    submitted: AtomicU64,
    /// The last segment that is done, with its staging memory mapped again.
    passed: AtomicU64,
    /// Whether a thread is in [`wait`](Self::wait).
    polling: AtomicBool,
}

impl Flights {
    pub(super) fn push(&self, flight: Flight) {
        let value = flight.value;
        self.queue.lock().push_back(flight);
        self.submitted.store(value, Ordering::Release);
    }

    pub(super) fn submitted(&self) -> u64 {
        self.submitted.load(Ordering::Acquire)
    }

    fn has_passed(&self, value: u64) -> bool {
        value <= self.passed.load(Ordering::Acquire)
    }

    /// See [`Backend::wait`](crate::backend::Backend::wait).
    pub(super) fn wait(
        &self,
        device: &wgpu::Device,
        health: &Health,
        value: u64,
        timeout: Duration,
    ) -> Result<bool> {
        let start = Instant::now();
        let mut panics = 0;
        loop {
            health.check()?;
            if self.has_passed(value) {
                return Ok(true);
            }
            let left = timeout.saturating_sub(start.elapsed());
            // Who finds another thread polling leaves it to that one.
            if let Some(_turn) = Turn::take(&self.polling) {
                match self.look(device, health, value, left.min(SLICE))? {
                    Look::Passed => return Ok(true),
                    Look::NotYet => panics = 0,
                    Look::Panicked(_) if panics + 1 < PANICS => panics += 1,
                    Look::Panicked(message) => return Err(health.lose(message)),
                    Look::Unmapped if left > PAUSE => std::thread::sleep(PAUSE),
                    Look::Unmapped => {}
                }
            } else if !left.is_zero() {
                std::thread::sleep(left.min(PAUSE));
            }
            if start.elapsed() >= timeout {
                return Ok(self.has_passed(value));
            }
        }
    }

    /// Makes every wait as long as its time-out, as a thread that polls for ever would.
    #[cfg(test)]
    pub(super) fn block_for_test(&self) {
        self.polling.store(true, Ordering::Release);
    }

    fn look(
        &self,
        device: &wgpu::Device,
        health: &Health,
        value: u64,
        slice: Duration,
    ) -> Result<Look> {
        let index = self.queue.lock().iter().find(|f| f.value == value).map(|f| f.index.clone());
        let Some(index) = index else {
            // Between the look at the counter and this one, another thread's wait has ended.
            if self.has_passed(value) {
                return Ok(Look::Passed);
            }
            return Err(Error::record("a wait", format!("segment {value} was never submitted")));
        };
        let wait = wgpu::PollType::Wait { submission_index: Some(index), timeout: Some(slice) };
        let polled = poll(device, wait);
        // The poll itself may have run the callback that says so.
        health.check()?;
        match polled {
            Ok(Ok(_)) => {}
            Ok(Err(wgpu::PollError::Timeout)) => return Ok(Look::NotYet),
            // wgpu counts a submission before it tries, and does not report a device that is lost.
            Ok(Err(wgpu::PollError::WrongSubmissionIndex(..))) => {
                return Err(health.lose("a submission did not reach the device"));
            }
            Err(Panic(message)) => return Ok(Look::Panicked(message)),
        }
        let mut queue = self.queue.lock();
        while queue.front().is_some_and(|flight| flight.value <= value) {
            if let Some(flight) = queue.front() {
                for (mapping, answer) in &flight.staging {
                    if !mapping.settle(answer, health)? {
                        return Ok(Look::Unmapped);
                    }
                }
                self.passed.store(flight.value, Ordering::Release);
            }
            queue.pop_front();
        }
        Ok(Look::Passed)
    }
}

enum Look {
    Passed,
    NotYet,
    /// The submission is done, but a callback is still to come.
    Unmapped,
    Panicked(String),
}

/// The right to poll, given back on drop.
struct Turn<'a>(&'a AtomicBool);

impl<'a> Turn<'a> {
    fn take(polling: &'a AtomicBool) -> Option<Self> {
        // Not `then_some`: a turn that is made and dropped ends the other thread's.
        (!polling.swap(true, Ordering::Acquire)).then(|| Self(polling))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

/// The message of a panic in wgpu.
#[derive(Debug)]
pub(super) struct Panic(String);

/// Polls, and catches what wgpu throws: it panics when a driver reports a lost device, and on an
/// assertion about its queue that a `submit` at the same time can break.
pub(super) fn poll(
    device: &wgpu::Device,
    kind: wgpu::PollType,
) -> Result<Result<wgpu::PollStatus, wgpu::PollError>, Panic> {
    catch_unwind(AssertUnwindSafe(|| device.poll(kind)))
        .map_err(|payload| Panic(Error::panicked("Device::poll", &*payload).to_string()))
}

/// Waits until memory of a submission that failed is mapped again. Nothing runs that uses it, so
/// this takes one look, unless another thread took the callbacks just then.
pub(super) fn reclaim(
    device: &wgpu::Device,
    health: &Health,
    staging: &[(Arc<Mapping>, Answer)],
) -> Result<()> {
    let start = Instant::now();
    for (mapping, answer) in staging {
        while !mapping.settle(answer, health)? {
            if poll(device, wgpu::PollType::Poll).is_err() || start.elapsed() > SLICE * 10 {
                return Err(health.lose("staging memory did not come back"));
            }
            health.check()?;
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}
