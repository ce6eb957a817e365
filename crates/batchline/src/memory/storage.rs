//! A block of device memory, and who has a part in it: tensors of users, operations in flight.

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use smallvec::SmallVec;

use super::block::DeviceBlock;
use super::manager::{DeviceLease, MemoryManager};
use super::pool::Loan;
use super::view::output_freed;
use crate::backend::{MAX_STREAMS, StreamId};
use crate::sync::{Mutex, MutexGuard};

/// A block of device memory. It goes home when nobody has it any more: no [`Share`] of a user, and
/// no [`Hold`] of an operation in flight.
#[derive(Debug)]
pub(crate) struct Storage {
    /// `None` only while it is being dropped.
    block: Option<DeviceLease>,
    memory: MemoryManager,
    parts: Mutex<Parts>,
}

/// Who has a part in a block.
#[derive(Debug, Default)]
struct Parts {
    shares: usize,
    holds: usize,
    /// The streams that work of the shares' users runs on, a bit each. On the last drop the
    /// position of each is noted, and the block's next writer comes after it.
    used_on: u32,
    /// What must last until those positions are noted.
    uses: SmallVec<[StreamUse; 2]>,
    /// Counts the batch among those that the consumer holds.
    held: Option<Held>,
    /// The way back to its pool, for memory of a loader. It holds the storage itself, so the last
    /// part takes it out.
    loan: Option<Loan<Arc<Storage>>>,
    /// Whether the device may go on using the block for ever.
    quarantined: bool,
}

/// Keeps a stream of a user's what it is, from its first use for a block until its position is
/// noted.
#[derive(Debug)]
pub(crate) struct StreamUse {
    /// Keeps the stream's number from being given to another one.
    pub(crate) _number: Arc<()>,
    /// Keeps the stream itself, where that is possible.
    pub(crate) _stream: Option<Arc<dyn Any + Send + Sync>>,
}

#[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "other devices have none"))]
impl StreamUse {
    /// Whether both keep the same stream.
    fn keeps_that_of(&self, other: &Self) -> bool {
        let pair = self._stream.as_ref().zip(other._stream.as_ref());
        pair.is_some_and(|(one, other)| std::ptr::addr_eq(Arc::as_ptr(one), Arc::as_ptr(other)))
    }
}

/// Counts one more while it exists.
#[derive(Debug)]
pub(crate) struct Held(Arc<AtomicUsize>);

impl Held {
    pub(crate) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(count))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Storage {
    pub(crate) fn new(block: DeviceLease, memory: &MemoryManager) -> Arc<Self> {
        let (block, memory) = (Some(block), memory.clone());
        Arc::new(Self { block, memory, parts: Mutex::new(Parts::default()) })
    }

    pub(crate) fn block(&self) -> &DeviceBlock {
        self.block.as_ref().expect("a block until it is dropped")
    }

    pub(crate) fn memory(&self) -> &MemoryManager {
        &self.memory
    }

    /// Gives the block up: it will be neither used again nor freed.
    pub(crate) fn quarantine(&self) {
        self.parts.lock().quarantined = true;
    }

    /// After a part was given back, under the same lock: sends the memory home if it was the last.
    fn settle(&self, mut parts: MutexGuard<'_, Parts>) {
        if parts.shares > 0 || parts.holds > 0 {
            return;
        }
        let (loan, quarantined) = (parts.loan.take(), parts.quarantined);
        drop(parts);
        // A view borrows its tensor, so none is left; one that was forgotten must not count on.
        self.block().usage.lock().views = 0;
        // A block of no pool goes home with the storage.
        let Some(loan) = loan else { return };
        if quarantined {
            drop(loan.keep());
        } else {
            output_freed(self.block(), self.memory.device());
        }
    }
}

impl Drop for Storage {
    fn drop(&mut self) {
        let quarantined = self.parts.lock().quarantined;
        if let Some(block) = self.block.take().filter(|_| quarantined) {
            block.quarantine();
        }
    }
}

/// A user's part in a block, which all tensors of a batch have.
#[derive(Debug)]
pub(crate) struct Share(Arc<Storage>);

impl Share {
    pub(crate) fn new(storage: Arc<Storage>) -> Self {
        storage.parts.lock().shares += 1;
        Self(storage)
    }

    /// The first share in memory that a loader's pool lends; the last part returns the loan.
    pub(crate) fn lent(loan: Loan<Arc<Storage>>) -> Self {
        let share = Self::new(Arc::clone(&loan));
        share.0.parts.lock().loan = Some(loan);
        share
    }

    pub(crate) fn storage(&self) -> &Storage {
        &self.0
    }

    /// Hands a batch to the consumer, whose work runs on this stream.
    pub(crate) fn hand_to(&self, stream: StreamId, held: Held) {
        self.use_on(stream);
        let before = self.0.parts.lock().held.replace(held);
        debug_assert!(before.is_none(), "a batch was handed out twice");
    }

    /// Notes that work on this stream may use the block from now on.
    pub(crate) fn use_on(&self, stream: StreamId) {
        self.0.parts.lock().used_on |= 1 << stream;
    }

    /// As [`use_on`](Self::use_on), for a stream of a user's.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code, reason = "other devices have none"))]
    pub(crate) fn use_by(&self, stream: StreamId, using: Option<StreamUse>) {
        let mut parts = self.0.parts.lock();
        let known = parts.used_on & 1 << stream != 0;
        // Who bound it before may not have kept the stream.
        let kept = |using: &StreamUse| {
            using._stream.is_none() || parts.uses.iter().any(|other| other.keeps_that_of(using))
        };
        if !known || !using.as_ref().is_none_or(kept) {
            parts.used_on |= 1 << stream;
            parts.uses.extend(using);
        }
    }

    /// Notes where this stream is now: the block's next writer comes after that.
    pub(crate) fn note_position(&self, stream: StreamId) {
        let core = self.0.memory.device().core();
        match core.health().notice(core.backend().consumer_position(stream)) {
            Ok(fence) => self.0.block().usage.lock().note_read(fence),
            Err(_) => self.0.quarantine(),
        }
    }

    /// A part for an operation.
    pub(crate) fn hold(&self) -> Hold {
        self.0.parts.lock().holds += 1;
        Hold(Arc::clone(&self.0))
    }
}

impl Clone for Share {
    fn clone(&self) -> Self {
        Self::new(Arc::clone(&self.0))
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        let storage = &*self.0;
        let mut parts = storage.parts.lock();
        // The last share: nobody can clone it meanwhile, and it counts until the positions are
        // noted.
        if parts.shares == 1 && parts.used_on != 0 {
            let (used_on, held) = (std::mem::take(&mut parts.used_on), parts.held.take());
            let uses = std::mem::take(&mut parts.uses);
            drop(parts);
            for stream in (0u8..).take(MAX_STREAMS).filter(|stream| used_on >> stream & 1 == 1) {
                self.note_position(stream);
            }
            drop((uses, held));
            parts = storage.parts.lock();
        }
        parts.shares -= 1;
        storage.settle(parts);
    }
}

/// The part of an operation in a block, until the device is done with it.
#[derive(Debug)]
pub(crate) struct Hold(Arc<Storage>);

impl Hold {
    pub(crate) fn storage(&self) -> &Storage {
        &self.0
    }

    /// Whether both are parts in one block.
    pub(crate) fn is_beside(&self, other: &Hold) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut parts = self.0.parts.lock();
        parts.holds -= 1;
        self.0.settle(parts);
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::thread;

    use super::*;
    use crate::memory::{Patience, Pool};
    use crate::{Device, MemoryManager};

    /// A tensor is dropped while an operation ends, and the next batch waits for the memory: it
    /// comes home once, and only after both.
    #[test]
    fn loom_the_last_part_returns_the_memory() {
        loom::model(|| {
            let memory = MemoryManager::new(&Device::host());
            let block = memory.block(16, Patience::None).unwrap();
            let pool = Pool::stocked("outputs", vec![Storage::new(block, &memory)], false);
            let none = || unreachable!("a stocked pool makes nothing");
            let share = Share::lent(pool.acquire(Patience::None, none).unwrap());
            let hold = share.hold();
            let parts = Arc::new(AtomicUsize::new(2));
            let user = {
                let parts = Arc::clone(&parts);
                thread::spawn(move || {
                    let clone = share.clone();
                    drop(share);
                    parts.fetch_sub(1, Ordering::AcqRel);
                    drop(clone);
                })
            };
            let reaper = {
                let parts = Arc::clone(&parts);
                thread::spawn(move || {
                    parts.fetch_sub(1, Ordering::AcqRel);
                    drop(hold);
                })
            };
            let next = pool.acquire(Patience::Forever, none).unwrap();
            assert_eq!(parts.load(Ordering::Acquire), 0);
            let share = Share::lent(next);
            user.join().unwrap();
            reaper.join().unwrap();
            assert_eq!(pool.counts().in_use, 1);
            drop(share);
            assert_eq!(pool.counts().available, 1);
        });
    }
}
