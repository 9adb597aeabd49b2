//! What is done to leaves of gfns in both MMUs.
//!
//! **Guarantee.** As for the TDP MMU alone: what the operation promises of a gfn holds for every leaf of it, whichever MMU has made it. The shadow MMU's part runs under mmu_lock exclusive, by reverse maps, before the
//! TDP MMU's, which keeps its own lock mode; a flush that either owes is made once, before the lock is released where the operation needs that.
//!
//! **Mechanism.** In a VM without shadow pages each of these is the TDP MMU's own function and a test for `None`.

use std::ops::Range;

use tdpmmu_mmu::FlushDebt;
use tdpmmu_platform::{Exclusive, Guard, Platform, Task};
use tdpmmu_spte::geometry::{round_down, span};
use tdpmmu_spte::{LEVEL_1G, LEVEL_2M, LEVEL_4K};

use crate::Vm;
use crate::slot::MemSlot;

/// The gfns of every leaf, of whatever size, that may map some of `gfns`: what is owed for those that were removed. (The TDP MMU tells them one by one.)
pub(crate) fn around(gfns: &Range<u64>) -> Range<u64> {
    round_down(gfns.start, LEVEL_1G)..gfns.end.checked_next_multiple_of(span(LEVEL_1G)).unwrap_or(u64::MAX)
}

impl<P: Platform> Vm<P> {
    /// kvm_unmap_gfn_range: the reverse maps first, then the TDP MMU, whose debt carries that of both.
    pub(crate) fn unmap_both(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfns: Range<u64>,
        may_block: bool,
        mut debt: FlushDebt,
    ) -> FlushDebt {
        if let Some(shadow) = self.shadow() {
            // What an earlier range owes is flushed before the lock is given up here, too.
            guard.set_debt(debt.is_owed());
            if shadow.unmap(guard, as_id, gfns.clone(), may_block) {
                // Paid by the TDP half at its first break of the hold, or by the caller at the end.
                debt.owe(around(&gfns));
            }
        }
        self.mmu().unmap_owing(guard, as_id, gfns, may_block, debt)
    }

    /// Takes Accessed from the leaves; true: some had it.
    pub(crate) fn age_both(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>) -> bool {
        let young = self.shadow().is_some_and(|shadow| {
            let guard = self.mmu().lock.write(task);
            shadow.age(&guard, as_id, gfns.clone())
        });
        self.mmu().age(task, as_id, gfns) | young
    }

    /// Has a leaf Accessed?
    pub(crate) fn test_age_both(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>) -> bool {
        let young = self.shadow().is_some_and(|shadow| {
            let guard = self.mmu().lock.write(task);
            shadow.test_age(&guard, as_id, gfns.clone())
        });
        young || self.mmu().test_age(task, as_id, gfns)
    }

    /// Takes W from the leaves of the shadow MMU of `min_level` and above; nothing where there is none. The caller flushes.
    pub(crate) fn write_protect_shadow(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>, min_level: u8) {
        if let Some(shadow) = self.shadow() {
            let guard = self.mmu().lock.write(task);
            shadow.write_protect(&guard, as_id, gfns, min_level);
        }
    }

    /// As [`Vm::write_protect_shadow`] for the pages `base + n` of each bit n of `mask`, in a hold that the caller has; leaves of all sizes.
    pub(crate) fn write_protect_shadow_masked(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        base: u64,
        mask: u64,
    ) {
        if let Some(shadow) = self.shadow() {
            let mut left = mask;
            while left != 0 {
                // A run of bits at a time.
                let first = left.trailing_zeros();
                let len = (!(left >> first)).trailing_zeros().min(64 - first);
                let run = if len == 64 { u64::MAX } else { ((1 << len) - 1) << first };
                let from = base + u64::from(first);
                shadow.write_protect(guard, as_id, from..from + u64::from(len), LEVEL_4K);
                left &= !run;
            }
        }
    }

    /// kvm_mmu_slot_gfn_write_protect; true: some leaf was changed, and the caller flushes before it releases the lock.
    pub(crate) fn write_protect_gfn_both(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
    ) -> bool {
        let shadowed = self.shadow().is_some_and(|shadow| shadow.protect_gfn(guard, as_id, gfn, LEVEL_4K));
        self.mmu().write_protect_gfn(guard, as_id, gfn, LEVEL_4K) | shadowed
    }

    /// Logging has ended: what slot and host allow to be huge is mapped anew by its next access. KVM zaps the small leaves of direct pages alone; here those of indirect ones go, too.
    pub(crate) fn collapse_shadow(&self, task: &Task<P>, slot: &MemSlot, level: &dyn Fn(u64) -> u8) {
        let Some(shadow) = self.shadow() else { return };
        let mut guard = self.mmu().lock.write(task);
        let gfns = slot.gfns();
        let (mut gfn, mut owed) = (gfns.start, false);
        while gfn < gfns.end {
            let next = round_down(gfn, LEVEL_2M) + span(LEVEL_2M);
            if level(gfn) > LEVEL_4K {
                // What an earlier piece owes is flushed before the lock is given up in this one.
                guard.set_debt(owed);
                owed = shadow.unmap(&mut guard, slot.as_id, gfn..next.min(gfns.end), true);
            }
            gfn = next;
        }
        if owed {
            self.mmu().flush(task, Some(gfns));
        }
    }

    /// Present leaves of the shadow MMU by size, from 4 KiB on.
    pub(crate) fn shadow_leaf_pages(&self) -> [i64; 3] {
        let leaves = self.shadow().map_or([0; 4], |shadow| shadow.counts().leaves);
        [LEVEL_4K, LEVEL_2M, LEVEL_1G].map(|level| leaves[usize::from(level)].cast_signed())
    }
}
