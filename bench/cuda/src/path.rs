//! The ways by which a batch gets to the device.

use batchline::{AsyncDataLoaderStats, ConfigBuilder, Gather, LoadPath, Residency};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Path {
    /// Workers copy rows into page-locked slots.
    Staged,
    /// The device fetches rows, as the loader chooses.
    Gathered,
    Copies,
    Kernel,
    /// Uploaded once.
    Resident,
}

impl Path {
    pub(crate) const ALL: [Self; 5] =
        [Self::Staged, Self::Gathered, Self::Copies, Self::Kernel, Self::Resident];
    /// As users ask for them.
    pub(crate) const PLAIN: [Self; 3] = [Self::Staged, Self::Gathered, Self::Resident];
    /// Without a choice of the loader's.
    pub(crate) const PURE: [Self; 4] = [Self::Staged, Self::Copies, Self::Kernel, Self::Resident];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Staged => "staged",
            Self::Gathered => "gathered",
            Self::Copies => "gathered by copies",
            Self::Kernel => "gathered by a kernel",
            Self::Resident => "resident",
        }
    }

    pub(crate) fn set(self, config: ConfigBuilder) -> ConfigBuilder {
        match self {
            Self::Staged => config.gather(Gather::Never),
            Self::Gathered => config.gather(Gather::Auto),
            Self::Copies => config.gather(Gather::Copies),
            Self::Kernel => config.gather(Gather::Kernel),
            Self::Resident => config.gather(Gather::Never).residency(Residency::Device),
        }
    }

    /// Checks that a loader went this way.
    ///
    /// # Errors
    /// It went another one; says why.
    pub(crate) fn check(self, stats: &AsyncDataLoaderStats) -> Result<(), String> {
        let (path, reason) = (stats.path, &stats.path_reason);
        let as_asked = match self {
            Self::Staged => path == LoadPath::Staged,
            Self::Gathered => path == LoadPath::Gathered,
            // Where the device has no such copies, it takes the kernel.
            Self::Copies => path == LoadPath::Gathered && reason.contains("copies"),
            Self::Kernel => path == LoadPath::Gathered && !reason.contains("copies"),
            Self::Resident => path == LoadPath::Resident,
        };
        if as_asked { Ok(()) } else { Err(format!("went {path}: {reason}")) }
    }
}
