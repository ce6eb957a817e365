//! Sharing memory with code that uses wgpu itself.
#![cfg(feature = "wgpu")]

use std::io::Write;

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, CommandBufferPool, Custom, DType, Device, Error,
    FnDataset, Host, MemoryManager, SampleSpec,
};

/// The device to test on, or `None` with a line that says why not.
fn device() -> Option<Device> {
    match Device::wgpu() {
        Ok(device) => Some(device),
        Err(missing) => {
            let required = std::env::var_os("BATCHLINE_REQUIRE_WGPU").is_some();
            assert!(!required, "BATCHLINE_REQUIRE_WGPU is set, but: {missing}");
            // Past the capture of the test harness, so that it is seen.
            let _ = writeln!(std::io::stderr(), "skipped, a test of wgpu: {missing}");
            None
        }
    }
}

/// Reads a buffer with nothing but wgpu.
fn read(device: &wgpu::Device, queue: &wgpu::Queue, bytes: batchline::WgpuBinding<'_>) -> Vec<u8> {
    let target = device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: bytes.size,
        usage: wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST,
        mapped_at_creation: false,
    });
    let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(bytes.buffer, bytes.offset, &target, 0, bytes.size);
    queue.submit([encoder.finish()]);
    target.map_async(wgpu::MapMode::Read, .., |result| result.expect("mapped"));
    device.poll(wgpu::PollType::wait_indefinitely()).expect("polled");
    target.get_mapped_range(..).expect("mapped").to_vec()
}

#[test]
fn a_batch_is_bound_to_the_users_own_device_and_queue() {
    let Some(made) = device() else { return };
    // What a renderer would have: a device and a queue of its own.
    let (raw, queue) = made.as_wgpu().expect("a wgpu device");
    let (raw, queue) = (raw.clone(), queue.clone());
    let own = Device::wgpu_from(raw.clone(), queue.clone()).expect("adopted");

    let spec = SampleSpec::new(DType::U8, &[7]).unwrap().label(DType::I32, &[]).unwrap();
    let dataset = FnDataset::new(30, spec, |index, sample| {
        sample.input().fill(u8::try_from(index)?);
        Ok(sample.write(1, &[i32::try_from(index)? * 3])?)
    });
    let config = AsyncDataLoaderConfig::builder().batch_size(10).device(own).build().unwrap();
    let loader = AsyncDataLoader::new(dataset, config).unwrap();
    loader.start().unwrap();
    for number in 0..3u8 {
        let batch = loader.get_batch().unwrap().unwrap();
        let bound = batch.bind(&queue).unwrap();
        let expected: Vec<u8> = (0..10).flat_map(|row| [number * 10 + row; 7]).collect();
        assert_eq!(read(&raw, &queue, *bound.input())[..70], expected);
        let labels = read(&raw, &queue, *bound.label().unwrap());
        let expected: Vec<u8> =
            (0..10).flat_map(|row| (i32::from(number * 10 + row) * 3).to_ne_bytes()).collect();
        assert_eq!(labels, expected);
        assert!(bound.input().as_buffer_binding().is_some());
    }
    assert!(loader.get_batch().unwrap().is_none());
}

/// Two devices with their queues, of one instance.
fn two_of_one_instance() -> Option<[(wgpu::Device, wgpu::Queue); 2]> {
    device()?;
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let open = || {
        let adapter = instance.request_adapter(&wgpu::RequestAdapterOptions::default());
        let adapter = pollster::block_on(adapter).expect("an adapter");
        pollster::block_on(adapter.request_device(&wgpu::DeviceDescriptor::default()))
            .expect("a device")
    };
    Some([open(), open()])
}

#[test]
fn another_queue_is_refused() {
    let Some([(device, queue), (_other, foreign)]) = two_of_one_instance() else { return };
    let own = Device::wgpu_from(device, queue.clone()).unwrap();
    let tensor = MemoryManager::new(&own).upload(&[1u8], &[1]).unwrap();
    assert!(tensor.bind(&queue).is_ok());
    let error = tensor.bind(&foreign).unwrap_err().to_string();
    assert!(error.contains("not the queue of wgpu"), "{error}");
    assert!(tensor.bind(&Host).is_err());
    let local = MemoryManager::new(&Device::host()).upload(&[1u8], &[1]).unwrap();
    assert!(local.bind(&queue).is_err());
}

/// A driver must not be unloaded under a thread that used it: NVIDIA's crashes the thread's end.
#[test]
fn a_thread_may_end_after_its_last_device() {
    if device().is_none() {
        return;
    }
    for _ in 0..3 {
        let user = std::thread::Builder::new().spawn(|| {
            let device = Device::wgpu().unwrap();
            MemoryManager::new(&device).upload(&[1u8, 2], &[2]).unwrap().to_vec::<u8>().unwrap()
        });
        assert_eq!(user.unwrap().join().unwrap(), [1, 2]);
    }
}

#[test]
fn custom_work_records_into_the_encoder() {
    let Some(device) = device() else { return };
    let memory = MemoryManager::new(&device);
    let commands = CommandBufferPool::new(&memory, 2).unwrap();
    let (from, to) =
        (memory.upload(&[1i32, 2, 3, 4], &[4]).unwrap(), memory.upload(&[0i32; 4], &[4]).unwrap());
    let mut buffer = commands.get_buffer().unwrap();
    let work = Custom::Wgpu(Box::new(|custom: batchline::WgpuCustom<'_>| {
        let (read, write) = (&custom.reads[0], &custom.writes[0]);
        custom.encoder.copy_buffer_to_buffer(
            read.buffer,
            read.offset,
            write.buffer,
            write.offset + 4,
            12,
        );
        Ok(())
    }));
    buffer.custom(work, &[&from], &[&to]).unwrap();
    buffer.execute().unwrap().wait().unwrap();
    assert_eq!(to.to_vec::<i32>().unwrap(), [0, 1, 2, 3]);
    let mut buffer = commands.get_buffer().unwrap();
    let wrong = Custom::Host(Box::new(|_| Ok(())));
    assert!(matches!(buffer.custom(wrong, &[], &[]), Err(Error::Record { .. })));
}

#[test]
fn a_lost_device_ends_the_stream() {
    let Some(device) = device() else { return };
    let spec = SampleSpec::new(DType::F32, &[64]).unwrap();
    let dataset = FnDataset::new(64, spec, |_, sample| Ok(sample.write(0, &[1f32; 64])?));
    let config = AsyncDataLoaderConfig::builder().batch_size(8).device(device.clone());
    let loader = AsyncDataLoader::new(dataset, config.build().unwrap()).unwrap();
    loader.start().unwrap();
    loader.get_batch().unwrap().unwrap();
    // Nothing writes to mapped memory any more when the stream has been read to its end.
    while loader.stats().batches_produced < 5 {
        drop(loader.get_batch().unwrap());
    }
    loader.stop().unwrap();
    device.as_wgpu().unwrap().0.destroy();
    let error = loop {
        match loader.start().and_then(|()| loader.get_batch()) {
            Err(error) => break error,
            Ok(_) => loader.stop().unwrap(),
        }
    };
    assert!(error.is_device_lost(), "{}", error.chain());
    assert!(loader.start().is_err());
}
