//! Random settings on a device with random delays, and with faults: what is delivered equals a
//! plain reading, up to the fault.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use batchline::testing::{FaultControl, FaultPlan, faulty_device};
use batchline::{Device, Tensor};

use super::cases::{Bench, Case, Random, cases, try_case};

struct Faulty {
    device: Device,
    control: FaultControl,
    gathers: bool,
}

impl Faulty {
    fn new(case: &Case) -> Self {
        // Other numbers than those of the case.
        let mut random = Random::new(!case.seed);
        let unified = random.one_in(3);
        let mut plan = FaultPlan {
            seed: case.seed,
            max_delay: Duration::from_micros(if case.seed.is_multiple_of(3) { 60 } else { 0 }),
            unified,
            gathers: case.in_memory,
            ..FaultPlan::default()
        };
        if case.fails {
            let at = Some(1 + random.below(12));
            match random.below(3) {
                0 => plan.fail_submit = at,
                1 => plan.fail_after_enqueue = at,
                _ => plan.lose_at = at,
            }
        }
        let (device, control) = faulty_device(plan);
        Self { device, control, gathers: case.in_memory && !unified }
    }

    fn run(&self, case: &Case) {
        case.run(self);
        if self.device.check().is_ok() {
            assert_eq!(self.control.registered(), 0, "memory that is still registered");
        }
    }
}

impl Bench for Faulty {
    fn device(&self) -> &Device {
        &self.device
    }

    fn gathers(&self) -> bool {
        self.gathers
    }

    fn look(&self, tensor: &Tensor, expected: Vec<u8>) {
        self.control.consume(tensor, expected);
    }

    fn settle(&self) {
        self.control.settle();
        assert_eq!(self.control.mismatches(), 0, "what the consumer's own work found");
    }
}

#[test]
fn any_settings_any_delays_any_fault() {
    let cases = cases(2000);
    // Cases mostly wait, so several go side by side.
    let next = AtomicU64::new(cases.start);
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= cases.end {
                        return;
                    }
                    let run = |case: &Case| Faulty::new(case).run(case);
                    try_case(&Case::new(seed), "loader any_settings", run);
                }
            });
        }
    });
}
