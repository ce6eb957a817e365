//! Only the parts: pooled tensors, a staging pool, and command buffers, without a loader.
//!
//! `cargo run -p batchline --example pools_alone`

use batchline::{
    BatchOperation, CommandBufferPool, Conversion, DType, Device, MemoryLimits, MemoryManager,
    StagingBufferPool,
};

fn main() -> Result<(), batchline::Error> {
    let device = Device::auto();
    println!("on {}", device.info().name);
    let limits = MemoryLimits::default().device_limit(256 << 20).staging_limit(64 << 20);
    let memory = MemoryManager::with_limits(&device, limits);
    let staging = StagingBufferPool::new(&memory, 4)?;
    let commands = CommandBufferPool::new(&memory, 4)?;

    let pixels = memory.tensor(&[8, 224, 224, 3], DType::U8)?;
    let planes = memory.tensor(&[8, 3, 224, 224], DType::F32)?;
    let data: Vec<u8> = (0..8 * 224 * 224 * 3u32).map(|i| (i % 251) as u8).collect();
    staging.transfer_to_gpu(&data, &pixels)?.wait()?;

    let to_planes = Conversion::new()
        .normalize(&[123.7, 116.3, 103.5], &[58.4, 57.1, 57.4])
        .reorder(batchline::ChannelOrder::Nhwc, batchline::ChannelOrder::Nchw);
    let batch = vec![
        BatchOperation::fill(&planes, 0.0f32),
        BatchOperation::convert(&pixels, &planes, to_planes)
            .on_complete(|result| println!("converted: {result:?}")),
    ];
    commands.execute_batch(batch)?.wait()?;
    println!("first value {:.4}", planes.to_vec::<f32>()?[0]);
    println!("{:?}", memory.stats());
    Ok(())
}
