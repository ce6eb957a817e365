//! The same rows in memory and in files that are mapped: without a header, and as npy.

use std::fs::File;
use std::io::Write;
use std::path::{Path as FilePath, PathBuf};

use batchline::formats::{Npy, Raw};
use batchline::{DType, Dataset, MemoryManager};

use crate::data::{Data, Rows};
use crate::device::IMAGE;
use crate::flow::{Work, contender};
use crate::path::Path;
use crate::paths::DIGITS;
use crate::report::{Entry, Report, in_turn};
use crate::settings::Settings;

pub(crate) fn measure(
    settings: &Settings,
    memory: &MemoryManager,
    data: Data,
    report: &mut Report,
) {
    for batch in [256, 4096] {
        let rows = data.rows(&[1, 28, 28], settings.pick(batch, batch / 64), DIGITS);
        let row = format!("u8 1x28x28 in files, batch {batch}");
        from_files(settings, memory, &row, &rows, report);
    }
    let images = data.part(settings.pick(1 << 30, 8 << 20));
    let rows = images.rows(&IMAGE, settings.pick(256, 4), u64::MAX);
    from_files(settings, memory, "u8 3x224x224 in files, batch 256", &rows, report);
}

fn from_files(
    settings: &Settings,
    memory: &MemoryManager,
    row: &str,
    rows: &Rows,
    report: &mut Report,
) {
    let folder = Folder::new(&settings.folder);
    let (raw, npy) = (folder.0.join("rows.u8"), folder.0.join("rows.npy"));
    if let Err(error) = write(&raw, b"", rows).and_then(|()| write(&npy, &header(rows), rows)) {
        let note = format!("{}: {error}", folder.0.display());
        return report.add(Entry::ours(row, "files", "samples/s").with("note", note));
    }
    let mut contenders = Vec::new();
    for path in [Path::Staged, Path::Gathered] {
        let sources: [(&str, Box<dyn Dataset>); 3] = [
            ("in memory", Box::new(rows.dataset())),
            ("raw", Box::new(Raw::open(&raw, DType::U8, &rows.shape).expect("its own file"))),
            ("npy", Box::new(Npy::open(&npy, None).expect("its own file"))),
        ];
        for (name, dataset) in sources {
            let work = Work::new(rows.batch, settings.workers, path);
            let who = format!("{name}, {}", path.name());
            let entry = Entry::ours(row, &who, "samples/s");
            let span = settings.span / 2;
            contenders.push(contender(memory, rows, dataset, &work, entry, span));
        }
    }
    in_turn(report, settings.rounds, contenders);
}

/// As numpy writes it.
fn header(rows: &Rows) -> Vec<u8> {
    let dims: Vec<String> = rows.shape.iter().map(u64::to_string).collect();
    let shape = format!("({}, {})", rows.len(), dims.join(", "));
    let header = format!("{{'descr': '|u1', 'fortran_order': False, 'shape': {shape}, }}");
    // Magic number, version, a length of two bytes and the header fill a multiple of 64 bytes.
    let header = format!("{header:<117}\n");
    [b"\x93NUMPY\x01\x00", &118u16.to_le_bytes()[..], header.as_bytes()].concat()
}

fn write(path: &FilePath, header: &[u8], rows: &Rows) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(header)?;
    file.write_all(rows.bytes())
}

/// A folder that goes with the value.
struct Folder(PathBuf);

impl Folder {
    fn new(within: &FilePath) -> Self {
        let path = within.join(format!("batchline-bench-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap_or_else(|err| panic!("{}: {err}", path.display()));
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
