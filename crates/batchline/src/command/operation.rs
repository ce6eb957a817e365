//! One recorded operation, with all the memory that it touches.

use super::gather::Gather;
use super::readback::Arrival;
use crate::Error;
use crate::backend::{Command, CommandKind, ConvertSpec, Custom, Region};
use crate::memory::{DeviceBlock, Hold, Share, StagingLease, Tensor};
use crate::staging::StagingBuffer;

/// An operation that was validated when it was recorded. It owns what it touches.
#[derive(Debug)]
#[allow(clippy::large_enum_variant, reason = "a box would be an allocation per batch")]
pub(crate) enum Operation {
    Upload { src: StagingBuffer, src_offset: u64, dst: Span },
    Download { src: Span, dst: StagingLease, arrive: Arrival },
    Copy { src: Span, dst: Span },
    Fill { dst: Span, element: [u8; 8], size: usize },
    Convert { src: Span, dst: Span, spec: ConvertSpec },
    Gather(Gather),
    Custom { work: Option<Custom>, reads: Vec<Span>, writes: Vec<Span> },
}

/// Bytes of a tensor.
#[derive(Debug)]
pub(crate) struct Span {
    hold: Hold,
    /// The user's share in it, while the operation is only recorded: a batch that it names counts
    /// as held until the operation is in flight.
    share: Option<Share>,
    /// First byte in the storage.
    pub(crate) offset: u64,
    pub(crate) len: u64,
}

impl Span {
    pub(crate) fn of(tensor: &Tensor) -> Self {
        Self::part(tensor, 0, tensor.byte_len())
    }

    /// `len` bytes from byte `offset` of a tensor on.
    pub(crate) fn part(tensor: &Tensor, offset: u64, len: u64) -> Self {
        let (hold, share) = (tensor.share().hold(), Some(tensor.share().clone()));
        Self { hold, share, offset: tensor.offset() + offset, len }
    }

    pub(crate) fn block(&self) -> &DeviceBlock {
        self.hold.storage().block()
    }

    pub(super) fn region(&self) -> Region<'_> {
        let memory = self.block().memory();
        Region { memory, offset: self.offset, len: self.len }
    }

    /// The user's share, until [`take_off`](Self::take_off).
    pub(super) fn share(&self) -> Option<&Share> {
        self.share.as_ref()
    }

    /// Notes that a submission owns it from now on.
    pub(super) fn take_off(&mut self) {
        self.share = None;
    }

    pub(crate) fn overlaps(&self, other: &Span) -> bool {
        self.hold.is_beside(&other.hold)
            && self.offset < other.offset + other.len
            && other.offset < self.offset + self.len
    }
}

impl Operation {
    pub(crate) fn kind(&self) -> CommandKind {
        match self {
            Operation::Upload { .. } => CommandKind::Upload,
            Operation::Download { .. } => CommandKind::Download,
            Operation::Copy { .. } => CommandKind::Copy,
            Operation::Fill { .. } => CommandKind::Fill,
            Operation::Convert { .. } => CommandKind::Convert,
            Operation::Gather(gather) => gather.kind(),
            Operation::Custom { .. } => CommandKind::Custom,
        }
    }

    /// What the device reads.
    pub(crate) fn reads(&self) -> &[Span] {
        match self {
            Operation::Download { src, .. }
            | Operation::Copy { src, .. }
            | Operation::Convert { src, .. } => std::slice::from_ref(src),
            Operation::Gather(gather) => gather.reads(),
            Operation::Custom { reads, .. } => reads,
            Operation::Upload { .. } | Operation::Fill { .. } => &[],
        }
    }

    /// What the device writes.
    pub(crate) fn writes(&self) -> &[Span] {
        match self {
            Operation::Upload { dst, .. }
            | Operation::Copy { dst, .. }
            | Operation::Fill { dst, .. }
            | Operation::Convert { dst, .. } => std::slice::from_ref(dst),
            Operation::Gather(gather) => gather.writes(),
            Operation::Custom { writes, .. } => writes,
            Operation::Download { .. } => &[],
        }
    }

    /// The command for the backend. `slots` are those that the command buffer keeps for all its
    /// operations.
    pub(crate) fn command<'c>(&'c mut self, slots: &'c [StagingBuffer]) -> Command<'c> {
        match self {
            Operation::Upload { src, src_offset, dst } => {
                Command::Upload { src: src.memory(), src_offset: *src_offset, dst: dst.region() }
            }
            Operation::Download { src, dst, .. } => {
                let dst = dst.memory();
                Command::Download { src: src.region(), dst, dst_offset: 0 }
            }
            Operation::Copy { src, dst } => Command::Copy { src: src.region(), dst: dst.region() },
            Operation::Fill { dst, element, size } => {
                Command::Fill { dst: dst.region(), element: &element[..*size] }
            }
            Operation::Convert { src, dst, spec } => {
                Command::Convert { src: src.region(), dst: dst.region(), spec }
            }
            Operation::Gather(gather) => Command::Gather(gather.spec(slots)),
            Operation::Custom { work, reads, writes } => Command::Custom {
                work,
                reads: reads.iter().map(Span::region).collect(),
                writes: writes.iter().map(Span::region).collect(),
            },
        }
    }

    /// Notes that a submission owns the operation from now on.
    pub(crate) fn take_off(&mut self) {
        match self {
            Operation::Upload { src, dst, .. } => {
                src.take_off();
                dst.take_off();
            }
            Operation::Fill { dst, .. } => dst.take_off(),
            Operation::Download { src, .. } => src.take_off(),
            Operation::Copy { src, dst } | Operation::Convert { src, dst, .. } => {
                src.take_off();
                dst.take_off();
            }
            Operation::Gather(gather) => gather.take_off(),
            Operation::Custom { reads, writes, .. } => {
                reads.iter_mut().chain(writes).for_each(Span::take_off);
            }
        }
    }

    /// Gives up all memory that the operation owns: the device may still be using it.
    pub(crate) fn quarantine(self, error: &Error) {
        for span in self.reads().iter().chain(self.writes()) {
            span.hold.storage().quarantine();
        }
        match self {
            Operation::Upload { src, .. } => src.quarantine(),
            Operation::Gather(gather) => gather.quarantine(),
            Operation::Download { dst, arrive, .. } => {
                dst.quarantine();
                arrive.arrive(Err(error.clone()));
            }
            _ => {}
        }
    }
}
