//! Every way in which a loader can end, at every point where it can: what the consumer is told,
//! that all threads are joined, that all memory is home, and how long it took.
//!
//! The scenes are played one after another in a process of their own, so that every thread of the
//! library belongs to the scene at hand. `BATCHLINE_SCENE=read cargo test --test endings` plays
//! those whose name begins so; `-- --nocapture` shows the table.

mod gate;
mod outcome;
mod scene;
mod stages;
mod threads;

use std::sync::mpsc;
use std::time::{Duration, Instant};

use stages::Stage;

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ending {
    /// A call fails.
    Error,
    /// A call panics.
    Panic,
    /// The device is lost.
    Lost,
    /// `stop`.
    Stop,
    /// The consumer drops the loader, then the batches that it holds.
    LoaderFirst,
    /// The consumer drops its batches, then the loader.
    BatchesFirst,
    /// The loader is dropped on another thread.
    Elsewhere,
    /// The call that is under way does not return within `stop_timeout`.
    Hangs,
}

impl Ending {
    pub(crate) fn drops_the_loader(self) -> bool {
        matches!(self, Ending::LoaderFirst | Ending::BatchesFirst | Ending::Elsewhere)
    }

    pub(crate) fn is_of_a_call(self) -> bool {
        matches!(self, Ending::Error | Ending::Panic)
    }

    pub(crate) fn leaves_the_source_alone(self) -> bool {
        matches!(self, Ending::Lost | Ending::Stop) || self.drops_the_loader()
    }
}

const ENDINGS: [(Ending, &str); 8] = [
    (Ending::Error, "error"),
    (Ending::Panic, "panic"),
    (Ending::Lost, "lost device"),
    (Ending::Stop, "`stop`"),
    (Ending::LoaderFirst, "loader dropped, then batches"),
    (Ending::BatchesFirst, "batches dropped, then loader"),
    (Ending::Elsewhere, "loader dropped on another thread"),
    (Ending::Hangs, "never returns"),
];

/// The stages, and what each ending comes to; the letters are explained below the table.
const EXPECTED: [(Stage, &str, [&str; 8]); 16] = {
    const HOME: &str = "home";
    const LOST: &str = "lost";
    const STOP: &str = "stopped";
    const LATE: &str = "detached";
    const WORKER: &str = "worker's";
    const SOURCE: &str = "source's";
    const SUBMIT: &str = "submitter's";
    [
        (
            Stage::Read,
            "worker: in `Dataset::read`",
            [WORKER, WORKER, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Backoff,
            "worker: waits before a retry",
            ["a", "a", LOST, STOP, HOME, HOME, HOME, "a"],
        ),
        (
            Stage::Sampler,
            "worker: in `Sampler::index`",
            [WORKER, "sampler's", LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Pull,
            "worker: in `DataSource::get_batch`",
            [SOURCE, SOURCE, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Reset,
            "worker: in `DataSource::reset`",
            [SOURCE, SOURCE, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Slot,
            "worker: waits for a slot",
            [SUBMIT, LOST, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Full,
            "a full ticket behind one that is not",
            [WORKER, WORKER, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Output,
            "submitter: waits for an output",
            [WORKER, WORKER, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Submit,
            "submitter: in the driver",
            [SUBMIT, LOST, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Fence,
            "reaper: waits for a fence",
            [LOST, LOST, LOST, STOP, HOME, HOME, HOME, "timeout"],
        ),
        (
            Stage::Completion,
            "reaper: in a completion",
            ["b", "goes on", LOST, STOP, HOME, HOME, HOME, "timeout"],
        ),
        (
            Stage::Get,
            "consumer: waits in `get_batch`",
            [WORKER, WORKER, LOST, STOP, "c", "c", "c", LATE],
        ),
        (
            Stage::Timed,
            "consumer: waits in `get_batch_timeout`",
            [WORKER, WORKER, LOST, STOP, "c", "c", "c", LATE],
        ),
        (
            Stage::Poll,
            "consumer: polls with `try_get_batch`",
            [WORKER, WORKER, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Stream,
            "consumer: awaits the stream",
            [WORKER, WORKER, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
        (
            Stage::Holds,
            "consumer: holds batches",
            [WORKER, WORKER, LOST, STOP, HOME, HOME, HOME, LATE],
        ),
    ]
};

/// More than any scene may take, on the slowest machine.
const LIMIT: Duration = Duration::from_secs(5);

#[test]
fn every_ending_at_every_stage() {
    let chosen = std::env::var("BATCHLINE_SCENE").unwrap_or_default();
    // The panics that the scenes bring about are no news.
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        let text = panic.payload().downcast_ref::<&str>().copied().unwrap_or_default();
        if !["no such luck", "a test made the driver panic"].contains(&text) {
            print(panic);
        }
    }));
    let mut times = Vec::new();
    let started = Instant::now();
    for (stage, _, outcomes) in EXPECTED {
        for ((ending, _), expected) in ENDINGS.into_iter().zip(outcomes) {
            let name = format!("{stage:?} {ending:?}").to_lowercase();
            if expected.len() == 1 || !name.starts_with(&chosen.to_lowercase()) {
                times.push(None);
                continue;
            }
            let before = Instant::now();
            for unified in [false, true] {
                if unified && !stage.is_on_unified() {
                    continue;
                }
                println!("{name}, unified: {unified}");
                let found = within_the_limit(&name, move || outcome::play(stage, ending, unified));
                assert_eq!(found, expected, "{name}");
            }
            times.push(Some(before.elapsed()));
        }
    }
    println!("\n{}\n{:?} in all", table(Some(&times)), started.elapsed());
}

/// Plays a scene on a thread of its own, so that one which hangs fails like any other.
fn within_the_limit<R: Send + 'static>(name: &str, play: impl FnOnce() -> R + Send + 'static) -> R {
    let (send, receive) = mpsc::channel();
    let thread = std::thread::Builder::new().name("scene".to_owned());
    let scene = thread.spawn(move || send.send(play())).unwrap();
    match receive.recv_timeout(LIMIT) {
        Ok(found) => {
            scene.join().unwrap().unwrap();
            found
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{name} did not end within {LIMIT:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(scene.join().expect_err("it ended without an outcome"))
        }
    }
}

/// The table of outcomes, with the times if there are any.
fn table(times: Option<&[Option<Duration>]>) -> String {
    let names: Vec<&str> = ENDINGS.iter().map(|(_, name)| *name).collect();
    let mut text = format!("| | {} |\n|{}\n", names.join(" | "), " --- |".repeat(9));
    for (row, (_, name, outcomes)) in EXPECTED.iter().enumerate() {
        let cells: Vec<String> = outcomes
            .iter()
            .enumerate()
            .map(|(column, outcome)| match times.map(|times| times[row * 8 + column]) {
                Some(Some(time)) => format!("{outcome}, {} ms", time.as_millis()),
                _ => (*outcome).to_owned(),
            })
            .collect();
        text += &format!("| {name} | {} |\n", cells.join(" | "));
    }
    text
}

#[test]
fn the_table_is_in_the_readme() {
    let readme = include_str!("../../src/loader/README.md").replace("\r\n", "\n");
    let table = table(None);
    assert!(readme.contains(&table), "loader/README.md should have this table:\n{table}");
}
