//! Submits recorded operations: orders them after what they depend on, and links the record before
//! the first call to the driver.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::operation::Operation;
use super::submission::{Fences, Parts, Progress, Submission, Work, refuse};
use crate::backend::{Fence, MAX_STREAMS, Segment, SubmitError};
use crate::device::{Device, SubmitState};
use crate::{Error, Result};

/// Hands `work` to the device.
///
/// # Errors
/// The work did not reach the device. The completions get that error too, and what the work owned
/// goes home, or is given up where part of it may have reached the device. Every later error is
/// the submission's.
pub(crate) fn execute(mut work: Work) -> Result<Submission> {
    let device = &work.memory.device().clone();
    let core = device.core();
    let mut submit = match core.check().and_then(|()| core.lock_submit()) {
        Ok(submit) => submit,
        Err(error) => {
            refuse(std::mem::take(&mut work.completions), &error);
            return Err(error);
        }
    };
    work.commands.take_off();
    let record = core.reaper.record(work);
    if let Err(error) = core.reaper.link(&record, core.health()) {
        drop(submit);
        record.finish(Err(error.clone()), false);
        return Err(error);
    }
    // The last segment on each stream.
    let mut ends = Fences::new();
    let outcome = {
        let mut work = record.work.lock();
        let enqueue = |parts: Parts<'_>| enqueue(device, &mut submit.state, parts, &mut ends);
        let enqueue = AssertUnwindSafe(|| match &mut *work {
            Some(work) => work.commands.with(enqueue),
            None => Ok(()),
        });
        // A driver that panics leaves it open what it has done.
        catch_unwind(enqueue).unwrap_or_else(|panic| {
            Err(SubmitError { error: Error::panicked("the backend", &*panic), enqueued: true })
        })
    };
    if let Err(SubmitError { error, enqueued: true }) = &outcome {
        // Still under the lock: whoever has it next must find the device lost, as it is not known
        // any more who writes what.
        core.health().mark_lost(error.clone());
    }
    drop(submit);
    let (progress, result) = match outcome {
        Ok(()) => (Progress::InFlight(ends), Ok(Submission::new(Arc::clone(&record)))),
        Err(SubmitError { error, enqueued: false }) => {
            (Progress::Refused(error.clone(), ends), core.health().notice(Err(error)))
        }
        Err(SubmitError { error, enqueued: true }) => {
            core.health().tell_lost();
            (Progress::Quarantined(error.clone()), Err(error))
        }
    };
    record.set_progress(progress);
    core.reaper.notify();
    result
}

/// Makes segments of the operations and submits each; `ends` are the fences that end those that
/// were.
fn enqueue(
    device: &Device,
    submit: &mut SubmitState,
    Parts { operations, slots, mut kept }: Parts<'_>,
    ends: &mut Fences,
) -> Result<(), SubmitError> {
    for span in operations.iter().flat_map(Operation::writes) {
        if span.block().usage.lock().views > 0 {
            return Err(Error::Borrowed { what: "a tensor".to_owned() }.into());
        }
    }
    let backend = device.core().backend();
    let mut rest = operations;
    while let Some(first) = rest.first() {
        let stream = backend.stream_of(first.kind());
        let len = rest.iter().take_while(|op| backend.stream_of(op.kind()) == stream).count();
        let (run, later) = rest.split_at_mut(len);
        rest = later;

        let fence = Fence { stream, value: submit.last[usize::from(stream)] + 1 };
        let latest = latest_uses(run);
        let after = dependencies(device, &latest, fence);
        let commands = &mut run.iter_mut().map(|operation| operation.command(slots));
        let segment = Segment { fence, after: &after, commands, kept: kept.first() };
        kept = kept.get(len..).unwrap_or_default();
        backend.submit(segment)?;
        submit.last[usize::from(stream)] = fence.value;
        note(run, fence, &latest);
        ends.retain(|end| end.stream != stream);
        ends.push(fence);
    }
    Ok(())
}

/// By stream, the last number that the operations must come after.
type Latest = [u64; MAX_STREAMS];

/// What the operations must come after.
fn latest_uses(operations: &[Operation]) -> Latest {
    let mut latest = [0u64; MAX_STREAMS];
    let mut need = |fence: Fence| {
        let value = &mut latest[usize::from(fence.stream)];
        *value = fence.value.max(*value);
    };
    for operation in operations {
        for span in operation.reads() {
            span.block().usage.lock().before_read().for_each(&mut need);
        }
        for span in operation.writes() {
            span.block().usage.lock().before_write().for_each(&mut need);
        }
    }
    latest
}

/// The fences of other streams among these which are not known to have passed.
fn dependencies(device: &Device, latest: &Latest, own: Fence) -> Fences {
    (0u8..)
        .zip(latest)
        .map(|(stream, value)| Fence { stream, value: *value })
        .filter(|fence| fence.value > 0 && fence.stream != own.stream)
        .filter(|fence| !device.core().has_passed(*fence))
        .collect()
}

/// Notes on each block that this segment, which comes after those uses, uses it. Others may have
/// been noted meanwhile: by who drops a tensor, on any thread.
fn note(operations: &[Operation], fence: Fence, latest: &Latest) {
    let is_before = |read: &Fence| {
        read.stream == fence.stream || read.value <= latest[usize::from(read.stream)]
    };
    for operation in operations {
        for span in operation.reads() {
            span.block().usage.lock().note_read(fence);
        }
        for span in operation.writes() {
            span.block().usage.lock().note_write(fence, is_before);
        }
    }
}
