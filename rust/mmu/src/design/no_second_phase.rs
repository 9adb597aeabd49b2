//! `no-second-phase`, D3b, a sketch in the thread of v3 (March 2022). **Flawed**: its fast zap returns while SPTEs are mapped.
//!
//! ```text
//! put: rc=0   invalid already --> off the list, RCU
//!             valid --> invalid:=1; rc:=1; queue on the system's queue
//! worker      shared: zap, yielding; put; give the VM's user reference back
//! fast zap    exclusive: each valid root: rc++, invalid:=1, queue
//!             return
//! ```
//! Its references are exact: one transition, one item, one reference; no gift is assumed, and thus the underflow of v3 is gone.
//!
//! *The flaw* (P-FZ, bug-history 22). Nothing waits. After the fast zap returns the memslot is gone, so a notifier that takes a page of it away finds no
//! slot and does nothing, the host frees the page, and a worker comes later upon an SPTE that still maps it and writes its Dirty bit back to somebody else's
//! page. To wait for the work was the answer, and with a queue of the VM's own it is one call: `async-worker`.

use tdpmmu_platform::{Exclusive, Guard, Owner, Platform, Task};

use super::{DesignOptions, Held, QueueKind, ZapDesign, ZapQueue};
use crate::TdpMmu;

/// See the module text.
pub struct NoSecondPhase<P: Platform> {
    queue: ZapQueue<P>,
}

impl<P: Platform> NoSecondPhase<P> {
    /// With workers as `options` say.
    pub fn new(options: &DesignOptions) -> Self {
        Self { queue: ZapQueue::new(QueueKind::System, options) }
    }
}

impl<P: Platform> ZapDesign<P> for NoSecondPhase<P> {
    fn name(&self) -> &'static str {
        "no-second-phase"
    }

    fn queue(&self) -> Option<&ZapQueue<P>> {
        Some(&self.queue)
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, held: Held<'_, '_, P>) {
        if mmu.invalidate_root(task, root) {
            mmu.rearm_root(task, root);
            self.queue.schedule_or_zap(mmu, task, root, held);
        } else {
            mmu.retire_root(task, root);
        }
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if !mmu.is_obsolete(root) && mmu.get_root(task, root, Owner::Work) {
                mmu.invalidate_root(task, root);
                self.queue.schedule_or_owe(mmu, task, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.queue.zap_owed(mmu, task);
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {
        self.queue.shutdown();
    }
}
