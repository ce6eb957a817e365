//! The samples that everybody loads, and what must arrive of them.

use batchline::{
    Conversion, DType, Dataset, Device, HostTensor, InMemory, MemoryManager, Shuffled,
};
use batchline::{Sampler, mix};

/// The seed of every order.
pub(crate) const SEED: u64 = 7;

/// Memory that is never freed, full of noise, to be taken for rows of any size.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Data(&'static [u8]);

impl Data {
    /// So many bytes, filled by all threads: each piece follows from its place.
    pub(crate) fn new(bytes: u64, threads: usize) -> Self {
        const PIECE: usize = 1 << 20;
        let mut data = vec![0u8; usize::try_from(bytes).expect("64 bits")];
        let share = data.len().div_ceil(PIECE).div_ceil(threads) * PIECE;
        std::thread::scope(|scope| {
            for (thread, part) in data.chunks_mut(share).enumerate() {
                scope.spawn(move || {
                    for (number, piece) in part.chunks_mut(PIECE).enumerate() {
                        let mut state = mix(&[thread as u64, number as u64]);
                        for word in piece.chunks_mut(8) {
                            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                            let noise = state ^ state >> 29;
                            word.copy_from_slice(&noise.to_le_bytes()[..word.len()]);
                        }
                    }
                });
            }
        });
        Self(data.leak())
    }

    /// The first so many bytes.
    pub(crate) fn part(self, bytes: u64) -> Self {
        Self(&self.0[..small(bytes).min(self.0.len())])
    }

    /// As many rows of this shape as make whole batches and lie in the memory, at most `most`.
    pub(crate) fn rows(self, shape: &[u64], batch: u64, most: u64) -> Rows {
        let row = shape.iter().product::<u64>();
        let batches = (self.0.len() as u64 / row).min(most) / batch;
        assert!(
            batches > 0,
            "the data have {} bytes, not a batch of {batch} × {row}",
            self.0.len()
        );
        let row = usize::try_from(row).expect("64 bits");
        Rows { bytes: &self.0[..row * small(batches * batch)], shape: shape.to_vec(), row, batch }
    }
}

/// Rows of `u8`, in batches that are all whole.
#[derive(Debug, Clone)]
pub(crate) struct Rows {
    bytes: &'static [u8],
    pub(crate) shape: Vec<u64>,
    /// Bytes of a row.
    pub(crate) row: usize,
    pub(crate) batch: u64,
}

impl Rows {
    pub(crate) fn len(&self) -> u64 {
        (self.bytes.len() / self.row) as u64
    }

    pub(crate) fn bytes(&self) -> &'static [u8] {
        self.bytes
    }

    pub(crate) fn get(&self, index: u64) -> &'static [u8] {
        &self.bytes[small(index) * self.row..][..self.row]
    }

    pub(crate) fn batch_bytes(&self) -> u64 {
        self.batch * self.row as u64
    }

    pub(crate) fn dataset(&self) -> InMemory {
        let shape = [&[self.len()], &self.shape[..]].concat();
        let tensor = HostTensor::from_bytes(DType::U8, &shape, self.bytes).expect("it fits");
        InMemory::new(tensor).expect("there are samples")
    }

    /// What must arrive as batch `number` of a shuffled first epoch, worked out on the host.
    pub(crate) fn expected(&self, number: u64, convert: Option<&(DType, Conversion)>) -> Vec<u8> {
        let order = Shuffled::new(self.len(), SEED);
        let rows = number * self.batch..(number + 1) * self.batch;
        let raw: Vec<u8> =
            rows.flat_map(|position| self.get(order.index(0, position))).copied().collect();
        let Some((to, conversion)) = convert else { return raw };
        let memory = MemoryManager::new(&Device::host());
        let shape = [&[self.batch], &self.shape[..]].concat();
        let tensor = memory.upload(&raw, &shape).expect("the host's memory");
        let converted = tensor.convert(*to, conversion).expect("a conversion that is known");
        converted.to_bytes().expect("the host's memory")
    }
}

/// Samples that are there at once: their window is taken and not written.
pub(crate) struct AtOnce(pub(crate) batchline::SampleSpec, pub(crate) u64);

impl Dataset for AtOnce {
    fn len(&self) -> u64 {
        self.1
    }
    fn spec(&self) -> &batchline::SampleSpec {
        &self.0
    }
    fn read(
        &self,
        _: u64,
        sample: &mut batchline::SampleMut<'_>,
    ) -> Result<(), batchline::BoxError> {
        std::hint::black_box(sample.input());
        Ok(())
    }
}

pub(crate) fn small(number: u64) -> usize {
    usize::try_from(number).expect("64 bits")
}
