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

use std::sync::{Arc, Mutex as StdMutex, OnceLock, PoisonError, Weak};

use tdpmmu_platform::{Event, Exclusive, Guard, Histogram, Owner, Phase, Platform, Role, Task, WorkQueue};

use super::{Held, WorkerReport, ZapDesign};
use crate::TdpMmu;
use crate::walk::Yield;

type Meters = Arc<StdMutex<Vec<WorkerReport>>>;

/// See the module text.
pub struct AsyncWorker<P: Platform> {
    workers: usize,
    queue: OnceLock<WorkQueue<P, u32>>,
    meters: Meters,
}

impl<P: Platform> AsyncWorker<P> {
    /// A queue of `workers` threads (the kernel's is unbound: as many as there are items and CPUs).
    pub fn new(workers: usize) -> Self {
        Self { workers: workers.max(1), queue: OnceLock::new(), meters: Meters::default() }
    }

    fn schedule(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32) {
        if let Some(observer) = mmu.observer() {
            observer.event(task.id(), &Event::RootSchedule { root });
        }
        if let Some(queue) = self.queue.get() {
            queue.queue(root);
        }
    }

    fn work(mmu: &TdpMmu<P>, root: u32, meters: &Meters) {
        let cpu = P::thread_cpu_ns();
        let task = mmu.task("zap-worker", Role::Worker);
        {
            let mut guard = mmu.lock.read(&task);
            mmu.zap_root(&mut guard, root, Yield::Allowed);
            mmu.put_root(&task, root, Owner::Work, Held::Shared(&mut guard));
        }
        let report = WorkerReport {
            name: task.name().to_owned(),
            meter: task.meter().take(),
            cpu_ns: P::thread_cpu_ns().saturating_sub(cpu),
        };
        meters.lock().unwrap_or_else(PoisonError::into_inner).push(report);
    }
}

impl<P: Platform> ZapDesign<P> for AsyncWorker<P> {
    fn name(&self) -> &'static str {
        "async-worker"
    }

    fn attach(&self, mmu: Weak<TdpMmu<P>>) -> std::io::Result<()> {
        let meters = Arc::clone(&self.meters);
        // The MMU drains the queue before it goes away (`drain`), so the upgrade succeeds whenever work is left.
        let queue = WorkQueue::new("tdp_mmu_zap_wq", self.workers, move |&root: &u32| {
            if let Some(mmu) = mmu.upgrade() {
                Self::work(&mmu, root, &meters);
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
        self.queue.get().map(WorkQueue::queue_ns)
    }

    fn take_worker_reports(&self) -> Vec<WorkerReport> {
        std::mem::take(&mut self.meters.lock().unwrap_or_else(PoisonError::into_inner))
    }
}
