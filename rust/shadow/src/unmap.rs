//! Unmapping by reverse maps: what a notifier takes back, wherever it is mapped.
//!
//! **Guarantee.** When [`ShadowMmu::unmap`] returns no leaf maps a gfn of the range, in any page, obsolete or not. What it says is owed must be flushed before the host takes the pages; what it zapped before it gave the lock up was flushed then.
//!
//! **Mechanism.** Level by level, gfn by gfn, as KVM walks a slot's reverse maps. The books are looked up again after each yield: the slots may be others.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_platform::{Exclusive, Guard, Phase, Platform};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{LEVEL_1G, LEVEL_4K};

use crate::leaves::Lost;
use crate::{BookSet, ShadowMmu, SlotBooks};

/// Heads looked at between two reschedule checks. KVM checks at each; where a check is a clock read that is most of the cost of a head. On a platform whose schedule decides at checks it is at each.
pub(crate) const fn heads_per_check<P: Platform>() -> u64 {
    if P::BULK { 64 } else { 1 }
}

/// A place in a walk over reverse maps: it survives that the lock is given up.
pub(crate) struct RmapWalk {
    as_id: u8,
    gfns: Range<u64>,
    pub(crate) level: u8,
    max_level: u8,
    pub(crate) gfn: u64,
}

impl RmapWalk {
    pub(crate) fn new(as_id: u8, gfns: Range<u64>, min_level: u8) -> Self {
        Self { as_id, gfn: gfns.start, gfns, level: min_level.max(LEVEL_4K), max_level: LEVEL_1G }
    }

    /// The next heads at the walk's place, at most `limit`, with the first one's gfn and level; the walk stands behind them. A frame that begins before the range is visited with it.
    pub(crate) fn next<'b>(
        &mut self,
        books: &'b BookSet,
        limit: u64,
    ) -> Option<(&'b SlotBooks, u64, u8, &'b [std::sync::atomic::AtomicU64])> {
        while self.level <= self.max_level {
            let slot = books.at_or_after(self.as_id, self.gfn).filter(|slot| slot.base < self.gfns.end);
            if let Some(slot) = slot
                && self.gfn < self.gfns.end
            {
                let (level, first) = (self.level, self.gfn.max(slot.base));
                let frame = span(level);
                let end = self.gfns.end.min(slot.base + slot.pages);
                let count = ((end - 1) / frame - first / frame + 1).min(limit);
                // The frame after the last; a slot that begins in the middle of it has a head of its own there.
                self.gfn = ((first / frame + count) * frame).min(end);
                return Some((slot, first, level, slot.rmap_run(first, level, count).unwrap_or(&[])));
            }
            self.level += 1;
            self.gfn = self.gfns.start;
        }
        None
    }
}

impl<P: Platform> ShadowMmu<P> {
    /// Unmaps `gfns` of one address space. True: a flush is owed, by the caller.
    pub fn unmap(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfns: Range<u64>,
        may_yield: bool,
    ) -> bool {
        let owed = self.unmap_books(guard, as_id, gfns, may_yield, true);
        // From here on it is the caller's.
        guard.set_debt(false);
        owed
    }

    /// `owes`: what is zapped must be flushed before the lock is given up.
    pub(crate) fn unmap_books(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfns: Range<u64>,
        may_yield: bool,
        owes: bool,
    ) -> bool {
        let task = guard.task();
        let _work = task.phase(Phase::SpteWork);
        let mut books = self.books();
        let mut walk = RmapWalk::new(as_id, gfns, LEVEL_4K);
        let mut owed = guard.debt();
        while let Some((_, _, _, heads)) = walk.next(&books, heads_per_check::<P>()) {
            let mut lost = Lost::default();
            let mut dropped = 0;
            for head in heads.iter().filter(|head| head.load(Relaxed) != 0) {
                dropped += self.drop_rmap(guard, &mut lost, head);
            }
            lost.settle(self, task);
            task.count(dropped, 0);
            owed |= dropped != 0 && owes;
            guard.set_debt(owed);
            if may_yield && guard.should_yield() {
                if std::mem::take(&mut owed) {
                    self.flush(task);
                    guard.set_debt(false);
                }
                guard.relock();
                books = self.books();
            }
        }
        owed
    }
}
