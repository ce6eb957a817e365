//! The CUDA device, on a driver that only pretends to have GPUs, or to be one.

use super::*;

/// Runs the command with a driver that has these settings.
fn on(settings: &str, arguments: &[&str]) -> Answer {
    with_driver_in(fake_cuda::folder(), settings, arguments)
}

/// Runs the command where the driver is looked for in this folder first.
fn with_driver_in(folder: &Path, settings: &str, arguments: &[&str]) -> Answer {
    let mut command = command(arguments);
    command.env("LD_LIBRARY_PATH", folder).env("FAKE_CUDA", settings);
    answer(command)
}

/// Whether there was no C++ compiler to make the pretended driver's kernels with.
fn no_kernels() -> bool {
    if !fake_cuda::KERNELS {
        // Past the capture of the test harness, so that it is seen.
        let line = b"skipped: no C++ compiler to make the kernels with\n";
        let _ = std::io::Write::write_all(&mut std::io::stderr(), line);
    }
    !fake_cuda::KERNELS
}

#[test]
fn gpus_are_listed() {
    let answer = on("devices=2,memory_mib=512,version=12040", &["devices"]);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    for gpu in ["cuda:0: Fake GPU 0", "cuda:1: Fake GPU 1"] {
        let entry = format!(
            "found    {gpu}\n         hardware; driver CUDA 12.4; buffers of up to 512 MiB\n"
        );
        assert!(answer.stdout.contains(&entry), "{entry} {}", answer.stdout);
    }
    assert!(!answer.stdout.contains("cuda: "), "{}", answer.stdout);
}

/// One that can't be opened is no failure of the list.
#[test]
fn gpus_are_measured() {
    let settings = "devices=2,fail=cuDevicePrimaryCtxRetain:1:46";
    let answer = on(settings, &["devices", "--measure", "--json"]);
    assert_eq!(answer.status, Some(0), "{answer:?}");
    let listing: Value = serde_json::from_str(&answer.stdout).unwrap();
    let gpu = |name: &str| {
        let devices = listing["devices"].as_array().unwrap();
        devices.iter().find(|device| device["name"] == name).unwrap().clone()
    };
    let why = gpu("cuda:0: Fake GPU 0")["not_measured"].as_str().unwrap().to_owned();
    assert!(why.contains("opening it failed: CUDA_ERROR_DEVICE_UNAVAILABLE (46)"), "{why}");
    assert!(gpu("cuda:1: Fake GPU 1")["bytes_per_second"].as_f64().unwrap() > 1e6, "{listing}");
}

/// Each in one line, of `devices` and of `run`.
#[test]
fn what_is_missing_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let lacking = folder.path().join("lacking");
    std::fs::create_dir(&lacking).unwrap();
    fake_cuda::without(&["cuMemHostRegister_v2"], &lacking).unwrap();
    let broken = folder.path().join("broken");
    std::fs::create_dir(&broken).unwrap();
    std::fs::write(broken.join("libcuda.so.1"), "no library").unwrap();
    let fake = fake_cuda::folder();
    let no_gpu = "the CUDA driver finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES";
    for (folder, settings, said) in [
        (fake, "devices=0", no_gpu),
        (fake, "init=100", no_gpu),
        (fake, "init=34", "the library found is the toolkit's stub, not the driver's; take the "),
        (fake, "init=803", "the CUDA driver's library and its kernel module differ; restart the "),
        (fake, "init=999", "the CUDA driver does not start: CUDA_ERROR_UNKNOWN (999): unknown "),
        (
            &lacking,
            "",
            "the CUDA driver is too old: its library lacks cuMemHostRegister_v2; update",
        ),
        (&broken, "", "the CUDA driver cannot be loaded: "),
    ] {
        let listed = with_driver_in(folder, settings, &["devices"]);
        assert_eq!(listed.status, Some(0), "{listed:?}");
        assert!(listed.stdout.contains(&format!("missing  cuda: {said}")), "{}", listed.stdout);
        assert!(listed.stdout.contains("found    host"), "{}", listed.stdout);
        let run = with_driver_in(folder, settings, &["run", DIGITS, "--device", "cuda"]);
        assert_failed(&run, &format!("batchline: no cuda device: {said}"));
    }
}

/// The command ended with one line that begins so.
fn assert_failed(answer: &Answer, said: &str) {
    assert_eq!((answer.status, &*answer.stdout), (Some(1), ""), "{answer:?}");
    assert!(answer.stderr.starts_with(said), "{said}: {}", answer.stderr);
    assert_eq!(answer.stderr.lines().count(), 1, "{}", answer.stderr);
}

#[test]
fn devices_that_do_not_open_or_lack_memory() {
    let gpu = "batchline: cuda:0: Fake GPU 0";
    for (settings, device, said) in [
        (
            "",
            "cuda:7",
            "batchline: no cuda:7 device: the CUDA driver shows 2 GPU(s) to this process; take cuda:0 to cuda:1",
        ),
        (
            "fail=cuDevicePrimaryCtxRetain:1:46",
            "cuda",
            "batchline: no cuda:0 device: opening it failed: CUDA_ERROR_DEVICE_UNAVAILABLE (46)",
        ),
        (
            "fail=cuStreamCreateWithPriority:2:2",
            "cuda",
            &format!("{gpu}: creating a stream failed: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        ),
        (
            "fail=cuMemAlloc_v2:1:2",
            "cuda",
            &format!("{gpu}: allocating device memory failed: CUDA_ERROR_OUT_OF_MEMORY (2)"),
        ),
    ] {
        let run = on(settings, &["run", DIGITS, "--device", device, "--json"]);
        assert_failed(&run, said);
    }
}

/// In the middle of a run: what there was before it is counted, and the error ends it.
#[test]
fn a_driver_that_fails_in_the_middle() {
    if no_kernels() {
        return;
    }
    let run = |settings: &str, more: &[&str]| {
        // Staged, so that it is known which calls are made.
        let run = ["run", DIGITS, "--device", "cuda", "--batch-size", "10", "--gather", "never"];
        on(settings, &[&run, more].concat())
    };
    let convert = ["--convert", "f32"];
    for (settings, more, said) in [
        (
            "fail=cuMemcpyHtoDAsync_v2:20:2",
            &[][..],
            "copying to the device failed: CUDA_ERROR_OUT_OF_MEMORY (2)",
        ),
        (
            "fail=cuMemcpyHtoDAsync_v2:20:700:lose",
            &[],
            "is lost (copying to the device: CUDA_ERROR_ILLEGAL_ADDRESS (700)",
        ),
        (
            "version=9000",
            &convert,
            "loading the kernels (they need compute capability 7.0) failed: CUDA_ERROR_UNSUPPORTED_PTX_VERSION (222)",
        ),
        (
            "fail=cuLaunchKernel:5:701",
            &convert,
            "is lost (launching a kernel: CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES (701)",
        ),
    ] {
        let answer = run(settings, more);
        assert_eq!((answer.status, answer.stderr.lines().count()), (Some(1), 1), "{answer:?}");
        assert!(answer.stderr.contains(said), "{said}: {}", answer.stderr);
    }
}

#[test]
fn a_gpu_delivers_the_same_bytes() {
    if no_kernels() {
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
        let host = run_digits(settings);
        // Where pages can't be locked it works as well.
        for driver in ["pageable=1,random_latency_us=50", "pageable=1,attribute=99:0"] {
            let arguments =
                [&["run", DIGITS, "--json", "--checksum", "--device", "cuda"], settings];
            let answer = on(driver, &arguments.concat());
            assert_eq!(answer.status, Some(0), "{}", answer.stderr);
            let cuda: Value = serde_json::from_str(&answer.stdout).unwrap();
            assert_eq!(cuda["device_kind"], "cuda");
            assert_eq!(cuda["checksum"], host["checksum"], "{settings:?}");
            assert_eq!(cuda["samples"], host["samples"]);
        }
    }
}
