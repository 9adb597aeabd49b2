//! The record of what was broken: each violation with its rule, its threads, its place and the obligation that was not met.

use std::fmt;

use tdpmmu_platform::NO_TASK;

use crate::rule::{Rule, RuleSet};

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What was broken.
    pub rule: Rule,
    /// In words, with the values.
    pub what: String,
    /// Who should have met the obligation, or reported the event that showed the violation; `NO_TASK` at a check.
    pub task: u32,
    /// Who made the obligation, where that is known.
    pub made_by: Option<u32>,
    /// What was promised, or owed, and not done.
    pub obligation: Option<String>,
    /// The root concerned.
    pub root: Option<u32>,
    /// The gfn concerned.
    pub gfn: Option<u64>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.what)?;
        if let Some(root) = self.root {
            write!(f, " [root {root}]")?;
        }
        if let Some(gfn) = self.gfn {
            write!(f, " [gfn {gfn:#x}]")?;
        }
        if self.task != NO_TASK {
            write!(f, " [task {}]", self.task)?;
        }
        if let Some(obligation) = &self.obligation {
            write!(f, " [owed: {obligation}")?;
            if let Some(task) = self.made_by {
                write!(f, ", by task {task}")?;
            }
            write!(f, "]")?;
        }
        Ok(())
    }
}

/// What the oracles have found so far. All are counted, the first [`Verdict::KEPT`] are kept. A silenced rule is neither.
#[derive(Clone, Debug)]
pub struct Verdict {
    task: u32,
    silenced: RuleSet,
    kept: Vec<Violation>,
    fresh: Vec<Violation>,
    count: u64,
}

impl Default for Verdict {
    fn default() -> Self {
        Self::silencing(RuleSet::default())
    }
}

impl Verdict {
    /// Violations kept in full.
    pub const KEPT: usize = 200;

    /// A verdict to which the rules of `silenced` cannot be broken.
    pub fn silencing(silenced: RuleSet) -> Self {
        Self { task: NO_TASK, silenced, kept: Vec::new(), fresh: Vec::new(), count: 0 }
    }

    /// Who reports from here on.
    pub fn reported_by(&mut self, task: u32) {
        self.task = task;
    }

    /// Notes a broken rule.
    #[cold]
    pub fn broken(&mut self, rule: Rule, root: Option<u32>, gfn: Option<u64>, what: String) {
        let task = self.task;
        self.note(Violation { rule, what, task, made_by: None, obligation: None, root, gfn });
    }

    /// Notes an obligation that `made_by` took on and that was not met.
    #[cold]
    pub fn unmet(
        &mut self,
        rule: Rule,
        root: Option<u32>,
        gfn: Option<u64>,
        what: String,
        made_by: u32,
        obligation: String,
    ) {
        let (task, made_by) = (self.task, (made_by != NO_TASK).then_some(made_by));
        self.note(Violation { rule, what, task, made_by, obligation: Some(obligation), root, gfn });
    }

    /// Notes a violation as it is.
    #[cold]
    pub fn note(&mut self, violation: Violation) {
        if self.silenced.contains(violation.rule) {
            return;
        }
        self.count += 1;
        if self.kept.len() < Self::KEPT {
            self.fresh.push(violation.clone());
            self.kept.push(violation);
        }
    }

    /// The violations kept, oldest first.
    pub fn violations(&self) -> &[Violation] {
        &self.kept
    }

    /// Those that were noted since the last call.
    pub(crate) fn take_fresh(&mut self) -> Vec<Violation> {
        std::mem::take(&mut self.fresh)
    }

    /// All violations, kept or not.
    pub fn count(&self) -> u64 {
        self.count
    }
}
