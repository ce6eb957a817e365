//! Rows of a fixed size, with nothing in front of them that says what they are.

use std::path::Path;

use super::array::{Array, Arrays, Encoding, Layout, Stored};
use super::bytes::{FileBytes, open_file};
use super::parse_shape;
use crate::{BoxError, DType, Dataset, Error, Result, SampleMut, SampleSpec, Shape};

/// The rows of a file without a header, with the labels of another: what `ndarray.tofile` writes,
/// and most programs that dump an array.
///
/// What a row is must be told: the type of its elements and its shape. The number of samples is
/// the file's length divided by the bytes of a row, and the file must end with a whole row.
///
/// **Elements are in this machine's byte order.** Nothing in the file tells; one that was written
/// on a machine of the other order is read as other numbers, without an error.
///
/// Files are memory-mapped (see [the module](super) for what that means for files that change),
/// and rows are copied, or fetched by the device, from there. In [`DType::Bool`] any byte but 0 is
/// read as 1, and for that each row is read by a worker.
///
/// ```no_run
/// use batchline::{DType, formats::Raw};
/// let images = Raw::open("images.u8".as_ref(), DType::U8, &[3, 224, 224])?
///     .labels("classes.i64".as_ref(), DType::I64, &[])?;
/// // Behind a header of 16 bytes that is known to be there:
/// let others = Raw::open_at("images.dat".as_ref(), 16, DType::U8, &[3, 224, 224])?;
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug)]
pub struct Raw(Arrays);

impl Raw {
    /// Opens the file of the inputs, whose rows have this type and shape. No dimensions are a
    /// scalar's.
    ///
    /// # Errors
    /// * [`Error::Io`]: the file is missing or may not be read.
    /// * [`Error::Format`]: it is no regular file, is empty, or does not end with a whole row.
    /// * [`Error::Config`], [`Error::Length`], [`Error::Overflow`]: a row has no elements, has more
    ///   than seven dimensions, or its size overflows.
    pub fn open(inputs: &Path, dtype: DType, shape: &[u64]) -> Result<Self> {
        Self::open_at(inputs, 0, dtype, shape)
    }

    /// As [`open`](Self::open), with the first row at byte `offset`.
    ///
    /// # Errors
    /// As of [`open`](Self::open); [`Error::Format`] also where the file ends before `offset` or
    /// there.
    pub fn open_at(inputs: &Path, offset: u64, dtype: DType, shape: &[u64]) -> Result<Self> {
        Ok(Self(Arrays::new(open_array(inputs, offset, dtype, shape)?, None)?))
    }

    /// Gives each sample a label: the row of the same number in this file.
    ///
    /// # Errors
    /// As of [`open`](Self::open); [`Error::Format`] also where there are more or fewer rows than
    /// samples.
    pub fn labels(self, labels: &Path, dtype: DType, shape: &[u64]) -> Result<Self> {
        Ok(Self(self.0.with_labels(open_array(labels, 0, dtype, shape)?)?))
    }

    /// Reads `PATH,SHAPE,DTYPE[,offset=BYTES][,labels=PATH:DTYPE]`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let wrong = |problem: String| {
            Error::config(
                "dataset",
                format!("{:?}: {problem}", format!("raw:{text}")),
                "write raw:PATH,SHAPE,DTYPE[,offset=BYTES][,labels=PATH:DTYPE], as in \
                 raw:images.u8,3x224x224,u8,labels=classes.i64:i64",
            )
        };
        let dtype = |text: &str| {
            text.trim().parse().map_err(|err: crate::UnknownDType| wrong(err.to_string()))
        };
        let (mut offset, mut labels) = (None, None);
        // From the end on, as there may be commas in the path.
        let mut rest = text;
        let (path, shape, of_inputs) = loop {
            let Some((before, last)) = rest.rsplit_once(',') else {
                return Err(wrong("the path, the shape or the type is missing".to_owned()));
            };
            let last = last.trim();
            if let Some(bytes) = last.strip_prefix("offset=") {
                let parsed =
                    bytes.parse().map_err(|err| wrong(format!("the offset {bytes:?}: {err}")))?;
                if offset.replace(parsed).is_some() {
                    return Err(wrong("there are two offsets".to_owned()));
                }
            } else if let Some(name) = last.strip_prefix("labels=") {
                let (path, of_labels) = name
                    .rsplit_once(':')
                    .ok_or_else(|| wrong(format!("the labels {name:?} have no :DTYPE")))?;
                if labels.replace((path, dtype(of_labels)?)).is_some() {
                    return Err(wrong("there are two files of labels".to_owned()));
                }
            } else {
                let Some((path, shape)) = before.rsplit_once(',') else {
                    return Err(wrong("the path, the shape or the type is missing".to_owned()));
                };
                let (shape, dtype) = (parse_shape(shape).map_err(wrong)?, dtype(last)?);
                row_bytes(dtype, &shape).map_err(|err| wrong(err.chain()))?;
                break (path, shape, dtype);
            }
            rest = before;
        };
        let inputs = Self::open_at(Path::new(path), offset.unwrap_or(0), of_inputs, &shape)?;
        match labels {
            Some((path, dtype)) => inputs.labels(Path::new(path), dtype, &[]),
            None => Ok(inputs),
        }
    }
}

impl Dataset for Raw {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn spec(&self) -> &SampleSpec {
        self.0.spec()
    }

    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        self.0.read(index, sample)
    }

    fn contiguous(&self, tensor: usize) -> Option<&[u8]> {
        self.0.contiguous(tensor)
    }

    /// Of the length, the spec and the content: all of it up to 64 MiB per file, and above that
    /// samples of it. The files' names don't matter.
    fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }
}

/// Bytes of a row.
///
/// # Errors
/// There are none, or there can't be a batch of such rows.
fn row_bytes(dtype: DType, shape: &[u64]) -> Result<u64> {
    match Shape::new(shape)?.batched(1)?.bytes(dtype)? {
        0 => Err(Error::config("shape", format!("{shape:?} holds no elements"), "leave out the 0")),
        bytes => Ok(bytes),
    }
}

fn open_array(path: &Path, offset: u64, dtype: DType, shape: &[u64]) -> Result<Array> {
    let (file, len) = open_file(path)?;
    let row_bytes = row_bytes(dtype, shape)?;
    let Some(bytes) = len.checked_sub(offset).filter(|bytes| *bytes > 0) else {
        let problem = match (len, offset) {
            (0, _) => "is empty: there are no rows in it".to_owned(),
            _ => format!("is {len} bytes, so no row starts at byte {offset}"),
        };
        return Err(Error::format(path, problem));
    };
    let (rows, left_over) = (bytes / row_bytes, bytes % row_bytes);
    if left_over > 0 {
        let problem = format!(
            "truncated, or of other rows: {bytes} bytes from byte {offset} on are {rows} rows of \
             {row_bytes} bytes ({dtype} {shape:?}) and {left_over} more; check shape, type and offset, \
             or copy the file again"
        );
        return Err(Error::format(path, problem));
    }
    let encoding = match dtype {
        DType::Bool => Encoding::Truth,
        plain => Encoding::Plain(plain),
    };
    let stored = Stored { encoding, swapped: false };
    let layout = Layout::new(path, offset, stored, &[&[rows], shape].concat(), false)?;
    Array::new(path, FileBytes::map(path, &file, len)?, layout)
}
