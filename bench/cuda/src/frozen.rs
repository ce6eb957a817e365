//! Frozen chains beside recording the same anew: what an execution costs the host, and what it
//! takes the device.

use batchline::{
    BoxError, CommandBuffer, CommandBufferPool, Conversion, CudaCustom, Custom, DType,
    MemoryManager, Submission, Tensor,
};

use crate::driver::{Driver, Event, Gate};
use crate::report::{Entry, Report};
use crate::settings::Settings;

/// Executions in a row. The driver makes callers wait when about a thousand commands are queued.
const EXECUTIONS: u32 = 50;

pub(crate) fn measure(settings: &Settings, memory: &MemoryManager, report: &mut Report) {
    let commands = CommandBufferPool::new(memory, 100).expect("command buffers");
    let tensor = |dtype| memory.tensor(&[256, 28, 28], dtype).expect("device memory");
    let (pixels, floats) = (tensor(DType::U8), tensor(DType::F32));
    let (copy, small) = (tensor(DType::F32), tensor(DType::BF16));
    let normal = Conversion::new().normalize(&[33.3], &[78.6]);
    let plain = Conversion::new();
    for len in [2, 4, 8] {
        let record = || {
            let mut buffer = commands.get_buffer().expect("a buffer");
            for place in 0..len {
                match place % 4 {
                    0 => buffer.convert(&pixels, &floats, &normal),
                    1 => buffer.convert(&floats, &small, &plain),
                    2 => buffer.copy(&floats, &copy),
                    _ => buffer.fill(&floats, 0.0f32),
                }
                .expect("it fits");
            }
            buffer
        };
        let chain = record().freeze().expect("it can be frozen");
        let again = || chain.execute().expect("submitted");
        let anew = || record().execute().expect("submitted");
        // The first execution makes the graph, the second brings it to the device.
        for warm in [again(), again(), anew()] {
            warm.wait().expect("done");
        }
        let (mut host, mut device) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
        for _ in 0..settings.rounds {
            let times = [timed(&commands, &floats, &again), timed(&commands, &floats, &anew)];
            for (place, (on_host, on_device)) in times.into_iter().enumerate() {
                host[place].push(on_host);
                device[place].push(on_device);
            }
        }
        for (whose, [again, anew]) in [("the host", host), ("the device", device)] {
            let row = format!("a chain of {len} operations, time of {whose}");
            report.add(Entry::ours(&row, "frozen", "µs").runs(again));
            report.add(Entry::ours(&row, "recorded anew", "µs").runs(anew));
        }
    }
}

/// Microseconds of the host and of the device for each execution. The device begins when all are
/// queued, so that neither waits for the other.
fn timed(
    commands: &CommandBufferPool,
    tensor: &Tensor,
    execute: &dyn Fn() -> Submission,
) -> (f64, f64) {
    let (held, holding) = std::sync::mpsc::channel();
    let first = on_the_stream(commands, tensor, move |custom| {
        let driver = Driver::load();
        let gate = driver.hold(custom.stream.as_raw());
        let start = driver.event();
        driver.record(start, custom.stream.as_raw());
        held.send((gate, start)).map_err(BoxError::from)
    });
    let (gate, start): (Gate, Event) = holding.recv().expect("the operation was called");
    drop(first);
    let began = std::time::Instant::now();
    for _ in 0..EXECUTIONS {
        drop(execute());
    }
    let host = began.elapsed();
    let (sent, sending) = std::sync::mpsc::channel();
    let last = on_the_stream(commands, tensor, move |custom| {
        let driver = Driver::load();
        let end = driver.event();
        driver.record(end, custom.stream.as_raw());
        sent.send(end).map_err(BoxError::from)
    });
    let end = sending.recv().expect("the operation was called");
    gate.open();
    last.wait().expect("done");
    let device = Driver::load().between(start, end);
    let each = f64::from(EXECUTIONS);
    (host.as_secs_f64() * 1e6 / each, device * 1e3 / each)
}

/// Has `work` called with the stream that chains run on.
fn on_the_stream(
    commands: &CommandBufferPool,
    tensor: &Tensor,
    work: impl FnOnce(CudaCustom) -> Result<(), BoxError> + Send + 'static,
) -> Submission {
    let mut buffer: CommandBuffer = commands.get_buffer().expect("a buffer");
    buffer.custom(Custom::Cuda(Box::new(work)), &[], &[tensor]).expect("recorded");
    buffer.execute().expect("submitted")
}
