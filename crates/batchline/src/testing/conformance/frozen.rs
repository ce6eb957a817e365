//! Chains that are executed again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{bytes, tensor_of, wait_until};
use crate::plan::mix;
use crate::{
    CommandBuffer, CommandBufferPool, Conversion, DType, Device, Error, FrozenCommands,
    MemoryManager, StagingBufferPool, Tensor,
};

/// Bytes of each tensor.
const LEN: usize = 260;
const TENSORS: usize = 4;

/// One operation between the tensors, by their numbers.
#[derive(Debug, Clone, Copy)]
enum Step {
    Fill { to: usize, value: u8 },
    Copy { from: usize, start: usize, to: usize, place: usize },
    Invert { from: usize, to: usize },
}

impl Step {
    fn random(random: &mut impl FnMut(u64) -> usize) -> Self {
        let to = random(TENSORS as u64);
        let from = (to + 1 + random(TENSORS as u64 - 1)) % TENSORS;
        match random(3) {
            0 => Step::Fill { to, value: bytes(random(1000) as u64, 1)[0] },
            1 => Step::Copy { from, start: random(32) * 4, to, place: random(32) * 4 },
            _ => Step::Invert { from, to },
        }
    }

    fn record(self, buffer: &mut CommandBuffer, tensors: &[Tensor]) -> crate::Result<()> {
        match self {
            Step::Fill { to, value } => buffer.fill(&tensors[to], value),
            Step::Copy { from, start, to, place } => {
                let range = start as u64..start as u64 + 128;
                buffer.copy_range(&tensors[from], range, &tensors[to], place as u64)
            }
            Step::Invert { from, to } => {
                let invert = Conversion::new().scale_and_bias(&[-1.0], &[255.0]);
                buffer.convert(&tensors[from], &tensors[to], &invert)
            }
        }
    }

    fn apply(self, model: &mut [Vec<u8>]) {
        match self {
            Step::Fill { to, value } => model[to].fill(value),
            Step::Copy { from, start, to, place } => {
                let moved = model[from][start..start + 128].to_vec();
                model[to][place..place + 128].copy_from_slice(&moved);
            }
            Step::Invert { from, to } => {
                model[to] = model[from].iter().map(|byte| 255 - byte).collect();
            }
        }
    }
}

/// Random chains are frozen and executed again and again, in turns, between uploads, without
/// waiting, and dropped while they are in flight; against a model.
///
/// # Panics
/// The device fails.
pub fn frozen_chains_run_again(device: &Device, seed: u64) {
    let memory = MemoryManager::new(device);
    let commands = CommandBufferPool::new(&memory, 2).expect("a pool");
    let staging = StagingBufferPool::with_buffer_size(&memory, 2, LEN as u64).expect("a pool");
    let mut model = vec![vec![0u8; LEN]; TENSORS];
    let tensors: Vec<Tensor> =
        model.iter().map(|data| tensor_of(&memory, DType::U8, &[LEN as u64], data)).collect();
    let mut count = 0;
    let mut random = |bound: u64| {
        count += 1;
        usize::try_from(mix(&[seed, count, 0xf0]) % bound).expect("small")
    };
    let done = Arc::new(AtomicUsize::new(0));
    let mut executed = 0;
    let mut chains: Vec<(Vec<Step>, FrozenCommands)> = Vec::new();
    for round in 0..60 {
        if chains.len() < 3 {
            // Chains of one operation, too.
            let steps: Vec<_> = (0..=random(6)).map(|_| Step::random(&mut random)).collect();
            let mut buffer = commands.get_buffer().expect("a buffer");
            for step in &steps {
                step.record(&mut buffer, &tensors).expect("recorded");
            }
            let frozen = buffer.freeze().expect("frozen");
            assert_eq!(frozen.len(), steps.len());
            chains.push((steps, frozen));
        }
        if random(2) == 0 {
            let (to, data) = (random(TENSORS as u64), bytes(random(1000) as u64, LEN));
            let mut staged = staging.get_buffer().expect("a staging buffer");
            staged.write(0, &data).expect("it fits");
            let mut buffer = commands.get_buffer().expect("a buffer");
            buffer.upload(staged, &tensors[to]).expect("recorded");
            drop(buffer.execute().expect("submitted"));
            model[to] = data;
        }
        let chosen = random(chains.len() as u64);
        let (steps, frozen) = &chains[chosen];
        let count = Arc::clone(&done);
        let completion = move |result: crate::Result<()>| {
            result.expect("an execution");
            count.fetch_add(1, Ordering::SeqCst);
        };
        drop(frozen.execute_async(completion).expect("submitted"));
        executed += 1;
        steps.iter().for_each(|step| step.apply(&mut model));
        if random(8) == 0 {
            // What is in flight needs no handle.
            drop(chains.swap_remove(chosen));
        }
        if random(5) == 0 {
            let place = random(TENSORS as u64);
            let found = tensors[place].to_vec::<u8>().expect("a readback");
            assert_eq!(found, model[place], "seed {seed}, round {round}");
        }
    }
    for (tensor, expected) in tensors.iter().zip(&model) {
        assert_eq!(&tensor.to_vec::<u8>().expect("a readback"), expected, "seed {seed}");
    }
    wait_until(|| done.load(Ordering::SeqCst) == executed, "each completion once");

    // The chains alone keep the tensors now.
    drop(tensors);
    for (_, frozen) in &chains {
        frozen.execute().expect("submitted").wait().expect("done");
    }
    assert!(chains.is_empty() || memory.stats().device_in_use > 0);
    drop(chains);
    wait_until(|| memory.stats().device_in_use == 0, "all device memory to come back");

    // What can be done only once is refused, and goes home.
    let tensor = memory.tensor(&[4], DType::U8).expect("a tensor");
    let mut buffer = commands.get_buffer().expect("a buffer");
    buffer.fill(&tensor, 1u8).expect("recorded");
    buffer.upload(staging.get_buffer().expect("a staging buffer"), &tensor).expect("recorded");
    let refused = buffer.freeze().expect_err("it must be refused");
    assert!(matches!(refused, Error::Record { .. }), "{refused}");
    wait_until(|| staging.stats().in_use == 0, "the staging buffer to come back");
    // Nothing is done at once.
    let nothing = commands.get_buffer().expect("a buffer").freeze().expect("frozen");
    assert!(nothing.is_empty());
    nothing.execute().expect("submitted").wait().expect("done");
}
