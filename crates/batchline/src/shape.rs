//! Shapes: up to eight dimensions, all arithmetic checked.

use std::fmt;

use crate::{DType, Error, Result};

/// The most dimensions that a shape can have.
pub const MAX_RANK: usize = 8;

/// The extent of a tensor in each dimension, outermost first. A scalar has none.
///
/// ```
/// use batchline::{DType, Shape};
/// let images = Shape::new(&[256, 3, 224, 224])?;
/// assert_eq!(images.elements()?, 38_535_168);
/// assert_eq!(images.bytes(DType::F32)?, 154_140_672);
/// assert!(Shape::new(&[1 << 40, 1 << 40])?.elements().is_err());
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Shape {
    /// Extents; those past `rank` are 0, so that equality may be derived.
    dims: [u64; MAX_RANK],
    rank: u8,
}

impl Shape {
    /// The shape of a scalar.
    pub const SCALAR: Shape = Shape { dims: [0; MAX_RANK], rank: 0 };

    /// # Errors
    /// More than [`MAX_RANK`] dimensions.
    pub fn new(dims: &[u64]) -> Result<Self> {
        if dims.len() > MAX_RANK {
            return Err(Error::Length {
                what: "a shape".to_owned(),
                expected: MAX_RANK as u64,
                found: dims.len() as u64,
                unit: "dimensions at most",
            });
        }
        let mut shape = Shape::SCALAR;
        shape.dims[..dims.len()].copy_from_slice(dims);
        #[allow(clippy::cast_possible_truncation, reason = "at most MAX_RANK")]
        {
            shape.rank = dims.len() as u8;
        }
        Ok(shape)
    }

    /// The extents, outermost first.
    pub fn dims(&self) -> &[u64] {
        &self.dims[..usize::from(self.rank)]
    }

    /// The number of dimensions.
    pub fn rank(&self) -> usize {
        usize::from(self.rank)
    }

    /// The product of the extents; 1 for a scalar.
    ///
    /// # Errors
    /// [`Error::Overflow`] when it does not fit 64 bits.
    pub fn elements(&self) -> Result<u64> {
        // A zero makes the product zero whatever the other factors are.
        if self.dims().contains(&0) {
            return Ok(0);
        }
        self.dims()
            .iter()
            .try_fold(1u64, |product, dim| product.checked_mul(*dim))
            .ok_or_else(|| Error::Overflow { what: format!("a tensor of shape {self}") })
    }

    /// Bytes of a dense tensor of this shape.
    ///
    /// # Errors
    /// [`Error::Overflow`] when it does not fit 64 bits.
    pub fn bytes(&self, dtype: DType) -> Result<u64> {
        self.elements()?
            .checked_mul(dtype.size() as u64)
            .ok_or_else(|| Error::Overflow { what: format!("a {dtype} tensor of shape {self}") })
    }

    /// This shape with one more dimension in front: the shape of a batch of such samples.
    ///
    /// # Errors
    /// More than [`MAX_RANK`] dimensions.
    pub fn batched(&self, rows: u64) -> Result<Self> {
        let mut dims = [0; MAX_RANK + 1];
        dims[0] = rows;
        dims[1..=self.rank()].copy_from_slice(self.dims());
        Shape::new(&dims[..=self.rank()])
    }

    /// The shape of one row: all dimensions but the first. `None` for a scalar.
    pub fn row(&self) -> Option<Self> {
        Shape::new(self.dims().get(1..)?).ok()
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("[")?;
        for (i, dim) in self.dims().iter().enumerate() {
            write!(f, "{}{dim}", if i == 0 { "" } else { ", " })?;
        }
        f.write_str("]")
    }
}

impl fmt::Debug for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl<const N: usize> TryFrom<[u64; N]> for Shape {
    type Error = Error;

    fn try_from(dims: [u64; N]) -> Result<Self> {
        Shape::new(&dims)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_checked() {
        assert_eq!(Shape::SCALAR.elements().unwrap(), 1);
        assert_eq!(Shape::new(&[u64::MAX, 0, 2]).unwrap().elements().unwrap(), 0);
        let wide = Shape::new(&[1 << 62]).unwrap();
        assert!(wide.bytes(DType::U8).is_ok());
        assert!(matches!(wide.bytes(DType::F32), Err(Error::Overflow { .. })));
        assert!(Shape::new(&[1; 9]).is_err());
    }

    #[test]
    fn rows_and_batches() {
        let row = Shape::new(&[3, 2]).unwrap();
        let batch = row.batched(5).unwrap();
        assert_eq!(batch.to_string(), "[5, 3, 2]");
        assert_eq!(batch.row(), Some(row));
        assert_eq!(Shape::SCALAR.row(), None);
        assert!(Shape::new(&[1; 8]).unwrap().batched(1).is_err());
    }
}
