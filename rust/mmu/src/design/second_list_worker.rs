//! `second-list-worker`, the variant of `second-list` from the thread of v3 (March 2022, never merged): one work item a VM serves the list.
//!
//! ```text
//! put: rc=0   invalid already --> off the list, RCU
//!             valid --> invalid:=1; rc:=1; onto the second list; queue THE item, unless it is pending
//! fast zap    exclusive: each valid root: rc++, invalid:=1, onto the second list; queue the item
//!             flush the item
//! the item    while the second list has a root: take it off; shared: zap, yielding; put
//! ```
//! *Obligations*. Exactly one reference goes with each place on the list. "Pending" changes under the list's lock, and is taken back by the item when
//! it finds the list empty: a root that comes later finds nothing pending and queues the item again, one that comes earlier is served, also when the zap of another one panics. So a flush of the
//! one item is a wait for all roots, those that were defunct before the fast zap included (P-FZ).
//!
//! *Flaws*. The roots of a VM are zapped one after the other, whatever the number of workers; a flush waits also for roots that were lost after it began, as
//! long as they come faster than they are zapped.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Arc;

use tdpmmu_platform::{Exclusive, Guard, Mutex, Owner, Phase, Platform, Task};

use super::second_list::RootChain;
use super::{DesignOptions, Held, QueueKind, ZapDesign, ZapQueue};
use crate::TdpMmu;
use crate::walk::Yield;

/// The list, and whether the item that serves it is queued or running.
#[derive(Default)]
struct List {
    roots: RootChain,
    pending: bool,
}

/// See the module text.
pub struct SecondListWorker<P: Platform> {
    /// The platform's mutex: the item is queued under it, and that is a schedule point.
    list: Arc<Mutex<P, List>>,
    queue: ZapQueue<P>,
}

impl<P: Platform> SecondListWorker<P> {
    /// One item needs one worker; of `options` the queue and the CPUs count.
    pub fn new(options: &DesignOptions) -> Self {
        let list = Arc::new(Mutex::<P, _>::new(List::default()));
        let served = list.clone();
        let one = DesignOptions { workers: 1, ..options.clone() };
        let queue = ZapQueue::with_work(QueueKind::PerVm, &one, move |mmu, task, _item| {
            let mut panic = None;
            while let Some(root) = next(mmu, &served) {
                // The item ends when the list is empty and not before, or nobody would serve the other roots, nor queue it again.
                let result = panic::catch_unwind(AssertUnwindSafe(|| {
                    let mut guard = mmu.lock.read(task);
                    mmu.zap_root(&mut guard, root, Yield::Allowed);
                    mmu.put_root(task, root, Owner::Work, Held::Shared(&mut guard));
                }));
                panic = panic.or(result.err());
            }
            if let Some(payload) = panic {
                panic::resume_unwind(payload);
            }
        });
        Self { list, queue }
    }

    /// Onto the list, with an [`Owner::Work`] reference. False: the VM is dying, the caller zaps.
    fn append(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32) -> bool {
        mmu.note_scheduled(task, root);
        let mut list = self.list.lock();
        if !list.pending {
            list.pending = self.queue.push(mmu, 0);
        }
        if list.pending {
            list.roots.push(mmu, root);
        }
        list.pending
    }
}

/// The next root for the item; none: the item ends.
fn next<P: Platform>(mmu: &TdpMmu<P>, list: &Mutex<P, List>) -> Option<u32> {
    let mut list = list.lock();
    let root = list.roots.pop(mmu);
    list.pending = root.is_some();
    root
}

impl<P: Platform> ZapDesign<P> for SecondListWorker<P> {
    fn name(&self) -> &'static str {
        "second-list-worker"
    }

    fn queue(&self) -> Option<&ZapQueue<P>> {
        Some(&self.queue)
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, held: Held<'_, '_, P>) {
        if !mmu.invalidate_root(task, root) {
            return mmu.retire_root(task, root);
        }
        mmu.rearm_root(task, root);
        if !self.append(mmu, task, root) {
            self.queue.zap_here(mmu, task, root, held);
        }
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if !mmu.is_obsolete(root) && mmu.get_root(task, root, Owner::Work) {
                mmu.invalidate_root(task, root);
                if !self.append(mmu, task, root) {
                    self.queue.owe(root);
                }
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.queue.zap_owed(mmu, task);
        let _waiting = task.phase(Phase::QueueDelay);
        self.queue.flush();
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {
        self.queue.shutdown();
    }
}
