//! Write protection for dirty logging: W goes, so that the next write faults and is booked.
//!
//! **Guarantee.** After [`TdpMmu::write_protect`] and the flush that follows it, each page of the range is written only through a fault that marks it dirty. MMU-writable
//! stays: the fast page fault gives W back without mmu_lock. Nothing is unmapped, no Dirty or Accessed is lost.
//!
//! **Mechanism.** The start of logging protects a whole slot under the shared lock, by compare-exchange, and owes one flush at the end instead of one at each yield: a
//! write through a stale translation before the call returns belongs to the time before logging. Harvesting protects what was dirty, by mask,
//! under the exclusive lock as `clear_dirty_pt_masked` does; what else may still write an entry then is the fast page fault and hardware, so
//! W goes by an atomic AND (6.12) or by the exclusive set path (6.1: `clear-dirty-write`), under valid roots or all (`clear-dirty-roots`).

use std::ops::Range;

use tdpmmu_platform::{Exclusive, Guard, Phase, Platform, Site, Task};
use tdpmmu_spte::geometry::index;
use tdpmmu_spte::{ClearDirty, RootSet, Spte};

use crate::TdpMmu;
use crate::change::{self, At};
use crate::ledger::Ledger;
use crate::root::Which;
use crate::walk::{Walk, Yield};

impl<P: Platform> TdpMmu<P> {
    /// Takes W from every leaf of level `min_level` (1 to 3) and above in `gfns` of one address space, under its valid roots. Takes mmu_lock
    /// shared. Returns how many had it; a flush of the range is owed by the caller in any case, for what others have protected and not yet flushed.
    pub fn write_protect(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>, min_level: u8) -> u64 {
        let mut changed = 0;
        let mut guard = self.lock.read(task);
        self.for_each_root(&mut guard, Which::Valid, |guard, root| {
            if self.as_id(root) != as_id {
                return;
            }
            let _work = task.phase(Phase::SpteWork);
            let mut walk = Walk::new(self, guard, root, min_level, gfns.clone(), Yield::Allowed);
            while let Some(entry) = walk.next_entry() {
                let Some(mut entry) = entry.or_yield() else { continue };
                if entry.level() == 1 {
                    changed += entry.protect_leaves();
                    continue;
                }
                while entry.old().is_leaf(entry.level()) && self.format().is_writable(entry.old()) {
                    let new = self.format().without_write(entry.old());
                    changed += u64::from(entry.set_as(new, Site::SpteProtect).is_ok());
                }
            }
            walk.finish_and_flush();
        });
        changed
    }

    /// Takes W from the 4 KiB leaves of the gfns `base + n` for each bit n of `mask`. The caller flushes afterwards, under the lock or not.
    /// Returns how many had it.
    pub fn write_protect_masked(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        base: u64,
        mask: u64,
    ) -> u64 {
        let which = match self.profile().clear_dirty_roots {
            RootSet::All => Which::All,
            RootSet::Valid => Which::Valid,
        };
        let mut changed = 0;
        self.for_each_root(guard, which, |guard, root| {
            if self.as_id(root) == as_id {
                changed += self.protect_masked_in(guard.task(), root, as_id, base, mask);
            }
        });
        changed
    }

    fn protect_masked_in(&self, task: &Task<P>, root: u32, as_id: u8, base: u64, mask: u64) -> u64 {
        let (format, mut left, mut changed) = (self.format(), mask, 0);
        let mut ledger = Ledger::default();
        let _rcu = task.rcu_read();
        // The level-1 table of the gfns from `from` on, while it lasts.
        let mut table = None;
        while left != 0 {
            let gfn = base + u64::from(left.trailing_zeros());
            left &= left - 1;
            if table.is_none_or(|(from, _)| gfn >> 9 != from) {
                table = Some((gfn >> 9, self.leaf_table(task, root, gfn)));
            }
            let Some((_, Some(leaf_table))) = table else { continue };
            let cell = &self.pool().entries(leaf_table)[index(gfn, 1)];
            let old = Spte(P::load(cell, Site::SpteRead));
            task.count(1, 0);
            if !old.is_present() || !format.is_writable(old) {
                continue;
            }
            let new = format.without_write(old);
            let was = match self.profile().clear_dirty_write {
                ClearDirty::AtomicAnd if format.is_volatile(old) => {
                    Spte(P::fetch_and(cell, !format.write, Site::SpteProtect))
                }
                ClearDirty::AtomicAnd | ClearDirty::SetPath => change::exchange::<P>(self, cell, old, new, 1),
            };
            task.count(0, 1);
            changed += 1;
            let at = At { as_id, root, gfn, level: 1 };
            let now = if was == old { new } else { self.after_protect(was, new) };
            change::changed::<P, Exclusive>(self, task, &mut ledger, at, was, now);
        }
        ledger.settle(self);
        changed
    }

    /// What the entry holds now that hardware added bits between the snapshot and the write.
    fn after_protect(&self, was: Spte, new: Spte) -> Spte {
        match self.profile().clear_dirty_write {
            ClearDirty::AtomicAnd => self.format().without_write(was),
            ClearDirty::SetPath => new,
        }
    }

    /// The level-1 table that translates `gfn`, if tables reach that far down.
    fn leaf_table(&self, task: &Task<P>, root: u32, gfn: u64) -> Option<u32> {
        let walk = self.walk_lockless(task, root, gfn);
        (walk.level == 1).then_some(walk.table)
    }
}
