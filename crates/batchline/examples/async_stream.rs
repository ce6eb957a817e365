//! Batches in asynchronous code, without a runtime: one task takes whatever comes first out of two
//! streams. A stream wakes its task when a batch is there; nothing polls meanwhile.
//!
//! `cargo run -p batchline --example async_stream --features async`

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, DType, Device, Error, FnDataset, SampleSpec,
};
use futures_core::Stream;

/// 40 samples in batches of 10, of which each takes its time to read.
fn loader(per_sample: Duration) -> Result<AsyncDataLoader, Error> {
    let spec = SampleSpec::new(DType::I64, &[])?;
    let numbers = FnDataset::new(40, spec, move |index, sample| {
        std::thread::sleep(per_sample);
        Ok(sample.write(0, &[i64::try_from(index)?])?)
    });
    let config = AsyncDataLoaderConfig::builder().batch_size(10).device(Device::host()).build()?;
    let loader = AsyncDataLoader::new(numbers, config)?;
    loader.start()?;
    Ok(loader)
}

async fn train(names: [&str; 2], loaders: [&AsyncDataLoader; 2]) -> Result<[i64; 2], Error> {
    let mut streams = loaders.map(AsyncDataLoader::stream);
    let mut open = [true; 2];
    let mut sums = [0; 2];
    while open.contains(&true) {
        // Ready with the first stream that has something; both wake the task.
        let (from, batch) = poll_fn(|context| {
            for (place, stream) in streams.iter_mut().enumerate().filter(|(place, _)| open[*place])
            {
                if let Poll::Ready(next) = Pin::new(stream).poll_next(context) {
                    return Poll::Ready((place, next));
                }
            }
            Poll::Pending
        })
        .await;
        let Some(batch) = batch.transpose()? else {
            println!("{} is over", names[from]);
            open[from] = false;
            continue;
        };
        println!("{} batch {}", names[from], batch.batch_id());
        sums[from] += batch.input_tensor().to_vec::<i64>()?.iter().sum::<i64>();
    }
    Ok(sums)
}

fn main() -> Result<(), Error> {
    let (fast, slow) = (loader(Duration::from_millis(1))?, loader(Duration::from_millis(4))?);
    // Any executor will do; this one blocks the thread.
    let sums = pollster::block_on(train(["fast", "slow"], [&fast, &slow]))?;
    assert_eq!(sums, [(0..40).sum::<i64>(); 2], "every sample of both");
    println!("sums {sums:?}");
    Ok(())
}
