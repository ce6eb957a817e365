//! Primary contexts, and which one is current to a thread.

use std::time::Instant;

use crate::arguments::Out;
use crate::codes::{INVALID_CONTEXT, INVALID_VALUE, Result};
use crate::driver::capture::Mode;
use crate::driver::stream::Fence;
use crate::driver::{CHANGED, CONTEXTS, Context, Driver, MODE, driver, stream};

impl Driver {
    /// Makes a device's primary context, or has it once more.
    fn retain(&mut self, device: usize) -> usize {
        let (mut context, retained) = self.devices[device];
        if retained == 0 {
            context = self.handle();
            self.contexts.insert(context, Context { device, lost: None, legacy: 0, streams: 0 });
            let legacy = self.new_stream(context, stream::Kind::Legacy);
            if let Some(new) = self.contexts.get_mut(&context) {
                new.legacy = legacy;
            }
        }
        self.devices[device] = (context, retained + 1);
        context
    }

    /// Destroys a context with all that is in it.
    fn destroy(&mut self, context: usize) {
        let lost = self.contexts.get(&context).is_some_and(|context| context.lost.is_some());
        let of_context = |stream: &&stream::Stream| stream.context == context;
        let queued: usize =
            self.streams.values().filter(of_context).map(|stream| stream.queue.len()).sum();
        if queued > 0 && !lost {
            self.violation(format!("a context was destroyed with {queued} operations queued"));
        }
        for stream in self.streams.values_mut().filter(|stream| stream.context == context) {
            stream.abandon();
        }
        while self.streams.values().filter(of_context).any(|stream| stream.running) {
            self.wait();
        }
        for block in self.memory.of_context(context) {
            self.leave(block.kind.name(), usize::from(!lost));
            let faults = self.memory.free(&block, false);
            faults.into_iter().for_each(|fault| self.violation(fault));
        }
        let own = |stream: &stream::Stream| stream.kind != stream::Kind::Legacy;
        let threads: Vec<_> = self.thread_streams.values().copied().collect();
        let streams = self.streams.iter().filter(|(handle, stream)| {
            stream.context == context
                && own(stream)
                && !stream.destroyed
                && !threads.contains(handle)
        });
        let streams = streams.count();
        let events = self.events.values().filter(|event| event.context == context).count();
        let modules = self.modules.values().filter(|module| module.context == context).count();
        let executables = self.executables.values().map(|executable| &executable.graph);
        let graphs = self.graphs.values().chain(executables);
        let graphs = graphs.filter(|graph| graph.context == context).count();
        let captures = self.captures.values().filter(|capture| capture.context == context).count();
        for (what, count) in [
            ("streams", streams),
            ("events", events),
            ("modules", modules),
            ("graphs", graphs),
            ("captures", captures),
        ] {
            self.leave(what, if lost { 0 } else { count });
        }
        self.streams.retain(|_, stream| stream.context != context);
        self.thread_streams.retain(|(own, _), _| *own != context);
        self.events.retain(|_, event| event.context != context);
        self.modules.retain(|_, module| module.context != context);
        self.graphs.retain(|_, graph| graph.context != context);
        self.executables.retain(|_, executable| executable.graph.context != context);
        self.captures.retain(|_, capture| capture.context != context);
        let state = &mut **self;
        state.functions.retain(|_, function| state.modules.contains_key(&function.module));
        state.contexts.remove(&context);
        CHANGED.notify_all();
    }

    fn leave(&mut self, what: &'static str, count: usize) {
        if count > 0 {
            *self.left.entry(what).or_default() += count;
        }
    }
}

driver! {
    fn cuDevicePrimaryCtxRetain(context: Out<usize>, device: i32) needs Init |driver| {
        let device = driver.device(device)?;
        if context.is_null() {
            return Err(INVALID_VALUE);
        }
        context.set(driver.retain(device))
    }

    fn cuDevicePrimaryCtxRelease_v2(device: i32) needs Init |driver| {
        let device = driver.device(device)?;
        let (context, retained) = driver.devices[device];
        if retained == 0 {
            driver.violation(format!("the context of device {device} was released too often"));
            return Err(INVALID_CONTEXT);
        }
        driver.devices[device].1 -= 1;
        if retained == 1 {
            driver.destroy(context);
        }
        Ok(())
    }

    fn cuCtxGetCurrent(context: Out<usize>) needs Init |driver| {
        context.set(driver.context)
    }

    fn cuCtxSetCurrent(context: usize) needs Init |driver| {
        driver.known_context(context)?;
        CONTEXTS.with_borrow_mut(|contexts| {
            contexts.pop();
            contexts.extend((context != 0).then_some(context));
        });
        Ok(())
    }

    fn cuCtxPushCurrent_v2(context: usize) needs Init |driver| {
        if context == 0 {
            return Err(INVALID_CONTEXT);
        }
        driver.known_context(context)?;
        CONTEXTS.with_borrow_mut(|contexts| contexts.push(context));
        Ok(())
    }

    fn cuCtxPopCurrent_v2(context: Out<usize>) needs Init |_driver| {
        let popped = CONTEXTS.with_borrow_mut(Vec::pop).ok_or(INVALID_CONTEXT)?;
        if context.is_null() { Ok(()) } else { context.set(popped) }
    }

    /// It answers for a lost context too.
    fn cuCtxGetDevice(device: Out<i32>) needs Init |driver| {
        let known = driver.contexts.get(&driver.context).ok_or(INVALID_CONTEXT)?;
        device.set(i32::try_from(known.device).map_err(|_| INVALID_VALUE)?)
    }

    fn cuCtxSynchronize() needs Context |driver| {
        driver.unsafe_in_captures()?;
        let ends = driver.ends();
        driver.wait_until(|state| ends.iter().all(|end| state.has_passed(*end)))
    }

    fn cuThreadExchangeStreamCaptureMode(mode: Out<u32>) needs Init |_driver| {
        let new = Mode::from_number(mode.get()?).ok_or(INVALID_VALUE)?;
        mode.set(MODE.replace(new) as u32)
    }
}

impl Driver {
    fn known_context(&mut self, context: usize) -> Result<()> {
        if context == 0 || self.contexts.contains_key(&context) {
            return Ok(());
        }
        self.dead::<()>("context", context).or(Err(INVALID_CONTEXT))
    }
}

impl Driver {
    /// The ends of all streams of the caller's context.
    fn ends(&self) -> Vec<Fence> {
        let of_context = self.streams.iter().filter(|(_, stream)| stream.context == self.context);
        of_context.map(|(handle, stream)| stream.end(*handle)).collect()
    }

    /// Waits for all that is queued in the caller's context now, in a call that the driver begins
    /// only then. A test that keeps it from being over is told, and goes on.
    pub(super) fn settle(&mut self, symbol: &str) -> Result<()> {
        let (context, ends, began) = (self.context, self.ends(), Instant::now());
        loop {
            self.check_context(context)?;
            let ahead = ends.iter().copied().find(|end| !self.has_passed(*end));
            let Some(ahead) = ahead else { return Ok(()) };
            let left = self.settings.patience.saturating_sub(began.elapsed());
            if left.is_zero() {
                let behind = self.streams.get(&ahead.stream).map_or_else(String::new, |stream| {
                    let first = stream.queue.front().map(|first| first.work.describe());
                    format!("stream {}: {}", stream.number, first.unwrap_or_default())
                });
                self.violation(format!(
                    "{symbol} waits for all that was queued before it, which does not end: {behind}"
                ));
                return Ok(());
            }
            self.wait_at_most(left);
        }
    }

    /// What `cuMemAlloc` may still give.
    pub(super) fn free_memory(&self) -> usize {
        self.settings.memory.saturating_sub(self.memory.used(self.context))
    }
}
