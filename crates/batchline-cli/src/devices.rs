//! `batchline devices`: what there is to load onto, what is missing, and how fast it is.

use batchline::{Device, DeviceInfo, DeviceKind, Error, Found};
use serde::Serialize;

use crate::copy_rate;
use crate::failure::Failure;
use crate::options::{DeviceChoice, DevicesOptions};
use crate::output::{print, print_json};
use crate::quantities::{byte_rate, bytes};

/// Opens the device that the user named.
pub(crate) fn open(choice: DeviceChoice) -> Result<Device, Error> {
    match choice {
        DeviceChoice::Auto => Ok(Device::auto()),
        DeviceChoice::Host => Ok(Device::host()),
        DeviceChoice::Cuda(ordinal) => open_cuda(ordinal),
        DeviceChoice::Wgpu => open_wgpu(),
    }
}

#[cfg(feature = "wgpu")]
fn open_wgpu() -> Result<Device, Error> {
    Device::wgpu()
}

#[cfg(not(feature = "wgpu"))]
fn open_wgpu() -> Result<Device, Error> {
    Err(no_wgpu())
}

#[cfg(feature = "cuda")]
fn open_cuda(ordinal: usize) -> Result<Device, Error> {
    Device::cuda(ordinal)
}

#[cfg(not(feature = "cuda"))]
fn open_cuda(_: usize) -> Result<Device, Error> {
    Err(no_cuda())
}

#[cfg(not(feature = "cuda"))]
fn no_cuda() -> Error {
    Error::NoDevice {
        wanted: "cuda".to_owned(),
        reason: "this build has no CUDA device".to_owned(),
        remedy: "build it with the feature cuda, or use wgpu or the host".to_owned(),
    }
}

#[cfg(not(feature = "wgpu"))]
fn no_wgpu() -> Error {
    Error::NoDevice {
        wanted: "wgpu".to_owned(),
        reason: "this build has no wgpu device".to_owned(),
        remedy: "build it with the feature wgpu, or use the host".to_owned(),
    }
}

/// What was found and what was not, as JSON has it.
#[derive(Debug, Default, Serialize)]
struct Listing {
    devices: Vec<Present>,
    missing: Vec<Absent>,
}

#[derive(Debug, Serialize)]
struct Present {
    #[serde(flatten)]
    info: DeviceInfo,
    /// The copy rate; `None` where it was not measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_second: Option<f64>,
    /// Why it could not be measured.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_measured: Option<String>,
}

#[derive(Debug, Serialize)]
struct Absent {
    wanted: String,
    reason: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    remedy: String,
}

/// Prints the list.
pub(crate) fn list(options: &DevicesOptions) -> Result<(), Failure> {
    let mut listing = Listing::default();
    for found in Device::list() {
        match found {
            Found::Device(info) => {
                let present = Present { info, bytes_per_second: None, not_measured: None };
                listing.devices.push(present);
            }
            Found::Missing(error) => listing.missing.push(Absent::of(error)),
            // There may be more to find in later versions.
            _ => {}
        }
    }
    #[cfg(not(feature = "wgpu"))]
    listing.missing.push(Absent::of(no_wgpu()));
    #[cfg(not(feature = "cuda"))]
    listing.missing.push(Absent::of(no_cuda()));
    if options.measure {
        measure(&mut listing.devices);
    }
    if options.json { print_json(&listing) } else { print(&text(&listing)) }
}

/// Measures each device. One that can't be is no failure: the others still are of interest.
fn measure(devices: &mut [Present]) {
    let mut opened: Vec<DeviceKind> = Vec::new();
    for present in devices {
        let kind = present.info.kind;
        let before = opened.iter().filter(|opened| **opened == kind).count();
        opened.push(kind);
        // The name wgpu opens the best of its devices, the one that is listed first.
        let result = if before > 0 && kind != DeviceKind::Cuda {
            Err("it cannot be opened by name; an application can hand it over".to_owned())
        } else {
            open_kind(kind, before)
                .and_then(|device| copy_rate::measure(&device))
                .map_err(|error| error.chain())
        };
        match result {
            Ok(rate) => present.bytes_per_second = Some(rate),
            Err(reason) => present.not_measured = Some(reason),
        }
    }
}

/// Opens the device of this kind that so many of its kind are listed before.
fn open_kind(kind: DeviceKind, before: usize) -> Result<Device, Error> {
    match kind {
        DeviceKind::Cuda => open_cuda(before),
        DeviceKind::Host => Ok(Device::host()),
        DeviceKind::Wgpu => open_wgpu(),
        other => Err(Error::NoDevice {
            wanted: other.to_string(),
            reason: "this tool does not know how to open it".to_owned(),
            remedy: "use host, cuda or wgpu".to_owned(),
        }),
    }
}

impl Absent {
    fn of(error: Error) -> Self {
        match error {
            Error::NoDevice { wanted, reason, remedy } => Self { wanted, reason, remedy },
            other => {
                Self { wanted: "device".to_owned(), reason: other.chain(), remedy: String::new() }
            }
        }
    }
}

/// The list for people: what can be used, the best first, and then what can't.
fn text(listing: &Listing) -> String {
    let mut lines = Vec::new();
    for Present { info, bytes_per_second, not_measured } in &listing.devices {
        lines.push(format!("found    {}", info.name));
        let mut about = Vec::new();
        match (info.kind, info.hardware) {
            (DeviceKind::Host, _) => about.push("ordinary memory, no hardware".to_owned()),
            (_, true) => about.push("hardware".to_owned()),
            (_, false) => about.push("software, on the CPU".to_owned()),
        }
        if !info.driver.is_empty() {
            about.push(format!("driver {}", info.driver));
        }
        if info.kind != DeviceKind::Host {
            about.push(format!("buffers of up to {}", bytes(info.max_allocation)));
        }
        lines.push(format!("         {}", about.join("; ")));
        if let Some(rate) = bytes_per_second {
            lines.push(format!("         one thread copies to it at {}", byte_rate(*rate)));
        }
        if let Some(reason) = not_measured {
            lines.push(format!("         not measured: {reason}"));
        }
    }
    for Absent { wanted, reason, remedy } in &listing.missing {
        let separator = if remedy.is_empty() { "" } else { "; " };
        lines.push(format!("missing  {wanted}: {reason}{separator}{remedy}"));
    }
    lines.push(String::new());
    lines.join("\n")
}
