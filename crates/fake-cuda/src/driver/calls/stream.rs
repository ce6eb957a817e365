//! Streams, and functions of the host on them.

use crate::arguments::Out;
use crate::codes::{INVALID_VALUE, NOT_READY, Result};
use crate::driver::stream::Kind;
use crate::driver::work::{HostCall, HostFunction, Work};
use crate::driver::{Driver, driver};

impl Driver {
    fn create_stream(&mut self, stream: Out<usize>, flags: u32) -> Result<()> {
        let kind = match flags {
            0 => Kind::Blocking,
            1 => Kind::NonBlocking,
            _ => return Err(INVALID_VALUE),
        };
        if stream.is_null() {
            return Err(INVALID_VALUE);
        }
        let context = self.context;
        stream.set(self.new_stream(context, kind))
    }
}

driver! {
    fn cuStreamCreate(stream: Out<usize>, flags: u32) needs Context |driver| {
        driver.create_stream(stream, flags)
    }

    /// Priorities are only hints.
    fn cuStreamCreateWithPriority(stream: Out<usize>, flags: u32, _priority: i32)
        needs Context |driver|
    {
        driver.create_stream(stream, flags)
    }

    /// What is queued is still done.
    fn cuStreamDestroy_v2(stream: usize) needs Context |driver| {
        if stream <= 2 {
            return driver.dead("stream", stream);
        }
        let handle = driver.stream(stream)?;
        driver.abandon_capture(handle);
        if let Some(stream) = driver.streams.get_mut(&handle) {
            stream.destroyed = true;
            if stream.queue.is_empty() {
                driver.streams.remove(&handle);
            }
        }
        Ok(())
    }

    fn cuStreamSynchronize(stream: usize) needs Context |driver| {
        let handle = driver.stream(stream)?;
        driver.not_captured(handle)?;
        driver.unsafe_in_captures()?;
        driver.wait_for_stream(handle)
    }

    fn cuStreamQuery(stream: usize) needs Context |driver| {
        let handle = driver.stream(stream)?;
        driver.not_captured(handle)?;
        driver.unsafe_in_captures()?;
        let end = driver.streams.get(&handle).map(|stream| stream.end(handle));
        if end.is_none_or(|end| driver.has_passed(end)) { Ok(()) } else { Err(NOT_READY) }
    }

    fn cuStreamGetCtx(stream: usize, context: Out<usize>) needs Context |driver| {
        let handle = driver.stream(stream)?;
        let own = driver.streams.get(&handle).map_or(0, |stream| stream.context);
        context.set(own)
    }

    fn cuLaunchHostFunc(stream: usize, function: Option<HostFunction>, data: usize)
        needs Context |driver|
    {
        let function = function.ok_or(INVALID_VALUE)?;
        let handle = driver.stream(stream)?;
        driver.submit(handle, Work::Host(HostCall { function, data }))
    }
}

impl Driver {
    /// Waits for all that is queued on a stream now.
    pub(super) fn wait_for_stream(&mut self, handle: usize) -> Result<()> {
        let known = self.streams.get(&handle).map(|stream| (stream.context, stream.end(handle)));
        let Some((context, end)) = known else { return Ok(()) };
        self.wait_until(|state| state.has_passed(end))?;
        // Of a lost context nothing is to come, but neither did it happen.
        self.check_context(context)
    }
}
