//! A data set of one's own, read by all workers at once: noisy sine waves and their frequencies.
//!
//! `cargo run -p batchline --example own_dataset`

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, BoxError, DType, Dataset, Device, Host, SampleMut,
    SampleSpec,
};

struct Waves {
    spec: SampleSpec,
}

impl Dataset for Waves {
    fn len(&self) -> u64 {
        10_000
    }

    fn spec(&self) -> &SampleSpec {
        &self.spec
    }

    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        let frequency = (index % 50) as f32;
        // Noise that depends on seed, epoch and sample alone: the same for any number of workers.
        let mut noise = sample.random_seed();
        for (step, value) in sample.elements::<f32>(0)?.iter_mut().enumerate() {
            noise = noise.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let jitter = (noise >> 40) as f32 / (1 << 24) as f32;
            *value = (frequency * step as f32 / 256.0).sin() + 0.1 * jitter;
        }
        sample.write(1, &[frequency])?;
        Ok(())
    }
}

fn main() -> Result<(), batchline::Error> {
    let spec = SampleSpec::new(DType::F32, &[256])?.label(DType::F32, &[])?;
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(128)
        .workers(4)
        .shuffle(true)
        .epochs(2)
        .device(Device::host())
        .build()?;
    let loader = AsyncDataLoader::new(Waves { spec }, config)?;
    loader.start()?;
    let (mut batches, mut sum) = (0, 0.0f64);
    for batch in &loader {
        let batch = batch?;
        let bound = batch.bind(&Host)?;
        sum += bound.input().as_slice::<f32>()?.iter().map(|value| f64::from(*value)).sum::<f64>();
        batches += 1;
    }
    println!("{batches} batches, mean {:.4}", sum / (2.0 * 10_000.0 * 256.0));
    println!("{}", loader.stats().verdict());
    Ok(())
}
