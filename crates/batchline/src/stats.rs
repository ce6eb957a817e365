//! Where the time goes, and what holds the pipeline up.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::{LoadPath, sync};

/// What a loader has done since it was last started, and where the time went.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct AsyncDataLoaderStats {
    /// Whether it is started and has not ended.
    pub is_running: bool,
    /// How often it was started.
    pub generation: u64,
    /// How batches get to the device.
    pub path: LoadPath,
    /// Why they take this path, and not a faster one.
    pub path_reason: String,
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
    /// Bytes that crossed the link to the device, the upload of a resident data set included; 0
    /// where the slot itself is the batch.
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
    /// Processor time of the workers, to the millisecond; `None` where the system does not tell.
    pub processor_time: Option<Duration>,
    /// The stages in the order of the flow.
    pub stages: Stages,
}

/// The stages, in the order of the flow.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[non_exhaustive]
pub struct Stages {
    /// The workers, all together: reading samples into slots.
    pub workers: StageTimes,
    /// The submitter, whichever worker has the turn: recording and submitting transfers. Nothing
    /// where there are none, as on the host without a conversion.
    pub submitter: StageTimes,
    /// The consumer: from one call of `get_batch` to the next.
    pub consumer: StageTimes,
}

/// How the threads of a stage spent their time.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
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
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Bottleneck {
    /// Too little has been delivered to tell.
    Unknown,
    /// The source: workers read most of the time.
    Workers,
    /// The way to the device: the submitter is busy, or everybody waits for transfers.
    Transfer,
    /// Handing batches from thread to thread: no stage is busy, and nothing is transferred.
    Handover,
    /// The consumer: batches wait for it, as they should.
    Consumer,
}

impl StageTimes {
    /// The share of the time spent working, 0 to 1.
    pub fn utilisation(&self) -> f64 {
        let all = self.working + self.waiting_for_input + self.waiting_for_room;
        if all.is_zero() { 0.0 } else { self.working.as_secs_f64() / all.as_secs_f64() }
    }
}

impl AsyncDataLoaderStats {
    /// Bytes per second over the link, from the start up to now or the end.
    pub fn link_rate(&self) -> f64 {
        let seconds = self.elapsed.as_secs_f64();
        if seconds > 0.0 { self.bytes_transferred as f64 / seconds } else { 0.0 }
    }

    /// Which stage holds the others up: the one that is busiest, if it is busy for half of the time.
    pub fn bottleneck(&self) -> Bottleneck {
        let Stages { workers, submitter, consumer } = self.stages;
        if self.batches_delivered < 2 {
            return Bottleneck::Unknown;
        }
        // The last one counts where two are equal: a consumer that is busy is what one wants.
        let busiest = [
            (workers.utilisation(), Bottleneck::Workers),
            (submitter.utilisation(), Bottleneck::Transfer),
            (consumer.utilisation(), Bottleneck::Consumer),
        ]
        .into_iter()
        .max_by(|one, other| one.0.total_cmp(&other.0));
        match busiest {
            Some((share, stage)) if share >= 0.5 => stage,
            _ if self.bytes_transferred > 0 => Bottleneck::Transfer,
            _ => Bottleneck::Handover,
        }
    }

    /// The verdict in words, with what to try.
    pub fn verdict(&self) -> String {
        let Stages { workers, consumer, .. } = self.stages;
        let waited = 100.0 * (1.0 - consumer.utilisation());
        match self.bottleneck() {
            Bottleneck::Unknown => "too few batches to tell what the bottleneck is".to_owned(),
            Bottleneck::Consumer => format!(
                "the consumer is the bottleneck, as it should be: it waited {waited:.1} % of the \
                 time for data"
            ),
            Bottleneck::Workers => {
                let (what, remedy) = match self.path {
                    LoadPath::Staged => ("reading", "more workers or a cheaper read"),
                    _ => ("looking samples up", "more workers or larger batches"),
                };
                format!(
                    "{what} is the bottleneck: {} worker(s) were busy {:.1} % of the time, and the \
                     consumer waited {waited:.1} %; try {remedy}",
                    self.workers,
                    100.0 * workers.utilisation()
                )
            }
            Bottleneck::Transfer => format!(
                "the transfer is the bottleneck: the consumer waited {waited:.1} % of the time \
                 while workers waited for free slots; try larger batches, a smaller element type \
                 over the link, or a greater prefetch depth"
            ),
            Bottleneck::Handover => format!(
                "handing batches over takes most of the time: no stage was busy, and the consumer \
                 waited {waited:.1} %; try larger batches"
            ),
        }
    }
}

impl fmt::Display for Bottleneck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Bottleneck::Unknown => "unknown",
            Bottleneck::Workers => "workers",
            Bottleneck::Transfer => "transfer",
            Bottleneck::Handover => "handover",
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

    /// The times of a stage that is one at a time, over `elapsed`: the rest is waiting for input.
    /// Nothing, if it never did anything.
    pub(crate) fn times_of(&self, elapsed: Duration) -> StageTimes {
        let mut times = self.times();
        let busy = times.working + times.waiting_for_room;
        if !busy.is_zero() {
            times.waiting_for_input = elapsed.saturating_sub(busy);
        }
        times
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
        Self { clock, since: sync::now() }
    }

    /// The time since the last call was spent like this; returns how much it was.
    pub(crate) fn spent(&mut self, doing: Doing) -> Duration {
        let now = sync::now();
        let time = now - self.since;
        self.clock.add(doing, time);
        self.since = now;
        time
    }

    /// When the last call was.
    pub(crate) fn since(&self) -> Instant {
        self.since
    }

    /// The time since the last call counts elsewhere.
    pub(crate) fn skip(&mut self) {
        self.since = sync::now();
    }
}

/// Reads the processor time of the thread that it is made on, now and then and at its end.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    /// Nanoseconds of all threads.
    sum: &'a AtomicU64,
    counted: Duration,
    next: Instant,
}

/// How long a [`Meter`] is not read: a reading is a call of the system.
const READING: Duration = Duration::from_millis(1);

impl<'a> Meter<'a> {
    pub(crate) fn new(sum: &'a AtomicU64) -> Self {
        Self { sum, counted: Duration::ZERO, next: sync::now() }
    }

    /// Adds what was taken since the last reading, if that is some time ago.
    pub(crate) fn read_at(&mut self, now: Instant) {
        if now >= self.next {
            self.next = now + READING;
            self.read();
        }
    }

    fn read(&mut self) {
        let Some(taken) = sync::processor_time() else { return };
        let more = taken.saturating_sub(self.counted);
        self.counted = taken;
        self.sum.fetch_add(u64::try_from(more.as_nanos()).unwrap_or(0), Ordering::Relaxed);
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        self.read();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(working: u64, input: u64, room: u64) -> StageTimes {
        let [working, waiting_for_input, waiting_for_room] =
            [working, input, room].map(Duration::from_millis);
        StageTimes { working, waiting_for_input, waiting_for_room }
    }

    fn stats(
        workers: StageTimes,
        submitter: StageTimes,
        consumer: StageTimes,
    ) -> AsyncDataLoaderStats {
        let stages = Stages { workers, submitter, consumer };
        AsyncDataLoaderStats { stages, batches_delivered: 100, workers: 2, ..Default::default() }
    }

    #[test]
    fn the_busiest_stage_is_the_bottleneck() {
        let idle = times(5, 95, 0);
        let reading = stats(times(190, 0, 10), idle, times(3, 97, 0));
        assert_eq!(reading.bottleneck(), Bottleneck::Workers);
        assert!(
            reading.verdict().contains("2 worker(s) were busy 95.0 %"),
            "{}",
            reading.verdict()
        );
        let training = stats(times(20, 0, 180), idle, times(99, 1, 0));
        assert_eq!(training.bottleneck(), Bottleneck::Consumer);
        assert!(training.verdict().contains("it waited 1.0 %"), "{}", training.verdict());
        let submitting = stats(times(20, 0, 180), times(80, 0, 20), times(10, 90, 0));
        assert_eq!(submitting.bottleneck(), Bottleneck::Transfer);
        let mut waiting = stats(times(20, 0, 180), idle, times(10, 90, 0));
        assert_eq!(waiting.bottleneck(), Bottleneck::Handover);
        waiting.bytes_transferred = 1;
        assert_eq!(waiting.bottleneck(), Bottleneck::Transfer);
        waiting.batches_delivered = 1;
        assert_eq!(waiting.bottleneck(), Bottleneck::Unknown);
    }

    #[test]
    fn a_lap_attributes_each_moment_once() {
        let clock = StageClock::default();
        let started = Instant::now();
        let mut lap = Lap::start(&clock);
        std::thread::sleep(Duration::from_millis(2));
        lap.spent(Doing::Working);
        lap.spent(Doing::WaitingForRoom);
        let times = clock.times();
        assert!(times.working >= Duration::from_millis(2));
        assert_eq!(times.waiting_for_input, Duration::ZERO);
        assert!(times.working + times.waiting_for_room <= started.elapsed());
    }
}
