//! The driver's library: loaded at run time, each entry point looked up by name.
//!
//! The types are our own and results are plain numbers: a newer driver may answer with codes that
//! no list of today knows.
#![allow(unsafe_code, reason = "calls a C library")]

use std::ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void};
use std::fmt;
use std::sync::{Arc, OnceLock};

use crate::process::Process;
use crate::{Error, Result};

/// What the driver answers: 0, or an error's number.
pub(super) type Code = c_uint;

/// A device by its place.
pub(super) type DeviceId = c_int;

/// An address on the device.
pub(super) type Address = u64;

/// Handles of the driver.
macro_rules! handles {
    ($($name:ident: $what:literal,)*) => {$(
        #[doc = $what]
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(transparent)]
        pub(super) struct $name(pub(super) *mut c_void);

        impl $name {
            pub(super) const NULL: Self = Self(std::ptr::null_mut());
        }

        // SAFETY: a handle is a name; the driver takes calls from any thread.
        unsafe impl Send for $name {}
        // SAFETY: as above.
        unsafe impl Sync for $name {}
    )*};
}

handles! {
    Context: "A context: what a process has on a device.",
    Stream: "A stream.",
    Event: "An event.",
    Module: "A module of kernels.",
    Function: "A kernel.",
    Graph: "Work that was captured.",
    GraphExec: "A graph that can be launched.",
}

/// The entry points that are called, by their names in the library. What stands behind a `?` may
/// be missing, all of it together.
macro_rules! entry_points {
    (
        $($name:ident($($argument:ident: $kind:ty),*);)*
        $(? $field:ident: $Group:ident, $about:literal {
            $($late:ident($($late_argument:ident: $late_kind:ty),*);)*
        })*
    ) => {
        /// The driver's entry points.
        #[allow(non_snake_case, reason = "the driver's own names")]
        pub(super) struct Driver {
            $(pub(super) $name: unsafe extern "C" fn($($argument: $kind),*) -> Code,)*
            $(#[doc = $about] pub(super) $field: Option<$Group>,)*
            /// Copies in one call, where the driver has that.
            pub(super) batch: Option<BatchCopy>,
            /// The process that started the driver. A child of it can't use it.
            process: Process,
            /// Keeps the library loaded.
            _library: libloading::Library,
        }

        impl Driver {
            /// Looks all of them up.
            fn resolve(library: libloading::Library) -> Result<Self, String> {
                Ok(Self {
                    $($name: entry_point!(library, $name),)*
                    $($field: $Group::resolve(&library).ok(),)*
                    batch: None,
                    process: Process::current(),
                    _library: library,
                })
            }
        }

        $(
            #[doc = $about]
            #[allow(non_snake_case, reason = "the driver's own names")]
            pub(super) struct $Group {
                $(pub(super) $late: unsafe extern "C" fn($($late_argument: $late_kind),*) -> Code,)*
            }

            impl $Group {
                fn resolve(library: &libloading::Library) -> Result<Self, String> {
                    Ok(Self { $($late: entry_point!(library, $late),)* })
                }
            }
        )*
    };
}

/// Looks one up.
macro_rules! entry_point {
    ($library:ident, $name:ident) => {{
        // SAFETY: the signature is that of the driver's documentation.
        let symbol = unsafe { $library.get(concat!(stringify!($name), "\0").as_bytes()) };
        *symbol.map_err(|_| format!("its library lacks {}", stringify!($name)))?
    }};
}

entry_points! {
    cuInit(flags: c_uint);
    cuDriverGetVersion(version: *mut c_int);
    cuGetErrorName(code: Code, text: *mut *const c_char);
    cuGetErrorString(code: Code, text: *mut *const c_char);
    cuDeviceGetCount(count: *mut c_int);
    cuDeviceGet(device: *mut DeviceId, ordinal: c_int);
    cuDeviceGetName(name: *mut c_char, len: c_int, device: DeviceId);
    cuDeviceTotalMem_v2(bytes: *mut usize, device: DeviceId);
    cuDeviceGetAttribute(value: *mut c_int, attribute: c_int, device: DeviceId);
    cuDeviceGetPCIBusId(id: *mut c_char, len: c_int, device: DeviceId);
    cuDevicePrimaryCtxRetain(context: *mut Context, device: DeviceId);
    cuDevicePrimaryCtxRelease_v2(device: DeviceId);
    cuCtxGetCurrent(context: *mut Context);
    cuCtxSetCurrent(context: Context);
    cuCtxPushCurrent_v2(context: Context);
    cuCtxPopCurrent_v2(context: *mut Context);
    cuStreamCreateWithPriority(stream: *mut Stream, flags: c_uint, priority: c_int);
    cuStreamDestroy_v2(stream: Stream);
    cuStreamSynchronize(stream: Stream);
    cuStreamWaitEvent(stream: Stream, event: Event, flags: c_uint);
    cuStreamIsCapturing(stream: Stream, status: *mut c_int);
    cuEventCreate(event: *mut Event, flags: c_uint);
    cuEventDestroy_v2(event: Event);
    cuEventRecord(event: Event, stream: Stream);
    cuEventQuery(event: Event);
    cuMemAlloc_v2(address: *mut Address, bytes: usize);
    cuMemFree_v2(address: Address);
    cuMemHostAlloc(address: *mut *mut c_void, bytes: usize, flags: c_uint);
    cuMemFreeHost(address: *mut c_void);
    cuMemHostRegister_v2(address: *mut c_void, bytes: usize, flags: c_uint);
    cuMemHostUnregister(address: *mut c_void);
    cuMemHostGetDevicePointer_v2(address: *mut Address, memory: *mut c_void, flags: c_uint);
    cuMemcpyHtoDAsync_v2(target: Address, source: *const c_void, bytes: usize, stream: Stream);
    cuMemcpyDtoHAsync_v2(target: *mut c_void, source: Address, bytes: usize, stream: Stream);
    cuMemcpyDtoDAsync_v2(target: Address, source: Address, bytes: usize, stream: Stream);
    cuMemsetD8Async(target: Address, value: u8, count: usize, stream: Stream);
    cuMemsetD16Async(target: Address, value: u16, count: usize, stream: Stream);
    cuMemsetD32Async(target: Address, value: c_uint, count: usize, stream: Stream);
    cuModuleLoadData(module: *mut Module, image: *const c_void);
    cuModuleUnload(module: Module);
    cuModuleGetFunction(function: *mut Function, module: Module, name: *const c_char);
    cuLaunchKernel(
        function: Function,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: Stream,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void
    );
    cuThreadExchangeStreamCaptureMode(mode: *mut c_uint);

    ? graphs: Graphs, "For graphs; since CUDA 11.4." {
        cuStreamBeginCapture_v2(stream: Stream, mode: c_uint);
        cuStreamEndCapture(stream: Stream, graph: *mut Graph);
        cuGraphInstantiateWithFlags(executable: *mut GraphExec, graph: Graph, flags: c_ulonglong);
        cuGraphLaunch(executable: GraphExec, stream: Stream);
        cuGraphDestroy(graph: Graph);
        cuGraphExecDestroy(executable: GraphExec);
    }
}

/// `CUmemcpyAttributes`, of copies that all read their sources in the stream's order and say
/// nothing of where memory is.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
pub(super) struct CopyAttributes {
    source_order: c_uint,
    source_and_target: [[c_int; 2]; 2],
    flags: c_uint,
}

/// `CU_MEMCPY_SRC_ACCESS_ORDER_STREAM`.
const STREAM_ORDER: c_uint = 1;

/// `cuMemcpyBatchAsync` as it came with CUDA 12.8, which tells at which copy it failed.
type FirstBatch = unsafe extern "C" fn(
    *mut Address,
    *mut Address,
    *mut usize,
    usize,
    *mut CopyAttributes,
    *mut usize,
    usize,
    *mut usize,
    Stream,
) -> Code;

/// As it is since CUDA 13.0.
type SecondBatch = unsafe extern "C" fn(
    *const Address,
    *const Address,
    *const usize,
    usize,
    *mut CopyAttributes,
    *mut usize,
    usize,
    Stream,
) -> Code;

/// The entry point for many copies at once.
#[derive(Debug, Clone, Copy)]
pub(super) enum BatchCopy {
    First(FirstBatch),
    Second(SecondBatch),
}

impl BatchCopy {
    /// The variant is that of the version which is asked for, whatever the driver has besides.
    fn find(driver: &Driver) -> Option<Self> {
        type GetProcAddress =
            unsafe extern "C" fn(*const c_char, *mut *mut c_void, c_int, u64, *mut c_uint) -> Code;
        const FIRST: c_int = 12080;
        const SECOND: c_int = 13000;
        let version = match driver.version_number()? {
            SECOND.. => SECOND,
            FIRST.. => FIRST,
            _ => return None,
        };
        // SAFETY: the signature is that of the driver's documentation.
        let find =
            unsafe { driver._library.get::<GetProcAddress>(b"cuGetProcAddress_v2\0") }.ok()?;
        let (mut address, mut status) = (std::ptr::null_mut(), 0);
        let name = c"cuMemcpyBatchAsync".as_ptr();
        // SAFETY: the name ends with a zero; both are places for answers.
        let code = unsafe { find(name, &raw mut address, version, 0, &raw mut status) };
        if code != code::SUCCESS || address.is_null() {
            return None;
        }
        Some(if version == SECOND {
            // SAFETY: the signature is that of this version's documentation.
            Self::Second(unsafe { std::mem::transmute::<*mut c_void, SecondBatch>(address) })
        } else {
            // SAFETY: as above.
            Self::First(unsafe { std::mem::transmute::<*mut c_void, FirstBatch>(address) })
        })
    }

    /// Enqueues the copies, whose order among themselves is open. None of them is empty, and there
    /// is at least one.
    ///
    /// # Safety
    /// Sources and targets are memory that the driver knows, as long as said, and kept until the
    /// copies are done.
    pub(super) unsafe fn copy(
        self,
        targets: &mut [Address],
        sources: &mut [Address],
        lens: &mut [usize],
        stream: Stream,
    ) -> Code {
        let mut attributes =
            CopyAttributes { source_order: STREAM_ORDER, source_and_target: [[0; 2]; 2], flags: 0 };
        let (mut first, mut failed, count) = (0, 0, targets.len());
        assert!(sources.len() == count && lens.len() == count, "a length for each copy");
        match self {
            // SAFETY: `count` of each, and one group of attributes from the first copy on; the rest
            // is promised by the caller.
            Self::First(copy) => unsafe {
                copy(
                    targets.as_mut_ptr(),
                    sources.as_mut_ptr(),
                    lens.as_mut_ptr(),
                    count,
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    &raw mut failed,
                    stream,
                )
            },
            // SAFETY: as above.
            Self::Second(copy) => unsafe {
                copy(
                    targets.as_ptr(),
                    sources.as_ptr(),
                    lens.as_ptr(),
                    count,
                    &raw mut attributes,
                    &raw mut first,
                    1,
                    stream,
                )
            },
        }
    }
}

/// Codes that mean something to us.
pub(super) mod code {
    use super::Code;

    pub(in super::super) const SUCCESS: Code = 0;
    pub(in super::super) const INVALID_VALUE: Code = 1;
    pub(in super::super) const OUT_OF_MEMORY: Code = 2;
    pub(in super::super) const STUB_LIBRARY: Code = 34;
    pub(in super::super) const NO_DEVICE: Code = 100;
    pub(in super::super) const INVALID_DEVICE: Code = 101;
    pub(in super::super) const NO_BINARY_FOR_GPU: Code = 209;
    pub(in super::super) const INVALID_PTX: Code = 218;
    pub(in super::super) const UNSUPPORTED_PTX_VERSION: Code = 222;
    pub(in super::super) const INVALID_HANDLE: Code = 400;
    pub(in super::super) const NOT_READY: Code = 600;
    pub(in super::super) const NOT_PERMITTED: Code = 800;
    pub(in super::super) const NOT_SUPPORTED: Code = 801;
    pub(in super::super) const SYSTEM_DRIVER_MISMATCH: Code = 803;
    /// The first and the last of those about captures.
    pub(in super::super) const CAPTURE_UNSUPPORTED: Code = 900;
    pub(in super::super) const CAPTURE_WRONG_THREAD: Code = 908;
}

impl Driver {
    /// The driver of this process, initialised. Asked for once; the answer stays.
    ///
    /// # Errors
    /// [`Error::NoDevice`] says what is missing.
    pub(super) fn get() -> Result<&'static Self> {
        static DRIVER: OnceLock<Result<Driver>> = OnceLock::new();
        let driver = DRIVER.get_or_init(Self::load).as_ref().map_err(Error::clone)?;
        if driver.process.is_gone() {
            return Err(Error::NoDevice {
                wanted: "cuda".to_owned(),
                reason: "CUDA was in use when this process was forked".to_owned(),
                remedy: "fork before the first use of CUDA, or start a new program".to_owned(),
            });
        }
        Ok(driver)
    }

    fn load() -> Result<Self> {
        let names: &[&str] = if cfg!(windows) {
            &["nvcuda.dll"]
        } else {
            // The first is the driver's own; the second is found where only a link was installed.
            &["libcuda.so.1", "libcuda.so"]
        };
        let missing = |reason: String, remedy: &str| Error::NoDevice {
            wanted: "cuda".to_owned(),
            reason,
            remedy: remedy.to_owned(),
        };
        // SAFETY: the driver's library runs no more than its own initialisers.
        let open = |name: &str| unsafe { libloading::Library::new(name) };
        let library = open(names[0]).or_else(|error| {
            let other = names[1..].iter().find_map(|name| open(name).ok());
            other.ok_or_else(|| {
                let text = error.to_string();
                // What is there may be broken, or lack another library, which is then named.
                let absent = text.contains(names[0]) && text.contains("No such file");
                let reason = if absent || !cfg!(target_os = "linux") {
                    format!("no CUDA driver ({} not found)", names[0])
                } else {
                    format!("the CUDA driver cannot be loaded: {text}")
                };
                missing(reason, "install the NVIDIA driver, or use another device")
            })
        })?;
        let mut driver = Self::resolve(library).map_err(|problem| {
            missing(format!("the CUDA driver is too old: {problem}"), "update the NVIDIA driver")
        })?;
        driver.batch = BatchCopy::find(&driver);
        // SAFETY: flags must be 0.
        match unsafe { (driver.cuInit)(0) } {
            code::SUCCESS => Ok(driver),
            code::NO_DEVICE | code::INVALID_DEVICE => Err(missing(
                "the CUDA driver finds no GPU".to_owned(),
                "look at nvidia-smi and CUDA_VISIBLE_DEVICES",
            )),
            code::STUB_LIBRARY => Err(missing(
                "the library found is the toolkit's stub, not the driver's".to_owned(),
                "take the toolkit's stubs folder out of the library path",
            )),
            code::SYSTEM_DRIVER_MISMATCH => Err(missing(
                "the CUDA driver's library and its kernel module differ".to_owned(),
                "restart the machine after a driver update, or reinstall the driver",
            )),
            other => Err(missing(
                format!("the CUDA driver does not start: {}", driver.text(other)),
                "look at nvidia-smi and the system's log",
            )),
        }
    }

    /// A code in words.
    pub(super) fn text(&self, code: Code) -> String {
        let ask = |entry: unsafe extern "C" fn(Code, *mut *const c_char) -> Code| {
            let mut text: *const c_char = std::ptr::null();
            // SAFETY: `text` is a place for the answer.
            if unsafe { entry(code, &raw mut text) } != code::SUCCESS || text.is_null() {
                return None;
            }
            // SAFETY: the driver's texts end with a zero and live for ever.
            Some(unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
        };
        match (ask(self.cuGetErrorName), ask(self.cuGetErrorString)) {
            (Some(name), Some(text)) => format!("{name} ({code}): {text}"),
            (Some(name), None) => format!("{name} ({code})"),
            _ => format!("CUDA error {code}"),
        }
    }

    /// The error that a call ended with, as a cause, with what to do about it.
    pub(super) fn cause(&self, code: Code) -> Arc<DriverError> {
        let remedy = match code {
            code::OUT_OF_MEMORY => {
                "; see with nvidia-smi who holds memory, or make batches or limits smaller"
            }
            code::UNSUPPORTED_PTX_VERSION => "; update the NVIDIA driver",
            code::INVALID_PTX | code::NO_BINARY_FOR_GPU => "; load without converting, or use wgpu",
            _ => "",
        };
        Arc::new(DriverError(self.text(code) + remedy))
    }

    /// The CUDA version that the driver supports, as `major.minor`.
    pub(super) fn version(&self) -> String {
        let text = |version| format!("CUDA {}.{}", version / 1000, version % 1000 / 10);
        self.version_number().map(text).unwrap_or_default()
    }

    /// It as 1000 times the major and ten times the minor version.
    fn version_number(&self) -> Option<c_int> {
        let mut version: c_int = 0;
        // SAFETY: `version` is a place for the answer.
        let code = unsafe { (self.cuDriverGetVersion)(&raw mut version) };
        (code == code::SUCCESS).then_some(version)
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Driver")
    }
}

/// What the driver answered, in its own words.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct DriverError(String);

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn what_an_older_driver_lacks_is_left_out_or_named() {
        // SAFETY: it is loaded already.
        let library = unsafe { libloading::Library::new("libc.so.6") }.unwrap();
        assert!(Graphs::resolve(&library).is_err());
        assert_eq!(Driver::resolve(library).err().unwrap(), "its library lacks cuInit");
    }
}
