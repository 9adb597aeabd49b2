//! A walk: the iterator with everything that must be held or paid around it.
//!
//! **Guarantee.** While an [`Entry`] exists, mmu_lock is held in the walk's mode and an RCU section is open, so the table it lies in can be neither
//! freed nor recycled. Yielding consumes the entry: no snapshot survives it. Before the lock is released the walk has paid its flush debt
//! *and then* left the RCU section (rules F1, F2; Linux 5.18 swapped exactly these two), and its ledger is settled.
//!
//! **Mechanism.** [`Walk`] owns the RCU guard and borrows the lock guard; [`Walk::next_entry`] lends one entry at a time. The lock mode
//! is a type: shared entries change by compare-exchange against the snapshot, exclusive ones by exchange where
//! hardware may still write (volatile leaves), else by a plain store.

use std::ops::Range;

use tdpmmu_platform::{Bug, Guard, Mode, Platform, RcuGuard, Shared, Site, Task, YieldPoint};
use tdpmmu_spte::geometry::{round_down, span};
use tdpmmu_spte::{AtomicZapOrder, Spte};

use crate::debt::FlushDebt;
use crate::iter::TdpIter;
use crate::ledger::Ledger;
use crate::{TdpMmu, change};

/// A compare-exchange was lost; the entry's snapshot is refreshed and every precondition must be tested again.
#[derive(Debug, PartialEq, Eq)]
pub struct Lost;

/// May this walk give up the lock in the middle?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Yield {
    /// At every check that asks for it.
    Allowed,
    /// Never: the caller could not cope (an unreachable root, a notifier that must not block).
    Never,
}

/// A walk over `[start, end)` of one root. See the module text.
pub struct Walk<'w, 'a, P: Platform, M: Mode> {
    pub(crate) mmu: &'w TdpMmu<P>,
    guard: &'w mut Guard<'a, P, M>,
    pub(crate) task: &'a Task<P>,
    rcu: Option<RcuGuard<'a, P>>,
    pub(crate) iter: TdpIter,
    pub(crate) as_id: u8,
    pub(crate) end: u64,
    yields: Yield,
    started: bool,
    pub(crate) debt: FlushDebt,
    pub(crate) ledger: Ledger,
}

impl<'w, 'a, P: Platform, M: Mode> Walk<'w, 'a, P, M> {
    /// Starts at `range.start` of `root`. The root must be referenced or the lock exclusive.
    pub fn new(
        mmu: &'w TdpMmu<P>,
        guard: &'w mut Guard<'a, P, M>,
        root: u32,
        min_level: u8,
        range: Range<u64>,
        yields: Yield,
    ) -> Self {
        let task = guard.task();
        let rcu = Some(task.rcu_read());
        let end = range.end.min(mmu.max_gfn());
        let iter = TdpIter::start::<P>(mmu.pool(), root, mmu.root_level(), min_level, range.start);
        let as_id = mmu.as_id(root);
        Self {
            mmu,
            guard,
            task,
            rcu,
            iter,
            as_id,
            end,
            yields,
            started: false,
            debt: FlushDebt::none(),
            ledger: Ledger::default(),
        }
    }

    /// Takes over a debt of an earlier walk under the same lock hold (bug-history 1: 5.10-5.11 lost it on a yield).
    pub fn inherit(&mut self, debt: FlushDebt) {
        self.debt.merge(debt);
    }

    /// The current task.
    pub fn task(&self) -> &'a Task<P> {
        self.task
    }

    /// Lends the next entry of the range, or ends the walk.
    pub fn next_entry(&mut self) -> Option<Entry<'_, 'w, 'a, P, M>> {
        if self.started {
            self.iter.advance::<P>(self.mmu.pool());
            self.task.count(1, 0);
        }
        self.started = true;
        (self.iter.valid() && self.iter.gfn() < self.end).then_some(Entry { walk: self })
    }

    /// A reschedule check; yields when it asks for it and the walk has moved since the last one. True: yielded.
    fn check_yield(&mut self) -> bool {
        // A walk that may not yield does not check either: a step ends at a check, and this one has none.
        if self.yields == Yield::Never {
            return false;
        }
        // 5.10 looked only after it had changed something.
        if P::bug(Bug::B04a) && self.ledger.is_settled() {
            return false;
        }
        if !P::BULK && !P::check_at(&self.mmu.pool().entries(self.iter.table())[self.iter.index() as usize]) {
            self.task.check_passed();
            return false;
        }
        let iter = &self.iter;
        // 5.10 did not remember where it had yielded last.
        let moved = iter.may_yield() || P::bug(Bug::B04b);
        let at = || moved.then(|| YieldPoint { root: iter.root(), gfn: iter.gfn(), level: iter.level() });
        if !self.task.should_yield_at(&self.mmu.lock, at) || !moved {
            return false;
        }
        self.ledger.settle(self.mmu);
        if P::bug(Bug::B07) {
            // 5.12-5.17: then the flush may come after the grace period.
            drop(self.rcu.take());
        }
        self.mmu.pay(self.task, &mut self.debt);
        let callers = self.tell_debt();
        drop(self.rcu.take());
        self.guard.relock();
        self.guard.set_debt(callers);
        self.rcu = Some(self.task.rcu_read());
        self.iter.mark_yielded();
        if P::bug(Bug::B05) {
            // 5.10-5.15: the loop then steps on from there.
            self.iter.restart::<P>(self.mmu.pool());
        }
        true
    }

    /// The lock is about to be given up: the release tells whether a flush is still owed, by this walk or by who called it (F1). Returns
    /// the caller's part.
    fn tell_debt(&self) -> bool {
        let callers = self.guard.debt();
        self.guard.set_debt(callers || self.debt.is_owed());
        callers
    }

    /// Ends the walk: books what was done and returns the flush that is still owed.
    pub fn finish(mut self) -> FlushDebt {
        self.ledger.settle(self.mmu);
        std::mem::take(&mut self.debt)
    }

    /// Ends the walk and pays its debt inside the RCU section, as freed tables demand.
    pub fn finish_and_flush(mut self) {
        self.ledger.settle(self.mmu);
        self.mmu.pay(self.task, &mut self.debt);
    }
}

/// One entry of a walk: a place and a snapshot of its value.
pub struct Entry<'e, 'w, 'a, P: Platform, M: Mode> {
    pub(crate) walk: &'e mut Walk<'w, 'a, P, M>,
}

impl<P: Platform, M: Mode> Entry<'_, '_, '_, P, M> {
    /// The snapshot.
    pub fn old(&self) -> Spte {
        self.walk.iter.old()
    }

    /// First gfn of the entry.
    pub fn gfn(&self) -> u64 {
        self.walk.iter.gfn()
    }

    /// Level of the entry.
    pub fn level(&self) -> u8 {
        self.walk.iter.level()
    }

    /// The table that holds the entry.
    pub fn table(&self) -> u32 {
        self.walk.iter.table()
    }

    /// The index in that table.
    pub fn index(&self) -> u16 {
        self.walk.iter.index()
    }

    /// A reschedule check. `None`: the walk has yielded and this entry is void; go on with [`Walk::next_entry`].
    #[must_use = "after a yield the entry must not be used"]
    pub fn or_yield(self) -> Option<Self> {
        if self.walk.check_yield() { None } else { Some(self) }
    }

    /// Gives up lock and RCU section for `body`, which may sleep. The entry is void afterwards and the walk goes on with it.
    pub(crate) fn unlocked_for<R>(self, body: impl FnOnce(&Task<P>) -> R) -> R {
        let walk = self.walk;
        walk.ledger.settle(walk.mmu);
        walk.mmu.pay(walk.task, &mut walk.debt);
        let callers = walk.tell_debt();
        drop(walk.rcu.take());
        let done = walk.guard.unlocked_for(body);
        walk.guard.set_debt(callers);
        walk.rcu = Some(walk.task.rcu_read());
        walk.iter.mark_yielded();
        done
    }

    /// A flush of this entry's span is owed.
    pub fn owe_flush(&mut self) {
        let (gfn, level) = (self.gfn(), self.level());
        self.walk.debt.owe(gfn..gfn + span(level));
    }

    /// Changes the entry from its snapshot to `new` and does everything that follows from it.
    ///
    /// # Errors
    /// [`Lost`] in shared mode when the entry changed meanwhile; the snapshot is refreshed, nothing else happened.
    #[inline]
    pub fn set(&mut self, new: Spte) -> Result<(), Lost> {
        self.set_as(new, Site::SpteZap)
    }

    /// As [`Entry::set`], at a schedule site of its own.
    ///
    /// # Errors
    /// [`Lost`] as for [`Entry::set`].
    #[inline]
    pub(crate) fn set_as(&mut self, new: Spte, site: Site) -> Result<(), Lost> {
        let Walk { mmu, iter, ledger, task, as_id, .. } = &mut *self.walk;
        let (level, gfn, table) = (iter.level(), iter.gfn(), iter.table());
        let cell = &mmu.pool().entries(table)[iter.index() as usize];
        let old = iter.old();
        debug_assert!(
            !mmu.format().is_frozen(old),
            "only the owner of a frozen entry may change it (rule R1)"
        );
        let was = if M::SHARED {
            match P::cmpxchg(cell, old.raw(), new.raw(), site) {
                Ok(_) => old,
                Err(seen) => {
                    task.count(1, 0);
                    task.meter().count_retries(1);
                    iter.refresh(Spte(seen));
                    return Err(Lost);
                }
            }
        } else {
            change::exchange::<P>(mmu, cell, old, new, level)
        };
        task.count(0, 1);
        let at = change::At { as_id: *as_id, root: iter.root(), gfn, level };
        change::changed::<P, M>(mmu, task, ledger, at, was, new);
        iter.refresh(new);
        Ok(())
    }

    /// Removes every present entry from here to the end of this level-1 table, at most `mmu.batch` of them: the hot path of
    /// the 4 KiB pass. The iterator moves to the last one handled.
    pub(crate) fn zap_leaves(&mut self) -> u64 {
        let Walk { mmu, iter, ledger, task, as_id, end, .. } = &mut *self.walk;
        let from = iter.index();
        let base = round_down(iter.gfn(), 2);
        let until = (*end - base).min(512) as u16;
        let to = until.min(from.saturating_add(mmu.batch()));
        let at = change::At { as_id: *as_id, root: iter.root(), gfn: iter.gfn(), level: 1 };
        let zapped = change::zap_leaf_batch::<P, M>(mmu, task, ledger, iter.table(), at, from..to);
        iter.handled_until(to);
        zapped
    }
}

impl<P: Platform> Entry<'_, '_, '_, P, Shared> {
    /// Freeze, flush, empty: nobody installs here while an old translation may be cached (rule F4; up to 6.12). What follows from the change is done
    /// before the flush or after all of it (`atomic-zap`); of the two other steps nobody is told.
    ///
    /// # Errors
    /// [`Lost`] when the entry changed meanwhile; the snapshot is refreshed, nothing else happened.
    pub(crate) fn zap_atomically(&mut self) -> Result<(), Lost> {
        let Walk { mmu, iter, ledger, task, as_id, .. } = &mut *self.walk;
        let (level, gfn, old) = (iter.level(), iter.gfn(), iter.old());
        let (frozen, empty) = (mmu.format().frozen(), mmu.format().empty());
        let cell = &mmu.pool().entries(iter.table())[iter.index() as usize];
        debug_assert!(!mmu.format().is_frozen(old), "a frozen entry is its owner's (rule R1)");
        if let Err(seen) = P::cmpxchg(cell, old.raw(), frozen.raw(), Site::SpteFreeze) {
            task.count(1, 0);
            task.meter().count_retries(1);
            iter.refresh(Spte(seen));
            return Err(Lost);
        }
        let at = change::At { as_id: *as_id, root: iter.root(), gfn, level };
        let order = mmu.profile().atomic_zap_order;
        if order == AtomicZapOrder::BookkeepingBeforeFlush {
            change::changed::<P, Shared>(mmu, task, ledger, at, old, frozen);
        } else {
            change::tell_frozen(mmu, task, at, old);
        }
        mmu.flush(task, Some(gfn..gfn + span(level)));
        P::store(cell, empty.raw(), Site::SpteZap);
        task.count(0, 2);
        if order == AtomicZapOrder::AfterFlush {
            change::changed::<P, Shared>(mmu, task, ledger, at, old, empty);
        }
        iter.refresh(empty);
        Ok(())
    }
}
