//! The sources of a round: they fail, panic, are slow and block as the round says.

use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use batchline::{
    BoxError, DType, DataSource, Dataset, ErrorPolicy, HostTensor, InMemory, Sample, SampleMut,
    SampleSpec, mix,
};

use crate::samples::Form;
use crate::tally::TALLY;

/// In the message of every panic that belongs to the plan of a round.
pub const PLANNED: &str = "a planned panic";

/// In the message of every error of a source.
pub const CANNOT_READ: &str = "can't be read, as planned";

/// What can't be read, and what the loader is to make of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trouble {
    None,
    /// The stream ends at the first bad sample.
    Fails,
    Skips,
    /// A bad sample can be read at the third attempt.
    Recovers,
    /// A bad sample is bad at every attempt.
    RetriedInVain,
}

impl Trouble {
    pub fn policy(self) -> ErrorPolicy {
        let backoff = Duration::from_micros(200);
        match self {
            Trouble::None | Trouble::Fails => ErrorPolicy::Fail,
            Trouble::Skips => ErrorPolicy::Skip { at_most: u64::MAX },
            Trouble::Recovers => ErrorPolicy::Retry { times: 2, backoff },
            Trouble::RetriedInVain => ErrorPolicy::Retry { times: 1, backoff },
        }
    }
}

/// How samples are read in a round.
#[derive(Debug, Clone)]
pub struct Reading {
    pub form: Form,
    pub len: u64,
    pub trouble: Trouble,
    /// One sample of so many is bad.
    pub bad_one_in: u64,
    /// One read of so many takes a while.
    pub slow_one_in: Option<u64>,
    pub gate: Option<Arc<Gate>>,
}

impl Reading {
    /// Whether this sample, or this batch of a pull source, can't be read. The first one can.
    pub fn is_bad(&self, number: u64) -> bool {
        self.trouble != Trouble::None
            && number > 0
            && mix(&[self.form.seed, number, 0xbad]).is_multiple_of(self.bad_one_in)
    }

    /// Whether it stays so.
    pub fn stays_bad(&self, number: u64) -> bool {
        self.trouble != Trouble::Recovers && self.is_bad(number)
    }

    /// What happens in each read.
    fn read(&self, number: u64) -> Result<(), BoxError> {
        thread_local! {
            // Repeated reads of a sample are made by one thread, one after the other.
            static LAST: Cell<(u64, u32)> = const { Cell::new((u64::MAX, 0)) };
        }
        if let Some(gate) = &self.gate {
            gate.pass();
        }
        let chance = mix(&[self.form.seed, number, 0x510]);
        if self.slow_one_in.is_some_and(|one_in| chance.is_multiple_of(one_in)) {
            std::thread::sleep(Duration::from_micros(chance >> 7 & 0xff));
        }
        if !self.is_bad(number) {
            return Ok(());
        }
        let attempt = match LAST.get() {
            (last, attempts) if last == number => attempts + 1,
            _ => 1,
        };
        LAST.set((number, attempt));
        if self.trouble == Trouble::Recovers && attempt == 3 {
            LAST.set((u64::MAX, 0));
            return Ok(());
        }
        if mix(&[chance, 0xa1]).is_multiple_of(2) {
            TALLY.panics.add(1);
            panic!("{PLANNED} of the source at {number}");
        }
        Err(format!("{number} {CANNOT_READ}").into())
    }
}

/// One read stands still here until it is let go on.
#[derive(Debug)]
pub struct Gate {
    /// The read that blocks, counted from 0.
    at: u64,
    reads: AtomicU64,
    inside: AtomicBool,
    open: AtomicBool,
}

impl Gate {
    pub fn new(at: u64) -> Arc<Self> {
        let [inside, open] = [AtomicBool::new(false), AtomicBool::new(false)];
        Arc::new(Self { at, reads: AtomicU64::new(0), inside, open })
    }

    fn pass(&self) {
        if self.reads.fetch_add(1, Ordering::SeqCst) != self.at {
            return;
        }
        self.inside.store(true, Ordering::SeqCst);
        while !self.open.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.inside.store(false, Ordering::SeqCst);
    }

    /// Whether a read stands still.
    pub fn is_blocking(&self) -> bool {
        self.inside.load(Ordering::SeqCst)
    }

    pub fn open(&self) {
        self.open.store(true, Ordering::SeqCst);
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.is_blocking() {
            assert!(Instant::now() < deadline, "a read that was let go did not go on");
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

/// Random access.
#[derive(Debug)]
pub struct Computed {
    reading: Reading,
    spec: SampleSpec,
}

impl Computed {
    pub fn new(reading: Reading) -> Self {
        let spec = reading.form.spec();
        Self { reading, spec }
    }
}

impl Dataset for Computed {
    fn len(&self) -> u64 {
        self.reading.len
    }

    fn spec(&self) -> &SampleSpec {
        &self.spec
    }

    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        let form = &self.reading.form;
        // Written first: a bad sample leaves bytes behind.
        form.write_input(index, sample.input());
        self.reading.read(index)?;
        sample.label().copy_from_slice(&form.labels(&[index])[..if form.label { 8 } else { 0 }]);
        if form.weight.is_some() {
            form.write_weight(index, sample.weight(0));
        }
        Ok(())
    }
}

/// All samples as tensors in memory.
pub fn in_memory(reading: &Reading) -> InMemory {
    let (Reading { form, len, .. }, indices) = (reading, Vec::from_iter(0..reading.len));
    let tensor = |dtype, dims: &[u64], bytes| {
        HostTensor::from_bytes(dtype, &[&[*len], dims].concat(), bytes).expect("as many bytes")
    };
    let inputs = tensor(form.dtype, &form.dims, form.inputs(&indices));
    let mut dataset = InMemory::new(inputs).expect("samples");
    if form.label {
        let labels = tensor(DType::I64, &[], form.labels(&indices));
        dataset = dataset.labels(labels).expect("a label for each");
    }
    if let Some((dtype, len)) = form.weight {
        let weights = tensor(dtype, &[len], form.weights(&indices));
        dataset = dataset.weights("weight", weights).expect("a weight for each");
    }
    dataset
}

/// Batch after batch.
#[derive(Debug)]
pub struct Pulled {
    reading: Reading,
    /// The next batch.
    at: u64,
}

impl Pulled {
    pub fn new(reading: Reading) -> Self {
        Self { reading, at: 0 }
    }
}

impl DataSource for Pulled {
    fn get_batch(&mut self, batch_size: usize) -> Result<Option<Sample>, BoxError> {
        let (size, Reading { form, len, .. }) = (batch_size as u64, &self.reading);
        let indices: Vec<u64> =
            (self.at * size..(self.at + 1) * size).take_while(|index| index < len).collect();
        if indices.is_empty() {
            return Ok(None);
        }
        if self.reading.trouble == Trouble::Skips && self.reading.is_bad(self.at) {
            // The next call is about the next batch.
            self.at += 1;
            return self.reading.read(self.at - 1).map(|()| None);
        }
        self.reading.read(self.at)?;
        self.at += 1;
        let rows = indices.len() as u64;
        let shape = |dims: &[u64]| [&[rows], dims].concat();
        let input = HostTensor::from_bytes(form.dtype, &shape(&form.dims), form.inputs(&indices))?;
        let mut batch = Sample::new(input);
        if form.label {
            let numbers = indices.iter().map(|index| index.cast_signed()).collect();
            batch = batch.label(HostTensor::new::<i64>(numbers, &[rows])?);
        }
        if let Some((dtype, len)) = form.weight {
            let weights = form.weights(&indices);
            batch = batch.weight("weight", HostTensor::from_bytes(dtype, &shape(&[len]), weights)?);
        }
        Ok(Some(batch))
    }

    fn size(&self) -> Option<u64> {
        Some(self.reading.len)
    }

    fn reset(&mut self) -> Result<(), BoxError> {
        self.at = 0;
        Ok(())
    }
}
