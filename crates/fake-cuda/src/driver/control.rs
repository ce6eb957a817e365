//! What tests ask and order, beside the driver's own functions.

use std::ffi::c_char;
use std::fmt::Write;
use std::time::Instant;

use super::memory::Kind;
use super::rules::{Manner, Rule};
use super::settings::Settings;
use super::work::Work;
use super::{CHANGED, Driver, SPARED, State, lock, stream};
use crate::arguments::{In, Out};

/// Exports functions that return a number.
macro_rules! control {
    ($($(#[$about:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?)
        -> $result:ty |$driver:ident| $body:block)*) => {$(
        $(#[$about])*
        #[unsafe(no_mangle)]
        extern "C" fn $name($($argument: $type),*) -> $result {
            let mut driver = Driver { state: Some(lock()), context: 0 };
            let $driver = &mut driver;
            $body
        }
    )*};
}

control! {
    /// A new driver with these settings. 0, or 1 where they can't be read.
    fn fake_cuda_reset(settings: In<c_char>) -> i32 |driver| {
        let mut new = Settings::default();
        if !apply(&mut new, settings) {
            return 1;
        }
        let is_on_memory = |stream: &stream::Stream| {
            stream.running
                && stream.queue.front().is_some_and(|first| !matches!(first.work, Work::Host(_)))
        };
        driver.streams.values_mut().for_each(stream::Stream::abandon);
        while driver.streams.values().any(is_on_memory) {
            driver.wait();
        }
        let executor = driver.executor;
        let state = &mut **driver;
        let old = std::mem::replace(state, State::new(new, state.next_handle));
        driver.executor = executor;
        // Callers initialise the driver once in a process.
        driver.initialised = old.initialised && driver.settings.init == 0 && !driver.devices.is_empty();
        old.memory.abandon();
        CHANGED.notify_all();
        0
    }

    /// Changes settings, from now on. 0, or 1 where they can't be read.
    fn fake_cuda_set(settings: In<c_char>) -> i32 |driver| {
        let mut new = driver.settings.clone();
        if !apply(&mut new, settings) || new.devices != driver.settings.devices {
            return 1;
        }
        driver.settings = new;
        0
    }

    /// Has the `nth` call of a symbol from now (`*` for any) fail: 0 before it has an effect, 1
    /// after it, 2 as the context is lost. 1 where that can't be.
    fn fake_cuda_fail(symbol: In<c_char>, nth: u64, code: u32, manner: u32) -> i32 |driver| {
        let manner = match manner {
            0 => Manner::Before,
            1 => Manner::After,
            2 => Manner::Lose,
            _ => return 1,
        };
        let Ok(symbol) = symbol.text() else { return 1 };
        if nth == 0 || code == 0 {
            return 1;
        }
        driver.settings.rules.push(Rule::new(&symbol, nth, code, manner));
        0
    }

    /// Has the `nth` piece of work that is done from now lose its context instead.
    fn fake_cuda_fail_work(nth: u64, code: u32) -> i32 |driver| {
        if nth == 0 || code == 0 {
            return 1;
        }
        let at = driver.executed + nth;
        driver.faults.push((at, code));
        0
    }

    /// Loses a device's context now. 1 where it has none.
    fn fake_cuda_lose(device: usize, code: u32) -> i32 |driver| {
        let Some((context, 1..)) = driver.devices.get(device).copied() else { return 1 };
        driver.lose(context, code);
        0
    }

    /// Has a stream start nothing; with 0 every stream, also those to come. 1 where there is none.
    fn fake_cuda_hold(stream: usize) -> i32 |driver| {
        hold(driver, stream, true)
    }

    /// Has a stream go on; with 0 every stream.
    fn fake_cuda_release(stream: usize) -> i32 |driver| {
        hold(driver, stream, false)
    }

    /// Has calls of a symbol wait inside, or with 0 has them go on. 1 where there is no such name.
    fn fake_cuda_hold_calls(symbol: In<c_char>, held: u32) -> i32 |driver| {
        let Ok(symbol) = symbol.text() else { return 1 };
        if held == 0 {
            driver.held_calls.remove(&*symbol);
            CHANGED.notify_all();
        } else {
            driver.held_calls.insert(symbol);
        }
        0
    }

    /// Spares the calls of this thread, or with 0 not any more. Returns what was so before.
    fn fake_cuda_spare(spared: u32) -> u32 |_driver| {
        u32::from(SPARED.replace(spared != 0))
    }

    /// Writes as much of an answer in lines of text as there is room for, and returns its length.
    fn fake_cuda_read(what: In<c_char>, text: Out<u8>, room: usize) -> usize |driver| {
        let answer = what.text().ok().and_then(|what| answer(driver, &what)).unwrap_or_default();
        if room > 0 && text.set_text(&answer, room).is_err() {
            return 0;
        }
        answer.len()
    }
}

fn apply(settings: &mut Settings, text: In<c_char>) -> bool {
    text.text().is_ok_and(|text| settings.apply(&text).is_ok())
}

fn hold(driver: &mut Driver, handle: usize, held: bool) -> i32 {
    let now = Instant::now();
    let mut found = handle == 0;
    if handle == 0 {
        driver.settings.held = held;
    }
    for (own, stream) in &mut driver.streams {
        if handle == 0 || *own == handle {
            found = true;
            stream.held = held;
            // What waited begins now.
            stream.clock = stream.clock.max(now);
        }
    }
    CHANGED.notify_all();
    i32::from(!found)
}

fn answer(driver: &mut Driver, what: &str) -> Option<String> {
    let mut text = String::new();
    match what {
        "violations" => {
            let faults = driver.memory.inspect();
            faults.into_iter().for_each(|fault| driver.violation(fault));
            text = driver.violations.join("\n");
        }
        "trace" => text = driver.trace.join("\n"),
        "calls" => list(&mut text, driver.calls.iter().map(|(symbol, count)| (*symbol, *count))),
        "live" => list(&mut text, live(driver)),
        "left" => list(&mut text, driver.left.iter().map(|(what, count)| (*what, *count))),
        "streams" => {
            for (handle, stream) in &driver.streams {
                let device = driver.contexts.get(&stream.context)?.device;
                let (number, queued) = (stream.number, stream.queue.len());
                let _ = writeln!(text, "{handle} {device} {number} {queued}");
            }
        }
        _ => return None,
    }
    Some(text)
}

fn list(
    text: &mut String,
    entries: impl IntoIterator<Item = (&'static str, impl std::fmt::Display)>,
) {
    for (what, count) in entries {
        let _ = writeln!(text, "{count} {what}");
    }
}

/// What was made and not destroyed.
fn live(driver: &Driver) -> Vec<(&'static str, usize)> {
    let count = |kind: fn(Kind) -> bool| driver.memory.count(kind);
    let threads: Vec<_> = driver.thread_streams.values().collect();
    let streams = driver.streams.iter().filter(|(handle, stream)| {
        stream.kind != stream::Kind::Legacy && !stream.destroyed && !threads.contains(handle)
    });
    vec![
        ("contexts", driver.devices.iter().map(|(_, retained)| retained).sum()),
        ("streams", streams.count()),
        ("events", driver.events.len()),
        ("device memory", count(|kind| kind == Kind::Device)),
        ("page-locked memory", count(|kind| kind == Kind::PageLocked)),
        ("registered memory", count(|kind| matches!(kind, Kind::Registered { .. }))),
        ("modules", driver.modules.len()),
        ("graphs", driver.graphs.len() + driver.executables.len()),
        ("captures", driver.captures.len()),
    ]
}
