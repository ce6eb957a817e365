//! Runs random rounds of loaders and pools, one after the other, until so many samples were
//! delivered, and judges whether memory, threads or open files grew. `README.md` says more.

mod bench;
mod files;
mod measure;
mod plan;
mod pools;
mod random;
mod round;
mod samples;
mod source;
mod stream;
mod tally;
mod verdict;

use std::alloc::System;
use std::fs::File;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use stats_alloc::{INSTRUMENTED_SYSTEM, StatsAlloc};

use bench::Devices;
use files::Files;
use measure::{Floor, Holdings, Idle, Row};
use round::Round;
use tally::TALLY;

#[global_allocator]
static HEAP: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// A round that takes longer hangs.
const PATIENCE: Duration = Duration::from_secs(60);

const USAGE: &str = "usage: soak [--samples N | --seconds N | --rounds N] [--seed N] [--csv FILE] \
                     [--device mixed|cuda]";

/// What was asked for.
struct Options {
    samples: u64,
    seed: u64,
    rounds: Option<u64>,
    /// How long rounds are begun.
    time: Option<Duration>,
    csv: Option<PathBuf>,
    devices: Devices,
}

impl Options {
    fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let mut options = Self {
            samples: 10_000_000,
            seed: 0,
            rounds: None,
            time: None,
            csv: None,
            devices: Devices::Mixed,
        };
        while let Some(name) = arguments.next() {
            let value = arguments.next()?;
            match &name[..] {
                "--samples" => options.samples = value.parse().ok()?,
                "--seed" => options.seed = value.parse().ok()?,
                "--rounds" => options.rounds = Some(value.parse().ok()?),
                "--seconds" => options.time = Some(Duration::from_secs(value.parse().ok()?)),
                "--csv" => options.csv = Some(value.into()),
                "--device" => {
                    options.devices = match &value[..] {
                        "mixed" => Devices::Mixed,
                        #[cfg(feature = "cuda")]
                        "cuda" => Devices::Cuda,
                        _ => return None,
                    }
                }
                _ => return None,
            }
        }
        Some(options)
    }
}

/// Where the run is, for the thread that watches it.
struct Watched {
    began: Instant,
    seed: AtomicU64,
    devices: Devices,
    /// Milliseconds after `began`.
    round_began: AtomicU64,
    over: AtomicBool,
    idle: Idle,
}

fn main() -> ExitCode {
    let Some(options) = Options::parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    match soak(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(problem) => {
            eprintln!("soak: {problem}");
            ExitCode::FAILURE
        }
    }
}

fn soak(options: &Options) -> Result<(), Box<dyn std::error::Error>> {
    be_silent_about_planned_panics();
    Files::write()?;
    round::warm_up(options.devices);
    // The standard output's buffer is made now too.
    match (options.rounds, options.time) {
        (Some(rounds), _) => println!("soak: {rounds} rounds, from seed {} on", options.seed),
        (_, Some(time)) => println!("soak: {} s, from seed {} on", time.as_secs(), options.seed),
        _ => println!("soak: up to {} samples, from seed {} on", options.samples, options.seed),
    }
    let csv: Box<dyn Write + Send> = match &options.csv {
        Some(path) => Box::new(File::create(path)?),
        None => Box::new(io::sink()),
    };
    let watched = Arc::new(Watched {
        began: Instant::now(),
        seed: AtomicU64::new(options.seed),
        devices: options.devices,
        round_began: AtomicU64::new(0),
        over: AtomicBool::new(false),
        idle: Idle::default(),
    });
    let watcher = {
        let watched = Arc::clone(&watched);
        // The table is there before the first measurement.
        let rows = Vec::with_capacity(1 << 16);
        std::thread::Builder::new()
            .name("watcher".to_owned())
            .spawn(move || watched.watch(rows, csv))?
    };
    let outcome = rounds(options, &watched);
    watched.over.store(true, Ordering::SeqCst);
    watcher.thread().unpark();
    let rows = watcher.join().expect("the watcher does not panic")?;
    Files::remove()?;
    println!("\n{}\n", TALLY.lines().join("\n"));
    outcome?;
    if options.devices != Devices::Mixed
        && TALLY.rounds.get() >= 200
        && (TALLY.gathered.get() == 0 || TALLY.resident.get() == 0)
    {
        return Err("the device gathered nothing by itself, or nothing was resident".into());
    }
    if rows.len() < verdict::LEAST_ROWS {
        println!("all rounds passed; {} s are too short to judge what grows", rows.len());
        return Ok(());
    }
    let grown = verdict::judge(&rows, options.devices != Devices::Mixed);
    if !grown.is_empty() {
        return Err(grown.join("; ").into());
    }
    println!(
        "all rounds passed, and nothing grew in {:.0} s",
        watched.began.elapsed().as_secs_f64()
    );
    Ok(())
}

/// The rounds, up to the first that fails.
fn rounds(options: &Options, watched: &Watched) -> Result<(), String> {
    let start = Holdings::now().map_err(|error| error.to_string())?;
    let mut floor = Floor { threads: start.threads, files: start.files, may_rise: 0 };
    if options.devices != Devices::Mixed {
        floor.may_rise = 3;
    }
    watched.idle.note(start);
    let mut before = start;
    for number in 0.. {
        let enough = match options.rounds {
            Some(rounds) => number >= rounds,
            None => match options.time {
                Some(time) => watched.began.elapsed() >= time,
                None => TALLY.samples.get() >= options.samples,
            },
        };
        if enough {
            break;
        }
        let seed = options.seed + number;
        watched.seed.store(seed, Ordering::SeqCst);
        watched.round_began.store(watched.milliseconds(), Ordering::SeqCst);
        let (round, given_up) = (Round::new(seed, options.devices), TALLY.given_up.get());
        let failed = |problem: &str| {
            let again = again(seed, options.devices);
            Err(format!("a round failed{problem}; to see it again: {again}"))
        };
        if catch_unwind(AssertUnwindSafe(|| round.run())).is_err() {
            return failed(", see above");
        }
        drop(round);
        match watched.idle.settle(&mut floor, before, TALLY.given_up.get() - given_up) {
            Ok(now) => before = now,
            Err(problem) => return failed(&format!(": {problem}")),
        }
        TALLY.rounds.add(1);
    }
    Ok(())
}

impl Watched {
    fn milliseconds(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_millis()).expect("not that long")
    }

    /// Once a second: notes a row, and that the rounds go on.
    fn watch(&self, mut rows: Vec<Row>, mut csv: impl Write) -> io::Result<Vec<Row>> {
        writeln!(csv, "{}", Row::HEADER)?;
        let mut device_bytes = 0;
        loop {
            // Asked first: the last row is of the end.
            let over = self.over.load(Ordering::SeqCst);
            if self.devices != Devices::Mixed && rows.len().is_multiple_of(5) {
                device_bytes = measure::device_memory();
            }
            let row = Row::now(self.began, &self.idle, device_bytes)?;
            row.write(&mut csv)?;
            if rows.len().is_multiple_of(60) {
                println!("{row}");
            }
            rows.push(row);
            if over {
                csv.flush()?;
                return Ok(rows);
            }
            let round_began = Duration::from_millis(self.round_began.load(Ordering::SeqCst));
            if self.began.elapsed().saturating_sub(round_began) > PATIENCE {
                let seed = self.seed.load(Ordering::SeqCst);
                eprintln!("soak: a round hangs; to see it again: {}", again(seed, self.devices));
                eprintln!("its threads:\n  {}", measure::threads().join("\n  "));
                std::process::exit(1);
            }
            std::thread::park_timeout(Duration::from_secs(1));
        }
    }
}

/// How a round is done once more, and what it does.
fn again(seed: u64, devices: Devices) -> String {
    let option = if devices == Devices::Mixed { "" } else { " --device cuda" };
    format!("soak --seed {seed} --rounds 1{option}; {:?}", Round::new(seed, devices))
}

/// Panics that a round plans are caught by the library, and of no interest here.
fn be_silent_about_planned_panics() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let own = panic.payload().downcast_ref::<String>();
        let faulty = panic.payload().downcast_ref::<&str>();
        if !own.is_some_and(|text| text.starts_with(source::PLANNED))
            && faulty.is_none_or(|text| *text != "a test made the driver panic")
        {
            usual(panic);
        }
    }));
}
