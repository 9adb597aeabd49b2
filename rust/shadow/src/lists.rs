//! The active list: every page that may be zapped, newest first.
//!
//! **Guarantee.** First in, first out: a page is added as the newest and never moved. So all obsolete pages lie at the old end, the first page of this generation ends a walk from there, and such a walk ends whatever vCPUs make meanwhile. A page that was zapped is not on the list, ever again: what would be zapped twice is not
//! found twice (bug-history 36).
//!
//! **Mechanism.** Links in the pages' headers (`next` is older, `prev` newer), a flag that says "listed".

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use tdpmmu_platform::{NIL, Platform};
use tdpmmu_table::TableFlag;

use crate::ShadowMmu;

/// The ends of the list and its length.
pub(crate) struct ActiveList {
    newest: AtomicU32,
    oldest: AtomicU32,
    len: AtomicU64,
}

impl Default for ActiveList {
    fn default() -> Self {
        Self { newest: AtomicU32::new(NIL), oldest: AtomicU32::new(NIL), len: AtomicU64::new(0) }
    }
}

fn page(link: &AtomicU32) -> Option<u32> {
    let page = link.load(Relaxed);
    (page != NIL).then_some(page)
}

impl<P: Platform> ShadowMmu<P> {
    /// Pages on the list.
    pub(crate) fn listed(&self) -> u64 {
        self.active.len.load(Relaxed)
    }

    pub(crate) fn is_listed(&self, table: u32) -> bool {
        self.pool.meta(table).has(TableFlag::Listed)
    }

    /// The page that was made first.
    pub(crate) fn oldest(&self) -> Option<u32> {
        page(&self.active.oldest)
    }

    /// The page that was made last.
    pub(crate) fn newest(&self) -> Option<u32> {
        page(&self.active.newest)
    }

    /// The page that was made next.
    pub(crate) fn newer(&self, table: u32) -> Option<u32> {
        page(&self.pool.meta(table).prev)
    }

    /// The page that was made before.
    pub(crate) fn older(&self, table: u32) -> Option<u32> {
        page(&self.pool.meta(table).next)
    }

    /// `table` is the newest page from here on.
    pub(crate) fn list_add(&self, table: u32) {
        let newest = self.active.newest.load(Relaxed);
        let meta = self.pool.meta(table);
        meta.next.store(newest, Relaxed);
        meta.prev.store(NIL, Relaxed);
        let link = if newest == NIL { &self.active.oldest } else { &self.pool.meta(newest).prev };
        link.store(table, Relaxed);
        self.active.newest.store(table, Relaxed);
        meta.set(TableFlag::Listed);
        self.active.len.store(self.listed() + 1, Relaxed);
    }

    /// Takes `table` off the list; false if it was not on it.
    pub(crate) fn list_del(&self, table: u32) -> bool {
        let meta = self.pool.meta(table);
        if !meta.clear(TableFlag::Listed) {
            return false;
        }
        let (older, newer) = (meta.next.load(Relaxed), meta.prev.load(Relaxed));
        let behind = if older == NIL { &self.active.oldest } else { &self.pool.meta(older).prev };
        behind.store(newer, Relaxed);
        let before = if newer == NIL { &self.active.newest } else { &self.pool.meta(newer).next };
        before.store(older, Relaxed);
        meta.next.store(NIL, Relaxed);
        meta.prev.store(NIL, Relaxed);
        self.active.len.store(self.listed() - 1, Relaxed);
        true
    }
}
