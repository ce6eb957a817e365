//! Folders of files with any names: what is found does not depend on the order in which the system
//! lists them, and is a data set that can be read.
#![no_main]

use std::path::Path;

use batchline::Dataset;
use batchline::formats::open;
use batchline_fuzz::{path, read};
use libfuzzer_sys::fuzz_target;

/// Two samples with one element each.
const IDX: &[u8] = &[0, 0, 8, 1, 0, 0, 0, 2, 70, 80];
const NPY: &[u8] =
    b"\x93NUMPY\x01\x00\x3b\x00{'descr': '|u1', 'fortran_order': False, 'shape': (2,)}   \nFP";

fuzz_target!(|text: &str| {
    let names: Vec<&str> = text.lines().filter(|name| is_name(name)).take(8).collect();
    let (forwards, backwards) = (path("forwards"), path("backwards"));
    fill(&forwards, names.iter());
    fill(&backwards, names.iter().rev());
    let (first, second) = (look(&forwards, &names), look(&backwards, &names));
    assert_eq!(first, second);
    for folder in [&forwards, &backwards] {
        std::fs::remove_dir_all(folder).expect("the folder can be removed");
    }
});

fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() < 200
        && !name.contains(['/', '\0'])
        && name != "."
        && name != ".."
}

fn fill<'a>(folder: &Path, names: impl Iterator<Item = &'a &'a str>) {
    // What an aborted run left.
    let _ = std::fs::remove_dir_all(folder);
    std::fs::create_dir(folder).expect("the folder can be written");
    for name in names {
        let bytes = if name.ends_with(".npy") { NPY } else { IDX };
        std::fs::write(folder.join(name), bytes).expect("the folder can be written");
    }
}

/// What the folder holds, and what each file with the labels beside it does.
fn look(folder: &Path, names: &[&str]) -> Vec<Result<(u64, bool), String>> {
    let spec = folder.to_str().expect("Unicode");
    let files = names.iter().map(|name| format!("{spec}/{name}"));
    std::iter::once(spec.to_owned())
        .chain(files)
        .map(|name| match open(&name) {
            Ok(dataset) => {
                assert_eq!(dataset.len(), 2);
                let sample = read(&*dataset, 1).expect("a sample of the data set");
                assert!(sample.iter().all(|tensor| *tensor == [80]), "{sample:?}");
                Ok((dataset.fingerprint(), dataset.spec().label_spec().is_some()))
            }
            Err(error) => Err(error.chain().replace(spec, "")),
        })
        .collect()
}
