//! The driver alone, as the ceiling to compare with.

use std::ffi::c_void;

use libloading::{Library, Symbol};

pub(crate) struct Driver(Library);

type Code = u32;

impl Driver {
    /// The driver, in whose primary context this thread is already.
    pub(crate) fn load() -> Self {
        // SAFETY: batchline has loaded it before.
        Self(unsafe { Library::new("libcuda.so.1") }.expect("the CUDA driver"))
    }

    fn get<F>(&self, name: &str) -> Symbol<'_, F> {
        // SAFETY: callers name the signature of the driver's documentation.
        unsafe { self.0.get(name.as_bytes()) }.expect("a symbol of every driver")
    }

    /// A stream that does not wait for the default one.
    pub(crate) fn stream(&self) -> *mut c_void {
        let call = self.get::<unsafe extern "C" fn(*mut *mut c_void, u32) -> Code>("cuStreamCreate");
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut stream, 1) }, 0);
        stream
    }

    pub(crate) fn page_locked(&self, bytes: usize) -> *mut u8 {
        let call =
            self.get::<unsafe extern "C" fn(*mut *mut c_void, usize, u32) -> Code>("cuMemHostAlloc");
        let mut start = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut start, bytes, 1) }, 0);
        start.cast()
    }

    pub(crate) fn device_memory(&self, bytes: usize) -> u64 {
        let call = self.get::<unsafe extern "C" fn(*mut u64, usize) -> Code>("cuMemAlloc_v2");
        let mut address = 0;
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut address, bytes) }, 0);
        address
    }

    /// So many copies, one behind the other, and the wait for the last.
    pub(crate) fn copy(
        &self,
        stream: *mut c_void,
        to: u64,
        from: &[*mut u8],
        bytes: usize,
        count: usize,
    ) {
        let copy = self.get::<unsafe extern "C" fn(u64, *const c_void, usize, *mut c_void) -> Code>(
            "cuMemcpyHtoDAsync_v2",
        );
        let wait = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuStreamSynchronize");
        for number in 0..count {
            let from = from[number % from.len()];
            // SAFETY: both are as long as said and are never freed.
            assert_eq!(unsafe { copy(to, from.cast(), bytes, stream) }, 0);
        }
        // SAFETY: the stream exists.
        assert_eq!(unsafe { wait(stream) }, 0);
    }
}
