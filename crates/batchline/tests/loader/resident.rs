//! A data set that was uploaded once, on every device that can be had: what is delivered is what
//! workers would have brought.

use batchline::{
    ChannelOrder, Conversion, Gather, HostTensor, InMemory, LastBatch, LoadPath, MemoryLimits,
    Residency, mix,
};

use super::*;

const LEN: u64 = 150;
const IMAGE: [u64; 3] = [9, 7, 3];
const BYTES: u64 = LEN * (9 * 7 * 3 + 8 + 1);

/// Images, labels, and a mask of a byte.
fn images() -> InMemory {
    let byte = |at: u64| mix(&[at]).to_le_bytes()[2];
    let [height, width, channels] = IMAGE;
    let pixels = (0..LEN * height * width * channels).map(byte).collect();
    let pixels = HostTensor::new::<u8>(pixels, &[LEN, height, width, channels]).unwrap();
    let labels = HostTensor::new((0..LEN.cast_signed()).collect(), &[LEN]).unwrap();
    let masks = HostTensor::new((0..LEN).map(byte).collect(), &[LEN, 1]).unwrap();
    InMemory::new(pixels).unwrap().labels(labels).unwrap().weights("mask", masks).unwrap()
}

/// A wgpu device with these limits, if there is an adapter; it says so where there is none.
#[cfg(feature = "wgpu")]
fn adopted(limits: wgpu::Limits) -> Option<Device> {
    if let Err(missing) = Device::wgpu() {
        let required = std::env::var_os("BATCHLINE_REQUIRE_WGPU").is_some();
        assert!(!required, "BATCHLINE_REQUIRE_WGPU is set, but: {missing}");
        // Past the capture of the test harness, so that it is seen.
        let line = format!("skipped, a test of wgpu: {missing}\n");
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line.as_bytes());
        return None;
    }
    let descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    let instance = wgpu::Instance::new(descriptor);
    let adapter = pollster::block_on(instance.request_adapter(&Default::default())).unwrap();
    let descriptor = wgpu::DeviceDescriptor { required_limits: limits, ..Default::default() };
    let (device, queue) = pollster::block_on(adapter.request_device(&descriptor)).unwrap();
    Some(Device::wgpu_from(device, queue).unwrap())
}

/// The device of the tests, a wgpu device, and one of which a kernel sees 16 KiB at a time: less
/// than the images.
fn devices() -> Vec<Device> {
    let plan = FaultPlan { gathers: true, ..FaultPlan::default() };
    let faulty = [faulty_device(plan).0];
    #[cfg(feature = "wgpu")]
    let adopted = {
        let small =
            wgpu::Limits { max_storage_buffer_binding_size: 16 << 10, ..Default::default() };
        [Default::default(), small].into_iter().filter_map(adopted)
    };
    #[cfg(not(feature = "wgpu"))]
    let adopted = [];
    faulty.into_iter().chain(adopted).collect()
}

/// A shuffled stream of two epochs; the last batch of each is short.
fn stream(memory: &MemoryManager, residency: Residency) -> ConfigBuilder {
    AsyncDataLoaderConfig::builder()
        .batch_size(16)
        .shuffle(true)
        .seed(5)
        .epochs(2)
        .gather(Gather::Never)
        .residency(residency)
        .memory_manager(memory.clone())
}

/// All bytes of a batch.
fn bytes(batch: &GpuBatch) -> Vec<u8> {
    let rest = batch.label_tensor().into_iter().chain(batch.weight_tensors());
    std::iter::once(batch.input_tensor())
        .chain(rest)
        .flat_map(|tensor| tensor.to_bytes().unwrap())
        .collect()
}

fn drain(loader: &AsyncDataLoader) -> Vec<Vec<u8>> {
    loader.batches().map(|batch| bytes(&batch.unwrap())).collect()
}

fn planes() -> Conversion {
    Conversion::new()
        .normalize(&[120.0, 110.0, 100.0], &[58.0, 57.0, 56.0])
        .reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw)
}

#[test]
fn the_same_bytes_as_workers_bring() {
    for device in devices() {
        let memory = MemoryManager::new(&device);
        // One conversion that is done on the way, and one that is not.
        let conversions =
            [None, Some((DType::F32, planes())), Some((DType::I32, Conversion::new()))];
        for (convert, (rank, world_size)) in conversions
            .iter()
            .flat_map(|convert| [(0, 1), (0, 2), (1, 2)].map(|rank| (convert, rank)))
        {
            let run = |residency, path| {
                let mut config =
                    stream(&memory, residency).shard(rank, world_size).last_batch(LastBatch::Pad);
                if let Some((to, conversion)) = convert {
                    config = config.convert(*to, conversion.clone());
                }
                let loader = start(images(), config);
                let stats = loader.stats();
                assert_eq!(stats.path, path, "{device:?}: {}", stats.path_reason);
                drain(&loader)
            };
            let staged = run(Residency::Host, LoadPath::Staged);
            assert_eq!(staged.len() as u64, 2 * LEN.div_ceil(16 * world_size));
            let resident = run(Residency::Device, LoadPath::Resident);
            assert!(resident == staged, "{device:?}, {convert:?}, rank {rank} of {world_size}");
        }
        assert_home(&memory);
    }
}

/// A state knows nothing of the path: what one began another continues.
#[test]
fn a_stream_goes_on_by_the_other_path() {
    let paths = [(Residency::Host, Residency::Device), (Residency::Device, Residency::Host)];
    for (device, (before, after)) in
        devices().iter().flat_map(|device| paths.map(|paths| (device, paths)))
    {
        let memory = MemoryManager::new(device);
        let config = |residency| stream(&memory, residency).convert(DType::F32, planes());
        let whole = drain(&start(images(), config(before)));
        for taken in [0, 3, 10, 13] {
            let loader = start(images(), config(before));
            let mut found: Vec<_> =
                (0..taken).map(|_| bytes(&loader.get_batch().unwrap().unwrap())).collect();
            let state = loader.state();
            drop(loader);
            let loader = start(images(), config(after).resume_from(state));
            found.extend(drain(&loader));
            assert!(found == whole, "{device:?}: {after:?} after {taken} batches");
        }
    }
}

#[test]
fn what_was_uploaded_stays_over_generations() {
    for device in devices() {
        let memory = MemoryManager::new(&device);
        let loader = start(images(), stream(&memory, Residency::Device));
        let first = drain(&loader);
        let numbers = 2 * LEN * 8;
        assert_eq!(loader.stats().bytes_transferred, BYTES + numbers);
        let allocations = memory.stats().allocations;
        for _ in 0..2 {
            loader.stop().unwrap();
            assert!(memory.stats().device_in_use >= BYTES, "{:?}", memory.stats());
            loader.start().unwrap();
            assert_eq!(loader.stats().path, LoadPath::Resident);
            assert!(drain(&loader) == first, "{device:?}");
            assert_eq!(loader.stats().bytes_transferred, numbers);
        }
        assert_eq!(memory.stats().allocations, allocations);
        drop(loader);
        assert_home(&memory);
    }
}

/// No batch fails for it: it is known at the start.
#[test]
fn what_does_not_fit_is_brought_by_workers() {
    let mut scenes = Vec::new();
    for device in devices() {
        let limits = MemoryLimits::default().device_limit(BYTES - 1);
        scenes.push((MemoryManager::with_limits(&device, limits), "device_limit"));
    }
    #[cfg(feature = "wgpu")]
    {
        let small = wgpu::Limits {
            max_buffer_size: 24 << 10,
            max_storage_buffer_binding_size: 16 << 10,
            ..Default::default()
        };
        let why = "28350 bytes of one tensor are more than the 24576 that this device gathers from";
        scenes.extend(adopted(small).map(|device| (MemoryManager::new(&device), why)));
    }
    for (memory, why) in scenes {
        let staged = drain(&start(images(), stream(&memory, Residency::Host)));
        let loader = start(images(), stream(&memory, Residency::Device));
        let stats = loader.stats();
        assert_eq!(stats.path, LoadPath::Staged);
        let reason = &stats.path_reason;
        assert!(reason.starts_with("not resident: ") && reason.contains(why), "{reason}");
        assert!(drain(&loader) == staged, "{reason}");
        drop(loader);
        assert_home(&memory);
    }
}
