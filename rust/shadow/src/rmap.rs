//! Reverse maps: which leaves map a gfn.
//!
//! **Guarantee.** A leaf of level L that maps `gfn` is in the reverse map of `gfn` at L, once, and nothing else is. So a gfn is unmapped, write-protected or aged by its reverse maps alone, in every page that maps it, obsolete ones too.
//!
//! **Mechanism.** A head a frame and level in the memslot's books ([`crate::SlotBooks`]), an entry or a list ([`crate::ptelist`]). A guest that maps one page a thousand times has its reverse map recycled: all
//! leaves go and come back as they are used, since every operation on the gfn walks them all.

use std::sync::atomic::AtomicU64;

use tdpmmu_platform::{Exclusive, Guard, Platform, Site};
use tdpmmu_spte::Spte;

use crate::leaves::Lost;
use crate::ptelist::Place;
use crate::zap::{DeadPages, Zapped};
use crate::{BookSet, ShadowMmu};

/// Leaves in one reverse map that are too many (RMAP_RECYCLE_THRESHOLD).
const RECYCLE: u64 = 1000;

/// What an entry held that was dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Dropped {
    /// Nothing that anybody used: empty, or MMIO.
    Nothing,
    /// A leaf with this last value. A flush is owed.
    Leaf(Spte),
    /// A link; with it went so many pages. A flush is owed, at the latest with the commit of the pages.
    Table(Zapped),
}

impl<P: Platform> ShadowMmu<P> {
    /// The leaf at entry `index` of `page` maps `gfn` from here on. The reverse map is recycled if it is long: everything in it goes, the new leaf too, and all TLBs are flushed.
    pub(crate) fn rmap_add(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        as_id: u8,
        gfn: u64,
        level: u8,
        page: u32,
        index: u16,
    ) {
        self.count_leaves(level, 1);
        let Some(head) = books.find(as_id, gfn).and_then(|slot| slot.rmap(gfn, level)) else {
            self.books_gone("a new leaf", as_id, gfn);
            return;
        };
        if self.lists.add(head, Place::new(page, index)) > RECYCLE {
            let mut lost = Lost::default();
            let dropped = self.drop_rmap(lock, &mut lost, head);
            lost.settle(self, lock.task());
            lock.task().count(dropped, 0);
            self.flush(lock.task());
        }
    }

    /// The leaf at entry `index` of `page` is about to go.
    pub(crate) fn rmap_remove(&self, books: &BookSet, page: u32, index: u16) {
        let (role, gfn) = (self.role(page), self.gfn_of(page, index));
        match books.find(role.as_id(), gfn).and_then(|slot| slot.rmap(gfn, role.level())) {
            Some(head) => {
                if !self.lists.remove(head, Place::new(page, index)) {
                    self.violation(
                        "shadow-rmap",
                        &format!("leaf {page}[{index}] is not in the reverse map of gfn {gfn:#x}"),
                    );
                }
            }
            None => self.books_gone("a leaf", role.as_id(), gfn),
        }
    }

    /// Every leaf of one reverse map goes; returns how many there were. A flush is owed for them.
    pub(crate) fn drop_rmap(&self, lock: &Guard<'_, P, Exclusive>, lost: &mut Lost, head: &AtomicU64) -> u64 {
        let mut dropped = 0;
        while let Some(at) = self.lists.pop(head) {
            let cell = &self.pool.entries(at.table())[usize::from(at.index())];
            let old = Spte(P::load(cell, Site::ShadowZap));
            if old.is_leaf(self.pool.meta(at.table()).level()) {
                self.clear_leaf(lock, lost, at.table(), at.index(), old);
                dropped += 1;
            } else {
                let what = format!("a reverse map names {}[{}], which is {old:?}", at.table(), at.index());
                self.violation("shadow-rmap", &what);
            }
        }
        dropped
    }

    /// Empties entry `index` of `page`, whatever it holds (mmu_page_zap_pte). Dirty and Accessed reach the host; a nested guest's page goes with its last parent.
    pub(crate) fn drop_spte(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        dead: &mut DeadPages,
        page: u32,
        index: u16,
    ) -> Dropped {
        let level = self.pool.meta(page).level();
        let cell = &self.pool.entries(page)[usize::from(index)];
        let old = Spte(P::load(cell, Site::ShadowZap));
        lock.task().count(1, 0);
        if old.is_leaf(level) {
            let mut lost = Lost::default();
            self.drop_leaf(lock, books, &mut lost, page, index, old);
            lost.settle(self, lock.task());
            return Dropped::Leaf(old);
        }
        if old.is_table(level) {
            let mut zapped = Zapped::default();
            self.drop_table(lock, books, dead, page, index, old.pfn() as u32, &mut zapped);
            return Dropped::Table(zapped);
        }
        if !self.format().is_empty(old) {
            P::store(cell, self.format().empty().raw(), Site::ShadowZap);
        }
        Dropped::Nothing
    }
}
