//! The loader's settings.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::route::{Gather, Residency};
use crate::plan::{LastBatch, Sampler, Shard};
use crate::{Conversion, DType, Device, Error, LoaderState, MemoryManager, Result};

/// The settings of an [`AsyncDataLoader`](crate::AsyncDataLoader). Made by
/// [`builder`](Self::builder); nonsense is refused there, with the remedy.
///
/// ```
/// use batchline::{AsyncDataLoaderConfig, Device};
/// let config = AsyncDataLoaderConfig::builder()
///     .batch_size(256)
///     .workers(8)
///     .shuffle(true)
///     .device(Device::host())
///     .build()?;
/// let error = AsyncDataLoaderConfig::builder().batch_size(0).build().unwrap_err();
/// assert_eq!(error.to_string(), "batch_size is 0: ask for at least one sample per batch");
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Clone)]
pub struct AsyncDataLoaderConfig {
    /// Samples per batch and rank.
    pub(crate) batch_size: u64,
    /// Batches that are prepared ahead of the consumer.
    pub(crate) prefetch_depth: usize,
    /// Threads that read samples.
    pub(crate) workers: usize,
    /// Batches that the consumer may hold without slowing the pipeline down.
    pub(crate) max_held: usize,
    /// The device's memory.
    pub(crate) memory: MemoryManager,
    /// `None`: for ever.
    pub(crate) epochs: Option<u64>,
    pub(crate) shuffle: bool,
    pub(crate) seed: u64,
    pub(crate) sampler: Option<Arc<dyn Sampler>>,
    pub(crate) last_batch: LastBatch,
    pub(crate) shard: Shard,
    pub(crate) error_policy: ErrorPolicy,
    /// What the device makes of the input tensor.
    pub(crate) convert: Option<(DType, Conversion)>,
    pub(crate) residency: Residency,
    pub(crate) gather: Gather,
    /// Where to start; the beginning if `None`.
    pub(crate) resume: Option<LoaderState>,
    /// How long `stop` waits for a source that does not return.
    pub(crate) stop_timeout: Duration,
}

/// What becomes of a sample that can't be read. A panic of the source counts as an error.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum ErrorPolicy {
    /// The stream ends with the error, behind all batches before it.
    #[default]
    Fail,
    /// The sample is left out: its batch is shorter, the others are unchanged. The skip is counted
    /// and listed with its reason, and part of the saved state.
    Skip {
        /// With one more the stream ends with an error.
        at_most: u64,
    },
    /// The sample is read again, then the stream ends with the error.
    Retry {
        /// How often it is read again.
        times: u32,
        /// The wait before the first repetition; it doubles with each.
        backoff: Duration,
    },
}

/// Builds an [`AsyncDataLoaderConfig`].
#[derive(Clone, Default)]
#[must_use = "nothing is configured until `build`"]
pub struct ConfigBuilder {
    batch_size: Option<u64>,
    prefetch_depth: Option<usize>,
    workers: Option<usize>,
    max_held: Option<usize>,
    memory: Option<MemoryManager>,
    epochs: Option<Option<u64>>,
    shuffle: bool,
    seed: u64,
    sampler: Option<Arc<dyn Sampler>>,
    last_batch: LastBatch,
    shard: Shard,
    error_policy: ErrorPolicy,
    convert: Option<(DType, Conversion)>,
    residency: Residency,
    gather: Gather,
    resume: Option<LoaderState>,
    stop_timeout: Option<Duration>,
}

impl AsyncDataLoaderConfig {
    /// A builder. Only the batch size must be given.
    pub fn builder() -> ConfigBuilder {
        ConfigBuilder::default()
    }
}

impl ConfigBuilder {
    /// Samples per batch; with several ranks, per batch of one rank. Required.
    pub fn batch_size(mut self, samples: u64) -> Self {
        self.batch_size = Some(samples);
        self
    }

    /// Batches that are prepared ahead of the consumer; 3 by default.
    pub fn prefetch_depth(mut self, batches: usize) -> Self {
        self.prefetch_depth = Some(batches);
        self
    }

    /// Threads that read samples; 2 by default. All of them work on the same batch, so more of them
    /// bring each batch sooner and take no more memory.
    pub fn workers(mut self, threads: usize) -> Self {
        self.workers = Some(threads);
        self
    }

    /// Batches that the consumer may hold while [`prefetch_depth`](Self::prefetch_depth) others are
    /// prepared; 2 by default. Who holds more slows the pipeline down; who holds all that there are
    /// and asks for another gets [`Error::TooManyHeld`].
    pub fn max_held(mut self, batches: usize) -> Self {
        self.max_held = Some(batches);
        self
    }

    /// The device's memory, with its limits. By default that of [`Device::auto`].
    pub fn memory_manager(mut self, memory: MemoryManager) -> Self {
        self.memory = Some(memory);
        self
    }

    /// The device, with the default [`MemoryLimits`](crate::MemoryLimits).
    pub fn device(self, device: Device) -> Self {
        self.memory_manager(MemoryManager::new(&device))
    }

    /// How often the data are gone through; once by default. With a resume this counts the epochs
    /// before it too.
    pub fn epochs(mut self, epochs: u64) -> Self {
        self.epochs = Some(Some(epochs));
        self
    }

    /// Goes through the data again and again.
    pub fn endless(mut self) -> Self {
        self.epochs = Some(None);
        self
    }

    /// Whether each epoch has an order of its own, given by the seed. Needs a
    /// [`Dataset`](crate::Dataset).
    pub fn shuffle(mut self, shuffle: bool) -> Self {
        self.shuffle = shuffle;
        self
    }

    /// The seed of the order and of [`SampleMut::random_seed`](crate::SampleMut::random_seed); 0 by
    /// default.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// An order of your own. Needs a [`Dataset`](crate::Dataset).
    pub fn sampler(mut self, sampler: impl Sampler + 'static) -> Self {
        self.sampler = Some(Arc::new(sampler));
        self
    }

    /// Whether samples that don't make up a whole batch are left out at the end of an epoch; false
    /// by default.
    pub fn drop_last(self, drop: bool) -> Self {
        self.last_batch(if drop { LastBatch::Drop } else { LastBatch::Keep })
    }

    /// What becomes of the samples that don't make up a whole batch.
    pub fn last_batch(mut self, last: LastBatch) -> Self {
        self.last_batch = last;
        self
    }

    /// The part of the stream that this process gets; all by default. Needs a
    /// [`Dataset`](crate::Dataset).
    pub fn shard(mut self, rank: u64, world_size: u64) -> Self {
        self.shard = Shard { rank, world_size };
        self
    }

    /// What becomes of samples that can't be read.
    pub fn error_policy(mut self, policy: ErrorPolicy) -> Self {
        self.error_policy = policy;
        self
    }

    /// Has the device convert the input tensor: the source's own elements cross the link, the
    /// consumer gets these. Where a kernel fetches the samples, it may convert them on the way; else
    /// they are converted behind the copies.
    pub fn convert(mut self, dtype: DType, conversion: Conversion) -> Self {
        self.convert = Some((dtype, conversion));
        self
    }

    /// Where the samples are kept: with [`Residency::Device`] all of them are uploaded at the first
    /// start, if that can be done, and batches are made on the device.
    pub fn residency(mut self, residency: Residency) -> Self {
        self.residency = residency;
        self
    }

    /// Whether, and by what, the device fetches samples of a data set in memory by itself. With
    /// [`Gather::Auto`], which is the default, it does where it can: the data set's memory is then
    /// page-locked, and counts against `staging_limit`.
    pub fn gather(mut self, gather: Gather) -> Self {
        self.gather = gather;
        self
    }

    /// Starts where a saved state ends.
    pub fn resume_from(mut self, state: LoaderState) -> Self {
        self.resume = Some(state);
        self
    }

    /// How long `stop` waits for a source that does not return from a call, before it detaches the
    /// worker; 5 seconds by default.
    pub fn stop_timeout(mut self, timeout: Duration) -> Self {
        self.stop_timeout = Some(timeout);
        self
    }

    /// The settings, checked.
    ///
    /// # Errors
    /// [`Error::Config`]: what is wrong, and the remedy.
    pub fn build(self) -> Result<AsyncDataLoaderConfig> {
        let batch_size = self.batch_size.ok_or_else(|| {
            Error::config("batch_size", "is missing", "say how many samples make a batch")
        })?;
        let (prefetch_depth, workers) =
            (self.prefetch_depth.unwrap_or(3), self.workers.unwrap_or(2));
        let max_held = self.max_held.unwrap_or(2);
        let epochs = self.epochs.unwrap_or(Some(1));
        let Shard { rank, world_size } = self.shard;
        for (setting, is_zero, remedy) in [
            ("batch_size", batch_size == 0, "ask for at least one sample per batch"),
            ("prefetch_depth", prefetch_depth == 0, "prepare at least one batch ahead"),
            ("workers", workers == 0, "use at least one thread"),
            ("max_held", max_held == 0, "let the consumer hold at least one batch"),
            ("epochs", epochs == Some(0), "ask for at least one epoch, or for `endless`"),
            ("world_size", world_size == 0, "there is at least one process"),
        ] {
            if is_zero {
                return Err(Error::config(setting, "is 0", remedy));
            }
        }
        if rank >= world_size {
            return Err(Error::config(
                "rank",
                format!("{rank} is not below world_size {world_size}"),
                "ranks count from 0",
            ));
        }
        if workers > 1024 {
            let problem = format!("{workers} are more than 1024");
            return Err(Error::config("workers", problem, "a few per core are plenty"));
        }
        if prefetch_depth.checked_add(max_held).is_none_or(|outputs| outputs > 65_536) {
            let problem = format!("{prefetch_depth} with max_held {max_held} is too many");
            return Err(Error::config("prefetch_depth", problem, "a few batches are plenty"));
        }
        if batch_size.checked_mul(world_size).is_none() {
            return Err(Error::Overflow { what: "batch_size times world_size".to_owned() });
        }
        if self.shuffle && self.sampler.is_some() {
            let remedy = "use one of the two: a sampler gives the order";
            return Err(Error::config("shuffle", "is set beside a sampler", remedy));
        }
        let memory = self.memory.unwrap_or_else(|| MemoryManager::new(&Device::auto()));
        Ok(AsyncDataLoaderConfig {
            batch_size,
            prefetch_depth,
            workers,
            max_held,
            memory,
            epochs,
            shuffle: self.shuffle,
            seed: self.seed,
            sampler: self.sampler,
            last_batch: self.last_batch,
            shard: self.shard,
            error_policy: self.error_policy,
            convert: self.convert,
            residency: self.residency,
            gather: self.gather,
            resume: self.resume,
            stop_timeout: self.stop_timeout.unwrap_or(Duration::from_secs(5)),
        })
    }
}

impl fmt::Debug for AsyncDataLoaderConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncDataLoaderConfig")
            .field("batch_size", &self.batch_size)
            .field("prefetch_depth", &self.prefetch_depth)
            .field("workers", &self.workers)
            .field("max_held", &self.max_held)
            .field("epochs", &self.epochs)
            .field("shuffle", &self.shuffle)
            .field("seed", &self.seed)
            .field("last_batch", &self.last_batch)
            .field("shard", &self.shard)
            .field("error_policy", &self.error_policy)
            .field("convert", &self.convert)
            .field("residency", &self.residency)
            .field("gather", &self.gather)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for ConfigBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConfigBuilder")
            .field("batch_size", &self.batch_size)
            .finish_non_exhaustive()
    }
}
