//! `defunct-flag`, D2, v2 of the 5.18 series (December 2021, never merged): the last put zaps inline and may yield.
//!
//! ```text
//! put: rc=0   invalid already --> off the list, RCU                     (somebody has zapped it)
//!             valid --> invalid:=1; defunct:=1; barrier; rc:=1; zap, yielding; put      (comes back to the line above)
//! fast zap    exclusive: each root that is not defunct: rc++, invalid:=1
//!             shared: each invalid root: zap; barrier; if not defunct: put the gift
//! ```
//! Two flags because there are two kinds of invalid roots: those on which a fast zap holds a gift, and those whose last reference was dropped. A root with a gift cannot become defunct, its
//! count being above zero: for who holds one, `defunct` is stable. *Barriers*: {invalid, defunct} before {rc:=1} in the put, {a successful get} before
//! {read of defunct} in the fast zap; without them the fast zap takes a defunct root for its own and puts a gift that it never took.
//!
//! *Obligations*: rc=1 while the put zaps, so that notifiers find the root (P-RCH); the fast zap zaps defunct roots too, beside their zapper, and ends after the step that
//! this one is in the middle of (P-FZ). (v2 dropped roots under the exclusive lock, which shuts that step out; 6.9+ drops them under the shared one.)
//!
//! *Flaws*. The vCPU that drops a root is blocked for the whole tree: above 900 s for 64 TiB of 4 KiB pages in the author's synthetic test. Two flags
//! that only together say who owes what.

use std::sync::atomic::{AtomicBool, Ordering};

use tdpmmu_platform::{Bug, Exclusive, Guard, Owner, Platform, Site, Task};
use tdpmmu_table::TableFlag;

use super::{Held, ZapDesign};
use crate::TdpMmu;
use crate::root::Which;
use crate::walk::Yield;

/// Was its last reference put while it was valid? v3 dropped the flag: every invalid root was taken for one with a gift.
fn is_defunct<P: Platform>(mmu: &TdpMmu<P>, root: u32) -> bool {
    P::point(Site::TableMeta);
    mmu.pool().meta(root).has(TableFlag::Defunct) && !P::bug(Bug::B21)
}

/// See the module text.
#[derive(Default)]
pub struct DefunctFlag {
    /// The open fast zap has met a defunct root.
    met: AtomicBool,
}

impl<P: Platform> ZapDesign<P> for DefunctFlag {
    fn name(&self) -> &'static str {
        "defunct-flag"
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, mut held: Held<'_, '_, P>) {
        if !mmu.invalidate_root(task, root) {
            return mmu.retire_root(task, root);
        }
        P::locked(Site::TableMeta);
        mmu.pool().meta(root).set(TableFlag::Defunct);
        P::fence(Site::RootInvalidate);
        mmu.rearm_root(task, root);
        held.zap(mmu, task, root, Yield::Allowed);
        mmu.put_root(task, root, Owner::Work, held);
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if !is_defunct(mmu, root) && mmu.get_root(task, root, Owner::Gift) {
                mmu.invalidate_root(task, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        let mut guard = mmu.lock.read(task);
        mmu.for_each_root(&mut guard, Which::All, |guard, root| {
            if mmu.is_obsolete(root) {
                mmu.zap_root(guard, root, Yield::Allowed);
                P::fence(Site::RootInvalidate);
                if is_defunct(mmu, root) {
                    self.met.store(true, Ordering::Relaxed);
                } else {
                    mmu.put_root(task, root, Owner::Gift, Held::Shared(guard));
                }
            }
        });
        drop(guard);
        if self.met.swap(false, Ordering::Relaxed) {
            mmu.await_holders(task);
        }
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {}
}
