//! The memory of a running pipeline: slots to fill, outputs to deliver. All of it is allocated at
//! the start and handed around from then on.

use std::sync::Arc;
use std::time::Duration;

use super::config::AsyncDataLoaderConfig;
use super::route::Route;
use super::slot::Slot;
use crate::backend::DeviceKind;
use crate::batch::Lists;
use crate::command::{CommandBufferPool, Conversion};
use crate::memory::{Patience, Pool, Storage};
use crate::source::{BatchLayout, SampleSpec};
use crate::staging::StagingBufferPool;
use crate::{DType, Error, MemoryManager, Result, Shape};

/// Slots for each output, where slots hold only numbers of samples.
pub(super) const NUMBERS: usize = 4;

/// See the [module](self).
#[derive(Debug)]
pub(crate) struct Buffers {
    pub(crate) spec: Arc<SampleSpec>,
    /// The layout of a slot: samples, or their numbers where the device fetches them.
    pub(crate) layout: Arc<BatchLayout>,
    /// The layout of samples as the source has them.
    pub(crate) raw_layout: BatchLayout,
    slots: Slots,
    /// Where batches land that are converted from there; on a device with memory of its own.
    pub(crate) raws: Option<Pool<Arc<Storage>>>,
    /// What batches are delivered in; `None` where the slot itself is the batch.
    pub(crate) outputs: Option<Pool<Arc<Storage>>>,
    pub(crate) output_layout: BatchLayout,
    /// What the device makes of the input.
    pub(crate) convert: Option<Conversion>,
    pub(crate) commands: CommandBufferPool,
    memory: MemoryManager,
    /// For the batches' tensors.
    pub(crate) lists: Arc<Lists>,
}

#[derive(Debug)]
enum Slots {
    Staging(StagingBufferPool),
    Unified(Pool<Arc<Storage>>),
}

impl Buffers {
    /// Allocates for samples of this kind, as much as the settings ask for and the limits allow,
    /// but at least one of each.
    ///
    /// # Errors
    /// Not even that fits, or the conversion does not suit the samples.
    pub(crate) fn allocate(
        spec: &SampleSpec,
        config: &AsyncDataLoaderConfig,
        route: &Route,
    ) -> Result<Self> {
        let memory = &config.memory;
        let raw_layout = BatchLayout::new(spec, config.batch_size)?;
        let layout = match route.is_staged() {
            true => raw_layout.clone(),
            // `u64`, which is as long.
            false => {
                BatchLayout::of([(DType::I64, Shape::new(&[])?)].into_iter(), config.batch_size)?
            }
        };
        let mut tensors: Vec<_> =
            spec.tensors().iter().map(|tensor| (tensor.dtype, tensor.shape)).collect();
        // Batches have one dimension more than samples; one that can't be shaped is refused here.
        for (_, shape) in &tensors {
            shape.batched(config.batch_size)?;
        }
        let mut convert = None;
        if let Some((dtype, conversion)) = &config.convert {
            let (from, shape) = tensors[0];
            let fitted = conversion.clone().fitted(from, *dtype, shape.batched(1)?);
            let fitted = fitted.map_err(|error| {
                let problem = format!("does not suit inputs of {from} {shape} ({error})");
                Error::config("convert", problem, "give one mean and std, or one per channel")
            })?;
            tensors[0] = (*dtype, conversion.shape(shape)?);
            convert = Some(fitted);
        }
        let output_layout = BatchLayout::of(tensors.into_iter(), config.batch_size)?;

        let unified = memory.device().info().unified;
        let (ahead, delivered) = (config.prefetch_depth, config.prefetch_depth + config.max_held);
        // Numbers take little, and small batches are over sooner than anybody learns of it.
        let wanted = if route.is_staged() { ahead } else { NUMBERS * delivered };
        let mut stock = Stock { memory, blocks: Default::default(), most: [0; 3] };
        let (in_bytes, raw_bytes, out_bytes) =
            (layout.bytes, raw_layout.bytes, output_layout.bytes);
        let staging = if unified {
            None
        } else {
            let fitting = usize::try_from(memory.fitting_staging(in_bytes)?).unwrap_or(usize::MAX);
            Some(StagingBufferPool::with_buffer_size(memory, wanted.min(fitting), in_bytes)?)
        };
        // Slots, raw batches and outputs of device memory.
        let (slots, raws, outputs) = match (unified, convert.is_some()) {
            (true, false) => (delivered, 0, 0),
            (true, true) => (ahead.min(2), 0, delivered),
            (false, converts) => (0, if converts && !route.fused { 2 } else { 0 }, delivered),
        };
        stock.most = [slots, raws, outputs];
        let bytes = [in_bytes, raw_bytes, out_bytes];
        // One of each first, or there is no way through; then as many as are asked for and fit.
        while stock.grow(bytes)? | staging.as_ref().map_or(Ok(false), StagingBufferPool::grow)? {}
        let [slots, raws, outputs] = stock.blocks;
        let count = slots.len().max(outputs.len());
        // Nothing is ever on its way to the host's own memory.
        let host = memory.device().kind() == DeviceKind::Host;
        let slots = match staging {
            Some(pool) => Slots::Staging(pool),
            None => Slots::Unified(Pool::stocked("slots", slots, host)),
        };
        let raws = (!raws.is_empty()).then(|| Pool::stocked("raw batches", raws, false));
        let outputs = (!outputs.is_empty()).then(|| Pool::stocked("outputs", outputs, host));
        Ok(Self {
            spec: Arc::new(spec.clone()),
            layout: Arc::new(layout),
            raw_layout,
            slots,
            raws,
            outputs,
            output_layout,
            convert,
            commands: CommandBufferPool::new(memory, wanted.max(delivered))?,
            memory: memory.clone(),
            // One more, as a batch that is dropped gives its memory back before its list.
            lists: Arc::new(Lists::new(count + 1, spec.tensors().len())),
        })
    }

    /// A free slot; waits for one.
    ///
    /// # Errors
    /// The pipeline is stopped, or the device lost.
    pub(crate) fn slot(&self) -> Result<Slot> {
        match &self.slots {
            Slots::Staging(pool) => pool.get_buffer().map(Slot::Staging),
            Slots::Unified(pool) => {
                let loan =
                    pool.acquire(Patience::Forever, || self.replacement(self.layout.bytes))?;
                // Work that the consumer enqueued on the memory may still be on its way.
                loan.block().wait_idle()?;
                Ok(Slot::Unified(loan))
            }
        }
    }

    /// The slots, and the bytes of each.
    pub(crate) fn slot_counts(&self) -> (usize, u64) {
        let slots = match &self.slots {
            Slots::Staging(pool) => pool.stats().max,
            Slots::Unified(pool) => pool.counts().max,
        };
        (slots, self.layout.bytes)
    }

    /// The outputs that there are.
    pub(crate) fn output_count(&self) -> usize {
        match (&self.outputs, &self.slots) {
            (Some(outputs), _) | (None, Slots::Unified(outputs)) => outputs.counts().max,
            (None, Slots::Staging(_)) => unreachable!("staging slots always have outputs"),
        }
    }

    /// Ends every wait for memory. What is lent goes back to the memory manager when it is done.
    pub(crate) fn close(&self, error: &Error) {
        match &self.slots {
            Slots::Staging(pool) => pool.close(error.clone()),
            Slots::Unified(pool) => pool.close(error.clone()),
        }
        for pool in self.raws.iter().chain(&self.outputs) {
            pool.close(error.clone());
        }
    }

    /// A block in the place of one that was given up: on a lost device, of which this pipeline may
    /// not have been told yet, or because it could not be noted where a consumer's stream was.
    fn replacement(&self, bytes: u64) -> Result<Arc<Storage>> {
        self.commands.device().check()?;
        Ok(Storage::new(self.memory.block(bytes, Patience::None)?, &self.memory))
    }

    /// What takes the place of an output.
    pub(super) fn new_output(&self) -> Result<Arc<Storage>> {
        self.replacement(self.output_layout.bytes)
    }

    /// What takes the place of a raw batch.
    pub(super) fn new_raw(&self) -> Result<Arc<Storage>> {
        self.replacement(self.raw_layout.bytes)
    }

    /// Waits until no transfer is on its way; false when `timeout` was too short for that.
    pub(crate) fn wait_landed(&self, timeout: Duration) -> bool {
        self.commands.cleanup_within(timeout)
    }
}

/// Blocks of device memory for several pools, which grow together.
struct Stock<'m> {
    memory: &'m MemoryManager,
    blocks: [Vec<Arc<Storage>>; 3],
    most: [usize; 3],
}

impl Stock<'_> {
    /// Adds a block to each pool that wants one more; false when there were none to add.
    ///
    /// # Errors
    /// There is no memory for the first of a pool.
    fn grow(&mut self, bytes: [u64; 3]) -> Result<bool> {
        let mut grown = false;
        for ((blocks, most), bytes) in self.blocks.iter_mut().zip(&mut self.most).zip(bytes) {
            if blocks.len() == *most {
                continue;
            }
            match self.memory.block(bytes, Patience::None) {
                Ok(block) => {
                    blocks.push(Storage::new(block, self.memory));
                    grown = true;
                }
                Err(Error::LimitReached { .. }) if !blocks.is_empty() => *most = blocks.len(),
                Err(error) => return Err(error),
            }
        }
        Ok(grown)
    }
}
