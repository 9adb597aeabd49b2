//! `inline`, D1, Linux 5.13-5.17: invalidate and zap in shared mode; the last put zaps in place.
//!
//! ```text
//! V(rc>0) --fast zap: rc++, invalid:=1 (exclusive; also roots that are invalid already)--> I(rc>0)
//! I --fast zap, shared, yielding: zap; put the gift--> I(rc-1)
//! any --put: rc=0--> off the list; zap WITHOUT yielding; RCU
//! ```
//! Why the last put must not yield: the root is off the list, so a notifier that ran in the gap would not find SPTEs of a page that
//! it is about to release. Hence the flaw: whoever drops the last reference is blocked for the whole tree (485 s at 32 TiB upstream).
//! "Invalid and referenced" means "a fast zap holds a gift on it", since slots_lock is held throughout and nothing else invalidates.

use tdpmmu_platform::{Exclusive, Guard, Owner, Platform, Task};

use super::{Held, ZapDesign};
use crate::TdpMmu;
use crate::root::Which;
use crate::walk::Yield;

/// See the module text.
pub struct Inline;

impl<P: Platform> ZapDesign<P> for Inline {
    fn name(&self) -> &'static str {
        "inline"
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, mut held: Held<'_, '_, P>) {
        mmu.unlist_root(root);
        held.zap(mmu, task, root, Yield::Never);
        mmu.free_root(task, root);
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if mmu.get_root(task, root, Owner::Gift) {
                mmu.invalidate_root(task, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        let mut guard = mmu.lock.read(task);
        mmu.for_each_root(&mut guard, Which::All, |guard, root| {
            if mmu.is_obsolete(root) {
                mmu.zap_root(guard, root, Yield::Allowed);
                mmu.put_root(task, root, Owner::Gift, Held::Shared(guard));
            }
        });
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {}
}
