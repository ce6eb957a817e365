//! Errors: those that stay, and those that tests order.

use std::ffi::c_void;
use std::sync::mpsc::channel;

use fake_cuda::codes::*;
use fake_cuda::{Live, When};

use crate::cuda::{Cuda, bytes, made};

extern "C" fn fail_the_test(_: *mut c_void) {
    // It would be called from C, so it can't panic.
    std::process::abort();
}

#[test]
fn an_error_of_the_device_stays() {
    let cuda = Cuda::new("");
    let context = made(|context| cuda.cuCtxGetCurrent(context));
    let (stream, other, event) = (cuda.stream(), cuda.stream(), cuda.event());
    let (device, host) = (cuda.device(4), cuda.host(&[1; 4]));
    let fault = cuda.function("batchline_test_fault");
    cuda.fake.hold(stream);
    assert_eq!(cuda.launch(fault, stream, &[]), 0);
    assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host, device, 4, stream), 0);
    assert_eq!(cuda.cuLaunchHostFunc(stream, fail_the_test, std::ptr::null_mut()), 0);
    assert_eq!(cuda.cuEventRecord(event, stream), 0);
    assert_eq!(cuda.cuStreamWaitEvent(other, event, 0), 0);
    let (started, has_started) = channel();
    std::thread::scope(|threads| {
        let waiter = threads.spawn(|| {
            assert_eq!(cuda.cuCtxSetCurrent(context), 0);
            started.send(()).unwrap();
            cuda.cuEventSynchronize(event)
        });
        has_started.recv().unwrap();
        cuda.fake.release(stream);
        assert_eq!(waiter.join().unwrap(), ILLEGAL_ADDRESS);
    });
    let results = [
        cuda.cuEventQuery(event),
        cuda.cuEventRecord(event, other),
        cuda.cuStreamWaitEvent(other, event, 0),
        cuda.cuStreamQuery(other),
        cuda.cuStreamSynchronize(other),
        cuda.cuCtxSynchronize(),
        cuda.cuMemcpyHtoDAsync_v2(device, host, 4, other),
        cuda.cuMemAlloc_v2(&mut 0, 4),
        cuda.cuMemHostAlloc(&mut std::ptr::null_mut(), 4, 0),
        cuda.cuStreamCreate(&mut 0, 1),
        cuda.cuEventCreate(&mut 0, 2),
        cuda.cuMemFree_v2(device),
        cuda.cuMemFreeHost(host),
        cuda.cuEventDestroy_v2(event),
        cuda.cuStreamDestroy_v2(stream),
    ];
    assert_eq!(results, [ILLEGAL_ADDRESS; 15]);
    // What still answers, as with the driver.
    assert_eq!(made(|device| cuda.cuCtxGetDevice(device)), 0);
    assert_eq!(cuda.cuCtxSetCurrent(context), 0);
    let memory: u32 = made(|kind: *mut u32| cuda.cuPointerGetAttribute(kind.cast(), 2, device));
    assert_eq!(memory, 2);
    assert_eq!(cuda.retain(0), context);
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 0);
    // Nothing behind the fault was done.
    assert_eq!(bytes(host, 4), [1; 4]);
    // The other device works on, and so does this one once its context is made again.
    let second = cuda.retain(1);
    assert_eq!(cuda.cuCtxSetCurrent(second), 0);
    assert_eq!(cuda.cuMemFree_v2(cuda.device(4)), 0);
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(1), 0);
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 0);
    let again = cuda.retain(0);
    assert_ne!(again, context);
    assert_eq!(cuda.cuCtxSetCurrent(again), 0);
    assert_eq!(cuda.cuMemFree_v2(cuda.device(4)), 0);
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 0);
    assert_eq!(cuda.fake.live(), Live::default());
    assert!(cuda.fake.left_behind().is_empty());
    cuda.violated("one that faults");
}

#[test]
fn a_call_fails_before_or_after_its_effect() {
    let cuda = Cuda::new("");
    let streams = || cuda.fake.live().streams;
    cuda.fake.fail(Some("cuStreamCreate"), 2, OUT_OF_MEMORY, When::Before);
    let mut stream = 0;
    let mut create = || cuda.cuStreamCreate(&raw mut stream, 1);
    assert_eq!((create(), create(), create()), (0, OUT_OF_MEMORY, 0));
    assert_eq!(streams(), 2);
    cuda.fake.fail(Some("cuStreamCreate"), 1, UNKNOWN, When::After);
    assert_eq!(create(), UNKNOWN);
    assert_eq!(streams(), 3);
    // Queued although the call failed.
    let (host, device) = (cuda.host(&[5]), cuda.device(1));
    cuda.fake.fail(Some("cuMemcpyHtoDAsync_v2"), 1, UNKNOWN, When::After);
    assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, host, 1, stream), UNKNOWN);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 1), [5]);
    // Of any symbol; asking for the words of an error does not count.
    cuda.fake.fail(None, 2, INVALID_VALUE, When::Before);
    assert_eq!(cuda.error_name(ILLEGAL_ADDRESS), "CUDA_ERROR_ILLEGAL_ADDRESS");
    assert_eq!(cuda.cuStreamQuery(stream), 0);
    assert_eq!(cuda.cuStreamQuery(stream), INVALID_VALUE);
    assert_eq!(cuda.cuStreamQuery(stream), 0);
    cuda.no_violations();
}

#[test]
fn the_context_is_lost_at_a_call_at_some_work_or_at_once() {
    let cuda = Cuda::new("");
    let (stream, device) = (cuda.stream(), cuda.device(1));
    cuda.fake.fail(None, 2, ECC_UNCORRECTABLE, When::Lose);
    assert_eq!(cuda.cuStreamQuery(stream), 0);
    assert_eq!(cuda.cuStreamQuery(stream), ECC_UNCORRECTABLE);
    assert_eq!(cuda.cuMemFree_v2(device), ECC_UNCORRECTABLE);
    drop(cuda);

    let cuda = Cuda::new("");
    let (stream, device, host) = (cuda.stream(), cuda.device(1), cuda.host(&[1]));
    cuda.fake.fail_work(2, LAUNCH_FAILED);
    for _ in 0..2 {
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host, device, 1, stream), 0);
        let fill = cuda.cuMemsetD8Async(device, 9, 1, stream);
        assert!(fill == 0 || fill == LAUNCH_FAILED);
        if cuda.cuStreamSynchronize(stream) != 0 {
            break;
        }
    }
    assert_eq!(cuda.cuStreamSynchronize(stream), LAUNCH_FAILED);
    assert_eq!(bytes(host, 1), [0]);
    drop(cuda);

    let cuda = Cuda::new("");
    let stream = cuda.stream();
    cuda.fake.lose(0, UNKNOWN);
    assert_eq!(cuda.cuCtxSynchronize(), UNKNOWN);
    // Also to who works in another context.
    let other = cuda.retain(1);
    assert_eq!(cuda.cuCtxSetCurrent(other), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), UNKNOWN);
    assert_eq!(cuda.cuCtxSynchronize(), 0);
    cuda.no_violations();
}

#[test]
fn calls_are_counted() {
    let cuda = Cuda::new("");
    let before = cuda.fake.calls(None);
    let stream = cuda.stream();
    for _ in 0..3 {
        assert_eq!(cuda.cuStreamQuery(stream), 0);
    }
    assert_eq!(cuda.fake.calls(None), before + 4);
    assert_eq!(cuda.fake.calls(Some("cuStreamQuery")), 3);
    assert_eq!(cuda.fake.all_calls()["cuStreamCreate"], 1);
    assert_eq!(cuda.fake.calls(Some("cuMemAlloc_v2")), 0);
}

#[test]
fn what_was_not_destroyed_is_counted() {
    let cuda = Cuda::new("");
    let bare = Live { contexts: 1, ..Live::default() };
    assert_eq!(cuda.fake.live(), bare);
    let (stream, event) = (cuda.stream(), cuda.event());
    let (device, host, mut own) = (cuda.device(4), cuda.host(&[0; 4]), [0u8; 4]);
    assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 4, 1), 0);
    cuda.function("other");
    let all = Live {
        contexts: 1,
        streams: 1,
        events: 1,
        device_memory: 1,
        page_locked_memory: 1,
        registered_memory: 1,
        modules: 1,
        graphs: 0,
        captures: 0,
    };
    assert_eq!(cuda.fake.live(), all);
    assert_eq!(cuda.cuMemFree_v2(device), 0);
    assert_eq!(cuda.cuMemFreeHost(host), 0);
    assert_eq!(cuda.cuMemHostUnregister(own.as_mut_ptr()), 0);
    assert_eq!(cuda.cuEventDestroy_v2(event), 0);
    assert_eq!(cuda.cuStreamDestroy_v2(stream), 0);
    assert_eq!(cuda.fake.live(), Live { modules: 1, ..bare });
    cuda.device(4);
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 0);
    assert_eq!(cuda.fake.live(), Live::default());
    let left = cuda.fake.left_behind();
    assert_eq!(
        left.into_iter().collect::<Vec<_>>(),
        [("device memory".to_owned(), 1), ("modules".to_owned(), 1)]
    );
}

#[test]
fn memory_is_limited() {
    let cuda = Cuda::new("memory_mib=2");
    let (mut free, mut total) = (0, 0);
    let mut info = || (cuda.cuMemGetInfo_v2(&raw mut free, &raw mut total), free, total);
    assert_eq!(info(), (0, 2 << 20, 2 << 20));
    let half = cuda.device(1 << 20);
    assert_eq!(info(), (0, 1 << 20, 2 << 20));
    assert_eq!(cuda.cuMemAlloc_v2(&mut 0, (1 << 20) + 1), OUT_OF_MEMORY);
    assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 0), INVALID_VALUE);
    assert_eq!(cuda.cuMemFree_v2(half), 0);
    assert_eq!(info(), (0, 2 << 20, 2 << 20));
    // New memory holds anything.
    let fresh = made(|address| cuda.cuMemAlloc_v2(address, 2));
    assert_eq!(cuda.read(fresh, 2), [0xCD; 2]);
}

#[test]
fn calls_need_a_context_of_the_thread() {
    let cuda = Cuda::new("");
    let (stream, event, device) = (cuda.stream(), cuda.event(), cuda.device(4));
    std::thread::scope(|threads| {
        let results = threads.spawn(|| {
            [
                cuda.cuStreamCreate(&mut 0, 1),
                cuda.cuMemAlloc_v2(&mut 0, 1),
                cuda.cuEventQuery(event),
                cuda.cuEventRecord(event, stream),
                cuda.cuMemsetD8Async(device, 1, 1, stream),
                cuda.cuMemFree_v2(device),
                cuda.cuCtxSynchronize(),
                cuda.cuCtxGetDevice(&mut 0),
                cuda.cuCtxPopCurrent_v2(&mut 0),
            ]
        });
        assert_eq!(results.join().unwrap(), [INVALID_CONTEXT; 9]);
    });
    cuda.no_violations();
}

#[test]
fn calls_wait_inside_while_they_are_held() {
    let cuda = Cuda::new("");
    let context = made(|context| cuda.cuCtxGetCurrent(context));
    let stream = cuda.stream();
    cuda.fake.hold_calls("cuStreamQuery");
    std::thread::scope(|threads| {
        let call = threads.spawn(|| {
            assert_eq!(cuda.cuCtxSetCurrent(context), 0);
            cuda.cuStreamQuery(stream)
        });
        while cuda.fake.calls(Some("cuStreamQuery")) == 0 {
            std::thread::yield_now();
        }
        // Others go on meanwhile.
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert!(!call.is_finished());
        // It finds what has become of the context meanwhile.
        cuda.fake.lose(0, LAUNCH_FAILED);
        cuda.fake.release_calls("cuStreamQuery");
        assert_eq!(call.join().unwrap(), LAUNCH_FAILED);
    });
}

#[test]
fn the_tests_own_calls_are_spared() {
    let cuda = Cuda::new("");
    let stream = cuda.stream();
    let before = cuda.fake.calls(None);
    cuda.fake.fail(Some("cuStreamQuery"), 1, UNKNOWN, When::Before);
    assert_eq!(cuda.fake.spared(|| cuda.cuStreamQuery(stream)), 0);
    assert_eq!(cuda.fake.calls(None), before);
    assert_eq!(cuda.cuStreamQuery(stream), UNKNOWN);
}
