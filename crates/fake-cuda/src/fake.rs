//! What tests steer the loaded library with.
#![allow(clippy::disallowed_types, reason = "batchline's locks are its own")]

use std::collections::BTreeMap;
use std::ffi::{CString, c_char};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use libloading::Library;

/// How a call fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum When {
    /// Before it has an effect.
    Before = 0,
    /// After it had its effect.
    After = 1,
    /// Its context is lost, as if earlier work had failed.
    Lose = 2,
}

/// How much there is of each thing that must be destroyed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Live {
    /// How often primary contexts are retained.
    pub contexts: u64,
    pub streams: u64,
    pub events: u64,
    pub device_memory: u64,
    pub page_locked_memory: u64,
    pub registered_memory: u64,
    pub modules: u64,
    /// Graphs and their executables.
    pub graphs: u64,
    /// Captures that were not ended.
    pub captures: u64,
}

/// A stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// Its handle.
    pub handle: usize,
    /// The device's number.
    pub device: usize,
    /// Its place among the streams created on the device, from 1; 0 is the default stream.
    pub number: usize,
    /// Pieces of work that are not done.
    pub queued: usize,
}

/// The folder to name in `LD_LIBRARY_PATH` for programs that are to get this driver.
pub fn folder() -> &'static Path {
    Path::new(env!("OUT_DIR"))
}

/// Makes a driver that lacks some symbols, in a folder to name in `LD_LIBRARY_PATH`.
///
/// # Errors
/// The library can't be copied.
///
/// # Panics
/// There is no such symbol.
pub fn without(symbols: &[&str], folder: &Path) -> std::io::Result<()> {
    let mut library = std::fs::read(self::folder().join("libcuda.so.1"))?;
    for symbol in symbols {
        // Its entry in the table of names, which is then found under no name that is asked for.
        let name = [b"\0", symbol.as_bytes(), b"\0"].concat();
        let found = library.windows(name.len()).position(|window| window == name);
        library[found.unwrap_or_else(|| panic!("no symbol {symbol}")) + 1] = b'-';
    }
    std::fs::write(folder.join("libcuda.so.1"), library)
}

/// The loaded library, for one test at a time.
#[derive(Debug)]
pub struct Fake {
    library: &'static Library,
    _turn: MutexGuard<'static, ()>,
}

impl Fake {
    /// Begins with a new driver that has these settings, when other tests of this process are done
    /// with theirs. What they left in it is invalid from now on.
    ///
    /// # Panics
    /// The library can't be loaded, or the settings can't be read.
    pub fn start(settings: &str) -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let library = LIBRARY.get_or_init(|| {
            let path = folder().join("libcuda.so.1");
            // SAFETY: the library is this crate's, and has no initialisers but Rust's.
            let library = unsafe { Library::new(&path) };
            library.unwrap_or_else(|error| panic!("{}: {error}", path.display()))
        });
        let fake = Self { library, _turn: turn };
        fake.order("fake_cuda_reset", settings);
        fake
    }

    /// Changes settings from now on; all but `devices`.
    ///
    /// # Panics
    /// The settings can't be read.
    pub fn set(&self, settings: &str) {
        self.order("fake_cuda_set", settings);
    }

    /// Has the `nth` call from now (1 for the next) of a symbol, or of any, fail.
    ///
    /// # Panics
    /// `nth` or `code` is 0.
    pub fn fail(&self, symbol: Option<&str>, nth: u64, code: u32, when: When) {
        type Call = unsafe extern "C" fn(*const c_char, u64, u32, u32) -> i32;
        let symbol = text(symbol.unwrap_or("*"));
        let call: Call = self.symbol("fake_cuda_fail");
        // SAFETY: the text lives till the call is over.
        let result = unsafe { call(symbol.as_ptr(), nth, code, when as u32) };
        assert_eq!(result, 0, "a rule for call {nth} with code {code}");
    }

    /// Has the `nth` piece of work that is done from now (1 for the next) lose its context, with
    /// this code, instead of having its effect.
    ///
    /// # Panics
    /// `nth` or `code` is 0.
    pub fn fail_work(&self, nth: u64, code: u32) {
        type Call = unsafe extern "C" fn(u64, u32) -> i32;
        let call: Call = self.symbol("fake_cuda_fail_work");
        // SAFETY: numbers.
        assert_eq!(unsafe { call(nth, code) }, 0, "a fault at {nth} with code {code}");
    }

    /// Loses a device's context now.
    ///
    /// # Panics
    /// The device has none.
    pub fn lose(&self, device: usize, code: u32) {
        type Call = unsafe extern "C" fn(usize, u32) -> i32;
        let call: Call = self.symbol("fake_cuda_lose");
        // SAFETY: numbers.
        assert_eq!(unsafe { call(device, code) }, 0, "device {device} has no context");
    }

    /// Has a stream, named by its handle, start nothing till it is released.
    ///
    /// # Panics
    /// There is no such stream.
    pub fn hold(&self, stream: usize) {
        assert_ne!(stream, 0, "the default stream has a handle among `streams`");
        self.steer("fake_cuda_hold", stream);
    }

    /// Has a stream go on.
    ///
    /// # Panics
    /// There is no such stream.
    pub fn release(&self, stream: usize) {
        assert_ne!(stream, 0, "the default stream has a handle among `streams`");
        self.steer("fake_cuda_release", stream);
    }

    /// Has all streams start nothing, also those to come.
    pub fn hold_all(&self) {
        self.steer("fake_cuda_hold", 0);
    }

    /// Has all streams go on.
    pub fn release_all(&self) {
        self.steer("fake_cuda_release", 0);
    }

    /// Has calls of a symbol wait inside the driver till they are released, as when it is busy. They
    /// are counted when they come.
    pub fn hold_calls(&self, symbol: &str) {
        self.steer_calls(symbol, 1);
    }

    /// Has calls of a symbol go on.
    pub fn release_calls(&self, symbol: &str) {
        self.steer_calls(symbol, 0);
    }

    /// Makes calls that are the test's own: they are not counted, nor held, nor made to fail. What
    /// loads the driver by its name does so with the function `fake_cuda_spare`.
    pub fn spared<R>(&self, calls: impl FnOnce() -> R) -> R {
        type Call = unsafe extern "C" fn(u32) -> u32;
        let spare: Call = self.symbol("fake_cuda_spare");
        // SAFETY: a number.
        let before = unsafe { spare(1) };
        let result = calls();
        // SAFETY: a number.
        unsafe { spare(before) };
        result
    }

    /// Calls of a symbol, or of all.
    pub fn calls(&self, symbol: Option<&str>) -> u64 {
        let calls = self.all_calls();
        match symbol {
            Some(symbol) => calls.get(symbol).copied().unwrap_or(0),
            None => calls.values().sum(),
        }
    }

    /// Calls by symbol.
    pub fn all_calls(&self) -> BTreeMap<String, u64> {
        self.counts("calls")
    }

    /// What was done that must not be, in words. Looks for stray writes first.
    pub fn violations(&self) -> Vec<String> {
        self.lines("violations")
    }

    /// The work done since the start, with the setting `trace=1`.
    pub fn trace(&self) -> Vec<String> {
        self.lines("trace")
    }

    /// What was made and not destroyed.
    pub fn live(&self) -> Live {
        let counts = self.counts("live");
        let count = |what| counts.get(what).copied().unwrap_or(0);
        Live {
            contexts: count("contexts"),
            streams: count("streams"),
            events: count("events"),
            device_memory: count("device memory"),
            page_locked_memory: count("page-locked memory"),
            registered_memory: count("registered memory"),
            modules: count("modules"),
            graphs: count("graphs"),
            captures: count("captures"),
        }
    }

    /// What was destroyed only with its context, by what it is; but for contexts that were lost, in
    /// which nothing else can be destroyed.
    pub fn left_behind(&self) -> BTreeMap<String, u64> {
        self.counts("left")
    }

    /// All streams, in the order of their creation.
    pub fn streams(&self) -> Vec<Stream> {
        let lines = self.lines("streams");
        let parsed = lines.iter().map(|line| {
            let mut numbers = line.split(' ').map_while(|number| number.parse().ok());
            let mut next = || numbers.next().expect("the library writes four numbers");
            Stream { handle: next(), device: next(), number: next(), queued: next() }
        });
        parsed.collect()
    }

    /// A function of the library, to call as the driver's.
    ///
    /// # Panics
    /// There is none.
    pub fn symbol<T: Copy>(&self, name: &str) -> T {
        // SAFETY: it is only found here; who calls it says what it is.
        let symbol = unsafe { self.library.get::<T>(name.as_bytes()) };
        *symbol.unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    fn order(&self, name: &str, settings: &str) {
        type Call = unsafe extern "C" fn(*const c_char) -> i32;
        let (settings, call): (_, Call) = (text(settings), self.symbol(name));
        // SAFETY: the text lives till the call is over.
        let result = unsafe { call(settings.as_ptr()) };
        assert_eq!(result, 0, "the settings {settings:?} can't be read");
    }

    fn steer(&self, name: &str, stream: usize) {
        type Call = unsafe extern "C" fn(usize) -> i32;
        let call: Call = self.symbol(name);
        // SAFETY: a number.
        assert_eq!(unsafe { call(stream) }, 0, "no stream {stream:#x}");
    }

    fn steer_calls(&self, symbol: &str, held: u32) {
        type Call = unsafe extern "C" fn(*const c_char, u32) -> i32;
        let (symbol, call): (_, Call) = (text(symbol), self.symbol("fake_cuda_hold_calls"));
        // SAFETY: the text lives till the call is over.
        assert_eq!(unsafe { call(symbol.as_ptr(), held) }, 0, "no symbol {symbol:?}");
    }

    fn counts(&self, what: &str) -> BTreeMap<String, u64> {
        let lines = self.lines(what);
        let parsed = lines.iter().filter_map(|line| {
            let (count, what) = line.split_once(' ')?;
            Some((what.to_owned(), count.parse().ok()?))
        });
        parsed.collect()
    }

    fn lines(&self, what: &str) -> Vec<String> {
        type Call = unsafe extern "C" fn(*const c_char, *mut u8, usize) -> usize;
        let (what, call): (_, Call) = (text(what), self.symbol("fake_cuda_read"));
        let mut answer = vec![0; 1 << 12];
        loop {
            // SAFETY: there is as much room as it says.
            let len = unsafe { call(what.as_ptr(), answer.as_mut_ptr(), answer.len()) };
            if len < answer.len() {
                answer.truncate(len);
                return String::from_utf8_lossy(&answer).lines().map(str::to_owned).collect();
            }
            // It may grow in between.
            answer.resize(2 * len + 1, 0);
        }
    }
}

fn text(text: &str) -> CString {
    CString::new(text).expect("no zero in it")
}
