//! Data of any size to the device, through the buffers of a pool.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::task::{Context, Poll};

use super::pool::StagingBufferPool;
use crate::command::{CommandBuffer, Submission};
use crate::memory::Tensor;
use crate::{Element, Error, Result};

/// A transfer on its way, in one piece or several. It can be waited for, asked, or awaited;
/// dropping it cancels nothing.
#[derive(Debug)]
#[must_use = "a transfer tells whether it succeeded"]
pub struct Transfer {
    /// One submission per piece, each waited for by itself.
    pieces: Vec<Submission>,
}

impl StagingBufferPool {
    /// Copies `data` to the device, through as many buffers as it takes; waits for free buffers,
    /// and returns when the last piece is submitted.
    ///
    /// # Errors
    /// `T` is not the tensor's type, `data` has another length, the tensor is on another device,
    /// or the pool is closed. Where it fails in the middle, the pieces submitted are still made.
    pub fn transfer_to_gpu<T: Element>(&self, data: &[T], tensor: &Tensor) -> Result<Transfer> {
        tensor.expect::<T>()?;
        let (found, expected) = (data.len() as u64, tensor.elements());
        if found != expected {
            let what = format!("the data for a tensor of shape {}", tensor.shape());
            return Err(Error::Length { what, expected, found, unit: "elements" });
        }
        if tensor.device() != self.device() {
            let problem = "the tensor is on another device than the pool";
            return Err(Error::record("a transfer", problem));
        }
        let memory = &self.inner.memory;
        let mut pieces = Vec::new();
        let mut rest: &[u8] = bytemuck::cast_slice(data);
        let mut offset = 0;
        while !rest.is_empty() {
            let mut buffer = self.get_buffer()?;
            // Whole words, so that each piece starts where the device wants it.
            let len = (buffer.capacity() & !255).min(rest.len());
            let (piece, later) = rest.split_at(len);
            buffer.write(0, piece)?;
            let mut commands = CommandBuffer::single(memory)?;
            commands.upload_range(buffer, 0..len as u64, tensor, offset)?;
            pieces.push(commands.execute()?);
            (rest, offset) = (later, offset + len as u64);
        }
        self.inner.transfers.fetch_add(1, Ordering::Relaxed);
        self.inner.bytes.fetch_add(tensor.byte_len(), Ordering::Relaxed);
        Ok(Transfer { pieces })
    }

    /// As [`transfer_to_gpu`](Self::transfer_to_gpu), and waits until it is done.
    ///
    /// # Errors
    /// As there, and whatever the device fails with.
    pub fn transfer_to_gpu_sync<T: Element>(&self, data: &[T], tensor: &Tensor) -> Result<()> {
        self.transfer_to_gpu(data, tensor)?.wait()
    }
}

impl Transfer {
    /// Waits until all of it is on the device.
    ///
    /// # Errors
    /// The first piece's that failed; all pieces are over then.
    pub fn wait(&self) -> Result<()> {
        self.pieces.iter().map(Submission::wait).fold(Ok(()), Result::and)
    }

    /// Whether all of it is over, with or without an error.
    pub fn is_done(&self) -> bool {
        self.pieces.iter().all(Submission::is_done)
    }
}

impl Future for Transfer {
    type Output = Result<()>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Result<()>> {
        while let Some(piece) = self.pieces.first_mut() {
            match Pin::new(piece).poll(context) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Ready(Ok(())) => drop(self.pieces.remove(0)),
            }
        }
        Poll::Ready(Ok(()))
    }
}
