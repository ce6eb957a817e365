//! What a stranger sees where something is missing: one line that says what, where, and what to do.
//! The driver is asked once in a process, so drivers that don't start are met in processes of their
//! own.

use std::path::Path;

use batchline::{
    AsyncDataLoader, Conversion, DType, Device, DeviceKind, Error, Found, MemoryLimits,
    MemoryManager, StagingBufferPool,
};
use fake_cuda::{When, codes, without};

use crate::{
    Gpu, assert_clean, builder, expected, gpu_is_required, no_kernels, numbers, pretended,
    run_child, say, start, task,
};

/// The one line of an error.
fn line(error: &Error) -> String {
    let line = error.chain();
    assert!(!line.contains('\n'), "{line:?}");
    line
}

/// What is said where there is no driver, in each of the ways to meet it.
fn no_driver() -> String {
    let missing = line(&Device::cuda(0).unwrap_err());
    assert!(
        matches!(Device::list().first(), Some(Found::Missing(error)) if line(error) == missing)
    );
    assert_eq!(line(&Device::cuda(0).unwrap_err()), missing, "asked again");
    missing
}

#[test]
fn devices_that_are_not_there() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("");
    let error = Device::cuda(99).unwrap_err().to_string();
    assert!(error.starts_with("no cuda:99 device: the CUDA driver shows "), "{error}");
    assert!(matches!(gpu.device().kind(), DeviceKind::Cuda));
}

#[test]
fn drivers_that_do_not_start() {
    if gpu_is_required() {
        return;
    }
    const NO_GPU: &str =
        "the CUDA driver finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
    let cases = [
        // As with an empty CUDA_VISIBLE_DEVICES.
        ("devices=0", NO_GPU),
        ("init=100", NO_GPU),
        ("init=101", NO_GPU),
        (
            "init=34",
            "the library found is the toolkit's stub, not the driver's; take the toolkit's stubs \
             folder out of the library path",
        ),
        (
            "init=803",
            "the CUDA driver's library and its kernel module differ; restart the machine after a \
             driver update, or reinstall the driver",
        ),
        (
            "init=999",
            "the CUDA driver does not start: CUDA_ERROR_UNKNOWN (999): unknown error; look at \
             nvidia-smi and the system's log",
        ),
        (
            "init=12345",
            "the CUDA driver does not start: CUDA error 12345; look at nvidia-smi and the system's \
             log",
        ),
    ];
    match task() {
        Some(settings) => {
            let _fake = start(&settings);
            let (_, said) = cases.iter().find(|(known, _)| *known == settings).unwrap();
            assert_eq!(no_driver(), format!("no cuda device: {said}"));
        }
        None => cases.iter().for_each(|(settings, _)| {
            run_child("missing::drivers_that_do_not_start", settings, None);
        }),
    }
}

/// Drivers in a folder of their own, which the process is told to look into first.
#[test]
#[cfg(target_os = "linux")]
fn drivers_that_cannot_be_used() {
    if gpu_is_required() {
        return;
    }
    let Some(task) = task() else {
        let folder = tempfile::tempdir().unwrap();
        for case in ["absent", "broken", "cuMemHostRegister_v2", "cuInit"] {
            let folder = folder.path().join(case);
            std::fs::create_dir(&folder).unwrap();
            match case {
                "absent" => {}
                "broken" => std::fs::write(folder.join("libcuda.so.1"), "no library").unwrap(),
                symbol => without(&[symbol], &folder).unwrap(),
            }
            run_child("missing::drivers_that_cannot_be_used", case, Some(&folder));
        }
        return;
    };
    if task == "absent" && is_there("libcuda.so.1") {
        say("skipped: a driver is installed");
        return;
    }
    let said = no_driver();
    let expected = match &*task {
        "absent" => {
            "no CUDA driver (libcuda.so.1 not found); install the NVIDIA driver, or use another \
             device"
        }
        "broken" => {
            // The folder and the system's words are between.
            let end =
                "libcuda.so.1: file too short; install the NVIDIA driver, or use another device";
            let start = "no cuda device: the CUDA driver cannot be loaded: ";
            assert!(said.starts_with(start) && said.ends_with(end), "{said}");
            return;
        }
        symbol => &format!(
            "the CUDA driver is too old: its library lacks {symbol}; update the NVIDIA driver"
        ),
    };
    assert_eq!(said, format!("no cuda device: {expected}"));
}

/// Whether the system has a library of this name somewhere.
fn is_there(name: &str) -> bool {
    let folders =
        ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib"];
    folders.iter().any(|folder| Path::new(folder).join(name).exists())
}

/// The driver starts, and the device can't be opened: a process has it for itself, or its memory.
#[test]
fn devices_that_do_not_open() {
    for (symbol, code, said) in [
        (
            "cuDevicePrimaryCtxRetain",
            codes::DEVICE_UNAVAILABLE,
            "no cuda:0 device: opening it failed: CUDA_ERROR_DEVICE_UNAVAILABLE (46): CUDA-capable \
             device(s) is/are busy or unavailable; look at nvidia-smi: another process may hold the \
             device or its memory",
        ),
        (
            "cuDevicePrimaryCtxRetain",
            codes::INVALID_DEVICE,
            "no cuda:0 device: opening it failed: CUDA_ERROR_INVALID_DEVICE (101): invalid device \
             ordinal; look at nvidia-smi: another process may hold the device or its memory",
        ),
        (
            "cuDevicePrimaryCtxRetain",
            codes::OUT_OF_MEMORY,
            "no cuda:0 device: opening it failed: CUDA_ERROR_OUT_OF_MEMORY (2): out of memory; look \
             at nvidia-smi: another process may hold the device or its memory",
        ),
        (
            "cuStreamCreateWithPriority",
            codes::OUT_OF_MEMORY,
            "cuda:0: Fake GPU 0: creating a stream failed: CUDA_ERROR_OUT_OF_MEMORY (2): out of \
             memory; see with nvidia-smi who holds memory, or make batches or limits smaller",
        ),
        (
            "cuDeviceGetCount",
            codes::UNKNOWN,
            "no cuda device: counting the GPUs failed: CUDA_ERROR_UNKNOWN (999): unknown error; \
             look at nvidia-smi: another process may hold the device or its memory",
        ),
    ] {
        let Some(fake) = pretended("") else { return };
        fake.fail(Some(symbol), 1, code, When::Before);
        assert_eq!(line(&Device::cuda(0).unwrap_err()), said);
        // It is no sentence for ever.
        drop(Device::cuda(0).unwrap());
        assert_clean(&fake, symbol);
    }
}

/// All of a small stream, with or without a conversion.
fn load(memory: &MemoryManager, convert: bool) -> Result<(), Error> {
    let mut config = builder(memory);
    if convert {
        config = config.convert(DType::F32, Conversion::new());
    }
    let loader = AsyncDataLoader::new(numbers(20), config.build()?)?;
    loader.start()?;
    let mut number = 0;
    while let Some(batch) = loader.get_batch()? {
        let read = if convert {
            batch.input_tensor().to_vec::<f32>()?
        } else {
            batch.input_tensor().to_vec::<u8>()?.into_iter().map(f32::from).collect()
        };
        assert!(read.into_iter().eq(expected(number).into_iter().map(f32::from)));
        number += 1;
    }
    assert_eq!(number, 5);
    loader.stop()
}

/// Device memory and page-locked memory that is not there: at the start of a loader, and in the
/// middle of something. What there is goes on.
#[test]
fn memory_that_is_not_there() {
    let Some(fake) = pretended("memory_mib=1") else { return };
    let memory = MemoryManager::new(&Device::cuda(0).unwrap());
    const NONE: &str = "cuda:0: Fake GPU 0: allocating device memory failed: \
        CUDA_ERROR_OUT_OF_MEMORY (2): out of memory; see with nvidia-smi who holds memory, or make \
        batches or limits smaller";
    let tensor = |kib: u64| memory.tensor(&[kib << 10], DType::U8);
    let held = tensor(600).unwrap();
    assert_eq!(line(&tensor(600).unwrap_err()), NONE);
    held.write(&vec![7u8; 600 << 10]).unwrap();
    assert!(held.to_bytes().unwrap().iter().all(|byte| *byte == 7));
    let config = builder(&memory).prefetch_depth(64).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(20), config).unwrap();
    assert_eq!(line(&loader.start().unwrap_err()), NONE);
    drop((loader, held));
    // What was kept to be used again makes room for something larger.
    assert!(memory.stats().device_cached >= 600 << 10);
    drop(tensor(900).unwrap());
    load(&memory, true).unwrap();
    // Page-locked memory is neither registered nor allocated.
    let pool = StagingBufferPool::with_buffer_size(&memory, 2, 12_345).unwrap();
    for symbol in ["cuMemHostRegister_v2", "cuMemHostAlloc"] {
        fake.fail(Some(symbol), 1, codes::OUT_OF_MEMORY, When::Before);
    }
    // What was kept is given back, and it is tried again.
    drop(pool.get_buffer().unwrap());
    memory.trim();
    let first = pool.get_buffer().unwrap();
    for symbol in ["cuMemHostRegister_v2", "cuMemHostAlloc"] {
        fake.fail(Some(symbol), 1, codes::OUT_OF_MEMORY, When::Before);
    }
    let second = pool.get_buffer().unwrap_err();
    assert_eq!(line(&second), NONE.replace("device memory", "page-locked memory"));
    drop(first);
    load(&memory, true).unwrap();
    drop((pool, memory));
    assert_clean(&fake, "after there was no memory");
}

/// Where pages can't be locked, as in confidential computing, the driver's own memory does as well.
#[test]
fn pages_that_are_not_locked() {
    for refusal in
        ["attribute=99:0", "fail=cuMemHostRegister_v2:1:800", "fail=cuMemHostRegister_v2:1:712"]
    {
        let Some(fake) = pretended(refusal) else { return };
        let memory = MemoryManager::new(&Device::cuda(0).unwrap());
        let buffer = StagingBufferPool::new(&memory, 1).unwrap().get_buffer().unwrap();
        let live = fake.live();
        assert_eq!((live.page_locked_memory, live.registered_memory), (1, 0), "{refusal}");
        drop(buffer);
        load(&memory, true).unwrap();
        drop(memory);
        assert_clean(&fake, refusal);
    }
}

/// The driver does not take the kernels: only what needs them fails, whenever it is asked for.
#[test]
fn kernels_that_are_not_taken() {
    let too_old = "CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222): the provided PTX was compiled with an \
        unsupported toolchain; update the NVIDIA driver";
    let other = "CUDA_ERROR_INVALID_PTX (218): a PTX JIT compilation failed; load without \
        converting, or use wgpu";
    let none = "CUDA_ERROR_NO_BINARY_FOR_GPU (209): no kernel image is available for execution on \
        the device; load without converting, or use wgpu";
    for (settings, said) in [
        ("version=9000", too_old),
        ("fail=cuModuleLoadData:1:218,fail=cuModuleLoadData:2:218", other),
        ("fail=cuModuleLoadData:1:209,fail=cuModuleLoadData:2:209", none),
    ] {
        let Some(fake) = pretended(settings) else { return };
        let memory = MemoryManager::with_limits(&Device::cuda(0).unwrap(), MemoryLimits::default());
        let operation = "cuda:0: Fake GPU 0: loading the kernels (they need compute capability 7.0) \
            failed";
        let tensor = memory.upload(&[1u8, 2, 3], &[3]).unwrap();
        let error = tensor.convert_to(DType::F32).unwrap_err();
        assert_eq!(line(&error), format!("{operation}: {said}"));
        load(&memory, false).unwrap();
        if settings.starts_with("version") {
            let error = line(&load(&memory, true).unwrap_err());
            assert!(
                error.ends_with(&format!(" batch 0 of epoch 0: {operation}: {said}")),
                "{error}"
            );
        } else {
            load(&memory, true).unwrap();
        }
        drop((tensor, memory));
        assert_clean(&fake, settings);
    }
}
