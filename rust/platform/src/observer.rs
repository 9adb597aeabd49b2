//! Observers: oracles, statistics, Perfetto and conform listen here.
//!
//! The choke point for SPTE changes, the root lifecycle, the locks and RCU report what they did. With no observer
//! a report costs one predictable branch: the event is built only once somebody is known to listen.
//! An observer is called with locks held and inside RCU sections: it must not call back into the MMU, nor sleep.
//!
//! Some reports lie on paths that a nanosecond matters to (each read section, each guest entry, each translation that is cached or used, each
//! reschedule check). These are made only for an observer that says so: [`Observer::wants_detail`].

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

/// The locks above and below mmu_lock, by class, for who checks their order. mmu_lock itself is told by [`Event::Lock`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum LockClass {
    /// kvm->slots_lock.
    Slots,
    /// The host's mmap_lock.
    Mmap,
    /// The lock of root list and NX list.
    Pages,
    /// A work queue's own.
    Queue,
    /// mmu_lock; never told as a class.
    Mmu,
}

impl LockClass {
    /// Its name in reports.
    pub const fn name(self) -> &'static str {
        match self {
            LockClass::Slots => "slots_lock",
            LockClass::Mmap => "mmap_lock",
            LockClass::Pages => "pages_lock",
            LockClass::Queue => "queue lock",
            LockClass::Mmu => "mmu_lock",
        }
    }
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
    /// An entry that held `old` was frozen for a change that is told, as `SpteChanged`, only when it is complete and flushed.
    SpteFrozen {
        as_id: u8,
        root: u32,
        gfn: u64,
        level: u8,
        old: u64,
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
    /// Released host frames `pfn .. pfn + count`, each with its owner's tag, may be re-issued from here on.
    FrameRelease {
        pfn: u64,
        count: u64,
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

    /// The task asks for a flush of gfns `start..end` (everything when `end` is `u64::MAX`): what changed before this is covered by it.
    FlushBegin {
        start: u64,
        end: u64,
    },
    /// The flush that the task asked for last has been delivered everywhere.
    FlushEnd {
        start: u64,
        end: u64,
    },
    /// The invalidation of gfns `start..end` holds faults off from here on; told with mmu_lock held exclusive.
    NotifierActive {
        start: u64,
        end: u64,
    },
    /// The host's change is complete: who looks a page up from here on finds the new state. Told with mmu_lock held exclusive, before the
    /// sequence moves.
    NotifierEnding {
        start: u64,
        end: u64,
    },
    /// A fault has sampled the notifier's sequence and is about to ask the host for the page of `gfn`.
    LookUp {
        as_id: u8,
        gfn: u64,
    },
    /// The host's answer to the task's last look-up: the frame of `gfn` and the level that may be mapped at most.
    Resolved {
        as_id: u8,
        gfn: u64,
        pfn: u64,
        level: u8,
    },
    /// The fault begins again from the start.
    FaultRetry {
        as_id: u8,
        gfn: u64,
    },
    /// A write-back or a guest's access reached frame `pfn` (with the tag that the mapping was made for), which belongs to somebody else by now.
    FrameStale {
        pfn: u64,
        what: &'static str,
    },
    /// Dirty (or else Accessed) of SPTEs that mapped `pfn .. pfn + count` has reached the host.
    WriteBack {
        pfn: u64,
        count: u64,
        dirty: bool,
    },
    /// Gfns `start..end` are logged from here on: the call that turned it on is about to return. `all_set`: every page counts as dirty.
    LogBegin {
        as_id: u8,
        start: u64,
        end: u64,
        all_set: bool,
    },
    /// Gfns `start..end` are logged no more: logging was turned off, or the slot is going.
    LogEnd {
        as_id: u8,
        start: u64,
        end: u64,
    },
    /// The log (bitmap or ring) knows that `gfn` is dirty.
    DirtyMark {
        as_id: u8,
        gfn: u64,
    },
    /// The marks `base + n` of each bit n of `mask` were taken from the log, for the report of this task.
    DirtyTake {
        as_id: u8,
        base: u64,
        mask: u64,
    },
    /// The call that took marks of gfns `start..end` is about to return what it took.
    LogReturn {
        as_id: u8,
        start: u64,
        end: u64,
    },
    /// `gfn` is not to be written without the slow path having been asked: write protection of leaves of `level` and above is about to return.
    WriteProtected {
        as_id: u8,
        gfn: u64,
        level: u8,
    },
    /// `table` became a candidate of the NX recovery; told under pages_lock.
    NxListed {
        table: u32,
    },
    /// `table` is no candidate any more; told under pages_lock.
    NxUnlisted {
        table: u32,
    },
    /// A set of memslots in which gfns `start..end` are INVALID (`going`), or have settled again, is seen by all.
    SlotPublish {
        as_id: u8,
        start: u64,
        end: u64,
        going: bool,
    },
    /// A VM with so many vCPUs; `writes_back`: Dirty and Accessed reach the host when SPTEs are removed.
    VmBegin {
        vcpus: u32,
        writes_back: bool,
    },
    /// No vCPU runs any more, nor ever will: no flush is owed from here on.
    VmEnd,
    /// The VM's tables are gone: nobody may work on them from here on.
    VmGone,
    /// User references of the VM (kvm->users_count) after a change.
    Users {
        users: u32,
    },

    /// The shadow MMU made a page of `gfn` (of the guest's table, or of what a direct page covers) and hashed it; `role` is raw. Its life ends with `TableFree`.
    ShadowAlloc {
        table: u32,
        as_id: u8,
        gfn: u64,
        role: u32,
        level: u8,
    },
    /// Shadow page `child` became reachable through entry `index` of `parent`.
    ShadowLink {
        parent: u32,
        index: u16,
        child: u32,
    },
    /// Entry `index` of `parent` names `child` no more.
    ShadowUnlink {
        parent: u32,
        index: u16,
        child: u32,
    },
    /// A leaf of the shadow MMU at entry `index` of `table`, the translation of `gfn`, went from `old` to `new`.
    ShadowLeaf {
        as_id: u8,
        table: u32,
        index: u16,
        gfn: u64,
        level: u8,
        old: u64,
        new: u64,
    },
    /// Shadow page `table` is prepared: its entries are gone, it is in no hash, and role.invalid is set.
    ShadowZap {
        table: u32,
    },
    /// Shadow page `table` is handed to reclamation, after the flush.
    ShadowFree {
        table: u32,
    },
    /// The shadow MMU's generation is `generation` from here on: pages of another one are obsolete.
    ShadowToggle {
        generation: u32,
    },
    /// References of vCPUs on shadow page `root` as a root, after a change.
    ShadowRoot {
        root: u32,
        count: u32,
    },
    /// The guest may write the table that `table` shadows without our being told (`on`), or may not any more.
    ShadowUnsync {
        table: u32,
        on: bool,
    },

    /// Detail: the task's outermost RCU read section has begun.
    RcuEnter,
    /// Detail: the task's outermost RCU read section is about to end.
    RcuLeave,
    /// Detail: a reschedule check of a walk.
    YieldCheck,
    /// Detail: the task is about to do what might sleep.
    MightSleep {
        what: &'static str,
    },
    /// Detail: what only RCU (or mmu_lock, held exclusive) keeps alive is read.
    RcuRead {
        what: &'static str,
    },
    /// Detail: a lock of this class was taken.
    Acquire {
        lock: LockClass,
        shared: bool,
    },
    /// Detail: a lock of this class is about to be released.
    Release {
        lock: LockClass,
    },
    /// Detail: the vCPU is in the guest, on `root`, with no request pending.
    GuestEnter {
        vcpu: u32,
        root: u32,
    },
    /// Detail: the vCPU uses no translation any more until its next entry.
    GuestExit {
        vcpu: u32,
    },
    /// Detail: the vCPU has emptied its translation caches.
    TlbFlush {
        vcpu: u32,
    },
    /// Detail: the vCPU has dropped what was tagged with `root`, as it loads it.
    TlbFlushRoot {
        vcpu: u32,
        root: u32,
    },
    /// Detail: the vCPU has cached the leaf `spte` as the translation of `gfn`.
    TlbFill {
        vcpu: u32,
        root: u32,
        gfn: u64,
        level: u8,
        spte: u64,
    },
    /// Detail: the vCPU's walker has cached `table` as the table of `level` on the path to `gfn`, and is about to read it.
    StructureFill {
        vcpu: u32,
        root: u32,
        gfn: u64,
        level: u8,
        table: u32,
    },
    /// Detail: the vCPU's walker begins at `table`, which it has cached.
    StructureUse {
        vcpu: u32,
        root: u32,
        gfn: u64,
        level: u8,
        table: u32,
    },
    /// Detail: a guest's access to `gfn` has gone through to frame `pfn`.
    GuestAccess {
        vcpu: u32,
        as_id: u8,
        root: u32,
        gfn: u64,
        pfn: u64,
        write: bool,
    },
    /// Detail: the vCPU is in READING_SHADOW_PAGE_TABLES from here on.
    ReadingBegin {
        vcpu: u32,
    },
    /// Detail: the vCPU's lockless walk is over; told before the mode says so.
    ReadingEnd {
        vcpu: u32,
    },
    /// Detail: a lockless walk of shadow pages stands on `table`, and is about to read an entry of it.
    ShadowWalked {
        table: u32,
    },
    /// Detail: a leaf in `table` gained bits without mmu_lock: Accessed and Dirty by hardware, W or an access by the fast page fault.
    SpteMarked {
        root: u32,
        table: u32,
        gfn: u64,
        level: u8,
        old: u64,
        new: u64,
    },
}

/// Listens to what the MMU does. `task` is the id of the reporting task, [`NO_TASK`] where there is none.
pub trait Observer: Send + Sync {
    /// Called at the event, in the reporting thread.
    fn event(&self, task: u32, event: &Event);

    /// Are the reports marked "Detail" wanted too? Asked once, when a task or a VM is made: read sections then take their slower path.
    fn wants_detail(&self) -> bool {
        false
    }
}

/// The task id of reports that come from no task (the RCU thread).
pub const NO_TASK: u32 = u32::MAX;
