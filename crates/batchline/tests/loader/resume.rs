//! A stream that is continued from a saved state: at every batch, in another shape of the run, and
//! from states that belong elsewhere.

use std::sync::atomic::{AtomicUsize, Ordering};

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, ConfigBuilder, DType, Dataset, Device, Error,
    ErrorPolicy, FnDataset, LastBatch, LoaderState, SampleSpec, Skipped,
};

use super::{numbers, start, start_source};

/// Samples of a global batch; 26 samples make three of them and a short one.
const GLOBAL: u64 = 8;
const LEN: u64 = 26;
const EPOCHS: u64 = 2;

/// What is the same for all loaders of one stream.
#[derive(Debug, Clone, Copy)]
struct Stream {
    shuffle: bool,
    last: LastBatch,
    /// Whether some samples can't be read and are skipped.
    skips: bool,
}

/// How a part of the stream is run.
#[derive(Debug, Clone, Copy)]
struct Run {
    world_size: u64,
    workers: usize,
    depth: usize,
}

/// The stream's bytes, by global batch: each tensor's rows, those of all ranks together.
type Bytes = Vec<Vec<Vec<u8>>>;

impl Stream {
    fn dataset(self) -> impl Dataset + 'static {
        let spec = SampleSpec::new(DType::I64, &[2]).unwrap().label(DType::U8, &[3]).unwrap();
        FnDataset::new(LEN, spec, move |index, sample| {
            let random = sample.random_seed().cast_signed();
            sample.write(0, &[index.cast_signed(), random])?;
            if self.skips && index % 9 == 4 {
                return Err("bad".into());
            }
            let byte = index.to_le_bytes()[0];
            Ok(sample.write(1, &[byte, byte ^ 0x55, 7])?)
        })
    }

    fn loader(self, run: Run, rank: u64, resume: Option<&LoaderState>) -> AsyncDataLoader {
        let mut config = AsyncDataLoaderConfig::builder()
            .batch_size(GLOBAL / run.world_size)
            .shard(rank, run.world_size)
            .workers(run.workers)
            .prefetch_depth(run.depth)
            .epochs(EPOCHS)
            .shuffle(self.shuffle)
            .seed(11)
            .last_batch(self.last)
            .device(Device::host());
        if self.skips {
            config = config.error_policy(ErrorPolicy::Skip { at_most: 100 });
        }
        if let Some(state) = resume {
            config = config.resume_from(state.clone());
        }
        start(self.dataset(), config)
    }

    /// Runs the stream to its end, from a state on. Returns the bytes, and the states of rank 0:
    /// before the first batch, and after each.
    fn run(self, run: Run, resume: Option<&LoaderState>) -> (Bytes, Vec<LoaderState>) {
        let mut whole = Bytes::new();
        let mut states = Vec::new();
        for rank in 0..run.world_size {
            let loader = self.loader(run, rank, resume);
            let mut state = vec![loader.state()];
            let mut number = 0;
            while let Some(batch) = loader.get_batch().unwrap() {
                let tensors = [batch.input_tensor(), batch.label_tensor().unwrap()];
                let bytes = tensors.map(|tensor| tensor.to_bytes().unwrap());
                match whole.get_mut(number) {
                    None => whole.push(bytes.to_vec()),
                    Some(together) => {
                        together.iter_mut().zip(bytes).for_each(|(all, own)| all.extend(own));
                    }
                }
                number += 1;
                state.push(loader.state());
            }
            assert_eq!(number, whole.len(), "as many batches for each rank");
            if rank == 0 {
                states = state;
            } else {
                let place = |state: &LoaderState| (state.epoch, state.position);
                assert!(states.iter().map(place).eq(state.iter().map(place)));
            }
        }
        (whole, states)
    }
}

/// The whole stream and every state of it, saved and read again, for each way to go on.
#[test]
fn from_every_batch_on_the_rest_is_the_same_bytes_however_it_is_run() {
    let mut streams = Vec::new();
    for shuffle in [false, true] {
        for last in [LastBatch::Keep, LastBatch::Drop, LastBatch::Pad] {
            for skips in [false, true] {
                streams.push(Stream { shuffle, last, skips });
            }
        }
    }
    let run = |world_size, workers, depth| Run { world_size, workers, depth };
    let runs = [
        (run(1, 2, 3), run(1, 5, 1)),
        (run(1, 1, 1), run(2, 3, 2)),
        (run(2, 2, 2), run(4, 1, 3)),
        (run(4, 1, 1), run(1, 4, 4)),
    ];
    let next = AtomicUsize::new(0);
    let body = || {
        while let Some(stream) = streams.get(next.fetch_add(1, Ordering::Relaxed)) {
            let (whole, all) = stream.run(run(1, 2, 3), None);
            let per_epoch = if stream.last == LastBatch::Drop { 3 } else { 4 };
            assert_eq!(whole.len(), 2 * per_epoch);
            assert_eq!(all[per_epoch].skipped.is_empty(), !stream.skips, "{stream:?}");
            for (before, after) in runs {
                let (_, states) = stream.run(before, None);
                for (taken, state) in states.iter().enumerate() {
                    assert_eq!((state.epoch, state.position), place(taken, per_epoch));
                    let state = LoaderState::from_json(&state.to_json()).unwrap();
                    let (rest, ends) = stream.run(after, Some(&state));
                    let what = format!("{stream:?} {before:?} {after:?} after {taken}");
                    assert_eq!(rest, whole[taken..], "{what}");
                    if before.world_size == 1 && after.world_size == 1 {
                        // The skips too: the state is that of a run that was never interrupted.
                        assert_eq!(ends, all[taken..], "{what}");
                    }
                    assert_eq!(ends[0].skipped, state.skipped, "{what}");
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(body);
        }
    });
}

/// Where a stream is after so many batches.
fn place(taken: usize, per_epoch: usize) -> (u64, u64) {
    ((taken / per_epoch) as u64, (taken % per_epoch) as u64)
}

fn config() -> ConfigBuilder {
    AsyncDataLoaderConfig::builder()
        .batch_size(8)
        .epochs(3)
        .shuffle(true)
        .seed(3)
        .device(Device::host())
}

/// The state in the middle of the second epoch of fifty numbers.
fn state() -> LoaderState {
    let loader = start(numbers(50, |_| Ok(())), config());
    for _ in 0..10 {
        loader.get_batch().unwrap().unwrap();
    }
    loader.state()
}

fn resumed(len: u64, config: ConfigBuilder, state: LoaderState) -> Result<AsyncDataLoader, Error> {
    let config = config.resume_from(state).build().unwrap();
    AsyncDataLoader::new(numbers(len, |_| Ok(())), config)
}

#[test]
fn a_state_of_another_stream_is_refused() {
    let refused = |len, config| match resumed(len, config, state()) {
        Err(Error::State { problem }) => problem,
        other => panic!("{other:?}"),
    };
    for (problem, part) in [
        (refused(51, config()), "another data set"),
        (refused(50, config().batch_size(7)), "global batches of 8"),
        (refused(50, config().shard(0, 2)), "16"),
        (refused(50, config().seed(4)), "another order (seed 3, this loader has 4"),
        (refused(50, config().shuffle(false)), "another order"),
        (refused(50, config().last_batch(LastBatch::Pad)), "another order"),
    ] {
        assert!(problem.contains(part), "{problem:?} should say {part:?}");
    }
    // What may differ.
    resumed(50, config().workers(7).prefetch_depth(1).max_held(5), state()).unwrap();
    resumed(50, config().batch_size(2).shard(3, 4), state()).unwrap();
    resumed(50, config().endless(), state()).unwrap();
}

/// The fields are public, and whoever keeps the state in a file of their own has no checksum.
#[test]
fn a_state_with_a_field_that_makes_no_sense_is_refused() {
    let refused = |change: fn(&mut LoaderState)| {
        let mut state = state();
        change(&mut state);
        match resumed(50, config().endless(), state) {
            Err(Error::State { problem }) => problem,
            other => panic!("{other:?}"),
        }
    };
    for (problem, part) in [
        (refused(|state| state.version = 0), "version 0"),
        (refused(|state| state.version = 2), "version 2"),
        (refused(|state| state.version = u32::MAX), "version 4294967295"),
        (refused(|state| state.seed = u64::MAX), "seed 18446744073709551615"),
        (refused(|state| state.epoch = u64::MAX), "epoch 18446744073709551615"),
        (refused(|state| state.position = 8), "batch 8 of an epoch of 7"),
        (refused(|state| state.position = u64::MAX), "batch 18446744073709551615"),
        (refused(|state| state.global_batch = 0), "global batches of 0"),
        (refused(|state| state.global_batch = u64::MAX), "18446744073709551615"),
        (refused(|state| state.fingerprint ^= 1), "another data set"),
        (refused(|state| state.order ^= 1), "another order"),
    ] {
        assert!(problem.contains(part), "{problem:?} should say {part:?}");
    }
}

/// What is accepted, and what comes of it.
#[test]
fn a_state_of_another_place_in_the_stream_is_continued_there() {
    let rest = |epoch, position| {
        let mut state = state();
        (state.epoch, state.position) = (epoch, position);
        let loader = resumed(50, config(), state).unwrap();
        loader.start().unwrap();
        loader.batches().map(|batch| batch.unwrap().len()).sum::<u64>()
    };
    assert_eq!(rest(0, 0), 150);
    // The end of an epoch is the beginning of the next.
    assert_eq!(rest(0, 7), 100);
    assert_eq!(rest(1, 0), 100);
    // Behind the last epoch there is nothing, as for a run that was finished.
    assert_eq!(rest(2, 7), 0);
    assert_eq!(rest(3, 0), 0);
    assert_eq!(rest(1000, 3), 0);
    // So a finished run can be continued by another epoch.
    let mut state = state();
    (state.epoch, state.position) = (3, 0);
    let loader = resumed(50, config().epochs(4), state).unwrap();
    loader.start().unwrap();
    assert_eq!(loader.batches().map(|batch| batch.unwrap().len()).sum::<u64>(), 50);
}

/// The skips of a state count against what may be skipped.
#[test]
fn skips_of_the_state_count() {
    let fail = |index| if index == 30 { Err("bad".into()) } else { Ok(()) };
    let config = || config().shuffle(false).epochs(1);
    let skip = |at_most| config().error_policy(ErrorPolicy::Skip { at_most });
    let first = start(numbers(50, fail), skip(1));
    while first.get_batch().unwrap().is_some() {}
    let mut state = first.state();
    let skipped: Vec<Skipped> = state.skipped.clone();
    assert_eq!(skipped.len(), 1);
    (state.epoch, state.position) = (0, 2);
    let resumed = |at_most| start(numbers(50, fail), skip(at_most).resume_from(state.clone()));
    let error = resumed(1).batches().find_map(Result::err).unwrap();
    assert!(matches!(error, Error::TooManySkipped { skipped: 2, at_most: 1, .. }), "{error}");
    let loader = resumed(2);
    assert_eq!(loader.batches().map(|batch| batch.unwrap().len()).sum::<u64>(), 33);
    assert_eq!(loader.state().skipped, [skipped.clone(), skipped].concat());
}

/// At every batch too; the end of an epoch is known only when the next one is asked for.
#[test]
fn pull_sources_are_continued_at_every_batch() {
    for drop_last in [false, true] {
        let start = |config: ConfigBuilder| {
            start_source(super::stream::pulled(25), config.drop_last(drop_last))
        };
        let config =
            || AsyncDataLoaderConfig::builder().batch_size(10).epochs(2).device(Device::host());
        let whole = super::stream::collect(&start(config()));
        assert_eq!(whole.len(), if drop_last { 4 } else { 6 });
        let loader = start(config());
        for taken in 0..=whole.len() {
            let state = LoaderState::from_json(&loader.state().to_json()).unwrap();
            let rest = start(config().workers(1 + taken).prefetch_depth(1).resume_from(state));
            assert_eq!(super::stream::collect(&rest), whole[taken..], "after {taken} batches");
            assert_eq!(loader.get_batch().unwrap().is_some(), taken < whole.len());
        }
    }
}
