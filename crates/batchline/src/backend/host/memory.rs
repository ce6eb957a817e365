//! Ordinary memory of the process.
#![allow(unsafe_code, reason = "promises that its memory is valid")]

use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::MmapMut;

use crate::backend::{DeviceMemory, StagingMemory};
use crate::{Error, Result};

/// Pages of the system: zeroed when they are first touched, by whichever worker that is.
#[derive(Debug)]
pub(crate) struct HostMemory {
    ptr: NonNull<u8>,
    len: usize,
    /// Keeps the pages.
    _pages: MmapMut,
}

impl HostMemory {
    pub(crate) fn new(device: &str, bytes: u64) -> Result<Self> {
        let out_of_memory = |source: std::io::Error| Error::Device {
            device: device.to_owned(),
            operation: "allocating host memory",
            source: Arc::new(source),
        };
        let too_large = |_| out_of_memory(std::io::ErrorKind::OutOfMemory.into());
        let len = usize::try_from(bytes.max(1)).map_err(too_large)?;
        let mut pages = MmapMut::map_anon(len).map_err(out_of_memory)?;
        // Large pages are found in a fraction of the time; for little memory, clearing a whole one
        // takes longer. Where the system has none, the usual ones do.
        #[cfg(target_os = "linux")]
        if len >= 8 << 20 {
            let _ = pages.advise(memmap2::Advice::HugePage);
        }
        let ptr = NonNull::from(&mut pages[..]).cast();
        Ok(Self { ptr, len, _pages: pages })
    }
}

// SAFETY: it owns plain bytes; who reads and writes them is the business of the traits' contracts.
unsafe impl Send for HostMemory {}
// SAFETY: as above; `&HostMemory` gives out nothing but the address.
unsafe impl Sync for HostMemory {}

// SAFETY: the pages are initialised, `len` bytes long, aligned to themselves, and never move.
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
