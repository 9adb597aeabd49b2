//! change_pte: the host moved one page, and says where to (up to 6.9).
//!
//! **Guarantee.** Afterwards no leaf of the gfn names the old frame. A read-only host mapping is followed at once, read-only; a writable one is left to the next fault. The frame of
//! a present leaf never changes in one step (rule R5): the entry is empty in between.
//!
//! **Mechanism.** Exclusive lock, every root of the address space, 4 KiB leaves only. The kernels' generic notifier wraps each call in an invalidation of the same page,
//! so that they find nothing present here any more: no recording shows a change made by it, and 6.10 removed it for that reason.

use tdpmmu_platform::{Exclusive, Guard, Phase, Platform};

use crate::TdpMmu;
use crate::walk::{Walk, Yield};

impl<P: Platform> TdpMmu<P> {
    /// Follows the host page of `gfn` to `pfn` (`writable`: the host may write it). True: the caller owes a flush. Nothing happens in kernels
    /// without the callback (`set-spte-gfn`).
    pub fn set_spte_gfn(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
        pfn: u64,
        writable: bool,
    ) -> bool {
        if !self.profile().set_spte_gfn {
            return false;
        }
        let _work = guard.task().phase(Phase::SpteWork);
        let mut owes = false;
        let roots: Vec<u32> = self.listed_roots().filter(|&root| self.as_id(root) == as_id).collect();
        for root in roots {
            let mut walk = Walk::new(self, guard, root, 1, gfn..gfn + 1, Yield::Never);
            while let Some(mut entry) = walk.next_entry() {
                if entry.level() != 1 || !entry.old().is_present() {
                    continue;
                }
                let old = entry.old();
                // Exclusive changes are never lost.
                owes |= entry.set(self.format().empty()).is_ok();
                if !writable {
                    let _ = entry.set(self.format().change_pte(old, pfn));
                }
            }
            // No table was freed: the caller's flush, before the unlock, covers every root.
            walk.finish().forget();
        }
        owes
    }
}
