//! The figures: a line each as they come, all of them as JSON.

use std::path::PathBuf;

use serde_json::{Map, Value, json};

/// What the note begins with where other bytes were delivered than must be.
pub(crate) const WRONG: &str = "wrong bytes";

/// Whose figures they are. `bench/compare.py` sets ours beside the others'.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Ours,
    /// The driver alone, copying one batch after the other.
    Loop,
    /// Threads that copy the same rows and send nothing.
    Threads,
}

/// One contender's figures in a row.
#[derive(Debug, Clone)]
pub(crate) struct Entry {
    row: String,
    who: String,
    kind: Kind,
    unit: &'static str,
    pub(crate) runs: Vec<f64>,
    /// Processor time by wall time, run by run.
    pub(crate) cores: Vec<f64>,
    facts: Map<String, Value>,
}

impl Entry {
    pub(crate) fn new(row: &str, who: &str, kind: Kind, unit: &'static str) -> Self {
        let (row, who) = (row.to_owned(), who.to_owned());
        Self { row, who, kind, unit, runs: Vec::new(), cores: Vec::new(), facts: Map::new() }
    }

    pub(crate) fn ours(row: &str, who: &str, unit: &'static str) -> Self {
        Self::new(row, who, Kind::Ours, unit)
    }

    pub(crate) fn with(mut self, fact: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(fact.to_owned(), value.into());
        self
    }

    pub(crate) fn runs(mut self, runs: Vec<f64>) -> Self {
        self.runs = runs;
        self
    }

    pub(crate) fn at_least(self, aim: f64) -> Self {
        self.with("aim", json!({ "at_least": aim }))
    }

    pub(crate) fn at_most(self, aim: f64) -> Self {
        self.with("aim", json!({ "at_most": aim }))
    }

    /// At least this share of another contender's figure in the same row, run by run.
    pub(crate) fn share_of(self, who: &str, share: f64) -> Self {
        self.with("aim", json!({ "at_least": share, "of": who }))
    }

    fn json(&self) -> Value {
        let kind = match self.kind {
            Kind::Ours => "ours",
            Kind::Loop => "loop",
            Kind::Threads => "threads",
        };
        let mut json = json!({
            "row": self.row, "who": self.who, "kind": kind, "unit": self.unit, "runs": self.runs,
        });
        if !self.cores.is_empty() {
            json["busy_cores"] = json!(self.cores);
        }
        for (fact, value) in &self.facts {
            json[fact] = value.clone();
        }
        json
    }
}

/// What is measured is kept as soon as it is there: the run may be cut short.
pub(crate) struct Report {
    path: Option<PathBuf>,
    about: Value,
    entries: Vec<Entry>,
    /// Whether bytes were wrong.
    pub(crate) failed: bool,
}

impl Report {
    pub(crate) fn new(path: Option<PathBuf>, about: Value) -> Self {
        Self { path, about, entries: Vec::new(), failed: false }
    }

    pub(crate) fn add(&mut self, entry: Entry) {
        let unit = entry.unit;
        let mut line = format!("{}: {} ", entry.row, entry.who);
        line += &match &entry.runs[..] {
            [] => "left out".to_owned(),
            runs => format!("{} {unit}", spread(runs)),
        };
        if let Some(bytes) = entry.facts.get("sample_bytes").and_then(Value::as_f64)
            && unit == "samples/s"
            && !entry.runs.is_empty()
        {
            line += &format!(", {} GB/s", number(median(&entry.runs) * bytes / 1e9));
        }
        if !entry.cores.is_empty() {
            line += &format!(", {} busy cores", number(median(&entry.cores)));
        }
        if let Some(note) = entry.facts.get("note").and_then(Value::as_str) {
            line += &format!(" ({note})");
            self.failed |= note.starts_with(WRONG);
        }
        println!("{line}");
        self.entries.push(entry);
        self.write();
    }

    fn write(&self) {
        let Some(path) = &self.path else { return };
        let mut whole = self.about.clone();
        whole["rows"] = self.entries.iter().map(Entry::json).collect();
        let text = serde_json::to_string_pretty(&whole).expect("plain values");
        std::fs::write(path, text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

pub(crate) fn median(runs: &[f64]) -> f64 {
    let mut sorted = runs.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Median, least and largest.
fn spread(runs: &[f64]) -> String {
    if runs.len() < 2 {
        return number(median(runs));
    }
    let least = runs.iter().copied().fold(f64::INFINITY, f64::min);
    let largest = runs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    format!("{} ({} to {})", number(median(runs)), number(least), number(largest))
}

fn number(value: f64) -> String {
    match value.abs() {
        0.0..1.0 => format!("{value:.4}"),
        1.0..10.0 => format!("{value:.3}"),
        10.0..1000.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// A run's figure, and how many cores were busy.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Figure {
    pub(crate) value: f64,
    pub(crate) cores: Option<f64>,
}

impl From<f64> for Figure {
    fn from(value: f64) -> Self {
        Self { value, cores: None }
    }
}

/// One who is measured: what is known of it, and what yields a figure per run.
pub(crate) struct Contender<'a> {
    entry: Entry,
    run: Option<Box<dyn FnMut() -> Figure + 'a>>,
}

impl<'a> Contender<'a> {
    pub(crate) fn new(entry: Entry, run: impl FnMut() -> Figure + 'a) -> Self {
        Self { entry, run: Some(Box::new(run)) }
    }

    pub(crate) fn with(self, fact: &str, value: impl Into<Value>) -> Self {
        Self { entry: self.entry.with(fact, value), ..self }
    }

    /// One who can't be measured here; the entry says why.
    pub(crate) fn left_out(entry: Entry) -> Self {
        Self { entry, run: None }
    }
}

/// Runs all contenders once a round, each round beginning with another one. A round before the
/// first warms up and is not kept.
pub(crate) fn in_turn(report: &mut Report, rounds: usize, mut contenders: Vec<Contender<'_>>) {
    let count = contenders.len();
    for round in 0..=rounds {
        for turn in 0..count {
            let contender = &mut contenders[(round + turn) % count];
            let Some(run) = &mut contender.run else { continue };
            let figure = run();
            if round > 0 {
                contender.entry.runs.push(figure.value);
                contender.entry.cores.extend(figure.cores);
            }
        }
    }
    contenders.into_iter().for_each(|contender| report.add(contender.entry));
}
