//! A run that is cut off in the middle of an epoch and goes on as if nothing had happened, with
//! another number of workers.
//!
//! `cargo run -p batchline --example resume`

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, ConfigBuilder, DType, Device, Error, FnDataset,
    LoaderState, SampleSpec, mix,
};

/// A loader of numbers, each made noisy by a random augmentation that is new in every epoch.
fn loader(settings: ConfigBuilder) -> Result<AsyncDataLoader, Error> {
    let spec = SampleSpec::new(DType::F32, &[])?;
    let numbers = FnDataset::new(1000, spec, |index, sample| {
        let noise = (sample.random_seed() >> 40) as f32 / (1 << 24) as f32;
        Ok(sample.write(0, &[index as f32 + noise])?)
    });
    let config = settings.batch_size(64).epochs(3).shuffle(true).device(Device::host()).build()?;
    let loader = AsyncDataLoader::new(numbers, config)?;
    loader.start()?;
    Ok(loader)
}

/// Reads up to `most` batches; returns a hash that depends on every byte and on the order.
fn train(loader: &AsyncDataLoader, before: u64, most: usize) -> Result<u64, Error> {
    loader.batches().take(most).try_fold(before, |hash, batch| {
        let bytes = batch?.input_tensor().to_bytes()?;
        Ok(bytes.iter().fold(hash, |hash, byte| mix(&[hash, u64::from(*byte)])))
    })
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let whole = train(&loader(AsyncDataLoaderConfig::builder())?, 0, usize::MAX)?;
    println!("uninterrupted              {whole:016x}");

    let file = std::env::temp_dir().join(format!("batchline-resume-{}.json", std::process::id()));
    let first = loader(AsyncDataLoaderConfig::builder().workers(2))?;
    let part = train(&first, 0, 20)?;
    first.state().save(&file)?; // with the model, in a real run
    drop(first);
    println!("cut off after 20 batches   {part:016x}");

    let state = LoaderState::load(&file)?;
    println!("the state                  epoch {}, batch {}", state.epoch, state.position);
    let second = loader(AsyncDataLoaderConfig::builder().workers(5).resume_from(state))?;
    let together = train(&second, part, usize::MAX)?;
    println!("continued with 5 workers   {together:016x}");
    assert_eq!(together, whole, "the same bytes in the same order");
    std::fs::remove_file(file)?;
    Ok(())
}
