//! What users may rely on of the public types: which threads they may go to, that they can be
//! printed and compared, and what is an error, a future or an iterator. Most of it is checked by
//! compiling.

use std::error::Error as StdError;
use std::fmt::Debug;
use std::future::Future;
use std::hash::Hash;
use std::iter::FusedIterator;

use batchline::backend::{
    Backend, Command, CommandKind, ConvertSpec, DeviceMemory, Direction, Fence, GatherBy, Gathers,
    RegisteredMemory, StagingMemory, SubmitError,
};
use batchline::testing::{FaultControl, FaultPlan};
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, AsyncDataLoaderStats, BatchOperation, BatchStream,
    Batches, Bottleneck, BoundBatch, BoxError, ChannelOrder, CommandBuffer, CommandBufferPool,
    CommandPoolStats, ConfigBuilder, Conversion, Custom, DType, DataSource, Dataset, Delivery,
    Device, DeviceInfo, DeviceKind, Error, ErrorPolicy, FnDataset, FnSource, Found, FrozenCommands,
    Gather, GpuBatch, Host, HostCustom, HostTensor, HostView, InMemory, IterSource, LastBatch,
    LoadPath, LoaderState, MemoryLimits, MemoryManager, MemoryStats, Permutation, Readback,
    Residency, Sample, SampleBuffer, SampleMut, SampleSpec, Sampler, Sequential, Shape, Shard,
    Shuffled, Skipped, StageTimes, Stages, StagingBuffer, StagingBufferPool, StagingPoolStats,
    Submission, Tensor, TensorSpec, Transfer, UnknownDType,
};

/// Lists the types that a bound must hold for.
macro_rules! all {
    ($bound:ident: $($type:ty),* $(,)?) => { $($bound::<$type>();)* };
}

#[test]
fn types_go_to_any_thread_and_can_be_printed() {
    fn shared<T: Send + Sync + Unpin + Debug>() {}
    type Read = fn(u64, &mut SampleMut<'_>) -> Result<(), BoxError>;
    type Next = fn(usize) -> Result<Option<Sample>, BoxError>;
    type Items = std::vec::IntoIter<Result<Sample, BoxError>>;
    all!(shared: AsyncDataLoader, AsyncDataLoaderConfig, AsyncDataLoaderStats, BatchStream<'static>,
        Batches<'static>, Bottleneck, BoundBatch<'static, Host>, ChannelOrder, CommandBufferPool,
        CommandPoolStats, ConfigBuilder, Conversion, DType, Delivery, Device, DeviceInfo,
        DeviceKind, Error, ErrorPolicy, FaultControl, FaultPlan, FnDataset<Read>, FnSource<Next>,
        Found, FrozenCommands, GpuBatch, Host, HostCustom<'static>, HostTensor, HostView<'static>, InMemory,
        IterSource<fn() -> Items, Items>, LastBatch, LoaderState, MemoryLimits, MemoryManager,
        MemoryStats, Permutation, Readback, Residency, Sample, SampleBuffer, SampleSpec, Sequential, Shape,
        Shard, Shuffled, Skipped, StageTimes, Stages, StagingBuffer, StagingBufferPool,
        StagingPoolStats, Submission, Tensor, TensorSpec, Transfer, UnknownDType,
        CommandKind, ConvertSpec, Direction, Fence, SubmitError);
    // What holds the user's closures goes from thread to thread, one at a time.
    fn moved<T: Send + Unpin + Debug>() {}
    all!(moved: BatchOperation, Command<'static>, CommandBuffer, Custom, SampleMut<'static>);
    #[cfg(feature = "formats")]
    all!(shared: batchline::formats::Idx, batchline::formats::Npy, batchline::formats::Synthetic);
    all!(shared: batchline::dlpack::DlpackStream, batchline::dlpack::DlpackTensor);
    #[cfg(feature = "wgpu")]
    all!(shared: batchline::WgpuBinding<'static>, BoundBatch<'static, wgpu::Queue>);
    #[cfg(feature = "wgpu")]
    all!(moved: batchline::WgpuCustom<'static>);
}

#[test]
fn values_are_copied_compared_and_kept() {
    fn handle<T: Clone + 'static>() {}
    all!(handle: AsyncDataLoaderConfig, AsyncDataLoaderStats, CommandBufferPool, ConfigBuilder, Conversion, Device,
        DeviceInfo, Error, FaultControl, Found, HostTensor, InMemory, LoaderState, MemoryManager,
        Sample, SampleSpec, StagingBufferPool, Submission, Tensor, TensorSpec);
    fn value<T: Copy + Eq + 'static>() {}
    all!(value: CommandPoolStats, MemoryLimits, MemoryStats, Permutation,
        Sequential, Shape, Shuffled, StageTimes, Stages, StagingPoolStats);
    fn key<T: Eq + Hash>() {}
    all!(key: Bottleneck, ChannelOrder, CommandKind, DType, DeviceKind, Direction, ErrorPolicy,
        Fence, Gather, GatherBy, LastBatch, LoadPath, Residency, SampleSpec, Shape, Shard, TensorSpec);
    fn with_default<T: Default>() {}
    all!(with_default: AsyncDataLoaderStats, CommandPoolStats, ConfigBuilder, Conversion,
        ErrorPolicy, Gather, Gathers, LastBatch, LoadPath, MemoryLimits, Residency, MemoryStats, Shape, Shard, StagingPoolStats);
    fn reported<T: serde::Serialize>() {}
    all!(reported: AsyncDataLoaderStats, Bottleneck, CommandPoolStats, DType, DeviceInfo,
        DeviceKind, LoadPath, LoaderState, MemoryStats, Skipped, StageTimes, Stages, StagingPoolStats);
}

#[test]
fn errors_are_errors_of_the_standard_library() {
    fn error<T: StdError + Send + Sync + 'static>() {}
    all!(error: Error, SubmitError, UnknownDType);
    // Every call returns one: it must not be in the way.
    assert!(size_of::<Error>() <= 128, "{} bytes", size_of::<Error>());
    let io = Error::Io {
        path: "a.npy".into(),
        operation: "open",
        source: std::sync::Arc::new(std::io::Error::other("no such file")),
    };
    let submit = SubmitError::from(io);
    assert_eq!(submit.to_string(), "a.npy: cannot open");
    assert_eq!(submit.source().expect("a cause").to_string(), "no such file");
}

#[test]
fn work_is_awaited_and_batches_are_iterated() {
    fn future<T: Future<Output = batchline::Result<()>>>() {}
    all!(future: Submission, Transfer);
    fn batches<T: Iterator<Item = batchline::Result<GpuBatch>>>() {}
    all!(batches: AsyncDataLoader, Batches<'static>);
    fn fused<T: FusedIterator>() {}
    all!(fused: Batches<'static>);
    fn stream<T: futures_core::Stream<Item = batchline::Result<GpuBatch>>>() {}
    all!(stream: BatchStream<'static>);
}

/// Sources, orders and backends can be chosen when the program runs.
#[test]
fn traits_make_objects() {
    fn dataset<T: Dataset>() {}
    all!(dataset: Box<dyn Dataset>, std::sync::Arc<dyn Dataset>);
    fn source<T: DataSource>() {}
    all!(source: Box<dyn DataSource>);
    fn object<T: ?Sized + Send + Sync>() {}
    all!(object: dyn Sampler, dyn Backend, dyn DeviceMemory, dyn RegisteredMemory,
        dyn StagingMemory);
}

#[test]
fn names_are_aligned_where_a_width_is_asked_for() {
    assert_eq!(format!("{:>5}|{:<5}|", DType::F32, DType::Bool), "  f32|bool |");
    assert_eq!(format!("{:6}|{:10}|", DeviceKind::Host, Bottleneck::Workers), "host  |workers   |");
    assert_eq!(format!("{:9}|", batchline::LoadPath::Gathered), "gathered |");
}

/// A sampler may be chosen at run time.
#[test]
fn samplers_are_forwarded() {
    let shuffled: Box<dyn batchline::Sampler> = Box::new(batchline::Shuffled::new(10, 3));
    let shared = std::sync::Arc::new(batchline::Shuffled::new(10, 3));
    let mut indices = [0; 10];
    batchline::Sampler::indices(&shuffled, 1, 0, &mut indices);
    for (position, index) in (0..).zip(indices) {
        assert_eq!(batchline::Sampler::index(&shared, 1, position), index);
    }
    assert_eq!(
        batchline::Sampler::fingerprint(&shuffled),
        batchline::Sampler::fingerprint(&shared)
    );
    let device = batchline::Device::host();
    let config = batchline::AsyncDataLoaderConfig::builder().batch_size(2).device(device);
    assert!(config.sampler(shuffled).build().is_ok());
}
