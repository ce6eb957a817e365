//! The `batchline` command: loads a data set onto a device, measures it, and says what holds it up.
//!
//! `batchline run DATASET` does the work (`run`) and reports it (`summary`); `batchline devices`
//! says what there is to load onto (`devices`), and how fast (`copy_rate`). What the user may ask
//! for is in `options`. Every ending that is no success is a `failure::Failure`: one line on
//! stderr, and the exit status.

mod copy_rate;
mod devices;
mod failure;
mod options;
mod output;
mod progress;
mod quantities;
mod run;
mod summary;

use std::process::ExitCode;

use clap::Parser;

use failure::Failure;
use options::{Command, Options};

fn main() -> ExitCode {
    match dispatch() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.report(),
    }
}

fn dispatch() -> Result<(), Failure> {
    let options = match Options::try_parse() {
        Ok(options) => options,
        // `--help` and `--version` come this way too.
        Err(answer) if !answer.use_stderr() => return output::print(&answer.to_string()),
        Err(mistake) => return Err(Failure::usage_of(&mistake)),
    };
    match options.command {
        Command::Run(options) => run::run(&options),
        Command::Devices(options) => devices::list(&options),
    }
}
