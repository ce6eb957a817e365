//! What a conversion between tensors is to do.

use std::sync::Arc;

use crate::backend::{ChannelOrder, ConvertSpec};
use crate::memory::Tensor;
use crate::{DType, Error, MAX_RANK, Result, Shape};

/// How elements become those of another tensor: the type follows from the target; scale and bias
/// per channel, and a change of the channels' place, can be added.
///
/// ```
/// use batchline::{ChannelOrder, Conversion};
/// // Pixels of 0 to 255 to normalised planes, as image models want them.
/// let conversion = Conversion::new()
///     .normalize(&[123.7, 116.3, 103.5], &[58.4, 57.1, 57.4])
///     .reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
/// ```
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conversion {
    scale: Arc<[f32]>,
    bias: Arc<[f32]>,
    order: Option<(ChannelOrder, ChannelOrder)>,
    order_of_scale: Option<ChannelOrder>,
}

impl Conversion {
    /// A change of the element type only: rounded to nearest, ties to even; saturated where the
    /// target is an integer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Multiplies each channel by its factor and adds its summand, in `f32`. One entry stands for
    /// all channels.
    #[must_use]
    pub fn scale_and_bias(mut self, scale: &[f32], bias: &[f32]) -> Self {
        (self.scale, self.bias) = (scale.into(), bias.into());
        self
    }

    /// `(x − mean) / std` per channel, in units of the source's elements, computed as one factor
    /// and one summand in `f32`. One entry stands for all channels.
    #[must_use]
    pub fn normalize(self, mean: &[f32], std: &[f32]) -> Self {
        let scale: Vec<f32> = std.iter().map(|std| 1.0 / std).collect();
        let bias: Vec<f32> = mean.iter().zip(std).map(|(mean, std)| -mean / std).collect();
        let bias = if mean.len() == std.len() { bias } else { vec![f32::NAN; mean.len()] };
        self.scale_and_bias(&scale, &bias)
    }

    /// Moves the channels of images, the last three dimensions.
    #[must_use]
    pub fn reorder(mut self, from: ChannelOrder, to: ChannelOrder) -> Self {
        self.order = Some((from, to));
        self
    }

    /// Says where the channels are that [`scale_and_bias`](Self::scale_and_bias) speaks of, when
    /// they stay there. Without it they are the last dimension.
    #[must_use]
    pub fn channels(mut self, order: ChannelOrder) -> Self {
        self.order_of_scale = Some(order);
        self
    }

    /// The shape that a tensor of `shape` gets.
    ///
    /// # Errors
    /// Channels are to be moved in a tensor of less than three dimensions.
    pub fn shape(&self, shape: Shape) -> Result<Shape> {
        let Some((from, to)) = self.order else { return Ok(shape) };
        let mut dims = [0; MAX_RANK];
        let dims = &mut dims[..shape.rank()];
        dims.copy_from_slice(shape.dims());
        let image = dims.len().checked_sub(3).ok_or_else(|| no_image(shape))?;
        match (from, to) {
            (ChannelOrder::Nhwc, ChannelOrder::Nchw) => dims[image..].rotate_right(1),
            (ChannelOrder::Nchw, ChannelOrder::Nhwc) => dims[image..].rotate_left(1),
            _ => {}
        }
        Shape::new(dims)
    }

    /// The same conversion, with an entry for each channel of a tensor of this shape. Making the
    /// instructions for such tensors allocates nothing then.
    pub(crate) fn fitted(mut self, from: DType, to: DType, shape: Shape) -> Result<Self> {
        let spec = self.spec_for(from, to, shape)?;
        (self.scale, self.bias) = (spec.scale, spec.bias);
        Ok(self)
    }

    /// The checked instructions for a backend.
    pub(crate) fn spec(&self, src: &Tensor, dst: &Tensor) -> Result<ConvertSpec> {
        let wanted = self.shape(src.shape())?;
        if wanted != dst.shape() {
            let problem = format!("the target has shape {}, expected {wanted}", dst.shape());
            return Err(Error::record("a conversion", problem));
        }
        self.spec_for(src.dtype(), dst.dtype(), src.shape())
    }

    /// As [`spec`](Self::spec), for tensors that don't exist yet.
    pub(crate) fn spec_for(&self, from: DType, to: DType, shape: Shape) -> Result<ConvertSpec> {
        let refuse = |problem: String| Err(Error::record("a conversion", problem));
        let (source_order, target_order) = self.order.unwrap_or_else(|| {
            let order = self.order_of_scale.unwrap_or(ChannelOrder::Nhwc);
            (order, order)
        });
        let dims = shape.dims();
        let (channels, pixels) = match (source_order, dims) {
            (ChannelOrder::Nhwc, [.., height, width, channels])
            | (ChannelOrder::Nchw, [.., channels, height, width]) => {
                let pixels = height.checked_mul(*width);
                let overflow = || Error::Overflow { what: format!("an image of {shape}") };
                (*channels, pixels.ok_or_else(overflow)?)
            }
            _ if self.order.is_some() || source_order == ChannelOrder::Nchw => {
                return Err(no_image(shape));
            }
            (_, [.., channels]) => (*channels, 1),
            (_, []) => (1, 1),
        };
        if self.scale.len() != self.bias.len() || self.bias.iter().any(|bias| bias.is_nan()) {
            return refuse(
                "scale and bias (mean and std) must be numbers, as many as each other".to_owned(),
            );
        }
        if self.scale.iter().any(|scale| !scale.is_finite()) {
            return refuse("a scale must be finite (a std must not be 0)".to_owned());
        }
        let (mut scale, mut bias) = (Arc::clone(&self.scale), Arc::clone(&self.bias));
        match scale.len() as u64 {
            0 => {}
            entries if entries == channels => {}
            1 => {
                // A dimension too long to repeat it for is no channel.
                const MOST: u64 = 1 << 20;
                if channels <= MOST {
                    let channels = usize::try_from(channels).unwrap_or(0);
                    scale = std::iter::repeat_n(scale[0], channels).collect();
                    bias = std::iter::repeat_n(bias[0], channels).collect();
                } else if self.order.is_some() {
                    return refuse(format!("{channels} channels of {shape} are more than {MOST}"));
                }
            }
            entries => {
                return refuse(format!("{entries} scales for the {channels} channels of {shape}"));
            }
        }
        // One scale for a dimension too long to repeat it: the channels are then of no matter.
        let channels = if scale.len() == 1 && self.order.is_none() { 1 } else { channels.max(1) };
        // With the channels last on both sides, an image's pixels are of no matter either, and what
        // stands before the channels may be anything.
        let last = (source_order, target_order) == (ChannelOrder::Nhwc, ChannelOrder::Nhwc);
        let pixels = if last { 1 } else { pixels.max(1) };
        Ok(ConvertSpec {
            from,
            to,
            elements: shape.elements()?,
            channels,
            pixels,
            source_order,
            target_order,
            scale,
            bias,
        })
    }
}

fn no_image(shape: Shape) -> Error {
    let problem = format!("{shape} is no image: channels need three dimensions at least");
    Error::record("a conversion", problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(conversion: &Conversion, dims: &[u64]) -> Result<ConvertSpec> {
        conversion.spec_for(DType::U8, DType::F32, Shape::new(dims).unwrap())
    }

    #[test]
    fn shapes_follow_the_channels() {
        let conversion = Conversion::new().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
        let shape = conversion.shape(Shape::new(&[8, 4, 5, 3]).unwrap()).unwrap();
        assert_eq!(shape.dims(), [8, 3, 4, 5]);
        let back = Conversion::new().reorder(ChannelOrder::Nchw, ChannelOrder::Nhwc);
        assert_eq!(back.shape(shape).unwrap().dims(), [8, 4, 5, 3]);
        assert!(conversion.shape(Shape::new(&[4, 5]).unwrap()).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        assert!(spec(&Conversion::new().normalize(&[0.0], &[0.0]), &[2]).is_err());
        assert!(spec(&Conversion::new().normalize(&[0.0, 1.0], &[1.0]), &[2]).is_err());
        let three = Conversion::new().normalize(&[0.0; 3], &[1.0; 3]);
        assert!(spec(&three, &[2, 2, 4]).is_err());
        assert!(spec(&three.clone().channels(ChannelOrder::Nchw), &[3]).is_err());
        assert_eq!(spec(&three, &[2, 2, 3]).unwrap().channels, 3);
    }

    #[test]
    fn pixels_count_where_channels_move_or_come_first() {
        let scaled = Conversion::new().normalize(&[1.0], &[2.0]);
        let grey = spec(&scaled, &[5, 28, 28]).unwrap();
        assert_eq!((grey.channels, grey.pixels), (28, 1));
        let planes = spec(&scaled.channels(ChannelOrder::Nchw), &[5, 3, 4, 2]).unwrap();
        assert_eq!((planes.channels, planes.pixels), (3, 8));
    }

    #[test]
    fn indices_are_permuted() {
        let conversion = Conversion::new().reorder(ChannelOrder::Nhwc, ChannelOrder::Nchw);
        let spec = spec(&conversion, &[2, 2, 2, 3]).unwrap();
        // Second image, channel 1, pixel 3.
        assert_eq!(spec.source_index(12 + 4 + 3), 12 + 3 * 3 + 1);
        assert_eq!(spec.channel_of(12 + 3 * 3 + 1), 1);
    }
}
