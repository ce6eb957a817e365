//! Finding the files of a data set by their names.

use std::path::{Path, PathBuf};

use super::bytes::{first_bytes, open_file};
use super::npy::MAGIC;
use crate::{Error, Result};

/// How many names an error lists.
const LISTED: usize = 8;

/// The names of inputs and of their labels, for numpy's files.
const NPY_PAIRS: [(&str, &str); 2] = [("images.npy", "labels.npy"), ("x.npy", "y.npy")];

/// Which format a data set is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Idx,
    Npy,
}

/// The files of a data set.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) kind: Kind,
    pub(super) inputs: PathBuf,
    pub(super) labels: Option<PathBuf>,
}

/// Finds the data set that is in the folder `path`, or whose inputs are the file `path`.
pub(super) fn find(path: &Path) -> Result<Found> {
    let kind = std::fs::metadata(path).map_err(|err| Error::io(path, "open", err))?;
    if kind.is_dir() { in_folder(path) } else { beside(path) }
}

fn in_folder(folder: &Path) -> Result<Found> {
    let names = file_names(folder)?;
    let mut sets: Vec<(Kind, &str, Option<&str>)> = Vec::new();
    for (inputs, labels) in NPY_PAIRS {
        if names.iter().any(|name| name == inputs) {
            let labels = names.iter().find(|name| *name == labels).map(String::as_str);
            sets.push((Kind::Npy, inputs, labels));
        }
    }
    let idx: Vec<IdxName> = names.iter().filter_map(|name| IdxName::parse(name)).collect();
    for images in idx.iter().filter(|name| name.part == "images") {
        // Who decompressed a file and kept the original has one data set, not two.
        let decompressed = |other: &IdxName| {
            images.gzip && !other.gzip && other.full == &images.full[..images.full.len() - 3]
        };
        if !idx.iter().any(decompressed) {
            sets.push((Kind::Idx, images.full, images.labels(&idx)));
        }
    }
    match sets[..] {
        [(kind, inputs, labels)] => {
            let labels = labels.map(|name| folder.join(name));
            Ok(Found { kind, inputs: folder.join(inputs), labels })
        }
        [] => {
            let labels_only = names
                .iter()
                .find(|name| {
                    IdxName::parse(name).is_some() || NPY_PAIRS.iter().any(|pair| pair.1 == *name)
                })
                .map_or(String::new(), |name| format!(" ({name} is there, but not its inputs)"));
            let problem = format!(
                "no data set in this folder{labels_only}: looked for *-images-idx3-ubyte with \
                 *-labels-idx1-ubyte (also *.idx3-ubyte, and each with .gz), images.npy with \
                 labels.npy, and x.npy with y.npy"
            );
            Err(Error::format(folder, problem))
        }
        [(_, first, _), ..] => {
            let mut listed: Vec<&str> = sets.iter().map(|set| set.1).take(LISTED).collect();
            if sets.len() > LISTED {
                listed.push("…");
            }
            let problem = format!(
                "{} data sets in this folder ({}): name the images file instead, such as {}",
                sets.len(),
                listed.join(", "),
                folder.join(first).display()
            );
            Err(Error::format(folder, problem))
        }
    }
}

/// Finds the kind of the file `inputs` by its content, and the labels beside it by its name.
fn beside(inputs: &Path) -> Result<Found> {
    let (file, _) = open_file(inputs)?;
    let start = first_bytes(inputs, &file, MAGIC.len())?;
    let extension = inputs.extension().unwrap_or_default();
    let kind = match &start[..] {
        start if start == MAGIC => Kind::Npy,
        [0, 0, ..] | [0x1f, 0x8b, ..] => Kind::Idx,
        // Not what they should be by their names: let the format say what is wrong.
        _ if extension == "npy" || extension == "npz" => Kind::Npy,
        _ if named_idx(inputs).is_some() => Kind::Idx,
        _ => {
            let problem = "neither an IDX file (which starts with the bytes 00 00) nor an npy \
                           file (which starts with \\x93NUMPY)";
            return Err(Error::format(inputs, problem));
        }
    };
    let mut found = Found { kind, inputs: inputs.to_owned(), labels: None };
    let Some(name) = inputs.file_name().and_then(|name| name.to_str()) else {
        return Ok(found);
    };
    let labels = match kind {
        Kind::Npy => NPY_PAIRS
            .iter()
            .find(|pair| pair.0 == name)
            .map(|pair| inputs.with_file_name(pair.1))
            .filter(|path| path.is_file()),
        Kind::Idx => match IdxName::parse(name) {
            Some(images) if images.part == "images" => {
                let names = file_names(&folder_of(inputs))?;
                let names: Vec<IdxName> =
                    names.iter().filter_map(|name| IdxName::parse(name)).collect();
                images.labels(&names).map(|name| inputs.with_file_name(name))
            }
            _ => None,
        },
    };
    found.labels = labels;
    Ok(found)
}

fn named_idx(path: &Path) -> Option<IdxName<'_>> {
    IdxName::parse(path.file_name()?.to_str()?)
}

fn folder_of(path: &Path) -> PathBuf {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    }
}

/// The names of the regular files in a folder (and of links to such), sorted. Names that are not
/// Unicode are none of ours.
fn file_names(folder: &Path) -> Result<Vec<String>> {
    let io = |err| Error::io(folder, "list", err);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(io)? {
        if let Ok(name) = entry.map_err(io)?.file_name().into_string() {
            let known = IdxName::parse(&name).is_some()
                || NPY_PAIRS.iter().any(|pair| pair.0 == name || pair.1 == name);
            // Unpacked archives hold folders named like the files in them.
            if known && folder.join(&name).is_file() {
                names.push(name);
            }
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A name such as `train-images-idx3-ubyte.gz`, taken apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct IdxName<'a> {
    full: &'a str,
    /// `train-`
    prefix: &'a str,
    /// `images` or `labels`.
    part: &'static str,
    /// `-` or `.`, before `idx`.
    separator: char,
    gzip: bool,
}

impl<'a> IdxName<'a> {
    fn parse(full: &'a str) -> Option<Self> {
        let plain = full.strip_suffix(".gz");
        let (stem, code) = plain.unwrap_or(full).rsplit_once("idx")?;
        let (dims, element) = code.split_once('-')?;
        let elements = ["ubyte", "byte", "short", "int", "float", "double"];
        if dims.parse::<u8>().is_err() || !elements.contains(&element) {
            return None;
        }
        let (stem, separator) = match stem.strip_suffix('-') {
            Some(stem) => (stem, '-'),
            None => (stem.strip_suffix('.')?, '.'),
        };
        let (prefix, part) = match stem.strip_suffix("images") {
            Some(prefix) => (prefix, "images"),
            None => (stem.strip_suffix("labels")?, "labels"),
        };
        Some(Self { full, prefix, part, separator, gzip: plain.is_some() })
    }

    /// The labels that belong to these images: named in the same way rather than in another, and
    /// not compressed rather than compressed.
    fn labels(&self, names: &[IdxName<'a>]) -> Option<&'a str> {
        names
            .iter()
            .filter(|name| name.part == "labels" && name.prefix == self.prefix)
            .min_by_key(|name| (name.separator != self.separator, name.gzip, name.full))
            .map(|name| name.full)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_taken_apart() {
        let name = IdxName::parse("emnist-letters-train-images.idx3-ubyte.gz").unwrap();
        assert_eq!((name.prefix, name.part), ("emnist-letters-train-", "images"));
        assert_eq!((name.separator, name.gzip), ('.', true));
        assert_eq!(IdxName::parse("labels-idx1-int").unwrap().part, "labels");
        for other in
            ["", "idx", "train-images", "images-idx-ubyte", "imagesidx3-ubyte", "a-idx3-ubyte"]
        {
            assert_eq!(IdxName::parse(other), None, "{other}");
        }
    }

    #[test]
    fn labels_named_alike_are_preferred() {
        let names = ["a-labels.idx1-ubyte", "a-labels-idx1-ubyte.gz", "b-labels-idx1-ubyte"];
        let names: Vec<IdxName> = names.iter().filter_map(|name| IdxName::parse(name)).collect();
        let labels = |images| IdxName::parse(images).unwrap().labels(&names);
        assert_eq!(labels("a-images-idx3-ubyte"), Some("a-labels-idx1-ubyte.gz"));
        assert_eq!(labels("a-images.idx3-ubyte"), Some("a-labels.idx1-ubyte"));
        assert_eq!(labels("c-images-idx3-ubyte"), None);
    }
}
