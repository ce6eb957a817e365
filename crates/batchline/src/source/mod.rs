//! Where samples come from: [`Dataset`] (random access, the fast one) and [`DataSource`] (pull),
//! with adapters from closures, iterators and tensors in memory.

mod adapters;
mod memory;
mod sample;
mod spec;
mod window;

pub use adapters::{FnDataset, FnSource, IterSource};
pub use memory::InMemory;
pub use sample::{HostTensor, Sample, SampleBuffer, SampleMut};
pub use spec::{SampleSpec, TensorSpec};

pub(crate) use sample::SampleKey;
pub(crate) use spec::{BatchLayout, Part, TENSOR_ALIGNMENT};
pub(crate) use window::Rows;

use crate::BoxError;

/// Samples that can be read in any order, from all workers at once, straight into the batch.
///
/// ```
/// use batchline::{BoxError, Dataset, DType, SampleMut, SampleSpec};
///
/// /// The squares of the first thousand numbers.
/// struct Squares(SampleSpec);
///
/// impl Dataset for Squares {
///     fn len(&self) -> u64 {
///         1000
///     }
///     fn spec(&self) -> &SampleSpec {
///         &self.0
///     }
///     fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
///         sample.write(0, &[index as f32])?;
///         sample.write(1, &[(index * index) as f32])?;
///         Ok(())
///     }
/// }
/// let squares = Squares(SampleSpec::new(DType::F32, &[])?.label(DType::F32, &[])?);
/// # assert_eq!(squares.len(), 1000);
/// # Ok::<(), batchline::Error>(())
/// ```
pub trait Dataset: Send + Sync {
    /// The number of samples. It must not change.
    fn len(&self) -> u64;

    /// Whether there are no samples.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// What a sample is made of. It must not change.
    fn spec(&self) -> &SampleSpec;

    /// Writes sample `index`, below [`len`](Self::len), filling every tensor's window whole.
    /// Called from several threads at once. What it writes must depend on nothing but `index` and
    /// [`SampleMut::random_seed`], or batches will differ from run to run.
    ///
    /// # Errors
    /// Whatever is wrong; the loader adds which sample it was and follows its
    /// [`ErrorPolicy`](crate::ErrorPolicy). A panic counts as an error.
    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError>;

    /// All samples of one tensor, where they lie in memory one after another as they would be
    /// delivered: [`len`](Self::len) times the bytes of that tensor. With such memory for every
    /// tensor the loader copies rows from it by itself and does not call [`read`](Self::read). It
    /// must not change.
    fn contiguous(&self, tensor: usize) -> Option<&[u8]> {
        let _ = tensor;
        None
    }

    /// A number that tells this data set from others, so that a saved state is not continued with
    /// another one. By default it covers length and spec; one that also covers the content is
    /// better.
    fn fingerprint(&self) -> u64 {
        default_fingerprint(self.len(), self.spec())
    }
}

macro_rules! forward_dataset {
    ($($pointer:ty),*) => {$(
        #[deny(clippy::missing_trait_methods)]
        impl<D: Dataset + ?Sized> Dataset for $pointer {
            fn len(&self) -> u64 {
                (**self).len()
            }
            fn is_empty(&self) -> bool {
                (**self).is_empty()
            }
            fn spec(&self) -> &SampleSpec {
                (**self).spec()
            }
            fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
                (**self).read(index, sample)
            }
            fn contiguous(&self, tensor: usize) -> Option<&[u8]> {
                (**self).contiguous(tensor)
            }
            fn fingerprint(&self) -> u64 {
                (**self).fingerprint()
            }
        }
    )*};
}

forward_dataset!(Box<D>, std::sync::Arc<D>);

/// A fingerprint of length and spec.
pub(crate) fn default_fingerprint(len: u64, spec: &SampleSpec) -> u64 {
    let mut hash = xxhash_rust::xxh3::Xxh3::new();
    hash.update(&len.to_le_bytes());
    for tensor in spec.tensors() {
        hash.update(tensor.to_string().as_bytes());
        hash.update(&[0]);
    }
    hash.digest()
}

/// A source that yields batches one after another. Calls never overlap, and come from the loader's
/// worker threads.
pub trait DataSource: Send {
    /// The next batch: tensors with the number of samples as their first dimension, at least one
    /// and at most `batch_size`. Only the last batch before the end may be short. `None` is the
    /// end of the data; after it the next call is [`reset`](Self::reset) or none.
    ///
    /// # Errors
    /// Whatever is wrong. Under [`ErrorPolicy::Retry`](crate::ErrorPolicy::Retry) and
    /// [`Skip`](crate::ErrorPolicy::Skip) the call is made again.
    fn get_batch(&mut self, batch_size: usize) -> Result<Option<Sample>, BoxError>;

    /// The number of samples of an epoch, if it is known.
    fn size(&self) -> Option<u64> {
        None
    }

    /// Goes back to the first sample. Called before each epoch, the first one included.
    ///
    /// # Errors
    /// Whatever is wrong; it ends the stream.
    fn reset(&mut self) -> Result<(), BoxError>;

    /// Whether a [`get_batch`](Self::get_batch) that failed may be called again for the same data.
    /// Where it can't, as for an iterator that has moved on, [`ErrorPolicy::Retry`] fails at once.
    ///
    /// [`ErrorPolicy::Retry`]: crate::ErrorPolicy::Retry
    fn can_retry(&self) -> bool {
        true
    }

    /// As [`Dataset::fingerprint`].
    fn fingerprint(&self) -> u64 {
        self.size().unwrap_or(0)
    }
}

#[deny(clippy::missing_trait_methods)]
impl<S: DataSource + ?Sized> DataSource for Box<S> {
    fn get_batch(&mut self, batch_size: usize) -> Result<Option<Sample>, BoxError> {
        (**self).get_batch(batch_size)
    }
    fn size(&self) -> Option<u64> {
        (**self).size()
    }
    fn reset(&mut self) -> Result<(), BoxError> {
        (**self).reset()
    }
    fn can_retry(&self) -> bool {
        (**self).can_retry()
    }
    fn fingerprint(&self) -> u64 {
        (**self).fingerprint()
    }
}
