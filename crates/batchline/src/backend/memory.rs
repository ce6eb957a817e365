//! The two kinds of memory that a backend hands out.
#![allow(unsafe_code, reason = "implementors promise that an address is valid")]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;

/// Which way a piece of page-locked memory is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Written by the host, read by the device.
    Upload,
    /// Written by the device, read by the host.
    Download,
}

/// Page-locked memory that host and device take turns in.
///
/// Dropping it frees it. It is dropped only when no segment in flight names it.
///
/// # Safety
/// While no segment that names the memory is in flight, [`ptr`](Self::ptr) must be valid for reads
/// and writes of [`len`](Self::len) initialised bytes, aligned to 256, and touched by nobody but
/// the caller. It may change from one flight to the next.
pub unsafe trait StagingMemory: Any + Send + Sync + fmt::Debug {
    /// The first byte.
    fn ptr(&self) -> NonNull<u8>;
    /// The number of bytes.
    fn len(&self) -> usize;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Memory of the device.
///
/// Dropping it frees it. It is dropped only when the device is done with it, where that can be
/// known.
///
/// # Safety
/// Where [`host_ptr`](Self::host_ptr) is `Some`, it must be valid for reads and writes of
/// [`len`](Self::len) initialised bytes for the whole life of the value, aligned to 256, and
/// touched by nobody but the caller and the segments in flight that name this memory.
pub unsafe trait DeviceMemory: Any + Send + Sync + fmt::Debug {
    /// The number of bytes.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    /// The first byte, on a [unified](super::DeviceInfo::unified) device.
    fn host_ptr(&self) -> Option<NonNull<u8>> {
        None
    }
}
