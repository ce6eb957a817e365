//! Captures and graphs.

use crate::arguments::Out;
use crate::codes::{
    ILLEGAL_STATE, INVALID_VALUE, STREAM_CAPTURE_INVALIDATED, STREAM_CAPTURE_UNSUPPORTED,
};
use crate::driver::capture::{Capture, Executable, Graph, Mode};
use crate::driver::{driver, executor};

/// Those of `CUgraphInstantiate_flags`.
const FLAGS: u64 = 1 | 2 | 4 | 8;

driver! {
    fn cuStreamBeginCapture_v2(stream: usize, mode: u32) needs Context |driver| {
        let handle = driver.stream(stream)?;
        let mode = Mode::from_number(mode).ok_or(INVALID_VALUE)?;
        let context = driver.context;
        if driver.contexts.get(&context).is_some_and(|context| context.legacy == handle) {
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        if driver.captures.contains_key(&handle) {
            return Err(ILLEGAL_STATE);
        }
        let thread = executor::thread_number();
        let capture = Capture { context, mode, thread, work: Vec::new(), invalid: false };
        driver.captures.insert(handle, capture);
        Ok(())
    }

    fn cuStreamEndCapture(stream: usize, graph: Out<usize>) needs Context |driver| {
        let handle = driver.stream(stream)?;
        let Some(capture) = driver.captures.remove(&handle) else { return Err(ILLEGAL_STATE) };
        for event in driver.events.values_mut().filter(|event| event.captured == Some(handle)) {
            event.captured = None;
        }
        if capture.invalid {
            graph.set(0)?;
            return Err(STREAM_CAPTURE_INVALIDATED);
        }
        let new = driver.handle();
        driver.graphs.insert(new, Graph { context: capture.context, work: capture.work });
        graph.set(new)
    }

    /// 0, or 1 while it is captured, or 2 once that is invalid.
    fn cuStreamIsCapturing(stream: usize, status: Out<i32>) needs Context |driver| {
        let handle = driver.stream(stream)?;
        status.set(driver.captures.get(&handle).map_or(0, |capture| 1 + i32::from(capture.invalid)))
    }

    fn cuGraphInstantiateWithFlags(executable: Out<usize>, graph: usize, flags: u64)
        needs Context |driver|
    {
        if flags & !FLAGS != 0 || executable.is_null() {
            return Err(INVALID_VALUE);
        }
        let Some(graph) = driver.graphs.get(&graph).cloned() else {
            return driver.dead("graph", graph);
        };
        let new = driver.handle();
        driver.executables.insert(new, Executable { graph, last: None });
        executable.set(new)
    }

    fn cuGraphLaunch(executable: usize, stream: usize) needs Context |driver| {
        let handle = driver.stream(stream)?;
        driver.launch(executable, handle)
    }

    fn cuGraphDestroy(graph: usize) needs Context |driver| {
        match driver.graphs.remove(&graph) {
            Some(_) => Ok(()),
            None => driver.dead("graph", graph),
        }
    }

    fn cuGraphExecDestroy(executable: usize) needs Context |driver| {
        let Some(destroyed) = driver.executables.remove(&executable) else {
            return driver.dead("graph", executable);
        };
        if destroyed.last.is_some_and(|last| !driver.has_passed(last)) {
            driver.violation("a graph was destroyed while its work is queued");
        }
        Ok(())
    }
}
