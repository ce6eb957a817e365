//! The data set that the user named.

use batchline::{BoxError, Dataset, Result, SampleMut, SampleSpec, formats};

/// A data set of any format.
pub(crate) struct Opened(Box<dyn Dataset>);

impl Opened {
    /// Opens what `spec` names.
    pub(crate) fn open(spec: &str) -> Result<Self> {
        formats::open(spec).map(Self)
    }
}

impl Dataset for Opened {
    fn len(&self) -> u64 {
        self.0.len()
    }

    fn spec(&self) -> &SampleSpec {
        self.0.spec()
    }

    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        self.0.read(index, sample)
    }

    fn fingerprint(&self) -> u64 {
        self.0.fingerprint()
    }
}
