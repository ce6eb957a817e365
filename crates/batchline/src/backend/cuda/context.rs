//! A process's part in a device: the primary context, shared with everybody else who uses CUDA in
//! this process, and whether it is still well.
#![allow(unsafe_code, reason = "calls the driver")]

use std::ffi::{c_char, c_int, c_uint};
use std::sync::OnceLock;

use super::driver::{self, Code, DeviceId, Driver, code};
use crate::backend::{DeviceInfo, DeviceKind};
use crate::device::FORKED;
use crate::process::Process;
use crate::{Error, Result, sync};

// Of `CUdevice_attribute`.
const MULTIPROCESSOR_COUNT: c_int = 16;
const CAN_MAP_HOST_MEMORY: c_int = 19;
const UNIFIED_ADDRESSING: c_int = 41;
const COMPUTE_CAPABILITY_MAJOR: c_int = 75;
const HOST_REGISTER_SUPPORTED: c_int = 99;
const READ_ONLY_HOST_REGISTER_SUPPORTED: c_int = 113;

/// See the [module](self). The last one to hold it lets go of the primary context.
#[derive(Debug)]
pub(super) struct Context {
    pub(super) driver: &'static Driver,
    pub(super) raw: driver::Context,
    device: DeviceId,
    pub(super) ordinal: usize,
    pub(super) info: DeviceInfo,
    /// How many multiprocessors it has.
    pub(super) multiprocessors: u32,
    /// Whether the kernels are for such a device: of compute capability 7.0 or above.
    pub(super) runs_kernels: bool,
    pub(super) host_access: HostAccess,
    /// The NUMA node that the device is at, where the system says so.
    pub(super) numa_node: Option<u32>,
    /// CUDA does not survive a fork: a child must not call the driver.
    process: Process,
    lost: OnceLock<Error>,
}

/// How a device reads memory of the host by itself.
#[derive(Debug, Clone, Copy)]
pub(super) struct HostAccess {
    /// Memory can be registered.
    pub(super) registers: bool,
    /// Also memory that the process itself may only read.
    pub(super) read_only: bool,
}

/// How many devices there are, and whether the driver is there.
pub(super) fn count(driver: &Driver) -> Result<usize> {
    let mut count: c_int = 0;
    // SAFETY: `count` is a place for the answer.
    let code = unsafe { (driver.cuDeviceGetCount)(&raw mut count) };
    told(driver, "cuda", "counting the GPUs", code)?;
    let count = usize::try_from(count).unwrap_or(0);
    if count == 0 {
        return Err(Error::NoDevice {
            wanted: "cuda".to_owned(),
            reason: "the CUDA driver shows no GPU to this process".to_owned(),
            remedy: "look at nvidia-smi and CUDA_VISIBLE_DEVICES".to_owned(),
        });
    }
    Ok(count)
}

/// An error for a device that can't be opened, as the driver would not do something.
fn told(driver: &Driver, wanted: &str, what: &str, code: Code) -> Result<()> {
    if code == code::SUCCESS {
        return Ok(());
    }
    Err(Error::NoDevice {
        wanted: wanted.to_owned(),
        reason: format!("{what} failed: {}", driver.text(code)),
        remedy: "look at nvidia-smi: another process may hold the device or its memory".to_owned(),
    })
}

/// What a device is, without opening it.
pub(super) fn describe(driver: &Driver, ordinal: usize) -> Result<(DeviceId, DeviceInfo)> {
    let count = count(driver)?;
    let mut device: DeviceId = 0;
    let place = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
    // SAFETY: `device` is a place for the answer.
    let code = unsafe { (driver.cuDeviceGet)(&raw mut device, place) };
    let wanted = format!("cuda:{ordinal}");
    if code != code::SUCCESS && ordinal >= count {
        let reason = format!("the CUDA driver shows {count} GPU(s) to this process");
        let remedy = format!("take cuda:0 to cuda:{}", count - 1);
        return Err(Error::NoDevice { wanted, reason, remedy });
    }
    told(driver, &wanted, "finding it", code)?;
    let mut name: [c_char; 256] = [0; 256];
    // SAFETY: the buffer is as long as said.
    let code = unsafe { (driver.cuDeviceGetName)(name.as_mut_ptr(), 256, device) };
    told(driver, &wanted, "asking for its name", code)?;
    let mut bytes = 0usize;
    // SAFETY: `bytes` is a place for the answer.
    let code = unsafe { (driver.cuDeviceTotalMem_v2)(&raw mut bytes, device) };
    told(driver, &wanted, "asking for its memory", code)?;
    let info = DeviceInfo {
        kind: DeviceKind::Cuda,
        name: format!("cuda:{ordinal}: {}", text(&name)),
        driver: driver.version(),
        hardware: true,
        max_allocation: bytes as u64,
        copy_alignment: 1,
        unified: false,
    };
    Ok((device, info))
}

fn text(buffer: &[c_char]) -> String {
    let bytes: Vec<u8> =
        buffer.iter().map(|c| c.to_ne_bytes()[0]).take_while(|byte| *byte != 0).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

impl Context {
    pub(super) fn open(ordinal: usize) -> Result<Self> {
        let driver = Driver::get()?;
        let (device, info) = describe(driver, ordinal)?;
        let mut raw = driver::Context::NULL;
        // SAFETY: `raw` is a place for the answer.
        let code = unsafe { (driver.cuDevicePrimaryCtxRetain)(&raw mut raw, device) };
        told(driver, &format!("cuda:{ordinal}"), "opening it", code)?;
        let mut bus: [c_char; 32] = [0; 32];
        // SAFETY: the buffer is as long as said.
        unsafe { (driver.cuDeviceGetPCIBusId)(bus.as_mut_ptr(), 32, device) };
        let numa_node = super::numa::node_of(&text(&bus));
        let attribute = |attribute| {
            let mut value: c_int = 0;
            // SAFETY: `value` is a place for the answer; of what is not known it stays 0.
            unsafe { (driver.cuDeviceGetAttribute)(&raw mut value, attribute, device) };
            u32::try_from(value).unwrap_or(0)
        };
        let multiprocessors = attribute(MULTIPROCESSOR_COUNT).clamp(1, 1 << 16);
        let runs_kernels = attribute(COMPUTE_CAPABILITY_MAJOR) >= 7;
        let host_access = HostAccess {
            registers: attribute(HOST_REGISTER_SUPPORTED) != 0
                && attribute(CAN_MAP_HOST_MEMORY) != 0
                && attribute(UNIFIED_ADDRESSING) != 0,
            read_only: attribute(READ_ONLY_HOST_REGISTER_SUPPORTED) != 0,
        };
        let process = Process::current();
        let lost = OnceLock::new();
        Ok(Self {
            driver,
            raw,
            device,
            ordinal,
            info,
            multiprocessors,
            runs_kernels,
            host_access,
            numa_node,
            process,
            lost,
        })
    }

    /// Makes calls to the driver possible on this thread, for as long as the value is there. None of
    /// them breaks a capture that the user makes, on this thread or another.
    ///
    /// # Errors
    /// The device is lost, or this is a child of the process that opened it.
    pub(super) fn enter(&self) -> Result<Entered<'_>> {
        let mut entered = self.enter_for_events()?;
        entered.relax()?;
        Ok(entered)
    }

    /// As [`enter`](Self::enter), for recording and waiting for events on streams that nobody
    /// captures, which no capture minds: a consumer does that with each batch.
    pub(super) fn enter_for_events(&self) -> Result<Entered<'_>> {
        self.check()?;
        let mut current = driver::Context::NULL;
        // SAFETY: `current` is a place for the answer.
        let asked = unsafe { (self.driver.cuCtxGetCurrent)(&raw mut current) };
        self.call("asking for the current context", asked)?;
        let entered = |pop| Entered { context: self, pop, capture_mode: None };
        if current == self.raw {
            return Ok(entered(false));
        }
        if current == driver::Context::NULL {
            // A thread that has none keeps ours, so that it is set once.
            // SAFETY: the context is retained.
            let set = unsafe { (self.driver.cuCtxSetCurrent)(self.raw) };
            self.call("setting the current context", set)?;
            return Ok(entered(false));
        }
        // SAFETY: as above.
        let pushed = unsafe { (self.driver.cuCtxPushCurrent_v2)(self.raw) };
        self.call("setting the current context", pushed)?;
        Ok(entered(true))
    }

    /// Whether the device may be used: at once and ever after an error once it is lost.
    pub(super) fn check(&self) -> Result<()> {
        if let Some(error) = self.lost.get() {
            return Err(error.clone());
        }
        if self.is_forked() {
            return Err(Error::DeviceLost {
                device: self.info.name.clone(),
                reason: FORKED.to_owned(),
            });
        }
        Ok(())
    }

    /// Whether this is a child of the process that opened the device.
    pub(super) fn is_forked(&self) -> bool {
        self.process.is_gone()
    }

    /// An error for a code that is one. What can't be said of this call alone loses the device.
    pub(super) fn call(&self, operation: &'static str, code: Code) -> Result<()> {
        match code {
            code::SUCCESS => Ok(()),
            // The call did nothing, and the device is as it was.
            code::OUT_OF_MEMORY
            | code::INVALID_VALUE
            | code::NOT_PERMITTED
            | code::NOT_SUPPORTED
            | code::CAPTURE_UNSUPPORTED..=code::CAPTURE_WRONG_THREAD => {
                Err(self.refused(operation, code))
            }
            _ => Err(self.lose(format!("{operation}: {}", self.driver.text(code)))),
        }
    }

    /// An error of a call that did nothing, whatever the code says. If there is more to it, the next
    /// call tells.
    pub(super) fn refused(&self, operation: &'static str, code: Code) -> Error {
        let (device, source) = (self.info.name.clone(), self.driver.cause(code));
        Error::Device { device, operation, source }
    }

    /// Counts the device as lost from now on; returns the error that says so, which is the first.
    pub(super) fn lose(&self, reason: String) -> Error {
        let error = Error::DeviceLost { device: self.info.name.clone(), reason };
        self.lost.get_or_init(|| error).clone()
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // What is left of a lost device is left alone, and a child has no part in it.
        if self.check().is_ok() {
            // SAFETY: retained once when it was opened; nothing of ours is on it any more.
            unsafe { (self.driver.cuDevicePrimaryCtxRelease_v2)(self.device) };
        }
    }
}

/// `CU_STREAM_CAPTURE_MODE_RELAXED`.
pub(super) const RELAXED: c_uint = 2;

/// The context is current on this thread. See [`Context::enter`].
#[derive(Debug)]
pub(super) struct Entered<'c> {
    pub(super) context: &'c Context,
    pop: bool,
    /// What the thread may do during captures again afterwards.
    capture_mode: Option<c_uint>,
}

impl Entered<'_> {
    /// See [`Context::call`].
    pub(super) fn call(&self, operation: &'static str, code: Code) -> Result<()> {
        self.context.call(operation, code)
    }

    pub(super) fn driver(&self) -> &'static Driver {
        self.context.driver
    }

    /// Keeps this thread's calls from breaking captures: a thread of ours from now on, another one
    /// until the value goes.
    fn relax(&mut self) -> Result<()> {
        thread_local! {
            static RELAXED_FOR_GOOD: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
        }
        if RELAXED_FOR_GOOD.get() {
            return Ok(());
        }
        match self.exchange_capture_mode(RELAXED) {
            Ok(_) if sync::is_own_thread() => RELAXED_FOR_GOOD.set(true),
            Ok(before) => self.capture_mode = Some(before),
            Err(error) if error.is_device_lost() => return Err(error),
            // What is to be called may work all the same, and must, where something is given back.
            Err(_) => {}
        }
        Ok(())
    }

    /// Sets what this thread may do during captures; returns what it might before.
    fn exchange_capture_mode(&self, mut mode: c_uint) -> Result<c_uint> {
        // SAFETY: `mode` is read, and the former one written to it.
        let code = unsafe { (self.driver().cuThreadExchangeStreamCaptureMode)(&raw mut mode) };
        self.call("exchanging the capture mode", code)?;
        Ok(mode)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        if let Some(before) = self.capture_mode {
            // If that fails the device is lost, and the next call says so.
            let _ = self.exchange_capture_mode(before);
        }
        if self.pop {
            let mut ours = driver::Context::NULL;
            // SAFETY: pushed on this thread, and calls between were balanced.
            unsafe { (self.context.driver.cuCtxPopCurrent_v2)(&raw mut ours) };
        }
    }
}
