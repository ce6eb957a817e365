//! A round of the pools alone: transfers, command buffers and read-back, against a model.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchline::{
    BatchOperation, CommandBufferPool, Conversion, DType, Error, Result, StagingBufferPool,
    Submission, Tensor,
};

use crate::bench::{Bench, wait_for};
use crate::random::Random;
use crate::tally::TALLY;

const TENSORS: usize = 4;

/// Operations on a few tensors; all follow from the seed.
#[derive(Debug, Clone)]
pub struct PoolRound {
    seed: u64,
    operations: u64,
    /// Bytes of each tensor.
    len: usize,
    buffer_size: u64,
    buffers: usize,
    recorders: usize,
}

impl PoolRound {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed, 0x90);
        Self {
            seed,
            operations: random.within(5, 60),
            len: random.index(5000) * 4 + 4,
            buffer_size: random.within(100, 8000),
            buffers: random.index(4) + 1,
            recorders: random.index(3) + 1,
        }
    }

    /// Does all of them, and checks that each completion ran once.
    ///
    /// # Panics
    /// Something is not as it must be.
    pub fn run(&self, bench: &Bench) {
        let completions = Completions::default();
        if let Err(error) = self.drive(bench, &completions) {
            bench.expect(&error);
        }
        let Completions { asked, ran } = completions;
        let asked = asked.load(Ordering::SeqCst);
        wait_for("every completion", || ran.load(Ordering::SeqCst) >= asked);
        assert_eq!(ran.load(Ordering::SeqCst), asked, "a completion ran twice");
    }

    fn drive(&self, bench: &Bench, completions: &Completions) -> Result<()> {
        let memory = &bench.memory;
        let staging = StagingBufferPool::with_buffer_size(memory, self.buffers, self.buffer_size)?;
        let commands = CommandBufferPool::new(memory, self.recorders)?;
        let mut random = Random::new(self.seed, 0x0b);
        let mut model = vec![vec![0u8; self.len]; TENSORS];
        let mut tensors = Vec::new();
        for data in &model {
            tensors.push(memory.upload(data, &[data.len() as u64])?);
        }
        let mut transfers = VecDeque::new();
        let mut submissions: VecDeque<Submission> = VecDeque::new();
        for _ in 0..self.operations {
            TALLY.pool_operations.add(1);
            let (from, to) = (random.index(TENSORS), random.index(TENSORS));
            match random.below(8) {
                0 => {
                    model[to] = self.data(&mut random);
                    transfers.push_back(staging.transfer_to_gpu(&model[to], &tensors[to])?);
                }
                1 => {
                    model[to] = self.data(&mut random);
                    staging.transfer_to_gpu_sync(&model[to], &tensors[to])?;
                }
                2 | 3 => {
                    let mut buffer = commands.get_buffer()?;
                    let value = random.below(256).to_le_bytes()[0];
                    buffer.fill(&tensors[to], value)?;
                    model[to].fill(value);
                    let mut readback = None;
                    if from != to {
                        let quarter = self.len / 4 / 4 * 4;
                        let range = 0..quarter as u64;
                        buffer.copy_range(&tensors[from], range, &tensors[to], quarter as u64)?;
                        let moved = model[from][..quarter].to_vec();
                        model[to][quarter..2 * quarter].copy_from_slice(&moved);
                        readback = Some(buffer.download(&tensors[to])?);
                    }
                    let submission = buffer.execute_async(completions.one())?;
                    match readback {
                        Some(readback) if random.one_in(2) => {
                            submission.wait()?;
                            assert_eq!(readback.to_vec::<u8>()?, model[to], "a readback");
                        }
                        _ => submissions.push_back(submission),
                    }
                }
                4 if from != to => {
                    let value = random.below(256).to_le_bytes()[0];
                    let expected = vec![value; self.len];
                    let batch = vec![
                        BatchOperation::fill(&tensors[from], value).on_complete(completions.one()),
                        BatchOperation::copy(&tensors[from], &tensors[to])
                            .on_complete(completions.one()),
                        BatchOperation::download(&tensors[to], move |arrived| {
                            assert!(
                                arrived.is_err() || arrived.is_ok_and(|bytes| bytes == expected)
                            );
                        }),
                    ];
                    model[from].fill(value);
                    model[to].fill(value);
                    submissions.push_back(commands.execute_batch(batch)?);
                }
                5 => {
                    // Recorded, and thought better of.
                    let mut buffer = commands.get_buffer()?;
                    let staged = staging.get_buffer()?;
                    let bytes = (staged.capacity() as u64 & !3).min(self.len as u64);
                    buffer.upload_range(staged, 0..bytes, &tensors[to], 0)?;
                    buffer.fill(&tensors[to], 1u8)?;
                }
                6 => {
                    let mut all = Vec::new();
                    while let Some(buffer) = staging.try_get_buffer()? {
                        all.push(buffer);
                    }
                    if all.len() == self.buffers {
                        let none = staging.get_buffer_timeout(Duration::from_micros(200));
                        assert!(matches!(none, Err(Error::Timeout { .. })) || bench.is_lost());
                    }
                }
                _ => self.try_conversion(&tensors[from], &model[from])?,
            }
            if random.one_in(3) {
                // Some are waited for, some dropped on their way.
                transfers.pop_front().map_or(Ok(()), |transfer| transfer.wait())?;
                submissions.pop_front();
            }
            if random.one_in(6) {
                assert_eq!(tensors[to].to_vec::<u8>()?, model[to], "a tensor");
            }
        }
        if random.one_in(2) {
            staging.wait_for_transfer_completion()?;
        }
        submissions.iter().try_for_each(Submission::wait)?;
        for (tensor, data) in tensors.iter().zip(&model) {
            assert_eq!(&tensor.to_vec::<u8>()?, data, "a tensor at the end");
        }
        if random.one_in(2) {
            staging.cleanup();
            commands.cleanup();
            assert_eq!((staging.stats().in_use, commands.stats().in_use), (0, 0));
        }
        Ok(())
    }

    fn data(&self, random: &mut Random) -> Vec<u8> {
        let first = random.below(256);
        (0..self.len as u64)
            .map(|place| (place.wrapping_mul(0x9d) + first).to_le_bytes()[0])
            .collect()
    }

    /// A tensor that lives for a moment only.
    fn try_conversion(&self, tensor: &Tensor, model: &[u8]) -> Result<()> {
        let wide = tensor.convert(DType::F32, &Conversion::new().scale_and_bias(&[0.5], &[1.0]))?;
        let expected: Vec<f32> = model.iter().map(|byte| f32::from(*byte) * 0.5 + 1.0).collect();
        assert_eq!(wide.to_vec::<f32>()?, expected, "a conversion");
        Ok(())
    }
}

/// Completions asked for, and those that ran.
#[derive(Debug, Default)]
struct Completions {
    asked: AtomicU64,
    ran: Arc<AtomicU64>,
}

impl Completions {
    fn one(&self) -> impl FnOnce(Result<()>) + Send + 'static {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let ran = Arc::clone(&self.ran);
        move |_| {
            ran.fetch_add(1, Ordering::SeqCst);
        }
    }
}
