//! Buffers of both kinds, and the turns that host and device take in a staging buffer.
//!
//! A staging buffer is mapped as a whole, always: *mapped* (the host's) → *in flight* (unmapped
//! right before the submission, mapping requested right after it) → *mapped* again, when the
//! submission is done and wgpu has called back.
#![allow(unsafe_code, reason = "promises that a mapped pointer is valid")]

use std::any::Any;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, AtomicU8, Ordering};

use super::health::{Health, scoped};
use crate::backend::{DeviceMemory, Direction, StagingMemory};
use crate::sync::Mutex;
use crate::{Error, Result};

/// Alignment of the pointer that [`StagingMemory`] promises. wgpu promises none.
const POINTER_ALIGNMENT: usize = 256;

/// Device memory: one buffer.
#[derive(Debug)]
pub(super) struct WgpuMemory {
    pub(super) buffer: wgpu::Buffer,
}

impl WgpuMemory {
    pub(super) fn new(device: &wgpu::Device, health: &Health, bytes: u64) -> Result<Self> {
        let size = size_of_buffer(device, "device memory", bytes, 0)?;
        let descriptor = wgpu::BufferDescriptor {
            label: Some("batchline device memory"),
            size,
            usage: wgpu::BufferUsages::STORAGE
                | wgpu::BufferUsages::COPY_SRC
                | wgpu::BufferUsages::COPY_DST,
            mapped_at_creation: false,
        };
        let (buffer, error) = scoped(device, || device.create_buffer(&descriptor));
        if let Some(error) = error {
            return Err(health.failed("allocating device memory", error));
        }
        probe(device, health)?;
        Ok(Self { buffer })
    }

    pub(super) fn of(memory: &dyn DeviceMemory) -> Option<&Self> {
        (memory as &dyn Any).downcast_ref()
    }
}

// SAFETY: `host_ptr` is `None`, so nothing is promised.
unsafe impl DeviceMemory for WgpuMemory {
    fn len(&self) -> u64 {
        self.buffer.size()
    }
}

/// Fails if the device is lost, which `create_buffer` doesn't tell; a mapping does.
pub(super) fn probe(device: &wgpu::Device, health: &Health) -> Result<()> {
    let descriptor = wgpu::BufferDescriptor {
        label: Some("batchline probe"),
        size: wgpu::MAP_ALIGNMENT,
        usage: wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: true,
    };
    let (mapped, error) = scoped(device, || {
        let buffer = device.create_buffer(&descriptor);
        buffer.slice(..).get_mapped_range_mut().is_ok()
    });
    match (mapped, error) {
        (true, _) => Ok(()),
        (false, Some(error @ wgpu::Error::OutOfMemory { .. })) => {
            Err(health.failed("mapping memory", error))
        }
        // Nothing else is wrong with such a buffer.
        (false, _) => Err(health.lose("a new buffer could not be mapped")),
    }
}

/// Page-locked memory: one buffer, mapped while it is the host's.
#[derive(Debug)]
pub(super) struct WgpuStaging {
    pub(super) mapping: Arc<Mapping>,
}

impl WgpuStaging {
    pub(super) fn new(
        device: &wgpu::Device,
        health: &Health,
        bytes: u64,
        direction: Direction,
    ) -> Result<Self> {
        let too_large = || Error::TooLarge {
            what: "staging memory".to_owned(),
            requested: bytes,
            limit_name: "the address space",
            limit: isize::MAX as u64,
        };
        let size = size_of_buffer(device, "staging memory", bytes, POINTER_ALIGNMENT as u64)?;
        let len = usize::try_from(size).map_err(|_| too_large())? - POINTER_ALIGNMENT;
        let upload = direction == Direction::Upload;
        let descriptor = wgpu::BufferDescriptor {
            label: Some("batchline staging memory"),
            size,
            usage: if upload {
                wgpu::BufferUsages::MAP_WRITE | wgpu::BufferUsages::COPY_SRC
            } else {
                wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST
            },
            // For a buffer to read from, this would be another piece of memory, copied on unmap.
            mapped_at_creation: upload,
        };
        let (start, error) = scoped(device, || {
            let buffer = device.create_buffer(&descriptor);
            if !upload {
                let answer = Answer::new();
                buffer.slice(..).map_async(wgpu::MapMode::Read, answer.reply());
                // Nothing uses the buffer, so one look at the device suffices; it is a look and
                // no wait, whatever other threads wait for at this time.
                super::flight::poll(device, wgpu::PollType::Poll).ok();
            }
            let start = locate(&buffer);
            start.map(|start| (buffer, start))
        });
        let (buffer, start) = match (start, error) {
            (Ok(mapped), None) => mapped,
            (_, Some(error @ wgpu::Error::OutOfMemory { .. })) => {
                return Err(health.failed("allocating staging memory", error));
            }
            (start, error) => {
                probe(device, health)?;
                let refused =
                    start.err().map(|error| health.failed("mapping staging memory", error));
                let error = error.map(|error| health.failed("allocating staging memory", error));
                return Err(error.or(refused).unwrap_or_else(|| health.lose("no reason given")));
            }
        };
        let pad = start.align_offset(POINTER_ALIGNMENT);
        let copyable = (pad as u64).is_multiple_of(wgpu::COPY_BUFFER_ALIGNMENT);
        if pad >= POINTER_ALIGNMENT || !copyable {
            let problem = std::io::Error::other(format!("mapped at {start:p}"));
            return Err(health.failed("aligning staging memory", problem));
        }
        let mapping = Mapping {
            buffer,
            direction,
            len,
            pad,
            start: AtomicPtr::new(start),
            request: Mutex::new(None),
        };
        Ok(Self { mapping: Arc::new(mapping) })
    }

    pub(super) fn of(memory: &dyn StagingMemory) -> Option<&Self> {
        (memory as &dyn Any).downcast_ref()
    }
}

// SAFETY: while no segment in flight names the memory, its buffer is mapped as a whole: it is
// mapped when made; only `Mapping::release` unmaps it, called by a submission that names it; and
// the segment's fence passes for the caller only after `Mapping::settle` found it mapped again.
// wgpu keeps the pages until the buffer is unmapped or dropped (views only guard against a second
// view, and are gone), zeroes them at the first mapping, and gives nobody else the buffer.
// `pad` and the 256 bytes more than `len` make the alignment. (A user who calls `Device::destroy`
// breaks this for every mapping of that device, as he does with wgpu's own views: module docs.)
unsafe impl StagingMemory for WgpuStaging {
    fn ptr(&self) -> NonNull<u8> {
        let start = self.mapping.start.load(Ordering::Acquire);
        NonNull::new(start.wrapping_add(self.mapping.pad)).unwrap_or(NonNull::dangling())
    }

    fn len(&self) -> usize {
        self.mapping.len
    }
}

/// The part of a staging buffer that a flight holds on to.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) buffer: wgpu::Buffer,
    direction: Direction,
    len: usize,
    /// Bytes of the buffer before the memory, so that its address is aligned.
    pad: usize,
    /// Where the buffer is mapped, or was last.
    start: AtomicPtr<u8>,
    /// The request under way, if the memory is not the host's.
    request: Mutex<Option<Answer>>,
}

impl Mapping {
    pub(super) fn direction(&self) -> Direction {
        self.direction
    }

    /// Where in the buffer the memory's byte `offset` is.
    pub(super) fn place(&self, offset: u64) -> u64 {
        self.pad as u64 + offset
    }

    /// Gives the memory to the device. In an error scope: a lost device fails here.
    pub(super) fn release(&self) {
        // Where an earlier segment in flight names it too, this takes back that one's request.
        self.buffer.unmap();
    }

    /// Asks for the memory as soon as `commands` are done.
    pub(super) fn request(&self, commands: &wgpu::CommandBuffer) -> Answer {
        let answer = Answer::new();
        *self.request.lock() = Some(answer.clone());
        let mode = match self.direction {
            Direction::Upload => wgpu::MapMode::Write,
            Direction::Download => wgpu::MapMode::Read,
        };
        commands.map_buffer_on_submit(&self.buffer, mode, .., answer.reply());
        answer
    }

    /// Whether the memory is the host's again, as far as the request with this answer goes.
    ///
    /// # Errors
    /// It can't be mapped: the device is lost.
    pub(super) fn settle(&self, answer: &Answer, health: &Health) -> Result<bool> {
        let mut request = self.request.lock();
        // A later segment took the memory over: its own flight waits for it.
        if !request.as_ref().is_some_and(|current| current.same(answer)) {
            return Ok(true);
        }
        match answer.get() {
            PENDING => return Ok(false),
            FAILED => return Err(health.lose("staging memory could not be mapped again")),
            // Also where wgpu forgot to call: whether the buffer is mapped is seen next.
            _ => {}
        }
        let start = locate(&self.buffer)
            .map_err(|error| health.lose(format!("staging memory: {error}")))?;
        if !start.wrapping_add(self.pad).addr().is_multiple_of(POINTER_ALIGNMENT) {
            return Err(health.lose("staging memory was mapped at another alignment"));
        }
        self.start.store(start, Ordering::Release);
        *request = None;
        Ok(true)
    }
}

/// The address that the buffer is mapped at.
fn locate(buffer: &wgpu::Buffer) -> Result<*mut u8, wgpu::MapRangeError> {
    // A view for writing gives the address without a reference to the bytes, for buffers to read
    // from as well. The view is dropped here: unmapping a buffer that has one panics.
    let mut view = buffer.slice(..).get_mapped_range_mut()?;
    Ok(view.slice(..).as_raw_element_ptr().as_ptr())
}

const PENDING: u8 = 0;
const MAPPED: u8 = 1;
const FAILED: u8 = 2;
const FORGOTTEN: u8 = 3;

/// What wgpu says to a request for a mapping. Holds no buffer, which wgpu holds the callback in.
#[derive(Debug, Clone)]
pub(super) struct Answer(Arc<AtomicU8>);

impl Answer {
    fn new() -> Self {
        Self(Arc::new(AtomicU8::new(PENDING)))
    }

    fn get(&self) -> u8 {
        self.0.load(Ordering::Acquire)
    }

    fn same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The callback. A panic inside wgpu may drop it without a call; that is an answer too.
    fn reply(&self) -> impl FnOnce(Result<(), wgpu::BufferAsyncError>) + Send + use<> {
        let reply = Reply(self.clone());
        move |result| {
            let answer = if result.is_ok() { MAPPED } else { FAILED };
            reply.0.0.store(answer, Ordering::Release);
        }
    }
}

struct Reply(Answer);

impl Drop for Reply {
    fn drop(&mut self) {
        let (then, now) = (Ordering::Release, Ordering::Relaxed);
        let _ = self.0.0.compare_exchange(PENDING, FORGOTTEN, then, now);
    }
}

/// The size of a buffer for `bytes` bytes and `more`: copies are of multiples of four.
fn size_of_buffer(device: &wgpu::Device, what: &str, bytes: u64, more: u64) -> Result<u64> {
    let limit = device.limits().max_buffer_size;
    bytes
        .max(1)
        .checked_next_multiple_of(wgpu::MAP_ALIGNMENT)
        .and_then(|size| size.checked_add(more))
        .filter(|size| *size <= limit)
        .ok_or_else(|| Error::TooLarge {
            what: what.to_owned(),
            requested: bytes,
            limit_name: "max_buffer_size",
            limit,
        })
}
