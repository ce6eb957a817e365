//! A command buffer: operations that are checked when they are recorded and submitted as one.

use std::ops::Range;

use super::convert::Conversion;
use super::execute::execute;
use super::frozen::FrozenCommands;
use super::gather::{Gather, GatherParts, Indices};
use super::operation::{Operation, Span};
use super::readback::{Arrival, Readback};
use super::submission::{Commands, Completion, Submission, Work};
use crate::backend::{Custom, DeviceKind, Direction, GatherBy};
use crate::memory::{Loan, MemoryManager, Patience, Pool, Tensor};
use crate::staging::StagingBuffer;
use crate::{Device, Element, Error, Result};

/// What a [`CommandBufferPool`](super::CommandBufferPool) lends: the list that operations are
/// recorded in. Native command buffers can be committed only once (on Metal and in wgpu), so the
/// recorder is what is pooled; it keeps its memory from use to use.
#[derive(Debug, Default)]
pub(crate) struct Recorder {
    operations: Vec<Operation>,
    /// Staging buffers that several operations use.
    slots: Vec<StagingBuffer>,
}

/// A recorder on loan, and what is recorded in it. Dropping it drops the operations, then returns
/// the empty recorder.
#[derive(Debug)]
pub(crate) struct Recording(Loan<Recorder>);

impl Recording {
    pub(crate) fn new(recorder: Loan<Recorder>) -> Self {
        Self(recorder)
    }

    pub(crate) fn operations(&mut self) -> &mut Vec<Operation> {
        &mut self.0.operations
    }

    /// The operations, and the slots that they name.
    pub(crate) fn parts(&mut self) -> (&mut [Operation], &[StagingBuffer]) {
        let Recorder { operations, slots } = &mut *self.0;
        (operations, slots)
    }

    /// Gives the slots up: the device may go on reading them.
    pub(crate) fn quarantine_slots(&mut self) {
        self.0.slots.drain(..).for_each(StagingBuffer::quarantine);
    }

    /// Notes that a submission owns the recorder and the operations from now on.
    pub(crate) fn take_off(&mut self) {
        self.0.take_off();
        self.0.operations.iter_mut().for_each(Operation::take_off);
        self.0.slots.iter_mut().for_each(StagingBuffer::take_off);
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        self.0.operations.clear();
        self.0.slots.clear();
    }
}

/// A list of operations for one device. It owns all that it touches until the device is done.
///
/// Recording checks everything at once: bounds, overlap, alignment, element types, device. A
/// buffer is executed by value, so it can't be submitted twice, nor changed in flight; what is to
/// be executed again and again is [frozen](Self::freeze).
///
/// ```compile_fail,E0382
/// # use batchline::{CommandBufferPool, Device, MemoryManager};
/// # let memory = MemoryManager::new(&Device::host());
/// # let commands = CommandBufferPool::new(&memory, 1)?.get_buffer()?;
/// commands.execute()?.wait()?;
/// commands.execute()?.wait()?; // the buffer was given away above
/// # Ok::<(), batchline::Error>(())
/// ```
///
/// ```compile_fail,E0382
/// # use batchline::{CommandBufferPool, Device, MemoryManager};
/// # let memory = MemoryManager::new(&Device::host());
/// # let tensor = memory.upload(&[1.0f32], &[1])?;
/// # let mut commands = CommandBufferPool::new(&memory, 1)?.get_buffer()?;
/// let submission = commands.execute()?;
/// commands.fill(&tensor, 0.0f32)?; // in flight
/// # Ok::<(), batchline::Error>(())
/// ```
///
/// Dropping a buffer that was not executed undoes what was recorded; so does
/// [`return_buffer`](Self::return_buffer), which needs no pool, so that a foreign one can't be
/// named:
///
/// ```compile_fail,E0061
/// # use batchline::{CommandBufferPool, Device, MemoryManager};
/// # let memory = MemoryManager::new(&Device::host());
/// # let (pool, other) = (CommandBufferPool::new(&memory, 1)?, CommandBufferPool::new(&memory, 1)?);
/// let commands = pool.get_buffer()?;
/// commands.return_buffer(&other);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "nothing that is recorded is done until it is executed"]
pub struct CommandBuffer {
    recording: Recording,
    memory: MemoryManager,
}

impl CommandBuffer {
    pub(crate) fn new(recorder: Loan<Recorder>, memory: MemoryManager) -> Self {
        Self { recording: Recording::new(recorder), memory }
    }

    /// A buffer of no pool, for one use.
    pub(crate) fn single(memory: &MemoryManager) -> Result<Self> {
        let pool = Pool::new("command buffer", 1);
        let recorder = pool.acquire(Patience::None, || Ok(Recorder::default()))?;
        Ok(Self::new(recorder, memory.clone()))
    }

    /// The device that the buffer is for.
    pub fn device(&self) -> &Device {
        self.memory.device()
    }

    /// The number of operations recorded.
    pub fn len(&self) -> usize {
        self.recording.0.operations.len()
    }

    /// Whether nothing is recorded.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Host to device: the first bytes of `src` become the whole of `dst`.
    ///
    /// # Errors
    /// [`Error::Record`]: `src` is shorter than `dst`, or `dst` is on another device. The staging
    /// buffer goes back to its pool.
    pub fn upload(&mut self, src: StagingBuffer, dst: &Tensor) -> Result<()> {
        let bytes = 0..dst.byte_len();
        self.upload_range(src, bytes, dst, 0)
    }

    /// Host to device: the bytes `range` of `src` become those from `dst_offset` on of `dst`.
    ///
    /// # Errors
    /// As [`upload`](Self::upload); or out of bounds; or not aligned to
    /// [`copy_alignment`](crate::backend::DeviceInfo::copy_alignment).
    pub fn upload_range(
        &mut self,
        src: StagingBuffer,
        range: Range<u64>,
        dst: &Tensor,
        dst_offset: u64,
    ) -> Result<()> {
        const WHAT: &str = "an upload";
        if src.device() != self.device() {
            return Err(Error::record(WHAT, "the staging buffer belongs to another device"));
        }
        let len = range.end.saturating_sub(range.start);
        check_bounds(WHAT, "staging buffer", range.start, len, src.capacity() as u64)?;
        let dst_span = self.span(WHAT, dst, dst_offset, len)?;
        self.check_alignment(WHAT, "source offset", range.start)?;
        let (src_offset, dst) = (range.start, dst_span);
        self.record(Operation::Upload { src, src_offset, dst })
    }

    /// Device to host. The bytes arrive in the [`Readback`] when the buffer is done.
    ///
    /// # Errors
    /// The tensor is on another device, or page-locked memory for it is not to be had.
    pub fn download(&mut self, src: &Tensor) -> Result<Readback> {
        self.download_range(src, 0..src.byte_len())
    }

    /// Device to host, the bytes `range` of a tensor.
    ///
    /// # Errors
    /// As [`download`](Self::download); or out of bounds or not aligned.
    pub fn download_range(&mut self, src: &Tensor, range: Range<u64>) -> Result<Readback> {
        let len = range.end.saturating_sub(range.start);
        let span = self.span("a download", src, range.start, len)?;
        let dst = self.memory.staging(len, Direction::Download, Patience::None)?;
        let arrive = Arrival::default();
        let readback = Readback::new(arrive.clone(), src.dtype(), len);
        self.record(Operation::Download { src: span, dst, arrive })?;
        Ok(readback)
    }

    /// Device to device: `dst` becomes a copy of `src`, of the same type and number of elements.
    ///
    /// # Errors
    /// [`Error::Record`]: another device, type or size; or the two overlap.
    pub fn copy(&mut self, src: &Tensor, dst: &Tensor) -> Result<()> {
        if src.dtype() != dst.dtype() || src.byte_len() != dst.byte_len() {
            let problem = format!(
                "{} {} cannot become {} {}: types and sizes must be equal (convert changes types)",
                src.dtype(),
                src.shape(),
                dst.dtype(),
                dst.shape()
            );
            return Err(Error::record("a copy", problem));
        }
        self.copy_range(src, 0..src.byte_len(), dst, 0)
    }

    /// Device to device: the bytes `range` of `src` become those from `dst_offset` on of `dst`.
    ///
    /// # Errors
    /// [`Error::Record`]: another device, out of bounds, not aligned, or the two overlap.
    pub fn copy_range(
        &mut self,
        src: &Tensor,
        range: Range<u64>,
        dst: &Tensor,
        dst_offset: u64,
    ) -> Result<()> {
        const WHAT: &str = "a copy";
        let len = range.end.saturating_sub(range.start);
        check_bounds(WHAT, "source", range.start, len, src.byte_len())?;
        self.check_alignment(WHAT, "source offset", range.start)?;
        self.check_device(WHAT, src)?;
        let dst = self.span(WHAT, dst, dst_offset, len)?;
        let from = Span::part(src, range.start, len);
        check_apart(WHAT, &from, &dst)?;
        self.record(Operation::Copy { src: from, dst })
    }

    /// Every element of `dst` becomes `value`.
    ///
    /// # Errors
    /// [`Error::Record`]: another device; [`Error::DType`]: `T` is not the tensor's type.
    pub fn fill<T: Element>(&mut self, dst: &Tensor, value: T) -> Result<()> {
        dst.expect::<T>()?;
        let span = self.span("a fill", dst, 0, dst.byte_len())?;
        let mut element = [0; 8];
        element[..size_of::<T>()].copy_from_slice(bytemuck::bytes_of(&value));
        self.record(Operation::Fill { dst: span, element, size: size_of::<T>() })
    }

    /// `dst` becomes `src`, converted to the type of `dst`.
    ///
    /// # Errors
    /// [`Error::Record`]: another device or number of elements; the conversion does not fit the
    /// shape; the two overlap.
    pub fn convert(&mut self, src: &Tensor, dst: &Tensor, conversion: &Conversion) -> Result<()> {
        const WHAT: &str = "a conversion";
        let spec = conversion.spec(src, dst)?;
        self.check_device(WHAT, src)?;
        let from = Span::of(src);
        let to = self.span(WHAT, dst, 0, dst.byte_len())?;
        check_apart(WHAT, &from, &to)?;
        self.record(Operation::Convert { src: from, dst: to, spec })
    }

    /// Keeps a slot with the numbers of `rows` rows, for [`gather`](Self::gather).
    pub(crate) fn keep_indices(&mut self, slot: StagingBuffer, rows: u64) -> Indices {
        let slots = &mut self.recording.0.slots;
        slots.push(slot);
        Indices { slot: slots.len() - 1, rows }
    }

    /// The targets become rows of the sources. The caller has seen to it that the device can do that,
    /// that the numbers are below those of the sources' rows, and that all is of this device.
    pub(crate) fn gather(&mut self, indices: &Indices, by: GatherBy, parts: GatherParts) {
        if indices.rows > 0 && !parts.is_empty() {
            let gather = Gather::new(indices, by, parts);
            self.recording.operations().push(Operation::Gather(gather));
        }
    }

    /// The user's own work, in order with the rest. It must not touch tensors that it does not
    /// declare.
    ///
    /// # Errors
    /// [`Error::Record`]: a tensor on another device, one that is written beside being read or
    /// written twice, or work for another kind of device.
    pub fn custom(&mut self, work: Custom, reads: &[&Tensor], writes: &[&Tensor]) -> Result<()> {
        const WHAT: &str = "a custom operation";
        let wanted = match work {
            Custom::Host(_) => self.device().info().unified,
            #[cfg(feature = "wgpu")]
            Custom::Wgpu(_) => self.device().kind() == DeviceKind::Wgpu,
            #[cfg(feature = "cuda")]
            Custom::Cuda(_) => self.device().kind() == DeviceKind::Cuda,
        };
        // The device of the tests runs host work as well, but is no unified memory.
        if !wanted && self.device().kind() != DeviceKind::Other {
            let problem = format!("{work:?} is not for {}", self.device().info().name);
            return Err(Error::record(WHAT, problem));
        }
        for tensor in reads.iter().chain(writes) {
            self.check_device(WHAT, tensor)?;
        }
        let reads: Vec<Span> = reads.iter().map(|tensor| Span::of(tensor)).collect();
        let writes: Vec<Span> = writes.iter().map(|tensor| Span::of(tensor)).collect();
        for (place, write) in writes.iter().enumerate() {
            for other in reads.iter().chain(&writes[..place]) {
                check_apart(WHAT, other, write)?;
            }
        }
        self.record(Operation::Custom { work: Some(work), reads, writes })
    }

    /// Submits everything that was recorded. See [`execute_async`](Self::execute_async).
    ///
    /// # Errors
    /// The device is lost.
    pub fn execute(self) -> Result<Submission> {
        self.submit(Vec::new())
    }

    /// Submits everything that was recorded; `completion` is called once when all of it is done,
    /// with the error if there was one. It runs on the device's reaper thread: it must be short,
    /// and can't wait for other work. A panic of it is the submission's error.
    ///
    /// # Errors
    /// The device is lost, or refused the work; the completion gets that error too.
    pub fn execute_async(
        self,
        completion: impl FnOnce(Result<()>) + Send + 'static,
    ) -> Result<Submission> {
        self.submit(vec![Box::new(completion)])
    }

    pub(crate) fn submit(self, completions: Vec<Completion>) -> Result<Submission> {
        let commands = Commands::Once(self.recording);
        execute(Work { memory: self.memory, commands, completions })
    }

    /// Makes what was recorded a chain that can be executed again and again. The buffer goes back
    /// to its pool.
    ///
    /// # Errors
    /// [`Error::Record`]: there is more than copies, fills and conversions. Whatever else there is
    /// uses up what it was given: a staging buffer, a readback, a closure.
    pub fn freeze(mut self) -> Result<FrozenCommands> {
        FrozenCommands::new(self.recording.operations(), self.memory)
    }

    /// Gives the buffer back unused. Dropping it does the same.
    pub fn return_buffer(self) {
        drop(self);
    }

    fn record(&mut self, operation: Operation) -> Result<()> {
        // A device has no business with nothing; a readback of nothing has arrived.
        let nothing = |spans: &[Span]| spans.iter().all(|span| span.len == 0);
        match operation {
            Operation::Download { ref src, .. } if src.len == 0 => operation.finish(&Ok(())),
            Operation::Custom { .. } | Operation::Download { .. } => {
                self.recording.operations().push(operation);
            }
            _ if nothing(operation.writes()) => {}
            _ => self.recording.operations().push(operation),
        }
        Ok(())
    }

    /// The span `offset..offset + len` of a tensor that is about to be copied to or from.
    fn span(&self, what: &'static str, tensor: &Tensor, offset: u64, len: u64) -> Result<Span> {
        self.check_device(what, tensor)?;
        check_bounds(what, "tensor", offset, len, tensor.byte_len())?;
        self.check_alignment(what, "offset", offset)?;
        if offset + len != tensor.byte_len() {
            self.check_alignment(what, "length, unless it ends with the tensor,", len)?;
        }
        Ok(Span::part(tensor, offset, len))
    }

    fn check_device(&self, what: &'static str, tensor: &Tensor) -> Result<()> {
        if tensor.device() == self.device() {
            return Ok(());
        }
        let problem = format!(
            "the tensor is on {:?}, the command buffer for {:?}",
            tensor.device(),
            self.device()
        );
        Err(Error::record(what, problem))
    }

    fn check_alignment(&self, what: &'static str, name: &str, value: u64) -> Result<()> {
        let alignment = self.device().info().copy_alignment;
        if value.is_multiple_of(alignment) {
            return Ok(());
        }
        Err(Error::record(
            what,
            format!("the {name} must be a multiple of {alignment}, not {value}"),
        ))
    }
}

fn check_bounds(what: &'static str, name: &str, offset: u64, len: u64, size: u64) -> Result<()> {
    if offset.checked_add(len).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(Error::record(what, format!("{len} bytes at offset {offset} go past the {name}'s {size}")))
}

fn check_apart(what: &'static str, one: &Span, other: &Span) -> Result<()> {
    if one.overlaps(other) {
        return Err(Error::record(what, "what it reads and what it writes overlap"));
    }
    Ok(())
}
