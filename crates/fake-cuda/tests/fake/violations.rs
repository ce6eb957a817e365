//! What must not be done is noticed, each kind of it.

use fake_cuda::codes::*;

use crate::cuda::{Cuda, bytes, made, write};

#[test]
fn memory_of_the_host_is_freed_while_work_names_it() {
    let cuda = Cuda::new("");
    let (stream, device, host) = (cuda.stream(), cuda.device(4), cuda.host(&[1; 4]));
    let other = cuda.host(&[2; 4]);
    cuda.fake.hold(stream);
    assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, host, 4, stream), 0);
    assert_eq!(cuda.cuMemFreeHost(other), 0);
    cuda.no_violations();
    assert_eq!(cuda.cuMemFreeHost(host), 0);
    assert_eq!(bytes(host, 4), [0xDB; 4]);
    cuda.violated("freed while in use: upload of 4 bytes");
    // The driver would go on, with whatever is there now.
    cuda.fake.release(stream);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 4), [0xDB; 4]);
}

#[test]
fn memory_is_unregistered_while_work_names_it() {
    let cuda = Cuda::new("");
    let (stream, device) = (cuda.stream(), cuda.device(4));
    let mut own = vec![1u8; 4];
    assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 4, 1), 0);
    assert_eq!(cuda.fake.live().registered_memory, 1);
    cuda.fake.hold(stream);
    assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, own.as_ptr(), 4, stream), 0);
    assert_eq!(cuda.cuMemHostUnregister(own.as_mut_ptr()), 0);
    cuda.violated("registered memory");
    drop(own);
    // Nothing is known of it any more, so it is not touched.
    cuda.fake.release(stream);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 4), [0; 4]);
}

#[test]
fn copies_name_what_is_not_theirs() {
    let ordinary = [0u8; 8];
    type Copy = fn(&Cuda, u64, *mut u8, usize, *const u8) -> u32;
    let cases: [(&str, Copy); 7] = [
        ("end behind device memory", |cuda, device, host, stream, _| {
            cuda.cuMemcpyHtoDAsync_v2(device + 5, host, 4, stream)
        }),
        ("end behind page-locked memory", |cuda, device, host, stream, _| {
            cuda.cuMemcpyDtoHAsync_v2(host.wrapping_add(5), device, 4, stream)
        }),
        ("is unknown", |cuda, device, _, stream, ordinary| {
            cuda.cuMemcpyHtoDAsync_v2(device, ordinary, 4, stream)
        }),
        ("is page-locked memory", |cuda, _, host, stream, _| {
            cuda.cuMemcpyHtoDAsync_v2(host as u64, host, 4, stream)
        }),
        ("is device memory", |cuda, device, _, stream, _| {
            cuda.cuMemcpyDtoHAsync_v2(device as *mut u8, device, 4, stream)
        }),
        ("was freed", |cuda, device, host, stream, _| {
            assert_eq!(cuda.cuMemFree_v2(device), 0);
            cuda.cuMemcpyHtoDAsync_v2(device, host, 4, stream)
        }),
        ("was freed", |cuda, device, host, stream, _| {
            assert_eq!(cuda.cuMemFreeHost(host), 0);
            cuda.cuMemcpyHtoDAsync_v2(device, host, 4, stream)
        }),
    ];
    for (words, copy) in cases {
        let cuda = Cuda::new("");
        let (stream, device, host) = (cuda.stream(), cuda.device(8), cuda.host(&[0; 8]));
        assert_eq!(copy(&cuda, device, host, stream, ordinary.as_ptr()), INVALID_VALUE, "{words}");
        cuda.violated(words);
        // It is the call that failed, not the context.
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    }
}

#[test]
fn copies_that_are_over_with_the_call_take_ordinary_memory() {
    let cuda = Cuda::new("latency_us=10");
    let device = cuda.device(3);
    assert_eq!(cuda.cuMemcpyHtoD_v2(device, [1u8, 2, 3].as_ptr(), 3), 0);
    assert_eq!(cuda.read(device, 3), [1, 2, 3]);
    cuda.no_violations();
}

#[test]
fn copies_that_go_on_take_ordinary_memory_where_it_is_allowed() {
    let cuda = Cuda::new("pageable=1");
    let (stream, device) = (cuda.stream(), cuda.device(2));
    cuda.fake.hold(stream);
    let mut own = [1u8, 2];
    assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, own.as_ptr(), 2, stream), 0);
    // It has been read when the call returns.
    own.fill(0);
    cuda.fake.release(stream);
    assert_eq!(cuda.cuMemcpyDtoHAsync_v2(own.as_mut_ptr(), device, 2, stream), 0);
    assert_eq!(own, [1, 2]);
    cuda.no_violations();
}

#[test]
fn memory_is_written_where_it_is_only_read() {
    let cuda = Cuda::new("");
    let (stream, device) = (cuda.stream(), cuda.device(4));
    let mut own = vec![1u8; 4];
    assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 4, 1 | 8), 0);
    assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, own.as_ptr(), 4, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.cuMemcpyDtoHAsync_v2(own.as_mut_ptr(), device, 4, stream), INVALID_VALUE);
    cuda.violated("registered for reading");
    assert_eq!(cuda.cuMemHostUnregister(own.as_mut_ptr()), 0);
}

#[test]
fn memory_is_freed_twice_or_was_never_allocated() {
    let cuda = Cuda::new("");
    let (device, host) = (cuda.device(4), cuda.host(&[0; 4]));
    assert_eq!(cuda.cuMemFree_v2(device + 1), INVALID_VALUE);
    assert_eq!(cuda.cuMemFree_v2(host as u64), INVALID_VALUE);
    assert_eq!(cuda.cuMemFree_v2(0), 0);
    assert_eq!(cuda.cuMemFree_v2(device), 0);
    assert_eq!(cuda.cuMemFree_v2(device), INVALID_VALUE);
    assert_eq!(cuda.cuMemFreeHost(host), 0);
    assert_eq!(cuda.cuMemFreeHost(host), INVALID_VALUE);
    assert_eq!(cuda.cuMemHostUnregister(host), HOST_MEMORY_NOT_REGISTERED);
    assert_eq!(cuda.fake.violations().len(), 5);
    let mut own = [0u8; 4];
    assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 4, 1), 0);
    let inside = own.as_mut_ptr().wrapping_add(2);
    assert_eq!(cuda.cuMemHostRegister_v2(inside, 4, 1), HOST_MEMORY_ALREADY_REGISTERED);
    assert_eq!(cuda.cuMemHostUnregister(own.as_mut_ptr()), 0);
}

#[test]
fn freed_memory_is_written() {
    let cuda = Cuda::new("");
    let host = cuda.host(&[0; 64]);
    assert_eq!(cuda.cuMemFreeHost(host), 0);
    cuda.no_violations();
    write(host.wrapping_add(63), &[1]);
    cuda.violated("page-locked memory of 64 bytes");
    // It is told once.
    assert_eq!(cuda.fake.violations().len(), 1);
}

#[test]
fn something_is_written_behind_the_end() {
    let cuda = Cuda::new("");
    let (host, other) = (cuda.host(&[0; 64]), cuda.host(&[0; 64]));
    write(host.wrapping_add(64), &[1]);
    cuda.violated("behind the end of page-locked memory of 64 bytes");
    write(other.wrapping_add(64), &[1]);
    assert_eq!(cuda.cuMemFreeHost(other), 0);
    assert_eq!(cuda.fake.violations().len(), 2);
}

#[test]
fn handles_are_used_after_they_were_destroyed() {
    let cuda = Cuda::new("");
    let (stream, live_stream) = (cuda.stream(), cuda.stream());
    let (event, live_event) = (cuda.event(), cuda.event());
    assert_eq!(cuda.cuStreamDestroy_v2(stream), 0);
    assert_eq!(cuda.cuEventDestroy_v2(event), 0);
    let results = [
        cuda.cuStreamDestroy_v2(stream),
        cuda.cuStreamQuery(stream),
        cuda.cuStreamSynchronize(stream),
        cuda.cuStreamWaitEvent(stream, live_event, 0),
        cuda.cuMemsetD8Async(0, 0, 0, stream),
        cuda.cuEventRecord(live_event, stream),
        cuda.cuEventRecord(event, live_stream),
        cuda.cuEventQuery(event),
        cuda.cuEventSynchronize(event),
        cuda.cuEventDestroy_v2(event),
        cuda.cuStreamWaitEvent(live_stream, event, 0),
        // One for the other.
        cuda.cuEventQuery(live_stream),
    ];
    assert_eq!(results, [INVALID_HANDLE; 12]);
    let violations = cuda.fake.violations();
    assert_eq!(violations.len(), results.len());
    assert!(violations.iter().all(|line| line.ends_with("was destroyed, or is no such thing")));
}

#[test]
fn graphs_are_destroyed_or_launched_too_late() {
    type Misuse = fn(&Cuda, usize, u64, usize, usize);
    let cases: [(&str, Misuse); 3] = [
        ("a graph was destroyed while its work is queued", |cuda, stream, _, _, graph| {
            assert_eq!(cuda.cuGraphLaunch(graph, stream), 0);
            assert_eq!(cuda.cuGraphExecDestroy(graph), 0);
        }),
        ("works on freed memory", |cuda, stream, device, _, graph| {
            assert_eq!(cuda.cuMemFree_v2(device), 0);
            assert_eq!(cuda.cuGraphLaunch(graph, stream), 0);
        }),
        ("whose kernel batchline_fill_u64 is unloaded", |cuda, stream, _, module, graph| {
            assert_eq!(cuda.cuModuleUnload(module), 0);
            assert_eq!(cuda.cuGraphLaunch(graph, stream), 0);
        }),
    ];
    for (words, misuse) in cases {
        let cuda = Cuda::new("");
        let (stream, device) = (cuda.stream(), cuda.device(8));
        let (module, function) = cuda.module_and_function("batchline_fill_u64");
        assert_eq!(cuda.cuStreamBeginCapture_v2(stream, 2), 0);
        assert_eq!(cuda.launch(function, stream, &[device, 1, 7]), 0);
        let graph = made(|graph| cuda.cuStreamEndCapture(stream, graph));
        let executable = made(|executable| cuda.cuGraphInstantiateWithFlags(executable, graph, 0));
        assert_eq!(cuda.cuGraphLaunch(executable, stream), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        cuda.no_violations();
        cuda.fake.hold(stream);
        misuse(&cuda, stream, device, module, executable);
        cuda.violated(words);
        cuda.fake.release(stream);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    }
}

#[test]
fn a_stream_is_destroyed_while_it_is_captured() {
    let cuda = Cuda::new("");
    let stream = cuda.stream();
    assert_eq!(cuda.cuStreamBeginCapture_v2(stream, 2), 0);
    assert_eq!(cuda.fake.live().captures, 1);
    assert_eq!(cuda.cuStreamDestroy_v2(stream), 0);
    cuda.violated("destroyed while it was captured");
    assert_eq!(cuda.fake.live().captures, 0);
}

#[test]
fn the_context_is_used_after_it_was_destroyed() {
    let cuda = Cuda::new("");
    let context = made(|context| cuda.cuCtxGetCurrent(context));
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 0);
    cuda.no_violations();
    assert_eq!(cuda.cuMemAlloc_v2(&mut 0, 4), CONTEXT_IS_DESTROYED);
    assert_eq!(cuda.cuCtxSynchronize(), CONTEXT_IS_DESTROYED);
    assert_eq!(cuda.cuCtxSetCurrent(context), INVALID_CONTEXT);
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), INVALID_CONTEXT);
    assert_eq!(cuda.fake.violations().len(), 4);
}

#[test]
fn the_context_is_destroyed_with_work_queued() {
    let cuda = Cuda::new("");
    let (stream, device) = (cuda.stream(), cuda.device(1));
    cuda.fake.hold(stream);
    assert_eq!(cuda.cuMemsetD8Async(device, 1, 1, stream), 0);
    assert_eq!(cuda.cuDevicePrimaryCtxRelease_v2(0), 0);
    cuda.violated("destroyed with 1 operations queued");
}

#[test]
fn memory_of_another_device_is_used() {
    let cuda = Cuda::new("");
    let device = cuda.device(4);
    let other = cuda.retain(1);
    assert_eq!(cuda.cuCtxSetCurrent(other), 0);
    let (stream, event) = (cuda.stream(), cuda.event());
    assert_eq!(cuda.cuMemsetD8Async(device, 1, 4, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    cuda.violated("another device");
    let first = cuda.retain(0);
    assert_eq!(cuda.cuCtxPushCurrent_v2(first), 0);
    assert_eq!(cuda.cuEventRecord(event, cuda.stream()), INVALID_HANDLE);
    assert_eq!(cuda.fake.violations().len(), 2);
    // To wait for another device's event is right.
    assert_eq!(cuda.cuStreamWaitEvent(cuda.stream(), event, 0), 0);
    assert_eq!(made(|device| cuda.cuCtxGetDevice(device)), 0);
    assert_eq!(made(|context| cuda.cuCtxPopCurrent_v2(context)), first);
    assert_eq!(made(|device| cuda.cuCtxGetDevice(device)), 1);
    assert_eq!(made(|context| cuda.cuStreamGetCtx(stream, context)), other);
    assert_eq!(cuda.fake.violations().len(), 2);
}

#[test]
fn kernels_touch_what_they_must_not() {
    type Parameters = fn(&Cuda, u64) -> (&'static str, Vec<u64>);
    let cases: [(&str, Parameters); 5] = [
        ("the kernel is one that faults", |_, _| ("batchline_test_fault", vec![])),
        ("no kernel called other", |_, _| ("other", vec![])),
        ("writes 3 words", |_, device| ("batchline_fill_u64", vec![device, 3, 0])),
        ("writes 1 words", |_, device| ("batchline_fill_u64", vec![device + 4, 1, 0])),
        ("was freed", |cuda, device| {
            assert_eq!(cuda.cuMemFree_v2(device), 0);
            ("batchline_fill_u64", vec![device, 1, 0])
        }),
    ];
    for (words, parameters) in cases {
        let cuda = Cuda::new("");
        let (stream, device) = (cuda.stream(), cuda.device(16));
        let (name, parameters) = parameters(&cuda, device);
        let function = cuda.function(name);
        assert_eq!(cuda.launch(function, stream, &parameters), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), ILLEGAL_ADDRESS);
        cuda.violated(words);
    }
}
