//! Exports of tensors on a CUDA device: which stream waits for what, and when memory is used again.
#![allow(unsafe_code, reason = "gives exports to a C program")]

use std::time::{Duration, Instant};

use batchline::backend::Custom;
use batchline::dlpack::{DL_CUDA, DlpackStream};
use batchline::{
    AsyncDataLoader, CommandBufferPool, CudaCustom, CudaStream, DType, Device, Error, GpuBatch,
    MemoryManager, Submission, Tensor,
};
use dlpack_consumer::Taken;
use fake_cuda::{Fake, Live, codes};

use super::driver::{Driver, Gate};
use super::{Gpu, WIDTH, builder, eventually, expected, in_a_child, no_kernels, numbers};

/// Whether there is nothing to test with.
fn skipped() -> bool {
    let no_program = !dlpack_consumer::BUILT;
    if no_program {
        let line = b"skipped: no C compiler to make a program with\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
    }
    no_program || no_kernels()
}

/// Exports a tensor to the program.
fn export(tensor: &Tensor, stream: DlpackStream) -> Taken {
    let raw = tensor.to_dlpack(stream).unwrap().into_raw();
    // SAFETY: just given out.
    unsafe { Taken::new(raw.cast(), false) }
}

/// Calls deleters in a thread that knows nothing of CUDA.
fn drop_elsewhere(taken: impl Send) {
    std::thread::scope(|scope| scope.spawn(move || drop(taken)).join().unwrap());
}

/// The stream with this number.
fn numbered(number: Option<i64>) -> DlpackStream {
    // SAFETY: only of the default streams, which there always are.
    unsafe { DlpackStream::from_number(number) }.unwrap()
}

/// The handle of a default stream.
fn default_stream(handle: usize) -> CudaStream {
    // SAFETY: there always is one.
    unsafe { CudaStream::from_raw(std::ptr::without_provenance_mut(handle)) }
}

/// Has the stream of fills and own work wait until the gate is opened.
fn hold_fills(memory: &MemoryManager, target: &Tensor) -> (Gate, Submission) {
    let commands = CommandBufferPool::new(memory, 1).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let (send, gate) = std::sync::mpsc::channel();
    let work = move |custom: CudaCustom| {
        let _ = send.send(Driver::load().hold(custom.stream));
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[target]).unwrap();
    buffer.fill(target, 7u8).unwrap();
    let submission = buffer.execute().unwrap();
    (gate.recv().unwrap(), submission)
}

/// Enqueues a copy of the elements, as the program's own work.
fn read(driver: &Driver, stream: CudaStream, taken: &Taken, len: usize) -> &'static [u8] {
    let bytes = driver.page_locked(len);
    bytes.fill(0xEE);
    driver.read(stream, taken.seen().data.addr() as u64, bytes);
    bytes
}

#[test]
fn what_the_program_sees() {
    if skipped() {
        return;
    }
    let gpu = Gpu::new("");
    let memory = MemoryManager::new(&gpu.device());
    let tensor = memory.upload(&[1i16; 6], &[3, 2]).unwrap();
    let device = tensor.dlpack_device().unwrap();
    assert_eq!((device.device_type, device.device_id), (DL_CUDA, 0));
    let taken = export(&tensor, DlpackStream::Unspecified);
    let seen = taken.seen();
    assert_eq!((seen.version, seen.flags, seen.device), ([1, 3], 1, [DL_CUDA, 0]));
    assert_eq!((seen.code, seen.bits, seen.ndim), (0, 16, 2));
    assert_eq!((&seen.shape[..2], &seen.strides[..2]), (&[3, 2][..], &[2, 1][..]));
    assert_eq!((seen.data.addr() % 256, seen.byte_offset), (0, 0));
    assert_eq!(seen.data.addr() as u64, tensor.bind(&default_stream(0)).unwrap().address);
    let none = memory.tensor(&[4, 0], DType::F16).unwrap();
    assert!(export(&none, DlpackStream::Unspecified).seen().data.is_null());
}

/// Two devices, each export with the number of its own.
#[test]
fn an_export_names_its_device() {
    if skipped() || std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some() {
        return;
    }
    let fake = Fake::start("devices=2,pageable=1");
    let tensors: Vec<Tensor> = (0..2)
        .map(|ordinal| {
            let memory = MemoryManager::new(&Device::cuda(ordinal).unwrap());
            memory.upload(&[1u8; 16], &[16]).unwrap()
        })
        .collect();
    let taken: Vec<Taken> =
        tensors.iter().map(|tensor| export(tensor, DlpackStream::Unspecified)).collect();
    assert_eq!(taken[0].seen().device, [DL_CUDA, 0]);
    assert_eq!(taken[1].seen().device, [DL_CUDA, 1]);
    drop(tensors);
    // From a thread that has no context, and from one that has the other's.
    drop_elsewhere(taken);
    eventually("the end of both", || fake.live() == Live::default());
    assert_eq!(crate::violations(&fake), [""; 0]);
}

/// A tensor whose writer is held: the program's stream waits, whichever it is, and nobody else.
#[test]
fn the_stream_of_an_export_waits_for_the_writer() {
    if skipped() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=20");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let tensor = memory.upload(&[1u8; 4096], &[4096]).unwrap();
    let own = driver.stream();
    for (stream, exported_for) in [
        (default_stream(0), numbered(None)),
        (default_stream(1), numbered(Some(1))),
        (default_stream(2), numbered(Some(2))),
        (own, DlpackStream::Cuda(own)),
    ] {
        tensor.write(&[1u8; 4096]).unwrap();
        let (gate, filled) = hold_fills(&memory, &tensor);
        let taken = export(&tensor, exported_for);
        let bytes = read(&driver, stream, &taken, 4096);
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(bytes, [0xEE; 4096], "{exported_for:?}");
        gate.open();
        assert_eq!(driver.synchronize(stream), 0);
        assert_eq!(bytes, [7; 4096], "{exported_for:?}");
        filled.wait().unwrap();
    }
    // Without synchronisation it does not: the program sees what was there.
    tensor.write(&[1u8; 4096]).unwrap();
    let (gate, filled) = hold_fills(&memory, &tensor);
    let taken = export(&tensor, numbered(Some(-1)));
    let bytes = read(&driver, own, &taken, 4096);
    assert_eq!(driver.synchronize(own), 0);
    assert_eq!(bytes, [1; 4096]);
    gate.open();
    filled.wait().unwrap();
}

/// Each batch of a loader is exported, read on a stream that is far behind, and let go of by
/// another thread. What the stream reads in the end is each batch as it was.
fn memory_is_kept_for(stream: CudaStream, export_batch: impl Fn(&GpuBatch) -> Taken) {
    let memory = MemoryManager::new(&Device::cuda(0).unwrap());
    let driver = Driver::load();
    let _context = memory.upload(&[1u8; 16], &[16]).unwrap();
    let config = builder(&memory).prefetch_depth(2).max_held(1).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(200), config).unwrap();
    loader.start().unwrap();
    let gate = driver.hold(stream);
    let mut seen = Vec::new();
    // As many as there are outputs; the next one has to wait for memory that is still read.
    for number in 0..3 {
        let batch = loader.get_batch().unwrap().unwrap();
        let taken = export_batch(&batch);
        seen.push((number, read(&driver, stream, &taken, 4 * usize::from(WIDTH))));
        drop(batch);
        drop_elsewhere(taken);
    }
    let later = loader.get_batch().unwrap().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    gate.open();
    assert_eq!(driver.synchronize(stream), 0);
    for (number, bytes) in seen {
        assert_eq!(bytes, expected(number), "batch {number}, as the stream saw it");
    }
    assert_eq!(later.input_tensor().to_bytes().unwrap(), expected(3));
    drop(later);
    for number in 4..50 {
        let batch = loader.get_batch().unwrap().unwrap();
        assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number));
    }
    assert!(loader.get_batch().unwrap().is_none());
}

#[test]
fn memory_is_written_again_behind_the_stream_of_an_export() {
    if skipped() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let _context = MemoryManager::new(&gpu.device()).upload(&[1u8; 16], &[16]).unwrap();
    let stream = Driver::load().stream();
    memory_is_kept_for(stream, |batch| export(batch.input_tensor(), DlpackStream::Cuda(stream)));
}

#[test]
fn memory_is_written_again_behind_the_default_stream() {
    if skipped() {
        return;
    }
    let _gpu = Gpu::new("random_latency_us=50");
    memory_is_kept_for(default_stream(0), |batch| {
        export(batch.input_tensor(), DlpackStream::Unspecified)
    });
}

/// In the thread that lets go of it, the handle names another stream.
#[test]
fn memory_is_written_again_behind_a_per_thread_stream() {
    if skipped() {
        return;
    }
    let _gpu = Gpu::new("random_latency_us=50");
    memory_is_kept_for(default_stream(2), |batch| export(batch.input_tensor(), numbered(Some(2))));
}

/// The stream that the device was opened for needs no order but its own.
#[test]
fn memory_is_written_again_behind_the_devices_stream() {
    if skipped() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let _context = MemoryManager::new(&gpu.device()).upload(&[1u8; 16], &[16]).unwrap();
    let driver = Driver::load();
    let stream = driver.stream();
    let memory = MemoryManager::new(&Device::cuda_for(0, stream).unwrap());
    let config = builder(&memory).prefetch_depth(2).max_held(1).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(40), config).unwrap();
    loader.start().unwrap();
    let mut seen = Vec::new();
    while let Some(batch) = loader.get_batch().unwrap() {
        let taken = export(batch.input_tensor(), DlpackStream::Unsynchronised);
        seen.push(read(&driver, stream, &taken, 4 * usize::from(WIDTH)));
    }
    assert_eq!(driver.synchronize(stream), 0);
    assert_eq!(seen.len(), 10);
    for (number, bytes) in (0..).zip(seen) {
        assert_eq!(bytes, expected(number), "batch {number}");
    }
}

/// A tensor of no batch counts for the device's stream, too.
#[test]
fn an_export_without_a_stream_is_on_the_devices_stream() {
    if skipped() {
        return;
    }
    let gpu = Gpu::new("");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let (_, stream) = device.as_cuda().unwrap();
    let tensor = memory.upload(&[1u8; 4096], &[4096]).unwrap();
    let gate = driver.hold(stream);
    let taken = export(&tensor, DlpackStream::Unsynchronised);
    let bytes = read(&driver, stream, &taken, 4096);
    drop(tensor);
    drop(taken);
    // The same memory, whose fill waits.
    let next = memory.tensor(&[4096], DType::U8).unwrap();
    assert_eq!(memory.stats().allocations, 1 + u64::from(memory.stats().staging_cached > 0));
    let mut buffer = CommandBufferPool::new(&memory, 1).unwrap().get_buffer().unwrap();
    buffer.fill(&next, 9u8).unwrap();
    let filled = buffer.execute().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert!(!filled.is_done());
    gate.open();
    filled.wait().unwrap();
    assert_eq!(driver.synchronize(stream), 0);
    assert_eq!(bytes, [1; 4096]);
}

/// The export is all that is left of the memory's owners, its stream is busy, and the thread that
/// calls the deleter may be the one that the stream waits for.
#[test]
fn the_last_deleter_waits_for_nothing() {
    if skipped() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=20");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let config = builder(&memory).prefetch_depth(2).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(200), config).unwrap();
    loader.start().unwrap();
    let batch = loader.get_batch().unwrap().unwrap();
    drop(memory.upload(&[1u8; 16], &[16]).unwrap());
    let stream = driver.stream();
    let taken = export(batch.input_tensor(), DlpackStream::Cuda(stream));
    drop((batch, loader, memory));
    let gate = driver.hold(stream);
    let bytes = read(&driver, stream, &taken, 4 * usize::from(WIDTH));
    let began = Instant::now();
    drop(taken);
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    gate.open();
    assert_eq!(driver.synchronize(stream), 0);
    assert_eq!(bytes, expected(0));
    drop(device);
    if let Some(fake) = &gpu.fake {
        eventually("the end of all", || fake.live() == Live::default());
    }
}

/// The context is lost for this process, so this runs in a process of its own.
#[test]
fn a_deleter_after_the_device_was_lost() {
    if skipped() || !in_a_child("dlpack::a_deleter_after_the_device_was_lost") {
        return;
    }
    let gpu = Gpu::new("");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let tensor = memory.upload(&[1u8; 4096], &[4096]).unwrap();
    let stream = driver.stream();
    let exports = [numbered(None), numbered(Some(-1)), DlpackStream::Cuda(stream)]
        .map(|stream| export(&tensor, stream));
    driver.fault(stream);
    assert_ne!(driver.synchronize(stream), 0);
    // Nobody has told batchline: it is the deleter that finds out.
    let [first, second, third] = exports;
    drop(first);
    assert!(matches!(device.check(), Err(Error::DeviceLost { .. })));
    assert!(tensor.to_dlpack(DlpackStream::Unspecified).unwrap_err().is_device_lost());
    drop(second);
    drop(tensor);
    drop_elsewhere(third);
    assert!(memory.stats().quarantined >= 4096);
    assert_eq!(memory.stats().device_in_use, 0);
}

/// Where a stream is can't be told while its work is recorded. The recording goes on; the memory is
/// given up.
#[test]
fn a_deleter_while_the_stream_is_captured() {
    if skipped() {
        return;
    }
    let gpu = Gpu::new("");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let tensor = memory.upload(&[1u8; 4096], &[4096]).unwrap();
    let stream = driver.stream();
    let taken = export(&tensor, DlpackStream::Cuda(stream));
    drop(tensor);
    driver.begin_capture(stream);
    drop(taken);
    assert_eq!(driver.end_capture(stream), 0);
    device.check().unwrap();
    assert_eq!(memory.stats().quarantined, 4096);
}

/// Streams come and go: their number is limited only at a time.
#[test]
fn any_number_of_streams_one_after_another() {
    if skipped() {
        return;
    }
    const MOST: usize = 28;
    let gpu = Gpu::new("random_latency_us=20");
    let memory = MemoryManager::new(&gpu.device());
    let driver = Driver::load();
    let tensor = memory.upload(&[1u8; 4096], &[4096]).unwrap();
    let use_one = || {
        let stream = driver.stream();
        let taken = export(&tensor, DlpackStream::Cuda(stream));
        let bytes = read(&driver, stream, &taken, 4096);
        drop(taken);
        assert_eq!(driver.synchronize(stream), 0);
        assert_eq!(bytes, [1; 4096]);
    };
    (0..2 * MOST).for_each(|_| use_one());
    // One is bound, which lasts until the tensor goes; the others are exported for.
    let bound = memory.upload(&[1u8; 16], &[16]).unwrap();
    bound.bind(&driver.stream()).unwrap();
    let streams: Vec<_> = (1..MOST).map(|_| driver.stream()).collect();
    let export = |stream: &CudaStream| export(&tensor, DlpackStream::Cuda(*stream));
    let mut exports: Vec<_> = streams.iter().map(export).collect();
    let refused = || {
        let error = tensor.to_dlpack(DlpackStream::Cuda(driver.stream())).unwrap_err();
        assert!(error.to_string().contains("28 other streams"), "{error}");
    };
    refused();
    // Those that are known go on.
    exports.push(export(&streams[1]));
    // One whose work is not over makes no room: memory that it reads may be of both.
    let gate = driver.hold(streams[0]);
    drop(exports.remove(0));
    refused();
    gate.open();
    assert_eq!(driver.synchronize(streams[0]), 0);
    use_one();
    exports.push(export(&streams[0]));
    refused();
    drop(bound);
    eventually("the end of the binding", || {
        tensor.to_dlpack(DlpackStream::Cuda(driver.stream())).is_ok()
    });
}

/// A stream that is none: the call fails, or the memory is given up, and the device goes on.
#[test]
fn a_stream_that_was_destroyed() {
    if skipped() || std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some() {
        return;
    }
    let fake = Fake::start("devices=1,pageable=1");
    let device = Device::cuda(0).unwrap();
    let memory = MemoryManager::new(&device);
    let tensor = memory.upload(&[1u8; 4096], &[4096]).unwrap();
    let stream = Driver::load().stream();
    let taken = export(&tensor, DlpackStream::Cuda(stream));
    let destroy: unsafe extern "C" fn(*mut std::ffi::c_void) -> u32 =
        fake.symbol("cuStreamDestroy_v2");
    // SAFETY: it exists; that it is used later is what is tested.
    assert_eq!(unsafe { destroy(stream.as_raw()) }, codes::SUCCESS);
    let (gate, filled) = hold_fills(&memory, &tensor);
    let error = tensor.to_dlpack(DlpackStream::Cuda(stream)).unwrap_err();
    assert!(error.chain().contains("INVALID_HANDLE") && !error.is_device_lost(), "{error}");
    gate.open();
    filled.wait().unwrap();
    drop((taken, tensor));
    device.check().unwrap();
    assert_eq!(memory.stats().quarantined, 4096);
}
