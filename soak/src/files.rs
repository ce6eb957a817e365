//! A data set on disk, opened anew by every round that reads it, and a place for saved states.

use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use batchline::{DType, Dataset, LoaderState, formats};
use tempfile::TempDir;

use crate::samples::Form;

pub struct Files;

static FOLDER: OnceLock<TempDir> = OnceLock::new();

impl Files {
    /// Samples of the data set.
    pub const LEN: u64 = 3000;

    pub fn form() -> Form {
        Form { seed: 0xf11e, dtype: DType::U8, dims: vec![5, 4], label: true, weight: None }
    }

    /// Writes the data set.
    pub fn write() -> std::io::Result<()> {
        let folder = tempfile::tempdir()?;
        let (form, indices) = (Self::form(), Vec::from_iter(0..Self::LEN));
        let len = Self::LEN;
        write_npy(
            &folder.path().join("images.npy"),
            "|u1",
            &format!("({len}, 5, 4)"),
            &form.inputs(&indices),
        )?;
        write_npy(
            &folder.path().join("labels.npy"),
            "<i8",
            &format!("({len},)"),
            &form.labels(&indices),
        )?;
        FOLDER.set(folder).expect("written once");
        Ok(())
    }

    pub fn remove() -> std::io::Result<()> {
        std::fs::remove_dir_all(Self::folder())
    }

    fn folder() -> &'static Path {
        FOLDER.get().expect("written at the start").path()
    }

    pub fn open() -> Box<dyn Dataset> {
        formats::open(Self::folder().to_str().expect("a plain path"))
            .expect("the files that were written")
    }

    pub fn save_and_load(state: &LoaderState) -> LoaderState {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!("state-{}.json", NUMBER.fetch_add(1, Ordering::Relaxed));
        let path = Self::folder().join(name);
        state.save(&path).expect("a file for the state");
        let state = LoaderState::load(&path).expect("the state that was saved");
        std::fs::remove_file(&path).expect("the file is there");
        state
    }
}

fn write_npy(path: &Path, dtype: &str, shape: &str, bytes: &[u8]) -> std::io::Result<()> {
    let header = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}");
    // Magic number, version, a length of two bytes and the header fill a multiple of 64 bytes.
    let header = format!("{header:<117}\n");
    let file = [b"\x93NUMPY\x01\x00", &118u16.to_le_bytes()[..], header.as_bytes(), bytes].concat();
    std::fs::write(path, file)
}
