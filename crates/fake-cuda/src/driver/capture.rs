//! Captures: work that is kept for later instead of being queued. One stream is captured by
//! itself: captures that spread to other streams through events are refused.

use super::stream::Fence;
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

/// A graph that can be launched, as often as one likes.
#[derive(Debug)]
pub(crate) struct Executable {
    pub(crate) graph: Graph,
    /// The end of its last launch, which the next one comes after on any stream.
    pub(crate) last: Option<Fence>,
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

    /// Queues the work of a graph, or keeps it where the stream is captured.
    pub(crate) fn launch(&mut self, executable: usize, stream: usize) -> Result<()> {
        let Some(known) = self.executables.get(&executable) else {
            return self.dead("graph", executable);
        };
        let (work, mut last) = (known.graph.work.clone(), known.last);
        for each in &work {
            if each.blocks().iter().any(|block| block.is_freed()) {
                self.violation("a graph was launched that works on freed memory");
            }
            if let Work::Kernel(launch) = each
                && !self.modules.contains_key(&launch.module)
            {
                let name = &launch.name;
                self.violation(format!("a graph was launched whose kernel {name} is unloaded"));
            }
        }
        for each in work {
            if self.captures.contains_key(&stream) {
                self.submit(stream, each)?;
            } else {
                let after: Vec<_> = last.into_iter().collect();
                last = Some(self.enqueue(stream, each, &after)?);
            }
        }
        if let Some(known) = self.executables.get_mut(&executable) {
            known.last = last;
        }
        Ok(())
    }

    /// A capture that nobody will end any more.
    pub(crate) fn abandon_capture(&mut self, stream: usize) {
        if self.captures.remove(&stream).is_some() {
            self.violation("a stream was destroyed while it was captured");
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
