//! Turns a segment into calls of the driver.
#![allow(unsafe_code, reason = "calls the driver with addresses of memory that segments name")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::CudaBackend;
use super::context::{Context, Entered};
use super::driver::{self, Address};
use super::gather::gather;
use super::graph;
use super::kernels::Launch;
use super::memory::{CudaMemory, CudaStaging};
use super::queue::{CudaBinding, CudaCustom, CudaStream};
use crate::backend::{Command, ConvertSpec, Custom, Region, Segment, StagingMemory, SubmitError};
use crate::{Error, Result};

pub(super) fn submit(backend: &CudaBackend, segment: Segment<'_, '_>) -> Result<(), SubmitError> {
    let Segment { fence, after, commands, kept } = segment;
    let entered = backend.context.enter()?;
    let lane = backend.lanes.get(fence.stream);
    for other in after {
        backend.lanes.get(other.stream).hold_back(&entered, lane, other.value)?;
    }
    let mut encoder = Encoder { backend, entered: &entered, stream: lane.stream(), issued: false };
    let draft =
        graph::enqueue(&mut encoder, commands, kept).map_err(|error| encoder.undone(error))?;
    lane.mark_as(&entered, fence.value).map_err(|error| encoder.undone(error))?;
    if let Some(draft) = draft {
        draft.capture(&encoder);
    }
    Ok(())
}

pub(super) struct Encoder<'e> {
    pub(super) backend: &'e CudaBackend,
    pub(super) entered: &'e Entered<'e>,
    pub(super) stream: driver::Stream,
    /// Whether something of the segment was given to the driver.
    pub(super) issued: bool,
}

impl Encoder<'_> {
    pub(super) fn context(&self) -> &Arc<Context> {
        &self.backend.context
    }

    /// The same, for another stream.
    pub(super) fn on(&self, stream: driver::Stream) -> Self {
        Self { backend: self.backend, entered: self.entered, stream, issued: false }
    }

    /// Ends a segment that failed: where the stream can be waited for, nothing of it is left on the
    /// device.
    fn undone(&self, error: Error) -> SubmitError {
        if !self.issued {
            return error.into();
        }
        // SAFETY: the stream exists.
        let code = unsafe { (self.entered.driver().cuStreamSynchronize)(self.stream) };
        let enqueued = self.entered.call("undoing a submission", code).is_err();
        SubmitError { error, enqueued }
    }

    pub(super) fn all(&mut self, commands: &mut dyn Iterator<Item = Command<'_>>) -> Result<()> {
        for command in commands {
            self.command(command)?;
        }
        Ok(())
    }

    pub(super) fn command(&mut self, command: Command<'_>) -> Result<()> {
        let (driver, stream) = (self.entered.driver(), self.stream);
        match command {
            Command::Upload { src, src_offset, dst } => {
                let mut target = self.device(dst)?;
                let (staging, start, len) = self.staging(src, src_offset, dst.len)?;
                for part in staging.copies(start..start + len) {
                    // SAFETY: within the staging memory, whose bounds were checked.
                    let source = unsafe { staging.ptr().add(part.start) };
                    self.issued = true;
                    // SAFETY: both are kept until the fence has passed.
                    let code = unsafe {
                        let source = source.as_ptr().cast();
                        (driver.cuMemcpyHtoDAsync_v2)(target, source, part.len(), stream)
                    };
                    self.entered.call("copying to the device", code)?;
                    target += part.len() as u64;
                }
                Ok(())
            }
            Command::Download { src, dst, dst_offset } => {
                let mut source = self.device(src)?;
                let (staging, start, len) = self.staging(dst, dst_offset, src.len)?;
                for part in staging.copies(start..start + len) {
                    // SAFETY: within the staging memory, whose bounds were checked.
                    let target = unsafe { staging.ptr().add(part.start) };
                    self.issued = true;
                    // SAFETY: both are kept until the fence has passed.
                    let code = unsafe {
                        let target = target.as_ptr().cast();
                        (driver.cuMemcpyDtoHAsync_v2)(target, source, part.len(), stream)
                    };
                    self.entered.call("copying from the device", code)?;
                    source += part.len() as u64;
                }
                Ok(())
            }
            Command::Copy { src, dst } => {
                let (source, target, len) = (self.device(src)?, self.device(dst)?, length(dst)?);
                self.issued = true;
                // SAFETY: both are kept until the fence has passed, and they don't overlap.
                let code = unsafe { (driver.cuMemcpyDtoDAsync_v2)(target, source, len, stream) };
                self.entered.call("copying within the device", code)
            }
            Command::Fill { dst, element } => self.fill(dst, element),
            Command::Convert { src, dst, spec } => {
                let launch = self.launch(spec)?;
                self.convert(&launch, src, dst)
            }
            Command::Gather(spec) => gather(self, &spec),
            Command::Custom { work, reads, writes } => {
                let binding = |region: &Region<'_>| {
                    Ok(CudaBinding { address: self.device(*region)?, bytes: region.len })
                };
                let reads = reads.iter().map(binding).collect::<Result<Vec<_>>>()?;
                let writes = writes.iter().map(binding).collect::<Result<Vec<_>>>()?;
                let Some(Custom::Cuda(work)) = work.take() else {
                    return Err(Error::record("custom", "this device takes Custom::Cuda"));
                };
                self.issued = true;
                let tensors = CudaCustom { stream: CudaStream::of_device(stream), reads, writes };
                match catch_unwind(AssertUnwindSafe(|| work(tensors))) {
                    Ok(Ok(())) => Ok(()),
                    Ok(Err(source)) => {
                        Err(Error::User { who: "a custom operation", source: source.into() })
                    }
                    Err(panic) => Err(Error::panicked("a custom operation", &*panic)),
                }
            }
        }
    }

    /// Gets a conversion ready; what it needs on the device may be copied there.
    pub(super) fn launch(&mut self, spec: &ConvertSpec) -> Result<Launch> {
        self.issued = true;
        self.backend.kernels.convert(self.entered, self.stream, spec)
    }

    pub(super) fn convert(
        &mut self,
        launch: &Launch,
        src: Region<'_>,
        dst: Region<'_>,
    ) -> Result<()> {
        let (source, target) = (self.device(src)?, self.device(dst)?);
        self.issued = true;
        launch.run(self.entered, self.stream, source, target)
    }

    fn fill(&mut self, dst: Region<'_>, element: &[u8]) -> Result<()> {
        let (driver, stream, target) = (self.entered.driver(), self.stream, self.device(dst)?);
        let count = length(dst)? / element.len();
        self.issued = true;
        // In each case the memory is kept until the fence has passed, and `count` elements are
        // within it.
        let code = match *element {
            // SAFETY: as said.
            [a] => unsafe { (driver.cuMemsetD8Async)(target, a, count, stream) },
            [a, b] => {
                let value = u16::from_ne_bytes([a, b]);
                // SAFETY: as said.
                unsafe { (driver.cuMemsetD16Async)(target, value, count, stream) }
            }
            [a, b, c, d] => {
                let value = u32::from_ne_bytes([a, b, c, d]);
                // SAFETY: as said.
                unsafe { (driver.cuMemsetD32Async)(target, value, count, stream) }
            }
            [a, b, c, d, e, f, g, h] => {
                let value = u64::from_ne_bytes([a, b, c, d, e, f, g, h]);
                let kernels = &self.backend.kernels;
                return kernels.fill(self.entered, stream, target, count as u64, value);
            }
            _ => return Err(Error::record("a fill", "elements have 1, 2, 4 or 8 bytes")),
        };
        self.entered.call("filling", code)
    }

    pub(super) fn device(&self, region: Region<'_>) -> Result<Address> {
        let memory = CudaMemory::of(region.memory).filter(|memory| memory.is_of(self.context()));
        let memory = memory.ok_or_else(foreign)?;
        within(region.offset, region.len, region.memory.len())?;
        Ok(memory.address + region.offset)
    }

    pub(super) fn staging<'m>(
        &self,
        memory: &'m dyn StagingMemory,
        offset: u64,
        len: u64,
    ) -> Result<(&'m CudaStaging, usize, usize)> {
        let staging = CudaStaging::of(memory).filter(|memory| memory.is_of(self.context()));
        let staging = staging.ok_or_else(foreign)?;
        within(offset, len, memory.len() as u64)?;
        #[allow(clippy::cast_possible_truncation, reason = "within memory that exists")]
        Ok((staging, offset as usize, len as usize))
    }
}

pub(super) fn within(offset: u64, len: u64, size: u64) -> Result<()> {
    if offset.checked_add(len).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(Error::record("a command", format!("{len} bytes at {offset} go past {size} bytes")))
}

fn length(region: Region<'_>) -> Result<usize> {
    usize::try_from(region.len).map_err(|_| Error::Overflow { what: "a command".to_owned() })
}

pub(super) fn foreign() -> Error {
    Error::record("a command", "its memory belongs to another device")
}
