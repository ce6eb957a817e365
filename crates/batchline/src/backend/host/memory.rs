//! Ordinary memory of the process.
#![allow(unsafe_code, reason = "promises that its memory is valid")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::backend::{DeviceMemory, StagingMemory};
use crate::{Error, Result};

/// So much memory is had from the system in large pages.
const MUCH: usize = 8 << 20;

/// The alignment of all memory that is handed out.
const PAGE: usize = 4096;

/// Plain bytes, zeroed when they are first touched, by whichever worker that is.
#[derive(Debug)]
pub(crate) struct HostMemory {
    ptr: NonNull<u8>,
    len: usize,
    origin: Origin,
}

#[derive(Debug)]
enum Origin {
    /// Pages of the system. Large ones are found in a fraction of the time; for little memory,
    /// clearing a whole one takes longer.
    Mapped { _pages: MmapMut },
    /// The allocator's, which may have pages at hand. With the alignment that it gives by itself:
    /// for a larger one it would clear them at once, and by hand.
    Allocated { base: NonNull<u8>, layout: Layout },
}

impl HostMemory {
    pub(crate) fn new(device: &str, bytes: u64) -> Result<Self> {
        let out_of_memory = |source: std::io::Error| Error::Device {
            device: device.to_owned(),
            operation: "allocating host memory",
            source: Arc::new(source),
        };
        let none = || out_of_memory(std::io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(bytes.max(1)).map_err(|_| none())?;
        if len >= MUCH {
            let mut pages = MmapMut::map_anon(len).map_err(out_of_memory)?;
            // Where the system has no large pages, the usual ones do.
            #[cfg(target_os = "linux")]
            let _ = pages.advise(memmap2::Advice::HugePage);
            let ptr = NonNull::from(&mut pages[..]).cast();
            return Ok(Self { ptr, len, origin: Origin::Mapped { _pages: pages } });
        }
        let layout = Layout::from_size_align(len + PAGE, 16).map_err(|_| none())?;
        // SAFETY: the layout's size is at least a page.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(none)?;
        let skip = base.as_ptr().align_offset(PAGE);
        // SAFETY: less than a page, by which the allocation is longer than asked for.
        let ptr = unsafe { base.add(skip) };
        Ok(Self { ptr, len, origin: Origin::Allocated { base, layout } })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        if let Origin::Allocated { base, layout } = self.origin {
            // SAFETY: allocated in `new` with this very layout, and freed only here.
            unsafe { dealloc(base.as_ptr(), layout) }
        }
    }
}

// SAFETY: it owns plain bytes; who reads and writes them is the business of the traits' contracts.
unsafe impl Send for HostMemory {}
// SAFETY: as above; `&HostMemory` gives out nothing but the address.
unsafe impl Sync for HostMemory {}

// SAFETY: the bytes are initialised, `len` of them, aligned to a page, and never move.
unsafe impl StagingMemory for HostMemory {
    fn ptr(&self) -> NonNull<u8> {
        self.ptr
    }

    fn len(&self) -> usize {
        self.len
    }
}

// SAFETY: as above.
unsafe impl DeviceMemory for HostMemory {
    fn len(&self) -> u64 {
        self.len as u64
    }

    fn host_ptr(&self) -> Option<NonNull<u8>> {
        Some(self.ptr)
    }
}
