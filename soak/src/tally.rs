//! What the run has done so far. The watching thread reads it while rounds write it.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! tally {
    ($($(#[doc = $doc:literal])* $name:ident: $text:literal,)*) => {
        /// Counters, from the start of the run.
        #[derive(Debug)]
        pub struct Tally {
            $($(#[doc = $doc])* pub $name: Counter,)*
        }

        pub static TALLY: Tally = Tally { $($name: Counter(AtomicU64::new(0)),)* };

        impl Tally {
            /// What was met how often.
            pub fn lines(&self) -> Vec<String> {
                vec![$(format!("{:>12}  {}", self.$name.get(), $text),)*]
            }
        }
    };
}

#[derive(Debug)]
pub struct Counter(AtomicU64);

impl Counter {
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

tally! {
    rounds: "rounds",
    samples: "samples delivered and compared",
    batches: "batches",
    starts: "starts of a loader",
    gathered: "starts of a loader whose device fetched samples by itself",
    resident: "starts of a loader whose samples were on the device",
    restarts: "starts of a loader that was stopped",
    early_stops: "stops in the middle",
    held_over: "batches that were held longer than their loader lived",
    resumes: "resumes from a saved state",
    failed_streams: "streams that ended in an error, as they had to",
    skipped: "samples or pulled batches skipped",
    retries: "reads repeated",
    panics: "panics of a source",
    too_many_held: "consumers told that they held too much",
    detached: "stops that detached a source that blocked",
    faults: "injected device failures that were met",
    lost: "devices lost",
    pool_operations: "operations of the pools alone",
    given_up: "bytes given up with lost devices, by design",
}
