//! Every device passes the conformance suite.

use std::cell::RefCell;
#[cfg(feature = "wgpu")]
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchline::Device;
use batchline::testing::{FaultPlan, conformance, faulty_device};

#[test]
fn host() {
    conformance::run_all(&Device::host);
}

/// The device that is as awkward as a correct one can be: asynchronous, with streams that overtake
/// each other, and freed slots overwritten.
#[test]
fn faulty() {
    for (unified, gathers) in [(false, false), (true, false), (false, true)] {
        let seed = AtomicU64::new(0);
        let controls = RefCell::new(Vec::new());
        conformance::run_all(&|| {
            let seed = seed.fetch_add(1, Ordering::Relaxed);
            let max_delay = Duration::from_micros(200);
            let plan = FaultPlan { seed, unified, gathers, max_delay, ..FaultPlan::default() };
            let (device, control) = faulty_device(plan);
            controls.borrow_mut().push(control);
            device
        });
        for control in controls.into_inner() {
            assert_eq!((control.mismatches(), control.registered()), (0, 0));
        }
    }
}

#[test]
fn random_operations_with_delays() {
    for seed in 0..20 {
        let max_delay = Duration::from_micros(100);
        let (device, _) = faulty_device(FaultPlan { seed, max_delay, ..FaultPlan::default() });
        conformance::random_operations(&device, seed);
    }
}

#[test]
fn frozen_chains_with_delays() {
    for seed in 0..20 {
        let max_delay = Duration::from_micros(100);
        let (device, _) = faulty_device(FaultPlan { seed, max_delay, ..FaultPlan::default() });
        conformance::frozen_chains_run_again(&device, seed);
    }
}

/// Runs on whatever adapter there is; a software rasteriser is enough.
#[cfg(feature = "wgpu")]
#[test]
fn wgpu() {
    if let Err(missing) = Device::wgpu() {
        let required = std::env::var_os("BATCHLINE_REQUIRE_WGPU").is_some();
        assert!(!required, "BATCHLINE_REQUIRE_WGPU is set, but: {missing}");
        // Past the capture of the test harness, so that it is seen.
        let _ = writeln!(std::io::stderr(), "skipped, the wgpu device: {missing}");
        return;
    }
    conformance::run_all(&|| Device::wgpu().expect("an adapter was found above"));
}
