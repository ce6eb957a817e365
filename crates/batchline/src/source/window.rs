//! Disjoint windows into the memory of one batch, so that several workers fill it at once.
#![allow(unsafe_code, reason = "turns one piece of memory into disjoint windows")]

use std::marker::PhantomData;
use std::ptr::NonNull;

use super::spec::{BatchLayout, Part};

/// The rows `first..end` of every tensor of a batch, for one writer.
#[derive(Debug)]
pub(crate) struct Rows<'a> {
    base: NonNull<u8>,
    parts: &'a [Part],
    first: u64,
    end: u64,
    /// Acts as the exclusive borrow of these rows that it is.
    _memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: it is an exclusive borrow of plain bytes, which may go to another thread.
unsafe impl Send for Rows<'_> {}

impl<'a> Rows<'a> {
    /// # Safety
    /// `base` must be valid for writes of `layout.bytes` initialised bytes, aligned to 256, for
    /// `'a`; and no other window of these rows may exist in that time.
    pub(crate) unsafe fn new(
        base: NonNull<u8>,
        layout: &'a BatchLayout,
        first: u64,
        end: u64,
    ) -> Self {
        assert!(first <= end && end <= layout.rows, "rows {first}..{end} of {}", layout.rows);
        Self { base, parts: &layout.parts, first, end, _memory: PhantomData }
    }

    /// All rows of a batch that lies in memory which the caller owns.
    pub(crate) fn of_slice(memory: &'a mut [u8], layout: &'a BatchLayout) -> Self {
        assert!(memory.len() as u64 >= layout.bytes, "memory too small for its layout");
        assert!(memory.as_ptr().addr().is_multiple_of(8), "memory not aligned for its elements");
        let base = NonNull::from(memory).cast();
        Self { base, parts: &layout.parts, first: 0, end: layout.rows, _memory: PhantomData }
    }

    pub(crate) fn first(&self) -> u64 {
        self.first
    }

    pub(crate) fn end(&self) -> u64 {
        self.end
    }

    pub(crate) fn tensors(&self) -> usize {
        self.parts.len()
    }

    /// Bytes of one row of `tensor`.
    pub(crate) fn row_bytes(&self, tensor: usize) -> usize {
        usize::try_from(self.parts[tensor].row_bytes).expect("within memory that exists")
    }

    /// The windows of one of these rows, counted from the batch's start.
    pub(crate) fn row(&mut self, row: u64) -> Rows<'_> {
        assert!(self.first <= row && row < self.end, "row {row} is not this window's");
        Rows { first: row, end: row + 1, _memory: PhantomData, ..*self }
    }

    /// The window of `tensor` over all these rows.
    pub(crate) fn all(&mut self, tensor: usize) -> &mut [u8] {
        self.span(tensor, self.first, self.end)
    }

    /// The windows of two different tensors, at once.
    pub(crate) fn pair(&mut self, one: usize, two: usize) -> (&mut [u8], &mut [u8]) {
        assert_ne!(one, two, "the same tensor twice");
        let one: *mut [u8] = self.all(one);
        let two = self.all(two);
        // SAFETY: different tensors of a layout don't overlap, and both borrows end with `self`'s.
        (unsafe { &mut *one }, two)
    }

    fn span(&mut self, tensor: usize, first: u64, end: u64) -> &mut [u8] {
        let part = self.parts[tensor];
        #[allow(clippy::cast_possible_truncation, reason = "within memory that exists")]
        let (start, len) = (
            (part.offset + first * part.row_bytes) as usize,
            ((end - first) * part.row_bytes) as usize,
        );
        // SAFETY: `first..end` are rows of the layout, whose bytes `base` is valid for.
        let start = unsafe { self.base.add(start) };
        // SAFETY: in bounds as above; exclusive by the constructors' promise and `&mut self`.
        unsafe { std::slice::from_raw_parts_mut(start.as_ptr(), len) }
    }
}
