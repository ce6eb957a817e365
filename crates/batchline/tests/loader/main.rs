//! The loader on the host, and on the device that injects faults.

mod cases;
mod endings;
mod paths;
mod properties;
mod regressions;
mod resident;
mod resume;
mod stream;

use std::time::{Duration, Instant};

use cases::assert_home;

use batchline::testing::{FaultControl, FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, BoxError, ConfigBuilder, DType, DataSource, Dataset,
    Device, FnDataset, GpuBatch, MemoryManager, SampleMut, SampleSpec,
};

/// Samples that are their own index; `read` may do what it likes before one is written.
fn numbers(
    len: u64,
    read: impl Fn(u64) -> Result<(), BoxError> + Send + Sync + 'static,
) -> impl Dataset + 'static {
    let spec = SampleSpec::new(DType::I64, &[]).unwrap();
    FnDataset::new(len, spec, move |index, sample: &mut SampleMut<'_>| {
        read(index)?;
        Ok(sample.write(0, &[index.cast_signed()])?)
    })
}

fn builder(memory: &MemoryManager) -> ConfigBuilder {
    AsyncDataLoaderConfig::builder().batch_size(10).workers(4).memory_manager(memory.clone())
}

fn host() -> MemoryManager {
    MemoryManager::new(&Device::host())
}

fn faulty(plan: FaultPlan) -> (MemoryManager, FaultControl) {
    let (device, control) = faulty_device(plan);
    (MemoryManager::new(&device), control)
}

fn start(dataset: impl Dataset + 'static, config: ConfigBuilder) -> AsyncDataLoader {
    let loader = AsyncDataLoader::new(dataset, config.build().unwrap()).unwrap();
    loader.start().unwrap();
    loader
}

fn start_source(source: impl DataSource + 'static, config: ConfigBuilder) -> AsyncDataLoader {
    let loader = AsyncDataLoader::from_source(source, config.build().unwrap()).unwrap();
    loader.start().unwrap();
    loader
}

/// The numbers of a batch.
fn values(batch: &GpuBatch) -> Vec<i64> {
    batch.input_tensor().to_vec::<i64>().unwrap()
}

fn spawn<R: Send + 'static>(
    body: impl FnOnce() -> R + Send + 'static,
) -> std::thread::JoinHandle<R> {
    std::thread::Builder::new().name("test".to_owned()).spawn(body).unwrap()
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    eventually_within(Duration::from_secs(20), what, condition);
}

fn eventually_within(limit: Duration, what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + limit;
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
