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

/// Rows so long that copies fetch them faster are converted behind the copies.
#[test]
fn long_rows_are_fetched_by_copies_and_then_converted() {
    let way = |gather, dtype| {
        let (memory, control) = gathering(MemoryLimits::default(), FaultPlan::default());
        let factors = Conversion::new().scale_and_bias(&[0.25], &[-3.0]);
        let config = plain().gather(gather).convert(dtype, factors).memory_manager(memory.clone());
        let loader = start(wide(LEN, 96), config);
        let (mut inputs, mut labels) = (Vec::new(), Vec::new());
        for batch in &loader {
            let batch = batch.unwrap();
            let floats = batch.input_tensor().convert_to(DType::F32).unwrap();
            inputs.extend(floats.to_vec::<f32>().unwrap());
            labels.extend(batch.label_tensor().unwrap().to_vec::<i64>().unwrap());
        }
        let stats = loader.stats();
        drop(loader);
        assert_eq!(control.mismatches(), 0);
        assert_home(&memory);
        (stats.path, stats.path_reason, inputs, labels)
    };
    let fetched = "the data set lies in memory; the device fetches samples by ";
    for dtype in [DType::F32, DType::BF16] {
        let (path, _, inputs, labels) = way(Gather::Never, dtype);
        assert_eq!(path, LoadPath::Staged);
        for (gather, by) in [
            (Gather::Auto, "copies"),
            // Who asks for it still gets it.
            (Gather::Kernel, "a kernel that converts on the way"),
        ] {
            let (path, reason, gathered, theirs) = way(gather, dtype);
            assert_eq!((path, reason), (LoadPath::Gathered, format!("{fetched}{by}")), "{dtype}");
            assert!(gathered == inputs && theirs == labels, "{dtype} by {by}");
        }
    }
}

/// So many samples of so many bytes, with labels of 8.
fn wide(rows: u64, width: u64) -> InMemory {
    let inputs = HostTensor::new(wide_bytes(rows * width), &[rows, width]).unwrap();
    let labels = HostTensor::new((0..rows.cast_signed()).collect(), &[rows]).unwrap();
    InMemory::new(inputs).unwrap().labels(labels).unwrap()
}

fn wide_bytes(len: u64) -> Vec<u8> {
    (0..len).map(|at| (at ^ (at >> 8) ^ (at >> 16)).to_le_bytes()[0]).collect()
}

/// Samples over and over, in order, up to the position that a test lets it name.
struct Paced {
    samples: u64,
    len: u64,
    /// A position that names no sample.
    bad: Option<u64>,
    pace: Arc<Pace>,
}

#[derive(Default)]
struct Pace {
    /// Positions below this one may be named.
    allowed: AtomicU64,
    /// The last position that a worker asked for.
    asked: AtomicU64,
}

impl Sampler for Paced {
    fn len(&self) -> u64 {
        self.len
    }
    fn index(&self, _: u64, position: u64) -> u64 {
        self.pace.asked.fetch_max(position, Ordering::SeqCst);
        // Longer than anything that the test waits for meanwhile.
        let limit = Duration::from_secs(120);
        let is_allowed = || position < self.pace.allowed.load(Ordering::SeqCst);
        eventually_within(limit, "its turn", is_allowed);
        if self.bad == Some(position) { u64::MAX } else { position % self.samples }
    }
    fn fingerprint(&self) -> u64 {
        self.len
    }
}

/// A loader with batches of ten, in which a test can have several batches full at a time.
struct Scene {
    loader: AsyncDataLoader,
    control: FaultControl,
    pace: Arc<Pace>,
    samples: u64,
    width: u64,
    bytes: Vec<u8>,
    batches: u64,
    /// Submissions before the first batch.
    uploads: u64,
}

impl Scene {
    const SIZE: u64 = 10;

    /// A data set of so many rows, gone through over and over for so many batches.
    fn new(
        (memory, control): (MemoryManager, FaultControl),
        (samples, width): (u64, u64),
        batches: u64,
        bad: Option<u64>,
        config: ConfigBuilder,
    ) -> Self {
        let pace = Arc::new(Pace::default());
        let order = Paced { samples, len: Self::SIZE * batches, bad, pace: Arc::clone(&pace) };
        let config = config.batch_size(Self::SIZE).workers(2).sampler(order).memory_manager(memory);
        let loader = start(wide(samples, width), config);
        let uploads = control.submissions();
        let bytes = wide_bytes(samples * width);
        Self { loader, control, pace, samples, width, bytes, batches, uploads }
    }

    fn allow(&self, batches: u64) {
        self.pace.allowed.store(Self::SIZE * batches, Ordering::SeqCst);
    }

    /// One worker is kept in the driver with the first batch, while the other fills those behind it
    /// up to the last one, and waits there.
    fn fill_all_but_the_last(&self) {
        self.control.hold_submissions();
        self.allow(1);
        eventually("the first batch", || self.control.submissions() > self.uploads);
        self.allow(self.batches - 1);
        let last = Self::SIZE * (self.batches - 1);
        eventually("full batches", || self.pace.asked.load(Ordering::SeqCst) >= last);
    }

    /// Lets the driver go on, then the last batch be filled. Tells how many submissions it took.
    fn let_go(&self) -> u64 {
        self.control.release();
        let stats = || self.loader.stats();
        let are_there = |batches| stats().batches_produced >= batches || !stats().is_running;
        eventually("the full batches", || are_there(self.batches - 1));
        self.allow(self.batches);
        eventually("the end", || !stats().is_running);
        self.control.submissions() - self.uploads
    }

    /// Takes the batches of these numbers, and checks them.
    fn take(&self, batches: std::ops::Range<u64>) {
        for number in batches {
            let batch = self.loader.get_batch().unwrap().unwrap();
            assert_eq!(batch.batch_id(), number);
            let places = Self::SIZE * number..Self::SIZE * (number + 1);
            let rows: Vec<u64> = places.map(|position| position % self.samples).collect();
            let labels = batch.label_tensor().unwrap().to_vec::<i64>().unwrap();
            let bytes = batch.input_tensor().to_vec::<u8>().unwrap();
            assert!(labels.into_iter().eq(rows.iter().map(|row| row.cast_signed())), "{number}");
            let start = |row: u64| usize::try_from(row * self.width).unwrap();
            let row = |row: &u64| &self.bytes[start(*row)..start(*row + 1)];
            assert!(bytes.chunks(start(1)).eq(rows.iter().map(row)), "{number}");
        }
    }
}

/// Batches that the device is done with at once are submitted up to four at a time where several
/// are full; larger ones, and those that workers fill, each by itself.
#[test]
fn brief_batches_that_are_full_go_together() {
    let (host, device) = (Residency::Host, Residency::Device);
    let kernel = Gather::Kernel;
    for (residency, gather, width, batches, submissions) in [
        // The first, two times four, and the last.
        (host, kernel, 24, 10, 4),
        (device, kernel, 24, 10, 4),
        // More than 1 MiB, which is too much to come over the link.
        (host, kernel, 105_000, 10, 10),
        (device, kernel, 105_000, 10, 4),
        // More than 16 MiB.
        (device, kernel, 1_700_000, 4, 4),
        (host, Gather::Never, 24, 10, 10),
    ] {
        let case = format!("{residency:?} {gather:?} {width}");
        let on = gathering(MemoryLimits::default(), FaultPlan::default());
        let memory = on.0.clone();
        let config = AsyncDataLoaderConfig::builder()
            .residency(residency)
            .gather(gather)
            .prefetch_depth(10)
            .max_held(1);
        let samples = if width == 24 { LEN } else { Scene::SIZE };
        let scene = Scene::new(on, (samples, width), batches, None, config);
        scene.fill_all_but_the_last();
        assert_eq!(scene.let_go(), submissions, "{case}");
        scene.take(0..batches);
        assert!(scene.loader.get_batch().unwrap().is_none(), "{case}");
        assert_eq!(scene.control.mismatches(), 0, "{case}");
        drop(scene);
        assert_home(&memory);
    }
}

/// The consumer may hold what is missing until he has the batches that could go.
#[test]
fn full_batches_do_not_wait_for_outputs_to_go_together() {
    let on = gathering(MemoryLimits::default(), FaultPlan::default());
    let config = AsyncDataLoaderConfig::builder().prefetch_depth(2).max_held(1);
    let scene = Scene::new(on, (LEN, 24), 10, None, config);
    scene.fill_all_but_the_last();
    scene.control.release();
    eventually("as many as there are outputs", || scene.loader.stats().batches_produced == 3);
    assert_eq!(scene.control.submissions(), 2, "the first, and two together");
    scene.allow(10);
    scene.take(0..10);
    assert!(scene.loader.get_batch().unwrap().is_none());
}

/// A submission that fails takes its batches with it, and none before.
#[test]
fn of_batches_that_fail_together_the_first_is_named() {
    let plan = FaultPlan { fail_submit: Some(3), ..FaultPlan::default() };
    let on = gathering(MemoryLimits::default(), plan);
    let memory = on.0.clone();
    let config = AsyncDataLoaderConfig::builder().prefetch_depth(10).max_held(1);
    let scene = Scene::new(on, (LEN, 24), 10, None, config);
    scene.fill_all_but_the_last();
    assert_eq!(scene.let_go(), 3);
    // The first, and the four behind it.
    scene.take(0..5);
    for _ in 0..2 {
        let error = scene.loader.get_batch().unwrap_err();
        assert!(
            matches!(error, batchline::Error::Stage { stage: "submitter", batch: 5, .. }),
            "{error}"
        );
        assert!(error.chain().contains("a test made it fail"), "{error}");
    }
    drop(scene);
    assert_home(&memory);
    assert!(memory.device().check().is_ok());
}

/// A batch of which something is to be said goes with none before it: they come before its error.
#[test]
fn a_batch_that_fails_takes_no_full_ones_with_it() {
    for policy in [ErrorPolicy::Skip { at_most: 1 }, ErrorPolicy::Skip { at_most: 0 }] {
        let on = gathering(MemoryLimits::default(), FaultPlan::default());
        let memory = on.0.clone();
        let config =
            AsyncDataLoaderConfig::builder().prefetch_depth(10).max_held(1).error_policy(policy);
        let scene = Scene::new(on, (LEN, 24), 10, Some(37), config);
        scene.fill_all_but_the_last();
        let submissions = scene.let_go();
        scene.take(0..3);
        let next = scene.loader.get_batch();
        if policy == (ErrorPolicy::Skip { at_most: 0 }) {
            let error = next.unwrap_err();
            assert!(
                matches!(error, batchline::Error::TooManySkipped { skipped: 1, .. }),
                "{error}"
            );
            assert!(scene.loader.get_batch().is_err());
            assert_eq!(submissions, 2, "the first, and the two behind it");
        } else {
            assert_eq!(next.unwrap().unwrap().len(), 9);
            assert_eq!(submissions, 5, "besides, it with three behind it, two, and the last");
            scene.take(4..10);
            assert!(scene.loader.get_batch().unwrap().is_none());
        }
        drop(scene);
        assert_home(&memory);
    }
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
