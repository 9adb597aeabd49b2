//! `async-worker`, D4, Linux 5.18-6.3: a per-VM queue; each valid -> invalid transition queues its root once.
//!
//! ```text
//! VALID(rc>0) --invalidate (exclusive): get; invalid:=1; queue--> INVALID
//! VALID --put: rc=0, was valid--> invalid:=1; rc:=1; queue   (one lock hold) --> INVALID
//! INVALID --worker (shared, yielding): zap; put--> INVALID(rc-1)
//! INVALID --put: rc=0, was invalid--> off the list, RCU
//! ```
//! The count is zero only inside one hold of mmu_lock, so exclusive walkers never see it and shared ones, which take references on valid
//! roots only, cannot tell. The exchange of the role word decides who made the transition; only that one queues, with one gifted
//! reference: a work item queued twice runs once, and the second reference leaks (bug-history 23). Roots that are invalid already are skipped, therefore
//! a fast zap must wait for *all* work, not only its own (P-FZ, bug-history 22): it flushes the queue.

use std::cell::Cell;
use std::sync::{Arc, Condvar, Mutex as StdMutex, OnceLock, PoisonError, Weak};

use tdpmmu_platform::{Event, Exclusive, Guard, Histogram, Owner, Phase, Platform, Role, Task, WorkQueue};

use super::{Held, WorkerReport, ZapDesign};
use crate::TdpMmu;
use crate::walk::Yield;

/// What a worker is asked to do.
enum Work {
    /// Zap this root and put the gifted reference; queued when, in ticks.
    Zap(u32, u64),
    /// Hand over what you measured, once every worker has been asked.
    Report(Arc<Muster>),
}

/// Where workers wait until each of them has its request, so that none takes two; called off when a shutdown came between the requests.
struct Muster {
    missing: StdMutex<usize>,
    complete: Condvar,
}

impl Muster {
    fn of(workers: usize) -> Self {
        Self { missing: StdMutex::new(workers), complete: Condvar::new() }
    }

    fn wait(&self) {
        let mut missing = self.missing.lock().unwrap_or_else(PoisonError::into_inner);
        *missing = missing.saturating_sub(1);
        if *missing == 0 {
            self.complete.notify_all();
        }
        let all = self.complete.wait_while(missing, |missing| *missing > 0);
        drop(all.unwrap_or_else(PoisonError::into_inner));
    }

    fn call_off(&self) {
        *self.missing.lock().unwrap_or_else(PoisonError::into_inner) = 0;
        self.complete.notify_all();
    }
}

/// A worker's own state, made and used by its thread.
struct Worker<P: Platform> {
    mmu: Weak<TdpMmu<P>>,
    task: Task<P>,
    cpu_ns: Cell<u64>,
    reports: Arc<StdMutex<Vec<WorkerReport>>>,
    delay_ns: Arc<StdMutex<Histogram>>,
}

impl<P: Platform> Worker<P> {
    fn run(&self, work: &Work) {
        match work {
            Work::Zap(root, queued) => {
                let delay = P::ticks_to_ns(P::ticks().saturating_sub(*queued));
                self.delay_ns.lock().unwrap_or_else(PoisonError::into_inner).record(delay);
                // The MMU drains the queue before it goes away (`drain`): while there is work, it is there.
                if let Some(mmu) = self.mmu.upgrade() {
                    let mut guard = mmu.lock.read(&self.task);
                    mmu.zap_root(&mut guard, *root, Yield::Allowed);
                    mmu.put_root(&self.task, *root, Owner::Work, Held::Shared(&mut guard));
                }
            }
            Work::Report(all) => {
                all.wait();
                let now = P::thread_cpu_ns();
                let cpu_ns = now.saturating_sub(self.cpu_ns.replace(now));
                let report = WorkerReport {
                    name: self.task.name().to_owned(),
                    meter: self.task.meter().take(),
                    cpu_ns,
                };
                self.reports.lock().unwrap_or_else(PoisonError::into_inner).push(report);
            }
        }
    }
}

/// See the module text.
pub struct AsyncWorker<P: Platform> {
    workers: usize,
    queue: OnceLock<WorkQueue<P, Work>>,
    reports: Arc<StdMutex<Vec<WorkerReport>>>,
    /// One muster at a time: the requests of two would meet in one queue, and each would wait for workers that stand at the other.
    reporting: StdMutex<()>,
    /// From queued to started, of zaps alone: requests for a report are no part of the design.
    delay_ns: Arc<StdMutex<Histogram>>,
}

impl<P: Platform> AsyncWorker<P> {
    /// A queue of `workers` threads (the kernel's is unbound: as many as there are items and CPUs).
    pub fn new(workers: usize) -> Self {
        Self {
            workers: workers.max(1),
            queue: OnceLock::new(),
            reports: Arc::default(),
            reporting: StdMutex::default(),
            delay_ns: Arc::default(),
        }
    }

    fn schedule(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32) {
        if let Some(observer) = mmu.observer() {
            observer.event(task.id(), &Event::RootSchedule { root });
        }
        if let Some(queue) = self.queue.get() {
            queue.queue(Work::Zap(root, P::ticks()));
        }
    }
}

impl<P: Platform> ZapDesign<P> for AsyncWorker<P> {
    fn name(&self) -> &'static str {
        "async-worker"
    }

    fn attach(&self, mmu: Weak<TdpMmu<P>>) -> std::io::Result<()> {
        let (reports, delay_ns) = (Arc::clone(&self.reports), Arc::clone(&self.delay_ns));
        let begin = move |_: usize| {
            let task = mmu.upgrade()?.task("zap-worker", Role::Worker);
            let cpu_ns = Cell::new(P::thread_cpu_ns());
            Some(Worker {
                mmu: mmu.clone(),
                task,
                cpu_ns,
                reports: reports.clone(),
                delay_ns: delay_ns.clone(),
            })
        };
        let queue = WorkQueue::with_context("tdp_mmu_zap_wq", self.workers, begin, |worker, work| {
            if let Some(worker) = worker {
                worker.run(work);
            }
        })?;
        let _ = self.queue.set(queue);
        Ok(())
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, _held: Held<'_, '_, P>) {
        if mmu.invalidate_root(task, root) {
            mmu.rearm_root(task, root);
            self.schedule(mmu, task, root);
        } else {
            mmu.retire_root(task, root);
        }
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if !mmu.is_obsolete(root) && mmu.get_root(task, root, Owner::Work) {
                mmu.invalidate_root(task, root);
                self.schedule(mmu, task, root);
            }
        }
    }

    fn finish(&self, _mmu: &TdpMmu<P>, task: &Task<P>) {
        let _waiting = task.phase(Phase::QueueDelay);
        <Self as ZapDesign<P>>::quiesce(self);
    }

    fn quiesce(&self) {
        if let Some(queue) = self.queue.get() {
            queue.flush();
        }
    }

    fn drain(&self, _mmu: &TdpMmu<P>, _task: &Task<P>) {
        if let Some(queue) = self.queue.get() {
            queue.shutdown();
        }
    }

    fn queue_ns(&self) -> Option<Histogram> {
        Some(self.delay_ns.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    fn take_worker_reports(&self) -> Vec<WorkerReport> {
        let _turn = self.reporting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(queue) = self.queue.get() {
            let all = Arc::new(Muster::of(self.workers));
            if (0..self.workers).all(|_| queue.queue(Work::Report(all.clone()))) {
                queue.flush();
            } else {
                // The queue is shut down: nobody will take the other requests, and the shutdown waits for those who took one.
                all.call_off();
            }
        }
        std::mem::take(&mut self.reports.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
