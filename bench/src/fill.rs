//! Filling slots, beside plain copies of the same rows in the same order by as many threads.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::Instant;

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, Device, Host, InMemory, Sampler, Shuffled,
};

use crate::data::{Check, Rows};
use crate::measure::{Contestant, Scale, Series, interleave, timed};
use crate::report::{Bar, Report};

const ROW: usize = 3 * 224 * 224;
const BATCH: usize = 64;
const WORKERS: usize = 2;
const SEED: u64 = 5;

pub fn measure(scale: Scale, report: &mut Report) {
    // 500 MB, more than last-level caches hold.
    let rows = Rows::new(scale.pick(3328, 256), ROW);
    let dataset = rows.dataset();
    let epochs = scale.pick(8, 4);
    let gigabytes = (rows.len() * ROW) as f64 * epochs as f64 / 1e9;

    let loader = loader(dataset.clone(), 1);
    let mut check = Check::new(rows);
    loader.start().expect("it starts");
    while let Some(batch) = loader.get_batch().expect("nothing fails") {
        check.batch(batch.input_tensor().bind(&Host).expect("the host's memory").bytes());
    }
    check.finish();
    let order = Shuffled::new(rows.len() as u64, SEED);
    let expected = (0..rows.len() as u64).map(|position| order.index(0, position) as usize);
    assert!(check.order.iter().copied().eq(expected), "the copies below have another order");
    let slots = loader.stats().slots;
    let mut ring = Ring::new(slots);
    ring.copy(rows, 0, Some(&mut Check::new(rows)));

    report.row("fill", "filling slots from memory, host device, 150,528-byte rows, shuffled");
    let mut whole = Series::new("batchline", "GB/s");
    let ours = || {
        let loader = self::loader(dataset.clone(), epochs);
        let begun = Instant::now();
        loader.start().expect("it starts");
        // The ring's memory was in use before; so are the slots from their second filling on.
        (0..=slots).for_each(|_| drop(loader.get_batch().expect("nothing fails")));
        let settled = Instant::now();
        let filled = slots + 1 + loader.stats().queued_batches;
        while loader.get_batch().expect("nothing fails").is_some() {}
        let left = gigabytes - (filled * BATCH * ROW) as f64 / 1e9;
        whole.runs.push(gigabytes / begun.elapsed().as_secs_f64());
        left / settled.elapsed().as_secs_f64()
    };
    let copies = || {
        let (time, ()) = timed(|| (0..epochs).for_each(|epoch| ring.copy(rows, epoch, None)));
        gigabytes / time.as_secs_f64()
    };
    let contestants =
        vec![Contestant::new("batchline", ours), Contestant::new("plain copies", copies)];
    let series = interleave(scale.rounds(), "GB/s", contestants);
    let case = format!("{WORKERS} workers, batch {BATCH}, {slots} slots");
    report.compare(&case, &series[0], &series[1], Some(Bar::AtLeast(0.9)));
    // Without the run that warms up.
    whole.runs.remove(0);
    report.compare(format!("{case}, the start included"), &whole, &series[1], None);
}

fn loader(dataset: InMemory, epochs: u64) -> AsyncDataLoader {
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(BATCH as u64)
        .workers(WORKERS)
        .shuffle(true)
        .seed(SEED)
        .epochs(epochs)
        .device(Device::host())
        .build()
        .expect("the settings are good");
    AsyncDataLoader::new(dataset, config).expect("there are samples")
}

/// As many buffers as the loader has slots, filled in turn.
struct Ring {
    /// Per worker its part of each buffer, so that they share nothing.
    parts: Vec<Vec<Vec<u8>>>,
}

impl Ring {
    fn new(buffers: usize) -> Self {
        let part = vec![1; BATCH / WORKERS * ROW];
        Self { parts: vec![vec![part; buffers]; WORKERS] }
    }

    /// Copies an epoch. The threads neither wait for one another nor for anybody else, so this is
    /// what the memory can do. As workers do, whoever is faster copies more: each takes the next
    /// half batch. `check` sees every copied row.
    fn copy(&mut self, rows: Rows, epoch: u64, check: Option<&mut Check>) {
        let order = Shuffled::new(rows.len() as u64, SEED);
        let half = BATCH / WORKERS;
        let next = AtomicUsize::new(0);
        let check = check.map(std::sync::Mutex::new);
        let (next, check) = (&next, check.as_ref());
        thread::scope(|scope| {
            for buffers in &mut self.parts {
                scope.spawn(move || {
                    let mut indices = vec![0; half];
                    for turn in 0.. {
                        let first = next.fetch_add(half, Relaxed);
                        if first >= rows.len() {
                            break;
                        }
                        let buffers_len = buffers.len();
                        let buffer = &mut buffers[turn % buffers_len];
                        order.indices(epoch, first as u64, &mut indices);
                        for (&index, place) in indices.iter().zip(buffer.chunks_exact_mut(ROW)) {
                            place.copy_from_slice(rows.get(index as usize));
                        }
                        if let Some(check) = check {
                            check.lock().expect("no check failed").batch(buffer);
                        }
                    }
                });
            }
        });
        if let Some(check) = check {
            check.lock().expect("no check failed").finish();
        }
    }
}
