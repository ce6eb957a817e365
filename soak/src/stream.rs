//! A round of a loader: random settings, and a consumer that takes, holds, stops, restarts, resumes
//! and leaves as the round says.

use std::time::Duration;

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, ChannelOrder, Conversion, DType, Error, Gather,
    LastBatch, LoadPath, LoaderState, Residency,
};

use crate::bench::{Bench, wait_for};
use crate::files::Files;
use crate::plan::{Bad, Order, Plan, Stream, Strided};
use crate::random::Random;
use crate::samples::Form;
use crate::source::{Computed, Gate, Pulled, Reading, Trouble, in_memory};
use crate::tally::TALLY;

mod consumer;

use consumer::{Consumer, Ended};

/// Where samples come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum From {
    Computed,
    Pulled,
    Files,
    /// Tensors in memory.
    Memory,
}

impl From {
    /// Whether a device may fetch samples by itself, or have them all.
    fn lies_in_memory(self) -> bool {
        matches!(self, From::Files | From::Memory)
    }
}

/// What the device makes of the input.
#[derive(Debug, Clone, Copy)]
struct Convert {
    to: DType,
    scaled: bool,
    planes: bool,
}

/// What is asked for, as often as it is here.
const GATHER: [Gather; 4] = [Gather::Auto, Gather::Copies, Gather::Kernel, Gather::Never];
const RESIDENCY: [Residency; 3] = [Residency::Host, Residency::Host, Residency::Device];

/// What a loader is asked to do; all of it follows from the seed.
#[derive(Debug, Clone)]
pub struct StreamRound {
    seed: u64,
    from: From,
    reading: Reading,
    plan: Plan,
    workers: usize,
    depth: usize,
    max_held: usize,
    convert: Option<Convert>,
    gather: Gather,
    residency: Residency,
    /// Limits that leave room for little more than one batch.
    tight: bool,
    /// The consumer takes all that it can get before it lets go.
    greedy: bool,
    /// Batches that the consumer keeps.
    keep: usize,
    slow_consumer: bool,
    /// How often the loader is started, and how many batches are taken each time; to the end if
    /// `None`.
    takes: Vec<Option<u64>>,
    /// Whether the loader is dropped while it runs.
    drop_running: bool,
    resume: bool,
}

impl StreamRound {
    pub fn new(seed: u64, alone: bool) -> Self {
        let mut random = Random::new(seed, 0x57);
        let from = random.pick(&[
            From::Computed,
            From::Computed,
            From::Computed,
            From::Pulled,
            From::Files,
            From::Memory,
            From::Memory,
        ]);
        let pulled = from == From::Pulled;
        let world_size = if pulled { 1 } else { random.pick(&[1, 1, 1, 2, 3, 4]) };
        let most = random.pick(&[4, 16, 128]);
        let batch_size = random.within(1, most);
        let last = match random.below(3) {
            0 => LastBatch::Drop,
            1 if !pulled => LastBatch::Pad,
            _ => LastBatch::Keep,
        };
        let trouble = match random.below(8) {
            _ if from.lies_in_memory() => Trouble::None,
            0 => Trouble::Fails,
            1 => Trouble::Skips,
            2 => Trouble::Recovers,
            3 if random.one_in(3) => Trouble::RetriedInVain,
            _ => Trouble::None,
        };
        let convert = random.one_in(3).then(|| Convert {
            to: random.pick(&[DType::F32, DType::F32, DType::I32, DType::I16]),
            scaled: random.one_in(2),
            planes: matches!(from, From::Computed | From::Memory) && random.one_in(3),
        });
        let dims = match convert {
            Some(Convert { planes: true, .. }) => vec![random.within(1, 4), random.within(1, 4), 3],
            _ if random.one_in(30) => vec![random.within(1, 6), 512],
            _ => [vec![], vec![random.within(0, 40)], vec![3, random.within(1, 5)]]
                [random.index(3)]
            .clone(),
        };
        let mut form = Form {
            seed,
            dtype: if convert.is_some() { DType::U8 } else { random.pick(&DType::ALL) },
            dims,
            label: random.one_in(2),
            weight: random.one_in(4).then(|| (random.pick(&DType::ALL), random.within(1, 9))),
        };
        // At least one batch, also where short ones are left out.
        let batches = random.within(1, if batch_size > 32 { 10 } else { 30 });
        let mut len = batch_size * world_size * batches + random.below(batch_size * world_size);
        if from == From::Files {
            (form, len) = (Files::form(), Files::LEN);
        }
        // A batch of many large samples takes long to work out, and so do many at once.
        let batch_size = if form.input_len() > 1000 { batch_size.min(16) } else { batch_size };
        if from == From::Memory && form.input_len() > 1000 {
            len = len.min(batch_size * world_size * batches);
        }
        let blocks = !from.lies_in_memory() && random.one_in(25);
        let depth = usize::try_from(random.within(1, 5)).expect("small");
        let max_held = usize::try_from(random.within(1, 4)).expect("small");
        let epochs = match random.below(4) {
            0 => None,
            _ => Some(random.within(1, 3)),
        };
        let starts = random.pick(&[1, 1, 2, 3]);
        let tight = alone && random.one_in(6);
        let greedy = !tight && random.one_in(6);
        let plan = Plan {
            seed,
            len,
            batch_size: batch_size.min(len / world_size),
            rank: random.below(world_size),
            world_size,
            last,
            order: if pulled {
                Order::Sequential
            } else {
                random.pick(&[Order::Sequential, Order::Shuffled, Order::Strided])
            },
            epochs,
            pulled,
        };
        let all = plan.batches();
        let take = |random: &mut Random| {
            let to_the_end = epochs.is_some() && random.one_in(2);
            (!to_the_end).then(|| random.below(all * 2 + 3).min(80))
        };
        let takes = (0..starts).map(|_| take(&mut random)).collect();
        let reading = Reading {
            form,
            len,
            trouble,
            bad_one_in: random.within(20, 400),
            slow_one_in: random.one_in(8).then(|| random.within(5, 200)),
            gate: blocks.then(|| Gate::new(random.below(len.min(500)))),
        };
        Self {
            seed,
            from,
            reading,
            plan,
            workers: usize::try_from(random.within(1, 8)).expect("small"),
            depth,
            max_held,
            convert,
            gather: random.pick(&GATHER),
            residency: random.pick(&RESIDENCY),
            tight,
            greedy,
            keep: if tight { 0 } else { random.index(max_held) },
            slow_consumer: random.one_in(6),
            takes,
            drop_running: random.one_in(3),
            resume: random.one_in(3),
        }
    }

    /// The least that leaves room for a batch or two on its way, or `None` for no bound.
    pub fn limit(&self) -> Option<(u64, u64)> {
        let raw = self.reading.form.batch_bytes(self.plan.batch_size);
        // At most four bytes are made of one.
        let converted = if self.convert.is_some() { raw * 5 } else { raw };
        self.tight.then(|| (converted * 5 / 2 + 4096, (raw * 5 / 2).max(64 << 10)))
    }

    fn loader(&self, bench: &Bench, resume: Option<LoaderState>) -> AsyncDataLoader {
        let plan = &self.plan;
        let mut config = AsyncDataLoaderConfig::builder()
            .batch_size(plan.batch_size)
            .workers(self.workers)
            .prefetch_depth(self.depth)
            .max_held(self.max_held)
            .seed(plan.seed)
            .last_batch(plan.last)
            .error_policy(self.reading.trouble.policy())
            .memory_manager(bench.memory.clone())
            .stop_timeout(Duration::from_secs(30));
        config = match plan.epochs {
            Some(epochs) => config.epochs(epochs),
            None => config.endless(),
        };
        if self.reading.gate.is_some() {
            config = config.stop_timeout(Duration::from_millis(15));
        }
        if !plan.pulled {
            config = config.shard(plan.rank, plan.world_size);
        }
        config = match plan.order {
            Order::Sequential => config,
            Order::Shuffled => config.shuffle(true),
            Order::Strided => config.sampler(Strided { len: plan.len }),
        };
        config = config.gather(self.gather).residency(self.residency);
        if let Some(Convert { to, scaled, planes }) = self.convert {
            let mut conversion = Conversion::new();
            if scaled {
                conversion = conversion.scale_and_bias(&[4.0], &[-14.0]);
            }
            if planes {
                conversion = conversion.reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
            }
            config = config.convert(to, conversion);
        }
        if let Some(state) = resume {
            config = config.resume_from(state);
        }
        let config = config.build().expect("settings that make sense");
        let reading = self.reading.clone();
        match self.from {
            From::Computed => AsyncDataLoader::new(Computed::new(reading), config),
            From::Pulled => AsyncDataLoader::from_source(Pulled::new(reading), config),
            From::Files => AsyncDataLoader::new(Files::open(), config),
            From::Memory => AsyncDataLoader::new(in_memory(&reading), config),
        }
        .expect("a loader of settings that make sense")
    }

    fn expected(&self, epoch: u64, position: u64) -> Stream<'_, impl Fn(u64) -> bool> {
        let bad = |number| self.reading.stays_bad(number);
        let skips = self.reading.trouble == Trouble::Skips;
        Stream::new(&self.plan, bad, if skips { Bad::Skipped } else { Bad::Fatal }, epoch, position)
    }

    /// The input as the device makes it of these bytes.
    fn converted(&self, input: Vec<u8>) -> Vec<u8> {
        let Some(Convert { to, scaled, planes }) = self.convert else { return input };
        let input = match (planes, &self.reading.form.dims[..]) {
            (true, [height, width, channels]) => {
                let (pixels, channels) = ((height * width) as usize, *channels as usize);
                let image = |image: &[u8]| -> Vec<u8> {
                    (0..channels * pixels)
                        .map(|place| image[place % pixels * channels + place / pixels])
                        .collect()
                };
                input.chunks_exact(pixels * channels).flat_map(image).collect()
            }
            _ => input,
        };
        let number = |byte: &u8| if scaled { i16::from(*byte) * 4 - 14 } else { i16::from(*byte) };
        let numbers = input.iter().map(number);
        match to {
            DType::F32 => numbers.flat_map(|number| f32::from(number).to_ne_bytes()).collect(),
            DType::I32 => numbers.flat_map(|number| i32::from(number).to_ne_bytes()).collect(),
            DType::I16 => numbers.flat_map(i16::to_ne_bytes).collect(),
            other => unreachable!("no round asks for {other}"),
        }
    }

    /// Does all of it.
    ///
    /// # Panics
    /// Something is not as it must be.
    pub fn run(&self, bench: &Bench) {
        let loader = self.loader(bench, None);
        let mut consumer = Consumer::new(self, bench);
        let mut running = false;
        for (time, take) in self.takes.iter().enumerate() {
            if self.tight && self.residency == Residency::Device {
                // The data set may leave room for one batch only.
                consumer.let_go(0);
            }
            match loader.start() {
                Ok(()) => {}
                Err(error) => {
                    bench.expect(&error);
                    if bench.is_lost() {
                        assert!(error.is_device_lost(), "{}", error.chain());
                        break;
                    }
                    continue;
                }
            }
            TALLY.starts.add(1);
            match loader.stats().path {
                LoadPath::Gathered => TALLY.gathered.add(1),
                LoadPath::Resident => TALLY.resident.add(1),
                _ => {}
            }
            TALLY.restarts.add(u64::from(time > 0));
            let ended = consumer.take(&loader, self.expected(0, 0), *take);
            if ended == Ended::Blocked {
                return self.detach(&loader, bench, &mut consumer);
            }
            let last = time + 1 == self.takes.len();
            running = last && self.drop_running;
            if !running {
                self.stop(&loader, bench);
            }
        }
        let state = loader.state();
        let (retries, skipped) = (loader.stats().retries, loader.stats().skipped);
        TALLY.retries.add(retries);
        TALLY.skipped.add(skipped);
        if self.resume && !running && !bench.is_lost() {
            consumer.let_go(0);
            self.go_on(bench, state);
        }
        drop(loader);
        TALLY.held_over.add(consumer.held.len() as u64);
        consumer.let_go(0);
        if let Some(gate) = &self.reading.gate {
            gate.open();
        }
    }

    fn stop(&self, loader: &AsyncDataLoader, bench: &Bench) {
        match (loader.stop(), &self.reading.gate) {
            (Ok(()), _) => {}
            // A read blocks that nobody has waited for, or the machine is busy.
            (Err(Error::Detached { .. } | Error::Timeout { .. }), Some(gate)) => {
                TALLY.detached.add(u64::from(gate.is_blocking()));
                gate.open();
                wait_for("the straggler to leave", || loader.stop().is_ok());
            }
            (Err(error), _) => panic!("a stop failed: {}", error.chain()),
        }
        loader.stop().expect("stopping twice is no error");
        let error = loader.get_batch().expect_err("it was stopped");
        let may_fail = matches!(self.reading.trouble, Trouble::Fails | Trouble::RetriedInVain);
        if !may_fail && bench.setting.fault.is_none() {
            assert!(matches!(error, Error::Lifecycle { .. }), "{}", error.chain());
        }
    }

    /// A read blocks: its worker is detached, and ends when it is let.
    fn detach(&self, loader: &AsyncDataLoader, bench: &Bench, consumer: &mut Consumer<'_>) {
        let gate = self.reading.gate.as_ref().expect("only a gate blocks");
        let error = loader.stop().expect_err("a read is still inside the source");
        assert!(matches!(error, Error::Detached { .. }), "{}", error.chain());
        TALLY.detached.add(1);
        consumer.detached = true;
        consumer.let_go(0);
        if self.plan.pulled {
            let error = loader.start().expect_err("the source has not returned");
            assert!(matches!(error, Error::Lifecycle { .. }), "{}", error.chain());
            gate.open();
            wait_for("the straggler to leave", || loader.stop().is_ok());
        }
        if let Err(error) = loader.start() {
            bench.expect(&error);
            return gate.open();
        }
        // The straggler has a slot of its own as long as it stays.
        consumer.take(loader, self.expected(0, 0), Some(3));
        if self.drop_running {
            self.stop(loader, bench);
        }
        consumer.let_go(0);
        gate.open();
    }

    /// Goes on from a saved state, with other threads and another number of ranks.
    fn go_on(&self, bench: &Bench, state: LoaderState) {
        let mut random = Random::new(self.seed, 0x60);
        let state = if random.one_in(4) {
            Files::save_and_load(&state)
        } else {
            LoaderState::from_json(&state.to_json()).expect("a state as it was saved")
        };
        let mut other = self.clone();
        other.workers = usize::try_from(random.within(1, 8)).expect("small");
        (other.gather, other.residency) = (random.pick(&GATHER), random.pick(&RESIDENCY));
        if !self.tight {
            other.depth = usize::try_from(random.within(1, 5)).expect("small");
            // The same global batch, dealt out to as many ranks as divide it.
            let global = self.plan.batch_size * self.plan.world_size;
            let world_size = random.within(1, 4);
            if !self.plan.pulled && global.is_multiple_of(world_size) {
                other.plan.batch_size = global / world_size;
                other.plan.world_size = world_size;
                other.plan.rank = random.below(world_size);
            }
        }
        let (epoch, position) = (state.epoch, state.position);
        let loader = other.loader(bench, Some(state));
        if let Err(error) = loader.start() {
            return bench.expect(&error);
        }
        TALLY.resumes.add(1);
        let mut consumer = Consumer::new(&other, bench);
        consumer.take(&loader, other.expected(epoch, position), Some(random.below(60)));
        consumer.let_go(0);
        other.stop(&loader, bench);
    }
}
