//! The result: schema `tdpmmu.conform/1`.

use std::collections::BTreeMap;

use serde::Serialize;

use super::compare::{LISTED, PerKind};
use super::inputs::What;
use super::load::Case;

/// All cases.
#[derive(Clone, Debug, Serialize)]
pub struct Conform {
    /// `tdpmmu.conform/1`.
    pub schema: &'static str,
    /// One per recording.
    pub cases: Vec<CaseReport>,
}

impl Conform {
    /// Nothing differs and nothing was skipped, in any case.
    pub fn passed(&self) -> bool {
        self.cases.iter().all(CaseReport::passed)
    }

    /// The result as JSON.
    ///
    /// # Errors
    /// None that a report can cause.
    pub fn to_json(&self) -> serde_json::Result<String> {
        serde_json::to_string(self)
    }
}

/// Counts of transitions with one cause.
#[derive(Clone, Debug, Default, Serialize)]
pub struct KindCount {
    /// Recorded.
    pub expected: u64,
    /// Recorded and predicted.
    pub matched: u64,
    /// Recorded, and hardware alone decided whether they would be.
    pub undetermined: u64,
    /// Predicted and not recorded.
    pub left_over: u64,
}

/// Counts of tables that came or went.
#[derive(Clone, Debug, Default, Serialize)]
pub struct LifeCount {
    /// Recorded.
    pub expected: u64,
    /// Recorded and predicted.
    pub matched: u64,
    /// Born where vCPUs raced, and not linked: the loser's.
    pub unlinked: u64,
    /// Everything else.
    pub differences: u64,
}

/// Counts of numbers that were compared.
#[derive(Clone, Debug, Default, Serialize)]
pub struct NumberCount {
    /// Compared.
    pub compared: u64,
    /// Different.
    pub mismatched: u64,
    /// Not compared, because they were moving.
    pub skipped: u64,
    /// Different ones by name.
    pub by_name: BTreeMap<String, u64>,
}

/// One difference.
#[derive(Clone, Debug, Serialize)]
pub struct Mismatch {
    /// Number of the operation, 0 outside of any.
    pub operation: u64,
    /// Its kind.
    pub kind: String,
    /// What caused it: fault, map, unmap, operation, ...
    pub cause: String,
    /// The recorded thread.
    pub thread: String,
    /// Line of the trace.
    pub line: u64,
    /// What was compared, and how.
    pub rule: String,
    /// What was recorded.
    pub expected: String,
    /// What the engine did.
    pub got: String,
    /// The recorded sequence around the difference.
    pub recorded: Vec<String>,
    /// The predicted sequence around it.
    pub predicted: Vec<String>,
}

/// Something that could not be carried out.
#[derive(Clone, Debug, Serialize)]
pub struct Skipped {
    /// Number of the operation.
    pub operation: u64,
    /// Why.
    pub why: String,
}

/// One recording.
#[derive(Clone, Debug, Serialize)]
pub struct CaseReport {
    /// The folder.
    pub name: String,
    /// The folder above it.
    pub kernel: String,
    /// The profile whose rules were used.
    pub profile: String,
    /// Who chose it: `option`, `folder`, or `nearest`, the newest that is not newer than the folder's version.
    pub profile_from: &'static str,
    /// Operations in the script.
    pub operations: u64,
    /// Things that were carried out: operations, faults, notifications.
    pub inputs: u64,
    /// Recorded transitions.
    pub expected: u64,
    /// Those that were predicted.
    pub matched: u64,
    /// Those whose existence hardware alone decided.
    pub undetermined: u64,
    /// Predicted transitions that were not recorded.
    pub left_over: u64,
    /// Everything that differs, listed or not: transitions, tables, statistics, results.
    pub differences: u64,
    /// The first differences.
    pub mismatches: Vec<Mismatch>,
    /// What was not carried out.
    pub skipped: Vec<Skipped>,
    /// Transitions by cause.
    pub per_kind: PerKind,
    /// Yields recorded.
    pub yields: u64,
    /// Of them, those that a walk of the engine took where it was recorded to.
    pub yields_taken: u64,
    /// Epochs in which vCPUs raced, compared as multisets.
    pub races: u64,
    /// Tables that came; `null` where the recording does not tell.
    pub births: Option<LifeCount>,
    /// Tables that were torn down; `null` where the recording does not tell.
    pub deaths: Option<LifeCount>,
    /// KVM's statistics after operations.
    pub statistics: NumberCount,
    /// What operations returned.
    pub results: NumberCount,
}

impl CaseReport {
    pub(crate) fn new(case: &Case, (profile, profile_from): (String, &'static str)) -> Self {
        Self {
            name: case.name.clone(),
            kernel: case.kernel.clone(),
            profile,
            profile_from,
            operations: case.script.operations.len() as u64,
            inputs: case.inputs.len() as u64,
            expected: 0,
            matched: 0,
            undetermined: 0,
            left_over: 0,
            differences: 0,
            mismatches: Vec::new(),
            skipped: Vec::new(),
            per_kind: PerKind::new(),
            yields: case.inputs.iter().filter(|input| matches!(input.what, What::Restart { .. })).count()
                as u64,
            yields_taken: 0,
            races: 0,
            births: None,
            deaths: None,
            statistics: NumberCount::default(),
            results: NumberCount::default(),
        }
    }

    /// Nothing differs and nothing was skipped.
    pub fn passed(&self) -> bool {
        self.differences == 0 && self.skipped.is_empty()
    }

    /// Lists a difference that is counted already.
    pub(crate) fn list(&mut self, mismatch: Mismatch) {
        if self.mismatches.len() < LISTED {
            self.mismatches.push(mismatch);
        }
    }

    /// Counts and lists a difference.
    pub(crate) fn differ(&mut self, mismatch: Mismatch) {
        self.differences += 1;
        self.list(mismatch);
    }
}
