//! `batchline run`: every sample arrives, whatever the settings, and is accounted for.

use std::process::Stdio;

use super::*;

#[test]
fn the_digits_arrive_as_they_lie_in_the_files() {
    for (workers, depth) in [("1", "1"), ("1", "5"), ("4", "1"), ("4", "5")] {
        let result = run_digits(&["--workers", workers, "--prefetch-depth", depth]);
        assert_eq!(result["samples"], 1797);
        assert_eq!(result["batches"], 29);
        assert_eq!(result["bytes"], 1797 * 65);
        assert_eq!(result["skipped"], 0);
        assert_eq!(result["complete"], true);
        assert_eq!(result["checksum"], checksum_of(batches_of(64)), "{workers} {depth}");
    }
    let result = run_digits(&["--batch-size", "100"]);
    assert_eq!(result["batches"], 18);
    assert_eq!(result["checksum"], checksum_of(batches_of(100)));
}

#[test]
fn rows_without_a_header_arrive_as_those_of_the_files_with_one() {
    let folder = tempfile::tempdir().unwrap();
    let labels = folder.path().join("labels");
    std::fs::write(&labels, digits().1).unwrap();
    let name = format!(
        "raw:{DIGITS}/digits-images-idx3-ubyte,8x8,u8,offset=16,labels={}:u8",
        labels.display()
    );
    let answer = batchline(&["run", &name, "--device", "host", "--json", "--checksum"]);
    assert_eq!(answer.status, Some(0), "{}", answer.stderr);
    let result: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(result["checksum"], checksum_of(batches_of(64)));
}

#[test]
fn an_order_depends_on_the_seed_alone() {
    let order = |arguments: &[&str]| run_digits(arguments)["checksum"].clone();
    let shuffled = order(&["--shuffle", "--workers", "1"]);
    assert_eq!(shuffled, order(&["--shuffle", "--workers", "4", "--prefetch-depth", "7"]));
    assert_ne!(shuffled, order(&["--shuffle", "--seed", "1"]));
    assert_ne!(shuffled, order(&[]));
}

#[test]
fn json_has_all_keys_and_nothing_else_is_said() {
    let answer = batchline(&["run", DIGITS, "--device", "host", "--json", "--epochs", "2"]);
    assert_eq!((answer.status, &*answer.stderr), (Some(0), ""));
    let result: Value = serde_json::from_str(&answer.stdout).unwrap();
    for key in [
        "dataset",
        "device",
        "path",
        "path_reason",
        "bytes_transferred",
        "link_bytes_per_second",
        "cpu_seconds",
        "batch_size",
        "workers",
        "epochs",
        "batches",
        "samples",
        "bytes",
        "seconds",
        "samples_per_second",
        "bytes_per_second",
        "time_to_first_batch_ms",
        "skipped",
        "skipped_samples",
        "stages",
        "bottleneck",
        "verdict",
    ] {
        assert!(!result[key].is_null(), "{key} is missing in {}", answer.stdout);
    }
    assert_eq!(result.get("checksum"), None);
    assert_eq!(result["dataset"], DIGITS);
    assert_eq!((&result["device"], &result["path"]), (&"host".into(), &"staged".into()));
    for stage in ["workers", "submitter", "consumer"] {
        for doing in ["working", "waiting_for_input", "waiting_for_room"] {
            assert!(result["stages"][stage][format!("{doing}_seconds")].is_f64());
        }
    }
    let (samples, seconds) =
        (result["samples"].as_f64().unwrap(), result["seconds"].as_f64().unwrap());
    let rate = result["samples_per_second"].as_f64().unwrap();
    assert!((rate * seconds / samples - 1.0).abs() < 1e-6);
}

#[test]
fn people_get_a_summary_and_a_line_per_epoch() {
    let answer = batchline(&["run", DIGITS, "--device", "host", "--epochs", "2", "--checksum"]);
    assert_eq!(answer.status, Some(0));
    for said in [
        "1,797 samples of input u8 [8, 8], label u8 []",
        "58 batches of up to 64, 3,594 samples, 228 KiB\n",
        "path         staged: the device's memory is the host's\n",
        "first batch after",
        "samples/s",
        " of the workers, ",
        "waiting for room",
        "verdict ",
        "checksum ",
    ] {
        assert!(answer.stdout.contains(said), "{said:?} is missing in {}", answer.stdout);
    }
    let epochs: Vec<&str> = answer.stderr.lines().map(|line| &line[..15]).collect();
    assert_eq!(epochs, ["epoch 1 of 2: 2", "epoch 2 of 2: 2"]);
}

#[test]
fn epochs_and_the_last_batch_are_counted() {
    let result = run_digits(&["--epochs", "3"]);
    assert_eq!((&result["samples"], &result["batches"]), (&(3 * 1797).into(), &87.into()));
    let three = (0..3).flat_map(|_| batches_of(64));
    assert_eq!(result["checksum"], checksum_of(three));

    let result = run_digits(&["--drop-last"]);
    assert_eq!((&result["samples"], &result["batches"]), (&(28 * 64).into(), &28.into()));
    assert_eq!(result["checksum"], checksum_of(batches_of(64).into_iter().take(28)));
}

/// Each global batch of 64 is dealt out to two ranks; the last one has 5 samples.
#[test]
fn ranks_together_get_everything_once() {
    for rank in 0..2 {
        let result =
            run_digits(&["--batch-size", "32", "--world-size", "2", "--rank", &rank.to_string()]);
        let part = batches_of(64).into_iter().map(|global| match (global.len(), rank) {
            (64, _) => global.start + 32 * rank..global.start + 32 * (rank + 1),
            (_, 0) => global.start..global.start + 3,
            (_, _) => global.start + 3..global.end,
        });
        assert_eq!(result["batches"], 29);
        assert_eq!(result["samples"], 28 * 32 + 3 - rank);
        assert_eq!(result["checksum"], checksum_of(part));
    }
}

#[test]
fn inputs_are_converted() {
    let result = run_digits(&["--convert", "f32"]);
    assert_eq!(result["bytes"], 1797 * (4 * 64 + 1));
    let floats = |pixel| f32::from(pixel).to_ne_bytes().to_vec();
    assert_eq!(result["checksum"], checksum_of_converted(batches_of(64), floats));

    // All of these numbers are exact in f32.
    let result = run_digits(&["--convert", "f32", "--normalize", "8/4", "--workers", "3"]);
    let normalized = |pixel| ((f32::from(pixel) - 8.0) / 4.0).to_ne_bytes().to_vec();
    let expected = checksum_of_converted(batches_of(64), normalized);
    assert_eq!(result["checksum"], expected);
    // One number per channel, the last dimension.
    let result = run_digits(&["--convert", "f32", "--normalize", "8,8,8,8,8,8,8,8/4"]);
    assert_eq!(result["checksum"], expected);

    for half in ["f16", "bf16"] {
        let result = run_digits(&["--convert", half, "--normalize", "-1/2"]);
        assert_eq!(result["bytes"], 1797 * (2 * 64 + 1));
    }
}

#[test]
fn limits_of_memory_change_nothing_but_the_memory() {
    let result = run_digits(&["--device-limit", "8KiB", "--staging-limit", "1MiB"]);
    assert_eq!(result["checksum"], checksum_of(batches_of(64)));
}

#[test]
fn synthetic_data_need_no_files() {
    let data = "synthetic:1000,3x4x4,f32";
    let answer = batchline(&["run", data, "--device", "host", "--json"]);
    let result: Value = serde_json::from_str(&answer.stdout).unwrap();
    assert_eq!(
        (&result["samples"], &result["bytes"]),
        (&1000.into(), &(1000 * (48 * 4 + 8)).into())
    );
}

#[test]
fn a_reader_who_leaves_is_no_failure() {
    let mut child = command(&["run", DIGITS, "--device", "host"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{stderr}");
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
}

#[test]
fn help_and_version_are_answers() {
    for arguments in [&["--help"][..], &["run", "--help"], &["devices", "-h"], &["--version"]] {
        let answer = batchline(arguments);
        assert_eq!((answer.status, &*answer.stderr), (Some(0), ""));
        assert!(answer.stdout.ends_with('\n') && answer.stdout.contains("batchline"));
    }
}
