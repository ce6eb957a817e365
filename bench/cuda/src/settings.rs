//! What was asked for, and how much of it.

use std::path::PathBuf;
use std::time::Duration;

/// The parts, in the order in which they run.
pub(crate) const PARTS: [&str; 4] = ["device", "paths", "training", "files"];

pub(crate) const USAGE: &str = "\
usage: batchline-bench-cuda [PART...] [OPTION...]
  PART             device, paths, training, files; all of them unless named
  --json FILE      every figure, written anew after each row
  --span SECONDS   how long a run takes, about; 0.3
  --rounds N       runs that count of each; 5
  --folder PATH    where files are made and removed; the folder for temporary files
  --libraries PATH where to look for cuBLAS first
  --quick          tiny sizes, to see that it works; the figures mean nothing";

#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) parts: Vec<String>,
    pub(crate) json: Option<PathBuf>,
    pub(crate) span: Duration,
    pub(crate) rounds: usize,
    pub(crate) folder: PathBuf,
    pub(crate) libraries: Option<PathBuf>,
    pub(crate) quick: bool,
    /// Threads that read samples, and those of the peer that copies.
    pub(crate) workers: usize,
}

impl Settings {
    pub(crate) fn parse(mut arguments: impl Iterator<Item = String>) -> Option<Self> {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let mut settings = Self {
            parts: Vec::new(),
            json: None,
            span: Duration::from_millis(300),
            rounds: 5,
            folder: std::env::temp_dir(),
            libraries: None,
            quick: false,
            workers: cores.min(16),
        };
        while let Some(name) = arguments.next() {
            match &name[..] {
                "--quick" => settings.quick = true,
                "--json" => settings.json = Some(arguments.next()?.into()),
                "--span" => {
                    let seconds = arguments.next()?.parse().ok()?;
                    settings.span = Duration::try_from_secs_f64(seconds).ok()?;
                }
                "--rounds" => {
                    settings.rounds = arguments.next()?.parse().ok().filter(|n| *n > 0)?
                }
                "--folder" => settings.folder = arguments.next()?.into(),
                "--libraries" => settings.libraries = Some(arguments.next()?.into()),
                part if PARTS.contains(&part) => settings.parts.push(name),
                _ => return None,
            }
        }
        if settings.parts.is_empty() {
            settings.parts = PARTS.map(str::to_owned).to_vec();
        }
        if settings.quick {
            (settings.span, settings.rounds) = (Duration::from_millis(10), 2);
        }
        Some(settings)
    }

    pub(crate) fn pick<T>(&self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}
