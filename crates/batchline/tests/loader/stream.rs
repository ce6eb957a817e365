//! What the stream of batches is: order, shuffles, epochs, ranks, the last batch.

use std::collections::BTreeMap;

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, BoxError, ConfigBuilder, DType, DataSource, Dataset,
    Device, FnDataset, FnSource, GpuBatch, HostTensor, InMemory, IterSource, LastBatch, Sample,
    SampleMut, SampleSpec, Sampler,
};

use super::{builder, host, numbers, start, start_source, values};

fn batches_of(samples: u64) -> ConfigBuilder {
    AsyncDataLoaderConfig::builder().batch_size(samples).device(Device::host())
}

fn started(len: u64, config: ConfigBuilder) -> AsyncDataLoader {
    start(numbers(len, |_| Ok(())), config)
}

/// The batches as lists of numbers.
pub(super) fn collect(loader: &AsyncDataLoader) -> Vec<Vec<i64>> {
    loader.batches().map(|batch| values(&batch.unwrap())).collect()
}

#[test]
fn the_shuffle_is_the_same_for_any_workers_and_depth_and_new_in_each_epoch() {
    let stream = |workers, depth| {
        let config = batches_of(10).shuffle(true).seed(5).epochs(2).workers(workers);
        collect(&started(103, config.prefetch_depth(depth))).concat()
    };
    let one = stream(1, 1);
    for (workers, depth) in [(2, 1), (4, 5), (8, 2)] {
        assert_eq!(stream(workers, depth), one);
    }
    let (first, second) = one.split_at(103);
    assert_ne!(first, second);
    for epoch in [first, second] {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..103).collect::<Vec<i64>>(), "each sample once");
        assert_ne!(epoch, sorted, "shuffled");
    }
}

#[test]
fn the_last_batch_is_kept_dropped_or_padded() {
    let lens = |last| {
        let loader = started(25, batches_of(10).last_batch(last));
        loader
            .batches()
            .map(|batch| batch.map(|batch| (batch.len(), batch.padding(), values(&batch)[0])))
            .collect::<Result<Vec<_>, _>>()
            .unwrap()
    };
    assert_eq!(lens(LastBatch::Keep), [(10, 0, 0), (10, 0, 10), (5, 0, 20)]);
    assert_eq!(lens(LastBatch::Drop), [(10, 0, 0), (10, 0, 10)]);
    assert_eq!(lens(LastBatch::Pad), [(10, 0, 0), (10, 0, 10), (10, 5, 20)]);
    let padded = collect(&started(25, batches_of(10).last_batch(LastBatch::Pad)));
    assert_eq!(padded[2], [20, 21, 22, 23, 24, 0, 1, 2, 3, 4]);
}

#[test]
fn ranks_together_are_the_single_stream() {
    for last in [LastBatch::Keep, LastBatch::Drop, LastBatch::Pad] {
        let config = |batch| batches_of(batch).shuffle(true).seed(9).epochs(2).last_batch(last);
        let single = collect(&started(103, config(12)));
        for world_size in [2, 3, 4] {
            let ranks: Vec<_> = (0..world_size)
                .map(|rank| collect(&started(103, config(12 / world_size).shard(rank, world_size))))
                .collect();
            assert!(ranks.iter().all(|rank| rank.len() == single.len()), "as many batches each");
            for (number, expected) in single.iter().enumerate() {
                let together: Vec<i64> =
                    ranks.iter().flat_map(|rank| rank[number].clone()).collect();
                assert_eq!(&together, expected, "{last:?}, {world_size} ranks, batch {number}");
            }
        }
    }
}

#[test]
fn a_rank_for_which_nothing_is_left_gets_an_empty_batch() {
    let loader = started(5, batches_of(2).shard(1, 2));
    assert_eq!(collect(&loader), [vec![2, 3], vec![]]);
}

#[test]
fn what_was_read_ahead_is_not_in_the_state() {
    let loader = started(100, batches_of(10).prefetch_depth(5));
    loader.get_batch().unwrap().unwrap();
    while loader.stats().queued_batches < 3 {
        std::thread::yield_now();
    }
    let state = loader.state();
    assert_eq!((state.epoch, state.position), (0, 1));
    // The next epoch's read-ahead begins before this one is consumed.
    let loader = started(20, batches_of(10).prefetch_depth(5).epochs(2));
    while loader.stats().queued_batches < 4 {
        std::thread::yield_now();
    }
    assert_eq!((loader.state().epoch, loader.state().position), (0, 0));
}

#[test]
fn an_own_sampler_gives_the_order() {
    struct Evens;
    impl Sampler for Evens {
        fn len(&self) -> u64 {
            5
        }
        fn index(&self, epoch: u64, position: u64) -> u64 {
            2 * position + epoch
        }
        fn fingerprint(&self) -> u64 {
            1
        }
    }
    let loader = started(10, batches_of(5).sampler(Evens).epochs(2));
    assert_eq!(collect(&loader), [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]);

    struct Beyond;
    impl Sampler for Beyond {
        fn len(&self) -> u64 {
            3
        }
        fn index(&self, _: u64, position: u64) -> u64 {
            position * 9
        }
        fn fingerprint(&self) -> u64 {
            2
        }
    }
    let loader = started(10, batches_of(1).sampler(Beyond));
    assert_eq!(values(&loader.get_batch().unwrap().unwrap()), [0]);
    assert_eq!(values(&loader.get_batch().unwrap().unwrap()), [9]);
    let error = loader.get_batch().unwrap_err().chain();
    assert!(error.contains("the sampler named sample 18 of 10"), "{error}");
}

#[test]
fn random_seeds_depend_on_seed_epoch_and_sample_alone() {
    let seeds = |seed, workers, batch_size| {
        let spec = SampleSpec::new(DType::I64, &[2]).unwrap();
        let dataset = FnDataset::new(40, spec, |index, sample| {
            let random = sample.random_seed().cast_signed();
            Ok(sample.write(0, &[index.cast_signed(), random])?)
        });
        let config = batches_of(batch_size).workers(workers).seed(seed).shuffle(true).epochs(2);
        let loader = AsyncDataLoader::new(dataset, config.build().unwrap()).unwrap();
        loader.start().unwrap();
        let mut seeds = BTreeMap::new();
        for batch in loader.batches() {
            let batch = batch.unwrap();
            for pair in values(&batch).chunks(2) {
                seeds.insert((batch.epoch(), pair[0]), pair[1]);
            }
        }
        seeds
    };
    let one = seeds(1, 1, 7);
    assert_eq!(one, seeds(1, 6, 16));
    assert_ne!(one, seeds(2, 1, 7));
    let distinct: std::collections::BTreeSet<_> = one.values().collect();
    assert_eq!(distinct.len(), 80);
}

/// A pull source of `len` numbers.
pub(super) fn pulled(len: i64) -> impl DataSource + 'static {
    IterSource::new(move || {
        (0..len).map(|n| Ok(Sample::new(HostTensor::scalar(n)).label(HostTensor::scalar(n % 7))))
    })
}

#[test]
fn pull_sources_are_delivered_in_order_for_any_workers() {
    for workers in [1, 4] {
        let config = batches_of(10).workers(workers).epochs(2).build().unwrap();
        let loader = AsyncDataLoader::from_source(pulled(25), config).unwrap();
        loader.start().unwrap();
        let epoch: Vec<Vec<i64>> = vec![(0..10).collect(), (10..20).collect(), (20..25).collect()];
        assert_eq!(collect(&loader), [epoch.clone(), epoch].concat());
        let stats = loader.stats();
        assert_eq!((stats.samples_delivered, stats.batches_delivered), (50, 6));
    }
}

#[test]
fn a_pull_source_shorter_than_its_state_is_told_so() {
    let start = |len, config: ConfigBuilder| {
        let loader = AsyncDataLoader::from_source(pulled(len), config.build().unwrap()).unwrap();
        loader.start().unwrap();
        loader
    };
    let loader = start(25, batches_of(5));
    for _ in 0..4 {
        loader.get_batch().unwrap().unwrap();
    }
    let shorter = start(12, batches_of(5).resume_from(loader.state()));
    let error = shorter.get_batch().unwrap_err().chain();
    assert!(error.contains("it is at batch 4, the source has only 3"), "{error}");
}

#[test]
fn a_closure_serves_one_epoch() {
    let mut left = 2;
    let source = FnSource::new(move |size| {
        left -= 1;
        let numbers = HostTensor::new(vec![left; size], &[size as u64])?;
        Ok((left >= 0).then(|| Sample::new(numbers)))
    });
    let loader = start_source(source, batches_of(2).epochs(2));
    for _ in 0..2 {
        assert!(loader.get_batch().unwrap().is_some());
    }
    assert!(loader.get_batch().unwrap_err().chain().contains("can't start again"));
}

#[test]
fn settings_that_need_random_access_are_refused_for_pull_sources() {
    for config in [
        batches_of(2).shuffle(true),
        batches_of(2).shard(0, 2),
        batches_of(2).last_batch(LastBatch::Pad),
    ] {
        let error = AsyncDataLoader::from_source(pulled(4), config.build().unwrap()).unwrap_err();
        assert!(error.to_string().contains("needs random access"), "{error}");
    }
}

#[test]
fn an_endless_loader_goes_on() {
    let loader = started(10, batches_of(4).endless());
    for number in 0..100 {
        let batch = loader.get_batch().unwrap().unwrap();
        assert_eq!(batch.epoch(), number / 3);
        assert_eq!(batch.is_last_in_epoch(), number % 3 == 2);
    }
    assert!(loader.stats().is_running);
}

/// The same samples, read one by one or copied from where they lie.
#[test]
fn memory_is_copied_as_it_would_be_read() {
    struct Read(InMemory);
    impl Dataset for Read {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn spec(&self) -> &SampleSpec {
            self.0.spec()
        }
        fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
            self.0.read(index, sample)
        }
    }
    /// Says that it lies in memory, and is a byte short.
    struct Short(InMemory);
    impl Dataset for Short {
        fn len(&self) -> u64 {
            self.0.len()
        }
        fn spec(&self) -> &SampleSpec {
            self.0.spec()
        }
        fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
            self.0.read(index, sample)
        }
        fn contiguous(&self, tensor: usize) -> Option<&[u8]> {
            self.0.contiguous(tensor).map(|bytes| &bytes[1..])
        }
    }
    let inputs = (0..101i64 * 3).collect::<Vec<_>>();
    let labels = (0..101u8).collect::<Vec<_>>();
    let dataset = InMemory::new(HostTensor::new(inputs, &[101, 3]).unwrap())
        .and_then(|set| set.labels(HostTensor::new(labels, &[101])?))
        .unwrap();
    for (shuffle, last) in [(false, LastBatch::Keep), (true, LastBatch::Pad)] {
        let config = || builder(&host()).shuffle(shuffle).last_batch(last).epochs(2).workers(3);
        let batches = |loader: AsyncDataLoader| {
            let bytes = |batch: GpuBatch| {
                let label = batch.label_tensor().unwrap().to_bytes().unwrap();
                (batch.input_tensor().to_vec::<i64>().unwrap(), label)
            };
            loader.batches().map(|batch| bytes(batch.unwrap())).collect::<Vec<_>>()
        };
        let expected = batches(start(Read(dataset.clone()), config()));
        assert_eq!(expected.len(), 22);
        assert_eq!(batches(start(dataset.clone(), config())), expected);
        assert_eq!(batches(start(Short(dataset.clone()), config())), expected);
    }
}
