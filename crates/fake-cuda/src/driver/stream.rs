//! Streams: queues of work, and what is between them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::memory::{Block, Kind as Memory};
use super::random::Random;
use super::work::Work;
use super::{CHANGED, Driver, State, executor};
use crate::codes::Result;

/// The handles that name no stream of one's own.
const LEGACY: usize = 1;
const PER_THREAD: usize = 2;

/// The end of the `number`th thing queued on a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fence {
    pub(crate) stream: usize,
    pub(crate) number: u64,
}

/// How a stream behaves towards the legacy default stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It is the legacy default stream.
    Legacy,
    /// Ordered with it.
    Blocking,
    /// Independent of it.
    NonBlocking,
}

#[derive(Debug)]
pub(crate) struct Stream {
    pub(crate) context: usize,
    /// In its context, in the order of creation. The legacy default stream is 0.
    pub(crate) number: usize,
    pub(crate) kind: Kind,
    pub(crate) queue: VecDeque<Arc<Operation>>,
    pub(crate) enqueued: u64,
    pub(crate) completed: u64,
    /// The first of the queue is being done.
    pub(crate) running: bool,
    pub(crate) held: bool,
    /// It goes when its queue is empty.
    pub(crate) destroyed: bool,
    /// When the last operation was over, had the executor no delays of its own.
    pub(crate) clock: Instant,
    random: Random,
}

/// Work in a queue.
#[derive(Debug)]
pub(crate) struct Operation {
    pub(crate) work: Work,
    /// What must have passed before it starts.
    pub(crate) after: Vec<Fence>,
    queued: Instant,
    latency: Duration,
}

impl Stream {
    pub(crate) fn new(
        context: usize,
        number: usize,
        kind: Kind,
        held: bool,
        random: Random,
    ) -> Self {
        Self {
            context,
            number,
            kind,
            queue: VecDeque::new(),
            enqueued: 0,
            completed: 0,
            running: false,
            held,
            destroyed: false,
            clock: Instant::now(),
            random,
        }
    }

    pub(crate) fn end(&self, handle: usize) -> Fence {
        Fence { stream: handle, number: self.enqueued }
    }

    /// Drops what has not begun.
    pub(crate) fn abandon(&mut self) {
        self.queue.truncate(usize::from(self.running));
    }
}

impl State {
    /// Whether the device is past a point. Of a stream that is gone or lost nothing is to come.
    pub(crate) fn has_passed(&self, fence: Fence) -> bool {
        let Some(stream) = self.streams.get(&fence.stream) else { return true };
        let lost = self.contexts.get(&stream.context).is_none_or(|context| context.lost.is_some());
        lost || stream.completed >= fence.number
    }

    /// When the first of a stream's queue will be done, if it may start.
    pub(crate) fn due(&self, stream: &Stream) -> Option<Instant> {
        let first = stream.queue.front()?;
        let lost = self.contexts.get(&stream.context).is_none_or(|context| context.lost.is_some());
        if stream.held
            || stream.running
            || lost
            || !first.after.iter().all(|fence| self.has_passed(*fence))
        {
            return None;
        }
        let others = first.after.iter().filter_map(|fence| self.streams.get(&fence.stream));
        let start = others.map(|other| other.clock).fold(first.queued.max(stream.clock), Ord::max);
        Some(start + first.latency)
    }

    /// Queues work that may be done once the fences have passed.
    pub(crate) fn enqueue(&mut self, handle: usize, work: Work, after: &[Fence]) -> Result<Fence> {
        let settings = (self.settings.latency_us, self.settings.random_latency_us);
        let mut after = after.to_vec();
        let Some(stream) = self.streams.get(&handle) else { return self.dead("stream", handle) };
        let (context, kind) = (stream.context, stream.kind);
        for (other, stream) in &self.streams {
            let ordered = matches!(
                (kind, stream.kind),
                (Kind::Legacy, Kind::Blocking) | (Kind::Blocking, Kind::Legacy)
            );
            if ordered && stream.context == context {
                after.push(stream.end(*other));
            }
        }
        after.retain(|fence| !self.has_passed(*fence));
        let abroad = work
            .blocks()
            .iter()
            .any(|block| block.kind == Memory::Device && block.context != context);
        if abroad {
            let what = work.describe();
            self.violation(format!("{what}: on a stream of another device than the memory's"));
        }
        let Some(stream) = self.streams.get_mut(&handle) else {
            return self.dead("stream", handle);
        };
        let mut micros = settings.0;
        if settings.1 > 0 {
            micros += stream.random.below(settings.1 + 1);
        }
        let latency =
            if work.is_effective() { Duration::from_micros(micros) } else { Duration::ZERO };
        let operation = Operation { work, after, queued: Instant::now(), latency };
        stream.queue.push_back(Arc::new(operation));
        stream.enqueued += 1;
        let fence = stream.end(handle);
        executor::start(self);
        CHANGED.notify_all();
        Ok(fence)
    }

    /// The first queued operation that names a block.
    pub(crate) fn user(&self, block: &Arc<Block>) -> Option<String> {
        let named = |operation: &&Arc<Operation>| {
            operation.work.blocks().iter().any(|other| Arc::ptr_eq(other, block))
        };
        let mut queues = self.streams.values().flat_map(|stream| &stream.queue);
        queues.find(named).map(|operation| operation.work.describe())
    }

    /// Whether a block is being worked on right now.
    pub(crate) fn is_running_on(&self, block: &Arc<Block>) -> bool {
        self.streams.values().filter(|stream| stream.running).any(|stream| {
            stream.queue.front().is_some_and(|operation| {
                operation.work.blocks().iter().any(|other| Arc::ptr_eq(other, block))
            })
        })
    }
}

impl Driver {
    /// The stream that a caller means.
    pub(crate) fn stream(&mut self, handle: usize) -> Result<usize> {
        let context = self.context;
        let named = match handle {
            0 | LEGACY => self.contexts.get(&context).map(|context| context.legacy),
            PER_THREAD => Some(self.thread_stream()),
            _ => self
                .streams
                .get(&handle)
                .filter(|stream| !stream.destroyed && stream.kind != Kind::Legacy)
                .map(|_| handle),
        };
        let Some(named) = named else { return self.dead("stream", handle) };
        let own = self.streams.get(&named).map_or(context, |stream| stream.context);
        self.check_context(own)?;
        Ok(named)
    }

    /// The per-thread default stream.
    fn thread_stream(&mut self) -> usize {
        let key = (self.context, executor::thread_number());
        if let Some(stream) = self.thread_streams.get(&key) {
            return *stream;
        }
        let stream = self.new_stream(key.0, Kind::Blocking);
        self.thread_streams.insert(key, stream);
        stream
    }
}
