//! What a loader must do on every device.

use super::{MakeDevice, bytes, wait_until};
use crate::backend::ChannelOrder;
use crate::backend::host::convert::convert;
use crate::plan::mix;
use crate::{
    AsyncDataLoader, AsyncDataLoaderConfig, Conversion, DType, Dataset, Device, Error, FnDataset,
    Gather, GpuBatch, HostTensor, InMemory, LastBatch, LoadPath, MemoryManager, Residency,
    SampleBuffer, SampleSpec, Shape,
};

/// A data set of `len` samples with an input, a label and a mask, each known by its index.
fn numbered(len: u64) -> impl Dataset + Clone {
    let inputs: Vec<u8> = (0..len).flat_map(|i| bytes(i, 37)).collect();
    let labels: Vec<i64> = (0..len).map(|i| mix(&[i]).cast_signed()).collect();
    let masks: Vec<f32> = (0..len).map(|i| (i % 7) as f32).collect();
    InMemory::new(HostTensor::new(inputs, &[len, 37]).expect("inputs"))
        .and_then(|set| set.labels(HostTensor::new(labels, &[len])?))
        .and_then(|set| set.weights("mask", HostTensor::new(masks, &[len, 1])?))
        .expect("a data set")
}

/// The bytes of a batch, tensor by tensor, read without any of the pipeline.
fn expected_batch(dataset: &dyn Dataset, indices: &[u64]) -> Vec<Vec<u8>> {
    let mut buffer = SampleBuffer::new(dataset.spec()).expect("a buffer");
    let mut tensors = vec![Vec::new(); dataset.spec().tensors().len()];
    for index in indices {
        buffer.fill(|sample| dataset.read(*index, sample)).expect("a sample");
        for (place, tensor) in tensors.iter_mut().enumerate() {
            tensor.extend_from_slice(buffer.bytes(place));
        }
    }
    tensors
}

fn batch_bytes(batch: &GpuBatch) -> Vec<Vec<u8>> {
    let label = batch.label_tensor();
    std::iter::once(batch.input_tensor())
        .chain(label)
        .chain(batch.weight_tensors())
        .map(|tensor| tensor.to_bytes().expect("a readback"))
        .collect()
}

/// Batches come in order, each once, with the right bytes, for any number of workers.
///
/// # Panics
/// The device fails.
pub fn loader_delivers_in_order(make: MakeDevice<'_>) {
    for (workers, depth, batch_size) in [(1, 1, 7), (3, 2, 16), (8, 5, 1), (4, 3, 64)] {
        let device = make();
        let memory = MemoryManager::new(&device);
        let dataset = numbered(100);
        let config = AsyncDataLoaderConfig::builder()
            .batch_size(batch_size)
            .workers(workers)
            .prefetch_depth(depth)
            .epochs(2)
            .memory_manager(memory.clone())
            .build()
            .expect("settings");
        let loader = AsyncDataLoader::new(dataset.clone(), config).expect("a loader");
        loader.start().expect("started");
        let mut number = 0;
        for epoch in 0..2 {
            let indices: Vec<u64> = (0..100).collect();
            let size = usize::try_from(batch_size).expect("small");
            for (place, indices) in indices.chunks(size).enumerate() {
                let batch = loader.get_batch().expect("a batch").expect("not the end");
                assert_eq!((batch.batch_id(), batch.epoch()), (number, epoch));
                assert_eq!(batch.batch_in_epoch(), place as u64);
                assert_eq!(batch_bytes(&batch), expected_batch(&dataset, indices));
                number += 1;
            }
        }
        assert!(loader.get_batch().expect("the end").is_none());
        assert!(loader.get_batch().expect("the end, again").is_none());
        drop(loader);
        wait_until(|| memory.stats().device_in_use == 0, "the outputs to come back");
        wait_until(|| memory.stats().staging_in_use == 0, "the slots to come back");
    }
}

/// The device converts the input, and leaves label and weights alone.
///
/// # Panics
/// The device fails.
pub fn loader_converts(device: &Device) {
    let spec = SampleSpec::new(DType::U8, &[4, 6, 3])
        .and_then(|spec| spec.label(DType::I64, &[]))
        .expect("a spec");
    let dataset = FnDataset::new(20, spec, |index, sample| {
        sample.input().copy_from_slice(&bytes(index, 72));
        sample.write(1, &[index.cast_signed()])?;
        Ok(())
    });
    let conversion = Conversion::new()
        .normalize(&[120.0, 110.0, 100.0], &[58.0, 57.0, 56.0])
        .reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(8)
        .last_batch(LastBatch::Keep)
        .convert(DType::F32, conversion.clone())
        .device(device.clone())
        .build()
        .expect("settings");
    let loader = AsyncDataLoader::new(dataset, config).expect("a loader");
    loader.start().expect("started");
    let mut first = 0;
    for batch in loader.batches() {
        let batch = batch.expect("a batch");
        let rows = batch.len();
        assert_eq!(batch.input_tensor().shape().dims(), [rows, 3, 4, 6]);
        let raw: Vec<u8> = (first..first + rows).flat_map(|index| bytes(index, 72)).collect();
        let shape = Shape::new(&[rows, 4, 6, 3]).expect("a shape");
        let spec = conversion.spec_for(DType::U8, DType::F32, shape).expect("a conversion");
        let mut expected = vec![0f32; raw.len()];
        convert(&raw, bytemuck::cast_slice_mut(&mut expected), &spec);
        assert_eq!(batch.input_tensor().to_vec::<f32>().expect("a readback"), expected);
        let labels: Vec<i64> = (first..first + rows).map(u64::cast_signed).collect();
        let label = batch.label_tensor().expect("a label");
        assert_eq!(label.to_vec::<i64>().expect("a readback"), labels);
        first += rows;
    }
    assert_eq!(first, 20);
}

/// Batches are the same whether workers bring the samples or the device fetches them, by each means
/// that it has.
///
/// # Panics
/// The device fails.
pub fn loader_takes_every_path(device: &Device) {
    let colours = Conversion::new().normalize(&[120.0, 110.0, 100.0], &[58.0, 57.0, 56.0]);
    let planes = colours.clone().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
    let conversions = [
        None,
        Some((DType::F32, planes.clone())),
        Some((DType::F16, planes)),
        Some((DType::I16, Conversion::new())),
    ];
    every_path(device, &[7, 5, 3], &conversions);
    let first = [Some((DType::BF16, colours.channels(ChannelOrder::Nchw)))];
    every_path(device, &[3, 7, 5], &first);
    // Of these a batch has other dimensions last than an image has.
    let scaled = [Some((DType::F32, Conversion::new().scale_and_bias(&[4.0], &[-14.0])))];
    for dims in [&[7, 5][..], &[5], &[]] {
        every_path(device, dims, &scaled);
    }
}

/// Rows of this shape, converted in each of these ways.
fn every_path(device: &Device, dims: &[u64], conversions: &[Option<(DType, Conversion)>]) {
    let memory = MemoryManager::new(device);
    let row = usize::try_from(dims.iter().product::<u64>()).expect("small");
    let inputs: Vec<u8> = (0..90).flat_map(|index| bytes(index, row)).collect();
    let inputs = HostTensor::new(inputs, &[&[90], dims].concat()).expect("inputs");
    let labels = HostTensor::new((0..90).collect::<Vec<i64>>(), &[90]).expect("labels");
    let dataset = InMemory::new(inputs).and_then(|set| set.labels(labels)).expect("a data set");
    let gathers = device.core().backend().gathers();
    let can = !device.info().unified;
    for convert in conversions {
        let mut staged = Vec::new();
        for (residency, gather, path) in [
            (Residency::Host, Gather::Never, LoadPath::Staged),
            (Residency::Device, Gather::Never, LoadPath::Resident),
            (Residency::Host, Gather::Auto, LoadPath::Gathered),
            (Residency::Host, Gather::Kernel, LoadPath::Gathered),
            (Residency::Host, Gather::Copies, LoadPath::Gathered),
        ] {
            let mut config = AsyncDataLoaderConfig::builder()
                .batch_size(16)
                .workers(3)
                .epochs(2)
                .shuffle(true)
                .residency(residency)
                .gather(gather)
                .memory_manager(memory.clone());
            if let Some((to, conversion)) = convert {
                config = config.convert(*to, conversion.clone());
            }
            let loader = AsyncDataLoader::new(dataset.clone(), config.build().expect("settings"))
                .expect("a loader");
            loader.start().expect("started");
            let path = match path {
                LoadPath::Resident if can && gathers.from_device > 0 => path,
                LoadPath::Gathered if can && gathers.from_host => path,
                _ => LoadPath::Staged,
            };
            let stats = loader.stats();
            assert_eq!(stats.path, path, "{}", stats.path_reason);
            let batch = |batch: crate::Result<GpuBatch>| batch_bytes(&batch.expect("a batch"));
            let found: Vec<_> = loader.batches().map(batch).collect();
            if staged.is_empty() {
                assert_eq!(found.len(), 12);
                staged = found;
            } else {
                assert!(found == staged, "{path}, {gather:?}, {convert:?}: other bytes");
            }
        }
    }
    wait_until(|| memory.stats().device_in_use == 0, "the outputs to come back");
    assert_eq!(memory.stats().staging_in_use, 0, "all after the loaders");
}

/// A loader that is stopped after any number of batches lets go of everything, and starts again.
///
/// # Panics
/// The device fails.
pub fn loader_stops_anywhere(device: &Device) {
    let memory = MemoryManager::new(device);
    let dataset = numbered(64);
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(8)
        .workers(4)
        .endless()
        .memory_manager(memory.clone())
        .build()
        .expect("settings");
    let loader = AsyncDataLoader::new(dataset.clone(), config).expect("a loader");
    for taken in 0..6u64 {
        loader.start().expect("started");
        assert!(matches!(loader.start(), Err(Error::Lifecycle { .. })));
        for number in 0..taken {
            let batch = loader.get_batch().expect("a batch").expect("not the end");
            assert_eq!((batch.batch_id(), batch.generation()), (number, taken + 1));
            let indices: Vec<u64> = (number * 8 % 64..number * 8 % 64 + 8).collect();
            assert_eq!(batch_bytes(&batch), expected_batch(&dataset, &indices));
        }
        loader.stop().expect("stopped");
        loader.stop().expect("stopped twice");
        assert!(matches!(loader.get_batch(), Err(Error::Lifecycle { .. })));
        wait_until(|| memory.stats().device_in_use == 0, "the outputs to come back");
        // What the device reads by itself stays registered with it.
        let gathered = loader.stats().path == LoadPath::Gathered;
        let registered = if gathered { 64 * (37 + 8 + 4) } else { 0 };
        assert_eq!(memory.stats().staging_in_use, registered, "slots after stop");
    }
    drop(loader);
    assert_eq!(memory.stats().staging_in_use, 0, "all after the loader");
    device.check().expect("a healthy device");
}
