//! The standard's structures, with its names (`dlpack.h`, version 1.3).

use std::ffi::c_void;

use crate::DType;

/// The version of the standard that exports follow.
pub const VERSION: DLPackVersion = DLPackVersion { major: 1, minor: 3 };

/// [`DLDevice::device_type`]: ordinary memory.
pub const DL_CPU: i32 = 1;
/// [`DLDevice::device_type`]: memory of a CUDA GPU.
pub const DL_CUDA: i32 = 2;

/// [`DLDataType::code`]: signed integers.
pub const DL_INT: u8 = 0;
/// [`DLDataType::code`]: unsigned integers.
pub const DL_UINT: u8 = 1;
/// [`DLDataType::code`]: IEEE 754 floating-point numbers.
pub const DL_FLOAT: u8 = 2;
/// [`DLDataType::code`]: bfloat16.
pub const DL_BFLOAT: u8 = 4;
/// [`DLDataType::code`]: a byte that is 0 or 1.
pub const DL_BOOL: u8 = 6;

/// A bit of [`DLManagedTensorVersioned::flags`]: nobody may write to the memory.
pub const FLAG_READ_ONLY: u64 = 1;

/// A version of the standard. Within a `major` one the structures stay as they are.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLPackVersion {
    /// Changes with the layout of the structures.
    pub major: u32,
    /// Changes with what numbers may stand in them.
    pub minor: u32,
}

/// A device: `__dlpack_device__` gives these two numbers.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDevice {
    /// [`DL_CPU`] or [`DL_CUDA`].
    pub device_type: i32,
    /// The number of the GPU, as the CUDA driver counts; 0 for ordinary memory.
    pub device_id: i32,
}

/// An element type.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DLDataType {
    /// What kind of number it is.
    pub code: u8,
    /// Its size in bits.
    pub bits: u8,
    /// Numbers in a vector: 1.
    pub lanes: u16,
}

impl From<DType> for DLDataType {
    fn from(dtype: DType) -> Self {
        let code = match dtype {
            DType::F32 | DType::F16 | DType::F64 => DL_FLOAT,
            DType::BF16 => DL_BFLOAT,
            DType::I8 | DType::I16 | DType::I32 | DType::I64 => DL_INT,
            DType::U8 => DL_UINT,
            DType::Bool => DL_BOOL,
        };
        #[allow(clippy::cast_possible_truncation, reason = "at most 64")]
        Self { code, bits: dtype.size() as u8 * 8, lanes: 1 }
    }
}

/// A tensor. Element `[i, j, …]` is at
/// `data + byte_offset + (i·strides[0] + j·strides[1] + …)·size`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct DLTensor {
    /// An address on the device. Ours are multiples of 256; null for a tensor of no elements.
    pub data: *mut c_void,
    /// The device.
    pub device: DLDevice,
    /// The number of dimensions.
    pub ndim: i32,
    /// The element type.
    pub dtype: DLDataType,
    /// `ndim` extents, outermost first.
    pub shape: *mut i64,
    /// `ndim` strides, in elements. Ours are never null, and those of a dense tensor.
    pub strides: *mut i64,
    /// Where the first element is from `data`. Ours is 0.
    pub byte_offset: u64,
}

/// A tensor that somebody else keeps for whoever has this. As it was before version 1.0, without
/// flags; some programs still ask for it.
#[repr(C)]
#[derive(Debug)]
pub struct DLManagedTensor {
    /// The tensor.
    pub dl_tensor: DLTensor,
    /// The keeper's own.
    pub manager_ctx: *mut c_void,
    /// To be called with this structure once, by any thread, when it is not needed any more.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensor)>,
}

/// A tensor that somebody else keeps for whoever has this.
#[repr(C)]
#[derive(Debug)]
pub struct DLManagedTensorVersioned {
    /// The version that the rest is of.
    pub version: DLPackVersion,
    /// The keeper's own.
    pub manager_ctx: *mut c_void,
    /// To be called with this structure once, by any thread, when it is not needed any more.
    pub deleter: Option<unsafe extern "C" fn(*mut DLManagedTensorVersioned)>,
    /// [`FLAG_READ_ONLY`], or 0.
    pub flags: u64,
    /// The tensor.
    pub dl_tensor: DLTensor,
}
