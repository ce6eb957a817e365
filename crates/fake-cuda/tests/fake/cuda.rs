//! The driver's functions, called as any program calls them.
#![allow(unsafe_code, reason = "calls a C library")]

use std::ffi::{CStr, CString, c_char, c_void};

use fake_cuda::Fake;

pub(crate) const NON_BLOCKING: u32 = 1;
const DISABLE_TIMING: u32 = 2;

pub(crate) const PTX: &str = ".version 7.0\n.target sm_52\n.address_size 64\n\
    .visible .entry batchline_fill_u64(.param .u64 to, .param .u64 count, .param .u64 value)\n\
    { ret; }\n.visible .entry batchline_test_fault()\n{ ret; }\n.visible .entry other()\n{ ret; }\n";

macro_rules! calls {
    ($($name:ident($($argument:ident: $kind:ty),*);)*) => {
        #[allow(non_snake_case, clippy::too_many_arguments, dead_code, reason = "the driver's")]
        impl Cuda {
            $(pub(crate) fn $name(&self, $($argument: $kind),*) -> u32 {
                type Call = unsafe extern "C" fn($($kind),*) -> u32;
                let call: Call = self.fake.symbol(stringify!($name));
                // SAFETY: the signature is the driver's; the tests keep what they name alive.
                unsafe { call($($argument),*) }
            })*
        }
    };
}

/// The fake and its functions.
pub(crate) struct Cuda {
    pub(crate) fake: Fake,
}

calls! {
    cuInit(flags: u32);
    cuDriverGetVersion(version: *mut i32);
    cuGetErrorName(code: u32, name: *mut *const c_char);
    cuGetErrorString(code: u32, text: *mut *const c_char);
    cuDeviceGetCount(count: *mut i32);
    cuDeviceGet(device: *mut i32, ordinal: i32);
    cuDeviceGetName(name: *mut u8, room: i32, device: i32);
    cuDeviceGetUuid_v2(uuid: *mut [u8; 16], device: i32);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: i32);
    cuDeviceGetAttribute(value: *mut i32, attribute: u32, device: i32);
    cuDeviceGetPCIBusId(id: *mut u8, room: i32, device: i32);
    cuDevicePrimaryCtxRetain(context: *mut usize, device: i32);
    cuDevicePrimaryCtxRelease_v2(device: i32);
    cuCtxGetCurrent(context: *mut usize);
    cuCtxSetCurrent(context: usize);
    cuCtxPushCurrent_v2(context: usize);
    cuCtxPopCurrent_v2(context: *mut usize);
    cuCtxGetDevice(device: *mut i32);
    cuCtxSynchronize();
    cuStreamCreate(stream: *mut usize, flags: u32);
    cuStreamCreateWithPriority(stream: *mut usize, flags: u32, priority: i32);
    cuStreamDestroy_v2(stream: usize);
    cuStreamSynchronize(stream: usize);
    cuStreamQuery(stream: usize);
    cuStreamWaitEvent(stream: usize, event: usize, flags: u32);
    cuStreamGetCtx(stream: usize, context: *mut usize);
    cuEventCreate(event: *mut usize, flags: u32);
    cuEventDestroy_v2(event: usize);
    cuEventRecord(event: usize, stream: usize);
    cuEventQuery(event: usize);
    cuEventSynchronize(event: usize);
    cuMemAlloc_v2(address: *mut u64, bytes: usize);
    cuMemFree_v2(address: u64);
    cuMemHostAlloc(address: *mut *mut u8, bytes: usize, flags: u32);
    cuMemFreeHost(address: *mut u8);
    cuMemHostRegister_v2(address: *mut u8, bytes: usize, flags: u32);
    cuMemHostUnregister(address: *mut u8);
    cuMemHostGetDevicePointer_v2(device: *mut u64, address: *mut u8, flags: u32);
    cuMemGetInfo_v2(free: *mut usize, total: *mut usize);
    cuPointerGetAttribute(data: *mut c_void, attribute: u32, address: u64);
    cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: usize);
    cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: usize);
    cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: usize);
    cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize);
    cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize);
    cuMemsetD8Async(to: u64, value: u8, count: usize, stream: usize);
    cuMemsetD16Async(to: u64, value: u16, count: usize, stream: usize);
    cuMemsetD32Async(to: u64, value: u32, count: usize, stream: usize);
    cuModuleLoadData(module: *mut usize, image: *const c_char);
    cuModuleUnload(module: usize);
    cuModuleGetFunction(function: *mut usize, module: usize, name: *const c_char);
    cuLaunchKernel(function: usize, grid_x: u32, grid_y: u32, grid_z: u32, block_x: u32,
        block_y: u32, block_z: u32, shared: u32, stream: usize, parameters: *mut *mut c_void,
        extra: *mut *mut c_void);
    cuLaunchHostFunc(stream: usize, function: extern "C" fn(*mut c_void), data: *mut c_void);
    cuThreadExchangeStreamCaptureMode(mode: *mut u32);
    cuGetProcAddress_v2(name: *const c_char, address: *mut usize, version: i32, flags: u64,
        status: *mut u32);
    cuMemcpyBatchAsync(to: *const u64, from: *const u64, bytes: *const usize, count: usize,
        attributes: *const [u32; 6], starts: *const usize, groups: usize, failed: *mut usize,
        stream: usize);
    cuMemcpyBatchAsync_v2(to: *const u64, from: *const u64, bytes: *const usize, count: usize,
        attributes: *const [u32; 6], starts: *const usize, groups: usize, stream: usize);
    cuStreamBeginCapture_v2(stream: usize, mode: u32);
    cuStreamEndCapture(stream: usize, graph: *mut usize);
    cuGraphInstantiateWithFlags(executable: *mut usize, graph: usize, flags: u64);
    cuGraphLaunch(executable: usize, stream: usize);
    cuGraphDestroy(graph: usize);
    cuGraphExecDestroy(executable: usize);
}

impl Cuda {
    /// A driver, with the context of device 0 current.
    pub(crate) fn new(settings: &str) -> Self {
        let cuda = Self::without_context(settings);
        let context = cuda.retain(0);
        assert_eq!(cuda.cuCtxSetCurrent(context), 0);
        cuda
    }

    pub(crate) fn without_context(settings: &str) -> Self {
        let cuda = Self { fake: Fake::start(settings) };
        // This thread may have been another test's.
        assert_eq!(cuda.cuInit(0), 0);
        assert_eq!(cuda.cuCtxSetCurrent(0), 0);
        cuda
    }

    pub(crate) fn retain(&self, device: i32) -> usize {
        made(|context| self.cuDevicePrimaryCtxRetain(context, device))
    }

    pub(crate) fn stream(&self) -> usize {
        made(|stream| self.cuStreamCreate(stream, NON_BLOCKING))
    }

    pub(crate) fn event(&self) -> usize {
        made(|event| self.cuEventCreate(event, DISABLE_TIMING))
    }

    /// Device memory, zero.
    pub(crate) fn device(&self, bytes: usize) -> u64 {
        let address = made(|address| self.cuMemAlloc_v2(address, bytes));
        assert_eq!(self.cuMemcpyHtoD_v2(address, vec![0; bytes].as_ptr(), bytes), 0);
        address
    }

    /// Page-locked memory with this content.
    pub(crate) fn host(&self, bytes: &[u8]) -> *mut u8 {
        let address = made(|address| self.cuMemHostAlloc(address, bytes.len(), 1));
        write(address, bytes);
        address
    }

    /// What is on the device now. Waits for blocking streams only.
    pub(crate) fn read(&self, address: u64, bytes: usize) -> Vec<u8> {
        let mut read = vec![0; bytes];
        assert_eq!(self.cuMemcpyDtoH_v2(read.as_mut_ptr(), address, bytes), 0);
        read
    }

    /// The kernel of a name.
    pub(crate) fn function(&self, name: &str) -> usize {
        self.module_and_function(name).1
    }

    /// The module of a kernel, and the kernel.
    pub(crate) fn module_and_function(&self, name: &str) -> (usize, usize) {
        let (text, name) = (CString::new(PTX).unwrap(), CString::new(name).unwrap());
        let module = made(|module| self.cuModuleLoadData(module, text.as_ptr()));
        (module, made(|function| self.cuModuleGetFunction(function, module, name.as_ptr())))
    }

    /// Launches one block of one thread.
    pub(crate) fn launch(&self, function: usize, stream: usize, parameters: &[u64]) -> u32 {
        let mut addresses: Vec<_> =
            parameters.iter().map(|value| std::ptr::from_ref(value).cast_mut().cast()).collect();
        let none = std::ptr::null_mut();
        let at = addresses.as_mut_ptr();
        self.cuLaunchKernel(function, 1, 1, 1, 1, 1, 1, 0, stream, at, none)
    }

    pub(crate) fn error_name(&self, code: u32) -> String {
        let name = made(|name| self.cuGetErrorName(code, name));
        // SAFETY: the driver's texts end with a zero and live for ever.
        unsafe { CStr::from_ptr(name) }.to_str().unwrap().to_owned()
    }

    pub(crate) fn no_violations(&self) {
        assert_eq!(self.fake.violations(), [""; 0]);
    }

    /// There is one violation, with these words.
    pub(crate) fn violated(&self, words: &str) {
        let violations = self.fake.violations();
        assert!(
            violations.len() == 1 && violations[0].contains(words),
            "instead of '{words}': {violations:?}"
        );
    }
}

/// What a call makes, which must succeed.
pub(crate) fn made<T>(call: impl FnOnce(*mut T) -> u32) -> T {
    let mut made = std::mem::MaybeUninit::uninit();
    assert_eq!(call(made.as_mut_ptr()), 0);
    // SAFETY: a call that succeeds writes it.
    unsafe { made.assume_init() }
}

/// Writes to memory of the driver's.
pub(crate) fn write(address: *mut u8, bytes: &[u8]) {
    // SAFETY: the tests write to what they have allocated, or had.
    unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address, bytes.len()) };
}

/// What is in memory of the driver's.
pub(crate) fn bytes(address: *const u8, len: usize) -> Vec<u8> {
    // SAFETY: as above.
    unsafe { std::slice::from_raw_parts(address, len) }.to_vec()
}

/// Takes the sender that was given to a host function.
pub(crate) fn take<T>(data: *mut c_void) -> T {
    // SAFETY: the tests give each host function a box, and it is called once.
    *unsafe { Box::from_raw(data.cast()) }
}
