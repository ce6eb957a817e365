//! What is said at the end of a run: for people, and for programs.

use std::fmt;
use std::time::Duration;

use batchline::{Bottleneck, DType, DeviceKind, LoadPath, Skipped, StageTimes};
use serde::Serialize;

use crate::options::RunOptions;
use crate::quantities::{byte_rate, bytes, count, counted, per_second, percent, sample_rate, time};
use crate::run::Outcome;

/// Skipped samples that people are shown; programs get all.
const SHOWN: usize = 5;

/// The summary of a run. Its fields are the keys of the JSON object; [`fmt::Display`] is the text.
#[derive(Debug, Serialize)]
pub(crate) struct Summary {
    dataset: String,
    dataset_samples: u64,
    /// What a sample is made of.
    sample: Vec<Part>,
    device: String,
    device_kind: DeviceKind,
    hardware: bool,
    /// How batches get to the device.
    path: LoadPath,
    path_reason: String,
    batch_size: u64,
    workers: usize,
    prefetch_depth: usize,
    epochs: u64,
    /// Whether all epochs were delivered, rather than stopped before.
    complete: bool,
    batches: u64,
    samples: u64,
    /// Bytes of the batches, as they lie on the device.
    bytes: u64,
    /// Bytes that crossed the link to the device.
    bytes_transferred: u64,
    link_bytes_per_second: f64,
    seconds: f64,
    /// Processor time of the workers.
    cpu_seconds: Option<f64>,
    samples_per_second: f64,
    bytes_per_second: f64,
    time_to_first_batch_ms: Option<f64>,
    /// Samples left out; those from before a resume count.
    skipped: usize,
    skipped_samples: Vec<Skipped>,
    stages: Stages,
    bottleneck: Bottleneck,
    verdict: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    checksum: Option<String>,
}

/// A tensor of a sample.
#[derive(Debug, Serialize)]
struct Part {
    name: String,
    dtype: DType,
    shape: Vec<u64>,
}

/// Where the time went, by stage, in the order of the flow.
#[derive(Debug, Serialize)]
struct Stages {
    workers: Stage,
    submitter: Stage,
    consumer: Stage,
}

/// How all threads of a stage together spent their time.
#[derive(Debug, Serialize)]
struct Stage {
    working_seconds: f64,
    waiting_for_input_seconds: f64,
    waiting_for_room_seconds: f64,
    #[serde(skip)]
    times: StageTimes,
}

impl Summary {
    /// The summary of a run with these options.
    pub(crate) fn new(options: &RunOptions, outcome: &Outcome) -> Self {
        let Outcome { stats, state, .. } = outcome;
        let info = outcome.device.info();
        let seconds = outcome.took.as_secs_f64();
        let parts = outcome.spec.tensors().iter().map(|tensor| Part {
            name: tensor.name.clone(),
            dtype: tensor.dtype,
            shape: tensor.shape.dims().to_vec(),
        });
        Self {
            dataset: options.dataset.clone(),
            dataset_samples: outcome.len,
            sample: parts.collect(),
            device: info.name.clone(),
            device_kind: info.kind,
            hardware: info.hardware,
            path: stats.path,
            path_reason: stats.path_reason.clone(),
            batch_size: options.batch_size,
            workers: stats.workers,
            prefetch_depth: options.prefetch_depth,
            epochs: options.epochs,
            complete: outcome.complete,
            batches: stats.batches_delivered,
            samples: stats.samples_delivered,
            bytes: stats.bytes_delivered,
            bytes_transferred: stats.bytes_transferred,
            link_bytes_per_second: per_second(stats.bytes_transferred, seconds),
            seconds,
            cpu_seconds: stats.processor_time.map(|time| time.as_secs_f64()),
            samples_per_second: per_second(stats.samples_delivered, seconds),
            bytes_per_second: per_second(stats.bytes_delivered, seconds),
            time_to_first_batch_ms: stats.time_to_first_batch.map(|time| 1e3 * time.as_secs_f64()),
            skipped: state.skipped.len(),
            skipped_samples: state.skipped.clone(),
            stages: Stages {
                workers: Stage::of(stats.stages.workers),
                submitter: Stage::of(stats.stages.submitter),
                consumer: Stage::of(stats.stages.consumer),
            },
            bottleneck: stats.bottleneck(),
            verdict: stats.verdict(),
            checksum: outcome.checksum.clone(),
        }
    }
}

impl Stage {
    fn of(times: StageTimes) -> Self {
        Self {
            working_seconds: times.working.as_secs_f64(),
            waiting_for_input_seconds: times.waiting_for_input.as_secs_f64(),
            waiting_for_room_seconds: times.waiting_for_room.as_secs_f64(),
            times,
        }
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sample: Vec<String> = self.sample.iter().map(Part::to_string).collect();
        let samples = counted(self.dataset_samples, "sample", "samples");
        writeln!(f, "data set     {}: {samples} of {}", self.dataset, sample.join(", "))?;
        writeln!(f, "device       {}", self.device)?;
        writeln!(f, "path         {}: {}", self.path, self.path_reason)?;
        write!(
            f,
            "delivered    {} of up to {}, {}, {}",
            counted(self.batches, "batch", "batches"),
            count(self.batch_size),
            counted(self.samples, "sample", "samples"),
            bytes(self.bytes)
        )?;
        writeln!(f, "{}", if self.complete { "" } else { " (stopped before the end)" })?;
        write!(f, "time         {}", time(Duration::from_secs_f64(self.seconds)))?;
        match self.time_to_first_batch_ms {
            Some(ms) => {
                writeln!(f, ", first batch after {}", time(Duration::from_secs_f64(ms / 1e3)))?;
            }
            None => writeln!(f)?,
        }
        let (samples, bytes) = (self.samples_per_second, self.bytes_per_second);
        writeln!(f, "throughput   {}, {}", sample_rate(samples), byte_rate(bytes))?;
        // On the host the slot that the workers fill is the batch itself.
        if self.bytes_transferred > 0 {
            let (all, rate) = (self.bytes_transferred, self.link_bytes_per_second);
            writeln!(f, "link         {}, {}", crate::quantities::bytes(all), byte_rate(rate))?;
        }
        if let Some(seconds) = self.cpu_seconds {
            let cores = seconds / self.seconds.max(f64::MIN_POSITIVE);
            let taken = time(Duration::from_secs_f64(seconds));
            writeln!(f, "processor    {taken} of the workers, {cores:.2} cores")?;
        }
        let workers = counted(self.workers as u64, "worker", "workers");
        let header = ["working", "waiting for input", "waiting for room"];
        writeln!(f, "stages       {:14}{:>9}{:>20}{:>19}", "", header[0], header[1], header[2])?;
        self.stages.workers.line(f, &workers)?;
        self.stages.submitter.line(f, "submitter")?;
        self.stages.consumer.line(f, "consumer")?;
        writeln!(f, "verdict      {}", self.verdict)?;
        self.skips(f)?;
        match &self.checksum {
            Some(checksum) => writeln!(f, "checksum     {checksum}"),
            None => Ok(()),
        }
    }
}

impl Stage {
    fn line(&self, f: &mut fmt::Formatter<'_>, name: &str) -> fmt::Result {
        let StageTimes { working, waiting_for_input, waiting_for_room, .. } = self.times;
        let all = working + waiting_for_input + waiting_for_room;
        if all.is_zero() {
            // There is no such stage.
            return Ok(());
        }
        let [working, input, room] = [working, waiting_for_input, waiting_for_room]
            .map(|part| format!("{:.1} %", percent(part, all)));
        writeln!(f, "  {name:25}{working:>9}{input:>20}{room:>19}")
    }
}

impl Summary {
    fn skips(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.skipped == 0 {
            return Ok(());
        }
        writeln!(f, "skipped      {}", counted(self.skipped as u64, "sample", "samples"))?;
        for skip in self.skipped_samples.iter().take(SHOWN) {
            let sample =
                skip.sample.map_or("a batch".to_owned(), |index| format!("sample {index}"));
            writeln!(
                f,
                "  {sample} (batch {} of epoch {}): {}",
                skip.batch, skip.epoch, skip.reason
            )?;
        }
        match self.skipped.saturating_sub(SHOWN) {
            0 => Ok(()),
            more => writeln!(f, "  and {} more, all of which --json lists", count(more as u64)),
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}", self.name, self.dtype, self.shape)
    }
}
