//! Rows that the device fetches by itself, told only which.

use std::sync::Arc;

use smallvec::SmallVec;

use super::operation::Span;
use crate::backend::{
    CommandKind, ConvertSpec, GatherBy, GatherPart, GatherSpec, MAX_PARTS, RowSource,
};
use crate::memory::{Registered, Tensor};
use crate::staging::StagingBuffer;

/// The numbers of rows, in a slot that the command buffer keeps.
#[derive(Debug)]
pub(crate) struct Indices {
    pub(super) slot: usize,
    pub(super) rows: u64,
}

/// Where the rows of a tensor lie.
#[derive(Debug)]
pub(crate) enum Source {
    /// In the host's memory.
    Registered(Arc<Registered>),
    /// In a tensor of the device.
    Resident(Tensor),
}

/// The tensors of one gather, in order.
#[derive(Debug, Default)]
pub(crate) struct GatherParts {
    parts: SmallVec<[Part; MAX_PARTS]>,
    /// Tensors of the device that are read.
    reads: SmallVec<[Span; MAX_PARTS]>,
    /// What is written, one for each part.
    writes: SmallVec<[Span; MAX_PARTS]>,
}

/// One tensor.
#[derive(Debug)]
struct Part {
    place: Place,
    row_bytes: u64,
    convert: Option<ConvertSpec>,
}

/// Where a part's rows lie.
#[derive(Debug)]
enum Place {
    Host(Arc<Registered>),
    /// In one of `reads`.
    Device(usize),
}

impl GatherParts {
    /// Adds a tensor: rows of `row_bytes` bytes become those of `dst`, converted if the device does
    /// that on the way.
    pub(crate) fn push(
        &mut self,
        source: &Source,
        row_bytes: u64,
        dst: &Tensor,
        convert: Option<ConvertSpec>,
    ) {
        if dst.byte_len() == 0 {
            return;
        }
        let place = match source {
            Source::Registered(memory) => Place::Host(Arc::clone(memory)),
            Source::Resident(tensor) => {
                self.reads.push(Span::of(tensor));
                Place::Device(self.reads.len() - 1)
            }
        };
        self.parts.push(Part { place, row_bytes, convert });
        self.writes.push(Span::of(dst));
    }

    pub(crate) fn len(&self) -> usize {
        self.parts.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A gather, recorded.
#[derive(Debug)]
pub(crate) struct Gather {
    by: GatherBy,
    slot: usize,
    rows: u64,
    parts: GatherParts,
}

impl Gather {
    pub(super) fn new(indices: &Indices, by: GatherBy, parts: GatherParts) -> Self {
        Self { by, slot: indices.slot, rows: indices.rows, parts }
    }

    pub(super) fn kind(&self) -> CommandKind {
        match self.by {
            GatherBy::Kernel => CommandKind::Gather,
            GatherBy::Copies => CommandKind::GatherCopies,
        }
    }

    pub(super) fn reads(&self) -> &[Span] {
        &self.parts.reads
    }

    pub(super) fn writes(&self) -> &[Span] {
        &self.parts.writes
    }

    pub(super) fn spec<'c>(&'c self, slots: &'c [StagingBuffer]) -> GatherSpec<'c> {
        let GatherParts { parts, reads, writes } = &self.parts;
        let part = |(part, dst): (&'c Part, &'c Span)| GatherPart {
            source: match &part.place {
                Place::Host(memory) => RowSource::Host(memory.memory()),
                Place::Device(read) => RowSource::Device(reads[*read].region()),
            },
            row_bytes: part.row_bytes,
            dst: dst.region(),
            convert: part.convert.as_ref(),
        };
        GatherSpec {
            by: self.by,
            indices: slots[self.slot].memory(),
            indices_offset: 0,
            rows: self.rows,
            parts: parts.iter().zip(writes).map(part).collect(),
        }
    }

    pub(super) fn take_off(&mut self) {
        self.parts.reads.iter_mut().chain(&mut self.parts.writes).for_each(Span::take_off);
    }

    /// Gives up the host's memory that it reads.
    pub(super) fn quarantine(self) {
        for part in self.parts.parts {
            if let Place::Host(memory) = part.place {
                memory.quarantine();
            }
        }
    }
}
