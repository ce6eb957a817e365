//! The samples: every byte follows from seed, index and tensor, so that the consumer can work out
//! again what must arrive.

use batchline::{DType, SampleSpec, mix};

/// What a sample of a round is made of.
#[derive(Debug, Clone)]
pub struct Form {
    /// Of the bytes.
    pub seed: u64,
    pub dtype: DType,
    /// Of the input.
    pub dims: Vec<u64>,
    /// An `i64` that is the sample's index.
    pub label: bool,
    /// Type and length of one more tensor.
    pub weight: Option<(DType, u64)>,
}

impl Form {
    pub fn spec(&self) -> SampleSpec {
        let mut spec = SampleSpec::new(self.dtype, &self.dims).expect("a small sample");
        if self.label {
            spec = spec.label(DType::I64, &[]).expect("one label");
        }
        if let Some((dtype, len)) = self.weight {
            spec = spec.weight("weight", dtype, &[len]).expect("one weight");
        }
        spec
    }

    /// Bytes of one sample's input.
    pub fn input_len(&self) -> usize {
        usize::try_from(self.dims.iter().product::<u64>()).expect("small") * self.dtype.size()
    }

    /// Bytes of one sample's weight.
    pub fn weight_len(&self) -> usize {
        self.weight.map_or(0, |(dtype, len)| usize::try_from(len).expect("small") * dtype.size())
    }

    /// Bytes of a batch, with the room that each tensor is rounded up to.
    pub fn batch_bytes(&self, rows: u64) -> u64 {
        let row = [self.input_len(), if self.label { 8 } else { 0 }, self.weight_len()];
        row.iter().map(|len| (*len as u64 * rows).next_multiple_of(256)).sum()
    }

    pub fn write_input(&self, index: u64, bytes: &mut [u8]) {
        write(mix(&[self.seed, index]), self.dtype, bytes);
    }

    pub fn write_weight(&self, index: u64, bytes: &mut [u8]) {
        let (dtype, _) = self.weight.expect("a form with a weight");
        write(mix(&[self.seed, index, 1]), dtype, bytes);
    }

    /// The input of these samples, one behind the other.
    pub fn inputs(&self, indices: &[u64]) -> Vec<u8> {
        let len = self.input_len();
        let mut bytes = vec![0; indices.len() * len];
        for (row, index) in indices.iter().enumerate() {
            self.write_input(*index, &mut bytes[row * len..][..len]);
        }
        bytes
    }

    pub fn labels(&self, indices: &[u64]) -> Vec<u8> {
        indices.iter().flat_map(|index| index.to_ne_bytes()).collect()
    }

    pub fn weights(&self, indices: &[u64]) -> Vec<u8> {
        let len = self.weight_len();
        let mut bytes = vec![0; indices.len() * len];
        for (row, index) in indices.iter().enumerate() {
            self.write_weight(*index, &mut bytes[row * len..][..len]);
        }
        bytes
    }
}

/// A cheap generator: a few operations for eight bytes.
fn write(mut state: u64, dtype: DType, bytes: &mut [u8]) {
    for chunk in bytes.chunks_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let word = (state ^ state >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9).rotate_left(32);
        chunk.copy_from_slice(&word.to_le_bytes()[..chunk.len()]);
    }
    if dtype == DType::Bool {
        bytes.iter_mut().for_each(|byte| *byte &= 1);
    }
}
