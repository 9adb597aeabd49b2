//! What is known about a design before one is built: the table of designs, and what each may be held to.

use tdpmmu_spte::{Ownership, Passes};

use super::QueueKind;

/// What is known about a design before one is built.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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
    /// It zaps an invalid root once and puts the obligation: a fault that maps under that root later leaks its tables. Only kernels whose faults test for a
    /// stale root (5.16 and later) may have it.
    pub needs_stale_root_check: bool,
    /// Its workers' queue; `None`: it has no workers.
    pub queue: Option<QueueKind>,
    /// What it promises, for a judge.
    pub obligations: Obligations,
    /// Wrong on purpose: never part of `all`, and marked wherever it is named.
    pub flawed: bool,
}

/// What a design promises beyond P-FZ and exact references. Each field names a freedom that some design takes; [`Obligations::STRICT`] takes none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Obligations {
    /// Each valid -> invalid transition schedules its root exactly once, by [`crate::TdpMmu::note_scheduled`] or a queue. False: a
    /// fast zap gives a gift to each root that it meets, and nothing is scheduled.
    pub schedules: bool,
    /// The last put of a valid root zaps it in place, unlisted and unyielding, and frees it without having invalidated it.
    pub last_put_zaps: bool,
    /// A fast zap empties the roots in place and leaves them valid: what it met is gone when it returns, what was mapped meanwhile stays.
    pub keeps_roots: bool,
    /// When a fast zap returns, a root that was invalid before it may still be held by who zaps it: the fast zap has zapped it too.
    pub zapper_outlives: bool,
}

impl Obligations {
    /// No freedom: invalidate first, schedule once, wait for everybody (5.18 and later).
    pub const STRICT: Self =
        Self { schedules: true, last_put_zaps: false, keeps_roots: false, zapper_outlives: false };
}

/// What the other ownership of the first reference means for a design.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OtherOwnership {
    /// It changes the design in a known way.
    Allowed,
    /// It makes no sense; why.
    Refused(&'static str),
}

const NOBODY_PUTS_IT: OtherOwnership = OtherOwnership::Refused(
    "with a reference of the MMU's own no vCPU ever drops the last one, and the fast zap of this design puts none: the root would never be freed",
);
const OWNED_IS_ANOTHER: OtherOwnership = OtherOwnership::Refused(
    "that is the design async-worker-owned (6.4-6.5), which gifts the MMU's reference to the worker",
);
const LEAKS_DROPPED: OtherOwnership = OtherOwnership::Refused(
    "nobody would zap a root whose last vCPU reference is dropped: its tables would leak",
);

/// The designs of this crate, oldest first; [`super::register`] adds others.
pub const DESIGNS: &[DesignInfo] = &[
    DesignInfo {
        name: "in-place",
        mainline: "5.10-5.12",
        summary: "a fast zap empties the valid roots under the exclusive lock, with lock-break; the last put zaps unyielding",
        passes: Some(Passes::ROOT),
        ownership: Ownership::Vcpu,
        other_ownership: NOBODY_PUTS_IT,
        // No root is ever stale: what is mapped late, the last put zaps.
        needs_stale_root_check: false,
        queue: None,
        obligations: Obligations {
            schedules: false,
            last_put_zaps: true,
            keeps_roots: true,
            ..Obligations::STRICT
        },
        flawed: false,
    },
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
        queue: None,
        obligations: Obligations { schedules: false, last_put_zaps: true, ..Obligations::STRICT },
        flawed: false,
    },
    DesignInfo {
        name: "defunct-flag",
        mainline: "v2 (Dec 2021), never merged",
        summary: "the last put zaps inline, yielding, and flags the root as defunct: no gift of a fast zap is on it",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Vcpu,
        other_ownership: NOBODY_PUTS_IT,
        needs_stale_root_check: true,
        queue: None,
        obligations: Obligations { schedules: false, zapper_outlives: true, ..Obligations::STRICT },
        flawed: false,
    },
    DesignInfo {
        name: "system-workqueue",
        mainline: "v3 (Feb 2022), never merged",
        summary: "a system worker zaps what the last put leaves; a fast zap puts a gift on every invalid root, given or not",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Vcpu,
        other_ownership: NOBODY_PUTS_IT,
        needs_stale_root_check: true,
        queue: Some(QueueKind::System),
        obligations: Obligations { schedules: false, zapper_outlives: true, ..Obligations::STRICT },
        flawed: true,
    },
    DesignInfo {
        name: "no-second-phase",
        mainline: "sketch in the v3 thread (Mar 2022)",
        summary: "a system worker zaps every root; a fast zap queues and returns without waiting",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Vcpu,
        other_ownership: NOBODY_PUTS_IT,
        needs_stale_root_check: true,
        queue: Some(QueueKind::System),
        obligations: Obligations::STRICT,
        flawed: true,
    },
    DesignInfo {
        name: "second-list",
        mainline: "v3.5 (Mar 2022), coded and never merged",
        summary: "a fast zap keeps its gifts on a list of its own and zaps that list; the last put zaps inline, yielding",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Vcpu,
        other_ownership: NOBODY_PUTS_IT,
        needs_stale_root_check: true,
        queue: None,
        obligations: Obligations { zapper_outlives: true, ..Obligations::STRICT },
        flawed: false,
    },
    DesignInfo {
        name: "second-list-worker",
        mainline: "idea in the v3 thread (Mar 2022), never merged",
        summary: "one work item a VM serves the list of invalid roots; a fast zap flushes that item",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Vcpu,
        other_ownership: NOBODY_PUTS_IT,
        needs_stale_root_check: true,
        queue: Some(QueueKind::PerVm),
        obligations: Obligations::STRICT,
        flawed: false,
    },
    DesignInfo {
        name: "async-worker",
        mainline: "5.18-6.3",
        summary: "a per-VM worker zaps; every valid->invalid transition queues once; a fast zap flushes the queue",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Vcpu,
        other_ownership: OWNED_IS_ANOTHER,
        needs_stale_root_check: true,
        queue: Some(QueueKind::PerVm),
        obligations: Obligations::STRICT,
        flawed: false,
    },
    DesignInfo {
        name: "async-worker-owned",
        mainline: "6.4-6.5",
        summary: "as async-worker, and the MMU owns a reference: only a fast zap queues, and hands that reference over",
        passes: Some(Passes::ROOT_1G),
        ownership: Ownership::Mmu,
        other_ownership: OtherOwnership::Refused(
            "that is the design async-worker (5.18-6.3): without the MMU's reference a last put must queue",
        ),
        needs_stale_root_check: true,
        queue: Some(QueueKind::PerVm),
        obligations: Obligations::STRICT,
        flawed: false,
    },
    DesignInfo {
        name: "sync",
        mainline: "6.6+, 6.1.y stable",
        summary: "the MMU owns a reference; only a fast zap tears down, in the caller, under the shared lock",
        passes: None,
        ownership: Ownership::Mmu,
        other_ownership: LEAKS_DROPPED,
        needs_stale_root_check: true,
        queue: None,
        obligations: Obligations::STRICT,
        flawed: false,
    },
];
