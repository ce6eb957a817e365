//! Modules and kernels.

use std::ffi::c_char;

use crate::arguments::{In, Out};
use crate::codes::{INVALID_HANDLE, INVALID_IMAGE, INVALID_VALUE, NOT_FOUND, NOT_SUPPORTED};
use crate::driver::ptx;
use crate::driver::work::{Launch, Work};
use crate::driver::{Driver, Function, Module, driver};

/// What a block of threads may be.
const MOST_THREADS: u64 = 1024;
const MOST_SHARED: u32 = 48 << 10;

driver! {
    /// The image is PTX in text. It is loaded when all that was queued before is over.
    fn cuModuleLoadData(module: Out<usize>, image: In<c_char>) needs Context |driver| {
        let text = image.text().map_err(|_| INVALID_IMAGE)?;
        if !text.contains(".version") {
            return Err(INVALID_IMAGE);
        }
        let entries = ptx::read(&text, driver.settings.version)?;
        driver.settle("cuModuleLoadData")?;
        let handle = driver.handle();
        let context = driver.context;
        driver.modules.insert(handle, Module { context, entries });
        module.set(handle)
    }

    fn cuModuleUnload(module: usize) needs Context |driver| {
        if driver.modules.remove(&module).is_none() {
            return driver.dead("module", module);
        }
        driver.functions.retain(|_, function| function.module != module);
        Ok(())
    }

    fn cuModuleGetFunction(function: Out<usize>, module: usize, name: In<c_char>)
        needs Context |driver|
    {
        let name = name.text()?;
        let Some(known) = driver.modules.get(&module) else {
            return driver.dead("module", module);
        };
        let entry = known.entries.iter().find(|entry| entry.name == name);
        let entry = entry.cloned().ok_or(NOT_FOUND)?;
        let handle = driver.handle();
        driver.functions.insert(handle, Function { module, entry });
        function.set(handle)
    }

    fn cuLaunchKernel(
        function: usize,
        grid_x: u32,
        grid_y: u32,
        grid_z: u32,
        block_x: u32,
        block_y: u32,
        block_z: u32,
        shared: u32,
        stream: usize,
        parameters: In<In<u8>>,
        extra: usize,
    ) needs Context |driver| {
        let (grid, block) = ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]);
        let Some(known) = driver.functions.get(&function) else {
            return driver.dead("function", function);
        };
        let (module, entry, own) = (known.module, known.entry.clone(), driver.context);
        let handle = driver.stream(stream)?;
        if driver.modules.get(&module).map(|module| module.context) != Some(own) {
            driver.violation(format!("{}: launched in another context", entry.name));
            return Err(INVALID_HANDLE);
        }
        let threads: u64 = block.iter().map(|side| u64::from(*side)).product();
        let limits = [u64::from(i32::MAX.unsigned_abs()), 65_535, 65_535];
        if grid.iter().zip(limits).any(|(side, most)| *side == 0 || u64::from(*side) > most)
            || threads == 0
            || threads > MOST_THREADS
            || block_z > 64
            || shared > MOST_SHARED
        {
            return Err(INVALID_VALUE);
        }
        if extra != 0 {
            return Err(NOT_SUPPORTED);
        }
        let mut launch = Launch {
            name: entry.name.into(),
            module,
            grid,
            block,
            shared,
            parameters: Vec::new(),
            memory: Vec::new(),
            fault: None,
        };
        let addresses = parameters.read(entry.parameters.len())?;
        for (address, bytes) in addresses.into_iter().zip(entry.parameters) {
            driver.add_parameter(&mut launch, &address.read(bytes)?);
        }
        driver.submit(handle, Work::Kernel(launch))
    }
}

impl Driver {
    /// Copies a parameter and notes the memory that it points to. Which words are pointers is not
    /// known, but no other number is likely to be the address of something.
    fn add_parameter(&mut self, launch: &mut Launch, bytes: &[u8]) {
        let mut copied = vec![0u128; bytes.len().div_ceil(16)];
        for (at, byte) in bytes.iter().enumerate() {
            copied[at / 16] |= u128::from(*byte) << (at % 16 * 8);
        }
        for word in bytes.chunks_exact(8) {
            let address = usize::from_le_bytes(word.try_into().unwrap_or_default());
            if self.memory.around(address).is_some() {
                launch.memory.extend(self.memory.reached_from(address).cloned());
            } else if self.memory.was_freed(address) {
                let fault = format!("memory at {address:#x} was freed");
                launch.fault.get_or_insert(fault);
            }
        }
        launch.parameters.push(copied);
    }
}
