//! What a shuffled order costs in memory and in time.

use std::hint::black_box;

use batchline::{Permutation, Sampler, Shuffled};
use burn_core::data::dataset::transform::ShuffledDataset;
use burn_core::data::dataset::{Dataset, DatasetError};

use cpu_time::ProcessTime;

use crate::allocations::counted;
use crate::measure::{Contestant, Scale, Series, interleave};
use crate::report::{Bar, Report};

pub fn measure(scale: Scale, report: &mut Report) {
    let len = 1_000_000_000;
    let asked = scale.pick(1_000_000, 10_000);
    report.row("order", "a shuffled order of 1,000,000,000 samples");

    let mut size = Series::new("size_of Permutation", "bytes");
    size.runs = vec![size_of::<Permutation>() as f64];
    report.alone("what an order is", &size, Some(Bar::AtMost(128.0)));

    let mut allocated = Series::new("batchline", "bytes");
    let mut indices = vec![0; 256];
    for epoch in 0..5 {
        let (allocations, ()) = counted(|| {
            let order = Shuffled::new(len, 7);
            order.indices(epoch, len / 2, &mut indices);
        });
        allocated.runs.push(allocations.bytes as f64);
    }
    report.alone("allocated for an epoch and 256 indices", &allocated, Some(Bar::AtMost(0.0)));

    // One thread computes, so its processor time is what an index costs, whoever else is about.
    let contestants = [("one by one", 1), ("256 at once", 256)].map(|(name, at_once)| {
        Contestant::new(name, move || {
            let order = Shuffled::new(len, 7);
            let mut indices = vec![0; at_once];
            let begun = ProcessTime::now();
            for first in (0..asked).step_by(at_once) {
                order.indices(3, first, &mut indices);
                black_box(&indices);
            }
            begun.elapsed().as_nanos() as f64 / asked as f64
        })
    });
    let permutation = Contestant::new("of a Permutation", move || {
        let order = Permutation::new(len, 7);
        let begun = ProcessTime::now();
        for position in 0..asked {
            black_box(order.index(position));
        }
        begun.elapsed().as_nanos() as f64 / asked as f64
    });
    let mut contestants = Vec::from(contestants);
    contestants.push(permutation);
    for series in interleave(scale.rounds(), "ns", contestants) {
        // The first one makes the order anew for each index, which the loader does not.
        let bar = (series.name != "one by one").then_some(Bar::AtMost(50.0));
        report.alone(format!("an index, {}", series.name), &series, bar);
    }
    peers(scale, report);
}

/// Makes an order of so many samples; its length.
type MakeOrder = fn(usize) -> usize;

/// How much the peers' orders take per sample: they are lists.
fn peers(scale: Scale, report: &mut Report) {
    use dataloader_rs::Sampler as _;
    let len = scale.pick(10_000_000, 10_000);
    let orders: [(_, MakeOrder); 2] = [
        ("dataloader-rs", |len| dataloader_rs::RandomSampler::new(7).indices(len).len()),
        ("burn", |len| ShuffledDataset::new(Numbers(len), 7).len()),
    ];
    for (name, make) in orders {
        let mut series = Series::new(name, "bytes");
        for _ in 0..5 {
            let (allocated, made) = counted(|| black_box(make(len)));
            assert_eq!(made, len);
            series.runs.push(allocated.bytes as f64 / len as f64);
        }
        report.alone(format!("allocated per sample by {name}, {len} samples"), &series, None);
    }
}

/// A data set for burn to shuffle.
struct Numbers(usize);

impl Dataset<usize> for Numbers {
    fn get(&self, index: usize) -> Result<usize, DatasetError> {
        Ok(index)
    }

    fn len(&self) -> usize {
        self.0
    }
}
