//! A segment becomes one submission.

use std::num::NonZeroU64;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::flight::{Flight, reclaim};
use super::health::scoped;
use super::kernels::Kernels;
use super::memory::{Mapping, WgpuMemory, WgpuStaging};
use super::{WgpuBackend, WgpuCustom, convert, foreign, gather, padded};
use crate::backend::{
    Command, Custom, DeviceMemory, Direction, GatherBy, GatherSpec, Region, RowSource, Segment,
    StagingMemory, SubmitError,
};
use crate::{Error, Result};

/// Bytes of the buffer that copies within one buffer go through: wgpu refuses the direct way.
const DETOUR: u64 = 4 << 20;

pub(super) fn submit(backend: &WgpuBackend, segment: Segment<'_, '_>) -> Result<(), SubmitError> {
    backend.health.check()?;
    backend.health.take_stray()?;
    if segment.fence.stream != 0 {
        return Err(Error::record("a segment", "wgpu has stream 0 only").into());
    }
    let mut enqueued = false;
    let run = AssertUnwindSafe(|| try_submit(backend, segment, &mut enqueued));
    match catch_unwind(run) {
        Ok(result) => result.map_err(|error| SubmitError { error, enqueued }),
        Err(payload) => {
            let mut error = Error::panicked("wgpu", &*payload);
            if enqueued {
                error = backend.health.lose(error.to_string());
            }
            Err(SubmitError { error, enqueued })
        }
    }
}

/// `enqueued` tells of an error whether something may have reached the device.
fn try_submit(backend: &WgpuBackend, segment: Segment<'_, '_>, enqueued: &mut bool) -> Result<()> {
    let (device, health) = (&backend.device, &*backend.health);
    let mut recorder = Recorder { backend, staging: Vec::new() };
    let (commands, error) = scoped(device, || -> Result<_> {
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor {
            label: Some("batchline segment"),
        });
        for command in segment.commands {
            recorder.record(&mut encoder, command)?;
        }
        Ok(encoder.finish())
    });
    if error.is_some() {
        // A pipeline may be among what failed.
        *backend.kernels.lock() = Kernels::default();
    }
    let commands = commands?;
    if let Some(error) = error {
        return Err(health.failed("recording commands", error));
    }

    // From here on the staging memory is the device's.
    *enqueued = true;
    let ((index, staging), error) = scoped(device, || {
        let mut staging = Vec::with_capacity(recorder.staging.len());
        for mapping in recorder.staging {
            mapping.release();
            let answer = mapping.request(&commands);
            staging.push((mapping, answer));
        }
        (backend.queue.submit([commands]), staging)
    });
    match error {
        None => {
            // A device lost meanwhile took nothing, without an error; so say the health, or the
            // first wait.
            health.check()?;
            backend.flights.push(Flight { value: segment.fence.value, index, staging });
            Ok(())
        }
        // What doesn't pass validation is not submitted. The mappings were requested all the same.
        Some(error @ wgpu::Error::Validation { .. }) => {
            health.check()?;
            reclaim(device, health, &staging)?;
            *enqueued = false;
            Err(health.failed("submitting commands", error))
        }
        Some(error) => Err(health.lose(format!("submitting commands: {error}"))),
    }
}

struct Recorder<'b> {
    backend: &'b WgpuBackend,
    /// Each staging buffer that the commands name, once.
    staging: Vec<Arc<Mapping>>,
}

impl Recorder<'_> {
    fn record(&mut self, encoder: &mut wgpu::CommandEncoder, command: Command<'_>) -> Result<()> {
        // Not locked over the user's work.
        let (device, kernels) = (&self.backend.device, &self.backend.kernels);
        match command {
            Command::Upload { src, src_offset, dst } => {
                let (src, start) = self.staging(src, Direction::Upload, src_offset, dst.len)?;
                let dst = Place::of(dst)?;
                encoder.copy_buffer_to_buffer(&src.buffer, start, dst.buffer, dst.offset, dst.size);
            }
            Command::Download { src, dst, dst_offset } => {
                let (dst, start) = self.staging(dst, Direction::Download, dst_offset, src.len)?;
                let src = Place::of(src)?;
                encoder.copy_buffer_to_buffer(src.buffer, src.offset, &dst.buffer, start, src.size);
            }
            Command::Copy { src, dst } => {
                copy(device, encoder, &mut kernels.lock(), Place::of(src)?, Place::of(dst)?);
            }
            Command::Fill { dst, element } => {
                let dst = Place::of(dst)?;
                if dst.size == 0 {
                    // wgpu clears to the end of the buffer where the size is not given.
                } else if element.iter().all(|byte| *byte == 0) {
                    encoder.clear_buffer(dst.buffer, dst.offset, Some(dst.size));
                } else {
                    kernels.lock().fill(device, encoder, dst, pattern(element)?);
                }
            }
            Command::Convert { src, dst, spec } => {
                match convert::plan(&device.limits(), src.len, dst.len, spec)? {
                    convert::Plan::Copy => {
                        copy(
                            device,
                            encoder,
                            &mut kernels.lock(),
                            Place::of(src)?,
                            Place::of(dst)?,
                        );
                    }
                    convert::Plan::Run(run) => {
                        let (src, dst) = (Place::of(src)?, Place::of(dst)?);
                        kernels.lock().convert(device, encoder, src, dst, &run);
                    }
                }
            }
            Command::Gather(spec) => self.gather(encoder, &spec)?,
            Command::Custom { work, reads, writes } => custom(encoder, work, &reads, &writes)?,
        }
        Ok(())
    }

    fn gather(&mut self, encoder: &mut wgpu::CommandEncoder, spec: &GatherSpec<'_>) -> Result<()> {
        if spec.by != GatherBy::Kernel {
            return Err(Error::record("a gather", "this device gathers by a kernel only"));
        }
        let device = &self.backend.device;
        if spec.rows == 0 {
            return Ok(());
        }
        let bytes = spec.rows.saturating_mul(gather::NUMBER);
        let (indices, start) =
            self.staging(spec.indices, Direction::Upload, spec.indices_offset, bytes)?;
        let mut kernels = self.backend.kernels.lock();
        let numbers = kernels.numbers(device, bytes);
        // The queue orders all users of the numbers, also those of segments before and after.
        encoder.copy_buffer_to_buffer(&indices.buffer, start, &numbers, 0, bytes);
        let numbers = Place { buffer: &numbers, offset: 0, size: bytes };
        for part in &spec.parts {
            let RowSource::Device(source) = part.source else {
                return Err(Error::record("a gather", "this device reads no memory of the host"));
            };
            if let Some(plan) = gather::plan(&device.limits(), spec.rows, part)? {
                let (src, dst) = (Place::of(source)?, Place::of(part.dst)?);
                kernels.gather(device, encoder, numbers, src, dst, &plan);
            }
        }
        Ok(())
    }

    /// The buffer, and where in it the memory's byte `offset` is.
    fn staging(
        &mut self,
        memory: &dyn StagingMemory,
        direction: Direction,
        offset: u64,
        len: u64,
    ) -> Result<(Arc<Mapping>, u64)> {
        let mapping = &WgpuStaging::of(memory).ok_or_else(foreign)?.mapping;
        if mapping.direction() != direction {
            let problem =
                format!("staging memory for {:?} is used the other way", mapping.direction());
            return Err(Error::record("a transfer", problem));
        }
        check(offset, len, memory.len() as u64)?;
        if !self.staging.iter().any(|known| Arc::ptr_eq(known, mapping)) {
            self.staging.push(Arc::clone(mapping));
        }
        Ok((Arc::clone(mapping), mapping.place(offset)))
    }
}

/// A region as wgpu takes it: the size is a multiple of 4.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) buffer: &'a wgpu::Buffer,
    pub(super) offset: u64,
    pub(super) size: u64,
}

impl<'a> Place<'a> {
    fn of(region: Region<'a>) -> Result<Self> {
        let buffer = &WgpuMemory::of(region.memory).ok_or_else(foreign)?.buffer;
        check(region.offset, region.len, buffer.size())?;
        Ok(Self { buffer, offset: region.offset, size: padded(region.len) })
    }
}

fn check(offset: u64, len: u64, size: u64) -> Result<()> {
    if !offset.is_multiple_of(wgpu::COPY_BUFFER_ALIGNMENT) {
        let problem = format!("its offset {offset} is no multiple of 4, as wgpu demands");
        return Err(Error::record("a command", problem));
    }
    let end = len.checked_next_multiple_of(4).and_then(|len| offset.checked_add(len));
    if end.is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(Error::record("a command", format!("{len} bytes at {offset} go past {size} bytes")))
}

fn copy(
    device: &wgpu::Device,
    encoder: &mut wgpu::CommandEncoder,
    kernels: &mut Kernels,
    src: Place<'_>,
    dst: Place<'_>,
) {
    if src.buffer != dst.buffer {
        let size = src.size.min(dst.size);
        encoder.copy_buffer_to_buffer(src.buffer, src.offset, dst.buffer, dst.offset, size);
        return;
    }
    // The queue orders all users of the detour, also those of segments before and after.
    let detour = kernels.detour(device, DETOUR);
    let mut start = 0;
    while start < src.size {
        let size = DETOUR.min(src.size - start);
        encoder.copy_buffer_to_buffer(src.buffer, src.offset + start, detour, 0, size);
        encoder.copy_buffer_to_buffer(detour, 0, dst.buffer, dst.offset + start, size);
        start += size;
    }
}

/// The element repeated to eight bytes.
fn pattern(element: &[u8]) -> Result<[u8; 8]> {
    let mut pattern = [0; 8];
    if !matches!(element.len(), 1 | 2 | 4 | 8) {
        return Err(Error::record("a fill", format!("of elements of {} bytes", element.len())));
    }
    for piece in pattern.chunks_exact_mut(element.len()) {
        piece.copy_from_slice(element);
    }
    Ok(pattern)
}

fn custom(
    encoder: &mut wgpu::CommandEncoder,
    work: &mut Option<Custom>,
    reads: &[Region<'_>],
    writes: &[Region<'_>],
) -> Result<()> {
    if !matches!(work, Some(Custom::Wgpu(_))) {
        return Err(Error::record("a custom operation", "this device takes Custom::Wgpu"));
    }
    let reads = reads.iter().map(|region| binding(*region)).collect::<Result<_>>()?;
    let writes = writes.iter().map(|region| binding(*region)).collect::<Result<_>>()?;
    let Some(Custom::Wgpu(work)) = work.take() else {
        return Ok(());
    };
    let run = AssertUnwindSafe(|| work(WgpuCustom { encoder, reads, writes }));
    match catch_unwind(run) {
        Ok(Ok(())) => Ok(()),
        Ok(Err(source)) => Err(Error::User { who: "a custom operation", source: source.into() }),
        Err(payload) => Err(Error::panicked("a custom operation", &*payload)),
    }
}

fn binding<'a>(region: Region<'a>) -> Result<wgpu::BufferBinding<'a>> {
    let memory: &'a dyn DeviceMemory = region.memory;
    let place = Place::of(Region { memory, ..region })?;
    if place.size == 0 {
        // Without a size, a binding goes on to the end of the buffer.
        return Err(Error::record("a custom operation", "wgpu binds no empty tensors"));
    }
    Ok(wgpu::BufferBinding {
        buffer: place.buffer,
        offset: place.offset,
        size: NonZeroU64::new(place.size),
    })
}
