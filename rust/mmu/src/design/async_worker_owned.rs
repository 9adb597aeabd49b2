//! `async-worker-owned`, D4', Linux 6.4-6.5: as `async-worker`, and the MMU owns a reference of each root.
//!
//! ```text
//! VALID(rc = vCPUs + 1) --invalidate (exclusive): invalid:=1; the MMU's reference goes to the worker; queue--> INVALID
//! INVALID --worker (shared, yielding): zap; put--> INVALID(rc-1)
//! INVALID --put: rc=0--> off the list, RCU
//! ```
//! A vCPU that drops its root leaves it to the next one that wants the same role: guests that toggle CR0.WP or enter SMM rebuilt all their tables over and over
//! before. So no root becomes invalid but by a fast zap or the VM's end, and a last put of a valid root is a fault in the engine.
//!
//! *Obligations*. The MMU's reference is the gift, handed over once, at the one transition. The queue is flushed as before; and the VM's end invalidates what is
//! left, since nobody else will. *Flaws*. Roots of roles that nobody uses stay until the next fast zap; the workers are those of `async-worker`.

use tdpmmu_platform::{Event, Exclusive, Guard, Owner, Phase, Platform, Task};

use super::{DesignOptions, Held, QueueKind, ZapDesign, ZapQueue};
use crate::TdpMmu;

/// See the module text.
pub struct AsyncWorkerOwned<P: Platform> {
    queue: ZapQueue<P>,
}

impl<P: Platform> AsyncWorkerOwned<P> {
    /// With workers as `options` say.
    pub fn new(options: &DesignOptions) -> Self {
        Self { queue: ZapQueue::new(QueueKind::PerVm, options) }
    }
}

impl<P: Platform> ZapDesign<P> for AsyncWorkerOwned<P> {
    fn name(&self) -> &'static str {
        "async-worker-owned"
    }

    fn queue(&self) -> Option<&ZapQueue<P>> {
        Some(&self.queue)
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
                mmu.invalidate_root(task, root);
                if let Some(observer) = mmu.observer() {
                    observer.event(task.id(), &Event::RootPass { root, from: Owner::Mmu, to: Owner::Work });
                }
                self.queue.schedule_or_owe(mmu, task, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.queue.zap_owed(mmu, task);
        let _waiting = task.phase(Phase::QueueDelay);
        self.queue.flush();
    }

    fn drain(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.invalidate(mmu, &mut mmu.lock.write(task));
        self.queue.zap_owed(mmu, task);
        self.queue.shutdown();
    }
}
