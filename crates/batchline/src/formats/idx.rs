//! IDX, the format of the MNIST family.

use std::fs::File;
use std::io::{BufReader, ErrorKind, Read};
use std::path::Path;

use flate2::bufread::MultiGzDecoder;

use super::array::{Array, Arrays, Encoding, Layout, Stored};
use super::bytes::{FileBytes, first_bytes, open_file};
use crate::{BoxError, DType, Dataset, Error, MAX_RANK, Result, SampleMut, SampleSpec};

/// Two zeros, the type code, the number of dimensions.
const MAGIC_BYTES: usize = 4;
/// What a gzip file starts with.
const GZIP_MAGIC: [u8; 2] = [0x1f, 0x8b];
/// A compressed byte stands for at most this many bytes.
const DEFLATE_RATIO: u64 = 1032;

/// The images of an IDX file, with the labels of another.
///
/// IDX is what MNIST, Fashion-MNIST, EMNIST and others come in: a magic number, the extent of each
/// dimension, then the elements, all big-endian. Elements are delivered in the machine's byte
/// order, in the type they are stored in: `u8`, `i8`, `i16`, `i32`, `f32` or `f64`. The first
/// dimension counts samples and may be followed by up to seven more, which are the shape of a
/// sample's input. Labels have one dimension, so that each label is a scalar.
///
/// Files are memory-mapped (see [the module](super) for what that means for files that change);
/// gzip files, told by their content, are decompressed into memory once, at opening, and never to
/// more bytes than their IDX header says.
///
/// ```no_run
/// use batchline::formats::Idx;
/// let images = "mnist/train-images-idx3-ubyte".as_ref();
/// let labels = "mnist/train-labels-idx1-ubyte.gz".as_ref();
/// let mnist = Idx::open(images, Some(labels))?;
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug)]
pub struct Idx(Arrays);

impl Idx {
    /// Opens `images` (`[samples, …]`) and, if samples are to have labels, `labels` (`[samples]`).
    ///
    /// # Errors
    /// * [`Error::Io`]: a file is missing or may not be read.
    /// * [`Error::Format`]: it is no IDX file, is truncated, goes on behind its end, or is a
    ///   corrupt gzip file; the labels are not of one dimension; the files have different numbers
    ///   of samples.
    pub fn open(images: &Path, labels: Option<&Path>) -> Result<Self> {
        let images = open_array(images)?.0;
        let labels = match labels {
            Some(path) => {
                let (array, rank) = open_array(path)?;
                if rank != 1 {
                    let problem = format!(
                        "has {rank} dimensions, but labels have 1: give the images first, \
                         then the labels"
                    );
                    return Err(Error::format(path, problem));
                }
                Some(array)
            }
            None => None,
        };
        Ok(Self(Arrays::new(images, labels)?))
    }
}

impl Dataset for Idx {
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

    /// Of the length, the spec and the content: all of it up to 64 MiB per file (decompressed),
    /// and above that samples of it. The files' names don't matter, nor whether they are
    /// compressed.
    fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }
}

/// The array in a file, and its number of dimensions.
fn open_array(path: &Path) -> Result<(Array, usize)> {
    let (file, len) = open_file(path)?;
    let (bytes, layout) = if first_bytes(path, &file, GZIP_MAGIC.len())? == GZIP_MAGIC {
        let (bytes, layout) = decompress(path, &file, len)?;
        (FileBytes::Owned(bytes), layout)
    } else {
        let bytes = FileBytes::map(path, &file, len)?;
        let layout = header(path, bytes.as_slice())?;
        (bytes, layout)
    };
    Ok((Array::new(path, bytes, layout)?, layout.shape.rank()))
}

/// Reads the header at the start of `bytes`.
fn header(path: &Path, bytes: &[u8]) -> Result<Layout> {
    let start = header_bytes(path, bytes)?;
    let code = bytes.get(2).copied().unwrap_or(0);
    let encoding = Encoding::Plain(match code {
        0x08 => DType::U8,
        0x09 => DType::I8,
        0x0b => DType::I16,
        0x0c => DType::I32,
        0x0d => DType::F32,
        0x0e => DType::F64,
        _ => {
            let problem = format!(
                "unknown type code 0x{code:02x}: IDX has 0x08 (u8), 0x09 (i8), 0x0b (i16), \
                 0x0c (i32), 0x0d (f32) and 0x0e (f64)"
            );
            return Err(Error::format(path, problem));
        }
    });
    let stored = Stored { encoding, swapped: cfg!(target_endian = "little") };
    let dims = bytes.get(MAGIC_BYTES..start).ok_or_else(|| {
        let len = bytes.len();
        let problem = format!("truncated: the header is {start} bytes, the file {len}");
        Error::format(path, problem)
    })?;
    let dims: Vec<u64> =
        dims.as_chunks().0.iter().map(|dim| u64::from(u32::from_be_bytes(*dim))).collect();
    Layout::new(path, start as u64, stored, &dims, false)
}

/// Bytes of the header, by the magic number that `bytes` start with.
fn header_bytes(path: &Path, bytes: &[u8]) -> Result<usize> {
    match bytes {
        [0, 0, _, rank, ..] if usize::from(*rank) <= MAX_RANK => {
            Ok(MAGIC_BYTES + 4 * usize::from(*rank))
        }
        [0, 0, _, rank, ..] => {
            let problem = format!("has {rank} dimensions, at most {MAX_RANK} are supported");
            Err(Error::format(path, problem))
        }
        [a, b, c, d, ..] => {
            let remedy = if *a == b'<' {
                "it looks like a web page, so download the file again"
            } else {
                "is it another kind of file?"
            };
            let problem = format!(
                "no IDX file: it starts with {a:02x} {b:02x} {c:02x} {d:02x}, not with 00 00, a \
                 type code and the number of dimensions; {remedy}"
            );
            Err(Error::format(path, problem))
        }
        _ => {
            let len = bytes.len();
            let problem = format!("truncated: {len} byte(s) are too few for an IDX header");
            Err(Error::format(path, problem))
        }
    }
}

/// Decompresses a gzip file of `len` bytes, up to the length that the IDX header in it says.
fn decompress(path: &Path, file: &File, len: u64) -> Result<(Vec<u8>, Layout)> {
    let mut stream = MultiGzDecoder::new(BufReader::new(file));
    let mut bytes = Vec::new();
    let mut read_up_to = |bytes: &mut Vec<u8>, len: u64| -> Result<()> {
        let missing = len.saturating_sub(bytes.len() as u64);
        match stream.by_ref().take(missing).read_to_end(bytes) {
            Ok(_) => Ok(()),
            Err(err) => Err(gzip_error(path, err, bytes.len())),
        }
    };
    read_up_to(&mut bytes, MAGIC_BYTES as u64)?;
    let header_len = header_bytes(path, &bytes)?;
    read_up_to(&mut bytes, header_len as u64)?;
    let layout = header(path, &bytes)?;
    let expected = layout.file_bytes(path)?;
    // Reserved at once, since growing could take twice as much; but a header that lies is believed
    // only up to what so short a file can hold. If the system refuses, reading below tells.
    let plausible = expected.min(len.saturating_mul(DEFLATE_RATIO));
    if let Ok(plausible) = usize::try_from(plausible) {
        let _ = bytes.try_reserve_exact(plausible.saturating_sub(bytes.len()));
    }
    // One byte more than there should be makes the stream tell whether it ends there; only at its
    // end does it check the checksum.
    read_up_to(&mut bytes, expected.saturating_add(1))?;
    if bytes.len() as u64 > expected {
        let problem = format!(
            "decompresses to more than the {expected} bytes that its header says (shape {}): \
             the file is corrupt or hostile",
            layout.shape
        );
        return Err(Error::format(path, problem));
    }
    Ok((bytes, layout))
}

fn gzip_error(path: &Path, err: std::io::Error, got: usize) -> Error {
    match err.kind() {
        ErrorKind::UnexpectedEof => Error::format(
            path,
            format!("the gzip data is cut short after {got} decompressed bytes: download it again"),
        ),
        ErrorKind::InvalidInput | ErrorKind::InvalidData => Error::format(
            path,
            format!(
                "the gzip data is corrupt after {got} decompressed bytes ({err}): download it again"
            ),
        ),
        _ => Error::io(path, "decompress", err),
    }
}
