//! Bytes on their way from the device to the host.

use std::fmt;
use std::sync::Arc;

use crate::memory::StagingLease;
use crate::sync::Mutex;
use crate::{DType, Element, Error, Result, staging};

/// What a recorded download will bring. The bytes arrive when the command buffer is done.
///
/// ```
/// use batchline::{CommandBufferPool, Device, MemoryManager};
/// let memory = MemoryManager::new(&Device::host());
/// let tensor = memory.upload(&[1.0f32, 2.0], &[2])?;
/// let mut commands = CommandBufferPool::new(&memory, 1)?.get_buffer()?;
/// let readback = commands.download(&tensor)?;
/// commands.execute()?.wait()?;
/// assert_eq!(readback.to_vec::<f32>()?, [1.0, 2.0]);
/// # Ok::<(), batchline::Error>(())
/// ```
#[must_use = "what is read back is in it"]
pub struct Readback {
    arrival: Arrival,
    dtype: DType,
    len: u64,
}

/// Where the bytes arrive; shared by the operation and its [`Readback`].
#[derive(Clone, Default)]
pub(crate) struct Arrival(Arc<Mutex<Option<Result<Arc<StagingLease>>>>>);

impl Arrival {
    pub(crate) fn arrive(&self, memory: Result<Arc<StagingLease>>) {
        *self.0.lock() = Some(memory);
    }
}

impl fmt::Debug for Arrival {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Arrival")
    }
}

impl Readback {
    pub(crate) fn new(arrival: Arrival, dtype: DType, len: u64) -> Self {
        Self { arrival, dtype, len }
    }

    /// The elements.
    ///
    /// # Errors
    /// They have not arrived yet, or never will; or `T` is not their type.
    pub fn to_vec<T: Element>(&self) -> Result<Vec<T>> {
        if !T::matches(self.dtype) {
            let (expected, found) = (self.dtype, T::DTYPE);
            return Err(Error::DType { what: "a readback".to_owned(), expected, found });
        }
        self.with_bytes(|bytes| bytemuck::pod_collect_to_vec(bytes))
    }

    /// Calls `read` with the bytes, in the machine's byte order.
    ///
    /// # Errors
    /// They have not arrived yet, or never will.
    pub fn with_bytes<R>(&self, read: impl FnOnce(&[u8]) -> R) -> Result<R> {
        // Not under the lock, as `read` is the user's.
        let arrived = self.arrival.0.lock().clone();
        match arrived {
            Some(Ok(memory)) => Ok(read(staging::arrived_bytes(&memory, self.len))),
            Some(Err(error)) => Err(error),
            None => Err(Error::record(
                "a readback",
                "the bytes have not arrived: execute the command buffer and wait for it first",
            )),
        }
    }
}

impl fmt::Debug for Readback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Readback({} bytes of {})", self.len, self.dtype)
    }
}
