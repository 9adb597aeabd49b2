//! Roots: found or made, counted, put.
//!
//! **Guarantee.** A page that vCPUs hold as a root is not freed: zapped it may be, then it is empty and invalid, off the list, and the last put frees it. A root that is obsolete is never given out.
//!
//! **Mechanism.** root_count in the page's header. A root is a page like any other, hashed by gfn and role; a direct root's gfn is 0.

use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Event, Exclusive, Guard, Platform, Site};
use tdpmmu_spte::Role;
use tdpmmu_table::{PoolError, TableCache};

use crate::ShadowMmu;
use crate::zap::DeadPages;

impl<P: Platform> ShadowMmu<P> {
    /// References of vCPUs on a page as a root.
    #[inline]
    pub(crate) fn root_count(&self, page: u32) -> u32 {
        self.pool.meta(page).refs.load(Relaxed)
    }

    /// The root of `role` for the guest's table in `gfn` (0 for direct paging), with a reference for the caller: found, or made. The cache was topped up before the lock was taken.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`]: the quota has no room left, though everything that is no root was zapped; or the cache is empty.
    pub fn load_root(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        cache: &mut TableCache,
        as_id: u8,
        gfn: u64,
        role: Role,
    ) -> Result<u32, PoolError> {
        P::point(Site::ShadowRoot);
        if !self.make_pages_available(guard) {
            let (in_use, cap) = (self.tallies.pages.get(), u64::from(self.config.quota));
            return Err(PoolError::Exhausted { in_use, cap, wanted: 1 });
        }
        let mut owed = self.owe();
        let found = self.get_page(guard, cache, &mut owed, as_id, gfn, role);
        self.pay(guard, &mut owed);
        let Some(root) = found else {
            let in_use = self.pool.stats().taken;
            return Err(PoolError::Exhausted { in_use, cap: self.pool.cap(), wanted: 1 });
        };
        let count = self.root_count(root) + 1;
        self.pool.meta(root).refs.store(count, Relaxed);
        self.tell(guard.task(), || Event::ShadowRoot { root, count });
        Ok(root)
    }

    /// Gives a reference on a root back. The last one of a zapped root frees it.
    pub fn put_root(&self, guard: &mut Guard<'_, P, Exclusive>, root: u32) {
        P::point(Site::ShadowRoot);
        let Some(count) = self.root_count(root).checked_sub(1) else {
            self.violation("shadow-root", &format!("root {root} was put, which nobody held"));
            return;
        };
        self.pool.meta(root).refs.store(count, Relaxed);
        self.tell(guard.task(), || Event::ShadowRoot { root, count });
        if count == 0 && self.is_invalid_page(root) {
            let books = self.books();
            let mut dead = DeadPages::default();
            let _ = self.prepare_zap(guard, &books, &mut dead, root);
            self.commit_zap(guard, dead);
        }
    }

    /// The root may not be used any more: zapped, or of an older generation. Without the lock it is a hint that only grows truer while no fast zap runs: who acts on "no" holds the lock.
    #[inline]
    pub fn is_obsolete(&self, root: u32) -> bool {
        P::point(Site::ShadowRoot);
        self.is_obsolete_page(root)
    }

    /// Level of a root: 4 or 5.
    #[inline]
    pub fn root_level(&self, root: u32) -> u8 {
        self.pool.meta(root).level()
    }
}
