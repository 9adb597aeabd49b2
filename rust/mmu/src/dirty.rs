//! Clearing dirty state: the bit that goes, slot-wide and by mask.
//!
//! **Guarantee.** What [`TdpMmu::clear_dirty`] and [`TdpMmu::clear_dirty_masked`] take from an entry is what the next write puts back in sight: Dirty, which hardware sets
//! again (and PML logs), or W, whose lack faults. A write through a stale translation is seen by the flush that the caller owes. Nothing is unmapped; a
//! Dirty that goes has reached the host page first (kernels up to 6.12).
//!
//! **Mechanism.** D needs hardware A/D on the entry. Without it, or where an L2's entries are not what PML logs, W goes in its place: each entry's A/D mode
//! tells (up to 6.8), or the root's role, for all under it (6.9 on: 2673dfb591a3, CVE-2024-26990; an entry that disagrees is a bug). The walk over a slot shares mmu_lock
//! and compare-exchanges, under valid roots. Harvesting by mask (`harvest.rs`) owns it, so that beside it only hardware and the fast page fault write:
//!
//! | | 6.1 (`set-path`) | 6.12 (`atomic-and`) |
//! | --- | --- | --- |
//! | new value | from the snapshot | the old one without the bit |
//! | write | exchange if volatile, else store | atomic AND if volatile, else store |
//! | bookkeeping | as of every change | the host page is dirty, whichever bit went |
//! | roots (`clear-dirty-roots`) | all | valid ones |
//!
//! A reschedule check stands at present leaves only (6.1 and 6.12 alike): an empty stretch has none.

use std::ops::Range;

use tdpmmu_platform::{Bug, Guard, Phase, Platform, Shared, Site, Task};
use tdpmmu_spte::geometry::round_down;
use tdpmmu_spte::{DirtyOrWrite, FormatKind, Role, RootSet, Spte};

use crate::TdpMmu;
use crate::change::{self, At};
use crate::ledger::Ledger;
use crate::root::Which;
use crate::walk::{Entry, Walk, Yield};

/// Which bit one round of dirty logging takes from an entry.
#[derive(Clone, Copy, Debug)]
pub(crate) enum LogBit {
    /// The same for everything under a root.
    Root(u64),
    /// By the entry's A/D mode; W in any case if `wrprot`.
    Entry { wrprot: bool },
}

/// Where a walk over a slot checks whether to give way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Checks {
    /// At each entry.
    Entries,
    /// At each present leaf.
    Leaves,
}

impl<P: Platform> TdpMmu<P> {
    /// Clears Dirty of every leaf in `gfns` of one address space under its valid roots, or takes W where Dirty would not come back by itself. Takes mmu_lock
    /// shared. Returns how many entries changed; a flush of the range is owed by the caller in any case (rule F6).
    pub fn clear_dirty(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>) -> u64 {
        let mut changed = 0;
        let mut guard = self.lock.read(task);
        self.for_each_root(&mut guard, Which::Valid, |guard, root| {
            if self.as_id(root) == as_id {
                let bit = self.log_bit(root, false);
                changed += self.clear_range(guard, root, 1, gfns.clone(), bit, Checks::Leaves);
            }
        });
        changed
    }

    /// The roots of one address space that an operation on single gfns visits (`clear-dirty-roots`), newest first. Under the exclusive lock, which is not
    /// given up meanwhile, and inside an RCU section: nobody needs a reference.
    pub(crate) fn roots_of_gfn(&self, as_id: u8) -> impl Iterator<Item = u32> + '_ {
        let all = self.profile().clear_dirty_roots == RootSet::All;
        self.listed_roots().filter(move |&root| self.as_id(root) == as_id && (all || !self.is_obsolete(root)))
    }

    /// The choice between D and W for the entries under `root`.
    pub(crate) fn log_bit(&self, root: u32, wrprot: bool) -> LogBit {
        let format = self.format();
        match self.profile().dirty_or_write {
            DirtyOrWrite::PerSpte => LogBit::Entry { wrprot },
            DirtyOrWrite::PerRoot if wrprot || self.logs_by_write(root) => LogBit::Root(format.write),
            DirtyOrWrite::PerRoot => LogBit::Root(format.dirty),
        }
    }

    /// Must dirty logging take W from everything under `root`: no hardware A/D, or an L2's tables where PML logs the L1's?
    fn logs_by_write(&self, root: u32) -> bool {
        let (format, layout) = (self.format(), self.profile().role_layout);
        let role = layout.unpack(Role(self.pool().meta(root).role()));
        // 5.10-6.8: D of an L2's entries too, though PML does not write those down.
        let logged_by_pml = !role.guest_mode || P::bug(Bug::B18);
        !format.ad_bits || role.ad_disabled || (format.kind == FormatKind::Ept && !logged_by_pml)
    }

    /// The mask of the bit that goes from `old`.
    #[inline]
    pub(crate) fn log_mask(&self, bit: LogBit, old: Spte) -> u64 {
        if !old.is_present() {
            self.violation("dirty logging asked which bit to take from an entry that is not present");
        }
        match bit {
            LogBit::Entry { wrprot } => self.format().dirty_log_bit(old, wrprot),
            LogBit::Root(mask) => {
                // The test came with the fix of the bug.
                if mask != self.format().write && self.format().needs_write_protect(old) && !P::bug(Bug::B18)
                {
                    self.violation("Dirty was to be cleared on a leaf that dirty logging must write-protect");
                }
                mask
            }
        }
    }

    /// Takes `bit` from every leaf of level `min_level` and above in `gfns` under one root. Returns how many had it.
    pub(crate) fn clear_range(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        root: u32,
        min_level: u8,
        gfns: Range<u64>,
        bit: LogBit,
        checks: Checks,
    ) -> u64 {
        let _work = guard.task().phase(Phase::SpteWork);
        let batched = self.batch() > 1;
        let mut changed = 0;
        let mut walk = Walk::new(self, guard, root, min_level, gfns, Yield::Allowed);
        'next: while let Some(mut entry) = walk.next_entry() {
            let mut lost = false;
            // Who loses the entry to somebody else looks at it again, and checks again.
            loop {
                let block = batched && entry.level() == 1;
                let leaf = entry.old().is_leaf(entry.level()) || lost && taken_for_leaf::<P>(entry.old());
                if checks == Checks::Leaves && !leaf && !block {
                    continue 'next;
                }
                let Some(here) = entry.or_yield() else { continue 'next };
                entry = here;
                if block {
                    changed += entry.clear_leaves(bit);
                    continue 'next;
                }
                let old = entry.old();
                let mask = if leaf { self.log_mask(bit, old) } else { 0 };
                if old.raw() & mask == 0 {
                    continue 'next;
                }
                if entry.set_as(Spte(old.raw() & !mask), Site::SpteProtect).is_ok() {
                    changed += 1;
                    continue 'next;
                }
                lost = true;
            }
        }
        walk.finish_and_flush();
        changed
    }
}

/// After a lost race nothing is taken for a leaf that is none. Up to 5.17 not even presence was asked again, up to 6.7 not the kind.
fn taken_for_leaf<P: Platform>(seen: Spte) -> bool {
    P::bug(Bug::B15) || P::bug(Bug::B16) && seen.is_present()
}

impl<P: Platform> Entry<'_, '_, '_, P, Shared> {
    /// Takes `bit` from every leaf from here to the end of this level-1 table, at most `mmu.batch` entries. The iterator moves to the last
    /// one handled. Returns how many had it.
    fn clear_leaves(&mut self, bit: LogBit) -> u64 {
        let Walk { mmu, iter, ledger, task, as_id, end, .. } = &mut *self.walk;
        let from = iter.index();
        let until = (*end - round_down(iter.gfn(), 2)).min(512) as u16;
        let to = until.min(from.saturating_add(mmu.batch()));
        let at = At { as_id: *as_id, root: iter.root(), gfn: iter.gfn(), level: 1 };
        let changed = clear_leaf_batch(mmu, task, ledger, iter.table(), at, from..to, bit);
        iter.handled_until(to);
        changed
    }
}

/// Takes `bit` from the leaves `range` of the live level-1 table `table`. MMU-writable stays, so that the fast page fault may give W back.
fn clear_leaf_batch<P: Platform>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    ledger: &mut Ledger,
    table: u32,
    at: At,
    range: Range<u16>,
    bit: LogBit,
) -> u64 {
    let format = mmu.format();
    let cells = &mmu.pool().entries(table)[range.start as usize..range.end as usize];
    // With hardware A/D nothing follows from a lost W: Dirty stays where it is.
    let only_w = matches!(bit, LogBit::Root(mask) if mask == format.write) && format.ad_bits;
    let silent = mmu.observer().is_none() && (only_w || !mmu.writes_back());
    // From a lost Dirty nothing follows but the host page's: a run of frames, kept at hand, as bookkeeping between two locked instructions costs what they do.
    let only_d = matches!(bit, LogBit::Root(mask) if mask == format.dirty) && mmu.observer().is_none();
    let (mut frame, mut frames) = (0, 0);
    let mut writes = 0;
    for (gfn, cell) in (at.gfn..).zip(cells) {
        let mut old = Spte(P::load(cell, Site::SpteRead));
        while old.is_present() {
            let mask = mmu.log_mask(bit, old);
            if old.raw() & mask == 0 {
                break;
            }
            let new = Spte(old.raw() & !mask);
            match P::cmpxchg(cell, old.raw(), new.raw(), Site::SpteProtect) {
                Ok(_) => {
                    writes += 1;
                    if silent {
                    } else if only_d {
                        if old.pfn() != frame + frames {
                            ledger.write_back(mmu, frame, frames, frames != 0, false);
                            (frame, frames) = (old.pfn(), 0);
                        }
                        frames += 1;
                    } else {
                        change::changed::<P, Shared>(mmu, task, ledger, At { gfn, ..at }, old, new);
                    }
                    break;
                }
                // Zapped, re-made, or marked by hardware: all is to be tested again.
                Err(seen) => {
                    task.meter().count_retries(1);
                    old = Spte(seen);
                }
            }
        }
    }
    ledger.write_back(mmu, frame, frames, frames != 0, false);
    task.count(cells.len() as u64, writes);
    writes
}
