//! Brings a loader to each of the points where it can end.

use std::collections::VecDeque;
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;

use batchline::testing::{FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, BoxError, CommandBufferPool, ConfigBuilder, DType,
    DataSource, ErrorPolicy, FnDataset, HostTensor, MemoryManager, Sample, SampleMut, SampleSpec,
    Sampler,
};
use futures_core::Stream;

use crate::Ending;
use crate::gate::{Gate, Keeper, Verdict};
use crate::scene::{Answer, BATCHES, Completion, LONG, ROWS, Scene, Way, eventually};
use crate::threads;

/// Where a thread is, or a call of the consumer, when the end comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// A worker is inside `Dataset::read`.
    Read,
    /// A worker waits before it reads a sample again.
    Backoff,
    /// A worker asks the sampler for the samples of its rows.
    Sampler,
    /// A worker is inside `DataSource::get_batch`.
    Pull,
    /// A worker is inside `DataSource::reset`.
    Reset,
    /// A worker waits for a free slot.
    Slot,
    /// The ticket in front is not full; the one behind it is.
    Full,
    /// The submitter waits for an output.
    Output,
    /// The submitter is inside the driver, with the last batch.
    Submit,
    /// The reaper waits for the fence of a transfer.
    Fence,
    /// The reaper is inside a completion of the user's.
    Completion,
    /// The consumer waits in `get_batch`.
    Get,
    /// The consumer waits in `get_batch_timeout`.
    Timed,
    /// The consumer polls with `try_get_batch`.
    Poll,
    /// The consumer's task awaits the stream.
    Stream,
    /// The consumer holds batches, and asks for none.
    Holds,
}

impl Stage {
    /// Whether it can be reached where slots are the batches themselves.
    pub(crate) fn is_on_unified(self) -> bool {
        !matches!(
            self,
            Stage::Slot | Stage::Output | Stage::Submit | Stage::Fence | Stage::Completion
        )
    }

    /// Whether, when a call fails, a batch before it is still in the consumer's queue.
    pub(crate) fn leaves_a_batch(self) -> bool {
        matches!(
            self,
            Stage::Read | Stage::Sampler | Stage::Pull | Stage::Reset | Stage::Slot | Stage::Submit
        )
    }

    /// The place at which the source, or the sampler, is held.
    fn gate(self) -> u64 {
        match self {
            // The number of the call.
            Stage::Pull => 3,
            // The epoch.
            Stage::Reset => 1,
            // The first sample of batch 2: the device is steered before anything of it goes on.
            Stage::Slot | Stage::Submit | Stage::Fence | Stage::Completion => 8,
            Stage::Output => 17,
            // The second sample of batch 2.
            _ => 9,
        }
    }

    /// Samples of an epoch, and epochs.
    pub(crate) fn size(self) -> (u64, u64) {
        match self {
            Stage::Reset => (8, BATCHES / 2),
            // Two batches, and the last one, behind which there is nothing to read.
            Stage::Submit => (12, 1),
            _ => (BATCHES * ROWS.unsigned_abs(), 1),
        }
    }
}

/// Brings a loader to `stage`, to see it end by `ending` there.
pub(crate) fn set(stage: Stage, ending: Ending, unified: bool) -> Scene {
    let (device, control) = faulty_device(FaultPlan { unified, ..FaultPlan::default() });
    let memory = MemoryManager::new(&device);
    let source = Keeper::at(stage.gate());
    let make = {
        let (gate, memory) = (Arc::clone(&source.gate), memory.clone());
        move || loader(stage, ending, &gate, &memory)
    };
    let loader = Arc::new(make());
    loader.start().unwrap();
    let per_epoch = stage.size().0 / ROWS.unsigned_abs();
    let (completion, waiting, waker, held) = (None, None, None, VecDeque::new());
    let make = Box::new(make);
    let loader = Some(loader);
    let mut scene = Scene {
        loader,
        memory,
        control,
        source,
        completion,
        waiting,
        waker,
        taken: 0,
        held,
        per_epoch,
        make,
    };
    scene.take();
    if ending.is_of_a_call() && stage.leaves_a_batch() {
        eventually("the next batch", || scene.loader().stats().queued_batches == 1);
    } else {
        scene.take();
    }
    match stage {
        Stage::Output => scene.take(),
        // Nothing is going on but that a worker waits for the consumer.
        Stage::Holds if ending.leaves_the_source_alone() => {
            scene.source.open(Verdict::Go);
            scene.take();
        }
        Stage::Holds => {}
        _ => scene.keep(1),
    }
    scene.source.entered();
    go_on(&mut scene, stage, ending);
    threads::settle();
    scene
}

/// From where the source stands to where the scene is.
fn go_on(scene: &mut Scene, stage: Stage, ending: Ending) {
    let submitted = scene.control.submissions();
    match stage {
        Stage::Backoff => {
            scene.source.open(Verdict::Fail);
        }
        Stage::Slot | Stage::Submit => {
            scene.control.hold_submissions();
            scene.source.open(Verdict::Go);
            eventually("a submission", || scene.control.submissions() > submitted);
            if matches!(ending, Ending::Lost | Ending::Stop | Ending::Hangs) {
                // Nobody but who ends the stream can wake it.
                scene.waiting = Some(consumer(scene, Way::Get));
            }
        }
        Stage::Fence => {
            scene.control.hold_transfers();
            scene.source.open(Verdict::Go);
            eventually("two transfers", || scene.control.submissions() > submitted + 1);
        }
        Stage::Completion => {
            let keeper = Keeper::at(0);
            let pool = CommandBufferPool::new(&scene.memory, 1).unwrap();
            let mut buffer = pool.get_buffer().unwrap();
            buffer.fill(&scene.memory.tensor(&[8], DType::U8).unwrap(), 1u8).unwrap();
            let gate = Arc::clone(&keeper.gate);
            let (drops, to_drop) = mpsc::channel();
            let completion = move |_| {
                gate.call(0).unwrap();
                drop(to_drop.try_recv());
            };
            let submission = buffer.execute_async(completion).unwrap();
            keeper.entered();
            scene.completion = Some(Completion { keeper, drops, submission });
            let submitted = scene.control.submissions();
            scene.source.open(Verdict::Go);
            eventually("two transfers", || scene.control.submissions() > submitted + 1);
        }
        // The worker that is kept may have claimed the rest of its ticket, or others read it.
        Stage::Full => eventually("the ticket behind", || scene.source.calls() >= 13),
        Stage::Output => {
            let answer = Way::Get.ask(scene.loader());
            let Answer::Error(error) = answer else { panic!("{answer:?}") };
            assert!(matches!(error, batchline::Error::TooManyHeld { held: 3, .. }), "{error}");
        }
        Stage::Get => scene.waiting = Some(consumer(scene, Way::Get)),
        Stage::Timed => {
            let answer = Way::Timed(Duration::from_millis(1)).ask(scene.loader());
            assert!(matches!(answer, Answer::NotYet), "{answer:?}");
            scene.waiting = Some(consumer(scene, Way::Timed(LONG)));
        }
        Stage::Poll => {
            let answer = Way::Poll.ask(scene.loader());
            assert!(matches!(answer, Answer::NotYet), "{answer:?}");
        }
        Stage::Stream if ending.drops_the_loader() => {
            // A loader can't be dropped before its stream, so that is given up first.
            let count = Arc::new(Nothing);
            let waker = Waker::from(Arc::clone(&count));
            let mut stream = scene.loader().stream();
            let poll = std::pin::Pin::new(&mut stream).poll_next(&mut Context::from_waker(&waker));
            assert!(matches!(poll, Poll::Pending));
            let count: Arc<dyn Send + Sync> = count;
            scene.waker = Some(Arc::downgrade(&count));
        }
        Stage::Stream => scene.waiting = Some(consumer(scene, Way::Stream)),
        Stage::Read | Stage::Sampler | Stage::Pull | Stage::Reset | Stage::Holds => {}
    }
}

/// A waker that does nothing.
struct Nothing;

impl Wake for Nothing {
    fn wake(self: Arc<Self>) {}
}

/// A consumer that asks on a thread of its own.
fn consumer(scene: &Scene, way: Way) -> std::thread::JoinHandle<Answer> {
    let loader = Arc::clone(scene.loader());
    let ask = move || way.ask(&loader);
    std::thread::Builder::new().name("consumer".to_owned()).spawn(ask).unwrap()
}

fn config(stage: Stage, ending: Ending, memory: &MemoryManager) -> ConfigBuilder {
    // Long enough for whatever is to come, and short where nothing comes.
    let timeout = if ending == Ending::Hangs { Duration::from_millis(30) } else { LONG };
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(ROWS.unsigned_abs())
        .workers(if stage == Stage::Read { 1 } else { 2 })
        .prefetch_depth(2)
        .max_held(1)
        .epochs(stage.size().1)
        .stop_timeout(timeout)
        .memory_manager(memory.clone());
    if stage == Stage::Backoff {
        let backoff = Duration::from_secs(3600);
        return config.error_policy(ErrorPolicy::Retry { times: 1, backoff });
    }
    config
}

fn loader(
    stage: Stage,
    ending: Ending,
    gate: &Arc<Gate>,
    memory: &MemoryManager,
) -> AsyncDataLoader {
    let config = config(stage, ending, memory);
    let gate = Arc::clone(gate);
    let len = stage.size().0;
    if matches!(stage, Stage::Pull | Stage::Reset) {
        let source = Pulled { stage, gate, len, at: 0, resets: 0, calls: 0 };
        return AsyncDataLoader::from_source(source, config.build().unwrap()).unwrap();
    }
    let spec = SampleSpec::new(DType::I64, &[]).unwrap();
    if stage == Stage::Sampler {
        let write = |index: u64, sample: &mut SampleMut<'_>| -> Result<(), BoxError> {
            threads::mark();
            Ok(sample.write(0, &[index.cast_signed()])?)
        };
        let dataset = FnDataset::new(len, spec, write);
        let config = config.sampler(Asks(gate, len)).build().unwrap();
        return AsyncDataLoader::new(dataset, config).unwrap();
    }
    let read = move |index: u64, sample: &mut SampleMut<'_>| -> Result<(), BoxError> {
        gate.call(index)?;
        Ok(sample.write(0, &[index.cast_signed()])?)
    };
    AsyncDataLoader::new(FnDataset::new(len, spec, read), config.build().unwrap()).unwrap()
}

/// The data set's own order, behind a gate.
struct Asks(Arc<Gate>, u64);

impl Sampler for Asks {
    fn len(&self) -> u64 {
        self.1
    }
    fn index(&self, _: u64, position: u64) -> u64 {
        // It has no error to return, but may name a sample that does not exist.
        if self.0.call(position).is_ok() { position } else { 99 }
    }
    fn fingerprint(&self) -> u64 {
        1
    }
}

/// A pull source of numbers, behind a gate at one of its calls.
struct Pulled {
    stage: Stage,
    gate: Arc<Gate>,
    len: u64,
    at: u64,
    resets: u64,
    calls: u64,
}

impl DataSource for Pulled {
    fn get_batch(&mut self, size: usize) -> Result<Option<Sample>, BoxError> {
        self.calls += 1;
        if self.stage == Stage::Pull {
            self.gate.call(self.calls)?;
        }
        let end = self.len.min(self.at + size as u64);
        if self.at == end {
            return Ok(None);
        }
        let numbers: Vec<i64> = (self.at..end).map(u64::cast_signed).collect();
        let rows = end - self.at;
        self.at = end;
        Ok(Some(Sample::new(HostTensor::new(numbers, &[rows])?)))
    }

    fn reset(&mut self) -> Result<(), BoxError> {
        if self.stage == Stage::Reset {
            self.gate.call(self.resets)?;
        }
        self.resets += 1;
        self.at = 0;
        Ok(())
    }
}
