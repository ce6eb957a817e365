//! What can't be done is said in one line on stderr, with the remedy; stdout stays empty.

use std::fs;

use super::*;

/// Runs the command, which must end with `status` and say `said`.
fn refused(status: i32, said: &str, arguments: &[&str]) {
    let answer = batchline(arguments);
    assert_eq!(answer.status, Some(status), "{arguments:?}: {answer:?}");
    assert_eq!(answer.stdout, "", "{arguments:?}");
    assert_eq!(answer.stderr.lines().count(), 1, "{arguments:?}: {answer:?}");
    assert!(answer.stderr.starts_with("batchline: "), "{arguments:?}: {answer:?}");
    assert!(answer.stderr.contains(said), "{said:?} is missing: {arguments:?}: {answer:?}");
}

/// As [`refused`], for a run of the digits on the host.
fn refused_run(status: i32, said: &str, arguments: &[&str]) {
    refused(status, said, &[&["run", DIGITS], arguments, &["--device", "host"]].concat());
}

#[test]
fn settings_that_make_no_sense() {
    for (said, arguments) in [
        ("batch_size is 0: ask for at least one sample", &["--batch-size", "0"][..]),
        ("workers is 0: use at least one thread", &["--workers", "0"]),
        ("prefetch_depth is 0", &["--prefetch-depth", "0"]),
        ("epochs is 0", &["--epochs", "0"]),
        ("world_size is 0", &["--world-size", "0"]),
        ("rank 2 is not below world_size 2", &["--rank", "2", "--world-size", "2"]),
        ("use a smaller batch size", &["--drop-last", "--batch-size", "2000"]),
        ("--normalize needs --convert", &["--normalize", "8/4"]),
        ("3 numbers, but inputs of shape [8, 8]", &["--convert", "f32", "--normalize", "1,2,3/4"]),
    ] {
        refused_run(2, said, arguments);
    }
    refused(2, "write synthetic:SAMPLES,SHAPE,DTYPE", &["run", "synthetic:3", "--device", "host"]);
    refused(2, "write raw:PATH,SHAPE,DTYPE", &["run", "raw:rows,3", "--device", "host"]);
    refused(2, "no samples", &["run", "synthetic:0,3,u8", "--device", "host"]);
}

#[test]
fn options_that_cannot_be_read() {
    for (said, arguments) in [
        ("'--batchsize'", &["--batchsize", "3"][..]),
        ("'--batch-size <SAMPLES>'", &["--batch-size", "many"]),
        ("'--batch-size <SAMPLES>'", &["--batch-size", "-1"]),
        ("f32, f16, bf16", &["--convert", "u8"]),
        ("there is no /", &["--convert", "f32", "--normalize", "8"]),
        ("no finite number", &["--convert", "f32", "--normalize", "8/x"]),
        ("divides by zero", &["--convert", "f32", "--normalize", "8/0"]),
        ("2 means for 3", &["--convert", "f32", "--normalize", "1,2/1,2,3"]),
        ("512MiB", &["--device-limit", "5 apples"]),
        ("--max-batches", &["--max-batches", "0"]),
        ("unexpected argument", &["another"]),
    ] {
        refused_run(2, said, arguments);
    }
    refused(2, "use auto, host, cuda, cuda:N or wgpu", &["run", DIGITS, "--device", "gpu"]);
    refused(2, "<DATASET>", &["run"]);
    refused(2, "unrecognized subcommand", &["fly"]);
    refused(2, "requires a subcommand", &[]);
    refused(2, "unexpected argument", &["devices", "--fast"]);
}

#[test]
fn devices_that_are_not_there() {
    // There is no such GPU, no driver, or no CUDA device in this build.
    refused(1, "no cuda", &["run", DIGITS, "--device", "cuda:97", "--json"]);
    #[cfg(not(feature = "cuda"))]
    refused(
        1,
        "no cuda device: this build has no CUDA device",
        &["run", DIGITS, "--device", "cuda"],
    );
    #[cfg(not(feature = "wgpu"))]
    refused(1, "no wgpu device: this build has no wgpu", &["run", DIGITS, "--device", "wgpu"]);
}

/// Where the Vulkan loader is told of no driver, as on a machine without one.
#[cfg(all(feature = "wgpu", target_os = "linux"))]
#[test]
fn no_adapter() {
    let output = command(&["run", DIGITS, "--device", "wgpu"])
        .env("VK_DRIVER_FILES", "/nonexistent")
        .env("VK_ICD_FILENAMES", "/nonexistent")
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.starts_with("batchline: no wgpu device: "), "{said}");
    assert!(said.contains("; install "), "the remedy is missing: {said}");
    assert_eq!(said.lines().count(), 1, "{said}");
    assert!(output.stdout.is_empty());
}

#[test]
fn data_that_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |said: &str, data: &Path| {
        refused(1, said, &["run", text(data), "--device", "host", "--json"]);
    };
    refused("missing: cannot open", &folder.path().join("missing"));
    refused("no data set in this folder", folder.path());
    let raw = format!("raw:{DIGITS}/digits-images-idx3-ubyte,8x8,u8");
    refused("1797 rows of 64 bytes (u8 [8, 8]) and 16 more", Path::new(&raw));

    let images = fs::read(Path::new(DIGITS).join("digits-images-idx3-ubyte")).unwrap();
    let cut = folder.path().join("digits-images-idx3-ubyte");
    fs::write(&cut, &images[..1000]).unwrap();
    refused("digits-images-idx3-ubyte: ", &cut);
    refused("digits-images-idx3-ubyte: ", folder.path());
    fs::write(&cut, &images[..3]).unwrap();
    refused("digits-images-idx3-ubyte: ", &cut);
    fs::write(&cut, "not a data set").unwrap();
    refused("digits-images-idx3-ubyte: ", &cut);
}

#[test]
fn states_that_cannot_be_continued() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    let state = ["--state", text(&file)];
    let first = ["run", "synthetic:100,3,u8", "--device", "host"];
    assert_eq!(batchline(&[&first, &state[..]].concat()).status, Some(0));
    refused_run(1, "another data set", &state);

    fs::remove_file(&file).unwrap();
    run_digits(&[&state[..], &["--max-batches", "3"]].concat());
    let saved = fs::read_to_string(&file).unwrap();
    refused_run(1, "another order", &[&state[..], &["--shuffle"]].concat());
    refused_run(1, "keep the product the same", &[&state[..], &["--batch-size", "32"]].concat());
    // Who was refused finds the state as it was.
    assert_eq!(fs::read_to_string(&file).unwrap(), saved);

    fs::write(&file, &saved[..saved.len() / 2]).unwrap();
    refused_run(1, "cut short", &state);
    fs::write(&file, saved.replace("\"position\": 3", "\"position\": 4")).unwrap();
    refused_run(1, "checksum does not match", &state);
    fs::write(&file, "").unwrap();
    refused_run(1, "the saved state cannot be used", &state);
    refused_run(1, "cannot read the state", &["--state", text(folder.path())]);
    let nowhere = folder.path().join("missing").join("state.json");
    refused_run(1, "cannot write the state", &["--state", text(&nowhere)]);
}

#[test]
fn memory_that_does_not_suffice() {
    refused_run(1, "raise the limit or ask for less", &["--device-limit", "1KiB"]);
}
