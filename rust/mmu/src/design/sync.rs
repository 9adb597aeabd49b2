//! `sync`, D5/D5', Linux 6.6+ (6.9+ with finer passes) and 6.1.y stable: the fast zap tears down, in its caller.
//!
//! ```text
//! VALID(rc = vCPUs + 1) --invalidate (exclusive, slots_lock)--> INVALID, scheduled
//! INVALID, scheduled --fast zap (shared): scheduled:=0; zap; put the MMU's reference--> INVALID
//! INVALID --last put (any task)--> off the list, RCU
//! ```
//! The MMU's own reference is the gift: it is put by whoever clears `scheduled`, once. `scheduled` tells "still to be zapped" from "zapped, and held by somebody":
//! without it a second fast zap would put a reference it does not own (that is bug-history 21 again). It changes under slots_lock
//! only. A last put on a valid root cannot happen. The zap precedes the put, so the root is reachable by notifiers throughout.

use tdpmmu_platform::{Bug, Exclusive, Guard, Owner, Platform, Task};
use tdpmmu_table::TableFlag;

use super::{Held, ZapDesign};
use crate::TdpMmu;
use crate::root::Which;
use crate::walk::Yield;

/// See the module text.
pub struct Sync;

impl<P: Platform> ZapDesign<P> for Sync {
    fn name(&self) -> &'static str {
        "sync"
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, _held: Held<'_, '_, P>) {
        if !mmu.is_obsolete(root) {
            mmu.violation("the last reference of a valid root was put although the MMU owns one");
        }
        mmu.retire_root(task, root);
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if !mmu.is_obsolete(root) {
                mmu.pool().meta(root).set(TableFlag::Scheduled);
                mmu.note_scheduled(task, root);
                mmu.invalidate_root(task, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        let mut guard = mmu.lock.read(task);
        mmu.for_each_root(&mut guard, Which::All, |guard, root| {
            if mmu.pool().meta(root).clear(TableFlag::Scheduled) {
                if !P::bug(Bug::B22c) {
                    mmu.zap_root(guard, root, Yield::Allowed);
                }
                mmu.put_root(task, root, Owner::Mmu, Held::Shared(guard));
            }
        });
    }

    fn drain(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.invalidate(mmu, &mut mmu.lock.write(task));
        <Self as ZapDesign<P>>::finish(self, mmu, task);
    }
}
