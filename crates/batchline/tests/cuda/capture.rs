//! A user captures work of his own while a loader runs.

use batchline::{AsyncDataLoader, DType, MemoryManager};

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
