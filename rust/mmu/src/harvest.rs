//! Harvesting dirty state: mask after mask under one exclusive hold.
//!
//! **Guarantee.** [`Harvest::clear`] does what [`TdpMmu::clear_dirty_masked`] does, for any number of masks in any order, entry by entry in the same order: mask by mask,
//! root by root, ascending. Nothing that it remembers between two masks outlives the hold: who changes the tree meanwhile asks for the lock by [`Harvest::interrupt`].
//!
//! **Mechanism.** A sparse harvest is made of what it does once per page: finding the table, missing the caches, booking. So the way down is remembered for the root that was
//! visited last (one is valid, as a rule), frames are booked for all masks together, and [`Harvest::expect`] asks for the lines of a mask that is still to come: pages
//! that are far apart lie in tables of their own, which no hardware prefetcher connects.
//!
//! mmu_lock is held exclusive, so that tables stay what they are; beside it only hardware and the fast page fault write, and only leaves.

use tdpmmu_platform::{Exclusive, Guard, Platform, RcuGuard, Site, Task};
use tdpmmu_spte::geometry::index;
use tdpmmu_spte::{ClearDirty, Spte};
use tdpmmu_table::prefetch::{Intent, LINE, prefetch};

use crate::TdpMmu;
use crate::change::{self, At};
use crate::dirty::LogBit;
use crate::ledger::Ledger;

/// The way down to the tables around one gfn, under one root.
#[derive(Clone, Copy)]
struct Path {
    root: u32,
    /// gfn >> 18, and the level-2 table of that GiB if tables reach that far down.
    gib: u64,
    middle: Option<u32>,
    /// gfn >> 9, and the level-1 table of these 2 MiB likewise.
    piece: u64,
    leaves: Option<u32>,
}

/// An exclusive hold of mmu_lock in which dirty pages are taken for clean. See the module text. The caller flushes after it, if anything was cleared.
pub struct Harvest<'h, 'a, P: Platform> {
    mmu: &'h TdpMmu<P>,
    guard: &'h mut Guard<'a, P, Exclusive>,
    task: &'a Task<P>,
    rcu: Option<RcuGuard<'a, P>>,
    as_id: u8,
    wrprot: bool,
    path: Option<Path>,
    ledger: Ledger,
    /// Host pages that were written and are not booked yet: a multiple of 64, and a bit for each from there on.
    written: (u64, u64),
}

impl<P: Platform> TdpMmu<P> {
    /// Begins to clear Dirty (`wrprot`: to take W) of 4 KiB leaves of one address space.
    pub fn harvest<'h, 'a>(
        &'h self,
        guard: &'h mut Guard<'a, P, Exclusive>,
        as_id: u8,
        wrprot: bool,
    ) -> Harvest<'h, 'a, P> {
        let task = guard.task();
        let rcu = Some(task.rcu_read());
        Harvest {
            mmu: self,
            guard,
            task,
            rcu,
            as_id,
            wrprot,
            path: None,
            ledger: Ledger::default(),
            written: (0, 0),
        }
    }

    /// Clears Dirty (`wrprot`: takes W) of the 4 KiB leaves of the gfns `base + n` for each bit n of `mask`; larger leaves are left alone. The caller
    /// flushes afterwards, under the lock or not. Returns how many entries changed.
    pub fn clear_dirty_masked(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        base: u64,
        mask: u64,
        wrprot: bool,
    ) -> u64 {
        self.harvest(guard, as_id, wrprot).clear(base, mask)
    }
}

impl<'a, P: Platform> Harvest<'_, 'a, P> {
    /// As [`TdpMmu::clear_dirty_masked`].
    pub fn clear(&mut self, base: u64, mask: u64) -> u64 {
        let mmu = self.mmu;
        mmu.roots_of_gfn(self.as_id).map(|root| self.clear_in(root, base, mask)).sum()
    }

    /// `clear(base, mask)` will come soon, after a few others: asks for the entries' cache lines. Changes nothing.
    #[inline]
    pub fn expect(&mut self, base: u64, mask: u64) {
        // A hint for the root that was visited last: where there are several, the others go without.
        let Some(Path { gib, middle: Some(middle), .. }) = self.path else { return };
        if base >> 18 != gib || mask == 0 {
            return;
        }
        let pool = self.mmu.pool();
        let entry = Spte(P::load(&pool.entries(middle)[index(base, 2)], Site::SpteRead));
        if !entry.is_table(2) {
            return;
        }
        let table = pool.child_entries(entry);
        // A mask that begins in the middle of a line has a ninth one, and may end in the next table: a hint need not be complete.
        let mut left = mask;
        while left != 0 {
            let bit = left.trailing_zeros() as usize;
            let at = index(base, 1) + bit;
            if at >= table.len() {
                return;
            }
            prefetch(table, at, Intent::Write);
            let next = bit + LINE - at % LINE;
            left = if next < 64 { left >> next << next } else { 0 };
        }
    }

    /// Lends the lock for something that may change the tree, or give the lock up.
    pub fn interrupt<R>(&mut self, body: impl FnOnce(&mut Guard<'a, P, Exclusive>) -> R) -> R {
        self.settle();
        self.path = None;
        drop(self.rcu.take());
        let done = body(self.guard);
        self.rcu = Some(self.task.rcu_read());
        done
    }

    /// Is it known that level-1 tables translate the gfns `first` and `last` under every root of the address space? Then there is no huge leaf around them to split
    /// or to protect. Never known at batch 1, where each walk is to be made as the kernel makes it.
    pub fn is_small(&mut self, first: u64, last: u64) -> bool {
        let (mmu, as_id) = (self.mmu, self.as_id);
        let mut roots = mmu.listed_roots().filter(|&root| mmu.as_id(root) == as_id);
        mmu.batch() > 1
            && roots.all(|root| {
                self.leaves(root, first).is_some()
                    && (first >> 9 == last >> 9 || self.leaves(root, last).is_some())
            })
    }

    /// The level-1 table that translates `gfn` under `root`, if tables reach that far down.
    #[inline]
    fn leaves(&mut self, root: u32, gfn: u64) -> Option<u32> {
        if let Some(path) = &mut self.path
            && path.root == root
            && path.gib == gfn >> 18
        {
            if path.piece != gfn >> 9 {
                path.piece = gfn >> 9;
                path.leaves = path.middle.and_then(|middle| {
                    self.task.count(1, 0);
                    let entries = self.mmu.pool().entries(middle);
                    let entry = Spte(P::load(&entries[index(gfn, 2)], Site::SpteRead));
                    entry.is_table(2).then(|| entry.pfn() as u32)
                });
            }
            return path.leaves;
        }
        let walk = self.mmu.walk_lockless(self.task, root, gfn);
        let middle = match walk.level {
            1 => walk.sptes[3].is_table(3).then(|| walk.sptes[3].pfn() as u32),
            2 => Some(walk.table),
            _ => None,
        };
        let leaves = (walk.level == 1).then_some(walk.table);
        self.path = Some(Path { root, gib: gfn >> 18, middle, piece: gfn >> 9, leaves });
        leaves
    }

    /// A host page was written. Pages that share a word of the host's flags are booked together: a locked instruction each would cost as much as the harvest.
    #[inline]
    fn frame_dirty(&mut self, pfn: u64) {
        let (base, mask) = &mut self.written;
        if pfn & !63 != *base {
            if *mask != 0 {
                self.mmu.frames_dirty_masked(*base, *mask);
            }
            (*base, *mask) = (pfn & !63, 0);
        }
        *mask |= 1 << (pfn & 63);
    }

    /// Books everything.
    fn settle(&mut self) {
        let (base, mask) = std::mem::take(&mut self.written);
        if mask != 0 {
            self.mmu.frames_dirty_masked(base, mask);
        }
        self.ledger.settle(self.mmu);
    }

    fn clear_in(&mut self, root: u32, base: u64, mask: u64) -> u64 {
        let (mmu, task, as_id) = (self.mmu, self.task, self.as_id);
        let format = mmu.format();
        let bit = mmu.log_bit(root, self.wrprot);
        let set_path = mmu.profile().clear_dirty_write == ClearDirty::SetPath;
        // With hardware A/D nothing follows from a lost W: Dirty stays where it is.
        let only_w = matches!(bit, LogBit::Root(mask) if mask == format.write)
            || matches!(bit, LogBit::Entry { wrprot: true });
        let silent = mmu.observer().is_none() && only_w && format.ad_bits;
        let (mut left, mut changed, mut reads) = (mask, 0, 0);
        while left != 0 {
            // The pages of one table.
            let first = base + u64::from(left.trailing_zeros());
            let until = ((first >> 9) + 1) << 9;
            let here = if until - base < 64 { left & ((1 << (until - base)) - 1) } else { left };
            left &= !here;
            let Some(table) = self.leaves(root, first) else { continue };
            let cells = mmu.pool().entries(table);
            let mut here = here;
            while here != 0 {
                let gfn = base + u64::from(here.trailing_zeros());
                here &= here - 1;
                let cell = &cells[index(gfn, 1)];
                let old = Spte(P::load(cell, Site::SpteRead));
                reads += 1;
                let mask = if old.is_present() { mmu.log_mask(bit, old) } else { 0 };
                if old.raw() & mask == 0 {
                    continue;
                }
                changed += 1;
                let new = Spte(old.raw() & !mask);
                let at = At { as_id, root, gfn, level: 1 };
                if set_path {
                    let was = change::exchange::<P>(mmu, cell, old, new, 1);
                    if !silent {
                        change::changed::<P, Exclusive>(mmu, task, &mut self.ledger, at, was, new);
                    }
                    continue;
                }
                if !format.is_volatile(old) {
                    P::store(cell, new.raw(), Site::SpteProtect);
                    change::tell::<P, Exclusive>(mmu, task, at, old, new);
                } else if mmu.observer().is_some() {
                    let was = P::fetch_and(cell, !mask, Site::SpteProtect);
                    change::tell::<P, Exclusive>(mmu, task, at, Spte(was), Spte(was & !mask));
                } else {
                    // Unused, the old value costs nothing: a plain locked AND.
                    let _ = P::fetch_and(cell, !mask, Site::SpteProtect);
                }
                if mmu.writes_back() {
                    self.frame_dirty(old.pfn());
                }
            }
        }
        task.count(reads, changed);
        changed
    }
}

impl<P: Platform> Drop for Harvest<'_, '_, P> {
    fn drop(&mut self) {
        // Before the caller can release the lock: it is borrowed.
        self.settle();
    }
}
