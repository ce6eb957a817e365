//! What a C program sees of tensors on the host through DLPack. Those of a CUDA device are in
//! `cuda/dlpack.rs`.
#![allow(unsafe_code, reason = "gives exports to a C program")]

use std::io::Write;
use std::time::Duration;

use batchline::dlpack::{DL_BFLOAT, DL_BOOL, DL_CPU, DL_FLOAT, DL_INT, DL_UINT, DlpackStream};
use batchline::testing::{FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, DType, Device, Error, FnDataset, Host, MemoryManager,
    SampleSpec, Tensor,
};
use dlpack_consumer::Taken;

/// Whether there is no C compiler to make the program with.
fn no_program() -> bool {
    if !dlpack_consumer::BUILT {
        // Past the capture of the test harness, so that it is seen.
        let _ = writeln!(std::io::stderr(), "skipped: no C compiler to make a program with");
    }
    !dlpack_consumer::BUILT
}

/// Exports a tensor to the program.
fn export(tensor: &Tensor) -> Taken {
    let raw = tensor.to_dlpack(DlpackStream::Unspecified).unwrap().into_raw();
    // SAFETY: just given out.
    unsafe { Taken::new(raw.cast(), false) }
}

/// As [`export`], for a program of old.
fn export_legacy(tensor: &Tensor) -> Taken {
    let raw = tensor.to_dlpack(DlpackStream::Unspecified).unwrap().into_legacy_raw();
    // SAFETY: just given out.
    unsafe { Taken::new(raw.cast(), true) }
}

/// Calls a deleter in another thread.
fn drop_elsewhere(taken: Taken) {
    std::thread::scope(|scope| scope.spawn(move || drop(taken)).join().unwrap());
}

/// A loader of batches of two, whose sample `n` is full of the byte `n`, in all its tensors.
fn loader(spec: SampleSpec, memory: &MemoryManager) -> AsyncDataLoader {
    let samples = FnDataset::new(40, spec, |index, sample| {
        for place in 0..sample.spec().tensors().len() {
            sample.bytes(place).fill(index.to_le_bytes()[0]);
        }
        Ok(())
    });
    let config = AsyncDataLoaderConfig::builder().batch_size(2).max_held(2);
    let config = config.memory_manager(memory.clone()).build().unwrap();
    let loader = AsyncDataLoader::new(samples, config).unwrap();
    loader.start().unwrap();
    loader
}

/// A spec with a tensor of each type, called by it.
fn all_types() -> SampleSpec {
    let spec = SampleSpec::new(DType::U8, &[5]).unwrap();
    DType::ALL
        .into_iter()
        .fold(spec, |spec, dtype| spec.weight(dtype.name(), dtype, &[1, 3]).unwrap())
}

#[test]
fn every_type_arrives_as_it_is() {
    if no_program() {
        return;
    }
    let loader = loader(all_types(), &MemoryManager::new(&Device::host()));
    // The second batch: its tensors lie behind one another, and hold no zeros.
    drop(loader.get_batch().unwrap());
    let batch = loader.get_batch().unwrap().unwrap();
    for dtype in DType::ALL {
        let (code, bits) = match dtype {
            DType::F32 => (DL_FLOAT, 32),
            DType::F16 => (DL_FLOAT, 16),
            DType::BF16 => (DL_BFLOAT, 16),
            DType::F64 => (DL_FLOAT, 64),
            DType::I8 => (DL_INT, 8),
            DType::I16 => (DL_INT, 16),
            DType::I32 => (DL_INT, 32),
            DType::I64 => (DL_INT, 64),
            DType::U8 => (DL_UINT, 8),
            DType::Bool => (DL_BOOL, 8),
            other => panic!("{other} is not tested"),
        };
        let tensor = batch.tensor(dtype.name()).unwrap();
        assert_eq!(tensor.dlpack_device().unwrap().device_type, DL_CPU);
        for (taken, version, flags) in
            [(export(tensor), [1, 3], 1), (export_legacy(tensor), [0, 0], 0)]
        {
            let seen = taken.seen();
            assert_eq!((seen.version, seen.flags), (version, flags), "{dtype}");
            assert_eq!(seen.device, [DL_CPU, 0]);
            assert_eq!((seen.code, seen.bits, seen.lanes), (code, bits, 1), "{dtype}");
            assert_eq!(seen.ndim, 3);
            assert_eq!((&seen.shape[..3], &seen.strides[..3]), (&[2, 1, 3][..], &[3, 3, 1][..]));
            assert_eq!((seen.data.addr() % 256, seen.byte_offset), (0, 0));
            let row = 3 * dtype.size();
            assert_eq!(taken.bytes(1024), [vec![2; row], vec![3; row]].concat(), "{dtype}");
        }
    }
}

#[test]
fn shapes_without_dimensions_or_elements() {
    if no_program() {
        return;
    }
    let memory = MemoryManager::new(&Device::host());
    let scalar = memory.upload(&[0.5f64], &[]).unwrap();
    let taken = export(&scalar);
    assert_eq!(taken.seen().ndim, 0);
    assert_eq!(taken.bytes(8), 0.5f64.to_ne_bytes());
    let most = memory.upload(&[7u8; 4], &[1, 1, 2, 1, 1, 2, 1, 1]).unwrap();
    let taken = export(&most);
    assert_eq!(taken.seen().shape, [1, 1, 2, 1, 1, 2, 1, 1]);
    assert_eq!(taken.seen().strides, [4, 4, 2, 2, 2, 1, 1, 1]);
    assert_eq!(taken.bytes(4), [7; 4]);
    for (shape, strides) in
        [(&[0][..], &[1][..]), (&[3, 0, 2], &[2, 2, 1]), (&[1 << 62, 1 << 62, 0], &[1 << 62, 1, 1])]
    {
        let none = memory.tensor(shape, DType::BF16).unwrap();
        for taken in [export(&none), export_legacy(&none)] {
            let seen = taken.seen();
            assert!(seen.data.is_null());
            assert_eq!(seen.strides[..shape.len()], *strides, "{shape:?}");
            assert_eq!(taken.bytes(8), [0; 0]);
        }
    }
    // The standard's numbers are signed.
    let long = memory.tensor(&[1 << 63, 0], DType::U8).unwrap();
    let error = long.to_dlpack(DlpackStream::Unspecified).unwrap_err();
    assert!(matches!(error, Error::Overflow { .. }), "{error}");
    assert_eq!(long.bind(&Host).unwrap().bytes(), [0; 0]);
}

#[test]
fn the_numbers_of_streams() {
    // SAFETY: no number here is a handle.
    let stream = |number| unsafe { DlpackStream::from_number(number) };
    assert_eq!(stream(None).unwrap(), DlpackStream::Unspecified);
    assert_eq!(stream(Some(-1)).unwrap(), DlpackStream::Unsynchronised);
    for number in [0, -2, i64::MIN] {
        let error = stream(Some(number)).unwrap_err().to_string();
        assert!(error.contains(&number.to_string()), "{error}");
    }
    let tensor = MemoryManager::new(&Device::host()).upload(&[1u8], &[1]).unwrap();
    drop(tensor.to_dlpack(DlpackStream::Unsynchronised).unwrap());
    // With a stream, or a build that knows of none, it is an error; and no view is left open.
    let error = stream(Some(1)).and_then(|stream| tensor.to_dlpack(stream)).unwrap_err();
    assert!(matches!(error, Error::Record { .. }), "{error}");
    tensor.write(&[2u8]).unwrap();
}

#[test]
fn an_exported_tensor_is_not_written() {
    if no_program() {
        return;
    }
    let tensor = MemoryManager::new(&Device::host()).upload(&[1u8; 4], &[4]).unwrap();
    let (first, second) = (export(&tensor), export_legacy(&tensor));
    let refused = || matches!(tensor.write(&[2u8; 4]), Err(Error::Borrowed { .. }));
    assert!(refused());
    drop(first);
    assert!(refused());
    // Reading is no harm, nor is a view beside it.
    assert_eq!(tensor.to_vec::<u8>().unwrap(), [1; 4]);
    assert_eq!(tensor.bind(&Host).unwrap().bytes(), second.bytes(4));
    drop(second);
    tensor.write(&[2u8; 4]).unwrap();
    let kept = tensor.to_dlpack(DlpackStream::Unspecified).unwrap();
    assert!(refused());
    drop(kept);
    tensor.write(&[3u8; 4]).unwrap();
}

#[test]
fn the_mark_of_reading_only_can_be_taken_away() {
    if no_program() {
        return;
    }
    let tensor = MemoryManager::new(&Device::host()).upload(&[1u8; 4], &[4]).unwrap();
    // SAFETY: nobody reads or writes it but this test.
    let export = unsafe { tensor.to_dlpack(DlpackStream::Unspecified).unwrap().writable() };
    // SAFETY: just given out.
    let taken = unsafe { Taken::new(export.into_raw().cast(), false) };
    assert_eq!(taken.seen().flags, 0);
}

/// A transfer to the tensor is under way: the export comes when it has arrived.
#[test]
fn an_export_waits_for_the_last_writer() {
    if no_program() {
        return;
    }
    let (device, control) = faulty_device(FaultPlan { unified: true, ..FaultPlan::default() });
    let memory = MemoryManager::new(&device);
    let tensor = memory.upload(&[1u8; 64], &[64]).unwrap();
    let staging = batchline::StagingBufferPool::new(&memory, 1).unwrap();
    control.hold_transfers();
    let transfer = staging.transfer_to_gpu(&[2u8; 64], &tensor).unwrap();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| export(&tensor));
        std::thread::sleep(Duration::from_millis(20));
        assert!(!waiting.is_finished());
        control.release();
        assert_eq!(waiting.join().unwrap().bytes(64), [2; 64]);
    });
    transfer.wait().unwrap();
}

/// Exports outlive the batch, the loader, the manager and the device's handle, and end elsewhere.
#[test]
fn an_export_keeps_the_batch() {
    if no_program() {
        return;
    }
    let (device, control) = faulty_device(FaultPlan { unified: true, ..FaultPlan::default() });
    let memory = MemoryManager::new(&device);
    let spec = SampleSpec::new(DType::U8, &[1000]).unwrap().label(DType::U8, &[]).unwrap();
    let loader = loader(spec, &memory);
    let batch = loader.get_batch().unwrap().unwrap();
    let (input, label) =
        (export(batch.input_tensor()), export_legacy(batch.label_tensor().unwrap()));
    drop(batch);
    let whole = [[0; 1000], [1; 1000]].concat();
    // More batches than there are slots: none is written to the one that is exported.
    for _ in 1..12 {
        drop(loader.get_batch().unwrap().unwrap());
        assert_eq!((input.bytes(2000), label.bytes(2)), (whole.clone(), vec![0, 1]));
    }
    // It counts as held.
    let mut batches = Vec::new();
    let refused = loop {
        match loader.get_batch() {
            Ok(batch) => batches.push(batch.unwrap()),
            Err(refused) => break refused,
        }
    };
    let counted = |held| held == batches.len() + 1;
    assert!(matches!(refused, Error::TooManyHeld { held, .. } if counted(held)), "{refused}");
    drop(batches);
    loader.stop().unwrap();
    drop((loader, memory, device));
    drop_elsewhere(label);
    assert_eq!(input.bytes(2000), whole);
    assert!(!control.is_closed(), "the device stays for the memory");
    drop_elsewhere(input);
    let began = std::time::Instant::now();
    while !control.is_closed() {
        assert!(began.elapsed() < Duration::from_secs(20), "the device goes with the last export");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Once the device is lost its memory is given up, whenever the deleter is called.
#[test]
fn a_lost_device_ends_no_export() {
    if no_program() {
        return;
    }
    let (device, control) = faulty_device(FaultPlan { unified: true, ..FaultPlan::default() });
    let memory = MemoryManager::new(&device);
    let loader = loader(SampleSpec::new(DType::U8, &[1000]).unwrap(), &memory);
    let batch = loader.get_batch().unwrap().unwrap();
    let taken = export(batch.input_tensor());
    let tensor = batch.input_tensor().clone();
    drop(batch);
    control.lose();
    assert!(loader.get_batch().unwrap_err().is_device_lost());
    assert!(tensor.to_dlpack(DlpackStream::Unspecified).unwrap_err().is_device_lost());
    drop((tensor, loader));
    assert_eq!(taken.bytes(2000), [[0; 1000], [1; 1000]].concat());
    drop(taken);
    assert!(memory.stats().quarantined > 0);
}

/// wgpu's memory has no address, nor has that of this one.
#[test]
fn memory_without_an_address_is_refused() {
    let (device, _) = faulty_device(FaultPlan::default());
    let tensor = MemoryManager::new(&device).upload(&[1u8], &[1]).unwrap();
    for error in [
        tensor.dlpack_device().unwrap_err(),
        tensor.to_dlpack(DlpackStream::Unspecified).unwrap_err(),
    ] {
        assert_eq!(
            error.to_string(),
            "cannot record an export through DLPack: memory of faulty has no address for others: \
             copy it (`to_vec`)"
        );
    }
}
