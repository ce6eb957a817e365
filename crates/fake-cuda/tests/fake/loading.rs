//! How programs come by the fake, and what it says of itself.
#![allow(unsafe_code, reason = "loads a C library")]

use std::ffi::{CStr, CString, c_char};
use std::path::Path;
use std::process::Command;

use fake_cuda::codes::*;
use fake_cuda::{Fake, folder, without};
use libloading::Library;

use crate::cuda::{Cuda, PTX, made};

type Ask = unsafe extern "C" fn(*mut i32) -> u32;
type Init = unsafe extern "C" fn(u32) -> u32;

#[test]
fn who_asks_for_the_driver_gets_the_fake_that_was_started() {
    let fake = Fake::start("version=12040");
    // SAFETY: this is the library that is loaded already.
    let library = unsafe { Library::new("libcuda.so.1") }.unwrap();
    // SAFETY: the driver's signature.
    let ask = unsafe { library.get::<Ask>(b"cuDriverGetVersion") }.unwrap();
    let mut version = 0;
    // SAFETY: a place for the answer.
    assert_eq!(unsafe { ask(&raw mut version) }, 0);
    assert_eq!(version, 12040);
    assert_eq!(fake.calls(Some("cuDriverGetVersion")), 1);
}

#[test]
fn another_program_gets_it_by_the_folder_and_its_settings_by_the_environment() {
    for name in ["libcuda.so.1", "libcuda.so"] {
        let own = std::env::current_exe().unwrap();
        let output = Command::new(own)
            .args(["--exact", "loading::as_another_program", "--nocapture"])
            .env("LD_LIBRARY_PATH", folder())
            .env("FAKE_CUDA", "devices=3,init=0")
            .env("FAKE_CUDA_TEST_LIBRARY", name)
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.contains("3 devices"), "{name}: {output}");
    }
}

/// Run by the test above.
#[test]
fn as_another_program() {
    let Ok(name) = std::env::var("FAKE_CUDA_TEST_LIBRARY") else { return };
    // SAFETY: the fake, by its environment.
    let library = unsafe { Library::new(name) }.unwrap();
    // SAFETY: the driver's signature.
    let init = unsafe { library.get::<Init>(b"cuInit") }.unwrap();
    // SAFETY: the driver's signature.
    let ask = unsafe { library.get::<Ask>(b"cuDeviceGetCount") }.unwrap();
    let mut count = 0;
    // SAFETY: no flags.
    assert_eq!(unsafe { init(0) }, 0);
    // SAFETY: a place for the answer.
    assert_eq!(unsafe { ask(&raw mut count) }, 0);
    println!("{count} devices");
}

#[test]
fn a_copy_lacks_the_symbols_that_it_is_to_lack() {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("lacking");
    std::fs::create_dir_all(&folder).unwrap();
    without(&["cuMemAlloc_v2", "cuInit"], &folder).unwrap();
    // SAFETY: the library's initialisers are Rust's.
    let library = unsafe { Library::new(folder.join("libcuda.so.1")) }.unwrap();
    for (symbol, there) in [
        ("cuInit", false),
        ("cuMemAlloc_v2", false),
        ("cuMemFree_v2", true),
        ("cuGetErrorName", true),
    ] {
        // SAFETY: it is only looked for.
        let found = unsafe { library.get::<Init>(symbol.as_bytes()) };
        assert_eq!(found.is_ok(), there, "{symbol}");
    }
}

#[test]
fn nobody_gets_it_by_accident() {
    // Cargo has LD_LIBRARY_PATH point to where it builds, for all that it runs.
    let deps = std::env::current_exe().unwrap().parent().unwrap().to_owned();
    assert!(deps.join("libfake_cuda.so").exists());
    for folder in [deps.as_path(), deps.parent().unwrap()] {
        for name in ["libcuda.so", "libcuda.so.1"] {
            assert!(!folder.join(name).exists());
        }
    }
}

#[test]
fn there_may_be_no_device_or_no_driver_that_works() {
    let init = |settings: &str| {
        let cuda = Cuda { fake: Fake::start(settings) };
        cuda.cuInit(0)
    };
    assert_eq!(init("devices=0"), NO_DEVICE);
    assert_eq!(init("init=803"), SYSTEM_DRIVER_MISMATCH);
    assert_eq!(init(""), 0);
    let cuda = Cuda { fake: Fake::start("devices=0") };
    assert_eq!(cuda.cuDeviceGetCount(&mut 0), NOT_INITIALIZED);
}

#[test]
fn settings_that_are_none_are_refused() {
    for wrong in ["latency", "latency_us=soon", "colour=1", "no_batch=2", "fail=cuInit:1"] {
        let start = || drop(Fake::start(wrong));
        assert!(std::panic::catch_unwind(start).is_err(), "{wrong}");
    }
    let fake = Fake::start("fail=cuDriverGetVersion:2:999:after,latency_us=1,random_latency_us=2");
    let cuda = Cuda { fake };
    assert_eq!(cuda.cuDriverGetVersion(&mut 0), 0);
    assert_eq!(cuda.cuDriverGetVersion(&mut 0), UNKNOWN);
}

#[test]
fn devices_have_names_and_properties() {
    let cuda = Cuda::new("devices=2,attribute=75:8");
    assert_eq!(made(|count| cuda.cuDeviceGetCount(count)), 2);
    assert_eq!(cuda.cuDeviceGet(&mut 0, 2), INVALID_DEVICE);
    let text = |text: &[u8]| CStr::from_bytes_until_nul(text).unwrap().to_str().unwrap().to_owned();
    let mut room = [1; 32];
    assert_eq!(cuda.cuDeviceGetName(room.as_mut_ptr(), 32, 1), 0);
    assert_eq!(text(&room), "Fake GPU 1");
    assert_eq!(cuda.cuDeviceGetName(room.as_mut_ptr(), 5, 1), 0);
    assert_eq!(text(&room), "Fake");
    assert_eq!(cuda.cuDeviceGetPCIBusId(room.as_mut_ptr(), 32, 1), 0);
    assert_eq!(text(&room), "0000:02:00.0");
    let uuid = |device| made(|uuid| cuda.cuDeviceGetUuid_v2(uuid, device));
    assert_ne!(uuid(0), uuid(1));
    assert_eq!(made(|bytes| cuda.cuDeviceTotalMem_v2(bytes, 0)), 1 << 30);
    let attribute = |number| made(|value| cuda.cuDeviceGetAttribute(value, number, 1));
    assert_eq!((attribute(1), attribute(33), attribute(75), attribute(18)), (1024, 2, 8, 0));
    let text = made(|text| cuda.cuGetErrorString(OUT_OF_MEMORY, text));
    // SAFETY: the driver's texts end with a zero.
    assert_eq!(unsafe { CStr::from_ptr(text) }.to_str().unwrap(), "out of memory");
    assert_eq!(cuda.cuGetErrorName(12345, &mut std::ptr::null()), INVALID_VALUE);
}

#[test]
fn addresses_tell_what_they_are() {
    let cuda = Cuda::new("attribute=99:0");
    let (device, host) = (cuda.device(64), cuda.host(&[0; 64]));
    let number = |attribute, address: u64| {
        let mut value = 0usize;
        let result = cuda.cuPointerGetAttribute((&raw mut value).cast(), attribute, address);
        (result, value)
    };
    assert_eq!(number(2, device + 63), (0, 2));
    assert_eq!(number(2, host as u64), (0, 1));
    assert_eq!(number(11, device + 5), (0, usize::try_from(device).unwrap()));
    assert_eq!(number(12, device + 5), (0, 64));
    assert_eq!(number(2, device + 64).0, INVALID_VALUE);
    assert_eq!(made(|to| cuda.cuMemHostGetDevicePointer_v2(to, host, 0)), host as u64);
    // Where devices can't register, as with confidential computing.
    assert_eq!(cuda.cuMemHostRegister_v2([0u8; 4].as_mut_ptr(), 4, 1), NOT_SUPPORTED);
}

/// Whether a name is found, or why not, for a program of this version.
fn find(cuda: &Cuda, name: &str, version: i32) -> Result<usize, u32> {
    let name = CString::new(name).unwrap();
    let (mut address, mut status) = (0, 0);
    let (to, why) = (&raw mut address, &raw mut status);
    assert_eq!(cuda.cuGetProcAddress_v2(name.as_ptr(), to, version, 0, why), 0);
    if address == 0 { Err(status) } else { Ok(address) }
}

#[test]
fn symbols_are_found_by_name_and_version() {
    fn address(cuda: &Cuda, name: &str) -> usize {
        cuda.fake.symbol(name)
    }
    let cuda = Cuda::without_context("");
    let own = |name: &str| Ok(address(&cuda, name));
    assert_eq!(find(&cuda, "cuMemAlloc", 12020), own("cuMemAlloc_v2"));
    assert_eq!(find(&cuda, "cuMemAlloc_v2", 12020), Err(1));
    assert_eq!(find(&cuda, "cuMemcpyBatchAsync", 12020), Err(2));
    assert_eq!(find(&cuda, "cuMemcpyBatchAsync", 12080), own("cuMemcpyBatchAsync"));
    assert_eq!(find(&cuda, "cuMemcpyBatchAsync", 13000), own("cuMemcpyBatchAsync_v2"));
    assert_eq!(find(&cuda, "cuMemcpyBatchAsync_v2", 13000), Err(1));
    assert_eq!(find(&cuda, "cuGetProcAddress", 12000), own("cuGetProcAddress_v2"));
    drop(cuda);
    let cuda = Cuda::without_context("version=12080");
    assert_eq!(find(&cuda, "cuMemcpyBatchAsync", 13000), Ok(address(&cuda, "cuMemcpyBatchAsync")));
    drop(cuda);
    let cuda = Cuda::without_context("version=12020");
    assert_eq!(find(&cuda, "cuMemcpyBatchAsync", 13000), Err(2));
    drop(cuda);
    let cuda = Cuda::without_context("no_batch=1,missing=cuMemAlloc_v2");
    assert_eq!(find(&cuda, "cuMemcpyBatchAsync", 13000), Err(1));
    drop(cuda);
    let cuda = Cuda::without_context("missing=cuMemAlloc_v2");
    assert_eq!(find(&cuda, "cuMemAlloc", 13000), Err(1));
    let (name, mut at) = (CString::new("cuMemAlloc").unwrap(), 0);
    let nowhere = std::ptr::null_mut();
    let found = cuda.cuGetProcAddress_v2(name.as_ptr(), &raw mut at, 13000, 0, nowhere);
    assert_eq!(found, NOT_FOUND);
}

#[test]
fn what_the_driver_lacks_is_not_to_be_called() {
    let cuda = Cuda::new("no_batch=1");
    let stream = cuda.stream();
    let (none, attributes) = (std::ptr::null(), std::ptr::null());
    let result = cuda.cuMemcpyBatchAsync_v2(
        none,
        none,
        std::ptr::null(),
        0,
        attributes,
        std::ptr::null(),
        0,
        stream,
    );
    assert_eq!(result, NOT_SUPPORTED);
    cuda.violated("cuMemcpyBatchAsync_v2");
}

#[test]
fn modules_that_are_none_are_refused() {
    let cuda = Cuda::new("version=12020");
    let load = |text: &str| {
        let text = CString::new(text).unwrap();
        cuda.cuModuleLoadData(&mut 0, text.as_ptr())
    };
    assert_eq!(load(PTX), 0);
    assert_eq!(load(&PTX.replace("7.0", "8.3")), UNSUPPORTED_PTX_VERSION);
    assert_eq!(load(&PTX.replace(".target", "")), INVALID_PTX);
    assert_eq!(load("something else"), INVALID_IMAGE);
    let text = CString::new(PTX).unwrap();
    let module = made(|module| cuda.cuModuleLoadData(module, text.as_ptr()));
    let unknown: *const c_char = c"unknown".as_ptr();
    assert_eq!(cuda.cuModuleGetFunction(&mut 0, module, unknown), NOT_FOUND);
    assert_eq!(cuda.cuModuleUnload(module), 0);
    assert_eq!(cuda.cuModuleUnload(module), INVALID_HANDLE);
}
