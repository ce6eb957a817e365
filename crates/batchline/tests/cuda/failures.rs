//! The device fails, or a call of the driver does.

use std::time::{Duration, Instant};

use batchline::backend::Custom;
use batchline::{
    AsyncDataLoader, CommandBufferPool, Conversion, CudaCustom, DType, Device, Error, MemoryManager,
};
use fake_cuda::{Fake, When, codes};

use crate::driver::Driver;
use crate::{Gpu, builder, expected, gpu_is_required, in_a_child, no_kernels, numbers};

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
    if gpu_is_required() || no_kernels() {
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
