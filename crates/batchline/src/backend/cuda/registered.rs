//! Memory of a data set, registered with the driver so that a device reads it by itself.
//!
//! A process can register memory once only, whatever the number of devices, handles to them, and
//! loaders that read it. So there is one table of what is registered, by pieces that know how many
//! use them. It stays locked while the driver registers and unregisters: nobody finds memory taken
//! that its last user is about to give up.
//!
//! No byte is registered that was not asked for, though the driver locks whole pages: it refuses
//! copies of memory that is registered in part, and what else lies on a page is somebody else's.
#![allow(unsafe_code, reason = "registers memory, and promises that the device can read it")]

use std::any::Any;
use std::collections::BTreeMap;
use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::{Arc, LazyLock};

use super::context::{Context, Entered};
use super::driver::{Address, Code, code};
use crate::backend::RegisteredMemory;
use crate::sync::Mutex;
use crate::{Error, Result};

/// Pieces end at multiples of this: drivers refuse large ones, and hold locks of the whole system
/// while they work on one.
const PIECE: usize = 256 << 20;

/// `CU_MEMHOSTREGISTER_PORTABLE`: for every context.
pub(super) const PORTABLE: u32 = 1;
/// `CU_MEMHOSTREGISTER_DEVICEMAP`: kernels can read it.
pub(super) const MAPPED: u32 = 2;
/// `CU_MEMHOSTREGISTER_READ_ONLY`: the device only reads it. Without it the process must be able to
/// write the memory, as it can't where a file is mapped for reading.
const READ_ONLY: u32 = 8;

static TABLE: LazyLock<Mutex<Table<Arc<Context>>>> = LazyLock::new(Mutex::default);

/// What is registered, in pieces that don't overlap, each with who registered it. Addresses are
/// those of the host.
#[derive(Debug)]
struct Table<W>(BTreeMap<usize, Piece<W>>);

#[derive(Debug)]
struct Piece<W> {
    end: usize,
    users: usize,
    who: W,
}

impl<W> Default for Table<W> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<W: Clone> Table<W> {
    /// Adds a user to the pieces that cover a range; those that are not there yet are registered.
    /// Returns where they begin, and an error with those that have the user already.
    fn add<E>(
        &mut self,
        range: Range<usize>,
        piece: usize,
        who: &W,
        mut register: impl FnMut(Range<usize>) -> Result<(), E>,
    ) -> Result<Vec<usize>, (Vec<usize>, E)> {
        let mut starts = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let known = self.0.range_mut(..=at).next_back();
            if let Some((start, piece)) = known.filter(|(_, piece)| piece.end > at) {
                piece.users += 1;
                starts.push(*start);
                at = piece.end;
                continue;
            }
            let bound = (at / piece).saturating_add(1).saturating_mul(piece).min(range.end);
            let end = self.0.range(at..bound).next().map_or(bound, |(start, _)| *start);
            if let Err(error) = register(at..end) {
                return Err((starts, error));
            }
            self.0.insert(at, Piece { end, users: 1, who: who.clone() });
            starts.push(at);
            at = end;
        }
        Ok(starts)
    }

    /// Takes a user from each piece; those that have none left go.
    fn remove(&mut self, starts: &[usize], mut unregister: impl FnMut(usize, W)) {
        for start in starts {
            let piece = self.0.get_mut(start).expect("a piece stays while it has users");
            piece.users -= 1;
            if piece.users == 0
                && let Some(piece) = self.0.remove(start)
            {
                unregister(*start, piece.who);
            }
        }
    }
}

/// See the [module](self).
#[derive(Debug)]
pub(super) struct CudaRegistered {
    range: Range<usize>,
    /// Where the pieces begin that cover it, in order.
    starts: Vec<usize>,
    /// The device's address of the first byte. The others follow.
    pub(super) device: Address,
    context: Arc<Context>,
}

impl CudaRegistered {
    /// # Errors
    /// The driver does not register this memory. That is no harm to the device: were it lost, its
    /// next call would say so.
    ///
    /// # Safety
    /// As [`Backend::register`](crate::backend::Backend::register).
    pub(super) unsafe fn new(context: &Arc<Context>, memory: NonNull<[u8]>) -> Result<Self> {
        let entered = context.enter()?;
        let refused = |code| Error::Device {
            device: context.info.name.clone(),
            operation: "registering memory of a data set",
            source: context.driver.cause(code),
        };
        if !context.host_access.registers {
            return Err(refused(code::NOT_SUPPORTED));
        }
        let start = memory.as_ptr().addr();
        let range = start..start + memory.len();
        let flags = PORTABLE | MAPPED | if context.host_access.read_only { READ_ONLY } else { 0 };
        let mut table = TABLE.lock();
        let pieces = table.add(range.clone(), PIECE, context, |piece| {
            // SAFETY: the caller keeps the memory where it is until it is unregistered.
            let code = unsafe {
                let start = piece.start as *mut c_void;
                (entered.driver().cuMemHostRegister_v2)(start, piece.len(), flags)
            };
            if code == code::SUCCESS { Ok(()) } else { Err(code) }
        });
        let outcome = match pieces {
            Ok(starts) => match device_address(&entered, &range, &starts) {
                Ok(device) => Ok((starts, device)),
                Err(code) => Err((starts, code)),
            },
            Err(failure) => Err(failure),
        };
        match outcome {
            Ok((starts, device)) => {
                Ok(Self { range, starts, device, context: Arc::clone(context) })
            }
            Err((starts, code)) => {
                table.remove(&starts, |start, who| unregister(start, &who, context));
                Err(refused(code))
            }
        }
    }

    pub(super) fn of(memory: &dyn RegisteredMemory) -> Option<&Self> {
        (memory as &dyn Any).downcast_ref()
    }

    pub(super) fn is_of(&self, context: &Arc<Context>) -> bool {
        Arc::ptr_eq(&self.context, context)
    }

    /// The host's address of the first byte.
    pub(super) fn address(&self) -> usize {
        self.range.start
    }

    /// The addresses within it that a copy must not cross, in order.
    pub(super) fn bounds(&self) -> &[usize] {
        self.starts.get(1..).unwrap_or_default()
    }
}

/// The device's address of the first byte of a range, which others follow for all its pieces.
pub(super) fn device_address(
    entered: &Entered<'_>,
    range: &Range<usize>,
    starts: &[usize],
) -> Result<Address, Code> {
    let mut first = 0;
    for start in starts.iter().map(|start| *start.max(&range.start)) {
        let mut address = 0;
        // SAFETY: `address` is a place for the answer; an address that is not registered is refused.
        let code = unsafe {
            let start = start as *mut c_void;
            (entered.driver().cuMemHostGetDevicePointer_v2)(&raw mut address, start, 0)
        };
        if code != code::SUCCESS {
            return Err(code);
        }
        if start == range.start {
            first = address;
        } else if address.wrapping_sub(first) != (start - range.start) as u64 {
            return Err(code::NOT_SUPPORTED);
        }
    }
    Ok(first)
}

/// Takes a piece back from the driver, by way of the context that it was registered in, or of its
/// last user's where that one is lost.
fn unregister(start: usize, who: &Context, last: &Context) {
    // What a lost device may still read stays registered.
    let Ok(entered) = who.enter().or_else(|_| last.enter()) else { return };
    // SAFETY: registered with this start, and its last user is gone.
    unsafe { (entered.driver().cuMemHostUnregister)(start as *mut c_void) };
}

// SAFETY: it is registered as long as this lives, in pieces whose addresses on the device follow
// one another; its owner keeps it that long.
unsafe impl RegisteredMemory for CudaRegistered {
    fn len(&self) -> u64 {
        self.range.len() as u64
    }
}

impl Drop for CudaRegistered {
    fn drop(&mut self) {
        // In a child nobody may ever unlock the table.
        if !self.context.is_forked() {
            let last = &self.context;
            TABLE.lock().remove(&self.starts, |start, who| unregister(start, &who, last));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Log = std::cell::RefCell<Vec<Range<usize>>>;

    fn add(table: &mut Table<u8>, range: Range<usize>, log: &Log) -> Vec<usize> {
        let noted = |piece| {
            log.borrow_mut().push(piece);
            Ok::<_, ()>(())
        };
        table.add(range, 100, &1, noted).unwrap()
    }

    #[test]
    fn only_gaps_are_registered_and_only_the_last_user_unregisters() {
        let (mut table, log) = (Table::default(), Log::default());
        let first = add(&mut table, 130..260, &log);
        assert_eq!(first, [130, 200]);
        assert_eq!(log.take(), [130..200, 200..260]);
        // Around it, and up to the next bound.
        let second = add(&mut table, 90..310, &log);
        assert_eq!(second, [90, 100, 130, 200, 260, 300]);
        assert_eq!(log.take(), [90..100, 100..130, 260..300, 300..310]);
        // Within one piece of it.
        let third = add(&mut table, 210..220, &log);
        assert_eq!((third.clone(), log.take()), (vec![200], vec![]));
        let gone = Log::default();
        let mut remove = |starts: &[usize]| {
            table.remove(starts, |start, _| gone.borrow_mut().push(start..start));
            gone.take()
        };
        assert!(remove(&first).is_empty());
        assert_eq!(remove(&second), [90..90, 100..100, 130..130, 260..260, 300..300]);
        assert_eq!(remove(&third), vec![200..200]);
        assert!(table.0.is_empty());
    }

    #[test]
    fn a_refusal_leaves_all_as_it_was() {
        let (mut table, log) = (Table::default(), Log::default());
        let first = add(&mut table, 150..180, &log);
        let mut left = 2;
        let refuse = |_| {
            left -= 1;
            if left == 0 { Err("refused") } else { Ok(()) }
        };
        let (starts, error) = table.add(120..300, 100, &2, refuse).unwrap_err();
        assert_eq!((starts.clone(), error), (vec![120, 150], "refused"));
        let mut gone = Vec::new();
        table.remove(&starts, |start, who| gone.push((start, who)));
        assert_eq!(gone, [(120, 2)]);
        assert_eq!(table.0.keys().copied().collect::<Vec<_>>(), first);
    }

    #[test]
    fn nothing_and_the_end_of_all_addresses() {
        let (mut table, log) = (Table::default(), Log::default());
        assert!(add(&mut table, 7..7, &log).is_empty());
        let end = usize::MAX;
        assert_eq!(add(&mut table, end - 3..end, &log), [end - 3]);
        assert_eq!(log.take(), vec![end - 3..end]);
    }
}
