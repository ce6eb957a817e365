//! Each call of the driver fails once: before it did anything, after it did, for good, and as there
//! is no memory. What comes of it is an error that says so or all that was asked for; never a hang,
//! a wrong byte, or memory that is used again too early.
//!
//! By default some calls of each kind fail, with `BATCHLINE_CASES` all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use batchline::backend::Custom;
use batchline::{
    AsyncDataLoader, BatchOperation, ChannelOrder, CommandBufferPool, Conversion, CudaCustom,
    CudaStream, DType, Device, Element, Error, MemoryManager, StagingBufferPool, Tensor,
};
use fake_cuda::{When, codes};

use crate::driver::{Code, Driver, PageLocked, Retained};
use crate::{
    WIDTH, assert_clean, builder, eventually, expected, gpu_is_required, in_a_child,
    more_is_asked_for, no_kernels, numbers, start, threads, wait_until_closed,
};

type Result<T = (), E = Error> = std::result::Result<T, E>;

/// Something that is done with a device, and checks what it gets.
type Program = fn(&MemoryManager) -> Result;

/// How a call fails.
const MANNERS: [(u32, When); 4] = [
    (codes::UNKNOWN, When::Before),
    (codes::UNKNOWN, When::After),
    (codes::LAUNCH_FAILED, When::Lose),
    (codes::OUT_OF_MEMORY, When::Before),
];

/// Where such a call fails, something is left behind: nobody is there to try again.
const ENDS: [&str; 11] = [
    "cuCtxGetCurrent",
    "cuCtxPopCurrent_v2",
    "cuCtxSetCurrent",
    "cuDevicePrimaryCtxRelease_v2",
    "cuEventDestroy_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostUnregister",
    "cuModuleUnload",
    "cuStreamDestroy_v2",
    "cuStreamSynchronize",
];

/// Where such a call fails, memory is given up: how far the consumer's stream is could not be noted.
const NOTING: [&str; 3] = ["cuEventCreate", "cuEventRecord", "cuStreamIsCapturing"];

/// More than a program may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Plays a program once for each call that fails, in a process of its own.
fn any_call_may_fail(test: &str, program: Program) {
    if gpu_is_required() || no_kernels() || !in_a_child(&format!("calls::{test}")) {
        return;
    }
    let all = more_is_asked_for();
    // The first time the driver is started besides.
    count_calls(program);
    let mut attempts = 0;
    for (symbol, count) in count_calls(program) {
        let told = symbol.starts_with("cuGetError");
        for nth in (1..=count).filter(|nth| !told && (all || is_chosen(*nth, count))) {
            for (code, when) in MANNERS {
                let name = format!("{symbol} {nth} of {count}, {code} {when:?}");
                let attempt = Attempt { program, symbol: symbol.clone(), nth, code, when };
                within_the_limit(&name.clone(), move || attempt.make(&name));
                attempts += 1;
            }
        }
    }
    println!("{attempts} attempts");
}

/// The first ones, the last one, and some between.
fn is_chosen(nth: u64, count: u64) -> bool {
    nth <= 3 || nth == count || nth.is_multiple_of((count / 4).max(1))
}

/// Calls by name.
fn count_calls(program: Program) -> std::collections::BTreeMap<String, u64> {
    let fake = start("seed=1");
    let memory = MemoryManager::new(&Device::cuda(0).unwrap());
    program(&memory).unwrap();
    drop(memory);
    wait_until_closed();
    assert_clean(&fake, "where nothing fails");
    fake.all_calls()
}

struct Attempt {
    program: Program,
    symbol: String,
    nth: u64,
    code: u32,
    when: When,
}

impl Attempt {
    fn make(self, name: &str) {
        let fake = start("seed=1,random_latency_us=20");
        fake.fail(Some(&self.symbol), self.nth, self.code, self.when);
        // Any other code loses the device, and what is left of a lost one is left alone.
        let mut may_leave = self.code != codes::OUT_OF_MEMORY || ENDS.contains(&&*self.symbol);
        match Device::cuda(0) {
            Err(error) => {
                self.assert_told(&error, name);
            }
            Ok(device) => {
                let memory = MemoryManager::new(&device);
                let result = (self.program)(&memory);
                if let Err(error) = &result {
                    self.assert_told(error, name);
                }
                if device.check().is_err() {
                    may_leave = true;
                } else if result.is_err() && self.when != When::Lose {
                    // Once it is over all goes on.
                    let again = (self.program)(&memory);
                    again.unwrap_or_else(|error| panic!("{name}, again: {}", error.chain()));
                }
                eventually(name, || {
                    let stats = memory.stats();
                    stats.device_in_use == 0 && stats.staging_in_use == 0
                });
                if memory.stats().quarantined > 0 {
                    let noting = NOTING.contains(&&*self.symbol);
                    assert!(may_leave || noting, "{name}: given up");
                    may_leave = true;
                }
            }
        }
        wait_until_closed();
        let workers = threads::count(threads::is_of_loader);
        assert!(workers.is_none_or(|count| count == 0), "{name}: {workers:?} threads are left");
        if may_leave {
            assert_eq!(crate::violations(&fake), [""; 0], "{name}");
        } else {
            assert_clean(&fake, name);
        }
    }

    /// The error says what the driver said.
    fn assert_told(&self, error: &Error, name: &str) {
        let text = error.chain();
        assert!(text.contains(&format!("({})", self.code)), "{name}: {text}");
    }
}

/// Runs something on a thread of its own, so that what hangs fails like anything else.
fn within_the_limit(name: &str, body: impl FnOnce() + Send + 'static) {
    let (send, over) = mpsc::channel::<()>();
    let scene = std::thread::Builder::new().name("scene".to_owned());
    let body = move || {
        body();
        drop(send);
    };
    let scene = scene.spawn(body).unwrap();
    match over.recv_timeout(LIMIT) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{name}: no end within {LIMIT:?}"),
        _ => scene.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
    }
}

fn bytes(seed: u64, len: u64) -> Vec<u8> {
    (0..len).map(|at| batchline::mix(&[seed, at]).to_le_bytes()[0]).collect()
}

fn filled<T: Element>(memory: &MemoryManager, value: T) -> Result<Tensor> {
    let tensor = memory.tensor(&[100], T::DTYPE)?;
    let pool = CommandBufferPool::new(memory, 1)?;
    let mut buffer = pool.get_buffer()?;
    buffer.fill(&tensor, value)?;
    buffer.execute()?.wait()?;
    Ok(tensor)
}

fn tensors(memory: &MemoryManager) -> Result {
    for len in [1, 256, 5000] {
        let data = bytes(len, len);
        let tensor = memory.upload(&data, &[len])?;
        let other = memory.tensor(&[len], DType::U8)?;
        other.copy_from(&tensor)?;
        drop(tensor);
        assert_eq!(other.to_bytes()?, data);
        other.write(&bytes(7, len))?;
        assert_eq!(other.to_vec::<u8>()?, bytes(7, len));
    }
    assert_eq!(filled(memory, 3u8)?.to_vec::<u8>()?, [3; 100]);
    assert_eq!(filled(memory, -500i16)?.to_vec::<i16>()?, [-500; 100]);
    assert_eq!(filled(memory, 0.5f32)?.to_vec::<f32>()?, [0.5; 100]);
    assert_eq!(filled(memory, i64::MIN + 5)?.to_vec::<i64>()?, [i64::MIN + 5; 100]);
    memory.trim();
    Ok(())
}

#[test]
fn of_tensors() {
    any_call_may_fail("of_tensors", tensors);
}

fn conversions(memory: &MemoryManager) -> Result {
    let source = memory.upload(&(0..48).collect::<Vec<u8>>(), &[4, 4, 3])?;
    let plain = source.convert_to(DType::F32)?;
    assert_eq!(plain.to_vec::<f32>()?, (0..48u8).map(f32::from).collect::<Vec<f32>>());
    // A pair without a kernel of its own.
    let wide = source.convert_to(DType::I64)?.convert_to(DType::F64)?;
    assert_eq!(wide.to_vec::<f64>()?, (0..48u8).map(f64::from).collect::<Vec<f64>>());
    let planes = Conversion::new().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
    let planes = source.convert(DType::U8, &planes)?.to_vec::<u8>()?;
    assert_eq!(planes[16..19], [1, 4, 7]);
    // More lists of factors than are kept on the device, and the first one again.
    let by = |factor: u8| Conversion::new().scale_and_bias(&[f32::from(factor); 3], &[1.0; 3]);
    let first = by(0);
    for factor in 0..20 {
        let conversion = if factor == 0 { first.clone() } else { by(factor) };
        assert_scaled(&source, &conversion, factor)?;
    }
    assert_scaled(&source, &first, 0)
}

/// Where it fails the same conversion is tried again, before the failure is told.
fn assert_scaled(source: &Tensor, conversion: &Conversion, factor: u8) -> Result {
    let convert = || source.convert(DType::F32, conversion)?.to_vec::<f32>();
    let factor = f32::from(factor);
    let expected: Vec<f32> = (0..48u8).map(|byte| f32::from(byte) * factor + 1.0).collect();
    let first = convert();
    let found = if first.is_ok() { first.clone()? } else { convert()? };
    assert_eq!(found, expected);
    first.map(drop)
}

#[test]
fn of_conversions() {
    any_call_may_fail("of_conversions", conversions);
}

fn staging(memory: &MemoryManager) -> Result {
    let pool = StagingBufferPool::with_buffer_size(memory, 2, 1024)?;
    let data = bytes(1, 5000);
    let tensor = memory.tensor(&[5000], DType::U8)?;
    pool.transfer_to_gpu(&data, &tensor)?.wait()?;
    assert_eq!(tensor.to_bytes()?, data);
    let mut buffer = pool.get_buffer()?;
    buffer.write(0, &[9u8; 1000])?;
    let small = memory.tensor(&[1000], DType::U8)?;
    let mut commands = CommandBufferPool::new(memory, 1)?.get_buffer()?;
    commands.upload(buffer, &small)?;
    commands.execute()?.wait()?;
    assert_eq!(small.to_bytes()?, [9; 1000]);
    pool.get_buffer()?.return_buffer();
    pool.wait_for_transfer_completion()?;
    assert_eq!(pool.stats().in_use, 0);
    pool.cleanup();
    Ok(())
}

#[test]
fn of_the_staging_pool() {
    any_call_may_fail("of_the_staging_pool", staging);
}

/// Each completion of a batch is called once, whatever becomes of the batch.
fn commands(memory: &MemoryManager) -> Result {
    let pool = CommandBufferPool::new(memory, 2)?;
    let staging = StagingBufferPool::with_buffer_size(memory, 1, 1024)?;
    let tensor = |dtype| memory.tensor(&[256], dtype);
    let (a, b, c, wide) =
        (tensor(DType::U8)?, tensor(DType::U8)?, tensor(DType::U8)?, tensor(DType::F32)?);
    for round in 0..3u8 {
        let mut buffer = staging.get_buffer()?;
        buffer.as_mut_slice().fill(round);
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = || {
            let calls = Arc::clone(&calls);
            move |_| {
                calls.fetch_add(1, Ordering::SeqCst);
            }
        };
        let (send, arrived) = mpsc::channel();
        let send = move |result: Result<&[u8]>| drop(send.send(result.map(<[u8]>::to_vec)));
        let submission = pool.execute_batch(vec![
            BatchOperation::upload(buffer, &a).on_complete(counted()),
            BatchOperation::copy(&a, &b).on_complete(counted()),
            BatchOperation::fill(&c, 100 + round),
            BatchOperation::convert(&b, &wide, Conversion::new()).on_complete(counted()),
            BatchOperation::download(&c, send).on_complete(counted()),
        ]);
        let result = submission.and_then(|submission| submission.wait());
        // Where it was not submitted they may be called a little later.
        eventually("all completions", || calls.load(Ordering::SeqCst) >= 4);
        let arrived = arrived.recv_timeout(LIMIT).expect("it is told");
        assert_eq!(arrived.is_ok(), result.is_ok());
        result?;
        assert_eq!(calls.load(Ordering::SeqCst), 4, "completions are called once");
        assert_eq!(arrived?, [100 + round; 256]);
        assert_eq!(wide.to_vec::<f32>()?, [f32::from(round); 256]);
    }
    pool.cleanup();
    Ok(())
}

#[test]
fn of_a_batch_of_commands() {
    any_call_may_fail("of_a_batch_of_commands", commands);
}

/// A custom operation between two others reads on the stream that it is given.
fn custom(memory: &MemoryManager) -> Result {
    let driver = Driver::load();
    let _context = driver.retain(0);
    // It may be lost by the last call of those that opened the device.
    own(driver.check())?;
    let mut target = driver.own_page_locked(64);
    let pool = CommandBufferPool::new(memory, 1)?;
    let tensor = memory.tensor(&[64], DType::U8)?;
    let (send, read) = mpsc::channel();
    let work = move |custom: CudaCustom| {
        let code = Driver::load().try_read(custom.stream, custom.reads[0].address, &mut target);
        let _ = send.send((target, custom.stream));
        if code == 0 { Ok(()) } else { Err(format!("CUDA error ({code})").into()) }
    };
    let mut buffer = pool.get_buffer()?;
    buffer.fill(&tensor, 1u8)?;
    buffer.custom(Custom::Cuda(Box::new(work)), &[&tensor], &[])?;
    buffer.fill(&tensor, 2u8)?;
    let result = buffer.execute().and_then(|submission| submission.wait());
    let read = read.try_recv();
    if let (Ok((_, stream)), Err(_)) = (&read, &result) {
        // What failed may not have been waited for.
        driver.synchronize(*stream);
    }
    result?;
    let (target, _) = read.expect("the operation is called");
    assert_eq!(*target, [1; 64]);
    assert_eq!(tensor.to_bytes()?, [2; 64]);
    // One that fails by itself.
    let mut buffer = pool.get_buffer()?;
    buffer.fill(&tensor, 3u8)?;
    buffer.custom(Custom::Cuda(Box::new(|_| Err("no such luck".into()))), &[], &[&tensor])?;
    let error = buffer.execute().and_then(|submission| submission.wait()).unwrap_err();
    if error.chain().contains("no such luck") && !error.is_device_lost() {
        return Ok(());
    }
    Err(error)
}

#[test]
fn of_custom_operations() {
    any_call_may_fail("of_custom_operations", custom);
}

fn readbacks(memory: &MemoryManager) -> Result {
    let pool = CommandBufferPool::new(memory, 1)?;
    let data = bytes(2, 3000);
    let tensor = memory.upload(&data, &[3000])?;
    let mut buffer = pool.get_buffer()?;
    let whole = buffer.download(&tensor)?;
    let part = buffer.download_range(&tensor, 100..400)?;
    assert!(whole.to_vec::<u8>().is_err(), "it has not arrived");
    let result = buffer.execute().and_then(|submission| submission.wait());
    if let Err(error) = result {
        assert!(whole.to_vec::<u8>().is_err() && part.to_vec::<u8>().is_err());
        return Err(error);
    }
    assert_eq!(whole.to_vec::<u8>()?, data);
    assert_eq!(part.to_vec::<u8>()?, data[100..400]);
    Ok(())
}

#[test]
fn of_readbacks() {
    any_call_may_fail("of_readbacks", readbacks);
}

/// A user whose streams are waited for before their memory goes.
struct User {
    driver: Driver,
    streams: [CudaStream; 2],
    memory: PageLocked,
    _context: Retained,
}

impl User {
    fn new(memory: usize) -> Result<Self> {
        let driver = Driver::load();
        let context = driver.retain(0);
        own(driver.check())?;
        let streams = [driver.stream(), driver.stream()];
        Ok(Self { memory: driver.own_page_locked(memory), streams, driver, _context: context })
    }
}

impl Drop for User {
    fn drop(&mut self) {
        for stream in self.streams {
            self.driver.synchronize(stream);
            self.driver.destroy(stream);
        }
    }
}

/// Streams of a user read what is written anew as soon as they are bound.
fn streams(memory: &MemoryManager) -> Result {
    const LEN: usize = 512;
    let mut user = User::new(6 * LEN)?;
    let tensor = memory.tensor(&[LEN as u64], DType::U8)?;
    let commands = CommandBufferPool::new(memory, 1)?;
    for (round, bytes) in user.memory.chunks_exact_mut(LEN).enumerate() {
        let mut buffer = commands.get_buffer()?;
        buffer.fill(&tensor, u8::try_from(round).unwrap())?;
        buffer.execute()?.wait()?;
        let stream = user.streams[round % 2];
        let bound = tensor.bind(&stream)?;
        own(user.driver.try_read(stream, bound.address, bytes))?;
        own(user.driver.synchronize(stream))?;
        assert!(bytes.iter().all(|byte| usize::from(*byte) == round));
    }
    Ok(())
}

/// What a call of the user's own came to: it fails where the context is lost.
fn own(code: Code) -> Result {
    if code == 0 {
        return Ok(());
    }
    let source = std::io::Error::other(format!("CUDA error ({code})"));
    Err(Error::User { who: "the user's own call", source: Arc::new(source) })
}

#[test]
fn of_users_streams() {
    any_call_may_fail("of_users_streams", streams);
}

/// A small run of the loader, every byte checked.
fn loader(memory: &MemoryManager) -> Result {
    let loader = AsyncDataLoader::new(numbers(20), builder(memory).build()?)?;
    loader.start()?;
    let mut number = 0;
    while let Some(batch) = loader.get_batch()? {
        assert_eq!(batch.input_tensor().to_bytes()?, expected(number), "batch {number}");
        number += 1;
    }
    assert_eq!(number, 5);
    loader.stop()
}

#[test]
fn of_a_loader() {
    any_call_may_fail("of_a_loader", loader);
}

/// As [`loader`], with a conversion, and with streams of a user that read each batch.
fn converting_loader(memory: &MemoryManager) -> Result {
    const LEN: usize = 4 * WIDTH as usize * size_of::<f32>();
    let mut user = User::new(5 * LEN)?;
    let config = builder(memory).convert(DType::F32, Conversion::new().normalize(&[1.0], &[2.0]));
    let loader = AsyncDataLoader::new(numbers(20), config.build()?)?;
    loader.start()?;
    let mut chunks = user.memory.chunks_exact_mut(LEN);
    for (number, stream) in (0..).zip(user.streams.into_iter().cycle()) {
        let Some(batch) = loader.get_batch()? else { break };
        assert_eq!(batch.batch_id(), number);
        let bound = batch.bind(&stream)?;
        let bytes = chunks.next().expect("five batches");
        own(user.driver.try_read(stream, bound.input().address, bytes))?;
    }
    assert_eq!(chunks.len(), 0);
    loader.stop()?;
    for stream in user.streams {
        own(user.driver.synchronize(stream))?;
    }
    for (number, bytes) in (0..).zip(user.memory.chunks_exact(LEN)) {
        let expected = expected(number).into_iter();
        let expected = expected.flat_map(|byte| ((f32::from(byte) - 1.0) / 2.0).to_ne_bytes());
        assert!(bytes.iter().copied().eq(expected), "batch {number}");
    }
    Ok(())
}

#[test]
fn of_a_loader_that_converts() {
    any_call_may_fail("of_a_loader_that_converts", converting_loader);
}
