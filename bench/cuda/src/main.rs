//! batchline's CUDA device beside the driver alone: every row and its peer in turn, five rounds,
//! median with least and largest. `FILE` gets every figure as JSON.
//!
//!     batchline-bench-cuda [FILE]

mod driver;
mod frozen;

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, BoxError, ChannelOrder, CommandBufferPool, Conversion,
    DType, Dataset, Device, HostTensor, InMemory, MemoryLimits, MemoryManager, SampleMut,
    SampleSpec, StagingBufferPool,
};
use driver::Driver;
use serde_json::{Value, json};

const ROW: u64 = 3 * 224 * 224;
const BATCH: u64 = 256;
const BYTES: u64 = ROW * BATCH;
const BATCHES: u64 = 300;
const ROUNDS: usize = 5;

fn main() {
    let device = Device::cuda(0).unwrap_or_else(|error| {
        eprintln!("bench: {error}");
        std::process::exit(1)
    });
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{}, {}, {workers} cores", device.info().name, device.info().driver);
    let limits = MemoryLimits::default().device_limit(8 << 30).staging_limit(4 << 30);
    let memory = MemoryManager::with_limits(&device, limits);
    // The first use makes the context current on this thread.
    drop(memory.upload(&[1u8; 16], &[16]).expect("a small tensor"));
    let driver = Driver::load();
    let mut report = Report::default();

    copies(&memory, &driver, &mut report);
    staged(&memory, &driver, workers, &mut report);
    rows(&memory, workers, &mut report);
    hand_over(&memory, workers, &mut report);
    conversion(&memory, &mut report);
    frozen::frozen(&memory, &mut report);

    if let Some(path) = std::env::args().nth(1) {
        let whole = json!({
            "device": device.info().name,
            "driver": device.info().driver,
            "cores": workers,
            "lines": report.lines,
        });
        std::fs::write(&path, serde_json::to_string_pretty(&whole).expect("plain values"))
            .unwrap_or_else(|error| panic!("{path}: {error}"));
    }
}

/// Copies of 38.5 MB out of page-locked memory.
fn copies(memory: &MemoryManager, driver: &Driver, report: &mut Report) {
    let bytes = usize::try_from(BYTES).expect("64 bits");
    let (stream, target) = (driver.stream(), driver.device_memory(bytes));
    let sources: Vec<_> = (0..4).map(|_| driver.page_locked(bytes)).collect();
    let staging = StagingBufferPool::with_buffer_size(memory, 4, BYTES).expect("page-locked memory");
    let commands = CommandBufferPool::new(memory, 8).expect("command buffers");
    let tensors: Vec<_> =
        (0..2).map(|_| memory.tensor(&[BYTES], DType::U8).expect("device memory")).collect();
    let ours = || {
        let mut last = None;
        for number in 0..BATCHES {
            let slot = staging.get_buffer().expect("a slot");
            let mut buffer = commands.get_buffer().expect("a buffer");
            let tensor = &tensors[usize::try_from(number).expect("small") % 2];
            buffer.upload(slot, tensor).expect("it fits");
            last = Some(buffer.execute().expect("it is submitted"));
        }
        last.expect("there was one").wait().expect("it is done");
    };
    let theirs = || {
        let count = usize::try_from(BATCHES).expect("small");
        driver.copy(stream, target, &sources, bytes, count);
    };
    let (ours, theirs) = beside(ours, theirs, (BYTES * BATCHES) as f64 / 1e9);
    report.row("copies from page-locked memory, 38.5 MB", "GB/s", ours, Some(("plain loop", theirs)));
}

/// Samples that are there at once: their window is taken and not written.
struct AtOnce(SampleSpec, u64);

impl Dataset for AtOnce {
    fn len(&self) -> u64 {
        self.1
    }
    fn spec(&self) -> &SampleSpec {
        &self.0
    }
    fn read(&self, _: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        std::hint::black_box(sample.input());
        Ok(())
    }
}

fn staged(memory: &MemoryManager, driver: &Driver, workers: usize, report: &mut Report) {
    let bytes = usize::try_from(BYTES).expect("64 bits");
    let (stream, target) = (driver.stream(), driver.device_memory(bytes));
    let sources: Vec<_> = (0..4).map(|_| driver.page_locked(bytes)).collect();
    let cpu = AtomicU64::new(0);
    let ours = || {
        let spec = SampleSpec::new(DType::U8, &[3, 224, 224]).expect("a shape");
        let loader = loader(memory, AtOnce(spec, BATCH * BATCHES), workers.min(4), false);
        loader.start().expect("it starts");
        drop(loader.get_batch().expect("a batch"));
        let began = Instant::now();
        let submitter = thread_time("submitter");
        let mut last = None;
        for _ in 1..BATCHES {
            last = loader.get_batch().expect("a batch");
        }
        let spent = thread_time("submitter") - submitter;
        last.expect("there was one").wait().expect("it arrives");
        cpu.store(spent.as_nanos() as u64 / (BATCHES - 1), Ordering::Relaxed);
        began.elapsed()
    };
    let mut times = [Vec::new(), Vec::new()];
    let mut submitter = Vec::new();
    for _ in 0..ROUNDS {
        let gigabytes = (BYTES * (BATCHES - 1)) as f64 / 1e9;
        times[0].push(gigabytes / ours().as_secs_f64());
        submitter.push(cpu.load(Ordering::Relaxed) as f64 / 1e3);
        let began = Instant::now();
        driver.copy(stream, target, &sources, bytes, usize::try_from(BATCHES).expect("small"));
        times[1].push((BYTES * BATCHES) as f64 / 1e9 / began.elapsed().as_secs_f64());
    }
    let [ours, theirs] = times;
    report.row("staged, a source that does nothing", "GB/s", ours, Some(("plain loop", theirs)));
    report.row("submitter, processor time per batch", "us", submitter, None);
}

fn loader(
    memory: &MemoryManager,
    dataset: impl Dataset + 'static,
    workers: usize,
    shuffle: bool,
) -> AsyncDataLoader {
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(BATCH)
        .workers(workers)
        .shuffle(shuffle)
        .memory_manager(memory.clone())
        .build()
        .expect("the settings are good");
    AsyncDataLoader::new(dataset, config).expect("there are samples")
}

/// Random rows of 150,528 bytes, beside as many threads that copy the same rows and send nothing.
fn rows(memory: &MemoryManager, workers: usize, report: &mut Report) {
    const SAMPLES: u64 = 100 * BATCH;
    let row = usize::try_from(ROW).expect("64 bits");
    let data: Vec<u8> = (0..SAMPLES * ROW).map(|at| (at % 251) as u8).collect();
    let source = data.clone();
    let images = HostTensor::new(data, &[SAMPLES, 3, 224, 224]).expect("a tensor");
    let dataset = std::sync::Arc::new(InMemory::new(images).expect("a data set"));
    let order = batchline::Permutation::new(SAMPLES, 7);
    let first = AtomicU64::new(0);
    let ours = || {
        let loader = loader(memory, std::sync::Arc::clone(&dataset), workers, true);
        loader.start().expect("it starts");
        let started = Instant::now();
        let batch = loader.get_batch().expect("a batch").expect("a first one");
        batch.wait().expect("it arrives");
        first.store(started.elapsed().as_nanos() as u64, Ordering::Relaxed);
        drop(batch);
        let began = Instant::now();
        let mut last = None;
        for _ in 1..SAMPLES / BATCH {
            last = loader.get_batch().expect("a batch");
        }
        last.expect("there was one").wait().expect("it arrives");
        began.elapsed()
    };
    let mut slots: Vec<Vec<u8>> =
        (0..5).map(|_| vec![1; usize::try_from(BYTES).expect("64 bits")]).collect();
    let mut theirs = || {
        let began = Instant::now();
        let next = AtomicU64::new(0);
        let slots: Vec<_> = slots.iter_mut().map(|slot| slot.as_mut_ptr().addr()).collect();
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let position = next.fetch_add(1, Ordering::Relaxed);
                        if position >= SAMPLES {
                            return;
                        }
                        let index = usize::try_from(order.index(position)).expect("64 bits") * row;
                        let slot = slots[usize::try_from(position / BATCH).expect("small") % 5];
                        let place = usize::try_from(position % BATCH).expect("small") * row;
                        let target = std::ptr::with_exposed_provenance_mut::<u8>(slot + place);
                        // SAFETY: each position has a place of its own within a slot; slots come
                        // round only after four others, and what they hold is not read.
                        unsafe {
                            std::ptr::copy_nonoverlapping(source[index..].as_ptr(), target, row);
                        }
                    }
                });
            }
        });
        began.elapsed()
    };
    let mut times = [Vec::new(), Vec::new(), Vec::new()];
    for _ in 0..ROUNDS {
        let gigabytes = (SAMPLES * ROW) as f64 / 1e9;
        times[0].push(gigabytes * 0.99 / ours().as_secs_f64());
        times[1].push(gigabytes / theirs().as_secs_f64());
        times[2].push(first.load(Ordering::Relaxed) as f64 / 1e6);
    }
    let [ours, theirs, first] = times;
    report.row("staged, random rows from memory", "GB/s", ours, Some(("threads that only copy", theirs)));
    report.row("first batch, after start has returned", "ms", first, None);
}

/// `get_batch` when batches are ready.
fn hand_over(memory: &MemoryManager, workers: usize, report: &mut Report) {
    let spec = SampleSpec::new(DType::U8, &[64, 64]).expect("a shape");
    let loader = loader(memory, AtOnce(spec, BATCH * 2000), workers.min(4), false);
    loader.start().expect("it starts");
    let mut calls = Vec::new();
    for _ in 0..1000 {
        while loader.stats().queued_batches < 2 {
            std::thread::sleep(Duration::from_micros(50));
        }
        let began = Instant::now();
        let batch = loader.get_batch().expect("a batch");
        calls.push(began.elapsed().as_nanos() as f64 / 1e3);
        drop(batch);
    }
    calls.sort_by(f64::total_cmp);
    report.row("get_batch, prefetched, median of 1000", "us", vec![calls[500]], None);
    report.row("get_batch, prefetched, 99th percentile", "us", vec![calls[990]], None);
}

/// The kernel alone: 38.5 MB of u8 to normalised floats, in the order of channels that models want.
fn conversion(memory: &MemoryManager, report: &mut Report) {
    let commands = CommandBufferPool::new(memory, 2).expect("command buffers");
    let source = memory.tensor(&[BATCH, 224, 224, 3], DType::U8).expect("device memory");
    for to in [DType::F32, DType::BF16] {
        for nchw in [false, true] {
            let mut conversion =
                Conversion::new().normalize(&[123.7, 116.3, 103.5], &[58.4, 57.1, 57.4]);
            if nchw {
                conversion = conversion.reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
            }
            let shape = conversion.shape(source.shape()).expect("an image");
            let target = memory.tensor(shape.dims(), to).expect("device memory");
            let run = |count: u64| {
                let mut buffer = commands.get_buffer().expect("a buffer");
                for _ in 0..count {
                    buffer.convert(&source, &target, &conversion).expect("it fits");
                }
                let began = Instant::now();
                buffer.execute().expect("submitted").wait().expect("done");
                began.elapsed().as_secs_f64()
            };
            run(10);
            let moved = (source.byte_len() + target.byte_len()) as f64 / 1e12;
            // The difference of two runs leaves out what a submission costs.
            let rates = (0..ROUNDS).map(|_| moved * 400.0 / (run(500) - run(100))).collect();
            let order = if nchw { "to NCHW" } else { "kept" };
            report.row(&format!("convert u8 to {to}, normalised, {order}"), "TB/s", rates, None);
        }
    }
}

/// Runs both in turn; what each did per second.
fn beside(ours: impl Fn(), theirs: impl Fn(), amount: f64) -> (Vec<f64>, Vec<f64>) {
    let timed = |run: &dyn Fn()| {
        let began = Instant::now();
        run();
        amount / began.elapsed().as_secs_f64()
    };
    ours();
    theirs();
    (0..ROUNDS).map(|_| (timed(&ours), timed(&theirs))).unzip()
}

/// Processor time of this process's thread of this name.
fn thread_time(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    for task in tasks {
        let comm = std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
        if comm.trim() == name {
            let stat = std::fs::read_to_string(task.path().join("schedstat")).unwrap_or_default();
            let nanos = stat.split(' ').next().and_then(|text| text.parse().ok()).unwrap_or(0);
            return Duration::from_nanos(nanos);
        }
    }
    Duration::ZERO
}

#[derive(Default)]
struct Report {
    lines: Vec<Value>,
}

impl Report {
    fn row(&mut self, what: &str, unit: &str, ours: Vec<f64>, peer: Option<(&str, Vec<f64>)>) {
        let mut line = format!("| {what} | {} {unit} |", spread(&ours));
        let mut entry = json!({ "what": what, "unit": unit, "ours": ours });
        if let Some((name, theirs)) = peer {
            let ratios: Vec<f64> = ours.iter().zip(&theirs).map(|(a, b)| a / b).collect();
            line += &format!(" {name} {} {unit} | {} x |", spread(&theirs), spread(&ratios));
            entry["peer"] = json!({ "name": name, "runs": theirs });
        } else {
            line += " | |";
        }
        println!("{line}");
        self.lines.push(entry);
    }
}

/// Median, least and largest.
fn spread(runs: &[f64]) -> String {
    let mut runs = runs.to_vec();
    runs.sort_by(f64::total_cmp);
    let text = |number: f64| if number < 10.0 { format!("{number:.3}") } else { format!("{number:.1}") };
    let median = text(runs[runs.len() / 2]);
    if runs.len() == 1 {
        return median;
    }
    format!("**{median}** ({} to {})", text(runs[0]), text(runs[runs.len() - 1]))
}
