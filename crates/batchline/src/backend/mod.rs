//! The contract between batchline and a device.
//!
//! A backend allocates memory, runs commands on streams, and says when they are done. All the rest
//! (pools, limits, lifetimes, hazards between streams, errors that end a pipeline) is above it and
//! the same for every device, so a backend can be small and can be wrong in few ways. The public
//! conformance suite (`testing::conformance`, feature `testing`) checks an implementation.
//!
//! # Streams and fences
//!
//! A stream runs its segments one after another; two streams run independently. Each segment that
//! is submitted gets the next number of its stream, and a [`Fence`] names that number: it has
//! *passed* when the stream has finished this segment and all before it. A segment may name fences
//! of other streams that it must come after; the device waits for them, the host does not.
//!
//! # Who keeps memory alive
//!
//! The caller does, from before [`Backend::submit`] until the segment's fence has passed. Where a
//! call fails such that this can't be known, [`SubmitError::enqueued`] says so, and the caller
//! leaks the memory rather than reuse it (*quarantine*).
#![allow(unsafe_code, reason = "implementors promise that memory is used as commanded")]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

pub use gather::{
    GatherBy, GatherPart, GatherSpec, Gathers, MAX_PARTS, RegisteredMemory, RowSource,
};
pub use memory::{DeviceMemory, Direction, StagingMemory};

use crate::{BoxError, DType, Error, Result};

#[cfg(feature = "cuda")]
pub(crate) mod cuda;
mod gather;
pub(crate) mod host;
mod memory;
#[cfg(feature = "wgpu")]
pub(crate) mod wgpu;

/// What a device is driven by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum DeviceKind {
    /// Ordinary memory and the CPU.
    Host,
    /// Metal, Vulkan or DX12 through wgpu.
    Wgpu,
    /// An NVIDIA GPU, through the CUDA driver.
    Cuda,
    /// An implementation of [`Backend`] from outside this crate, or a test device.
    Other,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            DeviceKind::Host => "host",
            DeviceKind::Wgpu => "wgpu",
            DeviceKind::Cuda => "cuda",
            DeviceKind::Other => "other",
        })
    }
}

/// What a device is and what it demands.
#[derive(Debug, Clone, serde::Serialize)]
pub struct DeviceInfo {
    /// What drives it.
    pub kind: DeviceKind,
    /// Its name, for people: `wgpu: NVIDIA H100 (Vulkan)`.
    pub name: String,
    /// The driver and its version, where known.
    pub driver: String,
    /// Whether this is real hardware: false for the host and for software rasterisers.
    pub hardware: bool,
    /// Largest single allocation in bytes.
    pub max_allocation: u64,
    /// Offsets and lengths of copies and fills are multiples of this many bytes, a power of two and
    /// at most 256. A length may be odd where it ends with its tensor.
    pub copy_alignment: u64,
    /// Whether device memory is ordinary memory of the host, so that a filled slot can be a batch
    /// without a copy. Every [`DeviceMemory::host_ptr`] is `Some` then.
    pub unified: bool,
}

/// A stream of the device, numbered by the backend from 0.
pub type StreamId = u8;

/// The most streams that a backend may use.
pub const MAX_STREAMS: usize = 32;

/// A point on a stream: the end of the segment with this number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fence {
    /// The stream.
    pub stream: StreamId,
    /// The segment's number on it, counted from 1. Number 0 has always passed.
    pub value: u64,
}

/// A piece of device memory. In bounds, and aligned as the device demands: the recorder saw to it.
#[derive(Debug, Clone, Copy)]
pub struct Region<'a> {
    /// The memory.
    pub memory: &'a dyn DeviceMemory,
    /// First byte.
    pub offset: u64,
    /// Bytes. Where this is odd ([`DeviceInfo::copy_alignment`]), the memory goes on at least to
    /// the next multiple, and what lies there may be overwritten.
    pub len: u64,
}

/// What [`Command`]s are told apart by when a stream is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CommandKind {
    /// Host to device.
    Upload,
    /// Device to host.
    Download,
    /// Device to device.
    Copy,
    /// A pattern into device memory.
    Fill,
    /// Between element types and layouts.
    Convert,
    /// Rows, by [`GatherBy::Kernel`].
    Gather,
    /// Rows, by [`GatherBy::Copies`].
    GatherCopies,
    /// The user's own work.
    Custom,
}

/// One command of a segment, validated.
#[derive(Debug)]
#[non_exhaustive]
#[allow(clippy::large_enum_variant, reason = "a box would be an allocation per batch")]
pub enum Command<'a> {
    /// `dst` becomes what lies at `src[src_offset..][..dst.len]`.
    Upload {
        /// Page-locked memory allocated for [`Direction::Upload`].
        src: &'a dyn StagingMemory,
        /// First byte in it.
        src_offset: u64,
        /// Where to.
        dst: Region<'a>,
    },
    /// `dst[dst_offset..][..src.len]` becomes what lies in `src`.
    Download {
        /// Where from.
        src: Region<'a>,
        /// Page-locked memory allocated for [`Direction::Download`].
        dst: &'a dyn StagingMemory,
        /// First byte in it.
        dst_offset: u64,
    },
    /// `dst` becomes what lies in `src`; the lengths are equal and the two don't overlap.
    Copy {
        /// Where from.
        src: Region<'a>,
        /// Where to.
        dst: Region<'a>,
    },
    /// `dst` becomes repetitions of an element. `dst.len` is a multiple of the element's size.
    Fill {
        /// Where to.
        dst: Region<'a>,
        /// The element, 1, 2, 4 or 8 bytes.
        element: &'a [u8],
    },
    /// `dst` becomes `src`, converted.
    Convert {
        /// Where from: `spec.elements` dense elements of `spec.from`.
        src: Region<'a>,
        /// Where to: as many of `spec.to`.
        dst: Region<'a>,
        /// What to make of them.
        spec: &'a ConvertSpec,
    },
    /// The targets become rows of the sources. Only where [`Backend::gathers`] says so.
    Gather(GatherSpec<'a>),
    /// The user's own work. It is taken out of the option when it is enqueued, and must then be
    /// called once; a panic of it is an error of the segment.
    Custom {
        /// The work.
        work: &'a mut Option<Custom>,
        /// What it reads, as declared.
        reads: Vec<Region<'a>>,
        /// What it writes, as declared.
        writes: Vec<Region<'a>>,
    },
}

impl Command<'_> {
    /// Which kind of command this is.
    pub fn kind(&self) -> CommandKind {
        match self {
            Command::Upload { .. } => CommandKind::Upload,
            Command::Download { .. } => CommandKind::Download,
            Command::Copy { .. } => CommandKind::Copy,
            Command::Fill { .. } => CommandKind::Fill,
            Command::Convert { .. } => CommandKind::Convert,
            Command::Gather(GatherSpec { by: GatherBy::Kernel, .. }) => CommandKind::Gather,
            Command::Gather(GatherSpec { by: GatherBy::Copies, .. }) => CommandKind::GatherCopies,
            Command::Custom { .. } => CommandKind::Custom,
        }
    }
}

/// An elementwise conversion, optionally with an affine map per channel and a change between
/// channels-last and channels-first. What it computes is defined by the host's kernel
/// (`backend/host/convert.rs`), bit for bit:
///
/// * without `scale` and `bias`: the value of each element, rounded to nearest, ties to even;
///   saturated where the target is an integer (NaN becomes 0); to `bool`, 1 unless the value is 0;
/// * with them: the element is rounded to `f32`, then `round(round(x · scale) + bias)` in `f32`
///   with subnormal inputs and results taken as zero (some GPUs flush them), and the sum rounded
///   to the target as above.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvertSpec {
    /// The source's element type.
    pub from: DType,
    /// The target's element type.
    pub to: DType,
    /// Elements to convert.
    pub elements: u64,
    /// Channels: `scale` and `bias` have this many entries, or none.
    pub channels: u64,
    /// Pixels of one image (height · width) where the layouts matter, else 1.
    pub pixels: u64,
    /// Where the source has its channels.
    pub source_order: ChannelOrder,
    /// Where the target has its channels.
    pub target_order: ChannelOrder,
    /// Factor per channel.
    pub scale: Arc<[f32]>,
    /// Summand per channel, added after the factor.
    pub bias: Arc<[f32]>,
}

/// Where the channels of an image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ChannelOrder {
    /// `[.., height, width, channels]`.
    Nhwc,
    /// `[.., channels, height, width]`.
    Nchw,
}

impl ConvertSpec {
    /// Whether `scale` and `bias` are applied.
    pub fn is_affine(&self) -> bool {
        !self.scale.is_empty()
    }

    /// The channel of the source's element `index`.
    pub fn channel_of(&self, index: u64) -> u64 {
        match self.source_order {
            ChannelOrder::Nhwc => index % self.channels,
            ChannelOrder::Nchw => index / self.pixels % self.channels,
        }
    }

    /// The source's element that the target's element `index` is made of.
    pub fn source_index(&self, index: u64) -> u64 {
        if self.source_order == self.target_order {
            return index;
        }
        let image = self.pixels * self.channels;
        let (base, within) = (index / image * image, index % image);
        base + match self.target_order {
            ChannelOrder::Nchw => within % self.pixels * self.channels + within / self.pixels,
            ChannelOrder::Nhwc => within % self.channels * self.pixels + within / self.channels,
        }
    }
}

/// The user's own work, as the device at hand takes it.
#[non_exhaustive]
pub enum Custom {
    /// For the host device: called with the declared tensors' bytes.
    Host(HostWork),
    /// For a wgpu device: called with the encoder that the segment is recorded with.
    #[cfg(feature = "wgpu")]
    Wgpu(WgpuWork),
    /// For a CUDA device: called with the stream that the segment runs on.
    #[cfg(feature = "cuda")]
    Cuda(CudaWork),
}

/// Work for the host device.
pub type HostWork = Box<dyn FnOnce(HostCustom<'_>) -> Result<(), BoxError> + Send>;

/// Work for a wgpu device.
#[cfg(feature = "wgpu")]
pub type WgpuWork = Box<dyn FnOnce(crate::WgpuCustom<'_>) -> Result<(), BoxError> + Send>;

/// Work for a CUDA device.
#[cfg(feature = "cuda")]
pub type CudaWork = Box<dyn FnOnce(crate::CudaCustom) -> Result<(), BoxError> + Send>;

impl fmt::Debug for Custom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Custom::Host(_) => "Custom::Host(..)",
            #[cfg(feature = "wgpu")]
            Custom::Wgpu(_) => "Custom::Wgpu(..)",
            #[cfg(feature = "cuda")]
            Custom::Cuda(_) => "Custom::Cuda(..)",
        })
    }
}

/// What a custom operation on the host may touch: the tensors that it declared, in that order.
#[derive(Debug)]
pub struct HostCustom<'a> {
    /// Bytes of the tensors to read.
    pub reads: Vec<&'a [u8]>,
    /// Bytes of the tensors to write.
    pub writes: Vec<&'a mut [u8]>,
}

/// Commands for one stream, in order.
pub struct Segment<'s, 'm> {
    /// The stream and the number that this segment gets on it.
    pub fence: Fence,
    /// Fences of other streams which must have passed, on the device, before the first command
    /// starts.
    pub after: &'s [Fence],
    /// The commands.
    pub commands: &'s mut dyn Iterator<Item = Command<'m>>,
    /// For commands that come again, those of [`FrozenCommands`](crate::FrozenCommands): a place
    /// where the backend may keep what it makes of them. It is theirs alone, and empty the first
    /// time.
    pub kept: Option<&'s Kept>,
}

/// What a backend keeps of commands that come again: a graph of its driver, say. Each time the
/// commands are the very same ones, on the same memory.
///
/// It is dropped when no segment that came with it is in flight any more, and leaked where that
/// can't be known.
pub type Kept = OnceLock<Box<dyn Any + Send + Sync>>;

impl fmt::Debug for Segment<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Segment")
            .field("fence", &self.fence)
            .field("after", &self.after)
            .finish_non_exhaustive()
    }
}

/// Why a segment was not submitted.
#[derive(Debug)]
pub struct SubmitError {
    /// The error.
    pub error: Error,
    /// Whether some of the commands may have reached the device. The memory is quarantined and the
    /// device counts as lost then; else everything goes back to where it came from, and the
    /// segment's number is used again.
    pub enqueued: bool,
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.error.fmt(f)
    }
}

impl std::error::Error for SubmitError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.error.source()
    }
}

impl From<Error> for SubmitError {
    /// An error before anything reached the device.
    fn from(error: Error) -> Self {
        Self { error, enqueued: false }
    }
}

/// A device. See the [module](self) for streams, fences, and who keeps memory alive.
///
/// Calls come from any thread. [`submit`](Self::submit) calls are made one at a time.
///
/// # Safety
/// Safe code above relies on an implementation for memory safety: memory it hands out must be as
/// long as was asked; commands must touch nothing but the memory that they name, and that only
/// between [`submit`](Self::submit) and the passing of the fence; [`wait`](Self::wait) must not
/// say that a fence has passed before it has.
pub unsafe trait Backend: Any + fmt::Debug + Send + Sync {
    /// What the device is.
    fn info(&self) -> &DeviceInfo;

    /// Memory of the device, at least `bytes` long (never 0, at most
    /// [`DeviceInfo::max_allocation`]), with any content.
    ///
    /// # Errors
    /// The device has no such memory, or is lost.
    fn allocate(&self, bytes: u64) -> Result<Box<dyn DeviceMemory>>;

    /// Page-locked memory, at least `bytes` long, initialised.
    ///
    /// # Errors
    /// The system has no such memory, or the device is lost.
    fn allocate_staging(&self, bytes: u64, direction: Direction) -> Result<Box<dyn StagingMemory>>;

    /// What the device can gather by itself.
    fn gathers(&self) -> Gathers {
        Gathers::default()
    }

    /// Has the device read this memory of the host by itself from now on. It need not be aligned,
    /// nor writable; the same memory may be registered several times.
    ///
    /// # Errors
    /// The device can't, or not this memory; it is as before then. Or it is lost.
    ///
    /// # Safety
    /// The memory is initialised, and stays where it is and unchanged until the value is dropped.
    unsafe fn register(&self, memory: NonNull<[u8]>) -> Result<Box<dyn RegisteredMemory>> {
        let _ = memory;
        Err(Error::record("a registration", "this device does not read the host's memory"))
    }

    /// The stream that commands of this kind run on, below [`MAX_STREAMS`].
    fn stream_of(&self, kind: CommandKind) -> StreamId;

    /// The stream on which a consumer works who did not name a queue of his own. It may be one of
    /// those that commands run on.
    fn consumer_stream(&self) -> StreamId;

    /// Enqueues a segment, without waiting for it.
    ///
    /// # Errors
    /// See [`SubmitError`].
    fn submit(&self, segment: Segment<'_, '_>) -> Result<(), SubmitError>;

    /// Waits until the fence has passed; false when it had not within `timeout`. With a zero
    /// timeout it asks and does not wait, and may be called by any thread; else it is called by
    /// one thread at a time, except on a [unified](DeviceInfo::unified) device. A fence that was
    /// never submitted must not be named.
    ///
    /// When this returns true for a segment that uploaded from staging memory, that memory is the
    /// host's again.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], at once and ever after, also to a thread that waits already.
    fn wait(&self, fence: Fence, timeout: Duration) -> Result<bool>;

    /// Makes all later work on the consumer's stream come after the fences, on the device. Where
    /// the consumer is the host itself, this waits.
    ///
    /// # Errors
    /// The device is lost.
    fn consumer_after(&self, stream: StreamId, fences: &[Fence]) -> Result<()>;

    /// Where the consumer's stream is now: a fence that passes once all work enqueued on it so far
    /// is done. Where the consumer is the host itself, one that has passed already.
    ///
    /// # Errors
    /// The device is lost; the memory that the consumer used is quarantined.
    fn consumer_position(&self, stream: StreamId) -> Result<Fence>;

    /// Called when a slot becomes free, with its bytes. A device for tests overwrites them here, so
    /// that work which still reads them is found out.
    fn slot_freed(&self, _bytes: &mut [u8]) {}
}
