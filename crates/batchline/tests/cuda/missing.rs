//! What a stranger sees where something is missing.

use batchline::{Device, DeviceKind, Found};

use crate::{Gpu, gpu_is_required, in_a_child, no_kernels, start};

/// What a stranger sees where there is no GPU, no driver, or not the one asked for.
#[test]
fn devices_that_are_not_there_are_errors() {
    if no_kernels() {
        return;
    }
    let gpu = Gpu::new("");
    let error = Device::cuda(99).unwrap_err().to_string();
    assert!(error.starts_with("no cuda:99 device: the CUDA driver shows "), "{error}");
    assert!(matches!(gpu.device().kind(), DeviceKind::Cuda));
}

/// The driver is asked once in a process, so this has one of its own.
#[test]
fn a_driver_without_a_gpu_is_an_error() {
    if gpu_is_required() || !in_a_child("missing::a_driver_without_a_gpu_is_an_error") {
        return;
    }
    let _none = start("devices=0");
    let error = Device::cuda(0).unwrap_err().to_string();
    assert_eq!(
        error,
        "no cuda device: the CUDA driver finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
    );
    assert!(matches!(Device::list().first(), Some(Found::Missing(_))));
}
