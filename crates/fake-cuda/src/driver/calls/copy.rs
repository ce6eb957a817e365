//! Copies and fills.
//!
//! The driver looks at addresses when it is called, and refuses those that it can't use with
//! `CUDA_ERROR_INVALID_VALUE`; so does this, and it notes a violation. Ordinary memory of the host
//! is refused by copies that go on after the call, except with the setting `pageable`.

use crate::arguments::{In, Out};
use crate::codes::{INVALID_VALUE, Result, STREAM_CAPTURE_UNSUPPORTED};
use crate::driver::memory::{Block, Kind, Place};
use crate::driver::work::{Source, Transfer, Work, read};
use crate::driver::{Driver, driver};

/// What an address must be.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Device,
    Host,
    /// As the address tells.
    Either,
}

impl Driver {
    /// The memory of a range, if it is of this side.
    fn place(&mut self, symbol: &str, address: usize, len: usize, side: Side) -> Result<Place> {
        let found = self.memory.find(address, len).and_then(|place| {
            let on_device = place.block.kind == Kind::Device;
            match (side, on_device) {
                (Side::Device, false) | (Side::Host, true) => {
                    Err(format!("memory at {address:#x} is {}", place.block.kind.name()))
                }
                _ => Ok(place),
            }
        });
        found.map_err(|fault| {
            self.violation(format!("{symbol}: {fault}"));
            INVALID_VALUE
        })
    }

    /// Where a copy may write.
    fn writable(&mut self, symbol: &str, address: usize, len: usize, side: Side) -> Result<Place> {
        let place = self.place(symbol, address, len, side)?;
        if place.block.kind == (Kind::Registered { read_only: true }) {
            self.violation(format!("{symbol}: memory at {address:#x} is registered for reading"));
            return Err(INVALID_VALUE);
        }
        Ok(place)
    }

    fn copy(
        &mut self,
        symbol: &str,
        (to, to_side): (usize, Side),
        (from, from_side): (usize, Side),
        len: usize,
        stream: usize,
    ) -> Result<()> {
        let stream = self.stream(stream)?;
        if len == 0 {
            return Ok(());
        }
        let ordinary = self.ordinary(to, len).filter(|_| to_side == Side::Host);
        let down = ordinary.is_some();
        let to = match ordinary {
            Some(to) => to,
            None => self.writable(symbol, to, len, to_side)?,
        };
        let from = match self.ordinary(from, len) {
            // The driver has read it when the call returns.
            Some(from) if from_side == Side::Host => Source::Bytes(read(&from, len)),
            _ => Source::Place(self.place(symbol, from, len, from_side)?),
        };
        self.submit(stream, Work::Copy(Transfer { from, to, len }))?;
        // And has written it.
        if down { self.wait_for_stream(stream) } else { Ok(()) }
    }

    /// Ordinary memory of the host, where copies that go on after the call take it.
    fn ordinary(&self, address: usize, len: usize) -> Option<Place> {
        let known = self.memory.touching(address, len).is_some() || self.memory.was_freed(address);
        if known || address == 0 || !self.settings.pageable {
            return None;
        }
        let block = Block::foreign(address, len, Kind::Ordinary, self.context);
        Some(Place { block, address })
    }

    /// A copy that is over when the call returns: the host's memory may be of any kind.
    fn copy_now(
        &mut self,
        symbol: &str,
        device: usize,
        host: usize,
        len: usize,
        up: bool,
    ) -> Result<()> {
        self.unsafe_in_captures()?;
        if len == 0 {
            return Ok(());
        }
        if host == 0 {
            return Err(INVALID_VALUE);
        }
        let place = self.place(symbol, device, len, Side::Device)?;
        let memory = Block::foreign(host, len, Kind::Ordinary, self.context);
        let other = Place { block: memory, address: host };
        let (from, to) = if up { (other, place) } else { (place, other) };
        let stream = self.stream(0)?;
        self.enqueue(stream, Work::Copy(Transfer { from: Source::Place(from), to, len }), &[])?;
        self.wait_for_stream(stream)
    }

    fn fill(
        &mut self,
        symbol: &str,
        to: usize,
        bytes: &[u8],
        count: usize,
        stream: usize,
    ) -> Result<()> {
        let stream = self.stream(stream)?;
        let width = bytes.len();
        if count == 0 {
            return Ok(());
        }
        let len =
            count.checked_mul(width).filter(|_| to.is_multiple_of(width)).ok_or(INVALID_VALUE)?;
        let to = self.writable(symbol, to, len, Side::Device)?;
        let mut element = [0; 4];
        element[..width].copy_from_slice(bytes);
        self.submit(stream, Work::Fill { to, element, width, count })
    }
}

driver! {
    fn cuMemcpyHtoDAsync_v2(to: usize, from: usize, len: usize, stream: usize)
        needs Context |driver|
    {
        let symbol = "cuMemcpyHtoDAsync_v2";
        driver.copy(symbol, (to, Side::Device), (from, Side::Host), len, stream)
    }

    fn cuMemcpyDtoHAsync_v2(to: usize, from: usize, len: usize, stream: usize)
        needs Context |driver|
    {
        let symbol = "cuMemcpyDtoHAsync_v2";
        driver.copy(symbol, (to, Side::Host), (from, Side::Device), len, stream)
    }

    fn cuMemcpyDtoDAsync_v2(to: usize, from: usize, len: usize, stream: usize)
        needs Context |driver|
    {
        let symbol = "cuMemcpyDtoDAsync_v2";
        driver.copy(symbol, (to, Side::Device), (from, Side::Device), len, stream)
    }

    fn cuMemcpyHtoD_v2(to: usize, from: usize, len: usize) needs Context |driver| {
        driver.copy_now("cuMemcpyHtoD_v2", to, from, len, true)
    }

    fn cuMemcpyDtoH_v2(to: usize, from: usize, len: usize) needs Context |driver| {
        driver.copy_now("cuMemcpyDtoH_v2", from, to, len, false)
    }

    fn cuMemsetD8Async(to: usize, value: u8, count: usize, stream: usize) needs Context |driver| {
        driver.fill("cuMemsetD8Async", to, &value.to_ne_bytes(), count, stream)
    }

    fn cuMemsetD16Async(to: usize, value: u16, count: usize, stream: usize) needs Context |driver| {
        driver.fill("cuMemsetD16Async", to, &value.to_ne_bytes(), count, stream)
    }

    fn cuMemsetD32Async(to: usize, value: u32, count: usize, stream: usize) needs Context |driver| {
        driver.fill("cuMemsetD32Async", to, &value.to_ne_bytes(), count, stream)
    }

    fn cuMemcpyBatchAsync(
        to: In<usize>,
        from: In<usize>,
        lens: In<usize>,
        count: usize,
        attributes: In<Attributes>,
        starts: In<usize>,
        groups: usize,
        failed: Out<usize>,
        stream: usize,
    ) needs Context |driver| {
        driver.demand("cuMemcpyBatchAsync", FIRST_BATCH)?;
        let mut at = usize::MAX;
        let batch = Batch { to, from, lens, count, attributes, starts, groups };
        let result = driver.batch("cuMemcpyBatchAsync", &batch, stream, &mut at);
        if result.is_err() && !failed.is_null() {
            failed.set(at)?;
        }
        result
    }

    fn cuMemcpyBatchAsync_v2(
        to: In<usize>,
        from: In<usize>,
        lens: In<usize>,
        count: usize,
        attributes: In<Attributes>,
        starts: In<usize>,
        groups: usize,
        stream: usize,
    ) needs Context |driver| {
        driver.demand("cuMemcpyBatchAsync_v2", SECOND_BATCH)?;
        let batch = Batch { to, from, lens, count, attributes, starts, groups };
        driver.batch("cuMemcpyBatchAsync_v2", &batch, stream, &mut 0)
    }
}

/// The drivers that batches came with.
pub(super) const FIRST_BATCH: i32 = 12080;
pub(super) const SECOND_BATCH: i32 = 13000;

/// `CUmemcpyAttributes`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attributes {
    /// When sources are read: 1 in the stream's order, 2 during the call, 3 at any time.
    order: u32,
    /// Where memory is: kind and number.
    hints: [[u32; 2]; 2],
    flags: u32,
}

/// The arguments of a batch.
struct Batch {
    to: In<usize>,
    from: In<usize>,
    lens: In<usize>,
    count: usize,
    attributes: In<Attributes>,
    /// At which copy each of the attributes begins to hold.
    starts: In<usize>,
    groups: usize,
}

impl Driver {
    /// `at` is told which copy is wrong, where it is one.
    fn batch(&mut self, symbol: &str, batch: &Batch, stream: usize, at: &mut usize) -> Result<()> {
        let own = self.context;
        let legacy = self.contexts.get(&own).map(|context| context.legacy);
        let handle = self.stream(stream)?;
        if Some(handle) == legacy {
            self.violation(format!("{symbol}: on the legacy default stream"));
            return Err(INVALID_VALUE);
        }
        if self.captures.contains_key(&handle) {
            self.not_captured(handle)?;
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        let attributes = batch.attributes.read(batch.groups)?;
        let starts = batch.starts.read(batch.groups)?;
        let sorted = starts.is_sorted_by(|one, next| one < next);
        let ordered = attributes.iter().all(|each| (1..=3).contains(&each.order));
        if starts.first() != Some(&0)
            || !sorted
            || starts.iter().any(|start| *start >= batch.count)
            || !ordered
        {
            return Err(INVALID_VALUE);
        }
        let (to, from) = (batch.to.read(batch.count)?, batch.from.read(batch.count)?);
        let mut copies = Vec::new();
        for (index, len) in batch.lens.read(batch.count)?.into_iter().enumerate() {
            *at = index;
            if len == 0 {
                self.violation(format!("{symbol}: copy {index} is empty"));
                return Err(INVALID_VALUE);
            }
            let group = starts.partition_point(|start| *start <= index) - 1;
            let order = attributes[group].order;
            let to = self.writable(symbol, to[index], len, Side::Either)?;
            let ordinary = order == 2 && self.memory.around(from[index]).is_none();
            let from = if ordinary && !self.memory.was_freed(from[index]) && from[index] != 0 {
                let block = Block::foreign(from[index], len, Kind::Ordinary, own);
                Place { block, address: from[index] }
            } else {
                self.place(symbol, from[index], len, Side::Either)?
            };
            // At any time: it may well be read before what was queued earlier is done.
            let early = order == 2 || order == 3 && self.random.below(2) == 0;
            let from = if early { Source::Bytes(read(&from, len)) } else { Source::Place(from) };
            copies.push(Transfer { from, to, len });
        }
        *at = usize::MAX;
        self.enqueue(handle, Work::Batch(copies), &[]).map(drop)
    }
}
