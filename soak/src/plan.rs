//! Which samples must be in which batch, worked out from the documentation alone.

use batchline::{LastBatch, Sampler, Sequential, Shuffled};

/// The order of an epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    Sequential,
    Shuffled,
    Strided,
}

/// A sampler of our own: every sample about once.
#[derive(Debug, Clone, Copy)]
pub struct Strided {
    pub len: u64,
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

/// What decides about the stream of one rank.
#[derive(Debug, Clone)]
pub struct Plan {
    pub seed: u64,
    pub len: u64,
    pub batch_size: u64,
    pub rank: u64,
    pub world_size: u64,
    pub last: LastBatch,
    pub order: Order,
    /// `None`: for ever.
    pub epochs: Option<u64>,
    /// A pull source of this many batches; its samples are numbered as they come.
    pub pulled: bool,
}

impl Plan {
    /// Batches of an epoch, those of a pull source that turn out to be bad included.
    pub fn batches(&self) -> u64 {
        let global = self.batch_size * self.world_size;
        if self.last == LastBatch::Drop { self.len / global } else { self.len.div_ceil(global) }
    }

    /// Batches that are read in an epoch: a pull source is asked for the last one also where it is
    /// short and left out.
    fn read(&self) -> u64 {
        if self.pulled { self.len.div_ceil(self.batch_size) } else { self.batches() }
    }

    /// The samples of a batch.
    fn indices(&self, epoch: u64, batch: u64) -> Vec<u64> {
        let global = self.batch_size * self.world_size;
        let start = batch * global;
        let left = (self.len - start).min(global);
        let rows = if self.last == LastBatch::Pad { global } else { left };
        // Dealt out evenly, the first ranks getting one more.
        let (share, extra) = (rows / self.world_size, rows % self.world_size);
        let first = start + self.rank * share + self.rank.min(extra);
        let end = first + share + u64::from(self.rank < extra);
        let sampler: Box<dyn Sampler> = match self.order {
            Order::Sequential => Box::new(Sequential::new(self.len)),
            Order::Shuffled => Box::new(Shuffled::new(self.len, self.seed)),
            Order::Strided => Box::new(Strided { len: self.len }),
        };
        (first..end).map(|position| sampler.index(epoch, position % self.len)).collect()
    }
}

/// What the consumer must get next.
#[derive(Debug)]
pub enum Next {
    Batch {
        epoch: u64,
        /// Within the epoch.
        batch: u64,
        indices: Vec<u64>,
    },
    /// The error of a bad sample.
    Failure,
    End,
}

/// What becomes of what can't be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bad {
    Skipped,
    Fatal,
}

/// The stream from some batch on.
pub struct Stream<'a, F> {
    plan: &'a Plan,
    /// Whether a sample, or a batch of a pull source, can't be read.
    bad: F,
    policy: Bad,
    epoch: u64,
    /// The batch within the epoch, as the loader counts: without those skipped whole.
    batch: u64,
    /// The same, of the source.
    at: u64,
}

impl<'a, F: Fn(u64) -> bool> Stream<'a, F> {
    pub fn new(plan: &'a Plan, bad: F, policy: Bad, epoch: u64, position: u64) -> Self {
        let mut stream = Self { plan, bad, policy, epoch, batch: 0, at: 0 };
        if !plan.pulled {
            (stream.batch, stream.at) = (position, position);
        }
        while stream.batch < position {
            stream.next();
        }
        stream
    }

    pub fn next(&mut self) -> Next {
        loop {
            if self.at == self.plan.read() {
                (self.epoch, self.batch, self.at) = (self.epoch + 1, 0, 0);
            }
            if self.plan.epochs.is_some_and(|epochs| self.epoch >= epochs) {
                return Next::End;
            }
            let mut indices = self.plan.indices(self.epoch, self.at);
            if self.plan.pulled {
                if (self.bad)(self.at) {
                    if self.policy == Bad::Fatal {
                        return Next::Failure;
                    }
                    self.at += 1;
                    continue;
                }
                if self.at == self.plan.batches() {
                    // Short, and left out.
                    self.at += 1;
                    continue;
                }
            } else if self.policy == Bad::Skipped {
                indices.retain(|index| !(self.bad)(*index));
            } else if indices.iter().any(|index| (self.bad)(*index)) {
                return Next::Failure;
            }
            let next = Next::Batch { epoch: self.epoch, batch: self.batch, indices };
            (self.batch, self.at) = (self.batch + 1, self.at + 1);
            return next;
        }
    }
}
