//! `batchline devices`, and that devices make no difference to what is loaded.

use super::*;

fn list(arguments: &[&str]) -> Value {
    let answer = batchline(&[&["devices", "--json"], arguments].concat());
    assert_eq!(answer.status, Some(0), "{}", answer.stderr);
    serde_json::from_str(&answer.stdout).expect("one JSON object on stdout")
}

fn of_kind(listing: &Value, kind: &str) -> Option<Value> {
    let devices = listing["devices"].as_array().expect("a list");
    devices.iter().find(|device| device["kind"] == kind).cloned()
}

#[test]
fn what_is_there_and_what_is_missing() {
    let answer = batchline(&["devices"]);
    assert_eq!(answer.status, Some(0));
    assert!(answer.stdout.contains("found    host\n"), "{}", answer.stdout);
    assert!(answer.stdout.contains("  cuda: ") || answer.stdout.contains("found    cuda:0"));

    let listing = list(&[]);
    let host = of_kind(&listing, "host").expect("the host is always there");
    assert_eq!((&host["name"], &host["hardware"]), (&"host".into(), &false.into()));
    let missing = listing["missing"].as_array().unwrap();
    let wgpu = missing.iter().any(|missing| missing["wanted"] == "wgpu");
    assert_eq!(wgpu, of_kind(&listing, "wgpu").is_none(), "{listing}");
    assert!(missing.iter().all(|missing| missing["reason"].is_string()));
}

#[test]
fn copies_are_measured() {
    let listing = list(&["--measure"]);
    let host = of_kind(&listing, "host").unwrap();
    assert!(host["bytes_per_second"].as_f64().unwrap() > 1e6, "{listing}");
    for device in listing["devices"].as_array().unwrap() {
        assert!(device["bytes_per_second"].is_f64() ^ device["not_measured"].is_string());
    }
    let answer = batchline(&["devices", "--measure"]);
    assert!(answer.stdout.contains("one thread copies to it at "), "{}", answer.stdout);
}

#[cfg(feature = "wgpu")]
#[test]
fn wgpu_delivers_the_same_bytes() {
    if of_kind(&list(&[]), "wgpu").is_none() {
        assert!(
            std::env::var_os("BATCHLINE_REQUIRE_WGPU").is_none_or(|value| value != "1"),
            "there is no wgpu device: {}",
            batchline(&["devices"]).stdout
        );
        // Past the capture of the test harness, so that it is seen.
        let _ = std::io::Write::write_all(&mut std::io::stderr(), b"skipped: no wgpu device\n");
        return;
    }
    for settings in [
        &[][..],
        &["--shuffle", "--epochs", "2"],
        &["--batch-size", "7", "--workers", "3", "--prefetch-depth", "1"],
        &["--convert", "f32", "--normalize", "8/4"],
        &["--convert", "f32", "--normalize", "1,2,3,4,5,6,7,8/3"],
        &["--convert", "f16", "--normalize", "4.9/6.0"],
        &["--convert", "bf16"],
    ] {
        let on = |device: &str| run_digits(&[settings, &["--device", device]].concat());
        let (host, wgpu) = (on("host"), on("wgpu"));
        assert_eq!(wgpu["device_kind"], "wgpu");
        assert_eq!(wgpu["checksum"], host["checksum"], "{settings:?}");
        assert_eq!(wgpu["samples"], host["samples"]);
    }
}
