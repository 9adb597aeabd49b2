//! Observers: oracles, statistics, Perfetto and conform listen here.
//!
//! The choke point for SPTE changes, the root lifecycle, the locks and RCU report what they did. With no observer
//! a report costs one predictable branch: the event is built only once somebody is known to listen.
//! An observer is called with locks held and inside RCU sections: it must not call back into the MMU, nor sleep.

/// Whom a reference on a root belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Owner {
    /// A vCPU's root cache, current or previous.
    Vcpu,
    /// The MMU itself: the list's own reference (6.4 and later).
    Mmu,
    /// A reference handed to a work item by the invalidation.
    Gift,
    /// A walk over the list of roots.
    Iterator,
    /// A work item that tears down.
    Work,
}

/// What happened. Gfns are guest frame numbers in 4 KiB units, tables and roots are pool indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Event {
    /// One SPTE went from `old` to `new`; `shared` names the mode of mmu_lock.
    SpteChanged {
        as_id: u8,
        root: u32,
        gfn: u64,
        level: u8,
        old: u64,
        new: u64,
        shared: bool,
    },
    TableAlloc {
        table: u32,
        level: u8,
        gfn: u64,
    },
    /// `table` became reachable through entry `index` of `parent`.
    TableLink {
        table: u32,
        parent: u32,
        index: u16,
    },
    TableUnlink {
        table: u32,
        level: u8,
        gfn: u64,
    },
    /// The page went back to the pool.
    TableFree {
        table: u32,
    },
    RootAlloc {
        root: u32,
        role: u32,
        refs: u32,
    },
    RootGet {
        root: u32,
        refs: u32,
        owner: Owner,
    },
    RootPut {
        root: u32,
        refs: u32,
        owner: Owner,
    },
    /// A reference changed hands without a change of the count.
    RootPass {
        root: u32,
        from: Owner,
        to: Owner,
    },
    RootInvalidate {
        root: u32,
    },
    RootSchedule {
        root: u32,
    },
    RootZapBegin {
        root: u32,
    },
    RootZapEnd {
        root: u32,
    },
    RootFree {
        root: u32,
    },
    FastZapBegin,
    FastZapEnd,
    /// mmu_lock was taken.
    Lock {
        shared: bool,
    },
    /// mmu_lock was released; `debt`: a flush was still owed.
    Unlock {
        shared: bool,
        debt: bool,
    },
    /// TLB entries of frames `start..end` were flushed on all vCPUs; everything when `end` is `u64::MAX`.
    Flush {
        as_id: u8,
        start: u64,
        end: u64,
    },
    /// The primary MMU begins to invalidate frames `start..end`.
    NotifierBegin {
        start: u64,
        end: u64,
    },
    NotifierEnd {
        start: u64,
        end: u64,
    },
    /// A released host frame may be re-issued from here on.
    FrameRelease {
        pfn: u64,
    },
    /// A vCPU was kicked.
    Kick {
        vcpu: u32,
    },
    /// A work item started after `waited_ns` in the queue.
    WorkBegin {
        root: u32,
        waited_ns: u64,
    },
    WorkEnd {
        root: u32,
    },
    /// A grace period has waited `ns` for the reader with this id.
    Stall {
        reader: u32,
        ns: u64,
    },
}

/// Listens to what the MMU does. `task` is the id of the reporting task, [`NO_TASK`] where there is none.
pub trait Observer: Send + Sync {
    /// Called at the event, in the reporting thread.
    fn event(&self, task: u32, event: &Event);
}

/// The task id of reports that come from no task (the RCU thread).
pub const NO_TASK: u32 = u32::MAX;
