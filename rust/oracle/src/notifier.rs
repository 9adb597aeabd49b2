//! The notifier's sequence (reliability x), and what is still mapped when a frame goes (I11).
//!
//! **Guarantee.** No leaf is made from a page that was looked up before an invalidation of it ended. A leaf that a fault makes maps its gfn to the frame that the host
//! named, by no larger a page than host and slot allowed. When a host frame is released, no SPTE maps it, under valid roots and invalid ones.
//!
//! **Mechanism.** A look-up is told after the fault has sampled the sequence and before it asks the host. An invalidation is *active*, then *ending*: both are told with mmu_lock held
//! exclusive, the second before the sequence moves. A fault makes its leaf with mmu_lock held shared: so between the two it must not make one in the range at all, and
//! after the second none from a look-up that lies before it. Look-ups after the second may be early (the sequence has yet to move): those faults retry, needlessly. Each
//! comparison is between one task's own report and one made under the exclusive lock: it holds in any order of arrival.
//!
//! **What it cannot see.** Leaves that nobody looked up (bulk population, a recorded host's answers, collapse): the check of the whole tree against the host at quiet points serves there.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;

use tdpmmu_platform::Event;
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Format, Spte};

use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

#[derive(Clone, Copy, Debug)]
struct LookUp {
    as_id: u8,
    gfn: u64,
    at: u64,
    /// Frame and level that the host named.
    answer: Option<(u64, u8)>,
}

/// Invalidations that are over and remembered.
const REMEMBERED: usize = 256;

/// See the module text.
pub struct Notifier {
    format: Format,
    look_ups: HashMap<u32, LookUp>,
    active: Vec<(u32, Range<u64>)>,
    ended: VecDeque<(u64, u32, Range<u64>)>,
    clock: u64,
}

impl Notifier {
    /// Nothing under way.
    pub fn new(rules: Rules) -> Self {
        Self {
            format: rules.format,
            look_ups: HashMap::new(),
            active: Vec::new(),
            ended: VecDeque::new(),
            clock: 0,
        }
    }

    /// Takes an event of `task` in.
    pub fn event(&mut self, task: u32, event: &Event, verdict: &mut Verdict) {
        self.clock += 1;
        let at = self.clock;
        match *event {
            Event::LookUp { as_id, gfn } => {
                self.look_ups.insert(task, LookUp { as_id, gfn, at, answer: None });
            }
            Event::Resolved { gfn, pfn, level, .. } => {
                if let Some(look_up) = self.look_ups.get_mut(&task).filter(|look_up| look_up.gfn == gfn) {
                    look_up.answer = Some((pfn, level));
                }
            }
            Event::FaultRetry { .. } | Event::Unlock { .. } => {
                self.look_ups.remove(&task);
            }
            Event::NotifierActive { start, end } => self.active.push((task, start..end)),
            Event::NotifierEnding { start, end } => {
                if let Some(i) = self.active.iter().position(|(by, r)| *by == task && *r == (start..end)) {
                    self.active.remove(i);
                }
                self.ended.push_back((at, task, start..end));
                if self.ended.len() > REMEMBERED {
                    self.ended.pop_front();
                }
            }
            Event::SpteChanged { as_id, root, gfn, level, old, new, .. }
            | Event::ShadowLeaf { as_id, table: root, gfn, level, old, new, .. } => {
                let Some(&look_up) = self.look_ups.get(&task) else { return };
                let made = Spte(new).is_leaf(level) && !Spte(old).is_leaf(level);
                if made && look_up.as_id == as_id && (gfn..gfn + span(level)).contains(&look_up.gfn) {
                    self.made(&look_up, (root, gfn, level), Spte(new), verdict);
                }
            }
            _ => {}
        }
    }

    /// Is an invalidation under way?
    pub fn is_active(&self) -> bool {
        !self.active.is_empty()
    }

    fn made(&self, look_up: &LookUp, (root, gfn, level): (u32, u64, u8), leaf: Spte, verdict: &mut Verdict) {
        // The gfn alone, as the fault itself asks: what makes a larger page of the host smaller is announced for all of that page.
        let overlaps = |r: &Range<u64>| r.contains(&look_up.gfn);
        let active = self.active.iter().find(|(_, r)| overlaps(r)).map(|(by, r)| (*by, r, "is under way"));
        let ended = || {
            let late = |at: &u64| *at > look_up.at;
            self.ended
                .iter()
                .find(|(at, _, r)| late(at) && overlaps(r))
                .map(|(_, by, r)| (*by, r, "has ended since"))
        };
        if let Some((by, range, state)) = active.or_else(ended) {
            let what = format!(
                "{:#x} was made at level {level} of a page that was looked up before an invalidation of {:#x}..{:#x}, which {state}",
                leaf.raw(),
                range.start,
                range.end
            );
            let owed = "a fault that met an invalidation since its look-up begins again".to_owned();
            verdict.unmet(Rule::StaleLookUp, Some(root), Some(gfn), what, by, owed);
        }
        let Some((pfn, most)) = look_up.answer.filter(|_| !self.format.is_mmio(leaf)) else { return };
        let maps = (leaf.pfn() & !(span(level) - 1)) + (look_up.gfn - gfn);
        if level > most || maps != pfn {
            let what = format!(
                "gfn {:#x} is frame {pfn:#x}, by pages of level {most} at most; {:#x} maps it at level {level} to {maps:#x}",
                look_up.gfn,
                leaf.raw()
            );
            verdict.broken(Rule::MappedElsewhere, Some(root), Some(gfn), what);
        }
    }
}

/// The first of `leaves` that maps a frame of `pfn .. pfn + count` is a leaf too many.
pub(crate) fn still_mapped<'a>(
    pfn: u64,
    count: u64,
    mut leaves: impl Iterator<Item = (&'a crate::model::Key, Spte)>,
    verdict: &mut Verdict,
) {
    let hit = leaves.find(|(key, leaf)| {
        let first = leaf.pfn() & !(span(key.level) - 1);
        first < pfn + count && pfn < first + span(key.level)
    });
    if let Some((key, leaf)) = hit {
        let what =
            format!("frame {pfn:#x} was released while {:#x} maps it at level {}", leaf.raw(), key.level);
        let owed = "every root is visited before a frame is released, invalid ones too".to_owned();
        verdict.unmet(
            Rule::MappedAfterRelease,
            Some(key.root),
            Some(key.gfn),
            what,
            tdpmmu_platform::NO_TASK,
            owed,
        );
    }
}
