//! Runs commands on memory that the host can touch.
#![allow(unsafe_code, reason = "commands name memory by address")]

use std::panic::{AssertUnwindSafe, catch_unwind};

use super::convert::convert;
use crate::backend::{Command, Custom, HostCustom, Region, StagingMemory};
use crate::{Error, Result};

/// Runs one command to its end.
///
/// All memory must be the host's. Called by the host's backend at once, and by the fault-injecting
/// device when the time of the segment has come.
pub(crate) fn execute(command: Command<'_>) -> Result<()> {
    match command {
        Command::Upload { src, src_offset, dst } => {
            copy(staging(src, src_offset, dst.len)?, device(dst)?, dst.len);
        }
        Command::Download { src, dst, dst_offset } => {
            copy(device(src)?, staging(dst, dst_offset, src.len)?, src.len);
        }
        Command::Copy { src, dst } => copy(device(src)?, device(dst)?, dst.len),
        Command::Fill { dst, element } => {
            for piece in bytes_mut(dst)?.chunks_exact_mut(element.len()) {
                piece.copy_from_slice(element);
            }
        }
        Command::Convert { src, dst, spec } => convert(bytes(src)?, bytes_mut(dst)?, spec),
        Command::Custom { work, reads, writes } => {
            let Some(Custom::Host(work)) = work.take() else {
                return Err(Error::record("custom", "this device takes Custom::Host"));
            };
            let reads = reads.into_iter().map(bytes).collect::<Result<_>>()?;
            let writes = writes.into_iter().map(bytes_mut).collect::<Result<_>>()?;
            let run = AssertUnwindSafe(|| work(HostCustom { reads, writes }));
            match catch_unwind(run) {
                Ok(Ok(())) => {}
                Ok(Err(source)) => {
                    return Err(Error::User { who: "a custom operation", source: source.into() });
                }
                Err(panic) => return Err(Error::panicked("a custom operation", &*panic)),
            }
        }
    }
    Ok(())
}

fn device(region: Region<'_>) -> Result<*mut u8> {
    let base = region.memory.host_ptr().ok_or_else(foreign)?;
    check(region.offset, region.len, region.memory.len())?;
    // SAFETY: just checked to be within the memory.
    Ok(unsafe { base.add(position(region.offset)) }.as_ptr())
}

fn staging(memory: &dyn StagingMemory, offset: u64, len: u64) -> Result<*mut u8> {
    check(offset, len, memory.len() as u64)?;
    // SAFETY: just checked to be within the memory.
    Ok(unsafe { memory.ptr().add(position(offset)) }.as_ptr())
}

fn copy(src: *const u8, dst: *mut u8, len: u64) {
    // SAFETY: both are valid for `len` bytes, as `device` and `staging` checked or were promised;
    // the recorder refuses regions that overlap; the submitter keeps others from writing `src` or
    // touching `dst` until the fence has passed.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, position(len)) }
}

fn bytes<'a>(region: Region<'a>) -> Result<&'a [u8]> {
    let start = device(region)?;
    // SAFETY: initialised memory that lives for 'a; nobody writes it until the fence has passed.
    Ok(unsafe { std::slice::from_raw_parts(start, position(region.len)) })
}

fn bytes_mut<'a>(region: Region<'a>) -> Result<&'a mut [u8]> {
    let start = device(region)?;
    // SAFETY: initialised memory that lives for 'a, written by this command alone: what it reads
    // doesn't overlap what it writes, as the recorder checked.
    Ok(unsafe { std::slice::from_raw_parts_mut(start, position(region.len)) })
}

fn check(offset: u64, len: u64, size: u64) -> Result<()> {
    if offset.checked_add(len).is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(Error::record("a command", format!("{len} bytes at {offset} go past {size} bytes")))
}

#[allow(clippy::cast_possible_truncation, reason = "within memory that exists")]
fn position(bytes: u64) -> usize {
    bytes as usize
}

fn foreign() -> Error {
    Error::record("a command", "its memory belongs to another device")
}
