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
    if let Some(gone) = launch.memory.iter().find(|block| !block.is_there()) {
        return Err(format!("{} at {:#x} was unregistered", gone.kind.name(), gone.base));
    }
    match &*launch.name {
        // By hand, so that a launch with wrong bounds is told from a right one.
        "batchline_fill_u64" => fill_u64(launch)?,
        "batchline_test_fault" => return Err("the kernel is one that faults".into()),
        // The benchmark's, which computes and leaves nothing behind.
        "batchline_bench_compute" => {}
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

/// `(u64 *to, u64 count, u64 value)`.
fn fill_u64(launch: &Launch) -> Result<(), String> {
    let [to, count, value] = launch.words()?;
    let len = usize::try_from(count).ok().and_then(|count| count.checked_mul(8));
    let to = usize::try_from(to).unwrap_or(0);
    let within = launch.memory.iter().any(|block| {
        let left = (block.base + block.len).checked_sub(to);
        to >= block.base && len.is_some_and(|len| left.is_some_and(|left| len <= left))
    });
    if !within || !to.is_multiple_of(8) {
        return Err(format!("{} writes {count} words at {to:#x}", launch.name));
    }
    for at in (to..to + len.unwrap_or(0)).step_by(8) {
        // SAFETY: it lies within memory that the launch holds, and is aligned.
        unsafe { (at as *mut u64).write(value) };
    }
    Ok(())
}

impl Launch {
    /// Parameters that are 64 bits each.
    fn words<const N: usize>(&self) -> Result<[u64; N], String> {
        let words: Vec<_> = self.parameters.iter().map(|bytes| low(bytes[0])).collect();
        let count = words.len();
        words.try_into().map_err(|_| format!("{} with {count} parameters", self.name))
    }
}

fn low(bytes: u128) -> u64 {
    u64::try_from(bytes & u128::from(u64::MAX)).unwrap_or(0)
}
