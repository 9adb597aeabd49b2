//! S0: everything is zapped, page by page.
//!
//! **Guarantee.** When it returns no page is on the active list, and nothing is mapped through any page. Without lock-break nobody else has had the lock meanwhile. With it the walk ends only if vCPUs stop making pages: each yield begins it again, and what is new is zapped too.
//!
//! **Mechanism.** From the newest on; from the start again whenever pages went with the one that was zapped. One commit, so one flush, at the end of each hold: whoever gets the lock next must find what is zapped also flushed. Where the VM is dead no vCPU can use a translation, and pages wait for one commit at the very end.

use tdpmmu_platform::{Event, Exclusive, Guard, Phase, Platform};

use crate::ShadowMmu;
use crate::zap::DeadPages;

/// Who may have the lock meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Breaks {
    /// Nobody.
    Never,
    /// Whoever waits, vCPUs too: what was zapped is flushed before.
    Alive,
    /// Whoever waits; no vCPU will ever run again.
    Dead,
}

impl<P: Platform> ShadowMmu<P> {
    /// Everything goes, because the VM does: no vCPU can run again. Gives the lock up where somebody waits.
    pub fn zap_all(&self, guard: &mut Guard<'_, P, Exclusive>) {
        self.tell(guard.task(), || Event::VmEnd);
        self.zap_pages(guard, Breaks::Dead);
    }

    pub(crate) fn zap_pages(&self, guard: &mut Guard<'_, P, Exclusive>, breaks: Breaks) {
        let task = guard.task();
        let _work = task.phase(Phase::SpteWork);
        self.on_cpu(task, || {
            let mut books = self.books();
            let mut dead = self.take_zapped(guard);
            let mut at = self.newest();
            while let Some(page) = at {
                if self.is_invalid_page(page) {
                    self.violation("shadow-list", &format!("invalid page {page} is on the active list"));
                    at = self.older(page);
                    continue;
                }
                let older = self.older(page);
                let zapped = self.prepare_zap(guard, &books, &mut dead, page);
                at = if zapped.unstable {
                    self.tallies.restarts.add(1);
                    self.newest()
                } else {
                    older
                };
                if breaks != Breaks::Never && guard.should_yield() {
                    if breaks == Breaks::Alive {
                        self.commit_zap(guard, std::mem::take(&mut dead));
                    }
                    self.give_way(guard, dead);
                    (books, dead) = (self.books(), self.take_zapped(guard));
                    at = self.newest();
                }
            }
            self.commit_zap(guard, dead);
        });
        self.stamp_zap_end();
    }

    /// Gives the lock up and takes it back, `dead` being kept for whoever needs its pages meanwhile.
    pub(crate) fn give_way(&self, guard: &mut Guard<'_, P, Exclusive>, dead: DeadPages) {
        self.keep_zapped(guard, dead);
        self.tallies.restarts.add(1);
        guard.relock();
    }
}
