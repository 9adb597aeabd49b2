//! Lost events: what they may have touched is unknown, never wrong.
//!
//! **Guarantee.** After a loss no mismatch is claimed that the lost events could explain, and an entry that they did not
//! touch is checked as before.
//!
//! **Mechanism.** A loss is announced where its CPU goes on; it began after that CPU's last event. So mismatches of that stretch,
//! seen on other CPUs, are taken back ([`Engine::retract`]). From here on every entry is doubted: its value stays, and its next event either finds it
//! (not touched: checked) or does not (unknown, and known again from there on). A thread is *adrift* until an event
//! names its root again: what it changes until then could be in any tree, so that entry becomes unknown in each. A recording that
//! never names roots can't tell trees apart after a loss, so there only steps that no kernel makes are mismatches.

#[allow(clippy::wildcard_imports)] // one engine in four files
use super::*;
use crate::replay::report::LISTED_LOSSES;

/// Two lines about one entry can stand swapped, but not further apart than this, ns.
const SHADOW_NS: u64 = 1_000_000;
/// Most mismatches that a later loss can take back.
const RECENT: usize = 1 << 16;

/// A mismatch that was claimed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Recent {
    ns: u64,
    kind: &'static str,
    /// It stands in place of another heading of its change.
    heading: bool,
}

impl Engine {
    /// Events of `cpu` were lost, after `since` and before `now`, ns.
    pub(crate) fn lose(&mut self, now: u64, since: u64, cpu: Option<u32>, count: Option<u64>) {
        if self.losses.len() < LISTED_LOSSES {
            self.losses.push(Loss { t_ns: now, cpu, count });
        }
        while let Some(Waiting { change, on }) = self.waiting.pop_front() {
            let counts = !change.fast && !matches!(on, Wait::Seen(..));
            self.checked.unknown += u64::from(counts);
            match on {
                Wait::Value(t, i) if self.forest.holds(t) => self.forget(t, i),
                Wait::Table(root) if (root as usize) < self.forest.roots.len() => {
                    self.forget_path(root, change.level, change.gfn);
                }
                _ => {}
            }
        }
        self.seen.lost = true;
        self.shadow_until = now.saturating_add(SHADOW_NS);
        self.retract(since);
        for thread in &mut self.threads {
            thread.removal.clear();
            thread.announced.clear();
            thread.birth = None;
            thread.made_root = None;
            thread.fault = None;
            thread.fault_since = None;
            thread.root = None;
            thread.guessed_root = None;
            thread.last = None;
            thread.shared = None;
            thread.adrift = true;
        }
        for root in 0..self.forest.roots.len() {
            for dying in std::mem::take(&mut self.forest.roots[root].dying) {
                self.discard(dying);
            }
        }
        self.forest.for_each_table(|table| {
            for known in table.known.iter_mut().filter(|k| **k != Known::Unknown) {
                *known = Known::Doubted;
            }
        });
        self.dead_pa.clear();
    }

    /// After a loss, in a recording that names no roots, trees can't be told apart any more.
    pub(super) fn excused(&self, kind: &'static str) -> bool {
        self.seen.lost && !self.seen.iter_start && kind != "transition"
    }

    pub(super) fn remember(&mut self, ns: u64, kind: &'static str, heading: bool) {
        if self.recent.len() >= RECENT {
            self.recent.pop_front();
        }
        self.recent.push_back(Recent { ns, kind, heading });
    }

    /// Mismatches since then may be the lost events' doing.
    fn retract(&mut self, since: u64) {
        let taken: Vec<Recent> = self.recent.iter().copied().filter(|m| m.ns >= since).collect();
        if taken.is_empty() {
            return;
        }
        self.recent.retain(|m| m.ns < since);
        for Recent { kind, heading, .. } in taken {
            self.checked.mismatch -= 1;
            self.checked.unknown += u64::from(heading);
            if kind == "statistics" {
                self.stats.mismatched = self.stats.mismatched.saturating_sub(1);
                self.stats.skipped += 1;
            }
            if let Some(count) = self.kinds.get_mut(kind) {
                *count -= 1;
            }
        }
        self.kinds.retain(|_, count| *count > 0);
        self.mismatches.retain(|m| m.t_ns < since);
    }

    /// Nothing is known of this entry any more, nor of what hung below it.
    pub(super) fn forget(&mut self, t: TableId, i: usize) {
        let table = self.forest.table(t);
        let (level, root, child) = (table.level, table.root, table.child(i));
        let counted = table.known[i] != Known::Unknown && Spte(table.entries[i]).is_leaf(level);
        if child != NONE {
            self.discard(child);
        }
        if counted && level <= 3 {
            self.leaf_moved(root, level, -1);
        }
        if self.forest.holds(t) {
            self.forest.table_mut(t).known[i] = Known::Unknown;
        }
    }

    /// The entry at this place, or the one above it where the path ends.
    fn forget_path(&mut self, root: RootId, level: u8, gfn: u64) {
        let mut id = self.forest.roots[root as usize].table;
        loop {
            if !self.forest.holds(id) || !self.forest.table(id).covers(gfn) {
                return;
            }
            let table = self.forest.table(id);
            let i = index(gfn, table.level);
            match table.child(i) {
                child if child != NONE && table.level > level => id = child,
                _ if table.level >= level => return self.forget(id, i),
                _ => return,
            }
        }
    }

    /// A fast page fault where events were lost since: the page may be mapped by a table or a leaf that nobody saw made. Then
    /// nothing is known of that place any more.
    pub(super) fn fast_in_the_dark(&mut self, c: &Change, root: RootId, place: Found) -> bool {
        let Some((t, i)) = self.forest.find_leaf(root, c.gfn) else { return false };
        let table = self.forest.table(t);
        if !matches!(table.known[i], Known::Unknown | Known::Doubted) {
            return false;
        }
        let (level, value) = (table.level, table.entries[i]);
        let found = matches!(place, Found::Entry(..))
            && matches!(drifted(&self.format, level, value, c.old), Some(Drift::Same | Drift::Hardware));
        if !found {
            self.forget(t, i);
        }
        !found
    }

    /// A thread of which nobody knows the root has changed a leaf at this gfn.
    pub(super) fn forget_leafs(&mut self, gfn: u64) {
        for root in 0..self.forest.roots.len() as RootId {
            if self.forest.roots[root as usize].live
                && let Some((t, i)) = self.forest.find_leaf(root, gfn)
            {
                self.forget(t, i);
            }
        }
    }

    /// A change by a thread that is adrift: in every tree where it may have been, its place is unknown now.
    pub(super) fn adrift(&mut self, c: &Change) -> bool {
        if !self.threads[c.thread].adrift || !self.seen.iter_start {
            return false;
        }
        self.checked.unknown += 1;
        let vm = self.threads[c.thread].vm_if_user();
        for root in 0..self.forest.roots.len() as RootId {
            let r = &self.forest.roots[root as usize];
            if r.live && r.as_id == c.as_id && vm.is_none_or(|vm| self.same_vm(r.vm, vm)) {
                self.forget_path(root, c.level, c.gfn);
            }
        }
        self.book.unplaced += 1;
        true
    }

    /// What hangs here is not the table that the event speaks of: it went when events were lost.
    pub(super) fn drop_stale_child(&mut self, t: TableId, i: usize, level: u8, old: Spte) {
        let child = self.forest.table(t).child(i);
        if child == NONE {
            return;
        }
        let pa = self.forest.table(child).pa;
        let the_old = old.is_table(level) && (pa == 0 || pa == old.pfn() << 12);
        if !the_old {
            self.discard(child);
        }
    }
}
