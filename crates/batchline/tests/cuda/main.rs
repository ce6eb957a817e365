//! The CUDA device: what its streams do to memory, and how it ends. On a GPU, or on a driver that
//! only pretends to have one.

mod driver;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchline::backend::Custom;
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, CommandBufferPool, ConfigBuilder, CudaCustom, DType,
    Device, Error, FnDataset, MemoryManager, SampleSpec, StagingBufferPool,
};

use driver::Driver;

/// A device, or `None` where there is none and none is demanded.
fn device() -> Option<Device> {
    match Device::cuda(0) {
        Ok(device) => Some(device),
        Err(missing) => {
            let required = std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some();
            assert!(!required, "BATCHLINE_REQUIRE_CUDA is set, but: {missing}");
            let line = format!("skipped: {missing}\n");
            // Past the capture of the test harness, so that it is seen.
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
            None
        }
    }
}

const WIDTH: u64 = 1 << 12;

/// Samples whose bytes are all their number's lowest byte.
fn numbers(
    len: u64,
) -> FnDataset<impl Fn(u64, &mut batchline::SampleMut<'_>) -> Result<(), batchline::BoxError>> {
    let spec = SampleSpec::new(DType::U8, &[WIDTH]).unwrap();
    FnDataset::new(len, spec, |index, sample: &mut batchline::SampleMut<'_>| {
        sample.input().fill(index.to_le_bytes()[0]);
        Ok(())
    })
}

fn builder(memory: &MemoryManager) -> ConfigBuilder {
    AsyncDataLoaderConfig::builder().batch_size(4).memory_manager(memory.clone())
}

fn expected(batch: u64) -> Vec<u8> {
    (batch * 4..batch * 4 + 4).flat_map(|row| vec![row.to_le_bytes()[0]; WIDTH as usize]).collect()
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
    let Some(device) = device() else { return };
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
        let bytes = driver.page_locked(bound.input().bytes as usize);
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
    let Some(first) = device() else { return };
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
        let bytes = driver.page_locked(bound.input().bytes as usize);
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

/// A slot whose copy has not run is not filled again, however long that takes.
#[test]
fn a_slot_stays_in_flight_until_its_copy_has_run() {
    let Some(device) = device() else { return };
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
    let Some(device) = device() else { return };
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
    const CHILD: &str = "BATCHLINE_TEST_LOST_CONTEXT";
    if device().is_none() {
        return;
    }
    if std::env::var_os(CHILD).is_none() {
        let name = "a_lost_context_is_told_to_everybody";
        let child = std::process::Command::new(std::env::current_exe().unwrap())
            .args([name, "--exact", "--nocapture"])
            .env(CHILD, "1")
            .output()
            .unwrap();
        let (out, err) =
            (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
        assert!(child.status.success(), "{out}{err}");
        return;
    }
    let device = device().unwrap();
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
    let submission = buffer.execute().unwrap();
    let error = submission.wait().unwrap_err();
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
