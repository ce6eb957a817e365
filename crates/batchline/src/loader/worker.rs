//! A worker: takes the next task from the ring, reads samples, and writes them into their rows.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::Duration;

use super::config::ErrorPolicy;
use super::feed::Feed;
use super::pipeline::{Opener, Pipeline};
use super::slot::Claim;
use super::ticket::{Outcome, Place, SkippedRow, Task};
use crate::plan::{BatchRows, Cut, LastBatch, Sampler};
use crate::source::{DataSource, Dataset, Rows, Sample, SampleKey, SampleMut};
use crate::stats::{Doing, Lap, Meter};
use crate::sync::Mutex;
use crate::{BoxError, Error, Result, Skipped};
use std::sync::atomic::Ordering;

/// How long a claim should keep a worker busy: long enough for the lock around it not to matter,
/// short enough for all workers to finish a batch together.
const CLAIM_TIME: Duration = Duration::from_micros(20);

/// The same where only numbers are written: several batches are under way at a time, and there is
/// less to do for each.
const NUMBERS_TIME: Duration = Duration::from_micros(100);

impl Pipeline {
    /// The worker's thread.
    pub(super) fn run_worker(&self) {
        let mut lap = Lap::start(&self.counters.workers);
        // Rows that are claimed at once. One at first, until it is known how long one takes.
        let mut most = 1;
        let batch = self.config.batch_size;
        // What a row took lately: a mean that each claim moves by a quarter, so that neither a slow
        // sample nor a turn on the processor that was lost has the worker claim single rows for long.
        let mut usual = Duration::ZERO;
        // Rows that take so little wait for nothing: more workers than there are cores would only
        // take turns on these.
        let cores = std::thread::available_parallelism().map_or(usize::MAX, usize::from);
        let beyond_cores = self.config.workers.saturating_sub(cores);
        let claim_time = if self.route.is_staged() { CLAIM_TIME } else { NUMBERS_TIME };
        // The samples of a claim; kept, so that nothing is allocated per claim.
        let mut indices = Vec::with_capacity(usize::try_from(batch.min(1 << 16)).unwrap_or(0));
        let mut meter = Meter::new(&self.counters.processor);
        loop {
            let spare = if usual.is_zero() || usual >= CLAIM_TIME { 0 } else { beyond_cores };
            let task = self.ring.next_task(most, spare);
            lap.spent(Doing::WaitingForRoom);
            meter.read_at(lap.since());
            match (task, &*self.feed) {
                (Task::End, _) => return,
                (Task::Open, feed) => {
                    let full = match feed {
                        Feed::Dataset { cut, .. } => self.open_planned(cut),
                        Feed::Source { source, .. } => {
                            self.open_pulled(source, &mut lap);
                            true
                        }
                    };
                    if full {
                        self.submit_full(&mut lap);
                    }
                }
                (Task::Fill(place, mut claim), Feed::Dataset { dataset, sampler, .. }) => {
                    crate::trace::span!("fill", epoch = place.epoch, batch = place.batch);
                    let found = contain("the sampler", || {
                        look_up(&**sampler, place, &claim, &mut indices);
                        Ok(())
                    });
                    let outcome = match found {
                        Ok(()) => self.fill(&**dataset, &indices, place, claim.rows()),
                        Err(error) => {
                            let error = failed("sampler", place, None, error);
                            Outcome { failure: Some((claim.first, error)), skipped: Vec::new() }
                        }
                    };
                    let rows = claim.end - claim.first;
                    // Without the wait for the lock: where that is long, smaller claims only add to it.
                    let each = lap.spent(Doing::Working) / u32::try_from(rows).unwrap_or(u32::MAX);
                    let full = self.ring.hand_back(claim, outcome);
                    usual = if usual.is_zero() { each } else { (3 * usual + each) / 4 };
                    let fitting = claim_time.as_nanos() / usual.as_nanos().max(1);
                    most = u64::try_from(fitting).unwrap_or(u64::MAX).clamp(1, batch);
                    if full {
                        self.submit_full(&mut lap);
                    }
                }
                (Task::Fill(..), Feed::Source { .. }) => {
                    unreachable!("pulled tickets are opened claimed")
                }
            }
        }
    }

    /// Opens the ticket of the next batch of the plan; true if that leaves nothing to fill.
    fn open_planned(&self, cut: &Cut) -> bool {
        let mut opener = self.opener.lock();
        if opener.batch >= cut.batches() {
            (opener.epoch, opener.batch) = (opener.epoch + 1, 0);
        }
        if self.config.epochs.is_some_and(|epochs| opener.epoch >= epochs) {
            self.ring.end(None, Vec::new());
            return true;
        }
        let place = Place {
            epoch: opener.epoch,
            batch: opener.batch,
            rows: cut.rows(opener.batch),
            last: opener.batch + 1 == cut.batches(),
        };
        match self.buffers().slot() {
            Ok(slot) => {
                opener.batch += 1;
                drop(opener);
                self.ring.open(place, slot, &self.buffers().layout, false, Vec::new());
                place.rows.rows == 0
            }
            Err(error) => {
                self.ring.end(Some(error), Vec::new());
                true
            }
        }
    }

    /// Fills rows with the samples that the plan has for them.
    fn fill(
        &self,
        dataset: &dyn Dataset,
        indices: &[u64],
        place: Place,
        mut rows: Rows<'_>,
    ) -> Outcome {
        let by_number = !self.route.is_staged();
        let len = dataset.len().min(self.route.rows);
        let done = contain("the data set", || {
            Ok(match by_number {
                true => write_numbers(indices, len, &mut rows),
                false => self.copy_rows(dataset, indices, &mut rows),
            })
        });
        if done.unwrap_or(false) {
            return Outcome::default();
        }
        let mut outcome = Outcome::default();
        let spec = &*self.buffers().spec;
        for (row, &index) in (rows.first()..rows.end()).zip(indices) {
            // Nobody will look at the rest.
            if self.ring.is_stopped() {
                break;
            }
            let key = SampleKey { seed: self.config.seed, epoch: place.epoch, index };
            let read = self.with_retries(|| {
                if index >= len {
                    let problem = format!("the sampler named sample {index} of {len}");
                    return Err(Error::Source { problem }.into());
                }
                if by_number {
                    rows.row(row).all(0).copy_from_slice(&index.to_ne_bytes());
                    return Ok(());
                }
                let mut sample = SampleMut::new(spec, rows.row(row), key);
                dataset.read(index, &mut sample)?;
                match sample.untouched() {
                    None => Ok(()),
                    Some(name) => {
                        let problem = format!("the data set did not write tensor {name:?}");
                        Err(Error::Source { problem }.into())
                    }
                }
            });
            let Err(source) = read else { continue };
            let error = failed("worker", place, Some(index), source);
            if !matches!(self.config.error_policy, ErrorPolicy::Skip { .. }) {
                outcome.failure = Some((row, error));
                break;
            }
            outcome.skipped.push(SkippedRow {
                row: Some(row),
                skipped: skipped(place.epoch, place.batch, Some(index), &error),
                error,
            });
        }
        outcome
    }

    /// Copies the samples of a data set that lies in memory; false where it does not, or where it
    /// has no such samples, about which the slow way has more to say.
    fn copy_rows(&self, dataset: &dyn Dataset, indices: &[u64], rows: &mut Rows<'_>) -> bool {
        /// Mapped memory may be slow, and a stop must not wait for much of it.
        const AT_ONCE: usize = 1 << 20;
        let len = dataset.len();
        if indices.iter().any(|index| *index >= len) {
            return false;
        }
        for tensor in 0..rows.tensors() {
            let row = rows.row_bytes(tensor);
            let Some(samples) = dataset.contiguous(tensor) else { return false };
            if samples.len() as u64 != len.saturating_mul(row as u64) {
                return false;
            }
            let most = (AT_ONCE / row.max(1)).max(1);
            let mut target = rows.all(tensor);
            let mut rest = indices;
            while let Some(first) = rest.first()
                && !self.ring.is_stopped()
            {
                // What lies together goes together.
                let together = rest.iter().zip(*first..).take(most);
                let run = together.take_while(|(index, next)| *index == next).count();
                let (here, later) = target.split_at_mut(run * row);
                #[allow(clippy::cast_possible_truncation, reason = "within a slice that exists")]
                here.copy_from_slice(&samples[*first as usize * row..][..run * row]);
                (target, rest) = (later, &rest[run..]);
            }
        }
        true
    }

    /// Asks a pull source for the next batch, opens its ticket, and copies it into the slot. The
    /// turn to open, which this worker has, keeps calls of the source from overlapping.
    fn open_pulled(&self, source: &Mutex<Box<dyn DataSource>>, lap: &mut Lap<'_>) {
        let mut opener = self.opener.lock();
        let mut skipped = Vec::new();
        let pulled = self.pull(&mut **source.lock(), &mut opener, &mut skipped);
        lap.spent(Doing::Working);
        let (place, batch) = match pulled {
            Ok(Some(pulled)) => pulled,
            Ok(None) => return self.ring.end(None, skipped),
            Err(error) => return self.ring.end(Some(error), skipped),
        };
        let slot = match self.buffers().slot() {
            Ok(slot) => slot,
            Err(error) => return self.ring.end(Some(error), skipped),
        };
        lap.spent(Doing::WaitingForRoom);
        drop(opener);
        let layout = &self.buffers().layout;
        let Some(mut claim) = self.ring.open(place, slot, layout, true, skipped) else { return };
        crate::trace::span!("fill", epoch = place.epoch, batch = place.batch);
        let mut rows = claim.rows();
        // Bytes that the user owns: they may change their number.
        let copied = contain("the source", || {
            for (number, tensor) in batch.tensors().enumerate() {
                rows.all(number).copy_from_slice(tensor.bytes());
            }
            Ok(())
        });
        let failure = copied.err().map(|error| (0, failed("source", place, None, error)));
        self.ring.hand_back(claim, Outcome { failure, skipped: Vec::new() });
        lap.spent(Doing::Working);
    }

    /// The next batch of a pull source, and where it belongs; `None` after the last epoch.
    fn pull(
        &self,
        source: &mut dyn DataSource,
        opener: &mut Opener,
        skips: &mut Vec<SkippedRow>,
    ) -> Result<Option<(Place, Sample)>> {
        let size = usize::try_from(self.config.batch_size)
            .map_err(|_| Error::Overflow { what: "batch_size".to_owned() })?;
        loop {
            if self.config.epochs.is_some_and(|epochs| opener.epoch >= epochs) {
                return Ok(None);
            }
            let failed = |opener: &Opener, error: BoxError| Error::Stage {
                stage: "source",
                epoch: opener.epoch,
                batch: opener.batch,
                sample: None,
                source: error.into(),
            };
            if !opener.begun {
                contain("the source", || source.reset()).map_err(|error| failed(opener, error))?;
                opener.begun = true;
                self.pass_over(source, size, opener).map_err(|error| failed(opener, error))?;
            }
            let batch = match self.with_retries(|| source.get_batch(size)) {
                Ok(batch) => batch,
                Err(error) => {
                    let error = failed(opener, error);
                    let ErrorPolicy::Skip { at_most } = self.config.error_policy else {
                        return Err(error);
                    };
                    let skipped = skipped(opener.epoch, opener.batch, None, &error);
                    skips.push(SkippedRow { row: None, skipped, error: error.clone() });
                    // Without a ticket to go with, nobody else would count them.
                    let so_far = self.counters.skipped.load(Ordering::Relaxed);
                    let skipped = so_far + skips.len() as u64;
                    if skipped > at_most || self.ring.is_stopped() {
                        let source = Arc::new(error);
                        return Err(Error::TooManySkipped { skipped, at_most, source });
                    }
                    continue;
                }
            };
            let Some(batch) = batch else {
                if opener.batch == 0 {
                    let problem = "the source has no samples".to_owned();
                    return Err(failed(opener, Error::Source { problem }.into()));
                }
                *opener = Opener { epoch: opener.epoch + 1, ..Opener::default() };
                continue;
            };
            let rows =
                self.check_pulled(&batch, opener).map_err(|error| failed(opener, error.into()))?;
            if rows < self.config.batch_size {
                opener.short = true;
                if self.config.last_batch == LastBatch::Drop {
                    if opener.batch == 0 {
                        let problem = format!(
                            "the source has {rows} samples, fewer than the {size} of a batch, and \
                             drop_last leaves them out"
                        );
                        return Err(failed(opener, Error::Source { problem }.into()));
                    }
                    continue;
                }
            }
            let place = Place {
                epoch: opener.epoch,
                batch: opener.batch,
                rows: BatchRows { first: 0, rows, padding: 0 },
                last: false,
            };
            opener.batch += 1;
            return Ok(Some((place, batch)));
        }
    }

    /// A resume in the middle of an epoch: what was delivered is read again and passed over.
    fn pass_over(
        &self,
        source: &mut dyn DataSource,
        size: usize,
        opener: &Opener,
    ) -> Result<(), BoxError> {
        let mut passed = 0;
        let mut bad = 0;
        while passed < opener.batch {
            match (self.with_retries(|| source.get_batch(size)), self.config.error_policy) {
                (Ok(Some(_)), _) => passed += 1,
                (Ok(None), _) => {
                    let batch = opener.batch;
                    let problem = format!("it is at batch {batch}, the source has only {passed}");
                    return Err(Error::State { problem }.into());
                }
                // It was skipped, and counted, before the state was taken.
                (Err(_), ErrorPolicy::Skip { at_most }) if bad < at_most => bad += 1,
                (Err(error), _) => return Err(error),
            }
            if self.ring.is_stopped() {
                break;
            }
        }
        Ok(())
    }

    /// Checks what a pull source gave, allocating for the first batch; returns its rows.
    fn check_pulled(&self, batch: &Sample, opener: &Opener) -> Result<u64> {
        let (spec, rows) = batch.row_spec()?;
        let size = self.config.batch_size;
        let refuse = |problem: String| Err(Error::Source { problem });
        if rows == 0 || rows > size {
            return refuse(format!(
                "the source gave a batch of {rows} samples; it must have 1 to {size} (the end is \
                 `None`)"
            ));
        }
        if opener.short {
            return refuse("the source gave more after a short batch, which ends it".to_owned());
        }
        let buffers = match self.buffers.get() {
            Some(buffers) => buffers,
            None => self.allocate(&spec)?,
        };
        match buffers.spec.difference(&spec) {
            None => Ok(rows),
            Some(difference) => refuse(format!("the source changed its samples: {difference}")),
        }
    }

    /// Whether a call that failed may be made again for the same data.
    fn can_retry(&self) -> bool {
        match &*self.feed {
            Feed::Dataset { .. } => true,
            Feed::Source { can_retry, .. } => *can_retry,
        }
    }

    /// Calls user code, again where the policy says so. A panic is an error.
    fn with_retries<R>(
        &self,
        mut call: impl FnMut() -> Result<R, BoxError>,
    ) -> Result<R, BoxError> {
        let (times, mut backoff) = match self.config.error_policy {
            ErrorPolicy::Retry { times, backoff } if self.can_retry() => (times, backoff),
            _ => (0, Duration::ZERO),
        };
        let mut result = contain("the source", &mut call);
        for _ in 0..times {
            if result.is_ok() || self.ring.sleep(backoff) {
                break;
            }
            self.counters.retries.fetch_add(1, Ordering::Relaxed);
            backoff = backoff.saturating_mul(2);
            result = contain("the source", &mut call);
        }
        result
    }
}

/// Writes the samples' numbers for a device that fetches them by itself; false where there are no
/// such samples, which it must never be told.
fn write_numbers(indices: &[u64], len: u64, rows: &mut Rows<'_>) -> bool {
    if indices.iter().any(|index| *index >= len) {
        return false;
    }
    rows.all(0).copy_from_slice(bytemuck::cast_slice(indices));
    true
}

fn failed(stage: &'static str, place: Place, sample: Option<u64>, source: BoxError) -> Error {
    let Place { epoch, batch, .. } = place;
    Error::Stage { stage, epoch, batch, sample, source: source.into() }
}

/// The samples that the plan has for the rows of a claim.
fn look_up(sampler: &dyn Sampler, place: Place, claim: &Claim, indices: &mut Vec<u64>) {
    let len = sampler.len();
    let rows = claim.end - claim.first;
    let first = place.rows.first + claim.first;
    indices.clear();
    if first + rows <= len {
        indices.resize(usize::try_from(rows).unwrap_or(0), 0);
        sampler.indices(place.epoch, first, indices);
    } else {
        // Rows that fill the last batch up begin again at the epoch's start.
        let positions = (first..first + rows).map(|position| position % len);
        indices.extend(positions.map(|position| sampler.index(place.epoch, position)));
    }
}

fn contain<R>(
    who: &'static str,
    call: impl FnOnce() -> Result<R, BoxError>,
) -> Result<R, BoxError> {
    // What user code leaves half done in its own state is its own affair; the rows it wrote are
    // written again or left out.
    catch_unwind(AssertUnwindSafe(call))
        .unwrap_or_else(|panic| Err(Error::panicked(who, &*panic).into()))
}

fn skipped(epoch: u64, batch: u64, sample: Option<u64>, error: &Error) -> Skipped {
    Skipped { epoch, batch, sample, reason: error.chain() }
}
