//! Any bytes as an npy file: what is accepted is no more than the file holds, can be read, and is
//! the same when it is saved again as numpy would.
#![no_main]

use batchline::formats::Npy;
use batchline::{DType, Dataset};
use batchline_fuzz::{READ_WHOLE, check_end, check_error, file, read};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let path = file("images.npy", bytes);
    let dataset = match Npy::open(&path, None) {
        Ok(dataset) => dataset,
        Err(error) => return check_error(&error),
    };
    let (len, input) = (dataset.len(), dataset.spec().input().clone());
    let delivered = u128::from(len) * u128::from(dataset.spec().bytes().expect("a size"));
    // Unsigned numbers are delivered as the next larger type.
    assert!(len > 0 && delivered > 0 && delivered <= 2 * bytes.len() as u128, "{len} {input}");
    assert_eq!(
        Npy::open(&path, None).map(|again| again.fingerprint()).ok(),
        Some(dataset.fingerprint())
    );
    check_end(&dataset);
    let mut samples = Vec::new();
    for index in 0..len.min(READ_WHOLE) {
        match read(&dataset, index) {
            Ok(sample) => samples.extend(sample),
            Err(error) => {
                // The one thing that only reading can tell: an unsigned number beyond i64.
                assert!(input.dtype == DType::I64 && error.contains("more than i64"), "{error}");
                return;
            }
        }
    }
    if len > READ_WHOLE {
        return;
    }
    let again =
        Npy::open(&file("again.npy", &saved(&input, len, &samples)), None).expect("a good file");
    assert_eq!((again.len(), again.spec()), (len, dataset.spec()));
    for (index, sample) in (0..len).zip(samples) {
        assert_eq!(read(&again, index), Ok(vec![sample]));
    }
});

/// The samples as numpy saves them.
fn saved(input: &batchline::TensorSpec, len: u64, samples: &[Vec<u8>]) -> Vec<u8> {
    let descr = match input.dtype {
        DType::Bool => "|b1",
        DType::I8 => "|i1",
        DType::U8 => "|u1",
        DType::I16 => "=i2",
        DType::I32 => "=i4",
        DType::I64 => "=i8",
        DType::F16 => "=f2",
        DType::F32 => "=f4",
        DType::F64 => "=f8",
        other => panic!("npy files hold no {other}"),
    };
    let dims: String = input.shape.dims().iter().map(|dim| format!("{dim}, ")).collect();
    let header =
        format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': ({len}, {dims}), }}\n");
    // numpy writes no comma behind the last of several extents; both are right.
    let header = header.replace(", )", ",)");
    let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
    bytes.extend(u16::try_from(header.len()).expect("short").to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(samples.concat());
    bytes
}
