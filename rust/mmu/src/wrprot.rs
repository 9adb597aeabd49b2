//! Write protection: W goes, so that the next write faults and is booked; for the shadow MMU, MMU-writable goes too.
//!
//! **Guarantee.** After [`TdpMmu::write_protect`] and the flush that follows it, each page of the range is written only through a fault that marks it dirty. MMU-writable
//! stays: the fast page fault gives W back without mmu_lock. After [`TdpMmu::write_protect_gfn`] and its flush one gfn is not written at all until a fault has asked again: the fast
//! path cannot give W back. Nothing is unmapped, no Dirty or Accessed is lost.
//!
//! **Mechanism.** The start of logging protects a whole slot under the shared lock, by compare-exchange, and owes one flush at the end instead of one at each yield: a
//! write through a stale translation before the call returns belongs to the time before logging. One gfn is protected under the exclusive lock, through the set path,
//! under valid roots or all (`clear-dirty-roots`), on the way down to its leaf; an entry that lacks W but has MMU-writable still changes (`protect-gfn-needs-w`: not up to 5.16), and owes
//! the flush, as dirty logging may have left writable translations behind (rule F7).

use std::ops::Range;

use tdpmmu_platform::{Bug, Exclusive, Guard, Platform, Site, Task};
use tdpmmu_spte::Spte;

use crate::TdpMmu;
use crate::dirty::{Checks, LogBit};
use crate::root::Which;
use crate::walk::{Walk, Yield};

impl<P: Platform> TdpMmu<P> {
    /// Takes W from every leaf of level `min_level` (1 to 3) and above in `gfns` of one address space, under its valid roots. Takes mmu_lock
    /// shared. Returns how many had it; a flush of the range is owed by the caller in any case, for what others have protected and not yet flushed.
    pub fn write_protect(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>, min_level: u8) -> u64 {
        let bit = LogBit::Root(self.format().write);
        let mut changed = 0;
        let mut guard = self.lock.read(task);
        self.for_each_root(&mut guard, Which::Valid, |guard, root| {
            if self.as_id(root) == as_id {
                changed += self.clear_range(guard, root, min_level, gfns.clone(), bit, Checks::Entries);
            }
        });
        changed
    }

    /// Takes W and MMU-writable from the leaf that maps `gfn` of one address space, if its level is `min_level` (1 to 3) or above. True: an entry
    /// changed, and the caller flushes before it releases mmu_lock.
    pub fn write_protect_gfn(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
        min_level: u8,
    ) -> bool {
        let task = guard.task();
        let gone = self.format().write | self.format().mmu_writable;
        let needs_w = self.profile().protect_gfn_needs_w || P::bug(Bug::B17);
        let looked_at = if needs_w { self.format().write } else { gone };
        let _rcu = task.rcu_read();
        let mut changed = false;
        for root in self.roots_of_gfn(as_id) {
            let mut walk = Walk::new(self, guard, root, min_level, gfn..gfn.saturating_add(1), Yield::Never);
            while let Some(mut entry) = walk.next_entry() {
                let old = entry.old();
                if !old.is_leaf(entry.level()) || old.raw() & looked_at == 0 {
                    continue;
                }
                // Alone with hardware and the fast page fault: the exclusive set path cannot lose.
                changed |= entry.set_as(Spte(old.raw() & !gone), Site::SpteProtect).is_ok();
            }
            walk.finish_and_flush();
        }
        changed
    }
}
