//! Runs commands on memory that the host can touch: at once for the host's backend, later for the
//! device that tests inject faults into.
#![allow(unsafe_code, reason = "commands name memory by address")]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;

use super::convert::convert;
use super::registered::HostRegistered;
use crate::backend::{
    Command, ConvertSpec, Custom, GatherSpec, HostCustom, Region, RowSource, StagingMemory,
};
use crate::{Error, Result};

/// A command by addresses: what a device would be given.
#[derive(Debug)]
pub(crate) enum Job {
    Copy { src: Bytes, dst: Bytes },
    Fill { dst: Bytes, element: Vec<u8> },
    Convert { src: Bytes, dst: Bytes, spec: ConvertSpec },
    Gather { indices: Bytes, parts: Vec<Rows> },
    Custom { work: Custom, reads: Vec<Bytes>, writes: Vec<Bytes> },
}

/// Rows that become those of a target, by their numbers.
#[derive(Debug)]
pub(crate) struct Rows {
    source: Bytes,
    row_bytes: usize,
    dst: Bytes,
    convert: Option<ConvertSpec>,
}

/// Bytes of memory that somebody keeps alive until the segment's fence has passed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Bytes {
    start: *mut u8,
    len: usize,
}

// SAFETY: an address and a length; `Job::run` says who may use them when.
unsafe impl Send for Bytes {}
// SAFETY: as above.
unsafe impl Sync for Bytes {}

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
            Command::Gather(spec) => Self::gather(&spec)?,
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

    fn gather(spec: &GatherSpec<'_>) -> Result<Self> {
        let overflow = || Error::Overflow { what: "a gather".to_owned() };
        let bytes = spec.rows.checked_mul(8).ok_or_else(overflow)?;
        let indices = staging(spec.indices, spec.indices_offset, bytes)?;
        let part = |part: &crate::backend::GatherPart<'_>| {
            let source = match part.source {
                RowSource::Device(region) => device(region)?,
                RowSource::Host(memory) => HostRegistered::bytes_of(memory)
                    .ok_or_else(|| Error::record("a gather", "of another device's memory"))?,
            };
            let row_bytes = usize::try_from(part.row_bytes).map_err(|_| overflow())?;
            let (dst, convert) = (device(part.dst)?, part.convert.cloned());
            Ok(Rows { source, row_bytes, dst, convert })
        };
        Ok(Job::Gather { indices, parts: spec.parts.iter().map(part).collect::<Result<_>>()? })
    }

    /// Whether it reads this memory of the host by itself.
    #[cfg(feature = "testing")]
    pub(crate) fn gathers_from(&self, memory: Bytes) -> bool {
        match self {
            Job::Gather { parts, .. } => parts.iter().any(|part| part.source == memory),
            _ => false,
        }
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
            Job::Gather { indices, parts } => {
                // SAFETY: promised by the caller.
                let indices = unsafe { indices.read() };
                for rows in parts {
                    // SAFETY: promised by the caller.
                    let source = unsafe { rows.source.read() };
                    // SAFETY: as above; a target is none of the sources.
                    let dst = unsafe { rows.dst.write() };
                    fetch(indices, source, rows.row_bytes, dst, rows.convert.as_ref());
                }
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

/// Fetches the rows of these numbers, and converts them on the way. This defines what a gather does.
pub(crate) fn fetch(
    indices: &[u8],
    source: &[u8],
    row_bytes: usize,
    dst: &mut [u8],
    spec: Option<&ConvertSpec>,
) {
    let (numbers, _) = indices.as_chunks::<8>();
    let rows = numbers.iter().map(|number| {
        let row = usize::try_from(u64::from_ne_bytes(*number)).unwrap_or(usize::MAX);
        &source[row.saturating_mul(row_bytes)..][..row_bytes]
    });
    let Some(spec) = spec else {
        if row_bytes > 0 {
            dst.chunks_exact_mut(row_bytes).zip(rows).for_each(|(to, row)| to.copy_from_slice(row));
        }
        return;
    };
    // Aligned for any type of element.
    let mut gathered = vec![0u64; (numbers.len() * row_bytes).div_ceil(8)];
    let gathered: &mut [u8] = bytemuck::cast_slice_mut(&mut gathered);
    let gathered = &mut gathered[..numbers.len() * row_bytes];
    for (to, row) in gathered.chunks_exact_mut(row_bytes.max(1)).zip(rows) {
        to.copy_from_slice(row);
    }
    convert(gathered, dst, spec);
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
    #[cfg_attr(not(feature = "testing"), allow(dead_code, reason = "for the device of the tests"))]
    pub(crate) fn new(memory: NonNull<[u8]>) -> Self {
        Self { start: memory.as_ptr().cast(), len: memory.len() }
    }

    pub(crate) fn len(self) -> usize {
        self.len
    }

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
