//! The driver alone, as the ceiling to compare with.

use std::ffi::c_void;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

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

    /// Holds a stream back until the gate is opened.
    pub(crate) fn hold(&self, stream: *mut c_void) -> Gate {
        extern "C" fn wait(gate: *mut c_void) {
            // SAFETY: the box that was given to this one call.
            let gate = unsafe { Box::from_raw(gate.cast::<Receiver<()>>()) };
            // A gate that is dropped is open.
            let _ = gate.recv();
        }
        let (open, gate) = channel::<()>();
        let call = self.get::<unsafe extern "C" fn(
            *mut c_void,
            extern "C" fn(*mut c_void),
            *mut c_void,
        ) -> Code>("cuLaunchHostFunc");
        let gate = Box::into_raw(Box::new(gate));
        // SAFETY: the function takes the box.
        assert_eq!(unsafe { call(stream, wait, gate.cast()) }, 0);
        Gate(open)
    }

    /// A new event, recorded on a stream.
    pub(crate) fn record(&self, stream: *mut c_void) -> *mut c_void {
        let create =
            self.get::<unsafe extern "C" fn(*mut *mut c_void, u32) -> Code>("cuEventCreate");
        let record =
            self.get::<unsafe extern "C" fn(*mut c_void, *mut c_void) -> Code>("cuEventRecord");
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { create(&raw mut event, 0) }, 0);
        // SAFETY: both exist.
        assert_eq!(unsafe { record(event, stream) }, 0);
        event
    }

    /// The time between two events, which are used up.
    pub(crate) fn between(&self, start: usize, end: usize) -> Duration {
        let elapsed = self.get::<unsafe extern "C" fn(*mut f32, *mut c_void, *mut c_void) -> Code>(
            "cuEventElapsedTime",
        );
        let destroy = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuEventDestroy_v2");
        let events = [start, end].map(std::ptr::with_exposed_provenance_mut);
        let mut milliseconds = 0.0;
        // SAFETY: both were made by `record` and have passed.
        assert_eq!(unsafe { elapsed(&raw mut milliseconds, events[0], events[1]) }, 0);
        for event in events {
            // SAFETY: nobody names it any more.
            assert_eq!(unsafe { destroy(event) }, 0);
        }
        Duration::from_secs_f64(f64::from(milliseconds) / 1e3)
    }
}

/// Keeps a stream waiting while it is there.
pub(crate) struct Gate(Sender<()>);

impl Gate {
    pub(crate) fn open(self) {
        let _ = self.0.send(());
    }
}
