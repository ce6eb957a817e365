//! The loader: reads samples with several threads, packs them into batches, moves them to the
//! device, and hands them out in order. `README.md` beside this file tells the protocol.

mod buffers;
mod config;
mod deliver;
mod feed;
mod iterate;
mod pipeline;
mod route;
mod slot;
mod stop;
mod submitter;
mod ticket;
mod worker;

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use config::{AsyncDataLoaderConfig, ConfigBuilder, ErrorPolicy};
#[cfg(feature = "async")]
pub use iterate::BatchStream;
pub use iterate::Batches;
pub use route::{Gather, LoadPath, Residency};

use feed::Feed;
use pipeline::Pipeline;
use route::Route;

use crate::memory::Patience;
use crate::plan::LastBatch;
use crate::source::{DataSource, Dataset};
use crate::stats::{AsyncDataLoaderStats, Stages};
use crate::sync::{self, Mutex};
use crate::{Error, GpuBatch, LoaderState, MemoryManager, Result};

/// What there was when the consumer asked.
#[derive(Debug)]
pub enum Delivery {
    /// The next batch.
    Ready(GpuBatch),
    /// Nothing yet; more will come.
    NotYet,
    /// Nothing any more: everything was delivered.
    End,
}

/// Loads batches onto a device in the background.
///
/// Batches come in order, each once, with the same bytes for any number of workers. An error comes
/// behind the batches before it, and again at every later call. Dropping the loader stops it.
///
/// ```
/// use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Device, HostTensor, InMemory};
/// let images = HostTensor::new(vec![0u8; 100 * 784], &[100, 784])?;
/// let labels = HostTensor::new((0..100i64).collect(), &[100])?;
/// let dataset = InMemory::new(images)?.labels(labels)?;
///
/// let config = AsyncDataLoaderConfig::builder()
///     .batch_size(32)
///     .shuffle(true)
///     .device(Device::host())
///     .build()?;
/// let loader = AsyncDataLoader::new(dataset, config)?;
/// loader.start()?;
/// let mut samples = 0;
/// for batch in &loader {
///     samples += batch?.len();
/// }
/// assert_eq!(samples, 100);
/// # Ok::<(), batchline::Error>(())
/// ```
pub struct AsyncDataLoader {
    config: Arc<AsyncDataLoaderConfig>,
    feed: Arc<Feed>,
    /// Of the data set. It may take long to find out, so that is left to who needs it.
    fingerprint: OnceLock<u64>,
    life: Mutex<Life>,
    /// The way to the device, chosen at the first start. It holds what was registered or uploaded.
    route: Mutex<Option<Arc<Route>>>,
    /// Held while the loader is started or stopped.
    changing: Mutex<()>,
}

/// Which generation runs.
#[derive(Debug, Default)]
struct Life {
    generation: u64,
    /// The newest generation, running, over, or stopped.
    current: Option<Arc<Pipeline>>,
    started: bool,
}

impl AsyncDataLoader {
    /// A loader of a data set. It does nothing until [`start`](Self::start).
    ///
    /// # Errors
    /// [`Error::Config`]: no samples, or too few for one batch with `drop_last`;
    /// [`Error::State`]: the state to resume from belongs to another stream.
    pub fn new(dataset: impl Dataset + 'static, config: AsyncDataLoaderConfig) -> Result<Self> {
        let feed = Feed::dataset(Arc::new(dataset), &config)?;
        Self::of(feed, config)
    }

    /// A loader of a source that yields batches one after another.
    ///
    /// # Errors
    /// [`Error::Config`]: a setting that needs random access; [`Error::State`] as for
    /// [`new`](Self::new).
    pub fn from_source(
        source: impl DataSource + 'static,
        config: AsyncDataLoaderConfig,
    ) -> Result<Self> {
        let feed = Feed::source(Box::new(source), &config)?;
        Self::of(feed, config)
    }

    fn of(feed: Feed, config: AsyncDataLoaderConfig) -> Result<Self> {
        let fingerprint = OnceLock::new();
        if config.resume.is_some() || matches!(feed, Feed::Source { .. }) {
            // A source can't be asked while it is being read.
            let _ = fingerprint.set(feed.fingerprint());
        }
        if let (Some(state), Some(fingerprint)) = (&config.resume, fingerprint.get()) {
            feed.check(state, *fingerprint, &config)?;
        }
        let (config, feed) = (Arc::new(config), Arc::new(feed));
        Ok(Self {
            config,
            feed,
            fingerprint,
            life: Mutex::new(Life::default()),
            route: Mutex::new(None),
            changing: Mutex::new(()),
        })
    }

    /// Allocates the buffers, starts the threads, and begins to read. The first time it chooses the
    /// [path](crate::guide::paths) to the device, and registers or uploads the data set for it, which
    /// takes its time and is not cut short by a `stop`. After a
    /// [`stop`](Self::stop) it begins anew, where the settings say: at the beginning, or at the
    /// state to resume from. Each start is a new generation.
    ///
    /// # Errors
    /// [`Error::Lifecycle`]: it is started already, or a pull source has not returned from a call
    /// since it was stopped; the buffers can't be allocated; the device is lost.
    pub fn start(&self) -> Result<()> {
        self.check_process()?;
        let _changing = self.changing.lock();
        let life = self.life.lock();
        if life.started {
            let remedy = "call `stop` before you start it again";
            return Err(Error::Lifecycle { state: "started already", remedy });
        }
        if let Some(old) = &life.current
            && matches!(*self.feed, Feed::Source { .. })
            && old.is_alive()
        {
            let remedy = "the source has not returned from a call; wait for it";
            return Err(Error::Lifecycle { state: "still stopping", remedy });
        }
        let generation = life.generation + 1;
        // Registering or uploading takes time; others may ask meanwhile.
        drop(life);
        let pipeline = self.begin(generation)?;
        let mut life = self.life.lock();
        life.current = Some(pipeline);
        (life.generation, life.started) = (generation, true);
        Ok(())
    }

    /// Starts a generation, by the way that was chosen before or is now.
    fn begin(&self, generation: u64) -> Result<Arc<Pipeline>> {
        let started = sync::now();
        let start = |route: &Arc<Route>| {
            let (config, feed) = (Arc::clone(&self.config), Arc::clone(&self.feed));
            Pipeline::start(config, feed, Arc::clone(route), generation, started)
        };
        let mut place = self.route.lock();
        if let Some(route) = &*place {
            return start(route);
        }
        let mut against = Vec::new();
        loop {
            let route = Arc::new(self.choose(&against)?);
            match start(&route) {
                // What was registered or uploaded leaves no room for the batches.
                Err(error @ (Error::LimitReached { .. } | Error::TooLarge { .. }))
                    if route.path != LoadPath::Staged =>
                {
                    against.push((route.path, error.chain()));
                }
                Err(error) => return Err(error),
                Ok(pipeline) => {
                    pipeline.counters.transferred.fetch_add(route.uploaded, Ordering::Relaxed);
                    *place = Some(route);
                    return Ok(pipeline);
                }
            }
        }
    }

    /// Chooses the way to the device; `against` has reasons against some.
    fn choose(&self, against: &[(LoadPath, String)]) -> Result<Route> {
        let choose = AssertUnwindSafe(|| Route::choose(&self.feed, &self.config, against));
        catch_unwind(choose).unwrap_or_else(|panic| Err(Error::panicked("the data set", &*panic)))
    }

    /// Ends the generation: threads leave and are joined, batches that nobody took are dropped.
    /// Batches that the consumer holds stay good. Stopping twice is no error.
    ///
    /// It takes as long as the longest call of the source that is under way.
    ///
    /// # Errors
    /// [`Error::Detached`]: a source did not return within `stop_timeout`; [`Error::Timeout`]: the
    /// device did not finish a transfer in that time. Everything else is stopped all the same.
    pub fn stop(&self) -> Result<()> {
        self.check_process()?;
        let _changing = self.changing.lock();
        let mut life = self.life.lock();
        life.started = false;
        let pipeline = life.current.clone();
        // Joining takes time; others may ask meanwhile.
        drop(life);
        pipeline.map_or(Ok(()), |pipeline| pipeline.stop())
    }

    /// The next batch; waits for it. `None` when everything was delivered.
    ///
    /// # Errors
    /// What ended the stream, once the batches before it were delivered, and again at every later
    /// call; [`Error::TooManyHeld`], which does not end it; [`Error::Lifecycle`] before `start` and
    /// after `stop`.
    pub fn get_batch(&self) -> Result<Option<GpuBatch>> {
        match self.pipeline()?.next(Patience::Forever, None)? {
            Delivery::Ready(batch) => Ok(Some(batch)),
            Delivery::End => Ok(None),
            Delivery::NotYet => Err(Error::record(
                "a wait",
                "a completion cannot wait for a batch: it would wait for itself",
            )),
        }
    }

    /// The next batch; waits for at most `timeout`, then says [`Delivery::NotYet`].
    ///
    /// # Errors
    /// As [`get_batch`](Self::get_batch).
    pub fn get_batch_timeout(&self, timeout: Duration) -> Result<Delivery> {
        self.pipeline()?.next(Patience::within(timeout), None)
    }

    /// The next batch, if there is one at this moment.
    ///
    /// # Errors
    /// As [`get_batch`](Self::get_batch).
    pub fn try_get_batch(&self) -> Result<Delivery> {
        self.pipeline()?.next(Patience::None, None)
    }

    /// An iterator over the batches from here on. It ends after the last one, or after an error.
    pub fn batches(&self) -> Batches<'_> {
        Batches::new(self)
    }

    /// A stream of the batches from here on, for an async runtime of your choice. It wakes its task
    /// without polling. It ends after the last batch, or after an error.
    #[cfg(feature = "async")]
    pub fn stream(&self) -> BatchStream<'_> {
        BatchStream::new(self)
    }

    /// Batches of an epoch, the same for all ranks; `None` for a source that does not know.
    pub fn batches_per_epoch(&self) -> Option<u64> {
        match &*self.feed {
            Feed::Dataset { cut, .. } => Some(cut.batches()),
            Feed::Source { size, .. } => size.map(|size| match self.config.last_batch {
                LastBatch::Drop => size / self.config.batch_size,
                _ => size.div_ceil(self.config.batch_size),
            }),
        }
    }

    /// The state after the last batch that was delivered. Before the first start it is where the
    /// stream will begin.
    pub fn state(&self) -> LoaderState {
        let (epoch, position, skipped) =
            match (self.life.lock().current.as_ref(), &self.config.resume) {
                (Some(pipeline), _) => {
                    let cursor = pipeline.cursor();
                    (cursor.epoch, cursor.position, cursor.skipped)
                }
                (None, Some(state)) => (state.epoch, state.position, state.skipped.clone()),
                (None, None) => (0, 0, Vec::new()),
            };
        LoaderState {
            version: LoaderState::VERSION,
            seed: self.config.seed,
            epoch,
            position,
            global_batch: self.config.batch_size * self.config.shard.world_size,
            skipped,
            fingerprint: *self.fingerprint.get_or_init(|| self.feed.fingerprint()),
            order: self.feed.order(),
        }
    }

    /// What the newest generation has done, and where the time went.
    pub fn stats(&self) -> AsyncDataLoaderStats {
        let life = self.life.lock();
        let memory = self.config.memory.stats();
        let mut stats = AsyncDataLoaderStats {
            is_running: false,
            generation: life.generation,
            path: LoadPath::Staged,
            path_reason: String::new(),
            workers: self.config.workers,
            queued_batches: 0,
            queue_capacity: 0,
            batches_produced: 0,
            batches_delivered: 0,
            samples_delivered: 0,
            bytes_delivered: 0,
            bytes_transferred: 0,
            skipped: 0,
            retries: 0,
            slots: 0,
            slot_bytes: 0,
            staging_bytes: memory.staging_in_use + memory.staging_cached,
            device_bytes: memory.device_in_use + memory.device_cached,
            elapsed: Duration::ZERO,
            time_to_first_batch: None,
            processor_time: None,
            stages: Stages::default(),
        };
        if let Some(pipeline) = &life.current {
            let counters = &pipeline.counters;
            stats.is_running = life.started && pipeline.is_running();
            stats.path = pipeline.route.path;
            stats.path_reason.clone_from(&pipeline.route.reason);
            stats.queued_batches = pipeline.deliver.queued();
            stats.batches_produced = counters.produced.load(Ordering::Relaxed);
            stats.batches_delivered = counters.delivered.load(Ordering::Relaxed);
            stats.samples_delivered = counters.samples.load(Ordering::Relaxed);
            stats.bytes_delivered = counters.bytes.load(Ordering::Relaxed);
            stats.bytes_transferred = counters.transferred.load(Ordering::Relaxed);
            stats.skipped = counters.skipped.load(Ordering::Relaxed);
            stats.retries = counters.retries.load(Ordering::Relaxed);
            stats.elapsed = pipeline.elapsed();
            stats.time_to_first_batch = pipeline.time_to_first_batch();
            stats.processor_time = counters.processor_time();
            stats.stages.workers = counters.workers.times();
            stats.stages.submitter = counters.submitter.times_of(stats.elapsed);
            stats.stages.consumer = counters.consumer.times();
            if let Some(buffers) = pipeline.buffers.get() {
                stats.queue_capacity = buffers.output_count();
                (stats.slots, stats.slot_bytes) = buffers.slot_counts();
            }
        }
        stats
    }

    /// The memory that the loader uses.
    pub fn memory_manager(&self) -> &MemoryManager {
        &self.config.memory
    }

    /// A child of the process that made the loader has none of its threads.
    fn check_process(&self) -> Result<()> {
        self.config.memory.device().core().health().check_process()
    }

    fn pipeline(&self) -> Result<Arc<Pipeline>> {
        self.check_process()?;
        let life = self.life.lock();
        life.current.clone().ok_or(Error::Lifecycle {
            state: "not started",
            remedy: "call `start` before you ask for batches",
        })
    }
}

impl Drop for AsyncDataLoader {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            crate::trace::warning!("a loader was dropped: {error}");
        }
    }
}

impl fmt::Debug for AsyncDataLoader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AsyncDataLoader").field("config", &self.config).finish_non_exhaustive()
    }
}
