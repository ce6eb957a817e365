//! In a steady state nothing is allocated: counted by the allocator itself.
#![allow(unsafe_code, reason = "an allocator that counts")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use batchline::{AsyncDataLoader, AsyncDataLoaderConfig, Device, Host, HostTensor, InMemory};

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: everything is left to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: promised by the caller; it came from the system's allocator.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Shuffled epochs with labels and weights, several workers, every batch looked at.
#[test]
fn batches_are_delivered_without_allocating() {
    let tensor =
        |width: u16| HostTensor::new(vec![1u8; 1000 * usize::from(width)], &[1000, width.into()]);
    let dataset = InMemory::new(tensor(64).unwrap())
        .and_then(|set| set.labels(HostTensor::new(vec![3i64; 1000], &[1000])?))
        .and_then(|set| set.weights("mask", tensor(8)?))
        .unwrap();
    let config = AsyncDataLoaderConfig::builder()
        .batch_size(16)
        .workers(3)
        .shuffle(true)
        .epochs(20)
        .device(Device::host())
        .build()
        .unwrap();
    let loader = AsyncDataLoader::new(dataset, config).unwrap();
    loader.start().unwrap();
    let mut batches = 0;
    let mut before = 0;
    while let Some(batch) = loader.get_batch().unwrap() {
        let bound = batch.bind(&Host).unwrap();
        assert_eq!(bound.input().bytes()[0], 1);
        batches += 1;
        // The first epochs warm it up: queues reach their length, all outputs were used once.
        if batches == 200 {
            before = ALLOCATIONS.load(Ordering::Relaxed);
        }
        if batches == 1200 {
            assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
        }
    }
    assert_eq!(batches, 20 * 63);
}
