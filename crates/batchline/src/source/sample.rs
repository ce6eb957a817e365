//! One sample: the window that a data set writes, and the values that an iterator yields.

use std::fmt;
use std::sync::Arc;

use super::spec::{BatchLayout, SampleSpec};
use super::window::Rows;
use crate::{DType, Element, Error, Result, Shape};

/// The place in a batch that one sample is written to, without a copy in between.
///
/// The memory holds bytes of an earlier batch until they are overwritten. A data set must ask for
/// each tensor's window and fill it whole; a tensor that was not asked for is an error.
#[derive(Debug)]
pub struct SampleMut<'a> {
    spec: &'a SampleSpec,
    /// The windows of this one row.
    rows: Rows<'a>,
    /// Which tensors were asked for: bit `i` for tensor `i`, the last bit for all from 63 on.
    touched: u64,
    key: SampleKey,
}

/// What a sample is known by: the key of its random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct SampleKey {
    pub(crate) seed: u64,
    pub(crate) epoch: u64,
    pub(crate) index: u64,
}

impl<'a> SampleMut<'a> {
    pub(crate) fn new(spec: &'a SampleSpec, rows: Rows<'a>, key: SampleKey) -> Self {
        Self { spec, rows, touched: 0, key }
    }

    /// What the sample is made of.
    pub fn spec(&self) -> &SampleSpec {
        self.spec
    }

    /// The epoch in which the sample is read.
    pub fn epoch(&self) -> u64 {
        self.key.epoch
    }

    /// A seed for random augmentation. It depends on the loader's seed, the epoch and the sample's
    /// index, and on nothing else: not on threads, not on timing, not on the rank.
    pub fn random_seed(&self) -> u64 {
        crate::plan::mix(&[self.key.seed, self.key.epoch, self.key.index])
    }

    /// The bytes of the tensor at this place in [`SampleSpec::tensors`].
    ///
    /// # Panics
    /// There is no such tensor.
    pub fn bytes(&mut self, tensor: usize) -> &mut [u8] {
        self.touch(tensor);
        self.rows.all(tensor)
    }

    /// The bytes of the input.
    pub fn input(&mut self) -> &mut [u8] {
        self.bytes(0)
    }

    /// The bytes of the label, and none where samples have no label.
    pub fn label(&mut self) -> &mut [u8] {
        if self.spec.label_spec().is_some() { self.bytes(1) } else { &mut [] }
    }

    /// The bytes of input and label at once, for a decoder that makes both.
    pub fn input_and_label(&mut self) -> (&mut [u8], &mut [u8]) {
        if self.spec.label_spec().is_none() {
            return (self.input(), &mut []);
        }
        self.touch(0);
        self.touch(1);
        self.rows.pair(0, 1)
    }

    /// The bytes of the weight tensor at this place in [`SampleSpec::weights`].
    ///
    /// # Panics
    /// There is no such weight.
    pub fn weight(&mut self, weight: usize) -> &mut [u8] {
        self.bytes(self.spec.first_weight() + weight)
    }

    /// The elements of the tensor at this place in [`SampleSpec::tensors`].
    ///
    /// # Errors
    /// [`Error::DType`] when `T` is not its type.
    ///
    /// # Panics
    /// There is no such tensor.
    pub fn elements<T: Element>(&mut self, tensor: usize) -> Result<&mut [T]> {
        let spec = &self.spec.tensors()[tensor];
        if !T::matches(spec.dtype) {
            return Err(Error::DType {
                what: spec.name.clone(),
                expected: spec.dtype,
                found: T::DTYPE,
            });
        }
        // Rows start at multiples of the element size, in memory aligned to 8 at least.
        Ok(bytemuck::cast_slice_mut(self.bytes(tensor)))
    }

    /// Copies `data` into the tensor at this place in [`SampleSpec::tensors`].
    ///
    /// # Errors
    /// `T` is not its type, or `data` has another length.
    ///
    /// # Panics
    /// There is no such tensor.
    pub fn write<T: Element>(&mut self, tensor: usize, data: &[T]) -> Result<()> {
        let name = &self.spec.tensors()[tensor].name;
        let window = self.elements::<T>(tensor)?;
        if window.len() != data.len() {
            return Err(Error::Length {
                what: name.clone(),
                expected: window.len() as u64,
                found: data.len() as u64,
                unit: "elements",
            });
        }
        window.copy_from_slice(data);
        Ok(())
    }

    fn touch(&mut self, tensor: usize) {
        assert!(tensor < self.rows.tensors(), "a sample has no tensor {tensor}");
        self.touched |= 1 << tensor.min(63);
    }

    /// The first tensor that nobody asked for.
    pub(crate) fn untouched(&self) -> Option<&str> {
        let missing = (0..self.rows.tensors()).find(|i| self.touched & (1 << (*i).min(63)) == 0)?;
        Some(&self.spec.tensors()[missing].name)
    }
}

/// Memory for one sample, to try a data set without a loader.
///
/// ```
/// use batchline::{Dataset, DType, SampleBuffer, SampleSpec};
/// # fn check(dataset: &dyn Dataset) -> Result<(), batchline::BoxError> {
/// let mut buffer = SampleBuffer::new(dataset.spec())?;
/// buffer.fill(|sample| dataset.read(0, sample))?;
/// println!("{:?}", buffer.bytes(0));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct SampleBuffer {
    spec: SampleSpec,
    layout: BatchLayout,
    /// In words, so that elements of any type are aligned.
    memory: Vec<u64>,
}

impl SampleBuffer {
    /// # Errors
    /// A sample's size overflows.
    pub fn new(spec: &SampleSpec) -> Result<Self> {
        let layout = BatchLayout::new(spec, 1)?;
        let words = usize::try_from(layout.bytes / 8)
            .map_err(|_| Error::Overflow { what: "a sample".to_owned() })?;
        Ok(Self { spec: spec.clone(), layout, memory: vec![0; words] })
    }

    /// Calls `read` with the window to write.
    pub fn fill<R>(&mut self, read: impl FnOnce(&mut SampleMut<'_>) -> R) -> R {
        let rows = Rows::of_slice(bytemuck::cast_slice_mut(&mut self.memory), &self.layout);
        read(&mut SampleMut::new(&self.spec, rows, SampleKey::default()))
    }

    /// The bytes of the tensor at this place in [`SampleSpec::tensors`].
    ///
    /// # Panics
    /// There is no such tensor.
    pub fn bytes(&self, tensor: usize) -> &[u8] {
        let part = self.layout.parts[tensor];
        #[allow(clippy::cast_possible_truncation, reason = "within memory that exists")]
        let range = part.offset as usize..(part.offset + part.row_bytes) as usize;
        &bytemuck::cast_slice(&self.memory)[range]
    }
}

/// A tensor in the host's memory. Clones share it.
#[derive(Clone)]
pub struct HostTensor {
    dtype: DType,
    shape: Shape,
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
}

/// A vector seen as bytes, without a copy.
struct Elements<T>(Vec<T>);

impl<T: Element> AsRef<[u8]> for Elements<T> {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl HostTensor {
    /// A tensor of these elements, outermost dimension first.
    ///
    /// # Errors
    /// `data` is longer or shorter than `shape` says.
    pub fn new<T: Element>(data: Vec<T>, shape: &[u64]) -> Result<Self> {
        Self::from_bytes(T::DTYPE, shape, Elements(data))
    }

    /// One number.
    pub fn scalar<T: Element>(value: T) -> Self {
        let bytes = Arc::new(Elements(vec![value]));
        Self { dtype: T::DTYPE, shape: Shape::SCALAR, bytes }
    }

    /// A tensor over bytes that something else owns: a `Vec<u8>`, a mapped file.
    ///
    /// # Errors
    /// There are more or fewer bytes than `shape` says.
    pub fn from_bytes(
        dtype: DType,
        shape: &[u64],
        bytes: impl AsRef<[u8]> + Send + Sync + 'static,
    ) -> Result<Self> {
        let shape = Shape::new(shape)?;
        let (expected, found) = (shape.bytes(dtype)?, bytes.as_ref().len() as u64);
        if expected != found {
            return Err(Error::Length {
                what: format!("a {dtype} tensor of shape {shape}"),
                expected,
                found,
                unit: "bytes",
            });
        }
        Ok(Self { dtype, shape, bytes: Arc::new(bytes) })
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// The shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The elements' bytes, in the machine's byte order.
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }
}

impl fmt::Debug for HostTensor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostTensor({} {})", self.dtype, self.shape)
    }
}

/// Several tensors that belong together: one sample, or (with one more dimension in front of each)
/// a batch of them.
#[derive(Debug, Clone)]
pub struct Sample {
    pub(crate) input: HostTensor,
    pub(crate) label: Option<HostTensor>,
    pub(crate) weights: Vec<(String, HostTensor)>,
}

impl Sample {
    /// A sample with an input only.
    pub fn new(input: HostTensor) -> Self {
        Self { input, label: None, weights: Vec::new() }
    }

    /// Adds or replaces the label.
    #[must_use]
    pub fn label(mut self, label: HostTensor) -> Self {
        self.label = Some(label);
        self
    }

    /// Adds a weight tensor.
    #[must_use]
    pub fn weight(mut self, name: &str, weight: HostTensor) -> Self {
        self.weights.push((name.to_owned(), weight));
        self
    }

    /// The tensors in the order of [`SampleSpec::tensors`].
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &HostTensor> {
        let weights = self.weights.iter().map(|(_, weight)| weight);
        std::iter::once(&self.input).chain(&self.label).chain(weights)
    }

    /// The spec of this sample.
    pub(crate) fn spec(&self) -> Result<SampleSpec> {
        self.spec_with(|tensor| Ok(tensor.shape))
    }

    /// The spec of one row, where this is a batch, and the number of rows.
    pub(crate) fn row_spec(&self) -> Result<(SampleSpec, u64)> {
        let rows = self.input.shape.dims().first().copied();
        let spec = self.spec_with(|tensor| match (tensor.shape.row(), rows) {
            (Some(row), Some(rows)) if tensor.shape.dims()[0] == rows => Ok(row),
            _ => Err(Error::Source {
                problem: format!(
                    "the source gave a tensor of shape {} beside an input of shape {}: \
                     the first dimension of each must be the number of samples",
                    tensor.shape, self.input.shape
                ),
            }),
        })?;
        Ok((spec, rows.unwrap_or(0)))
    }

    fn spec_with(&self, shape: impl Fn(&HostTensor) -> Result<Shape>) -> Result<SampleSpec> {
        let mut spec = SampleSpec::new(self.input.dtype, shape(&self.input)?.dims())?;
        if let Some(label) = &self.label {
            spec = spec.label(label.dtype, shape(label)?.dims())?;
        }
        for (name, weight) in &self.weights {
            spec = spec.weight(name, weight.dtype, shape(weight)?.dims())?;
        }
        Ok(spec)
    }
}
