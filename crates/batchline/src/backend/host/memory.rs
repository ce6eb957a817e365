//! Ordinary memory, for both sides of a transfer.
#![allow(unsafe_code, reason = "owns raw memory")]

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;
use std::sync::Arc;

use crate::backend::{DeviceMemory, StagingMemory};
use crate::{Error, Result};

/// Zeroed when new, aligned to a page, so that it also satisfies who would register it.
#[derive(Debug)]
pub(crate) struct HostMemory {
    /// What was allocated: zeroed pages come from the system when they are touched, which a larger
    /// alignment would have the allocator do at once, and by hand.
    base: NonNull<u8>,
    layout: Layout,
    /// The first page's start within it.
    ptr: NonNull<u8>,
    len: usize,
}

const PAGE: usize = 4096;

impl HostMemory {
    pub(crate) fn new(device: &str, bytes: u64) -> Result<Self> {
        let out_of_memory = || Error::Device {
            device: device.to_owned(),
            operation: "allocating host memory",
            source: Arc::new(std::io::Error::new(
                std::io::ErrorKind::OutOfMemory,
                format!("{bytes} bytes are not to be had"),
            )),
        };
        let len = usize::try_from(bytes.max(1)).map_err(|_| out_of_memory())?;
        let layout = len
            .checked_add(PAGE)
            .and_then(|size| Layout::from_size_align(size, 16).ok())
            .ok_or_else(out_of_memory)?;
        // SAFETY: the layout's size is at least 1.
        let base = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        let skip = base.as_ptr().align_offset(PAGE);
        // SAFETY: less than a page, by which the allocation is longer than asked for.
        let ptr = unsafe { base.add(skip) };
        Ok(Self { base, ptr, len, layout })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and freed only here.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}

// SAFETY: it owns plain bytes; who reads and writes them is the business of the traits' contracts.
unsafe impl Send for HostMemory {}
// SAFETY: as above; `&HostMemory` gives out nothing but the address.
unsafe impl Sync for HostMemory {}

// SAFETY: the allocation is initialised, page-aligned, `layout.size()` long, and never moves.
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
