//! A loader that runs, and what it delivers in a stretch of time.

use std::time::{Duration, Instant};

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, AsyncDataLoaderStats, Conversion, DType, Dataset,
    GpuBatch, MemoryManager,
};
use cpu_time::ProcessTime;

use crate::data::{Rows, SEED};
use crate::path::Path;
use crate::report::{Contender, Entry, Figure, WRONG};

/// Batches that are compared byte by byte before anything is timed.
const COMPARED: u64 = 3;
/// Batches that may lie ready when a stretch begins, and a few more.
const READY: usize = 8;

/// How a loader is to work.
#[derive(Debug, Clone)]
pub(crate) struct Work {
    pub(crate) batch: u64,
    pub(crate) workers: usize,
    pub(crate) path: Path,
    pub(crate) convert: Option<(DType, Conversion)>,
}

impl Work {
    pub(crate) fn new(batch: u64, workers: usize, path: Path) -> Self {
        Self { batch, workers, path, convert: None }
    }

    pub(crate) fn convert(mut self, to: DType, conversion: Conversion) -> Self {
        self.convert = Some((to, conversion));
        self
    }

    /// A loader that goes on for ever in random order, not started.
    pub(crate) fn loader(
        &self,
        memory: &MemoryManager,
        dataset: impl Dataset + 'static,
    ) -> AsyncDataLoader {
        let config = AsyncDataLoaderConfig::builder()
            .batch_size(self.batch)
            .workers(self.workers)
            .shuffle(true)
            .seed(SEED)
            .endless()
            .memory_manager(memory.clone());
        let mut config = self.path.set(config);
        if let Some((to, conversion)) = self.convert.clone() {
            config = config.convert(to, conversion);
        }
        let config = config.build().expect("the settings are good");
        AsyncDataLoader::new(dataset, config).expect("there are samples")
    }
}

/// See the [module](self).
pub(crate) struct Flow {
    pub(crate) loader: AsyncDataLoader,
    /// From the call of `start` until the first batch had arrived, with all that is made once.
    pub(crate) first: Duration,
}

impl Flow {
    pub(crate) fn start(loader: AsyncDataLoader) -> Self {
        let began = Instant::now();
        loader.start().expect("it starts");
        let batch = loader.get_batch().expect("a batch").expect("there is no end");
        batch.wait().expect("it arrives");
        Self { first: began.elapsed(), loader }
    }

    /// A loader of these rows, whose first batches were compared byte by byte; or why there is
    /// none: it can't go the way that was asked for, it fails, or the bytes are [`WRONG`].
    pub(crate) fn verified(
        memory: &MemoryManager,
        rows: &Rows,
        dataset: impl Dataset + 'static,
        work: &Work,
    ) -> Result<Self, String> {
        let failed = |error: batchline::Error| error.chain();
        let loader = work.loader(memory, dataset);
        let began = Instant::now();
        loader.start().map_err(failed)?;
        let mut first = Duration::ZERO;
        for number in 0..COMPARED.min(rows.len() / rows.batch) {
            let batch = loader.get_batch().map_err(failed)?.expect("there is no end");
            batch.wait().map_err(failed)?;
            if number == 0 {
                first = began.elapsed();
            }
            work.path.check(&loader.stats())?;
            let arrived = batch.input_tensor().to_bytes().map_err(failed)?;
            if arrived != rows.expected(number, work.convert.as_ref()) {
                return Err(format!("{WRONG}: in batch {number}"));
            }
        }
        Ok(Self { loader, first })
    }

    pub(crate) fn next(&self) -> GpuBatch {
        self.loader.get_batch().expect("a batch").expect("there is no end")
    }

    pub(crate) fn stats(&self) -> AsyncDataLoaderStats {
        self.loader.stats()
    }

    /// Takes batches for about this long, and drops each at once.
    pub(crate) fn stretch(&self, span: Duration) -> Stretch {
        // What lay ready would count as if it had been loaded in no time.
        (0..READY).for_each(|_| drop(self.next()));
        let (cpu, began) = (ProcessTime::now(), Instant::now());
        let (mut batches, mut samples, mut bytes) = (0, 0, 0);
        loop {
            let batch = self.next();
            batches += 1;
            samples += batch.len();
            bytes += batch.input_tensor().byte_len();
            if began.elapsed() >= span {
                batch.wait().expect("it arrives");
                break;
            }
        }
        let (wall, cpu) = (began.elapsed(), cpu.elapsed());
        Stretch { batches, samples, bytes, wall, cpu }
    }
}

/// What was delivered, and what it took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch {
    pub(crate) batches: u64,
    pub(crate) samples: u64,
    /// As they lie on the device.
    pub(crate) bytes: u64,
    pub(crate) wall: Duration,
    /// Of all threads.
    pub(crate) cpu: Duration,
}

impl Stretch {
    pub(crate) fn samples_per_second(&self) -> Figure {
        let wall = self.wall.as_secs_f64();
        Figure { value: self.samples as f64 / wall, cores: Some(self.cpu.as_secs_f64() / wall) }
    }
}

/// A contender that loads these rows in this way. Where the path can't be had, an entry without
/// figures that says why.
pub(crate) fn contender<'a>(
    memory: &MemoryManager,
    rows: &Rows,
    dataset: impl Dataset + 'static,
    work: &Work,
    entry: Entry,
    span: Duration,
) -> Contender<'a> {
    let entry = entry.with("sample_bytes", rows.row);
    match Flow::verified(memory, rows, dataset, work) {
        Ok(flow) => {
            let entry = entry
                .with("first_batch_ms", flow.first.as_secs_f64() * 1e3)
                .with("path_reason", flow.stats().path_reason);
            Contender::new(entry, move || flow.stretch(span).samples_per_second())
        }
        Err(reason) => Contender::left_out(entry.with("note", reason)),
    }
}
