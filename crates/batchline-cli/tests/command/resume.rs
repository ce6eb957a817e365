//! `--state` and `--max-batches`: a run in parts is the run in one go.

use batchline::{LoaderState, Skipped};

use super::*;

#[test]
fn parts_cover_everything_once() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    let part = |arguments: &[&str]| {
        let state = ["--state", text(&file)];
        run_digits(&[&state, arguments].concat())
    };
    let batches = batches_of(64);

    let first = part(&["--max-batches", "10"]);
    assert_eq!((&first["batches"], &first["complete"]), (&10.into(), &false.into()));
    assert_eq!(first["checksum"], checksum_of(batches[..10].to_vec()));
    // With other workers and another depth.
    let second = part(&["--max-batches", "5", "--workers", "1", "--prefetch-depth", "1"]);
    assert_eq!(second["checksum"], checksum_of(batches[10..15].to_vec()));
    let third = part(&[]);
    assert_eq!((&third["batches"], &third["complete"]), (&14.into(), &true.into()));
    assert_eq!(third["checksum"], checksum_of(batches[15..].to_vec()));
    // Nothing is left, and that is no error.
    let fourth = part(&[]);
    assert_eq!((&fourth["batches"], &fourth["complete"]), (&0.into(), &true.into()));
    assert!(fourth["time_to_first_batch_ms"].is_null());
    // With one more epoch there is.
    assert_eq!(part(&["--epochs", "2"])["samples"], 1797);
}

#[test]
fn shuffled_epochs_continue_too() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    let shuffled = ["--shuffle", "--seed", "7", "--epochs", "2"];
    let part = |most: &str| {
        let arguments = [&shuffled[..], &["--state", text(&file), "--max-batches", most]].concat();
        run_digits(&arguments)
    };
    assert_eq!(part("29")["samples"], 1797);
    // The last batch is delivered by the count: the run is complete.
    let second = part("29");
    assert_eq!((&second["samples"], &second["complete"]), (&1797.into(), &true.into()));
    assert_eq!(LoaderState::load(&file).unwrap().epoch, 2);
    // The second part is the second epoch of the run in one go, in another order than the first.
    let first = run_digits(&["--shuffle", "--seed", "7"]);
    assert_ne!(second["checksum"], first["checksum"]);
}

#[test]
fn skips_before_are_listed_after() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("state.json");
    run_digits(&["--state", text(&file), "--max-batches", "3", "--skip-errors", "10"]);
    let mut state = LoaderState::load(&file).unwrap();
    for sample in 0..7 {
        let skip = serde_json::json!({
            "epoch": 0, "batch": 1, "sample": sample, "reason": "the image is cut off"
        });
        state.skipped.push(serde_json::from_value::<Skipped>(skip).unwrap());
    }
    state.save(&file).unwrap();

    let more = ["--state", text(&file), "--skip-errors", "10"];
    let result = run_digits(&[&more[..], &["--max-batches", "1"]].concat());
    assert_eq!(result["skipped"], 7);
    assert_eq!(result["skipped_samples"][6]["reason"], "the image is cut off");
    let answer = batchline(&[&["run", DIGITS, "--device", "host"], &more[..]].concat());
    for said in [
        "skipped      7 samples\n",
        "  sample 4 (batch 1 of epoch 0): the image is cut off\n",
        "  and 2 more, all of which --json lists\n",
    ] {
        assert!(answer.stdout.contains(said), "{said:?} is missing in {}", answer.stdout);
    }
}

/// An array of unsigned numbers, of which one is too large to be delivered.
fn array_with_a_bad_sample(folder: &Path, bad: usize) {
    let mut header =
        "{'descr': '<u8', 'fortran_order': False, 'shape': (100, 1), }".as_bytes().to_vec();
    while !(10 + header.len() + 1).is_multiple_of(64) {
        header.push(b' ');
    }
    header.push(b'\n');
    let mut file = b"\x93NUMPY\x01\x00".to_vec();
    file.extend(u16::try_from(header.len()).unwrap().to_le_bytes());
    file.extend(header);
    for place in 0..100 {
        let value = if place == bad { u64::MAX } else { place as u64 };
        file.extend(value.to_le_bytes());
    }
    std::fs::write(folder.join("x.npy"), file).unwrap();
}

#[test]
fn a_run_that_fails_saves_what_was_delivered() {
    let folder = tempfile::tempdir().unwrap();
    array_with_a_bad_sample(folder.path(), 57);
    let data = folder.path().to_str().unwrap();
    let state = folder.path().join("state.json");
    let state = state.to_str().unwrap();
    let run = ["run", data, "--device", "host", "--batch-size", "10", "--state", state];
    let failed = batchline(&run);
    assert_eq!(failed.status, Some(1), "{failed:?}");
    assert!(failed.stderr.contains("sample 57 in batch 5 of epoch 0"), "{failed:?}");
    assert_eq!(LoaderState::load(Path::new(state)).unwrap().position, 5);
    // The bad one is left out now, and nothing is loaded twice.
    let rest = batchline(&[&run[..], &["--skip-errors", "1", "--json"]].concat());
    let rest: Value = serde_json::from_str(&rest.stdout).unwrap();
    assert_eq!(
        (&rest["batches"], &rest["samples"], &rest["skipped"]),
        (&5.into(), &49.into(), &1.into())
    );
}

#[test]
fn a_run_that_cannot_start_leaves_no_state() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.json");
    let told = state.to_str().unwrap();
    let refused =
        batchline(&["run", DIGITS, "--device", "host", "--device-limit", "1KiB", "--state", told]);
    assert_eq!(refused.status, Some(1), "{refused:?}");
    assert!(!state.exists(), "the next run would be held to these settings");
}
