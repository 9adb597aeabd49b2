//! Dirty logging: how it starts, and how what was written is collected.
//!
//! **Guarantee.** A write that completes after [`Vm::set_memslot`] has turned logging on, or after [`Vm::take_dirty_log`] has returned, is in the next log. No
//! page is unmapped for it.
//!
//! **Mechanism.** The slot with its bitmap is published first and SRCU waited for, so that every fault from then on maps 4 KiB and marks what it
//! makes writable. Then huge leaves are split (5.18 and later; before, a huge leaf is only protected and its write fault splits it), then W is taken from
//! every leaf of the slot, then one flush. A write faults from now on: the fast page fault gives W back without mmu_lock and marks
//! the page, where the profile has it; else the slow path does.
//!
//! | a write goes through | and is |
//! | --- | --- |
//! | a huge or writable translation, before the flush | part of the time before the log began |
//! | an SPTE that the walk has yet to protect | the same: the call has not returned |
//! | an SPTE that was protected, by a fault | marked after W was set; the mark may be early in the next log, never missing |
//!
//! Harvesting takes the bits first and protects second: a write in between sets its bit again and is reported twice, never lost.

use std::ops::Range;

use tdpmmu_platform::{Phase, Platform, Task};
use tdpmmu_spte::LEVEL_4K;

use crate::{Vm, VmError};

impl<P: Platform> Vm<P> {
    /// Logging has just been turned on for `gfns`, and the slot that says so is published; slots_lock is held.
    pub(crate) fn start_dirty_log(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>) {
        let mmu = self.mmu();
        // Best effort, as in KVM: what stays huge for want of a table is protected below and split by its write fault.
        let _shortage = mmu.split_huge_pages(task, as_id, gfns.clone(), LEVEL_4K);
        mmu.write_protect(task, as_id, gfns.clone(), LEVEL_4K);
        mmu.flush(task, Some(gfns));
    }

    /// KVM_GET_DIRTY_LOG: the gfns written since the last call, ascending; their SPTEs are write-protected so that the next write is seen. One exclusive hold of
    /// mmu_lock for the whole slot, and one flush after it if anything was dirty.
    ///
    /// # Errors
    /// [`VmError::NoSlot`] without such a slot, or when it does not log; [`VmError::Closed`].
    pub fn take_dirty_log(&self, task: &Task<P>, as_id: u8, id: u16) -> Result<Vec<u64>, VmError> {
        let slots = self.lock_slots(task);
        self.open()?;
        let set = slots.set();
        let slot = set.by_id(as_id, id).ok_or(VmError::NoSlot { as_id, id })?;
        let dirty = slot.dirty.as_ref().ok_or(VmError::NoSlot { as_id, id })?;
        let mut gfns = Vec::new();
        {
            let mut guard = self.mmu().lock.write(task);
            let _work = task.phase(Phase::SpteWork);
            for word in 0..dirty.words() {
                let mut bits = dirty.take_word(word);
                if bits == 0 {
                    continue;
                }
                let base = slot.base + word as u64 * 64;
                self.mmu().write_protect_masked(&mut guard, as_id, base, bits);
                while bits != 0 {
                    gfns.push(base + u64::from(bits.trailing_zeros()));
                    bits &= bits - 1;
                }
            }
        }
        // After the unlock: who reads an entry as protected and flushes nothing is served by this flush, since MMU-writable was left.
        if !gfns.is_empty() {
            self.mmu().flush(task, Some(slot.gfns()));
        }
        Ok(gfns)
    }
}
