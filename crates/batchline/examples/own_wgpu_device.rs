//! A wgpu device of one's own, shared with the loader: batches are bound to the program's queue and
//! read by its own compute shader, without a copy.
//!
//! `cargo run -p batchline --example own_wgpu_device`

use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Conversion, DType, Device, formats};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/digits");
/// One invocation per pixel: adds that pixel of all images of the batch to its sum.
const SHADER: &str = "
    @group(0) @binding(0) var<storage, read> batch: array<f32>;
    @group(0) @binding(1) var<storage, read_write> sums: array<f32>;
    @compute @workgroup_size(64) fn main(@builtin(local_invocation_index) pixel: u32) {
        for (var i = pixel; i < arrayLength(&batch); i += 64u) { sums[pixel] += batch[i]; }
    }";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // The program's own device. One `wgpu::Instance` for all of it.
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle());
    let adapter = instance.request_adapter(&wgpu::RequestAdapterOptions::default());
    let Ok(adapter) = pollster::block_on(adapter) else {
        println!("skipped: wgpu finds no adapter (apt install mesa-vulkan-drivers brings one)");
        return Ok(());
    };
    let request = adapter.request_device(&wgpu::DeviceDescriptor::default());
    let (device, queue) = pollster::block_on(request)?;
    println!("on {}", adapter.get_info().name);

    let shared = Device::wgpu_from(device.clone(), queue.clone())?;
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(256)
        .convert(DType::F32, Conversion::new()) // the files hold bytes
        .device(shared)
        .build()?;
    let loader = AsyncDataLoader::new(formats::open(DIGITS)?, config)?;
    loader.start()?;

    let source = wgpu::ShaderSource::Wgsl(SHADER.into());
    let module = device.create_shader_module(wgpu::ShaderModuleDescriptor { label: None, source });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: None,
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    // A tensor for the shader to write to.
    let sums = loader.memory_manager().upload(&[0f32; 64], &[8, 8])?;
    for batch in &loader {
        let batch = batch?;
        let bound = batch.bind(&queue)?; // the queue waits for the batch, the host does not
        let input = bound.input().as_buffer_binding().expect("no empty batch");
        let output = sums.bind(&queue)?.as_buffer_binding().expect("no empty tensor");
        let entry = |binding, resource| wgpu::BindGroupEntry { binding, resource };
        let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
            label: None,
            layout: &pipeline.get_bind_group_layout(0),
            entries: &[
                entry(0, wgpu::BindingResource::Buffer(input)),
                entry(1, wgpu::BindingResource::Buffer(output)),
            ],
        });
        let mut encoder = device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&pipeline);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(1, 1, 1);
        drop(pass);
        queue.submit([encoder.finish()]); // before the batch is dropped
    }

    let sums = sums.to_vec::<f32>()?; // behind the shader's work, on the same queue
    println!("the mean of 1,797 digits:");
    for row in sums.chunks(8) {
        let level =
            |sum: &f32| [2.5, 5.0, 7.5, 10.0].partition_point(|least| *least < sum / 1797.0);
        let shade = |sum| ["  ", "..", "oo", "OO", "@@"][level(sum)];
        println!("  {}", row.iter().map(shade).collect::<String>());
    }
    assert_eq!(sums.iter().sum::<f32>(), 561_718.0, "as the README beside the digits says");
    Ok(())
}
