//! Which calls wait for all streams, and which for none.

use std::ffi::CString;
use std::thread::sleep;
use std::time::{Duration, Instant};

use fake_cuda::When;
use fake_cuda::codes::*;

use crate::cuda::{Cuda, PTX, made};

/// Long enough for a call that does not wait.
const WHILE: Duration = Duration::from_millis(30);

/// A call that waits, on memory that nothing uses.
type Call = fn(&Cuda, u64) -> u32;

const CALLS: [(&str, Call); 2] = [
    ("cuModuleLoadData", |cuda, _| {
        let text = CString::new(PTX).unwrap();
        cuda.cuModuleLoadData(&mut 0, text.as_ptr())
    }),
    ("cuMemFree_v2", |cuda, address| cuda.cuMemFree_v2(address)),
];

/// Makes a call on a thread of its own. Once it waits inside, `meanwhile` is run, which must make it
/// return; its result.
fn waits(cuda: &Cuda, (symbol, call): (&str, Call), memory: u64, meanwhile: impl FnOnce()) -> u32 {
    let context = made(|context| cuda.cuCtxGetCurrent(context));
    let before = cuda.fake.calls(Some(symbol));
    std::thread::scope(|threads| {
        let caller = threads.spawn(|| {
            assert_eq!(cuda.cuCtxSetCurrent(context), 0);
            call(cuda, memory)
        });
        // It is counted when it comes, and nothing else is done till it waits.
        while cuda.fake.calls(Some(symbol)) == before {
            std::thread::yield_now();
        }
        sleep(WHILE);
        assert!(!caller.is_finished(), "{symbol} did not wait");
        meanwhile();
        caller.join().unwrap()
    })
}

#[test]
fn loading_and_freeing_wait_for_what_was_queued_before_on_any_stream() {
    for call in CALLS {
        for destroyed in [false, true] {
            let cuda = Cuda::new("");
            let (stream, later) = (cuda.stream(), cuda.stream());
            let (used, unused) = (cuda.device(1), cuda.device(8));
            cuda.fake.hold(stream);
            cuda.fake.hold(later);
            assert_eq!(cuda.cuMemsetD8Async(used, 7, 1, stream), 0);
            if destroyed {
                assert_eq!(cuda.cuStreamDestroy_v2(stream), 0);
            }
            let result = waits(&cuda, call, unused, || {
                assert_eq!(cuda.cuMemsetD8Async(used, 8, 1, later), 0);
                cuda.fake.release(stream);
            });
            assert_eq!(result, 0);
            assert_eq!(cuda.read(used, 1), [7]);
            // What came later may take as long as it likes.
            assert_eq!(cuda.cuStreamQuery(later), NOT_READY);
            cuda.fake.release(later);
            assert_eq!(cuda.cuStreamSynchronize(later), 0);
            cuda.no_violations();
        }
    }
}

#[test]
fn other_calls_do_not_wait() {
    let cuda = Cuda::new("");
    let (module, known) = cuda.module_and_function("batchline_fill_u64");
    let (held, free, device) = (cuda.stream(), cuda.stream(), cuda.device(8));
    cuda.fake.hold(held);
    assert_eq!(cuda.cuMemsetD8Async(device, 1, 1, held), 0);
    let began = Instant::now();
    let fresh = made(|address| cuda.cuMemAlloc_v2(address, 8));
    cuda.host(&[0; 8]);
    let mut own = vec![0u8; 8];
    assert_eq!(cuda.cuMemHostRegister_v2(own.as_mut_ptr(), 8, 1), 0);
    cuda.event();
    cuda.stream();
    made(|function| cuda.cuModuleGetFunction(function, module, c"other".as_ptr()));
    // The first launch of a kernel, too.
    assert_eq!(cuda.launch(known, free, &[fresh, 1, 7]), 0);
    // Nor does it wait for another device, or for what is only captured.
    let captured = cuda.stream();
    assert_eq!(cuda.cuStreamBeginCapture_v2(captured, 2), 0);
    assert_eq!(cuda.cuMemsetD8Async(device, 1, 1, captured), 0);
    let (first, second) = (made(|context| cuda.cuCtxGetCurrent(context)), cuda.retain(1));
    assert_eq!(cuda.cuCtxSetCurrent(second), 0);
    for (symbol, call) in CALLS {
        assert_eq!(call(&cuda, cuda.device(1)), 0, "{symbol}");
    }
    assert_eq!(cuda.cuCtxSetCurrent(first), 0);
    assert!(began.elapsed() < Duration::from_secs(5));
    if fake_cuda::KERNELS {
        assert_eq!(cuda.cuStreamSynchronize(free), 0);
        assert_eq!(cuda.read(fresh, 8), [7, 0, 0, 0, 0, 0, 0, 0]);
    }
    assert_eq!(cuda.cuStreamQuery(held), NOT_READY);
    cuda.fake.release(held);
    assert_eq!(cuda.cuStreamSynchronize(held), 0);
    assert_eq!(cuda.cuMemFree_v2(fresh), 0);
    cuda.no_violations();
}

#[test]
fn a_failure_ends_the_wait_and_has_no_effect() {
    for call in CALLS {
        let cuda = Cuda::new("");
        let (stream, used, unused) = (cuda.stream(), cuda.device(1), cuda.device(8));
        cuda.fake.hold(stream);
        assert_eq!(cuda.cuMemsetD8Async(used, 1, 1, stream), 0);
        let live = cuda.fake.live();
        // One that is ordered comes at once.
        cuda.fake.fail(Some(call.0), 1, OUT_OF_MEMORY, When::Before);
        assert_eq!(call.1(&cuda, unused), OUT_OF_MEMORY);
        let result = waits(&cuda, call, unused, || cuda.fake.lose(0, LAUNCH_FAILED));
        assert_eq!(result, LAUNCH_FAILED);
        assert_eq!(call.1(&cuda, unused), LAUNCH_FAILED);
        assert_eq!(cuda.fake.live(), live);
        cuda.no_violations();
    }
}

#[test]
fn a_wait_without_an_end_is_noticed() {
    for (symbol, call) in CALLS {
        let cuda = Cuda::new("patience_ms=30");
        let (stream, used, unused) = (cuda.stream(), cuda.device(1), cuda.device(8));
        cuda.fake.hold(stream);
        assert_eq!(cuda.cuMemsetD8Async(used, 1, 1, stream), 0);
        assert_eq!(call(&cuda, unused), 0);
        cuda.violated(&format!("{symbol} waits for all that was queued before it"));
        cuda.violated("which does not end: stream 1: fill of 1 bytes");
        cuda.fake.release(stream);
        assert_eq!(cuda.cuStreamSynchronize(stream), 0);
        cuda.violated(symbol);
    }
}

/// The wait makes it safe, but it stops the whole device: memory is to be freed after its use.
#[test]
fn memory_is_freed_while_work_names_it() {
    let cuda = Cuda::new("");
    let (stream, used) = (cuda.stream(), cuda.device(1));
    cuda.fake.hold(stream);
    assert_eq!(cuda.cuMemsetD8Async(used, 1, 1, stream), 0);
    let result = waits(&cuda, CALLS[1], used, || {
        cuda.violated("freed while in use: fill of 1 bytes");
        cuda.fake.release(stream);
    });
    assert_eq!(result, 0);
    assert_eq!(cuda.cuStreamQuery(stream), 0);
    cuda.violated("freed while in use");
}
