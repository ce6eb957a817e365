//! Which process this is. A child of a fork has its parent's memory and none of its threads, and no
//! part in its devices: what belongs to threads and devices keeps whose it is, and asks before it
//! waits or calls.
#![allow(unsafe_code, reason = "has the system call a function in children")]

/// A process, or a child of it by a fork. The system's number would do too, but is a call of the
/// system each time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process(usize);

#[cfg(unix)]
mod forks {
    use std::sync::Once;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// How often this process, and those that it is a child of, came of a fork.
    static FORKS: AtomicUsize = AtomicUsize::new(0);

    extern "C" fn in_a_child() {
        FORKS.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count() -> usize {
        static COUNTED: Once = Once::new();
        COUNTED.call_once(|| {
            // SAFETY: the function takes no lock and allocates nothing, as it must in a child. Where
            // there is no memory to note it, forks are not noticed.
            unsafe { libc::pthread_atfork(None, None, Some(in_a_child)) };
        });
        FORKS.load(Ordering::Relaxed)
    }
}

impl Process {
    /// The one that this is called in.
    pub(crate) fn current() -> Self {
        #[cfg(unix)]
        return Self(forks::count());
        #[cfg(not(unix))]
        Self(0)
    }

    /// Whether this is called in a child of it.
    pub(crate) fn is_gone(self) -> bool {
        self != Self::current()
    }
}
