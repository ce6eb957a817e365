//! Plans a gather: a conversion, if only of a type to itself, whose source is picked row by row.
//!
//! A source may be larger than a binding. Each dispatch then runs once for every window of the
//! source, and writes those elements that lie in it. So rows may straddle windows, and be longer
//! than one.

use std::ops::Range;

use super::convert::{self, Run, WIDEST, bindable, word};
use crate::backend::{ChannelOrder, ConvertSpec, GatherPart};
use crate::{DType, Error, Result};

/// Bytes of a row's number.
pub(super) const NUMBER: u64 = 8;

/// The conversions that a gather does on the way. The kernel could do any.
pub(super) const FUSED: &[(DType, DType)] = &[
    (DType::U8, DType::F32),
    (DType::U8, DType::F16),
    (DType::U8, DType::BF16),
    (DType::F32, DType::F16),
    (DType::F32, DType::BF16),
];

/// What the gather of one tensor comes to.
#[derive(Debug, PartialEq)]
pub(super) struct Plan {
    pub(super) run: Run,
    /// Elements of a row.
    pub(super) row: u32,
    /// The source, in elements: adjacent, each as much as a binding holds.
    pub(super) windows: Vec<Range<u64>>,
}

/// `None` where there is nothing to do.
pub(super) fn plan(
    limits: &wgpu::Limits,
    rows: u64,
    part: &GatherPart<'_>,
) -> Result<Option<Plan>> {
    let too_long = || refused(format!("{rows} rows of {} bytes are too many", part.row_bytes));
    let bytes = rows.checked_mul(part.row_bytes).ok_or_else(too_long)?;
    let plain;
    let spec = match part.convert {
        Some(spec) => spec,
        None => {
            plain = as_it_is(bytes, part.row_bytes);
            &plain
        }
    };
    convert::check(bytes, part.dst.len, spec)?;
    if bytes == 0 {
        return Ok(None);
    }
    let size = spec.from.size() as u64;
    if !part.row_bytes.is_multiple_of(size) {
        return Err(refused(format!("a row of {} bytes of {}", part.row_bytes, spec.from)));
    }
    // The kernel adds a place in a row and an index below `WIDEST`.
    let row = part.row_bytes / size;
    if row > WIDEST {
        return Err(refused(format!("a row of {} bytes is too long", part.row_bytes)));
    }
    // The numbers of a dispatch's rows, of which the first and the last may be begun, are bound too.
    let most = (bindable(limits) / NUMBER).saturating_sub(2).saturating_mul(row);
    let mut run = convert::run(limits, most, spec)?;
    run.variant.gathered = true;
    Ok(Some(Plan {
        run,
        row: word(row)?,
        windows: windows(limits, part.source.len() / size, size),
    }))
}

/// A conversion that leaves the bytes as they are, by the largest elements that rows consist of.
fn as_it_is(bytes: u64, row_bytes: u64) -> ConvertSpec {
    let dtype = match row_bytes.trailing_zeros() {
        0 => DType::U8,
        1 => DType::I16,
        2 => DType::I32,
        _ => DType::I64,
    };
    ConvertSpec {
        from: dtype,
        to: dtype,
        elements: bytes / dtype.size() as u64,
        channels: 1,
        pixels: 1,
        source_order: ChannelOrder::Nhwc,
        target_order: ChannelOrder::Nhwc,
        scale: [].into(),
        bias: [].into(),
    }
}

/// Each starts at an address that any element may lie at.
fn windows(limits: &wgpu::Limits, elements: u64, size: u64) -> Vec<Range<u64>> {
    let most = (bindable(limits) / 256 * 256).max(256) / size;
    let starts = (0..elements.div_ceil(most)).map(|window| window * most);
    starts.map(|start| start..elements.min(start + most)).collect()
}

fn refused(problem: String) -> Error {
    Error::record("a gather", problem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::host::HostMemory;
    use crate::backend::{Region, RowSource};

    /// A plan for that many rows out of a source of `source` bytes.
    fn plan_of(source: u64, rows: u64, row_bytes: u64) -> Result<Option<Plan>> {
        let memory = HostMemory::new("a test", 1).unwrap();
        let region = |len| Region { memory: &memory, offset: 0, len };
        let part = GatherPart {
            source: RowSource::Device(region(source)),
            row_bytes,
            dst: region(rows.saturating_mul(row_bytes)),
            convert: None,
        };
        plan(&wgpu::Limits::default(), rows, &part)
    }

    #[test]
    fn windows_cover_the_source_and_fit_a_binding() {
        let plan = plan_of(1 << 40, 100, 150_528).unwrap().unwrap();
        let mut next = 0;
        for window in &plan.windows {
            assert_eq!((window.start, window.start % 32), (next, 0));
            assert!((window.end - window.start) * 8 + 256 <= 128 << 20);
            next = window.end;
        }
        assert_eq!(next, 1 << 37);
        assert_eq!((plan.row, plan.run.chunks.len()), (150_528 / 8, 1));
        let small = plan_of(100 << 20, 100, 784).unwrap().unwrap();
        assert_eq!((small.windows.len(), &small.windows[0]), (1, &(0..100 << 17)));
    }

    /// The numbers of a dispatch's rows are as many as a binding holds.
    #[test]
    fn short_rows_go_in_parts() {
        let plan = plan_of(1 << 30, 50 << 20, 1).unwrap().unwrap();
        let chunks = &plan.run.chunks;
        assert!(chunks.iter().all(|chunk| u64::from(chunk.elements) * 8 + 256 <= 128 << 20));
        assert_eq!(chunks.iter().map(|chunk| u64::from(chunk.elements)).sum::<u64>(), 50 << 20);
    }

    #[test]
    fn rows_of_nothing_are_no_work() {
        assert_eq!(plan_of(0, 100, 0).unwrap(), None);
        assert_eq!(plan_of(100, 0, 4).unwrap(), None);
    }

    #[test]
    fn rows_that_the_kernel_can_not_count_are_refused() {
        assert!(plan_of(1 << 40, 3, WIDEST + 1).is_err());
        assert!(plan_of(1 << 40, 1 << 40, 1 << 40).is_err());
        assert!(plan_of(1 << 40, 1, WIDEST * 8).is_ok());
    }
}
