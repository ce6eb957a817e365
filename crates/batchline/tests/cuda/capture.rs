//! A user captures work of his own while a loader runs.

use batchline::{AsyncDataLoader, DType, Device, MemoryManager};

use super::driver::Driver;
use super::{Gpu, builder, expected, no_kernels, numbers};

/// Captures of the strictest mode are broken by many calls of any thread; by none of ours. Batches
/// go on, also on the thread that captures, and memory is had and given back.
#[test]
fn captures_of_the_user_are_not_broken() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    drop(memory.upload(&[1u8; 16], &[16]).unwrap());
    let loader = AsyncDataLoader::new(numbers(400), builder(&memory).build().unwrap()).unwrap();
    loader.start().unwrap();
    let stream = driver.stream();
    let mut number = 0;
    for _ in 0..10 {
        driver.begin_strict_capture(stream);
        for _ in 0..5 {
            let batch = loader.get_batch().unwrap().unwrap();
            batch.wait().unwrap();
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
            number += 1;
        }
        drop(memory.tensor(&[100_000 * (number + 1)], DType::U8).unwrap());
        memory.trim();
        assert_eq!(driver.end_capture(stream), 0, "the capture was broken");
    }
    device.check().unwrap();
}

/// The stream that batches are delivered for is captured while one is dropped: where the stream is
/// can't be known, so that memory is given up, and all else goes on.
#[test]
fn the_devices_own_stream_may_be_captured() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let loader = AsyncDataLoader::new(numbers(40), builder(&memory).build().unwrap()).unwrap();
    loader.start().unwrap();
    let batch = loader.get_batch().unwrap().unwrap();
    batch.wait().unwrap();
    let (_, stream) = device.as_cuda().unwrap();
    driver.begin_capture(stream);
    drop(batch);
    assert_eq!(driver.end_capture(stream), 0, "nothing was drawn into the capture");
    assert!(memory.stats().quarantined > 0);
    for number in 1..10 {
        let batch = loader.get_batch().unwrap().unwrap();
        assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
    }
    device.check().unwrap();
}

/// A device's own stream goes with it: what is left of its handle is not taken on trust.
#[test]
fn the_stream_of_a_device_that_is_gone_is_refused() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("");
    let (_, stale) = gpu.device().as_cuda().unwrap();
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let tensor = memory.upload(&[1u8; 16], &[16]).unwrap();
    let error = tensor.bind(&stale).unwrap_err().to_string();
    assert!(error.contains("it is another device's own stream"), "{error}");
    let error = Device::cuda_for(0, stale).unwrap_err().to_string();
    assert!(error.contains("the stream is another device's own"), "{error}");
    tensor.bind(&device.as_cuda().unwrap().1).unwrap();
}
