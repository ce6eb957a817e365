//! `cuGetProcAddress`: symbols by name and version.

use std::ffi::c_char;

use super::{capture, context, copy, device, event, memory, module, stream};
use crate::arguments::{In, Out};
use crate::codes::{INVALID_VALUE, NOT_FOUND};
use crate::driver::driver;

/// Why there is no symbol.
const UNKNOWN: u32 = 1;
const TOO_OLD: u32 = 2;

macro_rules! symbols {
    ($($module:ident: $($name:literal since $since:expr => $symbol:ident),* $(,)?;)*) => {
        &[$($(Symbol {
            name: $name,
            since: $since,
            symbol: stringify!($symbol),
            address: || $module::$symbol as *const () as usize,
        },)*)*]
    };
}

/// A function under the name that callers ask by.
struct Symbol {
    name: &'static str,
    /// The version that this variant came with.
    since: i32,
    symbol: &'static str,
    address: fn() -> usize,
}

const SYMBOLS: &[Symbol] = symbols! {
    device:
        "cuInit" since 2000 => cuInit,
        "cuDriverGetVersion" since 2020 => cuDriverGetVersion,
        "cuGetErrorName" since 6000 => cuGetErrorName,
        "cuGetErrorString" since 6000 => cuGetErrorString,
        "cuDeviceGetCount" since 2000 => cuDeviceGetCount,
        "cuDeviceGet" since 2000 => cuDeviceGet,
        "cuDeviceGetName" since 2000 => cuDeviceGetName,
        "cuDeviceGetUuid" since 11040 => cuDeviceGetUuid_v2,
        "cuDeviceTotalMem" since 3020 => cuDeviceTotalMem_v2,
        "cuDeviceGetAttribute" since 2000 => cuDeviceGetAttribute,
        "cuDeviceGetPCIBusId" since 4010 => cuDeviceGetPCIBusId;
    context:
        "cuDevicePrimaryCtxRetain" since 7000 => cuDevicePrimaryCtxRetain,
        "cuDevicePrimaryCtxRelease" since 11000 => cuDevicePrimaryCtxRelease_v2,
        "cuCtxGetCurrent" since 4000 => cuCtxGetCurrent,
        "cuCtxSetCurrent" since 4000 => cuCtxSetCurrent,
        "cuCtxPushCurrent" since 4000 => cuCtxPushCurrent_v2,
        "cuCtxPopCurrent" since 4000 => cuCtxPopCurrent_v2,
        "cuCtxGetDevice" since 2000 => cuCtxGetDevice,
        "cuCtxSynchronize" since 2000 => cuCtxSynchronize,
        "cuThreadExchangeStreamCaptureMode" since 10010 => cuThreadExchangeStreamCaptureMode;
    stream:
        "cuStreamCreate" since 2000 => cuStreamCreate,
        "cuStreamCreateWithPriority" since 5050 => cuStreamCreateWithPriority,
        "cuStreamDestroy" since 4000 => cuStreamDestroy_v2,
        "cuStreamSynchronize" since 2000 => cuStreamSynchronize,
        "cuStreamQuery" since 2000 => cuStreamQuery,
        "cuStreamGetCtx" since 9020 => cuStreamGetCtx,
        "cuLaunchHostFunc" since 10000 => cuLaunchHostFunc;
    event:
        "cuEventCreate" since 2000 => cuEventCreate,
        "cuEventDestroy" since 4000 => cuEventDestroy_v2,
        "cuEventRecord" since 2000 => cuEventRecord,
        "cuEventQuery" since 2000 => cuEventQuery,
        "cuEventElapsedTime" since 2000 => cuEventElapsedTime,
        "cuEventSynchronize" since 2000 => cuEventSynchronize,
        "cuStreamWaitEvent" since 3020 => cuStreamWaitEvent;
    memory:
        "cuMemAlloc" since 3020 => cuMemAlloc_v2,
        "cuMemFree" since 3020 => cuMemFree_v2,
        "cuMemHostAlloc" since 2020 => cuMemHostAlloc,
        "cuMemFreeHost" since 2000 => cuMemFreeHost,
        "cuMemHostRegister" since 6050 => cuMemHostRegister_v2,
        "cuMemHostUnregister" since 4000 => cuMemHostUnregister,
        "cuMemHostGetDevicePointer" since 3020 => cuMemHostGetDevicePointer_v2,
        "cuMemGetInfo" since 3020 => cuMemGetInfo_v2,
        "cuPointerGetAttribute" since 4000 => cuPointerGetAttribute;
    copy:
        "cuMemcpyHtoDAsync" since 3020 => cuMemcpyHtoDAsync_v2,
        "cuMemcpyDtoHAsync" since 3020 => cuMemcpyDtoHAsync_v2,
        "cuMemcpyDtoDAsync" since 3020 => cuMemcpyDtoDAsync_v2,
        "cuMemcpyHtoD" since 3020 => cuMemcpyHtoD_v2,
        "cuMemcpyDtoH" since 3020 => cuMemcpyDtoH_v2,
        "cuMemsetD8Async" since 3020 => cuMemsetD8Async,
        "cuMemsetD16Async" since 3020 => cuMemsetD16Async,
        "cuMemsetD32Async" since 3020 => cuMemsetD32Async,
        "cuMemcpyBatchAsync" since copy::FIRST_BATCH => cuMemcpyBatchAsync,
        "cuMemcpyBatchAsync" since copy::SECOND_BATCH => cuMemcpyBatchAsync_v2;
    module:
        "cuModuleLoadData" since 2000 => cuModuleLoadData,
        "cuModuleUnload" since 2000 => cuModuleUnload,
        "cuModuleGetFunction" since 2000 => cuModuleGetFunction,
        "cuLaunchKernel" since 4000 => cuLaunchKernel;
    capture:
        "cuStreamBeginCapture" since 10010 => cuStreamBeginCapture_v2,
        "cuStreamEndCapture" since 10000 => cuStreamEndCapture,
        "cuStreamIsCapturing" since 10000 => cuStreamIsCapturing,
        "cuGraphInstantiateWithFlags" since 11040 => cuGraphInstantiateWithFlags,
        "cuGraphLaunch" since 10000 => cuGraphLaunch,
        "cuGraphDestroy" since 10000 => cuGraphDestroy,
        "cuGraphExecDestroy" since 10000 => cuGraphExecDestroy;
};

/// This function is in no table: it stands for itself.
const OWN: &str = "cuGetProcAddress";

driver! {
    /// Names go without `_v2`; the version tells which variant is meant.
    fn cuGetProcAddress_v2(
        name: In<c_char>,
        address: Out<usize>,
        version: i32,
        flags: u64,
        status: Out<u32>,
    ) needs Library |driver| {
        let name = name.text()?;
        if flags > 2 {
            return Err(INVALID_VALUE);
        }
        let mut reason = UNKNOWN;
        let mut found = 0;
        if name == OWN && version >= 12000 {
            found = cuGetProcAddress_v2 as *const () as usize;
        }
        for symbol in SYMBOLS.iter().filter(|symbol| symbol.name == name) {
            if driver.settings.missing.contains(symbol.symbol) {
                continue;
            }
            if symbol.since <= version && driver.has(symbol.symbol, symbol.since) {
                found = (symbol.address)();
            } else {
                reason = TOO_OLD;
            }
        }
        address.set(found)?;
        match (found != 0, status.is_null()) {
            (true, true) => Ok(()),
            (false, true) => Err(NOT_FOUND),
            (true, false) => status.set(0),
            (false, false) => status.set(reason),
        }
    }
}
