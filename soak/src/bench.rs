//! The device of a round, its memory, and what is to go wrong with it.

use std::time::{Duration, Instant};

use batchline::testing::{FaultControl, FaultPlan, faulty_device};
use batchline::{Device, Error, MemoryLimits, MemoryManager};

use crate::random::Random;
use crate::tally::TALLY;

/// Which device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Host,
    /// The one of the tests, which overtakes itself and fails on demand.
    Faulty {
        unified: bool,
    },
    #[cfg(feature = "wgpu")]
    Wgpu,
    #[cfg(feature = "cuda")]
    Cuda,
}

/// Which devices the rounds are on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Devices {
    /// Now one, now another, of all but CUDA's.
    Mixed,
    #[cfg(feature = "cuda")]
    Cuda,
}

/// What goes wrong, at the n-th opportunity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    RefusedSubmission(u64),
    UnclearSubmission(u64),
    PanickingSubmission(u64),
    FailedAllocation(u64),
    FailedRegistration(u64),
    LostAtSegment(u64),
    /// The consumer loses the device once it has so many batches.
    LostAtBatch(u64),
}

/// What the device of a round is like.
#[derive(Debug, Clone, Copy)]
pub struct Setting {
    pub seed: u64,
    pub kind: Kind,
    pub fault: Option<Fault>,
    pub max_delay: Duration,
}

impl Setting {
    pub fn new(seed: u64, devices: Devices) -> Self {
        let mut random = Random::new(seed, 0xde);
        let kind = match random.below(8) {
            #[cfg(feature = "cuda")]
            _ if devices == Devices::Cuda => Kind::Cuda,
            _ if devices != Devices::Mixed => unreachable!("no other device is built in"),
            #[cfg(feature = "wgpu")]
            6 | 7 => Kind::Wgpu,
            0 | 1 => Kind::Host,
            2 => Kind::Faulty { unified: true },
            _ => Kind::Faulty { unified: false },
        };
        // The rarer ones lose the device, which gives memory up for good.
        let fault = match random.below(600) {
            _ if !matches!(kind, Kind::Faulty { .. }) => None,
            0..20 => Some(Fault::RefusedSubmission(random.within(1, 30))),
            20..40 => Some(Fault::FailedAllocation(random.within(1, 12))),
            40..42 => Some(Fault::UnclearSubmission(random.within(1, 30))),
            42..44 => Some(Fault::PanickingSubmission(random.within(1, 30))),
            44..46 => Some(Fault::LostAtSegment(random.within(1, 40))),
            46..48 => Some(Fault::LostAtBatch(random.below(20))),
            48..58 => Some(Fault::FailedRegistration(random.within(1, 3))),
            _ => None,
        };
        let max_delay = Duration::from_micros(random.pick(&[0, 0, 20, 150]));
        Self { seed, kind, fault, max_delay }
    }

    /// The device, and the handle that steers it if there is one.
    pub fn open(&self) -> (Device, Option<FaultControl>) {
        let unified = match self.kind {
            Kind::Host => return (Device::host(), None),
            #[cfg(feature = "wgpu")]
            Kind::Wgpu => return (wgpu(self.seed.is_multiple_of(16)), None),
            #[cfg(feature = "cuda")]
            Kind::Cuda => return (cuda(self.seed.is_multiple_of(16)), None),
            Kind::Faulty { unified } => unified,
        };
        let Self { seed, max_delay, .. } = *self;
        let gathers = !seed.is_multiple_of(4);
        let mut plan = FaultPlan { seed, max_delay, unified, gathers, ..FaultPlan::default() };
        match self.fault {
            Some(Fault::RefusedSubmission(at)) => plan.fail_submit = Some(at),
            Some(Fault::UnclearSubmission(at)) => plan.fail_after_enqueue = Some(at),
            Some(Fault::PanickingSubmission(at)) => plan.panic_in_submit = Some(at),
            Some(Fault::FailedAllocation(at)) => plan.fail_allocation = Some(at),
            Some(Fault::FailedRegistration(at)) => plan.fail_registration = Some(at),
            Some(Fault::LostAtSegment(at)) => plan.lose_at = Some(at),
            Some(Fault::LostAtBatch(_)) | None => {}
        }
        let (device, control) = faulty_device(plan);
        (device, Some(control))
    }
}

/// The wgpu device: one that lives as long as the program, or a new one.
#[cfg(feature = "wgpu")]
pub fn wgpu(anew: bool) -> Device {
    static KEPT: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    let open = || Device::wgpu().expect("this soak was built for a machine with a wgpu adapter");
    if anew { open() } else { KEPT.get_or_init(open).clone() }
}

/// The CUDA device: one that lives as long as the program, or a new one beside it.
#[cfg(feature = "cuda")]
pub fn cuda(anew: bool) -> Device {
    static KEPT: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
    let open = || Device::cuda(0).unwrap_or_else(|error| panic!("{}", error.chain()));
    let kept = KEPT.get_or_init(open);
    if anew { open() } else { kept.clone() }
}

/// What a round works on.
#[derive(Debug)]
pub struct Bench {
    pub setting: Setting,
    pub memory: MemoryManager,
    pub control: Option<FaultControl>,
}

impl Bench {
    pub fn new(setting: Setting, limits: MemoryLimits) -> Self {
        let (device, control) = setting.open();
        Self { setting, memory: MemoryManager::with_limits(&device, limits), control }
    }

    pub fn is_lost(&self) -> bool {
        self.memory.device().check().is_err()
    }

    /// Checks that an error is the one that was injected.
    ///
    /// # Panics
    /// It is another one.
    pub fn expect(&self, error: &Error) {
        let injected =
            error.chain().contains("a test made") || error.chain().contains("a test lost");
        assert!(self.setting.fault.is_some() && injected, "not to be expected: {}", error.chain());
        TALLY.faults.add(1);
    }

    /// Checks that all memory came home, and ends the bench.
    pub fn close(self) {
        wait_for("all memory to come home", || {
            let stats = self.memory.stats();
            stats.device_in_use == 0 && stats.staging_in_use == 0
        });
        let stats = self.memory.stats();
        if self.is_lost() {
            TALLY.lost.add(1);
            // Of a lost device's memory that is kept to be used again it can't be known either
            // whether the device is done with it.
            TALLY.given_up.add(stats.quarantined + stats.device_cached);
        } else {
            assert_eq!(stats.quarantined, 0, "memory was given up though the device is alive");
        }
        let Self { memory, control, .. } = self;
        drop(memory);
        if let Some(control) = control {
            wait_for("the device to be closed", || control.is_closed());
            assert_eq!(control.mismatches(), 0, "the consumer's work found other bytes");
        }
    }
}

/// Waits for something that has to happen soon.
///
/// # Panics
/// It does not.
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_micros(100));
    }
}
