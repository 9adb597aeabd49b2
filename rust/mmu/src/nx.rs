//! The NX huge-page mitigation: tables that exist only so that a guest can execute, and how they become huge pages again.
//!
//! **Guarantee.** With the mitigation on, no huge leaf made since is executable. A table that a fetch forced is on the candidate list while it is linked, once, and never after its
//! teardown has begun (I15); the list is in the order of linking. Recovery zaps the oldest candidates first and has flushed before it lets go of mmu_lock or of
//! the RCU section (bug-history 2, 3).
//!
//! **Mechanism.** The list runs through the tables' own headers, under `pages_lock`. A table carries the *disallowed* flag from before it is linked (6.2 on); who linked it takes the
//! lock afterwards and adds it only if the flag is still there, since teardown, which clears the flag, may have been faster. Up to 6.1 flag and list come both
//! after the link and are not looked at again (bug-history 9, 26: `nx-flag-before-publish`): what would corrupt that kernel's list is told as a violation here.
//! Recovery empties the entry that links the candidate: in exclusive mode (up to 6.17) it is there for certain, in shared mode (6.18 on) only a compare-exchange tells.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use tdpmmu_platform::{Bug, Event, Exclusive, Guard, Mode, NIL, Phase, Platform, Shared, Site, Task};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{LockMode, NxZap, Spte};
use tdpmmu_table::TableFlag;

use crate::TdpMmu;
use crate::change::{self, At};
use crate::ledger::Ledger;
use crate::walk::{Walk, Yield};

/// The switch and the candidates.
pub(crate) struct NxPages {
    enabled: AtomicBool,
    /// It has been on at some time: there may be candidates.
    used: AtomicBool,
    head: AtomicU32,
    tail: AtomicU32,
    splits: AtomicU64,
}

impl Default for NxPages {
    fn default() -> Self {
        Self {
            enabled: AtomicBool::new(false),
            used: AtomicBool::new(false),
            head: AtomicU32::new(NIL),
            tail: AtomicU32::new(NIL),
            splits: AtomicU64::new(0),
        }
    }
}

impl<P: Platform> TdpMmu<P> {
    /// Is the mitigation on: are huge leaves made without X, and are tables that a fetch needs candidates for recovery?
    #[inline]
    pub fn nx_huge_pages(&self) -> bool {
        self.nx.enabled.load(Ordering::Acquire)
    }

    /// Turns the mitigation on or off for faults and splits from now on. What is mapped already stays as it is: the caller fast-zaps, as writing
    /// the module parameter does.
    pub fn set_nx_huge_pages(&self, on: bool) {
        if on {
            self.nx.used.store(true, Ordering::Relaxed);
        }
        self.nx.enabled.store(on, Ordering::Release);
    }

    /// nx_lpage_splits: candidates for recovery now.
    pub fn nx_splits(&self) -> u64 {
        self.nx.splits.load(Ordering::Relaxed)
    }

    /// The candidates as (first gfn, level of the table), oldest first; a snapshot under `pages_lock`.
    pub fn nx_candidates(&self) -> Vec<(u64, u8)> {
        let _turn = self.pages_lock();
        let mut found = Vec::new();
        let mut at = self.nx.head.load(Ordering::Relaxed);
        while at != NIL {
            let meta = self.pool().meta(at);
            found.push((meta.gfn(), meta.level()));
            at = meta.next.load(Ordering::Relaxed);
        }
        found
    }

    /// Must a huge mapping be given up for the table that `entry` links, because the mitigation keeps it? 6.2 on asks the table's own flag; up
    /// to 6.1 any table will do (bug-history 42). The caller knows that the mitigation is on.
    pub(crate) fn nx_keeps_table(&self, entry: Spte) -> bool {
        P::point(Site::TableMeta);
        !self.profile().nx_adjust_flag_test
            || P::bug(Bug::B42)
            || self.pool().meta(entry.pfn() as u32).has(TableFlag::NxDisallowed)
    }

    /// Is a table's flag written before the table is linked? (5.12-6.1 wrote all of a table's books after the link, and did not look again.)
    fn nx_flags_first(&self) -> bool {
        self.profile().nx_flag_before_publish && !P::bug(Bug::B09)
    }

    /// Before `table` is linked for a fetch under the mitigation.
    pub(crate) fn nx_before_link(&self, table: u32) {
        if self.nx_flags_first() {
            self.pool().meta(table).set(TableFlag::NxDisallowed);
        }
    }

    /// After `table` was linked for a fetch that a huge page could have served. Inside the RCU section of the link.
    pub(crate) fn nx_after_link(&self, table: u32) {
        let meta = self.pool().meta(table);
        let _turn = self.pages_lock();
        if !self.nx_flags_first() {
            // Both sides set their own flag and then look for the other's, in one word: at least one of them sees both.
            meta.set(TableFlag::NxDisallowed);
            P::locked(Site::TableMeta);
            if meta.has(TableFlag::Unlinked) {
                meta.clear(TableFlag::NxDisallowed);
                self.violation(
                    "a table became an NX candidate after its teardown (bug-history 9, 26: nx-flag-before-publish=off)",
                );
                return;
            }
        }
        // Teardown may have been here between the link and our turn: then the flag is gone.
        if meta.has(TableFlag::NxDisallowed) || P::bug(Bug::B26) {
            self.nx_append(table);
        }
    }

    fn nx_append(&self, table: u32) {
        let meta = self.pool().meta(table);
        if meta.set(TableFlag::Listed) {
            return;
        }
        let tail = self.nx.tail.load(Ordering::Relaxed);
        meta.next.store(NIL, Ordering::Relaxed);
        meta.prev.store(tail, Ordering::Relaxed);
        let link = if tail == NIL { &self.nx.head } else { &self.pool().meta(tail).next };
        link.store(table, Ordering::Relaxed);
        self.nx.tail.store(table, Ordering::Relaxed);
        self.nx.splits.fetch_add(1, Ordering::Relaxed);
        self.tell_somebody(|| Event::NxListed { table });
    }

    /// `table` leaves the list and loses its flag; under `pages_lock`.
    fn nx_forget(&self, table: u32) {
        let meta = self.pool().meta(table);
        meta.clear(TableFlag::NxDisallowed);
        if !meta.clear(TableFlag::Listed) {
            return;
        }
        let (next, prev) = (meta.next.load(Ordering::Relaxed), meta.prev.load(Ordering::Relaxed));
        let from = if prev == NIL { &self.nx.head } else { &self.pool().meta(prev).next };
        from.store(next, Ordering::Relaxed);
        let back = if next == NIL { &self.nx.tail } else { &self.pool().meta(next).prev };
        back.store(prev, Ordering::Relaxed);
        self.nx.splits.fetch_sub(1, Ordering::Relaxed);
        self.tell_somebody(|| Event::NxUnlisted { table });
    }

    /// Teardown of `table` begins: it was unlinked from its parent. One load of a header that teardown reads anyway, where there is nothing to do.
    #[inline]
    pub(crate) fn nx_unlinked(&self, table: u32) {
        let meta = self.pool().meta(table);
        if self.nx.used.load(Ordering::Relaxed) {
            if !self.profile().nx_flag_before_publish {
                P::locked(Site::TableMeta);
                meta.set(TableFlag::Unlinked);
            }
            P::point(Site::TableMeta);
        }
        if meta.has(TableFlag::NxDisallowed) {
            let _turn = self.pages_lock();
            self.nx_forget(table);
        }
    }

    /// NX recovery: zaps the entries of at most `to_zap` candidates, the oldest first, so that the guest may have them huge again. `logged`: does the slot of a gfn log dirty
    /// pages? Its tables would come back as tables and are only struck off the list (`nx-skips-dirty-slots`). Takes mmu_lock in the profile's mode, yields
    /// after each candidate where that is asked for, and flushes before it does and at the end. Returns how many tables were zapped.
    pub fn recover_nx(&self, task: &Task<P>, to_zap: u64, logged: &dyn Fn(u8, u64) -> bool) -> u64 {
        match self.profile().nx_recovery_lock {
            LockMode::Exclusive => self.recover_nx_under(&mut self.lock.write(task), to_zap, logged),
            LockMode::Shared => self.recover_nx_under(&mut self.lock.read(task), to_zap, logged),
        }
    }

    fn recover_nx_under<M: Mode>(
        &self,
        guard: &mut Guard<'_, P, M>,
        to_zap: u64,
        logged: &dyn Fn(u8, u64) -> bool,
    ) -> u64
    where
        Self: ZapCandidate<P, M>,
    {
        let task = guard.task();
        let _work = task.phase(Phase::SpteWork);
        // One section over the whole loop: tables die in it, and the flush must come before they can be freed (F2).
        let mut rcu = Some(task.rcu_read());
        let (mut zapped, mut owes) = (0, false);
        for _ in 0..to_zap {
            let Some(table) = self.nx_take_first::<M>() else { break };
            let meta = self.pool().meta(table);
            let root = self.root_of(table);
            let at = At { as_id: self.as_id(root), root, gfn: meta.gfn(), level: meta.level() + 1 };
            // 6.3-6.4-rc: the slot of address space 0, whatever the root's.
            let as_id = if P::bug(Bug::B34) { 0 } else { at.as_id };
            if self.profile().nx_skips_dirty_slots && logged(as_id, at.gfn) {
                let _turn = self.pages_lock();
                self.nx_forget(table);
            } else {
                let gone = self.zap_candidate(guard, table, at);
                zapped += u64::from(gone);
                // 5.12-rc kept the last answer alone; 5.10-5.11 none.
                owes = (gone || owes && !P::bug(Bug::B03)) && !P::bug(Bug::B02);
            }
            if guard.should_yield() {
                if std::mem::take(&mut owes) {
                    self.flush(task, None);
                }
                drop(rcu.take());
                guard.relock();
                rcu = Some(task.rcu_read());
            }
        }
        if owes {
            self.flush(task, None);
        }
        drop(rcu);
        zapped
    }

    /// The oldest candidate. In shared mode it is struck off the list at once: what holds nobody else off must not be found twice (6.18).
    fn nx_take_first<M: Mode>(&self) -> Option<u32> {
        let _turn = self.pages_lock();
        let first = self.nx.head.load(Ordering::Relaxed);
        if first == NIL {
            return None;
        }
        if M::SHARED {
            self.nx_forget(first);
        }
        Some(first)
    }

    /// The root above `table`, by the parents in the headers; under RCU, of a table that was linked in this section.
    fn root_of(&self, mut table: u32) -> u32 {
        while let Some((parent, _)) = self.pool().meta(table).parent() {
            table = parent;
        }
        table
    }
}

/// How one candidate is zapped under a mode of mmu_lock.
pub(crate) trait ZapCandidate<P: Platform, M: Mode> {
    /// Empties the entry at `at` that links `table`; true: a flush is owed.
    fn zap_candidate(&self, guard: &mut Guard<'_, P, M>, table: u32, at: At) -> bool;
}

impl<P: Platform> ZapCandidate<P, Exclusive> for TdpMmu<P> {
    fn zap_candidate(&self, guard: &mut Guard<'_, P, Exclusive>, table: u32, at: At) -> bool {
        let task = guard.task();
        if self.profile().nx_zap == NxZap::Range {
            return self.zap_candidate_range(guard, at.as_id, at.level, at.gfn..at.gfn + span(at.level));
        }
        let Some((parent, index)) = self.pool().meta(table).parent() else { return false };
        let cell = &self.pool().entries(parent)[index as usize];
        let old = Spte(P::load(cell, Site::SpteRead));
        if !old.is_table(at.level) || old.pfn() != u64::from(table) {
            self.violation("an NX candidate is not linked (I15)");
            let _turn = self.pages_lock();
            self.nx_forget(table);
            return false;
        }
        let empty = self.format().empty();
        let old = change::exchange::<P>(self, cell, old, empty, at.level);
        task.count(1, 1);
        let mut ledger = Ledger::default();
        change::changed::<P, Exclusive>(self, task, &mut ledger, at, old, empty);
        ledger.settle(self);
        true
    }
}

impl<P: Platform> ZapCandidate<P, Shared> for TdpMmu<P> {
    fn zap_candidate(&self, guard: &mut Guard<'_, P, Shared>, table: u32, at: At) -> bool {
        let task = guard.task();
        let Some((parent, index)) = self.pool().meta(table).parent() else { return false };
        let cell = &self.pool().entries(parent)[index as usize];
        let old = Spte(P::load(cell, Site::SpteRead));
        task.count(1, 0);
        // Present is not enough: a leaf may have replaced the table, or another table may be here by now.
        if !old.is_table(at.level) || old.pfn() != u64::from(table) {
            return false;
        }
        let empty = self.format().empty();
        if P::cmpxchg(cell, old.raw(), empty.raw(), Site::SpteZap).is_err() {
            task.meter().count_retries(1);
            return false;
        }
        task.count(0, 1);
        let mut ledger = Ledger::default();
        change::changed::<P, Shared>(self, task, &mut ledger, at, old, empty);
        ledger.settle(self);
        true
    }
}

impl<P: Platform> TdpMmu<P> {
    /// Up to 5.17: the candidate's gfns are zapped under every root of its address space, not only its own.
    fn zap_candidate_range(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        level: u8,
        gfns: Range<u64>,
    ) -> bool {
        let (empty, mut any) = (self.format().empty(), false);
        let roots: Vec<u32> = self.listed_roots().filter(|&root| self.as_id(root) == as_id).collect();
        for root in roots {
            let mut walk = Walk::new(self, guard, root, level, gfns.clone(), Yield::Never);
            while let Some(mut entry) = walk.next_entry() {
                let inside = gfns.start <= entry.gfn() && entry.gfn() + span(entry.level()) <= gfns.end;
                let old = entry.old();
                // A larger table is walked into; a larger leaf goes as a whole.
                if old.is_leaf(entry.level()) || inside && old.is_present() {
                    any |= entry.set(empty).is_ok();
                }
            }
            // The caller flushes everything before anybody else may come.
            walk.finish().forget();
        }
        any
    }
}
