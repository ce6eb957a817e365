//! Measures batchline on the host, beside plain loops and beside other loaders. `README.md` says
//! what and how; `run.sh` runs it.

mod allocations;
mod data;
mod end_to_end;
mod fill;
mod handover;
mod machine;
mod measure;
mod order;
mod overhead;
mod peers;
mod report;
mod workers;

use std::process::ExitCode;

use measure::Scale;
use report::Report;

/// Measures one row.
type Measure = fn(Scale, &mut Report);

/// The rows, by the names that the command line knows.
const ROWS: [(&str, Measure); 11] = [
    ("fill", fill::measure),
    ("cpu", overhead::cpu),
    ("allocations", overhead::allocations),
    ("handover", handover::measure),
    ("scaling", workers::scaling),
    ("first", workers::first_batch),
    ("memory", workers::memory),
    ("stop", workers::stop),
    ("order", order::measure),
    ("end-to-end", end_to_end::measure),
    ("peers", peers::measure),
];

fn main() -> ExitCode {
    let (mut quick, mut json, mut chosen) = (false, None, Vec::new());
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--quick" => quick = true,
            "--json" => json = arguments.next(),
            name => match ROWS.iter().find(|(row, _)| *row == name) {
                Some(row) => chosen.push(*row),
                None => {
                    let names = ROWS.map(|(row, _)| row).join(" ");
                    eprintln!("no row {name:?}; there are: {names}; and --quick, --json FILE");
                    return ExitCode::from(2);
                }
            },
        }
    }
    let machine = machine::Machine::look();
    machine.print();
    let mut report = Report::default();
    for (_, measure) in if chosen.is_empty() { ROWS.to_vec() } else { chosen } {
        measure(Scale { quick }, &mut report);
    }
    println!();
    report.summarise();
    if let Some(path) = json {
        let all = serde_json::json!({ "machine": machine, "quick": quick, "lines": report.lines });
        let text = serde_json::to_string_pretty(&all).expect("plain figures");
        if let Err(error) = std::fs::write(&path, text + "\n") {
            eprintln!("{path}: {error}");
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}
