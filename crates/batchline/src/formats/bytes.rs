//! The bytes of a file: mapped, or owned where they had to be decompressed.
//!
//! # The hazard of mapped files
//!
//! A mapping is as long as the file was when it was made. If another process shortens the file
//! afterwards, touching a page behind the new end raises `SIGBUS`, which ends this process; if it
//! writes to the file, the bytes seen here change. The file's length is checked against its header
//! when it is opened, so a file that is short *at that time* is an error. Nothing can be done about
//! one that is shortened later: a check before each read would be a system call per sample and
//! would still race with the truncation. The public documentation tells users to replace data by
//! renaming.
#![allow(unsafe_code, reason = "mapping a file is unsafe, because others may change the file")]

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::Path;

use memmap2::Mmap;
use xxhash_rust::xxh3::Xxh3;

use crate::{Error, Result};

/// Files up to this many bytes are hashed whole.
const HASHED_WHOLE: usize = 64 << 20;
/// Of longer ones: this many bytes at each end …
const HASHED_END: usize = 1 << 20;
/// … and so many pages, evenly spaced, …
const HASHED_PAGES: usize = 64;
/// … of this many bytes.
const PAGE: usize = 4096;

/// The bytes of a file.
pub(super) enum FileBytes {
    /// Straight from the page cache.
    Mapped(Mmap),
    /// In memory of our own.
    Owned(Vec<u8>),
}

impl FileBytes {
    /// Maps `file`, which was opened from `path` and is `len` bytes long.
    pub(super) fn map(path: &Path, file: &File, len: u64) -> Result<Self> {
        // Some systems refuse to map nothing.
        if len == 0 {
            return Ok(Self::Owned(Vec::new()));
        }
        // SAFETY: the mapping is private to this value, read-only, and is only ever seen as bytes,
        // for which any content is valid. That nobody else changes or shortens the file can't be
        // enforced; the module's documentation tells what that means and passes it on to users.
        let map = unsafe { Mmap::map(file) }.map_err(|err| Error::io(path, "map", err))?;
        Ok(Self::Mapped(map))
    }

    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Owned(bytes) => bytes,
        }
    }

    /// Hashes the length and the content, or for a long file a part of the content that a
    /// different data set is most unlikely to share.
    pub(super) fn hash(&self, hash: &mut Xxh3) {
        hash_content(self.as_slice(), hash);
    }
}

impl fmt::Debug for FileBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self {
            Self::Mapped(_) => "mapped",
            Self::Owned(_) => "owned",
        };
        write!(f, "{} bytes, {kind}", self.as_slice().len())
    }
}

/// Opens a regular file and tells its length in bytes.
///
/// # Errors
/// [`Error::Io`]; or it is a folder or something else that has no length, such as a pipe (opening
/// one would block).
pub(super) fn open_file(path: &Path) -> Result<(File, u64)> {
    let io = |err| Error::io(path, "open", err);
    let kind = std::fs::metadata(path).map_err(io)?;
    if kind.is_dir() {
        return Err(Error::format(path, "is a folder: name a file in it"));
    }
    if !kind.is_file() {
        return Err(Error::format(
            path,
            "is no regular file, so it can't be mapped: copy it to one",
        ));
    }
    let file = File::open(path).map_err(io)?;
    // Of the open file, which may be another one than a moment ago.
    let len = file.metadata().map_err(io)?.len();
    Ok((file, len))
}

/// The first `len` bytes of a file, or all of a shorter one. Leaves the file at its start.
pub(super) fn first_bytes(path: &Path, mut file: &File, len: usize) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(len as u64).read_to_end(&mut bytes).map_err(|err| Error::io(path, "read", err))?;
    file.rewind().map_err(|err| Error::io(path, "read", err))?;
    Ok(bytes)
}

fn hash_content(bytes: &[u8], hash: &mut Xxh3) {
    hash.update(&(bytes.len() as u64).to_le_bytes());
    if bytes.len() <= HASHED_WHOLE {
        hash.update(bytes);
        return;
    }
    hash.update(&bytes[..HASHED_END]);
    // The length is over 64 MiB, so steps are longer than a page and the last one ends in bounds.
    let step = bytes.len() / (HASHED_PAGES + 1);
    for page in 1..=HASHED_PAGES {
        hash.update(&bytes[page * step..][..PAGE]);
    }
    hash.update(&bytes[bytes.len() - HASHED_END..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hashed(bytes: &[u8]) -> u64 {
        let mut hash = Xxh3::new();
        hash_content(bytes, &mut hash);
        hash.digest()
    }

    #[test]
    fn long_files_are_sampled_at_both_ends_and_between() {
        let mut bytes = vec![0u8; HASHED_WHOLE + 1];
        let before = hashed(&bytes);
        let step = bytes.len() / (HASHED_PAGES + 1);
        for place in [0, HASHED_END - 1, step * 30 + 5, bytes.len() - 1] {
            bytes[place] = 1;
            assert_ne!(hashed(&bytes), before, "byte {place}");
            bytes[place] = 0;
        }
        assert_eq!(hashed(&bytes), before);
        bytes.push(0);
        assert_ne!(hashed(&bytes), before, "length");
    }

    #[test]
    fn short_files_are_hashed_whole() {
        let mut bytes = vec![0u8; 3 << 20];
        let before = hashed(&bytes);
        bytes[(1 << 20) + 77] = 1;
        assert_ne!(hashed(&bytes), before);
    }

    #[test]
    fn what_is_no_regular_file_is_refused_before_it_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let err = open_file(folder.path()).unwrap_err().chain();
        assert!(err.contains("is a folder: name a file in it"), "{err}");
        #[cfg(unix)]
        {
            let err = open_file(Path::new("/dev/null")).unwrap_err().chain();
            assert!(err.contains("is no regular file"), "{err}");
        }
    }

    #[test]
    fn an_empty_file_can_be_mapped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (opened, len) = open_file(file.path()).unwrap();
        assert_eq!(FileBytes::map(file.path(), &opened, len).unwrap().as_slice(), [0u8; 0]);
    }
}
