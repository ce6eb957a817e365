//! The CUDA device: what its streams do to memory, and how it ends. On a GPU, or on a driver that
//! only pretends to have one.
//!
//! `BATCHLINE_REQUIRE_CUDA` demands a GPU. Tests that steer the driver then return early, as no
//! real one can be steered: those that begin with [`pretended`].

mod calls;
mod capture;
#[path = "../loader/cases.rs"]
mod cases;
#[cfg(feature = "cudarc")]
mod cudarc;
mod dlpack;
mod driver;
mod endings;
mod failures;
#[cfg(unix)]
mod fork;
mod frozen;
#[path = "../endings/gate.rs"]
#[allow(dead_code, reason = "the test of endings uses all of it")]
mod gate;
mod gather;
mod missing;
mod properties;
mod several;
mod steady;
mod streams;
#[path = "../endings/threads.rs"]
#[allow(dead_code, reason = "the test of endings uses all of it")]
mod threads;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use batchline::testing::conformance;
use batchline::{
    AsyncDataLoaderConfig, ConfigBuilder, DType, Device, FnDataset, MemoryManager, SampleSpec,
};

use fake_cuda::{Fake, Live};

/// Whether there must be a GPU, and nothing is pretended.
fn gpu_is_required() -> bool {
    std::env::var_os("BATCHLINE_REQUIRE_CUDA").is_some()
}

/// The GPU where one is demanded, else a driver that pretends to have one.
struct Gpu {
    fake: Option<Fake>,
}

impl Gpu {
    fn new(settings: &str) -> Self {
        Self { fake: (!gpu_is_required()).then(|| start(settings)) }
    }

    fn device(&self) -> Device {
        Device::cuda(0).unwrap()
    }
}

/// The driver that pretends, for tests that steer it. `None` where there is none to steer.
fn pretended(settings: &str) -> Option<Fake> {
    (!gpu_is_required() && !no_kernels()).then(|| start(settings))
}

fn start(settings: &str) -> Fake {
    // The real one, too, takes ordinary memory for copies that go on after the call.
    Fake::start(&format!("devices=1,pageable=1,{settings}"))
}

impl Drop for Gpu {
    /// Nothing was used after it was given back.
    fn drop(&mut self) {
        if let Some(fake) = self.fake.as_ref().filter(|_| !std::thread::panicking()) {
            wait_until_closed();
            let mut violations = fake.violations();
            // The fault that a test makes on purpose.
            violations.retain(|violation| !violation.contains("batchline_test_fault"));
            assert_eq!(violations, [""; 0]);
        }
    }
}

/// Waits until all devices of this process are closed: the last handle of one may be with work that
/// has just ended.
fn wait_until_closed() {
    eventually("the devices to be closed", || {
        threads::count(threads::is_of_device).is_none_or(|count| count == 0)
    });
}

/// What was done wrong, once all devices are closed: until then there may be more, which the next
/// test would find.
fn violations(fake: &Fake) -> Vec<String> {
    wait_until_closed();
    fake.violations()
}

/// Nothing was used after it was given back, and nothing is left.
fn assert_clean(fake: &Fake, what: &str) {
    assert_eq!(violations(fake), [""; 0], "{what}");
    assert_eq!(fake.live(), Live::default(), "left behind: {what}");
    assert!(fake.left_behind().is_empty(), "{:?} left to the context: {what}", fake.left_behind());
}

/// Whether there is neither a GPU, as far as is said, nor a C++ compiler to make kernels for the
/// pretended one.
fn no_kernels() -> bool {
    let none = !fake_cuda::KERNELS && !gpu_is_required();
    if none {
        say("skipped: no C++ compiler to make the kernels with");
    }
    none
}

/// Says something past the capture of the test harness, so that it is seen.
fn say(line: &str) {
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{line}\n").as_bytes());
}

/// What a process that a test started is to do.
const TASK: &str = "BATCHLINE_TEST_TASK";

/// More than any test may take in a process of its own, unless more cases are asked for.
const LIMIT: Duration = Duration::from_secs(300);

fn more_is_asked_for() -> bool {
    std::env::var_os("BATCHLINE_CASES").is_some()
}

/// The task of this process, if it was started by [`run_child`]. It ends with an error where the
/// task takes too long.
fn task() -> Option<String> {
    let task = std::env::var(TASK).ok()?;
    let watch = || {
        let limit = if more_is_asked_for() { 20 * LIMIT } else { LIMIT };
        std::thread::sleep(limit);
        say(&format!("no end after {limit:?}"));
        std::process::abort();
    };
    std::thread::Builder::new().name("watchdog".to_owned()).spawn(watch).unwrap();
    Some(task)
}

/// Runs a test again in a process of its own, to do this task; the driver is found in this folder
/// first, if one is named.
fn run_child(test: &str, task: &str, library_path: Option<&Path>) {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args([test, "--exact", "--nocapture"]).env(TASK, task);
    if let Some(folder) = library_path {
        child.env("LD_LIBRARY_PATH", folder);
    }
    let child = child.output().unwrap();
    let (out, err) =
        (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    assert!(child.status.success(), "{task}: {out}{err}");
    assert!(out.contains("1 passed"), "no test is called {test}: {out}");
}

/// Runs a test again in a process of its own, where this is true.
fn in_a_child(test: &str) -> bool {
    let is_child = task().is_some();
    if !is_child {
        run_child(test, "all of it", None);
    }
    is_child
}

/// The suite that every device passes, in different orders of the streams.
#[test]
fn conformance() {
    if no_kernels() {
        return;
    }
    // A GPU has an order of its own.
    let seeds = if gpu_is_required() { 1 } else { 3 };
    for seed in 0..seeds {
        let gpu = Gpu::new(&format!("random_latency_us=100,seed={seed}"));
        conformance::run_all(&|| gpu.device());
    }
}

const WIDTH: u16 = 1 << 12;

/// Samples whose bytes are all their number's lowest byte.
fn numbers(
    len: u64,
) -> FnDataset<impl Fn(u64, &mut batchline::SampleMut<'_>) -> Result<(), batchline::BoxError>> {
    let spec = SampleSpec::new(DType::U8, &[WIDTH.into()]).unwrap();
    FnDataset::new(len, spec, |index, sample: &mut batchline::SampleMut<'_>| {
        sample.input().fill(index.to_le_bytes()[0]);
        Ok(())
    })
}

fn builder(memory: &MemoryManager) -> ConfigBuilder {
    AsyncDataLoaderConfig::builder().batch_size(4).memory_manager(memory.clone())
}

fn expected(batch: u64) -> Vec<u8> {
    (batch * 4..batch * 4 + 4).flat_map(|row| vec![row.to_le_bytes()[0]; WIDTH.into()]).collect()
}

fn eventually(what: &str, condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(20), "{what} did not come about");
        std::thread::sleep(Duration::from_millis(1));
    }
}
