//! Chains of operations that are recorded once and executed again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::execute::execute;
use super::operation::{Operation, Span};
use super::submission::{Commands, Completion, Parts, Submission, Work};
use crate::backend::Kept;
use crate::memory::{Hold, MemoryManager, Share};
use crate::sync::Mutex;
use crate::{Device, Error, Result};

/// A recorded chain of operations that can be executed any number of times, from any thread:
/// [`CommandBuffer::freeze`](super::CommandBuffer::freeze).
///
/// ```
/// use batchline::{CommandBufferPool, Conversion, DType, Device, MemoryManager};
/// let memory = MemoryManager::new(&Device::host());
/// let pixels = memory.tensor(&[4], DType::U8)?;
/// let floats = memory.tensor(&[4], DType::F32)?;
/// let input = memory.tensor(&[4], DType::BF16)?;
///
/// let mut commands = CommandBufferPool::new(&memory, 1)?.get_buffer()?;
/// commands.convert(&pixels, &floats, &Conversion::new().normalize(&[128.0], &[64.0]))?;
/// commands.convert(&floats, &input, &Conversion::new())?;
/// commands.fill(&pixels, 0u8)?;
/// let prepare = commands.freeze()?;
///
/// for (value, prepared) in [(128u8, 0.0), (0, -2.0), (192, 1.0)] {
///     pixels.write(&[value; 4])?;
///     prepare.execute()?.wait()?;
///     assert_eq!(input.convert_to(DType::F32)?.to_vec::<f32>()?, [prepared; 4]);
/// }
/// # Ok::<(), batchline::Error>(())
/// ```
///
/// Each execution is a submission like any other: it comes behind earlier work on the same tensors,
/// the executions that are still under way included, and owns what the device uses. So this handle
/// may be dropped at any time. While it is there, the tensors that it names count as held, and
/// their memory is not given to others.
///
/// A stream of your own that reads one of the tensors is not waited for, as long as handles to that
/// tensor exist: before the next execution, have the device wait for it in a
/// [custom operation](super::CommandBuffer::custom) that writes the tensor.
///
/// On CUDA the driver is given a chain of two operations or more once, as a graph, and launches it
/// with one call from the second execution on. Where it makes no graph of it, and on every other
/// device, the operations are enqueued anew each time.
#[derive(Debug)]
#[must_use = "nothing that is recorded is done until it is executed"]
pub struct FrozenCommands {
    chain: Arc<Chain>,
    /// The user's part in what the operations name.
    _shares: Vec<Share>,
    memory: MemoryManager,
}

impl FrozenCommands {
    /// Takes the operations out of a recorder.
    pub(super) fn new(recorded: &mut Vec<Operation>, memory: MemoryManager) -> Result<Self> {
        for operation in &*recorded {
            let what = match operation {
                Operation::Copy { .. } | Operation::Fill { .. } | Operation::Convert { .. } => {
                    continue;
                }
                Operation::Upload { .. } => "an upload gives its staging buffer back",
                Operation::Download { .. } => "a download has one readback",
                Operation::Gather(_) => "a gather gives its row numbers back",
                Operation::Custom { .. } => "a custom operation can be called once",
            };
            let problem = format!("{what}: record it in a command buffer of its own each time");
            return Err(Error::record("a frozen chain", problem));
        }
        let mut operations = std::mem::take(recorded);
        let spans = operations.iter().flat_map(|it| it.reads().iter().chain(it.writes()));
        let shares: Vec<Share> = spans.filter_map(Span::share).cloned().collect();
        operations.iter_mut().for_each(Operation::take_off);
        let chain = Arc::new(Chain {
            kept: operations.iter().map(|_| Kept::new()).collect(),
            holds: shares.iter().map(Share::hold).collect(),
            operations: Mutex::new(operations),
            quarantined: AtomicBool::new(false),
        });
        Ok(Self { chain, _shares: shares, memory })
    }

    /// The device that the operations are for.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// The number of operations.
    pub fn len(&self) -> usize {
        self.chain.kept.len()
    }

    /// Whether there are none. Executing them is done at once then.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Submits the operations once more. See [`execute_async`](Self::execute_async).
    ///
    /// # Errors
    /// A tensor that is written is bound for reading on the host, or the device failed or is lost.
    /// Unless it is lost, the operations can be executed again.
    pub fn execute(&self) -> Result<Submission> {
        self.submit(Vec::new())
    }

    /// Submits the operations once more; `completion` is called once when this execution is done,
    /// as that of [`CommandBuffer::execute_async`](super::CommandBuffer::execute_async).
    ///
    /// # Errors
    /// As [`execute`](Self::execute); the completion has been called with that error.
    pub fn execute_async(
        &self,
        completion: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<Submission> {
        self.submit(vec![Box::new(completion)])
    }

    fn submit(&self, completions: Vec<Completion>) -> Result<Submission> {
        let commands = Commands::Again(Arc::clone(&self.chain));
        execute(Work { memory: self.memory.clone(), commands, completions })
    }
}

/// The operations of a frozen chain: the handle and each execution in flight have a part in them,
/// and the last one drops them.
#[derive(Debug)]
pub(crate) struct Chain {
    /// One for each operation. First, as the memory that it names must outlive it.
    kept: Vec<Kept>,
    /// Locked while they are being enqueued.
    operations: Mutex<Vec<Operation>>,
    /// The parts in their memory once more, for who must not wait for that lock.
    holds: Vec<Hold>,
    /// Whether the device may go on executing them for ever.
    quarantined: AtomicBool,
}

impl Chain {
    pub(super) fn with<R>(&self, enqueue: impl FnOnce(Parts<'_>) -> R) -> R {
        let mut operations = self.operations.lock();
        enqueue(Parts { operations: &mut operations, slots: &[], kept: &self.kept })
    }

    /// Gives up the memory, and what the backend kept: the device may still be using it.
    pub(super) fn quarantine(&self) {
        self.quarantined.store(true, Ordering::Release);
        self.holds.iter().for_each(|hold| hold.storage().quarantine());
    }
}

impl Drop for Chain {
    fn drop(&mut self) {
        if self.quarantined.load(Ordering::Acquire) {
            self.kept.drain(..).for_each(std::mem::forget);
        }
    }
}
