//! Page-locked memory beside the device: where a machine has several NUMA nodes, the copy engine
//! reads the near one faster.
#![allow(unsafe_code, reason = "calls the system")]

/// The node of a PCI device, on a machine that has more than one.
pub(super) fn node_of(bus_id: &str) -> Option<u32> {
    if !cfg!(target_os = "linux") {
        return None;
    }
    let several = std::fs::read_to_string("/sys/devices/system/node/online").ok()?;
    if several.trim() == "0" {
        return None;
    }
    let path = format!("/sys/bus/pci/devices/{}/numa_node", bus_id.to_lowercase());
    // The file says -1 where the firmware does not tell.
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// Has the pages of memory that nobody has touched come from this node where it has any left.
#[cfg(target_os = "linux")]
pub(super) fn prefer(node: u32, memory: &mut [u8]) {
    const MPOL_PREFERRED: libc::c_int = 1;
    let Some(mask) = 1u64.checked_shl(node) else { return };
    // SAFETY: the range is mapped and ours; the mask is 64 bits long. A refusal changes nothing.
    unsafe {
        libc::syscall(
            libc::SYS_mbind,
            memory.as_mut_ptr(),
            memory.len(),
            MPOL_PREFERRED,
            &raw const mask,
            // One more than there are, as the call wants it.
            65usize,
            0u32,
        );
    }
}

#[cfg(not(target_os = "linux"))]
pub(super) fn prefer(_: u32, _: &mut [u8]) {}
