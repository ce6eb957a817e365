//! Endings that are no success: what is said, and the exit status.

use std::io::Write;
use std::process::ExitCode;

use batchline::Error;

/// Why the command ended without doing what it was asked to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Failure {
    status: u8,
    message: String,
}

impl Failure {
    /// Something could not be done.
    pub(crate) fn failed(message: impl Into<String>) -> Self {
        Self { status: 1, message: message.into() }
    }

    /// Something was asked for that makes no sense.
    pub(crate) fn usage(message: impl Into<String>) -> Self {
        Self { status: 2, message: message.into() }
    }

    /// An error of the parser, shortened to what is wrong and its tips. How the command is used in
    /// general, `--help` tells.
    pub(crate) fn usage_of(mistake: &clap::Error) -> Self {
        let text = mistake.to_string();
        let said: Vec<String> = text
            .trim_start_matches("error: ")
            .split("\n\n")
            .map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "))
            .take_while(|part| !part.starts_with("Usage:") && !part.starts_with("For more"))
            .collect();
        let said = said.join("; ");
        Self::usage(format!("{said}; see batchline --help"))
    }

    /// Tells it on stderr, in one line, and gives the exit status.
    pub(crate) fn report(&self) -> ExitCode {
        let line = self.message.replace(['\n', '\r'], " ");
        // Nobody is left to hear that stderr is closed.
        let _ = writeln!(std::io::stderr().lock(), "batchline: {line}");
        ExitCode::from(self.status)
    }
}

impl From<Error> for Failure {
    /// Settings that make no sense are wrong usage; everything else went wrong.
    fn from(error: Error) -> Self {
        match error {
            Error::Config { .. } => Self::usage(error.chain()),
            _ => Self::failed(error.chain()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::Options;
    use clap::Parser;

    #[test]
    fn mistakes_are_told_in_one_line() {
        for (arguments, said) in [
            (&["run", "x", "--sed", "1"][..], "a similar argument exists: '--seed'"),
            (&["run"], "the following required arguments were not provided: <DATASET>"),
            (&["run", "x", "--convert", "f33"], "[possible values: f32, f16, bf16]"),
            (&["fly"], "unrecognized subcommand 'fly'"),
            (&[], "requires a subcommand"),
        ] {
            let arguments = ["batchline"].iter().chain(arguments);
            let failure = Failure::usage_of(&Options::try_parse_from(arguments).unwrap_err());
            assert_eq!(failure.status, 2);
            assert!(failure.message.contains(said), "{}", failure.message);
            assert!(failure.message.ends_with("; see batchline --help"), "{}", failure.message);
            assert!(!failure.message.contains(['\n', '\u{1b}']), "{}", failure.message);
        }
    }
}
