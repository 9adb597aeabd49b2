//! The RCU thread: batches what is deferred, one grace period for all of it.
//!
//! **Guarantee.** Everything deferred is handed to [`Reclaim`] exactly once, after its grace period; `barrier` returns
//! only when all that was deferred before it has been handed over, the call itself included in "before".
//!
//! **Mechanism.** The thread takes the whole [`Chain`], waits one grace period, reclaims, and looks again. While it waits
//! the next batch gathers by itself; `batch_delay_ns` makes it gather longer.
//!
//! *Sleep.* The thread announces that it idles, then looks at the chain; a deferring thread pushes, then looks at the
//! announcement. Both sides are SeqCst, so one of them sees the other.
//!
//! *Barrier.* A barrier draws a number and waits until the thread has completed it. The thread reads the last number
//! drawn before it takes the chain: whatever was deferred before that number was drawn is in what it takes, or in
//! a batch that is already done.
//!
//! *Stop.* The thread drains, says that it has stopped, and drains once more. A deferring thread pushes, then looks
//! whether the thread has stopped; if so it drains itself, as far as it can without waiting (it may be inside a section
//! of its own). SeqCst again: nothing falls between.

use std::{
    any::Any,
    io,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use super::{
    Flavour, RcuConfig, RcuStats, Stall,
    chain::Chain,
    epoch::{Epoch, Handle, QuickSection, Slot},
    membarrier::Asymmetric,
};
use crate::{
    api::{JoinHandle, NIL, Platform, RcuDomain, RcuReader, Reclaim},
    clock, futex,
    histogram::Histogram,
    meter::Phase,
    observer::{Event, NO_TASK},
    real::Real,
    timeline::{Batch, Timeline},
};

/// A domain with a timeline looks at the clock each time so many more ids were deferred.
const LOGGED_EACH: u64 = 16;

/// States of [`Inner::nap`].
const AWAKE: u32 = 0;
/// Nothing to do: the next `defer` wakes.
const IDLE: u32 = 1;
/// Something to do, waiting for more: only an urgent caller wakes.
const GATHERING: u32 = 2;

/// The RCU domain of the real platform.
#[derive(Debug)]
pub struct Domain {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle>>,
}

struct Inner {
    epoch: Arc<Epoch<Asymmetric>>,
    chain: Chain,
    reclaim: Arc<dyn Reclaim>,
    config: RcuConfig,
    /// When the oldest callback of the current batch was queued, in ticks.
    first_queued: AtomicU64,
    nap: AtomicU32,
    stopping: AtomicBool,
    stopped: AtomicBool,
    /// Barriers drawn and barriers completed, modulo 2^32.
    drawn: AtomicU32,
    completed: AtomicU32,
    callbacks: AtomicU64,
    reclaimed: AtomicU64,
    backlog_peak: AtomicU64,
    grace_periods: AtomicU64,
    thread_cpu_ns: AtomicU64,
    /// Chains taken after the stop whose readers were still inside.
    parked: Mutex<Vec<Taken>>,
    log: Mutex<Log>,
    /// What the RCU thread is at.
    at: Mutex<At>,
    timeline: Option<Arc<Timeline>>,
}

/// A chain taken from the stack; times in ticks.
#[derive(Clone, Copy)]
struct Taken {
    head: u32,
    queued: u64,
    taken: u64,
}

/// The RCU thread's time: waiting for a grace period, freeing, neither.
struct At {
    phase: Phase,
    since: u64,
    waiting_ticks: u64,
    freeing_ticks: u64,
}

impl At {
    /// Waiting and freeing up to `now`, in ticks.
    fn spent(&self, now: u64) -> (u64, u64) {
        let stretch = now.saturating_sub(self.since);
        match self.phase {
            Phase::GracePeriod => (self.waiting_ticks + stretch, self.freeing_ticks),
            Phase::Free => (self.waiting_ticks, self.freeing_ticks + stretch),
            _ => (self.waiting_ticks, self.freeing_ticks),
        }
    }
}

struct Log {
    grace_period_ns: Histogram,
    stalls: Vec<Stall>,
    stall_count: u64,
    thread_error: Option<String>,
    /// The first panic of the owner's reclaim, for whoever joins.
    panic: Option<Box<dyn Any + Send>>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("config", &self.config).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Counters and lists are whole after each statement: a panic elsewhere does not spoil them.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    fn backlog(&self) -> u64 {
        let reclaimed = self.reclaimed.load(Ordering::Relaxed);
        self.callbacks.load(Ordering::Relaxed).saturating_sub(reclaimed)
    }

    /// Wakes the thread from any nap.
    fn wake(&self) {
        if self.nap.swap(AWAKE, Ordering::SeqCst) != AWAKE {
            futex::wake(&self.nap, 1);
        }
    }

    /// Waits one grace period for everything that the calling thread has cut, or taken from those who cut.
    fn grace_period(&self) {
        let target = self.epoch.begin();
        let begun = clock::ticks();
        let mut rounds = 0u32;
        let mut stalled: Vec<(u32, String)> = Vec::new();
        let mut overdue = false;
        loop {
            let over = self.epoch.is_over(target, |slot| {
                if overdue && !stalled.iter().any(|(id, _)| *id == slot.id()) {
                    self.report_stall(slot, clock::ticks_to_ns(clock::ticks() - begun));
                    stalled.push((slot.id(), slot.name().to_owned()));
                }
            });
            if over {
                break;
            }
            match rounds {
                0..64 => std::hint::spin_loop(),
                64..72 => thread::yield_now(),
                _ => {
                    // Sections are short; one that outlasts the spin was most likely preempted.
                    thread::sleep(Duration::from_micros(20u64 << (rounds - 72).min(5)));
                    overdue =
                        clock::ticks_to_ns(clock::ticks().saturating_sub(begun)) >= self.config.stall_ns;
                }
            }
            rounds = rounds.saturating_add(1);
        }
        if !stalled.is_empty() {
            let ns = clock::ticks_to_ns(clock::ticks() - begun);
            for stall in &mut lock(&self.log).stalls {
                if stalled.iter().any(|(id, name)| *id == stall.reader_id && *name == stall.reader) {
                    stall.ns = stall.ns.max(ns);
                }
            }
        }
        self.grace_periods.fetch_add(1, Ordering::Relaxed);
    }

    #[cold]
    fn report_stall(&self, slot: &Slot, ns: u64) {
        let mut log = lock(&self.log);
        log.stall_count += 1;
        if log.stalls.len() < RcuStats::STALLS_KEPT {
            log.stalls.push(Stall { reader: slot.name().to_owned(), reader_id: slot.id(), ns });
        }
        drop(log);
        if let Some(observer) = &self.config.observer {
            observer.event(NO_TASK, &Event::Stall { reader: slot.id(), ns });
        }
    }

    /// Takes the whole stack.
    fn take(&self) -> Option<Taken> {
        // Before the take: afterwards a new first callback may overwrite it.
        let queued = self.first_queued.load(Ordering::Relaxed);
        let head = self.chain.take();
        (head != NIL).then(|| Taken { head, queued, taken: clock::ticks() })
    }

    /// Hands a taken chain over; its grace period is over.
    fn hand_over(&self, chain: Taken) {
        let freeing = clock::ticks();
        let waited = clock::ticks_to_ns(freeing.saturating_sub(chain.queued));
        lock(&self.log).grace_period_ns.record(waited);
        let freed = self.reclaim.reclaim(chain.head);
        // Highest here: what was deferred while these were freed counts too.
        let waiting = self.backlog();
        self.backlog_peak.fetch_max(waiting, Ordering::Relaxed);
        if let Some(timeline) = &self.timeline {
            timeline.point(clock::ticks(), waiting);
        }
        self.reclaimed.fetch_add(freed as u64, Ordering::Relaxed);
        if let Some(timeline) = &self.timeline {
            let (now, Taken { queued, taken, .. }) = (clock::ticks(), chain);
            timeline.point(now, self.backlog());
            timeline.batch(Batch { queued, taken, freeing, freed: now, pages: freed as u64 });
        }
    }

    /// The RCU thread goes on to `phase`.
    fn turns_to(&self, phase: Phase) {
        let mut at = lock(&self.at);
        let (was, since) = (at.phase, at.since);
        let now = clock::ticks().max(since);
        (at.waiting_ticks, at.freeing_ticks) = at.spent(now);
        (at.phase, at.since) = (phase, now);
        drop(at);
        if let Some(timeline) = &self.timeline {
            timeline.rcu_slice(was, since, now);
        }
    }

    /// Takes, waits, reclaims, until nothing is left; with a barrier waiting, once: what is deferred meanwhile is none of its
    /// business, and a stream of callbacks must not hold it up for ever.
    fn drain(&self) {
        while let Some(chain) = self.take() {
            self.turns_to(Phase::GracePeriod);
            self.grace_period();
            self.turns_to(Phase::Free);
            self.hand_over(chain);
            if self.drawn.load(Ordering::SeqCst) != self.completed.load(Ordering::Relaxed) {
                break;
            }
        }
    }

    /// Drains without waiting: the caller may itself be the reader in the way. What cannot be reclaimed yet is
    /// parked for the next attempt.
    #[cold]
    fn try_drain(&self) {
        // Another drainer at work, or this very thread inside `reclaim`: it is left to the next attempt.
        let Ok(mut parked) = self.parked.try_lock() else { return };
        self.park_all(&mut parked);
        let target = self.epoch.begin();
        if self.epoch.is_over(target, |_| ()) {
            self.grace_periods.fetch_add(1, Ordering::Relaxed);
            for chain in parked.drain(..) {
                self.hand_over(chain);
            }
        }
    }

    /// Drains for good, on the calling thread, after the RCU thread has stopped.
    #[cold]
    fn drain_stopped(&self) {
        let mut parked = lock(&self.parked);
        self.park_all(&mut parked);
        if parked.is_empty() {
            return;
        }
        self.grace_period();
        for chain in parked.drain(..) {
            self.hand_over(chain);
        }
    }

    fn park_all(&self, parked: &mut Vec<Taken>) {
        parked.extend(self.take());
    }

    /// The body of the RCU thread.
    fn run(&self) {
        crate::sched::background();
        loop {
            let stopping = self.stopping.load(Ordering::SeqCst);
            let drawn = self.drawn.load(Ordering::SeqCst);
            let urgent = stopping || drawn != self.completed.load(Ordering::Relaxed);
            if self.chain.is_empty() && !urgent {
                self.nap(IDLE, None, || !self.chain.is_empty());
                continue;
            }
            if !urgent && self.config.batch_delay_ns > 0 {
                self.turns_to(Phase::GracePeriod);
                self.nap(GATHERING, Some(self.config.batch_delay_ns), || false);
            }
            // Read before the take: what was deferred before these were drawn is in what is taken.
            let drawn = self.drawn.load(Ordering::SeqCst);
            self.drain_caught();
            self.turns_to(Phase::Other);
            self.thread_cpu_ns.store(clock::thread_cpu_ns(), Ordering::Relaxed);
            if self.completed.swap(drawn, Ordering::SeqCst) != drawn {
                futex::wake(&self.completed, u32::MAX);
            }
            if stopping {
                break;
            }
        }
        self.stopped.store(true, Ordering::SeqCst);
        // Under the lock that a barrier takes once it sees `stopped`: it must not return while this thread still holds
        // what was deferred before it.
        self.caught(Self::drain_stopped);
        self.thread_cpu_ns.store(clock::thread_cpu_ns(), Ordering::Relaxed);
        // A barrier drawn while the thread ended looks at `stopped` once woken.
        self.completed.fetch_add(1 << 31, Ordering::SeqCst);
        futex::wake(&self.completed, u32::MAX);
    }

    /// One nap unless `work` or an urgent caller came first.
    fn nap(&self, state: u32, timeout_ns: Option<u64>, work: impl FnOnce() -> bool) {
        self.nap.store(state, Ordering::SeqCst);
        let urgent = self.stopping.load(Ordering::SeqCst)
            || self.drawn.load(Ordering::SeqCst) != self.completed.load(Ordering::SeqCst);
        if !urgent && !work() {
            futex::wait(&self.nap, state, timeout_ns);
        }
        self.nap.store(AWAKE, Ordering::SeqCst);
    }

    /// A panic of the owner's reclaim must not leave barriers waiting for a dead thread; `stop` rethrows it.
    fn drain_caught(&self) {
        self.caught(Self::drain);
    }

    fn caught(&self, drain: impl FnOnce(&Self)) {
        let result = panic::catch_unwind(AssertUnwindSafe(|| drain(self)));
        if let Err(payload) = result {
            lock(&self.log).panic.get_or_insert(payload);
        }
    }
}

impl Domain {
    fn build(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> (Arc<Self>, io::Result<()>) {
        // Conversions in the RCU thread must not begin with a calibration.
        let interval = clock::ns_to_ticks(Timeline::INTERVAL_NS);
        let timeline = config.log.then(|| Arc::new(Timeline::new(interval)));
        let inner = Arc::new(Inner {
            epoch: Arc::new(Epoch::new(Asymmetric::new(config.flavour))),
            chain: Chain::new(),
            reclaim,
            config,
            first_queued: AtomicU64::new(0),
            nap: AtomicU32::new(AWAKE),
            stopping: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
            drawn: AtomicU32::new(0),
            completed: AtomicU32::new(0),
            callbacks: AtomicU64::new(0),
            reclaimed: AtomicU64::new(0),
            backlog_peak: AtomicU64::new(0),
            grace_periods: AtomicU64::new(0),
            thread_cpu_ns: AtomicU64::new(0),
            parked: Mutex::new(Vec::new()),
            log: Mutex::new(Log {
                grace_period_ns: Histogram::new(),
                stalls: Vec::new(),
                stall_count: 0,
                thread_error: None,
                panic: None,
            }),
            at: Mutex::new(At {
                phase: Phase::Other,
                since: clock::ticks(),
                waiting_ticks: 0,
                freeing_ticks: 0,
            }),
            timeline,
        });
        let body = inner.clone();
        let started = Real::spawn("tdpmmu-rcu", Box::new(move || body.run()));
        let (thread, result) = match started {
            Ok(handle) => (Some(handle), Ok(())),
            Err(error) => {
                inner.stopping.store(true, Ordering::SeqCst);
                inner.stopped.store(true, Ordering::SeqCst);
                lock(&inner.log).thread_error = Some(error.to_string());
                (None, Err(error))
            }
        };
        (Arc::new(Domain { inner, thread: Mutex::new(thread) }), result)
    }
}

impl RcuDomain for Domain {
    type Reader = Reader;

    fn try_new(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> io::Result<Arc<Self>> {
        let (domain, started) = Self::build(reclaim, config);
        started.map(|()| domain)
    }

    fn new(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> Arc<Self> {
        Self::build(reclaim, config).0
    }

    fn register(self: &Arc<Self>, name: &str) -> Reader {
        Reader(Epoch::register(&self.inner.epoch, name))
    }

    fn defer(&self, head: u32, tail_link: &AtomicU32, count: u32) {
        let inner = &*self.inner;
        let callbacks = inner.callbacks.fetch_add(u64::from(count), Ordering::Relaxed) + u64::from(count);
        let backlog = callbacks.saturating_sub(inner.reclaimed.load(Ordering::Relaxed));
        if backlog > inner.backlog_peak.load(Ordering::Relaxed) {
            inner.backlog_peak.fetch_max(backlog, Ordering::Relaxed);
        }
        if let Some(timeline) = &inner.timeline
            && callbacks / LOGGED_EACH != (callbacks - u64::from(count)) / LOGGED_EACH
        {
            timeline.grown(clock::ticks(), backlog);
        }
        inner.chain.splice(head, tail_link, || inner.first_queued.store(clock::ticks(), Ordering::Relaxed));
        // After the push: see "Sleep" and "Stop" in the module's text.
        if inner.nap.load(Ordering::SeqCst) == IDLE {
            inner.wake();
        }
        if inner.stopped.load(Ordering::SeqCst) {
            inner.try_drain();
        }
    }

    fn synchronize(&self) {
        self.inner.grace_period();
    }

    fn barrier(&self) {
        let inner = &*self.inner;
        if !inner.stopped.load(Ordering::SeqCst) {
            let ticket = inner.drawn.fetch_add(1, Ordering::SeqCst).wrapping_add(1);
            inner.wake();
            loop {
                let completed = inner.completed.load(Ordering::SeqCst);
                if inner.stopped.load(Ordering::SeqCst) {
                    break;
                }
                if completed.wrapping_sub(ticket) as i32 >= 0 {
                    return;
                }
                futex::wait(&inner.completed, completed, None);
            }
        }
        inner.drain_stopped();
    }

    fn timeline(&self) -> Option<&Arc<Timeline>> {
        self.inner.timeline.as_ref()
    }

    fn stats(&self) -> RcuStats {
        let inner = &*self.inner;
        let (waiting, freeing) = lock(&inner.at).spent(clock::ticks());
        let log = lock(&inner.log);
        RcuStats {
            flavour: self.flavour(),
            grace_period_ns: log.grace_period_ns.clone(),
            grace_periods: inner.grace_periods.load(Ordering::Relaxed),
            callbacks: inner.callbacks.load(Ordering::Relaxed),
            backlog: inner.backlog(),
            backlog_peak: inner.backlog_peak.load(Ordering::Relaxed),
            stalls: log.stalls.clone(),
            stall_count: log.stall_count,
            waiting_ns: clock::ticks_to_ns(waiting),
            freeing_ns: clock::ticks_to_ns(freeing),
            thread_cpu_ns: inner.thread_cpu_ns.load(Ordering::Relaxed),
            thread_error: log.thread_error.clone(),
        }
    }

    fn stop(&self) {
        // Held over the join: a second caller returns when the first has finished.
        let mut thread = lock(&self.thread);
        if let Some(handle) = thread.take() {
            self.inner.stopping.store(true, Ordering::SeqCst);
            self.inner.wake();
            let ended = handle.join();
            let payload = lock(&self.inner.log).panic.take().or(ended.err());
            if let Some(payload) = payload.filter(|_| !thread::panicking()) {
                drop(thread);
                panic::resume_unwind(payload);
            }
        }
        drop(thread);
        self.inner.drain_stopped();
    }
}

impl Domain {
    /// The barrier in use.
    pub fn flavour(&self) -> Flavour {
        self.inner.epoch.barrier().flavour()
    }

    /// How many readers are registered.
    pub fn reader_count(&self) -> usize {
        self.inner.epoch.reader_count()
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        self.stop();
    }
}

/// A registered reader of the real platform.
#[derive(Debug)]
pub struct Reader(Handle<Asymmetric>);

impl Reader {
    /// The id that stall reports carry.
    pub fn id(&self) -> u32 {
        self.0.id()
    }
}

impl RcuReader for Reader {
    fn set_slow(&self) {
        self.0.set_slow();
    }

    #[inline(always)]
    fn try_enter(&self) -> Option<QuickSection<'_>> {
        self.0.try_enter()
    }

    #[inline]
    fn enter(&self) {
        self.0.enter();
    }

    #[inline]
    fn leave(&self) {
        self.0.leave();
    }

    #[inline(always)]
    fn depth(&self) -> u32 {
        self.0.depth()
    }
}
