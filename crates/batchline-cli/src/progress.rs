//! How far a run is, on stderr.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use batchline::GpuBatch;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::quantities::{byte_rate, counted, per_second, sample_rate, time};

/// How often what is beside the bar changes.
const REFRESH_EVERY: Duration = Duration::from_millis(200);

/// Tells how far a run is. Its bar is gone when it is dropped.
#[derive(Debug)]
pub(crate) struct Progress {
    shown: Shown,
    epochs: u64,
    /// Since the start.
    run: Part,
    /// Since the start of the epoch, for its line.
    epoch: Part,
    /// When what is beside the bar was last changed.
    refreshed: Option<Instant>,
}

/// A part of the run: since when, and how much so far.
#[derive(Debug, Clone, Copy)]
struct Part {
    since: Instant,
    batches: u64,
    samples: u64,
    bytes: u64,
}

#[derive(Debug)]
enum Shown {
    /// For people at a terminal.
    Bar(ProgressBar),
    /// A line per epoch, for logs.
    Lines,
    Nothing,
}

impl Progress {
    /// Begins to tell about a run of so many batches and epochs. A quiet one tells nothing.
    pub(crate) fn new(batches: Option<u64>, epochs: u64, quiet: bool) -> Self {
        let shown = match quiet {
            true => Shown::Nothing,
            false if std::io::stderr().is_terminal() => Shown::Bar(bar(batches)),
            false => Shown::Lines,
        };
        let now = Instant::now();
        Self { shown, epochs, run: Part::new(now), epoch: Part::new(now), refreshed: None }
    }

    /// Notes a batch that came.
    pub(crate) fn note(&mut self, batch: &GpuBatch) {
        self.run.add(batch);
        self.epoch.add(batch);
        match &self.shown {
            Shown::Bar(bar) => {
                let now = Instant::now();
                if self.refreshed.is_none_or(|before| now - before >= REFRESH_EVERY) {
                    self.refreshed = Some(now);
                    bar.set_prefix(format!("epoch {} of {}", batch.epoch() + 1, self.epochs));
                    bar.set_message(format!(", {}", self.run.rates(now)));
                }
                bar.inc(1);
            }
            Shown::Lines if batch.is_last_in_epoch() => {
                let now = Instant::now();
                // Who closed stderr does not want to know.
                let _ = writeln!(
                    std::io::stderr().lock(),
                    "epoch {} of {}: {} in {}, {}",
                    batch.epoch() + 1,
                    self.epochs,
                    counted(self.epoch.batches, "batch", "batches"),
                    time(now - self.epoch.since),
                    self.epoch.rates(now),
                );
            }
            Shown::Lines | Shown::Nothing => {}
        }
        if batch.is_last_in_epoch() {
            self.epoch = Part::new(Instant::now());
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}

impl Part {
    fn new(since: Instant) -> Self {
        Self { since, batches: 0, samples: 0, bytes: 0 }
    }

    fn add(&mut self, batch: &GpuBatch) {
        self.batches += 1;
        self.samples += batch.len();
        self.bytes += batch.byte_len();
    }

    fn rates(&self, now: Instant) -> String {
        let seconds = (now - self.since).as_secs_f64();
        let samples = sample_rate(per_second(self.samples, seconds));
        format!("{samples}, {}", byte_rate(per_second(self.bytes, seconds)))
    }
}

fn bar(batches: Option<u64>) -> ProgressBar {
    let template = match batches {
        Some(_) => "{prefix} {bar:30} {human_pos} of {human_len} batches{msg}",
        None => "{prefix} {spinner} {human_pos} batches{msg}",
    };
    let bar = ProgressBar::with_draw_target(batches, ProgressDrawTarget::stderr());
    match ProgressStyle::with_template(template) {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    }
}
