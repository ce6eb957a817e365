//! Spans and events of the `tracing` crate, and nothing without that feature.

/// Enters a span for the rest of the block.
macro_rules! span {
    ($name:literal $(, $field:ident = $value:expr)* $(,)?) => {
        #[cfg(feature = "tracing")]
        let _span = tracing::trace_span!(target: "batchline", $name $(, $field = $value)*).entered();
        #[cfg(not(feature = "tracing"))]
        let _ = ($(&$value,)*);
    };
}

/// Tells of something that the user should know and no call can return.
macro_rules! warning {
    ($($message:tt)*) => {
        #[cfg(feature = "tracing")]
        tracing::warn!(target: "batchline", $($message)*);
        #[cfg(not(feature = "tracing"))]
        eprintln!("batchline: {}", format_args!($($message)*));
    };
}

pub(crate) use {span, warning};
