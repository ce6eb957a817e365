//! The way that samples take to the device: through slots that workers fill, or fetched by the
//! device itself, which is told only their numbers.

use std::fmt;
use std::sync::Arc;

use super::config::AsyncDataLoaderConfig;
use super::feed::Feed;
use crate::backend::{ChannelOrder, ConvertSpec, GatherBy, Gathers};
use crate::command::Source;
use crate::memory::Registered;
use crate::source::Dataset;
use crate::{DType, Error, Result, SampleSpec};

/// How batches get to the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, serde::Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum LoadPath {
    /// Workers write samples into slots; a filled slot is copied to the device, or is the batch
    /// itself where the device's memory is the host's.
    #[default]
    Staged,
    /// The device fetches samples out of the data set's own memory.
    Gathered,
    /// The data set was uploaded once; the device gathers batches out of its own memory.
    Resident,
}

impl fmt::Display for LoadPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            LoadPath::Staged => "staged",
            LoadPath::Gathered => "gathered",
            LoadPath::Resident => "resident",
        })
    }
}

/// Where the samples are kept while they are loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Residency {
    /// Where the data set has them.
    #[default]
    Host,
    /// On the device, all of them, uploaded at the first start. Where that can't be done (the data
    /// set does not lie in memory, they don't fit under `device_limit`, the device can't gather),
    /// they stay where they are, and the [stats](crate::AsyncDataLoaderStats::path_reason) say why.
    Device,
}

/// Whether, and by what, the device fetches samples of a data set that lies in the host's memory
/// ([`Dataset::contiguous`]).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum Gather {
    /// By what is faster for samples of that size, where the device can: long ones by copies, and
    /// what is to be [converted](crate::ConfigBuilder::convert) is converted behind them; short
    /// ones by a kernel.
    #[default]
    Auto,
    /// By its copy engine where it has one for that. What is to be converted is converted behind
    /// the copies.
    Copies,
    /// By a kernel, which converts on the way where the device has one for these element types.
    Kernel,
    /// Not at all: workers copy the samples. The data set's memory is not registered with the
    /// device then.
    Never,
}

/// The way that was chosen, for as long as the loader lives.
#[derive(Debug)]
pub(crate) struct Route {
    pub(crate) path: LoadPath,
    /// Why this one, in words.
    pub(crate) reason: String,
    /// Where the rows of each tensor lie, unless workers bring them; `None` for rows of no bytes.
    pub(crate) sources: Vec<Option<Source>>,
    /// What fetches the rows of each tensor.
    pub(crate) by: Vec<GatherBy>,
    /// Rows that there are of each tensor; no number may be greater. Where workers bring them the
    /// data set itself says how many there are.
    pub(crate) rows: u64,
    /// Whether the input is converted on the way.
    pub(crate) fused: bool,
    /// Bytes that were uploaded for it.
    pub(crate) uploaded: u64,
}

impl Route {
    /// Chooses for this feed, registering or uploading its memory. `against` has reasons against
    /// some ways.
    ///
    /// # Errors
    /// The device is lost. What else goes wrong is a reason to go another way.
    pub(crate) fn choose(
        feed: &Feed,
        config: &AsyncDataLoaderConfig,
        against: &[(LoadPath, String)],
    ) -> Result<Self> {
        let Feed::Dataset { dataset, .. } = feed else {
            return Ok(Self::staged("a pull source gives whole batches".to_owned()));
        };
        let device = config.memory.device();
        if device.info().unified {
            return Ok(Self::staged("the device's memory is the host's".to_owned()));
        }
        let gathers = device.core().backend().gathers();
        let allowed = |path| match against.iter().find(|(other, _)| *other == path) {
            Some((_, reason)) => Err(no(reason)),
            None => Ok(()),
        };
        let mut reasons = Vec::new();
        if config.residency == Residency::Device {
            let resident = allowed(LoadPath::Resident);
            match resident.and_then(|()| Self::resident(dataset, config, &gathers)) {
                Ok(route) => return Ok(route),
                Err(error) => reasons.push(format!("not resident: {}", refused(error)?)),
            }
        }
        let gathered = allowed(LoadPath::Gathered);
        let mut route = match gathered.and_then(|()| Self::gathered(dataset, config, &gathers)) {
            Ok(route) => route,
            Err(error) => Self::staged(refused(error)?),
        };
        reasons.push(route.reason);
        route.reason = reasons.join("; ");
        Ok(route)
    }

    /// The way that is always there.
    pub(crate) fn staged(reason: String) -> Self {
        let (sources, by) = (Vec::new(), Vec::new());
        let rows = u64::MAX;
        Self { path: LoadPath::Staged, reason, sources, by, rows, fused: false, uploaded: 0 }
    }

    /// Whether workers write samples, rather than their numbers.
    pub(crate) fn is_staged(&self) -> bool {
        self.path == LoadPath::Staged
    }

    /// Whether the device takes no longer for a batch of so many bytes, some 20 us, than the host
    /// takes to submit one: such batches are worth submitting together.
    pub(crate) fn is_brief(&self, bytes: u64) -> bool {
        match self.path {
            LoadPath::Staged => false,
            LoadPath::Gathered => bytes <= 1 << 20,
            LoadPath::Resident => bytes <= 16 << 20,
        }
    }

    fn resident(
        dataset: &Arc<dyn Dataset>,
        config: &AsyncDataLoaderConfig,
        gathers: &Gathers,
    ) -> Result<Self> {
        if gathers.from_device == 0 {
            return Err(no("this device does not gather from its own memory"));
        }
        let tensors = dataset.spec().tensors();
        let rows = dataset.len();
        let lengths = contiguous(&**dataset, rows)?;
        if let Some(len) = lengths.iter().find(|len| **len > gathers.from_device) {
            let most = gathers.from_device;
            return Err(no(format!(
                "{len} bytes of one tensor are more than the {most} that this device gathers from"
            )));
        }
        // All of it first, so that nothing is uploaded in vain.
        let device_tensor = |len: &u64| match len {
            0 => Ok(None),
            len => config.memory.tensor(&[*len], DType::U8).map(Some),
        };
        let places = lengths.iter().map(device_tensor).collect::<Result<Vec<_>>>()?;
        for (number, place) in places.iter().enumerate() {
            if let Some(place) = place {
                place.write(dataset.contiguous(number).ok_or_else(changed)?)?;
            }
        }
        let uploaded = lengths.iter().sum();
        let fused = is_fused(dataset.spec(), config, gathers)?;
        Ok(Self {
            path: LoadPath::Resident,
            reason: format!("asked for, and its {uploaded} bytes fit on the device"),
            sources: places.into_iter().map(|place| place.map(Source::Resident)).collect(),
            by: vec![GatherBy::Kernel; tensors.len()],
            rows,
            fused,
            uploaded,
        })
    }

    fn gathered(
        dataset: &Arc<dyn Dataset>,
        config: &AsyncDataLoaderConfig,
        gathers: &Gathers,
    ) -> Result<Self> {
        if config.gather == Gather::Never {
            return Err(no("workers were asked to copy the samples"));
        }
        if !gathers.from_host {
            return Err(no("this device does not fetch samples from the host's memory"));
        }
        let rows = dataset.len();
        let lengths = contiguous(&**dataset, rows)?;
        let register = |(tensor, len): (usize, &u64)| {
            if *len == 0 {
                return Ok(None);
            }
            let memory = Registered::new(&config.memory, dataset, tensor)?;
            // Rows are read by their place in it.
            if memory.memory().len() != *len {
                return Err(changed());
            }
            Ok(Some(memory))
        };
        let sources = lengths.iter().enumerate().map(register).collect::<Result<Vec<_>>>()?;
        let spec = dataset.spec();
        let by = spec.tensors().iter().map(|tensor| {
            let row = tensor.shape.bytes(tensor.dtype)?;
            Ok(match (config.gather, gathers.copies_from) {
                (Gather::Copies, Some(_)) => GatherBy::Copies,
                (Gather::Auto, Some(least)) if row >= least => GatherBy::Copies,
                _ => GatherBy::Kernel,
            })
        });
        let by = by.collect::<Result<Vec<_>>>()?;
        // Rows that copies fetch faster are converted behind them, while the next ones come.
        let fused = by[0] == GatherBy::Kernel && is_fused(spec, config, gathers)?;
        let what = match by[0] {
            GatherBy::Copies => "copies",
            GatherBy::Kernel if fused => "a kernel that converts on the way",
            GatherBy::Kernel => "a kernel",
        };
        Ok(Self {
            path: LoadPath::Gathered,
            reason: format!("the data set lies in memory; the device fetches samples by {what}"),
            sources: sources.into_iter().map(|memory| memory.map(Source::Registered)).collect(),
            by,
            rows,
            fused,
            uploaded: 0,
        })
    }
}

/// A reason against a way, as an error.
fn no(reason: impl Into<String>) -> Error {
    Error::record("a path", reason.into())
}

fn changed() -> Error {
    no("the data set changed its memory")
}

/// What an error says against a way.
///
/// # Errors
/// It says that the device is lost.
fn refused(error: Error) -> Result<String> {
    match error {
        lost if lost.is_device_lost() => Err(lost),
        Error::Record { problem, .. } => Ok(problem),
        other => Ok(other.chain()),
    }
}

/// The bytes of each tensor of a data set that lies in memory.
fn contiguous(dataset: &dyn Dataset, rows: u64) -> Result<Vec<u64>> {
    let len = |(number, tensor): (usize, &crate::TensorSpec)| {
        let name = &tensor.name;
        let Some(samples) = dataset.contiguous(number) else {
            return Err(no(format!("the data set does not have all of {name:?} in memory")));
        };
        let row = tensor.shape.bytes(tensor.dtype)?;
        let (found, expected) = (samples.len() as u64, rows.saturating_mul(row));
        if found != expected {
            return Err(no(format!("the data set has {found} bytes of {name:?}, not {expected}")));
        }
        Ok(found)
    };
    dataset.spec().tensors().iter().enumerate().map(len).collect()
}

/// Whether a kernel that fetches rows can also make of the input what the settings ask for.
fn is_fused(spec: &SampleSpec, config: &AsyncDataLoaderConfig, gathers: &Gathers) -> Result<bool> {
    let Some((to, conversion)) = &config.convert else { return Ok(false) };
    let input = spec.input();
    if input.shape.rank() == 0 {
        // The last dimension of a batch of scalars counts samples, and would be taken for channels.
        return Ok(false);
    }
    let one = conversion.spec_for(input.dtype, *to, input.shape.batched(1)?)?;
    Ok(gathers.fuses(input.dtype, *to) && is_one_image(&one))
}

/// Whether a row is one image, or so many pixels with their channels last.
fn is_one_image(row: &ConvertSpec) -> bool {
    match (row.source_order, row.target_order) {
        (ChannelOrder::Nhwc, ChannelOrder::Nhwc) => row.elements.is_multiple_of(row.channels),
        _ => row.channels.checked_mul(row.pixels) == Some(row.elements),
    }
}
