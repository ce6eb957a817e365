//! Whether the device still works; and wgpu's errors as values.
//!
//! wgpu tells of failures in four ways: error scopes (of one thread), the handler of uncaptured
//! errors (panics by default), the callback for a lost device, and panics out of `Device::poll`.
//! On a lost device most calls fail *silently*: they return objects that are no good. So the loss
//! is kept here as a level, is asked for at the start of every call, and is also inferred from
//! what can't happen on a device that works.

use std::sync::{Arc, OnceLock};

use crate::sync::Mutex;
use crate::{Error, Result};

/// Shared with wgpu's callbacks, which only set it.
#[derive(Debug)]
pub(super) struct Health {
    device: String,
    /// Why the device is lost, once it is.
    lost: OnceLock<String>,
    /// The last error that no scope caught: of the user's own calls on a device that we opened.
    stray: Mutex<Option<wgpu::Error>>,
}

impl Health {
    pub(super) fn new(device: String) -> Arc<Self> {
        Arc::new(Self { device, lost: OnceLock::new(), stray: Mutex::new(None) })
    }

    /// Takes the callbacks of a device of our own. On somebody else's device they are his.
    pub(super) fn watch(self: &Arc<Self>, device: &wgpu::Device) {
        let health = Arc::clone(self);
        device.on_uncaptured_error(Arc::new(move |error| *health.stray.lock() = Some(error)));
        let health = Arc::clone(self);
        device.set_device_lost_callback(move |reason, message| {
            let _ = health.lost.set(if message.is_empty() {
                format!("{reason:?}").to_lowercase()
            } else {
                message
            });
        });
    }

    /// # Errors
    /// [`Error::DeviceLost`].
    pub(super) fn check(&self) -> Result<()> {
        match self.lost() {
            Some(lost) => Err(lost),
            None => Ok(()),
        }
    }

    /// # Errors
    /// What the user's own calls on our device did wrong since the last time, if anything.
    pub(super) fn take_stray(&self) -> Result<()> {
        match self.stray.lock().take() {
            Some(error) => Err(self.failed("an earlier call from outside batchline", error)),
            None => Ok(()),
        }
    }

    pub(super) fn lost(&self) -> Option<Error> {
        let reason = self.lost.get()?.clone();
        Some(Error::DeviceLost { device: self.device.clone(), reason })
    }

    /// Marks the device as lost for good. The first reason stays.
    pub(super) fn lose(&self, reason: impl Into<String>) -> Error {
        let reason = self.lost.get_or_init(|| reason.into()).clone();
        Error::DeviceLost { device: self.device.clone(), reason }
    }

    pub(super) fn failed(
        &self,
        operation: &'static str,
        source: impl std::error::Error + Send + Sync + 'static,
    ) -> Error {
        Error::Device { device: self.device.clone(), operation, source: Arc::new(source) }
    }
}

/// Runs `work` with scopes for every kind of error, and gives the first error with the result.
///
/// Scopes belong to the thread, so a user's scopes on his own device do not see our errors.
pub(super) fn scoped<T>(
    device: &wgpu::Device,
    work: impl FnOnce() -> T,
) -> (T, Option<wgpu::Error>) {
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
    let result = work();
    // In reverse, as wgpu demands; the futures are ready at once on native devices. When `work`
    // panics the guards are dropped in that order too.
    let internal = pollster::block_on(internal.pop());
    let memory = pollster::block_on(memory.pop());
    let validation = pollster::block_on(validation.pop());
    (result, memory.or(internal).or(validation))
}
