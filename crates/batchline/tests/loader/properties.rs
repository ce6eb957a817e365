//! Random settings on a device with random delays, and with faults: what is delivered equals a
//! plain reading that shares no code with the pipeline, up to the fault.
//!
//! `BATCHLINE_CASES` sets the number of cases, `BATCHLINE_SEED` the first one. A case that fails
//! prints a line that runs it alone.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchline::testing::{FaultControl, FaultPlan, faulty_device};
use batchline::{
    AsyncDataLoader, AsyncDataLoaderConfig, Conversion, DType, ErrorPolicy, FnDataset, Gather,
    HostTensor, InMemory, LastBatch, LoadPath, LoaderState, MemoryLimits, MemoryManager, Residency,
    Sample, SampleSpec, Sampler, mix,
};

use super::assert_home;

/// Numbers that depend on the case alone.
struct Random {
    seed: u64,
    drawn: u64,
}

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.drawn += 1;
        mix(&[self.seed, self.drawn, 0xca5e]) % bound
    }

    fn one_in(&mut self, chances: u64) -> bool {
        self.below(chances) == 0
    }
}

/// What a case does; all of it follows from its seed.
#[derive(Debug, Clone)]
struct Case {
    seed: u64,
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
    unified: bool,
    convert: bool,
    tight: bool,
    pull: bool,
    /// Samples that can't be read: those that are 0 by this number.
    bad: Option<u64>,
    skip: bool,
    slow_reads: bool,
    fault: Option<Fault>,
    held: usize,
    resume_after: Option<usize>,
    /// Whether the samples lie in memory, for a device that can fetch them by itself.
    in_memory: bool,
    residency: Residency,
    gather: Gather,
    /// What is made of the input, if it is converted.
    target: DType,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    Sequential,
    Shuffled,
    Own,
}

#[derive(Debug, Clone, Copy)]
enum Fault {
    Refused(u64),
    Unclear(u64),
    Lost(u64),
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
    fn new(seed: u64) -> Self {
        let mut random = Random { seed, drawn: 0 };
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
            unified: random.one_in(3),
            convert: random.one_in(3),
            tight: random.one_in(5),
            pull,
            bad,
            skip: bad.is_some() && random.one_in(2),
            slow_reads: random.one_in(10),
            fault: match random.below(12) {
                0 => Some(Fault::Refused(1 + random.below(12))),
                1 => Some(Fault::Unclear(1 + random.below(12))),
                2 => Some(Fault::Lost(1 + random.below(12))),
                _ => None,
            },
            held: usize::try_from(random.below(max_held as u64 + 1)).unwrap(),
            resume_after: random.one_in(3).then(|| usize::try_from(random.below(12)).unwrap()),
            in_memory: false,
            residency: Residency::Host,
            gather: Gather::Auto,
            target: DType::I32,
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
            if random.one_in(2) {
                case.target = DType::F32;
            }
        }
        case
    }

    /// A sample's bytes.
    fn bytes(&self, index: u64) -> Vec<u8> {
        (0..self.width).map(|byte| mix(&[self.seed, index, byte]).to_le_bytes()[2]).collect()
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
        if self.convert {
            config = config.convert(self.target, Conversion::new());
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
                    Ok(Sample::new(input).label(HostTensor::scalar(index.cast_signed())))
                })
            });
            return Some(AsyncDataLoader::from_source(source, config.build().unwrap()).unwrap());
        }
        if self.in_memory {
            let bytes = (0..self.len).flat_map(|index| self.bytes(index)).collect::<Vec<u8>>();
            let labels = (0..self.len).map(u64::cast_signed).collect::<Vec<i64>>();
            let inputs = HostTensor::new(bytes, &[self.len, self.width]).unwrap();
            let labels = HostTensor::new(labels, &[self.len]).unwrap();
            let dataset = InMemory::new(inputs).unwrap().labels(labels).unwrap();
            return AsyncDataLoader::new(dataset, config.build().unwrap()).ok();
        }
        let spec = SampleSpec::new(DType::U8, &[self.width]).unwrap();
        let spec = spec.label(DType::I64, &[]).unwrap();
        let dataset = FnDataset::new(self.len, spec, move |index, sample| {
            if case.slow_reads {
                std::thread::sleep(Duration::from_micros(mix(&[case.seed, index]) % 60));
            }
            // Half of it is written before it turns out to be bad.
            sample.input().copy_from_slice(&case.bytes(index));
            if case.is_bad(index) {
                return Err("bad".into());
            }
            Ok(sample.write(1, &[index.cast_signed()])?)
        });
        // Too few samples for one batch are refused; that has tests of its own.
        AsyncDataLoader::new(dataset, config.build().unwrap()).ok()
    }

    fn run(&self) {
        let (expected, ends_in_error) = self.expected();
        // A pull source knows nothing of the plan's last batch where samples are skipped: its
        // batches are made of the good ones.
        if self.pull && (self.bad.is_some() || self.len < self.batch_size) {
            return;
        }
        let mut plan = FaultPlan {
            seed: self.seed,
            max_delay: Duration::from_micros(if self.seed.is_multiple_of(3) { 60 } else { 0 }),
            unified: self.unified,
            gathers: self.in_memory,
            ..FaultPlan::default()
        };
        match self.fault {
            Some(Fault::Refused(at)) => plan.fail_submit = Some(at),
            Some(Fault::Unclear(at)) => plan.fail_after_enqueue = Some(at),
            Some(Fault::Lost(at)) => plan.lose_at = Some(at),
            None => {}
        }
        let (device, control) = faulty_device(plan);
        let limits = if self.tight {
            // One of each, and little more.
            MemoryLimits::default().device_limit(40 << 10).staging_limit(24 << 10)
        } else {
            MemoryLimits::default()
        };
        let memory = MemoryManager::with_limits(&device, limits);
        let Some(loader) = self.loader(&memory, None) else {
            assert!(expected.is_empty());
            return;
        };
        if let Err(error) = loader.start() {
            // It was met by the upload of all samples.
            assert!(matches!(self.fault, Some(Fault::Unclear(_) | Fault::Lost(_))), "{error}");
            assert_eq!(self.residency, Residency::Device);
            drop(loader);
            return assert_home(&memory);
        }
        self.check_path(&loader);
        let resume_after = self.resume_after.filter(|_| self.fault.is_none());
        let (seen, failed, state) = self.drain(&loader, &control, &expected, resume_after);
        loader.stop().unwrap();
        drop(loader);
        assert_home(&memory);
        if let Some(state) = state {
            let state = LoaderState::from_json(&state.to_json()).unwrap();
            let loader = self.loader(&memory, Some(state)).unwrap();
            loader.start().unwrap();
            let (rest, failed, _) = self.drain(&loader, &control, &expected[seen..], None);
            assert_eq!(failed, ends_in_error);
            assert_eq!(seen + rest, expected.len(), "batches after a resume");
            loader.stop().unwrap();
            drop(loader);
            assert_home(&memory);
        } else if self.fault.is_none() {
            assert_eq!((seen, failed), (expected.len(), ends_in_error));
        } else if !failed {
            assert_eq!(seen, expected.len(), "a fault that was not met loses nothing");
            assert!(!ends_in_error);
        }
        control.settle();
        assert_eq!(control.mismatches(), 0, "what the consumer's own work found");
        if memory.device().check().is_ok() {
            assert_eq!(control.registered(), 0, "memory that is still registered");
        }
    }

    /// Without faults it is known which way batches go.
    fn check_path(&self, loader: &AsyncDataLoader) {
        let stats = loader.stats();
        let path = match (self.in_memory && !self.unified, self.residency, self.gather) {
            (true, Residency::Device, _) => LoadPath::Resident,
            (true, _, Gather::Auto | Gather::Copies | Gather::Kernel) => LoadPath::Gathered,
            _ => LoadPath::Staged,
        };
        if self.fault.is_none() && !self.tight {
            assert_eq!(stats.path, path, "{}", stats.path_reason);
        }
    }

    /// Takes batches and compares them; returns how many, whether an error came, and the state
    /// where it stopped before the end.
    fn drain(
        &self,
        loader: &AsyncDataLoader,
        control: &FaultControl,
        expected: &[Vec<u64>],
        stop_after: Option<usize>,
    ) -> (usize, bool, Option<LoaderState>) {
        let mut held = std::collections::VecDeque::new();
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
            if !matches!(self.order, Order::Sequential) {
                // Work on the consumer's stream looks at the batch in its turn, for some cases
                // after the batch is dropped.
                let labels = indices.iter().flat_map(|index| index.to_ne_bytes()).collect();
                control.consume(batch.label_tensor().unwrap(), labels);
                if !self.convert {
                    let bytes = indices.iter().flat_map(|index| self.bytes(*index)).collect();
                    control.consume(batch.input_tensor(), bytes);
                }
                if matches!(self.order, Order::Own) {
                    continue;
                }
            }
            let read = || -> Result<(Vec<u8>, Vec<i64>), batchline::Error> {
                let input = if self.convert && self.target == DType::F32 {
                    let wide = batch.input_tensor().to_vec::<f32>()?;
                    #[allow(clippy::cast_possible_truncation, reason = "a byte")]
                    wide.into_iter().map(|value| u8::try_from(value as i64).unwrap()).collect()
                } else if self.convert {
                    let wide = batch.input_tensor().to_vec::<i32>()?;
                    wide.into_iter().map(|value| u8::try_from(value).unwrap()).collect()
                } else {
                    batch.input_tensor().to_vec::<u8>()?
                };
                Ok((input, batch.label_tensor().unwrap().to_vec::<i64>()?))
            };
            match read() {
                Ok((input, label)) => {
                    let labels: Vec<i64> =
                        indices.iter().map(|index| index.cast_signed()).collect();
                    assert_eq!(label, labels, "the samples of batch {number}");
                    let bytes: Vec<u8> =
                        indices.iter().flat_map(|index| self.bytes(*index)).collect();
                    assert_eq!(input, bytes, "the bytes of batch {number}");
                }
                // Reading back is a submission too, and may be the one that fails.
                Err(_) if self.fault.is_some() => return (number, true, None),
                Err(error) => panic!("{}", error.chain()),
            }
            held.push_front(batch);
        }
        unreachable!("batches end")
    }
}

#[test]
fn any_settings_any_delays_any_fault() {
    let number = |name, default| {
        std::env::var(name).ok().map_or(default, |value| value.parse::<u64>().unwrap())
    };
    let (first, cases) = (number("BATCHLINE_SEED", 0), number("BATCHLINE_CASES", 2000));
    // Cases mostly wait, so several go side by side.
    let next = AtomicU64::new(first);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + cases {
                        return;
                    }
                    let case = Case::new(seed);
                    let run = std::panic::AssertUnwindSafe(|| case.run());
                    if let Err(panic) = std::panic::catch_unwind(run) {
                        eprintln!(
                            "to see it again: BATCHLINE_SEED={seed} BATCHLINE_CASES=1 cargo test \
                             -p batchline --test loader any_settings; the case: {case:?}"
                        );
                        std::panic::resume_unwind(panic);
                    }
                }
            });
        }
    });
}
