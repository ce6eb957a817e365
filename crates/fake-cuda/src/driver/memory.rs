//! Memory that the driver knows of. Device memory is memory of the host, under its own addresses,
//! so that kernels that are built for the host run on it.
//!
//! What was freed stays allocated for a while, full of a pattern: stale reads see it, and stale
//! writes are found when the pattern is looked at.

use std::alloc::{Layout, alloc, dealloc};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What freed memory is full of.
const FREED: u8 = 0xDB;
/// What new memory is full of: its content is undefined.
const FRESH: u8 = 0xCD;
/// What lies behind each allocation.
const BORDER: u8 = 0xFD;
/// Bytes of that.
const BORDER_LEN: usize = 256;
/// As the driver aligns.
const ALIGNMENT: usize = 4096;
/// Bytes of freed memory that stay allocated.
const KEPT: usize = 64 << 20;

/// What memory is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// From `cuMemAlloc`.
    Device,
    /// From `cuMemHostAlloc`.
    PageLocked,
    /// The caller's, registered.
    Registered {
        /// The device only reads it.
        read_only: bool,
    },
    /// The caller's: for copies that are over when the call returns.
    Ordinary,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Device => "device memory",
            Kind::PageLocked => "page-locked memory",
            Kind::Registered { .. } => "registered memory",
            Kind::Ordinary => "ordinary memory",
        }
    }
}

/// A range of memory. What is still to work on it holds it.
#[derive(Debug)]
pub(crate) struct Block {
    pub(crate) base: usize,
    pub(crate) len: usize,
    pub(crate) kind: Kind,
    /// The context that it was made in.
    pub(crate) context: usize,
    /// Where it is ours to free.
    layout: Option<Layout>,
    /// Freed, while work named it.
    freed_in_use: AtomicBool,
    freed: AtomicBool,
}

impl Block {
    /// # Errors
    /// The system has no such memory.
    pub(crate) fn allocate(len: usize, kind: Kind, context: usize) -> Option<Arc<Self>> {
        let whole = len.checked_add(BORDER_LEN)?;
        let layout = Layout::from_size_align(whole, ALIGNMENT).ok()?;
        // SAFETY: the size is not 0.
        let at = unsafe { alloc(layout) };
        if at.is_null() {
            return None;
        }
        let block = Self {
            base: at as usize,
            len,
            kind,
            context,
            layout: Some(layout),
            freed_in_use: AtomicBool::new(false),
            freed: AtomicBool::new(false),
        };
        block.fill(0, len, FRESH);
        block.fill(len, BORDER_LEN, BORDER);
        Some(Arc::new(block))
    }

    /// Memory of the caller.
    pub(crate) fn foreign(base: usize, len: usize, kind: Kind, context: usize) -> Arc<Self> {
        Arc::new(Self {
            base,
            len,
            kind,
            context,
            layout: None,
            freed_in_use: AtomicBool::new(false),
            freed: AtomicBool::new(false),
        })
    }

    /// Whether work may still touch it: what was allocated here stays allocated as long as
    /// something holds it, but of what the caller unregistered nothing is known.
    pub(crate) fn is_there(&self) -> bool {
        self.layout.is_some() || !self.is_freed()
    }

    pub(crate) fn is_freed(&self) -> bool {
        self.freed.load(Ordering::SeqCst)
    }

    pub(crate) fn border_is_intact(&self) -> bool {
        self.layout.is_none() || self.is_full_of(self.len, BORDER_LEN, BORDER)
    }

    fn content_is_untouched(&self) -> bool {
        self.freed_in_use.load(Ordering::SeqCst) || self.is_full_of(0, self.len, FREED)
    }

    fn fill(&self, offset: usize, len: usize, byte: u8) {
        // SAFETY: called for memory of our own and within what was allocated.
        unsafe { std::ptr::write_bytes((self.base + offset) as *mut u8, byte, len) };
    }

    fn is_full_of(&self, offset: usize, len: usize, byte: u8) -> bool {
        let pattern = [byte; 4096];
        // SAFETY: called for memory of our own and within what was allocated.
        let bytes = unsafe { std::slice::from_raw_parts((self.base + offset) as *const u8, len) };
        bytes.chunks(pattern.len()).all(|chunk| *chunk == pattern[..chunk.len()])
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if let Some(layout) = self.layout {
            // SAFETY: it was allocated with this layout, and nothing else frees it.
            unsafe { dealloc(self.base as *mut u8, layout) };
        }
    }
}

/// A range within a block.
#[derive(Debug, Clone)]
pub(crate) struct Place {
    pub(crate) block: Arc<Block>,
    pub(crate) address: usize,
}

/// All memory that the driver knows of, by address.
#[derive(Debug, Default)]
pub(crate) struct Memory {
    live: BTreeMap<usize, Arc<Block>>,
    freed: VecDeque<Arc<Block>>,
    freed_bytes: usize,
    /// Bytes of device memory, by context.
    used: BTreeMap<usize, usize>,
}

impl Memory {
    pub(crate) fn add(&mut self, block: Arc<Block>) {
        if block.kind == Kind::Device {
            *self.used.entry(block.context).or_default() += block.len;
        }
        self.live.insert(block.base, block);
    }

    /// Bytes of device memory that live in a context.
    pub(crate) fn used(&self, context: usize) -> usize {
        self.used.get(&context).copied().unwrap_or(0)
    }

    /// The block that starts at an address.
    pub(crate) fn starting_at(&self, address: usize) -> Option<&Arc<Block>> {
        self.live.get(&address)
    }

    /// The block that an address lies in.
    pub(crate) fn around(&self, address: usize) -> Option<&Arc<Block>> {
        let (_, block) = self.live.range(..=address).next_back()?;
        (address - block.base < block.len).then_some(block)
    }

    /// The block that an address lies in, and where it is registered memory the pieces that follow
    /// it without a gap: one address is enough to reach all of them.
    pub(crate) fn reached_from(&self, address: usize) -> impl Iterator<Item = &Arc<Block>> {
        let first = self.around(address);
        let mut next = first.map_or(usize::MAX, |block| block.base);
        self.live.range(next..).map(|(_, block)| block).take_while(move |block| {
            let follows = block.base == next && matches!(block.kind, Kind::Registered { .. });
            let taken = follows || first.is_some_and(|first| Arc::ptr_eq(first, block));
            next = block.base + block.len;
            taken
        })
    }

    /// A block that lies in a range or reaches into it.
    pub(crate) fn touching(&self, address: usize, len: usize) -> Option<&Arc<Block>> {
        let (_, block) = self.live.range(..address.saturating_add(len)).next_back()?;
        (block.base + block.len > address).then_some(block)
    }

    pub(crate) fn was_freed(&self, address: usize) -> bool {
        self.freed.iter().any(|block| address.wrapping_sub(block.base) < block.len)
    }

    /// # Errors
    /// Why the range is not within one live block.
    pub(crate) fn find(&self, address: usize, len: usize) -> Result<Place, String> {
        let Some(block) = self.around(address) else {
            let why = if self.was_freed(address) { "was freed" } else { "is unknown" };
            return Err(format!("memory at {address:#x} {why}"));
        };
        if len > block.len - (address - block.base) {
            return Err(format!(
                "{len} bytes at {address:#x} end behind {} of {} bytes at {:#x}",
                block.kind.name(),
                block.len,
                block.base
            ));
        }
        Ok(Place { block: Arc::clone(block), address })
    }

    /// Takes a block out and fills it with the pattern. `in_use`: work still names it. Returns what
    /// was found wrong.
    pub(crate) fn free(&mut self, block: &Arc<Block>, in_use: bool) -> Vec<String> {
        self.live.remove(&block.base);
        if let Some(used) = self.used.get_mut(&block.context)
            && block.kind == Kind::Device
        {
            *used -= block.len;
        }
        block.freed_in_use.store(in_use, Ordering::SeqCst);
        block.freed.store(true, Ordering::SeqCst);
        if block.layout.is_none() {
            return Vec::new();
        }
        let mut faults = Vec::new();
        faults.extend(border_fault(block));
        block.fill(0, block.len, FREED);
        block.fill(block.len, BORDER_LEN, BORDER);
        self.freed_bytes += block.len;
        self.freed.push_back(Arc::clone(block));
        while self.freed_bytes > KEPT
            && let Some(oldest) = self.freed.pop_front()
        {
            self.freed_bytes -= oldest.len;
            faults.extend(freed_fault(&oldest));
        }
        faults
    }

    /// Looks at all patterns. What is found is told once.
    pub(crate) fn inspect(&mut self) -> Vec<String> {
        let mut faults: Vec<_> = self.live.values().filter_map(border_fault).collect();
        for block in &self.freed {
            if let Some(fault) = freed_fault(block) {
                faults.push(fault);
                block.fill(0, block.len, FREED);
            }
        }
        faults
    }

    /// Of these contexts, or of all.
    pub(crate) fn count(&self, kind: impl Fn(Kind) -> bool) -> usize {
        self.live.values().filter(|block| kind(block.kind)).count()
    }

    pub(crate) fn of_context(&self, context: usize) -> Vec<Arc<Block>> {
        self.live.values().filter(|block| block.context == context).cloned().collect()
    }

    /// Gives up everything. What the host may still use stays allocated for good.
    pub(crate) fn abandon(self) {
        for block in self.live.into_values() {
            if block.kind == Kind::PageLocked {
                std::mem::forget(block);
            }
        }
    }
}

/// Whether somebody wrote behind the end; told once.
pub(crate) fn border_fault(block: &Arc<Block>) -> Option<String> {
    if block.border_is_intact() {
        return None;
    }
    block.fill(block.len, BORDER_LEN, BORDER);
    Some(format!(
        "something wrote behind the end of {} of {} bytes at {:#x}",
        block.kind.name(),
        block.len,
        block.base
    ))
}

fn freed_fault(block: &Arc<Block>) -> Option<String> {
    (!block.content_is_untouched()).then(|| {
        format!(
            "something wrote to {} of {} bytes at {:#x} after it was freed",
            block.kind.name(),
            block.len,
            block.base
        )
    })
}
