//! Pipelines, made when first needed, and their dispatches.

use std::collections::HashMap;

use super::convert::{Chunk, HEADER, Run, Variant};
use super::gather::{NUMBER, Plan};
use super::padded;
use super::record::Place;

/// Threads of a workgroup, as in the `.wgsl` files.
const GROUP: u32 = 256;

/// Parameter buffers kept: a loader in its steady state needs as many as it has output buffers.
const PARAMETERS: usize = 256;

/// Words of parameters kept.
const PARAMETER_WORDS: usize = 4 << 20;

/// What kernels need on a device. All of it can be dropped at any time and is then made anew.
#[derive(Debug, Default)]
pub(super) struct Kernels {
    fill: Option<Kernel>,
    convert: HashMap<(Variant, Sharing), Kernel>,
    /// Buffers by what they hold; never written again, so any number of flights may read one.
    parameters: HashMap<Vec<u32>, wgpu::Buffer>,
    detour: Option<wgpu::Buffer>,
    numbers: Option<wgpu::Buffer>,
}

/// Whether source and target are in one buffer. wgpu takes a buffer in one use at a time, so then
/// both bindings are declared for writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Sharing {
    Apart,
    OneBuffer,
}

#[derive(Debug, Clone)]
struct Kernel {
    pipeline: wgpu::ComputePipeline,
    layout: wgpu::BindGroupLayout,
}

/// A part of a buffer as a kernel sees it: bound from the last aligned offset before its start.
struct Window<'a> {
    binding: wgpu::BufferBinding<'a>,
    /// Word of the binding that the part starts at.
    word: u32,
}

impl<'a> Window<'a> {
    /// `start` is a multiple of 4.
    fn new(device: &wgpu::Device, place: Place<'a>, start: u64, len: u64) -> Self {
        let alignment = u64::from(device.limits().min_storage_buffer_offset_alignment);
        let start = place.offset + start;
        let bound = start / alignment * alignment;
        let binding = wgpu::BufferBinding {
            buffer: place.buffer,
            offset: bound,
            size: wgpu::BufferSize::new(start - bound + padded(len)),
        };
        Self { binding, word: narrow((start - bound) / 4) }
    }
}

impl Kernels {
    /// A buffer to copy through.
    pub(super) fn detour(&mut self, device: &wgpu::Device, size: u64) -> &wgpu::Buffer {
        self.detour.get_or_insert_with(|| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("batchline detour"),
                size,
                usage: wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        })
    }

    /// A buffer for the numbers of rows while they are gathered: kernels can't read staging memory.
    pub(super) fn numbers(&mut self, device: &wgpu::Device, size: u64) -> wgpu::Buffer {
        if let Some(buffer) = self.numbers.as_ref().filter(|buffer| buffer.size() >= size) {
            return buffer.clone();
        }
        // Flights keep the one that they use.
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("batchline row numbers"),
            size,
            usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        });
        self.numbers.insert(buffer).clone()
    }

    /// Writes the pattern all over `dst`.
    pub(super) fn fill(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        dst: Place<'_>,
        pattern: [u8; 8],
    ) {
        let [a, b, c, d, e, f, g, h] = pattern;
        let (low, high) = (u32::from_ne_bytes([a, b, c, d]), u32::from_ne_bytes([e, f, g, h]));
        let kernel = self.fill.get_or_insert_with(|| fill_kernel(device)).clone();
        let limits = device.limits();
        let slack = u64::from(limits.min_storage_buffer_offset_alignment);
        let most = limits.max_storage_buffer_binding_size.min(1 << 31).saturating_sub(slack);
        // A chunk starts with the pattern.
        let most = (most / 8 * 8).max(8);
        let mut start = 0;
        while start < dst.size {
            let len = most.min(dst.size - start);
            let window = Window::new(device, dst, start, len);
            let words = narrow(len / 4);
            let parameters = self.parameters(device, vec![words, window.word, low, high]);
            dispatch(device, encoder, &kernel, words, &parameters, [(2, window)]);
            start += len;
        }
    }

    /// Runs a planned conversion.
    pub(super) fn convert(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        src: Place<'_>,
        dst: Place<'_>,
        run: &Run,
    ) {
        let kernel = self.convert_kernel(device, run.variant, sharing(src, dst));
        let (from, to) = run.sizes();
        for chunk in &run.chunks {
            let elements = u64::from(chunk.elements);
            let src = Window::new(device, src, chunk.first * from, elements * from);
            let dst = Window::new(device, dst, chunk.first * to, elements * to);
            let (threads, parameters) = run_parameters(run, chunk, [src.word, dst.word], [0; 6]);
            let parameters = self.parameters(device, parameters);
            dispatch(device, encoder, &kernel, threads, &parameters, [(1, src), (2, dst)]);
        }
    }

    /// Runs a planned gather of the rows that `numbers` names.
    pub(super) fn gather(
        &mut self,
        device: &wgpu::Device,
        encoder: &mut wgpu::CommandEncoder,
        numbers: Place<'_>,
        src: Place<'_>,
        dst: Place<'_>,
        plan: &Plan,
    ) {
        let run = &plan.run;
        let kernel = self.convert_kernel(device, run.variant, sharing(src, dst));
        let (from, to) = run.sizes();
        let row = u64::from(plan.row);
        for (chunk, window) in
            run.chunks.iter().flat_map(|chunk| plan.windows.iter().map(move |w| (chunk, w)))
        {
            let elements = u64::from(chunk.elements);
            let (first, column) = (chunk.first / row, chunk.first % row);
            let rows = (column + elements).div_ceil(row);
            let numbers = Window::new(device, numbers, first * NUMBER, rows * NUMBER);
            let held = window.end - window.start;
            let src = Window::new(device, src, window.start * from, held * from);
            let dst = Window::new(device, dst, chunk.first * to, elements * to);
            let held = if plan.windows.len() == 1 { 0 } else { held };
            let gather = [
                plan.row,
                narrow(column),
                numbers.word / 2,
                narrow(held),
                lower(window.start),
                lower(window.start >> 32),
            ];
            let (threads, parameters) = run_parameters(run, chunk, [src.word, dst.word], gather);
            let parameters = self.parameters(device, parameters);
            let bindings = [(1, src), (2, dst), (3, numbers)];
            dispatch(device, encoder, &kernel, threads, &parameters, bindings);
        }
    }

    fn convert_kernel(
        &mut self,
        device: &wgpu::Device,
        variant: Variant,
        sharing: Sharing,
    ) -> Kernel {
        let kernel = self.convert.entry((variant, sharing)).or_insert_with(|| {
            let text = variant.source(sharing == Sharing::OneBuffer);
            let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some("batchline convert"),
                source: wgpu::ShaderSource::Wgsl(text.into()),
            });
            let source = storage(1, sharing == Sharing::Apart);
            let bindings = [storage(0, true), source, storage(2, false), storage(3, true)];
            let bindings = &bindings[..if variant.gathered { 4 } else { 3 }];
            kernel(device, "batchline convert", &module, bindings)
        });
        kernel.clone()
    }

    fn parameters(&mut self, device: &wgpu::Device, words: Vec<u32>) -> wgpu::Buffer {
        if let Some(buffer) = self.parameters.get(&words) {
            return buffer.clone();
        }
        let held: usize = self.parameters.keys().map(Vec::len).sum();
        if self.parameters.len() >= PARAMETERS || held + words.len() > PARAMETER_WORDS {
            // Flights keep the ones that they use.
            self.parameters.clear();
        }
        let bytes: &[u8] = bytemuck::cast_slice(&words);
        let buffer = device.create_buffer(&wgpu::BufferDescriptor {
            label: Some("batchline parameters"),
            size: bytes.len() as u64,
            usage: wgpu::BufferUsages::STORAGE,
            mapped_at_creation: true,
        });
        // A device that is lost maps nothing; the submission will say so.
        if let Ok(mut view) = buffer.slice(..).get_mapped_range_mut() {
            view.copy_from_slice(bytes);
        }
        buffer.unmap();
        self.parameters.insert(words, buffer.clone());
        buffer
    }
}

fn sharing(src: Place<'_>, dst: Place<'_>) -> Sharing {
    if src.buffer == dst.buffer { Sharing::OneBuffer } else { Sharing::Apart }
}

/// The number of threads, and the words that the kernel reads.
fn run_parameters(
    run: &Run,
    chunk: &Chunk,
    [src, dst]: [u32; 2],
    gather: [u32; 6],
) -> (u32, Vec<u32>) {
    let (_, to) = run.sizes();
    let threads = narrow((u64::from(chunk.elements) * to.min(4)).div_ceil(4));
    let header = [chunk.elements, threads, src, dst, run.channels, run.pixels, chunk.place, 0];
    debug_assert_eq!((header.len() + gather.len()) as u64, HEADER);
    let words = header.into_iter().chain(gather).chain(run.factors.iter().copied());
    (threads, words.collect())
}

fn fill_kernel(device: &wgpu::Device) -> Kernel {
    let module = device.create_shader_module(wgpu::include_wgsl!("fill.wgsl"));
    kernel(device, "batchline fill", &module, &[storage(0, true), storage(2, false)])
}

fn kernel(
    device: &wgpu::Device,
    label: &'static str,
    module: &wgpu::ShaderModule,
    bindings: &[wgpu::BindGroupLayoutEntry],
) -> Kernel {
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some(label),
        entries: bindings,
    });
    let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
        label: Some(label),
        bind_group_layouts: &[Some(&layout)],
        immediate_size: 0,
    });
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: Some(label),
        layout: Some(&pipeline_layout),
        module,
        entry_point: Some("main"),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    Kernel { pipeline, layout }
}

fn storage(binding: u32, read_only: bool) -> wgpu::BindGroupLayoutEntry {
    wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    }
}

fn dispatch<const N: usize>(
    device: &wgpu::Device,
    encoder: &mut wgpu::CommandEncoder,
    kernel: &Kernel,
    threads: u32,
    parameters: &wgpu::Buffer,
    windows: [(u32, Window<'_>); N],
) {
    let mut entries =
        vec![wgpu::BindGroupEntry { binding: 0, resource: parameters.as_entire_binding() }];
    entries.extend(windows.into_iter().map(|(binding, window)| {
        let resource = wgpu::BindingResource::Buffer(window.binding);
        wgpu::BindGroupEntry { binding, resource }
    }));
    let group = device.create_bind_group(&wgpu::BindGroupDescriptor {
        label: None,
        layout: &kernel.layout,
        entries: &entries,
    });
    let groups = threads.div_ceil(GROUP);
    let width = groups.min(device.limits().max_compute_workgroups_per_dimension).max(1);
    let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
    pass.set_pipeline(&kernel.pipeline);
    pass.set_bind_group(0, &group, &[]);
    pass.dispatch_workgroups(width, groups.div_ceil(width), 1);
}

#[allow(clippy::cast_possible_truncation, reason = "the plan keeps bindings below 2^31 bytes")]
fn narrow(number: u64) -> u32 {
    number as u32
}

#[allow(clippy::cast_possible_truncation, reason = "the lower half is what is wanted")]
fn lower(number: u64) -> u32 {
    number as u32
}
