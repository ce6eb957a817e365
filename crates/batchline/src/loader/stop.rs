//! The threads of a pipeline: started by name, counted, and joined within bounds.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crate::memory::Patience;
use crate::sync::{Condvar, Mutex, spawn_named};
use crate::{Error, Result};

/// The threads of one generation.
#[derive(Debug, Default)]
pub(crate) struct Threads {
    state: Arc<State>,
    handles: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug, Default)]
struct State {
    alive: Mutex<usize>,
    gone: Condvar,
}

/// Counts a thread out when it ends, however it ends.
struct Exit(Arc<State>);

impl Drop for Exit {
    fn drop(&mut self) {
        *self.0.alive.lock() -= 1;
        self.0.gone.notify_all();
    }
}

impl Threads {
    /// Starts a thread. A panic of `body` ends up in `panicked`.
    pub(crate) fn spawn(
        &self,
        name: String,
        body: impl FnOnce() + Send + 'static,
        panicked: impl FnOnce(&(dyn std::any::Any + Send)) + Send + 'static,
    ) -> Result<()> {
        *self.state.alive.lock() += 1;
        let exit = Exit(Arc::clone(&self.state));
        let run = move || {
            let exit = exit;
            if let Err(panic) = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)) {
                panicked(&*panic);
            }
            drop(exit);
        };
        let handle = spawn_named(name.clone(), run)
            .map_err(|source| Error::Thread { name, source: Arc::new(source) })?;
        self.handles.lock().push(handle);
        Ok(())
    }

    /// Threads that have not ended.
    pub(crate) fn alive(&self) -> usize {
        *self.state.alive.lock()
    }

    /// Joins all threads; gives those up that have not ended within `timeout` and returns how many
    /// they were.
    pub(crate) fn join(&self, timeout: Duration) -> usize {
        let patience = Patience::within(timeout);
        let mut alive = self.state.alive.lock();
        while *alive > 0
            && let Some(left) = patience.left()
        {
            alive = self.state.gone.wait_at_most(alive, left);
        }
        drop(alive);
        let handles = std::mem::take(&mut *self.handles.lock());
        if handles.is_empty() {
            // Joined before, or given up before and still there.
            return self.alive();
        }
        let mut detached = 0;
        let me = std::thread::current().id();
        for handle in handles {
            // A thread that has counted itself out is about to end.
            if self.alive() == 0 || handle.is_finished() {
                if handle.thread().id() != me {
                    let _ = handle.join();
                }
            } else {
                detached += 1;
            }
        }
        detached
    }
}
