//! Where a stream is, so that it can be continued in another process.

use std::io::Write;
use std::path::Path;

use crate::{Error, Result};

/// The position of a stream: what was *delivered*. What was read ahead is not in it.
///
/// It is small, does not grow with the data set, and continuing from it costs nothing. The stream
/// may be continued with other workers, another depth, and another number of ranks at the same
/// global batch.
///
/// ```no_run
/// # fn train(loader: &batchline::AsyncDataLoader) -> Result<(), batchline::Error> {
/// use std::path::Path;
/// // Save it with the model…
/// loader.state().save(Path::new("loader.json"))?;
/// // …and continue later: AsyncDataLoaderConfig::builder().resume_from(state)
/// let state = batchline::LoaderState::load(Path::new("loader.json"))?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct LoaderState {
    /// The version of this structure.
    pub version: u32,
    /// The loader's seed.
    pub seed: u64,
    /// The epoch, from 0.
    pub epoch: u64,
    /// Global batches of that epoch that were delivered.
    pub position: u64,
    /// Samples of a global batch: batch size times world size.
    pub global_batch: u64,
    /// What was skipped so far.
    pub skipped: Vec<Skipped>,
    /// The fingerprint of the data set.
    pub fingerprint: u64,
    /// The fingerprint of the order.
    pub order: u64,
}

/// A sample that was left out because it could not be read.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Skipped {
    /// The epoch.
    pub epoch: u64,
    /// The batch within the epoch.
    pub batch: u64,
    /// The sample's index; `None` where a source without indices left a batch out.
    pub sample: Option<u64>,
    /// Why.
    pub reason: String,
}

/// What is written to a file: the state, and a checksum of it.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Saved {
    state: LoaderState,
    checksum: String,
}

impl LoaderState {
    /// The version that this library writes and reads.
    pub const VERSION: u32 = 1;

    /// As text, with a checksum.
    pub fn to_json(&self) -> String {
        let saved = Saved { state: self.clone(), checksum: self.checksum() };
        serde_json::to_string_pretty(&saved).expect("numbers and strings can be written as JSON")
    }

    /// From [`to_json`](Self::to_json)'s text.
    ///
    /// # Errors
    /// [`Error::State`]: it is cut short, was edited, or is of another version.
    pub fn from_json(text: &str) -> Result<Self> {
        let refuse = |error: serde_json::Error| Error::State {
            problem: if error.is_eof() {
                "it is cut short; use an older one, or start anew".to_owned()
            } else {
                format!("it is no state of a loader ({})", one_line(&error.to_string()))
            },
        };
        // The version first: what else there is depends on it.
        let saved: serde_json::Value = serde_json::from_str(text).map_err(refuse)?;
        let version = saved.pointer("/state/version").and_then(serde_json::Value::as_u64);
        if let Some(version) = version.filter(|version| *version != u64::from(Self::VERSION)) {
            return Err(Error::State { problem: Self::another_version(version) });
        }
        let saved: Saved = serde_json::from_value(saved).map_err(refuse)?;
        if saved.checksum != saved.state.checksum() {
            let problem = "its checksum does not match: it was damaged or edited".to_owned();
            return Err(Error::State { problem });
        }
        Ok(saved.state)
    }

    /// What is wrong with a state of another version.
    pub(crate) fn another_version(version: u64) -> String {
        format!(
            "it has version {version}, this program reads version {}; start anew",
            Self::VERSION
        )
    }

    /// Writes the state to a file: first beside it, then renamed, so that a crash leaves the old
    /// file or the new one.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: &Path) -> Result<()> {
        // A name of its own: several ranks may save the same state to a folder that they share.
        let mut beside = path.as_os_str().to_owned();
        let moment = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default().as_nanos();
        beside.push(format!(".{}-{moment:x}.new", std::process::id()));
        let beside = Path::new(&beside);
        let write = || {
            let mut file = std::fs::File::create_new(beside)?;
            file.write_all(self.to_json().as_bytes())?;
            // On the disk before the old one goes.
            file.sync_all()
        };
        write().map_err(|error| {
            let _ = std::fs::remove_file(beside);
            Error::io(path, "write the state", error)
        })?;
        std::fs::rename(beside, path).map_err(|error| {
            let _ = std::fs::remove_file(beside);
            Error::io(path, "replace the state", error)
        })
    }

    /// Reads a state from a file.
    ///
    /// # Errors
    /// [`Error::Io`]; or as [`from_json`](Self::from_json).
    pub fn load(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(|error| Error::io(path, "read the state", error))?;
        Self::from_json(&text)
    }

    fn checksum(&self) -> String {
        let text = serde_json::to_string(self).expect("numbers and strings can be written as JSON");
        format!("{:016x}", xxhash_rust::xxh3::xxh3_64(text.as_bytes()))
    }
}

/// Text with names in it that the file chose, fit for an error: one line, not too long.
fn one_line(text: &str) -> String {
    text.chars().take(200).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> LoaderState {
        LoaderState {
            version: 1,
            seed: 7,
            epoch: 2,
            position: 31,
            global_batch: 64,
            skipped: vec![Skipped {
                epoch: 0,
                batch: 3,
                sample: Some(200),
                reason: "not \"an\" image".to_owned(),
            }],
            fingerprint: u64::MAX,
            order: 1,
        }
    }

    #[test]
    fn it_round_trips() {
        assert_eq!(LoaderState::from_json(&state().to_json()).unwrap(), state());
    }

    #[test]
    fn cut_short_at_any_place_it_is_refused() {
        let text = state().to_json();
        for end in 0..text.len() {
            assert!(matches!(LoaderState::from_json(&text[..end]), Err(Error::State { .. })));
        }
        let error = LoaderState::from_json(&text[..40]).unwrap_err().to_string();
        assert!(error.contains("cut short"), "{error}");
    }

    #[test]
    fn edited_it_is_refused() {
        let edited = state().to_json().replace("\"position\": 31", "\"position\": 32");
        let error = LoaderState::from_json(&edited).unwrap_err().to_string();
        assert!(error.contains("edited"), "{error}");
        let newer = state().to_json().replace("\"version\": 1", "\"version\": 2");
        let error = LoaderState::from_json(&newer).unwrap_err().to_string();
        assert!(error.contains("version 2"), "{error}");
    }

    #[test]
    fn what_a_file_says_does_not_get_out_of_the_error() {
        let text = format!("{{\"{}\\n\\u001b[2J\": 1}}", "x".repeat(50_000));
        for text in [&*text, r#"{"\n\u001b[2J": 1}"#, r#"{"state": {"\n\u001b[2J": 1}}"#] {
            let error = LoaderState::from_json(text).unwrap_err().to_string();
            assert!(!error.contains(char::is_control) && error.len() < 300, "{error:?}");
            assert!(error.contains("no state of a loader"), "{error:?}");
        }
    }

    #[test]
    fn files_are_replaced_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state.json");
        state().save(&path).unwrap();
        state().save(&path).unwrap();
        assert_eq!(LoaderState::load(&path).unwrap(), state());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(matches!(LoaderState::load(folder.path()), Err(Error::Io { .. })));
    }
}
