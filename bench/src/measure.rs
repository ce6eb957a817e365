//! Runs contestants in turn and keeps every figure.

use std::time::{Duration, Instant};

use serde::Serialize;

/// The figures of one contestant, one a run.
#[derive(Debug, Clone, Serialize)]
pub struct Series {
    pub name: String,
    pub unit: &'static str,
    pub runs: Vec<f64>,
}

impl Series {
    pub fn new(name: impl Into<String>, unit: &'static str) -> Self {
        Self { name: name.into(), unit, runs: Vec::new() }
    }

    pub fn median(&self) -> f64 {
        self.quantile(0.5)
    }

    pub fn min(&self) -> f64 {
        self.quantile(0.0)
    }

    pub fn max(&self) -> f64 {
        self.quantile(1.0)
    }

    /// With linear interpolation between neighbours.
    pub fn quantile(&self, share: f64) -> f64 {
        let mut sorted = self.runs.clone();
        sorted.sort_by(f64::total_cmp);
        let place = share * (sorted.len() - 1) as f64;
        let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
        low + (high - low) * place.fract()
    }

    /// This divided by the other, round by round, so that drift hits both alike.
    pub fn over(&self, other: &Series) -> Series {
        let runs = self.runs.iter().zip(&other.runs).map(|(a, b)| a / b).collect();
        Series { name: format!("{} / {}", self.name, other.name), unit: "x", runs }
    }
}

/// One who is measured: a name and what yields a figure per run.
pub struct Contestant<'a> {
    pub name: String,
    pub run: Box<dyn FnMut() -> f64 + 'a>,
}

impl<'a> Contestant<'a> {
    pub fn new(name: impl Into<String>, run: impl FnMut() -> f64 + 'a) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }
}

/// Runs all contestants once a round, each round beginning with another one, so that nobody always
/// follows the same neighbour. A round before the first warms up and is not kept.
pub fn interleave(
    rounds: usize,
    unit: &'static str,
    mut contestants: Vec<Contestant<'_>>,
) -> Vec<Series> {
    let count = contestants.len();
    let mut series: Vec<_> =
        contestants.iter().map(|contestant| Series::new(&contestant.name, unit)).collect();
    for round in 0..=rounds {
        for turn in 0..count {
            let who = (round + turn) % count;
            let figure = (contestants[who].run)();
            if round > 0 {
                series[who].runs.push(figure);
            }
        }
    }
    series
}

/// How long it takes.
pub fn timed<R>(work: impl FnOnce() -> R) -> (Duration, R) {
    let start = Instant::now();
    let result = work();
    (start.elapsed(), result)
}

/// What to do and how much of it.
#[derive(Debug, Clone, Copy)]
pub struct Scale {
    pub quick: bool,
}

impl Scale {
    pub fn rounds(self) -> usize {
        if self.quick { 2 } else { 7 }
    }

    pub fn pick<T>(self, full: T, quick: T) -> T {
        if self.quick { quick } else { full }
    }
}
