//! Locks: in which mode, in which order, and what may not be done under them.
//!
//! **Guarantee.** An SPTE changes under mmu_lock, and in exclusive ways only under the exclusive lock; without it nothing changes but what aging takes (6.15 on). There
//! is no cycle in the order in which classes of locks are taken, whoever takes them and however the run went: two tasks that could have met in the wrong order are found
//! though they did not meet. Nothing that may sleep is done under mmu_lock or inside an RCU section.
//!
//! **Mechanism.** A lockdep: the classes each task holds, and an edge from each held class to each one taken. All of a task's events are its own, so their order is true on every platform.
//! mmu_lock's holds are told in any case; the locks above it, read sections and sleeps in detail only.
//!
//! **What it cannot see.** Locks inside the platform and the MMU that tell nothing (the pool's, the queue's). A task that was never heard to lock is not judged: it was made without the observer.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use tdpmmu_platform::{Event, LockClass};
use tdpmmu_spte::{Format, Spte};

use crate::rule::Rule;
use crate::rules::Rules;
use crate::verdict::Verdict;

#[derive(Clone, Debug, Default)]
struct Held {
    /// Modes of the holds of mmu_lock: shared or not.
    mmu: Vec<bool>,
    others: Vec<LockClass>,
    /// RCU sections, outermost only.
    section: bool,
    /// It was heard to take mmu_lock.
    heard: bool,
}

impl Held {
    fn classes(&self) -> impl Iterator<Item = LockClass> {
        self.others.iter().copied().chain((!self.mmu.is_empty()).then_some(LockClass::Mmu))
    }
}

/// See the module text.
pub struct Locks {
    format: Format,
    tasks: HashMap<u32, Held>,
    /// Who first took the second with the first held.
    order: BTreeMap<(LockClass, LockClass), u32>,
    told: BTreeSet<(LockClass, LockClass)>,
}

impl Locks {
    /// Nobody holds anything.
    pub fn new(rules: Rules) -> Self {
        Self { format: rules.format, tasks: HashMap::new(), order: BTreeMap::new(), told: BTreeSet::new() }
    }

    /// Takes an event of `task` in.
    pub fn event(&mut self, task: u32, event: &Event, verdict: &mut Verdict) {
        match *event {
            Event::Lock { shared } => {
                self.taken(task, LockClass::Mmu, verdict);
                let held = self.tasks.entry(task).or_default();
                held.mmu.push(shared);
                held.heard = true;
            }
            Event::Unlock { shared, .. } => {
                let held = &mut self.tasks.entry(task).or_default().mmu;
                if let Some(at) = held.iter().rposition(|&mode| mode == shared) {
                    held.remove(at);
                }
            }
            Event::Acquire { lock, .. } => {
                if matches!(lock, LockClass::Slots | LockClass::Mmap) {
                    self.slept(task, lock.name(), verdict);
                }
                self.taken(task, lock, verdict);
                self.tasks.entry(task).or_default().others.push(lock);
            }
            Event::Release { lock } => {
                let held = &mut self.tasks.entry(task).or_default().others;
                if let Some(at) = held.iter().rposition(|&class| class == lock) {
                    held.remove(at);
                }
            }
            Event::RcuEnter => self.tasks.entry(task).or_default().section = true,
            Event::RcuLeave => self.tasks.entry(task).or_default().section = false,
            Event::MightSleep { what } => self.slept(task, what, verdict),
            Event::RcuRead { what } => self.read(task, what, verdict),
            Event::SpteChanged { root, gfn, level, old, new, shared, .. } => {
                self.changed(task, (root, gfn, level), Spte(old), Spte(new), shared, verdict);
            }
            _ => {}
        }
    }

    /// Does another task than `task` hold mmu_lock?
    pub fn held_by_another(&self, task: u32) -> bool {
        self.tasks.iter().any(|(&other, held)| other != task && !held.mmu.is_empty())
    }

    fn taken(&mut self, task: u32, lock: LockClass, verdict: &mut Verdict) {
        let Some(held) = self.tasks.get(&task) else { return };
        let held: Vec<LockClass> = held.classes().collect();
        for before in held {
            if before == lock {
                let what = format!("{} was taken by who holds it", lock.name());
                verdict.broken(Rule::LockOrder, None, None, what);
                continue;
            }
            self.order.entry((before, lock)).or_insert(task);
            let Some(&other) = self.path(lock, before) else { continue };
            if self.told.insert((before, lock)) {
                let what = format!("{} was taken under {}", lock.name(), before.name());
                let owed = format!("{} before {}, as elsewhere", lock.name(), before.name());
                verdict.unmet(Rule::LockOrder, None, None, what, other, owed);
            }
        }
    }

    /// Who took the first step on a way from `from` to `to` in the order so far.
    fn path(&self, from: LockClass, to: LockClass) -> Option<&u32> {
        let mut seen = BTreeSet::new();
        let mut open = vec![(from, None)];
        while let Some((at, first)) = open.pop() {
            for ((_, next), task) in self.order.range((at, LockClass::Slots)..=(at, LockClass::Mmu)) {
                let first = first.or(Some(task));
                if *next == to {
                    return first;
                }
                if seen.insert(*next) {
                    open.push((*next, first));
                }
            }
        }
        None
    }

    fn slept(&self, task: u32, what: &str, verdict: &mut Verdict) {
        let Some(held) = self.tasks.get(&task) else { return };
        let under = match (held.mmu.is_empty(), held.section) {
            (false, _) => "under mmu_lock",
            (_, true) => "inside an RCU section",
            _ => return,
        };
        verdict.broken(Rule::SleptAtomic, None, None, format!("{what} {under}"));
    }

    fn read(&self, task: u32, what: &str, verdict: &mut Verdict) {
        let Some(held) = self.tasks.get(&task) else { return };
        if !held.section && !held.mmu.contains(&false) {
            let what = format!("{what} read outside of an RCU section, mmu_lock not held exclusive");
            verdict.broken(Rule::ReadUnprotected, None, None, what);
        }
    }

    fn changed(
        &self,
        task: u32,
        (root, gfn, level): (u32, u64, u8),
        old: Spte,
        new: Spte,
        shared: bool,
        verdict: &mut Verdict,
    ) {
        let Some(held) = self.tasks.get(&task).filter(|held| held.heard) else { return };
        let change = || format!("{:#x} became {:#x} at level {level}", old.raw(), new.raw());
        if held.mmu.is_empty() {
            let format = &self.format;
            let aged = old.is_leaf(level)
                && new.is_leaf(level)
                && (old.raw() & !format.accessed == new.raw() & !format.accessed
                    || format.is_access_tracked(new));
            if !aged {
                let what = format!("{} without mmu_lock", change());
                verdict.broken(Rule::ChangedUnlocked, Some(root), Some(gfn), what);
            }
        } else if !shared && !held.mmu.contains(&false) {
            let what = format!("{} by an exclusive write, mmu_lock held shared", change());
            verdict.broken(Rule::WrongLockMode, Some(root), Some(gfn), what);
        }
    }
}
