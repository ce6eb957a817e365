//! The memory that workers fill: page-locked, or on a unified device the batch's own.
#![allow(unsafe_code, reason = "gives several workers disjoint windows of one slot")]

use std::ptr::NonNull;
use std::sync::Arc;

use crate::memory::{Loan, Storage};
use crate::source::{BatchLayout, Rows};
use crate::staging::StagingBuffer;

/// Memory for one batch, on loan while a ticket is on its way.
#[derive(Debug)]
pub(crate) enum Slot {
    /// Page-locked memory; the batch is copied from it to the device.
    Staging(StagingBuffer),
    /// Memory of a unified device, which is the batch itself or what it is converted from.
    Unified(Loan<Arc<Storage>>),
}

/// Memory that a ticket can be filled in.
pub(crate) trait Fillable {
    /// The first byte.
    fn base(&self) -> NonNull<u8>;
}

impl Fillable for Slot {
    fn base(&self) -> NonNull<u8> {
        match self {
            Slot::Staging(buffer) => buffer.base(),
            Slot::Unified(loan) => {
                let memory = loan.block().memory();
                memory.host_ptr().expect("a unified device's memory is the host's")
            }
        }
    }
}

impl Slot {
    /// All rows, for one writer.
    pub(crate) fn rows<'a>(&'a mut self, layout: &'a BatchLayout) -> Rows<'a> {
        // SAFETY: a slot is made with at least `layout.bytes`, aligned to 256 and initialised by
        // the backend's promise, and no other window exists: tickets give out none after the last
        // one came back, and `self` is borrowed exclusively.
        unsafe { Rows::new(self.base(), layout, 0, layout.rows) }
    }
}

/// Rows of a slot that one worker has claimed. The ticket keeps the slot until all its claims have
/// come back, so a claim is valid however long the worker takes.
#[derive(Debug)]
pub(crate) struct Claim {
    /// The ticket's number.
    pub(crate) ticket: u64,
    base: NonNull<u8>,
    layout: Arc<BatchLayout>,
    /// The rows: `first..end`.
    pub(crate) first: u64,
    pub(crate) end: u64,
}

// SAFETY: a claim is the exclusive right to plain bytes, which any thread may exercise.
unsafe impl Send for Claim {}

impl Claim {
    /// # Safety
    /// `slot` must stay where it is until the claim is handed back, and these rows must be claimed
    /// by nobody else.
    pub(super) unsafe fn new(
        ticket: u64,
        slot: &impl Fillable,
        layout: &Arc<BatchLayout>,
        first: u64,
        end: u64,
    ) -> Self {
        Self { ticket, base: slot.base(), layout: Arc::clone(layout), first, end }
    }

    /// The windows to write.
    pub(crate) fn rows(&mut self) -> Rows<'_> {
        // SAFETY: promised when the claim was made; `&mut self` keeps it to one window at a time.
        unsafe { Rows::new(self.base, &self.layout, self.first, self.end) }
    }
}
