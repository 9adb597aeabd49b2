//! RCU in virtual time: the protocol of [`crate::rcu::Domain`], its thread a task of the machine.
//!
//! **Guarantee.** That of [`crate::rcu`]: what was deferred is reclaimed after every section that had begun before; `barrier` returns when all that was deferred before it
//! is reclaimed; after `stop` whoever defers reclaims.
//!
//! **Mechanism.** One task gathers for `batch_delay_ns`, pays a barrier, looks for readers inside as the real thread does (spinning, then sleeping for 20 us and
//! longer), and hands over each table at [`Costs::free`](super::Costs). Readers are a counter each: their price is that of a section.

use std::{
    cell::Cell,
    io,
    rc::Rc,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use super::{Timed, charge_ns, costs, current_world};
use crate::{
    api::{JoinHandle, NIL, Platform, RcuDomain, RcuReader, Reclaim},
    histogram::Histogram,
    meter::Phase,
    rcu::{Flavour, RcuConfig, RcuStats},
    site::Site,
};

struct Chain {
    head: u32,
    count: u64,
    queued: u64,
}

#[derive(Default)]
struct Books {
    chains: Vec<Chain>,
    callbacks: u64,
    reclaimed: u64,
    peak: u64,
    periods: u64,
    grace: Histogram,
    cpu_ns: u64,
    waiting: u64,
    freeing: u64,
    at: Option<(Phase, u64)>,
    stopped: bool,
}

impl Books {
    fn phase(&mut self, phase: Option<Phase>, now: u64) {
        if let Some((at, since)) = self.at.take() {
            let spent = now.saturating_sub(since);
            match at {
                Phase::GracePeriod => self.waiting += spent,
                _ => self.freeing += spent,
            }
        }
        self.at = phase.map(|phase| (phase, now));
    }
}

/// One reader's word: levels, and how many outermost sections it has begun.
#[derive(Default)]
struct Slot(Cell<u32>, Cell<u64>);

/// The readers; used by the tasks of one world, one at a time, hence no lock.
#[derive(Default)]
struct Slots(std::cell::RefCell<Vec<Rc<Slot>>>);

// SAFETY: the tasks of a world run on one thread, one at a time, and a domain is used by the tasks of one world; no borrow lives across a switch.
unsafe impl Send for Slots {}
// SAFETY: as above.
unsafe impl Sync for Slots {}

struct Inner {
    slots: Slots,
    books: Mutex<Books>,
    reclaim: Arc<dyn Reclaim>,
    config: RcuConfig,
    /// Changes with each defer onto an empty list, each barrier and the stop: the task sleeps on it.
    bell: AtomicU32,
    /// Changes with each batch that is done: barriers sleep on it.
    done: AtomicU32,
    urgent: AtomicU32,
    stopping: AtomicU32,
}

/// See the module's text.
pub struct TimedRcu {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle>>,
}

impl std::fmt::Debug for TimedRcu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TimedRcu")
    }
}

/// A registered reader.
pub struct TimedReader(Rc<Slot>);

// SAFETY: as for `Slots`.
unsafe impl Send for TimedReader {}

impl RcuReader for TimedReader {
    #[inline]
    fn enter(&self) {
        if self.0.0.get() == 0 {
            self.0.1.set(self.0.1.get() + 1);
        }
        self.0.0.set(self.0.0.get() + 1);
    }

    #[inline]
    fn leave(&self) {
        self.0.0.set(self.0.0.get() - 1);
    }

    fn depth(&self) -> u32 {
        self.0.0.get()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// Waits until every section that is open now has ended.
    fn grace_period(&self) {
        charge_ns(costs().membarrier);
        let inside: Vec<(Rc<Slot>, u64)> = {
            let slots = self.slots.0.borrow();
            let open = slots.iter().filter(|slot| slot.0.get() != 0);
            open.map(|slot| (slot.clone(), slot.1.get())).collect()
        };
        let mut rounds = 0u32;
        while inside.iter().any(|(slot, begun)| slot.0.get() != 0 && slot.1.get() == *begun) {
            match rounds {
                0..64 => Timed::relax(Site::RcuGrace),
                64..72 => Timed::yield_cpu(Site::RcuGrace),
                _ => doze(20_000 << (rounds - 72).min(5)),
            }
            rounds = rounds.saturating_add(1);
        }
        lock(&self.books).periods += 1;
    }

    /// One batch, if there is anything.
    fn batch(&self) -> bool {
        let taken = std::mem::take(&mut lock(&self.books).chains);
        if taken.is_empty() {
            return false;
        }
        lock(&self.books).phase(Some(Phase::GracePeriod), Timed::ticks());
        self.grace_period();
        lock(&self.books).phase(Some(Phase::Free), Timed::ticks());
        for chain in taken {
            let waited = Timed::ticks_to_ns(Timed::ticks().saturating_sub(chain.queued));
            charge_ns(costs().free * chain.count as f64);
            let freed = self.reclaim.reclaim(chain.head) as u64;
            let mut books = lock(&self.books);
            books.grace.record(waited);
            books.reclaimed += freed;
        }
        let mut books = lock(&self.books);
        books.phase(None, Timed::ticks());
        true
    }

    fn serve(&self) {
        loop {
            let seen = self.bell.load(Ordering::SeqCst);
            let stopping = self.stopping.load(Ordering::SeqCst) != 0;
            let anything = !lock(&self.books).chains.is_empty();
            if anything
                && !stopping
                && self.urgent.load(Ordering::SeqCst) == 0
                && self.config.batch_delay_ns != 0
            {
                lock(&self.books).phase(Some(Phase::GracePeriod), Timed::ticks());
                Timed::futex_wait(&self.bell, seen, Some(self.config.batch_delay_ns));
            }
            let worked = self.batch();
            lock(&self.books).cpu_ns = Timed::thread_cpu_ns();
            self.done.fetch_add(1, Ordering::SeqCst);
            Timed::futex_wake(&self.done, u32::MAX);
            if !worked {
                if stopping {
                    return;
                }
                if self.bell.load(Ordering::SeqCst) == seen {
                    Timed::futex_wait(&self.bell, seen, None);
                }
            }
        }
    }

    fn ring(&self) {
        self.bell.fetch_add(1, Ordering::SeqCst);
        Timed::futex_wake(&self.bell, 1);
    }
}

/// Sleeps for a while.
fn doze(ns: u64) {
    let nobody = AtomicU32::new(0);
    Timed::futex_wait(&nobody, 0, Some(ns));
}

impl RcuDomain for TimedRcu {
    type Reader = TimedReader;

    fn try_new(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> io::Result<Arc<Self>> {
        let inner = Arc::new(Inner {
            slots: Slots::default(),
            books: Mutex::default(),
            reclaim,
            config,
            bell: AtomicU32::new(0),
            done: AtomicU32::new(0),
            urgent: AtomicU32::new(0),
            stopping: AtomicU32::new(0),
        });
        let serving = inner.clone();
        let thread = Timed::spawn("tdpmmu-rcu", Box::new(move || serving.serve()))?;
        Ok(Arc::new(TimedRcu { inner, thread: Mutex::new(Some(thread)) }))
    }

    fn new(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> Arc<Self> {
        match Self::try_new(reclaim, config) {
            Ok(domain) => domain,
            Err(error) => panic!("virtual time has no world: {error}"),
        }
    }

    fn register(self: &Arc<Self>, _name: &str) -> TimedReader {
        let slot = Rc::new(Slot::default());
        let mut slots = self.inner.slots.0.borrow_mut();
        // Those of tasks that are gone.
        slots.retain(|slot| Rc::strong_count(slot) > 1);
        slots.push(slot.clone());
        TimedReader(slot)
    }

    fn defer(&self, head: u32, tail_link: &AtomicU32, count: u32) {
        tail_link.store(NIL, Ordering::Relaxed);
        let queued = Timed::ticks();
        let mut books = lock(&self.inner.books);
        let first = books.chains.is_empty();
        books.chains.push(Chain { head, count: u64::from(count), queued });
        books.callbacks += u64::from(count);
        books.peak = books.peak.max(books.callbacks - books.reclaimed);
        let stopped = books.stopped;
        drop(books);
        if stopped {
            self.inner.batch();
        } else if first {
            self.inner.ring();
        }
    }

    fn synchronize(&self) {
        self.inner.grace_period();
    }

    fn barrier(&self) {
        let inner = &*self.inner;
        let target = lock(&inner.books).callbacks;
        inner.urgent.fetch_add(1, Ordering::SeqCst);
        loop {
            let seen = inner.done.load(Ordering::SeqCst);
            let (reclaimed, stopped) = {
                let books = lock(&inner.books);
                (books.reclaimed, books.stopped)
            };
            if reclaimed >= target {
                break;
            }
            if stopped {
                inner.batch();
                continue;
            }
            inner.ring();
            if inner.done.load(Ordering::SeqCst) == seen {
                Timed::futex_wait(&inner.done, seen, Some(1_000_000));
            }
        }
        inner.urgent.fetch_sub(1, Ordering::SeqCst);
    }

    fn stats(&self) -> RcuStats {
        let books = lock(&self.inner.books);
        let now = Timed::ticks();
        let under_way = |of: Phase| match books.at {
            Some((at, since)) if at == of => now.saturating_sub(since),
            _ => 0,
        };
        RcuStats {
            flavour: Flavour::Membarrier,
            grace_period_ns: books.grace.clone(),
            grace_periods: books.periods,
            callbacks: books.callbacks,
            backlog: books.callbacks - books.reclaimed,
            backlog_peak: books.peak,
            stalls: Vec::new(),
            stall_count: 0,
            thread_cpu_ns: books.cpu_ns,
            waiting_ns: Timed::ticks_to_ns(books.waiting + under_way(Phase::GracePeriod)),
            freeing_ns: Timed::ticks_to_ns(books.freeing + under_way(Phase::Free)),
            thread_error: None,
        }
    }

    fn stop(&self) {
        let thread = lock(&self.thread).take();
        self.inner.stopping.store(1, Ordering::SeqCst);
        if let Some(thread) = thread
            && current_world().is_some()
        {
            self.inner.ring();
            let _ = thread.join();
        }
        lock(&self.inner.books).stopped = true;
        self.inner.batch();
    }
}

impl Drop for TimedRcu {
    fn drop(&mut self) {
        self.stop();
    }
}
