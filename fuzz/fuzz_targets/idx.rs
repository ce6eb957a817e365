//! IDX files: accepted exactly where a plain reading accepts them, and read the same.
#![no_main]

use batchline::Dataset;
use batchline_fuzz::{Idx, check_idx, file, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Those are the business of the other target.
    if bytes.starts_with(&[0x1f, 0x8b]) {
        return;
    }
    let expected = Idx::parse(bytes);
    let path = file("images", bytes);
    check_idx(&path, expected.as_ref());
    // Its own labels: as many as there are samples, and of the right kind if it is a list.
    let labelled = batchline::formats::Idx::open(&path, Some(&path));
    assert_eq!(labelled.is_ok(), expected.is_some_and(|idx| idx.dims.len() == 1));
    if let Ok(dataset) = labelled {
        let sample = read(&dataset, dataset.len() - 1).expect("the last sample");
        assert_eq!(sample[0], sample[1]);
    }
});
