//! Sources made of closures and iterators.

use std::fmt;

use super::{DataSource, Dataset, HostTensor, Sample, SampleMut, SampleSpec};
use crate::{BoxError, Error, Result};

/// A [`Dataset`] made of a closure.
///
/// ```
/// use batchline::{DType, FnDataset, SampleSpec};
/// let spec = SampleSpec::new(DType::I64, &[])?;
/// let dataset = FnDataset::new(100, spec, |index, sample| {
///     sample.write(0, &[index as i64])?;
///     Ok(())
/// });
/// # Ok::<(), batchline::Error>(())
/// ```
pub struct FnDataset<F> {
    len: u64,
    spec: SampleSpec,
    read: F,
}

impl<F> FnDataset<F>
where
    F: Fn(u64, &mut SampleMut<'_>) -> Result<(), BoxError> + Send + Sync,
{
    /// A data set of `len` samples, each written by `read`. See [`Dataset::read`] for its duties.
    pub fn new(len: u64, spec: SampleSpec, read: F) -> Self {
        Self { len, spec, read }
    }
}

impl<F> Dataset for FnDataset<F>
where
    F: Fn(u64, &mut SampleMut<'_>) -> Result<(), BoxError> + Send + Sync,
{
    fn len(&self) -> u64 {
        self.len
    }

    fn spec(&self) -> &SampleSpec {
        &self.spec
    }

    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        (self.read)(index, sample)
    }
}

impl<F> fmt::Debug for FnDataset<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FnDataset").field("len", &self.len).field("spec", &self.spec).finish()
    }
}

/// A [`DataSource`] made of a closure that is called with the batch size.
///
/// It cannot be reset, so it serves one epoch.
pub struct FnSource<F> {
    next: F,
    started: bool,
}

impl<F> FnSource<F>
where
    F: FnMut(usize) -> Result<Option<Sample>, BoxError> + Send,
{
    /// A source whose batches are what `next` returns. See [`DataSource::get_batch`].
    pub fn new(next: F) -> Self {
        Self { next, started: false }
    }
}

impl<F> DataSource for FnSource<F>
where
    F: FnMut(usize) -> Result<Option<Sample>, BoxError> + Send,
{
    fn get_batch(&mut self, batch_size: usize) -> Result<Option<Sample>, BoxError> {
        self.started = true;
        (self.next)(batch_size)
    }

    fn reset(&mut self) -> Result<(), BoxError> {
        if self.started {
            return Err("a source made of a closure can't start again: \
                        implement DataSource, or ask for one epoch"
                .into());
        }
        Ok(())
    }
}

impl<F> fmt::Debug for FnSource<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FnSource").field("started", &self.started).finish()
    }
}

/// A [`DataSource`] over an iterator of samples, which is made anew for each epoch.
///
/// ```
/// use batchline::{HostTensor, IterSource, Sample};
/// let source = IterSource::new(|| {
///     (0..100u8).map(|n| {
///         let input = HostTensor::new(vec![n; 4], &[4])?;
///         Ok(Sample::new(input).label(HostTensor::scalar(i64::from(n))))
///     })
/// });
/// ```
pub struct IterSource<F, I> {
    make: F,
    samples: Option<I>,
    /// Samples of the batch at hand. They stay here when the iterator yields an error, so that the
    /// next call goes on behind the bad one.
    pending: Vec<Sample>,
}

impl<F, I> IterSource<F, I>
where
    F: FnMut() -> I + Send,
    I: Iterator<Item = Result<Sample, BoxError>> + Send,
{
    /// A source over the iterators that `make` returns, one per epoch.
    pub fn new(make: F) -> Self {
        Self { make, samples: None, pending: Vec::new() }
    }
}

impl<F, I> DataSource for IterSource<F, I>
where
    F: FnMut() -> I + Send,
    I: Iterator<Item = Result<Sample, BoxError>> + Send,
{
    fn get_batch(&mut self, batch_size: usize) -> Result<Option<Sample>, BoxError> {
        let samples = self.samples.get_or_insert_with(&mut self.make);
        while self.pending.len() < batch_size {
            let Some(sample) = samples.next() else { break };
            let sample = sample?;
            if let Some(first) = self.pending.first()
                && let Some(difference) = first.spec()?.difference(&sample.spec()?)
            {
                let problem = format!("samples of one batch differ: {difference}");
                return Err(Error::Source { problem }.into());
            }
            self.pending.push(sample);
        }
        let samples = std::mem::take(&mut self.pending);
        if samples.is_empty() { Ok(None) } else { Ok(Some(stack(&samples)?)) }
    }

    fn can_retry(&self) -> bool {
        // The bad item is gone from the iterator.
        false
    }

    fn reset(&mut self) -> Result<(), BoxError> {
        self.samples = None;
        self.pending.clear();
        Ok(())
    }
}

impl<F, I> fmt::Debug for IterSource<F, I> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IterSource").field("started", &self.samples.is_some()).finish()
    }
}

/// Makes a batch of samples that are alike.
fn stack(samples: &[Sample]) -> Result<Sample> {
    let spec = samples[0].spec()?;
    let rows = samples.len() as u64;
    let mut tensors = Vec::new();
    for (place, tensor) in spec.tensors().iter().enumerate() {
        let parts: Vec<&[u8]> = samples
            .iter()
            .filter_map(|sample| sample.tensors().nth(place))
            .map(HostTensor::bytes)
            .collect();
        let shape = tensor.shape.batched(rows)?;
        tensors.push(HostTensor::from_bytes(tensor.dtype, shape.dims(), parts.concat())?);
    }
    let mut tensors = tensors.into_iter();
    let mut batch =
        Sample { input: tensors.next().expect("an input"), label: None, weights: vec![] };
    if spec.label_spec().is_some() {
        batch.label = tensors.next();
    }
    batch.weights = spec.weights().iter().map(|weight| weight.name.clone()).zip(tensors).collect();
    Ok(batch)
}
