//! Captures: work that is kept for later instead of being queued. One stream is captured by
//! itself: captures that spread to other streams through events are refused.

use super::work::Work;
use super::{Driver, MODE, executor};
use crate::codes::{NOT_SUPPORTED, Result, STREAM_CAPTURE_UNSUPPORTED};

/// Which calls a capture forbids, and to whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Unsafe calls of all threads that don't say otherwise.
    Global = 0,
    /// Unsafe calls of the thread that captures.
    ThreadLocal = 1,
    /// None.
    Relaxed = 2,
}

impl Mode {
    pub(crate) fn from_number(number: u32) -> Option<Self> {
        [Mode::Global, Mode::ThreadLocal, Mode::Relaxed].into_iter().find(|m| *m as u32 == number)
    }
}

/// A capture under way.
#[derive(Debug)]
pub(crate) struct Capture {
    pub(crate) context: usize,
    pub(crate) mode: Mode,
    pub(crate) thread: u64,
    pub(crate) work: Vec<Work>,
    /// A forbidden call came.
    pub(crate) invalid: bool,
}

/// Captured work.
#[derive(Debug, Clone)]
pub(crate) struct Graph {
    pub(crate) context: usize,
    pub(crate) work: Vec<Work>,
}

impl Driver {
    /// For calls that a capture may forbid: then they fail, and so will the capture.
    pub(crate) fn unsafe_in_captures(&mut self) -> Result<()> {
        let (own, thread) = (MODE.get(), executor::thread_number());
        let mut forbidden = false;
        for capture in self.captures.values_mut() {
            let hit = match own {
                Mode::Relaxed => false,
                Mode::ThreadLocal => capture.thread == thread && capture.mode != Mode::Relaxed,
                Mode::Global => {
                    capture.mode == Mode::Global
                        || capture.thread == thread && capture.mode == Mode::ThreadLocal
                }
            };
            capture.invalid |= hit;
            forbidden |= hit;
        }
        if forbidden { Err(STREAM_CAPTURE_UNSUPPORTED) } else { Ok(()) }
    }

    /// For calls that a stream which is captured can't answer.
    pub(crate) fn not_captured(&mut self, stream: usize) -> Result<()> {
        match self.captures.get_mut(&stream) {
            None => Ok(()),
            Some(capture) => {
                capture.invalid = true;
                Err(STREAM_CAPTURE_UNSUPPORTED)
            }
        }
    }

    /// Queues work, or keeps it where the stream is captured.
    pub(crate) fn submit(&mut self, stream: usize, work: Work) -> Result<()> {
        match self.captures.get_mut(&stream) {
            None => self.enqueue(stream, work, &[]).map(drop),
            Some(capture) => {
                capture.work.push(work);
                Ok(())
            }
        }
    }

    /// # Errors
    /// The event belongs to a capture of another stream.
    pub(crate) fn not_of_another_capture(
        &self,
        captured: Option<usize>,
        stream: usize,
    ) -> Result<()> {
        match captured {
            Some(other) if other != stream => Err(NOT_SUPPORTED),
            _ => Ok(()),
        }
    }
}
