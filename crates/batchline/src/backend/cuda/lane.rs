//! A stream of the driver, and the events that tell how far it is.
//!
//! A fence is a number; the event recorded for it is kept until it is known to have passed, and is
//! then used again. An event that was never recorded would count as passed, so it is listed only
//! after it was recorded, and what waits for it is enqueued under the same lock.
//!
//! Users' streams come and go. A lane that nothing uses any more, and whose events have all passed,
//! is given to the next stream; its numbers go on.
#![allow(unsafe_code, reason = "calls the driver")]

use std::collections::VecDeque;
use std::ffi::{c_int, c_void};
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::context::{Context, Entered};
use super::driver::{self, Event, code};
use super::{CONSUMER, CudaStream};
use crate::backend::{MAX_STREAMS, StreamId};
use crate::sync::Mutex;
use crate::{Error, Result};

/// `CU_STREAM_NON_BLOCKING`: it does not wait for the legacy default stream.
const NON_BLOCKING: u32 = 1;
/// `CU_EVENT_DISABLE_TIMING`.
const DISABLE_TIMING: u32 = 2;

/// Events that each stream has from the start; more are made when they are needed.
const EVENTS: usize = 32;

/// See the [module](self).
#[derive(Debug)]
pub(super) struct Lane {
    /// The stream's handle. That of a user's lane changes, while nothing uses it.
    stream: AtomicPtr<c_void>,
    /// A user's stream is not ours to destroy.
    owned: bool,
    /// Whether users know of it though it is ours.
    shown: AtomicBool,
    marks: Mutex<Marks>,
    /// The last number known to have passed.
    passed: AtomicU64,
}

#[derive(Debug, Default)]
struct Marks {
    /// Numbers whose events were recorded and are not known to have passed, in order.
    pending: VecDeque<(u64, Event)>,
    /// The last number given out.
    last: u64,
    /// Events to record.
    spare: Vec<Event>,
}

impl Lane {
    /// A stream of our own.
    pub(super) fn new(entered: &Entered<'_>) -> Result<Self> {
        Self::of(entered, new_stream(entered)?, true)
    }

    /// A user's stream.
    fn adopt(entered: &Entered<'_>, stream: driver::Stream) -> Result<Self> {
        Self::of(entered, stream, false)
    }

    fn of(entered: &Entered<'_>, stream: driver::Stream, owned: bool) -> Result<Self> {
        let (stream, marks) = (AtomicPtr::new(stream.0), Mutex::new(Marks::default()));
        let (shown, passed) = (AtomicBool::new(false), AtomicU64::new(0));
        let lane = Self { stream, owned, shown, marks, passed };
        if let Err(error) = lane.stock(entered) {
            lane.close(entered);
            return Err(error);
        }
        Ok(lane)
    }

    /// Makes the events that a loader needs, so that none is made while it runs.
    fn stock(&self, entered: &Entered<'_>) -> Result<()> {
        let mut marks = self.marks.lock();
        for _ in 0..EVENTS {
            marks.spare.push(new_event(entered)?);
        }
        Ok(())
    }

    /// Notes that users learn of the stream: they may capture it from now on.
    pub(super) fn show(&self) {
        self.shown.store(true, Ordering::Release);
    }

    /// The stream.
    pub(super) fn stream(&self) -> driver::Stream {
        driver::Stream(self.stream.load(Ordering::Acquire))
    }

    /// Marks the stream's end with its next number.
    pub(super) fn mark(&self, entered: &Entered<'_>) -> Result<u64> {
        let stream = behind(self.stream());
        if !self.owned || self.shown.load(Ordering::Acquire) {
            self.check_not_captured(entered, stream)?;
        }
        let mut marks = self.marks.lock();
        let value = marks.last + 1;
        marks.record(entered, stream, value, self)?;
        Ok(value)
    }

    /// Marks the stream's end with this number, which must be a later one than all before.
    pub(super) fn mark_as(&self, entered: &Entered<'_>, value: u64) -> Result<()> {
        self.marks.lock().record(entered, self.stream(), value, self)
    }

    /// Refuses a stream whose work is recorded for later: an event on it would tell nothing, and
    /// would draw whoever waits for it into the recording.
    fn check_not_captured(&self, entered: &Entered<'_>, stream: driver::Stream) -> Result<()> {
        let mut status: c_int = 0;
        // SAFETY: the stream exists, and `status` is a place for the answer.
        let code = unsafe { (entered.driver().cuStreamIsCapturing)(stream, &raw mut status) };
        self.call(entered, "asking whether a stream is captured", code)?;
        if status == 0 {
            return Ok(());
        }
        Err(Error::record("the position of a CUDA stream", "the stream is being captured"))
    }

    /// As [`Entered::call`]; but a stream of a user's that the driver refuses is no loss of the
    /// device.
    fn call(
        &self,
        entered: &Entered<'_>,
        operation: &'static str,
        code: driver::Code,
    ) -> Result<()> {
        match code {
            code::INVALID_HANDLE | code::CAPTURE_UNSUPPORTED..=code::CAPTURE_WRONG_THREAD
                if !self.owned =>
            {
                Err(entered.context.refused(operation, code))
            }
            _ => entered.call(operation, code),
        }
    }

    /// Makes another stream wait, on the device, until this one has passed a number.
    pub(super) fn hold_back(&self, entered: &Entered<'_>, other: &Lane, value: u64) -> Result<()> {
        let marks = self.marks.lock();
        // The first that is not earlier: what has passed is not listed any more.
        let Some((_, event)) = marks.pending.iter().find(|(number, _)| *number >= value) else {
            return Ok(());
        };
        // SAFETY: both exist; the event was recorded, and under the lock it is not recorded again.
        let code = unsafe { (entered.driver().cuStreamWaitEvent)(other.stream(), *event, 0) };
        other.call(entered, "making a stream wait", code)
    }

    /// Whether the stream is known to have passed a number, without asking it.
    pub(super) fn known_passed(&self, value: u64) -> bool {
        value <= self.passed.load(Ordering::Acquire)
    }

    /// Asks how far the stream is.
    pub(super) fn has_passed(&self, entered: &Entered<'_>, value: u64) -> Result<bool> {
        if self.known_passed(value) {
            return Ok(true);
        }
        let mut marks = self.marks.lock();
        while let Some((number, event)) = marks.pending.front().copied() {
            // SAFETY: the event exists.
            match unsafe { (entered.driver().cuEventQuery)(event) } {
                code::NOT_READY => break,
                code => entered.call("asking for an event", code)?,
            }
            marks.pending.pop_front();
            marks.spare.push(event);
            self.passed.fetch_max(number, Ordering::AcqRel);
        }
        Ok(self.known_passed(value))
    }

    /// Frees stream and events. Everything on the stream must be over, or nothing is freed.
    pub(super) fn close(&self, entered: &Entered<'_>) {
        if self.owned {
            // SAFETY: the stream exists.
            let code = unsafe { (entered.driver().cuStreamSynchronize)(self.stream()) };
            if entered.call("ending a stream", code).is_err() {
                return;
            }
        }
        let mut marks = self.marks.lock();
        let pending = std::mem::take(&mut marks.pending);
        let spare = std::mem::take(&mut marks.spare);
        for event in pending.into_iter().map(|(_, event)| event).chain(spare) {
            // SAFETY: made by `event` and named nowhere else. The driver keeps one that is pending
            // until it has passed.
            unsafe { (entered.driver().cuEventDestroy_v2)(event) };
        }
        if self.owned {
            // SAFETY: ours, and nothing is on it.
            unsafe { (entered.driver().cuStreamDestroy_v2)(self.stream()) };
        }
    }
}

impl Marks {
    fn record(
        &mut self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        value: u64,
        lane: &Lane,
    ) -> Result<()> {
        let event = match self.spare.pop() {
            Some(event) => event,
            None => new_event(entered)?,
        };
        // SAFETY: both exist; nobody waits for a spare event.
        let code = unsafe { (entered.driver().cuEventRecord)(event, stream) };
        if let Err(error) = lane.call(entered, "recording an event", code) {
            self.spare.push(event);
            return Err(error);
        }
        self.pending.push_back((value, event));
        self.last = value;
        Ok(())
    }
}

/// A stream to whom it is given.
pub(super) fn new_stream(entered: &Entered<'_>) -> Result<driver::Stream> {
    let mut stream = driver::Stream::NULL;
    // SAFETY: `stream` is a place for the answer.
    let code =
        unsafe { (entered.driver().cuStreamCreateWithPriority)(&raw mut stream, NON_BLOCKING, 0) };
    entered.call("creating a stream", code).map(|()| stream)
}

fn new_event(entered: &Entered<'_>) -> Result<Event> {
    let mut event = Event::NULL;
    // SAFETY: `event` is a place for the answer.
    let code = unsafe { (entered.driver().cuEventCreate)(&raw mut event, DISABLE_TIMING) };
    entered.call("creating an event", code)?;
    Ok(event)
}

/// Streams of users that a device can serve at a time: what is left of [`MAX_STREAMS`].
const USERS: usize = MAX_STREAMS - OWN;

/// Streams that a device has by itself.
pub(super) const OWN: usize = 4;

/// `CU_STREAM_LEGACY`, for which null stands too, and `CU_STREAM_PER_THREAD`.
const LEGACY: usize = 1;
pub(super) const PER_THREAD: usize = 2;

/// A stream under the one of its names that it is known by.
fn known_as(stream: driver::Stream) -> driver::Stream {
    if stream.0.addr() == LEGACY { driver::Stream::NULL } else { stream }
}

/// The stream to record an event on, to have it come behind the work of `stream`. That is another
/// one only for the per-thread default stream, which in another thread is another stream; the
/// legacy default stream comes behind those of all threads.
fn behind(stream: driver::Stream) -> driver::Stream {
    if stream.0.addr() == PER_THREAD { driver::Stream::NULL } else { known_as(stream) }
}

/// The lanes of a device: its own, and those of users' streams.
#[derive(Debug)]
pub(super) struct Lanes {
    context: Arc<Context>,
    /// As many as [`OWN`].
    own: Vec<Lane>,
    users: [OnceLock<Lane>; USERS],
    /// For each lane of a user's a token: more handles to it than this one are uses of the lane.
    /// Locked while a lane is looked for, added, or given to another stream.
    uses: Mutex<[Arc<()>; USERS]>,
}

impl Lanes {
    /// Those of a device, the last of which is the consumer's: a user's stream, if there is one.
    pub(super) fn new(
        context: &Arc<Context>,
        entered: &Entered<'_>,
        consumer: Option<driver::Stream>,
    ) -> Result<Self> {
        let (context, users, uses) = (Arc::clone(context), Default::default(), Mutex::default());
        // Where one can't be made, those before it go with it.
        let mut lanes = Self { context, own: Vec::with_capacity(OWN), users, uses };
        for number in 1..=OWN {
            let lane = match consumer.filter(|_| number == OWN) {
                Some(stream) => Lane::adopt(entered, stream),
                None => Lane::new(entered),
            };
            lanes.own.push(lane?);
        }
        Ok(lanes)
    }

    pub(super) fn get(&self, stream: StreamId) -> &Lane {
        let place = usize::from(stream);
        match self.own.get(place) {
            Some(lane) => lane,
            None => self.users[place - OWN].get().expect("a number that `of_user` gave"),
        }
    }

    /// The number of a user's stream, which is its own while the token is there. No token stands
    /// for a stream that the device was opened for.
    ///
    /// # Errors
    /// Too many streams are in use.
    pub(super) fn of_user(&self, stream: CudaStream) -> Result<(StreamId, Option<Arc<()>>)> {
        let (stream, ours) = (known_as(stream.raw()), stream.is_ours());
        if ours {
            // By a handle of another device, or of one that is gone, it may be destroyed.
            if known_as(self.get(CONSUMER).stream()) == stream {
                return Ok((CONSUMER, None));
            }
            let problem = "it is another device's own stream: bind to a stream of yours, or to the \
                           one that `as_cuda` tells of the tensor's device";
            return Err(Error::record("a binding to a CUDA stream", problem));
        }
        let known = |lane: &Lane| !lane.owned && known_as(lane.stream()) == stream;
        if let Some((number, _)) = (0u8..).zip(&self.own).find(|(_, lane)| known(lane)) {
            return Ok((number, None));
        }
        let uses = self.uses.lock();
        let place = match self.users.iter().position(|user| user.get().is_some_and(known)) {
            Some(place) => place,
            None => {
                let place = self.free_place(&uses)?;
                let lane = match self.users[place].get() {
                    Some(lane) => lane,
                    None => {
                        let new = Lane::adopt(&self.context.enter()?, stream)?;
                        self.users[place].get_or_init(|| new)
                    }
                };
                lane.stream.store(stream.0, Ordering::Release);
                place
            }
        };
        #[allow(clippy::cast_possible_truncation, reason = "below MAX_STREAMS")]
        Ok(((OWN + place) as StreamId, Some(Arc::clone(&uses[place]))))
    }

    /// A place for one more stream of a user's.
    fn free_place(&self, uses: &[Arc<()>; USERS]) -> Result<usize> {
        if let Some(new) = self.users.iter().position(|user| user.get().is_none()) {
            return Ok(new);
        }
        let entered = self.context.enter()?;
        for (place, user) in self.users.iter().enumerate() {
            let unused = |_: &&Lane| Arc::strong_count(&uses[place]) == 1;
            let Some(lane) = user.get().filter(unused) else { continue };
            let last = lane.marks.lock().last;
            if lane.has_passed(&entered, last)? {
                return Ok(place);
            }
        }
        let problem = format!(
            "tensors are bound to, or exported for, {USERS} other streams, as many as a device \
             serves at a time: drop those of one of them"
        );
        Err(Error::record("a binding to a CUDA stream", problem))
    }

    fn all(&self) -> impl Iterator<Item = &Lane> {
        self.own.iter().chain(self.users.iter().filter_map(OnceLock::get))
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        // What is left of a lost device is left alone.
        if let Ok(entered) = self.context.enter() {
            self.all().for_each(|lane| lane.close(&entered));
        }
    }
}
