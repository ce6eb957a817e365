//! What more workers bring where samples take time: speed, an early first batch, and no more
//! memory. And how soon they stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

use batchline::testing::{FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, DType, Dataset, Device, FnDataset, Host, MemoryManager,
    SampleMut, SampleSpec,
};

use crate::measure::{Contestant, Scale, Series, interleave, timed};
use crate::report::{Bar, Report};

const BATCH: u64 = 64;

/// Samples that are their index and take that long to read; the longest read, in nanoseconds, is
/// kept in `longest`.
fn slow(len: u64, read: Duration, longest: &Arc<AtomicU64>) -> impl Dataset + 'static {
    let spec = SampleSpec::new(DType::I64, &[]).expect("a number is a sample");
    let longest = Arc::clone(longest);
    FnDataset::new(len, spec, move |index, sample: &mut SampleMut<'_>| {
        let begun = Instant::now();
        thread::sleep(read);
        sample.write(0, &[index as i64])?;
        longest.fetch_max(begun.elapsed().as_nanos() as u64, Relaxed);
        Ok(())
    })
}

fn loader(dataset: impl Dataset + 'static, workers: usize, device: &Device) -> AsyncDataLoader {
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(BATCH)
        .workers(workers)
        .memory_manager(MemoryManager::new(device))
        .build()
        .expect("the settings are good");
    AsyncDataLoader::new(dataset, config).expect("there are samples")
}

/// Loads everything and checks it; the time from the start to the end.
fn load(len: u64, read: Duration, workers: usize) -> Duration {
    let loader = loader(slow(len, read, &Arc::default()), workers, &Device::host());
    let (time, indices) = timed(|| {
        let mut indices = Vec::new();
        loader.start().expect("it starts");
        while let Some(batch) = loader.get_batch().expect("nothing fails") {
            let view = batch.input_tensor().bind(&Host).expect("the host's memory");
            indices.extend_from_slice(view.as_slice::<i64>().expect("numbers"));
        }
        indices
    });
    assert!(indices.into_iter().eq(0..len as i64), "the samples differ");
    time
}

fn threads(workers: usize) -> String {
    format!("{workers} {}", if workers == 1 { "worker" } else { "workers" })
}

pub fn scaling(scale: Scale, report: &mut Report) {
    let len = scale.pick(1024, 64);
    report.row("scaling", "samples that take 1 ms each, batch 64: 8 workers beside one");
    let contestants = [8, 1].map(|workers| {
        Contestant::new(threads(workers), move || {
            len as f64 / load(len, Duration::from_millis(1), workers).as_secs_f64()
        })
    });
    let series = interleave(scale.pick(5, 1), "samples/s", contestants.into());
    report.compare(format!("{len} samples"), &series[0], &series[1], Some(Bar::AtLeast(7.6)));
}

pub fn first_batch(scale: Scale, report: &mut Report) {
    report.row("first", "from start to the first batch: 1 ms a sample, batch 64, 8 workers");
    let loader =
        loader(slow(BATCH * 4, Duration::from_millis(1), &Arc::default()), 8, &Device::host());
    let ours = || {
        let (time, batch) = timed(|| {
            loader.start().expect("it starts");
            loader.get_batch()
        });
        drop(batch.expect("nothing fails").expect("there is one"));
        loader.stop().expect("it stops");
        time.as_secs_f64() * 1e3
    };
    // What the reads of one worker take, as sleeping takes longer than asked for.
    let sleeps = || {
        let (time, ()) = timed(|| (0..8).for_each(|_| thread::sleep(Duration::from_millis(1))));
        time.as_secs_f64() * 1e3
    };
    let contestants = vec![Contestant::new("batchline", ours), Contestant::new("8 sleeps", sleeps)];
    let series = interleave(scale.pick(21, 3), "ms", contestants);
    report.compare("beside 8 sleeps in a row", &series[0], &series[1], None);
    report.alone("1.2 times 64 / 8 ms, and 1 ms", &series[0], Some(Bar::AtMost(10.6)));
}

pub fn memory(scale: Scale, report: &mut Report) {
    report.row("memory", "bytes of all buffers while loading, 1, 8 and 32 workers");
    let counts = [1, 8, 32];
    let devices = [
        // A device with memory of its own, so that batches go through page-locked buffers.
        ("page-locked and device memory, test device", faulty_device(FaultPlan::default()).0),
        ("slots, host device", Device::host()),
    ];
    for (name, device) in devices {
        let mut series = Vec::new();
        for workers in counts {
            let mut bytes = Series::new(threads(workers), "bytes");
            for _ in 0..5 {
                let len = BATCH * scale.pick(100, 10);
                let loader =
                    loader(slow(len, Duration::from_micros(10), &Arc::default()), workers, &device);
                loader.start().expect("it starts");
                let mut most = 0;
                while let Some(batch) = loader.get_batch().expect("nothing fails") {
                    let stats = loader.stats();
                    most = most.max(stats.staging_bytes + stats.device_bytes);
                    drop(batch);
                }
                bytes.runs.push(most as f64);
            }
            series.push(bytes);
        }
        for more in &series[1..] {
            report.compare(name, more, &series[0], Some(Bar::AtMost(1.0)));
        }
    }
}

pub fn stop(scale: Scale, report: &mut Report) {
    let read = Duration::from_millis(20);
    report.row("stop", "stop in the middle of an epoch, 8 workers busy with reads of 20 ms");
    let mut beyond = Series::new("stop less the longest read", "ms");
    let mut whole = Series::new("batchline", "ms");
    for repetition in 0..scale.pick(50, 5) {
        let longest = Arc::default();
        let loader = loader(slow(BATCH * 1000, read, &longest), 8, &Device::host());
        loader.start().expect("it starts");
        // Somewhere in the middle of reads, and in each repetition somewhere else.
        thread::sleep(read * 2 + Duration::from_micros(397 * repetition));
        let (time, result) = timed(|| loader.stop());
        result.expect("it stops");
        let longest = Duration::from_nanos(longest.load(Relaxed)).as_secs_f64();
        whole.runs.push(time.as_secs_f64() * 1e3);
        beyond.runs.push((time.as_secs_f64() - longest) * 1e3);
    }
    report.alone("how long it takes", &whole, None);
    report.worst("beyond the longest read, the worst", &beyond, Bar::AtMost(50.0));
}
