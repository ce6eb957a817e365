//! The data loader of burn: each worker has a part of the data set, batches come as they are ready.

use burn_core::data::dataloader::DataLoaderBuilder;
use burn_core::data::dataloader::batcher::Batcher;
use burn_core::data::dataset::{Dataset, DatasetError};
use burn_core::tensor::Device;

use super::collate::{Batch, Collate, Collator};
use super::{BATCH, Clock, Consumer, Task, Times};
use crate::data::Rows;

impl Dataset<&'static [u8]> for Rows {
    fn get(&self, index: usize) -> Result<&'static [u8], DatasetError> {
        Ok(Rows::get(*self, index))
    }

    fn len(&self) -> usize {
        Rows::len(*self)
    }
}

/// Bytes rather than a tensor, which would cost burn more.
impl Batcher<&'static [u8], Batch> for Collator {
    fn batch(&self, rows: Vec<&'static [u8]>, _: &Device) -> Batch {
        Collator::batch(self, &rows)
    }
}

pub(super) fn load(task: Task, collate: Collate, consumer: Consumer<'_>) -> Times {
    let mut clock = Clock::begin();
    let mut builder =
        DataLoaderBuilder::new(Collator::new(collate)).batch_size(BATCH).num_workers(task.workers);
    if task.shuffle {
        builder = builder.shuffle(1);
    }
    let loader = builder.build(task.rows);
    clock.made();
    'epochs: for _ in 0..task.epochs {
        for batch in loader.iter() {
            let batch = batch.expect("nothing fails");
            clock.batch();
            if !consumer(batch.bytes()) {
                break 'epochs;
            }
        }
    }
    clock.end()
}
