//! The CUDA device: what its streams do to memory, and how it ends. On a GPU, or on a driver that
//! only pretends to have one.

mod capture;
#[cfg(feature = "cudarc")]
mod cudarc;
mod dlpack;
mod driver;
mod frozen;
mod gather;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchline::backend::Custom;
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, CommandBufferPool, ConfigBuilder, Conversion,
    CudaCustom, DType, Device, DeviceKind, Error, FnDataset, Found, MemoryManager, SampleSpec,
    StagingBufferPool,
};

use batchline::testing::conformance;
use driver::Driver;
use fake_cuda::{Fake, When, codes};

/// The GPU where one is demanded, else a driver that pretends to have one.
struct Gpu {
    fake: Option<Fake>,
}

impl Gpu {
    fn new(settings: &str) -> Self {
        if std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some() {
            return Self { fake: None };
        }
        // The real one, too, takes ordinary memory for copies that go on after the call.
        Self { fake: Some(Fake::start(&format!("devices=1,pageable=1,{settings}"))) }
    }

    fn device(&self) -> Device {
        Device::cuda(0).unwrap()
    }
}

impl Drop for Gpu {
    /// Nothing was used after it was given back.
    fn drop(&mut self) {
        if let Some(fake) = self.fake.as_ref().filter(|_| !std::thread::panicking()) {
            let mut violations = fake.violations();
            // The fault that a test makes on purpose.
            violations.retain(|violation| !violation.contains("batchline_test_fault"));
            assert_eq!(violations, [""; 0]);
        }
    }
}

/// Whether there is neither a GPU, as far as is said, nor a C++ compiler to make kernels for the
/// pretended one.
fn no_kernels() -> bool {
    let none = !fake_cuda::KERNELS && std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_none();
    if none {
        // Past the capture of the test harness, so that it is seen.
        let line = b"skipped: no C++ compiler to make the kernels with\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
    }
    none
}

/// Runs a test again in a process of its own, where this is true.
fn in_a_child(test: &str) -> bool {
    const CHILD: &str = "BATCHLINE_TEST_CHILD";
    if std::env::var_os(CHILD).is_some() {
        return true;
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([test, "--exact", "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{out}{err}");
    false
}

/// The suite that every device passes, in different orders of the streams.
#[test]
fn conformance() {
    if no_kernels() {
        return;
    }
    for seed in 0..3 {
        let gpu = Gpu::new(&format!("random_latency_us=100,seed={seed}"));
        conformance::run_all(&|| gpu.device());
    }
}

const WIDTH: u16 = 1 << 12;

/// Samples whose bytes are all their number's lowest byte.
fn numbers(
    len: u64,
) -> FnDataset<impl Fn(u64, &mut batchline::SampleMut<'_>) -> Result<(), batchline::BoxError>> {
    let spec = SampleSpec::new(DType::U8, &[WIDTH.into()]).unwrap();
    FnDataset::new(len, spec, |index, sample: &mut batchline::SampleMut<'_>| {
        sample.input().fill(index.to_le_bytes()[0]);
        Ok(())
    })
}

fn builder(memory: &MemoryManager) -> ConfigBuilder {
    AsyncDataLoaderConfig::builder().batch_size(4).memory_manager(memory.clone())
}

fn expected(batch: u64) -> Vec<u8> {
    (batch * 4..batch * 4 + 4).flat_map(|row| vec![row.to_le_bytes()[0]; WIDTH.into()]).collect()
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what} did not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A user's stream is far behind; each batch is bound to it, read by it, and dropped at once.
#[test]
fn an_output_is_rewritten_only_behind_the_users_stream() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    // Page-locked memory and streams need a context on this thread: any use of the device makes one.
    let tensor = memory.upload(&[1u8; 16], &[16]).unwrap();
    let stream = driver.stream();
    let config = builder(&memory).prefetch_depth(2).max_held(1).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(200), config).unwrap();
    loader.start().unwrap();
    let gate = driver.hold(stream);
    let mut read = Vec::new();
    // As many as there are outputs; the next one has to wait for memory that is still read.
    for number in 0..3u64 {
        let batch = loader.get_batch().unwrap().unwrap();
        let bound = batch.bind(&stream).unwrap();
        let bytes = driver.page_locked(4 * usize::from(WIDTH));
        driver.read(stream, bound.input().address, bytes);
        read.push((number, &*bytes));
    }
    // Batches go on: their copies wait on the device, and no host waits.
    let later = loader.get_batch().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(loader.stats().slots > 0);
    gate.open();
    assert_eq!(driver.synchronize(stream), 0);
    for (number, bytes) in read {
        assert_eq!(bytes, expected(number), "batch {number}, as the user's stream saw it");
    }
    assert_eq!(later.input_tensor().to_bytes().unwrap(), expected(3));
    drop(later);
    for number in 4..50 {
        let batch = loader.get_batch().unwrap().unwrap();
        assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
    }
    assert!(loader.get_batch().unwrap().is_none());
    drop(tensor);
}

/// The consumer's own stream, as `get_batch` orders it, needs no binding.
#[test]
fn a_device_for_a_users_stream_delivers_in_its_order() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let first = gpu.device();
    let driver = Driver::load();
    let _context = MemoryManager::new(&first).upload(&[1u8; 16], &[16]).unwrap();
    let stream = driver.stream();
    let device = Device::cuda_for(0, stream).unwrap();
    assert_eq!(device.as_cuda(), Some((0, stream)));
    let memory = MemoryManager::new(&device);
    let config = builder(&memory).prefetch_depth(2).max_held(2).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(200), config).unwrap();
    loader.start().unwrap();
    let mut read = Vec::new();
    let mut number = 0;
    while let Some(batch) = loader.get_batch().unwrap() {
        // By way of a binding only for the address: the stream is known already.
        let bound = batch.bind(&stream).unwrap();
        let bytes = driver.page_locked(4 * usize::from(WIDTH));
        driver.read(stream, bound.input().address, bytes);
        read.push((number, &*bytes));
        number += 1;
    }
    assert_eq!(driver.synchronize(stream), 0);
    assert_eq!(read.len(), 50);
    for (number, bytes) in read {
        assert_eq!(bytes, expected(number), "batch {number}");
    }
}

/// A chain of an own operation and a transfer, behind work on a user's stream.
#[test]
fn custom_work_is_called_with_the_segments_stream() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let _context = memory.upload(&[1u8; 16], &[16]).unwrap();
    let stream = driver.stream();
    let pool = StagingBufferPool::with_buffer_size(&memory, 1, 1 << 12).unwrap();
    let commands = CommandBufferPool::new(&memory, 2).unwrap();
    let target = memory.tensor(&[1 << 12], DType::U8).unwrap();
    // The target is used by the user's stream, which is held: the copy into it has to wait.
    let gate = driver.hold(stream);
    target.bind(&stream).unwrap();
    let share = target.clone();
    drop(target);
    // It counts as used until the last handle goes; a custom operation waits for the user instead.
    let mut staging = pool.get_buffer().unwrap();
    staging.as_mut_slice().fill(7);
    let mut buffer = commands.get_buffer().unwrap();
    let held = driver.stream();
    let inner = driver.hold(held);
    let signal = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&signal);
    let work = move |custom: CudaCustom| {
        assert_eq!(custom.writes.len(), 1);
        seen.store(1, Ordering::SeqCst);
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[&share]).unwrap();
    buffer.upload(staging, &share).unwrap();
    let submission = buffer.execute().unwrap();
    assert_eq!(signal.load(Ordering::SeqCst), 1, "custom work is called when it is submitted");
    submission.wait().unwrap();
    gate.open();
    inner.open();
    assert_eq!(driver.synchronize(stream), 0);
    assert_eq!(share.to_vec::<u8>().unwrap(), vec![7; 1 << 12]);
    assert_eq!(pool.stats().available, 1);
}

/// Custom work that holds our own stream: what comes behind it stays in flight, with its memory.
#[test]
fn nothing_is_given_back_before_the_device_is_done() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let pool = StagingBufferPool::with_buffer_size(&memory, 1, 1 << 12).unwrap();
    let commands = CommandBufferPool::new(&memory, 2).unwrap();
    let target = memory.tensor(&[1 << 12], DType::U8).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let (send, gate) = std::sync::mpsc::channel();
    let work = move |custom: CudaCustom| {
        let _ = send.send(Driver::load().hold(custom.stream));
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[&target]).unwrap();
    let first = buffer.execute().unwrap();
    let gate = gate.recv().unwrap();
    // The copy comes behind the custom work, on another stream.
    let mut staging = pool.get_buffer().unwrap();
    staging.as_mut_slice().fill(9);
    let mut buffer = commands.get_buffer().unwrap();
    buffer.upload(staging, &target).unwrap();
    let second = buffer.execute().unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert!(!first.is_done() && !second.is_done());
    assert!(pool.try_get_buffer().unwrap().is_none(), "the slot is in flight");
    drop(target);
    assert_eq!(memory.stats().device_cached, 0, "and so is the tensor's memory");
    gate.open();
    first.wait().unwrap();
    second.wait().unwrap();
    eventually("the slot's return", || pool.stats().available == 1);
    eventually("the memory's return", || memory.stats().device_cached > 0);
}

/// A kernel of the user's reaches for memory that is nobody's. The context is lost for this
/// process, so this runs in a process of its own.
#[test]
fn a_lost_context_is_told_to_everybody() {
    if no_kernels() {
        return;
    }
    if !in_a_child("a_lost_context_is_told_to_everybody") {
        return;
    }
    let gpu = Gpu::new("");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let config = builder(&memory).prefetch_depth(2).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(1 << 20), config).unwrap();
    loader.start().unwrap();
    let batch = loader.get_batch().unwrap().unwrap();
    let commands = CommandBufferPool::new(&memory, 1).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let work = |custom: CudaCustom| {
        Driver::load().fault(custom.stream);
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[batch.input_tensor()], &[]).unwrap();
    // It may be noticed already when the submission ends.
    let error = buffer.execute().and_then(|submission| submission.wait()).unwrap_err();
    assert!(error.is_device_lost(), "{}", error.chain());
    // Everybody hears of it, now and later.
    let began = Instant::now();
    let error = loop {
        match loader.get_batch() {
            Ok(Some(_)) => {}
            Ok(None) => panic!("a lost device is no end of the data"),
            Err(error) => break error,
        }
    };
    assert!(error.is_device_lost(), "{}", error.chain());
    assert!(loader.get_batch().unwrap_err().is_device_lost());
    assert!(matches!(device.check(), Err(Error::DeviceLost { .. })));
    assert!(memory.tensor(&[16], DType::U8).is_err());
    assert!(memory.upload(&[1u8], &[1]).is_err());
    drop(batch);
    loader.stop().unwrap();
    assert!(began.elapsed() < Duration::from_secs(10));
    drop(loader);
}

/// A small run of the loader, every byte checked: the batches that came.
fn run(device: &Device) -> Result<u64, Error> {
    let memory = MemoryManager::new(device);
    let config = builder(&memory).convert(DType::F32, Conversion::new().normalize(&[1.0], &[2.0]));
    let loader = AsyncDataLoader::new(numbers(20), config.build()?)?;
    loader.start()?;
    let mut number = 0;
    while let Some(batch) = loader.get_batch()? {
        let expected: Vec<f32> =
            expected(number).into_iter().map(|byte| (f32::from(byte) - 1.0) / 2.0).collect();
        assert_eq!(batch.input_tensor().to_vec::<f32>()?, expected, "batch {number}");
        number += 1;
    }
    loader.stop()?;
    Ok(number)
}

/// Each call of the driver fails once, before it did anything, after it did, and for good: an error
/// that says so or all batches, never a hang, a wrong byte, or memory that is used again too early.
#[test]
fn any_call_of_the_driver_may_fail() {
    if no_kernels() {
        return;
    }
    if std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some() {
        return;
    }
    let calls = {
        let fake = Fake::start("devices=1,pageable=1,seed=1");
        let device = Device::cuda(0).unwrap();
        assert_eq!(run(&device).unwrap(), 5);
        drop(device);
        assert_eq!(fake.violations(), [""; 0]);
        assert_eq!(fake.live(), fake_cuda::Live::default(), "nothing is left behind");
        fake.calls(None)
    };
    assert!(calls > 100, "{calls} calls");
    for when in [When::Before, When::After, When::Lose] {
        for nth in 1..=calls {
            let fake = Fake::start("devices=1,pageable=1,seed=1,random_latency_us=20");
            fake.fail(None, nth, codes::UNKNOWN, when);
            match Device::cuda(0).and_then(|device| run(&device)) {
                Ok(batches) => assert_eq!(batches, 5, "call {nth} {when:?}"),
                Err(error) => assert!(
                    error.is_device_lost() || error.chain().contains("999"),
                    "call {nth} {when:?}: {}",
                    error.chain()
                ),
            }
            assert_eq!(fake.violations(), [""; 0], "call {nth} {when:?}");
        }
    }
}

/// What a stranger sees where there is no GPU, no driver, or not the one asked for.
#[test]
fn devices_that_are_not_there_are_errors() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("");
    let error = Device::cuda(99).unwrap_err().to_string();
    assert!(error.starts_with("no cuda:99 device: the CUDA driver shows "), "{error}");
    assert!(matches!(gpu.device().kind(), DeviceKind::Cuda));
}

/// The driver is asked once in a process, so this has one of its own.
#[test]
fn a_driver_without_a_gpu_is_an_error() {
    if no_kernels() {
        return;
    }
    if std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some()
        || !in_a_child("a_driver_without_a_gpu_is_an_error")
    {
        return;
    }
    let _none = Fake::start("devices=0");
    let error = Device::cuda(0).unwrap_err().to_string();
    assert_eq!(
        error,
        "no cuda device: the CUDA driver finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    );
    assert!(matches!(Device::list().first(), Some(Found::Missing(_))));
}

/// The driver is called a few times per batch, and nothing is allocated, pinned or created.
#[test]
fn a_steady_state_makes_few_calls() {
    if no_kernels() {
        return;
    }
    if std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some() {
        return;
    }
    let fake = Fake::start("devices=1,pageable=1");
    let device = Device::cuda(0).unwrap();
    let memory = MemoryManager::new(&device);
    let loader = AsyncDataLoader::new(numbers(4000), builder(&memory).build().unwrap()).unwrap();
    loader.start().unwrap();
    let take = |batches: u64| {
        for _ in 0..batches {
            drop(loader.get_batch().unwrap().unwrap());
        }
    };
    take(100);
    let before = fake.all_calls();
    take(800);
    let after = fake.all_calls();
    let made = |name: &str| {
        let count =
            |calls: &std::collections::BTreeMap<String, u64>| calls.get(name).copied().unwrap_or(0);
        count(&after) - count(&before)
    };
    for name in [
        "cuMemAlloc_v2",
        "cuMemHostAlloc",
        "cuMemHostRegister_v2",
        "cuEventCreate",
        "cuStreamCreateWithPriority",
    ] {
        assert_eq!(made(name), 0, "{name}");
    }
    // Looks at events come as often as somebody waits.
    let looks = made("cuEventQuery") + made("cuCtxGetCurrent");
    let all: u64 = after.values().sum::<u64>() - before.values().sum::<u64>();
    let per_batch = (all - looks) as f64 / 800.0;
    assert!(per_batch <= 8.0, "{per_batch} calls per batch: {after:?}");
}
