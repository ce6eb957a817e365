//! The driver: its state, and what happens at every call.
#![allow(clippy::disallowed_types, reason = "batchline's locks are its own")]

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::codes::{
    CONTEXT_IS_DESTROYED, INVALID_CONTEXT, INVALID_HANDLE, NOT_INITIALIZED, NOT_SUPPORTED, Result,
    SUCCESS,
};
use capture::{Capture, Executable, Graph, Mode};
use memory::Memory;
use ptx::Entry;
use random::Random;
use rules::Manner;
use settings::Settings;
use stream::{Fence, Kind, Stream};

mod calls;
mod capture;
mod control;
mod executor;
mod kernels;
mod mapping;
mod memory;
mod ptx;
mod random;
mod rules;
mod settings;
mod stream;
mod work;

/// The environment variable with settings to start with.
const ENVIRONMENT: &str = "FAKE_CUDA";

/// All there is. One lock, as this is for tests; work on memory runs outside of it.
static STATE: LazyLock<Mutex<State>> = LazyLock::new(|| {
    let mut settings = Settings::default();
    if let Ok(text) = std::env::var(ENVIRONMENT)
        && let Err(fault) = settings.apply(&text)
    {
        eprintln!("fake-cuda: {ENVIRONMENT}: {fault}");
        std::process::abort();
    }
    Mutex::new(State::new(settings, FIRST_HANDLE))
});

/// Signalled whenever the state changed such that somebody may go on.
static CHANGED: Condvar = Condvar::new();

/// Handles are numbers that nothing lies at, and are given out once.
const FIRST_HANDLE: usize = 0x5A00_0000_0000;

#[derive(Debug)]
struct State {
    settings: Settings,
    random: Random,
    initialised: bool,
    /// For each device the primary context and how often it is retained.
    devices: Vec<(usize, usize)>,
    contexts: BTreeMap<usize, Context>,
    streams: BTreeMap<usize, Stream>,
    /// The per-thread default streams, by context and thread.
    thread_streams: BTreeMap<(usize, u64), usize>,
    events: BTreeMap<usize, Event>,
    modules: BTreeMap<usize, Module>,
    functions: BTreeMap<usize, Function>,
    graphs: BTreeMap<usize, Graph>,
    executables: BTreeMap<usize, Executable>,
    captures: BTreeMap<usize, Capture>,
    memory: Memory,
    calls: BTreeMap<&'static str, u64>,
    /// Symbols whose calls wait inside.
    held_calls: BTreeSet<String>,
    /// Work done so far that does something, and at which of it a context is to be lost.
    executed: u64,
    faults: Vec<(u64, u32)>,
    violations: Vec<String>,
    trace: Vec<String>,
    /// Objects that were destroyed with their context, by what they are.
    left: BTreeMap<&'static str, usize>,
    next_handle: usize,
    executor: bool,
}

#[derive(Debug)]
struct Context {
    device: usize,
    /// The error that it is lost by.
    lost: Option<u32>,
    /// Its legacy default stream.
    legacy: usize,
    /// Streams created in it.
    streams: usize,
}

#[derive(Debug)]
struct Event {
    context: usize,
    recorded: Option<Fence>,
    /// The stream whose capture it was last recorded in.
    captured: Option<usize>,
}

#[derive(Debug)]
struct Module {
    context: usize,
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Function {
    module: usize,
    entry: Entry,
}

impl State {
    fn new(settings: Settings, next_handle: usize) -> Self {
        Self {
            random: Random::new(settings.seed),
            initialised: false,
            devices: vec![(0, 0); settings.devices],
            contexts: BTreeMap::new(),
            streams: BTreeMap::new(),
            thread_streams: BTreeMap::new(),
            events: BTreeMap::new(),
            modules: BTreeMap::new(),
            functions: BTreeMap::new(),
            graphs: BTreeMap::new(),
            executables: BTreeMap::new(),
            captures: BTreeMap::new(),
            memory: Memory::default(),
            calls: BTreeMap::new(),
            held_calls: BTreeSet::new(),
            executed: 0,
            faults: Vec::new(),
            violations: Vec::new(),
            trace: Vec::new(),
            left: BTreeMap::new(),
            next_handle,
            executor: false,
            settings,
        }
    }

    fn handle(&mut self) -> usize {
        self.next_handle += 64;
        self.next_handle
    }

    fn violation(&mut self, what: impl Into<String>) {
        let what = what.into();
        if self.settings.print {
            eprintln!("fake-cuda: {what}");
        }
        self.violations.push(what);
    }

    /// A handle that names nothing: the caller is told, and so is the test.
    fn dead<T>(&mut self, what: &str, handle: usize) -> Result<T> {
        let why = if (FIRST_HANDLE..=self.next_handle).contains(&handle) {
            "was destroyed, or is no such thing"
        } else {
            "was never given out"
        };
        self.violation(format!("the {what} {handle:#x} {why}"));
        Err(INVALID_HANDLE)
    }

    fn new_stream(&mut self, context: usize, kind: Kind) -> usize {
        let handle = self.handle();
        let number = self.contexts.get_mut(&context).map_or(0, |context| {
            context.streams += 1;
            context.streams - 1
        });
        let seed = self.settings.seed.wrapping_add(number as u64).wrapping_mul(0x1234_5677);
        let stream = Stream::new(context, number, kind, self.settings.held, Random::new(seed));
        self.streams.insert(handle, stream);
        handle
    }

    /// The context that a thread works in, where it is one that works.
    fn check_context(&mut self, context: usize) -> Result<()> {
        if context == 0 {
            return Err(INVALID_CONTEXT);
        }
        match self.contexts.get(&context) {
            Some(Context { lost: Some(code), .. }) => Err(*code),
            Some(_) => Ok(()),
            None => {
                self.violation(format!("a call in the destroyed context {context:#x}"));
                Err(CONTEXT_IS_DESTROYED)
            }
        }
    }

    fn lose(&mut self, context: usize, code: u32) {
        let Some(lost) = self.contexts.get_mut(&context) else { return };
        lost.lost.get_or_insert(code);
        for stream in self.streams.values_mut().filter(|stream| stream.context == context) {
            stream.abandon();
        }
        self.captures.retain(|_, capture| capture.context != context);
        CHANGED.notify_all();
    }

    /// Whether the driver has a symbol that came with some version.
    fn has(&self, symbol: &str, since: i32) -> bool {
        since <= self.settings.version && !self.settings.missing.contains(symbol)
    }

    /// For symbols that are exported here, but that the driver of the settings lacks.
    fn demand(&mut self, symbol: &str, since: i32) -> Result<()> {
        if self.has(symbol, since) {
            return Ok(());
        }
        self.violation(format!("{symbol} was called, which this driver does not have"));
        Err(NOT_SUPPORTED)
    }
}

/// What a call needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
enum Need {
    /// Nothing, and it is counted but never made to fail.
    Nothing,
    /// Nothing.
    Library,
    /// That the driver was initialised.
    Init,
    /// A current context that is not lost.
    Context,
}

/// The driver, as a call sees it.
struct Driver {
    state: Option<MutexGuard<'static, State>>,
    /// The context current to the thread, or 0.
    context: usize,
}

impl Driver {
    /// Waits till `done`, or till the caller's context is lost.
    fn wait_until(&mut self, done: impl Fn(&State) -> bool) -> Result<()> {
        loop {
            let context = self.context;
            self.check_context(context)?;
            if done(self) {
                return Ok(());
            }
            self.wait();
        }
    }

    /// Waits for a change.
    fn wait(&mut self) {
        if let Some(state) = self.state.take() {
            self.state = Some(CHANGED.wait(state).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Waits for a change, no longer than this.
    fn wait_at_most(&mut self, time: Duration) {
        if let Some(state) = self.state.take() {
            let waited = CHANGED.wait_timeout(state, time);
            self.state = Some(waited.unwrap_or_else(PoisonError::into_inner).0);
        }
    }
}

impl Deref for Driver {
    type Target = State;

    fn deref(&self) -> &State {
        self.state.as_deref().expect("only taken while it waits")
    }
}

impl DerefMut for Driver {
    fn deref_mut(&mut self) -> &mut State {
        self.state.as_deref_mut().expect("only taken while it waits")
    }
}

fn lock() -> MutexGuard<'static, State> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

thread_local! {
    /// The contexts of this thread, the current one last.
    static CONTEXTS: RefCell<Vec<usize>> = const { RefCell::new(Vec::new()) };
    /// What it may do during captures.
    static MODE: Cell<Mode> = const { Cell::new(Mode::Global) };
    /// Whether its calls are the test's own.
    static SPARED: Cell<bool> = const { Cell::new(false) };
}

/// The process that loaded the library.
static PROCESS: LazyLock<u32> = LazyLock::new(std::process::id);

/// Runs a call.
fn enter(symbol: &'static str, need: Need, call: impl FnOnce(&mut Driver) -> Result<()>) -> u32 {
    if *PROCESS != std::process::id() {
        eprintln!("fake-cuda: {symbol} was called in a forked child");
        std::process::abort();
    }
    let context = CONTEXTS.with_borrow(|contexts| contexts.last().copied().unwrap_or(0));
    let mut driver = Driver { state: Some(lock()), context };
    let mut failure = None;
    if !SPARED.get() {
        *driver.calls.entry(symbol).or_default() += 1;
        while driver.held_calls.contains(symbol) {
            driver.wait();
        }
        if need != Need::Nothing {
            failure = rules::strike(&mut driver.settings.rules, symbol);
        }
    }
    match failure {
        Some((Manner::Before, code)) => return code,
        Some((Manner::Lose, code)) => driver.lose(context, code),
        Some((Manner::After, _)) | None => {}
    }
    let result = driver.ready(need).and_then(|()| call(&mut driver));
    match (failure, result) {
        (Some((_, code)), _) | (None, Err(code)) => code,
        (None, Ok(())) => SUCCESS,
    }
}

impl Driver {
    fn ready(&mut self, need: Need) -> Result<()> {
        if need >= Need::Init && !self.initialised {
            return Err(NOT_INITIALIZED);
        }
        if need == Need::Context {
            let context = self.context;
            self.check_context(context)?;
        }
        Ok(())
    }
}

/// Exports driver calls. What stands behind the arguments is what the call needs.
macro_rules! driver {
    ($($(#[$about:meta])* fn $name:ident($($argument:ident: $type:ty),* $(,)?)
        needs $need:ident |$driver:ident| $body:block)*) => {$(
        $(#[$about])*
        #[unsafe(no_mangle)]
        #[allow(non_snake_case, reason = "the driver's names")]
        pub(crate) extern "C" fn $name($($argument: $type),*) -> u32 {
            crate::driver::enter(
                stringify!($name),
                crate::driver::Need::$need,
                |$driver: &mut crate::driver::Driver| $body,
            )
        }
    )*};
}
use driver;
