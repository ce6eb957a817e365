//! What one sample is made of, and where its parts lie in a batch.

use std::fmt;

use crate::{DType, Error, Result, Shape};

/// Tensors start at multiples of this many bytes: the strictest rule of any device (storage
/// bindings of wgpu).
pub(crate) const TENSOR_ALIGNMENT: u64 = 256;

/// One tensor of a sample: its name, element type and shape, without the batch dimension.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct TensorSpec {
    /// Its name, unique within the sample.
    pub name: String,
    /// Its element type.
    pub dtype: DType,
    /// Its shape; a scalar has no dimensions.
    pub shape: Shape,
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {} {}", self.name, self.dtype, self.shape)
    }
}

/// What one sample is made of: an input, a label where there is one, and any number of weight
/// tensors (sample weights, masks).
///
/// ```
/// use batchline::{DType, SampleSpec};
/// let spec = SampleSpec::new(DType::U8, &[3, 224, 224])?
///     .label(DType::I64, &[])?
///     .weight("mask", DType::Bool, &[224, 224])?;
/// assert_eq!(spec.bytes()?, 3 * 224 * 224 + 8 + 224 * 224);
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SampleSpec {
    /// Input, then the label if there is one, then the weights.
    tensors: Vec<TensorSpec>,
    has_label: bool,
}

impl SampleSpec {
    /// Samples with an input of this type and shape.
    ///
    /// # Errors
    /// Too many dimensions, or a size that overflows.
    pub fn new(dtype: DType, shape: &[u64]) -> Result<Self> {
        let mut spec = Self { tensors: Vec::new(), has_label: false };
        spec.push("input", dtype, shape)?;
        Ok(spec)
    }

    /// Adds the label. Call it before [`weight`](Self::weight).
    ///
    /// # Errors
    /// As [`new`](Self::new); or there is a label already, or a weight.
    pub fn label(mut self, dtype: DType, shape: &[u64]) -> Result<Self> {
        if self.tensors.len() > 1 {
            return Err(Error::config(
                "label",
                "comes after another label or weight",
                "call `label` once, right after `new`",
            ));
        }
        self.push("label", dtype, shape)?;
        self.has_label = true;
        Ok(self)
    }

    /// Adds a weight tensor.
    ///
    /// # Errors
    /// As [`new`](Self::new); or the name is taken.
    pub fn weight(mut self, name: &str, dtype: DType, shape: &[u64]) -> Result<Self> {
        self.push(name, dtype, shape)?;
        Ok(self)
    }

    fn push(&mut self, name: &str, dtype: DType, shape: &[u64]) -> Result<()> {
        if self.tensors.iter().any(|tensor| tensor.name == name) {
            return Err(Error::config(
                "tensor name",
                format!("{name:?} is used twice"),
                "give each tensor of a sample its own name",
            ));
        }
        let shape = Shape::new(shape)?;
        shape.bytes(dtype)?;
        self.tensors.push(TensorSpec { name: name.to_owned(), dtype, shape });
        Ok(())
    }

    /// All tensors: the input, then the label if there is one, then the weights.
    pub fn tensors(&self) -> &[TensorSpec] {
        &self.tensors
    }

    /// The input.
    pub fn input(&self) -> &TensorSpec {
        &self.tensors[0]
    }

    /// The label, if samples have one.
    pub fn label_spec(&self) -> Option<&TensorSpec> {
        self.has_label.then(|| &self.tensors[1])
    }

    /// The weight tensors.
    pub fn weights(&self) -> &[TensorSpec] {
        &self.tensors[self.first_weight()..]
    }

    /// The place of the first weight in [`tensors`](Self::tensors).
    pub(crate) fn first_weight(&self) -> usize {
        1 + usize::from(self.has_label)
    }

    /// Bytes of one sample.
    ///
    /// # Errors
    /// [`Error::Overflow`].
    pub fn bytes(&self) -> Result<u64> {
        self.tensors.iter().try_fold(0u64, |sum, tensor| {
            sum.checked_add(tensor.shape.bytes(tensor.dtype)?)
                .ok_or_else(|| Error::Overflow { what: "a sample".to_owned() })
        })
    }

    /// The first difference to `other`, in words.
    pub(crate) fn difference(&self, other: &SampleSpec) -> Option<String> {
        for pair in 0..self.tensors.len().max(other.tensors.len()) {
            match (self.tensors.get(pair), other.tensors.get(pair)) {
                (Some(own), Some(new)) if own == new => {}
                (Some(own), Some(new)) => return Some(format!("{own} became {new}")),
                (Some(own), None) => return Some(format!("{own} is missing")),
                (None, Some(new)) => return Some(format!("{new} is new")),
                (None, None) => {}
            }
        }
        (self.has_label != other.has_label).then(|| "the label became a weight".to_owned())
    }
}

/// Where the tensors of a batch lie in one piece of memory: one after another, each dense and
/// starting at a multiple of [`TENSOR_ALIGNMENT`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct BatchLayout {
    pub(crate) rows: u64,
    pub(crate) parts: Vec<Part>,
    /// Bytes of the whole, a multiple of [`TENSOR_ALIGNMENT`].
    pub(crate) bytes: u64,
}

/// One tensor's place in a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub(crate) offset: u64,
    pub(crate) row_bytes: u64,
    pub(crate) dtype: DType,
    /// The shape of a row.
    pub(crate) shape: Shape,
}

impl BatchLayout {
    pub(crate) fn new(spec: &SampleSpec, rows: u64) -> Result<Self> {
        let tensors = spec.tensors().iter().map(|tensor| (tensor.dtype, tensor.shape));
        Self::of(tensors, rows)
    }

    pub(crate) fn of(tensors: impl Iterator<Item = (DType, Shape)>, rows: u64) -> Result<Self> {
        let overflow = || Error::Overflow { what: format!("a batch of {rows} samples") };
        let mut bytes = 0u64;
        let mut parts = Vec::new();
        for (dtype, shape) in tensors {
            let row_bytes = shape.bytes(dtype)?;
            parts.push(Part { offset: bytes, row_bytes, dtype, shape });
            bytes = row_bytes
                .checked_mul(rows)
                .and_then(|len| bytes.checked_add(len))
                .and_then(|end| end.checked_next_multiple_of(TENSOR_ALIGNMENT))
                .ok_or_else(overflow)?;
        }
        // Memory of no bytes does not exist; samples of no bytes do.
        Ok(Self { rows, parts, bytes: bytes.max(TENSOR_ALIGNMENT) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_aligned_and_disjoint() {
        let spec = SampleSpec::new(DType::U8, &[7])
            .unwrap()
            .label(DType::I64, &[])
            .unwrap()
            .weight("w", DType::F32, &[0])
            .unwrap();
        let layout = BatchLayout::new(&spec, 100).unwrap();
        let offsets: Vec<u64> = layout.parts.iter().map(|part| part.offset).collect();
        assert_eq!(offsets, [0, 768, 1792]);
        assert_eq!(layout.bytes, 1792);
        assert_eq!(spec.first_weight(), 2);
    }

    #[test]
    fn products_that_overflow_are_errors() {
        assert!(SampleSpec::new(DType::F64, &[1 << 61]).is_err());
        let spec = SampleSpec::new(DType::U8, &[1 << 60]).unwrap();
        assert!(matches!(BatchLayout::new(&spec, 1 << 10), Err(Error::Overflow { .. })));
    }

    #[test]
    fn names_are_unique_and_the_label_is_second() {
        let spec = SampleSpec::new(DType::U8, &[]).unwrap();
        assert!(spec.clone().weight("input", DType::U8, &[]).is_err());
        assert!(spec.weight("w", DType::U8, &[]).unwrap().label(DType::U8, &[]).is_err());
    }
}
