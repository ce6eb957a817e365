//! The pools and command buffers by themselves: custom work, views, futures, and misuse.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Duration;

use batchline::testing::{FaultPlan, faulty_device};
use batchline::{
    BatchOperation, CommandBufferPool, Custom, DType, Device, Error, Host, HostCustom,
    MemoryManager, StagingBufferPool,
};

fn host() -> (MemoryManager, CommandBufferPool) {
    let memory = MemoryManager::new(&Device::host());
    let commands = CommandBufferPool::new(&memory, 4).unwrap();
    (memory, commands)
}

fn custom(
    work: impl FnOnce(HostCustom<'_>) -> Result<(), batchline::BoxError> + Send + 'static,
) -> Custom {
    Custom::Host(Box::new(work))
}

#[test]
fn custom_work_runs_in_order_with_the_rest() {
    for device in [Device::host(), faulty_device(FaultPlan::default()).0] {
        let memory = MemoryManager::new(&device);
        let commands = CommandBufferPool::new(&memory, 4).unwrap();
        let source = memory.upload(&[1u8, 2, 3, 4], &[4]).unwrap();
        let target = memory.tensor(&[4], DType::U8).unwrap();
        let batch = vec![
            BatchOperation::fill(&target, 9u8),
            BatchOperation::custom(
                custom(|tensors| {
                    for (to, from) in tensors.writes.into_iter().flatten().zip(tensors.reads[0]) {
                        *to = *to * 10 + from;
                    }
                    Ok(())
                }),
                &[&source],
                &[&target],
            ),
        ];
        commands.execute_batch(batch).unwrap().wait().unwrap();
        assert_eq!(target.to_vec::<u8>().unwrap(), [91, 92, 93, 94]);
    }
}

#[test]
fn custom_work_that_fails_or_panics_is_an_error_and_the_device_goes_on() {
    let (memory, commands) = host();
    let tensor = memory.upload(&[7u8], &[1]).unwrap();
    for (work, part) in [
        (custom(|_| Err("out of paper".into())), "a custom operation failed: out of paper"),
        (custom(|_| panic!("oops")), "a custom operation panicked: oops"),
    ] {
        let mut buffer = commands.get_buffer().unwrap();
        buffer.custom(work, &[&tensor], &[]).unwrap();
        let heard = Arc::new(AtomicUsize::new(0));
        let hears = Arc::clone(&heard);
        let error = buffer
            .execute_async(move |result| {
                assert!(result.is_err());
                hears.fetch_add(1, Ordering::SeqCst);
            })
            .unwrap_err();
        assert_eq!(error.chain(), part);
        commands.wait_idle();
        assert_eq!(heard.load(Ordering::SeqCst), 1, "its completion runs once");
    }
    assert_eq!(tensor.to_vec::<u8>().unwrap(), [7]);
}

/// The pool's buffers come back a moment after the error.
trait WaitIdle {
    fn wait_idle(&self);
}

impl WaitIdle for CommandBufferPool {
    fn wait_idle(&self) {
        while self.stats().in_use > 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn custom_work_is_checked_when_it_is_recorded() {
    let (memory, commands) = host();
    let tensor = memory.upload(&[7u8; 8], &[8]).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let refused = buffer.custom(custom(|_| Ok(())), &[&tensor], &[&tensor]).unwrap_err();
    assert!(refused.to_string().contains("overlap"), "{refused}");
    let refused = buffer.custom(custom(|_| Ok(())), &[], &[&tensor, &tensor]).unwrap_err();
    assert!(refused.to_string().contains("overlap"), "{refused}");
    let foreign = MemoryManager::new(&Device::host()).tensor(&[8], DType::U8).unwrap();
    assert!(buffer.custom(custom(|_| Ok(())), &[&foreign], &[]).is_err());
}

#[test]
fn custom_work_that_calls_back_is_told_so_and_does_not_hang() {
    let (memory, commands) = host();
    let tensor = memory.upload(&[7u8; 8], &[8]).unwrap();
    let inner = tensor.clone();
    let mut buffer = commands.get_buffer().unwrap();
    let work = custom(move |_| {
        inner.write(&[1u8; 8])?;
        Ok(())
    });
    buffer.custom(work, &[], &[]).unwrap();
    let error = buffer.execute().unwrap_err().chain();
    assert!(error.contains("cannot use the device that it runs on"), "{error}");
}

#[test]
fn a_completion_that_needs_buffers_in_flight_does_not_hang() {
    let (memory, commands) = host();
    let pool = StagingBufferPool::with_buffer_size(&memory, 1, 256).unwrap();
    let _taken = pool.get_buffer().unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let tensor = memory.tensor(&[8], DType::U8).unwrap();
    buffer.fill(&tensor, 1u8).unwrap();
    let (send, receive) = std::sync::mpsc::channel();
    let other = pool.clone();
    let submission =
        buffer.execute_async(move |_| send.send(other.get_buffer().map(drop)).unwrap()).unwrap();
    submission.wait().unwrap();
    assert!(matches!(receive.recv().unwrap(), Err(Error::Timeout { .. })));
}

#[test]
fn a_tensor_that_is_seen_on_the_host_is_not_written() {
    let (memory, _) = host();
    let tensor = memory.upload(&[1.5f32, 2.5], &[2]).unwrap();
    let view = tensor.bind(&Host).unwrap();
    assert_eq!(view.as_slice::<f32>().unwrap(), [1.5, 2.5]);
    assert!(view.as_slice::<f64>().is_err());
    assert!(matches!(tensor.write(&[0f32; 2]), Err(Error::Borrowed { .. })));
    drop(view);
    tensor.write(&[3f32; 2]).unwrap();
    assert_eq!(tensor.to_vec::<f32>().unwrap(), [3.0; 2]);

    let (device, _) = faulty_device(FaultPlan::default());
    let far = MemoryManager::new(&device).upload(&[1u8], &[1]).unwrap();
    let error = far.bind(&Host).unwrap_err().to_string();
    assert!(error.contains("use `to_vec`"), "{error}");
}

/// Wakes the thread that polls.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    loop {
        match future.as_mut().poll(&mut Context::from_waker(&waker)) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park_timeout(Duration::from_secs(10)),
        }
    }
}

#[test]
fn submissions_and_transfers_can_be_awaited() {
    let max_delay = Duration::from_millis(2);
    let (device, control) = faulty_device(FaultPlan { max_delay, ..FaultPlan::default() });
    let memory = MemoryManager::new(&device);
    let pool = StagingBufferPool::with_buffer_size(&memory, 2, 1024).unwrap();
    let tensor = memory.tensor(&[5000], DType::U8).unwrap();
    control.hold_transfers();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(5));
            control.release();
        });
        block_on(pool.transfer_to_gpu(&[3u8; 5000], &tensor).unwrap()).unwrap();
    });
    assert_eq!(tensor.to_vec::<u8>().unwrap(), [3; 5000]);
    let mut buffer = CommandBufferPool::new(&memory, 1).unwrap().get_buffer().unwrap();
    buffer.fill(&tensor, 4u8).unwrap();
    block_on(buffer.execute().unwrap()).unwrap();
    control.lose();
    assert!(tensor.to_vec::<u8>().unwrap_err().is_device_lost());
}

#[test]
fn a_buffer_that_is_dropped_unused_keeps_nothing() {
    let (memory, commands) = host();
    let pool = StagingBufferPool::with_buffer_size(&memory, 1, 256).unwrap();
    let tensor = memory.tensor(&[8], DType::U8).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    buffer.upload(pool.get_buffer().unwrap(), &tensor).unwrap();
    buffer.fill(&tensor, 1u8).unwrap();
    assert_eq!((buffer.len(), pool.stats().in_use), (2, 1));
    drop(buffer);
    assert_eq!((commands.stats().available, pool.stats().available), (1, 1));
    assert!(commands.get_buffer().unwrap().is_empty());
}

#[test]
fn a_readback_says_when_it_has_not_arrived() {
    let (memory, commands) = host();
    let tensor = memory.upload(&[1u8, 2], &[2]).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let readback = buffer.download(&tensor).unwrap();
    assert!(readback.to_vec::<u8>().unwrap_err().to_string().contains("not arrived"));
    buffer.execute().unwrap().wait().unwrap();
    assert_eq!(readback.to_vec::<u8>().unwrap(), [1, 2]);
    assert!(matches!(readback.to_vec::<f32>(), Err(Error::DType { .. })));
}

#[test]
fn cleanup_waits_for_what_is_in_flight_and_nothing_dangles() {
    let (device, control) = faulty_device(FaultPlan::default());
    let memory = MemoryManager::new(&device);
    let pool = StagingBufferPool::with_buffer_size(&memory, 2, 256).unwrap();
    let tensor = memory.tensor(&[256], DType::U8).unwrap();
    control.hold_transfers();
    let transfer = pool.transfer_to_gpu(&[5u8; 256], &tensor).unwrap();
    assert!(!transfer.is_done());
    std::thread::scope(|scope| {
        let cleaning = scope.spawn(|| pool.cleanup());
        std::thread::sleep(Duration::from_millis(10));
        assert!(!cleaning.is_finished(), "a buffer was still in flight");
        control.release();
    });
    transfer.wait().unwrap();
    assert!(matches!(pool.get_buffer(), Err(Error::Closed { .. })));
    assert!(matches!(pool.transfer_to_gpu(&[5u8; 256], &tensor), Err(Error::Closed { .. })));
    assert_eq!(tensor.to_vec::<u8>().unwrap(), [5; 256]);
}

#[test]
fn devices_are_told_apart_and_described() {
    let (one, two) = (Device::host(), Device::host());
    assert_eq!(one, one.clone());
    assert_ne!(one, two);
    assert!(Device::list().iter().any(|found| {
        matches!(found, batchline::Found::Device(info) if info.kind == batchline::DeviceKind::Host)
    }));
    assert!(!Device::auto().info().name.is_empty());
}
