//! Births and deaths of tables, KVM's statistics, results of operations.

use std::collections::HashMap;

use serde_json::{Map, Value};
use tdpmmu_vm::VmStats;

use super::groups::races;
use super::{kind_of, number_of};
use crate::conform::inputs::{Input, What};
use crate::conform::load::Case;
use crate::conform::predict::{Book, NO_INPUT};
use crate::conform::recorded::Span;
use crate::conform::report::{CaseReport, LifeCount, Mismatch};

type Place = (u8, u64);

/// Compares births and deaths: per thread in order where one vCPU runs, else as multisets. A table that lost the race for its place was born and never linked:
/// where vCPUs race, births that were not predicted are such.
pub fn compare_lives(case: &Case, book: &Book, report: &mut CaseReport) {
    let races = races(&case.recorded.spans);
    let racing = |line: u64| {
        let at = races.partition_point(|&(_, end)| end < line);
        races.get(at).is_some_and(|&(begin, _)| begin <= line)
    };
    for birth in [true, false] {
        let known = if birth { case.recorded.has_births } else { case.recorded.has_deaths };
        if !known {
            continue;
        }
        let mut ours: HashMap<u32, Vec<Place>> = HashMap::new();
        let mut ours_anywhere: HashMap<Place, i64> = HashMap::new();
        for life in book.lives.iter().filter(|life| life.birth == birth) {
            let input = (life.input != NO_INPUT).then(|| case.inputs[life.input as usize]);
            match input {
                Some(input) if !racing(input.line) => {
                    ours.entry(input.thread).or_default().push((life.level, life.gfn));
                }
                _ => *ours_anywhere.entry((life.level, life.gfn)).or_default() += 1,
            }
        }
        let mut theirs: HashMap<u32, Vec<(Place, u64, u32)>> = HashMap::new();
        let mut count = LifeCount::default();
        for life in case.recorded.lives.iter().filter(|life| life.birth == birth) {
            count.expected += 1;
            let place = (life.level, life.gfn);
            if !case.recorded.workers.contains(&life.thread) && !racing(life.line) {
                theirs.entry(life.thread).or_default().push((place, life.line, life.op));
                continue;
            }
            let left = ours_anywhere.entry(place).or_default();
            if *left > 0 {
                *left -= 1;
                count.matched += 1;
            } else if birth {
                count.unlinked += 1;
            } else {
                count.differences += 1;
            }
        }
        count.differences += ours_anywhere.values().filter(|&&left| left > 0).sum::<i64>() as u64;
        for thread in 0..case.threads.len() as u32 {
            let (ours, theirs) =
                (ours.remove(&thread).unwrap_or_default(), theirs.remove(&thread).unwrap_or_default());
            let head = ours.iter().zip(&theirs).take_while(|(p, r)| **p == r.0).count();
            let rest = ours.len().min(theirs.len()) - head;
            let tail = (1..=rest).take_while(|i| ours[ours.len() - i] == theirs[theirs.len() - i].0).count();
            count.matched += (head + tail) as u64;
            let wrong = ours.len().max(theirs.len()) - head - tail;
            count.differences += wrong as u64;
            if wrong == 0 {
                continue;
            }
            let text = |place: Option<Place>| match place {
                Some((level, gfn)) => format!("table of level {level} at gfn {gfn:x}"),
                None => "nothing".to_owned(),
            };
            let (op, line) = theirs.get(head).map_or((u32::MAX, 0), |&(_, line, op)| (op, line));
            report.list(Mismatch {
                operation: number_of(case, op),
                kind: kind_of(case, op).to_owned(),
                cause: if birth { "birth" } else { "death" }.to_owned(),
                thread: case.threads[thread as usize].clone(),
                line,
                rule: "births and deaths of tables, thread by thread".to_owned(),
                expected: text(theirs.get(head).map(|one| one.0)),
                got: text(ours.get(head).copied()),
                recorded: Vec::new(),
                predicted: Vec::new(),
            });
        }
        if count.differences > 0 {
            let what = if birth { "births" } else { "deaths" };
            report.list(Mismatch {
                operation: 0,
                kind: String::new(),
                cause: what.to_owned(),
                thread: String::new(),
                line: 0,
                rule: format!("{what} of tables, all threads and workers together"),
                expected: format!("{} recorded", count.expected),
                got: format!("{} of them predicted, {} differences", count.matched, count.differences),
                recorded: Vec::new(),
                predicted: Vec::new(),
            });
        }
        report.differences += count.differences;
        if birth {
            report.births = Some(count);
        } else {
            report.deaths = Some(count);
        }
    }
}

/// Compares KVM's statistics after each operation with the engine's.
pub fn compare_statistics(case: &Case, book: &Book, report: &mut CaseReport) {
    let ours: HashMap<u64, &VmStats> = book.stats.iter().map(|(line, _, stats)| (*line, stats)).collect();
    let kicked = first_kick(case);
    for stat in &case.recorded.stats {
        let theirs = serde_json::from_slice::<Map<String, Value>>(&stat.json);
        let (Some(ours), Ok(theirs)) = (ours.get(&stat.line), theirs) else {
            report.statistics.skipped += 1;
            continue;
        };
        if stat.moving {
            report.statistics.skipped += 1;
            continue;
        }
        for (key, got) in numbers(ours) {
            let Some(expected) = theirs.get(key).and_then(Value::as_i64) else { continue };
            if key == "remote_tlb_flush" && stat.line > kicked {
                report.statistics.skipped += 1;
                continue;
            }
            report.statistics.compared += 1;
            if expected == got {
                continue;
            }
            report.statistics.mismatched += 1;
            *report.statistics.by_name.entry(key.to_owned()).or_default() += 1;
            report.differences += 1;
            let op = case.script.index(stat.number).unwrap_or(u32::MAX);
            report.list(Mismatch {
                operation: stat.number,
                kind: kind_of(case, op).to_owned(),
                cause: "statistics".to_owned(),
                thread: String::new(),
                line: stat.line,
                rule: format!("{key} after the operation"),
                expected: expected.to_string(),
                got: got.to_string(),
                recorded: Vec::new(),
                predicted: Vec::new(),
            });
        }
    }
}

/// remote_tlb_flush counts flushes that met a vCPU in the guest. From the first line on at which somebody else could have flushed while a vCPU ran, only the
/// clock knows whether one did.
fn first_kick(case: &Case) -> u64 {
    let runs: Vec<&Span> = case.recorded.spans.iter().filter(|span| span.runs).collect();
    let other = |input: &&Input| {
        let flushes = matches!(
            input.what,
            What::Unmap { .. } | What::Age { .. } | What::Script | What::NxZap | What::Work
        );
        let running =
            |span: &&Span| span.thread != input.thread && (span.begin..=span.end).contains(&input.line);
        flushes && runs.iter().any(running)
    };
    case.inputs.iter().find(other).map_or(u64::MAX, |input| input.line)
}

fn numbers(stats: &VmStats) -> [(&'static str, i64); 8] {
    [
        ("pages_4k", stats.pages_4k),
        ("pages_2m", stats.pages_2m),
        ("pages_1g", stats.pages_1g),
        ("pf_fixed", stats.pf_fixed as i64),
        ("pf_fast", stats.pf_fast as i64),
        ("pf_mmio_spte_created", stats.pf_mmio_spte_created as i64),
        ("nx_lpage_splits", stats.nx_lpage_splits as i64),
        ("remote_tlb_flush", stats.remote_tlb_flush as i64),
    ]
}

/// Compares what operations returned.
pub fn compare_outcomes(case: &Case, book: &Book, report: &mut CaseReport) {
    for (&op, ours) in &book.outcomes {
        let operation = &case.script.operations[op as usize];
        let theirs = |key: &str| operation.outcome.get(key).and_then(Value::as_i64);
        let params = |key: &str| operation.params.get(key).and_then(Value::as_i64);
        let pages = ours.pages.unwrap_or_default();
        let pairs = [
            ("dirty_pages", theirs("dirty_pages"), ours.dirty_pages.map(|n| n as i64)),
            ("first", theirs("first"), ours.first),
            ("last", theirs("last"), ours.last),
            ("collected", theirs("collected"), ours.collected.map(|n| n as i64)),
            ("ret", theirs("ret").filter(|_| ours.reset.is_some()), ours.reset.map(|n| n as i64)),
            ("pages_4k", params("pages_4k"), ours.pages.map(|_| pages[0])),
            ("pages_2m", params("pages_2m"), ours.pages.map(|_| pages[1])),
            ("pages_1g", params("pages_1g"), ours.pages.map(|_| pages[2])),
        ];
        for (key, expected, got) in pairs {
            let (Some(expected), Some(got)) = (expected, got) else { continue };
            report.results.compared += 1;
            if expected == got {
                continue;
            }
            report.results.mismatched += 1;
            *report.results.by_name.entry(key.to_owned()).or_default() += 1;
            report.differences += 1;
            report.list(Mismatch {
                operation: operation.number,
                kind: operation.kind.clone(),
                cause: "result".to_owned(),
                thread: String::new(),
                line: 0,
                rule: format!("{key} of the operation's result"),
                expected: expected.to_string(),
                got: got.to_string(),
                recorded: Vec::new(),
                predicted: Vec::new(),
            });
        }
    }
}
