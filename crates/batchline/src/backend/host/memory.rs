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
    ptr: NonNull<u8>,
    layout: Layout,
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
        let layout = usize::try_from(bytes.max(1))
            .ok()
            .and_then(|size| Layout::from_size_align(size, PAGE).ok())
            .ok_or_else(out_of_memory)?;
        // SAFETY: the layout's size is at least 1.
        let ptr = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(out_of_memory)?;
        Ok(Self { ptr, layout })
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this very layout, and freed only here.
        unsafe { dealloc(self.ptr.as_ptr(), self.layout) }
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
        self.layout.size()
    }
}

// SAFETY: as above.
unsafe impl DeviceMemory for HostMemory {
    fn len(&self) -> u64 {
        self.layout.size() as u64
    }

    fn host_ptr(&self) -> Option<NonNull<u8>> {
        Some(self.ptr)
    }
}
