//! No loader: a loop that gathers rows into a vector per batch, on the consumer's thread.

use dataloader_rs::{RandomSampler, Sampler};

use super::collate::Collator;
use super::{BATCH, Clock, Collate, Consumer, Task, Times};

pub(super) fn load(task: Task, collate: Collate, consumer: Consumer<'_>) -> Times {
    let mut clock = Clock::begin();
    let collator = Collator::new(collate);
    let mut sampler = RandomSampler::new(1);
    let mut rows = Vec::with_capacity(BATCH);
    clock.made();
    'epochs: for _ in 0..task.epochs {
        let order = task.shuffle.then(|| sampler.indices(task.rows.len()));
        for first in (0..task.rows.len()).step_by(BATCH) {
            let positions = first..(first + BATCH).min(task.rows.len());
            rows.clear();
            rows.extend(positions.map(|position| {
                task.rows.get(order.as_ref().map_or(position, |order| order[position]))
            }));
            let batch = collator.batch(&rows);
            clock.batch();
            if !consumer(batch.bytes()) {
                break 'epochs;
            }
        }
    }
    clock.end()
}
