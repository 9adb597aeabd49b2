//! mmu_lock: the raw lock with modes as types, measurement and yields.
//!
//! **Guarantee.** A [`Guard`] is the proof that the lock is held in its mode. [`Guard::relock`] is
//! `cond_resched_rwlock_{read,write}` of the kernel: release, give way, retake in the same mode; whoever waited has had
//! the lock in between. What the caller knew about the tables before it is void, and a flush that it owes must
//! have been paid: see `debt`.

use std::{cell::Cell, fmt, marker::PhantomData};

use crate::{
    api::{Exclusive, Mode, Platform, RawRwLock, Shared},
    bug::Bug,
    meter::{Phase, add},
    observer::Event,
    site::Site,
    task::Task,
};

/// The lock of an MMU's page tables.
pub struct MmuLock<P: Platform> {
    raw: P::RwLock,
}

impl<P: Platform> Default for MmuLock<P> {
    fn default() -> Self {
        Self::new()
    }
}

impl<P: Platform> fmt::Debug for MmuLock<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MmuLock").field("contended", &self.is_contended()).finish_non_exhaustive()
    }
}

impl<P: Platform> MmuLock<P> {
    /// An unlocked lock.
    pub fn new() -> Self {
        MmuLock { raw: P::RwLock::new() }
    }

    /// Takes the lock shared.
    #[inline]
    pub fn read<'a>(&'a self, task: &'a Task<P>) -> Guard<'a, P, Shared> {
        self.acquire(task)
    }

    /// Takes the lock exclusively.
    #[inline]
    pub fn write<'a>(&'a self, task: &'a Task<P>) -> Guard<'a, P, Exclusive> {
        self.acquire(task)
    }

    /// Somebody waits for the lock.
    #[inline(always)]
    pub fn is_contended(&self) -> bool {
        self.raw.is_contended()
    }

    #[inline]
    fn acquire<'a, M: Mode>(&'a self, task: &'a Task<P>) -> Guard<'a, P, M> {
        let mut guard = Guard::unlocked(self, task);
        guard.lock(Phase::LockWait);
        guard
    }
}

/// A hold of mmu_lock in mode `M`. Drop unlocks and records the hold.
#[must_use = "the lock is released when the guard is dropped"]
pub struct Guard<'a, P: Platform, M: Mode> {
    lock: &'a MmuLock<P>,
    task: &'a Task<P>,
    /// When the hold began, in ticks; of a shared hold only while measuring.
    since: u64,
    /// The raw lock is held: false before it was taken, and while it is given up. A panic in between must not unlock it.
    held: bool,
    debt: Cell<bool>,
    _mode: PhantomData<M>,
}

impl<'a, P: Platform, M: Mode> Guard<'a, P, M> {
    fn unlocked(lock: &'a MmuLock<P>, task: &'a Task<P>) -> Self {
        Guard { lock, task, since: 0, held: false, debt: Cell::new(false), _mode: PhantomData }
    }

    /// The holder.
    #[inline(always)]
    pub fn task(&self) -> &'a Task<P> {
        self.task
    }

    /// The lock held.
    #[inline(always)]
    pub fn mmu_lock(&self) -> &'a MmuLock<P> {
        self.lock
    }

    /// Somebody waits for the lock.
    #[inline(always)]
    pub fn is_contended(&self) -> bool {
        self.lock.is_contended()
    }

    /// Whether to yield here: [`Task::should_yield`] for this lock.
    #[inline]
    pub fn should_yield(&self) -> bool {
        self.task.should_yield(self.lock)
    }

    /// Notes that a flush is owed, or no longer; reported with the release.
    #[inline(always)]
    pub fn set_debt(&self, owed: bool) {
        self.debt.set(owed);
    }

    /// A flush is owed.
    #[inline(always)]
    pub fn debt(&self) -> bool {
        self.debt.get()
    }

    /// This hold, mistaken for an exclusive one: bug 25 of the museum, which called what needs the exclusive mode in shared mode. `None` without the bug. It is not to be given up ([`Guard::relock`]).
    pub fn taken_for_exclusive(&self) -> Option<Guard<'a, P, Exclusive>> {
        (M::SHARED && P::bug(Bug::B25)).then(|| Guard::unlocked(self.lock, self.task))
    }

    /// Gives the lock away and takes it back in the same mode. The CPU is given away too if the task needs to be
    /// rescheduled. Whoever was queued at the release has had the lock before this returns.
    pub fn relock(&mut self) {
        debug_assert!(!self.task.in_rcu(), "{} drops mmu_lock inside an RCU read section", self.task.name());
        let _yielding = self.task.phase(Phase::Yield);
        let meter = self.task.meter();
        add(&meter.yields, 1);
        if self.is_contended() {
            add(&meter.handoffs, 1);
        }
        self.unlock();
        let task = self.task;
        let _relock = Relock(self, Phase::Yield);
        task.unlocked();
        if task.need_resched() {
            task.give_cpu_away();
        } else {
            P::relax(Site::LockYield);
        }
    }

    /// Releases the lock for `body`, which may sleep, and takes it back in the same mode: an allocation in the middle of a walk. What the
    /// caller knew about the tables is void afterwards. A panic of `body` goes on with the lock held, as the guard says that it is.
    pub fn unlocked_for<R>(&mut self, body: impl FnOnce(&Task<P>) -> R) -> R {
        debug_assert!(!self.task.in_rcu(), "{} drops mmu_lock inside an RCU read section", self.task.name());
        let task = self.task;
        self.unlock();
        let _relock = Relock(self, Phase::LockWait);
        let done = body(task);
        task.unlocked();
        done
    }

    #[inline]
    fn lock(&mut self, waiting: Phase) {
        P::point(Site::LockAcquire);
        let task = self.task;
        let asked = if task.measures() { P::ticks() } else { 0 };
        let mut scope = None;
        let wait = || {
            add(&task.meter().contended, 1);
            scope = Some(task.phase(waiting));
        };
        if M::SHARED {
            self.lock.raw.lock_shared_or(wait);
        } else {
            self.lock.raw.lock_exclusive_or(wait);
        }
        self.held = true;
        let waited = scope.is_some();
        drop(scope);
        if self.timed() {
            self.since = P::ticks();
        }
        if task.measures() {
            self.note_wait(if waited { self.since.saturating_sub(asked) } else { 0 });
        }
        self.taken();
    }

    /// Exclusive holds are few and always timed; shared ones are every fault's.
    #[inline(always)]
    fn timed(&self) -> bool {
        !M::SHARED || self.task.is_timed()
    }

    #[cold]
    fn note_wait(&self, waited: u64) {
        let ns = P::ticks_to_ns(waited);
        self.task
            .meter()
            .histograms(|h| if M::SHARED { h.reader_wait.record(ns) } else { h.writer_wait.record(ns) });
    }

    #[inline(always)]
    fn taken(&self) {
        add(&self.task.meter().acquisitions, 1);
        self.task.lock_taken();
        self.task.observe(|| Event::Lock { shared: M::SHARED });
    }

    #[inline]
    fn unlock(&mut self) {
        self.held = false;
        self.task.observe(|| Event::Unlock { shared: M::SHARED, debt: self.debt.get() });
        self.task.lock_dropped();
        let until = if self.timed() { P::ticks().max(self.since) } else { 0 };
        if M::SHARED {
            self.lock.raw.unlock_shared();
        } else {
            self.lock.raw.unlock_exclusive();
        }
        if !M::SHARED {
            self.task.meter().note_exclusive_hold(until - self.since);
        }
        if self.task.is_timed() {
            self.note_hold(until);
        }
        P::point(Site::LockRelease);
    }

    /// After the release: the histogram is not paid for by those who wait.
    #[cold]
    fn note_hold(&self, until: u64) {
        let meter = self.task.meter();
        meter.record(|recording| recording.hold(M::SHARED, self.since, until));
        let ns = P::ticks_to_ns(until - self.since);
        meter.histograms(|h| if M::SHARED { h.read_hold.record(ns) } else { h.write_hold.record(ns) });
    }
}

/// Takes the lock of a guard back, also when unwinding: the guard's own drop unlocks it. The wait is booked to the phase.
struct Relock<'g, 'a, P: Platform, M: Mode>(&'g mut Guard<'a, P, M>, Phase);

impl<P: Platform, M: Mode> Drop for Relock<'_, '_, P, M> {
    fn drop(&mut self) {
        self.0.lock(self.1);
    }
}

impl<P: Platform, M: Mode> fmt::Debug for Guard<'_, P, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Guard")
            .field("shared", &M::SHARED)
            .field("task", &self.task.id())
            .finish_non_exhaustive()
    }
}

impl<P: Platform, M: Mode> Drop for Guard<'_, P, M> {
    #[inline]
    fn drop(&mut self) {
        if self.held {
            self.unlock();
        }
    }
}
