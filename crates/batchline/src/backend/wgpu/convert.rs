//! Plans a conversion as dispatches that fit the device's bindings.

use crate::backend::{ChannelOrder, ConvertSpec};
use crate::{DType, Error, Result};

/// What a conversion comes to.
#[derive(Debug, PartialEq)]
pub(super) enum Plan {
    /// The bytes stay as they are.
    Copy,
    /// The kernel.
    Run(Run),
}

/// Dispatches of the kernel.
#[derive(Debug, PartialEq)]
pub(super) struct Run {
    pub(super) variant: Variant,
    pub(super) channels: u32,
    pub(super) pixels: u32,
    /// Scales, then biases, as bits; empty, or of `channels` each.
    pub(super) factors: Vec<u32>,
    pub(super) chunks: Vec<Chunk>,
}

impl Run {
    /// Bytes of an element of the source, and of the target.
    pub(super) fn sizes(&self) -> (u64, u64) {
        (self.variant.from.size() as u64, self.variant.to.size() as u64)
    }
}

/// What the kernel is compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Variant {
    pub(super) from: DType,
    pub(super) to: DType,
    pub(super) affine: bool,
    pub(super) relayout: bool,
    pub(super) source_nchw: bool,
    /// Whether the source's rows are picked by their numbers.
    pub(super) gathered: bool,
}

impl Variant {
    /// The kernel's text. Where source and target are in one buffer, wgpu wants both bound for
    /// writing.
    pub(super) fn source(&self, one_buffer: bool) -> String {
        let access = if one_buffer { "read_write" } else { "read" };
        let (write, more) = match self.gathered {
            false => ("write", ""),
            true => ("gather", include_str!("gather.wgsl")),
        };
        let write = format!("{write}_{}", self.to.size());
        let text = include_str!("convert.wgsl");
        text.replace("SOURCE_ACCESS", access).replace("WRITE", &write) + more + &self.element()
    }

    /// The function that makes the target's element `index`.
    fn element(&self) -> String {
        let place = match (self.relayout, self.source_nchw) {
            (false, _) if !self.affine => "vec2(index, 0u)",
            (false, false) => "same_nhwc(index)",
            (false, true) => "same_nchw(index)",
            (true, false) => "nhwc_to_nchw(index)",
            (true, true) => "nchw_to_nhwc(index)",
        };
        let (from, to) = (self.from, self.to);
        let at = if self.gathered { "picked(place.x)" } else { "place.x" };
        let stored = format!("stored_{}({at})", from.size());
        let wide = matches!(from, DType::I32 | DType::I64 | DType::F64);
        // From the bits of an f32.
        let finish = |bits: String| match to {
            DType::F32 | DType::BF16 => format!("short_{to}({bits})"),
            _ => format!("put_{to}(take_f32({bits}))"),
        };
        let value = match (self.affine, wide) {
            (false, _) if from == to => stored,
            (false, true) => format!("put_{to}(wide_{from}({stored}))"),
            (false, false) => finish(format!("exact_{from}({stored})")),
            (true, true) => finish(format!("affine(put_f32(wide_{from}({stored})).y, place.y)")),
            (true, false) => finish(format!("affine(exact_{from}({stored}), place.y)")),
        };
        format!(
            "\nfn element(index: u32) -> vec2<u32> {{\n    \
             let place = {place};\n    return {value};\n}}\n"
        )
    }
}

/// Elements of one dispatch: a range of the target's, made of the same range of the source's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Chunk {
    /// The first one: a multiple of 4, so that it starts a word whatever its type is.
    pub(super) first: u64,
    pub(super) elements: u32,
    /// Where in its image the first one is, if it matters.
    pub(super) place: u32,
}

/// The most bytes that one binding is used for. A kernel counts elements in 32 bits.
pub(super) const WIDEST: u64 = 1 << 31;

/// Words of parameters before the factors.
pub(super) const HEADER: u64 = 14;

/// The most bytes that a kernel can have of one buffer at a time.
pub(super) fn bindable(limits: &wgpu::Limits) -> u64 {
    // A binding starts at a multiple of the alignment before the chunk.
    let slack = u64::from(limits.min_storage_buffer_offset_alignment) + wgpu::COPY_BUFFER_ALIGNMENT;
    limits.max_storage_buffer_binding_size.min(WIDEST).saturating_sub(slack)
}

pub(super) fn plan(
    limits: &wgpu::Limits,
    src_len: u64,
    dst_len: u64,
    spec: &ConvertSpec,
) -> Result<Plan> {
    check(src_len, dst_len, spec)?;
    let same = spec.from == spec.to && !spec.is_affine() && !moves(spec);
    if spec.elements == 0 || same {
        return Ok(Plan::Copy);
    }
    Ok(Plan::Run(run(limits, u64::MAX, spec)?))
}

/// # Errors
/// The lengths, in bytes, are not those of the elements.
pub(super) fn check(src_len: u64, dst_len: u64, spec: &ConvertSpec) -> Result<()> {
    let fits = |len: u64, dtype: DType| spec.elements.checked_mul(dtype.size() as u64) == Some(len);
    if fits(src_len, spec.from) && fits(dst_len, spec.to) {
        return Ok(());
    }
    Err(refused(format!(
        "{} elements are not {src_len} bytes of {} and {dst_len} of {}",
        spec.elements, spec.from, spec.to
    )))
}

/// Whether elements change their places. With one pixel or one channel the two layouts are the
/// same.
fn moves(spec: &ConvertSpec) -> bool {
    spec.source_order != spec.target_order && spec.channels > 1 && spec.pixels > 1
}

/// The dispatches of a conversion, of `most` elements each or fewer.
pub(super) fn run(limits: &wgpu::Limits, most: u64, spec: &ConvertSpec) -> Result<Run> {
    let (from, to) = (spec.from.size() as u64, spec.to.size() as u64);
    let (channels, pixels) = (spec.channels.max(1), spec.pixels.max(1));
    let (affine, relayout) = (spec.is_affine(), moves(spec));
    let binding = limits.max_storage_buffer_binding_size.min(WIDEST);
    let most = most.min(bindable(limits) / from.max(to)) / 4 * 4;
    let too_long = |what: &str, elements: u64| {
        let from_to = format!("{} to {}", spec.from, spec.to);
        refused(format!(
            "{what} of {elements} elements, {from_to}, does not fit a binding of this device \
             ({binding} bytes): convert it in parts"
        ))
    };
    let image = channels.checked_mul(pixels).ok_or_else(|| too_long("an image", u64::MAX))?;
    let whole = if relayout {
        if !spec.elements.is_multiple_of(image) {
            return Err(refused(format!("{} elements, images of {image}", spec.elements)));
        }
        // So many images at a time that the next one starts a word.
        let unit = image.checked_mul(4).map_or(image, |four| four >> image.trailing_zeros().min(2));
        // The last ones may be fewer.
        let unit = unit.min(spec.elements);
        if unit > most {
            return Err(too_long("an image (or up to four)", unit));
        }
        most / unit * unit
    } else {
        // The kernel adds a place in the image and an index below `WIDEST`.
        let matters = affine && spec.source_order == ChannelOrder::Nchw;
        if matters && image > WIDEST {
            return Err(too_long("an image", image));
        }
        most
    };
    let factors = if affine { factors(spec, channels)? } else { Vec::new() };
    if whole == 0 || (HEADER + factors.len() as u64) * 4 > binding {
        return Err(too_long("a list of factors", channels));
    }

    let mut chunks = Vec::new();
    let mut first = 0;
    while first < spec.elements {
        let place = match spec.source_order {
            _ if relayout || !affine => 0,
            ChannelOrder::Nhwc => first % channels,
            ChannelOrder::Nchw => first % image,
        };
        let elements = whole.min(spec.elements - first);
        chunks.push(Chunk { first, elements: word(elements)?, place: word(place)? });
        first += elements;
    }
    // What does not matter may be any number.
    let matters = affine || relayout;
    let nchw = spec.source_order == ChannelOrder::Nchw;
    Ok(Run {
        variant: Variant {
            from: spec.from,
            to: spec.to,
            affine,
            relayout,
            source_nchw: nchw && matters,
            gathered: false,
        },
        channels: if matters { word(channels)? } else { 1 },
        pixels: if relayout || (affine && nchw) { word(pixels)? } else { 1 },
        factors,
        chunks,
    })
}

fn factors(spec: &ConvertSpec, channels: u64) -> Result<Vec<u32>> {
    let (scales, biases) = (spec.scale.len() as u64, spec.bias.len() as u64);
    if scales != channels || biases != channels {
        let problem = format!("{scales} scales and {biases} biases for {channels} channels");
        return Err(refused(problem));
    }
    Ok(spec.scale.iter().chain(&spec.bias[..]).map(|factor| factor.to_bits()).collect())
}

pub(super) fn word(number: u64) -> Result<u32> {
    u32::try_from(number).map_err(|_| refused(format!("{number} is too large for the kernel")))
}

fn refused(problem: String) -> Error {
    Error::record("a conversion", problem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(elements: u64, channels: u64, pixels: u64) -> ConvertSpec {
        ConvertSpec {
            from: DType::U8,
            to: DType::F32,
            elements,
            channels,
            pixels,
            source_order: ChannelOrder::Nhwc,
            target_order: ChannelOrder::Nchw,
            scale: [].into(),
            bias: [].into(),
        }
    }

    fn chunks(limit: u64, spec: &ConvertSpec) -> Result<Vec<Chunk>> {
        let limits =
            wgpu::Limits { max_storage_buffer_binding_size: limit, ..wgpu::Limits::default() };
        match plan(&limits, spec.elements, spec.elements * 4, spec)? {
            Plan::Run(run) => Ok(run.chunks),
            Plan::Copy => panic!("a kernel is needed"),
        }
    }

    /// Chunks are adjacent, start words, hold whole images, and fit the binding.
    #[test]
    fn images_are_split_between_images() {
        let spec = spec(75 * 1001, 3, 25);
        let chunks = chunks(10_000, &spec).unwrap();
        let mut next = 0;
        for chunk in &chunks {
            assert_eq!(chunk.first, next);
            assert_eq!(chunk.first % 300, 0);
            assert!(u64::from(chunk.elements) * 4 + 256 <= 10_000);
            next += u64::from(chunk.elements);
        }
        assert_eq!(next, spec.elements);
        assert!(chunks.len() > 10);
    }

    #[test]
    fn an_image_that_fits_no_binding_is_refused() {
        let error = chunks(10_000, &spec(3 * 10_000, 3, 10_000)).unwrap_err().to_string();
        assert!(error.contains("30000 elements") && error.contains("10000 bytes"), "{error}");
    }

    #[test]
    fn the_place_in_the_image_goes_on_over_chunks() {
        let mut spec = spec(50_000, 3, 1);
        spec.target_order = ChannelOrder::Nhwc;
        spec.scale = [1.0; 3].into();
        spec.bias = [0.0; 3].into();
        for chunk in chunks(10_000, &spec).unwrap() {
            assert_eq!(u64::from(chunk.place), chunk.first % 3);
        }
    }

    #[test]
    fn the_wrong_lengths_are_refused() {
        let spec = spec(12, 3, 4);
        assert!(plan(&wgpu::Limits::default(), 12, 44, &spec).is_err());
        assert!(plan(&wgpu::Limits::default(), 13, 48, &spec).is_err());
    }
}
