//! Faults that were found once, each with the scene that showed it.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::task::{Context, Wake, Waker};
use std::time::Duration;

use batchline::testing::{FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, BoxError, ChannelOrder, CommandBufferPool, Conversion, Custom, DType,
    DataSource, Delivery, Device, Error, ErrorPolicy, FnDataset, FnSource, Host, HostTensor,
    IterSource, MemoryLimits, MemoryManager, Sample, SampleSpec, StagingBufferPool,
};
use futures_core::Stream;

use super::*;

/// A view was handed out over memory that a failed submission might still write.
#[test]
fn nothing_is_bound_on_a_device_that_is_lost() {
    let (memory, _) =
        faulty(FaultPlan { unified: true, fail_after_enqueue: Some(1), ..FaultPlan::default() });
    let tensor = memory.tensor(&[64], DType::U8).unwrap();
    let mut buffer = CommandBufferPool::new(&memory, 1).unwrap().get_buffer().unwrap();
    buffer.fill(&tensor, 1u8).unwrap();
    assert!(buffer.execute().is_err());
    assert!(tensor.bind(&Host).unwrap_err().is_device_lost());
}

/// The last memory manager freed blocks that the consumer's work still read.
#[test]
fn memory_outlives_the_consumers_work_on_it() {
    let (memory, control) = faulty(FaultPlan::default());
    // No more batches than outputs: none is written again behind the work that is held back.
    let loader = start(numbers(30, |_| Ok(())), builder(&memory));
    let batch = loader.get_batch().unwrap().unwrap();
    let expected = batch.input_tensor().to_bytes().unwrap();
    control.hold_consumer();
    control.consume(batch.input_tensor(), expected);
    drop(batch);
    loader.stop().unwrap();
    let release = {
        let control = control.clone();
        spawn(move || {
            std::thread::sleep(Duration::from_millis(30));
            control.release();
        })
    };
    drop((loader, memory));
    release.join().unwrap();
    assert_eq!(control.mismatches(), 0);
}

/// Memory that was given up kept the device, and its threads, for ever.
#[test]
fn a_lost_device_is_let_go_of() {
    for panics in [false, true] {
        let mut plan = FaultPlan::default();
        let fault = if panics { &mut plan.panic_in_submit } else { &mut plan.fail_after_enqueue };
        *fault = Some(2);
        let (memory, control) = faulty(plan);
        let loader = start(numbers(100, |_| Ok(())), builder(&memory));
        while loader.get_batch().is_ok_and(|batch| batch.is_some()) {}
        loader.stop().unwrap();
        eventually("the quarantine", || memory.stats().quarantined > 0);
        drop((loader, memory));
        eventually("the device to go", || control.is_closed());
    }
}

struct Bomb;

impl Wake for Bomb {
    fn wake(self: Arc<Self>) {
        panic!("a waker that panics");
    }
}

impl Drop for Bomb {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            panic!("a drop that panics");
        }
    }
}

/// The reaper's thread ended with the panic, and every later submission waited for ever.
#[test]
fn the_reaper_outlives_panics_of_wakers_and_drops() {
    let (memory, control) = faulty(FaultPlan::default());
    let tensor = memory.tensor(&[4], DType::U8).unwrap();
    let staging = StagingBufferPool::new(&memory, 2).unwrap();
    control.hold_transfers();
    let mut transfer = staging.transfer_to_gpu(&[1u8, 2, 3, 4], &tensor).unwrap();
    let bomb = Arc::new(Bomb);
    std::mem::forget(Arc::clone(&bomb));
    let waker = Waker::from(bomb);
    assert!(Pin::new(&mut transfer).poll(&mut Context::from_waker(&waker)).is_pending());
    control.release();
    transfer.wait().unwrap();
    assert_eq!(tensor.to_vec::<u8>().unwrap(), [1, 2, 3, 4]);

    let memory = host();
    let tensor = memory.upload(&[1u8; 4], &[4]).unwrap();
    let view = tensor.bind(&Host).unwrap();
    let pool = CommandBufferPool::new(&memory, 1).unwrap();
    let mut buffer = pool.get_buffer().unwrap();
    let bomb = Bomb;
    let work = Box::new(move |_: batchline::HostCustom<'_>| {
        let _keep = &bomb;
        Ok(())
    });
    buffer.custom(Custom::Host(work), &[], &[&tensor]).unwrap();
    assert!(matches!(buffer.execute(), Err(Error::Borrowed { .. })));
    drop(view);
    tensor.write(&[7u8; 4]).unwrap();
    assert_eq!(tensor.to_vec::<u8>().unwrap(), [7; 4]);
}

/// The state counted a batch that never arrived, so that a resume would have lost it.
#[test]
fn a_batch_that_did_not_arrive_is_not_in_the_state() {
    for unified in [true, false] {
        let (memory, control) = faulty(FaultPlan { unified, ..FaultPlan::default() });
        let loader = start(numbers(1000, |_| Ok(())), builder(&memory));
        assert!(loader.get_batch().unwrap().is_some());
        eventually("batches", || loader.stats().queued_batches >= 2);
        control.lose();
        let first = loader.get_batch().unwrap_err();
        assert!(first.is_device_lost(), "{first}");
        let again = loader.get_batch().unwrap_err();
        assert_eq!(first.chain(), again.chain(), "the same error at every call");
        assert_eq!(loader.state().position, 1);
    }
}

/// A retry asked the iterator for its next item, and the bad one was gone without a word.
#[test]
fn an_iterator_is_not_retried() {
    let source = IterSource::new(|| {
        (0..20u8).map(|n| {
            if n == 7 { Err("bad".into()) } else { Ok(Sample::new(HostTensor::scalar(n))) }
        })
    });
    let policy = ErrorPolicy::Retry { times: 2, backoff: Duration::from_millis(1) };
    let loader = start_source(source, builder(&host()).batch_size(5).error_policy(policy));
    assert!(loader.get_batch().unwrap().is_some());
    assert!(loader.get_batch().unwrap_err().chain().contains("bad"));
}

/// One odd sample took the whole batch with it.
#[test]
fn an_odd_sample_of_an_iterator_is_left_out_alone() {
    let source = IterSource::new(|| {
        (0..10u8).map(|n| {
            let width = if n == 3 { 2 } else { 1 };
            Ok(Sample::new(HostTensor::new(vec![n; width], &[width as u64])?))
        })
    });
    let policy = ErrorPolicy::Skip { at_most: 1 };
    let loader = start_source(source, builder(&host()).error_policy(policy));
    let batch = loader.get_batch().unwrap().unwrap();
    assert_eq!(batch.input_tensor().to_vec::<u8>().unwrap(), [0, 1, 2, 4, 5, 6, 7, 8, 9]);
}

/// Of two consumers that waited, the one that could not be served slept for ever.
#[test]
fn every_consumer_is_told_when_all_is_held() {
    for _ in 0..50 {
        let slow = |index| {
            if index >= 10 {
                std::thread::sleep(Duration::from_micros(200));
            }
            Ok(())
        };
        let config = builder(&host()).prefetch_depth(1).max_held(1);
        let loader = Arc::new(start(numbers(1000, slow), config));
        let held = loader.get_batch().unwrap().unwrap();
        let (send, receive) = mpsc::channel();
        for _ in 0..2 {
            let (loader, send) = (Arc::clone(&loader), send.clone());
            spawn(move || send.send(loader.get_batch()));
        }
        let both: Vec<_> =
            (0..2).map(|_| receive.recv_timeout(Duration::from_secs(5)).unwrap()).collect();
        assert_eq!(both.iter().filter(|batch| batch.is_ok()).count(), 1);
        drop((held, both));
    }
}

/// A second loader failed with a time-out of some microseconds.
#[test]
fn two_loaders_share_the_page_locked_memory() {
    let (device, _) = faulty_device(FaultPlan::default());
    let limits = MemoryLimits::default().staging_limit(1024);
    let memory = MemoryManager::with_limits(&device, limits);
    let config = || builder(&memory).prefetch_depth(3);
    let one = start(numbers(100, |_| Ok(())), config());
    let two = start(numbers(100, |_| Ok(())), config());
    for loader in [&one, &two] {
        assert_eq!(loader.batches().map(|batch| batch.unwrap().len()).sum::<u64>(), 100);
    }
    let third = AsyncDataLoader::new(numbers(9, |_| Ok(())), config().build().unwrap()).unwrap();
    let full = memory.clone();
    let pool = StagingBufferPool::with_buffer_size(&full, 4, 256).unwrap();
    one.stop().unwrap();
    two.stop().unwrap();
    let _all: Vec<_> = (0..4).map(|_| pool.get_buffer().unwrap()).collect();
    assert!(matches!(third.start(), Err(Error::LimitReached { .. })));
}

/// The first kind of buffer took two before the last one got any.
#[test]
fn one_of_each_is_enough() {
    for device in [Device::host(), faulty_device(FaultPlan::default()).0] {
        // A raw batch of 1024 bytes, an output of 4096.
        let limits = MemoryLimits::default().device_limit(5120);
        let memory = MemoryManager::with_limits(&device, limits);
        let spec = SampleSpec::new(DType::U8, &[1024]).unwrap();
        let dataset = FnDataset::new(5, spec, |_, sample| {
            sample.input().fill(1);
            Ok(())
        });
        let config = builder(&memory).batch_size(1).convert(DType::F32, Conversion::new());
        let loader = start(dataset, config);
        assert_eq!(loader.batches().map(|batch| batch.unwrap().len()).sum::<u64>(), 5);
    }
}

/// Waiting for everything, on the thread that brings it about.
#[test]
fn a_completion_that_cleans_up_does_not_hang() {
    let (memory, control) = faulty(FaultPlan::default());
    let tensor = memory.tensor(&[4], DType::U8).unwrap();
    let pool = CommandBufferPool::new(&memory, 4).unwrap();
    let staging = StagingBufferPool::new(&memory, 2).unwrap();
    control.hold_transfers();
    let mut buffer = pool.get_buffer().unwrap();
    buffer.fill(&memory.tensor(&[4], DType::U8).unwrap(), 1u8).unwrap();
    let (commands, other) = (pool.clone(), staging.clone());
    let (go, wait) = mpsc::channel::<()>();
    let submission = buffer
        .execute_async(move |_| {
            wait.recv().unwrap();
            assert!(other.wait_for_transfer_completion().is_err());
            commands.cleanup();
            other.cleanup();
        })
        .unwrap();
    let transfer = staging.transfer_to_gpu(&[1u8, 2, 3, 4], &tensor).unwrap();
    go.send(()).unwrap();
    submission.wait_timeout(Duration::from_secs(5)).expect("no hang").unwrap();
    control.release();
    transfer.wait().unwrap();
}

/// A pull source of batches that are all `at`, the bad ones errors.
struct Pulled {
    at: u64,
    end: u64,
    bad: Vec<u64>,
    delay: Duration,
}

impl DataSource for Pulled {
    fn get_batch(&mut self, size: usize) -> Result<Option<Sample>, BoxError> {
        std::thread::sleep(self.delay);
        if self.at == self.end {
            return Ok(None);
        }
        self.at += 1;
        if self.bad.contains(&self.at) {
            return Err(format!("bad {}", self.at).into());
        }
        Ok(Some(Sample::new(HostTensor::new(vec![self.at.cast_signed(); size], &[size as u64])?)))
    }

    fn reset(&mut self) -> Result<(), BoxError> {
        self.at = 0;
        Ok(())
    }
}

fn pulled(end: u64, bad: &[u64]) -> Pulled {
    Pulled { at: 0, end, bad: bad.to_vec(), delay: Duration::ZERO }
}

fn firsts(loader: &AsyncDataLoader) -> Vec<i64> {
    loader
        .batches()
        .map(|batch| batch.unwrap().input_tensor().to_vec::<i64>().unwrap()[0])
        .collect()
}

/// Skips behind the last batch had no ticket to go with, and a resume met skipped ones again.
#[test]
fn skips_of_a_pull_source_are_all_listed_and_passed_over() {
    let config = || builder(&host()).error_policy(ErrorPolicy::Skip { at_most: 3 });
    let source = || pulled(6, &[2, 6]);
    let loader = start_source(source(), config());
    assert_eq!(firsts(&loader), [1, 3, 4, 5]);
    assert_eq!(loader.state().skipped.len(), 2);
    assert_eq!(loader.stats().skipped, 2);
    loader.stop().unwrap();
    loader.start().unwrap();
    for _ in 0..2 {
        loader.get_batch().unwrap().unwrap();
    }
    let resumed = start_source(source(), config().resume_from(loader.state()));
    assert_eq!(firsts(&resumed), [4, 5]);
}

/// Operations that were recorded and never executed kept outputs that nobody counted.
#[test]
fn a_recorded_operation_holds_its_batch() {
    let (memory, _) = faulty(FaultPlan::default());
    let loader = start(numbers(1000, |_| Ok(())), builder(&memory).prefetch_depth(1).max_held(1));
    let pool = CommandBufferPool::new(&memory, 8).unwrap();
    let target = memory.tensor(&[10], DType::I64).unwrap();
    let mut recorded = Vec::new();
    for _ in 0..2 {
        let batch = loader.get_batch().unwrap().unwrap();
        let mut buffer = pool.get_buffer().unwrap();
        buffer.copy(batch.input_tensor(), &target).unwrap();
        recorded.push(buffer);
    }
    assert!(matches!(loader.get_batch(), Err(Error::TooManyHeld { held: 2, .. })));
    recorded.pop().unwrap().execute().unwrap().wait().unwrap();
    assert!(loader.get_batch().unwrap().is_some());
}

/// The first pull allocated behind the back of a `stop`.
#[test]
fn a_stop_during_the_first_pull_leaves_nothing() {
    let memory = host();
    let source = Pulled { delay: Duration::from_millis(30), ..pulled(100, &[]) };
    let loader = start_source(source, builder(&memory));
    std::thread::sleep(Duration::from_millis(5));
    loader.stop().unwrap();
    assert_eq!(memory.stats().device_in_use, 0);
}

/// A claim that was sized by fast reads was read to its end, however slow reads had become.
#[test]
fn stop_waits_for_one_read_and_not_for_a_claim() {
    let slow = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let (is_slow, count) = (Arc::clone(&slow), Arc::clone(&reads));
    let read = move |_| {
        if is_slow.load(Ordering::SeqCst) {
            count.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    };
    let config = builder(&host()).batch_size(1 << 14).workers(1).endless();
    let loader = start(numbers(1 << 20, read), config);
    for _ in 0..5 {
        loader.get_batch().unwrap().unwrap();
    }
    slow.store(true, Ordering::SeqCst);
    let batch = loader.get_batch_timeout(Duration::from_millis(1)).unwrap();
    drop(batch);
    eventually("a slow read", || {
        reads.load(Ordering::SeqCst) > 0 || loader.stats().queued_batches > 2
    });
    let before = reads.load(Ordering::SeqCst);
    loader.stop().unwrap();
    assert!(reads.load(Ordering::SeqCst) <= before + 2);
}

/// A conversion brought the host device down, another one panicked.
#[test]
fn conversions_of_odd_shapes_are_errors_at_most() {
    let memory = host();
    let wide = memory.tensor(&[1, 1, 1, 2_000_000], DType::U8).unwrap();
    let order =
        Conversion::new().normalize(&[1.0], &[2.0]).reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
    let error = wide.convert(DType::F32, &order).unwrap_err().to_string();
    assert!(error.contains("2000000 channels"), "{error}");
    wide.convert(DType::F32, &Conversion::new().normalize(&[1.0], &[2.0])).unwrap();
    let none = memory.tensor(&[0, 1 << 40, 1 << 40, 3], DType::U8).unwrap();
    assert!(matches!(none.convert_to(DType::F32), Err(Error::Overflow { .. })));
    memory.device().check().unwrap();
}

/// A view that was forgotten kept its block from ever being written again.
#[test]
fn a_forgotten_view_does_not_poison_its_block() {
    let memory = host();
    let tensor = memory.upload(&[1u8; 4], &[4]).unwrap();
    std::mem::forget(tensor.bind(&Host).unwrap());
    drop(tensor);
    memory.upload(&[2u8; 4], &[4]).unwrap();
}

/// It deadlocked.
#[test]
fn a_readback_may_be_read_while_it_is_read() {
    let memory = host();
    let tensor = memory.upload(&[1u8, 2], &[2]).unwrap();
    let mut buffer = CommandBufferPool::new(&memory, 1).unwrap().get_buffer().unwrap();
    let readback = buffer.download(&tensor).unwrap();
    buffer.execute().unwrap().wait().unwrap();
    let inner = readback.with_bytes(|_| readback.to_vec::<u8>()).unwrap().unwrap();
    assert_eq!(inner, [1, 2]);
}

/// It yielded the same error as often as it was asked.
#[test]
fn an_iterator_ends_where_all_is_held() {
    let loader = start(numbers(1000, |_| Ok(())), builder(&host()).prefetch_depth(1).max_held(1));
    let taken: Vec<_> = loader.batches().collect();
    assert_eq!(taken.len(), 3);
    assert!(matches!(taken[2], Err(Error::TooManyHeld { held: 2, .. })));
    drop(taken);
    assert!(matches!(loader.try_get_batch(), Ok(Delivery::Ready(_) | Delivery::NotYet)));
}

/// Everything was read and queued when the stop came, and dropping it passed for the end of the
/// data.
#[test]
fn a_stop_before_the_last_batches_is_not_the_end_of_the_data() {
    let loader = start(numbers(30, |_| Ok(())), builder(&host()));
    assert!(loader.get_batch().unwrap().is_some());
    eventually("the end of reading", || !loader.stats().is_running);
    loader.stop().unwrap();
    let error = loader.get_batch().unwrap_err();
    assert!(matches!(error, Error::Lifecycle { state: "stopped", .. }), "{error}");
}

/// The error came once; then the stream was said to be at its end.
#[test]
fn a_loss_before_the_last_batches_is_told_at_every_call() {
    for unified in [true, false] {
        let (memory, control) = faulty(FaultPlan { unified, ..FaultPlan::default() });
        let loader = start(numbers(30, |_| Ok(())), builder(&memory));
        assert!(loader.get_batch().unwrap().is_some());
        eventually("the end of reading", || !loader.stats().is_running);
        control.lose();
        let first = loader.get_batch().unwrap_err();
        assert!(first.is_device_lost(), "{first}");
        for _ in 0..2 {
            assert_eq!(loader.get_batch().unwrap_err().chain(), first.chain());
        }
    }
}

/// Somebody who is kept waiting.
#[derive(Default)]
struct Block {
    entered: AtomicBool,
    open: AtomicBool,
}

impl Wake for Block {
    fn wake(self: Arc<Self>) {
        self.entered.store(true, Ordering::SeqCst);
        while !self.open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// A loader found one of its blocks given up before it was told why, and said that its pool was
/// closed instead of that the device is lost.
#[test]
fn a_loss_that_is_still_being_told_is_a_loss() {
    let (memory, control) = faulty(FaultPlan::default());
    let (source, told) = (Arc::new(Block::default()), Arc::new(Block::default()));
    let block = Arc::clone(&source);
    let never = numbers(100, move |_| {
        while !block.open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    // Whoever tells the first loader is kept there.
    let first = start(never, builder(&memory));
    let mut stream = first.stream();
    let waker = Waker::from(Arc::clone(&told));
    let poll =
        futures_core::Stream::poll_next(Pin::new(&mut stream), &mut Context::from_waker(&waker));
    assert!(poll.is_pending());
    let reads = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&reads);
    let counting = move |_| {
        count.fetch_add(1, Ordering::SeqCst);
        Ok(())
    };
    let config = builder(&memory).prefetch_depth(1).max_held(1);
    let second = start(numbers(1000, counting), config);
    let batch = second.get_batch().unwrap();
    // The one slot is filled again: of the two batches before it nothing is in flight any more, and
    // there is no output for this one.
    eventually("a third batch", || reads.load(Ordering::SeqCst) == 30);
    control.lose();
    let asked = memory.clone();
    let teller = spawn(move || asked.tensor(&[1], DType::U8).is_err());
    eventually("the first loader to be told", || told.entered.load(Ordering::SeqCst));
    drop(batch);
    eventually("the second loader to end", || !second.stats().is_running);
    let error = second.get_batch().unwrap_err();
    assert!(error.is_device_lost(), "{}", error.chain());
    told.open.store(true, Ordering::SeqCst);
    source.open.store(true, Ordering::SeqCst);
    assert!(teller.join().unwrap());
}

struct PanicsAwake;

impl Wake for PanicsAwake {
    fn wake(self: Arc<Self>) {
        panic!("a waker that panics");
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// The submitter ended with the panic, and the other task was never woken; in `stop`, the threads
/// were left behind.
#[test]
fn a_waker_that_panics_is_its_owners_trouble() {
    for stops in [false, true] {
        let (release, released) = mpsc::sync_channel::<()>(1);
        let (enter, entered) = mpsc::channel();
        let source = FnSource::new(move |size| {
            let _ = enter.send(());
            let _ = released.recv();
            Ok(Some(Sample::new(HostTensor::new(vec![0i64; size], &[size as u64])?)))
        });
        let memory = host();
        let config = builder(&memory).stop_timeout(Duration::from_millis(20));
        let loader = start_source(source, config);
        let woken = Arc::new(Woken::default());
        for waker in [Waker::from(Arc::new(PanicsAwake)), Waker::from(Arc::clone(&woken))] {
            let mut stream = loader.stream();
            let mut context = Context::from_waker(&waker);
            assert!(Pin::new(&mut stream).poll_next(&mut context).is_pending());
        }
        entered.recv().unwrap();
        if stops {
            assert!(matches!(loader.stop(), Err(Error::Detached { .. })));
        } else {
            release.send(()).unwrap();
        }
        eventually("the other task to be woken", || woken.0.load(Ordering::SeqCst));
        assert_eq!(loader.get_batch().is_ok(), !stops);
        drop(release);
        eventually("the stop to succeed", || loader.stop().is_ok());
        assert_home(&memory);
    }
}
