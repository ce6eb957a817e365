//! An order of one's own: samples drawn by weight, so that a rare class comes as often as a common
//! one. The order is a formula of epoch and position, so resume and ranks work as always.
//!
//! `cargo run -p batchline --example own_sampler`

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, Device, HostTensor, InMemory, Sampler, mix,
};

/// Draws with replacement: each sample in proportion to its weight.
struct Weighted {
    draws: u64,
    seed: u64,
    /// Up to each sample, the sum of the weights.
    sums: Vec<f64>,
}

impl Weighted {
    fn new(draws: u64, seed: u64, weights: impl IntoIterator<Item = f64>) -> Self {
        let sums = weights.into_iter().scan(0.0, |sum, weight| {
            *sum += weight;
            Some(*sum)
        });
        Self { draws, seed, sums: sums.collect() }
    }
}

impl Sampler for Weighted {
    fn len(&self) -> u64 {
        self.draws
    }

    fn index(&self, epoch: u64, position: u64) -> u64 {
        // 53 random bits, as a number from 0 up to 1. No state: equal arguments, equal draw.
        let random = (mix(&[self.seed, epoch, position]) >> 11) as f64 / (1u64 << 53) as f64;
        let all = self.sums.last().copied().unwrap_or(0.0);
        self.sums.partition_point(|sum| *sum <= random * all) as u64
    }

    fn fingerprint(&self) -> u64 {
        let sums: Vec<u64> = self.sums.iter().map(|sum| sum.to_bits()).collect();
        mix(&[self.draws, self.seed, mix(&sums)])
    }
}

fn main() -> Result<(), batchline::Error> {
    // One sample in fifty is of class 1.
    let classes: Vec<u8> = (0..5000u32).map(|index| u8::from(index % 50 == 0)).collect();
    let rare = classes.iter().filter(|class| **class == 1).count();
    println!("class 1 makes up {:4.1} % of the data set", 100.0 * rare as f64 / 5000.0);

    let often = [1.0 / (5000 - rare) as f64, 1.0 / rare as f64];
    let sampler = Weighted::new(10_000, 7, classes.iter().map(|class| often[usize::from(*class)]));
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(100)
        .sampler(sampler)
        .epochs(2)
        .device(Device::host())
        .build()?;
    let loader = AsyncDataLoader::new(InMemory::new(HostTensor::new(classes, &[5000])?)?, config)?;
    loader.start()?;
    let mut ones = [0u32; 2];
    for batch in &loader {
        let batch = batch?;
        let classes = batch.input_tensor().to_vec::<u8>()?;
        ones[usize::from(batch.epoch() == 1)] +=
            classes.iter().map(|class| u32::from(*class)).sum::<u32>();
    }
    for (epoch, ones) in ones.into_iter().enumerate() {
        println!("class 1 makes up {:4.1} % of epoch {epoch}", f64::from(ones) / 100.0);
        assert!((4800..5200).contains(&ones), "half of the draws");
    }
    assert_ne!(ones[0], ones[1], "each epoch has draws of its own");
    Ok(())
}
