//! batchline with its default settings.

use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Device, Host};

use super::{BATCH, Clock, Collate, Consumer, Task, Times};

pub(super) fn load(task: Task, _: Collate, consumer: Consumer<'_>) -> Times {
    let mut clock = Clock::begin();
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(BATCH as u64)
        .workers(task.workers.max(1))
        .shuffle(task.shuffle)
        .epochs(task.epochs as u64)
        .device(Device::host())
        .build()
        .expect("the settings are good");
    let loader = AsyncDataLoader::new(task.rows.dataset(), config).expect("there are samples");
    clock.made();
    loader.start().expect("it starts");
    while let Some(batch) = loader.get_batch().expect("nothing fails") {
        clock.batch();
        if !consumer(batch.input_tensor().bind(&Host).expect("the host's memory").bytes()) {
            break;
        }
    }
    clock.end()
}
