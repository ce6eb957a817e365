//! What a loader reads from.

use std::fmt;
use std::sync::Arc;

use super::config::AsyncDataLoaderConfig;
use crate::plan::{Cut, LastBatch, Sampler, Sequential, Shard, Shuffled, mix};
use crate::source::{DataSource, Dataset};
use crate::sync::Mutex;
use crate::{Error, LoaderState, Result};

/// A source of either kind, with the plan where there is one.
pub(crate) enum Feed {
    /// Random access: the plan says which samples make a batch, all workers read at once.
    Dataset { dataset: Arc<dyn Dataset>, sampler: Arc<dyn Sampler>, cut: Cut },
    /// Pull: the source says what comes next, one worker at a time asks it.
    Source {
        source: Mutex<Box<dyn DataSource>>,
        /// Its size, asked for once: while it is being read it can't be asked.
        size: Option<u64>,
        can_retry: bool,
    },
}

impl Feed {
    /// A feed of a data set, with the order that the settings ask for.
    pub(crate) fn dataset(
        dataset: Arc<dyn Dataset>,
        config: &AsyncDataLoaderConfig,
    ) -> Result<Self> {
        let len = dataset.len();
        let sampler: Arc<dyn Sampler> = match &config.sampler {
            Some(own) => Arc::clone(own),
            None if config.shuffle => Arc::new(Shuffled::new(len, config.seed)),
            None => Arc::new(Sequential::new(len)),
        };
        let cut = Cut::new(
            if len == 0 { 0 } else { sampler.len() },
            config.batch_size,
            config.shard,
            config.last_batch,
        )?;
        Ok(Self::Dataset { dataset, sampler, cut })
    }

    /// A feed of a pull source.
    pub(crate) fn source(
        source: Box<dyn DataSource>,
        config: &AsyncDataLoaderConfig,
    ) -> Result<Self> {
        let needs_dataset = [
            ("shuffle", config.shuffle),
            ("sampler", config.sampler.is_some()),
            ("shard", config.shard != Shard::default()),
            ("last_batch", config.last_batch == LastBatch::Pad),
        ];
        for (setting, set) in needs_dataset {
            if set {
                return Err(Error::config(
                    setting,
                    "needs random access, which a pull source lacks",
                    "implement Dataset, or do it in the source",
                ));
            }
        }
        let size = source.size();
        let can_retry = source.can_retry();
        Ok(Self::Source { source: Mutex::new(source), size, can_retry })
    }

    pub(crate) fn fingerprint(&self) -> u64 {
        match self {
            Feed::Dataset { dataset, .. } => dataset.fingerprint(),
            Feed::Source { source, .. } => source.lock().fingerprint(),
        }
    }

    /// The fingerprint of the order.
    pub(crate) fn order(&self) -> u64 {
        match self {
            Feed::Dataset { sampler, cut, .. } => mix(&[sampler.fingerprint(), cut.last as u64]),
            Feed::Source { .. } => 0,
        }
    }

    /// Checks that a state was taken from a stream like this one.
    pub(crate) fn check(
        &self,
        state: &LoaderState,
        fingerprint: u64,
        config: &AsyncDataLoaderConfig,
    ) -> Result<()> {
        let refuse = |problem: String| Err(Error::State { problem });
        // It may come from a file of the user's own, that nobody has checked.
        LoaderState::check_version(state.version.into())?;
        if state.epoch > u64::MAX / 2 {
            return refuse(format!("it is at epoch {}, which no stream reaches", state.epoch));
        }
        if state.fingerprint != fingerprint {
            return refuse(
                "it was taken from another data set (the fingerprints differ); \
                 continue it with that one, or start anew"
                    .to_owned(),
            );
        }
        let global = config.batch_size * config.shard.world_size;
        if state.global_batch != global {
            return refuse(format!(
                "it counts global batches of {} samples, this loader makes them of {global} \
                 (batch_size {} times world_size {}); keep the product the same",
                state.global_batch, config.batch_size, config.shard.world_size
            ));
        }
        if state.order != self.order() || state.seed != config.seed {
            return refuse(format!(
                "it was taken in another order (seed {}, this loader has {}; or shuffle, sampler or \
                 last_batch differ); use the same settings",
                state.seed, config.seed
            ));
        }
        if let Feed::Dataset { cut, .. } = self
            && state.position > cut.batches()
        {
            let (position, batches) = (state.position, cut.batches());
            return refuse(format!("it is at batch {position} of an epoch of {batches}"));
        }
        Ok(())
    }
}

impl fmt::Debug for Feed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Feed::Dataset { cut, .. } => f.debug_tuple("Dataset").field(cut).finish(),
            Feed::Source { size, .. } => f.debug_tuple("Source").field(size).finish(),
        }
    }
}
