//! Which way batches go, why, and what is left behind.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use batchline::{
    Conversion, ErrorPolicy, Gather, HostTensor, InMemory, LoadPath, MemoryLimits, Residency,
    Sampler,
};

use super::*;

const LEN: u64 = 100;
const WIDTH: u64 = 24;

fn bytes() -> Vec<u8> {
    (0..LEN * WIDTH).map(|at| batchline::mix(&[at]).to_le_bytes()[1]).collect()
}

/// A hundred samples of 24 bytes, with labels of 8.
fn in_memory() -> InMemory {
    let inputs = HostTensor::new(bytes(), &[LEN, WIDTH]).unwrap();
    let labels = HostTensor::new((0..LEN.cast_signed()).collect(), &[LEN]).unwrap();
    InMemory::new(inputs).unwrap().labels(labels).unwrap()
}

fn gathering(limits: MemoryLimits, plan: FaultPlan) -> (MemoryManager, FaultControl) {
    let (device, control) = faulty_device(FaultPlan { gathers: true, ..plan });
    (MemoryManager::with_limits(&device, limits), control)
}

/// Takes everything, and checks it.
fn drain(loader: &AsyncDataLoader) {
    let (mut inputs, mut labels) = (Vec::new(), Vec::new());
    while let Some(batch) = loader.get_batch().unwrap() {
        inputs.extend(batch.input_tensor().to_vec::<u8>().unwrap());
        labels.extend(batch.label_tensor().unwrap().to_vec::<i64>().unwrap());
    }
    assert_eq!(labels, (0..LEN.cast_signed()).collect::<Vec<_>>());
    assert_eq!(inputs, bytes());
}

/// Loads the samples once, and tells which way and why.
fn way(memory: &MemoryManager, config: ConfigBuilder) -> (LoadPath, String) {
    let loader = start(in_memory(), config.memory_manager(memory.clone()));
    let stats = loader.stats();
    drain(&loader);
    (stats.path, stats.path_reason)
}

fn plain() -> ConfigBuilder {
    AsyncDataLoaderConfig::builder().batch_size(16)
}

#[test]
fn a_device_that_can_fetches_samples_by_itself() {
    let (memory, control) = gathering(MemoryLimits::default(), FaultPlan::default());
    let loader = start(in_memory(), plain().memory_manager(memory.clone()));
    assert_eq!(control.registered(), 2, "the inputs and the labels");
    // Page-locked, and counted so.
    assert!(memory.stats().staging_in_use >= LEN * (WIDTH + 8));
    drain(&loader);
    let stats = loader.stats();
    assert_eq!(stats.path, LoadPath::Gathered);
    assert_eq!(
        stats.path_reason,
        "the data set lies in memory; the device fetches samples by a kernel"
    );
    // Each sample once, and its number.
    assert_eq!(stats.bytes_transferred, LEN * (WIDTH + 8 + 8));
    assert!(stats.link_rate() > 0.0);
    assert_eq!(stats.processor_time.is_some(), cfg!(unix));
    // Another generation registers nothing anew.
    loader.stop().unwrap();
    assert_eq!(control.registered(), 2);
    loader.start().unwrap();
    assert_eq!(control.registered(), 2);
    drain(&loader);
    drop(loader);
    assert_eq!(control.registered(), 0);
    assert_home(&memory);
    assert_eq!(control.mismatches(), 0);
}

#[test]
fn what_fetches_them_can_be_chosen() {
    let by = |gather| {
        let (memory, _) = gathering(MemoryLimits::default(), FaultPlan::default());
        way(&memory, plain().gather(gather))
    };
    let fetched = "the data set lies in memory; the device fetches samples by ";
    assert_eq!(by(Gather::Copies), (LoadPath::Gathered, format!("{fetched}copies")));
    assert_eq!(by(Gather::Kernel), (LoadPath::Gathered, format!("{fetched}a kernel")));
    let (path, reason) = by(Gather::Never);
    assert_eq!((path, &*reason), (LoadPath::Staged, "workers were asked to copy the samples"));
}

#[test]
fn conversions_are_fused_where_they_can_be() {
    let (memory, control) = gathering(MemoryLimits::default(), FaultPlan::default());
    for (dtype, gather, runs) in [
        // In one segment of the kernel's stream; with i16 the conversion comes behind it there.
        (DType::F32, Gather::Auto, "by a kernel that converts on the way"),
        (DType::I16, Gather::Auto, "by a kernel"),
        (DType::F32, Gather::Copies, "by copies"),
    ] {
        let config = plain().gather(gather).convert(dtype, Conversion::new());
        let loader = start(in_memory(), config.memory_manager(memory.clone()));
        let reason = loader.stats().path_reason;
        assert!(reason.ends_with(runs), "{dtype}: {reason}");
        let mut all = Vec::new();
        for batch in &loader {
            let input = batch.unwrap().input_tensor().convert_to(DType::U8).unwrap();
            all.extend(input.to_vec::<u8>().unwrap());
        }
        assert_eq!(all, bytes(), "{dtype}");
    }
    assert_eq!(control.mismatches(), 0);
}

#[test]
fn samples_that_are_uploaded_cross_the_link_once() {
    let (memory, control) = gathering(MemoryLimits::default(), FaultPlan::default());
    let config = plain().residency(Residency::Device).epochs(1);
    let loader = start(in_memory(), config.memory_manager(memory.clone()));
    drain(&loader);
    let stats = loader.stats();
    assert_eq!(stats.path, LoadPath::Resident);
    assert_eq!(stats.path_reason, "asked for, and its 3200 bytes fit on the device");
    assert_eq!(stats.bytes_transferred, LEN * (WIDTH + 8) + LEN * 8);
    assert_eq!(control.registered(), 0);
    loader.stop().unwrap();
    let uploads = control.submissions();
    loader.start().unwrap();
    drain(&loader);
    // Only the numbers of another generation.
    assert_eq!(loader.stats().bytes_transferred, LEN * 8);
    assert!(control.submissions() > uploads);
    drop(loader);
    assert_home(&memory);
}

#[test]
fn what_does_not_fit_stays_where_it_is() {
    let small = MemoryLimits::default().staging_limit(3000);
    let (memory, control) = gathering(small, FaultPlan::default());
    let (path, reason) = way(&memory, plain());
    assert_eq!(path, LoadPath::Staged);
    assert!(reason.contains("staging_limit"), "{reason}");
    assert_eq!(control.registered(), 0);

    let (memory, control) =
        gathering(MemoryLimits::default().device_limit(3000), FaultPlan::default());
    let (path, reason) = way(&memory, plain().residency(Residency::Device));
    assert_eq!(path, LoadPath::Gathered);
    assert!(reason.starts_with("not resident: ") && reason.contains("device_limit"), "{reason}");
    assert!(reason.ends_with("by a kernel"), "{reason}");
    assert_eq!(control.registered(), 0, "after the loader is gone");
}

/// The samples alone fit on the device, but leave no room for a batch.
#[test]
fn what_leaves_no_room_for_batches_is_undone() {
    let limits = MemoryLimits::default().device_limit(3600).staging_limit(64 << 10);
    let (memory, _) = gathering(limits, FaultPlan::default());
    let (path, reason) = way(&memory, plain().residency(Residency::Device));
    assert_eq!(path, LoadPath::Gathered, "{reason}");
    assert!(reason.starts_with("not resident: "), "{reason}");
    assert_home(&memory);
}

#[test]
fn what_the_device_refuses_is_staged_and_the_reason_told() {
    let refused = FaultPlan { fail_registration: Some(2), ..FaultPlan::default() };
    let (memory, control) = gathering(MemoryLimits::default(), refused);
    let (path, reason) = way(&memory, plain());
    assert_eq!(path, LoadPath::Staged);
    assert_eq!(reason, "faulty: registering failed: a test made it fail");
    assert_eq!(control.registered(), 0, "also the first tensor's");
    assert_home(&memory);
    assert!(memory.device().check().is_ok());

    let (memory, _) = faulty(FaultPlan::default());
    let (path, reason) = way(&memory, plain().residency(Residency::Device));
    assert_eq!(path, LoadPath::Staged);
    assert_eq!(
        reason,
        "not resident: this device does not gather from its own memory; this device does not \
         fetch samples from the host's memory"
    );
}

#[test]
fn samples_that_do_not_lie_in_memory_are_read() {
    let (memory, _) = gathering(MemoryLimits::default(), FaultPlan::default());
    let config = builder(&memory).residency(Residency::Device);
    let loader = start(numbers(30, |_| Ok(())), config);
    let stats = loader.stats();
    assert_eq!(stats.path, LoadPath::Staged);
    assert_eq!(
        stats.path_reason,
        "not resident: the data set does not have all of \"input\" in memory; the data set does \
         not have all of \"input\" in memory"
    );
    let host = start(numbers(3, |_| Ok(())), builder(&host()));
    assert_eq!(host.stats().path_reason, "the device's memory is the host's");
}

/// An order that names a sample which is not there.
struct Beyond;

impl Sampler for Beyond {
    fn len(&self) -> u64 {
        20
    }
    fn index(&self, _: u64, position: u64) -> u64 {
        if position == 7 { LEN } else { position }
    }
    fn fingerprint(&self) -> u64 {
        1
    }
}

/// The device is never told of a sample that is not there: it would read somebody else's memory.
#[test]
fn numbers_beyond_the_samples_are_errors() {
    for residency in [Residency::Host, Residency::Device] {
        let (memory, _) = gathering(MemoryLimits::default(), FaultPlan::default());
        let config = || {
            AsyncDataLoaderConfig::builder()
                .batch_size(5)
                .sampler(Beyond)
                .residency(residency)
                .memory_manager(memory.clone())
        };
        let loader = start(in_memory(), config());
        assert_eq!(loader.get_batch().unwrap().unwrap().len(), 5);
        let error = loader.get_batch().unwrap_err().chain();
        assert!(error.contains("the sampler named sample 100 of 100"), "{error}");
        drop(loader);

        let skip = ErrorPolicy::Skip { at_most: 1 };
        let loader = start(in_memory(), config().error_policy(skip));
        let labels: Vec<i64> = loader
            .batches()
            .flat_map(|batch| batch.unwrap().label_tensor().unwrap().to_vec::<i64>().unwrap())
            .collect();
        assert_eq!(labels, (0..20).filter(|label| *label != 7).collect::<Vec<_>>());
        assert_eq!(loader.stats().skipped, 1);
    }
}

/// More tensors than one command takes.
#[test]
fn any_number_of_tensors_is_fetched() {
    for residency in [Residency::Host, Residency::Device] {
        let (memory, control) = gathering(MemoryLimits::default(), FaultPlan::default());
        let mut dataset = in_memory();
        for number in 0..6u8 {
            // Some long enough for copies.
            let width = 1 + 40 * u64::from(number);
            let bytes: Vec<u8> = (0..LEN * width).map(|at| at.to_le_bytes()[0] ^ number).collect();
            let weights = HostTensor::new(bytes, &[LEN, width]).unwrap();
            dataset = dataset.weights(&format!("w{number}"), weights).unwrap();
        }
        let config = plain().residency(residency).memory_manager(memory.clone());
        let loader = start(dataset, config);
        for (number, batch) in (0u64..).zip(&loader) {
            let batch = batch.unwrap();
            for (weight, tensor) in (0u8..).zip(batch.weight_tensors()) {
                let width = 1 + 40 * u64::from(weight);
                let first = number * 16 * width;
                let expected: Vec<u8> = (first..first + batch.len() * width)
                    .map(|at| at.to_le_bytes()[0] ^ weight)
                    .collect();
                assert_eq!(tensor.to_vec::<u8>().unwrap(), expected, "w{weight} of {number}");
            }
        }
        drop(loader);
        assert_eq!((control.registered(), control.mismatches()), (0, 0));
    }
}

/// A data set whose memory is not what its length says, and one that panics when it is asked.
struct Odd {
    spec: SampleSpec,
    memory: Vec<u8>,
    panics: bool,
}

impl Dataset for Odd {
    fn len(&self) -> u64 {
        10
    }
    fn spec(&self) -> &SampleSpec {
        &self.spec
    }
    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        sample.input().fill(index.to_le_bytes()[0]);
        Ok(())
    }
    fn contiguous(&self, _: usize) -> Option<&[u8]> {
        assert!(!self.panics, "asked for its memory");
        Some(&self.memory)
    }
}

#[test]
fn memory_of_another_length_is_not_fetched() {
    let (memory, _) = gathering(MemoryLimits::default(), FaultPlan::default());
    let odd = |panics| Odd {
        spec: SampleSpec::new(DType::U8, &[4]).unwrap(),
        memory: vec![0; 39],
        panics,
    };
    let loader = start(odd(false), builder(&memory));
    let stats = loader.stats();
    assert_eq!(stats.path_reason, "the data set has 39 bytes of \"input\", not 40");
    let batch = loader.get_batch().unwrap().unwrap();
    assert_eq!(batch.input_tensor().to_vec::<u8>().unwrap()[36..], [9; 4]);

    let config = builder(&memory).build().unwrap();
    let loader = AsyncDataLoader::new(odd(true), config).unwrap();
    let error = loader.start().unwrap_err().to_string();
    assert!(error.contains("the data set panicked: asked for its memory"), "{error}");
}

/// A data set that gives its memory up after so many questions, and says that it has grown.
struct Fickle {
    spec: SampleSpec,
    memory: Vec<u8>,
    questions: AtomicU64,
    grown: Arc<AtomicU64>,
}

impl Fickle {
    fn new(questions: u64) -> (Self, Arc<AtomicU64>) {
        let spec = SampleSpec::new(DType::U8, &[4]).unwrap();
        let (questions, grown) = (AtomicU64::new(questions), Arc::new(AtomicU64::new(0)));
        (Self { spec, memory: vec![7; 40], questions, grown: Arc::clone(&grown) }, grown)
    }
}

impl Dataset for Fickle {
    fn len(&self) -> u64 {
        10 + self.grown.load(Ordering::SeqCst)
    }
    fn spec(&self) -> &SampleSpec {
        &self.spec
    }
    fn read(&self, _: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        sample.input().fill(7);
        Ok(())
    }
    fn contiguous(&self, _: usize) -> Option<&[u8]> {
        let asked = |left: u64| left.checked_sub(1);
        let left = self.questions.fetch_update(Ordering::SeqCst, Ordering::SeqCst, asked);
        left.is_ok().then_some(&*self.memory)
    }
}

#[test]
fn memory_that_is_given_up_is_not_uploaded() {
    let (memory, _) = gathering(MemoryLimits::default(), FaultPlan::default());
    let (fickle, _) = Fickle::new(1);
    let loader = start(fickle, builder(&memory).residency(Residency::Device));
    let reason = loader.stats().path_reason;
    assert!(reason.starts_with("not resident: the data set changed its memory; "), "{reason}");
    let batch = loader.get_batch().unwrap().unwrap();
    assert_eq!(batch.input_tensor().to_vec::<u8>().unwrap(), [7; 40]);
}

/// The last sample of as many as there once were.
struct Last(u64);

impl Sampler for Last {
    fn len(&self) -> u64 {
        1
    }
    fn index(&self, _: u64, _: u64) -> u64 {
        self.0
    }
    fn fingerprint(&self) -> u64 {
        self.0
    }
}

/// What was registered or uploaded does not grow with the data set.
#[test]
fn samples_that_came_later_are_not_fetched() {
    for residency in [Residency::Host, Residency::Device] {
        let (memory, _) = gathering(MemoryLimits::default(), FaultPlan::default());
        let (fickle, grown) = Fickle::new(u64::MAX);
        let config = builder(&memory).residency(residency).sampler(Last(14)).epochs(2);
        let loader = AsyncDataLoader::new(fickle, config.build().unwrap()).unwrap();
        // Chosen before it grows.
        loader.start().unwrap();
        loader.stop().unwrap();
        grown.store(10, Ordering::SeqCst);
        loader.start().unwrap();
        let error = loader.get_batch().unwrap_err().chain();
        assert!(error.contains("the sampler named sample 14 of 10"), "{error}");
    }
}
