//! Kernels, as functions of the host.

use super::memory::border_fault;
use super::work::Launch;

/// Runs a kernel.
///
/// # Errors
/// What was illegal, or that nothing here is called so.
pub(crate) fn launch(launch: &Launch) -> Result<(), String> {
    if let Some(fault) = &launch.fault {
        return Err(fault.clone());
    }
    match &*launch.name {
        "batchline_test_fault" => return Err("the kernel is one that faults".into()),
        name => {
            let mut parameters: Vec<_> =
                launch.parameters.iter().map(|value| value.as_ptr().cast_mut().cast()).collect();
            // SAFETY: the parameters were copied with the sizes of the kernel's own text, and the
            // launch holds the memory that they name.
            let known = unsafe {
                cuda_kernels_native::launch(
                    name,
                    launch.grid,
                    launch.block,
                    launch.shared,
                    parameters.as_mut_ptr(),
                )
            };
            if !known {
                return Err(format!("no kernel called {name} is known"));
            }
        }
    }
    // What it wrote behind an end is not the next one's fault.
    launch.memory.iter().find_map(border_fault).map_or(Ok(()), Err)
}
