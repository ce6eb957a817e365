//! A data set that is computed, to measure everything but the disk.

use half::{bf16, f16};
use xxhash_rust::xxh3::Xxh3;

use super::parse_shape;
use crate::source::default_fingerprint;
use crate::{BoxError, DType, Dataset, Error, Result, SampleMut, SampleSpec};

/// Elements after which the content of a sample repeats.
const PERIOD: usize = 4096;
/// How many of the first elements number the sample.
const DIGITS: usize = 4;

/// Samples that cost as little as a copy from cache, to measure a pipeline without a disk, and to
/// try one without data.
///
/// The content is a fixed function of the index, so that runs can be compared. Its first four
/// elements are the index in base 256, lowest digit first, which makes samples of four or more
/// elements differ up to 2³² of them (not those of [`DType::Bool`]); the others are noise, from a
/// sequence that repeats after 4096 elements and starts elsewhere in each sample. A number `n` of
/// 0..256 stands for `n / 256` in the floating-point types, which all of them hold exactly, for
/// `n as i8` in [`DType::I8`], for `n % 2` in [`DType::Bool`], and for `n` in the other types.
///
/// The label is an [`DType::I64`] scalar: the class `index % 1000`.
///
/// ```
/// use batchline::{DType, Dataset, SampleBuffer, formats::Synthetic};
/// let dataset = Synthetic::new(1_281_167, &[3, 224, 224], DType::U8)?;
/// let mut sample = SampleBuffer::new(dataset.spec())?;
/// sample.fill(|window| dataset.read(5, window)).unwrap();
/// assert_eq!(sample.bytes(0)[..4], [5, 0, 0, 0]);
/// assert_eq!(sample.bytes(1), 5i64.to_ne_bytes());
/// # Ok::<(), batchline::Error>(())
/// ```
#[derive(Debug)]
pub struct Synthetic {
    len: u64,
    spec: SampleSpec,
    /// The noise: `PERIOD` elements.
    noise: Vec<u8>,
}

impl Synthetic {
    /// The number of classes that labels name.
    pub const CLASSES: u64 = 1000;

    /// `len` samples whose inputs have this shape and type. There may be none.
    ///
    /// # Errors
    /// `shape` has too many dimensions, or its size overflows.
    pub fn new(len: u64, shape: &[u64], dtype: DType) -> Result<Self> {
        let spec = SampleSpec::new(dtype, shape)?.label(DType::I64, &[])?;
        spec.bytes()?;
        let noise = (0..PERIOD as u64)
            .flat_map(|place| {
                encode(low_byte(scramble(place)), dtype).into_iter().take(dtype.size())
            })
            .collect();
        Ok(Self { len, spec, noise })
    }

    /// Reads `SAMPLES,SHAPE,DTYPE`.
    pub(super) fn parse(text: &str) -> Result<Self> {
        let wrong = |problem: String| {
            Error::config(
                "dataset",
                format!("{:?}: {problem}", format!("synthetic:{text}")),
                "write synthetic:SAMPLES,SHAPE,DTYPE, as in synthetic:100000,3x224x224,u8",
            )
        };
        let parts: Vec<&str> = text.split(',').map(str::trim).collect();
        let [len, shape, dtype] = parts[..] else {
            return Err(wrong(format!("{} part(s) instead of three", parts.len())));
        };
        let len =
            len.parse().map_err(|err| wrong(format!("the number of samples {len:?}: {err}")))?;
        let dims = parse_shape(shape).map_err(wrong)?;
        let dtype = dtype.parse().map_err(|err: crate::UnknownDType| wrong(err.to_string()))?;
        Self::new(len, &dims, dtype).map_err(|err| wrong(err.chain()))
    }
}

impl Dataset for Synthetic {
    fn len(&self) -> u64 {
        self.len
    }

    fn spec(&self) -> &SampleSpec {
        &self.spec
    }

    fn read(&self, index: u64, sample: &mut SampleMut<'_>) -> Result<(), BoxError> {
        if index >= self.len {
            let problem = format!("there is no sample {index}, there are {}", self.len);
            return Err(Error::Source { problem }.into());
        }
        let dtype = self.spec.input().dtype;
        let size = dtype.size();
        let (input, label) = sample.input_and_label();
        #[allow(clippy::cast_possible_truncation, reason = "less than PERIOD")]
        let start = (scramble(index) % PERIOD as u64) as usize;
        // From the start to the end of the noise first, then the whole of it again and again.
        let (head, rest) = input.split_at_mut(input.len().min((PERIOD - start) * size));
        head.copy_from_slice(&self.noise[start * size..][..head.len()]);
        for part in rest.chunks_mut(self.noise.len()) {
            part.copy_from_slice(&self.noise[..part.len()]);
        }
        for (digit, element) in input.chunks_exact_mut(size).take(DIGITS).enumerate() {
            element.copy_from_slice(&encode(low_byte(index >> (8 * digit)), dtype)[..size]);
        }
        let class = index % Self::CLASSES;
        if label.len() != size_of_val(&class) {
            let problem = "the window has no place for an i64 label".to_owned();
            return Err(Error::Source { problem }.into());
        }
        label.copy_from_slice(&class.to_ne_bytes());
        Ok(())
    }

    /// Of the length and the spec, on which the content depends.
    fn fingerprint(&self) -> u64 {
        let mut hash = Xxh3::new();
        hash.update(b"synthetic");
        hash.update(&default_fingerprint(self.len, &self.spec).to_le_bytes());
        hash.digest()
    }
}

fn low_byte(number: u64) -> u8 {
    number.to_le_bytes()[0]
}

/// Spreads numbers evenly: the finalizer of splitmix64.
fn scramble(number: u64) -> u64 {
    let mut z = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// The element that stands for `number`, in the first [`DType::size`] bytes.
fn encode(number: u8, dtype: DType) -> [u8; 8] {
    fn padded<const N: usize>(bytes: [u8; N]) -> [u8; 8] {
        let mut out = [0; 8];
        out[..N].copy_from_slice(&bytes);
        out
    }
    let fraction = f32::from(number) / 256.0;
    match dtype {
        DType::F32 => padded(fraction.to_ne_bytes()),
        DType::F16 => padded(f16::from_f32(fraction).to_ne_bytes()),
        DType::BF16 => padded(bf16::from_f32(fraction).to_ne_bytes()),
        DType::F64 => padded(f64::from(fraction).to_ne_bytes()),
        DType::I8 | DType::U8 => padded([number]),
        DType::I16 => padded(i16::from(number).to_ne_bytes()),
        DType::I32 => padded(i32::from(number).to_ne_bytes()),
        DType::I64 => padded(i64::from(number).to_ne_bytes()),
        DType::Bool => padded([number % 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::SampleBuffer;

    fn input(dataset: &Synthetic, index: u64) -> Vec<u8> {
        let mut buffer = SampleBuffer::new(dataset.spec()).unwrap();
        buffer.fill(|sample| dataset.read(index, sample)).unwrap();
        buffer.bytes(0).to_vec()
    }

    #[test]
    fn samples_are_the_sequence_from_their_start_on() {
        for dtype in DType::ALL {
            let dataset = Synthetic::new(300, &[3, 5000], dtype).unwrap();
            let got = input(&dataset, 259);
            let start = usize::try_from(scramble(259) % PERIOD as u64).unwrap();
            for (place, element) in got.chunks_exact(dtype.size()).enumerate() {
                let number = match place {
                    0 => 3,
                    1 => 1,
                    2 | 3 => 0,
                    _ => low_byte(scramble(((start + place) % PERIOD) as u64)),
                };
                assert_eq!(*element, encode(number, dtype)[..dtype.size()], "{dtype} {place}");
            }
        }
    }

    #[test]
    fn floats_are_exact_fractions() {
        for number in 0..=255 {
            let expected = f32::from(number) / 256.0;
            let half = encode(number, DType::F16);
            let brain = encode(number, DType::BF16);
            assert_eq!(f16::from_ne_bytes([half[0], half[1]]).to_f32(), expected);
            assert_eq!(bf16::from_ne_bytes([brain[0], brain[1]]).to_f32(), expected);
        }
    }

    #[test]
    fn samples_smaller_than_the_digits_work() {
        assert_eq!(input(&Synthetic::new(300, &[], DType::U8).unwrap(), 257), [1]);
        assert_eq!(input(&Synthetic::new(300, &[2], DType::U8).unwrap(), 257), [1, 1]);
        assert_eq!(input(&Synthetic::new(300, &[0], DType::U8).unwrap(), 257), [0u8; 0]);
    }
}
