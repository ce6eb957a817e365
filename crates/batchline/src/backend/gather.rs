//! Rows that a device fetches by itself, told only which: out of the host's memory (*gathered*) or
//! out of its own (*resident*).
#![allow(unsafe_code, reason = "implementors promise that memory is used as commanded")]

use std::any::Any;
use std::fmt;

use smallvec::SmallVec;

use super::{ConvertSpec, Region, StagingMemory};
use crate::DType;

/// What a device can gather. By default: nothing.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Gathers {
    /// Whether it reads rows out of the host's memory, once that is
    /// [registered](super::Backend::register).
    pub from_host: bool,
    /// The largest tensor of its own memory that it gathers rows from, in bytes; 0 for none.
    pub from_device: u64,
    /// Rows of the host of at least so many bytes come faster by copies than by a kernel; `None`
    /// where it has no copies for that.
    pub copies_from: Option<u64>,
    /// The pairs of element types between which its kernel converts on the way.
    pub fused: &'static [(DType, DType)],
}

impl Gathers {
    /// Whether the kernel converts between these on the way.
    pub fn fuses(&self, from: DType, to: DType) -> bool {
        self.fused.contains(&(from, to))
    }
}

/// What fetches the rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum GatherBy {
    /// The device's copy engine: a copy for each row.
    Copies,
    /// A kernel that reads the rows.
    Kernel,
}

/// Memory of the host that a device reads by itself. Dropping it ends that; the memory stays its
/// owner's.
///
/// It is dropped only when no segment in flight names it, where that can be known.
///
/// # Safety
/// [`len`](Self::len) bytes must be readable by the device as long as the value lives.
pub unsafe trait RegisteredMemory: Any + Send + Sync + fmt::Debug {
    /// The number of bytes.
    fn len(&self) -> u64;
    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The rows of some tensors: row `i` of each target becomes row `indices[i]` of its source.
#[derive(Debug)]
pub struct GatherSpec<'a> {
    /// What fetches them.
    pub by: GatherBy,
    /// Page-locked memory with the numbers of the rows, a `u64` each in the machine's byte order.
    /// They are below the number of rows of every source.
    pub indices: &'a dyn StagingMemory,
    /// Where in it the numbers begin, a multiple of 256.
    pub indices_offset: u64,
    /// How many there are.
    pub rows: u64,
    /// The tensors; at most [`MAX_PARTS`].
    pub parts: SmallVec<[GatherPart<'a>; MAX_PARTS]>,
}

/// The most tensors of one command.
pub const MAX_PARTS: usize = 4;

/// One tensor of a gather.
#[derive(Debug)]
pub struct GatherPart<'a> {
    /// All rows, one behind the other.
    pub source: RowSource<'a>,
    /// Bytes of a row of the source.
    pub row_bytes: u64,
    /// Where the rows go, one behind the other.
    pub dst: Region<'a>,
    /// What becomes of them on the way, where the device [fuses](Gathers::fused) that and a kernel
    /// fetches them: a conversion of all rows together. Only the first part has one.
    pub convert: Option<&'a ConvertSpec>,
}

/// Where rows lie.
#[derive(Debug, Clone, Copy)]
pub enum RowSource<'a> {
    /// In registered memory of the host, from its first byte on.
    Host(&'a dyn RegisteredMemory),
    /// In memory of the device.
    Device(Region<'a>),
}

impl RowSource<'_> {
    /// Bytes of all rows.
    pub fn len(&self) -> u64 {
        match self {
            RowSource::Host(memory) => memory.len(),
            RowSource::Device(region) => region.len,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
