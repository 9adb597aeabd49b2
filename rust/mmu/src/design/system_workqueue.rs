//! `system-workqueue`, D3, v3 of the 5.18 series (February 2022, never merged). **Flawed**: it puts references that nobody gave it.
//!
//! ```text
//! put: rc=0   invalid already --> off the list, RCU
//!             valid --> invalid:=1; rc:=1; a user reference of the VM? queue on the system's queue : zap here, put
//! worker      shared: zap, yielding; put; give the user reference back
//! fast zap    exclusive: each root: rc++, invalid:=1
//!             shared: each invalid root: zap; put "the gift"
//! ```
//! *The flaw* (bug-history 21). The second phase takes every invalid root for one that the first phase gave a gift. That was true while only a fast zap invalidated
//! (5.13-5.17); here the last put does so too. A root that is created and lost between the two phases has one reference, its
//! worker's, and the fast zap puts it: the root is freed under the worker, whose own put then finds nothing. v2's second flag had been there to prevent exactly that.
//!
//! In the kernel that is a count below zero, or a use after free. Here the count refuses and says so ([`crate::TdpMmu::violations`]), and the
//! worker looks whether its root is still there before it touches it: what goes wrong is reported, and nothing else is damaged.
//!
//! Beside it: a worker that holds a user reference can outlive the VM's last file descriptor, and the module with it.

use tdpmmu_platform::{Exclusive, Guard, Owner, Platform, Task};
use tdpmmu_table::TableFlag;

use super::{DesignOptions, Held, QueueKind, ZapDesign, ZapQueue};
use crate::TdpMmu;
use crate::root::Which;
use crate::walk::Yield;

/// See the module text.
pub struct SystemWorkqueue<P: Platform> {
    queue: ZapQueue<P>,
}

impl<P: Platform> SystemWorkqueue<P> {
    /// With workers as `options` say.
    pub fn new(options: &DesignOptions) -> Self {
        Self { queue: ZapQueue::with_work(QueueKind::System, options, zap_if_still_there) }
    }
}

/// The worker's part, with a net under it.
fn zap_if_still_there<P: Platform>(mmu: &TdpMmu<P>, task: &Task<P>, root: u32) {
    let mut guard = mmu.lock.read(task);
    let there = {
        // The page is no other root or table before this section ends.
        let _rcu = task.rcu_read();
        let listed = mmu.pool().meta(root).has(TableFlag::Listed) && mmu.is_obsolete(root);
        listed && mmu.get_root(task, root, Owner::Iterator)
    };
    if !there {
        return mmu
            .violation("a worker found its root gone: somebody had put the reference that it was given");
    }
    mmu.zap_root(&mut guard, root, Yield::Allowed);
    let _rcu = task.rcu_read();
    mmu.put_root(task, root, Owner::Work, Held::Shared(&mut guard));
    mmu.put_root(task, root, Owner::Iterator, Held::Shared(&mut guard));
}

impl<P: Platform> ZapDesign<P> for SystemWorkqueue<P> {
    fn name(&self) -> &'static str {
        "system-workqueue"
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
            if mmu.get_root(task, root, Owner::Gift) {
                mmu.invalidate_root(task, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        {
            let mut guard = mmu.lock.read(task);
            mmu.for_each_root(&mut guard, Which::All, |guard, root| {
                if mmu.is_obsolete(root) {
                    mmu.zap_root(guard, root, Yield::Allowed);
                    mmu.put_root(task, root, Owner::Gift, Held::Shared(guard));
                }
            });
        }
        mmu.await_holders(task);
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {
        self.queue.shutdown();
    }
}
