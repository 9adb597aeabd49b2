//! O-RCU and O-RCULEN: no table is freed under a reader, no section does too much.
//!
//! **Guarantee.** A table comes back to the pool only when every read section that was open when it was unlinked has ended (I7b). One section does not change more entries
//! between two reschedule checks than a step may ([`Rules::zap_step`] in the zap of a root, two tables of 1 GiB elsewhere); nor does a hold of mmu_lock (O-PROG, I17).
//!
//! **Mechanism.** Open sections by task, unlinks by table, each with the number of its event. A section is told after it has begun and before it ends, an unlink after it happened and before the
//! table is given to RCU: what the books hold open is open, and what they find older than an unlink was there when the grace period began. So this holds in any order of arrival.
//! Work is counted in told changes.
//!
//! **What it cannot see.** A section that was told late is taken for younger than an unlink (real platform only). What a reader did with the freed table: poison (simulation) tells that.

use std::collections::HashMap;

use tdpmmu_platform::{Event, NO_TASK};

use crate::rule::Rule;
use crate::rules::{Check, OTHER_STEP, Rules};
use crate::verdict::Verdict;

#[derive(Clone, Copy, Debug, Default)]
struct Work {
    /// Changes since the last check, in this hold of mmu_lock and in this section.
    step: u64,
    section: u64,
    /// Told already.
    step_told: bool,
    section_told: bool,
    /// Zaps of roots under way.
    zaps: u32,
    locked: u32,
    since: Option<u64>,
}

/// See the module text.
pub struct Sections {
    rules: Rules,
    tasks: HashMap<u32, Work>,
    unlinked: HashMap<u32, (u64, u32)>,
    clock: u64,
}

impl Sections {
    /// Nobody reads.
    pub fn new(rules: Rules) -> Self {
        Self { rules, tasks: HashMap::new(), unlinked: HashMap::new(), clock: 0 }
    }

    /// Takes an event of `task` in.
    pub fn event(&mut self, task: u32, event: &Event, verdict: &mut Verdict) {
        self.clock += 1;
        let at = self.clock;
        match *event {
            Event::RcuEnter => {
                let work = self.tasks.entry(task).or_default();
                (work.since, work.section, work.section_told) = (Some(at), 0, false);
            }
            Event::RcuLeave => self.tasks.entry(task).or_default().since = None,
            Event::YieldCheck => {
                let work = self.tasks.entry(task).or_default();
                (work.step, work.section, work.step_told, work.section_told) = (0, 0, false, false);
            }
            Event::Lock { .. } => {
                let work = self.tasks.entry(task).or_default();
                work.locked += 1;
                (work.step, work.step_told) = (0, false);
            }
            Event::Unlock { .. } => {
                let work = self.tasks.entry(task).or_default();
                work.locked = work.locked.saturating_sub(1);
                (work.step, work.step_told) = (0, false);
            }
            Event::RootZapBegin { .. } => self.tasks.entry(task).or_default().zaps += 1,
            Event::RootZapEnd { .. } => {
                let zaps = &mut self.tasks.entry(task).or_default().zaps;
                *zaps = zaps.saturating_sub(1);
            }
            Event::SpteChanged { root, gfn, .. } => self.worked(task, root, gfn, verdict),
            Event::TableUnlink { table, .. } => {
                self.unlinked.insert(table, (at, task));
            }
            Event::RootFree { root } => {
                self.unlinked.insert(root, (at, task));
            }
            Event::TableFree { table } => self.freed(table, verdict),
            _ => {}
        }
    }

    fn freed(&mut self, table: u32, verdict: &mut Verdict) {
        let Some((unlinked, by)) = self.unlinked.remove(&table) else { return };
        let reader = self.tasks.iter().filter_map(|(&task, work)| Some((work.since?, task))).min();
        if let Some((_, reader)) = reader.filter(|&(since, _)| since < unlinked) {
            let what = format!("table {table} was freed while task {reader} reads, since before the unlink");
            let owed = format!("a grace period between the unlink of table {table} and its free");
            verdict.unmet(Rule::FreedUnderReader, None, None, what, by, owed);
        }
    }

    fn worked(&mut self, task: u32, root: u32, gfn: u64, verdict: &mut Verdict) {
        // Checks are told in detail only.
        if task == NO_TASK || self.rules.check != Check::Full {
            return;
        }
        let zap_step = self.rules.zap_step;
        let Some(work) = self.tasks.get_mut(&task) else { return };
        let limit = if work.zaps == 0 { OTHER_STEP } else { zap_step.unwrap_or(u64::MAX) };
        if work.locked != 0 {
            work.step += 1;
            if work.step > limit && !std::mem::replace(&mut work.step_told, true) {
                let what = format!("more than {limit} entries changed since the last reschedule check");
                let owed = "a reschedule check after each step of a pass".to_owned();
                verdict.unmet(Rule::StepTooLong, Some(root), Some(gfn), what, task, owed);
            }
        }
        if work.since.is_some() {
            work.section += 1;
            if work.section > limit && !std::mem::replace(&mut work.section_told, true) {
                let what =
                    format!("more than {limit} entries changed in one RCU section, which no check could end");
                let owed = "an end of the section, or a check that may end it".to_owned();
                verdict.unmet(Rule::SectionTooLong, Some(root), Some(gfn), what, task, owed);
            }
        }
    }
}
