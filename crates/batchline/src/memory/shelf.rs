//! Blocks of memory by capacity, under a limit in bytes.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::Deref;
use std::sync::Arc;

use super::pool::Patience;
use crate::source::TENSOR_ALIGNMENT;
use crate::sync::{Condvar, Mutex};
use crate::{Error, Result};

/// What a shelf keeps.
pub(crate) trait Block: Send + Sized {
    /// Bytes that it was allocated with.
    fn capacity(&self) -> u64;
    /// Blocks of different classes never stand in for one another.
    fn class(&self) -> u8 {
        0
    }
    /// Whether nothing is known to be using it any more, so that it may be freed. Asked under the
    /// shelf's lock: it must not call into the device.
    fn is_idle(&self) -> bool;
    /// Something that brings up to date what [`is_idle`](Self::is_idle) knows; called without the
    /// lock.
    fn update(&self) -> Option<Update> {
        None
    }
    /// Gives its memory up without freeing it, because something may still be using it.
    fn leak(self);
}

/// Asks the device how far it is.
pub(crate) type Update = Box<dyn FnOnce() + Send>;

/// Blocks that are free to be used again, and the count of all bytes in existence.
pub(crate) struct Shelf<B> {
    /// What the blocks are, for error messages.
    what: &'static str,
    /// The limit's name, for error messages.
    limit_name: &'static str,
    limit: u64,
    /// The largest single allocation that the device makes.
    max_allocation: u64,
    state: Mutex<State<B>>,
    returned: Condvar,
}

struct State<B> {
    /// Free blocks by capacity and class, the one that has been free for longest first.
    free: BTreeMap<(u64, u8), VecDeque<B>>,
    counts: ShelfCounts,
}

/// Bytes and events, counted since the shelf was made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct ShelfCounts {
    /// Bytes lent.
    pub(crate) in_use: u64,
    /// Bytes free to be lent again.
    pub(crate) cached: u64,
    /// Bytes given up because their last use can't be proven to be over. They count against the
    /// limit for ever, as they still exist.
    pub(crate) quarantined: u64,
    /// Allocations made.
    pub(crate) allocations: u64,
}

impl ShelfCounts {
    fn existing(&self) -> u64 {
        self.in_use + self.cached + self.quarantined
    }
}

impl<B: Block> Shelf<B> {
    pub(crate) fn new(
        what: &'static str,
        limit_name: &'static str,
        limit: u64,
        max_allocation: u64,
    ) -> Self {
        let state = State { free: BTreeMap::new(), counts: ShelfCounts::default() };
        let state = Mutex::new(state);
        Self { what, limit_name, limit, max_allocation, state, returned: Condvar::new() }
    }

    /// The capacity that a request for `bytes` gets.
    ///
    /// # Errors
    /// It can never be had.
    pub(crate) fn capacity_for(&self, bytes: u64) -> Result<u64> {
        let too_large = |limit_name, limit| Error::TooLarge {
            what: self.what.to_owned(),
            requested: bytes,
            limit_name,
            limit,
        };
        let exact = bytes.max(1).checked_next_multiple_of(TENSOR_ALIGNMENT);
        let exact = exact.ok_or_else(|| Error::Overflow { what: self.what.to_owned() })?;
        if exact > self.max_allocation {
            return Err(too_large("the device's largest buffer", self.max_allocation));
        }
        if exact > self.limit {
            return Err(too_large(self.limit_name, self.limit));
        }
        // Up to an eighth is given away, so that requests of about the same size share blocks.
        let step = (exact.next_power_of_two() / 16).max(TENSOR_ALIGNMENT);
        let rounded = exact.next_multiple_of(step);
        Ok(if rounded > self.limit.min(self.max_allocation) { exact } else { rounded })
    }

    /// Lends a block of this class and at least `bytes`: a free one, else a new one.
    ///
    /// # Errors
    /// It can never be had; or the limit is reached and the patience over; or `make` failed.
    pub(crate) fn lend(
        self: &Arc<Self>,
        bytes: u64,
        class: u8,
        patience: Patience,
        make: impl FnOnce(u64) -> Result<B>,
    ) -> Result<Lease<B>> {
        let capacity = self.capacity_for(bytes)?;
        let mut state = self.state.lock();
        let mut updated = false;
        loop {
            if let Some(block) =
                state.free.get_mut(&(capacity, class)).and_then(VecDeque::pop_front)
            {
                state.counts.cached -= capacity;
                state.counts.in_use += capacity;
                return Ok(self.lease(block));
            }
            let evicted = state.evict(self.limit - capacity);
            let existing = state.counts.existing();
            if existing <= self.limit - capacity {
                state.counts.in_use += capacity;
                state.counts.allocations += 1;
                drop(state);
                drop(evicted);
                return match make(capacity) {
                    Ok(block) => Ok(self.lease(block)),
                    Err(error) => {
                        self.state.lock().counts.in_use -= capacity;
                        self.returned.notify_all();
                        Err(error)
                    }
                };
            }
            if !updated {
                // Blocks may have become idle without anybody knowing.
                updated = true;
                drop(state);
                self.update();
                state = self.state.lock();
                continue;
            }
            let Some(left) = patience.left() else {
                return Err(Error::LimitReached {
                    what: self.what.to_owned(),
                    requested: bytes,
                    in_use: existing,
                    limit_name: self.limit_name,
                    limit: self.limit,
                });
            };
            state = self.returned.wait_at_most(state, left);
            updated = false;
        }
    }

    /// Counts memory that is not the shelf's own against the limit, of which an eighth is left for
    /// blocks.
    ///
    /// # Errors
    /// There is no room for it, or there never is.
    pub(crate) fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation<B>> {
        let most = self.limit - self.limit / 8;
        if bytes > most {
            return Err(Error::TooLarge {
                what: self.what.to_owned(),
                requested: bytes,
                limit_name: self.limit_name,
                limit: most,
            });
        }
        self.update();
        let mut state = self.state.lock();
        let evicted = state.evict(most - bytes);
        let existing = state.counts.existing();
        let fits = existing <= most - bytes;
        if fits {
            state.counts.in_use += bytes;
        }
        drop(state);
        drop(evicted);
        if !fits {
            return Err(Error::LimitReached {
                what: self.what.to_owned(),
                requested: bytes,
                in_use: existing,
                limit_name: self.limit_name,
                limit: most,
            });
        }
        Ok(Reservation { bytes, shelf: Arc::clone(self) })
    }

    /// Asks the device about the blocks that are free.
    fn update(&self) {
        let updates: Vec<Update> =
            self.state.lock().free.values().flatten().filter_map(Block::update).collect();
        updates.into_iter().for_each(|update| update());
    }

    fn lease(self: &Arc<Self>, block: B) -> Lease<B> {
        Lease { block: Some(block), shelf: Arc::clone(self) }
    }

    pub(crate) fn counts(&self) -> ShelfCounts {
        self.state.lock().counts
    }

    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }

    /// Frees every block that is idle and not lent; returns the bytes.
    pub(crate) fn trim(&self) -> u64 {
        self.update();
        let mut state = self.state.lock();
        let before = state.counts.cached;
        let evicted = state.evict(0);
        let freed = before - state.counts.cached;
        drop(state);
        drop(evicted);
        freed
    }
}

impl<B: Block> State<B> {
    /// Takes idle blocks out, largest first, until no more than `goal` bytes exist. The caller
    /// drops them outside the lock.
    fn evict(&mut self, goal: u64) -> Vec<B> {
        let mut evicted = Vec::new();
        if self.counts.existing() <= goal {
            return evicted;
        }
        for ((capacity, _), blocks) in self.free.iter_mut().rev() {
            let mut place = 0;
            while place < blocks.len() && self.counts.existing() > goal {
                if blocks[place].is_idle() {
                    evicted.extend(blocks.remove(place));
                    self.counts.cached -= capacity;
                } else {
                    place += 1;
                }
            }
        }
        self.free.retain(|_, blocks| !blocks.is_empty());
        evicted
    }
}

impl<B> fmt::Debug for Shelf<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shelf").field("what", &self.what).field("limit", &self.limit).finish()
    }
}

/// Bytes of memory of others that count against a shelf's limit, until it is dropped.
#[derive(Debug)]
pub(crate) struct Reservation<B: Block> {
    bytes: u64,
    shelf: Arc<Shelf<B>>,
}

impl<B: Block> Reservation<B> {
    /// Counts them as given up from now on.
    pub(crate) fn quarantine(mut self) {
        let mut state = self.shelf.state.lock();
        let bytes = std::mem::take(&mut self.bytes);
        state.counts.in_use -= bytes;
        state.counts.quarantined += bytes;
    }
}

impl<B: Block> Drop for Reservation<B> {
    fn drop(&mut self) {
        self.shelf.state.lock().counts.in_use -= self.bytes;
        self.shelf.returned.notify_all();
    }
}

/// A block on loan. Dropping it puts the block back.
pub(crate) struct Lease<B: Block> {
    /// `None` only while it is being taken apart.
    block: Option<B>,
    shelf: Arc<Shelf<B>>,
}

impl<B: Block> Lease<B> {
    /// Gives the block up: it is neither used again nor freed.
    pub(crate) fn quarantine(mut self) {
        if let Some(block) = self.block.take() {
            let mut state = self.shelf.state.lock();
            state.counts.in_use -= block.capacity();
            state.counts.quarantined += block.capacity();
            drop(state);
            block.leak();
        }
    }
}

impl<B: Block> Deref for Lease<B> {
    type Target = B;

    fn deref(&self) -> &B {
        self.block.as_ref().expect("a block until it is taken")
    }
}

impl<B: Block> Drop for Lease<B> {
    fn drop(&mut self) {
        let Some(block) = self.block.take() else { return };
        let capacity = block.capacity();
        let mut state = self.shelf.state.lock();
        state.counts.in_use -= capacity;
        state.counts.cached += capacity;
        state.free.entry((capacity, block.class())).or_default().push_back(block);
        drop(state);
        // All: waiters want different sizes.
        self.shelf.returned.notify_all();
    }
}

impl<B: Block + fmt::Debug> fmt::Debug for Lease<B> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.block, f)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    struct Plain(u64);

    impl Block for Plain {
        fn capacity(&self) -> u64 {
            self.0
        }
        fn is_idle(&self) -> bool {
            true
        }
        fn leak(self) {}
    }

    fn shelf(limit: u64) -> Arc<Shelf<Plain>> {
        Arc::new(Shelf::new("memory", "device_limit", limit, 1 << 40))
    }

    fn lend(shelf: &Arc<Shelf<Plain>>, bytes: u64) -> Result<Lease<Plain>> {
        shelf.lend(bytes, 0, Patience::None, |capacity| Ok(Plain(capacity)))
    }

    #[test]
    fn capacities_are_rounded_by_an_eighth_at_most() {
        let shelf = shelf(u64::MAX / 2);
        for bytes in [0, 1, 256, 257, 4096, 5000, 1 << 20, (1 << 20) + 1, 38_535_168] {
            let capacity = shelf.capacity_for(bytes).unwrap();
            assert!(capacity >= bytes && capacity.is_multiple_of(256));
            assert!(capacity <= bytes + (bytes / 8).max(256), "{bytes} became {capacity}");
        }
        assert!(matches!(shelf.capacity_for(u64::MAX), Err(Error::Overflow { .. })));
        assert!(matches!(shelf.capacity_for(1 << 41), Err(Error::TooLarge { .. })));
    }

    #[test]
    fn a_block_is_used_again_and_the_limit_holds() {
        let shelf = shelf(1024);
        let one = lend(&shelf, 512).unwrap();
        drop(one);
        let _again = lend(&shelf, 500).unwrap();
        assert_eq!(shelf.counts().allocations, 1);
        let _two = lend(&shelf, 512).unwrap();
        assert!(matches!(lend(&shelf, 1), Err(Error::LimitReached { in_use: 1024, .. })));
        assert!(matches!(lend(&shelf, 1025), Err(Error::TooLarge { limit: 1024, .. })));
    }

    #[test]
    fn free_blocks_of_another_size_make_room() {
        let shelf = shelf(1024);
        drop(lend(&shelf, 256).unwrap());
        drop(lend(&shelf, 512).unwrap());
        let _large = lend(&shelf, 1024).unwrap();
        assert_eq!(
            shelf.counts(),
            ShelfCounts { in_use: 1024, allocations: 3, ..Default::default() }
        );
    }

    #[test]
    fn memory_of_others_counts_against_the_limit() {
        let shelf = shelf(1024);
        drop(lend(&shelf, 512).unwrap());
        assert!(matches!(shelf.reserve(1024), Err(Error::TooLarge { limit: 896, .. })));
        // What is kept makes room, what is lent does not.
        let reserved = shelf.reserve(800).unwrap();
        assert_eq!(shelf.counts().in_use, 800);
        assert!(lend(&shelf, 256).is_err());
        assert!(matches!(shelf.reserve(97), Err(Error::LimitReached { in_use: 800, .. })));
        drop(reserved);
        assert_eq!(shelf.counts(), ShelfCounts { allocations: 1, ..Default::default() });
        shelf.reserve(256).unwrap().quarantine();
        assert_eq!(shelf.counts().quarantined, 256);
    }

    #[test]
    fn trim_frees_and_quarantine_does_not() {
        let shelf = shelf(1024);
        let kept = lend(&shelf, 256).unwrap();
        drop(lend(&shelf, 512).unwrap());
        kept.quarantine();
        assert_eq!(shelf.trim(), 512);
        let counts = shelf.counts();
        assert_eq!((counts.in_use, counts.cached, counts.quarantined), (0, 0, 256));
        assert!(matches!(lend(&shelf, 1024), Err(Error::LimitReached { .. })));
    }

    /// A block in use by a device; asking the device runs a callback of the user's.
    struct Busy {
        idle: Arc<std::sync::atomic::AtomicBool>,
        callback: Mutex<Option<Update>>,
    }

    impl Block for Busy {
        fn capacity(&self) -> u64 {
            256
        }
        fn is_idle(&self) -> bool {
            self.idle.load(std::sync::atomic::Ordering::SeqCst)
        }
        fn update(&self) -> Option<Update> {
            self.callback.lock().take()
        }
        fn leak(self) {}
    }

    #[test]
    fn the_device_is_asked_without_the_lock() {
        let shelf: Arc<Shelf<Busy>> = Arc::new(Shelf::new("memory", "limit", 512, 1 << 40));
        let lend = |class, callback| {
            let idle = Arc::default();
            shelf.lend(256, class, Patience::None, |_| {
                Ok(Busy { idle, callback: Mutex::new(callback) })
            })
        };
        // The callback gives back what it holds, as a callback of the device may.
        let held = lend(0, None).unwrap();
        let idle = Arc::clone(&held.idle);
        let free: Update = Box::new(move || {
            idle.store(true, std::sync::atomic::Ordering::SeqCst);
            drop(held);
        });
        drop(lend(0, Some(free)).unwrap());
        // Both blocks are of another class, the first is in use, the second not known to be idle.
        lend(1, None).unwrap();
        assert_eq!(shelf.counts().allocations, 3);
    }
}
