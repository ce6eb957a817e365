//! The names of computed data sets: what is accepted is what was written, and can be read.
#![no_main]

use batchline::formats::open;
use batchline_fuzz::{check_end, check_error, read};
use libfuzzer_sys::fuzz_target;

/// Larger samples are not read: they are as large as was asked for.
const READ: u64 = 1 << 16;

fuzz_target!(|text: &str| {
    let dataset = match open(&format!("synthetic:{text}")) {
        Ok(dataset) => dataset,
        Err(error) => return check_error(&error),
    };
    let (len, spec) = (dataset.len(), dataset.spec());
    let bytes = spec.bytes().expect("a size that was checked");
    let dims: Vec<String> = spec.input().shape.dims().iter().map(u64::to_string).collect();
    let shape = if dims.is_empty() { "1".to_owned() } else { dims.join("x") };
    let again = open(&format!("synthetic:{len},{shape},{}", spec.input().dtype)).expect("accepted");
    // The shape 1 is a scalar's; 01 is a vector of one element, and can't be written otherwise.
    if spec.input().shape.dims() != [1] {
        assert_eq!((again.len(), again.spec()), (len, spec), "{text:?}");
        assert_eq!(again.fingerprint(), dataset.fingerprint());
    }
    if bytes > READ {
        return;
    }
    check_end(&*dataset);
    for index in [0, len / 2, len.saturating_sub(1)].into_iter().filter(|index| *index < len) {
        let sample = read(&*dataset, index).expect("a sample of the data set");
        assert_eq!(sample[1], i64::try_from(index % 1000).expect("small").to_ne_bytes());
    }
});
