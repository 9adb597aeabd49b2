//! The page quota: room for a fault is made before it begins, by zapping the oldest pages.
//!
//! **Guarantee.** After [`ShadowMmu::make_pages_available`] says true there is room: for the five pages of a path, or, where everything else is held, for one at least (a fault may then exceed the quota by four, as in KVM). It zaps pages, so the lock is held exclusively (bug-history 25), and whatever the caller knew of its root before is void: the root itself may be gone, by way of a page that it hung below. Whoever asks whether its root is stale asks *after* this
//! (bug-history 33).
//!
//! **Mechanism.** Zapped pages that wait for their commit go first: they are free for the flush. Then the oldest pages that no vCPU holds as a root; roots are passed over, as zapping one makes every holder load it anew and frees nothing until then. Obsolete pages are the oldest, so what `shadow-gen-kept` keeps goes first.
//! Unlike KVM's n_used_mmu_pages, which a page leaves when it is prepared, the quota here counts pages until they are committed: else nothing could be gained by committing.

use tdpmmu_platform::{Exclusive, Guard, Platform};

use crate::zap::DeadPages;
use crate::{BookSet, ShadowMmu};

/// Pages that must be available before a fault (KVM_MIN_FREE_MMU_PAGES).
const MIN_FREE: u64 = 5;
/// Pages to have available after a reclaim (KVM_REFILL_PAGES).
const REFILL: u64 = 25;

impl<P: Platform> ShadowMmu<P> {
    fn available(&self) -> u64 {
        let used = self.tallies.pages.get() + self.tallies.zapped_kept.get();
        u64::from(self.config.quota).saturating_sub(used)
    }

    /// Makes room for the pages of one fault; may zap any page, the caller's root too. False: there is none to be had.
    pub fn make_pages_available(&self, guard: &mut Guard<'_, P, Exclusive>) -> bool {
        if self.config.quota == u32::MAX || self.available() >= MIN_FREE {
            return true;
        }
        let kept = self.take_zapped(guard);
        self.commit_zap(guard, kept);
        if self.available() < MIN_FREE {
            let wanted = REFILL.min(u64::from(self.config.quota)) - self.available();
            let books = self.books();
            let mut dead = DeadPages::default();
            let zapped = self.zap_oldest(guard, &books, &mut dead, wanted);
            self.commit_zap(guard, dead);
            self.tallies.reclaimed.add(zapped);
        }
        self.available() != 0
    }

    /// Frees pages because memory is short (the kernel's shrinker): what is zapped already, else up to `pages` of the oldest. Returns how many are on their way to the pool.
    pub fn shrink(&self, guard: &mut Guard<'_, P, Exclusive>, pages: u64) -> u64 {
        let kept = self.tallies.zapped_kept.get();
        let dead = self.take_zapped(guard);
        self.commit_zap(guard, dead);
        if kept != 0 {
            return kept;
        }
        let books = self.books();
        let mut dead = DeadPages::default();
        let zapped = self.zap_oldest(guard, &books, &mut dead, pages);
        self.commit_zap(guard, dead);
        self.tallies.reclaimed.add(zapped);
        zapped
    }

    /// Zaps the oldest pages that no vCPU holds as a root, until `wanted` are on their way; returns how many are.
    fn zap_oldest(
        &self,
        guard: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        dead: &mut DeadPages,
        wanted: u64,
    ) -> u64 {
        let mut total = 0;
        let mut at = self.oldest();
        while let Some(page) = at {
            let newer = self.newer(page);
            // Passed over as candidates only: what hangs below another page goes with it, held or not.
            if self.root_count(page) != 0 {
                at = newer;
                continue;
            }
            let zapped = self.prepare_zap(guard, books, dead, page);
            total += zapped.pages;
            if total >= wanted {
                break;
            }
            at = if zapped.unstable { self.oldest() } else { newer };
        }
        total
    }
}
