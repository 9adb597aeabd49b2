//! Sites: the places where a schedule may switch.
//!
//! Each access to a shared word and each step of a protocol names its site. The real platform ignores it; the
//! simulated one schedules there, and counts which sites a search has forced, so that a site never forced shows.

macro_rules! sites {
    ($($(#[$doc:meta])* $name:ident),+ $(,)?) => {
        /// A place where a shared word is touched or a schedule may switch.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Site { $($(#[$doc])* $name),+ }

        impl Site {
            /// Every site, in the order of the discriminants.
            pub const ALL: &'static [Site] = &[$(Site::$name),+];

            /// The site's name as it is written in schedules and coverage reports.
            pub const fn name(self) -> &'static str {
                match self { $(Site::$name => stringify!($name)),+ }
            }
        }
    };
}

sites! {
    /// A walk loads an SPTE.
    SpteRead,
    /// A fault or map installs a leaf.
    SpteInstall,
    /// A zap clears an entry.
    SpteZap,
    /// The atomic zap parks an entry at the frozen value.
    SpteFreeze,
    /// The entries of an unlinked table are cleared.
    SpteTeardown,
    /// A new table becomes reachable through its parent entry.
    SptePublish,
    /// Accessed or Dirty is set by the walker or cleared by aging.
    SpteAd,
    /// The fast page fault restores write permission without the lock.
    SpteFast,
    /// A child entry of a split huge leaf is written.
    SpteSplit,
    /// Write protection or dirty clearing of a leaf.
    SpteProtect,
    /// A step of a lockless walk.
    WalkLockless,
    /// The list of roots is read or changed.
    RootList,
    /// A root's reference count changes.
    RootRef,
    /// A root turns invalid.
    RootInvalidate,
    /// A root is marked as scheduled for teardown.
    RootSchedule,
    /// Before an mmu_lock acquisition.
    LockAcquire,
    /// After an mmu_lock release.
    LockRelease,
    /// A reschedule check or a drop-and-retake of mmu_lock.
    LockYield,
    /// An RCU read section begins.
    RcuEnter,
    /// An RCU read section has ended.
    RcuLeave,
    /// A chain of tables is deferred.
    RcuDefer,
    /// A grace period is awaited.
    RcuGrace,
    /// vcpu->mode changes.
    VcpuMode,
    /// A request bit is made or consumed.
    VcpuRequest,
    /// A kick is sent or acknowledged.
    VcpuKick,
    /// The root cache of a vCPU is read or reloaded.
    VcpuRoot,
    /// A TLB is emptied.
    TlbFlush,
    /// A TLB entry is filled or hit.
    TlbAccess,
    /// mmu_invalidate_begin.
    NotifierBegin,
    /// mmu_invalidate_end.
    NotifierEnd,
    /// mmu_invalidate_seq is sampled or compared.
    NotifierSeq,
    /// The fault pipeline asks the primary MMU for a pfn.
    FaultPfn,
    /// The fault pipeline checks for a stale root or sequence.
    FaultStale,
    /// A work item is queued.
    QueueWork,
    /// A work item starts or ends.
    QueueRun,
    /// A flush of the work queue.
    QueueFlush,
    /// A table page is allocated.
    TableAlloc,
    /// A table page is freed.
    TableFree,
    /// A table's metadata is read or changed.
    TableMeta,
    /// slots_lock or the memslot array.
    SlotsLock,
    /// The steps of a fast zap.
    FastZap,
    /// A word of a dirty bitmap.
    DirtyBitmap,
    /// The primary MMU's page tables.
    HostPage,
    /// A sleeping mutex.
    Mutex,
    /// A spinning wait without a better name.
    Spin,
    /// A user reference of the VM, or its being closed.
    Users,
    /// Tables for a fault are allocated.
    AllocFault,
    /// A table for a root is allocated.
    AllocRoot,
    /// A table for a split is allocated.
    AllocSplit,
    /// Tables for a bulk population are allocated.
    AllocBulk,
    /// A memslot's arrays are allocated.
    AllocSlot,
    /// A shadow page is prepared for its end, or an entry of it is cleared.
    ShadowZap,
    /// Zapped shadow pages are handed to reclamation, or come out of it.
    ShadowFree,
    /// A step of a lockless walk of shadow pages.
    ShadowWalk,
    /// An unsync page is compared with the guest's table.
    ShadowSync,
    /// A shadow root is found, made, referenced or put.
    ShadowRoot,
    /// A word of the guest's own memory.
    GuestMemory,
    /// A vCPU's mode turns to READING_SHADOW_PAGE_TABLES, back, or is asked for it.
    ReadingMode,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lists_each_site_at_its_discriminant() {
        for (i, site) in Site::ALL.iter().enumerate() {
            assert_eq!(*site as usize, i);
        }
        let mut names: Vec<_> = Site::ALL.iter().map(|s| s.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Site::ALL.len());
    }
}
