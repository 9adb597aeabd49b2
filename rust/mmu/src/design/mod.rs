//! Zap designs: who owns the first reference, what the last put does, what an invalidation queues, what a fast zap waits for.
//!
//! **Guarantee asked of a sound design** (P-FZ): when [`ZapDesign::finish`] returns, no present SPTE is left under any root that was valid when the fast zap began.
//! (P-1): each valid -> invalid transition creates one obligation, to zap and to put, with exactly one reference. (P-RCH): while a zap may
//! give up mmu_lock, its root is listed with a count above zero, so that a notifier reaches the SPTEs too.
//!
//! **Mechanism.** A design is a `&dyn`, called per root, never per entry. The engine calls it at six places; each design's file
//! reads like its state machine. To write one more, from outside this crate too: implement
//! [`ZapDesign`], tell [`register`] (`docs/designs.md`).
//!
//! ```text
//! fast zap (slots_lock held)          unload / worker                    VM destruction
//!   write lock
//!     invalidate()                      put: refs -> 0: last_put()         drain()
//!     (request: reload, wait)
//!     in_lock()
//!   unlock
//!   finish()
//! ```

mod async_worker;
mod async_worker_owned;
mod defunct_flag;
mod in_place;
mod inline;
mod list;
mod no_second_phase;
mod queue;
mod registry;
mod second_list;
mod second_list_worker;
mod sync;
mod system_workqueue;

use std::sync::Weak;

use tdpmmu_platform::{Event, Exclusive, Guard, Histogram, Moment, Platform, Shared, Site, Task};
use tdpmmu_spte::{KernelProfile, Passes};

pub use async_worker::AsyncWorker;
pub use async_worker_owned::AsyncWorkerOwned;
pub use defunct_flag::DefunctFlag;
pub use in_place::InPlace;
pub use inline::Inline;
pub use list::{DESIGNS, DesignInfo, Obligations, OtherOwnership};
pub use no_second_phase::NoSecondPhase;
pub use queue::ZapQueue;
pub use registry::{RegisterError, UnknownDesign, build, info, names, register};
pub use second_list::SecondList;
pub use second_list_worker::SecondListWorker;
pub use sync::Sync;
pub use system_workqueue::SystemWorkqueue;

use crate::TdpMmu;
use crate::walk::Yield;

/// Whose queue the workers of a design serve.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum QueueKind {
    /// The VM's own (`alloc_workqueue`): drained before the VM goes.
    PerVm,
    /// The system's, shared by all VMs of the process: each item holds a user reference of its VM.
    System,
}

impl QueueKind {
    /// Both.
    pub const ALL: [Self; 2] = [Self::PerVm, Self::System];

    /// Its name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            QueueKind::PerVm => "per-vm",
            QueueKind::System => "system",
        }
    }

    /// The kind of that name.
    ///
    /// # Errors
    /// The name, when there is no such kind.
    pub fn parse(name: &str) -> Result<Self, UnknownQueue> {
        Self::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownQueue(name.to_owned()))
    }
}

/// No kind of queue has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("worker_queue={0:?}: expected {known}", known = QueueKind::ALL.map(QueueKind::name).join(" or "))]
pub struct UnknownQueue(pub String);

/// What a design is built with; designs without workers ignore it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DesignOptions {
    /// Worker threads, at least 1. (The kernel's queues are unbound: as many as there are items and CPUs.)
    pub workers: usize,
    /// CPUs that workers are bound to, worker n to the n-th, round and round; empty: not bound, they run where the process may, whatever thread makes the VM.
    pub worker_cpus: Vec<usize>,
    /// Whose queue; `None`: the design's own kind.
    pub queue: Option<QueueKind>,
}

impl Default for DesignOptions {
    fn default() -> Self {
        Self { workers: 1, worker_cpus: Vec::new(), queue: None }
    }
}

/// A CPU that workers are to be bound to, and may not.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("worker CPU {cpu}: {}", Self::RULE)]
pub struct WorkerCpuError {
    /// Its number.
    pub cpu: usize,
}

impl WorkerCpuError {
    /// What it is not.
    pub const RULE: &'static str = "a CPU that this process, or the thread that makes the VM, may run on";
}

/// Checks [`DesignOptions::worker_cpus`]; on a platform that does not tell its CPUs there is nothing to check.
///
/// # Errors
/// [`WorkerCpuError`] with the first CPU that breaks its rule.
pub fn check_worker_cpus<P: Platform>(cpus: &[usize]) -> Result<(), WorkerCpuError> {
    let (process, thread) = (P::process_cpus(), P::cpus());
    let known = !process.is_empty() || !thread.is_empty();
    let refused = cpus.iter().find(|cpu| known && !process.contains(cpu) && !thread.contains(cpu));
    refused.map_or(Ok(()), |&cpu| Err(WorkerCpuError { cpu }))
}

/// How the caller of a put holds mmu_lock.
pub enum Held<'g, 'a, P: Platform> {
    /// Not at all. Where the MMU owns a reference a put needs no lock (6.9); elsewhere [`TdpMmu::put_root`] takes it.
    No,
    /// Shared.
    Shared(&'g mut Guard<'a, P, Shared>),
    /// Exclusive.
    Exclusive(&'g mut Guard<'a, P, Exclusive>),
}

impl<P: Platform> Held<'_, '_, P> {
    /// Empties `root` under the caller's lock, or under the shared one.
    pub fn zap(&mut self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, yields: Yield) {
        match self {
            Held::Shared(guard) => mmu.zap_root(guard, root, yields),
            Held::Exclusive(guard) => mmu.zap_root(guard, root, yields),
            Held::No => mmu.zap_root(&mut mmu.lock.read(task), root, yields),
        }
    }
}

impl<'g, 'a, P: Platform> From<&'g mut Guard<'a, P, Shared>> for Held<'g, 'a, P> {
    fn from(guard: &'g mut Guard<'a, P, Shared>) -> Self {
        Held::Shared(guard)
    }
}

impl<'g, 'a, P: Platform> From<&'g mut Guard<'a, P, Exclusive>> for Held<'g, 'a, P> {
    fn from(guard: &'g mut Guard<'a, P, Exclusive>) -> Self {
        Held::Exclusive(guard)
    }
}

/// A zap design. See the module text for the obligations.
pub trait ZapDesign<P: Platform>: Send + std::marker::Sync {
    /// Its name on the command line.
    fn name(&self) -> &'static str;

    /// The workers' queue of a design that has one; what follows from it (`attach`, `quiesce`, measurements) is done by the methods below.
    fn queue(&self) -> Option<&ZapQueue<P>> {
        None
    }

    /// Called once, before anything else: the place to start workers.
    ///
    /// # Errors
    /// What the host says when a thread cannot be started.
    fn attach(&self, mmu: Weak<TdpMmu<P>>) -> std::io::Result<()> {
        self.queue().map_or(Ok(()), |queue| queue.attach(mmu))
    }

    /// The last reference of `root` is gone; `held` is how the caller holds mmu_lock.
    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, held: Held<'_, '_, P>);

    /// A fast zap begins: make every valid root unusable and take on the obligations.
    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>);

    /// Still in the exclusive hold, after every vCPU was asked to reload.
    fn in_lock(&self, _mmu: &TdpMmu<P>, _guard: &mut Guard<'_, P, Exclusive>) {}

    /// After the unlock: returns when P-FZ holds.
    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>);

    /// Waits until everything that is queued has been done; what nobody queued is nobody's business here. Unlike
    /// [`ZapDesign::finish`] it may be called at any time: it takes on no obligation of a fast zap.
    fn quiesce(&self) {
        if let Some(queue) = self.queue() {
            queue.flush();
        }
    }

    /// The VM goes away, no vCPU holds a root any more: leaves no root and no worker behind.
    fn drain(&self, mmu: &TdpMmu<P>, task: &Task<P>);

    /// Time from queueing to start of work items, for designs that have a queue.
    fn queue_ns(&self) -> Option<Histogram> {
        self.queue().map(ZapQueue::queue_ns)
    }

    /// What each worker has measured since the last call; waits until the queue is empty.
    fn take_worker_reports(&self) -> Vec<WorkerReport> {
        self.queue().map_or_else(Vec::new, ZapQueue::take_worker_reports)
    }
}

/// What one worker has done.
pub struct WorkerReport {
    /// The worker's task.
    pub name: String,
    /// Its measurements.
    pub meter: tdpmmu_platform::MeterSnapshot,
    /// CPU time of its items in ns: looking for work and answering for reports is none of it.
    pub cpu_ns: u64,
}

impl<P: Platform> TdpMmu<P> {
    /// Reports that the zap of `root` has been promised: once in its life, at the transition from valid to invalid (P-1).
    pub fn note_scheduled(&self, task: &Task<P>, root: u32) {
        P::point(Site::RootSchedule);
        task.mark(Moment::RootSchedule, root);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::RootSchedule { root });
        }
    }

    /// Returns when every hold of mmu_lock that was under way has ended: whoever had unlinked a subtree has emptied it by then.
    pub fn await_holders(&self, task: &Task<P>) {
        drop(self.lock.write(task));
    }
}

/// The passes that a run uses: what was asked for, else the design's historic ones, else the profile's.
pub fn effective_passes(asked: Option<Passes>, design: &DesignInfo, profile: &KernelProfile) -> Passes {
    asked.or(design.passes).unwrap_or(profile.passes)
}
