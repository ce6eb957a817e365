//! Two ranks, as two processes would be: each reads its part of every global batch, and the parts
//! put together are the stream of a single process.
//!
//! `cargo run -p batchline --example ranks`

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, ConfigBuilder, Device, Error, HostTensor, InMemory,
};

/// The batches of one process, as lists of the samples' numbers.
fn batches(settings: ConfigBuilder) -> Result<Vec<Vec<i64>>, Error> {
    let numbers = InMemory::new(HostTensor::new((0..50i64).collect(), &[50])?)?;
    let config = settings.shuffle(true).seed(3).device(Device::host()).build()?;
    let loader = AsyncDataLoader::new(numbers, config)?;
    loader.start()?;
    loader.batches().map(|batch| batch?.input_tensor().to_vec()).collect()
}

fn main() -> Result<(), Error> {
    // A batch of 12 in one process, or of 6 in each of two.
    let single = batches(AsyncDataLoaderConfig::builder().batch_size(12))?;
    let rank = |rank| batches(AsyncDataLoaderConfig::builder().batch_size(6).shard(rank, 2));
    let (zero, one) = std::thread::scope(|scope| {
        let other = scope.spawn(|| rank(1));
        (rank(0), other.join().expect("no panic"))
    });
    let (zero, one) = (zero?, one?);

    for (batch, expected) in single.iter().enumerate() {
        println!("batch {batch}   rank 0 {:?}   rank 1 {:?}", zero[batch], one[batch]);
        assert_eq!([&zero[batch][..], &one[batch]].concat(), *expected);
    }
    // The last two samples are dealt out evenly, so that both ranks take as many steps.
    assert_eq!((zero.len(), one.len()), (single.len(), single.len()));
    println!("put together: the {} batches of a single process", single.len());
    Ok(())
}
