//! What a loader asks of the driver once it runs.

use std::collections::BTreeMap;

use batchline::{AsyncDataLoader, Conversion, DType, Device, MemoryManager};

use crate::driver::Driver;
use crate::{builder, numbers, pretended};

/// Calls that make, register or free something: none of them belongs into a steady state.
const MAKING: [&str; 12] = [
    "cuEventCreate",
    "cuEventDestroy_v2",
    "cuMemAlloc_v2",
    "cuMemFreeHost",
    "cuMemFree_v2",
    "cuMemHostAlloc",
    "cuMemHostRegister_v2",
    "cuMemHostUnregister",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuStreamCreateWithPriority",
    "cuStreamDestroy_v2",
];

/// Once on each thread that calls the driver, whenever it does so first.
const ENTERING: [&str; 2] = ["cuCtxSetCurrent", "cuThreadExchangeStreamCaptureMode"];

const WORKERS: u8 = 2;

/// Looks come as often as somebody waits.
const LOOKS: [&str; 2] = ["cuCtxGetCurrent", "cuEventQuery"];

/// The driver is called a few times per batch, and nothing is allocated, pinned or created: with
/// and without a conversion, for the device's own stream and for a user's, on a device that is done
/// at once and on one that takes its time.
#[test]
fn a_steady_state_makes_few_calls() {
    // A stream that batches are bound to is kept in order besides the device's own.
    for (convert, bind, latency, most) in [
        (false, false, 0, 8),
        (true, false, 0, 8),
        (false, true, 0, 8),
        (true, true, 0, 10),
        (false, false, 100, 8),
        (true, false, 100, 8),
    ] {
        let Some(fake) = pretended(&format!("random_latency_us={latency}")) else { return };
        let device = Device::cuda(0).unwrap();
        let memory = MemoryManager::new(&device);
        let mut config = builder(&memory).workers(WORKERS.into());
        if convert {
            config = config.convert(DType::F16, Conversion::new().normalize(&[1.0], &[2.0]));
        }
        let loader = AsyncDataLoader::new(numbers(4000), config.build().unwrap()).unwrap();
        loader.start().unwrap();
        let driver = Driver::load();
        let _context = driver.retain(0);
        let stream = driver.stream();
        let take = |batches: u64| {
            for _ in 0..batches {
                let batch = loader.get_batch().unwrap().unwrap();
                if bind {
                    batch.bind(&stream).unwrap();
                }
            }
        };
        take(100);
        let before = fake.all_calls();
        take(800);
        let after = fake.all_calls();
        let made = |name: &str| {
            let count = |calls: &BTreeMap<String, u64>| calls.get(name).copied().unwrap_or(0);
            count(&after) - count(&before)
        };
        for name in MAKING {
            assert_eq!(made(name), 0, "{name}: {convert} {bind} {latency}");
        }
        for name in ENTERING {
            assert!(made(name) <= WORKERS.into(), "{name}: {convert} {bind} {latency}");
        }
        let all: u64 = after.keys().map(|name| made(name)).sum();
        let looks: u64 = LOOKS.into_iter().map(made).sum();
        assert!(all - looks <= 800 * most, "{convert} {bind} {latency}: {before:?}, {after:?}");
    }
}
