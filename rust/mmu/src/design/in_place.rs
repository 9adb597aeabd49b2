//! `in-place`, D0, Linux 5.10-5.12: a fast zap empties the roots where they are, under the exclusive lock.
//!
//! ```text
//! LIVE(rc>0) --fast zap (exclusive; all vCPUs asked to reload): empty it, yielding; flush--> LIVE(rc>0)
//! LIVE --put: rc=0--> off the list; zap WITHOUT yielding; RCU
//! ```
//! No root is ever invalid. *Obligations*: a reference on each visited root, since the walk yields; the flush that is owed is paid before each yield and before the
//! unlock, for the roots are valid and a vCPU that reloaded at the first yield runs on them again. (5.10 asked every vCPU to drop *all* its roots, KVM_REQ_MMU_RELOAD; a
//! root that nobody loads again is freed that way.)
//!
//! *Flaws*. The exclusive hold is as long as the tree is large: faults of all vCPUs wait, or refill behind the walk when it yields. Mappings
//! of all other slots go too, and P-FZ holds only because the slot that is deleted was marked invalid before. The last put does not yield,
//! under a lock that a vCPU holds exclusively: it blocks everybody.

use tdpmmu_platform::{Exclusive, Guard, Platform, Task};

use super::{Held, ZapDesign};
use crate::TdpMmu;
use crate::root::Which;
use crate::walk::Yield;

/// See the module text.
pub struct InPlace;

impl<P: Platform> ZapDesign<P> for InPlace {
    fn name(&self) -> &'static str {
        "in-place"
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, mut held: Held<'_, '_, P>) {
        mmu.unlist_root(root);
        held.zap(mmu, task, root, Yield::Never);
        mmu.free_root(task, root);
    }

    fn invalidate(&self, _mmu: &TdpMmu<P>, _guard: &mut Guard<'_, P, Exclusive>) {}

    fn in_lock(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        mmu.for_each_root(guard, Which::All, |guard, root| mmu.zap_valid_root(guard, root, Yield::Allowed));
    }

    fn finish(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {}

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {}
}
