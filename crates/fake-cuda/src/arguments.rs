//! What C callers pass. They promise what the driver's documentation demands: a pointer is null or
//! points to as much as the call says, for as long as the call takes.

use std::ffi::{CStr, c_char};

use crate::codes::{INVALID_VALUE, Result};

/// Where a result goes.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct Out<T>(*mut T);

impl<T> Out<T> {
    /// For a call whose argument can be of several types.
    pub(crate) fn at(address: usize) -> Self {
        Self(address as *mut T)
    }

    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    pub(crate) fn set(&self, value: T) -> Result<()> {
        if self.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller promises that it points to a `T` (see the module).
        unsafe { self.0.write(value) };
        Ok(())
    }
}

impl<T: Copy> Out<T> {
    /// What is there before the call.
    pub(crate) fn get(&self) -> Result<T> {
        if self.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller promises that it points to a `T`.
        Ok(unsafe { self.0.read() })
    }
}

impl Out<u8> {
    /// Writes text with a zero at its end, cut to `room` bytes; like the driver.
    pub(crate) fn set_text(&self, text: &str, room: usize) -> Result<()> {
        if self.is_null() || room == 0 {
            return Err(INVALID_VALUE);
        }
        let mut bytes = text.as_bytes()[..text.len().min(room - 1)].to_vec();
        bytes.push(0);
        // SAFETY: the caller promises room for as many bytes as it says.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.0, bytes.len()) };
        Ok(())
    }
}

/// Values to read.
#[repr(transparent)]
#[derive(Clone, Copy)]
pub(crate) struct In<T>(*const T);

impl<T: Copy> In<T> {
    pub(crate) fn is_null(&self) -> bool {
        self.0.is_null()
    }

    /// As many as the call says that there are.
    pub(crate) fn read(&self, count: usize) -> Result<Vec<T>> {
        if count == 0 {
            return Ok(Vec::new());
        }
        if self.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller promises that there are as many.
        Ok(unsafe { std::slice::from_raw_parts(self.0, count) }.to_vec())
    }
}

impl In<c_char> {
    /// A C string.
    pub(crate) fn text(&self) -> Result<String> {
        if self.is_null() {
            return Err(INVALID_VALUE);
        }
        // SAFETY: the caller promises that a zero ends it.
        let text = unsafe { CStr::from_ptr(self.0) };
        text.to_str().map(str::to_owned).map_err(|_| INVALID_VALUE)
    }
}
