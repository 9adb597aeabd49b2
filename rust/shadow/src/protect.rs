//! Reverse maps put to work without unmapping: write protection, dirty clearing, aging.
//!
//! **Guarantee.** After [`ShadowMmu::write_protect`] and the flush that it may owe, the guest writes no page of the range without a fault, which may be one that the fast path settles. After `write_protect_gfn` and its flush the gfn is not written until a fault under the lock has said so. No Dirty or Accessed is lost.
//!
//! **Mechanism.** Each leaf in the reverse maps of the range, by level. The lock is exclusive but hardware and the fast page fault go on, so a volatile leaf is changed by an exchange whose old value is believed.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Exclusive, Guard, Phase, Platform, Site};
use tdpmmu_spte::{Format, LEVEL_4K, Spte};

use crate::ptelist::Place;
use crate::unmap::RmapWalk;
use crate::{BookSet, ShadowMmu};

/// Heads asked for at a time.
const RUN: u64 = 512;

impl<P: Platform> ShadowMmu<P> {
    /// Write-protects the leaves of `min_level` and above in `gfns` for dirty logging: W goes, the fast page fault may give it back. True: a flush is owed.
    pub fn write_protect(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        as_id: u8,
        gfns: Range<u64>,
        min_level: u8,
    ) -> bool {
        self.change_leaves(lock, &self.books(), as_id, gfns, min_level, |format, spte| {
            format.is_writable(spte).then(|| format.without_write(spte))
        })
    }

    /// Clears Dirty, or W where an entry has no Dirty, in `gfns`. True: a flush is owed.
    pub fn clear_dirty(&self, lock: &Guard<'_, P, Exclusive>, as_id: u8, gfns: Range<u64>) -> bool {
        self.change_leaves(lock, &self.books(), as_id, gfns, LEVEL_4K, |format, spte| {
            let bit = format.dirty_log_bit(spte, false);
            (spte.raw() & bit != 0).then_some(Spte(spte.raw() & !bit))
        })
    }

    /// No leaf of `min_level` or above maps `gfn` writable, here or in the other MMU, and no fast page fault makes one: the guest's table in it is about to be shadowed. True: a flush is owed. (An entry that lacks W but not MMU-writable changes too: bug-history 17.)
    pub(crate) fn write_protect_gfn(
        &self,
        lock: &mut Guard<'_, P, Exclusive>,
        books: &BookSet,
        as_id: u8,
        gfn: u64,
        min_level: u8,
    ) -> bool {
        let elsewhere = self.host.write_protect_gfn(lock, as_id, gfn, min_level);
        elsewhere | self.protect_gfn_here(lock, books, as_id, gfn, min_level)
    }

    /// The half of [`ShadowMmu::write_protect_gfn`] that is about this MMU, for who asks both.
    pub fn protect_gfn(&self, lock: &Guard<'_, P, Exclusive>, as_id: u8, gfn: u64, min_level: u8) -> bool {
        self.protect_gfn_here(lock, &self.books(), as_id, gfn, min_level)
    }

    fn protect_gfn_here(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        as_id: u8,
        gfn: u64,
        min_level: u8,
    ) -> bool {
        self.change_leaves(lock, books, as_id, gfn..gfn + 1, min_level, |format, spte| {
            let gone = format.write | format.mmu_writable;
            (spte.raw() & gone != 0).then(|| format.without_mmu_write(spte))
        })
    }

    /// Takes the accessed mark from every leaf of `gfns`; true if one had it. No flush is owed.
    pub fn age(&self, lock: &Guard<'_, P, Exclusive>, as_id: u8, gfns: Range<u64>) -> bool {
        self.change_leaves(lock, &self.books(), as_id, gfns, LEVEL_4K, |format, spte| {
            format.is_accessed(spte).then(|| format.without_accessed(spte))
        })
    }

    /// Has a leaf of `gfns` been accessed since it was last aged?
    pub fn test_age(&self, lock: &Guard<'_, P, Exclusive>, as_id: u8, gfns: Range<u64>) -> bool {
        let mut young = false;
        self.visit_leaves(lock, &self.books(), as_id, gfns, LEVEL_4K, |_, spte| {
            young |= self.format().is_accessed(spte);
        });
        young
    }

    /// Replaces each leaf for which `change` has a value; true if one was.
    fn change_leaves(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        as_id: u8,
        gfns: Range<u64>,
        min_level: u8,
        change: impl Fn(&Format, Spte) -> Option<Spte>,
    ) -> bool {
        let mut any = false;
        self.visit_leaves(lock, books, as_id, gfns, min_level, |at, spte| {
            any |= self.change_leaf(lock, at, spte, &change);
        });
        any
    }

    fn change_leaf(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        at: Place,
        mut old: Spte,
        change: &impl Fn(&Format, Spte) -> Option<Spte>,
    ) -> bool {
        let task = lock.task();
        let cell = &self.pool.entries(at.table())[usize::from(at.index())];
        let new = loop {
            let Some(new) = change(self.format(), old) else { return false };
            if !self.format().is_volatile(old) {
                P::store(cell, new.raw(), Site::SpteProtect);
                break new;
            }
            match P::cmpxchg(cell, old.raw(), new.raw(), Site::SpteProtect) {
                Ok(_) => break new,
                // Hardware added a bit, or the fast path W.
                Err(seen) => old = Spte(seen),
            }
        };
        task.count(0, 1);
        self.tell_leaf(task, at.table(), at.index(), old, new);
        // Dirty that goes with the change is the host's; Accessed is not: whoever ages is about to be told.
        if self.writes_back && self.format().leaf_needs_dirty(old) && !self.format().leaf_needs_dirty(new) {
            self.dirty_now(task, old.pfn());
        }
        true
    }

    fn visit_leaves(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        as_id: u8,
        gfns: Range<u64>,
        min_level: u8,
        mut visit: impl FnMut(Place, Spte),
    ) {
        let task = lock.task();
        let _work = task.phase(Phase::SpteWork);
        let mut walk = RmapWalk::new(as_id, gfns, min_level);
        while let Some((_, _, _, heads)) = walk.next(books, RUN) {
            for head in heads.iter().filter(|head| head.load(Relaxed) != 0) {
                for at in self.lists.iter(head) {
                    task.count(1, 0);
                    let cell = &self.pool.entries(at.table())[usize::from(at.index())];
                    visit(at, Spte(P::load(cell, Site::SpteRead)));
                }
            }
        }
    }
}
