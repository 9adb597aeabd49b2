//! The comparator: what KVM was recorded to do against what the engine did.
//!
//! **Guarantee.** Every recorded transition is compared with at most one predicted one, and what is left over on either side is a difference. Nothing is masked ([`ad`]).
//!
//! **Mechanism.** Where one vCPU at a time is in flight, each input of a thread has a sequence on both sides, and they must be equal in order: a prediction cannot be made up
//! for later. Where vCPUs race, only the multiset of an epoch is determined, an epoch being a stretch in which some operation is open. A worker of the zap queue is compared root by root.
//! An aging event exists only if hardware had set Accessed: those that only hardware could have caused are optional, and counted apart.
//!
//! | file | idea |
//! | --- | --- |
//! | `ad.rs` | when two transitions are the same |
//! | `groups.rs` | which transitions are compared with which |
//! | `sequence.rs` | in order |
//! | `race.rs` | as multisets |
//! | `life.rs` | births and deaths of tables; statistics; results of operations |

mod ad;
mod groups;
mod life;
mod race;
mod sequence;

use std::collections::BTreeMap;

use super::inputs::NO_OP;
use super::load::Case;
use super::names::{Change, FrameNames};
use super::predict::{Book, change_text};
use super::report::{CaseReport, KindCount, Mismatch, Skipped};
use groups::{Group, Key};

/// Differences that are listed; all are counted.
pub const LISTED: usize = 20;
/// Transitions shown before and after a difference.
const AROUND: usize = 4;

/// One transition of either side, as groups see it.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The change.
    pub change: Change,
    /// Line of the trace, or of the input that predicted it.
    pub line: u64,
    /// Happens only if hardware has set Accessed.
    pub optional: bool,
}

/// What became of one group.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    /// Recorded transitions that were predicted.
    pub matched: u64,
    /// Recorded ones whose existence hardware decided.
    pub undetermined: u64,
    /// Recorded ones that were not predicted.
    pub missing: u64,
    /// Predicted ones that were not recorded.
    pub extra: u64,
    /// The first difference: index on the recorded side, on the predicted side.
    pub first: Option<(usize, usize)>,
}

/// Compares a recording with the book of its prediction.
pub fn compare(case: &mut Case, profile: (String, &'static str), mut book: Book) -> CaseReport {
    if !case.has_faults {
        let mut frames = FrameNames::default();
        frames.rename(case.recorded.transitions.iter_mut().map(|t| &mut t.change));
        frames.rename(book.transitions.iter_mut().map(|t| &mut t.change));
    }
    let mut report = CaseReport::new(case, profile);
    report.yields_taken = book.yields;
    let groups = groups::build(case, &book);
    report.races = groups.values().filter(|group| matches!(group.key, Key::Race(_))).count() as u64;
    for group in groups.values() {
        judge(case, &mut report, group);
    }
    report.left_over = report.per_kind.values().map(|kind| kind.left_over).sum();
    life::compare_lives(case, &book, &mut report);
    life::compare_statistics(case, &book, &mut report);
    life::compare_outcomes(case, &book, &mut report);
    for (op, why) in &case.skipped {
        report
            .skipped
            .push(Skipped { operation: case.script.operations[*op as usize].number, why: why.clone() });
    }
    for &operation in &case.strangers {
        let why = "script.json does not know it".to_owned();
        report.skipped.push(Skipped { operation, why });
    }
    if case.recorded.lost > 0 {
        let why =
            format!("events were lost in {} places: what they were cannot be compared", case.recorded.lost);
        report.skipped.push(Skipped { operation: 0, why });
    }
    for (input, why) in &book.notes {
        let input = case.inputs[*input as usize];
        let operation = number_of(case, input.op);
        if why.contains("are not known") {
            report.skipped.push(Skipped { operation, why: why.clone() });
            continue;
        }
        report.differ(Mismatch {
            operation,
            kind: kind_of(case, input.op).to_owned(),
            cause: input.what.name().to_owned(),
            thread: case.threads[input.thread as usize].clone(),
            line: input.line,
            rule: "what the kernel did the engine refused".to_owned(),
            expected: "done".to_owned(),
            got: why.clone(),
            recorded: Vec::new(),
            predicted: Vec::new(),
        });
    }
    report
}

/// Number of an operation; 0 without one.
pub fn number_of(case: &Case, op: u32) -> u64 {
    if op == NO_OP { 0 } else { case.script.operations[op as usize].number }
}

/// Kind of an operation; empty without one.
pub fn kind_of(case: &Case, op: u32) -> &str {
    case.script.operations.get(op as usize).map_or("", |op| &op.kind)
}

fn judge(case: &Case, report: &mut CaseReport, group: &Group) {
    let verdict = match group.key {
        Key::Race(_) => race::judge(&group.recorded, &group.predicted),
        _ => sequence::judge(&group.recorded, &group.predicted, group.aging),
    };
    let count: &mut KindCount = report.per_kind.entry(group.cause.clone()).or_default();
    count.expected += group.recorded.len() as u64;
    count.matched += verdict.matched;
    count.undetermined += verdict.undetermined;
    count.left_over += verdict.extra;
    report.expected += group.recorded.len() as u64;
    report.matched += verdict.matched;
    report.undetermined += verdict.undetermined;
    let wrong = verdict.missing + verdict.extra;
    if wrong == 0 {
        return;
    }
    report.differences += wrong;
    if report.mismatches.len() >= LISTED {
        return;
    }
    let (r, p) = verdict.first.unwrap_or((0, 0));
    let at = |side: &[Entry], i: usize| side.get(i).map_or("nothing".to_owned(), |e| change_text(&e.change));
    let around = |side: &[Entry], i: usize| {
        let from = i.saturating_sub(AROUND).min(side.len());
        let to = (i + AROUND + 1).min(side.len());
        let mark = |n: usize| if n == i { "> " } else { "  " };
        (from..to).map(|n| format!("{}{}", mark(n), change_text(&side[n].change))).collect::<Vec<_>>()
    };
    report.mismatches.push(Mismatch {
        operation: number_of(case, group.op),
        kind: kind_of(case, group.op).to_owned(),
        cause: group.cause.clone(),
        thread: group.thread.clone(),
        line: group.recorded.get(r).map_or(group.line, |e| e.line),
        rule: group.key.rule().to_owned(),
        expected: at(&group.recorded, r),
        got: at(&group.predicted, p),
        recorded: around(&group.recorded, r),
        predicted: around(&group.predicted, p),
    });
}

/// Counts of a kind.
pub type PerKind = BTreeMap<String, KindCount>;
