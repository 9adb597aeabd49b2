//! RCU of the simulation: grace periods that wait for exactly the sections that were there.
//!
//! **Guarantee.** What was deferred is reclaimed once every section that had begun when the grace period began has ended, and as early as that: sections that begin
//! later are not waited for, so that a reader that reached for memory too late is caught with the memory gone.
//!
//! **Mechanism.** Each reader counts its sections. A grace period empties all store buffers (the kernel's makes every CPU pass through a full barrier), notes the
//! readers that are inside with the number of their section, waits until each has left it, and empties the buffers again. A task of the run makes the grace periods
//! for what is deferred, a batch at a time; [`SimRcu::synchronize`] makes its own. Both are subject to the schedule like any other task, so a grace
//! period may be as short as it can be, or as long as the schedule likes; a fault ([`Fault::GraceDelay`]) makes it longer.
//!
//! Without its task (no run, or after [`SimRcu::stop`]) the domain reclaims on the deferring thread when no reader is inside, at the latest when it is dropped.

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
};

use super::{platform::Sim, scheduler, world};
use crate::{
    api::{JoinHandle, NIL, Platform, RcuDomain, RcuReader, Reclaim},
    fault::Fault,
    histogram::Histogram,
    rcu::{Flavour, RcuConfig, RcuStats},
    site::Site,
};

/// The RCU domain of the simulated platform. See the module's text.
#[derive(Debug)]
pub struct SimRcu {
    inner: Arc<Inner>,
    thread: Mutex<Option<JoinHandle>>,
}

/// One reader, as grace periods see it.
#[derive(Debug)]
struct Slot {
    depth: AtomicU32,
    /// Sections begun so far.
    section: AtomicU64,
}

struct Inner {
    reclaim: Arc<dyn Reclaim>,
    readers: Mutex<Vec<Arc<Slot>>>,
    /// Top of the stack of deferred ids; changes with each defer, so that the task can sleep on it.
    top: AtomicU32,
    /// The task is there and serves.
    served: AtomicBool,
    stopping: AtomicBool,
    /// Barriers drawn and completed.
    drawn: AtomicU64,
    completed: AtomicU64,
    callbacks: AtomicU64,
    reclaimed: AtomicU64,
    backlog_peak: AtomicU64,
    grace_periods: AtomicU64,
    first_queued: AtomicU64,
    grace_period_ns: Mutex<Histogram>,
    thread_error: Option<String>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner").field("served", &self.served).finish_non_exhaustive()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Inner {
    /// What the task sleeps on, what grace periods sleep on, what barriers sleep on.
    fn keys(&self) -> [usize; 3] {
        [
            std::ptr::from_ref(&self.top).addr(),
            std::ptr::from_ref(&self.grace_periods).addr(),
            std::ptr::from_ref(&self.completed).addr(),
        ]
    }

    fn wake(&self, key: usize) {
        world::with(|world| world.wake(key, u32::MAX));
    }

    fn take(&self) -> u32 {
        self.top.swap(NIL, Ordering::SeqCst)
    }

    fn somebody_inside(&self) -> bool {
        lock(&self.readers).iter().any(|slot| slot.depth.load(Ordering::SeqCst) != 0)
    }

    /// Waits one grace period.
    fn grace_period(&self) {
        scheduler::settle(Site::RcuGrace);
        world::with(|world| world.drain_everybody());
        let mut inside: Vec<(Arc<Slot>, u64)> = lock(&self.readers)
            .iter()
            .filter(|slot| slot.depth.load(Ordering::SeqCst) != 0)
            .map(|slot| (slot.clone(), slot.section.load(Ordering::SeqCst)))
            .collect();
        scheduler::point(Site::RcuGrace, super::report::Kind::Point);
        scheduler::pause(scheduler::ask(Fault::GraceDelay, Site::RcuGrace), Site::RcuGrace);
        while !Sim::abandoned() {
            inside.retain(|(slot, section)| {
                slot.depth.load(Ordering::SeqCst) != 0 && slot.section.load(Ordering::SeqCst) == *section
            });
            if inside.is_empty() {
                break;
            }
            scheduler::block(self.keys()[1], "the end of RCU read sections", Site::RcuGrace, None);
        }
        world::with(|world| world.drain_everybody());
        self.grace_periods.fetch_add(1, Ordering::SeqCst);
    }

    /// Hands a chain over whose grace period has ended.
    fn hand_over(&self, head: u32) {
        let waited = Sim::ticks().saturating_sub(self.first_queued.load(Ordering::SeqCst));
        lock(&self.grace_period_ns).record(waited);
        self.backlog_peak.fetch_max(self.backlog(), Ordering::SeqCst);
        scheduler::point(Site::TableFree, super::report::Kind::Point);
        let freed = self.reclaim.reclaim(head);
        self.reclaimed.fetch_add(freed as u64, Ordering::SeqCst);
    }

    fn backlog(&self) -> u64 {
        self.callbacks.load(Ordering::SeqCst).saturating_sub(self.reclaimed.load(Ordering::SeqCst))
    }

    /// Without a task: what can be reclaimed now is. `anyway`: nobody reads any more, or the run is over.
    fn drain(&self, anyway: bool) {
        while anyway || !self.somebody_inside() {
            let head = self.take();
            if head == NIL {
                return;
            }
            self.grace_periods.fetch_add(1, Ordering::SeqCst);
            self.hand_over(head);
        }
    }

    /// The body of the task.
    fn run(&self) {
        loop {
            scheduler::point(Site::RcuGrace, super::report::Kind::Point);
            let stopping = self.stopping.load(Ordering::SeqCst);
            let drawn = self.drawn.load(Ordering::SeqCst);
            let head = self.take();
            if head != NIL {
                self.grace_period();
                self.hand_over(head);
            }
            if self.completed.swap(drawn, Ordering::SeqCst) != drawn {
                self.wake(self.keys()[2]);
            }
            let idle = self.top.load(Ordering::SeqCst) == NIL && self.drawn.load(Ordering::SeqCst) == drawn;
            if idle && stopping {
                return;
            }
            if idle && !self.stopping.load(Ordering::SeqCst) {
                scheduler::block(self.keys()[0], "something to reclaim", Site::RcuGrace, None);
            }
        }
    }
}

/// Says that the task is gone, however it went.
struct Served(Arc<Inner>);

impl Drop for Served {
    fn drop(&mut self) {
        self.0.served.store(false, Ordering::SeqCst);
        self.0.wake(self.0.keys()[2]);
    }
}

impl SimRcu {
    fn make(reclaim: Arc<dyn Reclaim>, error: Option<String>) -> Arc<Inner> {
        Arc::new(Inner {
            reclaim,
            readers: Mutex::default(),
            top: AtomicU32::new(NIL),
            served: AtomicBool::new(error.is_none()),
            stopping: AtomicBool::new(false),
            drawn: AtomicU64::new(0),
            completed: AtomicU64::new(0),
            callbacks: AtomicU64::new(0),
            reclaimed: AtomicU64::new(0),
            backlog_peak: AtomicU64::new(0),
            grace_periods: AtomicU64::new(0),
            first_queued: AtomicU64::new(0),
            grace_period_ns: Mutex::new(Histogram::new()),
            thread_error: error,
        })
    }

    fn serve(inner: &Arc<Inner>) -> io::Result<JoinHandle> {
        let served = Served(inner.clone());
        Sim::spawn("rcu", Box::new(move || served.0.run()))
    }
}

impl RcuDomain for SimRcu {
    type Reader = SimReader;

    fn try_new(reclaim: Arc<dyn Reclaim>, _config: RcuConfig) -> io::Result<Arc<Self>> {
        let inner = Self::make(reclaim, None);
        let thread = Self::serve(&inner)?;
        Ok(Arc::new(SimRcu { inner, thread: Mutex::new(Some(thread)) }))
    }

    fn new(reclaim: Arc<dyn Reclaim>, config: RcuConfig) -> Arc<Self> {
        Self::try_new(reclaim.clone(), config).unwrap_or_else(|error| {
            let inner = Self::make(reclaim, Some(error.to_string()));
            Arc::new(SimRcu { inner, thread: Mutex::new(None) })
        })
    }

    fn register(self: &Arc<Self>, _name: &str) -> SimReader {
        let slot = Arc::new(Slot { depth: AtomicU32::new(0), section: AtomicU64::new(0) });
        lock(&self.inner.readers).push(slot.clone());
        SimReader { inner: self.inner.clone(), slot }
    }

    fn defer(&self, head: u32, tail_link: &AtomicU32, count: u32) {
        let inner = &self.inner;
        let top = inner.top.load(Ordering::SeqCst);
        if top == NIL {
            inner.first_queued.store(Sim::ticks(), Ordering::SeqCst);
        }
        tail_link.store(top, Ordering::SeqCst);
        inner.top.store(head, Ordering::SeqCst);
        inner.callbacks.fetch_add(u64::from(count), Ordering::SeqCst);
        if inner.served.load(Ordering::SeqCst) {
            inner.wake(inner.keys()[0]);
        } else {
            inner.drain(Sim::abandoned());
        }
    }

    fn synchronize(&self) {
        if !Sim::abandoned() {
            self.inner.grace_period();
        }
    }

    fn barrier(&self) {
        scheduler::settle(Site::RcuGrace);
        let inner = &self.inner;
        let target = inner.drawn.fetch_add(1, Ordering::SeqCst) + 1;
        inner.wake(inner.keys()[0]);
        while inner.served.load(Ordering::SeqCst)
            && inner.completed.load(Ordering::SeqCst) < target
            && !Sim::abandoned()
        {
            scheduler::block(inner.keys()[2], "an RCU barrier", Site::RcuGrace, None);
        }
        if !inner.served.load(Ordering::SeqCst) || Sim::abandoned() {
            while inner.somebody_inside() && !Sim::abandoned() {
                scheduler::block(inner.keys()[1], "the end of RCU read sections", Site::RcuGrace, None);
            }
            inner.drain(true);
        }
    }

    fn stats(&self) -> RcuStats {
        let inner = &self.inner;
        RcuStats {
            flavour: Flavour::Fence,
            grace_period_ns: lock(&inner.grace_period_ns).clone(),
            grace_periods: inner.grace_periods.load(Ordering::SeqCst),
            callbacks: inner.callbacks.load(Ordering::SeqCst),
            backlog: inner.backlog(),
            backlog_peak: inner.backlog_peak.load(Ordering::SeqCst),
            stalls: Vec::new(),
            stall_count: 0,
            thread_cpu_ns: 0,
            waiting_ns: 0,
            freeing_ns: 0,
            thread_error: inner.thread_error.clone(),
        }
    }

    fn stop(&self) {
        let inner = &self.inner;
        inner.stopping.store(true, Ordering::SeqCst);
        inner.wake(inner.keys()[0]);
        let thread = lock(&self.thread).take();
        let panic = thread.and_then(|thread| thread.join().err());
        inner.drain(Sim::abandoned());
        if let Some(panic) = panic.filter(|_| !std::thread::panicking() && !Sim::abandoned()) {
            std::panic::resume_unwind(panic);
        }
    }
}

impl Drop for SimRcu {
    fn drop(&mut self) {
        self.stop();
        // Readers borrow the domain's insides, not the domain: whoever is inside has nothing left to read.
        self.inner.drain(true);
    }
}

/// A reader of [`SimRcu`].
#[derive(Debug)]
pub struct SimReader {
    inner: Arc<Inner>,
    slot: Arc<Slot>,
}

impl RcuReader for SimReader {
    fn enter(&self) {
        if self.slot.depth.fetch_add(1, Ordering::SeqCst) != 0 {
            return;
        }
        self.slot.section.fetch_add(1, Ordering::SeqCst);
        world::with(|world| {
            let task = world.task();
            task.sections += 1;
            if task.sections == 1 {
                task.section_since = task.accesses;
            }
        });
    }

    fn leave(&self) {
        let depth = self.slot.depth.load(Ordering::SeqCst);
        assert!(depth != 0, "RCU read section left that was not entered");
        self.slot.depth.store(depth - 1, Ordering::SeqCst);
        if depth != 1 {
            return;
        }
        world::with(|world| {
            world.section_stretch_ends();
            let task = world.task();
            task.sections = task.sections.saturating_sub(1);
        });
        self.inner.wake(self.inner.keys()[1]);
    }

    fn depth(&self) -> u32 {
        self.slot.depth.load(Ordering::SeqCst)
    }
}

impl Drop for SimReader {
    fn drop(&mut self) {
        lock(&self.inner.readers).retain(|slot| !Arc::ptr_eq(slot, &self.slot));
        self.slot.depth.store(0, Ordering::SeqCst);
        self.inner.wake(self.inner.keys()[1]);
    }
}
