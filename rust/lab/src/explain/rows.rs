//! Which lines become rows, and which are folded.
//!
//! What happened before the threads started is one row: what the set-up left. From there on each line is a row, unless it says little: then it is told while the story is short, or where it concerns the root or
//! the gfn that the finding is about.

use std::collections::BTreeMap;

use tdpmmu_platform::Event;
use tdpmmu_platform::sim::Kind;

use super::books::Books;
use super::words::{self, Weight};
use super::{Mark, Row};
use crate::program::{Finding, Outcome, Program, Told};

/// With more rows than that, details go.
const SHORT: usize = 90;
/// With more rows than that, steps that concern another root or gfn go as well.
const LONG: usize = 220;

struct Draft {
    at: u64,
    task: u32,
    mark: Mark,
    weight: Weight,
    concerns: bool,
    text: String,
}

/// The columns and the rows of a story.
pub(super) fn rows(
    program: &Program,
    outcome: &Outcome,
    finding: Option<&Finding>,
) -> (Vec<String>, Vec<Row>) {
    let Ok(config) = program.machine.config(1, None) else { return (Vec::new(), Vec::new()) };
    let mut books = Books::new(program.machine.levels);
    let mut drafts = Vec::new();
    let first_act = outcome.lines.iter().position(|line| matches!(line.told, Told::Begins(_)));
    let start = first_act.unwrap_or(outcome.lines.len());
    let mut held = Vec::new();
    for (n, line) in outcome.lines.iter().enumerate() {
        if n == start {
            held = books.held();
        }
        let concerns = |event: &Event| concerns(event, finding);
        let (mark, weight, concern, text) = match &line.told {
            Told::Event(event) => {
                books.note(event);
                let (weight, text) = words::event(&books, &config.format, event);
                (Mark::Plain, weight, concerns(event), text)
            }
            Told::Begins(act) => (Mark::Act, Weight::Step, true, format!("> {act}")),
            Told::Ended(what) => (Mark::Act, Weight::Step, true, format!("< {what}")),
            Told::Violation(what) => (Mark::Violation, Weight::Step, true, format!("! {what}")),
        };
        if n >= start || mark == Mark::Violation {
            drafts.push(Draft { at: line.at, task: line.task, mark, weight, concerns: concern, text });
        }
    }
    add_switches(outcome, &mut drafts);
    // The simulation's own findings were told by no judge.
    for violation in &outcome.run.violations {
        let told =
            drafts.iter().any(|draft| draft.mark == Mark::Violation && draft.text.contains(violation.rule));
        if !told {
            let text = format!("! {}: {}", violation.rule, violation.what);
            let task = violation.task.unwrap_or(0);
            let (mark, weight) = (Mark::Violation, Weight::Step);
            drafts.push(Draft { at: violation.at, task, mark, weight, concerns: true, text });
        }
    }
    drafts.sort_by_key(|draft| draft.at);
    // What is told while the run is taken down is no part of it.
    if let Some(last) = drafts.iter().rposition(|draft| draft.mark == Mark::Violation) {
        drafts.truncate(last + 1);
    }
    let mut least = Weight::Detail;
    if shown(&drafts, least, false) > SHORT {
        least = Weight::Step;
    }
    let strict = shown(&drafts, least, false) > LONG;
    columns(outcome, drafts, least, strict, &held)
}

fn shows(draft: &Draft, least: Weight, strict: bool) -> bool {
    draft.mark != Mark::Plain || (draft.weight >= least && (draft.concerns || !strict))
}

fn shown(drafts: &[Draft], least: Weight, strict: bool) -> usize {
    drafts.iter().filter(|draft| shows(draft, least, strict)).count()
}

/// Is the event about what the finding is about?
fn concerns(event: &Event, finding: Option<&Finding>) -> bool {
    let Some(finding) = finding else { return true };
    let text = format!("{event:?}");
    let root = finding.root.is_some_and(|root| {
        text.contains(&format!("root: {root},")) || text.contains(&format!("root: {root} "))
    });
    let gfn = finding
        .gfn
        .is_some_and(|gfn| text.contains(&format!("gfn: {gfn},")) || text.contains(&format!("gfn: {gfn} ")));
    let global = matches!(
        event,
        Event::FastZapBegin
            | Event::FastZapEnd
            | Event::Flush { .. }
            | Event::NotifierBegin { .. }
            | Event::NotifierEnd { .. }
            | Event::SlotPublish { .. }
            | Event::FrameRelease { .. }
    );
    (finding.root.is_none() && finding.gfn.is_none()) || root || gfn || global
}

/// Where the schedule took the CPU from a task that could have gone on, held a store back, or let a check yield.
fn add_switches(outcome: &Outcome, drafts: &mut Vec<Draft>) {
    for step in &outcome.run.log {
        let text = match step.kind {
            Kind::Switch => format!("~~ preempted at {} ~~", step.site.name()),
            Kind::Drain => "a buffered store reaches memory".to_owned(),
            Kind::Fault => format!("fault: {}", step.text),
            Kind::Block => format!("waits for {}", step.text),
            _ => continue,
        };
        let mark = if step.kind == Kind::Switch { Mark::Preempted } else { Mark::Plain };
        let weight = if step.kind == Kind::Block { Weight::Detail } else { Weight::Step };
        drafts.push(Draft { at: step.at, task: step.task, mark, weight, concerns: true, text });
    }
}

fn columns(
    outcome: &Outcome,
    drafts: Vec<Draft>,
    least: Weight,
    strict: bool,
    held: &[(u32, String)],
) -> (Vec<String>, Vec<Row>) {
    // The main task is the stage: what it tells goes across.
    let mut of_task = BTreeMap::new();
    let told =
        |draft: &&Draft| draft.task != 0 && (draft.mark != Mark::Plain || draft.weight == Weight::Step);
    for draft in drafts.iter().filter(told).filter(|draft| shows(draft, least, strict)) {
        of_task.insert(draft.task, 0);
    }
    let mut names = Vec::new();
    for (task, column) in &mut of_task {
        *column = names.len();
        names.push(outcome.run.tasks.get(*task as usize).cloned().unwrap_or_default());
    }
    let mut rows = Vec::new();
    if !held.is_empty() {
        let roots: Vec<_> = held.iter().map(|(root, refs)| format!("root {root}: {refs}")).collect();
        let text = format!("the set-up leaves {}", roots.join("; "));
        rows.push(Row { at: 0, column: None, mark: Mark::Plain, text });
    }
    let drafts = alike(drafts, least, strict);
    let mut folded: Option<(u32, u64, usize)> = None;
    let flush = |folded: &mut Option<(u32, u64, usize)>, rows: &mut Vec<Row>| {
        if let Some((task, at, count)) = folded.take().filter(|(.., count)| *count > 3) {
            let text = format!(".. {count} steps of no concern");
            rows.push(Row { at, column: of_task.get(&task).copied(), mark: Mark::Folded, text });
        }
    };
    for draft in drafts {
        // Who only waits has no column.
        if draft.task != 0 && !of_task.contains_key(&draft.task) {
            continue;
        }
        if !shows(&draft, least, strict) {
            if let Some((task, _, count)) = &mut folded
                && *task == draft.task
            {
                *count += 1;
            } else {
                flush(&mut folded, &mut rows);
                folded = of_task.contains_key(&draft.task).then_some((draft.task, draft.at, 1));
            }
            continue;
        }
        flush(&mut folded, &mut rows);
        let column = of_task.get(&draft.task).copied().filter(|_| draft.task != 0);
        rows.push(Row { at: draft.at, column, mark: draft.mark, text: draft.text });
    }
    flush(&mut folded, &mut rows);
    (names, rows)
}

/// Steps in a row of one task that differ in their numbers alone: the first two are told, the others counted.
fn alike(drafts: Vec<Draft>, least: Weight, strict: bool) -> Vec<Draft> {
    let shape = |draft: &Draft| draft.text.replace(|c: char| c.is_ascii_hexdigit(), "");
    let mut kept: Vec<Draft> = Vec::new();
    let mut run = (String::new(), 0, 0);
    for draft in drafts {
        if draft.mark != Mark::Plain || !shows(&draft, least, strict) {
            kept.push(draft);
            continue;
        }
        let this = shape(&draft);
        if run.0 == this && run.1 == draft.task {
            run.2 += 1;
        } else {
            run = (this, draft.task, 1);
        }
        match (run.2, kept.iter_mut().rev().find(|last| last.mark == Mark::Folded && last.task == draft.task))
        {
            (..=2, _) => kept.push(draft),
            (3, _) | (_, None) => {
                let text = ".. 1 more of the kind".to_owned();
                kept.push(Draft { mark: Mark::Folded, text, ..draft });
            }
            (n, Some(last)) => last.text = format!(".. {} more of the kind", n - 2),
        }
    }
    kept
}
