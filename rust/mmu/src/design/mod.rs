//! Zap designs: who owns the first reference, what the last put does, what an invalidation queues, what a fast zap waits for.
//!
//! **Guarantee asked of a sound design** (P-FZ): when [`ZapDesign::finish`] returns, no present SPTE is left under any root that was valid when the fast zap began.
//! (P-1): each valid -> invalid transition creates one obligation, to zap and to put, with exactly one reference. (P-RCH): while a zap may
//! give up mmu_lock, its root is listed with a count above zero, so that a notifier reaches the SPTEs too.
//!
//! **Mechanism.** A design is a `&dyn`, called per root, never per entry. The engine calls it at six places; each design's file
//! reads like its state machine. To write one more: implement [`ZapDesign`], add a row to [`DESIGNS`].
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
mod inline;
mod sync;

use std::sync::{Arc, Weak};

use tdpmmu_platform::{Exclusive, Guard, Platform, Shared, Task};
use tdpmmu_spte::{KernelProfile, Ownership, Passes};

pub use async_worker::AsyncWorker;
pub use inline::Inline;
pub use sync::Sync;

use crate::TdpMmu;

/// How the caller of a put holds mmu_lock.
pub enum Held<'g, 'a, P: Platform> {
    /// Not at all (root put needs no lock since 6.9).
    No,
    /// Shared.
    Shared(&'g mut Guard<'a, P, Shared>),
    /// Exclusive.
    Exclusive(&'g mut Guard<'a, P, Exclusive>),
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

    /// Called once, before anything else: the place to start workers.
    ///
    /// # Errors
    /// What the host says when a thread cannot be started.
    fn attach(&self, _mmu: Weak<TdpMmu<P>>) -> std::io::Result<()> {
        Ok(())
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
    fn quiesce(&self) {}

    /// The VM goes away, no vCPU holds a root any more: leaves no root and no worker behind.
    fn drain(&self, mmu: &TdpMmu<P>, task: &Task<P>);

    /// Time from queueing to start of work items, for designs that have a queue.
    fn queue_ns(&self) -> Option<tdpmmu_platform::Histogram> {
        None
    }

    /// What each worker has measured since the last call; waits until the queue is empty.
    fn take_worker_reports(&self) -> Vec<WorkerReport> {
        Vec::new()
    }
}

/// What one worker has done.
pub struct WorkerReport {
    /// The worker's task.
    pub name: String,
    /// Its measurements.
    pub meter: tdpmmu_platform::MeterSnapshot,
    /// CPU time of its thread in ns.
    pub cpu_ns: u64,
}

/// What is known about a design before one is built.
#[derive(Clone, Copy, Debug)]
pub struct DesignInfo {
    /// Its name.
    pub name: &'static str,
    /// Kernels that had it.
    pub mainline: &'static str,
    /// One line for tables and help.
    pub summary: &'static str,
    /// Its historic passes; `None`: the kernel profile's.
    pub passes: Option<Passes>,
    /// Who owns the first reference.
    pub ownership: Ownership,
    /// May the ownership be changed, and what does the other one mean?
    pub other_ownership: OtherOwnership,
    /// Zaps an invalid root once and for all: sound only where no fault maps under one (`stale_root_check` of the profile).
    pub needs_stale_root_check: bool,
    /// Wrong on purpose: never part of `all`.
    pub flawed: bool,
}

/// What the other owner of the first reference would mean for a design.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherOwnership {
    /// It makes sense; with the note shown in help.
    Allowed,
    /// It makes no sense, and why.
    Refused(&'static str),
}

/// The designs that exist, oldest first.
pub const DESIGNS: &[DesignInfo] = &[
    DesignInfo {
        name: "inline",
        mainline: "5.13-5.17",
        summary: "the last put zaps in place, unyielding; a fast zap invalidates, then zaps under the shared lock",
        passes: Some(Passes::ROOT),
        ownership: Ownership::Vcpu,
        other_ownership: OtherOwnership::Refused(
            "with a reference of the MMU's own no vCPU ever drops the last one, so nothing would be zapped inline",
        ),
        // What a fault maps after the zap, the last put zaps.
        needs_stale_root_check: false,
        flawed: false,
    },
    DesignInfo {
        name: "async-worker",
        mainline: "5.18-6.3",
        summary: "a per-VM worker zaps; every valid->invalid transition queues once; a fast zap flushes the queue",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Vcpu,
        other_ownership: OtherOwnership::Refused(
            "that is the design async-worker-owned (6.4-6.5), which gifts the MMU's reference to the worker",
        ),
        needs_stale_root_check: true,
        flawed: false,
    },
    DesignInfo {
        name: "sync",
        mainline: "6.6+, 6.1.y stable",
        summary: "the MMU owns a reference; only a fast zap tears down, in the caller, under the shared lock",
        passes: None,
        ownership: Ownership::Mmu,
        other_ownership: OtherOwnership::Refused(
            "nobody would zap a root whose last vCPU reference is dropped: its tables would leak",
        ),
        needs_stale_root_check: true,
        flawed: false,
    },
];

/// Looks a design up by name.
pub fn info(name: &str) -> Option<&'static DesignInfo> {
    DESIGNS.iter().find(|d| d.name == name)
}

/// Builds a design by name; `workers` for those that have a queue.
///
/// # Errors
/// The name, when there is no such design.
pub fn build<P: Platform>(name: &str, workers: usize) -> Result<Arc<dyn ZapDesign<P>>, UnknownDesign> {
    Ok(match name {
        "inline" => Arc::new(Inline),
        "async-worker" => Arc::new(AsyncWorker::new(workers)),
        "sync" => Arc::new(Sync),
        _ => return Err(UnknownDesign(name.to_owned())),
    })
}

/// No design has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("unknown zap design {0:?}; known: {known}", known = DESIGNS.iter().map(|d| d.name).collect::<Vec<_>>().join(", "))]
pub struct UnknownDesign(pub String);

/// The passes that a run uses: what was asked for, else the design's historic ones, else the profile's.
pub fn effective_passes(asked: Option<Passes>, design: &DesignInfo, profile: &KernelProfile) -> Passes {
    asked.or(design.passes).unwrap_or(profile.passes)
}
