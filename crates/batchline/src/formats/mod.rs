//! Data sets on disk, and one that is computed: [`Idx`] (the format of MNIST), [`Npy`] (numpy's
//! arrays), [`Raw`] (rows without a header) and [`Synthetic`].
//!
//! Files are memory-mapped: opening a data set reads headers only, a sample is one copy out of the
//! page cache, and many processes share one copy of the data. **A mapped file must not be made
//! shorter while it is open**: a Unix system then kills the process (`SIGBUS`) on a read behind the
//! new end. Lengths are checked against the headers when a file is opened; no check made later
//! could prevent it. To replace a file that may be in use, write a new one beside it and rename it
//! over the old: whoever has the old one mapped keeps it. Compressed files are read into memory at
//! opening, and are not exposed to this.
//!
//! Every file is taken for hostile: whatever its bytes are, opening and reading end in samples or
//! in an [`Error`], never in a panic, nor in memory beyond what the data needs.

mod array;
mod bytes;
mod folder;
mod idx;
mod npy;
mod npy_header;
mod raw;
mod synthetic;

pub use idx::Idx;
pub use npy::Npy;
pub use raw::Raw;
pub use synthetic::Synthetic;

use std::path::Path;

use crate::{Dataset, Error, Result};
use folder::Kind;

/// Opens what `spec` names:
///
/// * a **folder** that holds one data set. Of IDX files: `*-images-idx3-ubyte` and
///   `*-labels-idx1-ubyte` with the same beginning, also as `*-images.idx3-ubyte`, each also with
///   `.gz` (the file without `.gz` is preferred). Of numpy's files: `images.npy` and `labels.npy`,
///   or `x.npy` and `y.npy`. Where there are no labels, samples have none.
/// * a **file**: the inputs, as `.npy` or IDX (told by its content). Labels are taken from the
///   file beside it that has the matching name of the list above, if there is one.
/// * **`raw:PATH,SHAPE,DTYPE`**, such as `raw:images.u8,3x224x224,u8`: the rows of a file without a
///   header, as [`Raw`] reads them. Behind it may follow `,offset=BYTES`, where the first row is,
///   and `,labels=PATH:DTYPE`, a file of as many scalars. There may be commas in the first path, but
///   not in that of the labels.
/// * **`synthetic:SAMPLES,SHAPE,DTYPE`**, such as `synthetic:100000,3x224x224,u8`: a
///   [`Synthetic`] data set.
///
/// The shape `1` is that of a scalar, which has no dimensions.
///
/// ```no_run
/// let digits = batchline::formats::open("data/digits")?;
/// println!("{} samples of {}", digits.len(), digits.spec().input());
/// # Ok::<(), batchline::Error>(())
/// ```
///
/// # Errors
/// * [`Error::Io`]: there is no such file or folder, or it may not be read.
/// * [`Error::Format`]: the folder holds no data set or several, or a file is not what its format
///   demands.
/// * [`Error::Config`]: `spec` starts with `raw:` or `synthetic:` and goes on wrongly, or is empty.
pub fn open(spec: &str) -> Result<Box<dyn Dataset>> {
    if let Some(parameters) = spec.strip_prefix("synthetic:") {
        return Ok(Box::new(Synthetic::parse(parameters)?));
    }
    if let Some(parameters) = spec.strip_prefix("raw:") {
        return Ok(Box::new(Raw::parse(parameters)?));
    }
    if spec.is_empty() {
        return Err(Error::config(
            "dataset",
            "is an empty name",
            "name a folder, a file, raw:PATH,SHAPE,DTYPE or synthetic:SAMPLES,SHAPE,DTYPE",
        ));
    }
    let found = folder::find(Path::new(spec))?;
    let labels = found.labels.as_deref();
    Ok(match found.kind {
        Kind::Idx => Box::new(Idx::open(&found.inputs, labels)?),
        Kind::Npy => Box::new(Npy::open(&found.inputs, labels)?),
    })
}

/// Reads the shape in a name: extents with an `x` between them, or `1` for a scalar.
///
/// # Errors
/// What is wrong.
fn parse_shape(text: &str) -> Result<Vec<u64>, String> {
    match text.trim() {
        "1" => Ok(Vec::new()),
        text => text
            .split('x')
            .map(|dim| dim.parse().map_err(|err| format!("the extent {dim:?}: {err}")))
            .collect(),
    }
}
