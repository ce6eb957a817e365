//! Frozen chains on the CUDA device: what a graph of the driver does, what it costs, how long it
//! lives, and what happens where there is none.

use batchline::backend::Custom;
use batchline::testing::conformance;
use batchline::{
    ChannelOrder, CommandBuffer, CommandBufferPool, Conversion, CudaCustom, DType, Device, Error,
    FrozenCommands, MemoryManager, Result, Tensor, mix,
};
use fake_cuda::{Fake, Live, When, codes};

use crate::driver::Driver;
use crate::{Gpu, eventually, no_kernels, wait_until_closed};

/// Whether the pretended driver is to be looked into, and can't be.
fn no_fake() -> bool {
    no_kernels() || std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some()
}

fn fake(settings: &str) -> Fake {
    Fake::start(&format!("devices=1,pageable=1,{settings}"))
}

/// Calls of some symbols since `before`.
fn calls(fake: &Fake, before: &[u64], symbols: &[&str]) -> Vec<u64> {
    let now = symbols.iter().map(|symbol| fake.calls(Some(symbol)));
    now.zip(before.iter().chain(std::iter::repeat(&0))).map(|(now, before)| now - before).collect()
}

/// What is enqueued in place of a graph.
const WORK: [&str; 5] = [
    "cuLaunchKernel",
    "cuMemcpyDtoDAsync_v2",
    "cuMemsetD8Async",
    "cuMemsetD16Async",
    "cuMemsetD32Async",
];

/// What makes a graph.
const MAKING: [&str; 6] = [
    "cuStreamCreateWithPriority",
    "cuStreamBeginCapture_v2",
    "cuStreamEndCapture",
    "cuGraphInstantiateWithFlags",
    "cuGraphDestroy",
    "cuStreamDestroy_v2",
];

/// The suite's check, in different orders of the streams.
#[test]
fn conformance() {
    if no_kernels() {
        return;
    }
    for seed in 0..10 {
        let gpu = Gpu::new(&format!("random_latency_us=50,seed={seed}"));
        conformance::frozen_chains_run_again(&gpu.device(), seed);
    }
}

/// Tensors of the types that have kernels of their own, one that has none, and one whose fills are
/// a kernel. Each an image of three channels.
const TYPES: [DType; 6] = [DType::U8, DType::F32, DType::BF16, DType::F16, DType::I64, DType::F64];
const DIMS: [u64; 4] = [2, 5, 4, 3];

struct Tensors {
    memory: MemoryManager,
    commands: CommandBufferPool,
    list: Vec<Tensor>,
}

impl Tensors {
    fn new(device: &Device) -> Result<Self> {
        let memory = MemoryManager::new(device);
        let commands = CommandBufferPool::new(&memory, 2)?;
        // Two of each, so that there is something to copy.
        let tensor = |dtype: &DType| memory.tensor(&DIMS, *dtype);
        let list: Vec<Tensor> = TYPES.iter().chain(&TYPES).map(tensor).collect::<Result<_>>()?;
        let tensors = Self { memory, commands, list };
        let mut zero = tensors.buffer()?;
        zero.fill(&tensors.list[0], 0u8)?;
        for tensor in &tensors.list[1..] {
            zero.convert(&tensors.list[0], tensor, &Conversion::new())?;
        }
        zero.execute()?.wait()?;
        Ok(tensors)
    }

    fn buffer(&self) -> Result<CommandBuffer> {
        self.commands.get_buffer()
    }

    /// Writes the inputs of a round.
    fn write(&self, round: u64) -> Result<()> {
        let bytes: Vec<u8> = (0..120).map(|at| mix(&[round, at]).to_le_bytes()[0]).collect();
        self.list[0].write(&bytes)?;
        self.list[1].write(&bytes.iter().map(|byte| f32::from(*byte) - 100.5).collect::<Vec<_>>())
    }

    fn bytes(&self) -> Result<Vec<Vec<u8>>> {
        self.list.iter().map(Tensor::to_bytes).collect()
    }

    /// Records a random chain; the same for the same seed.
    fn chain(&self, seed: u64) -> Result<CommandBuffer> {
        let mut buffer = self.buffer()?;
        let mut count = 0;
        let mut random = |bound: usize| {
            count += 1;
            usize::try_from(mix(&[seed, count]) % bound as u64).unwrap()
        };
        for _ in 0..2 + random(8) {
            let (from, to) = (random(self.list.len()), random(self.list.len()));
            let (from, to) = (&self.list[from], &self.list[to]);
            match random(3) {
                0 => fill(&mut buffer, to, random(100))?,
                1 if std::ptr::eq(from, to) => {
                    buffer.copy_range(from, 0..8, to, 16)?;
                }
                1 => {
                    let len = from.byte_len().min(to.byte_len()) / 16 * 8;
                    buffer.copy_range(from, 8..len, to, 0)?;
                }
                _ if std::ptr::eq(from, to) => {}
                _ => {
                    let conversion = match random(3) {
                        0 => Conversion::new(),
                        1 => Conversion::new().normalize(&[1.0, 2.0, 3.5], &[0.5, 0.25, 2.0]),
                        _ => Conversion::new().scale_and_bias(&[0.5], &[random(9) as f32]),
                    };
                    buffer.convert(from, to, &conversion)?;
                }
            }
        }
        Ok(buffer)
    }
}

fn fill(buffer: &mut CommandBuffer, tensor: &Tensor, value: usize) -> Result<()> {
    let value = u8::try_from(value).unwrap();
    match tensor.dtype() {
        DType::U8 => buffer.fill(tensor, value),
        DType::F32 => buffer.fill(tensor, f32::from(value)),
        DType::F64 => buffer.fill(tensor, f64::from(value)),
        DType::I64 => buffer.fill(tensor, i64::from(value)),
        _ => Ok(()),
    }
}

#[test]
fn the_bytes_are_those_of_recording_anew() {
    if no_kernels() {
        return;
    }
    for seed in 0..20 {
        let gpu = Gpu::new(&format!("random_latency_us=20,seed={seed}"));
        let device = gpu.device();
        let (again, anew) = (Tensors::new(&device).unwrap(), Tensors::new(&device).unwrap());
        let chain = again.chain(seed).unwrap().freeze().unwrap();
        for round in 0..4 {
            for tensors in [&again, &anew] {
                tensors.write(round).unwrap();
            }
            drop(chain.execute().unwrap());
            drop(anew.chain(seed).unwrap().execute().unwrap());
            assert_eq!(again.bytes().unwrap(), anew.bytes().unwrap(), "seed {seed}, {round}");
        }
    }
}

/// A chain of `len` operations, of every kind.
fn chain(tensors: &Tensors, len: usize) -> FrozenCommands {
    let (pixels, floats, integers) = (&tensors.list[0], &tensors.list[1], &tensors.list[4]);
    let (same, copied) = (Conversion::new(), &tensors.list[7]);
    let normal = Conversion::new().normalize(&[1.0, 2.0, 3.0], &[0.5, 0.5, 2.0]);
    let mut buffer = tensors.buffer().unwrap();
    for place in 0..len {
        match place % 5 {
            0 => buffer.convert(pixels, floats, &normal),
            1 => buffer.copy(floats, copied),
            2 => buffer.fill(integers, 3i64),
            3 => buffer.convert(floats, &tensors.list[2], &same),
            _ => buffer.fill(floats, 1.0f32),
        }
        .unwrap();
    }
    buffer.freeze().unwrap()
}

/// The second execution and all later ones are one call and its event, whatever is in the chain.
#[test]
fn an_execution_is_one_launch() {
    if no_fake() {
        return;
    }
    let fake = fake("");
    let tensors = Tensors::new(&Device::cuda(0).unwrap()).unwrap();
    for len in [2, 4, 8] {
        let chain = chain(&tensors, len);
        let (work, made) = (calls(&fake, &[], &WORK), calls(&fake, &[], &MAKING));
        chain.execute().unwrap().wait().unwrap();
        // Enqueued once, captured once.
        let first: u64 = calls(&fake, &work, &WORK).iter().sum();
        assert_eq!(first, 2 * len as u64);
        assert_eq!(calls(&fake, &made, &MAKING), [1; 6]);
        let before = fake.all_calls();
        for _ in 0..10 {
            chain.execute().unwrap().wait().unwrap();
        }
        let mut after = fake.all_calls();
        after.retain(|symbol, count| {
            *count -= before.get(symbol).copied().unwrap_or(0);
            // Looks at events come as often as somebody waits; this thread is not ours, so what it
            // may do during captures is set back each time.
            let around = ["cuEventQuery", "cuCtxGetCurrent", "cuThreadExchangeStreamCaptureMode"];
            *count > 0 && !around.contains(&&**symbol)
        });
        let expected = [("cuEventRecord".to_owned(), 10), ("cuGraphLaunch".to_owned(), 10)];
        assert_eq!(after.into_iter().collect::<Vec<_>>(), expected, "{len} operations");
    }
    assert_eq!(fake.violations(), [""; 0]);
}

/// For one operation a graph is not worth it.
#[test]
fn a_chain_of_one_operation_makes_no_graph() {
    if no_fake() {
        return;
    }
    let fake = fake("");
    let tensors = Tensors::new(&Device::cuda(0).unwrap()).unwrap();
    let chain = chain(&tensors, 1);
    let (work, made) = (calls(&fake, &[], &WORK), calls(&fake, &[], &MAKING));
    for _ in 0..5 {
        chain.execute().unwrap().wait().unwrap();
    }
    assert_eq!(calls(&fake, &work, &WORK), [5, 0, 0, 0, 0]);
    assert_eq!(calls(&fake, &made, &MAKING), [0; 6]);
    assert_eq!(fake.calls(Some("cuGraphLaunch")), 0);
}

/// Executions pile up while the device does nothing; the handles and the tensors go at once.
#[test]
fn a_graph_lives_until_its_last_launch_is_over() {
    if no_fake() {
        return;
    }
    let fake = fake("random_latency_us=20");
    let device = Device::cuda(0).unwrap();
    let tensors = Tensors::new(&device).unwrap();
    let chain = chain(&tensors, 5);
    chain.execute().unwrap().wait().unwrap();
    assert_eq!(fake.live().graphs, 1);
    fake.hold_all();
    let executions: Vec<_> = (0..20).map(|_| chain.execute().unwrap()).collect();
    let memory = tensors.memory.clone();
    drop((chain, tensors));
    std::thread::sleep(std::time::Duration::from_millis(5));
    assert_eq!(fake.live().graphs, 1, "it is in flight");
    assert!(memory.stats().device_in_use > 0, "and so is its memory");
    fake.release_all();
    executions.iter().for_each(|execution| execution.wait().unwrap());
    eventually("the end of the graph", || fake.live().graphs == 0);
    eventually("the memory's return", || memory.stats().device_in_use == 0);
    drop((executions, memory, device));
    assert_eq!(crate::violations(&fake), [""; 0]);
    eventually("the end of all", || fake.live() == Live::default());
}

/// Chains come and go while others are in flight, from several threads.
#[test]
fn many_chains_overlap_and_go() {
    if no_kernels() {
        return;
    }
    for seed in 0..4u64 {
        let gpu = Gpu::new(&format!("random_latency_us=30,seed={seed}"));
        let device = gpu.device();
        let number = MemoryManager::new(&device).upload(&[0i32; 64], &[64]).unwrap();
        std::thread::scope(|threads| {
            for _ in 0..3 {
                threads.spawn(|| {
                    let memory = MemoryManager::new(&device);
                    let commands = CommandBufferPool::new(&memory, 1).unwrap();
                    for _ in 0..5 {
                        let floats = memory.tensor(&[64], DType::F32).unwrap();
                        let one = Conversion::new().scale_and_bias(&[1.0], &[1.0]);
                        let mut buffer = commands.get_buffer().unwrap();
                        buffer.convert(&number, &floats, &one).unwrap();
                        buffer.convert(&floats, &number, &Conversion::new()).unwrap();
                        let more = buffer.freeze().unwrap();
                        for _ in 0..4 {
                            drop(more.execute().unwrap());
                        }
                    }
                });
            }
        });
        // Each is whole: what one thread's chain reads, no other's writes meanwhile.
        assert_eq!(number.to_vec::<i32>().unwrap(), [60; 64], "seed {seed}");
        drop((number, device));
        if let Some(fake) = &gpu.fake {
            eventually("the end of all", || fake.live() == Live::default());
        }
    }
}

/// The cache of scales and biases is full of others', and has evicted those of the graph.
#[test]
fn a_graph_keeps_its_factors() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=20");
    let tensors = Tensors::new(&gpu.device()).unwrap();
    let (pixels, floats) = (&tensors.list[0], &tensors.list[1]);
    let shifted = |bias: u8| Conversion::new().scale_and_bias(&[1.0], &[f32::from(bias)]);
    // More lists in one chain than the cache holds, too.
    for len in [2u8, 20] {
        let mut buffer = tensors.buffer().unwrap();
        let outputs: Vec<_> = (0..len)
            .map(|bias| {
                let output = tensors.memory.tensor(&DIMS, DType::F32).unwrap();
                buffer.convert(pixels, &output, &shifted(bias)).unwrap();
                output
            })
            .collect();
        let chain = buffer.freeze().unwrap();
        for round in 0..3u8 {
            pixels.write(&[round; 120]).unwrap();
            chain.execute().unwrap().wait().unwrap();
            for (bias, output) in (0u8..).zip(&outputs) {
                let expected = [f32::from(bias + round); 120];
                assert_eq!(output.to_vec::<f32>().unwrap(), expected, "{len}, round {round}");
            }
            for bias in 0..20 {
                let mut buffer = tensors.buffer().unwrap();
                buffer.convert(pixels, floats, &shifted(bias)).unwrap();
                buffer.execute().unwrap().wait().unwrap();
            }
        }
    }
}

/// More lists in one chain than the cache holds, and no graph: they live as long as the chain.
#[test]
fn factors_live_as_long_as_a_chain_without_a_graph() {
    if no_fake() {
        return;
    }
    let fake = fake("");
    let tensors = Tensors::new(&Device::cuda(0).unwrap()).unwrap();
    let outputs: Vec<_> =
        (0..20).map(|_| tensors.memory.tensor(&DIMS, DType::F32).unwrap()).collect();
    let mut buffer = tensors.buffer().unwrap();
    for (bias, output) in (0u8..).zip(&outputs) {
        let shifted = Conversion::new().scale_and_bias(&[1.0], &[f32::from(bias)]);
        buffer.convert(&tensors.list[0], output, &shifted).unwrap();
    }
    let chain = buffer.freeze().unwrap();
    // The capture fails while the first execution is under way; then an execution in the middle.
    fake.set("latency_us=2000");
    fake.fail(Some("cuStreamBeginCapture_v2"), 1, codes::OUT_OF_MEMORY, When::Before);
    drop(chain.execute().unwrap());
    fake.fail(Some("cuLaunchKernel"), 15, codes::OUT_OF_MEMORY, When::Before);
    chain.execute().unwrap_err();
    fake.set("latency_us=0");
    chain.execute().unwrap().wait().unwrap();
    for (bias, output) in (0u8..).zip(&outputs) {
        assert_eq!(output.to_vec::<f32>().unwrap(), [f32::from(bias); 120]);
    }
    assert_eq!(fake.calls(Some("cuGraphLaunch")), 0);
    drop((chain, outputs, tensors));
    assert_eq!(crate::violations(&fake), [""; 0]);
}

/// The copy of scales and biases to the device fails once: what is in their place is not used.
#[test]
fn factors_that_did_not_arrive_are_sent_again() {
    if no_fake() {
        return;
    }
    let fake = fake("");
    let run = Run::new(&Device::cuda(0).unwrap()).unwrap();
    fake.fail(Some("cuMemcpyHtoDAsync_v2"), 1, codes::OUT_OF_MEMORY, When::Before);
    let error = run.chain.execute().unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{}", error.chain());
    run.run().unwrap();
    drop(run);
    assert_eq!(crate::violations(&fake), [""; 0]);
}

/// The consumer's own stream reads an output; a custom operation has the next execution wait.
#[test]
fn an_execution_comes_behind_custom_work_on_its_tensors() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("random_latency_us=20");
    let tensors = Tensors::new(&gpu.device()).unwrap();
    let pixels = &tensors.list[0];
    let planes = tensors.memory.tensor(&[2, 3, 5, 4], DType::F32).unwrap();
    let mut buffer = tensors.buffer().unwrap();
    let order = Conversion::new().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
    buffer.convert(pixels, &planes, &order).unwrap();
    buffer.fill(pixels, 9u8).unwrap();
    let chain = buffer.freeze().unwrap();
    chain.execute().unwrap().wait().unwrap();
    pixels.write(&[4u8; 120]).unwrap();
    let (send, gate) = std::sync::mpsc::channel();
    let mut buffer = tensors.buffer().unwrap();
    let work = move |custom: CudaCustom| {
        let _ = send.send(Driver::load().hold(custom.stream));
        Ok(())
    };
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[&planes]).unwrap();
    let custom = buffer.execute().unwrap();
    let gate = gate.recv().unwrap();
    let execution = chain.execute().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert!(!custom.is_done() && !execution.is_done());
    gate.open();
    execution.wait().unwrap();
    assert_eq!(planes.to_vec::<f32>().unwrap(), [4.0; 120]);
    assert_eq!(pixels.to_vec::<u8>().unwrap(), [9; 120]);
}

/// A chain, ready to be executed.
struct Run {
    pixels: Tensor,
    words: Tensor,
    copy: Tensor,
    chain: FrozenCommands,
}

impl Run {
    fn new(device: &Device) -> Result<Self> {
        let memory = MemoryManager::new(device);
        let pixels = memory.upload(&[0u8; 16], &[16])?;
        let (floats, copy) = (memory.tensor(&[16], DType::F32)?, memory.tensor(&[16], DType::F32)?);
        let words = memory.upload(&[0i64; 4], &[4])?;
        let mut buffer = CommandBufferPool::new(&memory, 1)?.get_buffer()?;
        buffer.convert(&pixels, &floats, &Conversion::new().normalize(&[1.0], &[2.0]))?;
        buffer.copy(&floats, &copy)?;
        buffer.fill(&words, 5i64)?;
        buffer.fill(&pixels, 3u8)?;
        Ok(Self { pixels, words, copy, chain: buffer.freeze()? })
    }

    /// Every byte checked.
    fn run(&self) -> Result<()> {
        for value in [0u8, 3, 3] {
            self.chain.execute()?.wait()?;
            let expected = [(f32::from(value) - 1.0) / 2.0; 16];
            assert_eq!(self.copy.to_vec::<f32>()?, expected);
        }
        assert_eq!(self.words.to_vec::<i64>()?, [5; 4]);
        assert_eq!(self.pixels.to_vec::<u8>()?, [3; 16]);
        Ok(())
    }
}

/// Each call of the driver fails once, in each manner: an error that says so or the right bytes.
#[test]
fn any_call_of_the_driver_may_fail() {
    if no_fake() {
        return;
    }
    let (first, last) = {
        let fake = fake("seed=1");
        let run = Run::new(&Device::cuda(0).unwrap()).unwrap();
        let first = fake.calls(None) + 1;
        run.run().unwrap();
        drop(run);
        eventually("the end of all", || fake.live() == Live::default());
        assert_eq!(crate::violations(&fake), [""; 0]);
        assert_eq!(fake.left_behind().len(), 0);
        (first, fake.calls(None))
    };
    for when in [When::Before, When::After, When::Lose] {
        for nth in first..=last {
            let fake = fake("seed=1,random_latency_us=20");
            fake.fail(None, nth, codes::UNKNOWN, when);
            let run = Device::cuda(0).and_then(|device| Run::new(&device));
            if let Err(error) = run.and_then(|run| run.run()) {
                assert!(
                    error.is_device_lost() || error.chain().contains("999"),
                    "call {nth} {when:?}: {}",
                    error.chain()
                );
            }
            wait_until_closed();
            assert_eq!(crate::violations(&fake), [""; 0], "call {nth} {when:?}");
        }
    }
}

/// Where a step on the way to a graph is refused, there is none, and nobody notices. No capture is
/// left open.
#[test]
fn without_a_graph_the_operations_are_enqueued_anew() {
    if no_fake() {
        return;
    }
    let refusals = [
        codes::OUT_OF_MEMORY,
        codes::NOT_SUPPORTED,
        codes::INVALID_VALUE,
        codes::STREAM_CAPTURE_UNSUPPORTED,
        codes::STREAM_CAPTURE_INVALIDATED,
    ];
    for symbol in MAKING.into_iter().chain(WORK) {
        for (code, when) in
            refusals.iter().flat_map(|code| [(*code, When::Before), (*code, When::After)])
        {
            let fake = fake("seed=3,random_latency_us=20");
            let device = Device::cuda(0).unwrap();
            let tensors = Tensors::new(&device).unwrap();
            let (pixels, floats) = (&tensors.list[0], &tensors.list[1]);
            let (words, copy) = (&tensors.list[4], &tensors.list[7]);
            let mut buffer = tensors.buffer().unwrap();
            buffer.convert(pixels, floats, &Conversion::new()).unwrap();
            buffer.fill(words, 7i64).unwrap();
            buffer.copy(floats, copy).unwrap();
            buffer.fill(floats, 1.0f32).unwrap();
            buffer.fill(pixels, 2u8).unwrap();
            let chain = buffer.freeze().unwrap();
            // In the capture, behind the same calls in the first execution.
            let before = match symbol {
                "cuLaunchKernel" => 2,
                symbol if WORK.contains(&symbol) => 1,
                _ => 0,
            };
            fake.fail(Some(symbol), before + 1, code, when);
            for round in 0..3u8 {
                pixels.write(&[round; 120]).unwrap();
                chain.execute().unwrap().wait().unwrap();
                let what = || format!("{symbol} {code} {when:?}, round {round}");
                assert_eq!(copy.to_vec::<f32>().unwrap(), [f32::from(round); 120], "{}", what());
                assert_eq!(floats.to_vec::<f32>().unwrap(), [1.0; 120], "{}", what());
                assert_eq!(words.to_vec::<i64>().unwrap(), [7; 120], "{}", what());
            }
            // A call that destroys leaves what it was to destroy. What was made by a call that says
            // that it failed is not touched.
            let still = ["cuGraphDestroy", "cuStreamDestroy_v2", "cuMemsetD16Async"];
            let launched = fake.calls(Some("cuGraphLaunch")) > 0;
            assert_eq!(launched, still.contains(&symbol), "{symbol} {code} {when:?}");
            assert_eq!(fake.live().captures, 0, "{symbol} {code} {when:?}");
            drop((chain, tensors, device));
            assert_eq!(crate::violations(&fake), [""; 0], "{symbol} {code} {when:?}");
        }
    }
}

/// Nothing is known of a launch: neither does the driver say that it failed, nor that it is over.
/// Then the graph is left to the driver, like the memory that it works on.
#[test]
fn a_graph_of_which_nothing_is_known_is_given_up() {
    if no_fake() {
        return;
    }
    let fake = fake("");
    // Its own end waits for the streams.
    let device = Device::cuda(0).unwrap();
    let tensors = Tensors::new(&device).unwrap();
    let chain = chain(&tensors, 5);
    chain.execute().unwrap().wait().unwrap();
    fake.hold_all();
    fake.fail(Some("cuEventRecord"), 1, codes::OUT_OF_MEMORY, When::Before);
    fake.fail(Some("cuStreamSynchronize"), 1, codes::NOT_PERMITTED, When::Before);
    let error = chain.execute().unwrap_err();
    assert!(matches!(error, Error::Device { .. }), "{}", error.chain());
    assert!(chain.execute().unwrap_err().is_device_lost());
    drop((chain, tensors));
    std::thread::sleep(std::time::Duration::from_millis(20));
    let graphs = fake.live().graphs;
    fake.release_all();
    drop(device);
    assert_eq!(graphs, 1);
    assert_eq!(crate::violations(&fake), [""; 0]);
}

/// The device is lost in the middle of a graph.
#[test]
fn a_graph_that_fails_loses_the_device() {
    if no_fake() {
        return;
    }
    for nth in 1..6 {
        let fake = fake("random_latency_us=20");
        let tensors = Tensors::new(&Device::cuda(0).unwrap()).unwrap();
        let chain = chain(&tensors, 5);
        chain.execute().unwrap().wait().unwrap();
        fake.fail_work(nth, codes::ILLEGAL_ADDRESS);
        let executions: Vec<_> = (0..3).map_while(|_| chain.execute().ok()).collect();
        drop(chain);
        let failed = executions.iter().map(|execution| execution.wait());
        assert!(failed.into_iter().all(|result| result.unwrap_err().is_device_lost()));
        assert!(tensors.bytes().is_err());
        drop(tensors);
        assert_eq!(crate::violations(&fake), [""; 0]);
    }
}
