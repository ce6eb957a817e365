//! What was measured: tables for people, JSON for everything else.

use serde::Serialize;

use crate::measure::Series;

/// What a figure has to reach.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Bar {
    AtLeast(f64),
    AtMost(f64),
    Exceeds(f64),
}

impl Bar {
    fn is_met(self, figure: f64) -> bool {
        match self {
            Bar::AtLeast(bar) => figure >= bar,
            Bar::AtMost(bar) => figure <= bar,
            Bar::Exceeds(bar) => figure > bar,
        }
    }

    fn text(self) -> String {
        match self {
            Bar::AtLeast(bar) => format!(">= {}", number(bar)),
            Bar::AtMost(bar) => format!("<= {}", number(bar)),
            Bar::Exceeds(bar) => format!("> {}", number(bar)),
        }
    }
}

/// One line of a table.
#[derive(Debug, Serialize)]
pub struct Line {
    pub row: &'static str,
    pub case: String,
    pub ours: Series,
    /// What it is compared with.
    pub beside: Option<Series>,
    /// Ours over theirs, round by round.
    pub ratio: Option<Series>,
    pub bar: Option<Bar>,
    /// The figure that the bar is about: the median of the ratio if there is one, else of ours,
    /// unless the line says otherwise.
    pub judged: f64,
    pub met: Option<bool>,
}

/// Collects lines and prints them as they come.
#[derive(Debug, Default)]
pub struct Report {
    row: &'static str,
    pub lines: Vec<Line>,
}

impl Report {
    pub fn row(&mut self, row: &'static str, title: &str) {
        self.row = row;
        println!("\n## {row}: {title}\n");
        println!(
            "| case | batchline (min to max) | beside (min to max) | ratio (min to max) | bar |"
        );
        println!("| --- | --- | --- | --- | --- |");
    }

    /// A figure beside another: the bar is about the median of their ratio.
    pub fn compare(
        &mut self,
        case: impl Into<String>,
        ours: &Series,
        beside: &Series,
        bar: Option<Bar>,
    ) {
        let ratio = ours.over(beside);
        let judged = ratio.median();
        self.line(case, ours, Some(beside), Some(ratio), bar, judged);
    }

    /// A figure alone: the bar is about its median.
    pub fn alone(&mut self, case: impl Into<String>, ours: &Series, bar: Option<Bar>) {
        self.line(case, ours, None, None, bar, ours.median());
    }

    /// A figure alone, with the bar about its largest value.
    pub fn worst(&mut self, case: impl Into<String>, ours: &Series, bar: Bar) {
        self.line(case, ours, None, None, Some(bar), ours.max());
    }

    /// How many bars were met, and which were not.
    pub fn summarise(&self) {
        let judged: Vec<_> = self.lines.iter().filter(|line| line.met.is_some()).collect();
        let missed: Vec<_> = judged.iter().filter(|line| line.met == Some(false)).collect();
        println!("{} of {} bars met", judged.len() - missed.len(), judged.len());
        for line in missed {
            let theirs = line.beside.as_ref().map_or(String::new(), |beside| beside.name.clone());
            println!("  not met: {}: {} {theirs}: {}", line.row, line.case, number(line.judged));
        }
    }

    fn line(
        &mut self,
        case: impl Into<String>,
        ours: &Series,
        beside: Option<&Series>,
        ratio: Option<Series>,
        bar: Option<Bar>,
        judged: f64,
    ) {
        let case = case.into();
        let met = bar.map(|bar| bar.is_met(judged));
        let verdict = match (bar, met) {
            (Some(bar), Some(true)) => format!("{}: met", bar.text()),
            (Some(bar), _) => format!("{}: NOT MET", bar.text()),
            (None, _) => String::new(),
        };
        println!(
            "| {case} | {} | {} | {} | {verdict} |",
            spread(ours),
            beside.map_or(String::new(), |series| format!("{} {}", series.name, spread(series))),
            ratio.as_ref().map_or(String::new(), spread),
        );
        let (ours, beside) = (ours.clone(), beside.cloned());
        self.lines.push(Line { row: self.row, case, ours, beside, ratio, bar, judged, met });
    }
}

fn spread(series: &Series) -> String {
    let (median, min, max) = (series.median(), series.min(), series.max());
    format!("**{}** {} ({} to {})", number(median), series.unit, number(min), number(max))
}

/// Three to four digits that matter, thousands with commas.
fn number(figure: f64) -> String {
    let digits = match figure.abs() {
        size if size >= 100.0 || size == 0.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 2,
        _ => 3,
    };
    let text = format!("{figure:.digits$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (place, digit) in whole.chars().enumerate() {
        let left = whole.len() - place;
        if place > 0 && left % 3 == 0 && !grouped.ends_with('-') {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped + rest
}
