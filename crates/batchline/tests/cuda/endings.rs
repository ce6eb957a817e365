//! Every way in which a loader can end, wherever its device happens to be: what the consumer is
//! told, that all threads are joined, that all memory is home or given up, to the byte, and that
//! nothing is left with the driver. As `tests/endings`, for what only a driver does.
//!
//! `BATCHLINE_SCENE=slot cargo test --test cuda endings` plays the scenes whose name begins so.

use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, BoxError, CommandBufferPool, Conversion, DType, Device,
    Error, FnDataset, GpuBatch, MemoryManager, SampleMut, SampleSpec, Submission,
};
use fake_cuda::{Fake, When, codes};

use crate::driver::{Driver, Fault};
use crate::gate::{Keeper, Verdict};
use crate::{assert_clean, in_a_child, no_kernels, pretended, threads, wait_until_closed};

/// Where a thread is, or the device, when the end comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A worker is inside `Dataset::read`.
    Read,
    /// The consumer waits in `get_batch`, for what is being read.
    Get,
    /// The consumer holds all batches; the next one waits for an output.
    Holds,
    /// The copy stream is held; a worker waits for a slot.
    Slot,
    /// The copy stream is held, with the last batches; there is nothing more to read.
    Copy,
    /// The stream that converts is held.
    Prepare,
    /// The consumer's stream is held; the next copy waits for it, on the device.
    Consumer,
    /// A worker is inside the driver.
    Driver,
    /// The reaper is inside a completion of the user's.
    Completion,
}

impl Stage {
    /// Batches that the device may be at.
    fn in_flight(self) -> usize {
        match self {
            Stage::Read | Stage::Get | Stage::Holds => 0,
            Stage::Consumer | Stage::Driver => 1,
            Stage::Slot | Stage::Copy | Stage::Prepare | Stage::Completion => 2,
        }
    }
}

/// How it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// A call fails: that of the source, or of the driver.
    Error,
    /// A call of the user's code panics.
    Panic,
    /// The context is lost.
    Lost,
    /// A kernel faults, on a stream of the user's.
    Fault,
    Stop,
    /// The consumer drops the loader, then the batches that it holds.
    LoaderFirst,
    /// The consumer drops its batches, then the loader.
    BatchesFirst,
    /// The loader is dropped on another thread.
    Elsewhere,
    /// What is under way does not return within `stop_timeout`.
    Hangs,
}

const ENDINGS: [Ending; 9] = [
    Ending::Error,
    Ending::Panic,
    Ending::Lost,
    Ending::Fault,
    Ending::Stop,
    Ending::LoaderFirst,
    Ending::BatchesFirst,
    Ending::Elsewhere,
    Ending::Hangs,
];

/// What each ending comes to; `-` where it can't come.
#[rustfmt::skip]
const EXPECTED: [(Stage, [&str; 9]); 9] = [
    (Stage::Read,       ["worker's",    "worker's", "lost", "lost", "stopped", "home", "home", "home", "detached"]),
    (Stage::Get,        ["worker's",    "worker's", "lost", "lost", "stopped", "-",    "-",    "-",    "detached"]),
    (Stage::Holds,      ["worker's",    "worker's", "lost", "lost", "stopped", "home", "home", "home", "detached"]),
    (Stage::Slot,       ["lost",        "-",        "lost", "lost", "stopped", "home", "home", "home", "timeout"]),
    (Stage::Copy,       ["lost",        "-",        "lost", "lost", "stopped", "home", "home", "home", "timeout"]),
    (Stage::Prepare,    ["lost",        "-",        "lost", "lost", "stopped", "home", "home", "home", "timeout"]),
    (Stage::Consumer,   ["lost",        "-",        "lost", "lost", "stopped", "home", "home", "home", "timeout"]),
    (Stage::Driver,     ["submitter's", "-",        "lost", "lost", "stopped", "home", "home", "home", "detached"]),
    (Stage::Completion, ["-",           "goes on",  "lost", "lost", "stopped", "home", "home", "home", "timeout"]),
];

/// More than any scene may take, on the slowest machine.
const LIMIT: Duration = Duration::from_secs(10);

/// What everybody is told after `stop`.
const STOPPED: &str = "the loader is stopped: call `start` to begin a new generation";

const ROWS: u64 = 4;
const WIDTH: u8 = 64;
/// Batches of the stream, where it does not end with those in flight.
const BATCHES: u64 = 10;
/// Bytes of a slot, and of a batch as it is copied.
const SLOT: u64 = ROWS * WIDTH as u64;

#[test]
fn every_ending_wherever_the_device_is() {
    if no_kernels() || !in_a_child("endings::every_ending_wherever_the_device_is") {
        return;
    }
    let chosen = std::env::var("BATCHLINE_SCENE").unwrap_or_default().to_lowercase();
    quiet();
    for (stage, outcomes) in EXPECTED {
        for (ending, expected) in ENDINGS.into_iter().zip(outcomes) {
            for convert in [false, true] {
                let name = format!("{stage:?} {ending:?}, converting: {convert}").to_lowercase();
                let cannot_be = expected == "-" || stage == Stage::Prepare && !convert;
                if cannot_be || !name.starts_with(&chosen) {
                    continue;
                }
                let Some(found) = within_the_limit(&name, move || play(stage, ending, convert))
                else {
                    return;
                };
                assert_eq!(found, expected, "{name}");
            }
        }
    }
}

/// The call that a worker is inside of fails, in each manner: with what says nothing of the device,
/// and it goes on; or with what does, and all is given up that the call may have reached.
#[test]
fn a_call_fails_while_a_worker_is_inside() {
    if no_kernels() || !in_a_child("endings::a_call_fails_while_a_worker_is_inside") {
        return;
    }
    for (code, when, expected) in [
        (codes::OUT_OF_MEMORY, When::Before, "submitter's"),
        (codes::OUT_OF_MEMORY, When::After, "submitter's"),
        (codes::UNKNOWN, When::Before, "lost"),
        (codes::UNKNOWN, When::After, "lost"),
        (codes::UNKNOWN, When::Lose, "lost"),
    ] {
        for convert in [false, true] {
            let play = move || {
                let mut scene = Scene::set(Stage::Driver, Ending::Error, convert)?;
                let outcome = fail_inside(&mut scene, code, when);
                // Where the stream can still be waited for, it is known that nothing is on it.
                let in_flight = usize::from(when == When::Lose);
                clear_away(scene, Ending::Error, (outcome == "lost").then_some(in_flight));
                Some(outcome)
            };
            let name = format!("{code} {when:?}, converting: {convert}");
            let Some(found) = within_the_limit(&name, play) else { return };
            assert_eq!(found, expected, "{name}");
        }
    }
}

/// The panics that the scenes bring about are no news.
fn quiet() {
    let print = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if panic.payload().downcast_ref::<&str>() != Some(&"no such luck") {
            print(panic);
        }
    }));
}

/// Plays a scene on a thread of its own, so that one which hangs fails like any other.
fn within_the_limit<R: Send + 'static>(name: &str, play: impl FnOnce() -> R + Send + 'static) -> R {
    let (send, receive) = mpsc::channel();
    let thread = std::thread::Builder::new().name("scene".to_owned());
    let scene = thread.spawn(move || send.send(play())).unwrap();
    match receive.recv_timeout(LIMIT) {
        Ok(found) => {
            scene.join().unwrap().unwrap();
            found
        }
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("{name} did not end within {LIMIT:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            println!("{name}");
            std::panic::resume_unwind(scene.join().expect_err("it ended without an outcome"))
        }
    }
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    // A little less than a scene may take, so that it says what did not come.
    let deadline = Instant::now() + LIMIT / 2;
    while !condition() {
        assert!(Instant::now() < deadline, "waited for {what}");
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// A loader that was brought to a certain point.
struct Scene {
    fake: Fake,
    stage: Stage,
    convert: bool,
    memory: MemoryManager,
    /// `None` once it was dropped.
    loader: Option<Arc<AsyncDataLoader>>,
    source: Keeper,
    /// A completion of the test's own, and what it drops when it goes on.
    completion: Option<(Keeper, mpsc::Sender<AsyncDataLoader>, Submission)>,
    /// The kernel that the device is to be lost by, if it is: nothing is loaded while streams are
    /// held.
    fault: Option<Fault>,
    /// A consumer that waits in a call.
    waiting: Option<JoinHandle<Result<Option<GpuBatch>, Error>>>,
    /// Batches that the consumer has taken, and those of them that it holds, the oldest first.
    taken: u64,
    held: VecDeque<GpuBatch>,
    batches: u64,
}

/// The driver's call that the worker is inside of.
const CALL: &str = "cuMemcpyHtoDAsync_v2";

impl Scene {
    /// Brings a loader to `stage`, to see it end by `ending` there.
    fn set(stage: Stage, ending: Ending, convert: bool) -> Option<Self> {
        let fake = pretended("")?;
        let memory = MemoryManager::new(&Device::cuda(0).unwrap());
        // The first sample of batch 2 where the device is steered before anything of it goes on;
        // else the second one, or that of batch 4.
        let source = Keeper::at(match stage {
            Stage::Read | Stage::Get => 9,
            Stage::Holds => 17,
            _ => 8,
        });
        let batches = if stage == Stage::Copy { 4 } else { BATCHES };
        let loader = loader(&memory, &source, batches, convert, ending);
        loader.start().unwrap();
        let mut scene = Self {
            fake,
            stage,
            convert,
            loader: Some(Arc::new(loader)),
            source,
            completion: None,
            fault: (ending == Ending::Fault).then(|| Driver::load().load_fault()),
            waiting: None,
            taken: 0,
            held: VecDeque::new(),
            batches,
            memory,
        };
        scene.take();
        scene.take();
        if stage == Stage::Holds {
            scene.take();
        }
        scene.wait_for_transfers();
        scene.assert_held_are_good();
        scene.source.entered();
        scene.go_on();
        threads::settle();
        Some(scene)
    }

    /// From where the source stands to where the scene is.
    fn go_on(&mut self) {
        let number = |number| {
            let streams = self.fake.streams();
            streams.iter().find(|stream| stream.number == number).expect("four streams").handle
        };
        // In the order in which a device makes them; the third one reads back.
        let (copy, prepare, consumer) = (number(1), number(2), number(4));
        match self.stage {
            Stage::Read => self.keep(1),
            Stage::Get => {
                self.keep(1);
                let loader = Arc::clone(self.loader());
                let consumer = std::thread::Builder::new().name("consumer".to_owned());
                self.waiting = Some(consumer.spawn(move || loader.get_batch()).unwrap());
            }
            Stage::Holds => {
                let error = self.loader().get_batch().unwrap_err();
                assert!(matches!(error, Error::TooManyHeld { held: 3, .. }), "{error}");
            }
            Stage::Slot | Stage::Copy | Stage::Prepare => {
                self.keep(1);
                self.fake.hold(if self.stage == Stage::Prepare { prepare } else { copy });
                self.source.open(Verdict::Go);
                self.wait_for_queued(2);
            }
            Stage::Consumer => {
                self.keep(1);
                eventually("the end of batch 0", || self.queued(consumer) == 0);
                self.fake.hold(consumer);
                self.keep(0);
                self.source.open(Verdict::Go);
                self.take();
                self.take();
                self.wait_for_transfers();
                // Batch 4 is written over batch 1, which the consumer's stream may still use.
                self.wait_for_queued(1);
                let writes = if self.convert { prepare } else { copy };
                eventually("a write that waits", || self.queued(writes) > 0);
            }
            Stage::Driver => {
                self.keep(1);
                self.fake.hold_calls(CALL);
                let before = self.fake.calls(Some(CALL));
                self.source.open(Verdict::Go);
                eventually("a call", || self.fake.calls(Some(CALL)) > before);
            }
            Stage::Completion => {
                self.keep(1);
                let keeper = Keeper::at(0);
                let mut buffer =
                    CommandBufferPool::new(&self.memory, 1).unwrap().get_buffer().unwrap();
                buffer.fill(&self.memory.tensor(&[8], DType::U8).unwrap(), 1u8).unwrap();
                let gate = Arc::clone(&keeper.gate);
                let (drops, to_drop) = mpsc::channel();
                let completion = move |_| {
                    gate.call(0).unwrap();
                    drop(to_drop.try_recv());
                };
                let submission = buffer.execute_async(completion).unwrap();
                keeper.entered();
                self.completion = Some((keeper, drops, submission));
                self.source.open(Verdict::Go);
                self.wait_for_queued(2);
            }
        }
    }

    /// Work that is queued on a stream.
    fn queued(&self, stream: usize) -> usize {
        let streams = self.fake.streams();
        streams.iter().find(|each| each.handle == stream).map_or(0, |each| each.queued)
    }

    fn wait_for_queued(&self, batches: usize) {
        eventually("batches that are submitted", || {
            self.loader().stats().queued_batches == batches
        });
    }

    /// What the consumer holds has arrived, and is not in flight any more.
    fn wait_for_transfers(&self) {
        self.held.iter().for_each(|batch| batch.wait().unwrap());
    }

    fn loader(&self) -> &Arc<AsyncDataLoader> {
        self.loader.as_ref().expect("a loader until it is dropped")
    }

    /// The next batch, which the consumer holds.
    fn take(&mut self) {
        let batch = self.loader().get_batch().unwrap().expect("a batch");
        assert_eq!(batch.batch_id(), self.taken);
        self.held.push_back(batch);
        self.taken += 1;
    }

    /// The consumer keeps only this many batches, the newest.
    fn keep(&mut self, batches: usize) {
        while self.held.len() > batches {
            self.held.pop_front();
        }
    }

    /// What the consumer holds is what it was when it was taken.
    fn assert_held_are_good(&self) {
        for (batch, number) in self.held.iter().rev().zip((0..self.taken).rev()) {
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number, self.convert));
        }
    }

    /// However the consumer asks, and as often, it is told this; so is the one that waits.
    fn assert_told(&mut self, text: &str) {
        let told =
            |error: Error| assert!(error.chain().contains(text), "{} is no {text}", error.chain());
        if let Some(waiting) = self.waiting.take() {
            eventually("the consumer that waits to be woken", || waiting.is_finished());
            told(waiting.join().unwrap().unwrap_err());
        }
        let loader = self.loader();
        told(loader.get_batch().unwrap_err());
        told(loader.try_get_batch().unwrap_err());
        told(loader.get_batch_timeout(Duration::from_secs(60)).unwrap_err());
        told(loader.get_batch().unwrap_err());
        assert!(!loader.stats().is_running);
    }

    /// Lets everything go on that the scene holds up.
    fn let_go(&self) {
        let_go(&self.fake, &self.source, self.completion.as_ref().map(|(keeper, ..)| keeper));
    }

    /// Runs `call`, which waits for something, and lets everything go on as soon as it does.
    fn while_all_goes_on<R>(&mut self, call: impl FnOnce() -> R) -> R {
        let number = threads::own_number();
        let over = AtomicBool::new(false);
        let Self { fake, source, completion, .. } = self;
        let (fake, completion) = (&*fake, completion.as_mut().map(|(keeper, ..)| keeper));
        std::thread::scope(|scope| {
            let other = std::thread::Builder::new().name("meanwhile".to_owned());
            let over = &over;
            let meanwhile = move || {
                threads::wait_until_asleep(number.as_deref(), || over.load(Ordering::SeqCst));
                let_go(fake, source, completion.as_deref());
            };
            other.spawn_scoped(scope, meanwhile).unwrap();
            let result = call();
            over.store(true, Ordering::SeqCst);
            result
        })
    }
}

fn let_go(fake: &Fake, source: &Keeper, completion: Option<&Keeper>) {
    source.open(Verdict::Go);
    if let Some(keeper) = completion {
        keeper.open(Verdict::Go);
    }
    fake.release_calls(CALL);
    fake.release_all();
}

fn loader(
    memory: &MemoryManager,
    source: &Keeper,
    batches: u64,
    convert: bool,
    ending: Ending,
) -> AsyncDataLoader {
    // Long enough for whatever is to come, and short where nothing comes.
    let timeout = if ending == Ending::Hangs { Duration::from_millis(30) } else { LIMIT };
    let mut config = AsyncDataLoaderConfig::builder()
        .batch_size(ROWS)
        .workers(2)
        .prefetch_depth(2)
        .max_held(1)
        .stop_timeout(timeout)
        .memory_manager(memory.clone());
    if convert {
        config = config.convert(DType::I16, Conversion::new());
    }
    let gate = Arc::clone(&source.gate);
    let spec = SampleSpec::new(DType::U8, &[WIDTH.into()]).unwrap();
    let read = move |index: u64, sample: &mut SampleMut<'_>| -> Result<(), BoxError> {
        gate.call(index)?;
        sample.input().fill(index.to_le_bytes()[0]);
        Ok(())
    };
    let dataset = FnDataset::new(batches * ROWS, spec, read);
    AsyncDataLoader::new(dataset, config.build().unwrap()).unwrap()
}

/// The bytes of a batch.
fn expected(batch: u64, convert: bool) -> Vec<u8> {
    let rows = (batch * ROWS..(batch + 1) * ROWS).map(|row| row.to_le_bytes()[0]);
    let element =
        |byte: u8| if convert { i16::from(byte).to_ne_bytes().to_vec() } else { vec![byte] };
    rows.flat_map(|byte| element(byte).repeat(WIDTH.into())).collect()
}

/// The loader's threads end by themselves, but for those that can't.
fn assert_threads_left(left: usize) {
    eventually("the loader's threads to end", || {
        threads::count(threads::is_of_loader).is_none_or(|count| count == left)
    });
}

/// Plays the scene, and says in a word how it ended.
fn play(stage: Stage, ending: Ending, convert: bool) -> Option<&'static str> {
    let mut scene = Scene::set(stage, ending, convert)?;
    let outcome = match ending {
        Ending::Error | Ending::Panic => fail(&mut scene, ending),
        Ending::Lost | Ending::Fault => lose(&mut scene, ending),
        Ending::Stop => stop(&mut scene),
        Ending::LoaderFirst | Ending::BatchesFirst => drop_in_order(&mut scene, ending),
        Ending::Elsewhere => drop_elsewhere(&mut scene),
        Ending::Hangs => hang(&mut scene),
    };
    let in_flight = stage.in_flight();
    clear_away(scene, ending, (outcome == "lost").then_some(in_flight));
    Some(outcome)
}

/// A call fails or panics: the batches before it, then the error.
fn fail(scene: &mut Scene, ending: Ending) -> &'static str {
    let verdict = if ending == Ending::Error { Verdict::Fail } else { Verdict::Panic };
    match scene.stage {
        Stage::Read | Stage::Get | Stage::Holds => scene.source.open(verdict),
        Stage::Driver => return fail_inside(scene, codes::OUT_OF_MEMORY, When::Before),
        Stage::Completion => {
            scene.completion.as_ref().unwrap().0.open(verdict);
            return go_on(scene);
        }
        // The reaper looks at what is in flight all the time.
        _ => {
            scene.fake.fail(Some("cuEventQuery"), 1, codes::UNKNOWN, When::Before);
            return lost(scene, "CUDA_ERROR_UNKNOWN (999)", 0);
        }
    }
    let text = match scene.stage {
        Stage::Holds => "worker: sample 17 in batch 4 of epoch 0: ",
        _ => "worker: sample 9 in batch 2 of epoch 0: ",
    };
    if scene.stage == Stage::Holds {
        // The batch that waits for an output is before the error.
        scene.keep(2);
        scene.take();
        scene.keep(1);
    }
    end_with(scene, text);
    "worker's"
}

/// The call of the driver that a worker is inside of fails.
fn fail_inside(scene: &mut Scene, code: u32, when: When) -> &'static str {
    scene.fake.fail(Some(CALL), 1, code, when);
    scene.fake.release_calls(CALL);
    if code == codes::UNKNOWN {
        return lost(scene, "CUDA_ERROR_UNKNOWN (999)", 0);
    }
    let text = "submitter: batch 2 of epoch 0: cuda:0: Fake GPU 0: copying to the device failed: \
                CUDA_ERROR_OUT_OF_MEMORY (2)";
    end_with(scene, text);
    "submitter's"
}

/// The loader has ended with an error; what the consumer holds is still good.
fn end_with(scene: &mut Scene, text: &str) {
    scene.assert_told(text);
    scene.assert_held_are_good();
    assert_threads_left(0);
    scene.loader().stop().unwrap();
    // The error before it counts.
    scene.assert_told(text);
}

/// It does not end at all.
fn go_on(scene: &mut Scene) -> &'static str {
    while scene.taken < BATCHES {
        scene.keep(1);
        scene.take();
    }
    scene.keep(1);
    assert!(scene.loader().get_batch().unwrap().is_none());
    assert_threads_left(0);
    let (_, _, submission) = scene.completion.as_ref().unwrap();
    assert_eq!(submission.wait().unwrap_err().chain(), "a completion panicked: no such luck");
    scene.assert_held_are_good();
    scene.loader().stop().unwrap();
    "goes on"
}

/// The context is lost, by itself or by a kernel of the user's.
fn lose(scene: &mut Scene, ending: Ending) -> &'static str {
    let why = if ending == Ending::Lost {
        scene.fake.lose(0, codes::LAUNCH_FAILED);
        "CUDA_ERROR_LAUNCH_FAILED (719)"
    } else {
        let fault = scene.fault.take().expect("loaded when the scene was set");
        fault.launch(Driver::load().stream());
        "CUDA_ERROR_ILLEGAL_ADDRESS (700)"
    };
    // Of a size that nothing has, so that the driver must be asked.
    let rows = Cell::new(1000);
    eventually("the loss", || {
        rows.set(rows.get() + 1);
        scene.memory.tensor(&[rows.get(), 256], DType::U8).is_err()
    });
    let inside = scene.source.is_inside() || scene.stage == Stage::Driver;
    lost(scene, why, usize::from(inside))
}

/// Everybody is told, while so many workers can't leave what they are inside of.
fn lost(scene: &mut Scene, why: &str, left: usize) -> &'static str {
    let device = scene.memory.device();
    eventually("the loss to be noticed", || device.check().is_err());
    eventually("the loader to be told", || !scene.loader().stats().is_running);
    let text = scene.memory.device().check().unwrap_err().chain();
    assert!(text.starts_with("cuda:0: Fake GPU 0 is lost (") && text.contains(why), "{text}");
    scene.assert_told(&text);
    for batch in &scene.held {
        assert!(batch.input_tensor().to_bytes().unwrap_err().is_device_lost());
    }
    assert_threads_left(left);
    scene.let_go();
    scene.loader().stop().unwrap();
    scene.assert_told(&text);
    "lost"
}

/// `stop` returns with what is under way; everybody is told.
fn stop(scene: &mut Scene) -> &'static str {
    let loader = Arc::clone(scene.loader());
    scene.while_all_goes_on(|| loader.stop()).unwrap();
    drop(loader);
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    scene.assert_told(STOPPED);
    scene.assert_held_are_good();
    assert_eq!(scene.loader().stats().queued_batches, 0);
    scene.loader().stop().unwrap();
    "stopped"
}

fn drop_in_order(scene: &mut Scene, ending: Ending) -> &'static str {
    if ending == Ending::BatchesFirst {
        scene.held.clear();
    }
    let loader = Arc::into_inner(scene.loader.take().unwrap()).expect("nobody else has it");
    scene.while_all_goes_on(|| drop(loader));
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    scene.assert_held_are_good();
    scene.held.clear();
    "home"
}

/// The loader goes on another thread, the batches on this one, while that thread waits. Where there
/// is a completion, the loader goes in it: on the very thread that brings its memory home.
fn drop_elsewhere(scene: &mut Scene) -> &'static str {
    let loader = Arc::into_inner(scene.loader.take().unwrap()).expect("nobody else has it");
    if let Some((_, drops, submission)) = &scene.completion {
        drops.send(loader).unwrap();
        scene.let_go();
        submission.wait().unwrap();
        scene.held.clear();
        return "home";
    }
    let other = std::thread::Builder::new().name("elsewhere".to_owned());
    let other = other.spawn(move || drop(loader)).unwrap();
    threads::settle();
    scene.held.clear();
    scene.let_go();
    eventually("the loader to be dropped", || other.is_finished());
    other.join().unwrap();
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    "home"
}

/// `stop` gives up what does not return, and remembers it.
fn hang(scene: &mut Scene) -> &'static str {
    let loader = Arc::clone(scene.loader());
    loader.stop().unwrap_err();
    scene.assert_told(STOPPED);
    let in_flight = scene.memory.stats().staging_in_use;
    let outcome = match loader.stop() {
        Err(Error::Detached { workers: 1, .. }) => "detached",
        Err(Error::Timeout { .. }) => "timeout",
        other => panic!("{other:?}"),
    };
    assert_threads_left(usize::from(outcome == "detached"));
    assert!(in_flight >= SLOT, "a slot that may be read or written is not free");
    scene.let_go();
    eventually("the call to return", || threads::marked() == 0);
    eventually("the stop to succeed", || loader.stop().is_ok());
    scene.assert_held_are_good();
    outcome
}

/// What is left, whatever the ending was: no thread, no memory in use, none given up but what may
/// still be used, nothing with the driver; and what there was before is there again for the next
/// loader. `lost` says how many batches were in flight when the device was lost, if it was.
fn clear_away(mut scene: Scene, ending: Ending, lost: Option<usize>) {
    // What is in flight is given up with all that it owns; so is what the consumer holds, as its
    // stream can't be asked any more.
    let output = if scene.convert { 2 * SLOT } else { SLOT };
    let record = SLOT + output + if scene.convert { SLOT } else { 0 };
    let in_doubt =
        lost.map_or(0, |records| records as u64 * record + scene.held.len() as u64 * output);
    scene.held.clear();
    scene.let_go();
    assert_eq!(threads::marked(), 0, "a worker was not joined");
    assert_threads_left(0);
    let stats = || scene.memory.stats();
    eventually("all memory to come home", || {
        stats().device_in_use == 0 && stats().staging_in_use == 0
    });
    assert_eq!(stats().quarantined, in_doubt, "memory that is given up");
    let loader = scene.loader.take().unwrap_or_else(|| {
        Arc::new(loader(&scene.memory, &scene.source, scene.batches, scene.convert, ending))
    });
    if lost.is_some() {
        assert!(loader.start().unwrap_err().is_device_lost());
    } else {
        let before = stats().allocations;
        loader.start().unwrap();
        for number in 0..scene.batches {
            let batch = loader.get_batch().unwrap().expect("a batch");
            assert_eq!(batch.input_tensor().to_bytes().unwrap(), expected(number, scene.convert));
        }
        assert!(loader.get_batch().unwrap().is_none());
        eventually("the stop to succeed", || loader.stop().is_ok());
        assert_eq!(stats().allocations, before, "memory was lost");
    }
    let Scene { fake, memory, completion, .. } = scene;
    drop((loader, memory, completion));
    wait_until_closed();
    if lost.is_some() {
        let mut violations = fake.violations();
        violations.retain(|violation| !violation.contains("batchline_test_fault"));
        assert_eq!(violations, [""; 0]);
    } else {
        assert_clean(&fake, "the end of a scene");
    }
}
