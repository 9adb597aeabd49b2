//! Zaps: a root in passes of falling granularity, a range of leaves, everything.
//!
//! **Guarantee.** After [`TdpMmu::zap_root`] nothing present is left under the root, if nobody may install there any more (the root is invalid, or the VM
//! dead). A zap of leaves frees no table (up to 5.17 it does, and flushes each at once), so its flush may be paid by the caller; a zap of a root owes no flush, since no guest can run on the root: the request that went with its
//! invalidation was acknowledged, and loading a root flushes its tag (F6).
//!
//! **Mechanism.** A pass of level Z walks down to Z and empties every present entry at or below it; a table removed there takes its subtree with it in one unyielding
//! step. Passes bound that step: `root` (5.13-5.17) up to 512 GiB, `1G,root` (5.18-6.8) 262,656 entry writes for a GiB of 4 KiB
//! pages, `4K,2M,1G,root` (6.9+) 512, at the price of writing each leaf twice.

use std::ops::Range;

use tdpmmu_platform::{Bug, Event, Exclusive, Guard, Mode, Moment, NIL, Phase, Platform, Site};

use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Passes, RootSet};

use crate::TdpMmu;
use crate::debt::FlushDebt;
use crate::root::Which;
use crate::walk::{Walk, Yield};

impl<P: Platform> TdpMmu<P> {
    /// Empties `root` in the configured passes. The root must be referenced, or unreachable and `Yield::Never`.
    pub fn zap_root<M: Mode>(&self, guard: &mut Guard<'_, P, M>, root: u32, yields: Yield) {
        self.zap_passes(guard, root, yields, false);
    }

    /// As [`TdpMmu::zap_root`], of a root that guests may run on again at the next yield: what is owed is paid before each yield and at the end (5.10-5.12).
    pub fn zap_valid_root(&self, guard: &mut Guard<'_, P, Exclusive>, root: u32, yields: Yield) {
        self.zap_passes(guard, root, yields, true);
    }

    fn zap_passes<M: Mode>(&self, guard: &mut Guard<'_, P, M>, root: u32, yields: Yield, owes: bool) {
        let task = guard.task();
        let _work = task.phase(Phase::SpteWork);
        task.mark(Moment::RootZapBegin, root);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::RootZapBegin { root });
        }
        let cpu = if task.config().measure { P::thread_cpu_ns() } else { 0 };
        let mut zapped = false;
        let passes = match () {
            // 5.13-5.17: 512 GiB in one RCU section.
            () if P::bug(Bug::B20) => Passes::ROOT,
            // 5.18-6.8: a GiB between two checks.
            () if P::bug(Bug::B39) => Passes::ROOT_1G,
            () => self.passes(),
        };
        for level in passes.iter(self.root_level()) {
            zapped |= self.zap_pass(guard, root, level, yields, owes);
        }
        if task.config().measure {
            let spent = &task.meter().walk_cpu_ns;
            spent.set(spent.get() + P::thread_cpu_ns().saturating_sub(cpu));
        }
        task.mark(Moment::RootZapEnd, root);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::RootZapEnd { root });
        }
        // The late last put of a root that is empty already ends no zap.
        if zapped {
            self.stamp_zap_end();
        }
    }

    /// One pass; whether it changed an entry.
    fn zap_pass<M: Mode>(
        &self,
        guard: &mut Guard<'_, P, M>,
        root: u32,
        level: u8,
        yields: Yield,
        owes: bool,
    ) -> bool {
        let mut zapped = false;
        let empty = self.format().empty();
        // The kernel checks at each entry, which costs it a flag test and us a clock read: in an empty stretch of an upper
        // table every 64th read is enough.
        let at_each = self.batch() == 1;
        let mut walk = Walk::new(self, guard, root, level, 0..self.max_gfn(), yields);
        'walk: while let Some(entry) = walk.next_entry() {
            if !at_each && entry.level() > 1 && !entry.old().is_present() && !entry.index().is_multiple_of(64)
            {
                continue;
            }
            let Some(mut entry) = entry.or_yield() else { continue };
            if entry.level() > level {
                // A leaf above the pass's level waits for its own pass.
                continue;
            }
            if level == 1 && !at_each {
                let before = entry.gfn();
                let any = entry.zap_leaves() > 0;
                zapped |= any;
                if owes && any {
                    let end = walk.iter.gfn() + 1;
                    walk.debt.owe(before..end);
                }
                continue;
            }
            while entry.old().is_present() {
                if entry.set(empty).is_ok() {
                    zapped = true;
                    if owes {
                        entry.owe_flush();
                    }
                    break;
                }
                // Lost to somebody else: the kernel goes back to the check, too.
                let Some(here) = entry.or_yield() else { continue 'walk };
                entry = here;
            }
        }
        walk.finish_and_flush();
        zapped
    }

    /// Empties the leaves of `range` under one root (notifier unmap, range zaps). Tables stay; up to 5.17 (`unmap-frees-tables`) those that lie wholly inside go too, each flushed
    /// before it is given to RCU. Takes over `debt` and returns what is owed then.
    pub fn zap_leafs(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        root: u32,
        range: Range<u64>,
        yields: Yield,
        debt: FlushDebt,
    ) -> FlushDebt {
        let empty = self.format().empty();
        // 6.9+ owes nothing for an invalid root: no guest runs on it (fcdffe97f80e).
        let owes = self.profile().invalid_root_owes_flush || !self.is_obsolete(root);
        // 5.18-rc1: leaves only, where callers had relied on the tables going too.
        let whole_tables = self.profile().unmap_frees_tables && !P::bug(Bug::B24);
        let _work = guard.task().phase(Phase::SpteWork);
        let mut walk = Walk::new(self, guard, root, 1, range.clone(), yields);
        walk.inherit(debt);
        while let Some(entry) = walk.next_entry() {
            let Some(mut entry) = entry.or_yield() else { continue };
            if entry.level() == 1 {
                let before = entry.gfn();
                if entry.zap_leaves() > 0 && owes {
                    let end = walk.iter.gfn() + 1;
                    walk.debt.owe(before..end);
                }
            } else if entry.old().is_leaf(entry.level()) {
                while entry.old().is_leaf(entry.level()) && entry.set(empty).is_err() {}
                if owes {
                    entry.owe_flush();
                }
            } else if whole_tables && entry.old().is_table(entry.level()) {
                let (gfn, level) = (entry.gfn(), entry.level());
                if range.start <= gfn && gfn + span(level) <= range.end && entry.set(empty).is_ok() {
                    // 5.12-5.15 began at the last child's gfn, as its loop had left it.
                    let from = if P::bug(Bug::B08) { gfn + span(level) - span(level - 1) } else { gfn };
                    // Now, while the ledger still holds the tables: a guest may walk them from its caches until it is flushed.
                    self.flush(walk.task, Some(from..gfn + span(level)));
                }
            }
        }
        walk.finish()
    }

    /// mmu_notifier unmap of `range` in address space `as_id`: every root, invalid ones too from 5.18 on (before, a page could be released
    /// that an invalid root still maps: bug-history 13). The caller pays the debt before it returns to the host.
    pub fn unmap(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        range: Range<u64>,
        may_block: bool,
    ) -> FlushDebt {
        self.unmap_owing(guard, as_id, range, may_block, FlushDebt::none())
    }

    /// [`TdpMmu::unmap`] of one range after others in the same hold: takes over what they owe, pays it before a yield, and returns what is owed then. (KVM keeps the debt of each
    /// slot apart until the end: who finds nothing left to zap while it yields in the next one returns to the host unflushed.)
    pub fn unmap_owing(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        range: Range<u64>,
        may_block: bool,
        debt: FlushDebt,
    ) -> FlushDebt {
        let yields = if may_block { Yield::Allowed } else { Yield::Never };
        // 5.13-5.17: the filter was inside of the iterator, for everybody.
        let all = self.profile().unmap_invalid_roots && !P::bug(Bug::B13);
        let which = if all { Which::All } else { Which::Valid };
        self.zap_leafs_of(guard, which, Some(as_id), &range, yields, debt)
    }

    /// [`TdpMmu::zap_leafs`] under each root of `which`, of one address space or of both; takes over `debt` and returns what is owed then.
    fn zap_leafs_of(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        which: Which,
        as_id: Option<u8>,
        gfns: &Range<u64>,
        yields: Yield,
        mut debt: FlushDebt,
    ) -> FlushDebt {
        guard.set_debt(debt.is_owed());
        let mut visit = |guard: &mut Guard<'_, P, Exclusive>, root| {
            if as_id.is_none_or(|as_id| self.as_id(root) == as_id) {
                // 5.10-5.11 began each root without the debt of those before, and added up at the end.
                let kept = if P::bug(Bug::B01) { std::mem::take(&mut debt) } else { FlushDebt::none() };
                // The walk takes it over, and pays it before it yields.
                guard.set_debt(kept.is_owed());
                debt = self.zap_leafs(guard, root, gfns.clone(), yields, std::mem::take(&mut debt));
                debt.merge(kept);
            }
            // Our reference is the last one: the put that follows may zap the root, and give the lock up (F1, also for what an earlier root owes).
            if self.refs(root) == 1 {
                self.pay(guard.task(), &mut debt);
            }
            guard.set_debt(debt.is_owed());
        };
        if P::bug(Bug::B10) {
            // 5.13-5.15 took the iterator of those who do not yield: no reference on the root that is visited.
            self.listed_roots().for_each(|root| visit(guard, root));
        } else {
            self.for_each_root(guard, which, visit);
        }
        // From here on it is the caller's.
        guard.set_debt(false);
        debt
    }

    /// kvm_zap_gfn_range's half of the TDP MMU: the leaves of `gfns` in both address spaces, under all roots (up to 6.8) or the valid ones (`zap-range-roots`); one
    /// address space after the other up to 6.5, all in the order of the list since (`zap-range-by-space`). The caller has begun an invalidation in this hold, and pays
    /// the debt before it ends it.
    pub fn zap_gfn_range(&self, guard: &mut Guard<'_, P, Exclusive>, gfns: Range<u64>) -> FlushDebt {
        let which = match self.profile().zap_range_roots {
            RootSet::All => Which::All,
            RootSet::Valid => Which::Valid,
        };
        let spaces: &[Option<u8>] =
            if self.profile().zap_range_by_space { &[Some(0), Some(1)] } else { &[None] };
        spaces.iter().fold(FlushDebt::none(), |debt, &as_id| {
            self.zap_leafs_of(guard, which, as_id, &gfns, Yield::Allowed, debt)
        })
    }

    /// Everything, under the exclusive lock (the VM's memory goes away: no vCPU can run, no flush is owed).
    pub fn zap_all(&self, guard: &mut Guard<'_, P, Exclusive>) {
        self.tell(guard.task(), || Event::VmEnd);
        self.for_each_root(guard, Which::All, |guard, root| self.zap_root(guard, root, Yield::Allowed));
    }

    /// First step of a fast zap, under slots_lock and the exclusive lock: after it no valid root is left (except in designs that keep them).
    pub fn fast_zap_invalidate(&self, guard: &mut Guard<'_, P, Exclusive>) {
        P::point(Site::FastZap);
        guard.task().mark(Moment::FastZapBegin, NIL);
        if let Some(observer) = self.observer() {
            observer.event(guard.task().id(), &Event::FastZapBegin);
        }
        self.design().invalidate(self, guard);
    }

    /// Second step, same hold, after every vCPU was asked to reload its root.
    pub fn fast_zap_in_lock(&self, guard: &mut Guard<'_, P, Exclusive>) {
        self.design().in_lock(self, guard);
    }

    /// Last step, lock released: returns when nothing is mapped under the roots that were valid at the beginning.
    pub fn fast_zap_finish(&self, task: &tdpmmu_platform::Task<P>) {
        P::point(Site::FastZap);
        self.design().finish(self, task);
        task.mark(Moment::FastZapEnd, NIL);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::FastZapEnd);
        }
    }
}
