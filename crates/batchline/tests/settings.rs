//! Nonsense is refused with the remedy.

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, CommandBufferPool, ConfigBuilder, Conversion, DType,
    Device, Error, HostTensor, InMemory, MemoryManager, SampleSpec, Shuffled, StagingBufferPool,
};

fn builder() -> ConfigBuilder {
    AsyncDataLoaderConfig::builder().batch_size(4).device(Device::host())
}

fn refused(config: ConfigBuilder) -> String {
    config.build().unwrap_err().to_string()
}

#[test]
fn settings_of_zero() {
    assert!(refused(builder().batch_size(0)).starts_with("batch_size is 0:"));
    assert!(refused(builder().workers(0)).starts_with("workers is 0:"));
    assert!(refused(builder().prefetch_depth(0)).starts_with("prefetch_depth is 0:"));
    assert!(refused(builder().max_held(0)).starts_with("max_held is 0:"));
    assert!(refused(builder().epochs(0)).starts_with("epochs is 0:"));
    assert!(refused(builder().shard(0, 0)).starts_with("world_size is 0:"));
    let missing = AsyncDataLoaderConfig::builder().build().unwrap_err().to_string();
    assert!(missing.starts_with("batch_size is missing:"));
}

#[test]
fn settings_out_of_range() {
    assert!(refused(builder().shard(2, 2)).starts_with("rank 2 is not below world_size 2:"));
    assert!(refused(builder().workers(5000)).contains("more than 1024"));
    assert!(refused(builder().prefetch_depth(usize::MAX)).starts_with("prefetch_depth"));
    let product = builder().batch_size(1 << 40).shard(0, 1 << 40);
    assert!(matches!(product.build(), Err(Error::Overflow { .. })));
    assert!(refused(builder().shuffle(true).sampler(Shuffled::new(4, 1))).contains("sampler"));
}

fn dataset(len: u64) -> InMemory {
    InMemory::new(HostTensor::new(vec![0u8; usize::try_from(len).unwrap() * 2], &[len, 2]).unwrap())
        .unwrap()
}

#[test]
fn data_sets_too_small() {
    let error = |len, config: ConfigBuilder| {
        AsyncDataLoader::new(dataset(len), config.build().unwrap()).unwrap_err().to_string()
    };
    assert!(error(0, builder()).starts_with("the data set has no samples"));
    assert!(error(3, builder().drop_last(true)).contains("3 samples are fewer than the 4 of one"));
    assert!(error(7, builder().drop_last(true).shard(0, 2)).contains("fewer than the 8"));
}

#[test]
fn tensors_that_do_not_match() {
    let labels = HostTensor::new(vec![0u8; 9], &[9]).unwrap();
    let error = dataset(10).labels(labels).unwrap_err().to_string();
    assert_eq!(error, "labels has 9 samples, expected 10");
    let error = HostTensor::new(vec![0f32; 5], &[2, 3]).unwrap_err().to_string();
    assert!(error.contains("has 20 bytes, expected 24"), "{error}");
    assert!(InMemory::new(HostTensor::scalar(1u8)).is_err());
    assert!(matches!(SampleSpec::new(DType::F64, &[1 << 62]), Err(Error::Overflow { .. })));
}

#[test]
fn batches_that_overflow_or_never_fit() {
    let spec = SampleSpec::new(DType::U8, &[1 << 40]).unwrap();
    let huge = batchline::FnDataset::new(1 << 30, spec, |_, _| Ok(()));
    let config = builder().batch_size(1 << 30).build().unwrap();
    let error = AsyncDataLoader::new(huge, config).unwrap().start().unwrap_err();
    assert!(matches!(error, Error::Overflow { .. }), "{error}");
    let spec = SampleSpec::new(DType::U8, &[1 << 33]).unwrap();
    let large = batchline::FnDataset::new(10, spec, |_, _| Ok(()));
    let error =
        AsyncDataLoader::new(large, builder().build().unwrap()).unwrap().start().unwrap_err();
    let text = error.to_string();
    assert!(
        text.contains("34359738368 bytes can never fit under device_limit of 4294967296"),
        "{text}"
    );
}

#[test]
fn conversions_that_do_not_fit_the_samples() {
    let order =
        Conversion::new().reorder(batchline::ChannelOrder::Nhwc, batchline::ChannelOrder::Nchw);
    let config = builder().convert(DType::F32, order).build().unwrap();
    let error = AsyncDataLoader::new(dataset(10), config).unwrap().start().unwrap_err().to_string();
    assert!(error.contains("is no image"), "{error}");
}

#[test]
fn pools_of_nothing() {
    let memory = MemoryManager::new(&Device::host());
    assert!(StagingBufferPool::new(&memory, 0).is_err());
    assert!(StagingBufferPool::with_buffer_size(&memory, 1, 0).is_err());
    assert!(CommandBufferPool::new(&memory, 0).is_err());
    let error = memory.upload(&[1u8, 2, 3], &[2]).unwrap_err().to_string();
    assert!(error.contains("has 3 elements, expected 2"), "{error}");
    let pool = StagingBufferPool::new(&memory, 1).unwrap();
    let tensor = memory.tensor(&[4], DType::U8).unwrap();
    assert!(matches!(pool.transfer_to_gpu(&[0u8; 5], &tensor), Err(Error::Length { .. })));
    assert!(matches!(pool.transfer_to_gpu(&[0f32; 4], &tensor), Err(Error::DType { .. })));
    let mut buffer = pool.get_buffer().unwrap();
    assert!(matches!(buffer.write(4 << 20, &[0u8]), Err(Error::Length { .. })));
    assert!(matches!(buffer.write(usize::MAX, &[0u8; 2]), Err(Error::Length { .. })));
}
