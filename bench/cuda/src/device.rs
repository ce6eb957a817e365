//! The staged path beside the driver alone: copies, random rows, hand-over, conversion.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchline::{
    ChannelOrder, CommandBufferPool, Conversion, DType, Device, MemoryManager, Permutation,
    SampleSpec, StagingBufferPool, Tensor,
};

use crate::data::{AtOnce, Data, Rows, SEED, small};
use crate::driver::{Driver, Link};
use crate::flow::{Flow, Work, contender};
use crate::path::Path;
use crate::report::{Contender, Entry, Figure, Kind, Report, in_turn, median};
use crate::settings::Settings;

pub(crate) const LOOP: &str = "plain loop of copies";
pub(crate) const THREADS: &str = "threads that only copy";

/// Images of 150,528 bytes.
pub(crate) const IMAGE: [u64; 3] = [3, 224, 224];

pub(crate) fn measure(
    settings: &Settings,
    memory: &MemoryManager,
    driver: &Driver,
    data: Data,
    report: &mut Report,
) {
    let batch = settings.pick(256, 4);
    let rows = data.rows(&IMAGE, batch, u64::MAX);
    copies(settings, memory, driver, &rows, report);
    nothing(settings, memory, driver, &rows, report);
    random_rows(settings, memory, &rows, report);
    first_batch(settings, memory, &rows, report);
    hand_over(settings, memory, report);
    conversion(settings, memory, batch, report);
    crate::frozen::measure(settings, memory, report);
    #[cfg(feature = "wgpu")]
    wgpu(settings, &rows, report);
}

/// Copies of a batch out of page-locked memory.
fn copies(
    settings: &Settings,
    memory: &MemoryManager,
    driver: &Driver,
    rows: &Rows,
    report: &mut Report,
) {
    let bytes = rows.batch_bytes();
    let row = "copies of 38.5 MB";
    let staging = StagingBufferPool::with_buffer_size(memory, 4, bytes).expect("a pool");
    let commands = CommandBufferPool::new(memory, 8).expect("command buffers");
    let tensors: Vec<Tensor> =
        (0..2).map(|_| memory.tensor(&[bytes], DType::U8).expect("device memory")).collect();
    let copy = |number: u64| {
        let slot = staging.get_buffer().expect("a slot");
        let mut buffer = commands.get_buffer().expect("a command buffer");
        buffer.upload(slot, &tensors[small(number % 2)]).expect("it fits");
        buffer.execute().expect("it is submitted")
    };
    // A slot with known bytes arrives as it is.
    let mut slot = staging.get_buffer().expect("a slot");
    let expected = rows.expected(0, None);
    slot.as_mut_slice()[..expected.len()].copy_from_slice(&expected);
    let mut buffer = commands.get_buffer().expect("a command buffer");
    buffer.upload(slot, &tensors[0]).expect("it fits");
    buffer.execute().expect("it is submitted").wait().expect("it is done");
    assert!(tensors[0].to_bytes().expect("it can be read back") == expected);
    let span = settings.span;
    let mut count = 8;
    let ours = move || {
        let began = Instant::now();
        let mut last = None;
        for number in 0..count {
            last = Some(copy(number));
        }
        last.expect("there was one").wait().expect("it is done");
        let seconds = began.elapsed().as_secs_f64();
        let rate = (bytes * count) as f64 / seconds;
        count = ((count as f64 * span.as_secs_f64() / seconds) as u64).clamp(4, 100_000);
        Figure::from(rate / 1e9)
    };
    let entry = Entry::ours(row, "command buffers", "GB/s").share_of(LOOP, 0.99);
    let contenders = vec![Contender::new(entry, ours), link(driver, row, bytes, "GB/s", 1e9, span)];
    in_turn(report, settings.rounds, contenders);
}

/// The plain loop, its rate divided by `scale`.
pub(crate) fn link<'a>(
    driver: &'a Driver,
    row: &str,
    bytes: u64,
    unit: &'static str,
    scale: f64,
    span: Duration,
) -> Contender<'a> {
    let mut link = Link::new(driver, bytes);
    let entry = Entry::new(row, LOOP, Kind::Loop, unit);
    Contender::new(entry, move || Figure::from(link.rate(span) / scale))
}

/// The staged path with a source that writes nothing.
fn nothing(
    settings: &Settings,
    memory: &MemoryManager,
    driver: &Driver,
    rows: &Rows,
    report: &mut Report,
) {
    let (row, span) = ("staged, a source that writes nothing", settings.span);
    let spec = SampleSpec::new(DType::U8, &rows.shape).expect("a shape");
    let work = Work::new(rows.batch, settings.workers.min(4), Path::Staged);
    let flow = Flow::start(work.loader(memory, AtOnce(spec, 1 << 20)));
    let ours = || {
        let stretch = flow.stretch(span);
        let seconds = stretch.wall.as_secs_f64();
        Figure {
            value: stretch.bytes as f64 / seconds / 1e9,
            cores: Some(stretch.cpu.as_secs_f64() / seconds),
        }
    };
    let entry = Entry::ours(row, "staged", "GB/s").share_of(LOOP, 0.95);
    let bytes = rows.batch_bytes();
    let contenders = vec![Contender::new(entry, ours), link(driver, row, bytes, "GB/s", 1e9, span)];
    in_turn(report, settings.rounds, contenders);
    submission(settings, "a batch of 38.5 MB, staged, nothing written", &flow, report);
}

/// Random rows, beside as many threads that copy the same rows and send nothing; and what a batch
/// costs the processor.
fn random_rows(settings: &Settings, memory: &MemoryManager, rows: &Rows, report: &mut Report) {
    let (row, span) = ("staged, random rows of 150,528 B from memory", settings.span);
    let work = Work::new(rows.batch, settings.workers, Path::Staged);
    let entry = Entry::ours(row, "staged", "samples/s").share_of(THREADS, 0.9);
    let contenders = vec![
        contender(memory, rows, rows.dataset(), &work, entry, span),
        threads(row, rows, settings.workers, span),
    ];
    in_turn(report, settings.rounds, contenders);

    let flow = Flow::verified(memory, rows, rows.dataset(), &work).expect("the staged path");
    submission(settings, "a batch of 38.5 MB, staged", &flow, report);
}

/// What a batch takes whoever submits it, and all threads together.
fn submission(settings: &Settings, row: &str, flow: &Flow, report: &mut Report) {
    let (mut submitting, mut all) = (Vec::new(), Vec::new());
    for _ in 0..settings.rounds {
        let before = flow.stats();
        let stretch = flow.stretch(settings.span);
        let after = flow.stats();
        let batches = (after.batches_produced - before.batches_produced).max(1) as f64;
        let spent = after.stages.submitter.working - before.stages.submitter.working;
        submitting.push(spent.as_secs_f64() * 1e6 / batches);
        all.push(stretch.cpu.as_secs_f64() * 1e6 / stretch.batches as f64);
    }
    report.add(Entry::ours(row, "submitting it", "µs").runs(submitting).at_most(15.0));
    report.add(Entry::ours(row, "processor time of all threads", "µs").runs(all));
}

/// Threads that copy random rows into a few buffers, wait for nobody and send nothing.
pub(crate) fn threads<'a>(row: &str, rows: &Rows, workers: usize, span: Duration) -> Contender<'a> {
    const SLOTS: usize = 5;
    let (rows, order) = (rows.clone(), Permutation::new(rows.len(), SEED));
    let mut slots: Vec<Vec<u8>> = (0..SLOTS).map(|_| vec![1; small(rows.batch_bytes())]).collect();
    let mut count = 4 * rows.batch;
    let entry = Entry::new(row, THREADS, Kind::Threads, "samples/s").with("sample_bytes", rows.row);
    let run = move || {
        // A piece of several rows is claimed at once where they are small.
        let piece = (16_384 / rows.row as u64).clamp(1, rows.batch);
        let (began, next) = (Instant::now(), AtomicU64::new(0));
        // As numbers, to be shared between threads.
        let starts: Vec<usize> =
            slots.iter_mut().map(|slot| slot.as_mut_ptr().expose_provenance()).collect();
        std::thread::scope(|scope| {
            for _ in 0..workers {
                scope.spawn(|| {
                    loop {
                        let first = next.fetch_add(piece, Ordering::Relaxed);
                        if first >= count {
                            return;
                        }
                        for position in first..(first + piece).min(count) {
                            let from = rows.get(order.index(position % rows.len()));
                            let slot = starts[small(position / rows.batch) % SLOTS];
                            let at = slot + small(position % rows.batch) * rows.row;
                            let to = std::ptr::with_exposed_provenance_mut::<u8>(at);
                            // SAFETY: each position has a place of its own within a slot, and a
                            // slot comes round only after four others; what it holds is not read.
                            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to, rows.row) };
                        }
                    }
                });
            }
        });
        let seconds = began.elapsed().as_secs_f64();
        let rate = count as f64 / seconds;
        let batches = (rate * span.as_secs_f64() / rows.batch as f64) as u64;
        count = batches.max(4) * rows.batch;
        Figure::from(rate)
    };
    Contender::new(entry, run)
}

/// From `start` until the first batch has arrived, staged.
fn first_batch(settings: &Settings, memory: &MemoryManager, rows: &Rows, report: &mut Report) {
    let work = Work::new(rows.batch, settings.workers, Path::Staged);
    let (mut starting, mut arriving) = (Vec::new(), Vec::new());
    for _ in 0..=settings.rounds {
        let loader = work.loader(memory, rows.dataset());
        let began = Instant::now();
        loader.start().expect("it starts");
        let started = began.elapsed();
        let batch = loader.get_batch().expect("a batch").expect("a first one");
        batch.wait().expect("it arrives");
        starting.push(started.as_secs_f64() * 1e3);
        arriving.push((began.elapsed() - started).as_secs_f64() * 1e3);
    }
    // The first time memory is page-locked that is kept from then on.
    let row = "the first batch of 38.5 MB, staged";
    let (cold, starting) = starting.split_at(1);
    report.add(Entry::ours(row, "start, the first time", "ms").runs(cold.to_vec()));
    report.add(Entry::ours(row, "start, again", "ms").runs(starting.to_vec()));
    let arriving = arriving[1..].to_vec();
    report.add(Entry::ours(row, "after start", "ms").runs(arriving).at_most(10.0));
}

/// `get_batch` when batches are ready.
fn hand_over(settings: &Settings, memory: &MemoryManager, report: &mut Report) {
    let spec = SampleSpec::new(DType::U8, &[64, 64]).expect("a shape");
    let work = Work::new(settings.pick(256, 4), settings.workers.min(4), Path::Staged);
    let flow = Flow::start(work.loader(memory, AtOnce(spec, 1 << 20)));
    let (mut medians, mut tails) = (Vec::new(), Vec::new());
    for _ in 0..settings.rounds {
        let mut calls: Vec<f64> = (0..settings.pick(1000, 20))
            .map(|_| {
                while flow.stats().queued_batches < 2 {
                    std::thread::sleep(Duration::from_micros(50));
                }
                let began = Instant::now();
                let batch = flow.next();
                let took = began.elapsed();
                drop(batch);
                took.as_secs_f64() * 1e6
            })
            .collect();
        medians.push(median(&calls));
        calls.sort_by(f64::total_cmp);
        tails.push(calls[calls.len() * 99 / 100]);
    }
    let row = "get_batch, a batch is ready";
    report.add(Entry::ours(row, "median of 1000", "µs").runs(medians).at_most(2.0));
    report.add(Entry::ours(row, "99th percentile", "µs").runs(tails));
}

/// The conversion of images to normalised floats.
pub(crate) fn normalized() -> Conversion {
    Conversion::new().normalize(&[123.7, 116.3, 103.5], &[58.4, 57.1, 57.4])
}

/// The same, and to the order of channels that most models take.
pub(crate) fn planes() -> Conversion {
    normalized().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw)
}

/// The kernel alone: a batch of `u8` to normalised floats.
fn conversion(settings: &Settings, memory: &MemoryManager, batch: u64, report: &mut Report) {
    let commands = CommandBufferPool::new(memory, 2).expect("command buffers");
    let shape = [batch, 224, 224, 3];
    let pixels: Vec<u8> =
        (0..shape.iter().product::<u64>()).map(|place| (place % 251) as u8).collect();
    let source = memory.upload(&pixels, &shape).expect("device memory");
    let host = MemoryManager::new(&Device::host()).upload(&pixels, &shape).expect("memory");
    for to in [DType::F32, DType::BF16] {
        for (name, conversion) in [("NHWC kept", normalized()), ("to NCHW", planes())] {
            let shape = conversion.shape(source.shape()).expect("an image");
            let target = memory.tensor(shape.dims(), to).expect("device memory");
            let run = |count: u64| {
                let mut buffer = commands.get_buffer().expect("a command buffer");
                for _ in 0..count {
                    buffer.convert(&source, &target, &conversion).expect("it fits");
                }
                let began = Instant::now();
                buffer.execute().expect("it is submitted").wait().expect("it is done");
                began.elapsed().as_secs_f64()
            };
            run(2);
            let expected = host.convert(to, &conversion).and_then(|tensor| tensor.to_bytes());
            assert!(target.to_bytes().expect("it can be read back") == expected.expect("memory"));
            let moved = (source.byte_len() + target.byte_len()) as f64 / 1e12;
            // The difference of two runs leaves out what a submission costs.
            let (many, few) = settings.pick((500, 100), (4, 2));
            let rates = (0..settings.rounds)
                .map(|_| moved * (many - few) as f64 / (run(many) - run(few)).max(1e-9))
                .collect();
            let entry = Entry::ours(
                "convert a batch of 38.5 MB of u8, normalised",
                &format!("to {to}, {name}"),
                "TB/s",
            );
            let entry = if to == DType::F32 { entry.at_least(2.4) } else { entry };
            report.add(entry.runs(rates));
        }
    }
}

/// The wgpu device, staged.
#[cfg(feature = "wgpu")]
fn wgpu(settings: &Settings, rows: &Rows, report: &mut Report) {
    let entry = Entry::ours("wgpu, random rows of 150,528 B from memory", "staged", "samples/s");
    let device = match Device::wgpu() {
        Ok(device) => device,
        Err(error) => return report.add(entry.with("note", error.chain())),
    };
    let memory = MemoryManager::new(&device);
    let work = Work::new(rows.batch, settings.workers, Path::Staged);
    let entry = entry.with("device", &*device.info().name);
    let contenders = vec![contender(&memory, rows, rows.dataset(), &work, entry, settings.span)];
    in_turn(report, settings.rounds, contenders);
}
