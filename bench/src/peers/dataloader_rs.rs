//! The crate dataloader-rs: batches in parallel on a pool of threads, delivered in order.

use dataloader_rs::collator::Collator as CollatorTrait;
use dataloader_rs::error::Result;
use dataloader_rs::{DataLoader, Dataset, RandomSampler, SequentialSampler};

use super::collate::{Batch, Collate, Collator};
use super::{BATCH, Clock, Consumer, Task, Times};
use crate::data::Rows;

impl Dataset for Rows {
    type Item = &'static [u8];

    fn get(&self, index: usize) -> Result<&'static [u8]> {
        Ok(Rows::get(*self, index))
    }

    /// What the default does, in one allocation.
    fn get_batch(&self, indices: &[usize]) -> Result<Vec<&'static [u8]>> {
        Ok(indices.iter().map(|&index| Rows::get(*self, index)).collect())
    }

    fn len(&self) -> usize {
        Rows::len(*self)
    }
}

impl CollatorTrait<&'static [u8]> for Collator {
    type Batch = Batch;

    fn collate(&self, items: Vec<&'static [u8]>) -> Result<Batch> {
        Ok(self.batch(&items))
    }
}

pub(super) fn load(task: Task, collate: Collate, consumer: Consumer<'_>) -> Times {
    let clock = Clock::begin();
    let builder = DataLoader::builder(task.rows)
        .batch_size(BATCH)
        .num_workers(task.workers)
        .collator(Collator::new(collate));
    // The two samplers make loaders of two types.
    if task.shuffle {
        consume(clock, builder.sampler(RandomSampler::new(1)).build(), task.epochs, consumer)
    } else {
        consume(clock, builder.sampler(SequentialSampler).build(), task.epochs, consumer)
    }
}

fn consume<S: dataloader_rs::Sampler>(
    mut clock: Clock,
    mut loader: DataLoader<Rows, S, Collator>,
    epochs: usize,
    consumer: Consumer<'_>,
) -> Times {
    clock.made();
    'epochs: for _ in 0..epochs {
        for batch in &mut loader {
            let batch = batch.expect("nothing fails");
            clock.batch();
            if !consumer(batch.bytes()) {
                break 'epochs;
            }
        }
    }
    clock.end()
}
