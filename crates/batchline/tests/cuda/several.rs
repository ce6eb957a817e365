//! Several devices in one process: each goes its own way, and threads keep the context that they
//! had.

use batchline::backend::Custom;
use batchline::{
    AsyncDataLoader, CommandBufferPool, Conversion, DType, Device, MemoryManager,
    StagingBufferPool, Tensor,
};
use fake_cuda::{Fake, When, codes};

use crate::driver::Driver;
use crate::{
    Gpu, assert_clean, builder, expected, no_kernels, numbers, pretended, wait_until_closed,
};

fn loader(memory: &MemoryManager, len: u64) -> AsyncDataLoader {
    let config = builder(memory).prefetch_depth(2).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(len), config).unwrap();
    loader.start().unwrap();
    loader
}

fn close_and_check(fake: &Fake) {
    wait_until_closed();
    assert_clean(fake, "two devices");
}

/// What belongs to one device is refused by the other, with both their names.
fn assert_apart(one: &Device, other: &Device) {
    let (mine, theirs) = (MemoryManager::new(one), MemoryManager::new(other));
    let (a, b) =
        (mine.upload(&[1u8; 64], &[64]).unwrap(), theirs.upload(&[2u8; 64], &[64]).unwrap());
    let names = (&one.info().name, &other.info().name);
    let refused = |what: &str, result: Result<(), batchline::Error>| {
        let expected = format!(
            "cannot record {what}: the tensor is on Device({:?}), the command buffer for \
             Device({:?})",
            names.1, names.0
        );
        assert_eq!(result.unwrap_err().to_string(), expected);
    };
    let commands = CommandBufferPool::new(&mine, 1).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    refused("a copy", buffer.copy(&b, &a));
    refused("a copy", buffer.copy(&a, &b));
    refused("a fill", buffer.fill(&b, 1u8));
    refused("a conversion", buffer.convert(&b, &a, &Conversion::new()));
    refused("a download", buffer.download(&b).map(drop));
    let work = Custom::Cuda(Box::new(|_| Ok(())));
    refused("a custom operation", buffer.custom(work, &[&a, &b], &[]));
    let staging = StagingBufferPool::with_buffer_size(&mine, 1, 64).unwrap();
    refused("an upload", buffer.upload(staging.get_buffer().unwrap(), &b));
    let staging = StagingBufferPool::with_buffer_size(&theirs, 1, 64).unwrap();
    let error = buffer.upload(staging.get_buffer().unwrap(), &a).unwrap_err().to_string();
    assert_eq!(error, "cannot record an upload: the staging buffer belongs to another device");
    let error = staging.transfer_to_gpu(&[1u8; 64], &a).unwrap_err().to_string();
    assert_eq!(error, "cannot record a transfer: the tensor is on another device than the pool");
    // Nothing of it was recorded.
    assert!(buffer.is_empty());
    assert_eq!((a.to_vec::<u8>().unwrap(), b.to_vec::<u8>().unwrap()), (vec![1; 64], vec![2; 64]));
}

#[test]
fn what_belongs_to_one_device_is_refused_by_another() {
    let Some(fake) = pretended("devices=2") else { return };
    assert_apart(&Device::cuda(0).unwrap(), &Device::cuda(1).unwrap());
    close_and_check(&fake);
}

/// They share a context, but neither knows of the other's streams.
#[test]
fn a_gpu_that_is_opened_twice_is_two_devices() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=20");
    let (one, other) = (gpu.device(), gpu.device());
    assert_apart(&one, &other);
    let managers = [MemoryManager::new(&one), MemoryManager::new(&other)];
    let loaders = managers.each_ref().map(|memory| loader(memory, 100));
    drop(one);
    for number in 0..25 {
        for loader in &loaders {
            let batch = loader.get_batch().unwrap().unwrap();
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
        }
    }
}

/// The same thread takes from two loaders by turns, in no fixed rhythm.
#[test]
fn one_thread_takes_from_two_devices() {
    for seed in 0..3 {
        let Some(fake) = pretended(&format!("devices=2,random_latency_us=50,seed={seed}")) else {
            return;
        };
        let loaders = [0, 1].map(|ordinal| {
            let memory = MemoryManager::new(&Device::cuda(ordinal).unwrap());
            loader(&memory, 200)
        });
        let (mut taken, mut held) = ([0, 0], [None, None]);
        for turn in 0.. {
            if taken == [50, 50] {
                break;
            }
            let which = usize::from(batchline::mix(&[seed, turn]).is_multiple_of(3));
            let Some(batch) = loaders[which].get_batch().unwrap() else { continue };
            assert_eq!(batch.input_tensor().device(), loaders[which].memory_manager().device());
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(taken[which]));
            taken[which] += 1;
            held[which] = Some(batch);
        }
        drop((held, loaders));
        close_and_check(&fake);
    }
}

#[test]
fn one_device_is_lost_and_the_other_goes_on() {
    let Some(fake) = pretended("devices=2,random_latency_us=20") else { return };
    let managers = [0, 1].map(|ordinal| MemoryManager::new(&Device::cuda(ordinal).unwrap()));
    let tensors = managers.each_ref().map(|memory| memory.upload(&[3u8; 64], &[64]).unwrap());
    let loaders = managers.each_ref().map(|memory| loader(memory, 400));
    for number in 0..10 {
        for loader in &loaders {
            let batch = loader.get_batch().unwrap().unwrap();
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
        }
    }
    fake.lose(0, codes::ILLEGAL_ADDRESS);
    let error = loop {
        match loaders[0].get_batch() {
            Ok(batch) => assert!(batch.is_some(), "a lost device is no end of the data"),
            Err(error) => break error,
        }
    };
    let text = error.chain();
    assert!(error.is_device_lost() && text.contains("cuda:0: Fake GPU 0 is lost ("), "{text}");
    assert!(text.contains("CUDA_ERROR_ILLEGAL_ADDRESS (700)"), "{text}");
    assert!(tensors[0].to_vec::<u8>().unwrap_err().is_device_lost());
    for number in 10..100 {
        let batch = loaders[1].get_batch().unwrap().unwrap();
        assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
    }
    assert!(loaders[1].get_batch().unwrap().is_none());
    assert_eq!(tensors[1].to_vec::<u8>().unwrap(), [3; 64]);
    loaders.iter().for_each(|loader| loader.stop().unwrap());
    drop((loaders, tensors, managers));
    wait_until_closed();
    assert_eq!(crate::violations(&fake), [""; 0]);
    // What was on the other one is gone.
    assert_eq!(fake.live().contexts, 1);
}

/// A thread of the user's has the context of another device current, and has it still after each
/// call, whether it ends well or not.
#[test]
fn a_thread_keeps_the_context_that_it_has() {
    let Some(fake) = pretended("devices=2,memory_mib=64") else { return };
    drop(Device::cuda(1).unwrap());
    let driver = Driver::load();
    let other = driver.retain(1);
    let kept = |what: &str| assert_eq!(driver.current(), other.context, "after {what}");

    let device = Device::cuda(0).unwrap();
    kept("opening");
    let memory = MemoryManager::new(&device);
    let tensor = memory.upload(&[1u8; 64], &[64]).unwrap();
    kept("an upload");
    let wide: Tensor = tensor.convert_to(DType::F32).unwrap();
    kept("a conversion");
    assert_eq!(wide.to_vec::<f32>().unwrap(), [1.0; 64]);
    kept("a readback");
    let (_, stream) = device.as_cuda().unwrap();
    tensor.bind(&stream).unwrap();
    kept("a binding");
    let commands = CommandBufferPool::new(&memory, 1).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let work = |_| {
        assert_ne!(Driver::load().current(), 0);
        Err("no such luck".into())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[&tensor], &[]).unwrap();
    buffer.execute().unwrap_err();
    kept("a custom operation that fails");
    drop((tensor, wide));
    memory.trim();
    kept("freeing");
    let large = memory.tensor(&[40 << 20], DType::U8).unwrap();
    memory.tensor(&[40 << 20], DType::U8).unwrap_err();
    kept("an allocation that fails");
    drop(large);
    let loader = loader(&memory, 40);
    for number in 0..10 {
        let batch = loader.get_batch().unwrap().unwrap();
        assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
        drop(batch);
        kept("a batch");
    }
    loader.stop().unwrap();
    drop((loader, commands, memory, device));
    kept("closing");

    // A thread without any has ours from then on, and no longer than that matters.
    driver.make_current(0);
    drop(MemoryManager::new(&Device::cuda(0).unwrap()).upload(&[1u8], &[1]).unwrap());
    drop(MemoryManager::new(&Device::cuda(1).unwrap()).upload(&[1u8], &[1]).unwrap());
    driver.make_current(0);
    drop(other);
    close_and_check(&fake);
}

/// A context is lost in the middle of a call for which it was made current.
#[test]
fn a_thread_keeps_its_context_where_the_other_one_is_lost() {
    let Some(fake) = pretended("devices=2") else { return };
    drop(Device::cuda(1).unwrap());
    let driver = Driver::load();
    let other = driver.retain(1);
    let memory = MemoryManager::new(&Device::cuda(0).unwrap());
    let tensor = memory.upload(&[1u8; 64], &[64]).unwrap();
    fake.fail(Some("cuMemcpyDtoHAsync_v2"), 1, codes::LAUNCH_FAILED, When::Lose);
    assert!(tensor.to_vec::<u8>().is_err());
    assert_eq!(driver.current(), other.context);
    assert!(tensor.to_vec::<u8>().unwrap_err().is_device_lost());
    assert_eq!(driver.current(), other.context);
    driver.make_current(0);
}
