//! The consumer of a round: takes batches, compares each, holds some, and is slow where the round
//! says so.

use std::collections::VecDeque;
use std::time::Duration;

use batchline::{AsyncDataLoader, Delivery, Error, GpuBatch, Host, Tensor};

use super::StreamRound;
use crate::bench::{Bench, Fault};
use crate::plan::{Next, Stream};
use crate::random::Random;
use crate::source::{CANNOT_READ, PLANNED};
use crate::tally::TALLY;

/// Why the consumer stopped taking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ended {
    /// It has as many as it wanted.
    Enough,
    AtTheEnd,
    Failed,
    /// A read blocks.
    Blocked,
}

pub(super) struct Consumer<'a> {
    round: &'a StreamRound,
    bench: &'a Bench,
    pub(super) random: Random,
    pub(super) held: VecDeque<(GpuBatch, Vec<u64>)>,
    /// How often it may still sleep.
    pub(super) sleeps: u64,
    /// Whether the read that blocks is one of an earlier start.
    pub(super) detached: bool,
}

impl<'a> Consumer<'a> {
    pub(super) fn new(round: &'a StreamRound, bench: &'a Bench) -> Self {
        let random = Random::new(round.seed, 0xc0);
        Self {
            round,
            bench,
            random,
            held: VecDeque::new(),
            sleeps: if round.slow_consumer { 15 } else { 0 },
            detached: false,
        }
    }

    /// Takes batches and compares them.
    pub(super) fn take<F: Fn(u64) -> bool>(
        &mut self,
        loader: &AsyncDataLoader,
        mut expected: Stream<'_, F>,
        most: Option<u64>,
    ) -> Ended {
        let mut taken = 0;
        while most.is_none_or(|most| taken < most) {
            if let (Some(Fault::LostAtBatch(at)), Some(control)) =
                (self.bench.setting.fault, &self.bench.control)
                && at == taken
            {
                control.lose();
            }
            if !self.round.greedy {
                self.let_go(self.round.keep);
            }
            if self.sleeps > 0 && self.random.one_in(4) {
                self.sleeps -= 1;
                std::thread::sleep(Duration::from_micros(self.random.below(2000)));
            }
            let next = match self.next(loader) {
                Ok(Delivery::NotYet) => return Ended::Blocked,
                Err(Error::TooManyHeld { .. }) if self.round.greedy => {
                    TALLY.too_many_held.add(1);
                    self.let_go(self.held.len() / 2);
                    continue;
                }
                next => next,
            };
            match (next, expected.next()) {
                (Ok(Delivery::Ready(batch)), Next::Batch { epoch, batch: number, indices }) => {
                    assert_eq!((batch.epoch(), batch.batch_in_epoch()), (epoch, number));
                    assert_eq!(batch.batch_id(), taken, "the number since the start");
                    assert_eq!(batch.len(), indices.len() as u64);
                    taken += 1;
                    if !self.check(&batch, &indices) {
                        return Ended::Failed;
                    }
                    TALLY.batches.add(1);
                    TALLY.samples.add(batch.len());
                    self.held.push_back((batch, indices));
                }
                (Ok(Delivery::End), Next::End) => {
                    assert!(matches!(loader.get_batch(), Ok(None)), "the end stays the end");
                    return Ended::AtTheEnd;
                }
                (Err(error), next) => {
                    let chain = error.chain();
                    let planned = chain.contains(CANNOT_READ) || chain.contains(PLANNED);
                    // A bad sample's error may be there first, and its batch not yet at hand, when
                    // a device that is lost takes the batches before it.
                    if planned && (matches!(next, Next::Failure) || self.bench.is_lost()) {
                        TALLY.failed_streams.add(1);
                    } else {
                        self.bench.expect(&error);
                    }
                    let again = loader.get_batch().expect_err("an error stays");
                    assert_eq!(error.chain(), again.chain());
                    return Ended::Failed;
                }
                (Ok(delivery), next) => panic!("{delivery:?}, expected {next:?}"),
            }
        }
        TALLY.early_stops.add(1);
        Ended::Enough
    }

    /// The next batch, asked for in one of three ways; `NotYet` when a read blocks for good.
    pub(super) fn next(&mut self, loader: &AsyncDataLoader) -> batchline::Result<Delivery> {
        if let Some(gate) = &self.round.reading.gate
            && !self.detached
        {
            loop {
                // Asked before: what was on its way comes within the time.
                let blocked = gate.is_blocking();
                match loader.get_batch_timeout(Duration::from_millis(20))? {
                    Delivery::NotYet if !blocked => {}
                    other => return Ok(other),
                }
            }
        }
        match self.random.below(4) {
            0 => loop {
                match loader.try_get_batch()? {
                    Delivery::NotYet => std::thread::sleep(Duration::from_micros(30)),
                    other => return Ok(other),
                }
            },
            1 => loop {
                match loader.get_batch_timeout(Duration::from_millis(1))? {
                    Delivery::NotYet => {}
                    other => return Ok(other),
                }
            },
            _ => Ok(loader.get_batch()?.map_or(Delivery::End, Delivery::Ready)),
        }
    }

    /// Lets go of all batches but the newest so many; now and then looks at them once more.
    pub(super) fn let_go(&mut self, keep: usize) {
        while self.held.len() > keep {
            let Some((batch, indices)) = self.held.pop_front() else { return };
            if self.random.one_in(4) {
                self.check(&batch, &indices);
            }
        }
    }

    /// Compares every byte of a batch; whether it could be read.
    pub(super) fn check(&mut self, batch: &GpuBatch, indices: &[u64]) -> bool {
        let form = &self.round.reading.form;
        let input = self.round.converted(form.inputs(indices));
        let mut tensors = vec![(batch.input_tensor(), input)];
        if form.label {
            tensors.push((batch.label_tensor().expect("a label"), form.labels(indices)));
        }
        if form.weight.is_some() {
            tensors.push((&batch.weight_tensors()[0], form.weights(indices)));
        }
        tensors.into_iter().all(|(tensor, bytes)| self.check_tensor(tensor, bytes))
    }

    pub(super) fn check_tensor(&mut self, tensor: &Tensor, expected: Vec<u8>) -> bool {
        let unified = tensor.device().info().unified;
        let compared = match (self.random.below(3), &self.bench.control) {
            // The device looks at them behind our back, after the batch is dropped perhaps.
            (0, Some(control)) if !expected.is_empty() => {
                control.consume(tensor, expected);
                return true;
            }
            (1, _) if unified => tensor.bind(&Host).map(|view| view.bytes() == expected),
            _ => tensor.to_bytes().map(|bytes| bytes == expected),
        };
        match compared {
            Ok(equal) => {
                assert!(equal, "other bytes in {tensor:?}");
                true
            }
            // Reading is work of the device too, and may be what fails.
            Err(error) => {
                self.bench.expect(&error);
                false
            }
        }
    }
}
