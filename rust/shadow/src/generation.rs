//! S1: everything is made obsolete by a number; what is obsolete is zapped behind it, or kept.
//!
//! **Guarantee.** After [`ShadowMmu::fast_zap_begin`] no page made before is found, linked below a newer one or loaded as a root; with the reload that is requested in the same hold, none is used by a vCPU that enters the guest after it. `shadow-gen`: when [`ShadowMmu::fast_zap_rest`] returns no obsolete page is on the active list, however many pages vCPUs make
//! meanwhile. At least `batch` pages are zapped between two yields: the walk gets on however contended the lock is. `shadow-gen-kept`: nothing refers to the dying memslot any more, obsolete pages stay until the quota or [`ShadowMmu::shrink`] takes them.
//!
//! **Mechanism.** The list is first in, first out, so obsolete pages are its old end and the first page of this generation ends the walk. A walk that has given the lock up, or that took others along with a page, begins again at the oldest. No flush is owed when the lock is given up: no vCPU is on an obsolete page, and loading a new root flushes. One flush at the end stands before the freeing,
//! for lockless walkers and for hardware that may still hold a *table* in its caches. One bit is enough for a generation while slots_lock lets only one fast zap run and each leaves nothing obsolete behind; what keeps obsolete pages must count.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Event, Exclusive, Guard, Phase, Platform, Site, Task};

use crate::all::Breaks;
use crate::{ShadowDesign, ShadowMmu, SlotBooks, SlotPages};

impl<P: Platform> ShadowMmu<P> {
    /// First step of a fast zap, under slots_lock. Designs with a generation make everything obsolete; the caller requests the reload, and waits for it, in this same hold.
    pub fn fast_zap_begin(&self, guard: &mut Guard<'_, P, Exclusive>) {
        P::point(Site::FastZap);
        let was = self.generation.load(Relaxed);
        let generation = match self.design() {
            ShadowDesign::Gen => was ^ 1,
            ShadowDesign::GenKept => was.wrapping_add(1),
            ShadowDesign::Walk | ShadowDesign::WalkBreak | ShadowDesign::Slot => return,
        };
        if self.design() == ShadowDesign::Gen && self.tallies.obsolete.get() != 0 {
            self.violation("shadow-generation", "a second generation is about to become current again");
        }
        P::locked(Site::FastZap);
        self.generation.store(generation, Relaxed);
        self.tallies.toggles.add(1);
        self.tallies.obsolete.set(self.listed());
        self.tell(guard.task(), || Event::ShadowToggle { generation });
        if self.design() == ShadowDesign::GenKept {
            self.on_cpu(guard.task(), || self.clear_all_lpage(guard, &self.books()));
        }
    }

    /// Second step, in the same hold at first: it may be given up. `dying`: the memslot that goes, if one does.
    pub fn fast_zap_rest(&self, guard: &mut Guard<'_, P, Exclusive>, dying: Option<&Arc<SlotBooks>>) {
        match (self.design(), dying) {
            // No memslot goes: everything does, in one hold, as a walk that broke off might never end beside running vCPUs.
            (ShadowDesign::Walk, _) | (ShadowDesign::Slot, None) => self.zap_pages(guard, Breaks::Never),
            (ShadowDesign::WalkBreak, _) => self.zap_pages(guard, Breaks::Alive),
            (ShadowDesign::Gen, _) => self.zap_obsolete(guard),
            (ShadowDesign::GenKept, Some(slot)) => self.unmap_obsolete(guard, slot),
            (ShadowDesign::GenKept, None) => {}
            (ShadowDesign::Slot, Some(slot)) => self.zap_slot(guard, slot, SlotPages::All),
        }
    }

    /// Zaps every obsolete page, oldest first, and commits them all at the end.
    fn zap_obsolete(&self, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        let _work = task.phase(Phase::SpteWork);
        self.on_cpu(task, || {
            let mut books = self.books();
            let mut dead = self.take_zapped(guard);
            // Pages since the last yield, and since the last check.
            let (mut batch, mut unchecked) = (0, 0);
            let mut at = self.oldest();
            while let Some(page) = at {
                // First in, first out: nothing obsolete is newer than this.
                if !self.is_obsolete_page(page) {
                    break;
                }
                let newer = self.newer(page);
                if self.is_invalid_page(page) {
                    // It must not be here; whoever zapped it again would find it again, for ever.
                    self.violation("shadow-list", &format!("invalid page {page} is on the active list"));
                    at = newer;
                    continue;
                }
                if batch >= u64::from(self.config.batch) {
                    self.batch_done(&mut unchecked);
                    if guard.should_yield() {
                        batch = 0;
                        self.give_way(guard, dead);
                        (books, dead) = (self.books(), self.take_zapped(guard));
                        at = self.oldest();
                        continue;
                    }
                }
                let zapped = self.prepare_zap(guard, &books, &mut dead, page);
                batch += zapped.pages;
                unchecked += zapped.pages;
                at = if zapped.unstable {
                    self.tallies.restarts.add(1);
                    self.oldest()
                } else {
                    newer
                };
            }
            if unchecked != 0 {
                self.batch_done(&mut unchecked);
            }
            // The kick before the freeing, for lockless walkers; and one for all.
            self.commit_zap(guard, dead);
        });
        self.stamp_zap_end();
    }

    fn batch_done(&self, pages: &mut u64) {
        self.tallies.batches.add(1);
        self.tallies.longest_batch.raise(std::mem::take(pages));
    }

    /// The reverse maps of a dying slot, with lock-break: what its notifiers could not find afterwards. Obsolete pages that shadow tables in it count for nothing any more ([`crate::account`]), and stay.
    fn unmap_obsolete(&self, guard: &mut Guard<'_, P, Exclusive>, slot: &Arc<SlotBooks>) {
        let task = guard.task();
        self.on_cpu(task, || {
            // All vCPUs have been asked off these pages and flush as they load new roots: nothing is owed, neither at a yield nor at the end.
            self.unmap_books(guard, slot.as_id, slot.gfns(), true, false);
        });
        self.stamp_zap_end();
    }

    /// Books the CPU time of `body` as that of a walk.
    pub(crate) fn on_cpu<R>(&self, task: &Task<P>, body: impl FnOnce() -> R) -> R {
        if !task.config().measure {
            return body();
        }
        let cpu = P::thread_cpu_ns();
        let done = body();
        let spent = &task.meter().walk_cpu_ns;
        spent.set(spent.get() + P::thread_cpu_ns().saturating_sub(cpu));
        done
    }
}
