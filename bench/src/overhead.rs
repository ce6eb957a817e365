//! What the loader itself costs where the source costs next to nothing: processor time and
//! allocations per batch.

use std::hint::black_box;

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, DType, Dataset, Device, FnDataset, Host, SampleBuffer,
    SampleMut, SampleSpec,
};
use cpu_time::ProcessTime;

use crate::allocations::counted;
use crate::measure::{Contestant, Scale, Series, interleave};
use crate::report::{Bar, Report};

const SIZES: [u64; 3] = [1, 64, 256];

/// A data set whose samples are one byte, the lowest of the index.
fn dataset(len: u64) -> impl Dataset + 'static {
    let spec = SampleSpec::new(DType::U8, &[]).expect("a byte is a sample");
    FnDataset::new(len, spec, |index, sample: &mut SampleMut<'_>| {
        sample.input()[0] = index.to_le_bytes()[0];
        Ok(())
    })
}

fn loader(len: u64, batch: u64, epochs: u64) -> AsyncDataLoader {
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(batch)
        .epochs(epochs)
        .device(Device::host())
        .build()
        .expect("the settings are good");
    AsyncDataLoader::new(dataset(len), config).expect("there are samples")
}

pub fn cpu(scale: Scale, report: &mut Report) {
    report.row("cpu", "processor time per batch beyond the source's own work, 2 workers");
    for batch in SIZES {
        let batches = scale.pick(100_000, 1000);
        let len = batch * batches;
        let mut first = 0;
        verify(loader(len, batch, 1), |bytes| {
            let expected = (first..).take(bytes.len()).map(|index: u64| index.to_le_bytes()[0]);
            assert!(bytes.iter().copied().eq(expected), "wrong bytes from sample {first} on");
            first += bytes.len() as u64;
        });
        assert_eq!(first, len, "samples are missing");

        let micros = |work: &mut dyn FnMut()| {
            let before = ProcessTime::now();
            work();
            before.elapsed().as_secs_f64() * 1e6 / batches as f64
        };
        let ours = || {
            let loader = loader(len, batch, 1);
            micros(&mut || {
                loader.start().expect("it starts");
                while loader.get_batch().expect("nothing fails").is_some() {}
                loader.stop().expect("it stops");
            })
        };
        let bare = dataset(len);
        let source = || {
            let mut sample = SampleBuffer::new(bare.spec()).expect("a byte");
            micros(&mut || {
                sample.fill(|window| {
                    for index in 0..len {
                        bare.read(index, window).expect("nothing fails");
                        black_box(&mut *window);
                    }
                });
            })
        };
        let contestants =
            vec![Contestant::new("with the loader", ours), Contestant::new("source alone", source)];
        let series = interleave(scale.rounds(), "us", contestants);
        let mut beyond = Series::new("beyond the source", "us");
        beyond.runs = series[0].runs.iter().zip(&series[1].runs).map(|(a, b)| a - b).collect();
        // The bar is about small batches.
        let bar = (batch <= 64).then_some(Bar::AtMost(5.0));
        report.compare(format!("batch {batch}, in all"), &series[0], &series[1], None);
        report.alone(format!("batch {batch}, beyond the source"), &beyond, bar);
    }
}

pub fn allocations(scale: Scale, report: &mut Report) {
    const SETTLE: u64 = 100;
    report.row("allocations", "allocations per batch, from the hundredth on, all threads");
    for batch in SIZES {
        let batches = scale.pick(10_000, 1000);
        let mut calls = Series::new("batchline", "calls");
        let mut bytes = Series::new("batchline", "bytes");
        for _ in 0..5 {
            let loader = loader(batch * (batches + SETTLE + 100), batch, 1);
            loader.start().expect("it starts");
            let take = || drop(loader.get_batch().expect("nothing fails").expect("there are more"));
            (0..SETTLE).for_each(|_| take());
            let (allocated, ()) = counted(|| (0..batches).for_each(|_| take()));
            calls.runs.push(allocated.calls as f64 / batches as f64);
            bytes.runs.push(allocated.bytes as f64 / batches as f64);
        }
        report.alone(format!("batch {batch}"), &calls, Some(Bar::AtMost(0.0)));
        report.alone(format!("batch {batch}"), &bytes, None);
    }
}

/// Shows every delivered batch to `check`.
fn verify(loader: AsyncDataLoader, mut check: impl FnMut(&[u8])) {
    loader.start().expect("it starts");
    while let Some(batch) = loader.get_batch().expect("nothing fails") {
        check(batch.input_tensor().bind(&Host).expect("the host's memory").bytes());
    }
}
