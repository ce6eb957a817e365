//! What every device must do. Each function panics where the device does not.
//!
//! ```
//! use batchline::Device;
//! use batchline::testing::conformance;
//! conformance::run_all(&|| Device::host());
//! ```

mod frozen;
mod gather;
mod loader;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crate::backend::ChannelOrder;
use crate::backend::host::convert::convert;
use crate::plan::mix;
use crate::{
    BatchOperation, CommandBufferPool, Conversion, DType, Device, Error, MemoryLimits,
    MemoryManager, Shape, StagingBufferPool, Tensor,
};

pub use frozen::frozen_chains_run_again;
pub use gather::{
    gathers_are_in_order, gathers_convert_on_the_way, gathers_equal_the_reference,
    gathers_keep_what_they_read, registering_refuses,
};
pub use loader::{
    loader_converts, loader_delivers_in_order, loader_stops_anywhere, loader_takes_every_path,
};

/// Makes the device under test; each check gets a fresh one.
pub type MakeDevice<'a> = &'a dyn Fn() -> Device;

/// Runs every check.
///
/// # Panics
/// The device fails one.
pub fn run_all(make: MakeDevice<'_>) {
    memory_round_trips(&make());
    transfers_of_any_size(&make());
    copies_and_fills(&make());
    conversions_equal_the_reference(&make());
    gathers_equal_the_reference(&make());
    gathers_convert_on_the_way(&make());
    gathers_keep_what_they_read(&make());
    gathers_are_in_order(&make());
    registering_refuses(&make());
    recording_refuses(&make(), &make());
    batches_complete_once(&make());
    completions_that_panic_are_contained(&make());
    random_operations(&make(), 1);
    frozen_chains_run_again(&make(), 1);
    limits_hold(&make());
    pools_wait_and_close(&make());
    loader_delivers_in_order(make);
    loader_converts(&make());
    loader_takes_every_path(&make());
    loader_stops_anywhere(&make());
}

/// Bytes that look random, the same for the same seed.
fn bytes(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| mix(&[seed, i]).to_le_bytes()[3]).collect()
}

/// A tensor with these bytes.
fn tensor_of(memory: &MemoryManager, dtype: DType, shape: &[u64], bytes: &[u8]) -> Tensor {
    let tensor = memory.tensor(shape, dtype).expect("a tensor");
    macro_rules! write {
        ($($dtype:ident => $rust:ty),*) => {
            match dtype {
                $(DType::$dtype => tensor.write(&bytemuck::pod_collect_to_vec::<u8, $rust>(bytes)),)*
            }
        };
    }
    write!(
        F32 => f32, F16 => half::f16, BF16 => half::bf16, F64 => f64, I8 => i8, I16 => i16,
        I32 => i32, I64 => i64, U8 => u8, Bool => u8
    )
    .expect("a write");
    tensor
}

/// Tensors of every type and of awkward sizes come back as they went.
///
/// # Panics
/// The device fails.
pub fn memory_round_trips(device: &Device) {
    let memory = MemoryManager::new(device);
    for dtype in DType::ALL {
        for elements in [0u64, 1, 2, 3, 5, 63, 64, 65, 1000, 4099] {
            let len = usize::try_from(elements).expect("small") * dtype.size();
            let data = bytes(elements, len);
            let tensor = tensor_of(&memory, dtype, &[elements], &data);
            assert_eq!(tensor.to_bytes().expect("a readback"), data, "{dtype} [{elements}]");
            let clone = tensor.clone();
            drop(tensor);
            assert_eq!(clone.to_bytes().expect("a readback"), data, "a clone of {dtype}");
        }
    }
    let scalar = tensor_of(&memory, DType::I64, &[], &7i64.to_ne_bytes());
    assert_eq!(scalar.to_vec::<i64>().expect("a readback"), [7]);
    assert!(matches!(scalar.to_vec::<f32>(), Err(Error::DType { .. })));
    drop(scalar);
    wait_until(|| memory.stats().device_in_use == 0, "all device memory to come back");
    wait_until(|| memory.stats().staging_in_use == 0, "all staging memory to come back");
}

/// Transfers that are smaller than a staging buffer, equal, and several times as large.
///
/// # Panics
/// The device fails.
pub fn transfers_of_any_size(device: &Device) {
    let memory = MemoryManager::new(device);
    let pool = StagingBufferPool::with_buffer_size(&memory, 2, 1024).expect("a pool");
    for len in [1usize, 1023, 1024, 1025, 10_000, 65_537] {
        let data = bytes(len as u64, len);
        let tensor = memory.tensor(&[len as u64], DType::U8).expect("a tensor");
        let transfer = pool.transfer_to_gpu(&data, &tensor).expect("a transfer");
        assert_eq!(tensor.to_vec::<u8>().expect("a readback"), data, "{len} bytes");
        transfer.wait().expect("a transfer");
    }
    pool.wait_for_transfer_completion().expect("transfers");
    let stats = pool.stats();
    assert_eq!((stats.available, stats.in_use, stats.transfers), (stats.total, 0, 6));
    assert!(stats.total <= stats.max);
}

/// Copies between tensors and within one, and fills of every type.
///
/// # Panics
/// The device fails.
pub fn copies_and_fills(device: &Device) {
    let memory = MemoryManager::new(device);
    let commands = CommandBufferPool::new(&memory, 2).expect("a pool");
    let data = bytes(3, 1001);
    let src = tensor_of(&memory, DType::U8, &[1001], &data);
    let dst = tensor_of(&memory, DType::U8, &[1001], &[0; 1001]);
    dst.copy_from(&src).expect("a copy");
    assert_eq!(dst.to_vec::<u8>().expect("a readback"), data);

    // Part of a tensor into another place of the same one.
    let mut buffer = commands.get_buffer().expect("a buffer");
    buffer.copy_range(&src, 0..400, &src, 500).expect("recorded");
    buffer.execute().expect("submitted").wait().expect("done");
    let mut expected = data.clone();
    expected.copy_within(0..400, 500);
    assert_eq!(src.to_vec::<u8>().expect("a readback"), expected);

    macro_rules! fill {
        ($($rust:ty: $value:expr),*) => {$(
            let value: $rust = $value;
            for elements in [1u64, 3, 257, 70_001] {
                let tensor =
                    memory.tensor(&[elements], <$rust as crate::Element>::DTYPE).expect("a tensor");
                let mut buffer = commands.get_buffer().expect("a buffer");
                buffer.fill(&tensor, value).expect("recorded");
                buffer.execute().expect("submitted").wait().expect("done");
                let found = tensor.to_vec::<$rust>().expect("a readback");
                assert!(found.iter().all(|element| *element == value), "{elements} {found:?}");
            }
        )*};
    }
    fill!(
        u8: 0xAB, i8: -3, i16: -12345, i32: 0x0102_0304, i64: i64::MIN + 5, f32: 1.5, f64: -0.1,
        half::f16: half::f16::from_f32(0.33), half::bf16: half::bf16::from_f32(3.1)
    );
}

/// Conversions between all types, scaled and reordered, equal those of the host bit for bit.
///
/// # Panics
/// The device fails.
pub fn conversions_equal_the_reference(device: &Device) {
    let memory = MemoryManager::new(device);
    let dims = [3u64, 4, 5, 3];
    let elements = 180usize;
    let plain = Conversion::new();
    let scaled = Conversion::new().scale_and_bias(&[0.017, -3.5, 1e3], &[-2.1, 0.25, 7.0]);
    let planes = scaled.clone().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
    let moved = Conversion::new().reorder(ChannelOrder::Nchw, ChannelOrder::Nhwc);
    for from in DType::ALL {
        let data = bytes(11, elements * from.size());
        let src = tensor_of(&memory, from, &dims, &data);
        for to in DType::ALL {
            for conversion in [&plain, &scaled, &planes, &moved] {
                // The dimension that `moved` takes for the channels has four entries; no matter.
                let spec = conversion
                    .spec_for(from, to, Shape::new(&dims).expect("a shape"))
                    .expect("a conversion");
                let mut expected = vec![0u64; elements * to.size() / 8 + 1];
                let expected: &mut [u8] = bytemuck::cast_slice_mut(&mut expected);
                let expected = &mut expected[..elements * to.size()];
                let mut aligned = vec![0u64; data.len() / 8 + 1];
                let aligned: &mut [u8] = bytemuck::cast_slice_mut(&mut aligned);
                aligned[..data.len()].copy_from_slice(&data);
                convert(&aligned[..data.len()], expected, &spec);
                let found = src.convert(to, conversion).expect("converted");
                let found = found.to_bytes().expect("a readback");
                assert_eq!(found, expected, "{from} to {to} by {conversion:?}");
            }
        }
    }
}

/// Everything that can't be done is refused when it is recorded, with a reason.
///
/// # Panics
/// The device fails.
pub fn recording_refuses(device: &Device, other: &Device) {
    let memory = MemoryManager::new(device);
    let commands = CommandBufferPool::new(&memory, 1).expect("a pool");
    let staging = StagingBufferPool::with_buffer_size(&memory, 1, 256).expect("a pool");
    let small = memory.tensor(&[16], DType::F32).expect("a tensor");
    let large = memory.tensor(&[1000], DType::F32).expect("a tensor");
    let foreign = MemoryManager::new(other).tensor(&[16], DType::F32).expect("a tensor");
    let refused = |result: crate::Result<()>, part: &str| {
        let text = result.expect_err("it must be refused").to_string();
        assert!(text.contains(part), "{text:?} should say {part:?}");
    };
    let mut buffer = commands.get_buffer().expect("a buffer");
    let staged = || staging.get_buffer().expect("a staging buffer");
    refused(buffer.upload(staged(), &large), "go past the staging buffer's");
    refused(buffer.upload(staged(), &foreign), "the tensor is on");
    refused(buffer.upload_range(staged(), 0..64, &small, 4), "go past the tensor's 64");
    refused(buffer.copy(&small, &large), "sizes must be equal");
    refused(buffer.copy(&small, &foreign), "the tensor is on");
    refused(buffer.copy(&foreign, &small), "the tensor is on");
    refused(buffer.copy_range(&large, 0..100, &large, 96), "overlap");
    refused(buffer.copy_range(&large, 0..u64::MAX, &small, 0), "go past");
    refused(buffer.fill(&small, 1u8), "dtype");
    refused(buffer.fill(&foreign, 1.0f32), "the tensor is on");
    refused(buffer.convert(&small, &large, &Conversion::new()), "has shape");
    refused(buffer.convert(&small, &small, &Conversion::new()), "overlap");
    let alignment = device.info().copy_alignment;
    if alignment > 1 {
        refused(buffer.copy_range(&large, 1..5, &small, 0), "must be a multiple of");
        refused(buffer.copy_range(&large, 0..3, &small, 0), "must be a multiple of");
    }
    assert!(buffer.is_empty(), "a refused operation was recorded");
    buffer.return_buffer();
    assert_eq!(commands.stats().available, 1);
    assert_eq!(staging.stats().available, 1, "a refused upload keeps its staging buffer");
}

/// A batch of operations runs in order, in one submission, and completes each once.
///
/// # Panics
/// The device fails.
pub fn batches_complete_once(device: &Device) {
    let memory = MemoryManager::new(device);
    let commands = CommandBufferPool::new(&memory, 1).expect("a pool");
    let staging = StagingBufferPool::with_buffer_size(&memory, 1, 4096).expect("a pool");
    let data: Vec<f32> = (0u16..100).map(f32::from).collect();
    let first = memory.tensor(&[100], DType::F32).expect("a tensor");
    let second = memory.tensor(&[100], DType::F32).expect("a tensor");
    let third = memory.tensor(&[100], DType::U8).expect("a tensor");
    for round in 0..10 {
        let counts: Arc<[AtomicUsize; 5]> = Arc::default();
        let count = |place: usize| {
            let counts = Arc::clone(&counts);
            move |result: crate::Result<()>| {
                result.expect("an operation");
                counts[place].fetch_add(1, Ordering::SeqCst);
            }
        };
        let mut filled = staging.get_buffer().expect("a staging buffer");
        filled.write(0, &data).expect("it fits");
        let arrived = Arc::clone(&counts);
        let batch = vec![
            BatchOperation::fill(&second, 9.0f32).on_complete(count(0)),
            BatchOperation::upload(filled, &first).on_complete(count(1)),
            BatchOperation::copy(&first, &second).on_complete(count(2)),
            BatchOperation::convert(&second, &third, Conversion::new()).on_complete(count(3)),
            BatchOperation::download(&third, move |bytes| {
                let expected: Vec<u8> = (0..100).collect();
                assert_eq!(bytes.expect("bytes"), expected);
                arrived[4].fetch_add(1, Ordering::SeqCst);
            }),
        ];
        let submission = commands.execute_batch(batch).expect("submitted");
        submission.wait().expect("done");
        assert!(submission.is_done());
        let counts: Vec<usize> = counts.iter().map(|count| count.load(Ordering::SeqCst)).collect();
        assert_eq!(counts, [1; 5], "round {round}");
    }
    // One that can't be recorded: none runs, each hears of it.
    let errors = Arc::new(AtomicUsize::new(0));
    let count = || {
        let errors = Arc::clone(&errors);
        move |result: crate::Result<()>| {
            result.expect_err("refused");
            errors.fetch_add(1, Ordering::SeqCst);
        }
    };
    let batch = vec![
        BatchOperation::fill(&first, -1.0f32).on_complete(count()),
        BatchOperation::copy(&first, &third).on_complete(count()),
    ];
    commands.execute_batch(batch).expect_err("it can't be recorded");
    assert_eq!(errors.load(Ordering::SeqCst), 2);
    assert_eq!(first.to_vec::<f32>().expect("a readback"), data);
}

/// A completion that panics is an error of its submission, and of nothing else.
///
/// # Panics
/// The device fails.
pub fn completions_that_panic_are_contained(device: &Device) {
    let memory = MemoryManager::new(device);
    let commands = CommandBufferPool::new(&memory, 1).expect("a pool");
    let tensor = memory.tensor(&[4], DType::U8).expect("a tensor");
    let mut buffer = commands.get_buffer().expect("a buffer");
    buffer.fill(&tensor, 5u8).expect("recorded");
    let submission = buffer.execute_async(|_| panic!("on purpose")).expect("submitted");
    let error = submission.wait().expect_err("the panic");
    assert!(error.to_string().contains("on purpose"), "{error}");
    assert_eq!(tensor.to_vec::<u8>().expect("a readback"), [5; 4]);
    // A completion that would wait for other work is told so.
    let mut buffer = commands.get_buffer().expect("a buffer");
    buffer.fill(&tensor, 6u8).expect("recorded");
    let (send, receive) = std::sync::mpsc::channel();
    let inner = memory.clone();
    let submission = buffer
        .execute_async(move |_| {
            let other = inner.tensor(&[4], DType::U8).expect("a tensor");
            let _ = send.send(other.write(&[1u8; 4]).is_err());
        })
        .expect("submitted");
    submission.wait().expect("done");
    assert_eq!(receive.recv_timeout(Duration::from_secs(10)), Ok(true));
}

/// Random operations on a few tensors, submitted without waiting, against a model.
///
/// # Panics
/// The device fails.
pub fn random_operations(device: &Device, seed: u64) {
    const TENSORS: u64 = 4;
    const LEN: usize = 260;
    let memory = MemoryManager::new(device);
    let commands = CommandBufferPool::new(&memory, 3).expect("a pool");
    let staging = StagingBufferPool::with_buffer_size(&memory, 2, LEN as u64).expect("a pool");
    let mut model = vec![vec![0u8; LEN]; usize::try_from(TENSORS).expect("small")];
    let tensors: Vec<Tensor> =
        model.iter().map(|data| tensor_of(&memory, DType::U8, &[LEN as u64], data)).collect();
    let mut count = 0;
    let mut random = |bound: u64| {
        count += 1;
        usize::try_from(mix(&[seed, count]) % bound).expect("small")
    };
    for _ in 0..60 {
        let mut buffer = commands.get_buffer().expect("a buffer");
        for _ in 0..=random(4) {
            let (from, to) = (random(TENSORS), random(TENSORS));
            match random(4) {
                0 => {
                    let data = bytes(random(1000) as u64, LEN);
                    let mut staged = staging.get_buffer().expect("a staging buffer");
                    staged.write(0, &data).expect("it fits");
                    buffer.upload(staged, &tensors[to]).expect("recorded");
                    model[to] = data;
                    // The pool has two: a buffer with more in it would wait for itself.
                    break;
                }
                1 => {
                    let value = bytes(random(1000) as u64, 1)[0];
                    buffer.fill(&tensors[to], value).expect("recorded");
                    model[to].fill(value);
                }
                2 if from != to => {
                    let (start, place) = (random(32) * 4, random(32) * 4);
                    let range = start as u64..start as u64 + 128;
                    buffer
                        .copy_range(&tensors[from], range, &tensors[to], place as u64)
                        .expect("recorded");
                    let moved = model[from][start..start + 128].to_vec();
                    model[to][place..place + 128].copy_from_slice(&moved);
                }
                _ if from != to => {
                    let order = Conversion::new().scale_and_bias(&[-1.0], &[255.0]);
                    buffer.convert(&tensors[from], &tensors[to], &order).expect("recorded");
                    model[to] = model[from].iter().map(|byte| 255 - byte).collect();
                }
                _ => {}
            }
        }
        drop(buffer.execute().expect("submitted"));
        if random(5) == 0 {
            let place = random(TENSORS);
            assert_eq!(tensors[place].to_vec::<u8>().expect("a readback"), model[place]);
        }
    }
    for (tensor, expected) in tensors.iter().zip(&model) {
        assert_eq!(&tensor.to_vec::<u8>().expect("a readback"), expected, "seed {seed}");
    }
}

/// Limits in bytes are kept, and what can never fit is told from what does not fit now.
///
/// # Panics
/// The device fails.
pub fn limits_hold(device: &Device) {
    let limits = MemoryLimits::default().device_limit(4096).staging_limit(4096);
    let memory = MemoryManager::with_limits(device, limits);
    let half = memory.tensor(&[2048], DType::U8).expect("a tensor");
    let _other = memory.tensor(&[512], DType::F32).expect("a tensor");
    assert!(matches!(memory.tensor(&[1], DType::U8), Err(Error::LimitReached { .. })));
    drop(half);
    wait_until(|| memory.tensor(&[256], DType::U8).is_ok(), "memory that was dropped");
    let error = memory.tensor(&[4097], DType::U8).expect_err("it can never fit");
    assert!(matches!(error, Error::TooLarge { requested: 4097, limit: 4096, .. }), "{error}");
    assert!(matches!(memory.tensor(&[1 << 60, 1 << 60], DType::U8), Err(Error::Overflow { .. })));
    let error = StagingBufferPool::new(&memory, 1).expect_err("a buffer of 4 MiB");
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    // With nearly no page-locked memory, transfers take more steps.
    let tensor = memory.tensor(&[2000], DType::U8).expect("a tensor");
    let data = bytes(5, 2000);
    tensor.write(&data).expect("a write");
    assert_eq!(tensor.to_vec::<u8>().expect("a readback"), data);
    let max = device.info().max_allocation;
    if max < 1 << 40 {
        let memory = MemoryManager::with_limits(device, limits.device_limit(u64::MAX / 2));
        let error = memory.tensor(&[max + 1], DType::U8).expect_err("above the largest buffer");
        assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    }
}

/// Pools make callers wait, count what they lend, and refuse everything once cleaned up.
///
/// # Panics
/// The device fails.
pub fn pools_wait_and_close(device: &Device) {
    let memory = MemoryManager::new(device);
    let pool = StagingBufferPool::with_buffer_size(&memory, 2, 256).expect("a pool");
    let one = pool.get_buffer().expect("a buffer");
    let two = pool.get_buffer().expect("a buffer");
    assert!(pool.try_get_buffer().expect("open").is_none());
    let late = pool.get_buffer_timeout(Duration::from_millis(5));
    assert!(matches!(late, Err(Error::Timeout { .. })));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| pool.get_buffer().map(drop));
        drop(one);
        waiter.join().expect("no panic").expect("the buffer that came back");
    });
    let stats = pool.stats();
    assert_eq!((stats.available, stats.in_use, stats.total, stats.max), (1, 1, 2, 2));
    pool.cleanup();
    assert!(matches!(pool.get_buffer(), Err(Error::Closed { .. })));
    drop(two);
    assert_eq!(pool.stats().total, 0);

    let commands = CommandBufferPool::new(&memory, 1).expect("a pool");
    let tensor = memory.tensor(&[1 << 16], DType::U8).expect("a tensor");
    let mut buffer = commands.get_buffer().expect("a buffer");
    assert!(commands.try_get_buffer().expect("open").is_none());
    buffer.fill(&tensor, 3u8).expect("recorded");
    let submission = buffer.execute().expect("submitted");
    commands.cleanup();
    assert!(matches!(commands.get_buffer(), Err(Error::Closed { .. })));
    let done = submission.wait_timeout(Duration::from_secs(10));
    done.expect("cleanup waited for it").expect("done");
    assert_eq!(commands.stats().total, 0);
}

/// Waits for something that happens on another thread.
fn wait_until(condition: impl Fn() -> bool, what: &str) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("waited 5 s for {what}");
}
