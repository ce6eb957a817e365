//! Compressed IDX files: accepted exactly where the whole stream is sound and holds a good IDX
//! file. What is no gzip file is compressed first, so that the checksum hides nothing.
#![no_main]

use std::io::{Read, Write};

use batchline::Dataset;
use batchline_fuzz::{Idx, check_idx, file};
use flate2::Compression;
use flate2::bufread::MultiGzDecoder;
use flate2::write::GzEncoder;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if bytes.starts_with(&[0x1f, 0x8b]) {
        // A short file decompresses to a thousand times as much at most.
        let mut plain = Vec::new();
        let sound = MultiGzDecoder::new(bytes).read_to_end(&mut plain).is_ok();
        let expected = sound.then(|| Idx::parse(&plain)).flatten();
        check_idx(&file("images.gz", bytes), expected.as_ref());
        return;
    }
    let expected = Idx::parse(bytes);
    // In one member or two.
    let middle = if bytes.len().is_multiple_of(2) { bytes.len() / 2 } else { bytes.len() };
    let mut compressed = member(&bytes[..middle]);
    if middle < bytes.len() {
        compressed.extend(member(&bytes[middle..]));
    }
    let path = file("images.gz", &compressed);
    check_idx(&path, expected.as_ref());
    if expected.is_some() {
        let fingerprint =
            |path| batchline::formats::Idx::open(path, None).map(|idx| idx.fingerprint());
        let plain = file("images", bytes);
        assert_eq!(fingerprint(&path).ok(), fingerprint(&plain).ok());
    }
});

fn member(bytes: &[u8]) -> Vec<u8> {
    let mut stream = GzEncoder::new(Vec::new(), Compression::fast());
    stream.write_all(bytes).and_then(|()| stream.finish()).expect("memory can be written")
}
