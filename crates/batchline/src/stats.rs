//! Where the time goes, and what holds the pipeline up.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a loader has done since it was last started, and where the time went.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct AsyncDataLoaderStats {
    /// Whether it is started and has not ended.
    pub is_running: bool,
    /// How often it was started.
    pub generation: u64,
    /// Threads that read samples.
    pub workers: usize,
    /// Batches that wait for the consumer.
    pub queued_batches: usize,
    /// The most batches that can be on the device at once.
    pub queue_capacity: usize,
    /// Batches submitted to the device.
    pub batches_produced: u64,
    /// Batches handed to the consumer.
    pub batches_delivered: u64,
    /// Samples handed to the consumer.
    pub samples_delivered: u64,
    /// Bytes handed to the consumer, as they lie on the device.
    pub bytes_delivered: u64,
    /// Bytes that were copied to the device; 0 where the slot itself is the batch.
    pub bytes_transferred: u64,
    /// Samples left out because they could not be read.
    pub skipped: u64,
    /// Reads that were repeated.
    pub retries: u64,
    /// Slots that workers fill, and the bytes of each.
    pub slots: usize,
    /// Bytes of one slot.
    pub slot_bytes: u64,
    /// Page-locked memory in use and kept, of the loader's memory manager.
    pub staging_bytes: u64,
    /// Device memory in use and kept, of the loader's memory manager.
    pub device_bytes: u64,
    /// Time since the start, up to the end.
    pub elapsed: Duration,
    /// From the start to the first batch that was ready for the consumer.
    pub time_to_first_batch: Option<Duration>,
    /// The stages in the order of the flow.
    pub stages: Stages,
}

/// The stages, in the order of the flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct Stages {
    /// The workers, all together: reading samples into slots.
    pub workers: StageTimes,
    /// The submitter: recording and submitting transfers.
    pub submitter: StageTimes,
    /// The consumer: from one call of `get_batch` to the next.
    pub consumer: StageTimes,
}

/// How the threads of a stage spent their time.
#[derive(Debug, Clone, Copy, Default, PartialEq, serde::Serialize)]
#[non_exhaustive]
pub struct StageTimes {
    /// Doing its work.
    pub working: Duration,
    /// Waiting for the stage before it.
    pub waiting_for_input: Duration,
    /// Waiting for a free slot or output, that is, for the stage behind it.
    pub waiting_for_room: Duration,
}

/// The stage that holds all others up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Bottleneck {
    /// Too little has been delivered to tell.
    Unknown,
    /// The source: workers read all the time, and the consumer waits.
    Workers,
    /// The submitter or the device: workers wait for slots, and the consumer waits.
    Transfer,
    /// The consumer: batches wait for it, as they should.
    Consumer,
}

impl AsyncDataLoaderStats {
    /// Which stage holds the others up.
    pub fn bottleneck(&self) -> Bottleneck {
        let consumer = self.stages.consumer;
        let total = (consumer.working + consumer.waiting_for_input).as_secs_f64();
        if self.batches_delivered < 2 || total == 0.0 {
            return Bottleneck::Unknown;
        }
        // Less than a twentieth of waiting is noise.
        if consumer.waiting_for_input.as_secs_f64() < 0.05 * total {
            return Bottleneck::Consumer;
        }
        let workers = self.stages.workers;
        if workers.waiting_for_room > workers.working {
            Bottleneck::Transfer
        } else {
            Bottleneck::Workers
        }
    }

    /// The verdict in words, with what to try.
    pub fn verdict(&self) -> String {
        let share = |part: Duration, of: Duration| match of.as_secs_f64() {
            0.0 => 0.0,
            of => 100.0 * part.as_secs_f64() / of,
        };
        let consumer = self.stages.consumer;
        let waited =
            share(consumer.waiting_for_input, consumer.working + consumer.waiting_for_input);
        match self.bottleneck() {
            Bottleneck::Unknown => "too few batches to tell what the bottleneck is".to_owned(),
            Bottleneck::Consumer => format!(
                "the consumer is the bottleneck, as it should be: it waited {waited:.1} % of the \
                 time for data"
            ),
            Bottleneck::Workers => {
                let workers = self.stages.workers;
                let all = workers.working + workers.waiting_for_input + workers.waiting_for_room;
                format!(
                    "reading is the bottleneck: the consumer waited {waited:.1} % of the time, and \
                     {} worker(s) were busy {:.1} % of theirs; try more workers or a cheaper read",
                    self.workers,
                    share(workers.working, all)
                )
            }
            Bottleneck::Transfer => format!(
                "the transfer is the bottleneck: the consumer waited {waited:.1} % of the time \
                 while workers waited for free slots; try larger batches, a smaller element type \
                 over the link, or a greater prefetch depth"
            ),
        }
    }
}

impl fmt::Display for Bottleneck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Bottleneck::Unknown => "unknown",
            Bottleneck::Workers => "workers",
            Bottleneck::Transfer => "transfer",
            Bottleneck::Consumer => "consumer",
        })
    }
}

/// The counters behind a [`StageTimes`].
#[derive(Debug, Default)]
pub(crate) struct StageClock {
    working: AtomicU64,
    input: AtomicU64,
    room: AtomicU64,
}

/// What a thread of a stage did.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Doing {
    Working,
    WaitingForInput,
    WaitingForRoom,
}

impl StageClock {
    pub(crate) fn add(&self, doing: Doing, time: Duration) {
        let counter = match doing {
            Doing::Working => &self.working,
            Doing::WaitingForInput => &self.input,
            Doing::WaitingForRoom => &self.room,
        };
        // 584 years of nanoseconds fit.
        counter.fetch_add(u64::try_from(time.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(crate) fn times(&self) -> StageTimes {
        let read = |counter: &AtomicU64| Duration::from_nanos(counter.load(Ordering::Relaxed));
        StageTimes {
            working: read(&self.working),
            waiting_for_input: read(&self.input),
            waiting_for_room: read(&self.room),
        }
    }
}

/// Attributes the time of one thread: each moment to one doing.
#[derive(Debug)]
pub(crate) struct Lap<'a> {
    clock: &'a StageClock,
    since: Instant,
}

impl<'a> Lap<'a> {
    pub(crate) fn start(clock: &'a StageClock) -> Self {
        Self { clock, since: Instant::now() }
    }

    /// The time since the last call was spent like this; returns how much it was.
    pub(crate) fn spent(&mut self, doing: Doing) -> Duration {
        let now = Instant::now();
        let time = now - self.since;
        self.clock.add(doing, time);
        self.since = now;
        time
    }
}
