//! What streams do.

use std::ffi::c_void;
use std::sync::Arc;

use super::kernels;
use super::memory::{Block, Kind, Place};
use super::random::Random;

/// `void (*)(void *)`.
pub(crate) type HostFunction = extern "C" fn(*mut c_void);

/// One thing to do.
#[derive(Debug, Clone)]
pub(crate) enum Work {
    /// Nothing but to be passed: a recorded event.
    Mark,
    /// Nothing but to come after something.
    Wait,
    Copy(Transfer),
    /// Copies in any order.
    Batch(Vec<Transfer>),
    Fill {
        to: Place,
        element: [u8; 4],
        width: usize,
        count: usize,
    },
    Kernel(Launch),
    Host(HostCall),
}

/// Where a copy's bytes come from.
#[derive(Debug, Clone)]
pub(crate) enum Source {
    Place(Place),
    /// Read when it was asked for.
    Bytes(Arc<[u8]>),
}

#[derive(Debug, Clone)]
pub(crate) struct Transfer {
    pub(crate) from: Source,
    pub(crate) to: Place,
    pub(crate) len: usize,
}

/// A kernel and what it was given.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(crate) name: Arc<str>,
    /// Where the kernel is from.
    pub(crate) module: usize,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared: u32,
    /// Bytes of each parameter, each on an address that any type can have.
    pub(crate) parameters: Vec<Vec<u128>>,
    /// The memory that the parameters point to.
    pub(crate) memory: Vec<Arc<Block>>,
    /// A parameter that points to freed memory.
    pub(crate) fault: Option<String>,
}

/// A function of the host.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HostCall {
    pub(crate) function: HostFunction,
    /// An address, as only the function knows to whom it belongs.
    pub(crate) data: usize,
}

impl HostCall {
    pub(crate) fn call(self) {
        (self.function)(self.data as *mut c_void);
    }
}

impl Work {
    /// The memory that it names.
    pub(crate) fn blocks(&self) -> Vec<&Arc<Block>> {
        match self {
            Work::Mark | Work::Wait | Work::Host(_) => Vec::new(),
            Work::Copy(copy) => copy.blocks(),
            Work::Batch(copies) => copies.iter().flat_map(Transfer::blocks).collect(),
            Work::Fill { to, .. } => vec![&to.block],
            Work::Kernel(launch) => launch.memory.iter().collect(),
        }
    }

    /// Whether it does something, besides putting things in order.
    pub(crate) fn is_effective(&self) -> bool {
        !matches!(self, Work::Mark | Work::Wait)
    }

    pub(crate) fn describe(&self) -> String {
        match self {
            Work::Mark => "event".into(),
            Work::Wait => "wait".into(),
            Work::Copy(copy) => copy.describe(),
            Work::Batch(copies) => format!("batch of {}", copies.len()),
            Work::Fill { width, count, .. } => format!("fill of {} bytes", width * count),
            Work::Kernel(Launch { name, grid, block, shared, .. }) => {
                format!("kernel {name}, {grid:?} blocks of {block:?} threads and {shared} bytes")
            }
            Work::Host(_) => "host function".into(),
        }
    }

    /// Does it. The host's functions are called elsewhere.
    ///
    /// # Errors
    /// What was illegal.
    pub(crate) fn run(&self, seed: u64) -> Result<(), String> {
        match self {
            Work::Mark | Work::Wait | Work::Host(_) => {}
            Work::Copy(copy) => copy.run(),
            Work::Batch(copies) => {
                let mut left: Vec<_> = copies.iter().collect();
                let mut random = Random::new(seed);
                while !left.is_empty() {
                    left.swap_remove(random.index(left.len())).run();
                }
            }
            Work::Fill { to, element, width, count } => {
                for at in 0..if to.block.is_there() { *count } else { 0 } {
                    let at = (to.address + at * width) as *mut u8;
                    // SAFETY: the range was checked, and the block is held.
                    unsafe { std::ptr::copy_nonoverlapping(element.as_ptr(), at, *width) };
                }
            }
            Work::Kernel(launch) => kernels::launch(launch)?,
        }
        Ok(())
    }
}

impl Transfer {
    fn blocks(&self) -> Vec<&Arc<Block>> {
        match &self.from {
            Source::Place(from) => vec![&from.block, &self.to.block],
            Source::Bytes(_) => vec![&self.to.block],
        }
    }

    fn describe(&self) -> String {
        let from_device = match &self.from {
            Source::Place(from) => from.block.kind == Kind::Device,
            Source::Bytes(_) => false,
        };
        let name = match (from_device, self.to.block.kind == Kind::Device) {
            (false, true) => "upload",
            (true, false) => "download",
            _ => "copy",
        };
        format!("{name} of {} bytes", self.len)
    }

    fn run(&self) {
        if self.blocks().iter().any(|block| !block.is_there()) {
            return;
        }
        let to = self.to.address as *mut u8;
        let from = match &self.from {
            Source::Place(from) => from.address as *const u8,
            Source::Bytes(bytes) => bytes.as_ptr(),
        };
        // SAFETY: both ranges were checked, and what they lie in is held. They may overlap.
        unsafe { std::ptr::copy(from, to, self.len) };
    }
}

/// The bytes at a place, now.
pub(crate) fn read(place: &Place, len: usize) -> Arc<[u8]> {
    // SAFETY: the range was checked, and the block is held.
    unsafe { std::slice::from_raw_parts(place.address as *const u8, len) }.into()
}
