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
        let any: serde_json::Value = serde_json::from_str(text).map_err(refuse)?;
        if let Some(version) = any.pointer("/state/version").and_then(serde_json::Value::as_u64) {
            Self::check_version(version)?;
        }
        // From the text again, for the error to name the place.
        let saved: Saved = serde_json::from_str(text).map_err(refuse)?;
        if saved.checksum != saved.state.checksum() {
            let problem = "its checksum does not match: it was damaged or edited".to_owned();
            return Err(Error::State { problem });
        }
        Ok(saved.state)
    }

    pub(crate) fn check_version(version: u64) -> Result<()> {
        if version == u64::from(Self::VERSION) {
            return Ok(());
        }
        let problem = format!(
            "it has version {version}, this program reads version {}; start anew",
            Self::VERSION
        );
        Err(Error::State { problem })
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
    use serde_json::Value;

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
            assert!(refused(&text[..end]).contains("cut short"), "after {end} bytes");
        }
    }

    /// What is wrong with a text.
    fn refused(text: &str) -> String {
        match LoaderState::from_json(text) {
            Err(Error::State { problem }) => problem,
            other => panic!("{other:?} of {text}"),
        }
    }

    /// The objects of the text, by their places in it, and their fields.
    fn fields() -> Vec<(&'static str, Vec<String>)> {
        let text = serde_json::from_str::<Value>(&state().to_json()).unwrap();
        ["", "/state", "/state/skipped/0"]
            .map(|place| {
                let object = text.pointer(place).unwrap().as_object().unwrap();
                (place, object.keys().cloned().collect())
            })
            .to_vec()
    }

    /// The text with one of its objects changed.
    fn edited(place: &str, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) -> String {
        let mut text = serde_json::from_str::<Value>(&state().to_json()).unwrap();
        edit(text.pointer_mut(place).unwrap().as_object_mut().unwrap());
        serde_json::to_string_pretty(&text).unwrap()
    }

    #[test]
    fn a_field_more_or_less_is_refused_by_its_name() {
        let mut count = 0;
        for (place, fields) in fields() {
            for field in fields {
                count += 1;
                let less = refused(&edited(place, |object| drop(object.remove(&field))));
                // An index that is missing is none, so only the checksum can tell.
                let expected = if field == "sample" {
                    "its checksum does not match".to_owned()
                } else {
                    format!("missing field `{field}`")
                };
                assert!(less.contains(&expected), "{place}/{field}: {less}");
            }
            let more = refused(&edited(place, |object| {
                object.insert("more".to_owned(), 1.into());
            }));
            assert!(more.contains("unknown field `more`"), "{place}: {more}");
        }
        assert_eq!(count, 2 + 8 + 4);
    }

    #[test]
    fn a_field_that_was_edited_is_refused() {
        let ours = serde_json::from_str::<Value>(&state().to_json()).unwrap();
        for (place, fields) in fields() {
            for field in fields {
                let own = &ours.pointer(place).unwrap()[&field];
                // Another number that it could be, numbers that it can't be, and other things.
                let mut values = vec![
                    serde_json::json!(5),
                    serde_json::json!(u64::MAX - 1),
                    serde_json::json!(-1),
                    serde_json::json!(0.5),
                    serde_json::json!(1e300),
                    serde_json::json!("5"),
                    serde_json::json!(true),
                    serde_json::json!([5]),
                    serde_json::json!({}),
                    Value::Null,
                ];
                values.retain(|value| value != own);
                for value in values {
                    let text = edited(place, |object| {
                        object.insert(field.clone(), value.clone());
                    });
                    let problem = refused(&text);
                    let whole = value.is_u64();
                    let expected = match (own, &*field) {
                        (_, "version") if whole => "version",
                        // Of the right kind: only the checksum can tell.
                        (Value::Number(_), _) if whole => "its checksum does not match",
                        (Value::String(_), _) if value.is_string() => "its checksum does not match",
                        (_, "sample") if value.is_null() => "its checksum does not match",
                        // Of another kind: the place in the text.
                        _ => "at line",
                    };
                    assert!(problem.contains(expected), "{place}/{field} = {value}: {problem}");
                }
            }
        }
        let twice = state().to_json().replace("\"seed\": 7", "\"seed\": 8, \"seed\": 7");
        assert!(refused(&twice).contains("duplicate field `seed`"));
    }

    #[test]
    fn another_version_is_refused_whatever_else_there_is() {
        let newer = edited("/state", |object| {
            object.insert("version".to_owned(), 2.into());
            object.insert("more".to_owned(), 1.into());
        });
        assert!(refused(&newer).contains("it has version 2, this program reads version 1"));
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
