//! What the user may ask for.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::str::FromStr;

use batchline::{Conversion, DType, Gather, Shape};
use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::failure::Failure;
use crate::quantities::parse_bytes;

/// Keeps a GPU fed: loads training samples onto a device, measures it, and says what holds it up.
#[derive(Debug, Parser)]
#[command(name = "batchline", version, arg_required_else_help = false)]
pub(crate) struct Options {
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Load a data set, epoch by epoch, and report throughput and bottleneck
    Run(Box<RunOptions>),
    /// List the devices that there are, and what is missing
    Devices(DevicesOptions),
}

/// The options of `batchline run`.
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub(crate) struct RunOptions {
    /// A folder or file (IDX as of MNIST, or npy); raw:PATH,SHAPE,DTYPE for rows without a header,
    /// such as raw:images.u8,3x224x224,u8, behind it ,offset=BYTES and ,labels=PATH:DTYPE; or
    /// synthetic:SAMPLES,SHAPE,DTYPE such as synthetic:100000,3x224x224,u8
    pub(crate) dataset: String,

    /// Where to load to: auto, host, cuda, cuda:N or wgpu
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    pub(crate) device: DeviceChoice,

    /// Samples per batch (with several ranks, per batch of one)
    #[arg(long, value_name = "SAMPLES", default_value_t = 64)]
    pub(crate) batch_size: u64,

    /// Threads that read samples [default: one per CPU]
    #[arg(long, value_name = "THREADS")]
    pub(crate) workers: Option<usize>,

    /// Batches prepared ahead of the consumer
    #[arg(long, value_name = "BATCHES", default_value_t = 3)]
    pub(crate) prefetch_depth: usize,

    /// How often to go through the data
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) epochs: u64,

    /// Give each epoch an order of its own
    #[arg(long)]
    pub(crate) shuffle: bool,

    /// The seed of that order
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,

    /// Leave out the samples at the end that don't make up a batch
    #[arg(long)]
    pub(crate) drop_last: bool,

    /// Which of the processes this is, from 0
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) rank: u64,

    /// How many processes share the data
    #[arg(long, value_name = "N", default_value_t = 1)]
    pub(crate) world_size: u64,

    /// Have the device convert the input to this type
    #[arg(long, value_name = "DTYPE")]
    pub(crate) convert: Option<FloatType>,

    /// With --convert: make x into (x - MEAN) / STD. Each is one number, or one per channel with
    /// commas between; channels are the last dimension. Example: 127.5/127.5
    #[arg(long, value_name = "MEAN/STD", allow_hyphen_values = true)]
    pub(crate) normalize: Option<Normalize>,

    /// Upload the whole data set at the start, if it lies in memory or is mapped and fits under
    /// --device-limit, and make batches on the device
    #[arg(long)]
    pub(crate) resident: bool,

    /// What fetches samples of a data set that lies in memory: the device, by copies or by a kernel
    /// (auto takes what is faster), or never, so that workers copy them
    #[arg(long, value_name = "BY", default_value = "auto")]
    pub(crate) gather: GatherChoice,

    /// Leave out samples that can't be read, up to this many
    #[arg(long, value_name = "N")]
    pub(crate) skip_errors: Option<u64>,

    /// Read every batch back from the device and compute the SHA-256 over inputs and labels
    #[arg(long)]
    pub(crate) checksum: bool,

    /// Continue from the state in this file, if it is there; save the state in it at the end
    #[arg(long, value_name = "FILE")]
    pub(crate) state: Option<PathBuf>,

    /// Stop after this many batches
    #[arg(long, value_name = "N")]
    pub(crate) max_batches: Option<NonZeroU64>,

    /// Most device memory to use, such as 512MiB [default: 4GiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) device_limit: Option<u64>,

    /// Most page-locked memory to use, such as 512MiB [default: 1GiB]
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    pub(crate) staging_limit: Option<u64>,

    /// Print one JSON object instead of the summary
    #[arg(long)]
    pub(crate) json: bool,
}

impl RunOptions {
    /// The conversion that was asked for, of inputs of this shape.
    pub(crate) fn conversion(&self, shape: Shape) -> Result<Option<(DType, Conversion)>, Failure> {
        let Some(to) = self.convert else { return Ok(None) };
        let Some(Normalize { mean, std }) = &self.normalize else {
            return Ok(Some((to.dtype(), Conversion::new())));
        };
        let (given, channels) = (mean.len(), shape.dims().last().map_or(1, |last| *last));
        if given > 1 && given as u64 != channels {
            return Err(Failure::usage(format!(
                "--normalize has {given} numbers, but inputs of shape {shape} have {channels} \
                 channels (the last dimension): give one number, or {channels}"
            )));
        }
        Ok(Some((to.dtype(), Conversion::new().normalize(mean, std))))
    }

    /// The threads that read samples: as many as were asked for, else one per CPU.
    pub(crate) fn worker_threads(&self) -> usize {
        let per_cpu = || std::thread::available_parallelism().map_or(2, usize::from);
        self.workers.unwrap_or_else(per_cpu)
    }
}

/// The options of `batchline devices`.
#[derive(Debug, Args)]
pub(crate) struct DevicesOptions {
    /// Measure how fast each device is copied to
    #[arg(long)]
    pub(crate) measure: bool,

    /// Print one JSON object instead of lines
    #[arg(long)]
    pub(crate) json: bool,
}

/// A device by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DeviceChoice {
    Auto,
    Host,
    Cuda(usize),
    Wgpu,
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let unknown = || "use auto, host, cuda, cuda:N or wgpu".to_owned();
        match name {
            "auto" => Ok(Self::Auto),
            "host" => Ok(Self::Host),
            "cuda" => Ok(Self::Cuda(0)),
            "wgpu" => Ok(Self::Wgpu),
            _ => {
                let number = name.strip_prefix("cuda:").ok_or_else(unknown)?;
                number.parse().map(Self::Cuda).map_err(|_| unknown())
            }
        }
    }
}

/// What fetches samples.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum GatherChoice {
    Auto,
    Copies,
    Kernel,
    Never,
}

impl From<GatherChoice> for Gather {
    fn from(choice: GatherChoice) -> Self {
        match choice {
            GatherChoice::Auto => Self::Auto,
            GatherChoice::Copies => Self::Copies,
            GatherChoice::Kernel => Self::Kernel,
            GatherChoice::Never => Self::Never,
        }
    }
}

/// What the device can convert inputs to.
#[derive(Debug, Clone, Copy, ValueEnum)]
#[value(rename_all = "lower")]
pub(crate) enum FloatType {
    F32,
    F16,
    BF16,
}

impl FloatType {
    fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::BF16 => DType::BF16,
        }
    }
}

/// Mean and standard deviation, as many of one as of the other.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Normalize {
    mean: Vec<f32>,
    std: Vec<f32>,
}

impl FromStr for Normalize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let example = "write MEAN/STD, as in 127.5/127.5 or 123.7,116.3,103.5/58.4,57.1,57.4";
        let numbers = |what: &str, list: &str| {
            let number = |text: &str| match text.trim().parse::<f32>() {
                Ok(number) if number.is_finite() => Ok(number),
                _ => Err(format!("the {what} {text:?} is no finite number; {example}")),
            };
            list.split(',').map(number).collect::<Result<Vec<f32>, String>>()
        };
        let (mean, std) = text.split_once('/').ok_or("there is no /; ".to_owned() + example)?;
        let (mut mean, mut std) = (numbers("mean", mean)?, numbers("standard deviation", std)?);
        // Also refuses what is so small that its inverse is no number.
        if std.iter().any(|std| !std.recip().is_finite()) {
            return Err("a standard deviation of 0 divides by zero".to_owned());
        }
        match (mean.len(), std.len()) {
            (means, stds) if means == stds => {}
            (1, stds) => mean = vec![mean[0]; stds],
            (means, 1) => std = vec![std[0]; means],
            (means, stds) => {
                return Err(format!(
                    "{means} means for {stds} standard deviations; give one per channel of each"
                ));
            }
        }
        Ok(Self { mean, std })
    }
}

/// The text number `case` of characters of `alphabet`, up to eleven of them.
#[cfg(test)]
pub(crate) fn text_of(alphabet: &str, case: u64) -> String {
    let letters: Vec<char> = alphabet.chars().collect();
    let draw = |place| usize::try_from(batchline::mix(&[case, place]) >> 32).unwrap();
    (1..=case % 12).map(|place| letters[draw(place) % letters.len()]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_holds_together() {
        use clap::CommandFactory;
        Options::command().debug_assert();
    }

    #[test]
    fn devices_have_names() {
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        assert_eq!("cuda:3".parse(), Ok(DeviceChoice::Cuda(3)));
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "HOST"] {
            assert!(wrong.parse::<DeviceChoice>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn normalizations_are_read() {
        let read = |text: &str| text.parse::<Normalize>();
        assert_eq!(read("8/4"), Ok(Normalize { mean: vec![8.0], std: vec![4.0] }));
        assert_eq!(read("-1,2/4"), Ok(Normalize { mean: vec![-1.0, 2.0], std: vec![4.0, 4.0] }));
        assert_eq!(read("1/2,4"), Ok(Normalize { mean: vec![1.0, 1.0], std: vec![2.0, 4.0] }));
        for wrong in ["", "8", "8/", "/4", "8/0", "8/1e-45", "8/nan", "inf/1", "1,2/1,2,3", "1/2/3"]
        {
            assert!(read(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn what_is_read_can_be_computed_with() {
        let mut accepted = 0;
        for case in 0..50_000 {
            let text = text_of("01289,,//.-e nif\u{e9}\0", case);
            let Ok(Normalize { mean, std }) = text.parse() else { continue };
            accepted += 1;
            assert!(!mean.is_empty() && mean.len() == std.len(), "{text:?}");
            assert!(mean.iter().chain(&std).all(|number| number.is_finite()), "{text:?}");
            assert!(std.iter().all(|std| std.recip().is_finite()), "{text:?}");
            // Written out, it is the same again.
            let list = |numbers: &[f32]| {
                numbers.iter().map(f32::to_string).collect::<Vec<String>>().join(",")
            };
            let again = format!("{}/{}", list(&mean), list(&std)).parse();
            assert_eq!(again, Ok(Normalize { mean, std }), "{text:?}");
        }
        assert!(accepted > 100, "{accepted}");
    }

    #[test]
    fn no_other_name_is_a_device() {
        for case in 0..50_000 {
            let text = text_of("cud:a09hostwgp+- ", case);
            match text.parse() {
                Ok(DeviceChoice::Cuda(number)) if text != "cuda" => {
                    let digits = text.strip_prefix("cuda:").unwrap();
                    assert_eq!(digits.parse(), Ok(number), "{text:?}");
                }
                Ok(_) => assert!(["auto", "host", "cuda", "wgpu"].contains(&&*text), "{text:?}"),
                Err(_) => {}
            }
        }
    }
}
