//! O-TLB, the ledger: what must be flushed before whom.
//!
//! **Guarantee.** A change that takes something from a translation (present -> not, W or D away, a table unlinked) under a root that vCPUs may use is an
//! obligation of the task that made it. It is met by a flush that was asked for *after* the change, covers its gfns, and has been delivered. What removed something is paid by its own task: that
//! another's flush came in between is luck, which no caller may count on. What only takes W or D may be paid by anybody. It is due
//!
//! | obligation | due before |
//! | --- | --- |
//! | a leaf or a table is gone | its task releases mmu_lock (F1); an invalidation of its gfns ends (F3) |
//! | a table was unlinked | its task's RCU section ends too (F2: a grace period could end before the kick) |
//! | W, MMU-writable or D was taken | the call that took it returns: the log, write protection, the start of logging (F6f, F7) |
//!
//! **Mechanism.** A list of ranges per task, merged as walks go on. A flush takes from it what was there when it began. No obligation arises under a root that is
//! invalid or that nobody holds (the request that came with the invalidation, or the local flush of a load, serves: F6c), from a split (F6b), from aging (F6e), nor after the VM's end
//! (F6d). All events that meet in one obligation are one task's own, or lie on both sides of a flush: so this holds in any order of arrival; but the last row is judged in true order only.
//!
//! A change that is told only when it is complete (6.12: freeze, flush, empty, tell) owes from the freeze on, which is told by itself.
//!
//! Leaves of the shadow MMU owe as those of the TDP MMU do, page for root. Its obsolete pages owe nothing at a yield: each vCPU flushes as it loads another root. Its tables are another matter:
//! no page of them is freed without a flush (`shadow.rs`).
//!
//! **What it cannot see.** Whether a flush reaches every vCPU, and whether one that is not owed by these rules was needed all the same: that is
//! `caches.rs`. A fault that found no memslot and comes late, when the slot is there and its page mapped, puts an MMIO entry over the leaf and flushes nothing, in every kernel: a TLB may keep
//! the page, and a later unmap finds no leaf to flush for. If a frame is then released under such a TLB, `caches.rs` tells. A W that a fault takes when it makes a leaf anew is on the list and never due: the kernel does not flush for it either.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use tdpmmu_platform::Event;
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::span;

use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Unmapped,
    Unlinked,
    Taken,
}

impl Kind {
    const fn text(self) -> &'static str {
        match self {
            Kind::Unmapped => "leaves removed",
            Kind::Unlinked => "a table unlinked",
            Kind::Taken => "W or D taken",
        }
    }
}

#[derive(Clone, Debug)]
struct Debt {
    kind: Kind,
    as_id: u8,
    root: u32,
    gfns: Range<u64>,
    /// The task that made the change.
    by: u32,
    /// When: the number of the event.
    at: u64,
    /// Flushes asked for before it: two changes with one between them are two debts.
    flushes: u64,
}

impl Debt {
    fn text(&self) -> String {
        let Range { start, end } = self.gfns;
        format!("a flush of {start:#x}..{end:#x} for {} under root {}", self.kind.text(), self.root)
    }
}

/// Never-due debts are kept up to here.
const MOST: usize = 8192;

/// See the module text.
pub struct FlushLedger {
    rules: Rules,
    debts: Vec<Debt>,
    /// Flushes under way, by task: when each was asked for.
    open: HashMap<u32, Vec<u64>>,
    flushes: u64,
    clock: u64,
    ended: bool,
    /// What the task has taken from a log and not returned yet.
    taken: HashMap<u32, BTreeSet<(u8, u64)>>,
    /// The last entry that the task has frozen for a change that it tells later.
    frozen: HashMap<u32, (u32, Range<u64>)>,
}

impl FlushLedger {
    /// An empty ledger.
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            debts: Vec::new(),
            open: HashMap::new(),
            flushes: 0,
            clock: 0,
            ended: false,
            taken: HashMap::new(),
            frozen: HashMap::new(),
        }
    }

    /// Takes an event of `task` in. `in_use`: may a vCPU use translations of that root?
    pub fn event(&mut self, task: u32, event: &Event, in_use: impl Fn(u32) -> bool, verdict: &mut Verdict) {
        self.clock += 1;
        match *event {
            Event::SpteFrozen { as_id, root, gfn, level, old } => {
                if let Some(kind) = self.owed(level, Spte(old), self.rules.format.frozen())
                    && !self.ended
                    && in_use(root)
                {
                    self.owe(kind, as_id, root, gfn..gfn + span(level), task);
                }
                self.frozen.insert(task, (root, gfn..gfn + span(level)));
            }
            // What was owed for it since the freeze is what is owed for all below.
            Event::SpteChanged { root, gfn, .. }
                if self.frozen.get(&task).is_some_and(|(at, gfns)| *at == root && gfns.contains(&gfn)) => {}
            Event::SpteChanged { as_id, root, gfn, level, old, new, .. } => {
                if let Some(kind) = self.owed(level, Spte(old), Spte(new))
                    && !self.ended
                    && in_use(root)
                {
                    self.owe(kind, as_id, root, gfn..gfn + span(level), task);
                }
            }
            // A shadow page stands for its root here: what is owed for an obsolete or invalid one came with the request to reload.
            Event::ShadowLeaf { as_id, table, gfn, level, old, new, .. } => {
                if let Some(kind) = self.owed(level, Spte(old), Spte(new))
                    && !self.ended
                    && in_use(table)
                {
                    self.owe(kind, as_id, table, gfn..gfn + span(level), task);
                }
            }
            Event::FlushBegin { .. } => {
                self.flushes += 1;
                self.open.entry(task).or_default().push(self.clock);
            }
            Event::FlushEnd { start, end } => {
                if let Some(begun) = self.open.get_mut(&task).and_then(Vec::pop) {
                    self.flushed(task, &(start..end), begun);
                }
            }
            Event::Unlock { .. } => {
                self.frozen.remove(&task);
                self.due(Rule::FlushMissing, "mmu_lock was released before", verdict, |debt| {
                    debt.by == task && debt.kind != Kind::Taken
                });
            }
            Event::NotifierEnding { start, end } => {
                self.due(Rule::FlushMissing, "an invalidation ended before", verdict, |debt| {
                    debt.kind != Kind::Taken && debt.gfns.start < end && start < debt.gfns.end
                });
            }
            Event::RcuLeave => self.due(Rule::FlushLate, "the RCU section ended before", verdict, |debt| {
                debt.by == task && debt.kind == Kind::Unlinked
            }),
            Event::DirtyTake { as_id, base, mask } => {
                let bits = (0..64).filter(|n| mask >> n & 1 != 0);
                self.taken.entry(task).or_default().extend(bits.map(|n| (as_id, base + n)));
            }
            Event::LogReturn { .. } => {
                let Some(taken) = self.taken.remove(&task) else { return };
                self.due(Rule::WriteUnflushed, "the log was returned before", verdict, |debt| {
                    debt.by == task
                        && debt.kind == Kind::Taken
                        && taken
                            .range((debt.as_id, debt.gfns.start)..(debt.as_id, debt.gfns.end))
                            .next()
                            .is_some()
                });
            }
            Event::WriteProtected { as_id, gfn, .. } => {
                self.due(Rule::WriteUnflushed, "write protection returned before", verdict, |debt| {
                    debt.by == task
                        && debt.kind == Kind::Taken
                        && debt.as_id == as_id
                        && debt.gfns.contains(&gfn)
                });
            }
            Event::LogBegin { as_id, start, end, .. } => {
                self.due(Rule::WriteUnflushed, "logging began before", verdict, |debt| {
                    debt.by == task
                        && debt.kind == Kind::Taken
                        && debt.as_id == as_id
                        && debt.gfns.start < end
                        && start < debt.gfns.end
                });
            }
            Event::VmEnd => {
                self.ended = true;
                self.debts.clear();
            }
            // A root that dies takes its debts along: a load of that page flushes its tag.
            Event::RootFree { root } => self.debts.retain(|debt| debt.root != root),
            Event::TableFree { table } => self.debts.retain(|debt| debt.root != table),
            _ => {}
        }
    }

    /// What the change owes.
    fn owed(&self, level: u8, old: Spte, new: Spte) -> Option<Kind> {
        let format = &self.rules.format;
        if old.is_table(level) {
            return (!new.is_table(level)).then_some(Kind::Unlinked);
        }
        // A leaf that a fault makes an MMIO entry of: the kernel does not flush for it (the text says what that may cost).
        if !old.is_leaf(level) || new.is_table(level) || format.is_mmio(new) {
            return None;
        }
        if !new.is_leaf(level) {
            return Some(Kind::Unmapped);
        }
        if format.is_accessed(old) && !format.is_accessed(new) {
            // Aging: whatever goes with Accessed, a TLB may go on without telling (F6e).
            return None;
        }
        let lost = |has: bool, had: bool| had && !has;
        let taken = lost(format.is_writable(new), format.is_writable(old))
            || lost(format.is_mmu_writable(new), format.is_mmu_writable(old))
            || format.ad_bits && lost(format.is_dirty(new), format.is_dirty(old));
        taken.then_some(Kind::Taken)
    }

    fn owe(&mut self, kind: Kind, as_id: u8, root: u32, gfns: Range<u64>, by: u32) {
        let (at, flushes) = (self.clock, self.flushes);
        if let Some(last) = self.debts.last_mut()
            && (last.kind, last.as_id, last.root, last.by, last.flushes) == (kind, as_id, root, by, flushes)
            && last.gfns.start <= gfns.end
            && gfns.start <= last.gfns.end
        {
            last.gfns = last.gfns.start.min(gfns.start)..last.gfns.end.max(gfns.end);
            last.at = at;
            return;
        }
        if self.debts.len() >= MOST
            && let Some(old) = self.debts.iter().position(|debt| debt.kind == Kind::Taken)
        {
            self.debts.remove(old);
        }
        self.debts.push(Debt { kind, as_id, root, gfns, by, at, flushes });
    }

    /// A flush of `gfns` that `task` asked for at `begun` has been delivered.
    fn flushed(&mut self, task: u32, gfns: &Range<u64>, begun: u64) {
        let mut left = Vec::with_capacity(self.debts.len());
        for debt in self.debts.drain(..) {
            let paid = debt.by == task || debt.kind == Kind::Taken;
            if !paid || debt.at > begun || debt.gfns.end <= gfns.start || gfns.end <= debt.gfns.start {
                left.push(debt);
                continue;
            }
            for rest in [debt.gfns.start..gfns.start, gfns.end..debt.gfns.end] {
                if rest.start < rest.end {
                    left.push(Debt { gfns: rest, ..debt.clone() });
                }
            }
        }
        self.debts = left;
    }

    /// What is due now and not paid is broken, and forgiven, so that it is told once.
    fn due(&mut self, rule: Rule, when: &str, verdict: &mut Verdict, is_due: impl Fn(&Debt) -> bool) {
        // On real threads one task may be a vCPU and a caller by turns: what its faults take is never due, and cannot be told apart there.
        if self.debts.is_empty() || rule == Rule::WriteUnflushed && !self.rules.in_true_order() {
            return;
        }
        self.debts.retain(|debt| {
            let due = is_due(debt);
            if due {
                let owed = debt.text();
                let what = format!("{when} {owed} was delivered");
                verdict.unmet(rule, Some(debt.root), Some(debt.gfns.start), what, debt.by, owed);
            }
            !due
        });
    }

    /// Obligations open now.
    pub fn open(&self) -> usize {
        self.debts.len()
    }
}
