//! The library and its devices.

use std::ffi::c_char;

use crate::arguments::Out;
use crate::codes::{INVALID_DEVICE, INVALID_VALUE, NO_DEVICE, Result, explain};
use crate::driver::{State, driver};

/// Attributes that are not 0, with the numbers of `CUdevice_attribute`.
const ATTRIBUTES: &[(i32, i32)] = &[
    (1, 1024),          // threads in a block
    (2, 1024),          // of which along x
    (3, 1024),          // along y
    (4, 64),            // along z
    (5, i32::MAX),      // blocks along x
    (6, 65_535),        // along y
    (7, 65_535),        // along z
    (8, 48 << 10),      // shared memory of a block
    (10, 32),           // threads in a warp
    (12, 65_536),       // registers of a block
    (13, 1_000_000),    // clock in kHz
    (14, 512),          // texture alignment
    (16, 8),            // multiprocessors
    (19, 1),            // can map host memory
    (31, 1),            // concurrent kernels
    (36, 1_000_000),    // memory clock in kHz
    (37, 256),          // memory bus in bits
    (38, 1 << 20),      // L2 cache
    (39, 2048),         // threads of a multiprocessor
    (40, 3),            // copy engines
    (41, 1),            // unified addresses
    (75, 9),            // compute capability
    (78, 1),            // stream priorities
    (91, 1),            // registered memory has the host's addresses
    (HOST_REGISTER, 1), // host memory can be registered
    (READ_ONLY_REGISTER, 1),
];

/// `CU_DEVICE_ATTRIBUTE_HOST_REGISTER_SUPPORTED`.
pub(super) const HOST_REGISTER: i32 = 99;
/// `CU_DEVICE_ATTRIBUTE_READ_ONLY_HOST_REGISTER_SUPPORTED`.
pub(super) const READ_ONLY_REGISTER: i32 = 113;
const BUS: i32 = 33;
const LAST_ATTRIBUTE: i32 = 150;

impl State {
    pub(super) fn device(&self, device: i32) -> Result<usize> {
        let index = usize::try_from(device).map_err(|_| INVALID_DEVICE)?;
        if index < self.devices.len() { Ok(index) } else { Err(INVALID_DEVICE) }
    }

    pub(super) fn attribute(&self, attribute: i32, device: usize) -> Result<i32> {
        if let Some(value) = self.settings.attributes.get(&attribute) {
            return Ok(*value);
        }
        match attribute {
            BUS => i32::try_from(device + 1).map_err(|_| INVALID_DEVICE),
            1..=LAST_ATTRIBUTE => {
                let known = ATTRIBUTES.iter().find(|(known, _)| *known == attribute);
                Ok(known.map_or(0, |(_, value)| *value))
            }
            _ => Err(INVALID_VALUE),
        }
    }
}

driver! {
    fn cuInit(flags: u32) needs Library |driver| {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        if driver.settings.init != 0 {
            return Err(driver.settings.init);
        }
        if driver.devices.is_empty() {
            return Err(NO_DEVICE);
        }
        driver.initialised = true;
        Ok(())
    }

    fn cuDriverGetVersion(version: Out<i32>) needs Library |driver| {
        version.set(driver.settings.version)
    }

    fn cuGetErrorName(error: u32, name: Out<*const c_char>) needs Nothing |_driver| {
        match explain(error) {
            Some((known, _)) => name.set(known.as_ptr()),
            None => name.set(std::ptr::null()).and(Err(INVALID_VALUE)),
        }
    }

    fn cuGetErrorString(error: u32, text: Out<*const c_char>) needs Nothing |_driver| {
        match explain(error) {
            Some((_, known)) => text.set(known.as_ptr()),
            None => text.set(std::ptr::null()).and(Err(INVALID_VALUE)),
        }
    }

    fn cuDeviceGetCount(count: Out<i32>) needs Init |driver| {
        count.set(i32::try_from(driver.devices.len()).map_err(|_| INVALID_VALUE)?)
    }

    fn cuDeviceGet(device: Out<i32>, ordinal: i32) needs Init |driver| {
        driver.device(ordinal)?;
        device.set(ordinal)
    }

    fn cuDeviceGetName(name: Out<u8>, len: i32, device: i32) needs Init |driver| {
        let device = driver.device(device)?;
        let len = usize::try_from(len).map_err(|_| INVALID_VALUE)?;
        name.set_text(&format!("Fake GPU {device}"), len)
    }

    fn cuDeviceGetUuid_v2(uuid: Out<[u8; 16]>, device: i32) needs Init |driver| {
        let device = driver.device(device)?;
        let mut bytes = *b"fake cuda device";
        bytes[15] = u8::try_from(device).map_err(|_| INVALID_DEVICE)?;
        uuid.set(bytes)
    }

    fn cuDeviceTotalMem_v2(bytes: Out<usize>, device: i32) needs Init |driver| {
        driver.device(device)?;
        bytes.set(driver.settings.memory)
    }

    fn cuDeviceGetAttribute(value: Out<i32>, attribute: i32, device: i32) needs Init |driver| {
        let device = driver.device(device)?;
        value.set(driver.attribute(attribute, device)?)
    }

    fn cuDeviceGetPCIBusId(id: Out<u8>, len: i32, device: i32) needs Init |driver| {
        let device = driver.device(device)?;
        let len = usize::try_from(len).map_err(|_| INVALID_VALUE)?;
        id.set_text(&format!("0000:{:02X}:00.0", device + 1), len)
    }
}
