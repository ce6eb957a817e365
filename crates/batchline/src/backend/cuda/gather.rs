//! Rows that the device fetches by itself: a copy each, all enqueued by one call of the driver, or
//! one launch of a kernel.
#![allow(unsafe_code, reason = "calls the driver with addresses of memory that segments name")]

use smallvec::SmallVec;

use super::context::{Context, Entered};
use super::driver::{self, Address, code};
use super::execute::{Encoder, foreign, within};
use super::kernels::{FUSED, Rows};
use super::registered::CudaRegistered;
use crate::backend::{
    ConvertSpec, GatherBy, GatherPart, GatherSpec, Gathers, MAX_PARTS, RowSource, StagingMemory,
};
use crate::{Error, Result};

/// From this length on rows of the host come faster by copies than by a kernel. On an H100 (PCIe 5.0
/// x16, `BENCHMARKS.md`) copies brought rows of 48 KiB at 46 to 52 GB/s, those of 147 KiB at 51 to 53,
/// and those of 16 KiB at 16 to 28; the kernel brought all of them at 44 to 48.
const LONG_ROW: u64 = 48 << 10;

/// The same where the driver takes one copy a call, which costs 2 us or more: an estimate, as the
/// drivers that were at hand take many.
const VERY_LONG_ROW: u64 = 2 << 20;

/// What a device can gather.
pub(super) fn abilities(context: &Context) -> Gathers {
    if !context.runs_kernels {
        return Gathers::default();
    }
    let long = if context.driver.batch.is_some() { LONG_ROW } else { VERY_LONG_ROW };
    Gathers {
        from_host: context.host_access.registers,
        from_device: context.info.max_allocation,
        copies_from: Some(long),
        fused: FUSED,
    }
}

pub(super) fn gather(encoder: &mut Encoder<'_>, spec: &GatherSpec<'_>) -> Result<()> {
    let numbers = Numbers::of(encoder, spec)?;
    if spec.parts.len() > MAX_PARTS {
        return Err(wrong("a gather has at most four tensors"));
    }
    let mut parts = SmallVec::<[Part<'_>; MAX_PARTS]>::new();
    for (place, part) in spec.parts.iter().enumerate() {
        let fetched = Part::of(encoder, spec, &numbers, part)?;
        if part.convert.is_some() && (place > 0 || spec.by != GatherBy::Kernel) {
            return Err(wrong("only the first tensor is converted, and only by a kernel"));
        }
        if fetched.row_bytes > 0 && spec.rows > 0 {
            parts.push(fetched);
        }
    }
    if parts.is_empty() {
        return Ok(());
    }
    match spec.by {
        GatherBy::Copies => parts.iter().try_for_each(|part| copy(encoder, numbers.all, part)),
        GatherBy::Kernel => {
            let indices = numbers.device.ok_or_else(|| wrong("kernels can't read its numbers"))?;
            // What has no bytes was left out, so this is the first one's.
            let convert = parts[0].convert;
            let rows: SmallVec<[Rows; MAX_PARTS]> = parts.iter().map(Part::rows).collect();
            encoder.issued = true;
            let (entered, stream) = (encoder.entered, encoder.stream);
            let kernels = &encoder.backend.kernels;
            kernels.gather(entered, stream, (indices, spec.rows), &rows, convert)
        }
    }
}

fn wrong(problem: &str) -> Error {
    Error::record("a gather", problem)
}

fn overflow() -> Error {
    Error::Overflow { what: "a gather".to_owned() }
}

/// The numbers of the rows.
struct Numbers<'s> {
    all: &'s [u64],
    /// Where kernels find them.
    device: Option<Address>,
}

impl<'s> Numbers<'s> {
    fn of(encoder: &Encoder<'_>, spec: &GatherSpec<'s>) -> Result<Self> {
        let bytes = spec.rows.checked_mul(8).ok_or_else(overflow)?;
        let (staging, start, _) = encoder.staging(spec.indices, spec.indices_offset, bytes)?;
        if !start.is_multiple_of(8) {
            return Err(wrong("its numbers must be aligned"));
        }
        let rows = usize::try_from(spec.rows).map_err(|_| overflow())?;
        // SAFETY: within the memory, whose bounds were checked.
        let first = unsafe { staging.ptr().add(start) };
        // SAFETY: initialised, aligned, and nobody's but this segment's until its fence has passed;
        // the device only reads it.
        let all = unsafe { std::slice::from_raw_parts(first.as_ptr().cast::<u64>(), rows) };
        Ok(Self { all, device: staging.device.map(|device| device + start as u64) })
    }
}

/// One tensor, checked.
struct Part<'s> {
    /// The address that copies know the first row by.
    source: Address,
    /// The address that kernels do.
    mapped: Address,
    /// Addresses that a copy must not cross.
    bounds: &'s [usize],
    from_host: bool,
    target: Address,
    row_bytes: u64,
    convert: Option<&'s ConvertSpec>,
}

impl<'s> Part<'s> {
    fn of(
        encoder: &Encoder<'_>,
        spec: &GatherSpec<'_>,
        numbers: &Numbers<'_>,
        part: &GatherPart<'s>,
    ) -> Result<Self> {
        let fetched = spec.rows.checked_mul(part.row_bytes).ok_or_else(overflow)?;
        // Who commands promises it. To look at all of them here would take as long as the rest of a
        // submission: they lie in the caches of whoever wrote them.
        let rows = part.source.len().checked_div(part.row_bytes).unwrap_or(u64::MAX);
        debug_assert!(numbers.all.iter().all(|number| *number < rows), "rows that are not there");
        let target = encoder.device(part.dst)?;
        let (made, convert) = match part.convert {
            Some(convert) => (converted(convert, fetched, part.row_bytes)?, Some(convert)),
            None => (fetched, None),
        };
        within(0, made, part.dst.len)?;
        let (source, mapped, bounds, from_host) = match part.source {
            RowSource::Device(region) => {
                let address = encoder.device(region)?;
                (address, address, &[][..], false)
            }
            RowSource::Host(memory) => {
                let registered = CudaRegistered::of(memory);
                let registered = registered.filter(|memory| memory.is_of(encoder.context()));
                let registered = registered.ok_or_else(foreign)?;
                let source = registered.address() as Address;
                (source, registered.device, registered.bounds(), true)
            }
        };
        let row_bytes = part.row_bytes;
        Ok(Self { source, mapped, bounds, from_host, target, row_bytes, convert })
    }

    fn rows(&self) -> Rows {
        Rows { source: self.mapped, target: self.target, row_bytes: self.row_bytes }
    }
}

/// Bytes that a conversion of all rows makes, where the kernel can do it row by row.
fn converted(spec: &ConvertSpec, fetched: u64, row_bytes: u64) -> Result<u64> {
    let image = spec.channels.checked_mul(spec.pixels).ok_or_else(overflow)?;
    let whole = image > 0 && row_bytes.is_multiple_of(image);
    let by_image = spec.is_affine() || spec.source_order != spec.target_order;
    let fits = FUSED.contains(&(spec.from, spec.to)) && spec.elements == fetched;
    if !fits || by_image && !whole {
        return Err(wrong("its kernel does not do this conversion row by row"));
    }
    let factors = |list: &[f32]| !spec.is_affine() || list.len() as u64 == spec.channels;
    if !factors(&spec.scale) || !factors(&spec.bias) {
        return Err(wrong("a conversion has a factor and a summand for each channel"));
    }
    spec.elements.checked_mul(spec.to.size() as u64).ok_or_else(overflow)
}

/// Copies, as the driver takes them. The lists are kept, so that batches which are alike allocate
/// nothing.
#[derive(Debug, Default)]
pub(super) struct Copies {
    targets: Vec<Address>,
    sources: Vec<Address>,
    lens: Vec<usize>,
}

impl Copies {
    fn clear(&mut self) {
        self.targets.clear();
        self.sources.clear();
        self.lens.clear();
    }

    /// Adds a copy, cut where it must not cross. What follows on the one before becomes part of it.
    fn push(&mut self, mut source: Address, mut target: Address, len: usize, bounds: &[usize]) {
        let end = source + len as u64;
        let mut next = bounds.partition_point(|bound| *bound as Address <= source);
        let starts_piece = next > 0 && bounds[next - 1] as Address == source;
        let mut follows = !starts_piece && self.ends_at(source, target);
        while source < end {
            let bound = bounds.get(next).map_or(end, |bound| end.min(*bound as Address));
            let part = usize::try_from(bound - source).expect("part of a length");
            match self.lens.last_mut().filter(|_| follows) {
                Some(last) => *last += part,
                None => {
                    self.targets.push(target);
                    self.sources.push(source);
                    self.lens.push(part);
                }
            }
            follows = false;
            (source, target, next) = (bound, target + part as u64, next + 1);
        }
    }

    /// Whether the last copy ends at both of these.
    fn ends_at(&self, source: Address, target: Address) -> bool {
        match (self.sources.last(), self.targets.last(), self.lens.last()) {
            (Some(from), Some(to), Some(len)) => {
                let len = *len as u64;
                from + len == source && to + len == target
            }
            _ => false,
        }
    }

    /// Enqueues them all.
    fn run(
        &mut self,
        entered: &Entered<'_>,
        stream: driver::Stream,
        from_host: bool,
    ) -> Result<()> {
        const WHAT: &str = "copying rows to the device";
        let driver = entered.driver();
        if let Some(batch) = driver.batch {
            // SAFETY: checked against the memory's length by the caller, and kept until the
            // segment's fence has passed.
            let code =
                unsafe { batch.copy(&mut self.targets, &mut self.sources, &mut self.lens, stream) };
            // Where the system can't, each goes by itself.
            if code != code::NOT_SUPPORTED {
                return entered.call(WHAT, code);
            }
        }
        let copies = self.targets.iter().zip(&self.sources).zip(&self.lens);
        for ((target, source), len) in copies {
            let code = if from_host {
                let source = *source as *const std::ffi::c_void;
                // SAFETY: as above.
                unsafe { (driver.cuMemcpyHtoDAsync_v2)(*target, source, *len, stream) }
            } else {
                // SAFETY: as above; no tensor is gathered from itself.
                unsafe { (driver.cuMemcpyDtoDAsync_v2)(*target, *source, *len, stream) }
            };
            entered.call(WHAT, code)?;
        }
        Ok(())
    }
}

fn copy(encoder: &mut Encoder<'_>, numbers: &[u64], part: &Part<'_>) -> Result<()> {
    let len = usize::try_from(part.row_bytes).map_err(|_| overflow())?;
    let mut copies = encoder.backend.copies.lock();
    copies.clear();
    let mut target = part.target;
    for number in numbers {
        copies.push(part.source + number * part.row_bytes, target, len, part.bounds);
        target += part.row_bytes;
    }
    encoder.issued = true;
    copies.run(encoder.entered, encoder.stream, part.from_host)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_cut_at_bounds_and_joined_elsewhere() {
        let mut copies = Copies::default();
        let mut all = |rows: &[(u64, u64)], bounds: &[usize]| {
            copies.clear();
            rows.iter().for_each(|&(source, target)| copies.push(source, target, 10, bounds));
            let copies = copies.sources.iter().zip(&copies.targets).zip(&copies.lens);
            copies.map(|((source, target), len)| (*source, *target, *len)).collect::<Vec<_>>()
        };
        assert_eq!(all(&[(100, 0), (150, 10)], &[]), [(100, 0, 10), (150, 10, 10)]);
        assert_eq!(all(&[(100, 0), (110, 10), (120, 30)], &[]), [(100, 0, 20), (120, 30, 10)]);
        // A row across one bound, across two, up to one, and from one on.
        assert_eq!(all(&[(100, 0)], &[90, 103, 200]), [(100, 0, 3), (103, 3, 7)]);
        assert_eq!(all(&[(100, 0)], &[103, 105]), [(100, 0, 3), (103, 3, 2), (105, 5, 5)]);
        assert_eq!(all(&[(100, 0), (110, 10)], &[110]), [(100, 0, 10), (110, 10, 10)]);
        assert_eq!(all(&[(90, 0), (100, 10)], &[95]), [(90, 0, 5), (95, 5, 15)]);
        assert_eq!(all(&[(90, 0), (100, 10)], &[105]), [(90, 0, 15), (105, 15, 5)]);
    }
}
