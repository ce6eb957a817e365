//! The device fails, or a call of the driver does.

use std::time::{Duration, Instant};

use batchline::backend::Custom;
use batchline::{AsyncDataLoader, CommandBufferPool, CudaCustom, DType, Error, MemoryManager};

use crate::driver::Driver;
use crate::{Gpu, builder, in_a_child, no_kernels, numbers};

/// A kernel of the user's reaches for memory that is nobody's. The context is lost for this
/// process, so this runs in a process of its own.
#[test]
fn a_lost_context_is_told_to_everybody() {
    if no_kernels() {
        return;
    }
    if !in_a_child("failures::a_lost_context_is_told_to_everybody") {
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
