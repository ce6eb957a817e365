//! numpy's arrays.

use std::path::Path;

use super::array::{Array, Arrays, Layout};
use super::bytes::{FileBytes, open_file};
use super::npy_header;
use crate::{BoxError, Dataset, Error, Result, SampleMut, SampleSpec};

/// What an npy file starts with. The version follows, as two bytes.
pub(super) const MAGIC: &[u8] = b"\x93NUMPY";

/// The inputs of a `.npy` file (what `numpy.save` writes), with the labels of another.
///
/// The first dimension of each array counts samples; the others are the shape of a sample's input
/// or label. Elements are delivered in the machine's byte order, whatever theirs is:
///
/// | numpy's dtype              | delivered as                                            |
/// |----------------------------|---------------------------------------------------------|
/// | `b1`                       | [`Bool`](crate::DType::Bool), any byte but 0 as 1       |
/// | `i1`, `i2`, `i4`, `i8`     | `I8`, `I16`, `I32`, `I64`                               |
/// | `u1`                       | `U8`                                                    |
/// | `u2`, `u4`                 | `I32`, `I64`, which hold every value                    |
/// | `u8` (64 bits)             | `I64`; reading a sample with a larger value is an error |
/// | `f2`, `f4`, `f8`           | `F16`, `F32`, `F64`                                     |
///
/// Complex numbers, strings, times, raw bytes and structures are refused with a hint at how to
/// save them; Python objects are refused for good, since reading them can run code.
///
/// Files are memory-mapped (see [the module](super) for what that means for files that change). In
/// C order a sample is one piece of the file; in Fortran order its elements are gathered one by
/// one from all over it, which is slow.
///
/// ```no_run
/// use batchline::formats::Npy;
/// let dataset = Npy::open("images.npy".as_ref(), Some("labels.npy".as_ref()))?;
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug)]
pub struct Npy(Arrays);

impl Npy {
    /// Opens `inputs` (`[samples, …]`) and, if samples are to have labels, `labels`
    /// (`[samples, …]`).
    ///
    /// # Errors
    /// * [`Error::Io`]: a file is missing or may not be read.
    /// * [`Error::Format`]: it is no npy file of version 1, 2 or 3; its header is malformed; its
    ///   data are shorter or longer than the header says; its dtype is not in the table above; it
    ///   has no dimensions, no elements, or more than eight dimensions; the files have different
    ///   numbers of samples.
    pub fn open(inputs: &Path, labels: Option<&Path>) -> Result<Self> {
        let labels = labels.map(open_array).transpose()?;
        Ok(Self(Arrays::new(open_array(inputs)?, labels)?))
    }
}

impl Dataset for Npy {
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

fn open_array(path: &Path) -> Result<Array> {
    let (file, len) = open_file(path)?;
    let bytes = FileBytes::map(path, &file, len)?;
    let layout = layout(path, bytes.as_slice())?;
    Array::new(path, bytes, layout)
}

/// Reads what is in front of the elements: magic, version, header length, header.
fn layout(path: &Path, bytes: &[u8]) -> Result<Layout> {
    let truncated = |what: &str, needed: usize| {
        let found = bytes.len();
        let problem = format!(
            "truncated: {what} ends at byte {needed}, the file at {found}; copy or save it again"
        );
        Error::format(path, problem)
    };
    let start = &bytes[..bytes.len().min(MAGIC.len())];
    if start != MAGIC {
        let problem = if bytes.starts_with(b"PK\x03\x04") {
            "is a zip (npz) file: save each array by itself, with `numpy.save`".to_owned()
        } else if MAGIC.starts_with(start) {
            return Err(truncated("the magic number", MAGIC.len()));
        } else {
            format!(
                "no npy file: it starts with {}, not with 93 4e 55 4d 50 59 (\\x93NUMPY)",
                start.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
            )
        };
        return Err(Error::format(path, problem));
    }
    let (header_at, header_len) = match bytes[MAGIC.len()..] {
        [1, 0, a, b, ..] => (10usize, usize::from(u16::from_le_bytes([a, b]))),
        [2 | 3, 0, a, b, c, d, ..] => {
            let len = u32::from_le_bytes([a, b, c, d]);
            (12, usize::try_from(len).unwrap_or(usize::MAX))
        }
        [1..=3, 0, ..] | [1..=3] | [] => return Err(truncated("the header's length", 12)),
        [major, ref rest @ ..] => {
            let minor = rest.first().copied().unwrap_or(0);
            let problem = format!(
                "npy version {major}.{minor} is unknown: 1.0, 2.0 and 3.0 are; save the array anew"
            );
            return Err(Error::format(path, problem));
        }
    };
    let data_at = header_at.saturating_add(header_len);
    let header = bytes.get(header_at..data_at).ok_or_else(|| truncated("the header", data_at))?;
    let header = npy_header::parse(header)
        .map_err(|problem| Error::format(path, format!("malformed npy header: {problem}")))?;
    let stored =
        npy_header::dtype(&header.descr).map_err(|problem| Error::format(path, problem))?;
    Layout::new(path, data_at as u64, stored, &header.shape, header.fortran)
}
