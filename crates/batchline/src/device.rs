//! A device: what it is, whether it is well, and the one queue to it.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

#[cfg(feature = "cuda")]
use crate::CudaStream;
use crate::backend::host::HostBackend;
use crate::backend::{Backend, DeviceInfo, DeviceKind, Fence, MAX_STREAMS};
use crate::command::reaper::Reaper;
use crate::memory::Patience;
use crate::process::Process;
use crate::sync::{Mutex, MutexGuard};
use crate::{Error, Result};

/// A device that batches are delivered to. Clones are handles to the same device. It belongs to the
/// process that opened it: in a child of a fork it counts as lost.
///
/// ```
/// use batchline::Device;
/// let device = Device::host();
/// assert_eq!(device.info().name, "host");
/// ```
#[derive(Clone)]
pub struct Device {
    core: Arc<DeviceCore>,
}

/// What there is to find on this machine, and what is missing.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Found {
    /// A device that can be opened.
    Device(DeviceInfo),
    /// A kind of device of which there is none, with the reason.
    Missing(Error),
}

impl Device {
    /// The host as a device: ordinary memory, no hardware. Always there.
    pub fn host() -> Self {
        Self::from_backend(Box::new(HostBackend::new()))
    }

    /// An NVIDIA GPU by its number, as `CUDA_VISIBLE_DEVICES` leaves them, in its primary context:
    /// memory and streams go together with those of all other users of CUDA in this process.
    /// Batches are delivered for a stream that [`as_cuda`](Self::as_cuda) tells.
    ///
    /// This loads the kernels, for which the driver waits until all work that was enqueued in the
    /// context is over.
    ///
    /// # Errors
    /// [`Error::NoDevice`], which says what is missing.
    #[cfg(feature = "cuda")]
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Ok(Self::from_backend(Box::new(crate::backend::cuda::CudaBackend::open(ordinal, None)?)))
    }

    /// As [`cuda`](Self::cuda), with batches delivered for a stream of your own: work on it comes
    /// behind the batch that was asked for before it, without [`bind`](crate::GpuBatch::bind).
    ///
    /// # Errors
    /// As [`cuda`](Self::cuda).
    #[cfg(feature = "cuda")]
    pub fn cuda_for(ordinal: usize, consumer: CudaStream) -> Result<Self> {
        let backend = crate::backend::cuda::CudaBackend::open(ordinal, Some(consumer))?;
        Ok(Self::from_backend(Box::new(backend)))
    }

    /// As [`cuda_for`](Self::cuda_for), with a stream of the `cudarc` crate, which the device keeps.
    /// The GPU is that of the stream's context.
    ///
    /// ```no_run
    /// use batchline::Device;
    /// let context = cudarc::driver::CudaContext::new(0)?;
    /// let stream = context.new_stream()?;
    /// let device = Device::cuda_from(&stream)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`cuda`](Self::cuda); or the context is not the GPU's primary context, which
    /// `CudaContext::new` gives.
    #[cfg(feature = "cudarc")]
    pub fn cuda_from(stream: &Arc<cudarc::driver::CudaStream>) -> Result<Self> {
        let backend = crate::backend::cuda::CudaBackend::open_for(stream)?;
        Ok(Self::from_backend(Box::new(backend)))
    }

    /// The best adapter that wgpu finds: Metal, Vulkan or DX12. A software rasteriser counts.
    ///
    /// # Errors
    /// [`Error::NoDevice`], which says what is missing.
    #[cfg(feature = "wgpu")]
    pub fn wgpu() -> Result<Self> {
        Ok(Self::from_backend(Box::new(crate::backend::wgpu::WgpuBackend::open(false)?)))
    }

    /// A wgpu device of your own, so that a renderer or a compute framework shares its memory with
    /// batchline. Don't call `wgpu::Device::destroy` while batchline uses it: wgpu then unmaps
    /// memory that workers may be writing. Your callbacks on the device and its queue may run on
    /// batchline's threads; they must not panic nor provoke errors of wgpu, which would count as
    /// batchline's.
    ///
    /// # Errors
    /// The device is lost, or out of memory.
    #[cfg(feature = "wgpu")]
    pub fn wgpu_from(device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        let backend = crate::backend::wgpu::WgpuBackend::adopt(device, queue)?;
        Ok(Self::from_backend(Box::new(backend)))
    }

    /// A device of another make.
    pub fn from_backend(backend: Box<dyn Backend>) -> Self {
        let backend: Arc<dyn Backend> = backend.into();
        Self {
            core: Arc::new(DeviceCore {
                health: Arc::new(Health {
                    backend: Arc::clone(&backend),
                    process: Process::current(),
                    lost: OnceLock::new(),
                    passed: Default::default(),
                    listeners: Mutex::new(Vec::new()),
                }),
                submit: Mutex::new(SubmitState { last: [0; MAX_STREAMS] }),
                submitting: Mutex::new(None),
                reaper: Reaper::new(),
            }),
        }
    }

    /// The best device of this machine: CUDA's first, else a hardware adapter of wgpu, else the host.
    pub fn auto() -> Self {
        #[cfg(feature = "cuda")]
        if let Ok(device) = Self::cuda(0) {
            return device;
        }
        #[cfg(feature = "wgpu")]
        if let Ok(backend) = crate::backend::wgpu::WgpuBackend::open(true) {
            return Self::from_backend(Box::new(backend));
        }
        Self::host()
    }

    /// Every device that can be found, and for each kind without one, why.
    pub fn list() -> Vec<Found> {
        let host = Found::Device(HostBackend::new().info().clone());
        let found = Self::list_cuda().into_iter().chain(Self::list_wgpu());
        found.chain([host]).collect()
    }

    #[cfg(feature = "cuda")]
    fn list_cuda() -> Vec<Found> {
        match crate::backend::cuda::CudaBackend::devices() {
            Ok(devices) => devices.into_iter().map(Found::Device).collect(),
            Err(missing) => vec![Found::Missing(missing)],
        }
    }

    #[cfg(not(feature = "cuda"))]
    fn list_cuda() -> Vec<Found> {
        Vec::new()
    }

    #[cfg(feature = "wgpu")]
    fn list_wgpu() -> Vec<Found> {
        let adapters = crate::backend::wgpu::WgpuBackend::adapters();
        if adapters.is_empty() {
            let missing = crate::backend::wgpu::WgpuBackend::open(false).err();
            return missing.into_iter().map(Found::Missing).collect();
        }
        adapters.into_iter().map(Found::Device).collect()
    }

    #[cfg(not(feature = "wgpu"))]
    fn list_wgpu() -> Vec<Found> {
        Vec::new()
    }

    /// What the device is.
    pub fn info(&self) -> &DeviceInfo {
        self.core.backend().info()
    }

    /// What drives the device.
    pub fn kind(&self) -> DeviceKind {
        self.info().kind
    }

    /// Whether the device can be used.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], at every call once the device is lost.
    pub fn check(&self) -> Result<()> {
        self.core.check()
    }

    /// The number of the GPU, and the stream that batches are delivered for, behind this device;
    /// `None` for another kind.
    #[cfg(feature = "cuda")]
    pub fn as_cuda(&self) -> Option<(usize, CudaStream)> {
        let backend: &dyn std::any::Any = self.core.backend();
        let backend = backend.downcast_ref::<crate::backend::cuda::CudaBackend>()?;
        Some((backend.ordinal(), backend.consumer()))
    }

    /// The wgpu device and queue behind this device; `None` for another kind. Don't call
    /// `wgpu::Device::destroy` on it: wgpu then unmaps memory that workers may be writing.
    #[cfg(feature = "wgpu")]
    pub fn as_wgpu(&self) -> Option<(&wgpu::Device, &wgpu::Queue)> {
        let backend: &dyn std::any::Any = self.core.backend();
        let backend = backend.downcast_ref::<crate::backend::wgpu::WgpuBackend>()?;
        Some((backend.device(), backend.queue()))
    }

    pub(crate) fn core(&self) -> &Arc<DeviceCore> {
        &self.core
    }
}

impl PartialEq for Device {
    /// Whether both are handles to the same device.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.core, &other.core)
    }
}

impl Eq for Device {}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Device").field(&self.info().name).finish()
    }
}

/// Someone who waits for something that a lost device will never bring.
pub(crate) trait LossListener: Send + Sync {
    /// Wakes every waiter; they find the error by asking.
    fn device_lost(&self, error: &Error);
}

/// What all handles of a device share.
pub(crate) struct DeviceCore {
    health: Arc<Health>,
    /// Held while a command buffer is submitted: its segments stay together, and the order of the
    /// fences is the order of the calls.
    submit: Mutex<SubmitState>,
    /// The thread that holds `submit`. A custom operation that runs on the host runs under that
    /// lock and would wait for itself if it called back.
    submitting: Mutex<Option<std::thread::ThreadId>>,
    /// Dropped with the last handle: ends the thread that watches the fences.
    pub(crate) reaper: Reaper,
}

/// The numbers of the last segments.
pub(crate) struct SubmitState {
    pub(crate) last: [u64; MAX_STREAMS],
}

/// Why a device can't be used in a child of the process that opened it.
pub(crate) const FORKED: &str = "it was opened before this process was forked";

/// The part of a device that the reaper's thread needs, so that the thread does not keep the
/// device itself alive.
pub(crate) struct Health {
    pub(crate) backend: Arc<dyn Backend>,
    /// The process that opened the device.
    process: Process,
    /// Set once. A level, not a message: who asks later gets it too.
    lost: OnceLock<Error>,
    /// By stream, the highest number known to have passed.
    passed: [AtomicU64; MAX_STREAMS],
    listeners: Mutex<Vec<Weak<dyn LossListener>>>,
}

impl Health {
    pub(crate) fn check(&self) -> Result<()> {
        let check = || self.lost.get().map_or(Ok(()), |error| Err(error.clone()));
        self.check_process().and_then(|()| check())
    }

    /// A child of the process that opened the device has none of its threads, and no right to its
    /// driver: whoever would wait there is told so.
    pub(crate) fn check_process(&self) -> Result<()> {
        if !self.process.is_gone() {
            return Ok(());
        }
        let device = self.backend.info().name.clone();
        Err(Error::DeviceLost { device, reason: FORKED.to_owned() })
    }

    /// Declares the device lost and wakes everybody who waits for it.
    pub(crate) fn lose(&self, error: Error) {
        self.mark_lost(error);
        self.tell_lost();
    }

    /// Declares the device lost. Who asks from now on gets the error.
    pub(crate) fn mark_lost(&self, error: Error) {
        let error = match error {
            lost @ Error::DeviceLost { .. } => lost,
            other => Error::DeviceLost {
                device: self.backend.info().name.clone(),
                reason: other.chain(),
            },
        };
        let _ = self.lost.set(error);
    }

    /// Wakes everybody who waits for a device that was declared lost.
    pub(crate) fn tell_lost(&self) {
        let Some(error) = self.lost.get().filter(|_| self.check_process().is_ok()) else { return };
        let listeners: Vec<_> = self.listeners.lock().drain(..).collect();
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            listener.device_lost(error);
        }
    }

    /// Passes on what a call to the backend gave. If it says that the device is lost, everybody
    /// learns of it.
    pub(crate) fn notice<T>(&self, result: Result<T>) -> Result<T> {
        if let Err(error) = &result
            && error.is_device_lost()
        {
            self.lose(error.clone());
        }
        result
    }

    /// Waits for a fence until it passes or the device is lost.
    pub(crate) fn wait(&self, fence: Fence) -> Result<()> {
        loop {
            // Whoever found the loss may only have marked it.
            self.check().inspect_err(|_| self.tell_lost())?;
            match self.backend.wait(fence, Duration::from_millis(100)) {
                Ok(true) => {
                    self.note_passed(fence);
                    return Ok(());
                }
                Ok(false) => {}
                Err(error) => {
                    self.lose(error.clone());
                    return Err(error);
                }
            }
        }
    }

    fn note_passed(&self, fence: Fence) {
        self.passed[usize::from(fence.stream)].fetch_max(fence.value, Ordering::AcqRel);
    }

    /// Whether a fence is known to have passed, without asking the device.
    pub(crate) fn known_passed(&self, fence: Fence) -> bool {
        fence.value <= self.passed[usize::from(fence.stream)].load(Ordering::Acquire)
    }
}

impl DeviceCore {
    pub(crate) fn backend(&self) -> &dyn Backend {
        &*self.health.backend
    }

    pub(crate) fn health(&self) -> &Arc<Health> {
        &self.health
    }

    pub(crate) fn check(&self) -> Result<()> {
        self.health.check()
    }

    /// How long the calling thread may wait for something in flight: not at all on the reaper's
    /// own thread, where completions run, as it is the reaper that brings everything home, nor in a
    /// process that has none.
    pub(crate) fn patience(&self, asked: Patience) -> Patience {
        let in_vain = self.health.check_process().is_err() || self.reaper.is_current();
        if in_vain { Patience::None } else { asked }
    }

    /// Whether a fence has passed. Asks the device, and does not wait for it. A backend may run
    /// callbacks of the user here.
    pub(crate) fn has_passed(&self, fence: Fence) -> bool {
        if self.health.known_passed(fence) {
            return true;
        }
        match self.backend().wait(fence, Duration::ZERO) {
            Ok(passed) => {
                if passed {
                    self.health.note_passed(fence);
                }
                passed
            }
            Err(error) => {
                // Only marked: this is asked under locks that listeners take. The next call to the
                // backend tells them.
                if error.is_device_lost() {
                    self.health.mark_lost(error);
                }
                false
            }
        }
    }

    /// Calls `listener` when the device is lost; at once if it is already.
    pub(crate) fn on_loss(&self, listener: Weak<dyn LossListener>) {
        let mut listeners = self.health.listeners.lock();
        listeners.retain(|listener| listener.strong_count() > 0);
        listeners.push(Weak::clone(&listener));
        drop(listeners);
        if let (Err(error), Some(listener)) = (self.check(), listener.upgrade()) {
            listener.device_lost(&error);
        }
    }

    /// Takes the queue to the device.
    ///
    /// # Errors
    /// This thread has it already: a custom operation calls back.
    pub(crate) fn lock_submit(&self) -> Result<SubmitGuard<'_>> {
        let me = std::thread::current().id();
        if *self.submitting.lock() == Some(me) {
            return Err(Error::record(
                "an operation",
                "a custom operation cannot use the device that it runs on: record what it needs \
                 before or after it",
            ));
        }
        let state = self.submit.lock();
        *self.submitting.lock() = Some(me);
        Ok(SubmitGuard { state, core: self })
    }
}

impl fmt::Debug for DeviceCore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("DeviceCore").field(&self.backend().info().name).finish()
    }
}

/// The queue to the device, held by one thread.
pub(crate) struct SubmitGuard<'a> {
    pub(crate) state: MutexGuard<'a, SubmitState>,
    core: &'a DeviceCore,
}

impl Drop for SubmitGuard<'_> {
    fn drop(&mut self) {
        *self.core.submitting.lock() = None;
    }
}
