//! The few driver calls that the tests make themselves, as a user's kernels would.
#![allow(unsafe_code, reason = "calls the driver, as a user does")]

use std::ffi::{CString, c_char, c_int, c_void};
use std::ops::{Deref, DerefMut};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use batchline::CudaStream;
use libloading::{Library, Symbol};

/// The driver's library.
pub(crate) struct Driver(Library);

pub(crate) type Code = u32;

/// See [`Driver::own`].
struct Own<'d>(Option<(u32, Symbol<'d, unsafe extern "C" fn(u32) -> u32>)>);

impl Drop for Own<'_> {
    fn drop(&mut self) {
        if let Some((before, spare)) = &self.0 {
            // SAFETY: a number.
            unsafe { spare(*before) };
        }
    }
}

impl Driver {
    pub(crate) fn load() -> Self {
        // SAFETY: batchline has loaded it before.
        Self(unsafe { Library::new("libcuda.so.1") }.unwrap())
    }

    /// While it is there, this thread's calls are the test's own to a driver that pretends: it
    /// neither counts them nor makes them fail.
    fn own(&self) -> Own<'_> {
        // SAFETY: the signature is that of the fake; a real driver has no such function.
        let spare = unsafe { self.0.get::<unsafe extern "C" fn(u32) -> u32>(b"fake_cuda_spare") };
        // SAFETY: a number.
        let spare = spare.ok().map(|spare| (unsafe { spare(1) }, spare));
        Own(spare)
    }

    fn get<F>(&self, name: &str) -> Symbol<'_, F> {
        // SAFETY: callers name the signature of the driver's documentation.
        unsafe { self.0.get(name.as_bytes()) }.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// A stream that does not wait for the default one.
    pub(crate) fn stream(&self) -> CudaStream {
        let _own = self.own();
        let create =
            self.get::<unsafe extern "C" fn(*mut *mut c_void, u32) -> Code>("cuStreamCreate");
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for the answer; the context is current on this thread by then.
        assert_eq!(unsafe { create(&raw mut stream, 1) }, 0);
        // SAFETY: it is never destroyed.
        unsafe { CudaStream::from_raw(stream) }
    }

    /// Destroys a stream that nothing uses any more. In a lost context it fails.
    pub(crate) fn destroy(&self, stream: CudaStream) {
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuStreamDestroy_v2");
        // SAFETY: the stream exists, and no device knows it any more.
        unsafe { call(stream.as_raw()) };
    }

    pub(crate) fn synchronize(&self, stream: CudaStream) -> Code {
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuStreamSynchronize");
        // SAFETY: the stream exists.
        unsafe { call(stream.as_raw()) }
    }

    /// Whether all that was enqueued on a stream is over.
    pub(crate) fn is_over(&self, stream: CudaStream) -> bool {
        const NOT_READY: Code = 600;
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuStreamQuery");
        // SAFETY: the stream exists.
        let code = unsafe { call(stream.as_raw()) };
        assert!(matches!(code, 0 | NOT_READY), "{code}");
        code == 0
    }

    /// Holds a stream back until the gate is opened.
    pub(crate) fn hold(&self, stream: CudaStream) -> Gate {
        let _own = self.own();
        extern "C" fn wait(gate: *mut c_void) {
            // SAFETY: the box that was given to this one call.
            let gate = unsafe { Box::from_raw(gate.cast::<Receiver<()>>()) };
            // A test that fails must not hang.
            let _ = gate.recv_timeout(Duration::from_secs(20));
        }
        let (open, gate) = channel::<()>();
        let call = self.get::<unsafe extern "C" fn(
            *mut c_void,
            extern "C" fn(*mut c_void),
            *mut c_void,
        ) -> Code>("cuLaunchHostFunc");
        let gate = Box::into_raw(Box::new(gate));
        // SAFETY: the function takes the box.
        assert_eq!(unsafe { call(stream.as_raw(), wait, gate.cast()) }, 0);
        Gate(open)
    }

    /// Has work on a stream recorded instead of done, and other threads' calls left alone.
    pub(crate) fn begin_capture(&self, stream: CudaStream) {
        self.begin_capture_as(stream, 1);
    }

    /// As [`begin_capture`](Self::begin_capture), for a capture that calls of any thread break.
    pub(crate) fn begin_strict_capture(&self, stream: CudaStream) {
        self.begin_capture_as(stream, 0);
    }

    fn begin_capture_as(&self, stream: CudaStream, mode: u32) {
        let _own = self.own();
        let begin =
            self.get::<unsafe extern "C" fn(*mut c_void, u32) -> Code>("cuStreamBeginCapture_v2");
        // SAFETY: the stream exists.
        assert_eq!(unsafe { begin(stream.as_raw(), mode) }, 0);
    }

    /// Ends the recording; 0 unless something broke it.
    pub(crate) fn end_capture(&self, stream: CudaStream) -> Code {
        let _own = self.own();
        let end = self.get::<unsafe extern "C" fn(*mut c_void, *mut *mut c_void) -> Code>(
            "cuStreamEndCapture",
        );
        let mut graph = std::ptr::null_mut();
        // SAFETY: the stream exists; a place for the answer, which is never destroyed.
        unsafe { end(stream.as_raw(), &raw mut graph) }
    }

    /// Reads device memory on a stream; the bytes are there once the stream has come so far.
    pub(crate) fn read(&self, stream: CudaStream, address: u64, bytes: &mut [u8]) {
        assert_eq!(self.try_read(stream, address, bytes), 0);
    }

    /// As [`read`](Self::read), where it may fail.
    pub(crate) fn try_read(&self, stream: CudaStream, address: u64, bytes: &mut [u8]) -> Code {
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn(*mut c_void, u64, usize, *mut c_void) -> Code>(
            "cuMemcpyDtoHAsync_v2",
        );
        let target = bytes.as_mut_ptr().cast();
        // SAFETY: the caller keeps both until the stream was waited for.
        unsafe { call(target, address, bytes.len(), stream.as_raw()) }
    }

    /// Page-locked memory, so that a copy to it does not make the caller wait. It is never freed.
    pub(crate) fn page_locked(&self, bytes: usize) -> &'static mut [u8] {
        let memory = std::mem::ManuallyDrop::new(self.own_page_locked(bytes));
        // SAFETY: just allocated, and never freed.
        unsafe { std::slice::from_raw_parts_mut(memory.start, memory.len) }
    }

    /// Page-locked memory that is freed.
    pub(crate) fn own_page_locked(&self, len: usize) -> PageLocked {
        let _own = self.own();
        let call = self
            .get::<unsafe extern "C" fn(*mut *mut c_void, usize, u32) -> Code>("cuMemHostAlloc");
        let mut start = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut start, len, 1) }, 0);
        PageLocked { start: start.cast(), len, context: self.current() }
    }

    /// Takes a part in a device's primary context, as a program does that uses CUDA itself, and
    /// makes it current to this thread.
    pub(crate) fn retain(&self, device: c_int) -> Retained {
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn(*mut *mut c_void, c_int) -> Code>(
            "cuDevicePrimaryCtxRetain",
        );
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut context, device) }, 0);
        let retained = Retained { device, context: context as usize };
        self.make_current(retained.context);
        retained
    }

    /// Makes a context current to this thread; 0 for none.
    pub(crate) fn make_current(&self, context: usize) {
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuCtxSetCurrent");
        // SAFETY: a context that is retained.
        assert_eq!(unsafe { call(context as *mut c_void) }, 0);
    }

    /// Whether the current context works: 0 unless it is lost.
    pub(crate) fn check(&self) -> Code {
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn() -> Code>("cuCtxSynchronize");
        // SAFETY: no arguments.
        unsafe { call() }
    }

    /// The context that is current to this thread, or 0.
    pub(crate) fn current(&self) -> usize {
        let _own = self.own();
        let call = self.get::<unsafe extern "C" fn(*mut *mut c_void) -> Code>("cuCtxGetCurrent");
        let mut context = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut context) }, 0);
        context as usize
    }

    /// Enqueues a kernel that makes the context unusable, once what was enqueued before is over.
    pub(crate) fn fault(&self, stream: CudaStream) {
        self.load_fault().launch(stream);
    }

    /// Loads the kernel that makes the context unusable: to do so is to wait for all streams.
    pub(crate) fn load_fault(&self) -> Fault {
        let _own = self.own();
        // A store to an address that belongs to nobody.
        const PTX: &str = "
.version 6.0
.target sm_70
.address_size 64
.visible .entry batchline_test_fault()
{
    .reg .b64 %a;
    mov.b64 %a, 16;
    st.global.u32 [%a], 1;
    ret;
}
";
        let (text, name) = (CString::new(PTX).unwrap(), c"batchline_test_fault");
        let load = self.get::<unsafe extern "C" fn(*mut *mut c_void, *const c_char) -> Code>(
            "cuModuleLoadData",
        );
        let find = self
            .get::<unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> Code>(
                "cuModuleGetFunction",
            );
        let (mut module, mut kernel) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: places for the answers, texts that end with a zero.
        assert_eq!(unsafe { load(&raw mut module, text.as_ptr()) }, 0);
        // SAFETY: as above.
        assert_eq!(unsafe { find(&raw mut kernel, module, name.as_ptr()) }, 0);
        Fault(kernel)
    }
}

/// A kernel that makes the context unusable.
pub(crate) struct Fault(*mut c_void);

impl Fault {
    /// Enqueues it.
    pub(crate) fn launch(self, stream: CudaStream) {
        let driver = Driver::load();
        let _own = driver.own();
        let launch = driver.get::<unsafe extern "C" fn(
            *mut c_void,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            u32,
            *mut c_void,
            *mut *mut c_void,
            *mut *mut c_void,
        ) -> Code>("cuLaunchKernel");
        let none = std::ptr::null_mut();
        // SAFETY: a kernel without parameters.
        let code = unsafe { launch(self.0, 1, 1, 1, 1, 1, 1, 0, stream.as_raw(), none, none) };
        assert_eq!(code, 0);
    }
}

/// A part in a primary context, which stays as long as this does.
pub(crate) struct Retained {
    device: c_int,
    pub(crate) context: usize,
}

impl Drop for Retained {
    fn drop(&mut self) {
        let driver = Driver::load();
        let _own = driver.own();
        let call =
            driver.get::<unsafe extern "C" fn(c_int) -> Code>("cuDevicePrimaryCtxRelease_v2");
        // SAFETY: retained once.
        unsafe { call(self.device) };
    }
}

/// Page-locked memory. What is enqueued on it must be over when it is dropped.
pub(crate) struct PageLocked {
    start: *mut u8,
    len: usize,
    context: usize,
}

// SAFETY: plain memory that is owned.
unsafe impl Send for PageLocked {}

impl Deref for PageLocked {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: allocated with this length; who reads it has waited for what writes it.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for PageLocked {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

impl Drop for PageLocked {
    fn drop(&mut self) {
        let driver = Driver::load();
        let _own = driver.own();
        let call = driver.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuMemFreeHost");
        // Any thread may drop it.
        let before = driver.current();
        driver.make_current(self.context);
        // SAFETY: allocated, and used by nothing any more. In a lost context it fails.
        unsafe { call(self.start.cast()) };
        driver.make_current(before);
    }
}

/// Keeps a stream waiting while it is there.
pub(crate) struct Gate(Sender<()>);

impl Gate {
    pub(crate) fn open(self) {
        let _ = self.0.send(());
    }
}
