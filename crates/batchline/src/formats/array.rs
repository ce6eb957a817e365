//! The array in a file, its first dimension counting samples, and how a sample is read from it.

use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::bytes::FileBytes;
use crate::source::default_fingerprint;
use crate::{BoxError, DType, Error, MAX_RANK, Result, SampleMut, SampleSpec, Shape};

/// How elements are stored, and what they are delivered as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    pub(super) encoding: Encoding,
    /// Whether the byte order is not this machine's.
    pub(super) swapped: bool,
}

/// The types that elements are stored in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Encoding {
    /// As they are delivered.
    Plain(DType),
    /// A byte that is 0 for false and anything else for true, delivered as [`DType::Bool`].
    Truth,
    /// Delivered as [`DType::I32`].
    U16,
    /// Delivered as [`DType::I64`].
    U32,
    /// Delivered as [`DType::I64`], where it fits.
    U64,
}

impl Stored {
    /// The type that elements are delivered in.
    pub(super) fn dtype(self) -> DType {
        match self.encoding {
            Encoding::Plain(dtype) => dtype,
            Encoding::Truth => DType::Bool,
            Encoding::U16 => DType::I32,
            Encoding::U32 | Encoding::U64 => DType::I64,
        }
    }

    /// Bytes of an element in the file.
    pub(super) fn size(self) -> usize {
        match self.encoding {
            Encoding::Plain(dtype) => dtype.size(),
            Encoding::Truth => 1,
            Encoding::U16 => 2,
            Encoding::U32 => 4,
            Encoding::U64 => 8,
        }
    }
}

/// What a file's header says.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    /// Where the elements start, in bytes.
    pub(super) start: u64,
    pub(super) stored: Stored,
    /// All dimensions, the first one counting samples. Never without a dimension, never with an
    /// extent of 0.
    pub(super) shape: Shape,
    /// Whether the first dimension varies fastest, not the last.
    pub(super) fortran: bool,
}

impl Layout {
    /// # Errors
    /// Too many dimensions, none, or one of extent 0.
    pub(super) fn new(
        path: &Path,
        start: u64,
        stored: Stored,
        dims: &[u64],
        fortran: bool,
    ) -> Result<Self> {
        if dims.is_empty() {
            let problem = "has 0 dimensions, so there are no samples: the first dimension must \
                           count them";
            return Err(Error::format(path, problem));
        }
        if dims.len() > MAX_RANK {
            let problem =
                format!("has {} dimensions, at most {MAX_RANK} are supported", dims.len());
            return Err(Error::format(path, problem));
        }
        let shape = Shape::new(dims)?;
        if dims.contains(&0) {
            return Err(Error::format(
                path,
                format!("has the shape {shape}: it holds no elements"),
            ));
        }
        Ok(Self { start, stored, shape, fortran })
    }

    /// Bytes of the whole file.
    ///
    /// # Errors
    /// They overflow.
    pub(super) fn file_bytes(&self, path: &Path) -> Result<u64> {
        self.shape
            .elements()
            .ok()
            .and_then(|elements| elements.checked_mul(self.stored.size() as u64))
            .and_then(|data| data.checked_add(self.start))
            .ok_or_else(|| {
                let (shape, dtype) = (self.shape, self.stored.dtype());
                let problem = format!(
                    "the header is corrupt: the size of its shape {shape} of {dtype} overflows"
                );
                Error::format(path, problem)
            })
    }

    /// Checks that a file of `found` bytes is what the header says.
    pub(super) fn check_len(&self, path: &Path, found: u64) -> Result<()> {
        let expected = self.file_bytes(path)?;
        if found == expected {
            return Ok(());
        }
        let says = format!(
            "the header says shape {} with {} byte(s) per element, {expected} bytes in all",
            self.shape,
            self.stored.size()
        );
        let problem = if found < expected {
            format!(
                "truncated: {says}, but there are {found}; copy, download or save the file again"
            )
        } else {
            let extra = found - expected;
            format!(
                "{extra} byte(s) after the end: {says}, but there are {found}; is something \
                 appended to the file?"
            )
        };
        Err(Error::format(path, problem))
    }
}

/// The array in a file.
#[derive(Debug)]
pub(super) struct Array {
    path: PathBuf,
    bytes: FileBytes,
    layout: Layout,
    /// Where the elements start.
    start: usize,
    /// Elements of one sample.
    row_elements: usize,
}

impl Array {
    /// # Errors
    /// `bytes` are more or fewer than `layout` says.
    pub(super) fn new(path: &Path, bytes: FileBytes, mut layout: Layout) -> Result<Self> {
        layout.check_len(path, bytes.as_slice().len() as u64)?;
        // One byte has no order.
        layout.stored.swapped &= layout.stored.size() > 1;
        let row = layout.shape.row().unwrap_or(Shape::SCALAR);
        // Both are less than the length of a slice that exists, so they do fit.
        let overflow = |_| Error::Overflow { what: "a file".to_owned() };
        Ok(Self {
            path: path.to_owned(),
            bytes,
            layout,
            start: usize::try_from(layout.start).map_err(overflow)?,
            row_elements: usize::try_from(row.elements()?).map_err(overflow)?,
        })
    }

    /// The number of samples.
    pub(super) fn len(&self) -> u64 {
        self.layout.shape.dims().first().copied().unwrap_or(0)
    }

    fn row(&self) -> Shape {
        self.layout.shape.row().unwrap_or(Shape::SCALAR)
    }

    fn dtype(&self) -> DType {
        self.layout.stored.dtype()
    }

    /// Writes sample `index` to `out`, innermost dimension last, in this machine's byte order.
    fn read(&self, index: u64, out: &mut [u8]) -> Result<()> {
        let what = || format!("the window for sample {index} of {}", self.path.display());
        let expected = self.row_elements.saturating_mul(self.dtype().size());
        if out.len() != expected {
            return Err(Error::Length {
                what: what(),
                expected: expected as u64,
                found: out.len() as u64,
                unit: "bytes",
            });
        }
        let row = match usize::try_from(index) {
            Ok(row) if index < self.len() => row,
            _ => {
                let problem = format!("has no sample {index}, there are {}", self.len());
                return Err(Error::format(&self.path, problem));
            }
        };
        match self.layout.stored.encoding {
            Encoding::Plain(dtype) => match dtype.size() {
                _ if !self.layout.stored.swapped && !self.layout.fortran => {
                    out.copy_from_slice(self.row_bytes(row));
                }
                1 => self.convert(row, out, |element: [u8; 1]| element),
                2 => self.convert(row, out, |element: [u8; 2]| element),
                4 => self.convert(row, out, |element: [u8; 4]| element),
                _ => self.convert(row, out, |element: [u8; 8]| element),
            },
            Encoding::Truth => self.convert(row, out, |[byte]| [u8::from(byte != 0)]),
            Encoding::U16 => {
                self.convert(row, out, |e| i32::from(u16::from_ne_bytes(e)).to_ne_bytes());
            }
            Encoding::U32 => {
                self.convert(row, out, |e| i64::from(u32::from_ne_bytes(e)).to_ne_bytes());
            }
            Encoding::U64 => {
                let mut largest = 0;
                self.convert(row, out, |element: [u8; 8]| {
                    largest = largest.max(u64::from_ne_bytes(element));
                    element
                });
                if i64::try_from(largest).is_err() {
                    let problem = format!(
                        "sample {index} holds {largest}, more than i64 can ({}): save the array \
                         as another type, such as `.astype('f8')`",
                        i64::MAX
                    );
                    return Err(Error::format(&self.path, problem));
                }
            }
        }
        Ok(())
    }

    /// All samples, where the file holds them as they are delivered.
    fn contiguous(&self) -> Option<&[u8]> {
        let Stored { encoding, swapped } = self.layout.stored;
        let plain = matches!(encoding, Encoding::Plain(_)) && !swapped && !self.layout.fortran;
        plain.then(|| &self.bytes.as_slice()[self.start..])
    }

    /// The bytes of a sample, where they lie together.
    fn row_bytes(&self, row: usize) -> &[u8] {
        let len = self.row_elements * self.layout.stored.size();
        &self.bytes.as_slice()[self.start + row * len..][..len]
    }

    /// Writes what `convert` makes of each element of a sample. Elements come in this machine's
    /// byte order.
    fn convert<const IN: usize, const OUT: usize>(
        &self,
        row: usize,
        out: &mut [u8],
        mut convert: impl FnMut([u8; IN]) -> [u8; OUT],
    ) {
        let swapped = self.layout.stored.swapped;
        let mut native = |mut element: [u8; IN]| {
            if swapped {
                element.reverse();
            }
            convert(element)
        };
        let (out, _) = out.as_chunks_mut::<OUT>();
        if self.layout.fortran {
            let (elements, _) = self.bytes.as_slice()[self.start..].as_chunks::<IN>();
            let places = FortranRow::new(&self.layout, row);
            out.iter_mut().zip(places).for_each(|(out, place)| *out = native(elements[place]));
        } else {
            let (elements, _) = self.row_bytes(row).as_chunks::<IN>();
            out.iter_mut().zip(elements).for_each(|(out, element)| *out = native(*element));
        }
    }
}

/// The places of a sample's elements in an array whose first dimension varies fastest, in the
/// order in which the last one does.
struct FortranRow {
    rank: usize,
    extents: [usize; MAX_RANK],
    strides: [usize; MAX_RANK],
    position: [usize; MAX_RANK],
    place: usize,
}

impl FortranRow {
    fn new(layout: &Layout, row: usize) -> Self {
        let dims = layout.shape.dims();
        let mut places = Self {
            rank: dims.len() - 1,
            extents: [0; MAX_RANK],
            strides: [0; MAX_RANK],
            position: [0; MAX_RANK],
            place: row,
        };
        let mut stride = 1;
        for (axis, dim) in dims.iter().enumerate() {
            #[allow(clippy::cast_possible_truncation, reason = "at most the elements of a slice")]
            let dim = *dim as usize;
            if axis > 0 {
                places.extents[axis - 1] = dim;
                places.strides[axis - 1] = stride;
            }
            stride *= dim;
        }
        places
    }
}

impl Iterator for FortranRow {
    type Item = usize;

    /// Never ends: behind the last element comes the first again.
    fn next(&mut self) -> Option<usize> {
        let place = self.place;
        for axis in (0..self.rank).rev() {
            self.position[axis] += 1;
            self.place += self.strides[axis];
            if self.position[axis] < self.extents[axis] {
                break;
            }
            self.place -= self.strides[axis] * self.extents[axis];
            self.position[axis] = 0;
        }
        Some(place)
    }
}

/// Inputs, and labels where there are any, with one row of each per sample.
#[derive(Debug)]
pub(super) struct Arrays {
    inputs: Array,
    labels: Option<Array>,
    spec: SampleSpec,
}

impl Arrays {
    /// # Errors
    /// There are more or fewer labels than inputs.
    pub(super) fn new(inputs: Array, labels: Option<Array>) -> Result<Self> {
        let mut spec = SampleSpec::new(inputs.dtype(), inputs.row().dims())?;
        if let Some(labels) = &labels {
            if labels.len() != inputs.len() {
                let problem = format!(
                    "holds {} labels, but {} holds {} samples: these files don't belong together",
                    labels.len(),
                    inputs.path.display(),
                    inputs.len()
                );
                return Err(Error::format(&labels.path, problem));
            }
            spec = spec.label(labels.dtype(), labels.row().dims())?;
        }
        Ok(Self { inputs, labels, spec })
    }

    /// The same inputs with these labels.
    ///
    /// # Errors
    /// As of [`new`](Self::new).
    pub(super) fn with_labels(self, labels: Array) -> Result<Self> {
        Self::new(self.inputs, Some(labels))
    }

    pub(super) fn len(&self) -> u64 {
        self.inputs.len()
    }

    pub(super) fn spec(&self) -> &SampleSpec {
        &self.spec
    }

    pub(super) fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        self.inputs.read(index, sample.input())?;
        if let Some(labels) = &self.labels {
            labels.read(index, sample.label())?;
        }
        Ok(())
    }

    /// See [`Dataset::contiguous`](crate::Dataset::contiguous).
    pub(super) fn contiguous(&self, tensor: usize) -> Option<&[u8]> {
        match tensor {
            0 => self.inputs.contiguous(),
            _ => self.labels.as_ref()?.contiguous(),
        }
    }

    pub(super) fn fingerprint(&self) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(&default_fingerprint(self.len(), &self.spec).to_le_bytes());
        self.inputs.bytes.hash(&mut hash);
        if let Some(labels) = &self.labels {
            labels.bytes.hash(&mut hash);
        }
        hash.digest()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layout(dims: &[u64], fortran: bool) -> Layout {
        let stored = Stored { encoding: Encoding::Plain(DType::U8), swapped: false };
        Layout::new(Path::new("a"), 0, stored, dims, fortran).unwrap()
    }

    #[test]
    fn fortran_places_agree_with_the_definition() {
        let (a, b, c, d) = (3, 2, 4, 5);
        let layout = layout(&[a as u64, b as u64, c as u64, d as u64], true);
        for i in 0..a {
            let mut places = FortranRow::new(&layout, i);
            for j in 0..b {
                for k in 0..c {
                    for l in 0..d {
                        assert_eq!(places.next(), Some(i + a * (j + b * (k + c * l))));
                    }
                }
            }
        }
    }

    #[test]
    fn a_vector_is_the_same_in_both_orders() {
        for fortran in [false, true] {
            let bytes = FileBytes::Owned(vec![7, 8, 9]);
            let array = Array::new(Path::new("a"), bytes, layout(&[3], fortran)).unwrap();
            let mut out = [0];
            array.read(2, &mut out).unwrap();
            assert_eq!(out, [9]);
        }
    }

    #[test]
    fn indices_and_windows_that_do_not_fit_are_errors() {
        let bytes = FileBytes::Owned(vec![7, 8, 9]);
        let array = Array::new(Path::new("a"), bytes, layout(&[3], false)).unwrap();
        let text = |result: Result<()>| result.unwrap_err().chain();
        assert_eq!(text(array.read(3, &mut [0])), "a: has no sample 3, there are 3");
        assert!(text(array.read(u64::MAX, &mut [0])).contains("has no sample"));
        assert!(text(array.read(0, &mut [0, 0])).contains("has 2 bytes, expected 1"));
    }
}
