//! The freer's side: barrier, flush, then free or defer. Steps are numbered as in the text of [`super`].

use std::sync::Arc;

use tdpmmu_platform::{Bug, Event, Platform, RcuDomain, Reclaim, Site, Task};
use tdpmmu_table::{DeadChain, TablePool};

use super::{ReclaimKind, Reclamation};

impl<P: Platform> Reclamation<P> {
    /// Takes the pages of `dead`, which nothing links any more (5), flushes by `flush` and gives them back: now, or when no walker can be inside. `flush` returns when
    /// no vCPU uses an older translation, and no walk goes on that it found announced in a mode word (7). The caller holds mmu_lock exclusively, or nobody can walk any more.
    pub fn free(&self, task: &Task<P>, mut dead: DeadChain, flush: impl FnOnce()) {
        if dead.is_empty() {
            return;
        }
        P::point(Site::ShadowFree);
        // (6)
        match self.kind {
            ReclaimKind::Membarrier => P::heavy_fence(Site::ReadingMode),
            _ if P::bug(Bug::B44c) => {}
            _ => P::fence(Site::ReadingMode),
        }
        flush();
        if task.is_observed() {
            dead.pages(&self.pool).for_each(|table| task.observe(|| Event::ShadowFree { table }));
        }
        match self.kind {
            ReclaimKind::Ipi | ReclaimKind::Membarrier => self.free_now(dead),
            // (7)
            ReclaimKind::Counter if P::load(&self.readers.0, Site::ReadingMode) == 0 => self.free_now(dead),
            ReclaimKind::Counter | ReclaimKind::Rcu => {
                self.pool.begin_waiting(&dead);
                if let Some((head, tail, count)) = dead.take(&self.pool) {
                    P::point(Site::RcuDefer);
                    self.rcu.defer(head, tail, count);
                }
            }
            ReclaimKind::Epoch => {
                self.pool.begin_waiting(&dead);
                self.retire(dead);
            }
        }
    }

    /// (8)
    fn free_now(&self, mut dead: DeadChain) {
        if let Some((head, ..)) = dead.take(&self.pool) {
            self.pool.reclaim(head);
        }
    }

    /// To the epoch library. Its garbage is collected by who pins often and by who retires: each call tries to end one epoch.
    fn retire(&self, mut dead: DeadChain) {
        let handle = self.epochs.register();
        let pin = handle.pin();
        if let Some((head, ..)) = dead.take(&self.pool) {
            let pool: Arc<TablePool> = Arc::clone(&self.pool);
            pin.defer(move || pool.reclaim(head));
        }
        pin.flush();
    }

    /// Waits until nothing waits any more: at the end of a VM, when nobody walks. Not inside a section, nor under a lock.
    pub fn drain(&self, task: &Task<P>) {
        task.might_sleep();
        match self.kind {
            ReclaimKind::Ipi | ReclaimKind::Membarrier => {}
            ReclaimKind::Counter | ReclaimKind::Rcu => self.rcu.barrier(),
            ReclaimKind::Epoch => {
                while self.pool.waiting() != 0 && !P::abandoned() {
                    self.epochs.register().pin().flush();
                    P::yield_cpu(Site::ShadowFree);
                }
            }
        }
    }
}
