//! The driver alone, as the ceiling to compare with, and for work on a stream of our own.

use std::ffi::{CStr, c_void};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use batchline::CudaStream;
use libloading::{Library, Symbol};

pub(crate) struct Driver(Library);

type Code = u32;

/// An event that notes the time, by its handle: any thread may name it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Event(usize);

impl Event {
    fn raw(self) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(self.0)
    }
}

/// A kernel of our own.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Kernel(*mut c_void);

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

    /// A stream that does not wait for the default one. It is never destroyed.
    pub(crate) fn stream(&self) -> *mut c_void {
        let call =
            self.get::<unsafe extern "C" fn(*mut *mut c_void, u32) -> Code>("cuStreamCreate");
        let mut stream = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut stream, 1) }, 0);
        stream
    }

    /// The same as batchline takes it.
    pub(crate) fn shared(stream: *mut c_void) -> CudaStream {
        // SAFETY: of the primary context, and never destroyed.
        unsafe { CudaStream::from_raw(stream) }
    }

    /// Never freed.
    pub(crate) fn page_locked(&self, bytes: usize) -> &'static mut [u8] {
        let call = self
            .get::<unsafe extern "C" fn(*mut *mut c_void, usize, u32) -> Code>("cuMemHostAlloc");
        let mut start = std::ptr::null_mut::<c_void>();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut start, bytes, 1) }, 0);
        // SAFETY: as long as was asked for, ours alone, and never freed.
        let memory = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), bytes) };
        memory.fill(1);
        memory
    }

    /// Never freed.
    pub(crate) fn device_memory(&self, bytes: usize) -> u64 {
        let call = self.get::<unsafe extern "C" fn(*mut u64, usize) -> Code>("cuMemAlloc_v2");
        let mut address = 0;
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut address, bytes) }, 0);
        address
    }

    /// Enqueues a copy.
    pub(crate) fn copy(&self, stream: *mut c_void, to: u64, from: &'static [u8]) {
        let call = self
            .get::<unsafe extern "C" fn(u64, *const c_void, usize, *mut c_void) -> Code>(
                "cuMemcpyHtoDAsync_v2",
            );
        // SAFETY: callers have device memory of this length; neither is ever freed.
        assert_eq!(unsafe { call(to, from.as_ptr().cast(), from.len(), stream) }, 0);
    }

    pub(crate) fn wait(&self, stream: *mut c_void) {
        let call = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuStreamSynchronize");
        // SAFETY: the stream exists.
        assert_eq!(unsafe { call(stream) }, 0);
    }

    pub(crate) fn event(&self) -> Event {
        let call = self.get::<unsafe extern "C" fn(*mut *mut c_void, u32) -> Code>("cuEventCreate");
        let mut event = std::ptr::null_mut();
        // SAFETY: a place for the answer.
        assert_eq!(unsafe { call(&raw mut event, 0) }, 0);
        Event(event.expose_provenance())
    }

    pub(crate) fn record(&self, event: Event, stream: *mut c_void) {
        let call =
            self.get::<unsafe extern "C" fn(*mut c_void, *mut c_void) -> Code>("cuEventRecord");
        // SAFETY: both exist.
        assert_eq!(unsafe { call(event.raw(), stream) }, 0);
    }

    pub(crate) fn wait_for(&self, event: Event) {
        let call = self.get::<unsafe extern "C" fn(*mut c_void) -> Code>("cuEventSynchronize");
        // SAFETY: the event exists.
        assert_eq!(unsafe { call(event.raw()) }, 0);
    }

    /// Milliseconds from one event to the other, both of which have passed.
    pub(crate) fn between(&self, from: Event, to: Event) -> f64 {
        let call = self.get::<unsafe extern "C" fn(*mut f32, *mut c_void, *mut c_void) -> Code>(
            "cuEventElapsedTime",
        );
        let mut milliseconds = 0.0;
        // SAFETY: a place for the answer, and two events.
        assert_eq!(unsafe { call(&raw mut milliseconds, from.raw(), to.raw()) }, 0);
        f64::from(milliseconds)
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

    /// A kernel by its text and name.
    pub(crate) fn kernel(&self, text: &CStr, name: &CStr) -> Kernel {
        let load = self.get::<unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> Code>(
            "cuModuleLoadData",
        );
        let find = self
            .get::<unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_void) -> Code>(
                "cuModuleGetFunction",
            );
        let (mut module, mut kernel) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: a place for the answer, and a text that ends with a zero.
        assert_eq!(unsafe { load(&raw mut module, text.as_ptr().cast()) }, 0);
        // SAFETY: as above.
        assert_eq!(unsafe { find(&raw mut kernel, module, name.as_ptr().cast()) }, 0);
        Kernel(kernel)
    }

    /// Launches a kernel whose parameters are an address and a number.
    pub(crate) fn launch(
        &self,
        kernel: Kernel,
        blocks: u32,
        stream: *mut c_void,
        mut address: u64,
        mut number: u32,
    ) {
        let call = self.get::<unsafe extern "C" fn(
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
        let mut parameters = [(&raw mut address).cast(), (&raw mut number).cast::<c_void>()];
        let (parameters, none) = (parameters.as_mut_ptr(), std::ptr::null_mut());
        // SAFETY: the kernel has these two parameters, and the address is of device memory.
        let code = unsafe { call(kernel.0, blocks, 1, 1, 256, 1, 1, 0, stream, parameters, none) };
        assert_eq!(code, 0);
    }
}

/// Keeps a stream waiting while it is there.
pub(crate) struct Gate(Sender<()>);

impl Gate {
    pub(crate) fn open(self) {
        let _ = self.0.send(());
    }
}

/// Copies of one size out of page-locked memory, one behind the other: the link's ceiling.
pub(crate) struct Link<'d> {
    driver: &'d Driver,
    stream: *mut c_void,
    target: u64,
    sources: Vec<&'static [u8]>,
    /// Copies in a run.
    count: usize,
}

impl<'d> Link<'d> {
    pub(crate) fn new(driver: &'d Driver, bytes: u64) -> Self {
        let bytes = usize::try_from(bytes).expect("64 bits");
        let (stream, target) = (driver.stream(), driver.device_memory(bytes));
        let sources = (0..4).map(|_| &*driver.page_locked(bytes)).collect();
        Self { driver, stream, target, sources, count: 4 }
    }

    /// Bytes per second over about this long; a first run finds out how many copies that is.
    pub(crate) fn rate(&mut self, span: Duration) -> f64 {
        let began = Instant::now();
        for number in 0..self.count {
            self.driver.copy(self.stream, self.target, self.sources[number % self.sources.len()]);
        }
        self.driver.wait(self.stream);
        let seconds = began.elapsed().as_secs_f64();
        let bytes = self.count * self.sources[0].len();
        let copies = self.count as f64 * span.as_secs_f64() / seconds;
        self.count = (copies as usize).clamp(4, 100_000);
        bytes as f64 / seconds
    }
}
