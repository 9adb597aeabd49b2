//! The NX huge-page mitigation, seen from the VM: its switch, and the recovery of what it has split.
//!
//! **Guarantee.** When [`Vm::set_nx_huge_pages`] returns no SPTE made under the other setting is mapped. [`Vm::recover_nx`] leaves tables alone whose slot logs dirty
//! pages, where the kernel looks (6.12; 6.1 recovers them too).
//!
//! **Mechanism.** The module parameter is stored first and the VM fast-zapped second, so that a fault in between maps by the new rule under a root that goes or under one that stays. A period
//! of the recovery thread takes the oldest of the candidates, one in `ratio` of them, rounded up.

use tdpmmu_platform::{Platform, Task};

use crate::vm::FastZapTimes;
use crate::{Vm, VmError};

impl<P: Platform> Vm<P> {
    /// Writes the module parameter nx_huge_pages as far as this VM is concerned: a change of its value is a fast zap, the same value is nothing.
    ///
    /// # Errors
    /// [`VmError::Closed`].
    pub fn set_nx_huge_pages(&self, task: &Task<P>, on: bool) -> Result<Option<FastZapTimes>, VmError> {
        let _slots = self.lock_slots(task);
        self.open()?;
        if self.mmu().nx_huge_pages() == on {
            return Ok(None);
        }
        self.mmu().set_nx_huge_pages(on);
        Ok(Some(self.fast_zap_locked(task, None)))
    }

    /// One period of the recovery thread: of the tables that stand where a huge page could, the oldest are zapped, one in `ratio`, rounded up; 0 is none
    /// (nx_huge_pages_recovery_ratio). Returns how many were zapped. Tables of the TDP MMU alone: the shadow MMU keeps no list of candidates, and its small leaves stay until they are zapped for another reason.
    ///
    /// # Errors
    /// [`VmError::Closed`].
    pub fn recover_nx(&self, task: &Task<P>, ratio: u32) -> Result<u64, VmError> {
        // Close waits for who reads mmap_lock. The slots are asked as of now, as SRCU would have it.
        let _open = self.share_mmap(task);
        self.open()?;
        let to_zap = match ratio {
            0 => 0,
            ratio => self.mmu().nx_splits().div_ceil(u64::from(ratio)),
        };
        if to_zap == 0 {
            return Ok(0);
        }
        let set = self.slots();
        let logged = |as_id, gfn| set.find(as_id, gfn).is_some_and(|slot| slot.flags.log_dirty);
        Ok(self.mmu().recover_nx(task, to_zap, &logged))
    }
}
