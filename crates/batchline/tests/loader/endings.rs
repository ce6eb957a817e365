//! Errors, faults and limits, beside the endings that the test `endings` goes through one by one.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchline::testing::{FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, BoxError, DType, DataSource, Delivery, Error, ErrorPolicy, FnDataset,
    FnSource, HostTensor, MemoryManager, Sample, SampleMut, SampleSpec,
};

use super::*;

#[test]
fn an_error_comes_behind_the_batches_before_it_and_again_at_every_call() {
    for workers in [1, 4, 8] {
        let memory = host();
        let fail = |index| if index == 37 { Err("no such luck".into()) } else { Ok(()) };
        let loader = start(numbers(100, fail), builder(&memory).workers(workers));
        for number in 0..3 {
            let batch = loader.get_batch().unwrap().unwrap();
            assert_eq!(values(&batch), (number * 10..number * 10 + 10).collect::<Vec<i64>>());
        }
        for _ in 0..3 {
            let error = loader.get_batch().unwrap_err();
            assert_eq!(
                error.chain(),
                "worker: sample 37 in batch 3 of epoch 0: no such luck",
                "{workers} workers"
            );
        }
        assert_eq!(loader.batches().count(), 1, "an iterator ends after the error");
        loader.stop().unwrap();
        assert_home(&memory);
    }
}

#[test]
fn of_several_errors_the_first_sample_counts() {
    for round in 0..20 {
        let others = Arc::new(AtomicU64::new(0));
        let fail = {
            let others = Arc::clone(&others);
            move |index: u64| {
                match index {
                    // The first to fail, and late: one behind it comes back before.
                    4 => {
                        eventually("another failure", || others.load(Ordering::SeqCst) > 0);
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    5.. => drop(others.fetch_add(1, Ordering::SeqCst)),
                    _ => return Ok(()),
                }
                Err(format!("bad {index}").into())
            }
        };
        let loader = start(numbers(100, fail), builder(&host()).workers(8));
        let error = loader.get_batch().unwrap_err();
        assert!(matches!(error, Error::Stage { sample: Some(4), .. }), "round {round}: {error}");
    }
}

#[test]
fn skipped_samples_are_left_out_counted_and_listed() {
    for workers in [1, 8] {
        let fail = |index: u64| if index % 7 == 3 { Err("bad".into()) } else { Ok(()) };
        let policy = ErrorPolicy::Skip { at_most: 10 };
        let config = || builder(&host()).workers(workers).error_policy(policy);
        let loader = start(numbers(50, fail), config());
        let batches: Vec<_> =
            loader.batches().map(|batch| values(&batch.unwrap())).collect::<Vec<_>>();
        let good: Vec<i64> = (0..50).filter(|index| index % 7 != 3).collect();
        assert_eq!(batches.len(), 5);
        assert_eq!(batches.concat(), good);
        let state = loader.state();
        let skipped: Vec<_> = state.skipped.iter().map(|skip| skip.sample.unwrap()).collect();
        assert_eq!(skipped, [3, 10, 17, 24, 31, 38, 45]);
        assert!(state.skipped[0].reason.contains("bad"), "{:?}", state.skipped[0]);
        assert_eq!(loader.stats().skipped, 7);
        // A resume remembers them.
        let resumed = start(numbers(50, fail), config().epochs(2).resume_from(state));
        assert_eq!(resumed.state().skipped.len(), 7);
        let error = resumed.batches().find_map(Result::err).unwrap();
        assert!(matches!(error, Error::TooManySkipped { skipped: 11, at_most: 10, .. }), "{error}");
    }
}

#[test]
fn a_batch_of_which_all_is_skipped_is_delivered_empty() {
    let fail = |index: u64| if (10..20).contains(&index) { Err("bad".into()) } else { Ok(()) };
    for unified in [true, false] {
        let (memory, _) = faulty(FaultPlan { unified, ..FaultPlan::default() });
        let policy = ErrorPolicy::Skip { at_most: 10 };
        let loader = start(numbers(30, fail), builder(&memory).error_policy(policy));
        let lens: Vec<u64> = loader.batches().map(|batch| batch.unwrap().len()).collect();
        assert_eq!(lens, [10, 0, 10]);
    }
}

#[test]
fn reads_are_retried() {
    let failures = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&failures);
    let fail = move |index| {
        if index == 5 && count.fetch_add(1, Ordering::SeqCst) < 2 {
            return Err("not yet".into());
        }
        Ok(())
    };
    let retry = |times| ErrorPolicy::Retry { times, backoff: Duration::from_millis(1) };
    let loader = start(numbers(20, fail), builder(&host()).error_policy(retry(2)));
    assert_eq!(loader.batches().map(|batch| batch.unwrap().len()).sum::<u64>(), 20);
    assert_eq!(loader.stats().retries, 2);

    let always = |index| if index == 5 { Err("never".into()) } else { Ok(()) };
    let loader = start(numbers(20, always), builder(&host()).error_policy(retry(3)));
    assert!(loader.get_batch().unwrap_err().chain().contains("never"));
    assert_eq!(loader.stats().retries, 3);
}

#[test]
fn a_consumer_that_holds_everything_is_told_so() {
    for unified in [true, false] {
        let (memory, _) = faulty(FaultPlan { unified, ..FaultPlan::default() });
        let config = builder(&memory).prefetch_depth(2).max_held(1);
        let loader = start(numbers(1000, |_| Ok(())), config);
        let mut held: Vec<_> = (0..3).map(|_| loader.get_batch().unwrap().unwrap()).collect();
        let error = loader.get_batch().unwrap_err();
        assert!(matches!(error, Error::TooManyHeld { held: 3, max_held: 1 }), "{error}");
        assert!(loader.try_get_batch().is_err());
        // Dropping one is enough, and nothing was lost.
        held.pop();
        assert_eq!(values(&loader.get_batch().unwrap().unwrap())[0], 30);
    }
}

#[test]
fn limits_bound_the_buffers_and_one_of_each_is_enough() {
    let (device, _) = faulty_device(FaultPlan::default());
    // Ten numbers fit 256 bytes: two slots and one output.
    let limits = batchline::MemoryLimits::default().device_limit(256).staging_limit(512);
    let memory = MemoryManager::with_limits(&device, limits);
    let loader = start(numbers(100, |_| Ok(())), builder(&memory).prefetch_depth(5));
    let mut seen = Vec::new();
    while let Some(batch) = loader.get_batch().unwrap() {
        let input = batch.input_tensor().clone();
        drop(batch);
        seen.extend(input.to_vec::<i64>().unwrap());
    }
    assert_eq!(seen, (0..100).collect::<Vec<i64>>());
    let stats = memory.stats();
    assert!(stats.device_in_use + stats.device_cached <= 256, "{stats:?}");
    assert!(stats.staging_in_use + stats.staging_cached <= 512, "{stats:?}");

    let limits = batchline::MemoryLimits::default().staging_limit(64);
    let memory = MemoryManager::with_limits(&device, limits);
    let config = builder(&memory).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(100, |_| Ok(())), config).unwrap();
    let error = loader.start().unwrap_err();
    assert!(matches!(error, Error::TooLarge { limit: 64, .. }), "{error}");
}

#[test]
fn staging_memory_does_not_grow_with_the_workers() {
    let in_flight = |workers| {
        let (memory, _) = faulty(FaultPlan::default());
        let loader = start(numbers(1000, |_| Ok(())), builder(&memory).workers(workers));
        while loader.get_batch().unwrap().is_some() {}
        loader.stats().staging_bytes
    };
    assert_eq!(in_flight(1), in_flight(32));
}

#[test]
fn nothing_is_allocated_in_a_steady_state() {
    for unified in [true, false] {
        let (memory, _) = faulty(FaultPlan { unified, ..FaultPlan::default() });
        let config = builder(&memory).endless().convert(DType::F32, Default::default());
        let loader = start(numbers(1000, |_| Ok(())), config);
        for _ in 0..5 {
            loader.get_batch().unwrap().unwrap();
        }
        let before = memory.stats().allocations;
        for _ in 0..50 {
            loader.get_batch().unwrap().unwrap();
        }
        assert_eq!(memory.stats().allocations, before);
        // Starting again takes what is there.
        loader.stop().unwrap();
        loader.start().unwrap();
        loader.get_batch().unwrap().unwrap();
        assert_eq!(memory.stats().allocations, before);
    }
}

/// Takes batches until the stream ends; returns them and the error.
fn drain(loader: &AsyncDataLoader) -> (Vec<i64>, Option<Error>) {
    let mut seen = Vec::new();
    loop {
        match loader.get_batch() {
            Ok(Some(batch)) => match batch.input_tensor().to_vec::<i64>() {
                Ok(values) => seen.extend(values),
                Err(error) => return (seen, Some(error)),
            },
            Ok(None) => return (seen, None),
            Err(error) => return (seen, Some(error)),
        }
    }
}

#[test]
fn any_submission_that_fails_ends_in_an_error_and_everything_comes_home() {
    for number in 1..=10 {
        let plan = FaultPlan { fail_submit: Some(number), ..FaultPlan::default() };
        let (memory, _) = faulty(plan);
        let loader = start(numbers(100, |_| Ok(())), builder(&memory));
        let (seen, error) = drain(&loader);
        let error = error.expect("the failure").chain();
        assert!(error.contains("a test made it fail"), "{number}: {error}");
        assert_eq!(seen, (0..seen.len() as i64).collect::<Vec<i64>>());
        loader.stop().unwrap();
        drop(loader);
        assert_home(&memory);
        assert_eq!(memory.stats().quarantined, 0, "nothing had reached the device");
        memory.device().check().unwrap();
    }
}

#[test]
fn what_may_have_reached_the_device_is_quarantined() {
    for number in 1..=10 {
        for panics in [false, true] {
            let mut plan =
                FaultPlan { max_delay: Duration::from_micros(100), ..Default::default() };
            let fault =
                if panics { &mut plan.panic_in_submit } else { &mut plan.fail_after_enqueue };
            *fault = Some(number);
            let (memory, _) = faulty(plan);
            let loader = start(numbers(100, |_| Ok(())), builder(&memory));
            let (_, error) = drain(&loader);
            assert!(error.is_some());
            assert!(memory.device().check().unwrap_err().is_device_lost());
            assert!(loader.get_batch().is_err(), "a lost device stays lost");
            loader.stop().unwrap();
            drop(loader);
            assert_home(&memory);
            assert!(memory.stats().quarantined > 0);
        }
    }
}

#[test]
fn a_lost_device_ends_every_wait() {
    for segment in [1, 2, 3, 7, 20] {
        for unified in [false, true] {
            let plan = FaultPlan {
                unified,
                seed: segment,
                max_delay: Duration::from_micros(200),
                lose_at: Some(segment),
                ..FaultPlan::default()
            };
            let (memory, _) = faulty(plan);
            let config = builder(&memory).endless().convert(DType::F32, Default::default());
            let loader = start(numbers(1000, |_| Ok(())), config);
            let error = loop {
                match loader.get_batch() {
                    Ok(batch) => drop(batch),
                    Err(error) => break error,
                }
            };
            assert!(error.is_device_lost(), "{error}");
            assert!(loader.get_batch().unwrap_err().is_device_lost());
            loader.stop().unwrap();
            assert!(loader.start().unwrap_err().is_device_lost());
        }
    }
}

#[test]
fn a_device_that_is_lost_while_everybody_waits() {
    let (memory, control) = faulty(FaultPlan::default());
    control.hold_transfers();
    let loader = Arc::new(start(numbers(1000, |_| Ok(())), builder(&memory)));
    let pool = batchline::StagingBufferPool::with_buffer_size(&memory, 1, 256).unwrap();
    let _taken = pool.get_buffer().unwrap();
    let other = pool.clone();
    let waiter = spawn(move || other.get_buffer().map(drop));
    let tensor = memory.tensor(&[8], DType::U8).unwrap();
    let reader = spawn(move || tensor.to_vec::<u8>());
    std::thread::sleep(Duration::from_millis(20));
    control.lose();
    assert!(waiter.join().unwrap().unwrap_err().is_device_lost());
    assert!(reader.join().unwrap().unwrap_err().is_device_lost());
    let error = loop {
        match loader.get_batch() {
            Ok(batch) => drop(batch),
            Err(error) => break error,
        }
    };
    assert!(error.is_device_lost(), "{error}");
}

#[test]
fn an_allocation_that_fails_is_an_error_of_start() {
    for number in 1..=6 {
        let (memory, _) =
            faulty(FaultPlan { fail_allocation: Some(number), ..FaultPlan::default() });
        let config = builder(&memory).build().unwrap();
        let loader = AsyncDataLoader::new(numbers(100, |_| Ok(())), config).unwrap();
        let error = loader.start().unwrap_err().chain();
        assert!(error.contains("a test made it fail"), "{error}");
        assert_home(&memory);
        // It happens once; the next start works.
        loader.start().unwrap();
        assert!(loader.get_batch().unwrap().is_some());
    }
}

#[test]
fn a_slot_is_free_only_when_its_transfer_is_over() {
    let (memory, control) = faulty(FaultPlan::default());
    control.hold_transfers();
    let loader = start(numbers(1000, |_| Ok(())), builder(&memory).prefetch_depth(2));
    // Two slots are full and in flight; nothing else can be read.
    while control.submissions() < 2 {
        std::thread::yield_now();
    }
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(control.submissions(), 2, "a third batch went through a slot in flight");
    control.release();
    let (seen, error) = drain(&loader);
    assert!(error.is_none());
    assert_eq!(seen, (0..1000).collect::<Vec<i64>>());
}

#[test]
fn an_output_is_rewritten_only_after_the_consumers_work_on_it() {
    for seed in 0..5 {
        let plan =
            FaultPlan { seed, max_delay: Duration::from_micros(300), ..FaultPlan::default() };
        let (memory, control) = faulty(plan);
        let loader =
            start(numbers(600, |_| Ok(())), builder(&memory).prefetch_depth(2).max_held(1));
        control.hold_consumer();
        for number in 0..3i64 {
            let batch = loader.get_batch().unwrap().unwrap();
            let expected: Vec<i64> = (number * 10..number * 10 + 10).collect();
            control.consume(batch.input_tensor(), to_bytes(&expected));
            // Dropped at once, with the work on it still enqueued.
        }
        std::thread::sleep(Duration::from_millis(5));
        control.release();
        for number in 3..60i64 {
            let batch = loader.get_batch().unwrap().unwrap();
            let expected: Vec<i64> = (number * 10..number * 10 + 10).collect();
            control.consume(batch.input_tensor(), to_bytes(&expected));
        }
        assert!(loader.get_batch().unwrap().is_none());
        loader.stop().unwrap();
        memory.device().check().unwrap();
        let run = control.segments_run();
        while control.segments_run() < run + 1 && control.mismatches() == 0 {
            if control.segments_run() >= 180 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(control.mismatches(), 0, "seed {seed}");
    }
}

fn to_bytes(values: &[i64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_ne_bytes()).collect()
}

/// A pull source that misbehaves in one way.
struct Odd(fn(u64, usize) -> Result<Option<Sample>, BoxError>, u64);

impl DataSource for Odd {
    fn get_batch(&mut self, batch_size: usize) -> Result<Option<Sample>, BoxError> {
        self.1 += 1;
        (self.0)(self.1, batch_size)
    }
    fn reset(&mut self) -> Result<(), BoxError> {
        self.1 = 0;
        Ok(())
    }
}

fn zeros<T: batchline::Element>(dims: &[u64]) -> HostTensor {
    let len = usize::try_from(dims.iter().product::<u64>()).unwrap();
    HostTensor::new(vec![T::zeroed(); len], dims).unwrap()
}

#[test]
fn pull_sources_that_break_their_contract_are_told_so() {
    let error = |odd: fn(u64, usize) -> Result<Option<Sample>, BoxError>| {
        let config = builder(&host()).build().unwrap();
        let loader = AsyncDataLoader::from_source(Odd(odd, 0), config).unwrap();
        loader.start().unwrap();
        loader.batches().find_map(Result::err).expect("an error").chain()
    };
    for (odd, part) in [
        (
            (|call, _| {
                let width = if call < 3 { 4 } else { 5 };
                Ok(Some(Sample::new(zeros::<f32>(&[10, width]))))
            }) as fn(u64, usize) -> Result<Option<Sample>, BoxError>,
            "the source changed its samples: input: f32 [4] became input: f32 [5]",
        ),
        (
            |call, _| {
                let same = Sample::new(zeros::<f32>(&[10]));
                Ok(Some(if call < 3 { same } else { Sample::new(zeros::<f64>(&[10])) }))
            },
            "f32 [] became input: f64 []",
        ),
        (
            |_, _| Ok(Some(Sample::new(zeros::<u8>(&[10])).label(zeros::<u8>(&[9])))),
            "a tensor of shape [9] beside an input of shape [10]",
        ),
        (|_, _| Ok(Some(Sample::new(zeros::<u8>(&[11])))), "a batch of 11 samples"),
        (|_, _| Ok(Some(Sample::new(zeros::<u8>(&[0])))), "a batch of 0 samples"),
        (
            |call, _| Ok(Some(Sample::new(zeros::<u8>(&[if call == 1 { 9 } else { 10 }])))),
            "more after a short batch",
        ),
        (|_, _| Ok(None), "no samples"),
        (|_, _| Err("the disk is gone".into()), "source: batch 0 of epoch 0: the disk is gone"),
        (|_, _| panic!("a bug"), "the source panicked: a bug"),
    ] {
        let error = error(odd);
        assert!(error.contains(part), "{error:?} should say {part:?}");
    }
}

#[test]
fn a_source_that_never_ends_is_read_no_further_than_there_is_room() {
    let calls = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&calls);
    let source = FnSource::new(move |size| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(Some(Sample::new(zeros::<u8>(&[size as u64]))))
    });
    let memory = host();
    let config = builder(&memory).prefetch_depth(2).max_held(1).build().unwrap();
    let loader = AsyncDataLoader::from_source(source, config).unwrap();
    loader.start().unwrap();
    for _ in 0..20 {
        assert!(loader.get_batch().unwrap().is_some());
    }
    std::thread::sleep(Duration::from_millis(10));
    // Three outputs, and one batch in the hands of the worker whose turn it is.
    let read = calls.load(Ordering::SeqCst);
    assert!(read <= 24, "{read} batches were read for 20 taken");
    loader.stop().unwrap();
    drop(loader);
    assert_home(&memory);
}

#[test]
fn data_sets_that_break_their_contract_are_told_so() {
    let spec = || SampleSpec::new(DType::F32, &[3]).unwrap().label(DType::U8, &[]).unwrap();
    let error = |read: fn(&mut SampleMut<'_>) -> Result<(), BoxError>| {
        let dataset = FnDataset::new(10, spec(), move |_, sample| read(sample));
        start(dataset, builder(&host())).get_batch().unwrap_err().chain()
    };
    let missing = error(|sample| Ok(sample.write(0, &[0f32; 3])?));
    assert!(missing.contains("did not write tensor \"label\""), "{missing}");
    let long = error(|sample| Ok(sample.write(0, &[0f32; 4])?));
    assert!(long.contains("input has 4 elements, expected 3"), "{long}");
    let other = error(|sample| Ok(sample.write(0, &[0f64; 3])?));
    assert!(other.contains("dtype f64, expected f32"), "{other}");
}

#[test]
fn times_beyond_the_clock_are_for_ever() {
    let loader = start(numbers(10, |_| Ok(())), builder(&host()).stop_timeout(Duration::MAX));
    let delivery = loader.get_batch_timeout(Duration::MAX).unwrap();
    let Delivery::Ready(batch) = delivery else { panic!("{delivery:?}") };
    batch.wait().unwrap();
    assert!(matches!(loader.get_batch_timeout(Duration::MAX).unwrap(), Delivery::End));
    loader.stop().unwrap();
    let backoff = Duration::MAX;
    let policy = ErrorPolicy::Retry { times: 1, backoff };
    let loader = start(numbers(10, |_| Err("no".into())), builder(&host()).error_policy(policy));
    std::thread::sleep(Duration::from_millis(5));
    loader.stop().unwrap();
}

#[test]
fn nothing_works_before_start() {
    let config = builder(&host()).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(10, |_| Ok(())), config).unwrap();
    assert!(matches!(loader.get_batch(), Err(Error::Lifecycle { state: "not started", .. })));
    loader.stop().unwrap();
    loader.start().unwrap();
    assert!(matches!(loader.start(), Err(Error::Lifecycle { state: "started already", .. })));
}
