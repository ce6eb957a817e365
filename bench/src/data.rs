//! The samples that everybody loads, and the proof that they were delivered.

use batchline::{HostTensor, InMemory, mix};

/// Rows of equal length in memory, the same bytes for every contestant. Each row begins with its
/// own number, so that a delivered row tells which it is; the rest is noise.
#[derive(Debug, Clone, Copy)]
pub struct Rows {
    bytes: &'static [u8],
    row: usize,
}

impl Rows {
    /// `count` rows of `row` bytes each. The memory is never freed: so everybody can hold on to it
    /// without counting references, which is the fastest for all.
    pub fn new(count: usize, row: usize) -> Self {
        assert!(row >= 16 && row.is_multiple_of(8));
        let mut bytes = vec![0; count * row];
        for (number, row) in bytes.chunks_exact_mut(row).enumerate() {
            let (own, noise) = row.split_at_mut(8);
            own.copy_from_slice(&(number as u64).to_le_bytes());
            let mut state = mix(&[number as u64]);
            for word in noise.chunks_exact_mut(8) {
                state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
                word.copy_from_slice(&state.to_le_bytes());
            }
        }
        Self { bytes: bytes.leak(), row }
    }

    pub fn len(self) -> usize {
        self.bytes.len() / self.row
    }

    pub fn get(self, index: usize) -> &'static [u8] {
        &self.bytes[index * self.row..][..self.row]
    }

    /// The same memory as a data set of ours.
    pub fn dataset(self) -> InMemory {
        let shape = [self.len() as u64, self.row as u64];
        let tensor = HostTensor::from_bytes(batchline::DType::U8, &shape, self.bytes);
        InMemory::new(tensor.expect("the shape fits")).expect("there are samples")
    }
}

/// Checks delivered batches byte by byte: each row is one of the source, each comes once, and
/// none is missing in the end.
#[derive(Debug)]
pub struct Check {
    rows: Rows,
    seen: Vec<bool>,
    /// In which order rows came.
    pub order: Vec<usize>,
}

impl Check {
    pub fn new(rows: Rows) -> Self {
        Self { rows, seen: vec![false; rows.len()], order: Vec::with_capacity(rows.len()) }
    }

    pub fn batch(&mut self, bytes: &[u8]) {
        assert_eq!(bytes.len() % self.rows.row, 0, "a batch is a number of rows");
        for row in bytes.chunks_exact(self.rows.row) {
            let own = u64::from_le_bytes(row[..8].try_into().expect("eight bytes"));
            let number = usize::try_from(own).expect("a row's number");
            assert!(number < self.rows.len(), "no row has the number {number}");
            assert!(row == self.rows.get(number), "row {number} was delivered with other bytes");
            assert!(!self.seen[number], "row {number} came twice");
            self.seen[number] = true;
            self.order.push(number);
        }
    }

    pub fn finish(&self) {
        assert_eq!(self.order.len(), self.rows.len(), "rows are missing");
    }
}
