//! The pool of command buffers, and batches of operations in one submission.

use std::fmt;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::buffer::{CommandBuffer, Recorder};
use super::convert::Conversion;
use super::submission::{Completion, Submission, refuse};
use crate::backend::Custom;
use crate::device::LossListener;
use crate::memory::{Patience, Pool, Tensor};
use crate::staging::StagingBuffer;
use crate::{Device, Element, Error, MemoryManager, Result};

/// A bounded pool of [`CommandBuffer`]s. Clones are handles to the same pool.
///
/// ```
/// use batchline::{CommandBufferPool, Device, MemoryManager};
/// let memory = MemoryManager::new(&Device::host());
/// let pool = CommandBufferPool::new(&memory, 4)?;
/// let (a, b) = (memory.upload(&[1i32, 2], &[2])?, memory.tensor(&[2], batchline::DType::I32)?);
///
/// let mut commands = pool.get_buffer()?;
/// commands.copy(&a, &b)?;
/// let submission = commands.execute_async(|result| println!("done: {result:?}"))?;
/// submission.wait()?;
/// assert_eq!(b.to_vec::<i32>()?, [1, 2]);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CommandBufferPool {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    pool: Pool<Recorder>,
    memory: MemoryManager,
}

impl LossListener for Inner {
    fn device_lost(&self, error: &Error) {
        self.pool.close(error.clone());
    }
}

/// The counts of a [`CommandBufferPool`] at one moment: `available + in_use = total ≤ max`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, serde::Serialize)]
#[non_exhaustive]
pub struct CommandPoolStats {
    /// Buffers made and free.
    pub available: usize,
    /// Buffers being recorded or in flight.
    pub in_use: usize,
    /// Buffers made.
    pub total: usize,
    /// The most that will be made.
    pub max: usize,
}

impl CommandBufferPool {
    /// A pool of at most `max_buffers` buffers, for the device of `memory`.
    ///
    /// # Errors
    /// `max_buffers` is 0, or the device is lost.
    pub fn new(memory: &MemoryManager, max_buffers: usize) -> Result<Self> {
        if max_buffers == 0 {
            return Err(Error::config("max_buffers", "is 0", "give the pool at least one buffer"));
        }
        let device = memory.device();
        device.check()?;
        let pool = Pool::new("command buffer pool", max_buffers);
        let inner = Arc::new(Inner { pool, memory: memory.clone() });
        let listener: Weak<Inner> = Arc::downgrade(&inner);
        device.core().on_loss(listener);
        Ok(Self { inner })
    }

    /// The device that the buffers are for.
    pub fn device(&self) -> &Device {
        self.inner.memory.device()
    }

    /// A buffer; waits while all are in use.
    ///
    /// # Errors
    /// The pool is closed, or the device lost.
    pub fn get_buffer(&self) -> Result<CommandBuffer> {
        self.get(Patience::Forever)
    }

    /// A buffer, or `None` while all are in use.
    ///
    /// # Errors
    /// The pool is closed, or the device lost.
    pub fn try_get_buffer(&self) -> Result<Option<CommandBuffer>> {
        match self.get(Patience::None) {
            Err(Error::Timeout { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    /// Closes the pool and waits no longer than `timeout`; false when that was too short. Called
    /// from a completion it does not wait, as [`cleanup`](Self::cleanup).
    pub(crate) fn cleanup_within(&self, timeout: Duration) -> bool {
        self.inner.pool.close(Error::Closed { what: "command buffer pool" });
        let patience = self.device().core().patience(Patience::within(timeout));
        self.inner.pool.wait_landed(patience) || patience == Patience::None
    }

    fn get(&self, patience: Patience) -> Result<CommandBuffer> {
        self.device().check()?;
        let patience = self.device().core().patience(patience);
        let recorder = self.inner.pool.acquire(patience, || Ok(Recorder::default()))?;
        Ok(CommandBuffer::new(recorder, self.inner.memory.clone()))
    }

    /// Records all operations in one command buffer and submits it once. Each operation's
    /// completion runs once, with the error if there was one.
    ///
    /// # Errors
    /// An operation that can't be recorded: nothing is submitted then, and every completion is
    /// called with that error. Or the pool is closed, or the device lost.
    pub fn execute_batch(&self, operations: Vec<BatchOperation>) -> Result<Submission> {
        let mut completions = Vec::new();
        let mut records = Vec::new();
        for operation in operations {
            completions.extend(operation.completion);
            records.push(operation.record);
        }
        let recorded = self.get_buffer().and_then(|mut buffer| {
            records.into_iter().try_for_each(|record| record(&mut buffer)).map(|()| buffer)
        });
        match recorded {
            Ok(buffer) => buffer.submit(completions),
            Err(error) => {
                refuse(completions, &error);
                Err(error)
            }
        }
    }

    /// The counts at this moment.
    pub fn stats(&self) -> CommandPoolStats {
        let counts = self.inner.pool.counts();
        CommandPoolStats {
            available: counts.available,
            in_use: counts.in_use,
            total: counts.total,
            max: counts.max,
        }
    }

    /// Closes the pool: waits for every buffer in flight; each later call is an error. Buffers
    /// still being recorded stay usable and are not taken back. Called from a completion it closes
    /// the pool and does not wait, since completions run one after another.
    pub fn cleanup(&self) {
        self.inner.pool.close(Error::Closed { what: "command buffer pool" });
        let patience = self.device().core().patience(Patience::Forever);
        self.inner.pool.wait_landed(patience);
    }
}

/// One operation of [`CommandBufferPool::execute_batch`].
///
/// ```
/// use batchline::{BatchOperation, CommandBufferPool, Device, DType, MemoryManager};
/// let memory = MemoryManager::new(&Device::host());
/// let (a, b) = (memory.tensor(&[4], DType::F32)?, memory.tensor(&[4], DType::F32)?);
/// let batch = vec![
///     BatchOperation::fill(&a, 2.5f32),
///     BatchOperation::copy(&a, &b).on_complete(|result| assert!(result.is_ok())),
/// ];
/// CommandBufferPool::new(&memory, 1)?.execute_batch(batch)?.wait()?;
/// assert_eq!(b.to_vec::<f32>()?, [2.5; 4]);
/// # Ok::<(), batchline::Error>(())
/// ```
#[must_use = "an operation does nothing until it is executed"]
pub struct BatchOperation {
    name: &'static str,
    record: Recipe,
    completion: Option<Completion>,
}

/// Records an operation.
type Recipe = Box<dyn FnOnce(&mut CommandBuffer) -> Result<()> + Send>;

impl BatchOperation {
    fn new(
        name: &'static str,
        record: impl FnOnce(&mut CommandBuffer) -> Result<()> + Send + 'static,
    ) -> Self {
        Self { name, record: Box::new(record), completion: None }
    }

    /// As [`CommandBuffer::upload`].
    pub fn upload(src: StagingBuffer, dst: &Tensor) -> Self {
        let dst = dst.clone();
        Self::new("upload", move |buffer| buffer.upload(src, &dst))
    }

    /// As [`CommandBuffer::copy`].
    pub fn copy(src: &Tensor, dst: &Tensor) -> Self {
        let (src, dst) = (src.clone(), dst.clone());
        Self::new("copy", move |buffer| buffer.copy(&src, &dst))
    }

    /// As [`CommandBuffer::fill`].
    pub fn fill<T: Element>(dst: &Tensor, value: T) -> Self {
        let dst = dst.clone();
        Self::new("fill", move |buffer| buffer.fill(&dst, value))
    }

    /// As [`CommandBuffer::convert`].
    pub fn convert(src: &Tensor, dst: &Tensor, conversion: Conversion) -> Self {
        let (src, dst) = (src.clone(), dst.clone());
        Self::new("convert", move |buffer| buffer.convert(&src, &dst, &conversion))
    }

    /// As [`CommandBuffer::custom`].
    pub fn custom(work: Custom, reads: &[&Tensor], writes: &[&Tensor]) -> Self {
        let reads: Vec<Tensor> = reads.iter().copied().cloned().collect();
        let writes: Vec<Tensor> = writes.iter().copied().cloned().collect();
        Self::new("custom", move |buffer| {
            let reads: Vec<&Tensor> = reads.iter().collect();
            let writes: Vec<&Tensor> = writes.iter().collect();
            buffer.custom(work, &reads, &writes)
        })
    }

    /// As [`CommandBuffer::download`]; `arrived` gets the bytes on the reaper's thread.
    pub fn download(src: &Tensor, arrived: impl FnOnce(Result<&[u8]>) + Send + 'static) -> Self {
        let src = src.clone();
        let cell = Arc::new(crate::sync::Mutex::new(None));
        let filled = Arc::clone(&cell);
        let operation = Self::new("download", move |buffer| {
            *filled.lock() = Some(buffer.download(&src)?);
            Ok(())
        });
        operation.on_complete(move |result| match (result, cell.lock().take()) {
            (Ok(()), Some(readback)) => {
                let mut arrived = Some(arrived);
                let outcome =
                    readback.with_bytes(|bytes| arrived.take().map(|call| call(Ok(bytes))));
                if let (Err(error), Some(call)) = (outcome, arrived) {
                    call(Err(error));
                }
            }
            (Err(error), _) => arrived(Err(error)),
            (Ok(()), None) => arrived(Err(Error::Closed { what: "command buffer" })),
        })
    }

    /// Has `completion` called when the batch is done, with the error if there was one. Those
    /// added earlier are called first.
    pub fn on_complete(mut self, completion: impl FnOnce(Result<()>) + Send + 'static) -> Self {
        self.completion = Some(match self.completion.take() {
            None => Box::new(completion),
            Some(first) => Box::new(move |result| {
                first(result.clone());
                completion(result);
            }),
        });
        self
    }
}

impl fmt::Debug for BatchOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("BatchOperation").field(&self.name).finish()
    }
}
