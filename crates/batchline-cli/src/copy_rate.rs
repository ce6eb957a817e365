//! How fast a device is copied to.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use batchline::{
    CommandBufferPool, DType, Device, MemoryManager, Result, StagingBuffer, StagingBufferPool,
    Submission, Tensor,
};

/// Bytes of a copy, where the device allows so much.
const COPY: u64 = 64 << 20;
/// Copies on their way at once.
const IN_FLIGHT: usize = 3;
/// How long it is measured.
const LONG: Duration = Duration::from_millis(500);

/// Bytes per second from ordinary memory to the device: one thread fills page-locked buffers, the
/// device copies them meanwhile. The filling counts, because on some devices it is the transfer:
/// Vulkan may place the buffers in the GPU's own memory, which the CPU then writes over the link.
pub(crate) fn measure(device: &Device) -> Result<f64> {
    let memory = MemoryManager::new(device);
    let bytes = COPY.min(device.info().max_allocation);
    let staging = StagingBufferPool::with_buffer_size(&memory, IN_FLIGHT, bytes)?;
    let commands = CommandBufferPool::new(&memory, IN_FLIGHT)?;
    let targets = (0..IN_FLIGHT)
        .map(|_| memory.tensor(&[bytes], DType::U8))
        .collect::<Result<Vec<Tensor>>>()?;

    // The first use of memory is slow: its pages are made then. Each buffer and each target has
    // its first use before the clock runs.
    let mut buffers =
        (0..IN_FLIGHT).map(|_| staging.get_buffer()).collect::<Result<Vec<StagingBuffer>>>()?;
    buffers.iter_mut().for_each(|buffer| buffer.as_mut_slice().fill(1));
    for (buffer, target) in buffers.into_iter().zip(&targets) {
        copy(&commands, buffer, target)?.wait()?;
    }

    let source: Vec<u8> = (0..bytes).map(|place| (place % 251) as u8).collect();
    let mut in_flight: VecDeque<Submission> = VecDeque::new();
    let mut copied = 0;
    let started = Instant::now();
    for target in targets.iter().cycle() {
        if started.elapsed() >= LONG {
            break;
        }
        let mut buffer = staging.get_buffer()?;
        buffer.write(0, &source)?;
        in_flight.push_back(copy(&commands, buffer, target)?);
        copied += bytes;
        if in_flight.len() == IN_FLIGHT
            && let Some(first) = in_flight.pop_front()
        {
            first.wait()?;
        }
    }
    in_flight.iter().try_for_each(Submission::wait)?;
    Ok(copied as f64 / started.elapsed().as_secs_f64())
}

fn copy(
    commands: &CommandBufferPool,
    buffer: StagingBuffer,
    target: &Tensor,
) -> Result<Submission> {
    let mut recorded = commands.get_buffer()?;
    recorded.upload(buffer, target)?;
    recorded.execute()
}
