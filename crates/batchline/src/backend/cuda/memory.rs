//! Device memory, and page-locked memory of the host.
#![allow(unsafe_code, reason = "promises that page-locked memory is valid")]

use std::any::Any;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

use super::context::Context;
use super::driver::{Address, code};
use super::numa;
use super::registered::{MAPPED, PORTABLE, device_address};
use crate::backend::{DeviceMemory, StagingMemory};
use crate::{Error, Result};

/// Page-locked memory is registered in pieces of at most this size: drivers refuse large ones, and
/// hold locks of the whole system while they work on one.
const PIECE: usize = 256 << 20;

/// For every context, and for kernels. Also what `cuMemHostAlloc` calls so.
const FLAGS: u32 = PORTABLE | MAPPED;

/// A piece of device memory.
#[derive(Debug)]
pub(super) struct CudaMemory {
    pub(super) address: Address,
    bytes: u64,
    context: Arc<Context>,
}

impl CudaMemory {
    pub(super) fn new(context: &Arc<Context>, bytes: u64) -> Result<Self> {
        const WHAT: &str = "allocating device memory";
        let len = usize::try_from(bytes).map_err(|_| Error::Overflow { what: WHAT.to_owned() })?;
        let entered = context.enter()?;
        let mut address = 0;
        // SAFETY: `address` is a place for the answer.
        let code = unsafe { (entered.driver().cuMemAlloc_v2)(&raw mut address, len) };
        entered.call(WHAT, code)?;
        Ok(Self { address, bytes, context: Arc::clone(context) })
    }

    pub(super) fn of(memory: &dyn DeviceMemory) -> Option<&Self> {
        (memory as &dyn Any).downcast_ref()
    }

    pub(super) fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }
}

// SAFETY: `host_ptr` is `None`, so nothing is promised.
unsafe impl DeviceMemory for CudaMemory {
    fn len(&self) -> u64 {
        self.bytes
    }
}

impl Drop for CudaMemory {
    fn drop(&mut self) {
        // Memory of a lost device is left to the end of the process.
        if let Ok(entered) = self.context.enter() {
            // SAFETY: allocated by `new`; nothing in flight names it any more.
            unsafe { (entered.driver().cuMemFree_v2)(self.address) };
        }
    }
}

/// A piece of page-locked memory.
#[derive(Debug)]
pub(super) struct CudaStaging {
    base: NonNull<u8>,
    len: usize,
    /// What kernels know it by, where they can read it.
    pub(super) device: Option<Address>,
    origin: Origin,
    context: Arc<Context>,
}

/// Where page-locked memory comes from.
#[derive(Debug)]
enum Origin {
    /// The system's pages, registered with the driver in pieces. It is several times faster than
    /// having the driver allocate, and lets huge pages and the NUMA node be chosen.
    Registered(memmap2::MmapMut),
    /// The driver's, where it refuses to register.
    Driver,
}

// SAFETY: plain memory that is owned.
unsafe impl Send for CudaStaging {}
// SAFETY: `&self` gives addresses only.
unsafe impl Sync for CudaStaging {}

impl CudaStaging {
    pub(super) fn new(context: &Arc<Context>, bytes: u64) -> Result<Self> {
        const WHAT: &str = "allocating page-locked memory";
        let len = usize::try_from(bytes).map_err(|_| Error::Overflow { what: WHAT.to_owned() })?;
        if let Some(staging) = Self::register(context, len)? {
            return Ok(staging);
        }
        let entered = context.enter()?;
        let mut start: *mut c_void = std::ptr::null_mut();
        // SAFETY: `start` is a place for the answer.
        let code = unsafe { (entered.driver().cuMemHostAlloc)(&raw mut start, len, FLAGS) };
        entered.call(WHAT, code)?;
        let base = NonNull::new(start.cast::<u8>())
            .ok_or_else(|| context.lose("page-locked memory without an address".to_owned()))?;
        // SAFETY: allocated above, `len` bytes long.
        unsafe { base.write_bytes(0, len) };
        let at = base.addr().get();
        let device = device_address(&entered, &(at..at + len), &[at]).ok();
        Ok(Self { base, len, device, origin: Origin::Driver, context: Arc::clone(context) })
    }

    /// `None` where the driver does not register memory, as in confidential computing.
    fn register(context: &Arc<Context>, len: usize) -> Result<Option<Self>> {
        let Ok(mut pages) = memmap2::MmapMut::map_anon(len) else { return Ok(None) };
        #[cfg(target_os = "linux")]
        // Where it is refused, pages of the usual size do as well.
        let _ = pages.advise(memmap2::Advice::HugePage);
        if let Some(node) = context.numa_node {
            numa::prefer(node, &mut pages);
        }
        let base = NonNull::from(&mut pages[..]).cast::<u8>();
        let entered = context.enter()?;
        for piece in pieces(0..len) {
            let start = pages[piece.clone()].as_mut_ptr().cast();
            // SAFETY: the range is mapped, and stays so until it is unregistered.
            let code =
                unsafe { (entered.driver().cuMemHostRegister_v2)(start, piece.len(), FLAGS) };
            // Whatever the reason: a device that is lost says so in the next call too.
            if code != code::SUCCESS {
                unregister(context, base, piece.start);
                return Ok(None);
            }
        }
        let at = base.addr().get();
        let starts: Vec<usize> = pieces(0..len).map(|piece| at + piece.start).collect();
        let device = device_address(&entered, &(at..at + len), &starts).ok();
        drop(entered);
        let origin = Origin::Registered(pages);
        Ok(Some(Self { base, len, device, origin, context: Arc::clone(context) }))
    }

    pub(super) fn of(memory: &dyn StagingMemory) -> Option<&Self> {
        (memory as &dyn Any).downcast_ref()
    }

    pub(super) fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }

    /// Cuts a range at the bounds of what was registered: a copy must not cross them.
    pub(super) fn copies(&self, range: Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
        match self.origin {
            Origin::Registered(_) => Pieces { rest: range, piece: PIECE },
            Origin::Driver => Pieces { rest: range, piece: usize::MAX },
        }
    }
}

fn pieces(range: Range<usize>) -> Pieces {
    Pieces { rest: range, piece: PIECE }
}

/// A range cut at the multiples of a length.
#[derive(Debug)]
struct Pieces {
    rest: Range<usize>,
    piece: usize,
}

impl Iterator for Pieces {
    type Item = Range<usize>;

    fn next(&mut self) -> Option<Range<usize>> {
        let start = self.rest.start;
        if start >= self.rest.end {
            return None;
        }
        let bound = (start / self.piece).saturating_add(1).saturating_mul(self.piece);
        let end = bound.min(self.rest.end);
        self.rest.start = end;
        Some(start..end)
    }
}

/// Takes the first `len` bytes back from the driver.
fn unregister(context: &Context, base: NonNull<u8>, len: usize) {
    let Ok(entered) = context.enter() else { return };
    for piece in pieces(0..len) {
        // SAFETY: within the mapping.
        let start = unsafe { base.add(piece.start) };
        // SAFETY: registered with this start; nothing in flight names it any more.
        unsafe { (entered.driver().cuMemHostUnregister)(start.as_ptr().cast()) };
    }
}

// SAFETY: mapped or allocated for as long as the value lives, page-aligned, zeroed, and only the
// driver's copies touch it besides the caller.
unsafe impl StagingMemory for CudaStaging {
    fn ptr(&self) -> NonNull<u8> {
        self.base
    }

    fn len(&self) -> usize {
        self.len
    }
}

impl Drop for CudaStaging {
    fn drop(&mut self) {
        if self.context.check().is_err() {
            // The device may still read it, and a child of a fork must not call the driver.
            if let Origin::Registered(pages) = std::mem::replace(&mut self.origin, Origin::Driver) {
                std::mem::forget(pages);
            }
            return;
        }
        match &self.origin {
            Origin::Registered(_) => unregister(&self.context, self.base, self.len),
            Origin::Driver => {
                if let Ok(entered) = self.context.enter() {
                    // SAFETY: allocated by `new`; nothing in flight names it any more.
                    unsafe { (entered.driver().cuMemFreeHost)(self.base.as_ptr().cast()) };
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_stop_at_the_bounds_of_what_was_registered() {
        let cut = |range, piece| Pieces { rest: range, piece }.collect::<Vec<_>>();
        assert_eq!(cut(0..10, 4), [0..4, 4..8, 8..10]);
        assert_eq!(cut(3..5, 4), [3..4, 4..5]);
        assert_eq!(cut(4..8, 4), vec![4..8]);
        assert_eq!(cut(5..5, 4), Vec::<Range<usize>>::new());
        assert_eq!(cut(1..usize::MAX, usize::MAX), vec![1..usize::MAX]);
    }
}
