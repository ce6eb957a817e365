//! Streams, ours and users': who waits for whom.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchline::backend::Custom;
use batchline::{
    AsyncDataLoader, BoxError, CommandBufferPool, Conversion, CudaCustom, DType, Delivery, Device,
    FnDataset, GpuBatch, MemoryManager, SampleMut, SampleSpec, StagingBufferPool,
};

use crate::driver::Driver;
use crate::{Gpu, WIDTH, builder, eventually, expected, no_kernels, numbers, pretended};

/// A loader with two slots and three outputs, of samples that count how often they are read.
struct Counted {
    memory: MemoryManager,
    loader: AsyncDataLoader,
    reads: Arc<AtomicU64>,
    convert: bool,
}

impl Counted {
    const BATCHES: u64 = 50;

    fn new(device: &Device, convert: bool) -> Self {
        let memory = MemoryManager::new(device);
        let mut config = builder(&memory).prefetch_depth(2).max_held(1);
        if convert {
            config = config.convert(DType::I16, Conversion::new());
        }
        let reads = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&reads);
        let spec = SampleSpec::new(DType::U8, &[WIDTH.into()]).unwrap();
        let read = move |index: u64, sample: &mut SampleMut<'_>| -> Result<(), BoxError> {
            count.fetch_add(1, Ordering::SeqCst);
            sample.input().fill(index.to_le_bytes()[0]);
            Ok(())
        };
        let dataset = FnDataset::new(4 * Self::BATCHES, spec, read);
        let loader = AsyncDataLoader::new(dataset, config.build().unwrap()).unwrap();
        Self { memory, loader, reads, convert }
    }

    fn expected(&self, batch: u64) -> Vec<u8> {
        let bytes = expected(batch).into_iter();
        if self.convert {
            return bytes.flat_map(|byte| i16::from(byte).to_ne_bytes()).collect();
        }
        bytes.collect()
    }

    fn take(&self, number: u64) -> GpuBatch {
        let batch = self.loader.get_batch().unwrap().unwrap();
        assert_eq!(batch.batch_id(), number);
        batch
    }

    /// While the device is held back, this many batches are read and no more, as their slots stay
    /// in flight; and the next one does not come.
    fn assert_held_back(&self, batches: u64) {
        let reads = || self.reads.load(Ordering::SeqCst);
        eventually("the slots to be filled", || reads() == 4 * batches);
        let in_use = self.memory.stats().staging_in_use;
        assert!(in_use >= 2 * 4 * u64::from(WIDTH));
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!((reads(), self.memory.stats().staging_in_use), (4 * batches, in_use));
        assert!(matches!(self.loader.try_get_batch().unwrap(), Delivery::NotYet));
    }

    /// The rest of the stream, every byte.
    fn take_the_rest(&self, from: u64) {
        for number in from..Self::BATCHES {
            let batch = self.take(number);
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), self.expected(number), "{number}");
        }
        assert!(self.loader.get_batch().unwrap().is_none());
    }
}

/// The copy stream is held: slots stay in flight, and are not filled again.
#[test]
fn a_slot_stays_in_flight_while_its_copy_is_held_back() {
    for convert in [false, true] {
        let Some(fake) = pretended("") else { return };
        let counted = Counted::new(&Device::cuda(0).unwrap(), convert);
        // The first stream that a device makes.
        let copy = fake.streams().into_iter().find(|stream| stream.number == 1).unwrap();
        fake.hold(copy.handle);
        counted.loader.start().unwrap();
        // Batches are delivered all the same: the consumer's stream waits.
        let first = counted.take(0);
        let second = counted.take(1);
        counted.assert_held_back(2);
        fake.release(copy.handle);
        for (number, batch) in [(0, first), (1, second)] {
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), counted.expected(number));
        }
        counted.take_the_rest(2);
        drop(counted);
        assert_eq!(crate::violations(&fake), [""; 0]);
    }
}

/// The stream that converts is held: the copies are over, but their slots go home with the rest.
#[test]
fn a_slot_stays_in_flight_while_its_conversion_is_held_back() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let counted = Counted::new(&device, true);
    let other = MemoryManager::new(&device);
    let mut buffer = CommandBufferPool::new(&other, 1).unwrap().get_buffer().unwrap();
    let (send, gate) = std::sync::mpsc::channel();
    let work = move |custom: CudaCustom| {
        let _ = send.send(Driver::load().hold(custom.stream));
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[]).unwrap();
    let held = buffer.execute().unwrap();
    let gate = gate.recv().unwrap();
    counted.loader.start().unwrap();
    let first = counted.take(0);
    let second = counted.take(1);
    counted.assert_held_back(2);
    assert!(!held.is_done());
    gate.open();
    for (number, batch) in [(0, first), (1, second)] {
        assert_eq!(batch.input_tensor().to_bytes().unwrap(), counted.expected(number));
    }
    counted.take_the_rest(2);
}

/// A user's stream is held before the loader is started, perhaps until a batch has come: nothing
/// that the loader does on its way to a batch waits for all streams.
#[test]
fn first_batches_come_while_a_users_stream_is_held() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let driver = Driver::load();
    let _context = driver.retain(0);
    let stream = driver.stream();
    let gate = driver.hold(stream);
    let (send, first) = std::sync::mpsc::channel();
    let consume = move || {
        let counted = Counted::new(&device, true);
        counted.loader.start().unwrap();
        // More than there are outputs, so that each was written for the first time and again.
        for number in 0..6 {
            let bytes = counted.take(number).input_tensor().to_bytes().unwrap();
            assert_eq!(bytes, counted.expected(number), "{number}");
        }
        send.send(()).unwrap();
        counted
    };
    let consumer = std::thread::Builder::new().name("consumer".to_owned()).spawn(consume).unwrap();
    // Well before the gate opens by itself.
    let came = first.recv_timeout(Duration::from_secs(5));
    let is_held = !driver.is_over(stream);
    gate.open();
    let counted = consumer.join().unwrap();
    assert_eq!(came, Ok(()), "the first batches came only when the stream was released");
    assert!(is_held);
    counted.take_the_rest(6);
    assert_eq!(driver.synchronize(stream), 0);
}

/// A user's stream is far behind; each batch is bound to it, read by it, and dropped at once.
#[test]
fn an_output_is_rewritten_only_behind_the_users_stream() {
    if no_kernels() {
        return;
    }
    for convert in [false, true] {
        let gpu = Gpu::new("random_latency_us=50");
        let device = gpu.device();
        let driver = Driver::load();
        let _context = driver.retain(0);
        let stream = driver.stream();
        let counted = Counted::new(&device, convert);
        counted.loader.start().unwrap();
        let gate = driver.hold(stream);
        let mut read = Vec::new();
        // As many as there are outputs; the next one has to wait for memory that is still read.
        for number in 0..3 {
            let batch = counted.take(number);
            let bound = batch.bind(&stream).unwrap();
            let mut bytes = driver.own_page_locked(counted.expected(number).len());
            driver.read(stream, bound.input().address, &mut bytes);
            read.push((number, bytes));
        }
        // Batches go on: what writes them waits on the device, and no host waits.
        let later = [counted.take(3), counted.take(4)];
        counted.assert_held_back(5);
        gate.open();
        assert_eq!(driver.synchronize(stream), 0);
        for (number, bytes) in read {
            let seen = "as the user's stream saw it";
            assert_eq!(*bytes, counted.expected(number), "batch {number}, {seen}");
        }
        for (number, batch) in (3..).zip(later) {
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), counted.expected(number));
        }
        counted.take_the_rest(5);
    }
}

/// The consumer's own stream, as `get_batch` orders it, needs no binding.
#[test]
fn a_device_for_a_users_stream_delivers_in_its_order() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let first = gpu.device();
    let driver = Driver::load();
    let _context = MemoryManager::new(&first).upload(&[1u8; 16], &[16]).unwrap();
    let stream = driver.stream();
    let device = Device::cuda_for(0, stream).unwrap();
    assert_eq!(device.as_cuda(), Some((0, stream)));
    let memory = MemoryManager::new(&device);
    let config = builder(&memory).prefetch_depth(2).max_held(2).build().unwrap();
    let loader = AsyncDataLoader::new(numbers(200), config).unwrap();
    loader.start().unwrap();
    let mut read = Vec::new();
    let mut number = 0;
    while let Some(batch) = loader.get_batch().unwrap() {
        // By way of a binding only for the address: the stream is known already.
        let bound = batch.bind(&stream).unwrap();
        let mut bytes = driver.own_page_locked(4 * usize::from(WIDTH));
        driver.read(stream, bound.input().address, &mut bytes);
        read.push((number, bytes));
        number += 1;
    }
    assert_eq!(driver.synchronize(stream), 0);
    assert_eq!(read.len(), 50);
    for (number, bytes) in read {
        assert_eq!(*bytes, expected(number), "batch {number}");
    }
}

/// A chain of an own operation and a transfer, behind work on a user's stream.
#[test]
fn custom_work_is_called_with_the_segments_stream() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let driver = Driver::load();
    let _context = memory.upload(&[1u8; 16], &[16]).unwrap();
    let stream = driver.stream();
    let pool = StagingBufferPool::with_buffer_size(&memory, 1, 1 << 12).unwrap();
    let commands = CommandBufferPool::new(&memory, 2).unwrap();
    let target = memory.tensor(&[1 << 12], DType::U8).unwrap();
    // The target is used by the user's stream, which is held: the copy into it has to wait.
    let gate = driver.hold(stream);
    target.bind(&stream).unwrap();
    let share = target.clone();
    drop(target);
    // It counts as used until the last handle goes; a custom operation waits for the user instead.
    let mut staging = pool.get_buffer().unwrap();
    staging.as_mut_slice().fill(7);
    let mut buffer = commands.get_buffer().unwrap();
    let held = driver.stream();
    let inner = driver.hold(held);
    let signal = Arc::new(AtomicU64::new(0));
    let seen = Arc::clone(&signal);
    let work = move |custom: CudaCustom| {
        assert_eq!(custom.writes.len(), 1);
        seen.store(1, Ordering::SeqCst);
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[&share]).unwrap();
    buffer.upload(staging, &share).unwrap();
    let submission = buffer.execute().unwrap();
    assert_eq!(signal.load(Ordering::SeqCst), 1, "custom work is called when it is submitted");
    submission.wait().unwrap();
    gate.open();
    inner.open();
    assert_eq!(driver.synchronize(stream), 0);
    assert_eq!(share.to_vec::<u8>().unwrap(), vec![7; 1 << 12]);
    assert_eq!(pool.stats().available, 1);
}

/// Custom work that holds our own stream: what comes behind it stays in flight, with its memory.
#[test]
fn nothing_is_given_back_before_the_device_is_done() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let memory = MemoryManager::new(&device);
    let pool = StagingBufferPool::with_buffer_size(&memory, 1, 1 << 12).unwrap();
    let commands = CommandBufferPool::new(&memory, 2).unwrap();
    let target = memory.tensor(&[1 << 12], DType::U8).unwrap();
    let mut buffer = commands.get_buffer().unwrap();
    let (send, gate) = std::sync::mpsc::channel();
    let work = move |custom: CudaCustom| {
        let _ = send.send(Driver::load().hold(custom.stream));
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[&target]).unwrap();
    let first = buffer.execute().unwrap();
    let gate = gate.recv().unwrap();
    // The copy comes behind the custom work, on another stream.
    let mut staging = pool.get_buffer().unwrap();
    staging.as_mut_slice().fill(9);
    let mut buffer = commands.get_buffer().unwrap();
    buffer.upload(staging, &target).unwrap();
    let second = buffer.execute().unwrap();
    std::thread::sleep(Duration::from_millis(30));
    assert!(!first.is_done() && !second.is_done());
    assert!(pool.try_get_buffer().unwrap().is_none(), "the slot is in flight");
    drop(target);
    assert_eq!(memory.stats().device_cached, 0, "and so is the tensor's memory");
    gate.open();
    first.wait().unwrap();
    second.wait().unwrap();
    eventually("the slot's return", || pool.stats().available == 1);
    eventually("the memory's return", || memory.stats().device_cached > 0);
}

/// The last of a manager goes with its last upload, while a user's stream is held: to free memory
/// waits for that stream, but what others have in flight is ended meanwhile.
#[test]
fn memory_that_is_freed_late_keeps_nobody_waiting() {
    let gpu = Gpu::new("random_latency_us=50");
    let device = gpu.device();
    let other = MemoryManager::new(&device);
    let slots = StagingBufferPool::with_buffer_size(&other, 1, 1 << 12).unwrap();
    let commands = CommandBufferPool::new(&other, 1).unwrap();
    let target = other.tensor(&[1 << 12], DType::U8).unwrap();
    let driver = Driver::load();
    let _context = driver.retain(0);
    let stream = driver.stream();
    {
        let memory = MemoryManager::new(&device);
        let pool = StagingBufferPool::with_buffer_size(&memory, 1, 1 << 12).unwrap();
        let slot = pool.get_buffer().unwrap();
        let tensor = memory.tensor(&[1 << 12], DType::U8).unwrap();
        let mut buffer = CommandBufferPool::new(&memory, 1).unwrap().get_buffer().unwrap();
        buffer.upload(slot, &tensor).unwrap();
        drop((memory, pool, tensor));
        let gate = driver.hold(stream);
        drop(buffer.execute().unwrap());
        let mut buffer = commands.get_buffer().unwrap();
        buffer.upload(slots.get_buffer().unwrap(), &target).unwrap();
        let upload = buffer.execute().unwrap();
        let in_time = upload.wait_timeout(Duration::from_secs(5));
        assert!(in_time.is_some_and(|end| end.is_ok()), "it waited for a user's stream");
        assert!(!driver.is_over(stream));
        gate.open();
    }
    assert_eq!(driver.synchronize(stream), 0);
}
