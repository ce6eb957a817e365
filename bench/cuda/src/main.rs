//! batchline's CUDA device beside the driver alone: all who are compared run in turn, and what they
//! deliver is compared byte by byte before anything is timed.

mod compute;
mod data;
mod device;
mod driver;
mod files;
mod flow;
mod frozen;
mod path;
mod paths;
mod report;
mod settings;
mod training;

use std::process::ExitCode;

use batchline::{Device, MemoryLimits, MemoryManager};
use serde_json::json;

use data::Data;
use driver::Driver;
use report::Report;
use settings::{Settings, USAGE};

fn main() -> ExitCode {
    let Some(settings) = Settings::parse(std::env::args().skip(1)) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let device = match Device::cuda(0) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("bench: {}", error.chain());
            return ExitCode::FAILURE;
        }
    };
    let (info, workers) = (device.info(), settings.workers);
    println!("{}, {}, {workers} workers", info.name, info.driver);
    let limits = MemoryLimits::default()
        .device_limit(settings.pick(40 << 30, 512 << 20))
        .staging_limit(settings.pick(80 << 30, 512 << 20));
    let memory = MemoryManager::with_limits(&device, limits);
    // The first use makes the context current on this thread.
    drop(memory.upload(&[1u8; 16], &[16]).expect("a small tensor"));
    let driver = Driver::load();
    let about = json!({
        "program": "batchline-bench-cuda",
        "device": info.name,
        "driver": info.driver,
        "workers": workers,
        "quick": settings.quick,
        "parts": settings.parts,
    });
    let mut report = Report::new(settings.json.clone(), about);
    let data = Data::new(settings.pick(28_672 * 150_528, 24 << 20), workers);
    for part in &settings.parts {
        match &part[..] {
            "device" => device::measure(&settings, &memory, &driver, data, &mut report),
            "paths" => paths::measure(&settings, &memory, &driver, data, &mut report),
            "training" => training::measure(&settings, &memory, &driver, data, &mut report),
            "files" => files::measure(&settings, &memory, data, &mut report),
            other => unreachable!("the part {other} is no part"),
        }
        memory.trim();
    }
    if report.failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}
