//! Rows that the device fetches by itself, told only which. A device that can't is asked for
//! nothing but to say so.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{bytes, wait_until};
use crate::backend::host::execute::fetch;
use crate::backend::{ChannelOrder, ConvertSpec, GatherBy, MAX_PARTS};
use crate::command::{GatherParts, Source};
use crate::memory::Registered;
use crate::plan::mix;
use crate::source::TENSOR_ALIGNMENT;
use crate::{
    BoxError, CommandBuffer, CommandBufferPool, Conversion, DType, Dataset, Device, Error,
    FnDataset, MemoryLimits, MemoryManager, SampleMut, SampleSpec, Shape, StagingBuffer,
    StagingBufferPool, Submission, Tensor,
};

/// Numbers that a slot has room for.
const MOST_NUMBERS: u64 = 300;

/// How rows can be fetched.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Way {
    from_host: bool,
    by: GatherBy,
}

/// All that the device says it can.
fn ways(device: &Device) -> Vec<Way> {
    let gathers = device.core().backend().gathers();
    let can = [
        (gathers.from_device > 0, Way { from_host: false, by: GatherBy::Kernel }),
        (gathers.from_host, Way { from_host: true, by: GatherBy::Kernel }),
        (
            gathers.from_host && gathers.copies_from.is_some(),
            Way { from_host: true, by: GatherBy::Copies },
        ),
    ];
    can.into_iter().filter(|(can, _)| *can).map(|(_, way)| way).collect()
}

/// Bytes in memory, not at its start, as a data set of rows.
struct Slice {
    bytes: Vec<u8>,
    start: usize,
    rows: u64,
    spec: SampleSpec,
}

impl Dataset for Slice {
    fn len(&self) -> u64 {
        self.rows
    }
    fn spec(&self) -> &SampleSpec {
        &self.spec
    }
    fn read(&self, _: u64, _: &mut SampleMut<'_>) -> Result<(), BoxError> {
        unreachable!("the device fetches the rows")
    }
    fn contiguous(&self, _: usize) -> Option<&[u8]> {
        Some(&self.bytes[self.start..])
    }
}

fn slice(rows: u64, row_bytes: u64, start: usize) -> Slice {
    let len = usize::try_from(rows * row_bytes).expect("small");
    let spec = SampleSpec::new(DType::U8, &[row_bytes]).expect("a spec");
    Slice { bytes: bytes(row_bytes, start + len), start, rows, spec }
}

/// Rows to gather from, where the device can read them.
struct Table {
    source: Source,
    data: Vec<u8>,
    row_bytes: u64,
}

impl Table {
    fn new(memory: &MemoryManager, way: Way, rows: u64, row_bytes: u64) -> Self {
        // Somewhere in the middle: at any address on the host, and as tensors lie on a device.
        let start = if way.from_host { row_bytes % 5 } else { row_bytes % 3 * TENSOR_ALIGNMENT };
        let start = usize::try_from(start).expect("small");
        let slice = slice(rows, row_bytes, start);
        let data = slice.bytes[start..].to_vec();
        let source = if way.from_host {
            let dataset: Arc<dyn Dataset> = Arc::new(slice);
            Source::Registered(Registered::new(memory, &dataset, 0).expect("registered"))
        } else {
            let all = memory.upload(&slice.bytes, &[slice.bytes.len() as u64]).expect("a tensor");
            let shape = Shape::new(&[data.len() as u64]).expect("a shape");
            Source::Resident(Tensor::new(all.share().clone(), start as u64, shape, DType::U8))
        };
        Self { source, data, row_bytes }
    }

    /// The rows of these numbers, as the host picks and converts them.
    fn picked(&self, numbers: &[u64], spec: Option<&ConvertSpec>) -> Vec<u8> {
        let row_bytes = usize::try_from(self.row_bytes).expect("small");
        let plain = numbers.len() * row_bytes;
        let len = spec
            .map_or(plain, |spec| usize::try_from(spec.elements).expect("small") * spec.to.size());
        let mut aligned = vec![0u64; len.div_ceil(8)];
        let target: &mut [u8] = &mut bytemuck::cast_slice_mut(&mut aligned)[..len];
        fetch(bytemuck::cast_slice(numbers), &self.data, row_bytes, target, spec);
        target.to_vec()
    }
}

/// What a gather needs, and one output with room for several tensors.
struct Bench {
    memory: MemoryManager,
    commands: CommandBufferPool,
    slots: StagingBufferPool,
}

impl Bench {
    fn new(device: &Device) -> Self {
        let memory = MemoryManager::new(device);
        let commands = CommandBufferPool::new(&memory, 3).expect("a pool");
        let slots = StagingBufferPool::with_buffer_size(&memory, 2, MOST_NUMBERS * 8);
        Self { commands, slots: slots.expect("a pool"), memory }
    }

    fn slot(&self, numbers: &[u64]) -> StagingBuffer {
        let mut slot = self.slots.get_buffer().expect("a slot");
        slot.as_mut_slice()[..numbers.len() * 8].copy_from_slice(bytemuck::cast_slice(numbers));
        slot
    }

    /// Tensors of these shapes, one behind the other in one block, which holds noise.
    fn targets(&self, tensors: &[(DType, Shape)]) -> (Tensor, Vec<Tensor>) {
        let mut offsets = Vec::new();
        let mut end = 0u64;
        for (dtype, shape) in tensors {
            offsets.push(end);
            end += shape.bytes(*dtype).expect("small").next_multiple_of(TENSOR_ALIGNMENT);
        }
        let noise = bytes(end, usize::try_from(end).expect("small"));
        let block = self.memory.upload(&noise, &[end]).expect("a tensor");
        let views = tensors.iter().zip(offsets).map(|((dtype, shape), offset)| {
            Tensor::new(block.share().clone(), offset, *shape, *dtype)
        });
        let views = views.collect();
        (block, views)
    }

    /// Gathers rows of the tables, the first one's converted, and compares them with the host's.
    fn compare(
        &self,
        way: Way,
        tables: &[&Table],
        numbers: &[u64],
        convert: Option<(&ConvertSpec, Shape)>,
    ) {
        let rows = numbers.len() as u64;
        let shapes = tables.iter().enumerate().map(|(place, table)| match convert {
            Some((spec, shape)) if place == 0 => (spec.to, shape),
            _ => (DType::U8, Shape::new(&[rows, table.row_bytes]).expect("a shape")),
        });
        let (block, targets) = self.targets(&shapes.collect::<Vec<_>>());
        let mut buffer = self.commands.get_buffer().expect("a buffer");
        let indices = buffer.keep_indices(self.slot(numbers), rows);
        let mut parts = GatherParts::default();
        for (place, (table, target)) in tables.iter().zip(&targets).enumerate() {
            let spec = convert.map(|(spec, _)| spec.clone()).filter(|_| place == 0);
            parts.push(&table.source, table.row_bytes, target, spec);
        }
        buffer.gather(&indices, way.by, parts);
        buffer.execute().expect("submitted").wait().expect("done");
        let found = block.to_vec::<u8>().expect("a readback");
        for (place, (table, target)) in tables.iter().zip(&targets).enumerate() {
            let spec = convert.map(|(spec, _)| spec).filter(|_| place == 0);
            let expected = table.picked(numbers, spec);
            let start = usize::try_from(target.offset()).expect("small");
            let wrong = found[start..].iter().zip(&expected).position(|(one, other)| one != other);
            let row_bytes = table.row_bytes;
            assert_eq!(wrong, None, "{way:?}: {rows} rows of {row_bytes} bytes, {spec:?}");
        }
    }

    /// Everything has come home.
    fn assert_home(self) {
        let Self { memory, commands, slots } = self;
        drop((commands, slots));
        wait_until(
            || {
                let stats = memory.stats();
                stats.device_in_use == 0 && stats.staging_in_use == 0
            },
            "all that was gathered from, into and with to come back",
        );
    }
}

/// `count` numbers of rows in random order, some of them several times, the first and the last row
/// among them.
fn numbers(seed: u64, count: u64, rows: u64) -> Vec<u64> {
    let random = (2..count).map(|i| mix(&[seed, count, i]) % rows);
    let all = [rows - 1, 0].into_iter().chain(random);
    all.take(usize::try_from(count).expect("small")).collect()
}

/// Rows of any length come as the host would pick them, for one tensor or several at once.
///
/// # Panics
/// The device fails.
pub fn gathers_equal_the_reference(device: &Device) {
    let bench = Bench::new(device);
    for way in ways(device) {
        let lengths: Vec<u64> = (1..=70).chain([4099, 784, 8, 4]).collect();
        let tables: Vec<Table> =
            lengths.iter().map(|len| Table::new(&bench.memory, way, 90, *len)).collect();
        let mut rest: Vec<&Table> = tables.iter().collect();
        for group in 0.. {
            let together = rest.len().min(group % MAX_PARTS + 1);
            let tables: Vec<&Table> = rest.drain(..together).collect();
            if tables.is_empty() {
                break;
            }
            for count in [1, 255, 257] {
                bench.compare(way, &tables, &numbers(group as u64, count, 90), None);
            }
        }
        let long = Table::new(&bench.memory, way, 7, 70_001);
        let wide = Table::new(&bench.memory, way, 7, 65_536);
        bench.compare(way, &[&long], &[6], None);
        bench.compare(way, &[&wide, &long], &[0, 6, 3, 3, 1, 2, 6, 5, 4], None);
        bench.compare(way, &[&wide, &long], &[], None);
    }
    bench.assert_home();
}

/// Where the device converts on the way, it does so bit for bit as the host does.
///
/// # Panics
/// The device fails.
pub fn gathers_convert_on_the_way(device: &Device) {
    let bench = Bench::new(device);
    let (hwc, chw) = (ChannelOrder::Nhwc, ChannelOrder::Nchw);
    let plain = Conversion::new();
    let scaled = plain.clone().scale_and_bias(&[0.017, -3.5, 1e3], &[-2.1, 0.25, 7.0]);
    let images = [
        plain.clone(),
        scaled.clone(),
        plain.clone().reorder(hwc, chw),
        scaled.clone().reorder(hwc, chw),
        plain.clone().reorder(chw, hwc),
        scaled.clone().channels(chw),
        scaled.reorder(chw, hwc),
    ];
    let rows = [plain.clone(), plain.scale_and_bias(&[0.5], &[-1.25])];
    // The last dimension of images with the channels first is three as well, for `scaled`.
    let shapes: [(&[u64], &[Conversion]); 4] =
        [(&[3, 5, 3], &images), (&[3, 4, 3], &images), (&[7], &rows), (&[4], &rows)];
    for way in ways(device).into_iter().filter(|way| way.by == GatherBy::Kernel) {
        for (from, to) in device.core().backend().gathers().fused {
            for (dims, conversions) in shapes {
                let shape = Shape::new(dims).expect("a shape");
                let row_bytes = shape.bytes(*from).expect("small");
                let table = Table::new(&bench.memory, way, 50, row_bytes);
                let labels = Table::new(&bench.memory, way, 50, 8);
                for (count, conversion) in
                    [1, 33].iter().flat_map(|count| conversions.iter().map(move |c| (*count, c)))
                {
                    let batch = shape.batched(count).expect("a shape");
                    let spec = conversion.spec_for(*from, *to, batch).expect("a conversion");
                    let target = conversion.shape(batch).expect("a shape");
                    let numbers = numbers(row_bytes, count, 50);
                    bench.compare(way, &[&table, &labels], &numbers, Some((&spec, target)));
                }
            }
        }
    }
    bench.assert_home();
}

/// Several gathers on their way at once, two with the same numbers, whose sources and slots are
/// given back while the device may still read them.
///
/// # Panics
/// The device fails.
pub fn gathers_keep_what_they_read(device: &Device) {
    let bench = Bench::new(device);
    let ways = ways(device);
    if ways.is_empty() {
        return;
    }
    let mut on_their_way: VecDeque<(Submission, Tensor, Vec<Vec<u8>>)> = VecDeque::new();
    let check = |(submission, block, expected): (Submission, Tensor, Vec<Vec<u8>>)| {
        submission.wait().expect("done");
        let found = block.to_vec::<u8>().expect("a readback");
        let mut start = 0;
        for expected in expected {
            assert!(found[start..start + expected.len()] == expected, "rows of a gather");
            start += expected.len().next_multiple_of(256);
        }
    };
    for round in 0..24u64 {
        let numbers = numbers(round, 1 + round * 11, 40);
        let rows = numbers.len() as u64;
        // In one command buffer: rows by each way, told by one slot.
        let tables: Vec<(Way, Table)> = (0..)
            .zip(&ways)
            .map(|(place, way)| (*way, Table::new(&bench.memory, *way, 40, 30 + round + place)))
            .collect();
        let shape =
            |table: &Table| (DType::U8, Shape::new(&[rows, table.row_bytes]).expect("a shape"));
        let shapes: Vec<_> = tables.iter().map(|(_, table)| shape(table)).collect();
        let (block, targets) = bench.targets(&shapes);
        let mut buffer: CommandBuffer = bench.commands.get_buffer().expect("a buffer");
        let indices = buffer.keep_indices(bench.slot(&numbers), rows);
        for ((way, table), target) in tables.iter().zip(&targets) {
            let mut parts = GatherParts::default();
            parts.push(&table.source, table.row_bytes, target, None);
            buffer.gather(&indices, way.by, parts);
        }
        let submission = buffer.execute().expect("submitted");
        let expected = tables.iter().map(|(_, table)| table.picked(&numbers, None)).collect();
        drop(tables);
        on_their_way.push_back((submission, block, expected));
        if on_their_way.len() == 3 {
            on_their_way.pop_front().into_iter().for_each(check);
        }
    }
    on_their_way.into_iter().for_each(check);
    bench.assert_home();
}

/// Rows of device memory are those that were written before the gather, whatever is written after it.
///
/// # Panics
/// The device fails.
pub fn gathers_are_in_order(device: &Device) {
    if device.core().backend().gathers().from_device == 0 {
        return;
    }
    let bench = Bench::new(device);
    let staging = StagingBufferPool::with_buffer_size(&bench.memory, 3, 4000).expect("a pool");
    let source = bench.memory.tensor(&[4000], DType::U8).expect("a tensor");
    let numbers = numbers(1, 30, 100);
    let shape = Shape::new(&[30, 40]).expect("a shape");
    let rounds = 0..20u64;
    let written = |round: u64| bytes(round, 4000);
    let gathered = rounds.clone().map(|round| {
        let mut slot = staging.get_buffer().expect("a slot");
        slot.write(0, &written(round)).expect("it fits");
        let mut buffer = bench.commands.get_buffer().expect("a buffer");
        buffer.upload(slot, &source).expect("recorded");
        drop(buffer.execute().expect("submitted"));
        let target = bench.memory.tensor(&[1200], DType::U8).expect("a tensor");
        let mut buffer = bench.commands.get_buffer().expect("a buffer");
        let indices = buffer.keep_indices(bench.slot(&numbers), 30);
        let mut parts = GatherParts::default();
        let view = Tensor::new(target.share().clone(), 0, shape, DType::U8);
        parts.push(&Source::Resident(source.clone()), 40, &view, None);
        buffer.gather(&indices, GatherBy::Kernel, parts);
        drop(buffer.execute().expect("submitted"));
        target
    });
    let gathered: Vec<Tensor> = gathered.collect();
    for (round, target) in rounds.zip(gathered) {
        let written = written(round);
        let row = |number: &u64| &written[usize::try_from(number * 40).expect("small")..][..40];
        let expected: Vec<u8> = numbers.iter().flat_map(row).copied().collect();
        assert!(target.to_vec::<u8>().expect("a readback") == expected, "round {round}");
    }
}

/// Memory that can't be registered is refused, and nothing is left of the attempt.
///
/// # Panics
/// The device fails.
pub fn registering_refuses(device: &Device) {
    let limits = MemoryLimits::default().staging_limit(64 << 10);
    let memory = MemoryManager::with_limits(device, limits);
    let spec = SampleSpec::new(DType::U8, &[4]).expect("a spec");
    let scattered: Arc<dyn Dataset> = Arc::new(FnDataset::new(10, spec, |_, _| Ok(())));
    let error = Registered::new(&memory, &scattered, 0).expect_err("it must be refused");
    assert!(error.to_string().contains("does not lie in memory"), "{error}");
    let small: Arc<dyn Dataset> = Arc::new(slice(100, 37, 1));
    let large: Arc<dyn Dataset> = Arc::new(slice(100, 1000, 1));
    let error = Registered::new(&memory, &large, 0).expect_err("it must be refused");
    assert!(matches!(error, Error::TooLarge { .. }), "{error}");
    if device.core().backend().gathers().from_host {
        let one = Registered::new(&memory, &small, 0).expect("registered");
        let two = Registered::new(&memory, &small, 0).expect("registered twice");
        assert_eq!((one.memory().len(), two.memory().len()), (3700, 3700));
        assert_eq!(memory.stats().staging_in_use, 7400);
        drop((one, two));
    } else {
        Registered::new(&memory, &small, 0).expect_err("the device said that it can't");
    }
    assert_eq!((memory.stats().staging_in_use, Arc::strong_count(&small)), (0, 1));
    device.check().expect("a healthy device");
}
