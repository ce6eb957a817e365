//! The same samples through batchline and through other loaders, with the same batches and as many
//! worker threads.
//!
//! A peer's data set hands out references to the rows, and its collator copies them into one vector
//! per batch, on the worker: one copy in all, as ours. Collators come in two kinds: one that
//! allocates a vector per batch, as their users write it, and one that uses the vectors of dropped
//! batches again, which saves the peers the page faults of fresh memory.

mod burn;
mod collate;
mod dataloader_rs;
mod ours;
mod plain;

use std::hint::black_box;
use std::time::{Duration, Instant};

use collate::Collate;

use crate::data::{Check, Rows};
use crate::measure::{Contestant, Scale, Series, interleave};
use crate::report::{Bar, Report};

const BATCH: usize = 64;

/// What everybody is asked to load.
#[derive(Debug, Clone, Copy)]
struct Task {
    rows: Rows,
    workers: usize,
    shuffle: bool,
    epochs: usize,
}

/// What a consumer does with a batch; false ends the loading.
type Consumer<'a> = &'a mut dyn FnMut(&[u8]) -> bool;

/// Loads and returns how long it took.
type Load = fn(Task, Collate, Consumer<'_>) -> Times;

/// When things happened.
#[derive(Debug, Clone, Copy)]
struct Times {
    /// Until the loader was made.
    made: Duration,
    /// From there to the first batch.
    first: Duration,
    /// From there to the end.
    end: Duration,
}

/// Takes the times of a loader's life.
struct Clock {
    begun: Instant,
    made: Instant,
    first: Option<Instant>,
}

impl Clock {
    fn begin() -> Self {
        let now = Instant::now();
        Self { begun: now, made: now, first: None }
    }

    fn made(&mut self) {
        self.made = Instant::now();
    }

    fn batch(&mut self) {
        self.first.get_or_insert_with(Instant::now);
    }

    fn end(&self) -> Times {
        Times {
            made: self.made - self.begun,
            first: self.first.expect("there are batches") - self.made,
            end: self.made.elapsed(),
        }
    }
}

/// Who is measured. Ours comes first.
const LOADERS: [(&str, Load, Collate); 6] = [
    ("batchline", ours::load, Collate::Fresh),
    ("plain loop", plain::load, Collate::Fresh),
    ("dataloader-rs", dataloader_rs::load, Collate::Fresh),
    ("dataloader-rs, buffers reused", dataloader_rs::load, Collate::Reused),
    ("burn", burn::load, Collate::Fresh),
    ("burn, buffers reused", burn::load, Collate::Reused),
];

pub fn measure(scale: Scale, report: &mut Report) {
    let sizes = [
        ("64 B", 64, scale.pick(1 << 20, 1 << 10), 3),
        ("784 B", 784, scale.pick(1 << 18, 1 << 10), 4),
        ("12 KiB", 12 << 10, scale.pick(1 << 14, 1 << 8), 6),
        ("150 KiB", 150 << 10, scale.pick(1344, 128), 6),
    ];
    let mut speeds = Vec::new();
    let mut firsts = Vec::new();
    for (size, row_bytes, count, epochs) in sizes {
        let rows = Rows::new(count, row_bytes);
        for shuffle in [false, true] {
            for workers in scale.pick(&[0, 1, 2, 4][..], &[0, 2][..]).iter().copied() {
                let task = Task { rows, workers, shuffle, epochs: scale.pick(epochs, 1) };
                verify(task);
                let order = if shuffle { "shuffled" } else { "in order" };
                let threads = match workers {
                    0 => "1 worker, the others none".to_owned(),
                    1 => "1 worker".to_owned(),
                    many => format!("{many} workers"),
                };
                let case = format!("{size}, {order}, {threads}");
                speeds.push((case.clone(), workers, speed(task, scale)));
                firsts.push((case, workers, first_batch(task, scale)));
                eprint!(".");
            }
        }
    }
    eprintln!();

    report.row("peers, speed", "samples per second, beside other loaders");
    for (case, workers, series) in &speeds {
        for (place, theirs) in series.iter().enumerate().skip(1) {
            // The plain loop is for orientation, and so is who has no workers.
            let bar = (place > 1 && *workers > 0).then_some(Bar::Exceeds(1.0));
            report.compare(case, &series[0], theirs, bar);
        }
    }
    report.row("peers, first", "time to the first batch from where loading starts, beside others");
    first_lines(&firsts, report, |both| &both.0);
    report
        .row("peers, made and first", "time to the first batch, the making of the loader included");
    first_lines(&firsts, report, |both| &both.1);
}

type Firsts = (Vec<Series>, Vec<Series>);

fn first_lines(
    firsts: &[(String, usize, Firsts)],
    report: &mut Report,
    of: impl Fn(&Firsts) -> &Vec<Series>,
) {
    for (case, workers, both) in firsts {
        let series = of(both);
        for (place, theirs) in series.iter().enumerate().skip(1) {
            let bar = (place > 1 && *workers > 0).then_some(Bar::AtMost(1.0));
            report.compare(case, &series[0], theirs, bar);
        }
    }
}

/// Compares every byte that everybody delivers in one epoch with the source, and the order where
/// there is one to expect.
fn verify(task: Task) {
    for (name, load, collate) in LOADERS {
        let mut check = Check::new(task.rows);
        load(Task { epochs: 1, ..task }, collate, &mut |bytes| {
            check.batch(bytes);
            true
        });
        check.finish();
        let in_order = check.order.is_sorted();
        // burn's workers hand their batches over as they come.
        let ordered = !task.shuffle && (!name.starts_with("burn") || task.workers < 2);
        assert!(!ordered || in_order, "{name} did not keep the order");
        assert!(!task.shuffle || !in_order, "{name} did not shuffle");
    }
}

fn speed(task: Task, scale: Scale) -> Vec<Series> {
    let samples = (task.rows.len() * task.epochs) as f64;
    let contestants = LOADERS.map(|(name, load, collate)| {
        Contestant::new(name, move || {
            let times = load(task, collate, &mut |bytes| {
                black_box(bytes.as_ptr());
                true
            });
            samples / times.end.as_secs_f64()
        })
    });
    interleave(scale.pick(5, 1), "samples/s", contestants.into())
}

/// From where loading starts, and from where the loader is made.
fn first_batch(task: Task, scale: Scale) -> Firsts {
    let made: Vec<_> = LOADERS.iter().map(|_| std::cell::RefCell::new(Vec::new())).collect();
    let contestants = LOADERS.iter().zip(&made).map(|((name, load, collate), made)| {
        Contestant::new(*name, move || {
            let times = load(task, *collate, &mut |bytes| {
                black_box(bytes.as_ptr());
                false
            });
            made.borrow_mut().push((times.made + times.first).as_secs_f64() * 1e6);
            times.first.as_secs_f64() * 1e6
        })
    });
    let from_start = interleave(scale.pick(9, 1), "us", contestants.collect());
    let from_making = from_start.iter().zip(made).map(|(series, runs)| {
        let mut all = Series::new(&series.name, "us");
        // Without the one that warms up.
        all.runs = runs.into_inner().split_off(1);
        all
    });
    let from_making = from_making.collect();
    (from_start, from_making)
}
