//! Tensors on streams of the `cudarc` crate.
#![allow(unsafe_code, reason = "launches kernels, as a user does")]

use std::sync::Arc;
use std::time::Duration;

use batchline::{AsyncDataLoader, CudaStream, DType, Device, Error, MemoryManager};
use cudarc::driver::{
    CudaContext, CudaStream as Stream, DevicePtr, DeviceSlice, LaunchConfig, PushKernelArg, sys,
};
use cudarc::nvrtc::Ptx;

use super::driver::Driver;
use super::{Gpu, WIDTH, builder, eventually, expected, no_kernels, numbers};

/// A GPU, and a stream of cudarc's on it; `None` where there is nothing to test with.
fn stream(settings: &str) -> Option<(Gpu, Arc<Stream>)> {
    if no_kernels() {
        return None;
    }
    let gpu = Gpu::new(settings);
    if gpu.fake.is_some() {
        // cudarc asks for names that only the toolkit gives to the driver first.
        // SAFETY: it is the fake, by the name of the driver, or another driver.
        let library = unsafe { sys::culib() };
        // SAFETY: it is not called.
        let fake = unsafe { library.get::<unsafe extern "C" fn()>(b"fake_cuda_reset") };
        if fake.is_err() {
            let line = b"skipped: cudarc finds another driver than the fake\n";
            let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
            return None;
        }
    }
    let stream = CudaContext::new(0).unwrap().new_stream().unwrap();
    Some((gpu, stream))
}

/// The stream, for what the test does with the driver itself.
fn raw(stream: &Stream) -> CudaStream {
    // SAFETY: it is kept by the caller.
    unsafe { CudaStream::from_raw(stream.cu_stream().cast()) }
}

#[test]
fn a_device_for_a_stream_of_cudarc() {
    let Some((_gpu, stream)) = stream("random_latency_us=50") else { return };
    let device = Device::cuda_from(&stream).unwrap();
    assert_eq!(device.as_cuda(), Some((0, raw(&stream))));
    let config = builder(&MemoryManager::new(&device)).prefetch_depth(2).max_held(2);
    let loader = AsyncDataLoader::new(numbers(40), config.build().unwrap()).unwrap();
    loader.start().unwrap();
    let mut seen = Vec::new();
    while let Some(batch) = loader.get_batch().unwrap() {
        let bound = batch.bind(&stream).unwrap();
        let view = bound.input().view::<u8>().unwrap();
        assert_eq!(view.len(), 4 * usize::from(WIDTH));
        // The copy goes on after the batch was dropped.
        seen.push(stream.clone_dtoh(&view).unwrap());
    }
    stream.synchronize().unwrap();
    assert_eq!(seen.len(), 10);
    for (number, bytes) in (0..).zip(seen) {
        assert_eq!(bytes, expected(number), "batch {number}");
    }
}

/// The stream is kept, though its owner has let go of it; and memory is written again behind it.
#[test]
fn a_binding_keeps_the_stream() {
    let Some((gpu, stream)) = stream("random_latency_us=50") else { return };
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let tensor = memory.upload(&[1u8; 4096], &[4096]).unwrap();
    let address = tensor.bind(&stream).unwrap().address();
    let bytes = driver.page_locked(4096);
    let gate = driver.hold(raw(&stream));
    driver.read(raw(&stream), address, bytes);
    drop(stream);
    drop(tensor);
    // The same memory, which is written behind the copy.
    let next = memory.tensor(&[4096], DType::U8).unwrap();
    let own = driver.stream();
    assert_eq!(next.bind(&own).unwrap().address, address);
    std::thread::scope(|scope| {
        let written = scope.spawn(|| next.write(&[2u8; 4096]));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!written.is_finished());
        gate.open();
        written.join().unwrap().unwrap();
    });
    assert_eq!(bytes, [1; 4096]);
    if let Some(fake) = &gpu.fake {
        // Four of the device, the test's own, and the default stream.
        eventually("the stream's end", || fake.live().streams == 5);
    }
}

#[test]
fn views_are_of_the_tensors_type() {
    let Some((gpu, stream)) = stream("") else { return };
    let memory = MemoryManager::new(&gpu.device());
    let tensor = memory.upload(&[1.5f32, -2.0], &[2]).unwrap();
    let bound = tensor.bind(&stream).unwrap();
    let error = bound.view::<i32>().unwrap_err();
    assert!(matches!(error, Error::DType { .. }), "{error}");
    let view = bound.view::<f32>().unwrap();
    let copied = stream.clone_dtoh(&view).unwrap();
    stream.synchronize().unwrap();
    assert_eq!(copied, [1.5, -2.0]);
    // Another stream comes behind the bound one, and the host behind it.
    let other = stream.context().new_stream().unwrap();
    let gate = Driver::load().hold(raw(&stream));
    std::thread::scope(|scope| {
        let copied = scope.spawn(|| other.clone_dtoh(&view).unwrap());
        std::thread::sleep(Duration::from_millis(20));
        assert!(!copied.is_finished());
        gate.open();
        assert_eq!(copied.join().unwrap(), [1.5, -2.0]);
    });
    // Nothing is recorded on the bound stream itself.
    let (address, order) = DevicePtr::<f32>::device_ptr(&view, &stream);
    assert_eq!(address, bound.address());
    drop(order);
}

#[test]
fn a_view_is_an_argument_of_a_kernel() {
    let Some((gpu, stream)) = stream("") else { return };
    let memory = MemoryManager::new(&gpu.device());
    let tensor = memory.upload(&[0i64; 1000], &[1000]).unwrap();
    let text = include_str!("../../src/backend/cuda/kernels.ptx");
    let module = stream.context().load_module(Ptx::from_src(text)).unwrap();
    let fill = module.load_function("batchline_fill_u64").unwrap();
    let bound = tensor.bind(&stream).unwrap();
    let view = bound.view::<i64>().unwrap();
    let mut launch = stream.launch_builder(&fill);
    launch.arg(&view).arg(&1000u64).arg(&7u64);
    let config = LaunchConfig { grid_dim: (4, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
    // SAFETY: the kernel writes as many elements as there are, and nobody else uses them.
    unsafe { launch.launch(config) }.unwrap();
    stream.synchronize().unwrap();
    assert_eq!(tensor.to_vec::<i64>().unwrap(), [7; 1000]);
}

/// A context of one's own, as another library may have made one.
#[test]
fn a_stream_of_another_context_is_refused() {
    let Some((gpu, stream)) = stream("") else { return };
    if gpu.fake.is_none() {
        return;
    }
    drop((stream, gpu));
    let fake = fake_cuda::Fake::start("devices=2,pageable=1");
    let other = CudaContext::new(1).unwrap();
    // The fake has primary contexts only; this one is another GPU's.
    // SAFETY: it exists, and what would destroy it is leaked.
    let foreign = unsafe { CudaContext::from_raw_context(0, 0, other.cu_ctx()) }.unwrap();
    std::mem::forget(Arc::clone(&foreign));
    let error = Device::cuda_from(&foreign.default_stream()).unwrap_err();
    assert!(error.to_string().contains("primary context"), "{error}");
    let device = Device::cuda(0).unwrap();
    let tensor = MemoryManager::new(&device).upload(&[1u8], &[1]).unwrap();
    let error = tensor.bind(&other.default_stream()).unwrap_err();
    assert!(error.to_string().contains("not in the context of cuda:0"), "{error}");
    let host = MemoryManager::new(&Device::host()).upload(&[1u8], &[1]).unwrap();
    let error = host.bind(&other.default_stream()).unwrap_err();
    assert!(error.to_string().contains("the tensor is on host"), "{error}");
    device.check().unwrap();
    assert_eq!(fake.violations(), [""; 0]);
}
