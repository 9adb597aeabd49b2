//! Leaves that go: one at a time, and a table at a time.
//!
//! **Guarantee.** For each leaf that is dropped, exactly once: its entry is out of the reverse map of its gfn, the statistics know, the observer is told, Dirty and Accessed reach the host (kernels up to 6.12).
//!
//! **Mechanism.** Hardware and the fast page fault may add bits to a leaf without the lock, so a volatile leaf is exchanged and any other stored over. A direct page of level 1 is most of what a zap of
//! everything meets, 512 leaves whose reverse map heads are neighbours, each with that one leaf in it: it is done in blocks of 64, the entries first, then the heads, which hold what is expected or go the long way. `docs/shadow.md` has what was tried and measured.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tdpmmu_platform::{Event, Exclusive, Guard, Platform, Site, Task};
use tdpmmu_spte::{ENTRIES, Spte};
use tdpmmu_table::Entries;
use tdpmmu_table::prefetch::{Intent, LINE, prefetch};

use crate::ptelist::Place;
use crate::{BookSet, ShadowMmu, SlotBooks};

#[derive(Clone, Copy, Default)]
struct Run {
    pfn: u64,
    count: u64,
}

impl Run {
    /// Adds frames; returns a finished run when the new ones do not continue it.
    #[inline]
    fn add(&mut self, pfn: u64, count: u64) -> Option<Run> {
        if self.count != 0 && self.pfn + self.count == pfn {
            self.count += count;
            return None;
        }
        let done = std::mem::replace(self, Run { pfn, count });
        (done.count != 0).then_some(done)
    }
}

/// Dirty and Accessed of leaves that are gone, not yet with the host. Settled before the lock is given up.
#[must_use = "what leaves knew of their pages belongs to the host"]
#[derive(Default)]
pub(crate) struct Lost {
    dirty: Run,
    accessed: Run,
}

impl Lost {
    #[inline]
    fn note<P: Platform>(&mut self, mmu: &ShadowMmu<P>, task: &Task<P>, old: Spte) {
        self.note_run(mmu, task, old, 1);
    }

    /// `count` leaves like `old` are gone, whose frames follow on.
    #[inline]
    fn note_run<P: Platform>(&mut self, mmu: &ShadowMmu<P>, task: &Task<P>, old: Spte, count: u64) {
        if !mmu.writes_back {
            return;
        }
        let format = mmu.format();
        if format.leaf_needs_dirty(old)
            && let Some(run) = self.dirty.add(old.pfn(), count)
        {
            tell_host(mmu, task, run, true);
        }
        if format.leaf_needs_accessed(old)
            && let Some(run) = self.accessed.add(old.pfn(), count)
        {
            tell_host(mmu, task, run, false);
        }
    }

    /// Hands everything to the host.
    pub(crate) fn settle<P: Platform>(&mut self, mmu: &ShadowMmu<P>, task: &Task<P>) {
        for (run, dirty) in [(&mut self.dirty, true), (&mut self.accessed, false)] {
            let run = std::mem::take(run);
            if run.count != 0 {
                tell_host(mmu, task, run, dirty);
            }
        }
    }
}

impl Drop for Lost {
    fn drop(&mut self) {
        debug_assert!(
            self.dirty.count + self.accessed.count == 0 || std::thread::panicking(),
            "Dirty or Accessed of {} dropped leaves never reached the host",
            self.dirty.count + self.accessed.count
        );
    }
}

fn tell_host<P: Platform>(mmu: &ShadowMmu<P>, task: &Task<P>, run: Run, dirty: bool) {
    mmu.tell(task, || Event::WriteBack { pfn: run.pfn, count: run.count, dirty });
    if dirty {
        mmu.host().frames_dirty(run.pfn, run.count);
    } else {
        mmu.host().frames_accessed(run.pfn, run.count);
    }
}

/// Entries exchanged back to back before their reverse maps are looked at.
const BLOCK: usize = 64;

impl<P: Platform> ShadowMmu<P> {
    /// Takes a leaf out: exchanged where hardware or the fast page fault may still add a bit, else stored over. Returns the true old value.
    #[inline(always)]
    fn take_out(&self, cell: &AtomicU64, old: Spte) -> Spte {
        let empty = self.format().empty().raw();
        if self.format().is_volatile(old) {
            Spte(P::swap(cell, empty, Site::ShadowZap))
        } else {
            P::store(cell, empty, Site::ShadowZap);
            old
        }
    }

    /// Drops the leaf `old` at entry `index` of `page`, its reverse map entry too.
    pub(crate) fn drop_leaf(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        lost: &mut Lost,
        page: u32,
        index: u16,
        old: Spte,
    ) {
        self.rmap_remove(books, page, index);
        self.clear_leaf(lock, lost, page, index, old);
    }

    /// Drops the leaf `old` at entry `index` of `page`, which is out of its reverse map.
    pub(crate) fn clear_leaf(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        lost: &mut Lost,
        page: u32,
        index: u16,
        old: Spte,
    ) {
        let task = lock.task();
        let level = self.pool.meta(page).level();
        let old = self.take_out(&self.pool.entries(page)[usize::from(index)], old);
        task.count(0, 1);
        self.count_leaves(level, -1);
        lost.note(self, task, old);
        self.tell_leaf(task, page, index, old, self.format().empty());
    }

    /// One page was written through a leaf that forgets it now.
    pub(crate) fn dirty_now(&self, task: &Task<P>, pfn: u64) {
        tell_host(self, task, Run { pfn, count: 1 }, true);
    }

    /// Reports that a leaf changed.
    #[inline]
    pub(crate) fn tell_leaf(&self, task: &Task<P>, page: u32, index: u16, old: Spte, new: Spte) {
        self.tell(task, || {
            let (role, gfn) = (self.role(page), self.gfn_of(page, index));
            let (as_id, level) = (role.as_id(), role.level());
            Event::ShadowLeaf { as_id, table: page, index, gfn, level, old: old.raw(), new: new.raw() }
        });
    }

    /// Empties a page of level 1.
    pub(crate) fn drop_leaf_table(&self, lock: &Guard<'_, P, Exclusive>, books: &BookSet, page: u32) {
        let task = lock.task();
        let role = self.role(page);
        let mut lost = Lost::default();
        let mut writes = 0;
        let base = self.pool.meta(page).gfn();
        let slot = if role.direct() { books.find(role.as_id(), base) } else { None };
        let entries = self.pool.entries(page);
        let ahead = slot.and_then(|slot| self.next_direct_table(slot, page));
        for (n, block) in entries.as_chunks::<BLOCK>().0.iter().enumerate() {
            let first = (n * BLOCK) as u16;
            if let Some((next, heads)) = ahead {
                for line in (0..BLOCK).step_by(LINE) {
                    prefetch(next, n * BLOCK + line, Intent::Write);
                    prefetch(heads, n * BLOCK + line, Intent::Write);
                }
            }
            // The heads of 64 neighbours, where the slot has them all.
            let heads = slot
                .and_then(|slot| slot.rmap_run(base + u64::from(first), 1, BLOCK as u64))
                .and_then(|heads| heads.first_chunk::<BLOCK>());
            writes += match heads {
                Some(heads) => self.drop_direct_block(lock, books, &mut lost, page, first, block, heads),
                None => self.drop_block(lock, books, &mut lost, page, first, block),
            };
        }
        lost.settle(self, task);
        self.count_leaves(1, -(writes as i64));
        task.count(ENTRIES as u64, writes);
    }

    /// The entries of the page that a walk from the oldest comes to next, and the heads of what it maps, if it is of the same kind: while one table is emptied the next is on its way. Each is a page of memory, at whose end the hardware prefetcher stops.
    fn next_direct_table<'s>(&'s self, slot: &'s SlotBooks, page: u32) -> Option<(&'s Entries, &'s Entries)> {
        let next = self.newer(page)?;
        let meta = self.pool.meta(next);
        if meta.level() != 1 || !self.role(next).direct() || self.role(next).as_id() != slot.as_id {
            return None;
        }
        let heads = slot.rmap_run(meta.gfn(), 1, ENTRIES as u64)?.first_chunk::<ENTRIES>()?;
        Some((self.pool.entries(next), heads))
    }

    /// 64 entries of a direct page; returns how many leaves there were.
    fn drop_direct_block(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        lost: &mut Lost,
        page: u32,
        first: u16,
        block: &[AtomicU64; BLOCK],
        heads: &[AtomicU64; BLOCK],
    ) -> u64 {
        let format = self.format();
        let empty = format.empty().raw();
        let mut olds = [Spte(0); BLOCK];
        let mut present = u64::MAX;
        let settled = format.is_settled(Spte(P::load(&block[0], Site::ShadowZap)))
            && self.read_settled(block, &mut olds);
        if settled {
            for cell in block {
                P::store(cell, empty, Site::ShadowZap);
            }
        } else {
            // Read and exchanged one after the other: a pass of reads before would cost a tenth.
            for (i, (old, cell)) in olds.iter_mut().zip(block).enumerate() {
                *old = Spte(P::load(cell, Site::ShadowZap));
                if old.is_present() {
                    *old = self.take_out(cell, *old);
                    continue;
                }
                present &= !(1 << i);
                if !format.is_empty(*old) {
                    P::store(cell, empty, Site::ShadowZap);
                }
            }
        }
        // The heads: each holds the one leaf, as a rule.
        let alone = Place::new(page, first).word();
        let mut others = 0;
        for (i, head) in heads.iter().enumerate() {
            others |= head.load(Relaxed) ^ (alone + 2 * i as u64);
        }
        if others == 0 && present == u64::MAX {
            heads.iter().for_each(|head| head.store(0, Relaxed));
        } else {
            for (i, head) in heads.iter().enumerate().filter(|(i, _)| present >> i & 1 != 0) {
                if head.load(Relaxed) == alone + 2 * i as u64 {
                    head.store(0, Relaxed);
                } else {
                    self.rmap_remove(books, page, first + i as u16);
                }
            }
        }
        self.book_block(lock.task(), lost, page, first, present, &olds);
        u64::from(present.count_ones())
    }

    /// Reads a block; are all of it leaves that nobody can add a bit to?
    #[inline]
    fn read_settled(&self, block: &[AtomicU64; BLOCK], olds: &mut [Spte; BLOCK]) -> bool {
        let format = self.format();
        let mut unsettled = 0;
        for (old, cell) in olds.iter_mut().zip(block) {
            *old = Spte(P::load(cell, Site::ShadowZap));
            unsettled |= (old.raw() ^ format.settled_value()) & format.settled_mask();
        }
        unsettled == 0
    }

    /// 64 entries of a page whose gfns lie anywhere.
    fn drop_block(
        &self,
        lock: &Guard<'_, P, Exclusive>,
        books: &BookSet,
        lost: &mut Lost,
        page: u32,
        first: u16,
        block: &[AtomicU64; BLOCK],
    ) -> u64 {
        let mut olds = [Spte(0); BLOCK];
        let mut present = 0u64;
        for (i, (old, cell)) in olds.iter_mut().zip(block).enumerate() {
            *old = Spte(P::load(cell, Site::ShadowZap));
            if old.is_present() {
                present |= 1 << i;
                self.rmap_remove(books, page, first + i as u16);
                *old = self.take_out(cell, *old);
            } else if !self.format().is_empty(*old) {
                P::store(cell, self.format().empty().raw(), Site::ShadowZap);
            }
        }
        self.book_block(lock.task(), lost, page, first, present, &olds);
        u64::from(present.count_ones())
    }

    /// What the leaves of a block knew goes to the host and to who listens.
    #[inline]
    fn book_block(
        &self,
        task: &Task<P>,
        lost: &mut Lost,
        page: u32,
        first: u16,
        present: u64,
        olds: &[Spte; BLOCK],
    ) {
        if !self.writes_back && !self.is_observed() {
            return;
        }
        if !self.is_observed() && present == u64::MAX {
            let follows =
                |(i, old): (usize, &Spte)| old.raw() == olds[0].raw() + ((i as u64) << Spte::PFN_SHIFT);
            if olds.iter().enumerate().all(follows) {
                lost.note_run(self, task, olds[0], BLOCK as u64);
                return;
            }
        }
        for (i, old) in olds.iter().enumerate().filter(|(i, _)| present >> i & 1 != 0) {
            lost.note(self, task, *old);
            self.tell_leaf(task, page, first + i as u16, *old, self.format().empty());
        }
    }
}
