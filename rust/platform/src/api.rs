//! The contract between the MMU and the ground it stands on.
//!
//! The MMU is written once over `P: Platform`. SPTE words are `std` `AtomicU64` on every platform and every access
//! goes through the platform with its site: on [`crate::Real`] that inlines to the plain atomic, on a simulated
//! platform it is a scheduling point and may go through a store buffer.

use std::{
    any::Any,
    io,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64},
    },
};

use crate::{
    bug::Bug,
    fault::Fault,
    rcu::{QuickSection, RcuConfig, RcuStats},
    site::Site,
    timeline::Timeline,
};

/// How often a thread was taken off its CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Switches {
    /// It slept or yielded.
    pub voluntary: u64,
    /// The scheduler preempted it.
    pub involuntary: u64,
}

/// The ground: words, time, sleep, threads, locks and RCU.
pub trait Platform: Sized + Send + Sync + 'static {
    /// The lock under mmu_lock.
    type RwLock: RawRwLock;
    /// The RCU domain.
    type Rcu: RcuDomain;
    /// `real` or the simulation's name.
    const NAME: &'static str;

    /// Acquire load.
    fn load(cell: &AtomicU64, site: Site) -> u64;
    /// Release store.
    fn store(cell: &AtomicU64, value: u64, site: Site);
    /// Exchange, a full barrier; returns the old value.
    fn swap(cell: &AtomicU64, value: u64, site: Site) -> u64;
    /// Compare and exchange, a full barrier; `Err` carries the value found.
    fn cmpxchg(cell: &AtomicU64, old: u64, new: u64, site: Site) -> Result<u64, u64>;
    /// Atomic AND, a full barrier; returns the old value.
    fn fetch_and(cell: &AtomicU64, value: u64, site: Site) -> u64;
    /// Atomic OR, a full barrier; returns the old value.
    fn fetch_or(cell: &AtomicU64, value: u64, site: Site) -> u64;
    /// Atomic add, a full barrier; returns the old value.
    fn fetch_add(cell: &AtomicU64, value: u64, site: Site) -> u64;
    /// Full barrier.
    fn fence(site: Site);
    /// The cheap side of an asymmetric barrier: orders like a full barrier against every [`Platform::heavy_fence`], and not at all against another light one.
    /// Costs no instruction where the host has `membarrier`; else it is a full barrier, and so it is by default.
    #[inline(always)]
    fn light_fence(site: Site) {
        Self::fence(site);
    }
    /// The dear side: a full barrier here, and one somewhere in what each other thread does between the call and the return.
    #[inline(always)]
    fn heavy_fence(site: Site) {
        Self::fence(site);
    }
    /// A schedule point; nothing on the real platform.
    fn point(site: Site);
    /// A schedule point before a locked instruction on a word that is no `AtomicU64` (a count, a flag, a list head): what this thread has stored before is visible
    /// to all when it returns. Nothing on the real platform, where the instruction itself sees to that.
    #[inline(always)]
    fn locked(site: Site) {
        Self::point(site);
    }
    /// Before a locked instruction that is no point of its own (an unlock): what this thread has stored before is visible to all when it returns.
    #[inline(always)]
    fn settle(_site: Site) {}
    /// Spin-wait hint.
    fn relax(site: Site);
    /// Gives the CPU away (sched_yield).
    fn yield_cpu(site: Site);
    /// The clock of measurements: invariant TSC where there is one.
    fn ticks() -> u64;
    /// Converts a difference of [`Platform::ticks`] to nanoseconds.
    fn ticks_to_ns(ticks: u64) -> u64;
    /// Converts nanoseconds to ticks.
    fn ns_to_ticks(ns: u64) -> u64;
    /// CPU time of the calling thread in nanoseconds.
    fn thread_cpu_ns() -> u64;
    /// Context switches of the calling thread so far.
    fn switches() -> Switches;
    /// Time the calling thread has waited runnable for a CPU, in nanoseconds, where the host tells.
    fn run_delay_ns() -> Option<u64>;
    /// Sleeps while `cell` is `expected`, at most `timeout_ns`; may return early.
    fn futex_wait(cell: &AtomicU32, expected: u32, timeout_ns: Option<u64>);
    /// Wakes up to `count` sleepers of `cell`; returns how many.
    fn futex_wake(cell: &AtomicU32, count: u32) -> u32;
    /// The calling thread serves others from now on: being woken, it does not take the CPU from whoever runs (a vCPU that
    /// queues work would else pay for the worker's first time slice). Nothing where the host has no such thing.
    fn background();
    /// The CPUs that the calling thread may run on, ascending; empty where the host does not say.
    fn cpus() -> Vec<usize> {
        Vec::new()
    }
    /// The CPUs that the process may run on, which are those of its first thread, ascending; empty where the host does not say.
    fn process_cpus() -> Vec<usize> {
        Vec::new()
    }
    /// Binds the calling thread to one CPU; nothing where the platform has none. Errors: what the host says.
    fn pin(_cpu: usize) -> io::Result<()> {
        Ok(())
    }
    /// Lets the calling thread run on all of [`Platform::process_cpus`], whatever thread it was started by and where that one is bound.
    /// Errors: what the host says.
    fn unpin() -> io::Result<()> {
        Ok(())
    }
    /// Is this defect of the museum switched on? `false` for all on a platform without a museum: what stands behind the question is compiled out.
    #[inline(always)]
    fn bug(_bug: Bug) -> bool {
        false
    }
    /// Does this fault strike here and now? `false` for all on a platform without fault injection: the question is compiled out.
    #[inline(always)]
    fn inject(fault: Fault, site: Site) -> bool {
        Self::inject_for(fault, site) != 0
    }
    /// As [`Platform::inject`], for faults that last: 0 is no, anything else says how long, in the fault's own unit.
    #[inline(always)]
    fn inject_for(_fault: Fault, _site: Site) -> u32 {
        0
    }
    /// Waiters look again for a while before they sleep. Where a schedule decides who runs, they sleep at once.
    const SPINS: bool = true;
    /// Bulk work may leave the platform: threads of a pool, non-temporal stores.
    const BULK: bool = true;
    /// Is a reschedule check of a walk that stands at this entry one to be looked at? False where nothing can differ by it: it counts as made, and nobody yields.
    #[inline(always)]
    fn check_at(_cell: &AtomicU64) -> bool {
        true
    }
    /// The schedule wants the calling task to give way at this reschedule check, whatever its slice and the lock say.
    #[inline(always)]
    fn asked_to_yield() -> bool {
        false
    }
    /// The id of a task that is being made, where ids must not depend on what else the process does.
    #[inline(always)]
    fn new_task_id() -> Option<u32> {
        None
    }
    /// The id of the task that the calling thread made last, where threads are the platform's own: who reports what has no task at hand.
    #[inline(always)]
    fn task_id() -> Option<u32> {
        None
    }
    /// What the calling thread serves: 0, or what it said last with [`Platform::set_serving`]. A queue knows its own workers by it.
    fn serving() -> usize;
    /// See [`Platform::serving`].
    fn set_serving(what: usize);
    /// The number of the simulated world that the caller is in; 0 in the real one.
    #[inline(always)]
    fn world() -> u64 {
        0
    }
    /// A rule was broken. A simulated run ends at its next point.
    #[inline(always)]
    fn violation(_rule: &'static str, _what: &str) {}
    /// The run is over and its tasks are being unwound: nothing is to be waited for any more, nothing finished.
    #[inline(always)]
    fn abandoned() -> bool {
        false
    }
    /// Gives names to the words of a region, for logs: `name` is told the offset in bytes. Ends with [`Platform::forget_words`].
    #[inline(always)]
    fn name_words(_base: *const u8, _bytes: usize, _name: Arc<dyn Fn(usize) -> String + Send + Sync>) {}
    /// The region that begins at `base` is about to be unmapped.
    #[inline(always)]
    fn forget_words(_base: *const u8) {}
    /// One turn of a wait for the clock to say `until`, by who would also be interrupted: a guest between two accesses. A spin-wait hint where time passes by itself.
    #[inline(always)]
    fn idle_until(_until: u64, site: Site) {
        Self::relax(site);
    }
    /// What sets up or checks is not part of what is measured: on a platform of virtual time none passes meanwhile, and nobody else goes on. No sleeping inside.
    #[inline(always)]
    fn quiet<R>(body: impl FnOnce() -> R) -> R {
        body()
    }
    /// Tables may be held by count: described, not stored, until they are changed. `false` where every table is a page: what stands behind the question is compiled out.
    const BY_COUNT: bool = false;
    /// The words of `bytes` bytes from `base` on may be held by count: accesses are answered by `words`, until [`Platform::forget_words`].
    #[inline(always)]
    fn by_count(_base: *const u8, _bytes: usize, _words: Arc<dyn HeldWords>) {}
    /// So many entries of a table held by count are handled in one event: the time passes that they would have taken one by one.
    #[inline(always)]
    fn charge_entries(_what: Bulk, _entries: u64) {}
    /// Starts a thread. Errors: what the host says, and a NUL in `name`.
    fn spawn(name: &str, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle>;
}

/// What is done to many entries in one event ([`Platform::charge_entries`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bulk {
    /// Loads.
    Read,
    /// Stores.
    Write,
    /// Exchanges.
    Swap,
    /// A load and a compare-exchange each.
    Cmpxchg,
}

/// Who knows the words of pages that are held by count ([`Platform::by_count`]).
pub trait HeldWords: Send + Sync {
    /// The word at `offset` bytes, if its page is held by count.
    fn read(&self, offset: usize) -> Option<u64>;
    /// The page of the word at `offset` bytes is about to be changed: makes it real.
    fn expand(&self, offset: usize);
}

/// A started thread of any platform.
pub struct JoinHandle(Box<dyn Join>);

impl std::fmt::Debug for JoinHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinHandle")
    }
}

/// What a platform's thread must offer.
pub trait Join: Send {
    /// Waits for the end; `Err` is the panic of the thread.
    fn join(self: Box<Self>) -> Result<(), Box<dyn Any + Send>>;
}

impl JoinHandle {
    /// Wraps a platform's own handle.
    pub fn new(inner: impl Join + 'static) -> Self {
        JoinHandle(Box::new(inner))
    }

    /// Waits for the end of the thread; `Err` is its panic.
    pub fn join(self) -> Result<(), Box<dyn Any + Send>> {
        self.0.join()
    }
}

/// A fair reader-writer lock that can tell whether somebody waits.
///
/// Unlocking without holding is a logic error: it corrupts the lock, not memory.
pub trait RawRwLock: Send + Sync {
    /// An unlocked lock.
    fn new() -> Self;
    /// Takes the lock shared; queues behind everybody who waits.
    fn lock_shared(&self);
    /// Gives a shared hold back.
    fn unlock_shared(&self);
    /// Takes the lock shared if neither a writer holds it nor anybody waits.
    fn try_lock_shared(&self) -> bool;
    /// Takes the lock exclusively.
    fn lock_exclusive(&self);
    /// Gives the exclusive hold back.
    fn unlock_exclusive(&self);
    /// Takes the lock exclusively if it is free and nobody waits.
    fn try_lock_exclusive(&self) -> bool;
    /// Somebody waits for the lock. One load.
    fn is_contended(&self) -> bool;

    /// Like [`RawRwLock::lock_shared`], but calls `waiting` once before it waits, and never if it need not wait.
    fn lock_shared_or(&self, waiting: impl FnOnce()) {
        if !self.try_lock_shared() {
            waiting();
            self.lock_shared();
        }
    }

    /// Like [`RawRwLock::lock_exclusive`], but calls `waiting` once before it waits, and never if it need not wait.
    fn lock_exclusive_or(&self, waiting: impl FnOnce()) {
        if !self.try_lock_exclusive() {
            waiting();
            self.lock_exclusive();
        }
    }
}

/// Takes back what was deferred, after a grace period.
pub trait Reclaim: Send + Sync {
    /// Frees the chain of deferred ids that starts at `head`, linked through the owner's own links and ended by
    /// [`NIL`]; runs on the RCU thread (after `stop`: on any thread). Returns how many.
    fn reclaim(&self, head: u32) -> usize;
}

/// The end of a chain of deferred ids.
pub const NIL: u32 = u32::MAX;

/// An RCU domain: readers, deferred chains, grace periods.
pub trait RcuDomain: Send + Sync + Sized + 'static {
    /// A registered reader; one per thread.
    type Reader: RcuReader;

    /// A domain that hands what was deferred to `reclaim`. Errors: the RCU thread could not be started.
    fn try_new(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> io::Result<Arc<Self>>;

    /// Like [`RcuDomain::try_new`], but a domain whose thread could not be started works without it, in the state
    /// that [`RcuDomain::stop`] leaves behind; [`RcuStats::thread_error`] then says why.
    fn new(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> Arc<Self>;

    /// Registers a reader under a name that stall reports print.
    fn register(self: &Arc<Self>, name: &str) -> Self::Reader;

    /// Splices the chain `head ..= tail` of `count` ids; `tail_link` is the link of its last id and is overwritten.
    /// O(1), no allocation; allowed inside a read section.
    fn defer(&self, head: u32, tail_link: &AtomicU32, count: u32);

    /// Waits one full grace period. Not inside a read section.
    fn synchronize(&self);

    /// Waits until everything deferred before the call is reclaimed. Not inside a read section.
    fn barrier(&self);

    /// The timeline that the domain keeps, if it keeps one.
    fn timeline(&self) -> Option<&Arc<Timeline>> {
        None
    }

    /// What the domain has counted and measured so far.
    fn stats(&self) -> RcuStats;

    /// Reclaims what is deferred and ends the RCU thread; idempotent. What is deferred later is reclaimed by the
    /// deferring thread as soon as no reader is in the way, at the latest by `barrier` or the drop of the domain.
    fn stop(&self);
}

/// A thread's side of RCU. Sections nest.
pub trait RcuReader: Send {
    /// Begins a section, or one level more of it.
    fn enter(&self);
    /// Ends one level.
    fn leave(&self);
    /// Levels entered and not left.
    fn depth(&self) -> u32;

    /// Sections are to take [`RcuReader::enter`] and [`RcuReader::leave`] only. Not inside a section.
    fn set_slow(&self) {}

    /// A quicker [`RcuReader::enter`] that may decline, and then has done nothing. What it began ends with
    /// [`QuickSection::try_leave`], and if that declines, with [`RcuReader::leave`].
    #[inline(always)]
    fn try_enter(&self) -> Option<QuickSection<'_>> {
        None
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Shared {}
    impl Sealed for super::Exclusive {}
}

/// The mode in which mmu_lock is held, as a type.
pub trait Mode: sealed::Sealed + 'static {
    /// Whether others may hold the lock in the same mode.
    const SHARED: bool;
}

/// mmu_lock held for read: SPTEs change by atomic operations only.
#[derive(Debug)]
pub struct Shared;
/// mmu_lock held for write.
#[derive(Debug)]
pub struct Exclusive;

impl Mode for Shared {
    const SHARED: bool = true;
}
impl Mode for Exclusive {
    const SHARED: bool = false;
}
