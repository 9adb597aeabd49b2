//! Our own figures, each beside the limit that it has to come near.
//!
//! A figure is what was measured; with the limits of the same run it becomes a row. A goal is a bound on the ratio where
//! the figure has a limit, else on the value. Figures are the least of their repetitions: what disturbs a run only ever
//! adds. Those of whole experiments with running vCPUs (`experiment`) are what one run gave, tails included.
//!
//! | file | figures |
//! | --- | --- |
//! | `zap.rs` | zap of a guest, shared and exclusive, with and without write-back |
//! | `vcpu.rs` | a page fault, a read section |
//! | `experiment.rs` | from the laboratory: dependent walks, vCPUs that drop a root, work between reschedule checks |
//! | `memory.rs` | bytes beside the tables, allocations of a zap |
//! | `text.rs` | reading a recording |
//!
//! `native.rs` is no figure of this table, but the native side of the calls that `benches/python` makes.

mod experiment;
pub mod memory;
pub mod native;
mod text;
mod vcpu;
mod zap;

use std::fmt::Write as _;

use serde::Serialize;

use crate::cli::{Options, Report};
use crate::harness::{BenchError, Work};
use crate::limits::{LimitOptions, Limits, measure};
use crate::tree;

/// What a figure is set against.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Basis {
    Swap,
    Cmpxchg,
    /// Every entry is written twice: by compare-exchange while it is in use, by swap when its table is dead.
    CmpxchgAndSwap,
    Write,
    /// A figure of the same experiment.
    Own(&'static str, f64),
}

impl Basis {
    fn of(self, limits: &Limits) -> (&'static str, f64) {
        let one = &limits.one;
        match self {
            Self::Swap => ("swap_ns", one.swap_ns),
            Self::Cmpxchg => ("cmpxchg_ns", one.cmpxchg_ns),
            Self::CmpxchgAndSwap => {
                ("(cmpxchg_ns + swap_ns) / 2", f64::midpoint(one.cmpxchg_ns, one.swap_ns))
            }
            Self::Write => ("write_ns", one.write_ns),
            Self::Own(name, value) => (name, value),
        }
    }
}

/// What is wanted of a ratio, or of a value that has no limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Goal {
    /// Shown for comparison.
    None,
    AtMost(f64),
    AtLeast(f64),
}

/// A measurement, before there are limits to set it against.
#[derive(Debug, Clone)]
pub struct Figure {
    pub name: String,
    pub value: f64,
    /// Unit of the value.
    pub unit: &'static str,
    pub basis: Option<Basis>,
    pub goal: Goal,
    /// Operations, or samples, behind the value.
    pub count: u64,
}

impl Figure {
    /// A time per operation without a limit or a goal.
    pub fn ns(name: impl Into<String>, value: f64, count: u64) -> Self {
        Self { name: name.into(), value, unit: "ns", basis: None, goal: Goal::None, count }
    }

    /// The same in another unit.
    #[must_use]
    pub fn unit(self, unit: &'static str) -> Self {
        Self { unit, ..self }
    }

    /// The same, set against `basis`.
    #[must_use]
    pub fn of(self, basis: Basis) -> Self {
        Self { basis: Some(basis), ..self }
    }

    /// The same, with a goal.
    #[must_use]
    pub fn goal(self, goal: Goal) -> Self {
        Self { goal, ..self }
    }
}

/// A row of the table.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub name: String,
    pub value: f64,
    /// Unit of the value.
    pub unit: &'static str,
    /// The limit in that unit, and its name.
    pub limit: Option<f64>,
    pub of: Option<&'static str>,
    /// `value` over `limit`.
    pub ratio: Option<f64>,
    /// Bound on the ratio where there is a limit, else on the value.
    pub goal: Option<f64>,
    /// The bound is a lower one.
    pub at_least: bool,
    pub met: Option<bool>,
    /// Operations, or samples, behind the value.
    pub count: u64,
}

fn row(figure: Figure, limits: &Limits) -> Row {
    let Figure { name, value, unit, basis, goal, count } = figure;
    let limit = basis.map(|basis| basis.of(limits));
    let ratio = limit.map(|(_, limit)| value / limit);
    let judged = ratio.unwrap_or(value);
    let (bound, at_least, met) = match goal {
        Goal::None => (None, false, None),
        Goal::AtMost(most) => (Some(most), false, Some(judged <= most)),
        Goal::AtLeast(least) => (Some(least), true, Some(judged >= least)),
    };
    let (of, limit) = limit.unzip();
    Row { name, value, unit, limit, of, ratio, goal: bound, at_least, met, count }
}

/// Measures everything.
///
/// # Errors
/// What the first figure that could not be taken says.
pub fn run(options: &Options) -> Result<Report<Row>, BenchError> {
    let (memory, reps) = (options.memory_bytes, options.reps);
    let talk = |what: &str| eprintln!("goals: {what}");
    // First: later figures leave a heap behind.
    talk("memory beside the tables");
    let beside = memory::beside_tables(memory >> 12)?;
    talk("limits");
    let before = measure(&LimitOptions::default())?;
    talk("zap");
    let mut figures = zap::figures(memory, reps)?;
    talk("populate");
    figures.extend(populate(memory >> 12, reps)?);
    talk("page faults, read sections");
    figures.extend(vcpu::figures(reps)?);
    talk("dependent walks");
    figures.extend(experiment::walks()?);
    figures.extend(beside);
    talk("allocations");
    figures.extend(memory::allocations()?);
    talk("trace text");
    figures.push(text::reading(reps)?);
    talk("vCPUs that drop a root");
    figures.extend(experiment::drops(memory)?);
    talk("work between reschedule checks");
    figures.extend(experiment::steps(memory)?);
    talk("limits again");
    let limits = before.bracket(&measure(&LimitOptions::default())?);
    let rows: Vec<Row> = figures.into_iter().map(|figure| row(figure, &limits)).collect();
    let missed = rows.iter().filter(|row| row.met == Some(false)).count();
    let mut report = Report::new("tdpmmu.goals/1", options, limits, rows);
    if options.has("--check") && missed > 0 {
        report.failed = Some(format!("{missed} goals missed"));
    }
    Ok(report)
}

fn populate(pages: u64, reps: u32) -> Result<Vec<Figure>, BenchError> {
    let figure = |sample: crate::harness::Sample| {
        debug_assert_eq!(sample.work, Work::Map);
        let how = sample.name.trim_start_matches("tdpmmu ");
        let figure = Figure::ns(format!("populate {how}"), sample.ns, sample.count);
        if how == "(bulk)" {
            return figure.of(Basis::Write).goal(Goal::AtMost(1.2));
        }
        figure.of(Basis::Cmpxchg).goal(Goal::AtMost(1.4))
    };
    Ok(tree::map_samples(pages, reps)?.into_iter().map(figure).collect())
}

/// The table for people.
pub fn table(rows: &[Row], _limits: &Limits) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "{:<58} {:>10}       {:>9} {:>8} {:>8}         of",
        "figure", "value", "limit", "ratio", "goal"
    );
    for row in rows {
        let number = |value: Option<f64>| value.map_or_else(String::new, |value| format!("{value:.2}"));
        let bound = row
            .goal
            .map_or_else(String::new, |goal| format!("{}{goal}", if row.at_least { ">= " } else { "<= " }));
        let met = match row.met {
            None => "",
            Some(true) => "met",
            Some(false) => "MISSED",
        };
        let _ = writeln!(
            out,
            "{:<58} {:>10.2} {:<5} {:>9} {:>8} {bound:>8} {met:<7} {}",
            row.name,
            row.value,
            row.unit,
            number(row.limit),
            number(row.ratio),
            row.of.unwrap_or(""),
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::tests::limits;

    #[test]
    fn a_goal_is_on_the_ratio_where_there_is_a_limit_else_on_the_value() {
        let zap = Figure::ns("zap", 5.5, 1).of(Basis::CmpxchgAndSwap);
        for (bound, met) in [(1.2, false), (1.25, true)] {
            let row = row(zap.clone().goal(Goal::AtMost(bound)), &limits());
            assert_eq!((row.limit, row.met), (Some(4.5), Some(met)), "{bound}");
        }
        let read = Figure::ns("read", 299.0, 1).unit("MB/s").goal(Goal::AtLeast(300.0));
        assert_eq!(row(read, &limits()).met, Some(false));
        let own = Figure::ns("drop", 30.0, 1).of(Basis::Own("baseline", 20.0)).goal(Goal::AtMost(2.0));
        assert_eq!((row(own.clone(), &limits()).ratio, row(own, &limits()).met), (Some(1.5), Some(true)));
    }

    #[test]
    fn the_table_says_what_was_missed() {
        let missed = Figure::ns("slow", 3.0, 1).goal(Goal::AtMost(2.0));
        let rows = [row(missed, &limits()), row(Figure::ns("free", 1.0, 1), &limits())];
        let text = table(&rows, &limits());
        let lines: Vec<&str> = text.lines().collect();
        assert!(lines[1].contains("<= 2") && lines[1].contains("MISSED"), "{text}");
        assert!(!lines[2].contains("met"), "{text}");
    }

    #[test]
    fn populate_has_three_ways() {
        let figures = populate(1 << 12, 1).unwrap();
        let bases: Vec<_> = figures.iter().map(|figure| figure.basis).collect();
        assert_eq!(bases, [Some(Basis::Cmpxchg), Some(Basis::Cmpxchg), Some(Basis::Write)]);
    }
}
