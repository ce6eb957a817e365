//! The command as its users see it: what it prints, and how it ends.

#[cfg(all(feature = "cuda", target_os = "linux"))]
mod cuda;
mod devices;
mod refusals;
mod resume;
mod run;

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use sha2::{Digest, Sha256};

/// The digits that lie in the repository: 1797 images of 8×8 with their labels.
const DIGITS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../data/digits");
const SAMPLES: usize = 1797;
const PIXELS: usize = 64;

/// How the command ended, and what it said.
#[derive(Debug)]
struct Answer {
    status: Option<i32>,
    stdout: String,
    stderr: String,
}

/// Runs the command.
fn batchline(arguments: &[&str]) -> Answer {
    answer(command(arguments))
}

fn answer(mut command: Command) -> Answer {
    let output = command.output().expect("the command starts");
    Answer {
        status: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}

fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_batchline"));
    command.args(arguments);
    command
}

/// Runs `batchline run` on the digits, on the host unless told otherwise, and returns its JSON.
fn run_digits(arguments: &[&str]) -> Value {
    let mut all = vec!["run", DIGITS, "--json", "--checksum"];
    if !arguments.contains(&"--device") {
        all.extend(["--device", "host"]);
    }
    all.extend(arguments);
    let answer = batchline(&all);
    assert_eq!(answer.status, Some(0), "{arguments:?}: {}", answer.stderr);
    serde_json::from_str(&answer.stdout).expect("one JSON object on stdout")
}

/// The digits' pixels and labels, read without the library.
fn digits() -> (Vec<u8>, Vec<u8>) {
    let read = |name: &str, header: usize| {
        let mut bytes = std::fs::read(Path::new(DIGITS).join(name)).expect("the digits are there");
        bytes.drain(..header);
        bytes
    };
    let (pixels, labels) =
        (read("digits-images-idx3-ubyte", 16), read("digits-labels-idx1-ubyte", 8));
    assert_eq!((pixels.len(), labels.len()), (SAMPLES * PIXELS, SAMPLES));
    (pixels, labels)
}

/// The checksum of batches that are made of these samples.
fn checksum_of(batches: impl IntoIterator<Item = std::ops::Range<usize>>) -> String {
    checksum_of_converted(batches, |pixel| vec![pixel])
}

/// As [`checksum_of`], for pixels that were made into others.
fn checksum_of_converted(
    batches: impl IntoIterator<Item = std::ops::Range<usize>>,
    convert: impl Fn(u8) -> Vec<u8>,
) -> String {
    let (pixels, labels) = digits();
    let mut hash = Sha256::new();
    for batch in batches {
        let pixels = &pixels[batch.start * PIXELS..batch.end * PIXELS];
        hash.update(pixels.iter().flat_map(|pixel| convert(*pixel)).collect::<Vec<u8>>());
        hash.update(&labels[batch]);
    }
    format!("{:x}", hash.finalize())
}

/// The samples of all batches, in order.
fn batches_of(size: usize) -> Vec<std::ops::Range<usize>> {
    (0..SAMPLES).step_by(size).map(|start| start..SAMPLES.min(start + size)).collect()
}

/// A path as an argument.
fn text(path: &Path) -> &str {
    path.to_str().expect("a Unicode path")
}
