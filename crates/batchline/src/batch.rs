//! A batch on the device.

use std::fmt;
use std::sync::Arc;

use smallvec::SmallVec;

use crate::backend::{Fence, StreamId};
use crate::memory::{ConsumerQueue, Held, Tensor};
use crate::sync::Mutex;
use crate::{Error, Result, SampleSpec, Submission};

/// A batch on the device, ready for work on the consumer's queue.
///
/// Dropping the batch (and all clones of its tensors) gives its memory back: whatever was enqueued
/// on the consumer's queue until then still sees this batch, and the next one is written behind it.
///
/// ```
/// # use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Device, Host, HostTensor, InMemory};
/// # let dataset = InMemory::new(HostTensor::new(vec![1.0f32; 8], &[4, 2])?)?;
/// # let config = AsyncDataLoaderConfig::builder().batch_size(4).device(Device::host()).build()?;
/// # let loader = AsyncDataLoader::new(dataset, config)?;
/// # loader.start()?;
/// let batch = loader.get_batch()?.expect("a first batch");
/// assert_eq!(batch.input_tensor().shape().dims(), [4, 2]);
/// let bound = batch.bind(&Host)?;
/// assert_eq!(bound.input().as_slice::<f32>()?, [1.0; 8]);
/// # Ok::<(), batchline::Error>(())
/// ```
pub struct GpuBatch {
    /// Input, then the label if there is one, then the weights.
    tensors: Vec<Tensor>,
    spec: Arc<SampleSpec>,
    about: BatchInfo,
    /// The transfer, where there is one.
    transfer: Option<Submission>,
    /// Where the emptied list of tensors goes.
    lists: Arc<Lists>,
}

/// Lists of tensors, kept from batch to batch.
#[derive(Debug)]
pub(crate) struct Lists(Mutex<Vec<Vec<Tensor>>>);

impl Lists {
    /// So many lists, each with room for the tensors of a batch.
    pub(crate) fn new(batches: usize, tensors: usize) -> Self {
        Self(Mutex::new((0..batches).map(|_| Vec::with_capacity(tensors)).collect()))
    }

    /// An empty list.
    pub(crate) fn take(&self) -> Vec<Tensor> {
        self.0.lock().pop().unwrap_or_default()
    }

    fn keep(&self, mut list: Vec<Tensor>) {
        // Not under the lock: memory may go home.
        list.clear();
        self.0.lock().push(list);
    }
}

/// Where a batch comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BatchInfo {
    pub(crate) batch_id: u64,
    pub(crate) generation: u64,
    pub(crate) epoch: u64,
    pub(crate) batch_in_epoch: u64,
    pub(crate) last_in_epoch: bool,
    pub(crate) rows: u64,
    pub(crate) padding: u64,
}

impl GpuBatch {
    pub(crate) fn new(
        tensors: Vec<Tensor>,
        spec: Arc<SampleSpec>,
        about: BatchInfo,
        transfer: Option<Submission>,
        lists: &Arc<Lists>,
    ) -> Self {
        Self { tensors, spec, about, transfer, lists: Arc::clone(lists) }
    }

    /// What became of the transfer, if it is over and failed.
    pub(crate) fn failure(&self) -> Option<Error> {
        let transfer = self.transfer.as_ref().filter(|transfer| transfer.is_done())?;
        transfer.wait().err()
    }

    /// The fence that work on the batch must come after.
    pub(crate) fn written(&self) -> Option<Fence> {
        // All tensors lie in one block.
        self.tensors[0].storage().block().usage.lock().written
    }

    /// Notes that work on this consumer's stream may use the batch from now on.
    pub(crate) fn hand_to(&self, stream: StreamId, held: Held) {
        self.tensors[0].share().hand_to(stream, held);
    }

    /// The input: the samples are its first dimension.
    pub fn input_tensor(&self) -> &Tensor {
        &self.tensors[0]
    }

    /// The label, if samples have one.
    pub fn label_tensor(&self) -> Option<&Tensor> {
        self.spec.label_spec().map(|_| &self.tensors[1])
    }

    /// The weight tensors, in the order of the spec.
    pub fn weight_tensors(&self) -> &[Tensor] {
        &self.tensors[self.spec.first_weight()..]
    }

    /// The tensor with this name: `input`, `label`, or that of a weight.
    pub fn tensor(&self, name: &str) -> Option<&Tensor> {
        let place = self.spec.tensors().iter().position(|tensor| tensor.name == name)?;
        Some(&self.tensors[place])
    }

    /// What a sample is made of, at the source.
    pub fn spec(&self) -> &SampleSpec {
        &self.spec
    }

    /// The number of samples.
    pub fn len(&self) -> u64 {
        self.about.rows
    }

    /// Whether there are no samples: all were skipped, or a short last batch left none for this
    /// rank. It is delivered all the same, so that all ranks count the same batches.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many of the samples, the last ones, only fill the last batch of the epoch up.
    pub fn padding(&self) -> u64 {
        self.about.padding
    }

    /// The batch's number, from 0 in each generation.
    pub fn batch_id(&self) -> u64 {
        self.about.batch_id
    }

    /// How often the loader had been started when it made this batch; 1 after the first start.
    pub fn generation(&self) -> u64 {
        self.about.generation
    }

    /// The epoch, from 0.
    pub fn epoch(&self) -> u64 {
        self.about.epoch
    }

    /// The batch's number within its epoch, from 0.
    pub fn batch_in_epoch(&self) -> u64 {
        self.about.batch_in_epoch
    }

    /// Whether it is the last batch of its epoch. A source that does not know its size can't tell.
    pub fn is_last_in_epoch(&self) -> bool {
        self.about.last_in_epoch
    }

    /// Bytes of all tensors.
    pub fn byte_len(&self) -> u64 {
        self.tensors.iter().map(Tensor::byte_len).sum()
    }

    /// Makes `queue` wait for the batch, and hands out what that queue's work needs to use it.
    ///
    /// # Errors
    /// The queue is not one of the batch's device, or the device is lost.
    pub fn bind<'b, Q: ConsumerQueue>(&'b self, queue: &Q) -> Result<BoundBatch<'b, Q>> {
        let tensors =
            self.tensors.iter().map(|tensor| queue.bind(tensor)).collect::<Result<_>>()?;
        Ok(BoundBatch { tensors, batch: self })
    }

    /// Waits, on the host, until the batch has arrived. Work on the consumer's queue needs no such
    /// wait; it is for who measures, or wants to know of a failed transfer here and now.
    ///
    /// # Errors
    /// The transfer failed, or the device is lost.
    pub fn wait(&self) -> Result<()> {
        self.transfer.as_ref().map_or(Ok(()), Submission::wait)
    }

    /// Gives the batch back. Dropping it does the same.
    pub fn release(self) {
        drop(self);
    }
}

impl Drop for GpuBatch {
    fn drop(&mut self) {
        self.lists.keep(std::mem::take(&mut self.tensors));
    }
}

impl fmt::Debug for GpuBatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuBatch")
            .field("tensors", &self.tensors)
            .field("about", &self.about)
            .finish()
    }
}

/// A batch as one queue sees it. See [`GpuBatch::bind`].
pub struct BoundBatch<'b, Q: ConsumerQueue> {
    /// Up to four, which is what most data sets have, need no allocation.
    tensors: SmallVec<[Q::Handle<'b>; 4]>,
    batch: &'b GpuBatch,
}

impl<'b, Q: ConsumerQueue> BoundBatch<'b, Q> {
    /// The input.
    pub fn input(&self) -> &Q::Handle<'b> {
        &self.tensors[0]
    }

    /// The label, if samples have one.
    pub fn label(&self) -> Option<&Q::Handle<'b>> {
        self.batch.spec.label_spec().map(|_| &self.tensors[1])
    }

    /// The weights, in the order of the spec.
    pub fn weights(&self) -> &[Q::Handle<'b>] {
        &self.tensors[self.batch.spec.first_weight()..]
    }
}

impl<Q: ConsumerQueue> fmt::Debug for BoundBatch<'_, Q> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BoundBatch").field(self.batch).finish()
    }
}
