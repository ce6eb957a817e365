//! Samples that the device fetches by itself: out of the host's memory, or out of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, BoxError, ChannelOrder, ConfigBuilder, Conversion,
    DType, Dataset, Device, Error, Gather, HostTensor, InMemory, LoadPath, MemoryLimits,
    MemoryManager, Residency, SampleMut, SampleSpec, Sampler,
};
use fake_cuda::{Fake, Live, When, codes};

/// A driver that pretends, or none where the GPU is demanded. `None` at all where there is neither.
fn start(settings: &str) -> Option<Option<Fake>> {
    if std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some() {
        return Some(None);
    }
    if !fake_cuda::KERNELS {
        // Past the capture of the test harness, so that it is seen.
        let line = b"skipped: no C++ compiler to make the kernels with\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
        return None;
    }
    Some(Some(Fake::start(&format!("devices=2,pageable=1,{settings}"))))
}

/// Only a driver that pretends: for tests that steer it.
fn pretended(settings: &str) -> Option<Fake> {
    start(settings).flatten()
}

/// Nothing was used too early or too late, and nothing is left.
fn settle(fake: &Fake) {
    assert_eq!(crate::violations(fake), [""; 0]);
    assert_eq!(fake.live(), Live::default());
}

/// Runs a test again in a process of its own, which asks the driver anew what it has.
fn in_a_child(test: &str) -> bool {
    const CHILD: &str = "BATCHLINE_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([&format!("gather::{test}"), "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success() && out.contains("1 passed"), "{out}{err}");
    false
}

fn random<T>(count: u64, of: impl Fn(u64) -> T) -> Vec<T> {
    (0..count).map(|at| of(batchline::mix(&[count, at]))).collect()
}

/// So many samples: images, a label, and weights of a length that nothing is aligned by.
fn samples(len: u64, image: &[u64]) -> InMemory {
    let tensor = |width: &[u64]| [&[len], width].concat();
    let bytes = |count| random(count, |word| word.to_le_bytes()[3]);
    let images = HostTensor::new(bytes(len * image.iter().product::<u64>()), &tensor(image));
    let labels = HostTensor::new(random(len, u64::cast_signed), &[len]).unwrap();
    let masks = HostTensor::new(bytes(len * 77), &tensor(&[77])).unwrap();
    let samples = InMemory::new(images.unwrap()).unwrap().labels(labels).unwrap();
    samples.weights("mask", masks).unwrap()
}

/// The bytes of all tensors, batch by batch, and the way that they came.
fn load(
    device: &Device,
    dataset: impl Dataset + 'static,
    config: impl FnOnce(ConfigBuilder) -> ConfigBuilder,
) -> Result<(LoadPath, String, Vec<Vec<u8>>), Error> {
    let builder = config(AsyncDataLoaderConfig::builder().batch_size(7).device(device.clone()));
    let loader = AsyncDataLoader::new(dataset, builder.build()?)?;
    loader.start()?;
    let mut all = Vec::new();
    while let Some(batch) = loader.get_batch()? {
        all.push(batch.input_tensor().to_bytes()?);
        for tensor in batch.label_tensor().into_iter().chain(batch.weight_tensors()) {
            all.push(tensor.to_bytes()?);
        }
    }
    let stats = loader.stats();
    loader.stop()?;
    Ok((stats.path, stats.path_reason, all))
}

type Way = (LoadPath, fn(ConfigBuilder) -> ConfigBuilder);

const WAYS: [Way; 4] = [
    (LoadPath::Staged, |config| config.gather(Gather::Never)),
    (LoadPath::Gathered, |config| config.gather(Gather::Copies)),
    (LoadPath::Gathered, |config| config.gather(Gather::Kernel)),
    (LoadPath::Resident, |config| config.residency(Residency::Device)),
];

fn normalised() -> Conversion {
    Conversion::new().normalize(&[120.0, 110.0, 100.0], &[58.0, 57.0, 56.0])
}

#[test]
fn every_way_gives_the_bytes_that_the_host_gives() {
    let planes = normalised().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
    let conversions = [
        None,
        Some((DType::F32, Conversion::new())),
        Some((DType::F16, normalised())),
        Some((DType::BF16, planes)),
        // None that the kernel does on the way.
        Some((DType::I16, Conversion::new())),
    ];
    for (seed, conversion) in (0..).zip(conversions) {
        for image in [&[6, 5, 3][..], &[16, 16, 3]] {
            let dataset = Arc::new(samples(60, image));
            let config = |config: ConfigBuilder| {
                let config = config.shuffle(true).seed(seed).epochs(2);
                match conversion.clone() {
                    Some((dtype, conversion)) => config.convert(dtype, conversion),
                    None => config,
                }
            };
            let (_, _, expected) = load(&Device::host(), Arc::clone(&dataset), config).unwrap();
            for (path, way) in WAYS {
                let settings = format!("random_latency_us=30,seed={seed}");
                let Some(fake) = start(&settings) else { return };
                let device = Device::cuda(0).unwrap();
                let way = |builder| way(config(builder));
                let (taken, reason, found) = load(&device, Arc::clone(&dataset), way).unwrap();
                assert_eq!(taken, path, "{reason}");
                assert!(found == expected, "{path} {image:?} {conversion:?}");
                drop(device);
                fake.iter().for_each(settle);
            }
        }
    }
}

/// Long rows by copies, short ones by a kernel: in one batch.
#[test]
fn each_tensor_is_fetched_by_what_is_faster() {
    let dataset = Arc::new(samples(9, &[49 << 10]));
    let config = |config: ConfigBuilder| config.shuffle(true);
    let (_, _, expected) = load(&Device::host(), Arc::clone(&dataset), config).unwrap();
    let Some(fake) = start("random_latency_us=30,trace=1") else { return };
    let device = Device::cuda(0).unwrap();
    let (_, reason, found) = load(&device, dataset, config).unwrap();
    assert!(found == expected);
    drop(device);
    // A driver before CUDA 12.8 takes one copy a call: rows must be longer to be worth it.
    if let Some(fake) = fake {
        assert!(reason.ends_with("by copies"), "{reason}");
        let trace = fake.trace();
        let count = |what| trace.iter().filter(|line| line.contains(what)).count();
        assert_eq!((count("batch of"), count("kernel batchline_gather_rows")), (2, 2), "{trace:?}");
        settle(&fake);
    }
}

/// Two loaders, on two handles to one device and on another device, read the same memory; whoever
/// goes first leaves it to the others.
#[test]
fn loaders_share_what_is_registered() {
    let dataset = Arc::new(samples(400, &[50]));
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2]] {
        let Some(fake) = start("random_latency_us=20") else { return };
        // The second device only where there is one.
        let second = Device::cuda(1).or_else(|_| Device::cuda(0));
        let devices = [Device::cuda(0).unwrap(), Device::cuda(0).unwrap(), second.unwrap()];
        let open = |device: Device| {
            let config = AsyncDataLoaderConfig::builder().batch_size(10).device(device);
            AsyncDataLoader::new(Arc::clone(&dataset), config.build().unwrap()).unwrap()
        };
        let mut loaders: Vec<_> = devices.map(open).into_iter().map(Some).collect();
        for loader in loaders.iter().flatten() {
            loader.start().unwrap();
            let stats = loader.stats();
            assert_eq!(stats.path, LoadPath::Gathered, "{}", stats.path_reason);
        }
        let image = dataset.contiguous(0).unwrap();
        for (gone, leaving) in (0u64..).zip(order) {
            for loader in loaders.iter().flatten() {
                for number in gone * 5..gone * 5 + 5 {
                    let batch = loader.get_batch().unwrap().unwrap();
                    let start = usize::try_from(number).unwrap() * 500;
                    assert_eq!(batch.input_tensor().to_bytes().unwrap(), image[start..][..500]);
                }
            }
            loaders[leaving] = None;
        }
        fake.iter().for_each(settle);
    }
}

/// A file that is mapped for reading can't be registered for writing.
#[test]
fn memory_that_can_only_be_read_is_fetched() {
    static TEXT: &[u8] = b"This lies where the system lets nobody write, as a mapped file does.";
    struct Letters(SampleSpec);
    impl Dataset for Letters {
        fn len(&self) -> u64 {
            TEXT.len() as u64
        }
        fn spec(&self) -> &SampleSpec {
            &self.0
        }
        fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
            sample.input()[0] = TEXT[usize::try_from(index)?];
            Ok(())
        }
        fn contiguous(&self, _: usize) -> Option<&[u8]> {
            Some(TEXT)
        }
    }
    let letters = || Letters(SampleSpec::new(DType::U8, &[]).unwrap());
    let Some(fake) = start("") else { return };
    let device = Device::cuda(0).unwrap();
    let (path, reason, found) = load(&device, letters(), |config| config).unwrap();
    assert_eq!((path, found.concat()), (LoadPath::Gathered, TEXT.to_vec()), "{reason}");
    drop(device);
    let Some(fake) = fake else { return };
    settle(&fake);
    drop(fake);
    // A device that can't: the samples come all the same.
    let fake = pretended("attribute=113:0").unwrap();
    let device = Device::cuda(0).unwrap();
    let (path, reason, found) = load(&device, letters(), |config| config).unwrap();
    assert_eq!((path, found.concat()), (LoadPath::Staged, TEXT.to_vec()));
    assert!(reason.contains("CUDA_ERROR_INVALID_VALUE"), "{reason}");
    device.check().unwrap();
    drop(device);
    settle(&fake);
}

/// Whatever the driver says against it, the samples are copied by workers then, and nothing is lost.
#[test]
fn what_the_driver_refuses_is_staged() {
    let dataset = Arc::new(samples(20, &[50]));
    let (_, _, expected) = load(&Device::host(), Arc::clone(&dataset), |config| config).unwrap();
    // Also those that this library gives no name to.
    let refusals = [
        codes::OUT_OF_MEMORY,
        codes::INVALID_VALUE,
        304,
        codes::HOST_MEMORY_ALREADY_REGISTERED,
        codes::NOT_PERMITTED,
        codes::NOT_SUPPORTED,
        codes::UNKNOWN,
    ];
    for code in refusals {
        for symbol in ["cuMemHostRegister_v2", "cuMemHostGetDevicePointer_v2"] {
            let mut staged = 0;
            for nth in 1..=12 {
                let Some(fake) = pretended("") else { return };
                let device = Device::cuda(0).unwrap();
                fake.fail(Some(symbol), nth, code, When::Before);
                let result = load(&device, Arc::clone(&dataset), |config| config);
                let (path, reason, found) = match result {
                    // A slot that kernels can't read.
                    Err(error) if symbol != "cuMemHostRegister_v2" => {
                        assert!(error.chain().contains("can't read its numbers"));
                        continue;
                    }
                    result => result.unwrap(),
                };
                assert!(found == expected);
                if path == LoadPath::Staged {
                    staged += 1;
                    assert!(reason.contains("registering memory of a data set"), "{reason}");
                    assert!(reason.contains(&format!("{code}")), "{reason}");
                }
                device.check().unwrap();
                drop(device);
                settle(&fake);
            }
            assert_eq!(staged, 3, "three tensors, {code} of {symbol}");
        }
    }
    let Some(fake) = pretended("attribute=99:0") else { return };
    let device = Device::cuda(0).unwrap();
    let (path, reason, found) = load(&device, dataset, |config| config).unwrap();
    assert_eq!(path, LoadPath::Staged);
    assert!(reason.contains("does not fetch samples from the host's memory"), "{reason}");
    assert!(found == expected);
    drop(device);
    settle(&fake);
}

/// Many samples that are zero, but for some around a bound between registered pieces: the first one
/// ends there or crosses it.
struct Sparse {
    spec: SampleSpec,
    bytes: Vec<u8>,
    first: u64,
}

impl Sparse {
    const ROW: usize = 65_537;
    /// Where registration is cut.
    const PIECE: usize = 256 << 20;

    fn new() -> Self {
        // Of zeros no page is there until it is touched.
        let mut bytes = vec![0; (Self::PIECE / Self::ROW + 3) * Self::ROW];
        let start = bytes.as_ptr().addr();
        let bound = start.next_multiple_of(Self::PIECE) - start;
        let first = (bound.saturating_sub(1) / Self::ROW).min(bytes.len() / Self::ROW - 3);
        for (at, byte) in bytes[first * Self::ROW..][..3 * Self::ROW].iter_mut().enumerate() {
            *byte = batchline::mix(&[at as u64]).to_le_bytes()[0];
        }
        Self { spec: SampleSpec::new(DType::U8, &[65_537]).unwrap(), bytes, first: first as u64 }
    }

    fn row(&self, number: u64) -> &[u8] {
        &self.bytes[usize::try_from(number).unwrap() * Self::ROW..][..Self::ROW]
    }
}

impl Dataset for Sparse {
    fn len(&self) -> u64 {
        (self.bytes.len() / Self::ROW) as u64
    }
    fn spec(&self) -> &SampleSpec {
        &self.spec
    }
    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        sample.input().copy_from_slice(self.row(index));
        Ok(())
    }
    fn contiguous(&self, _: usize) -> Option<&[u8]> {
        Some(&self.bytes)
    }
}

/// Of a data set the few samples that are not zero, back and forth.
struct Few(u64);

impl Few {
    const ORDER: [u64; 9] = [0, 1, 2, 2, 1, 0, 1, 1, 2];
}

impl Sampler for Few {
    fn len(&self) -> u64 {
        Self::ORDER.len() as u64
    }
    fn index(&self, _: u64, position: u64) -> u64 {
        self.0 + Self::ORDER[usize::try_from(position).unwrap()]
    }
    fn fingerprint(&self) -> u64 {
        1
    }
}

#[test]
fn samples_cross_the_bounds_of_what_is_registered() {
    let dataset = Arc::new(Sparse::new());
    let expected: Vec<u8> =
        Few::ORDER.iter().flat_map(|number| dataset.row(dataset.first + number).to_vec()).collect();
    for gather in [Gather::Copies, Gather::Kernel] {
        let Some(fake) = start("") else { return };
        let device = Device::cuda(0).unwrap();
        let limits = MemoryLimits::default().staging_limit(512 << 20);
        let memory = MemoryManager::with_limits(&device, limits);
        let few = Few(dataset.first);
        let config =
            |config: ConfigBuilder| config.gather(gather).sampler(few).memory_manager(memory);
        let (path, reason, found) = load(&device, Arc::clone(&dataset), config).unwrap();
        assert_eq!(path, LoadPath::Gathered, "{reason}");
        assert!(found.concat() == expected, "{gather:?}");
        drop(device);
        fake.iter().for_each(settle);
    }
}

/// Loaders that are dropped in the middle of their work.
#[test]
fn loaders_may_go_at_any_time() {
    let dataset = Arc::new(samples(4000, &[50]));
    for seed in 0..12u64 {
        let Some(fake) = start(&format!("latency_us=20,random_latency_us=300,seed={seed}")) else {
            return;
        };
        let device = Device::cuda(0).unwrap();
        let config = AsyncDataLoaderConfig::builder().batch_size(7).device(device.clone());
        let (_, way) = WAYS[1 + usize::try_from(seed % 3).unwrap()];
        let loader = AsyncDataLoader::new(Arc::clone(&dataset), way(config).build().unwrap());
        let loader = loader.unwrap();
        loader.start().unwrap();
        for _ in 0..seed {
            drop(loader.get_batch().unwrap().unwrap());
        }
        drop(loader);
        drop(device);
        fake.iter().for_each(settle);
    }
}

/// The device has begun nothing when the loader is dropped: what it will read stays registered.
#[test]
fn nothing_is_unregistered_while_it_is_to_be_read() {
    let dataset = Arc::new(samples(400, &[50]));
    for (gather, call) in
        [(Gather::Copies, "cuMemcpyBatchAsync_v2"), (Gather::Kernel, "cuLaunchKernel")]
    {
        let Some(fake) = pretended("held=1") else { return };
        let device = Device::cuda(0).unwrap();
        let config = AsyncDataLoaderConfig::builder().batch_size(7).gather(gather);
        let config = config.stop_timeout(Duration::from_millis(100)).device(device.clone());
        let loader = AsyncDataLoader::new(Arc::clone(&dataset), config.build().unwrap()).unwrap();
        loader.start().unwrap();
        let began = Instant::now();
        while fake.calls(Some(call)) == 0 {
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(1));
        }
        let unregistered = fake.calls(Some("cuMemHostUnregister"));
        drop(loader);
        assert_eq!(fake.calls(Some("cuMemHostUnregister")), unregistered, "{gather:?}");
        assert!(fake.live().registered_memory >= 3);
        fake.release_all();
        drop(device);
        // What it left behind goes by itself.
        let began = Instant::now();
        while fake.live() != Live::default() && began.elapsed() < Duration::from_secs(20) {
            std::thread::sleep(Duration::from_millis(1));
        }
        settle(&fake);
    }
}

/// Each call of the driver fails once, before it did anything, after it did, and for good: an error
/// that says so or all batches, never a hang, a wrong byte, or memory that is used too early or
/// taken back too early. The calls by which a device is opened and closed are failed elsewhere.
#[test]
fn any_call_of_the_driver_may_fail() {
    let dataset = Arc::new(samples(10, &[4, 4, 3]));
    let convert = |config: ConfigBuilder| config.convert(DType::F32, normalised());
    let (_, _, expected) = load(&Device::host(), Arc::clone(&dataset), convert).unwrap();
    for (_, way) in &WAYS[1..] {
        let run = |device: &Device| load(device, Arc::clone(&dataset), |c| way(convert(c)));
        let calls = {
            let Some(fake) = pretended("seed=1") else { return };
            let device = Device::cuda(0).unwrap();
            let opened = fake.calls(None);
            run(&device).unwrap();
            let calls = fake.calls(None) - opened;
            drop(device);
            settle(&fake);
            calls
        };
        for when in [When::Before, When::After, When::Lose] {
            for nth in 1..=calls {
                let fake = pretended("seed=1,random_latency_us=20").unwrap();
                let device = Device::cuda(0).unwrap();
                fake.fail(None, nth, codes::UNKNOWN, when);
                let began = Instant::now();
                match run(&device) {
                    Ok((.., found)) => assert!(found == expected, "call {nth} {when:?}"),
                    Err(error) => {
                        let text = error.chain();
                        let told = text.contains("999") || text.contains("can't read its numbers");
                        assert!(error.is_device_lost() || told, "call {nth} {when:?}: {text}");
                    }
                }
                drop(device);
                let violations = crate::violations(&fake);
                assert!(began.elapsed() < Duration::from_secs(10), "call {nth} {when:?}");
                assert_eq!(violations, [""; 0], "call {nth} {when:?}");
            }
        }
    }
}

/// Per batch the driver is asked for one launch or one batch of copies, and nothing is allocated,
/// registered or created.
#[test]
fn a_steady_state_makes_few_calls() {
    let dataset = Arc::new(samples(4000, &[50]));
    for (path, way) in &WAYS[1..] {
        let Some(fake) = pretended("") else { return };
        let device = Device::cuda(0).unwrap();
        let config = AsyncDataLoaderConfig::builder().batch_size(4).shuffle(true);
        let config = way(config.device(device)).build().unwrap();
        let loader = AsyncDataLoader::new(Arc::clone(&dataset), config).unwrap();
        loader.start().unwrap();
        assert_eq!(loader.stats().path, *path);
        let take = |batches: u64| {
            for _ in 0..batches {
                drop(loader.get_batch().unwrap().unwrap());
            }
            fake.all_calls()
        };
        let (before, after) = (take(100), take(800));
        let made = |name: &str| {
            let count = |calls: &std::collections::BTreeMap<String, u64>| {
                calls.get(name).copied().unwrap_or(0)
            };
            count(&after) - count(&before)
        };
        for name in [
            "cuMemAlloc_v2",
            "cuMemHostAlloc",
            "cuMemHostRegister_v2",
            "cuMemHostUnregister",
            "cuMemHostGetDevicePointer_v2",
            "cuEventCreate",
            "cuMemcpyHtoDAsync_v2",
        ] {
            assert_eq!(made(name), 0, "{name} {path}");
        }
        let fetched = made("cuLaunchKernel") + made("cuMemcpyBatchAsync_v2");
        // One batch of copies a tensor.
        let most = if made("cuLaunchKernel") == 0 { 3 * 804 } else { 804 };
        assert!((790..=most).contains(&fetched), "{fetched} {path}");
        let looks = made("cuEventQuery") + made("cuCtxGetCurrent");
        let all: u64 = after.values().sum::<u64>() - before.values().sum::<u64>();
        let per_batch = (all - looks) as f64 / 800.0;
        assert!(per_batch <= 10.0, "{per_batch} calls per batch: {path} {after:?}");
    }
}

/// The driver of this version, or one that takes no batches of copies.
fn copies_with(settings: &str, symbol: &str) {
    let dataset = Arc::new(samples(30, &[50]));
    let config = |config: ConfigBuilder| config.shuffle(true);
    let (_, _, expected) = load(&Device::host(), Arc::clone(&dataset), config).unwrap();
    let Some(fake) = pretended(settings) else { return };
    let device = Device::cuda(0).unwrap();
    let way = |builder| config(builder).gather(Gather::Copies);
    let (path, reason, found) = load(&device, dataset, way).unwrap();
    assert_eq!(path, LoadPath::Gathered, "{reason}");
    assert!(found == expected);
    assert!(fake.calls(Some(symbol)) >= 5, "{:?}", fake.all_calls());
    drop(device);
    settle(&fake);
}

#[test]
fn copies_in_batches_as_they_came_first() {
    if in_a_child("copies_in_batches_as_they_came_first") {
        copies_with("version=12080", "cuMemcpyBatchAsync");
    }
}

#[test]
fn copies_by_a_driver_that_takes_no_batches() {
    if in_a_child("copies_by_a_driver_that_takes_no_batches") {
        copies_with("version=12020", "cuMemcpyHtoDAsync_v2");
    }
}

#[test]
fn copies_by_a_driver_that_lacks_its_batches() {
    if in_a_child("copies_by_a_driver_that_lacks_its_batches") {
        copies_with("no_batch=1", "cuMemcpyHtoDAsync_v2");
    }
}

/// The driver knows the call, and the system can't.
#[test]
fn copies_go_one_by_one_where_a_batch_is_not_supported() {
    copies_with("fail=cuMemcpyBatchAsync_v2:1:801", "cuMemcpyHtoDAsync_v2");
}

/// More lists of factors than are kept: one that is in use again and again stays.
#[test]
fn factors_that_are_used_stay_on_the_device() {
    let Some(fake) = pretended("") else { return };
    let device = Device::cuda(0).unwrap();
    let memory = MemoryManager::new(&device);
    let source = memory.upload(&[10u8, 20, 30], &[3]).unwrap();
    let conversion = |by: u16| Conversion::new().scale_and_bias(&[f32::from(by); 3], &[1.0; 3]);
    let check = |conversion: &Conversion, by: u16| {
        let made = source.convert(DType::F32, conversion).unwrap().to_vec::<f32>().unwrap();
        assert_eq!(made, [10, 20, 30].map(|value| f32::from(value * by) + 1.0));
    };
    let often = conversion(1);
    check(&often, 1);
    let uploads = |fake: &Fake| fake.calls(Some("cuMemcpyHtoDAsync_v2"));
    let before = uploads(&fake);
    for by in 2..60 {
        check(&conversion(by), by);
        check(&often, 1);
    }
    // A scale each; they have the bias in common.
    assert_eq!(uploads(&fake) - before, 58);
    // A list of its own, with the same numbers.
    check(&conversion(1), 1);
    assert_eq!(uploads(&fake) - before, 58);
    drop((source, memory, device));
    settle(&fake);
}
