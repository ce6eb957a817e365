//! Memory of others that a device on the host reads by itself. The host as a device has no use for
//! it, the device of the tests has.
#![allow(unsafe_code, reason = "promises that memory is readable")]
#![cfg_attr(not(feature = "testing"), allow(dead_code, reason = "for the device of the tests"))]

use std::any::Any;
use std::fmt;
use std::ptr::NonNull;

use super::execute::Bytes;
use crate::backend::RegisteredMemory;

/// Somebody else's memory, which a device on the host reads by itself.
pub(crate) struct HostRegistered {
    bytes: Bytes,
    /// Called when it is dropped.
    dropped: Box<dyn Fn(Bytes) + Send + Sync>,
}

impl HostRegistered {
    /// # Safety
    /// As [`Backend::register`](crate::backend::Backend::register).
    pub(crate) unsafe fn new(
        memory: NonNull<[u8]>,
        dropped: impl Fn(Bytes) + Send + Sync + 'static,
    ) -> Self {
        Self { bytes: Bytes::new(memory), dropped: Box::new(dropped) }
    }

    /// The bytes of memory that was registered here.
    pub(super) fn bytes_of(memory: &dyn RegisteredMemory) -> Option<Bytes> {
        let memory: &dyn Any = memory;
        memory.downcast_ref::<Self>().map(|registered| registered.bytes)
    }
}

impl Drop for HostRegistered {
    fn drop(&mut self) {
        (self.dropped)(self.bytes);
    }
}

impl fmt::Debug for HostRegistered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("HostRegistered").field(&self.bytes).finish()
    }
}

// SAFETY: whoever registered it promised that it stays readable.
unsafe impl RegisteredMemory for HostRegistered {
    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }
}
