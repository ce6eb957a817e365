//! Data sets on disk: what valid files yield, what each kind of bad file is called, and that no
//! file makes anything panic.
#![cfg(feature = "formats")]

use std::io::Write;
use std::path::{Path, PathBuf};

use batchline::formats::{Idx, Npy, Raw, Synthetic, open};
use batchline::{DType, Dataset, Error, Result, SampleBuffer};

const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/digits");

// ---- Making files, reading samples, looking at errors

/// A folder for one test.
struct Folder(tempfile::TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.0.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    fn spec(&self) -> &str {
        self.0.path().to_str().unwrap()
    }
}

fn idx(code: u8, dims: &[u32], data: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0, 0, code, u8::try_from(dims.len()).unwrap()];
    dims.iter().for_each(|dim| bytes.extend(dim.to_be_bytes()));
    bytes.extend(data);
    bytes
}

/// Two images of 2 by 3.
fn images() -> Vec<u8> {
    idx(8, &[2, 2, 3], &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12])
}

fn labels() -> Vec<u8> {
    idx(8, &[2], &[70, 80])
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut stream = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    stream.write_all(bytes).unwrap();
    stream.finish().unwrap()
}

/// An npy file with any header.
fn npy_of(version: u8, header: &[u8], data: &[u8]) -> Vec<u8> {
    let mut bytes = b"\x93NUMPY".to_vec();
    bytes.extend([version, 0]);
    if version == 1 {
        bytes.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
    } else {
        bytes.extend(u32::try_from(header.len()).unwrap().to_le_bytes());
    }
    bytes.extend(header);
    bytes.extend(data);
    bytes
}

fn npy_header(descr: &str, fortran: bool, shape: &str) -> String {
    let fortran = if fortran { "True" } else { "False" };
    format!("{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}          \n")
}

/// An npy file as numpy writes it.
fn npy(descr: &str, fortran: bool, shape: &str, data: &[u8]) -> Vec<u8> {
    npy_of(1, npy_header(&format!("'{descr}'"), fortran, shape).as_bytes(), data)
}

fn read(dataset: &dyn Dataset, index: u64) -> Vec<Vec<u8>> {
    let mut buffer = SampleBuffer::new(dataset.spec()).unwrap();
    buffer.fill(|sample| dataset.read(index, sample)).unwrap();
    (0..dataset.spec().tensors().len()).map(|tensor| buffer.bytes(tensor).to_vec()).collect()
}

#[track_caller]
fn error_of<T>(result: Result<T>) -> String {
    let Err(err) = result else { panic!("no error") };
    let text = err.chain();
    assert!(!text.contains(char::is_control) && text.len() < 600, "not a clear line: {text:?}");
    text
}

/// Checks that opening fails with an error about this file that holds these parts.
#[track_caller]
fn assert_error<T>(result: Result<T>, path: &Path, parts: &[&str]) {
    let text = error_of(result);
    assert!(text.starts_with(&path.display().to_string()), "names another file: {text}");
    for part in parts {
        assert!(text.contains(part), "lacks {part:?}: {text}");
    }
}

#[track_caller]
fn assert_idx_error(bytes: &[u8], parts: &[&str]) {
    let folder = Folder::new();
    let path = folder.put("images", bytes);
    assert_error(Idx::open(&path, None), &path, parts);
}

#[track_caller]
fn assert_npy_error(bytes: &[u8], parts: &[&str]) {
    let folder = Folder::new();
    let path = folder.put("images.npy", bytes);
    assert_error(Npy::open(&path, None), &path, parts);
}

#[track_caller]
fn assert_header_error(header: &str, part: &str) {
    for version in 1..=3 {
        let bytes = npy_of(version, header.as_bytes(), &[0; 12]);
        assert_npy_error(&bytes, &["malformed npy header", part]);
    }
}

// ---- The digits

#[test]
fn the_digits_are_what_they_were() {
    let digits = open(DIGITS).unwrap();
    assert_eq!(digits.len(), 1797);
    assert_eq!(digits.spec().input().to_string(), "input: u8 [8, 8]");
    assert_eq!(digits.spec().label_spec().unwrap().to_string(), "label: u8 []");
    let (mut pixels, mut classes) = (0, 0);
    for index in 0..digits.len() {
        let sample = read(&*digits, index);
        pixels += sample[0].iter().map(|pixel| u64::from(*pixel)).sum::<u64>();
        classes += u64::from(sample[1][0]);
    }
    assert_eq!((pixels, classes), (561_718, 8070));
}

// ---- IDX: valid files

#[test]
fn idx_elements_of_each_type_are_read_in_the_machines_order() {
    let folder = Folder::new();
    let cases: [(u8, DType, Vec<u8>, Vec<u8>); 6] = [
        (0x08, DType::U8, vec![1, 255], vec![1, 255]),
        (0x09, DType::I8, vec![1, 255], vec![1, 255]),
        (
            0x0b,
            DType::I16,
            [-2i16, 300].map(i16::to_be_bytes).concat(),
            [-2i16, 300].map(i16::to_ne_bytes).concat(),
        ),
        (
            0x0c,
            DType::I32,
            [-2i32, 70_000].map(i32::to_be_bytes).concat(),
            [-2i32, 70_000].map(i32::to_ne_bytes).concat(),
        ),
        (
            0x0d,
            DType::F32,
            [-0.1f32, 7e9].map(f32::to_be_bytes).concat(),
            [-0.1f32, 7e9].map(f32::to_ne_bytes).concat(),
        ),
        (
            0x0e,
            DType::F64,
            [-0.1f64, 7e90].map(f64::to_be_bytes).concat(),
            [-0.1f64, 7e90].map(f64::to_ne_bytes).concat(),
        ),
    ];
    for (code, dtype, stored, expected) in cases {
        let path = folder.put("images", &idx(code, &[1, 2], &stored));
        let dataset = Idx::open(&path, None).unwrap();
        assert_eq!(dataset.spec().input().dtype, dtype);
        assert_eq!(read(&dataset, 0), [expected], "{dtype}");
        let path = folder.put("images.gz", &gzip(&idx(code, &[2], &stored)));
        let dataset = Idx::open(&path, None).unwrap();
        let (first, second) = (read(&dataset, 0), read(&dataset, 1));
        assert_eq!([&first[0][..], &second[0][..]].concat(), stored_as(dtype, &stored), "{dtype}");
    }
}

/// Big-endian elements in the machine's order.
fn stored_as(dtype: DType, big_endian: &[u8]) -> Vec<u8> {
    let mut bytes = big_endian.to_vec();
    if cfg!(target_endian = "little") {
        bytes.chunks_exact_mut(dtype.size()).for_each(<[u8]>::reverse);
    }
    bytes
}

#[test]
fn idx_files_of_one_to_eight_dimensions_are_read() {
    let folder = Folder::new();
    for rank in 1..=8 {
        let mut dims = vec![1; rank];
        dims[0] = 3;
        let path = folder.put("images", &idx(8, &dims, &[7, 8, 9]));
        let dataset = Idx::open(&path, None).unwrap();
        assert_eq!((dataset.len(), dataset.spec().input().shape.rank()), (3, rank - 1));
        assert_eq!(read(&dataset, 2), [[9]]);
    }
}

#[test]
fn each_name_of_an_idx_pair_is_found_in_a_folder() {
    for (images_name, labels_name) in [
        ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
        ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"),
        ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz"),
        ("a-images.idx3-ubyte.gz", "a-labels-idx1-ubyte"),
    ] {
        let folder = Folder::new();
        let bytes = |name: &str, bytes: Vec<u8>| match name.ends_with(".gz") {
            true => gzip(&bytes),
            false => bytes,
        };
        let images = folder.put(images_name, &bytes(images_name, images()));
        folder.put(labels_name, &bytes(labels_name, labels()));
        folder.put("notes.txt", b"not a data set");
        let image = images.to_str().unwrap();
        for spec in [folder.spec(), image] {
            let dataset = open(spec).unwrap();
            assert_eq!(dataset.len(), 2);
            assert_eq!(read(&*dataset, 1), [vec![7, 8, 9, 10, 11, 12], vec![80]]);
        }
    }
}

#[test]
fn an_idx_file_beside_its_compressed_original_is_one_data_set() {
    let folder = Folder::new();
    folder.put("train-images-idx3-ubyte", &images());
    folder.put("train-images-idx3-ubyte.gz", b"not even read");
    folder.put("train-labels-idx1-ubyte", &labels());
    folder.put("train-labels-idx1-ubyte.gz", b"not even read");
    assert_eq!(read(&*open(folder.spec()).unwrap(), 0)[1], [70]);
}

#[test]
fn images_without_labels_are_inputs_only() {
    let folder = Folder::new();
    folder.put("a-images-idx3-ubyte", &images());
    // Another set's labels, and a folder of the right name.
    folder.put("b-labels-idx1-ubyte", &labels());
    std::fs::create_dir(folder.0.path().join("a-labels-idx1-ubyte")).unwrap();
    let dataset = open(folder.spec()).unwrap();
    assert!(dataset.spec().label_spec().is_none());
    assert_eq!(read(&*dataset, 0), [[1, 2, 3, 4, 5, 6]]);
}

#[test]
fn gzip_files_of_several_members_are_read() {
    let folder = Folder::new();
    let (head, tail) = (gzip(&images()[..9]), gzip(&images()[9..]));
    let path = folder.put("images.gz", &[head, tail].concat());
    assert_eq!(read(&Idx::open(&path, None).unwrap(), 1), [[7, 8, 9, 10, 11, 12]]);
}

// ---- IDX: bad files

#[test]
fn idx_wrong_magic() {
    let text = &["no IDX file: it starts with 93 4e 55 4d, not with 00 00"];
    assert_idx_error(b"\x93NUMPY\x01\x00", text);
}

#[test]
fn idx_web_page_instead_of_a_file() {
    assert_idx_error(b"<!DOCTYPE html>", &["looks like a web page, so download the file again"]);
}

#[test]
fn idx_unknown_type_code() {
    assert_idx_error(&idx(0x0a, &[1], &[0]), &["unknown type code 0x0a", "0x08 (u8)"]);
}

#[test]
fn idx_without_dimensions() {
    assert_idx_error(&idx(8, &[], &[]), &["has 0 dimensions, so there are no samples"]);
}

#[test]
fn idx_too_many_dimensions() {
    assert_idx_error(&idx(8, &[1; 9], &[0]), &["has 9 dimensions, at most 8 are supported"]);
}

#[test]
fn idx_extent_of_zero() {
    assert_idx_error(&idx(8, &[0, 28, 28], &[]), &["has the shape [0, 28, 28]", "no elements"]);
    assert_idx_error(&idx(8, &[9, 0], &[]), &["has the shape [9, 0]: it holds no elements"]);
}

#[test]
fn idx_dimensions_that_overflow() {
    let text = &["header is corrupt: the size of its shape [4294967295, 4294967295, 4294967295]"];
    assert_idx_error(&idx(8, &[u32::MAX; 3], &[0]), text);
    assert_idx_error(&gzip(&idx(8, &[u32::MAX; 3], &[0])), text);
    // The elements fit, their bytes don't.
    assert_idx_error(&idx(0x0e, &[1 << 31, 1 << 31], &[0]), &["f64 overflows"]);
}

#[test]
fn idx_truncated() {
    let whole = images();
    let text = &["truncated: the header says shape [2, 2, 3]", "28 bytes in all, but there are 27"];
    assert_idx_error(&whole[..27], text);
    assert_idx_error(&gzip(&whole[..27]), text);
}

#[test]
fn idx_truncated_in_its_header() {
    assert_idx_error(&images()[..15], &["truncated: the header is 16 bytes, the file 15"]);
    assert_idx_error(&images()[..3], &["truncated: 3 byte(s) are too few for an IDX header"]);
    assert_idx_error(b"", &["truncated: 0 byte(s)"]);
    assert_idx_error(&gzip(b""), &["truncated: 0 byte(s)"]);
}

#[test]
fn idx_bytes_after_the_end() {
    let text = &["2 byte(s) after the end", "28 bytes in all, but there are 30"];
    assert_idx_error(&[images(), vec![0, 0]].concat(), text);
}

#[test]
fn idx_gzip_that_decompresses_to_too_much() {
    // 64 MiB of zeros in 300 kB, of which one byte more than needed is looked at.
    let bomb = gzip(&[images(), vec![0; 64 << 20]].concat());
    assert_idx_error(&bomb, &["decompresses to more than the 28 bytes that its header says"]);
}

#[test]
fn idx_gzip_header_that_claims_too_much() {
    let lie = gzip(&idx(8, &[u32::MAX, u32::MAX], &[1, 2, 3]));
    assert_idx_error(&lie, &["truncated", "18446744065119617037 bytes in all, but there are 15"]);
}

#[test]
fn idx_gzip_cut_short() {
    let whole = gzip(&images());
    for len in 2..whole.len() {
        assert_idx_error(&whole[..len], &["the gzip data is cut short", "download it again"]);
    }
}

#[test]
fn idx_gzip_with_a_wrong_checksum() {
    let mut bytes = gzip(&images());
    let crc = bytes.len() - 8;
    bytes[crc] ^= 1;
    assert_idx_error(&bytes, &["the gzip data is corrupt", "checksum", "download it again"]);
}

#[test]
fn idx_gzip_with_garbage_behind_it() {
    let bytes = [gzip(&images()), b"something else".to_vec()].concat();
    assert_idx_error(&bytes, &["the gzip data is corrupt"]);
}

#[test]
fn idx_labels_of_several_dimensions() {
    let folder = Folder::new();
    let (images, labels) = (folder.put("i", &images()), folder.put("l", &labels()));
    let text = &["has 3 dimensions, but labels have 1", "give the images first"];
    assert_error(Idx::open(&labels, Some(&images)), &images, text);
}

#[test]
fn counts_that_differ() {
    let folder = Folder::new();
    let images = folder.put("images", &images());
    let labels = folder.put("labels", &idx(8, &[3], &[1, 2, 3]));
    let text = &["holds 3 labels, but ", "images holds 2 samples", "don't belong together"];
    assert_error(Idx::open(&images, Some(&labels)), &labels, text);
    let images = folder.put("images.npy", &npy("|u1", false, "(2, 1)", &[1, 2]));
    let labels = folder.put("labels.npy", &npy("|u1", false, "(3,)", &[1, 2, 3]));
    let text = &["holds 3 labels, but ", "images.npy holds 2 samples"];
    assert_error(Npy::open(&images, Some(&labels)), &labels, text);
    assert_error(open(folder.spec()), &labels, text);
}

// ---- npy: valid files

#[test]
fn npy_elements_of_each_type_and_order_are_read() {
    macro_rules! case {
        ($kind:literal, $dtype:ident, $stored:expr, $expected:expr) => {{
            let (stored, expected) = ($stored, $expected);
            let expected: Vec<Vec<u8>> =
                expected.iter().map(|v| v.to_ne_bytes().to_vec()).collect();
            let shape = format!("({},)", stored.len());
            for (order, bytes) in [
                ("<", stored.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>()),
                (">", stored.iter().flat_map(|v| v.to_be_bytes()).collect()),
                ("=", stored.iter().flat_map(|v| v.to_ne_bytes()).collect()),
                ("", stored.iter().flat_map(|v| v.to_ne_bytes()).collect()),
            ] {
                let folder = Folder::new();
                let descr = format!("{order}{}", $kind);
                let path = folder.put("x.npy", &npy(&descr, false, &shape, &bytes));
                let dataset = Npy::open(&path, None).unwrap();
                assert_eq!(dataset.spec().input().dtype, DType::$dtype, "{descr}");
                let got: Vec<Vec<u8>> =
                    (0..dataset.len()).map(|index| read(&dataset, index).remove(0)).collect();
                assert_eq!(got, expected, "{descr}");
            }
        }};
    }
    case!("i1", I8, [-128i8, 127], [-128i8, 127]);
    case!("u1", U8, [0u8, 255], [0u8, 255]);
    case!("i2", I16, [-32768i16, 258], [-32768i16, 258]);
    case!("i4", I32, [i32::MIN, 66_051], [i32::MIN, 66_051]);
    case!("i8", I64, [i64::MIN, 1 << 40], [i64::MIN, 1 << 40]);
    case!("f2", F16, [half::f16::from_f32(1.5)], [half::f16::from_f32(1.5)]);
    case!("f4", F32, [-0.1f32, f32::MAX], [-0.1f32, f32::MAX]);
    case!("f8", F64, [-0.1f64, f64::MAX], [-0.1f64, f64::MAX]);
    case!("u2", I32, [258u16, u16::MAX], [258i32, 65_535]);
    case!("u4", I64, [66_051u32, u32::MAX], [66_051i64, 4_294_967_295]);
    case!("u8", I64, [1u64 << 40, u64::MAX / 2], [1i64 << 40, i64::MAX]);
}

/// From there a device can fetch samples by itself.
#[test]
fn samples_that_need_no_change_are_offered_as_they_lie() {
    let digits = open(DIGITS).unwrap();
    let file = std::fs::read(format!("{DIGITS}/digits-images-idx3-ubyte")).unwrap();
    assert_eq!(digits.contiguous(0), Some(&file[16..]));
    assert_eq!(digits.contiguous(1).map(<[u8]>::len), Some(1797));
    let folder = Folder::new();
    let offered = |bytes: &[u8]| {
        let path = folder.put("x.npy", bytes);
        Npy::open(&path, None).unwrap().contiguous(0).map(<[u8]>::to_vec)
    };
    let (native, other) = if cfg!(target_endian = "little") { ("<", ">") } else { (">", "<") };
    let data = [1, 2, 3, 4];
    for (descr, fortran, whole) in [
        (format!("{native}i2"), false, true),
        (format!("{other}i2"), false, false),
        (format!("{other}u1"), false, true),
        ("|b1".to_owned(), false, false),
        (format!("{native}i2"), true, false),
    ] {
        let len = data.len() / if descr.ends_with('2') { 2 } else { 1 };
        let bytes = npy(&descr, fortran, &format!("({len}, 1)"), &data);
        assert_eq!(offered(&bytes), whole.then(|| data.to_vec()), "{descr} {fortran}");
    }
    let path = folder.put("i", &idx(0x0b, &[2], &data));
    let swapped = cfg!(target_endian = "little");
    assert_eq!(Idx::open(&path, None).unwrap().contiguous(0).is_none(), swapped);
}

#[test]
fn npy_booleans_are_zero_or_one() {
    let folder = Folder::new();
    let path = folder.put("x.npy", &npy("|b1", false, "(1, 4)", &[0, 1, 2, 255]));
    let dataset = Npy::open(&path, None).unwrap();
    assert_eq!(dataset.spec().input().dtype, DType::Bool);
    assert_eq!(read(&dataset, 0), [[0, 1, 1, 1]]);
}

#[test]
fn npy_in_fortran_order_reads_the_same_as_in_c_order() {
    let (samples, rows, columns) = (2u16, 3, 4);
    let value = |i: u16, j: u16, k: u16| 1000 * i + 10 * j + k;
    for descr in ["<i2", ">i2", "<u2", ">u2"] {
        let bytes = |value: u16| match descr.starts_with('<') {
            true => value.to_le_bytes(),
            false => value.to_be_bytes(),
        };
        let (mut c, mut fortran) = (Vec::new(), Vec::new());
        for i in 0..samples {
            for j in 0..rows {
                (0..columns).for_each(|k| c.extend(bytes(value(i, j, k))));
            }
        }
        for k in 0..columns {
            for j in 0..rows {
                (0..samples).for_each(|i| fortran.extend(bytes(value(i, j, k))));
            }
        }
        let folder = Folder::new();
        let c = Npy::open(&folder.put("c", &npy(descr, false, "(2, 3, 4)", &c)), None).unwrap();
        let fortran = folder.put("f", &npy(descr, true, "(2, 3, 4)", &fortran));
        let fortran = Npy::open(&fortran, None).unwrap();
        for i in 0..2 {
            assert_eq!(read(&c, i), read(&fortran, i), "{descr} sample {i}");
        }
        let expected = value(1, 0, 2);
        let size = if descr.ends_with("i2") { 2 } else { 4 };
        let low = u16::from_le_bytes(read(&c, 1)[0][2 * size..][..2].try_into().unwrap());
        if cfg!(target_endian = "little") {
            assert_eq!(low, expected);
        }
    }
}

#[test]
fn npy_versions_one_to_three_are_read() {
    for version in 1..=3 {
        let folder = Folder::new();
        let header = npy_header("'|u1'", false, "(2, 2)");
        let path = folder.put("a", &npy_of(version, header.as_bytes(), &[1, 2, 3, 4]));
        assert_eq!(read(&Npy::open(&path, None).unwrap(), 1), [[3, 4]], "version {version}");
    }
}

#[test]
fn npy_labels_can_be_arrays() {
    let folder = Folder::new();
    folder.put("x.npy", &npy("<f4", false, "(2,)", &[0; 8]));
    folder.put("y.npy", &npy("|u1", false, "(2, 3)", &[1, 2, 3, 4, 5, 6]));
    for spec in [folder.spec(), folder.0.path().join("x.npy").to_str().unwrap()] {
        assert_eq!(read(&*open(spec).unwrap(), 1)[1], [4, 5, 6]);
    }
}

#[test]
fn an_npy_file_of_another_name_has_no_labels() {
    let folder = Folder::new();
    let path = folder.put("train.npy", &npy("|u1", false, "(2,)", &[1, 2]));
    folder.put("labels.npy", &npy("|u1", false, "(2,)", &[1, 2]));
    assert!(open(path.to_str().unwrap()).unwrap().spec().label_spec().is_none());
}

// ---- npy: bad files

#[test]
fn npy_wrong_magic() {
    assert_npy_error(b"something", &["no npy file: it starts with 73 6f 6d 65 74 68"]);
    assert_npy_error(b"PK\x03\x04 and so on", &["is a zip (npz) file", "numpy.save"]);
}

#[test]
fn npy_unknown_version() {
    let bytes = npy_of(4, npy_header("'|u1'", false, "(1,)").as_bytes(), &[0]);
    assert_npy_error(&bytes, &["npy version 4.0 is unknown: 1.0, 2.0 and 3.0"]);
}

#[test]
fn npy_truncated_before_its_header() {
    let whole = npy_of(2, npy_header("'|u1'", false, "(1,)").as_bytes(), &[0]);
    for len in 0..12 {
        assert_npy_error(&whole[..len], &["truncated", &format!("the file at {len}")]);
    }
}

#[test]
fn npy_header_beyond_the_file() {
    let mut bytes = npy("|u1", false, "(1,)", &[0]);
    bytes[8..10].copy_from_slice(&[0xff, 0xff]);
    assert_npy_error(&bytes, &["truncated: the header ends at byte 65545, the file at"]);
    let mut bytes = npy_of(3, npy_header("'|u1'", false, "(1,)").as_bytes(), &[0]);
    bytes[8..12].copy_from_slice(&[0xff; 4]);
    assert_npy_error(&bytes, &["truncated: the header ends at byte 4294967307"]);
}

#[test]
fn npy_header_length_that_lies() {
    let header = npy_header("'|u1'", false, "(3,)");
    // Too short: cuts the header off; too long: takes data for header.
    let mut short = npy_of(1, header.as_bytes(), &[1, 2, 3]);
    short[8] = 20;
    assert_npy_error(&short, &["malformed npy header", "has no end"]);
    let mut long = npy_of(1, header.as_bytes(), b"abc");
    long[8] += 2;
    assert_npy_error(&long, &["nothing but spaces after the closing brace", "\"ab\""]);
}

#[test]
fn npy_header_that_is_not_ascii() {
    assert_header_error("{'d\u{e9}scr': 1}", "byte 3 is 0xc3, which is not ASCII");
}

#[test]
fn npy_header_with_a_string_without_end() {
    assert_header_error("{'descr': '|u1, }", "the string that starts at byte 10 has no end");
}

#[test]
fn npy_header_without_a_key() {
    let cases = [
        ("{'fortran_order': False, 'shape': (1,)}", "the key 'descr' is missing"),
        ("{'descr': '|u1', 'shape': (1,)}", "the key 'fortran_order' is missing"),
        ("{'descr': '|u1', 'fortran_order': False}", "the key 'shape' is missing"),
        ("{}", "is missing"),
    ];
    cases.iter().for_each(|(header, text)| assert_header_error(header, text));
}

#[test]
fn npy_header_with_a_key_twice() {
    let header = "{'descr': '|u1', 'descr': '|u1', 'fortran_order': False, 'shape': (1,)}";
    assert_header_error(header, "the key \"descr\" comes twice, again at byte 17");
}

#[test]
fn npy_header_with_another_key() {
    let header = "{'descr': '|u1', 'fortran_order': False, 'shape': (1,), 'evil': 1}";
    assert_header_error(header, "unknown key \"evil\"");
}

#[test]
fn npy_header_that_is_code() {
    assert_header_error("__import__('os').system('true')", "'{' should be at byte 0");
    assert_header_error("{'descr': str(1)}", "a string should be at byte 10, found \"str(1)}\"");
}

#[test]
fn npy_header_with_a_negative_extent() {
    let header = npy_header("'|u1'", false, "(-3, 1)");
    assert_header_error(&header, "a negative extent in the shape");
}

#[test]
fn npy_header_with_an_extent_beyond_64_bits() {
    let header = npy_header("'|u1'", false, "(18446744073709551616,)");
    assert_header_error(&header, "\"18446744073709551616\" at byte");
}

#[test]
fn npy_shape_that_overflows() {
    let bytes = npy("<f8", false, "(4294967296, 4294967296)", &[0; 8]);
    assert_npy_error(&bytes, &["header is corrupt: the size of its shape", "overflows"]);
    let bytes = npy("<f8", false, "(2305843009213693952,)", &[0; 8]);
    assert_npy_error(&bytes, &["overflows"]);
    let bytes = npy("|u1", false, "(18446744073709551615,)", &[0; 8]);
    assert_npy_error(&bytes, &["overflows"]);
}

#[test]
fn npy_without_dimensions() {
    assert_npy_error(&npy("<f4", false, "()", &[0; 4]), &["has 0 dimensions"]);
}

#[test]
fn npy_without_elements() {
    let bytes = npy("<f4", false, "(1000000000000, 0)", &[]);
    assert_npy_error(&bytes, &["has the shape [1000000000000, 0]: it holds no elements"]);
}

#[test]
fn npy_too_many_dimensions() {
    let bytes = npy("|u1", false, "(1, 1, 1, 1, 1, 1, 1, 1, 1)", &[0]);
    assert_npy_error(&bytes, &["has 9 dimensions, at most 8 are supported"]);
}

#[test]
fn npy_data_shorter_than_the_header_says() {
    let bytes = npy("<f4", false, "(3, 2)", &[0; 23]);
    assert_npy_error(&bytes, &["truncated: the header says shape [3, 2] with 4 byte(s) per"]);
}

#[test]
fn npy_data_longer_than_the_header_says() {
    assert_npy_error(&npy("<f4", false, "(3, 2)", &[0; 25]), &["1 byte(s) after the end"]);
}

#[test]
fn npy_types_that_are_refused() {
    for (descr, what, remedy) in [
        ("<c8", "complex numbers", "a.view('f4')"),
        ("<c16", "complex numbers", "a.view('f8')"),
        ("<f16", "a float that few machines have", "a.astype('f8')"),
        ("|S5", "strings", "numpy.unique"),
        ("<U5", "strings", "numpy.unique"),
        ("<M8[ns]", "dates", "a.view('i8')"),
        ("<m8[s]", "time spans", "a.view('i8')"),
        ("|V2", "raw bytes", "a.astype('f4')"),
        ("<x4", "nothing that is known here", "a.astype('f4')"),
        ("", "nothing that is known here", "a.astype('f4')"),
    ] {
        let bytes = npy(descr, false, "(1,)", &[0; 16]);
        assert_npy_error(&bytes, &[&format!("dtype {descr:?} is {what}"), remedy]);
    }
}

#[test]
fn npy_structures_are_refused() {
    for descr in ["[('a', '<f4'), ('b', '|u1')]", "('<f4', (2,))"] {
        let bytes = npy_of(1, npy_header(descr, false, "(1,)").as_bytes(), &[0; 8]);
        assert_npy_error(&bytes, &["holds structures: save each field as an array by itself"]);
    }
}

#[test]
fn npy_objects_are_refused() {
    let bytes = npy("|O", false, "(1,)", b"\x80\x04K\x01.");
    assert_npy_error(&bytes, &["pickled objects are refused: they can run code"]);
}

#[test]
fn npy_number_beyond_i64_is_an_error_of_its_sample() {
    let folder = Folder::new();
    for order in ["<", ">"] {
        let data = [1u64, u64::MAX].map(|v| match order {
            "<" => v.to_le_bytes(),
            _ => v.to_be_bytes(),
        });
        let path = folder.put("x.npy", &npy(&format!("{order}u8"), false, "(2,)", &data.concat()));
        let dataset = Npy::open(&path, None).unwrap();
        assert_eq!(read(&dataset, 0), [1i64.to_ne_bytes()]);
        let mut buffer = SampleBuffer::new(dataset.spec()).unwrap();
        let err = buffer.fill(|sample| dataset.read(1, sample)).unwrap_err().to_string();
        assert!(err.contains("sample 1 holds 18446744073709551615, more than i64 can"), "{err}");
        assert!(err.contains(".astype('f8')"), "{err}");
    }
}

// ---- Raw

#[test]
fn raw_elements_of_each_type_are_read_as_they_lie() {
    let folder = Folder::new();
    for dtype in DType::ALL {
        // A header of five bytes, then two rows of three; true is any byte but 0.
        let row = 3 * dtype.size();
        let bytes: Vec<u8> = (0..5 + 2 * u8::try_from(row).unwrap()).map(|n| n % 4).collect();
        let path = folder.put("rows", &bytes);
        let raw = Raw::open_at(&path, 5, dtype, &[3]).unwrap();
        assert_eq!(raw.len(), 2);
        assert_eq!(raw.spec().input().to_string(), format!("input: {dtype} [3]"));
        let mut expected = bytes[5..].to_vec();
        if dtype == DType::Bool {
            assert!(expected.contains(&0));
            expected.iter_mut().for_each(|byte| *byte = u8::from(*byte != 0));
        }
        for index in 0..2 {
            let place = usize::try_from(index).unwrap() * row;
            assert_eq!(read(&raw, index), [&expected[place..][..row]], "{dtype}");
        }
        let lies_ready = (dtype != DType::Bool).then_some(&expected[..]);
        assert_eq!(raw.contiguous(0), lies_ready, "{dtype}");
        assert_eq!(raw.contiguous(1), None);
    }
}

#[test]
fn raw_files_are_opened_by_name() {
    let folder = Folder::new();
    let images = folder.put("a,b,offset=9", &images());
    let labels = folder.put("labels", &[70u16.to_ne_bytes(), 80u16.to_ne_bytes()].concat());
    let (images, labels) = (images.display(), labels.display());
    for options in
        [format!("offset=16,labels={labels}:i16"), format!("labels={labels}:i16 , offset=16")]
    {
        let dataset = open(&format!("raw:{images},2x3, u8,{options}")).unwrap();
        assert_eq!(dataset.len(), 2);
        assert_eq!(dataset.spec().input().to_string(), "input: u8 [2, 3]");
        assert_eq!(dataset.spec().label_spec().unwrap().to_string(), "label: i16 []");
        assert_eq!(read(&*dataset, 1), [&[7, 8, 9, 10, 11, 12][..], &80i16.to_ne_bytes()]);
        assert_eq!(dataset.contiguous(0), Some(&[1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12][..]));
    }
    let scalars = open(&format!("raw:{labels},1,i16")).unwrap();
    assert_eq!(scalars.spec().input().to_string(), "input: i16 []");
    assert_eq!(read(&*scalars, 0), [70i16.to_ne_bytes()]);
    assert!(scalars.spec().label_spec().is_none());
}

#[test]
fn raw_names_that_are_wrong() {
    for (spec, text) in [
        ("raw:", "the path, the shape or the type is missing"),
        ("raw:a,u8", "the path, the shape or the type is missing"),
        ("raw:offset=3,labels=b:u8", "the path, the shape or the type is missing"),
        ("raw:a,2x,u8", "the extent \"\": "),
        ("raw:a,2,u9", "unknown dtype \"u9\": use f32"),
        ("raw:a,2x0,u8", "[2, 0] holds no elements"),
        ("raw:a,1x1x1x1x1x1x1x1,u8", "9 dimensions at most, expected 8"),
        ("raw:a,4294967296x4294967296,u8", "overflows 64 bits"),
        ("raw:a,4294967296x2147483648,f32", "overflows 64 bits"),
        ("raw:a,2,u8,offset=-1", "the offset \"-1\": invalid digit"),
        ("raw:a,2,u8,offset=99999999999999999999", "number too large"),
        ("raw:a,2,u8,offset=1,offset=2", "there are two offsets"),
        ("raw:a,2,u8,labels=b", "the labels \"b\" have no :DTYPE"),
        ("raw:a,2,u8,labels=b:", "unknown dtype \"\""),
        ("raw:a,2,u8,labels=b:u8,labels=c:u8", "there are two files of labels"),
        ("raw:\u{1b}[2J,2,u9", "raw:\\u{1b}[2J,2,u9"),
    ] {
        let err = open(spec).map(drop).unwrap_err();
        assert!(matches!(err, Error::Config { setting: "dataset", .. }), "{err:?}");
        let err = error_of::<()>(Err(err));
        assert!(err.contains(text), "{err}");
        assert!(err.contains("write raw:PATH,SHAPE,DTYPE[,offset=BYTES]"), "{err}");
    }
}

#[test]
fn raw_files_that_are_no_whole_rows() {
    let folder = Folder::new();
    let open = |path: &Path, offset| Raw::open_at(path, offset, DType::I16, &[3]);
    let path = folder.put("rows", &[0; 18]);
    let cut = "truncated, or of other rows: 17 bytes from byte 1 on are 2 rows of 6 bytes \
               (i16 [3]) and 5 more";
    assert_error(open(&path, 1), &path, &[cut, "copy the file again"]);
    assert_eq!(open(&path, 12).unwrap().len(), 1);
    assert_error(open(&path, 17), &path, &["1 bytes from byte 17 on are 0 rows"]);
    for offset in [18, 19, u64::MAX] {
        let text = format!("is 18 bytes, so no row starts at byte {offset}");
        assert_error(open(&path, offset), &path, &[&text]);
    }
    let empty = folder.put("empty", &[]);
    for offset in [0, 7] {
        assert_error(open(&empty, offset), &empty, &["is empty: there are no rows in it"]);
    }
    let text = &["is a folder: name a file in it"];
    assert_error(open(folder.0.path(), 0), folder.0.path(), text);
    let missing = folder.0.path().join("missing");
    let err = open(&missing, 0).unwrap_err();
    assert!(matches!(&err, Error::Io { path, .. } if *path == missing), "{err:?}");
}

#[test]
fn raw_labels_that_do_not_belong_to_the_inputs() {
    let folder = Folder::new();
    let inputs = folder.put("inputs", &[0; 12]);
    let labels = folder.put("labels", &[0; 3]);
    let open = |dtype| Raw::open(&inputs, DType::U8, &[4]).unwrap().labels(&labels, dtype, &[]);
    assert_eq!(open(DType::U8).unwrap().len(), 3);
    assert_error(
        open(DType::I8).unwrap().labels(&inputs, DType::F32, &[3]),
        &inputs,
        &["holds 1 labels, but", "holds 3 samples: these files don't belong together"],
    );
    assert_error(open(DType::I16), &labels, &["truncated, or of other rows"]);
    let missing = folder.0.path().join("missing");
    let err = Raw::open(&inputs, DType::U8, &[4]).unwrap().labels(&missing, DType::U8, &[]);
    assert!(matches!(err.unwrap_err(), Error::Io { path, .. } if path == missing));
}

/// A file of more bytes than 32 bits count, which takes no room on the disk.
#[test]
#[cfg(target_pointer_width = "64")]
fn raw_files_can_be_large() {
    use std::io::{Seek, SeekFrom};
    let folder = Folder::new();
    let path = folder.put("large", &[]);
    let mut file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len((5 << 30) + 6).unwrap();
    file.seek(SeekFrom::Start(5 << 30)).unwrap();
    file.write_all(&[1, 2, 3, 4, 5, 6]).unwrap();
    let raw = Raw::open_at(&path, (1 << 32) + 2, DType::U8, &[4]).unwrap();
    assert_eq!(raw.len(), (1 << 28) + 1);
    assert_eq!(read(&raw, 0), [[0; 4]]);
    assert_eq!(read(&raw, 1 << 28), [[3, 4, 5, 6]]);
}

// ---- Samples and windows that do not fit

#[test]
fn an_index_behind_the_end_is_an_error() {
    let folder = Folder::new();
    let path = folder.put("x.npy", &npy("|u1", false, "(2,)", &[1, 2]));
    let npy = Npy::open(&path, None).unwrap();
    let raw =
        Raw::open_at(&path, std::fs::metadata(&path).unwrap().len() - 2, DType::U8, &[]).unwrap();
    let synthetic = Synthetic::new(2, &[1], DType::U8).unwrap();
    for dataset in [&npy as &dyn Dataset, &raw, &synthetic] {
        for index in [2, u64::MAX] {
            let mut buffer = SampleBuffer::new(dataset.spec()).unwrap();
            let err = buffer.fill(|sample| dataset.read(index, sample)).unwrap_err().to_string();
            assert!(err.contains(&format!("no sample {index}, there are 2")), "{err}");
        }
    }
}

#[test]
fn the_window_of_another_data_set_is_an_error() {
    let folder = Folder::new();
    let path = folder.put("x.npy", &npy("|u1", false, "(2,)", &[1, 2]));
    let unlabelled = Npy::open(&path, None).unwrap();
    let labelled = Npy::open(&path, Some(&path)).unwrap();
    let synthetic = Synthetic::new(2, &[1], DType::U8).unwrap();
    let mut buffer = SampleBuffer::new(unlabelled.spec()).unwrap();
    assert!(buffer.fill(|sample| labelled.read(0, sample)).is_err());
    assert!(buffer.fill(|sample| synthetic.read(0, sample)).is_err());
}

// ---- Folders

#[test]
fn a_folder_without_a_data_set() {
    let folder = Folder::new();
    let names = [
        "*-images-idx3-ubyte",
        "*-labels-idx1-ubyte",
        "images.npy",
        "labels.npy",
        "x.npy",
        "y.npy",
    ];
    assert_error(open(folder.spec()), folder.0.path(), &["no data set in this folder"]);
    assert_error(open(folder.spec()), folder.0.path(), &names);
    folder.put("y.npy", b"");
    let text = &["(y.npy is there, but not its inputs)"];
    assert_error(open(folder.spec()), folder.0.path(), text);
}

#[test]
fn a_folder_with_two_data_sets() {
    let folder = Folder::new();
    for name in ["train", "t10k"] {
        folder.put(&format!("{name}-images-idx3-ubyte"), &images());
        folder.put(&format!("{name}-labels-idx1-ubyte.gz"), &gzip(&labels()));
    }
    let path = folder.0.path().join("t10k-images-idx3-ubyte");
    let text = [
        "2 data sets in this folder (t10k-images-idx3-ubyte, train-images-idx3-ubyte)",
        &format!("name the images file instead, such as {}", path.display()),
    ];
    assert_error(open(folder.spec()), folder.0.path(), &text);
    assert_eq!(read(&*open(path.to_str().unwrap()).unwrap(), 1)[1], [80]);
    let folder = Folder::new();
    folder.put("images.npy", b"");
    folder.put("x.npy", b"");
    folder.put("images-idx3-ubyte", b"");
    let text = &["3 data sets in this folder (images.npy, x.npy, images-idx3-ubyte)"];
    assert_error(open(folder.spec()), folder.0.path(), text);
}

#[test]
fn what_does_not_exist() {
    let folder = Folder::new();
    let path = folder.0.path().join("no-such-thing");
    #[cfg(unix)]
    {
        let text = &["cannot open: No such file or directory"];
        assert_error(open(path.to_str().unwrap()), &path, text);
        assert_error(Idx::open(&path, None), &path, text);
        assert_error(Npy::open(&path, None), &path, text);
    }
    let images = folder.put("images", &images());
    let err = Idx::open(&images, Some(&path)).unwrap_err();
    assert!(matches!(err, Error::Io { path: missing, .. } if missing == path));
}

#[test]
#[cfg(unix)]
fn what_may_not_be_read() {
    use std::os::unix::fs::PermissionsExt;
    let folder = Folder::new();
    let path = folder.put("x.npy", &npy("|u1", false, "(2,)", &[1, 2]));
    let permit = |path: &Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    permit(&path, 0);
    permit(folder.0.path(), 0o111);
    // To the superuser nothing is forbidden.
    if std::fs::File::open(&path).is_err() {
        assert_error(Npy::open(&path, None), &path, &["cannot open: Permission denied"]);
        let text = &["cannot list: Permission denied"];
        assert_error(open(folder.spec()), folder.0.path(), text);
    }
    permit(folder.0.path(), 0o700);
}

#[test]
fn a_file_that_is_no_data_set() {
    let folder = Folder::new();
    let path = folder.put("data.csv", b"1,2,3\n");
    assert_error(open(path.to_str().unwrap()), &path, &["neither an IDX file", "nor an npy file"]);
    let path = folder.put("a.npz", b"PK\x03\x04");
    assert_error(open(path.to_str().unwrap()), &path, &["is a zip (npz) file"]);
    let path = folder.put("images-idx3-ubyte", b"<html>");
    assert_error(open(path.to_str().unwrap()), &path, &["looks like a web page"]);
    assert_error(Idx::open(folder.0.path(), None), folder.0.path(), &["is a folder"]);
}

#[test]
#[cfg(unix)]
fn what_is_no_regular_file() {
    let text = &["is no regular file, so it can't be mapped"];
    assert_error(open("/dev/zero"), Path::new("/dev/zero"), text);
}

// ---- Synthetic

#[test]
fn synthetic_specs() {
    let dataset = open("synthetic:100000,3x224x224,u8").unwrap();
    assert_eq!(dataset.len(), 100_000);
    assert_eq!(dataset.spec().input().to_string(), "input: u8 [3, 224, 224]");
    let sample = read(&*dataset, 70_007);
    assert_eq!(sample[0][..4], [0x77, 0x11, 1, 0]);
    assert_eq!(sample[1], 7i64.to_ne_bytes());
    assert_eq!(read(&*dataset, 70_007), sample);
    let scalar = open("synthetic:5,1,f32").unwrap();
    assert_eq!(scalar.spec().input().to_string(), "input: f32 []");
    assert_eq!(read(&*scalar, 4)[0], (4.0f32 / 256.0).to_ne_bytes());
    assert!(open("synthetic:0,2x2,bf16").unwrap().is_empty());
}

#[test]
fn synthetic_specs_that_are_wrong() {
    for (spec, text) in [
        ("synthetic:", "1 part(s) instead of three"),
        ("synthetic:1,2", "2 part(s) instead of three"),
        ("synthetic:x,2,u8", "the number of samples \"x\": invalid digit"),
        ("synthetic:-1,2,u8", "the number of samples \"-1\""),
        ("synthetic:99999999999999999999,2,u8", "number too large"),
        ("synthetic:1,2x,u8", "the extent \"\""),
        ("synthetic:1,2*3,u8", "the extent \"2*3\""),
        ("synthetic:1,1x1x1x1x1x1x1x1x1,u8", "9 dimensions at most, expected 8"),
        ("synthetic:1,4294967296x4294967296,u8", "overflows 64 bits"),
        ("synthetic:1,\u{1b}[2J,u8", "the extent \"\\u{1b}[2J\""),
        ("synthetic:1,2,u9", "unknown dtype \"u9\": use f32"),
        ("", "dataset is an empty name: name a folder"),
    ] {
        let err = error_of(open(spec));
        assert!(err.contains(text), "{err}");
        assert!(err.contains("synthetic:SAMPLES,SHAPE,DTYPE"), "{err}");
    }
}

// ---- Fingerprints

#[test]
fn fingerprints_tell_contents_apart_and_not_paths() {
    let folder = Folder::new();
    let open = |images: &[u8], labels: Option<&[u8]>, name: &str| {
        let images = folder.put(&format!("{name}-i"), images);
        let labels = labels.map(|bytes| folder.put(&format!("{name}-l"), bytes));
        Idx::open(&images, labels.as_deref()).unwrap().fingerprint()
    };
    let base = open(&images(), Some(&labels()), "a");
    assert_eq!(open(&images(), Some(&labels()), "b"), base);
    assert_eq!(open(&gzip(&images()), Some(&gzip(&labels())), "c"), base);
    let mut others = vec![base, open(&images(), None, "d")];
    for (at, code) in [(16, 8), (27, 8), (27, 9)] {
        let mut bytes = images();
        bytes[at] ^= 0x40;
        bytes[2] = code;
        others.push(open(&bytes, Some(&labels()), "e"));
    }
    others.push(open(&images(), Some(&idx(8, &[2], &[70, 81])), "f"));
    let raw = folder.put("raw", &images());
    others.push(Raw::open(&raw, DType::U8, &[4]).unwrap().fingerprint());
    others.push(Raw::open(&raw, DType::U8, &[2, 2]).unwrap().fingerprint());
    others.push(Raw::open_at(&raw, 4, DType::U8, &[4]).unwrap().fingerprint());
    others.push(Synthetic::new(2, &[2, 3], DType::U8).unwrap().fingerprint());
    others.push(Synthetic::new(3, &[2, 3], DType::U8).unwrap().fingerprint());
    others.push(Synthetic::new(2, &[2, 3], DType::I8).unwrap().fingerprint());
    let different: std::collections::HashSet<u64> = others.iter().copied().collect();
    assert_eq!(different.len(), others.len());
}

// ---- Mutations

/// Opens each of the many files that one change makes of `whole`. Each ends in an error that is a
/// clear line, or in a data set whose samples can all be read or are errors.
fn mutate(whole: &[u8], open: impl Fn(&Path) -> Result<Box<dyn Dataset>>) {
    let folder = Folder::new();
    let (mut opened, mut refused) = (0u32, 0u32);
    let mut attempt = |bytes: &[u8]| {
        let path = folder.put("file", bytes);
        let dataset = match open(&path) {
            Ok(dataset) => dataset,
            Err(err) => {
                refused += 1;
                error_of::<()>(Err(err));
                return;
            }
        };
        opened += 1;
        assert!((1..=1000).contains(&dataset.len()));
        assert!(dataset.spec().bytes().unwrap() < 10_000);
        dataset.fingerprint();
        let mut buffer = SampleBuffer::new(dataset.spec()).unwrap();
        for index in 0..=dataset.len() {
            let result = buffer.fill(|sample| dataset.read(index, sample));
            assert!(result.is_err() || index < dataset.len());
        }
    };
    attempt(whole);
    for at in 0..whole.len() {
        attempt(&whole[..at]);
        let mut bytes = whole.to_vec();
        for byte in (0..8).map(|bit| whole[at] ^ (1 << bit)).chain([0, 0xff, b'\'', b'9', b'{']) {
            bytes[at] = byte;
            attempt(&bytes);
        }
        bytes.remove(at);
        attempt(&bytes);
        let mut bytes = whole.to_vec();
        bytes.insert(at, b'9');
        attempt(&bytes);
    }
    assert!(opened > 0 && refused > 0, "{opened} opened, {refused} refused");
}

#[test]
fn no_mutation_of_an_idx_file_panics() {
    mutate(&images(), |path| Ok(Box::new(Idx::open(path, None)?)));
    let folder = Folder::new();
    let images = folder.put("images", &images());
    mutate(&labels(), |path| Ok(Box::new(Idx::open(&images, Some(path))?)));
    mutate(&idx(0x0b, &[2, 3], &[9; 12]), |path| Ok(Box::new(Idx::open(path, None)?)));
}

#[test]
fn no_mutation_of_a_compressed_idx_file_panics() {
    mutate(&gzip(&images()), |path| Ok(Box::new(Idx::open(path, None)?)));
}

#[test]
fn no_mutation_of_an_npy_file_panics() {
    for (version, fortran) in [(1, false), (2, true), (3, false)] {
        let header = npy_header("'<u8'", fortran, "(3, 1)");
        let whole = npy_of(version, header.as_bytes(), &[0x55; 24]);
        mutate(&whole, |path| Ok(Box::new(Npy::open(path, None)?)));
    }
    let whole = npy("|u1", false, "(2,)", &[1, 2]);
    mutate(&whole, |path| open(path.to_str().unwrap()));
}
