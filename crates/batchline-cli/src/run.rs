//! `batchline run`: loads a data set onto a device, batch by batch.

use std::time::{Duration, Instant};

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, AsyncDataLoaderStats, ConfigBuilder, Dataset, Device,
    ErrorPolicy, GpuBatch, LoaderState, MemoryLimits, MemoryManager, Residency, SampleSpec,
    formats,
};
use sha2::{Digest, Sha256};

use crate::devices;
use crate::failure::Failure;
use crate::options::RunOptions;
use crate::output::{print, print_json};
use crate::progress::Progress;
use crate::summary::Summary;

/// What a run was and what came of it.
#[derive(Debug)]
pub(crate) struct Outcome {
    /// Samples of the data set.
    pub(crate) len: u64,
    /// What a sample is made of.
    pub(crate) spec: SampleSpec,
    pub(crate) device: Device,
    /// Where the stream is now.
    pub(crate) state: LoaderState,
    pub(crate) stats: AsyncDataLoaderStats,
    /// From the start until the last batch was on the device and all threads had ended.
    pub(crate) took: Duration,
    /// Whether everything was delivered, rather than stopped before.
    pub(crate) complete: bool,
    /// Of all batches, in hexadecimal.
    pub(crate) checksum: Option<String>,
}

/// Does what the options say and prints the summary.
pub(crate) fn run(options: &RunOptions) -> Result<(), Failure> {
    let outcome = load(options)?;
    let summary = Summary::new(options, &outcome);
    if options.json { print_json(&summary) } else { print(&summary.to_string()) }
}

/// Loads the data set.
fn load(options: &RunOptions) -> Result<Outcome, Failure> {
    let mut settings = settings(options)?;
    // Nonsense is told before anything is looked for or opened.
    settings.clone().device(Device::host()).build()?;
    let dataset = formats::open(&options.dataset)?;
    let (len, spec) = (dataset.len(), dataset.spec().clone());
    if let Some((dtype, conversion)) = options.conversion(spec.input().shape)? {
        settings = settings.convert(dtype, conversion);
    }
    let device = devices::open(options.device)?;
    let memory = MemoryManager::with_limits(&device, limits(options));
    let loader = AsyncDataLoader::new(dataset, settings.memory_manager(memory).build()?)?;
    let mut progress = Progress::new(batches_ahead(&loader, options), options.epochs, options.json);
    let mut checksum = options.checksum.then(Sha256::new);
    let started = Instant::now();
    loader.start()?;
    // A place that can't be written is noticed now rather than after hours.
    save(&loader, options)?;
    let complete = take(&loader, options, &mut progress, checksum.as_mut());
    let (stats, state) = (loader.stats(), loader.state());
    // Waits for what is still on its way to the device, too.
    let stopped = loader.stop().and_then(|()| device.check());
    let took = started.elapsed();
    drop(progress);
    // Whatever happened: what was delivered need not be loaded again.
    let saved = save(&loader, options);
    let complete = complete?;
    stopped?;
    saved?;
    let checksum = checksum.map(|checksum| format!("{:x}", checksum.finalize()));
    Ok(Outcome { len, spec, device, state, stats, took, complete, checksum })
}

/// Takes the batches, as many as there are or were asked for; whether those were all.
fn take(
    loader: &AsyncDataLoader,
    options: &RunOptions,
    progress: &mut Progress,
    mut checksum: Option<&mut Sha256>,
) -> Result<bool, Failure> {
    let mut left = options.max_batches.map_or(u64::MAX, u64::from);
    while left > 0 {
        let Some(batch) = loader.get_batch()? else { return Ok(true) };
        left -= 1;
        progress.note(&batch);
        if let Some(checksum) = &mut checksum {
            add(checksum, &batch)?;
        }
        if batch.is_last_in_epoch() {
            // For a run that is killed.
            save(loader, options)?;
        }
    }
    Ok(is_over(loader, options))
}

/// The loader's settings, but for what depends on the data set and the device.
fn settings(options: &RunOptions) -> Result<ConfigBuilder, Failure> {
    if options.normalize.is_some() && options.convert.is_none() {
        return Err(Failure::usage(
            "--normalize needs --convert: say what the device is to make of the input, as in \
             --convert f32",
        ));
    }
    let mut settings = AsyncDataLoaderConfig::builder()
        .batch_size(options.batch_size)
        .workers(options.worker_threads())
        .prefetch_depth(options.prefetch_depth)
        .epochs(options.epochs)
        .shuffle(options.shuffle)
        .seed(options.seed)
        .drop_last(options.drop_last)
        .shard(options.rank, options.world_size)
        .gather(options.gather.into());
    if options.resident {
        settings = settings.residency(Residency::Device);
    }
    if let Some(at_most) = options.skip_errors {
        settings = settings.error_policy(ErrorPolicy::Skip { at_most });
    }
    // What can't be looked at is not taken for missing: loading it tells what is wrong.
    if let Some(path) = &options.state
        && !matches!(path.try_exists(), Ok(false))
    {
        settings = settings.resume_from(LoaderState::load(path)?);
    }
    Ok(settings)
}

fn limits(options: &RunOptions) -> MemoryLimits {
    let mut limits = MemoryLimits::default();
    if let Some(bytes) = options.device_limit {
        limits = limits.device_limit(bytes);
    }
    if let Some(bytes) = options.staging_limit {
        limits = limits.staging_limit(bytes);
    }
    limits
}

fn save(loader: &AsyncDataLoader, options: &RunOptions) -> Result<(), Failure> {
    match &options.state {
        Some(path) => Ok(loader.state().save(path)?),
        None => Ok(()),
    }
}

/// How many batches there are to come.
fn batches_ahead(loader: &AsyncDataLoader, options: &RunOptions) -> Option<u64> {
    let per_epoch = loader.batches_per_epoch()?;
    let LoaderState { epoch, position, .. } = loader.state();
    let all = per_epoch.saturating_mul(options.epochs.saturating_sub(epoch));
    let ahead = all.saturating_sub(position);
    Some(options.max_batches.map_or(ahead, |most| ahead.min(most.into())))
}

/// Whether the last batch there is was delivered.
fn is_over(loader: &AsyncDataLoader, options: &RunOptions) -> bool {
    loader.state().epoch >= options.epochs
}

/// Adds a batch to the checksum: the bytes of the input, then those of the label, as they come back
/// from the device.
fn add(checksum: &mut Sha256, batch: &GpuBatch) -> batchline::Result<()> {
    checksum.update(batch.input_tensor().to_bytes()?);
    if let Some(label) = batch.label_tensor() {
        checksum.update(label.to_bytes()?);
    }
    Ok(())
}
