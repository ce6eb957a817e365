//! Runs commands on memory that the host can touch: at once for the host's backend, later for the
//! device that tests inject faults into.
#![allow(unsafe_code, reason = "commands name memory by address")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::convert::convert;
use crate::backend::{Command, ConvertSpec, Custom, HostCustom, Region, StagingMemory};
use crate::{Error, Result};

/// A command by addresses: what a device would be given.
#[derive(Debug)]
pub(crate) enum Job {
    Copy { src: Bytes, dst: Bytes },
    Fill { dst: Bytes, element: Vec<u8> },
    Convert { src: Bytes, dst: Bytes, spec: ConvertSpec },
    Custom { work: Custom, reads: Vec<Bytes>, writes: Vec<Bytes> },
}

/// Bytes of memory that somebody keeps alive until the segment's fence has passed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bytes {
    start: *mut u8,
    len: usize,
}

// SAFETY: an address and a length; `Job::run` says who may use them when.
unsafe impl Send for Bytes {}

impl Job {
    /// Checks a command and takes down its addresses.
    pub(crate) fn new(command: Command<'_>) -> Result<Self> {
        Ok(match command {
            Command::Upload { src, src_offset, dst } => {
                Job::Copy { src: staging(src, src_offset, dst.len)?, dst: device(dst)? }
            }
            Command::Download { src, dst, dst_offset } => {
                Job::Copy { src: device(src)?, dst: staging(dst, dst_offset, src.len)? }
            }
            Command::Copy { src, dst } => Job::Copy { src: device(src)?, dst: device(dst)? },
            Command::Fill { dst, element } => {
                Job::Fill { dst: device(dst)?, element: element.to_vec() }
            }
            Command::Convert { src, dst, spec } => {
                Job::Convert { src: device(src)?, dst: device(dst)?, spec: spec.clone() }
            }
            Command::Custom { work, reads, writes } => {
                let reads = reads.into_iter().map(device).collect::<Result<_>>()?;
                let writes = writes.into_iter().map(device).collect::<Result<_>>()?;
                match work.take() {
                    Some(work @ Custom::Host(_)) => Job::Custom { work, reads, writes },
                    _ => return Err(Error::record("custom", "this device takes Custom::Host")),
                }
            }
        })
    }

    /// Runs the command to its end.
    ///
    /// # Safety
    /// The memory that the command named must still be there; nobody may write what it reads, nor
    /// touch what it writes, until this returns. The submitter promises that from the submission
    /// until the fence has passed.
    pub(crate) unsafe fn run(self) -> Result<()> {
        match self {
            Job::Copy { src, dst } => {
                // SAFETY: promised by the caller; the lengths are equal and the recorder refuses
                // regions that overlap.
                unsafe { std::ptr::copy_nonoverlapping(src.start, dst.start, dst.len) };
            }
            Job::Fill { dst, element } => {
                // SAFETY: promised by the caller.
                let dst = unsafe { dst.write() };
                dst.chunks_exact_mut(element.len())
                    .for_each(|piece| piece.copy_from_slice(&element));
            }
            Job::Convert { src, dst, spec } => {
                // SAFETY: promised by the caller.
                let src = unsafe { src.read() };
                // SAFETY: as above; the recorder refuses regions that overlap.
                let dst = unsafe { dst.write() };
                convert(src, dst, &spec);
            }
            Job::Custom { work, reads, writes } => {
                // SAFETY: promised by the caller.
                let reads = reads.into_iter().map(|bytes| unsafe { bytes.read() }).collect();
                // SAFETY: as above; the recorder refuses regions that overlap.
                let writes = writes.into_iter().map(|bytes| unsafe { bytes.write() }).collect();
                return call(work, HostCustom { reads, writes });
            }
        }
        Ok(())
    }
}

fn call(work: Custom, tensors: HostCustom<'_>) -> Result<()> {
    #[cfg_attr(not(feature = "wgpu"), allow(irrefutable_let_patterns, reason = "one variant"))]
    let Custom::Host(work) = work else { unreachable!("checked when the job was made") };
    match catch_unwind(AssertUnwindSafe(|| work(tensors))) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(Error::User { who: "a custom operation", source: source.into() }),
        Err(panic) => Err(Error::panicked("a custom operation", &*panic)),
    }
}

impl Bytes {
    /// # Safety
    /// As [`Job::run`].
    pub(crate) unsafe fn read<'a>(self) -> &'a [u8] {
        // SAFETY: promised by the caller; the memory is initialised by its own contract.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }

    /// # Safety
    /// As [`Job::run`].
    pub(crate) unsafe fn write<'a>(self) -> &'a mut [u8] {
        // SAFETY: promised by the caller; the memory is initialised by its own contract.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

pub(crate) fn device(region: Region<'_>) -> Result<Bytes> {
    let problem = "its memory belongs to another device";
    let base = region.memory.host_ptr().ok_or_else(|| Error::record("a command", problem))?;
    let (offset, len) = within(region.offset, region.len, region.memory.len())?;
    // SAFETY: just checked to be within the memory.
    let start = unsafe { base.add(offset) };
    Ok(Bytes { start: start.as_ptr(), len })
}

fn staging(memory: &dyn StagingMemory, offset: u64, len: u64) -> Result<Bytes> {
    let (offset, len) = within(offset, len, memory.len() as u64)?;
    // SAFETY: just checked to be within the memory.
    let start = unsafe { memory.ptr().add(offset) };
    Ok(Bytes { start: start.as_ptr(), len })
}

#[allow(clippy::cast_possible_truncation, reason = "within memory that exists")]
fn within(offset: u64, len: u64, size: u64) -> Result<(usize, usize)> {
    if offset.checked_add(len).is_some_and(|end| end <= size) {
        return Ok((offset as usize, len as usize));
    }
    Err(Error::record("a command", format!("{len} bytes at {offset} go past {size} bytes")))
}
