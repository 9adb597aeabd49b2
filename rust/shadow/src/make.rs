//! Shadow pages are made here.

use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Event, Exclusive, Fault, Guard, Platform, Site, Task};
use tdpmmu_spte::geometry::MAX_LEVEL;
use tdpmmu_spte::{ENTRIES, Role};
use tdpmmu_table::{PoolError, TableCache, TableFlag};

use crate::page::direct_gfn;
use crate::{BookSet, ShadowMmu};

impl<P: Platform> ShadowMmu<P> {
    /// Fills `cache` so that neither a fault nor the load of a root can fail for want of a table; outside all locks. New pages are empty.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] at the cap of the pool. What obsolete pages hold can be had by [`ShadowMmu::shrink`].
    pub fn top_up(&self, task: &Task<P>, cache: &mut TableCache) -> Result<(), PoolError> {
        let wanted = usize::from(MAX_LEVEL);
        if P::inject(Fault::Alloc, Site::AllocFault) {
            let in_use = self.pool.stats().taken;
            return Err(PoolError::Exhausted { in_use, cap: self.pool.cap(), wanted: wanted as u64 });
        }
        if cache.len() >= wanted {
            return Ok(());
        }
        task.might_sleep();
        P::point(Site::AllocFault);
        let empty = self.format().empty().raw();
        cache.top_up(&self.pool, wanted, |page| {
            self.pool.entries(page).iter().for_each(|entry| entry.store(empty, Relaxed));
        })
    }

    /// A new page of this generation for the guest's table in `gfn` (or, direct, for what begins at `gfn`): hashed, the newest of the active list, accounted in its memslot. `None`: the cache is empty. Its gfn is not write-protected yet.
    pub(crate) fn new_page(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        cache: &mut TableCache,
        as_id: u8,
        gfn: u64,
        role: Role,
    ) -> Option<u32> {
        let page = cache.pop()?;
        P::point(Site::TableAlloc);
        let direct = role.direct();
        self.pool.meta(page).init(role.raw(), gfn, role.level(), None);
        if role.invalid(self.profile().role_layout) {
            // A child of an invalid page (bug-history 33): it is as invalid as its parent, and is listed all the same.
            self.pool.meta(page).set(TableFlag::Invalid);
        }
        self.pages.reset(page, self.generation.load(Relaxed), !direct);
        self.hash_add(page);
        self.list_add(page);
        let t = &self.tallies;
        t.pages.add(1);
        t.pages_peak.raise(t.pages.get());
        if !direct {
            t.indirect.add(1);
            t.indirect_peak.raise(t.indirect.get());
            self.account_shadowed(books, page);
        }
        let level = role.level();
        self.tell(lock.task(), || Event::ShadowAlloc { table: page, as_id, gfn, role: role.raw(), level });
        Some(page)
    }

    /// The gfn that entry `index` of `page` translates: computed for a direct page, stored for one that shadows a table.
    #[inline]
    pub(crate) fn gfn_of(&self, page: u32, index: u16) -> u64 {
        let meta = self.pool.meta(page);
        if self.role(page).direct() {
            direct_gfn(meta.gfn(), meta.level(), index)
        } else {
            self.pages.stored(page, index).0
        }
    }

    /// The access bits that the guest gives entry `index`; those of the role for a direct page.
    #[inline]
    pub(crate) fn access_of(&self, page: u32, index: u16) -> u8 {
        let role = self.role(page);
        if role.direct() { role.access(self.profile().role_layout) } else { self.pages.stored(page, index).1 }
    }

    /// Notes which gfn entry `index` of `page` translates, with the guest's access bits. A direct page computes its gfns: nothing is stored.
    #[inline]
    pub(crate) fn set_gfn(&self, page: u32, index: u16, gfn: u64, access: u8) {
        debug_assert!(usize::from(index) < ENTRIES);
        if !self.role(page).direct() {
            self.pages.store(page, index, gfn, access);
        }
    }
}
