//! How long `get_batch` takes where batches lie ready.

use std::hint::{black_box, spin_loop};
use std::thread;
use std::time::{Duration, Instant};

use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Device, Host};

use crate::data::{Check, Rows};
use crate::measure::{Scale, Series, timed};
use crate::report::{Bar, Report};

const ROW: usize = 784;
const BATCH: usize = 64;

/// Lets time pass.
type Pass = fn(Duration);

pub fn measure(scale: Scale, report: &mut Report) {
    let rows = Rows::new(1 << 14, ROW);
    verify(rows);
    let calls = scale.pick(1000, 50);
    report.row("handover", "get_batch with a full queue, batches of 64 times 784 bytes");
    // A consumer is busy between two calls; one that slept comes back to cold caches.
    let consumers: [(_, Pass); 2] = [("busy before", spin), ("asleep before", thread::sleep)];
    for (name, pass) in consumers {
        let mut medians = Series::new("batchline", "ns");
        let mut tails = Series::new("batchline", "ns");
        for _ in 0..5 {
            let latencies = latencies(rows, calls, pass);
            medians.runs.push(latencies.quantile(0.5));
            tails.runs.push(latencies.quantile(0.99));
        }
        let bar = (name == "busy before").then_some(Bar::AtMost(1000.0));
        report.alone(format!("{name}, median of {calls} calls"), &medians, bar);
        report.alone(format!("{name}, 99th percentile"), &tails, None);
    }
    let mut clock = Series::new("reading the clock", "ns");
    for _ in 0..5 {
        let (time, ()) = timed(|| {
            for _ in 0..1000 {
                black_box(Instant::now());
            }
        });
        clock.runs.push(time.as_nanos() as f64 / 1000.0);
    }
    report.alone("reading the clock, part of each", &clock, None);
}

/// Of calls that each find the queue full.
fn latencies(rows: Rows, calls: usize, pass: Pass) -> Series {
    let loader = loader(rows, 1000);
    loader.start().expect("it starts");
    let full = loader.stats().queue_capacity;
    let mut latencies = Series::new("get_batch", "ns");
    for _ in 0..calls {
        let begun = Instant::now();
        loop {
            pass(Duration::from_micros(100));
            if loader.stats().queued_batches == full {
                break;
            }
            assert!(begun.elapsed() < Duration::from_secs(20), "the queue does not fill");
        }
        // What `stats` took from the caches of this thread comes back.
        pass(Duration::from_micros(100));
        let (time, batch) = timed(|| loader.get_batch());
        latencies.runs.push(time.as_nanos() as f64);
        batch.expect("nothing fails").expect("there are more");
    }
    latencies
}

fn loader(rows: Rows, epochs: u64) -> AsyncDataLoader {
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(BATCH as u64)
        .epochs(epochs)
        .shuffle(true)
        .device(Device::host())
        .build()
        .expect("the settings are good");
    AsyncDataLoader::new(rows.dataset(), config).expect("there are samples")
}

fn verify(rows: Rows) {
    let loader = loader(rows, 1);
    let mut check = Check::new(rows);
    loader.start().expect("it starts");
    while let Some(batch) = loader.get_batch().expect("nothing fails") {
        check.batch(batch.input_tensor().bind(&Host).expect("the host's memory").bytes());
    }
    check.finish();
}

fn spin(time: Duration) {
    let begun = Instant::now();
    while begun.elapsed() < time {
        spin_loop();
    }
}
