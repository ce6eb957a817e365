//! Memory: of devices, page-locked, registered.

use std::sync::Arc;

use super::device::{HOST_REGISTER, READ_ONLY_REGISTER};
use crate::arguments::Out;
use crate::codes::{
    HOST_MEMORY_ALREADY_REGISTERED, HOST_MEMORY_NOT_REGISTERED, INVALID_VALUE, NOT_SUPPORTED,
    OUT_OF_MEMORY, Result,
};
use crate::driver::memory::{Block, Kind};
use crate::driver::{Driver, driver, mapping};

/// Portable, mapped, write-combined.
const HOST_FLAGS: u32 = 1 | 2 | 4;
/// Portable, mapped, of a device, read-only.
const REGISTER_FLAGS: u32 = 1 | 2 | 4 | READ_ONLY;
const READ_ONLY: u32 = 8;

impl Driver {
    fn allocate(&mut self, bytes: usize, kind: Kind) -> Result<usize> {
        let context = self.context;
        let block = Block::allocate(bytes, kind, context).ok_or(OUT_OF_MEMORY)?;
        let base = block.base;
        self.memory.add(block);
        Ok(base)
    }

    /// Takes memory back, and tells where work still names it.
    fn free(&mut self, address: usize, kind: impl Fn(Kind) -> bool, otherwise: u32) -> Result<()> {
        let known = self.memory.starting_at(address).filter(|block| kind(block.kind));
        let Some(block) = known.map(Arc::clone) else {
            let why =
                if self.memory.was_freed(address) { "was freed before" } else { "is unknown" };
            self.violation(format!("memory at {address:#x} was to be freed, but it {why}"));
            return Err(otherwise);
        };
        if let Some(user) = self.user(&block) {
            let what = block.kind.name();
            self.violation(format!("{what} at {address:#x} was freed while in use: {user}"));
        }
        if block.kind == Kind::Device {
            self.settle("cuMemFree_v2")?;
        }
        while self.is_running_on(&block) {
            self.wait();
        }
        if block.is_freed() {
            self.violation(format!("memory at {address:#x} was freed by two threads"));
            return Err(otherwise);
        }
        let in_use = self.user(&block).is_some();
        let faults = self.memory.free(&block, in_use);
        faults.into_iter().for_each(|fault| self.violation(fault));
        Ok(())
    }
}

driver! {
    fn cuMemAlloc_v2(address: Out<usize>, bytes: usize) needs Context |driver| {
        driver.unsafe_in_captures()?;
        if bytes == 0 || address.is_null() {
            return Err(INVALID_VALUE);
        }
        if bytes > driver.free_memory() {
            return Err(OUT_OF_MEMORY);
        }
        address.set(driver.allocate(bytes, Kind::Device)?)
    }

    fn cuMemFree_v2(address: usize) needs Context |driver| {
        driver.unsafe_in_captures()?;
        if address == 0 {
            return Ok(());
        }
        driver.free(address, |kind| kind == Kind::Device, INVALID_VALUE)
    }

    fn cuMemHostAlloc(address: Out<usize>, bytes: usize, flags: u32) needs Context |driver| {
        driver.unsafe_in_captures()?;
        if bytes == 0 || flags & !HOST_FLAGS != 0 || address.is_null() {
            return Err(INVALID_VALUE);
        }
        address.set(driver.allocate(bytes, Kind::PageLocked)?)
    }

    fn cuMemFreeHost(address: usize) needs Context |driver| {
        driver.unsafe_in_captures()?;
        driver.free(address, |kind| kind == Kind::PageLocked, INVALID_VALUE)
    }

    fn cuMemHostRegister_v2(address: usize, bytes: usize, flags: u32) needs Context |driver| {
        driver.unsafe_in_captures()?;
        if driver.attribute(HOST_REGISTER, 0)? == 0 {
            return Err(NOT_SUPPORTED);
        }
        let end = address.checked_add(bytes);
        if address == 0 || bytes == 0 || end.is_none() || flags & !REGISTER_FLAGS != 0 {
            return Err(INVALID_VALUE);
        }
        let read_only = flags & READ_ONLY != 0;
        if read_only && driver.attribute(READ_ONLY_REGISTER, 0)? == 0 {
            return Err(NOT_SUPPORTED);
        }
        if driver.memory.touching(address, bytes).is_some() {
            return Err(HOST_MEMORY_ALREADY_REGISTERED);
        }
        if !mapping::allows(address, bytes, !read_only) {
            return Err(INVALID_VALUE);
        }
        let kind = Kind::Registered { read_only };
        let block = Block::foreign(address, bytes, kind, driver.context);
        driver.memory.add(block);
        Ok(())
    }

    fn cuMemHostUnregister(address: usize) needs Context |driver| {
        driver.unsafe_in_captures()?;
        let registered = |kind| matches!(kind, Kind::Registered { .. });
        driver.free(address, registered, HOST_MEMORY_NOT_REGISTERED)
    }

    /// The device has the host's addresses.
    fn cuMemHostGetDevicePointer_v2(device: Out<usize>, host: usize, flags: u32)
        needs Context |driver|
    {
        let known = driver.memory.around(host).is_some_and(|block| block.kind != Kind::Device);
        if !known || flags != 0 {
            return Err(INVALID_VALUE);
        }
        device.set(host)
    }

    fn cuMemGetInfo_v2(free: Out<usize>, total: Out<usize>) needs Context |driver| {
        free.set(driver.free_memory())?;
        total.set(driver.settings.memory)
    }

    /// `data` is written as the type that the attribute has. It answers for a lost context too.
    fn cuPointerGetAttribute(data: usize, attribute: u32, address: usize) needs Init |driver| {
        let Some(block) = driver.memory.around(address).map(Arc::clone) else {
            return Err(INVALID_VALUE);
        };
        let on_device = block.kind == Kind::Device;
        let device = driver.contexts.get(&block.context).map_or(0, |context| context.device);
        match attribute {
            1 => Out::<usize>::at(data).set(block.context),
            2 => Out::<u32>::at(data).set(if on_device { 2 } else { 1 }),
            3 => Out::<usize>::at(data).set(address),
            4 if on_device => Err(INVALID_VALUE),
            4 => Out::<usize>::at(data).set(address),
            8 => Out::<u32>::at(data).set(0),
            9 => Out::<i32>::at(data).set(i32::try_from(device).map_err(|_| INVALID_VALUE)?),
            11 => Out::<usize>::at(data).set(block.base),
            12 => Out::<usize>::at(data).set(block.len),
            13 => Out::<u32>::at(data).set(1),
            _ => Err(INVALID_VALUE),
        }
    }
}
