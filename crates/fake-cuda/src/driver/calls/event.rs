//! Events. An event is the point where it was recorded last; who waits takes the point that it is
//! at the time of the call.

use crate::arguments::Out;
use crate::codes::{
    CAPTURED_EVENT, INVALID_HANDLE, INVALID_VALUE, NOT_READY, Result, STREAM_CAPTURE_ISOLATION,
};
use crate::driver::stream::Fence;
use crate::driver::work::Work;
use crate::driver::{Driver, Event, driver};

/// Blocking waits, no times, for other processes.
const FLAGS: u32 = 1 | 2 | 4;

impl Driver {
    /// The context of an event, its point, and its capture.
    fn event(&mut self, handle: usize) -> Result<(usize, Option<Fence>, Option<usize>)> {
        let Some(event) = self.events.get(&handle) else { return self.dead("event", handle) };
        let known = (event.context, event.recorded, event.captured);
        self.check_context(known.0)?;
        Ok(known)
    }

    /// The point of an event that the host asks about; `None` where it never was recorded.
    fn point(&mut self, handle: usize) -> Result<Option<Fence>> {
        let (_, point, captured) = self.event(handle)?;
        if let Some(stream) = captured {
            if let Some(capture) = self.captures.get_mut(&stream) {
                capture.invalid = true;
            }
            return Err(CAPTURED_EVENT);
        }
        self.unsafe_in_captures()?;
        Ok(point)
    }
}

driver! {
    fn cuEventCreate(event: Out<usize>, flags: u32) needs Context |driver| {
        if flags & !FLAGS != 0 || event.is_null() {
            return Err(INVALID_VALUE);
        }
        let handle = driver.handle();
        let context = driver.context;
        driver.events.insert(handle, Event { context, recorded: None, captured: None });
        event.set(handle)
    }

    /// Waits for it that were asked for stay.
    fn cuEventDestroy_v2(event: usize) needs Context |driver| {
        driver.event(event)?;
        driver.events.remove(&event);
        Ok(())
    }

    fn cuEventRecord(event: usize, stream: usize) needs Context |driver| {
        let (context, _, _) = driver.event(event)?;
        let handle = driver.stream(stream)?;
        if driver.streams.get(&handle).is_some_and(|stream| stream.context != context) {
            driver.violation("an event was recorded on a stream of another context");
            return Err(INVALID_HANDLE);
        }
        let captured = driver.captures.contains_key(&handle);
        let point = if captured { None } else { Some(driver.enqueue(handle, Work::Mark, &[])?) };
        if let Some(event) = driver.events.get_mut(&event) {
            event.recorded = point;
            event.captured = captured.then_some(handle);
        }
        Ok(())
    }

    fn cuEventQuery(event: usize) needs Context |driver| {
        let point = driver.point(event)?;
        if point.is_none_or(|point| driver.has_passed(point)) { Ok(()) } else { Err(NOT_READY) }
    }

    fn cuEventSynchronize(event: usize) needs Context |driver| {
        let Some(point) = driver.point(event)? else { return Ok(()) };
        driver.wait_until(|state| state.has_passed(point))?;
        // Of a lost context nothing is to come, but neither did it happen.
        driver.event(event).map(drop)
    }

    /// No time passes here: it is the benchmark's, which runs on this driver only to see that it
    /// works.
    fn cuEventElapsedTime(milliseconds: Out<f32>, from: usize, to: usize) needs Context |driver| {
        for event in [from, to] {
            let point = driver.point(event)?.ok_or(INVALID_HANDLE)?;
            if !driver.has_passed(point) {
                return Err(NOT_READY);
            }
        }
        milliseconds.set(0.0)
    }

    fn cuStreamWaitEvent(stream: usize, event: usize, flags: u32) needs Context |driver| {
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        let handle = driver.stream(stream)?;
        let (_, point, captured) = driver.event(event)?;
        driver.not_of_another_capture(captured, handle)?;
        if let Some(capture) = driver.captures.get_mut(&handle) {
            if captured.is_some() || point.is_none() {
                return Ok(());
            }
            capture.invalid = true;
            return Err(STREAM_CAPTURE_ISOLATION);
        }
        match point {
            Some(point) => driver.enqueue(handle, Work::Wait, &[point]).map(drop),
            None => Ok(()),
        }
    }
}
