//! What the fuzz targets share: files to open, samples to read, and a plain reading of IDX to
//! compare with.

use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use batchline::{DType, Dataset, Error, SampleBuffer};

/// Data sets of more samples are read in part.
pub const READ_WHOLE: u64 = 4096;

/// A folder of this process. `ci/fuzz.sh` sets TMPDIR to a place in memory, and empties it.
static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let folder = std::env::temp_dir().join(format!("batchline-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&folder).expect("the folder for temporary files can be written");
    folder
});

/// A path in the folder of this process.
pub fn path(name: &str) -> PathBuf {
    FOLDER.join(name)
}

/// Writes a file into the folder of this process.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    let path = path(name);
    std::fs::write(&path, bytes).expect("the folder for temporary files can be written");
    path
}

/// The tensors of a sample, or why it can't be read.
pub fn read(dataset: &dyn Dataset, index: u64) -> Result<Vec<Vec<u8>>, String> {
    let mut buffer = SampleBuffer::new(dataset.spec()).expect("a sample fits memory");
    buffer
        .fill(|sample| dataset.read(index, sample))
        .map_err(|error| error.downcast_ref().map_or_else(|| error.to_string(), Error::chain))?;
    Ok((0..dataset.spec().tensors().len()).map(|tensor| buffer.bytes(tensor).to_vec()).collect())
}

/// The samples to read: all of a small data set, the ends of a large one.
pub fn indices(len: u64) -> impl Iterator<Item = u64> {
    (0..len.min(READ_WHOLE)).chain(len.saturating_sub(READ_WHOLE).max(READ_WHOLE)..len)
}

/// There is nothing behind the last sample.
pub fn check_end(dataset: &dyn Dataset) {
    for index in [dataset.len(), u64::MAX] {
        assert!(read(dataset, index).is_err(), "sample {index} of {}", dataset.len());
    }
}

/// An error is one line that a terminal shows as it is, whatever the bytes were that it is about.
pub fn check_error(error: &Error) {
    let text = error.chain();
    assert!(!text.is_empty() && !text.contains(char::is_control), "no clear line: {text:?}");
}

/// What an IDX file holds, read in the plainest way.
pub struct Idx<'a> {
    pub dtype: DType,
    pub dims: Vec<u64>,
    pub data: &'a [u8],
}

impl<'a> Idx<'a> {
    /// `None` where the file is not what the format demands.
    pub fn parse(file: &'a [u8]) -> Option<Self> {
        let (magic, rest) = file.split_first_chunk::<4>()?;
        let [0, 0, code, rank @ 1..=8] = *magic else { return None };
        let dtype = match code {
            0x08 => DType::U8,
            0x09 => DType::I8,
            0x0b => DType::I16,
            0x0c => DType::I32,
            0x0d => DType::F32,
            0x0e => DType::F64,
            _ => return None,
        };
        let (dims, data) = rest.split_at_checked(4 * usize::from(rank))?;
        let dims: Vec<u64> =
            dims.chunks(4).map(|dim| dim.iter().fold(0, |n, b| n << 8 | u64::from(*b))).collect();
        let bytes = dims.iter().try_fold(dtype.size() as u64, |n, dim| n.checked_mul(*dim))?;
        (bytes > 0 && bytes == data.len() as u64).then_some(Self { dtype, dims, data })
    }

    /// Checks that a data set holds exactly this.
    pub fn check(&self, dataset: &dyn Dataset) {
        assert_eq!(dataset.len(), self.dims[0]);
        let input = dataset.spec().input();
        assert_eq!((input.dtype, input.shape.dims()), (self.dtype, &self.dims[1..]));
        let row = self.data.len() / usize::try_from(self.dims[0]).expect("less than the data");
        for index in indices(dataset.len()) {
            let start = usize::try_from(index).expect("less than the data") * row;
            let mut expected = self.data[start..][..row].to_vec();
            if cfg!(target_endian = "little") {
                expected.chunks_mut(self.dtype.size()).for_each(<[u8]>::reverse);
            }
            assert_eq!(read(dataset, index).expect("a sample of the file"), [expected]);
        }
        check_end(dataset);
    }
}

/// Checks that a file is opened exactly if `expected` is something, and then holds it.
pub fn check_idx(path: &Path, expected: Option<&Idx<'_>>) {
    match (batchline::formats::Idx::open(path, None), expected) {
        (Ok(dataset), Some(expected)) => expected.check(&dataset),
        (Err(error), None) => check_error(&error),
        (Ok(_), None) => panic!("a bad file was accepted"),
        (Err(error), Some(_)) => panic!("a good file was refused: {}", error.chain()),
    }
}
