//! What a loader asks of the driver once it runs.

use batchline::{AsyncDataLoader, Device, MemoryManager};

use crate::{builder, numbers, pretended};

/// The driver is called a few times per batch, and nothing is allocated, pinned or created.
#[test]
fn a_steady_state_makes_few_calls() {
    let Some(fake) = pretended("") else { return };
    let device = Device::cuda(0).unwrap();
    let memory = MemoryManager::new(&device);
    let loader = AsyncDataLoader::new(numbers(4000), builder(&memory).build().unwrap()).unwrap();
    loader.start().unwrap();
    let take = |batches: u64| {
        for _ in 0..batches {
            drop(loader.get_batch().unwrap().unwrap());
        }
    };
    take(100);
    let before = fake.all_calls();
    take(800);
    let after = fake.all_calls();
    let made = |name: &str| {
        let count =
            |calls: &std::collections::BTreeMap<String, u64>| calls.get(name).copied().unwrap_or(0);
        count(&after) - count(&before)
    };
    for name in [
        "cuMemAlloc_v2",
        "cuMemHostAlloc",
        "cuMemHostRegister_v2",
        "cuEventCreate",
        "cuStreamCreateWithPriority",
    ] {
        assert_eq!(made(name), 0, "{name}");
    }
    // Looks at events come as often as somebody waits.
    let looks = made("cuEventQuery") + made("cuCtxGetCurrent");
    let all: u64 = after.values().sum::<u64>() - before.values().sum::<u64>();
    let per_batch = (all - looks) as f64 / 800.0;
    assert!(per_batch <= 8.0, "{per_batch} calls per batch: {after:?}");
}
