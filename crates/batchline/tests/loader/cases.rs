//! Random settings of a loader, and what it must deliver: worked out by a plain reading that shares
//! no code with the pipeline.
//!
//! The tests of several devices include this file. `BATCHLINE_CASES` sets the number of cases,
//! `BATCHLINE_SEED` the first one. A case that fails prints a line that runs it alone.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, Conversion, DType, Device, ErrorPolicy, FnDataset,
    Gather, GpuBatch, HostTensor, InMemory, LastBatch, LoadPath, LoaderState, MemoryLimits,
    MemoryManager, Residency, Sample, SampleSpec, Sampler, Tensor, mix,
};

/// What a case runs on.
pub(crate) trait Bench {
    fn device(&self) -> &Device;

    /// Whether the device can fetch samples by itself, out of the host's memory and its own.
    fn gathers(&self) -> bool;

    /// Has work of the consumer's look at a tensor in its turn, which may come after the batch is
    /// dropped.
    fn look(&self, tensor: &Tensor, expected: Vec<u8>);

    /// Waits for that work; it must have found what was expected.
    fn settle(&self);
}

/// Numbers that depend on the case alone.
pub(crate) struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Self { seed, drawn: 0 }
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        mix(&[self.seed, self.drawn, 0xca5e]) % bound
    }

    pub(crate) fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// What a case does; all of it follows from its seed.
#[derive(Debug, Clone)]
pub(crate) struct Case {
    pub(crate) seed: u64,
    len: u64,
    width: u64,
    batch_size: u64,
    workers: usize,
    depth: usize,
    max_held: usize,
    epochs: u64,
    order: Order,
    rank: u64,
    world_size: u64,
    last: LastBatch,
    /// What the device makes of the input.
    convert: Option<Target>,
    /// Tensors besides input and label.
    weights: u64,
    tight: bool,
    pull: bool,
    /// Samples that can't be read: those that are 0 by this number.
    bad: Option<u64>,
    skip: bool,
    slow_reads: bool,
    /// Whether the device is to fail somewhere.
    pub(crate) fails: bool,
    held: usize,
    resume_after: Option<usize>,
    /// Whether the samples lie in memory, for a device that can fetch them by itself.
    pub(crate) in_memory: bool,
    residency: Residency,
    gather: Gather,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    Sequential,
    Shuffled,
    Own,
}

/// A type, and whether there is a factor and a summand.
#[derive(Debug, Clone, Copy)]
struct Target {
    dtype: DType,
    scaled: bool,
}

/// Powers of two and small numbers, so that nothing is rounded on the way.
const SCALE: f32 = 0.5;
const BIAS: f32 = -3.0;

impl Target {
    const DTYPES: [DType; 6] =
        [DType::F32, DType::F16, DType::BF16, DType::I32, DType::F64, DType::I64];

    /// A byte of the source, converted.
    fn of(self, byte: u8) -> Vec<u8> {
        let value = f32::from(byte);
        let value = if self.scaled { value * SCALE + BIAS } else { value };
        #[allow(clippy::cast_possible_truncation, reason = "from a byte and small numbers")]
        match self.dtype {
            DType::F32 => value.to_ne_bytes().to_vec(),
            DType::F16 => half::f16::from_f32(value).to_ne_bytes().to_vec(),
            DType::BF16 => half::bf16::from_f32(value).to_ne_bytes().to_vec(),
            DType::I32 => (value.round_ties_even() as i32).to_ne_bytes().to_vec(),
            DType::F64 => f64::from(value).to_ne_bytes().to_vec(),
            DType::I64 => (value.round_ties_even() as i64).to_ne_bytes().to_vec(),
            other => unreachable!("{other} is not among the targets"),
        }
    }
}

/// Every sample about once, in an order of its own.
struct Strided {
    len: u64,
}

impl Sampler for Strided {
    fn len(&self) -> u64 {
        self.len
    }
    fn index(&self, epoch: u64, position: u64) -> u64 {
        (position * 7 + epoch) % self.len
    }
    fn fingerprint(&self) -> u64 {
        self.len
    }
}

impl Case {
    pub(crate) fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let pull = random.one_in(5);
        let world_size = if pull { 1 } else { 1 + random.below(3) };
        let bad = random.one_in(4).then(|| 2 + random.below(30));
        let depth = 1 + usize::try_from(random.below(5)).unwrap();
        let most = if random.one_in(2) { 64 } else { 8 };
        let batch_size = 1 + random.below(most);
        let max_held = 1 + usize::try_from(random.below(3)).unwrap();
        let mut case = Self {
            seed,
            len: 1 + random.below(90),
            width: random.below(40),
            batch_size,
            workers: 1 + usize::try_from(random.below(8)).unwrap(),
            depth,
            max_held,
            epochs: 1 + random.below(3),
            order: match random.below(3) {
                _ if pull => Order::Sequential,
                0 => Order::Sequential,
                1 => Order::Shuffled,
                _ => Order::Own,
            },
            rank: random.below(world_size),
            world_size,
            last: match random.below(3) {
                0 => LastBatch::Drop,
                1 if !pull => LastBatch::Pad,
                _ => LastBatch::Keep,
            },
            convert: random.one_in(3).then(|| Target {
                dtype: Target::DTYPES[usize::try_from(random.below(6)).unwrap()],
                scaled: random.one_in(2),
            }),
            weights: random.below(3),
            tight: random.one_in(5),
            pull,
            bad,
            skip: bad.is_some() && random.one_in(2),
            slow_reads: random.one_in(10),
            fails: random.one_in(4),
            held: usize::try_from(random.below(max_held as u64 + 1)).unwrap(),
            resume_after: random.one_in(3).then(|| usize::try_from(random.below(12)).unwrap()),
            in_memory: false,
            residency: Residency::Host,
            gather: Gather::Auto,
        };
        if !case.pull && case.bad.is_none() && random.one_in(2) {
            case.in_memory = true;
            // Some rows are long enough for copies, and some samples have no bytes at all.
            case.width = random.below(100) * u64::from(!random.one_in(10));
            case.gather = [Gather::Auto, Gather::Copies, Gather::Kernel, Gather::Never]
                [usize::try_from(random.below(4)).unwrap()];
            if random.one_in(2) {
                case.residency = Residency::Device;
            }
        }
        case
    }

    /// A sample's bytes.
    fn bytes(&self, index: u64) -> Vec<u8> {
        (0..self.width).map(|byte| mix(&[self.seed, index, byte]).to_le_bytes()[2]).collect()
    }

    /// Those of a weight tensor, of which each is longer than the one before.
    fn weight(&self, weight: u64, index: u64) -> Vec<u8> {
        (0..3 * weight + 1).map(|byte| mix(&[index, weight, byte]).to_le_bytes()[1]).collect()
    }

    /// What each tensor of a batch must hold: input, label, weights.
    fn tensors(&self, indices: &[u64]) -> Vec<Vec<u8>> {
        let all =
            |of: &dyn Fn(u64) -> Vec<u8>| indices.iter().flat_map(|index| of(*index)).collect();
        let input = |index| match self.convert {
            Some(target) => {
                self.bytes(index).into_iter().flat_map(|byte| target.of(byte)).collect()
            }
            None => self.bytes(index),
        };
        let mut tensors: Vec<Vec<u8>> =
            vec![all(&input), all(&|index| index.to_ne_bytes().to_vec())];
        tensors.extend((0..self.weights).map(|weight| all(&|index| self.weight(weight, index))));
        tensors
    }

    fn is_bad(&self, index: u64) -> bool {
        self.bad.is_some_and(|bad| mix(&[self.seed, index, 0xbad]).is_multiple_of(bad))
    }

    /// The samples of every batch, and where the stream ends: worked out the long way, position by
    /// position, from the documentation alone.
    fn expected(&self) -> (Vec<Vec<u64>>, bool) {
        let mut batches = Vec::new();
        let global = self.batch_size * self.world_size;
        for epoch in 0..self.epochs {
            let order: Vec<u64> = (0..self.len)
                .map(|position| match self.order {
                    Order::Sequential => position,
                    Order::Shuffled => {
                        batchline::Shuffled::new(self.len, self.seed).index(epoch, position)
                    }
                    Order::Own => (position * 7 + epoch) % self.len,
                })
                .collect();
            for start in (0..self.len).step_by(usize::try_from(global).unwrap()) {
                let mut whole: Vec<u64> = (start..(start + global).min(self.len)).collect();
                let short = (whole.len() as u64) < global;
                match self.last {
                    LastBatch::Drop if short => continue,
                    LastBatch::Pad if short => {
                        whole =
                            (start..start + global).map(|position| position % self.len).collect();
                    }
                    _ => {}
                }
                // Dealt out evenly, the first ranks getting one more.
                let (share, extra) =
                    (whole.len() as u64 / self.world_size, whole.len() as u64 % self.world_size);
                let first = self.rank * share + self.rank.min(extra);
                let mine = share + u64::from(self.rank < extra);
                let mut batch = Vec::new();
                for place in first..first + mine {
                    let index =
                        order[usize::try_from(whole[usize::try_from(place).unwrap()]).unwrap()];
                    match (self.is_bad(index), self.skip) {
                        (true, true) => {}
                        (true, false) => return (batches, true),
                        (false, _) => batch.push(index),
                    }
                }
                batches.push(batch);
            }
        }
        (batches, false)
    }

    fn loader(
        &self,
        memory: &MemoryManager,
        resume: Option<LoaderState>,
    ) -> Option<AsyncDataLoader> {
        let mut config = AsyncDataLoaderConfig::builder()
            .batch_size(self.batch_size)
            .workers(self.workers)
            .prefetch_depth(self.depth)
            .max_held(self.max_held)
            .epochs(self.epochs)
            .seed(self.seed)
            .last_batch(self.last)
            .memory_manager(memory.clone());
        if !self.pull {
            config = config.shard(self.rank, self.world_size);
        }
        match self.order {
            Order::Sequential => {}
            Order::Shuffled => config = config.shuffle(true),
            Order::Own => config = config.sampler(Strided { len: self.len }),
        }
        if let Some(Target { dtype, scaled }) = self.convert {
            let plain = Conversion::new();
            let conversion = if scaled { plain.scale_and_bias(&[SCALE], &[BIAS]) } else { plain };
            config = config.convert(dtype, conversion);
        }
        config = config.residency(self.residency).gather(self.gather);
        if self.skip {
            config = config.error_policy(ErrorPolicy::Skip { at_most: u64::MAX });
        }
        if let Some(state) = resume {
            config = config.resume_from(state);
        }
        let case = self.clone();
        if self.pull {
            let source = batchline::IterSource::new(move || {
                let case = case.clone();
                (0..case.len).map(move |index| {
                    if case.is_bad(index) {
                        return Err("bad".into());
                    }
                    let input = HostTensor::new(case.bytes(index), &[case.width])?;
                    let label = HostTensor::scalar(index.cast_signed());
                    let mut sample = Sample::new(input).label(label);
                    for weight in 0..case.weights {
                        let bytes = case.weight(weight, index);
                        let shape = [bytes.len() as u64];
                        sample =
                            sample.weight(&format!("w{weight}"), HostTensor::new(bytes, &shape)?);
                    }
                    Ok(sample)
                })
            });
            return Some(AsyncDataLoader::from_source(source, config.build().unwrap()).unwrap());
        }
        if self.in_memory {
            let all = |of: &dyn Fn(u64) -> Vec<u8>| (0..self.len).flat_map(of).collect::<Vec<u8>>();
            let inputs = all(&|index| self.bytes(index));
            let inputs = HostTensor::new(inputs, &[self.len, self.width]).unwrap();
            let labels = (0..self.len).map(u64::cast_signed).collect::<Vec<i64>>();
            let labels = HostTensor::new(labels, &[self.len]).unwrap();
            let mut dataset = InMemory::new(inputs).unwrap().labels(labels).unwrap();
            for weight in 0..self.weights {
                let bytes = all(&|index| self.weight(weight, index));
                let bytes = HostTensor::new(bytes, &[self.len, 3 * weight + 1]).unwrap();
                dataset = dataset.weights(&format!("w{weight}"), bytes).unwrap();
            }
            return AsyncDataLoader::new(dataset, config.build().unwrap()).ok();
        }
        let spec = SampleSpec::new(DType::U8, &[self.width]).unwrap();
        let mut spec = spec.label(DType::I64, &[]).unwrap();
        for weight in 0..self.weights {
            spec = spec.weight(&format!("w{weight}"), DType::U8, &[3 * weight + 1]).unwrap();
        }
        let dataset = FnDataset::new(self.len, spec, move |index, sample| {
            if case.slow_reads {
                std::thread::sleep(Duration::from_micros(mix(&[case.seed, index]) % 60));
            }
            // Half of it is written before it turns out to be bad.
            sample.input().copy_from_slice(&case.bytes(index));
            if case.is_bad(index) {
                return Err("bad".into());
            }
            for (weight, at) in (0..case.weights).zip(0..) {
                sample.weight(at).copy_from_slice(&case.weight(weight, index));
            }
            Ok(sample.write(1, &[index.cast_signed()])?)
        });
        // Too few samples for one batch are refused; that has tests of its own.
        AsyncDataLoader::new(dataset, config.build().unwrap()).ok()
    }

    /// Runs the loader on a device that bears out whether the case [`fails`](Self::fails).
    pub(crate) fn run(&self, bench: &dyn Bench) {
        let (expected, ends_in_error) = self.expected();
        // A pull source knows nothing of the plan's last batch where samples are skipped: its
        // batches are made of the good ones.
        if self.pull && (self.bad.is_some() || self.len < self.batch_size) {
            return;
        }
        let limits = if self.tight {
            // One of each, and little more.
            MemoryLimits::default().device_limit(40 << 10).staging_limit(24 << 10)
        } else {
            MemoryLimits::default()
        };
        let memory = MemoryManager::with_limits(bench.device(), limits);
        let Some(loader) = self.loader(&memory, None) else {
            assert!(expected.is_empty());
            return;
        };
        if let Err(error) = loader.start() {
            // It was met by the upload of all samples.
            assert!(self.fails, "{}", error.chain());
            assert_eq!(self.residency, Residency::Device);
            drop(loader);
            return assert_home(&memory);
        }
        self.check_path(&loader, bench);
        let resume_after = self.resume_after.filter(|_| !self.fails);
        let (seen, failed, state) = self.drain(&loader, bench, &expected, resume_after);
        loader.stop().unwrap();
        drop(loader);
        assert_home(&memory);
        if let Some(state) = state {
            let state = LoaderState::from_json(&state.to_json()).unwrap();
            let loader = self.loader(&memory, Some(state)).unwrap();
            loader.start().unwrap();
            let (rest, failed, _) = self.drain(&loader, bench, &expected[seen..], None);
            assert_eq!(failed, ends_in_error);
            assert_eq!(seen + rest, expected.len(), "batches after a resume");
            loader.stop().unwrap();
            drop(loader);
            assert_home(&memory);
        } else if !self.fails {
            assert_eq!((seen, failed), (expected.len(), ends_in_error));
        } else if !failed {
            assert_eq!(seen, expected.len(), "a fault that was not met loses nothing");
            assert!(!ends_in_error);
        }
        bench.settle();
    }

    /// Without faults it is known which way batches go.
    fn check_path(&self, loader: &AsyncDataLoader, bench: &dyn Bench) {
        let stats = loader.stats();
        let path = match (self.in_memory && bench.gathers(), self.residency, self.gather) {
            (true, Residency::Device, _) => LoadPath::Resident,
            (true, _, Gather::Auto | Gather::Copies | Gather::Kernel) => LoadPath::Gathered,
            _ => LoadPath::Staged,
        };
        if !self.fails && !self.tight {
            assert_eq!(stats.path, path, "{}", stats.path_reason);
        }
    }

    /// Takes batches and compares them; returns how many, whether an error came, and the state
    /// where it stopped before the end.
    fn drain(
        &self,
        loader: &AsyncDataLoader,
        bench: &dyn Bench,
        expected: &[Vec<u64>],
        stop_after: Option<usize>,
    ) -> (usize, bool, Option<LoaderState>) {
        let mut held: VecDeque<GpuBatch> = VecDeque::new();
        for number in 0.. {
            if Some(number) == stop_after && number < expected.len() {
                return (number, false, Some(loader.state()));
            }
            // With tight limits there may be one output only.
            let keep = if self.tight { 0 } else { self.held.saturating_sub(1) };
            held.truncate(keep);
            let batch = match loader.get_batch() {
                Ok(Some(batch)) => batch,
                Ok(None) => return (number, false, None),
                Err(_) => return (number, true, None),
            };
            let Some(indices) = expected.get(number) else {
                panic!("batch {number} is one too many")
            };
            let wanted = self.tensors(indices);
            let spec = batch.spec().tensors();
            let tensors = spec.iter().map(|tensor| batch.tensor(&tensor.name).unwrap());
            if !matches!(self.order, Order::Sequential) {
                // For some cases after the batch is dropped.
                tensors.clone().zip(&wanted).for_each(|(tensor, bytes)| {
                    bench.look(tensor, bytes.clone());
                });
                if matches!(self.order, Order::Own) {
                    continue;
                }
            }
            let read: Result<Vec<_>, _> = tensors.map(Tensor::to_bytes).collect();
            match read {
                Ok(read) => {
                    let labels = &read[1];
                    assert_eq!(*labels, wanted[1], "the samples of batch {number}");
                    assert!(read == wanted, "the bytes of batch {number}");
                }
                // Reading back is a submission too, and may be the one that fails.
                Err(_) if self.fails => return (number, true, None),
                Err(error) => panic!("{}", error.chain()),
            }
            held.push_front(batch);
        }
        unreachable!("batches end")
    }
}

/// The cases to try: by default so many, from seed 0.
pub(crate) fn cases(default: u64) -> std::ops::Range<u64> {
    let number = |name, default| {
        std::env::var(name).ok().map_or(default, |value| value.parse::<u64>().unwrap())
    };
    let first = number("BATCHLINE_SEED", 0);
    first..first + number("BATCHLINE_CASES", default)
}

/// Runs a case; where it fails, tells how to run it alone.
pub(crate) fn try_case(case: &Case, test: &str, run: impl FnOnce(&Case)) {
    let run = std::panic::AssertUnwindSafe(|| run(case));
    if let Err(panic) = std::panic::catch_unwind(run) {
        eprintln!(
            "to see it again: BATCHLINE_SEED={} BATCHLINE_CASES=1 cargo test -p batchline --test \
             {test}; the case: {case:?}",
            case.seed
        );
        std::panic::resume_unwind(panic);
    }
}

/// Everything has come home: no memory in use but what was quarantined.
pub(crate) fn assert_home(memory: &MemoryManager) {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let stats = memory.stats();
        if stats.device_in_use == 0 && stats.staging_in_use == 0 {
            return;
        }
        assert!(Instant::now() < deadline, "memory did not come home: {stats:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
