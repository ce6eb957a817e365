//! What can go wrong, as one enum: each variant says what, where, and what to do about it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

/// The result of this library's calls.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What user code (a source, a completion, a custom operation) may fail with.
pub type BoxError = Box<dyn std::error::Error + Send + Sync + 'static>;

/// The cause of an error. Shared, because an error ends a pipeline and is told to every caller.
pub type Cause = Arc<dyn std::error::Error + Send + Sync + 'static>;

/// What went wrong. The message does not repeat [`source`](std::error::Error::source); print the
/// chain, or use [`Error::chain`].
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A setting makes no sense.
    #[error("{setting} {problem}: {remedy}")]
    Config {
        /// The setting's name, such as `batch_size`.
        setting: &'static str,
        /// What is wrong with its value.
        problem: String,
        /// What to do.
        remedy: String,
    },

    /// A device was asked for that this machine or this build does not have.
    #[error("no {wanted} device: {reason}; {remedy}")]
    NoDevice {
        /// What was asked for.
        wanted: String,
        /// What is missing.
        reason: String,
        /// What to do.
        remedy: String,
    },

    /// A call to the device failed.
    #[error("{device}: {operation} failed")]
    Device {
        /// The device's name.
        device: String,
        /// What was being done.
        operation: &'static str,
        /// What the driver said.
        #[source]
        source: Cause,
    },

    /// The device is lost. Nothing that was in flight on it can be trusted, and its memory is
    /// never used again.
    #[error("{device} is lost ({reason}); open the device anew, or restart the process")]
    DeviceLost {
        /// The device's name.
        device: String,
        /// How it was noticed.
        reason: String,
    },

    /// A single request that can never fit under a byte limit.
    #[error(
        "{what} of {requested} bytes can never fit under {limit_name} of {limit} bytes: \
         raise the limit or ask for less"
    )]
    TooLarge {
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// The limit's name.
        limit_name: &'static str,
        /// The limit in bytes.
        limit: u64,
    },

    /// A byte limit is reached at this moment; memory comes back when tensors or buffers are
    /// dropped.
    #[error(
        "{what} of {requested} bytes does not fit now: {in_use} of {limit} bytes ({limit_name}) \
         are in use; drop tensors or raise the limit"
    )]
    LimitReached {
        /// What was to be allocated.
        what: String,
        /// Bytes asked for.
        requested: u64,
        /// Bytes in use.
        in_use: u64,
        /// The limit's name.
        limit_name: &'static str,
        /// The limit in bytes.
        limit: u64,
    },

    /// A product or sum of sizes does not fit 64 bits.
    #[error("the size of {what} overflows 64 bits: make it smaller")]
    Overflow {
        /// What was measured.
        what: String,
    },

    /// Two element types had to be the same.
    #[error("{what} has dtype {found}, expected {expected}")]
    DType {
        /// What has the wrong type.
        what: String,
        /// The type that was needed.
        expected: crate::DType,
        /// The type that it has.
        found: crate::DType,
    },

    /// A number of elements or bytes is not the one that was needed.
    #[error("{what} has {found} {unit}, expected {expected}")]
    Length {
        /// What has the wrong length.
        what: String,
        /// The length needed.
        expected: u64,
        /// The length that it has.
        found: u64,
        /// What is counted.
        unit: &'static str,
    },

    /// An operation that can't be recorded: out of bounds, overlapping, misaligned, of the wrong
    /// type, or on another device.
    #[error("cannot record {operation}: {problem}")]
    Record {
        /// The operation.
        operation: &'static str,
        /// Why not, with the numbers.
        problem: String,
    },

    /// Memory that is lent to the host cannot be written at the same time.
    #[error("{what} is bound for reading on the host: drop the view before writing to it")]
    Borrowed {
        /// What is bound.
        what: String,
    },

    /// A pool was closed by `cleanup`, or its device was closed.
    #[error("the {what} is closed: make a new one")]
    Closed {
        /// The pool.
        what: &'static str,
    },

    /// A wait was longer than the caller allowed.
    #[error("{what} did not come within {after:?}")]
    Timeout {
        /// What was waited for.
        what: &'static str,
        /// How long the wait was.
        after: Duration,
    },

    /// The consumer holds every batch that the outputs allow and asks for one more.
    #[error(
        "all {held} batches that the loader may have on the device are held by the consumer: \
         drop one before asking for the next, or raise max_held (now {max_held}) and, where it \
         bounds them, device_limit"
    )]
    TooManyHeld {
        /// Batches held.
        held: usize,
        /// The setting that allows more.
        max_held: usize,
    },

    /// A sample or a batch could not be produced. [`source`](std::error::Error::source) tells why.
    #[error("{stage}: {}", place(*.epoch, *.batch, *.sample))]
    Stage {
        /// The stage that failed: `source`, `worker`, `submitter`, `reaper`.
        stage: &'static str,
        /// The epoch, from 0.
        epoch: u64,
        /// The batch within the epoch, from 0.
        batch: u64,
        /// The sample's index in the data set, where one sample is to blame.
        sample: Option<u64>,
        /// The cause.
        #[source]
        source: Cause,
    },

    /// User code panicked; the panic was contained.
    #[error("{who} panicked: {message}")]
    Panicked {
        /// Whose code it was.
        who: &'static str,
        /// The panic's message.
        message: String,
    },

    /// User code failed.
    #[error("{who} failed")]
    User {
        /// Whose code it was.
        who: &'static str,
        /// Its error.
        #[source]
        source: Cause,
    },

    /// A source broke its contract.
    #[error("{problem}")]
    Source {
        /// What it did, with the numbers.
        problem: String,
    },

    /// More samples were bad than `ErrorPolicy::Skip` allows.
    #[error("{skipped} samples could not be read, more than the {at_most} that may be skipped")]
    TooManySkipped {
        /// Samples skipped so far, this one included.
        skipped: u64,
        /// How many may be skipped.
        at_most: u64,
        /// Why the last one could not be read.
        #[source]
        source: Cause,
    },

    /// A file is not what its format demands.
    #[error("{}: {problem}", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and the remedy.
        problem: String,
    },

    /// A file could not be read or written.
    #[error("{}: cannot {operation}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        operation: &'static str,
        /// What the system said.
        #[source]
        source: Cause,
    },

    /// A saved state that cannot be continued here.
    #[error("the saved state cannot be used: {problem}")]
    State {
        /// Why not, and the remedy.
        problem: String,
    },

    /// The loader is not in the state that the call needs.
    #[error("the loader is {state}: {remedy}")]
    Lifecycle {
        /// What it is: not started, already started, stopped.
        state: &'static str,
        /// What to do.
        remedy: &'static str,
    },

    /// `stop` could not join every worker: a source did not return from a call. The workers were
    /// detached; they end when the source returns, and until then keep their slot.
    #[error(
        "{workers} thread(s) still inside a call after {after:?}, of the source most likely; they \
         were detached and end when it returns"
    )]
    Detached {
        /// How many.
        workers: usize,
        /// How long `stop` waited.
        after: Duration,
    },

    /// The system refused a thread.
    #[error("cannot start the thread {name}")]
    Thread {
        /// Its name.
        name: String,
        /// What the system said.
        #[source]
        source: Cause,
    },
}

impl Error {
    /// The message with those of all its causes, joined by `: `, on one line.
    ///
    /// ```
    /// use batchline::Error;
    /// let err = Error::Io {
    ///     path: "a.npy".into(),
    ///     operation: "open",
    ///     source: std::sync::Arc::new(std::io::Error::other("disk on fire")),
    /// };
    /// assert_eq!(err.chain(), "a.npy: cannot open: disk on fire");
    /// ```
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = std::error::Error::source(self);
        while let Some(err) = cause {
            text.push_str(": ");
            text.push_str(&err.to_string());
            cause = err.source();
        }
        text.replace('\n', " ")
    }

    /// Whether the device is gone, so that only opening it anew can help.
    pub fn is_device_lost(&self) -> bool {
        let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(self);
        while let Some(err) = cause {
            // A shared cause is an error of its own, in front of what it shares.
            let own = match err.downcast_ref::<Cause>() {
                Some(shared) => shared.downcast_ref::<Error>(),
                None => err.downcast_ref::<Error>(),
            };
            if matches!(own, Some(Error::DeviceLost { .. })) {
                return true;
            }
            cause = err.source();
        }
        false
    }

    pub(crate) fn config(
        setting: &'static str,
        problem: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self::Config { setting, problem: problem.into(), remedy: remedy.into() }
    }

    pub(crate) fn record(operation: &'static str, problem: impl Into<String>) -> Self {
        Self::Record { operation, problem: problem.into() }
    }

    #[cfg_attr(not(feature = "formats"), allow(dead_code, reason = "formats only"))]
    pub(crate) fn format(path: &std::path::Path, problem: impl Into<String>) -> Self {
        Self::Format { path: path.to_owned(), problem: problem.into() }
    }

    pub(crate) fn io(
        path: &std::path::Path,
        operation: &'static str,
        source: std::io::Error,
    ) -> Self {
        Self::Io { path: path.to_owned(), operation, source: Arc::new(source) }
    }

    /// Turns what `catch_unwind` caught into an error.
    pub(crate) fn panicked(who: &'static str, payload: &(dyn std::any::Any + Send)) -> Self {
        let message = payload
            .downcast_ref::<&str>()
            .map(|text| (*text).to_owned())
            .or_else(|| payload.downcast_ref::<String>().cloned())
            .unwrap_or_else(|| "no message".to_owned());
        Self::Panicked { who, message }
    }
}

fn place(epoch: u64, batch: u64, sample: Option<u64>) -> String {
    match sample {
        Some(sample) => format!("sample {sample} in batch {batch} of epoch {epoch}"),
        None => format!("batch {batch} of epoch {epoch}"),
    }
}
