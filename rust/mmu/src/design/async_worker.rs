//! `async-worker`, D4, Linux 5.18-6.3: a per-VM queue; each valid -> invalid transition queues its root once.
//!
//! ```text
//! VALID(rc>0) --invalidate (exclusive): get; invalid:=1; queue--> INVALID
//! VALID --put: rc=0, was valid--> invalid:=1; rc:=1; queue   (one lock hold) --> INVALID
//! INVALID --worker (shared, yielding): zap; put--> INVALID(rc-1)
//! INVALID --put: rc=0, was invalid--> off the list, RCU
//! ```
//! The count is zero only inside one hold of mmu_lock, so exclusive walkers never see it and shared ones, which take references on valid
//! roots only, cannot tell. The exchange of the role word decides who made the transition; only that one queues, with one gifted
//! reference: a work item queued twice runs once, and the second reference leaks (bug-history 23). *Obligations*: roots that are invalid already are skipped, therefore
//! a fast zap must wait for *all* work, not only its own (P-FZ, bug-history 22): it flushes the queue. The queue is the VM's own, so that to wait for all is one
//! call, and its destruction drains it: no item needs to hold the VM.
//!
//! *Flaws*. Workers have neither the affinity nor the priority of who made them work: one memslot update could occupy every CPU for 8 ms. Several roots
//! are zapped at once, good for throughput and bad for everybody else.

use std::sync::atomic::{AtomicBool, Ordering};

use tdpmmu_platform::{Bug, Exclusive, Guard, Owner, Phase, Platform, Task};

use super::{DesignOptions, Held, QueueKind, ZapDesign, ZapQueue};
use crate::TdpMmu;

/// See the module text.
pub struct AsyncWorker<P: Platform> {
    queue: ZapQueue<P>,
    /// The open fast zap has queued something itself; under slots_lock.
    queued: AtomicBool,
}

impl<P: Platform> AsyncWorker<P> {
    /// With workers as `options` say.
    pub fn new(options: &DesignOptions) -> Self {
        Self { queue: ZapQueue::new(QueueKind::PerVm, options), queued: AtomicBool::new(false) }
    }
}

impl<P: Platform> ZapDesign<P> for AsyncWorker<P> {
    fn name(&self) -> &'static str {
        "async-worker"
    }

    fn queue(&self) -> Option<&ZapQueue<P>> {
        Some(&self.queue)
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, held: Held<'_, '_, P>) {
        // 5.13-5.17: off the list and zapped on the spot, hence without a yield; 485 s for 32 TiB.
        if P::bug(Bug::B19) && !mmu.is_obsolete(root) {
            return super::Inline.last_put(mmu, task, root, held);
        }
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
            // A sketch of March 2022 gave each listed root a reference and queued it, invalid ones again.
            if (!mmu.is_obsolete(root) || P::bug(Bug::B23)) && mmu.get_root(task, root, Owner::Work) {
                mmu.invalidate_root(task, root);
                self.queue.schedule_or_owe(mmu, task, root);
                self.queued.store(true, Ordering::Relaxed);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.queue.zap_owed(mmu, task);
        // The same thread: return while the work is queued, or wait for one's own items and not for what a last put had queued before.
        let own = self.queued.swap(false, Ordering::Relaxed);
        if P::bug(Bug::B22a) || P::bug(Bug::B22b) && !own {
            return;
        }
        let _waiting = task.phase(Phase::QueueDelay);
        self.queue.flush();
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {
        self.queue.shutdown();
    }
}
