//! What runs when.

use std::ffi::c_void;
use std::ptr::null_mut;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use fake_cuda::codes::*;

use crate::cuda::{Cuda, NON_BLOCKING, bytes, made, take, write};

fn eventually(what: &str, done: impl Fn() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what} did not come about");
        std::thread::yield_now();
    }
}

#[test]
fn a_stream_does_its_work_in_order() {
    for seed in 0..20 {
        let cuda = Cuda::new(&format!("seed={seed},random_latency_us=20"));
        let (stream, device) = (cuda.stream(), cuda.device(8));
        let (up, down) = (cuda.host(&[1; 8]), cuda.host(&[0; 8]));
        assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, up, 8, stream), 0);
        assert_eq!(cuda.cuMemsetD8Async(device, 2, 4, stream), 0);
        assert_eq!(cuda.cuMemsetD16Async(device, 0x0403, 1, stream), 0);
        assert_eq!(cuda.cuMemcpyDtoDAsync_v2(device + 6, device, 2, stream), 0);
        assert_eq!(cuda.cuMemsetD32Async(device, 0x0807_0605, 1, stream), 0);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(down, device, 8, stream), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(bytes(down, 8), [5, 6, 7, 8, 1, 1, 3, 4]);
        cuda.no_violations();
    }
}

#[test]
fn work_runs_later_and_copies_read_when_they_run() {
    let cuda = Cuda::new("held=1");
    let (stream, host) = (cuda.stream(), cuda.host(&[1; 4]));
    let device = made(|address| cuda.cuMemAlloc_v2(address, 4));
    assert_eq!(cuda.cuMemcpyHtoDAsync_v2(device, host, 4, stream), 0);
    assert_eq!(cuda.cuStreamQuery(stream), NOT_READY);
    write(host, &[2; 4]);
    cuda.fake.release_all();
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.cuStreamQuery(stream), 0);
    assert_eq!(cuda.read(device, 4), [2; 4]);
}

#[test]
fn a_wait_orders_two_streams() {
    for seed in 0..20 {
        let cuda = Cuda::new(&format!("seed={seed}"));
        let (first, second, event) = (cuda.stream(), cuda.stream(), cuda.event());
        let device = cuda.device(4);
        cuda.fake.hold(first);
        assert_eq!(cuda.cuMemsetD8Async(device, 1, 4, first), 0);
        assert_eq!(cuda.cuEventRecord(event, first), 0);
        assert_eq!(cuda.cuStreamWaitEvent(second, event, 0), 0);
        assert_eq!(cuda.cuMemsetD8Async(device, 2, 2, second), 0);
        assert_eq!(cuda.cuEventQuery(event), NOT_READY);
        assert_eq!(cuda.cuStreamQuery(second), NOT_READY);
        assert_eq!(cuda.read(device, 4), [0; 4]);
        cuda.fake.release(first);
        assert_eq!(cuda.cuStreamSynchronize(second), 0);
        assert_eq!(cuda.cuEventQuery(event), 0);
        assert_eq!(cuda.read(device, 4), [2, 2, 1, 1]);
    }
}

#[test]
fn an_event_is_where_it_was_recorded_last_and_a_wait_keeps_the_point_of_its_call() {
    let cuda = Cuda::new("");
    let (slow, fast, waiter) = (cuda.stream(), cuda.stream(), cuda.stream());
    let event = cuda.event();
    // Never recorded: it has passed.
    assert_eq!(cuda.cuEventQuery(event), 0);
    assert_eq!(cuda.cuEventSynchronize(event), 0);
    assert_eq!(cuda.cuStreamWaitEvent(waiter, event, 0), 0);

    cuda.fake.hold(slow);
    assert_eq!(cuda.cuEventRecord(event, fast), 0);
    assert_eq!(cuda.cuStreamWaitEvent(waiter, event, 0), 0);
    // Recorded again: the wait is for the first point.
    assert_eq!(cuda.cuEventRecord(event, slow), 0);
    assert_eq!(cuda.cuStreamSynchronize(waiter), 0);
    assert_eq!(cuda.cuEventQuery(event), NOT_READY);
    // And a wait that comes now is for the second, even when the event is recorded elsewhere.
    assert_eq!(cuda.cuStreamWaitEvent(waiter, event, 0), 0);
    assert_eq!(cuda.cuEventRecord(event, fast), 0);
    assert_eq!(cuda.cuEventSynchronize(event), 0);
    assert_eq!(cuda.cuEventDestroy_v2(event), 0);
    assert_eq!(cuda.cuStreamQuery(waiter), NOT_READY);
    cuda.fake.release(slow);
    assert_eq!(cuda.cuStreamSynchronize(waiter), 0);
    cuda.no_violations();
}

#[test]
fn the_default_stream_waits_for_blocking_streams_and_they_for_it() {
    let cuda = Cuda::new("");
    let blocking = made(|stream| cuda.cuStreamCreate(stream, 0));
    let (free, device) = (cuda.stream(), cuda.device(1));
    let default = cuda.fake.streams()[0];
    assert_eq!(default.number, 0);

    cuda.fake.hold(blocking);
    assert_eq!(cuda.cuMemsetD8Async(device, 1, 1, blocking), 0);
    assert_eq!(cuda.cuMemsetD8Async(device, 2, 1, 0), 0);
    assert_eq!(cuda.cuStreamSynchronize(free), 0);
    assert_eq!(cuda.cuStreamQuery(0), NOT_READY);
    cuda.fake.release(blocking);
    assert_eq!(cuda.cuStreamSynchronize(0), 0);
    assert_eq!(cuda.read(device, 1), [2]);

    cuda.fake.hold(default.handle);
    assert_eq!(cuda.cuMemsetD8Async(device, 3, 1, 1), 0);
    assert_eq!(cuda.cuMemsetD8Async(device, 4, 1, blocking), 0);
    assert_eq!(cuda.cuMemsetD8Async(device, 5, 1, free), 0);
    assert_eq!(cuda.cuStreamSynchronize(free), 0);
    assert_eq!(cuda.cuStreamQuery(blocking), NOT_READY);
    cuda.fake.release(default.handle);
    assert_eq!(cuda.cuStreamSynchronize(blocking), 0);
    assert_eq!(cuda.read(device, 1), [4]);
    cuda.no_violations();
}

/// The order in which three streams do four things each, which are all queued before any begins.
fn interleaving(settings: &str) -> Vec<String> {
    let cuda = Cuda::new(&format!("trace=1,{settings}"));
    let device = cuda.device(16);
    cuda.fake.hold_all();
    let streams = [cuda.stream(), cuda.stream(), cuda.stream()];
    for count in 1..=4 {
        for stream in streams {
            assert_eq!(cuda.cuMemsetD8Async(device, 1, count, stream), 0);
        }
    }
    cuda.fake.release_all();
    assert_eq!(cuda.cuCtxSynchronize(), 0);
    let trace = cuda.fake.trace();
    assert_eq!(trace.len(), 13);
    for number in 1..=3 {
        let of_stream = format!("device 0 stream {number}: fill of ");
        let fills = trace.iter().filter_map(|line| line.strip_prefix(&of_stream));
        assert_eq!(fills.collect::<Vec<_>>(), ["1 bytes", "2 bytes", "3 bytes", "4 bytes"]);
    }
    trace
}

#[test]
fn the_order_between_streams_is_that_of_the_seed() {
    for latencies in ["", ",random_latency_us=300", ",latency_us=20,random_latency_us=100"] {
        let of_seed = |seed: u64| interleaving(&format!("seed={seed}{latencies}"));
        let orders: Vec<_> = (0..5).map(of_seed).collect();
        assert_eq!(orders, (0..5).map(of_seed).collect::<Vec<_>>(), "{latencies}");
        assert!(orders.iter().any(|order| *order != orders[0]), "{latencies}");
    }
}

#[test]
fn work_takes_its_time_on_each_stream_by_itself() {
    let cuda = Cuda::new("");
    let device = cuda.device(4);
    let streams: Vec<_> = (0..8).map(|_| cuda.stream()).collect();
    cuda.fake.set("latency_us=40000");
    let began = Instant::now();
    for stream in &streams {
        assert_eq!(cuda.cuMemsetD8Async(device, 1, 4, *stream), 0);
    }
    assert_eq!(cuda.cuStreamQuery(streams[0]), NOT_READY);
    assert_eq!(cuda.cuCtxSynchronize(), 0);
    let took = began.elapsed();
    assert!(took >= Duration::from_millis(40), "{took:?}");
    // One after another they would take 320 ms.
    assert!(took < Duration::from_millis(280), "{took:?}");
}

extern "C" fn wait_for_gate(data: *mut c_void) {
    let (begun, gate): (Sender<()>, Receiver<()>) = take(data);
    begun.send(()).unwrap();
    gate.recv().unwrap();
}

#[test]
fn a_host_function_holds_up_its_own_stream_only() {
    let cuda = Cuda::new("");
    let (held, free) = (cuda.stream(), cuda.stream());
    let device = cuda.device(1);
    let ((begun, has_begun), (open, gate)) = (channel::<()>(), channel::<()>());
    let data = Box::into_raw(Box::new((begun, gate))).cast();
    assert_eq!(cuda.cuLaunchHostFunc(held, wait_for_gate, data), 0);
    assert_eq!(cuda.cuMemsetD8Async(device, 1, 1, held), 0);
    has_begun.recv().unwrap();
    assert_eq!(cuda.cuMemsetD8Async(device, 2, 1, free), 0);
    assert_eq!(cuda.cuStreamSynchronize(free), 0);
    assert_eq!(cuda.cuStreamQuery(held), NOT_READY);
    open.send(()).unwrap();
    assert_eq!(cuda.cuStreamSynchronize(held), 0);
    assert_eq!(cuda.read(device, 1), [1]);
}

#[test]
fn a_destroyed_stream_still_does_what_is_queued() {
    let cuda = Cuda::new("");
    let (stream, device) = (cuda.stream(), cuda.device(1));
    cuda.fake.hold(stream);
    assert_eq!(cuda.cuMemsetD8Async(device, 7, 1, stream), 0);
    assert_eq!(cuda.cuStreamDestroy_v2(stream), 0);
    assert_eq!(cuda.fake.live().streams, 0);
    cuda.fake.release_all();
    assert_eq!(cuda.cuCtxSynchronize(), 0);
    assert_eq!(cuda.read(device, 1), [7]);
    cuda.no_violations();
}

#[test]
fn a_kernel_gets_its_parameters_as_they_were_at_the_launch() {
    let cuda = Cuda::new("");
    let (stream, device) = (cuda.stream(), cuda.device(24));
    let fill = cuda.function("batchline_fill_u64");
    cuda.fake.hold(stream);
    let mut parameters = [device + 8, 1, 0x0102_0304_0506_0708];
    assert_eq!(cuda.launch(fill, stream, &parameters), 0);
    parameters.fill(0);
    cuda.fake.release(stream);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 24), [[0; 8], [8, 7, 6, 5, 4, 3, 2, 1], [0; 8]].concat());
    let none: *mut *mut c_void = null_mut();
    let mut at = [null_mut(); 3];
    let mut launch = |grid, block| {
        cuda.cuLaunchKernel(fill, grid, 1, 1, block, 1, 1, 0, stream, at.as_mut_ptr(), none)
    };
    assert_eq!(launch(0, 1), INVALID_VALUE);
    assert_eq!(launch(1, 1025), INVALID_VALUE);
}

/// The arguments of a batch that takes from host memory, all with one order of access.
fn batch(cuda: &Cuda, to: &[u64], from: &[u64], lens: &[usize], order: u32, stream: usize) -> u32 {
    let (attributes, starts) = ([order, 0, 0, 0, 0, 0], [0]);
    let (to, from, count) = (to.as_ptr(), from.as_ptr(), lens.len());
    let attributes = &raw const attributes;
    cuda.cuMemcpyBatchAsync_v2(
        to,
        from,
        lens.as_ptr(),
        count,
        attributes,
        starts.as_ptr(),
        1,
        stream,
    )
}

#[test]
fn a_batch_copies_all_its_pieces() {
    let cuda = Cuda::new("");
    let (stream, device) = (cuda.stream(), cuda.device(4));
    let host = cuda.host(&[1, 2, 3]);
    let from = [host as u64 + 2, host as u64];
    cuda.fake.hold(stream);
    assert_eq!(batch(&cuda, &[device, device + 2], &from, &[1, 2], 1, stream), 0);
    // Read in the stream's order: what is written now is copied.
    write(host, &[7]);
    cuda.fake.release(stream);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 4), [3, 0, 7, 2]);
    // Read during the call: it may be any memory, which is then the caller's again.
    let mut own = [9u8];
    cuda.fake.hold(stream);
    assert_eq!(batch(&cuda, &[device], &[own.as_ptr() as u64], &[1], 2, stream), 0);
    own[0] = 0;
    cuda.fake.release(stream);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 1), [9]);
    assert_eq!(own, [0]);
    cuda.no_violations();
}

#[test]
fn a_batch_refuses_what_the_driver_refuses() {
    let cuda = Cuda::new("");
    let (stream, device, host) = (cuda.stream(), cuda.device(4), cuda.host(&[1; 4]) as u64);
    assert_eq!(batch(&cuda, &[device], &[host], &[4], 1, 0), INVALID_VALUE);
    cuda.violated("default stream");
    assert_eq!(batch(&cuda, &[device], &[host], &[4], 0, stream), INVALID_VALUE);
    // The first version says which copy it was.
    let (attributes, starts, mut failed) = ([1, 0, 0, 0, 0, 0], [0], 0);
    let mut first = |lens: [usize; 2]| {
        let (to, from) = ([device, device + 1], [host, host]);
        let (to, from, lens) = (to.as_ptr(), from.as_ptr(), lens.as_ptr());
        let (attributes, starts) = (&raw const attributes, starts.as_ptr());
        let failed = &raw mut failed;
        cuda.cuMemcpyBatchAsync(to, from, lens, 2, attributes, starts, 1, failed, stream)
    };
    assert_eq!(first([1, 1]), 0);
    assert_eq!(first([1, 0]), INVALID_VALUE);
    assert_eq!(failed, 1);
}

#[test]
fn a_graph_does_what_was_captured() {
    let cuda = Cuda::new("");
    let (stream, device, event) = (cuda.stream(), cuda.device(2), cuda.event());
    assert_eq!(cuda.cuStreamBeginCapture_v2(stream, 1), 0);
    assert_eq!(cuda.cuMemsetD8Async(device, 5, 1, stream), 0);
    assert_eq!(cuda.cuEventRecord(event, stream), 0);
    assert_eq!(cuda.cuMemcpyDtoDAsync_v2(device + 1, device, 1, stream), 0);
    let graph = made(|graph| cuda.cuStreamEndCapture(stream, graph));
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 2), [0, 0]);
    let executable = made(|executable| cuda.cuGraphInstantiateWithFlags(executable, graph, 0));
    assert_eq!(cuda.cuGraphLaunch(executable, stream), 0);
    assert_eq!(cuda.cuStreamSynchronize(stream), 0);
    assert_eq!(cuda.read(device, 2), [5, 5]);
    assert_eq!(cuda.fake.live().graphs, 2);
    assert_eq!(cuda.cuGraphDestroy(graph), 0);
    assert_eq!(cuda.cuGraphExecDestroy(executable), 0);
    assert_eq!(cuda.fake.live().graphs, 0);
    cuda.no_violations();
}

/// Captures what `record` does on a stream; the executable.
fn executable(cuda: &Cuda, stream: usize, record: impl FnOnce()) -> usize {
    assert_eq!(cuda.cuStreamBeginCapture_v2(stream, 2), 0);
    record();
    let graph = made(|graph| cuda.cuStreamEndCapture(stream, graph));
    let executable = made(|executable| cuda.cuGraphInstantiateWithFlags(executable, graph, 0));
    // The executable does not need it any more.
    assert_eq!(cuda.cuGraphDestroy(graph), 0);
    executable
}

#[test]
fn a_graph_is_launched_again_and_reads_what_is_there_then() {
    let cuda = Cuda::new("random_latency_us=20");
    let (captured, stream) = (cuda.stream(), cuda.stream());
    let (from, to, filled, host) =
        (cuda.device(2), cuda.device(2), cuda.device(8), cuda.host(&[0; 8]));
    let function = cuda.function("batchline_fill_u64");
    let graph = executable(&cuda, captured, || {
        assert_eq!(cuda.cuMemcpyDtoDAsync_v2(to, from, 2, captured), 0);
        // What a kernel is told is copied: it is gone when the call is over.
        assert_eq!(cuda.launch(function, captured, &[filled, 1, 0x0102_0304]), 0);
        assert_eq!(cuda.cuMemsetD16Async(from, 0x0909, 1, captured), 0);
    });
    assert_eq!(cuda.cuStreamDestroy_v2(captured), 0);
    for value in 1..4u8 {
        assert_eq!(cuda.cuMemsetD8Async(from, value, 2, stream), 0);
        assert_eq!(cuda.cuMemsetD8Async(filled, 0, 8, stream), 0);
        assert_eq!(cuda.cuGraphLaunch(graph, stream), 0);
        assert_eq!(cuda.cuMemcpyDtoHAsync_v2(host, to, 2, stream), 0);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        assert_eq!(bytes(host, 2), [value; 2]);
        assert_eq!(cuda.read(from, 2), [9; 2]);
        assert_eq!(cuda.read(filled, 8), [4, 3, 2, 1, 0, 0, 0, 0]);
    }
    assert_eq!(cuda.cuGraphInstantiateWithFlags(&mut 0, 1, 16), INVALID_VALUE);
    assert_eq!(cuda.cuGraphExecDestroy(graph), 0);
    assert_eq!(cuda.fake.live().graphs, 0);
    cuda.no_violations();
}

#[test]
fn launches_of_a_graph_come_one_after_another_on_any_streams() {
    let cuda = Cuda::new("");
    let (one, other, device) = (cuda.stream(), cuda.stream(), cuda.device(1));
    let graph = executable(&cuda, one, || {
        assert_eq!(cuda.cuMemsetD8Async(device, 5, 1, one), 0);
    });
    cuda.fake.hold(one);
    assert_eq!(cuda.cuGraphLaunch(graph, one), 0);
    assert_eq!(cuda.cuGraphLaunch(graph, other), 0);
    std::thread::sleep(Duration::from_millis(10));
    assert_eq!(cuda.cuStreamQuery(other), NOT_READY);
    cuda.fake.release(one);
    assert_eq!(cuda.cuStreamSynchronize(other), 0);
    assert_eq!(cuda.cuGraphExecDestroy(graph), 0);
    cuda.no_violations();
}

#[test]
fn a_capture_forbids_queries_to_threads_that_do_not_say_otherwise() {
    let cuda = Cuda::new("");
    let (stream, event) = (cuda.stream(), cuda.event());
    assert_eq!(cuda.cuEventRecord(event, cuda.stream()), 0);
    for (capture, thread, expected) in [
        (0, 0, STREAM_CAPTURE_UNSUPPORTED),
        (0, 2, 0),
        (1, 0, STREAM_CAPTURE_UNSUPPORTED),
        (2, 0, 0),
    ] {
        assert_eq!(cuda.cuCtxSynchronize(), 0);
        assert_eq!(cuda.cuStreamBeginCapture_v2(stream, capture), 0);
        let mut mode = thread;
        assert_eq!(cuda.cuThreadExchangeStreamCaptureMode(&raw mut mode), 0);
        assert_eq!(cuda.cuEventQuery(event), expected, "{capture} {thread}");
        assert_eq!(cuda.cuThreadExchangeStreamCaptureMode(&raw mut mode), 0);
        assert_eq!(mode, thread);
        let mut graph = 0;
        let ended = cuda.cuStreamEndCapture(stream, &raw mut graph);
        assert_eq!(ended, if expected == 0 { 0 } else { STREAM_CAPTURE_INVALIDATED });
    }
    // Another thread is forbidden it only by a capture that is global.
    assert_eq!(cuda.cuStreamBeginCapture_v2(stream, 1), 0);
    let context = made(|context| cuda.cuCtxGetCurrent(context));
    std::thread::scope(|threads| {
        threads.spawn(|| {
            assert_eq!(cuda.cuCtxSetCurrent(context), 0);
            assert_eq!(cuda.cuEventQuery(event), 0);
        });
    });
    let graph = made(|graph| cuda.cuStreamEndCapture(stream, graph));
    assert_eq!(cuda.cuGraphDestroy(graph), 0);
    cuda.no_violations();
}

#[test]
fn per_thread_streams_are_apart() {
    let cuda = Cuda::new("");
    let device = cuda.device(1);
    cuda.fake.hold_all();
    assert_eq!(cuda.cuMemsetD8Async(device, 1, 1, 2), 0);
    assert_eq!(cuda.cuStreamQuery(2), NOT_READY);
    assert_eq!(cuda.fake.streams().len(), 2);
    assert_eq!(cuda.fake.live().streams, 0);
    cuda.fake.release_all();
    eventually("the end of the stream", || cuda.cuStreamQuery(2) == 0);
    assert_eq!(cuda.cuStreamCreateWithPriority(&mut 0, NON_BLOCKING, -1), 0);
}
