//! What a walk has done and not yet booked: leaf counts, write-backs, dead tables.
//!
//! **Guarantee.** Whenever mmu_lock is released (yield or end), everything done under it is booked: page statistics are exact, every
//! Dirty and Accessed bit of a removed leaf has reached the host (rule A5), every unlinked table was handed to RCU once.
//!
//! **Mechanism.** Booking per entry would cost more than the entry (`docs/performance.md`), so deltas gather here, in registers and on
//! the stack, and [`Ledger::settle`] pays them at the latest before the unlock. Frames gather as runs: guests are backed by
//! contiguous memory more often than not, and a run costs one atomic OR per 64 pages where a page would cost one each.

use tdpmmu_platform::{Bug, Event, Platform, RcuDomain, Site};
use tdpmmu_spte::Spte;
use tdpmmu_table::DeadChain;

use crate::TdpMmu;

#[derive(Clone, Copy, Default)]
struct Run {
    pfn: u64,
    count: u64,
}

/// Runs longer than this are passed on at once, so that settling stays a bounded step.
const LONGEST_RUN: u64 = 4096;

impl Run {
    /// Adds frames; returns a finished run when the new ones do not continue it.
    #[inline]
    fn add(&mut self, pfn: u64, count: u64) -> Option<Run> {
        if self.count != 0 && self.pfn + self.count == pfn && self.count < LONGEST_RUN {
            self.count += count;
            return None;
        }
        let done = *self;
        *self = Run { pfn, count };
        (done.count != 0).then_some(done)
    }

    fn dirty<P: Platform>(self, mmu: &TdpMmu<P>) {
        mmu.tell_somebody(|| Event::WriteBack { pfn: self.pfn, count: self.count, dirty: true });
        mmu.host().frames_dirty(self.pfn, self.count);
    }

    fn accessed<P: Platform>(self, mmu: &TdpMmu<P>) {
        mmu.tell_somebody(|| Event::WriteBack { pfn: self.pfn, count: self.count, dirty: false });
        mmu.host().frames_accessed(self.pfn, self.count);
    }

    fn take(&mut self) -> Option<Run> {
        let done = std::mem::take(self);
        (done.count != 0).then_some(done)
    }
}

impl<P: Platform> TdpMmu<P> {
    /// Write-back of Dirty for the frames `pfn + n` of each bit n of `mask`.
    pub(crate) fn frames_dirty_masked(&self, pfn: u64, mask: u64) {
        if self.observer().is_some() {
            for n in (0..64).filter(|n| mask >> n & 1 != 0) {
                self.tell_somebody(|| Event::WriteBack { pfn: pfn + n, count: 1, dirty: true });
            }
        }
        self.host().frames_dirty_masked(pfn, mask);
    }
}

/// Pending bookkeeping of one walk. Settled before any unlock; a drop bomb in debug builds.
#[derive(Default)]
pub(crate) struct Ledger {
    leaves: [i64; 4],
    dirty: Run,
    accessed: Run,
    dead: DeadChain,
    /// The entry whose table will be emptied next: a hint for the memory system.
    pub(crate) upcoming: Option<Spte>,
}

impl Ledger {
    /// `count` leaves more (or fewer) at `level`.
    #[inline]
    pub(crate) fn leaf(&mut self, level: u8, count: i64) {
        self.leaves[level as usize] += count;
    }

    /// Leaves that mapped `[pfn, pfn + count)` are gone; their state belongs to the host pages.
    #[inline]
    pub(crate) fn write_back<P: Platform>(
        &mut self,
        mmu: &TdpMmu<P>,
        pfn: u64,
        count: u64,
        dirty: bool,
        accessed: bool,
    ) {
        if dirty && let Some(run) = self.dirty.add(pfn, count) {
            run.dirty(mmu);
        }
        if accessed && let Some(run) = self.accessed.add(pfn, count) {
            run.accessed(mmu);
        }
    }

    /// `table` is unlinked and empty: it goes to RCU with the next settlement.
    #[inline]
    pub(crate) fn bury<P: Platform>(&mut self, mmu: &TdpMmu<P>, table: u32) {
        self.dead.push(mmu.pool(), table);
    }

    /// Books everything. Before any unlock of mmu_lock, inside the RCU section.
    pub(crate) fn settle<P: Platform>(&mut self, mmu: &TdpMmu<P>) {
        for (level, delta) in self.leaves.iter_mut().enumerate() {
            if *delta != 0 {
                mmu.add_leaves(level as u8, std::mem::take(delta));
            }
        }
        if let Some(run) = self.dirty.take() {
            run.dirty(mmu);
        }
        if let Some(run) = self.accessed.take() {
            run.accessed(mmu);
        }
        if let Some((head, tail, count)) = self.dead.take(mmu.pool()) {
            mmu.tables_unlinked(u64::from(count));
            if P::bug(Bug::C04) || P::bug(Bug::C06) {
                tdpmmu_platform::Reclaim::reclaim(mmu.pool(), head);
            }
            if P::bug(Bug::C04) {
                return;
            }
            P::point(Site::RcuDefer);
            mmu.rcu().defer(head, tail, count);
        }
    }

    /// Nothing is pending.
    pub(crate) fn is_settled(&self) -> bool {
        self.leaves.iter().all(|&d| d == 0)
            && self.dirty.count == 0
            && self.accessed.count == 0
            && self.dead.is_empty()
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        debug_assert!(
            self.is_settled() || std::thread::panicking(),
            "a walk ended without booking what it did"
        );
    }
}
