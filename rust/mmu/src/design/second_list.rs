//! `second-list`, D3.5, coded in March 2022 as a fallback for the 5.18 series and never merged: a fast zap keeps its roots on a list of its own.
//!
//! ```text
//! put: rc=0   invalid already --> off the list, RCU
//!             valid --> invalid:=1; rc:=1; zap, yielding; put             (comes back to the line above)
//! fast zap    exclusive: each listed root: rc++, invalid:=1, onto the second list
//!             shared: while the second list has a root: take it off; zap; put the gift
//! ```
//! The second list says who owes what: a root is on it exactly while the fast zap holds a gift on it. No flag, no iterator over "invalid roots", no assumption; a root that
//! is lost between the two phases is not on it. A root stays on the first list meanwhile, where notifiers look (P-RCH): the first version of the idea *moved* it, and broke that.
//!
//! *Obligations*. A root that became defunct just before the fast zap is invalid, half zapped by whoever dropped it, and may map the slot. It gets a gift and a place
//! like the others: the fast zap zaps it too, and, as who dropped it may be in the middle of a step, waits for the holders of mmu_lock.
//!
//! *Flaws*. The list is plumbing that a queue gives for nothing, the reason why 5.18 went with `async-worker`; who drops a root is blocked for the whole
//! tree as in `defunct-flag`; an invalid root that a halted vCPU holds is walked again by each fast zap.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tdpmmu_platform::{Exclusive, Guard, NIL, Owner, Platform, Task};

use super::{Held, ZapDesign};
use crate::TdpMmu;
use crate::walk::Yield;

/// Roots linked through their headers: no allocation, one link a root. The owner's lock protects it.
pub(super) struct RootChain {
    head: AtomicU32,
    tail: AtomicU32,
}

impl Default for RootChain {
    fn default() -> Self {
        Self { head: AtomicU32::new(NIL), tail: AtomicU32::new(NIL) }
    }
}

impl RootChain {
    pub(super) fn push<P: Platform>(&self, mmu: &TdpMmu<P>, root: u32) {
        mmu.pool().meta(root).second.store(NIL, Ordering::Relaxed);
        match self.tail.swap(root, Ordering::Relaxed) {
            NIL => self.head.store(root, Ordering::Relaxed),
            last => mmu.pool().meta(last).second.store(root, Ordering::Relaxed),
        }
    }

    pub(super) fn pop<P: Platform>(&self, mmu: &TdpMmu<P>) -> Option<u32> {
        let root = self.head.load(Ordering::Relaxed);
        if root == NIL {
            return None;
        }
        let next = mmu.pool().meta(root).second.load(Ordering::Relaxed);
        self.head.store(next, Ordering::Relaxed);
        if next == NIL {
            self.tail.store(NIL, Ordering::Relaxed);
        }
        Some(root)
    }
}

/// See the module text.
#[derive(Default)]
pub struct SecondList {
    /// Under slots_lock.
    invalidated: RootChain,
    /// The open fast zap has met roots that somebody else had invalidated.
    met: AtomicBool,
}

impl<P: Platform> ZapDesign<P> for SecondList {
    fn name(&self) -> &'static str {
        "second-list"
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, mut held: Held<'_, '_, P>) {
        if !mmu.invalidate_root(task, root) {
            return mmu.retire_root(task, root);
        }
        mmu.rearm_root(task, root);
        mmu.note_scheduled(task, root);
        held.zap(mmu, task, root, Yield::Allowed);
        mmu.put_root(task, root, Owner::Work, held);
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if mmu.get_root(task, root, Owner::Gift) {
                if mmu.invalidate_root(task, root) {
                    mmu.note_scheduled(task, root);
                } else {
                    self.met.store(true, Ordering::Relaxed);
                }
                self.invalidated.push(mmu, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        {
            let mut guard = mmu.lock.read(task);
            while let Some(root) = self.invalidated.pop(mmu) {
                mmu.zap_root(&mut guard, root, Yield::Allowed);
                mmu.put_root(task, root, Owner::Gift, Held::Shared(&mut guard));
            }
        }
        if self.met.swap(false, Ordering::Relaxed) {
            mmu.await_holders(task);
        }
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {}
}
