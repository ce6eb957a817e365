//! A training loop on the same GPU, with and without loading: how long its stream waits for data,
//! and how much slower its own work gets.

use std::ffi::c_void;

use batchline::{DType, MemoryManager};

use crate::compute::Compute;
use crate::data::{Data, Rows, small};
use crate::device::planes;
use crate::driver::{Driver, Event};
use crate::flow::{Flow, Work};
use crate::path::Path;
use crate::report::{Entry, Report, median};
use crate::settings::Settings;

/// What a step is to take.
const STEP_MS: f64 = 2.0;
/// So many steps may be on their way when the host waits for the oldest, as a loop does that looks
/// at its loss now and then.
const AHEAD: usize = 4;

pub(crate) fn measure(
    settings: &Settings,
    memory: &MemoryManager,
    driver: &Driver,
    data: Data,
    report: &mut Report,
) {
    let rows = data.rows(&[224, 224, 3], settings.pick(256, 4), u64::MAX);
    let stream = driver.stream();
    let compute = Compute::new(settings, driver, stream, STEP_MS);
    let track = Track::new(settings, driver, stream, &compute);
    let mut lanes = vec![Lane::new("without loading", None)];
    for path in Path::PLAIN {
        for converted in [false, true] {
            let mut work = Work::new(rows.batch, settings.workers, path);
            let name = if converted {
                work = work.convert(DType::BF16, planes());
                format!("{}, to bf16 planes", path.name())
            } else {
                path.name().to_owned()
            };
            match Flow::verified(memory, &rows, rows.dataset(), &work) {
                Ok(flow) => lanes.push(Lane::new(&name, Some(flow))),
                Err(note) => report.add(Entry::ours(ROW, &name, "ms").with("note", note)),
            }
        }
    }
    for round in 0..=settings.rounds {
        for turn in 0..lanes.len() {
            let count = lanes.len();
            let lane = &mut lanes[(round + turn) % count];
            let steps = track.run(lane.flow.as_ref());
            if round > 0 {
                lane.rounds.push(steps);
            }
        }
    }
    tell(&compute, &rows, &lanes, report);
}

const ROW: &str = "a training step, u8 224x224x3, batch 256";

/// One who trains: alone, or with a loader.
struct Lane {
    name: String,
    flow: Option<Flow>,
    rounds: Vec<Steps>,
}

impl Lane {
    fn new(name: &str, flow: Option<Flow>) -> Self {
        Self { name: name.to_owned(), flow, rounds: Vec::new() }
    }

    fn each(&self, of: impl Fn(&Steps) -> f64) -> Vec<f64> {
        self.rounds.iter().map(of).collect()
    }
}

/// What a run of steps took, in milliseconds.
struct Steps {
    /// From one step to the next, in the mean.
    whole: f64,
    /// The stream's wait for a batch, in the mean.
    waiting: f64,
    /// The step's own work, its median.
    work: f64,
}

/// Where steps run, and the events around their parts.
struct Track<'a> {
    driver: &'a Driver,
    stream: *mut c_void,
    compute: &'a Compute<'a>,
    /// Before a batch is waited for, behind it, and behind the work.
    events: Vec<[Event; 3]>,
}

impl<'a> Track<'a> {
    fn new(
        settings: &Settings,
        driver: &'a Driver,
        stream: *mut c_void,
        compute: &'a Compute<'a>,
    ) -> Self {
        let steps = (settings.span.as_secs_f64() * 1e3 / STEP_MS) as usize;
        let three = |_| [driver.event(), driver.event(), driver.event()];
        Self { driver, stream, compute, events: (0..steps.max(20)).map(three).collect() }
    }

    fn run(&self, flow: Option<&Flow>) -> Steps {
        let (driver, stream) = (self.driver, self.stream);
        // The first ones find batches that lay ready.
        let warm = self.events.len() / 10;
        for (number, [before, ready, done]) in self.events.iter().enumerate() {
            if let Some([_, _, oldest]) = number.checked_sub(AHEAD).map(|step| self.events[step]) {
                driver.wait_for(oldest);
            }
            driver.record(*before, stream);
            let batch = flow.map(|flow| {
                let batch = flow.next();
                drop(batch.bind(&Driver::shared(stream)).expect("a stream of this device"));
                batch
            });
            driver.record(*ready, stream);
            self.compute.enqueue();
            driver.record(*done, stream);
            // Its memory is written again behind the work.
            drop(batch);
        }
        driver.wait(stream);
        let counted = &self.events[warm..];
        let count = counted.len() as f64;
        let waits = counted.iter().map(|[before, ready, _]| driver.between(*before, *ready));
        let work: Vec<f64> =
            counted.iter().map(|[_, ready, done]| driver.between(*ready, *done)).collect();
        let [first, .., last] = counted else { unreachable!("there are twenty steps at least") };
        Steps {
            whole: driver.between(first[2], last[2]) / (count - 1.0),
            waiting: waits.sum::<f64>() / count,
            work: median(&work),
        }
    }
}

fn tell(compute: &Compute<'_>, rows: &Rows, lanes: &[Lane], report: &mut Report) {
    let alone = &lanes[0];
    for lane in lanes {
        let entry = Entry::ours(ROW, &lane.name, "ms")
            .with("work", compute.name())
            .with("sample_bytes", rows.row)
            .with("batch", small(rows.batch));
        report.add(entry.runs(lane.each(|steps| steps.whole)));
    }
    for lane in &lanes[1..] {
        // What two events one behind the other take is no wait for data.
        let of_alone = |of: fn(&Steps, &Steps) -> f64| -> Vec<f64> {
            lane.rounds.iter().zip(&alone.rounds).map(|(with, without)| of(with, without)).collect()
        };
        let stall = of_alone(|with, without| (with.waiting - without.waiting) / with.whole);
        let slower = of_alone(|with, without| with.work / without.work - 1.0);
        let row = "a training step waits for data";
        report.add(Entry::ours(row, &lane.name, "of the step").runs(stall).at_most(0.01));
        let row = "the work of a training step gets slower";
        report.add(Entry::ours(row, &lane.name, "of the work").runs(slower).at_most(0.03));
    }
}
