//! The names of files without a header: one that is accepted holds what the plain reading finds.
//! The first line of an input is what follows the path in the name, the rest is the file.
#![no_main]

use batchline::DType;
use batchline::formats::open;
use batchline_fuzz::{check_end, check_error, file, indices, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some(end) = input.iter().position(|byte| *byte == b'\n') else { return };
    let Ok(options) = std::str::from_utf8(&input[..end]) else { return };
    let bytes = &input[end + 1..];
    let path = file("raw", bytes);
    let dataset = match open(&format!("raw:{},{options}", path.display())) {
        Ok(dataset) => dataset,
        Err(error) => return check_error(&error),
    };
    let input = dataset.spec().input();
    let row = usize::try_from(input.shape.bytes(input.dtype).expect("checked")).expect("small");
    let len = usize::try_from(dataset.len()).expect("no more than bytes");
    assert!(row > 0 && len > 0);
    // The rows reach to the end, whatever was left out before them.
    let mut expected = bytes[bytes.len() - len * row..].to_vec();
    if input.dtype == DType::Bool {
        expected.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
    } else {
        assert_eq!(dataset.contiguous(0), Some(&expected[..]));
    }
    for index in indices(dataset.len()) {
        let at = usize::try_from(index).expect("small") * row;
        assert_eq!(read(&*dataset, index).expect("a sample of the file")[0], expected[at..][..row]);
    }
    check_end(&*dataset);
});
