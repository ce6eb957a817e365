//! A C program that takes tensors through DLPack: `consumer.c`, which has the standard's structures
//! in its own words. It says what it sees, reads elements, and calls the deleter.
#![allow(unsafe_code, reason = "calls the C program")]

use std::ffi::{c_int, c_void};

/// Whether there was a C compiler. Without it nothing can be taken.
pub const BUILT: bool = cfg!(built);

/// What the program sees of a tensor.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    /// The version; zeros for the old structure, which has none.
    pub version: [u32; 2],
    /// The flags.
    pub flags: u64,
    /// Type and number of the device.
    pub device: [i32; 2],
    /// The element type's code.
    pub code: u8,
    /// Its bits.
    pub bits: u8,
    /// Its lanes.
    pub lanes: u16,
    /// The number of dimensions.
    pub ndim: i32,
    /// Extents.
    pub shape: [i64; 8],
    /// Strides.
    pub strides: [i64; 8],
    /// The address.
    pub data: *const c_void,
    /// The first element's place behind it.
    pub byte_offset: u64,
}

#[cfg(built)]
unsafe extern "C" {
    fn dlpack_consumer_look(managed: *const c_void, is_legacy: c_int, seen: *mut Seen) -> c_int;
    fn dlpack_consumer_read(
        managed: *const c_void,
        is_legacy: c_int,
        to: *mut u8,
        room: usize,
    ) -> i64;
    fn dlpack_consumer_end(managed: *mut c_void, is_legacy: c_int);
}

/// # Safety
/// Nothing is asked for, as nothing is done.
#[cfg(not(built))]
unsafe fn dlpack_consumer_look(_: *const c_void, _: c_int, _: *mut Seen) -> c_int {
    -1
}

/// # Safety
/// Nothing is asked for, as nothing is done.
#[cfg(not(built))]
unsafe fn dlpack_consumer_read(_: *const c_void, _: c_int, _: *mut u8, _: usize) -> i64 {
    -1
}

/// # Safety
/// Nothing is asked for, as nothing is done.
#[cfg(not(built))]
unsafe fn dlpack_consumer_end(_: *mut c_void, _: c_int) {}

/// A tensor that the program has taken. Dropping it calls the deleter.
#[derive(Debug)]
pub struct Taken {
    managed: *mut c_void,
    is_legacy: bool,
}

// SAFETY: the standard lets any thread use an export and call its deleter.
unsafe impl Send for Taken {}

impl Taken {
    /// Takes a `DLManagedTensorVersioned`, or where `is_legacy` a `DLManagedTensor`.
    ///
    /// # Safety
    /// It is one, and nobody else's.
    pub unsafe fn new(managed: *mut c_void, is_legacy: bool) -> Self {
        Self { managed, is_legacy }
    }

    /// What the program sees.
    ///
    /// # Panics
    /// The standard is not kept to, or there was no C compiler.
    pub fn seen(&self) -> Seen {
        let mut seen = std::mem::MaybeUninit::uninit();
        // SAFETY: taken by `new`; `seen` is a place for the answer.
        let code =
            unsafe { dlpack_consumer_look(self.managed, self.is_legacy.into(), seen.as_mut_ptr()) };
        assert_eq!(code, 0, "what the program sees");
        // SAFETY: it was filled.
        unsafe { seen.assume_init() }
    }

    /// The elements of a tensor on the host.
    ///
    /// # Panics
    /// There are more than `room` bytes, or there was no C compiler.
    pub fn bytes(&self, room: usize) -> Vec<u8> {
        let mut bytes = vec![0; room];
        // SAFETY: taken by `new`, and there is as much room as is said.
        let len = unsafe {
            dlpack_consumer_read(self.managed, self.is_legacy.into(), bytes.as_mut_ptr(), room)
        };
        bytes.truncate(usize::try_from(len).expect("room for the elements"));
        bytes
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        // SAFETY: taken by `new`, and not used any more.
        unsafe { dlpack_consumer_end(self.managed, self.is_legacy.into()) }
    }
}
