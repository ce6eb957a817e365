//! Finding and opening devices.

use std::sync::OnceLock;

use crate::backend::{DeviceInfo, DeviceKind};
use crate::{Error, Result};

pub(super) fn adapters() -> Vec<DeviceInfo> {
    let describe =
        |adapter: &wgpu::Adapter| describe(&adapter.get_info(), adapter.limits().max_buffer_size);
    enumerate().iter().map(describe).collect()
}

pub(super) fn open(hardware_only: bool) -> Result<(wgpu::Device, wgpu::Queue)> {
    let adapters = enumerate();
    let found = adapters.len();
    let adapter = adapters
        .into_iter()
        .find(|adapter| !hardware_only || adapter.get_info().device_type != wgpu::DeviceType::Cpu);
    let Some(adapter) = adapter else {
        return Err(none(found));
    };
    let descriptor = wgpu::DeviceDescriptor {
        label: Some("batchline"),
        // For consumers who compute with half-precision batches.
        required_features: adapter.features() & wgpu::Features::SHADER_F16,
        // All that the adapter can do: the defaults stop at 256 MiB for a buffer and 128 MiB for
        // a binding.
        required_limits: adapter.limits(),
        ..Default::default()
    };
    pollster::block_on(adapter.request_device(&descriptor)).map_err(|error| Error::NoDevice {
        wanted: "wgpu".to_owned(),
        reason: format!("{} could not be opened: {error}", adapter.get_info().name),
        remedy: "update its driver, or use another device".to_owned(),
    })
}

pub(super) fn describe(info: &wgpu::AdapterInfo, max_allocation: u64) -> DeviceInfo {
    let api = match info.backend {
        wgpu::Backend::Vulkan => "Vulkan",
        wgpu::Backend::Metal => "Metal",
        wgpu::Backend::Dx12 => "DX12",
        wgpu::Backend::Gl => "GL",
        wgpu::Backend::BrowserWebGpu => "WebGPU",
        wgpu::Backend::Noop => "no-op",
    };
    DeviceInfo {
        kind: DeviceKind::Wgpu,
        name: format!("wgpu: {} ({api})", info.name),
        driver: format!("{} {}", info.driver, info.driver_info).trim().to_owned(),
        hardware: info.device_type != wgpu::DeviceType::Cpu,
        max_allocation: max_allocation / wgpu::MAP_ALIGNMENT * wgpu::MAP_ALIGNMENT,
        copy_alignment: wgpu::COPY_BUFFER_ALIGNMENT,
        unified: false,
    }
}

/// The one instance of this process. It is never dropped: a dropped one unloads the driver's
/// library, and NVIDIA's leaves destructors behind that crash each thread which ends after that.
fn instance(backends: wgpu::Backends) -> &'static wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        wgpu::Instance::new(wgpu::InstanceDescriptor {
            backends,
            ..wgpu::InstanceDescriptor::new_without_display_handle()
        })
    })
}

/// Adapters that can compute, the best first.
fn enumerate() -> Vec<wgpu::Adapter> {
    let backends = wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12;
    let mut adapters = pollster::block_on(instance(backends).enumerate_adapters(backends));
    adapters.retain(|adapter| {
        let flags = adapter.get_downlevel_capabilities().flags;
        flags.contains(wgpu::DownlevelFlags::COMPUTE_SHADERS)
    });
    // Stable, so that among equals the driver's own order decides.
    adapters.sort_by_key(|adapter| {
        let info = adapter.get_info();
        let speed = match info.device_type {
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            wgpu::DeviceType::Other => 3,
            wgpu::DeviceType::Cpu => 4,
        };
        (speed, info.backend != wgpu::Backend::Metal, info.backend == wgpu::Backend::Dx12)
    });
    adapters
}

fn none(found: usize) -> Error {
    let driver = if cfg!(target_os = "macos") {
        "a Mac with Metal is needed"
    } else if cfg!(windows) {
        "install the GPU's driver, with DX12 or Vulkan"
    } else {
        "install the GPU's driver with its Vulkan part, or mesa-vulkan-drivers for Vulkan on the CPU"
    };
    let (reason, remedy) = if found > 0 {
        let reason = "Vulkan runs on the CPU only here";
        (reason, format!("ask for the wgpu device by name to use that, else {driver}"))
    } else if cfg!(target_os = "linux") {
        ("no Vulkan driver answers (loader libvulkan.so.1 and a driver are needed)", driver.into())
    } else {
        ("no driver for Metal, Vulkan or DX12 answers", driver.to_owned())
    };
    Error::NoDevice { wanted: "wgpu".to_owned(), reason: reason.to_owned(), remedy }
}
