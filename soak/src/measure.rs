//! What the process holds, as Linux tells it in `/proc/self`.

use std::fmt;
use std::io::{self, Write};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::HEAP;
use crate::tally::TALLY;

/// Threads, open files and heap at one moment.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Holdings {
    pub threads: u64,
    pub files: u64,
    /// Bytes that Rust code has allocated and not freed.
    pub heap: i64,
}

impl Holdings {
    pub fn now() -> io::Result<Self> {
        let heap = HEAP.stats();
        Ok(Self {
            threads: status("Threads:")?,
            // One of them is the folder that is being read.
            files: std::fs::read_dir("/proc/self/fd")?.count() as u64 - 1,
            heap: (heap.bytes_allocated - heap.bytes_deallocated).cast_signed() as i64,
        })
    }
}

/// The threads and open files that may be there between rounds.
#[derive(Debug)]
pub struct Floor {
    pub threads: u64,
    pub files: u64,
    /// How often it may rise yet: a driver may begin a thread of its own late, and once.
    pub may_rise: u32,
}

/// What is there between two rounds, when everything of a round is gone.
#[derive(Debug, Default)]
pub struct Idle {
    threads: AtomicU64,
    files: AtomicU64,
    /// What all rounds together left behind whose device was not lost.
    left_behind: AtomicI64,
    /// What the others left behind besides the bytes that they gave up.
    left_by_lost: AtomicI64,
}

impl Idle {
    /// Waits until a round's threads and files are gone, down to the `floor`, and adds up what it
    /// left on the heap since `before`.
    ///
    /// # Errors
    /// What is still there.
    pub fn settle(
        &self,
        floor: &mut Floor,
        before: Holdings,
        given_up: u64,
    ) -> Result<Holdings, String> {
        let (began, patience) = (Instant::now(), Duration::from_secs(20));
        let deadline = began + if floor.may_rise > 0 { patience / 4 } else { patience };
        loop {
            let now = Holdings::now().map_err(|error| error.to_string())?;
            let left = now.heap - before.heap - given_up.cast_signed();
            // A device that lives on drops what its last work used a moment after it is done.
            let settled = left <= 0 || began.elapsed() > Duration::from_millis(200);
            if now.threads <= floor.threads && now.files <= floor.files && settled {
                let sum = if given_up == 0 { &self.left_behind } else { &self.left_by_lost };
                sum.fetch_add(left, Ordering::Relaxed);
                self.note(now);
                return Ok(now);
            }
            if Instant::now() > deadline {
                let problem = format!(
                    "the round is over, and there are {} open files and {} threads, {} and {} \
                     before: {}",
                    now.files,
                    now.threads,
                    floor.files,
                    floor.threads,
                    threads().join(", ")
                );
                let Some(may_rise) = floor.may_rise.checked_sub(1) else { return Err(problem) };
                println!("{problem}");
                let (threads, files) = (now.threads.max(floor.threads), now.files.max(floor.files));
                *floor = Floor { threads, files, may_rise };
            }
            std::thread::sleep(Duration::from_micros(100));
        }
    }

    pub fn note(&self, now: Holdings) {
        self.threads.store(now.threads, Ordering::Relaxed);
        self.files.store(now.files, Ordering::Relaxed);
    }
}

/// A moment of the run: a row of the table.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    pub seconds: f64,
    pub rounds: u64,
    pub samples: u64,
    pub resident: u64,
    pub threads: u64,
    pub files: u64,
    pub left_behind: i64,
    pub left_by_lost: i64,
    pub idle_threads: u64,
    pub idle_files: u64,
    pub given_up: u64,
    /// Devices lost.
    pub lost: u64,
    /// Memory of the GPU that is in use, by whomever; 0 where it was not asked for.
    pub device_bytes: u64,
}

impl Row {
    pub const HEADER: &str = "seconds,rounds,samples,resident_bytes,threads,files,idle_threads,\
                              idle_files,left_behind_bytes,given_up_bytes,left_by_lost_bytes,\
                              lost_devices,device_bytes";

    pub fn now(began: Instant, idle: &Idle, device_bytes: u64) -> io::Result<Self> {
        let Holdings { threads, files, .. } = Holdings::now()?;
        Ok(Self {
            seconds: began.elapsed().as_secs_f64(),
            rounds: TALLY.rounds.get(),
            samples: TALLY.samples.get(),
            resident: status("VmRSS:")? * 1024,
            threads,
            files,
            left_behind: idle.left_behind.load(Ordering::Relaxed),
            left_by_lost: idle.left_by_lost.load(Ordering::Relaxed),
            idle_threads: idle.threads.load(Ordering::Relaxed),
            idle_files: idle.files.load(Ordering::Relaxed),
            given_up: TALLY.given_up.get(),
            lost: TALLY.lost.get(),
            device_bytes,
        })
    }

    pub fn write(&self, mut to: impl Write) -> io::Result<()> {
        let Self { seconds, rounds, samples, resident, threads, files, .. } = self;
        let Self { idle_threads, idle_files, left_behind, given_up, left_by_lost, .. } = self;
        let Self { lost, device_bytes, .. } = self;
        writeln!(
            to,
            "{seconds:.1},{rounds},{samples},{resident},{threads},{files},{idle_threads},\
             {idle_files},{left_behind},{given_up},{left_by_lost},{lost},{device_bytes}"
        )
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        write!(
            f,
            "{:5.0} s  {:6} rounds  {:9} samples  {:5.1} MiB resident, {:.2} of them given up; left \
             by the rounds: {} bytes, {} threads, {} files",
            self.seconds,
            self.rounds,
            self.samples,
            mib(self.resident as f64),
            mib(self.given_up as f64),
            self.left_behind,
            self.idle_threads,
            self.idle_files
        )
    }
}

/// The number in this line of `/proc/self/status`.
fn status(name: &str) -> io::Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| io::Error::other(format!("/proc/self/status has no number for {name}")))
}

/// Memory of the GPU that is in use, in bytes; 0 where `nvidia-smi` does not tell.
pub fn device_memory() -> u64 {
    let told = std::process::Command::new("nvidia-smi")
        .args(["--id=0", "--query-gpu=memory.used", "--format=csv,noheader,nounits"])
        .output();
    let text = told.map(|told| told.stdout).unwrap_or_default();
    let mebibytes = String::from_utf8_lossy(&text).trim().parse::<u64>();
    mebibytes.unwrap_or(0) << 20
}

/// Name, state and kernel function of every thread.
pub fn threads() -> Vec<String> {
    let Ok(folder) = std::fs::read_dir("/proc/self/task") else { return Vec::new() };
    let describe = |task: std::path::PathBuf| {
        let read = |file| std::fs::read_to_string(task.join(file)).unwrap_or_default();
        let state = read("status")
            .lines()
            .find_map(|line| line.strip_prefix("State:\t").map(str::to_owned));
        format!("{}: {} {}", read("comm").trim(), state.unwrap_or_default(), read("wchan"))
    };
    folder.filter_map(|entry| Some(describe(entry.ok()?.path()))).collect()
}
