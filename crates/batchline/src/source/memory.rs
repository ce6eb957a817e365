//! A data set of tensors in memory.

use super::{Dataset, HostTensor, Sample, SampleMut, SampleSpec};
use crate::{BoxError, Error, Result};

/// A data set over tensors that lie in memory, the samples along their first dimension. This is
/// the reference for every other source.
///
/// ```
/// use batchline::{Dataset, HostTensor, InMemory};
/// let images = HostTensor::new(vec![0u8; 10 * 28 * 28], &[10, 28, 28])?;
/// let labels = HostTensor::new(vec![0i64; 10], &[10])?;
/// let dataset = InMemory::new(images)?.labels(labels)?;
/// assert_eq!(dataset.len(), 10);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct InMemory {
    tensors: Sample,
    len: u64,
    spec: SampleSpec,
    /// Bytes of one sample in each tensor.
    row_bytes: Vec<usize>,
}

impl InMemory {
    /// A data set of these inputs.
    ///
    /// # Errors
    /// A scalar, which has no samples.
    pub fn new(inputs: HostTensor) -> Result<Self> {
        Self::of(Sample::new(inputs))
    }

    /// Adds labels.
    ///
    /// # Errors
    /// There are more or fewer labels than inputs.
    pub fn labels(self, labels: HostTensor) -> Result<Self> {
        self.check_len("labels", &labels)?;
        Self::of(self.tensors.label(labels))
    }

    /// Adds a weight per sample: numbers, masks.
    ///
    /// # Errors
    /// There are more or fewer of them than inputs, or the name is taken.
    pub fn weights(self, name: &str, weights: HostTensor) -> Result<Self> {
        self.check_len(name, &weights)?;
        Self::of(self.tensors.weight(name, weights))
    }

    fn of(tensors: Sample) -> Result<Self> {
        let (spec, len) = tensors.row_spec()?;
        let row_bytes = spec
            .tensors()
            .iter()
            .map(|tensor| {
                usize::try_from(tensor.shape.bytes(tensor.dtype)?)
                    .map_err(|_| Error::Overflow { what: "a sample".to_owned() })
            })
            .collect::<Result<_>>()?;
        Ok(Self { tensors, len, spec, row_bytes })
    }

    fn check_len(&self, name: &str, tensor: &HostTensor) -> Result<()> {
        let found = tensor.shape().dims().first().copied().unwrap_or(1);
        if found == self.len {
            return Ok(());
        }
        Err(Error::Length { what: name.to_owned(), expected: self.len, found, unit: "samples" })
    }
}

impl Dataset for InMemory {
    fn len(&self) -> u64 {
        self.len
    }

    fn spec(&self) -> &SampleSpec {
        &self.spec
    }

    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        let index = usize::try_from(index)?;
        for (place, tensor) in self.tensors.tensors().enumerate() {
            let row = self.row_bytes[place];
            sample.bytes(place).copy_from_slice(&tensor.bytes()[index * row..][..row]);
        }
        Ok(())
    }

    fn contiguous(&self, tensor: usize) -> Option<&[u8]> {
        self.tensors.tensors().nth(tensor).map(HostTensor::bytes)
    }

    fn fingerprint(&self) -> u64 {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        hash.update(&super::default_fingerprint(self.len, &self.spec).to_le_bytes());
        for tensor in self.tensors.tensors() {
            hash.update(tensor.bytes());
        }
        hash.digest()
    }
}
