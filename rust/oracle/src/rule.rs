//! What can be broken: every rule by name, and the oracle that it belongs to.

use std::fmt;

use tdpmmu_platform::Owner;

macro_rules! rules {
    ($($(#[$doc:meta])* $variant:ident = $name:literal in $oracle:literal),+ $(,)?) => {
        /// A rule that an MMU can break. [`Rule::name`] is what result files show.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Rule { $($(#[$doc])* $variant),+ }

        impl Rule {
            /// Every rule.
            pub const ALL: &'static [Rule] = &[$(Rule::$variant),+];

            /// Stable kebab-case name.
            pub const fn name(self) -> &'static str {
                match self { $(Rule::$variant => $name),+ }
            }

            /// The oracle that it belongs to: a name of `bug-history.md` (`O-TLB`, `O-REF`), or, for what only `reliability.md` 3.3 asks for,
            /// one of its kind (`O-MODEL`, `O-LIN`, `O-LOCK`, `O-SEQ`, `O-WORK`).
            pub const fn oracle(self) -> &'static str {
                match self { $(Rule::$variant => $oracle),+ }
            }
        }
    };
}

rules! {
    /// The tree holds what no report accounts for, or lacks what was reported.
    TreeDiffers = "tree-differs" in "O-MODEL",
    /// Reports about one word that no order can join into a history.
    BrokenHistory = "broken-history" in "O-MODEL",
    /// A frozen entry was changed by another than its owner (I8, R1).
    FrozenChanged = "frozen-changed" in "O-INV",
    /// A frozen entry in a live table although nobody is at work.
    FrozenLeft = "frozen-left" in "O-INV",
    /// A present leaf changed its frame (R5).
    LeafMoved = "leaf-moved" in "O-INV",
    /// An entry that cannot be: permission bits, alignment or level (I13).
    MalformedSpte = "malformed-spte" in "O-INV",
    /// One non-present value replaced another for no reason.
    IdleChange = "idle-change" in "O-INV",
    /// Page statistics or table count differ from a recount (I10, O-STAT).
    StatsDiffer = "stats-differ" in "O-STAT",
    /// A table's header does not say where the table is.
    HeaderDiffers = "header-differs" in "O-LIST",
    /// A table handed out while it was in use.
    HandedOutTwice = "handed-out-twice" in "O-LIST",
    /// A table linked twice, or linked without having been allocated.
    LinkedTwice = "linked-twice" in "O-LIST",
    /// A table unlinked twice, or unlinked without having been linked.
    UnlinkedTwice = "unlinked-twice" in "O-LIST",
    /// A page freed twice (I9).
    FreedTwice = "freed-twice" in "O-RCU",
    /// A page freed while it was reachable (I7a).
    FreedWhileLinked = "freed-while-linked" in "O-RCU",
    /// A table linked below one that is gone, and left there.
    UsedAfterUnlink = "used-after-unlink" in "O-LIST",
    /// A table that nobody freed, or that waits for no grace period any more.
    TableLeaked = "table-leaked" in "O-END",
    /// The pool's own counters contradict the reports.
    PoolCount = "pool-count" in "O-END",
    /// A reference was put by a class of owner that holds none (I4, bug-history 21).
    PutByNonOwner = "put-by-non-owner" in "O-REF",
    /// The owners' references do not add up to the count (O-REF).
    RefsDiffer = "refs-differ" in "O-REF",
    /// A count left zero other than by the one legal re-arm (I2).
    Resurrected = "resurrected" in "O-REF",
    /// A report names a root that does not exist.
    UnknownRoot = "unknown-root" in "O-REF",
    /// The root list is not the set of referenced roots (I1, O-LIST).
    ListDiffers = "list-differs" in "O-LIST",
    /// A root was freed while somebody held it.
    FreedReferenced = "freed-referenced" in "O-REF",
    /// A root was freed without having been invalidated, in a design that invalidates first.
    FreedValid = "freed-valid" in "O-REF",
    /// A root was freed with entries in it, or never zapped.
    FreedUnzapped = "freed-unzapped" in "O-REF",
    /// A zap of a root that nobody holds, so that a notifier cannot reach it (P-RCH).
    ZapUnreferenced = "zap-unreferenced" in "O-REF",
    /// valid -> invalid happened twice (I3).
    InvalidatedTwice = "invalidated-twice" in "O-REF",
    /// One transition, two work items (P-1, bug-history 23).
    ScheduledTwice = "scheduled-twice" in "O-REF",
    /// A transition that created no obligation to zap (P-1).
    NeverScheduled = "never-scheduled" in "O-REF",
    /// A present entry was created under a root that was invalid when mmu_lock was taken (I5, bug-history 11).
    CreatedUnderInvalid = "created-under-invalid" in "O-INV",
    /// A fast zap returned with entries present under a root that was there at its begin (I6, P-FZ).
    FastZapLeft = "fast-zap-left" in "O-FZ",
    /// A fast zap returned without the reference put that came with its obligation.
    GiftKept = "gift-kept" in "O-FZ",
    /// Two fast zaps at once: slots_lock was not held; or an end without a begin.
    FastZapOverlap = "fast-zap-overlap" in "O-LOCK",
    /// A root was still there at the end (O-END).
    RootLeaked = "root-leaked" in "O-END",
    /// mmu_lock was released with a TLB flush owed (I14, O-DEBT).
    FlushOwed = "flush-owed" in "O-DEBT",
    /// mmu_lock was released, or an invalidation ended, before a flush for what the task had unmapped under a root that vCPUs may use (O-TLB a).
    FlushMissing = "flush-missing" in "O-TLB",
    /// A flush was told as delivered while a vCPU ran on that had not emptied its TLB since it was asked for.
    FlushUndelivered = "flush-undelivered" in "O-TLB",
    /// A table went back to the pool while a vCPU in the guest had it in its paging-structure cache (O-TLB c).
    FreedWhileCached = "freed-while-cached" in "O-TLB",
    /// A host frame was released while a vCPU in the guest had a translation to it (O-TLB b, I11).
    ReleasedWhileCached = "released-while-cached" in "O-TLB",
    /// A vCPU entered the guest on a root whose page had been another root, with translations of that time (F6).
    StaleTag = "stale-tag" in "O-TLB",
    /// A guest's access reached a frame of somebody else.
    StaleAccess = "stale-access" in "O-TLB",
    /// A hardware walk went through a table that had been freed.
    WalkedFreed = "walked-freed" in "O-TLB",
    /// A host frame was released while an SPTE mapped it (I11, bug-history 13).
    MappedAfterRelease = "mapped-after-release" in "O-TLB",
    /// An RCU section in which a table was unlinked ended before the flush for it (F2, bug-history 7).
    FlushLate = "flush-late" in "O-DEBT",
    /// A table was freed while a read section that had begun before its unlink was open.
    FreedUnderReader = "freed-under-reader" in "O-RCU",
    /// What only RCU keeps alive was read outside of a section (bug-history 6).
    ReadUnprotected = "read-unprotected" in "O-RCU",
    /// Too much work between two reschedule checks (I17).
    StepTooLong = "step-too-long" in "O-PROG",
    /// A fault that begins again and again though nothing has changed (bug-history 29).
    RetryWithoutCause = "retry-without-cause" in "O-PROG",
    /// Too much work in one RCU section without a check that could have ended it (bug-history 20).
    SectionTooLong = "section-too-long" in "O-RCULEN",
    /// Dirty (or W, where that stands for it) was set by hardware or the fast fault, and overwritten unseen (bug-history 14).
    DirtyLost = "dirty-lost" in "O-DIRTY",
    /// A leaf lost its Dirty state, and mmu_lock was released before the host page knew.
    WriteBackMissing = "write-back-missing" in "O-DIRTY",
    /// A write-back reached a frame of somebody else.
    StaleWriteBack = "stale-write-back" in "O-DIRTY",
    /// A guest's write is neither in the log nor was it returned since.
    WriteLost = "write-lost" in "O-DIRTY",
    /// A call that took W or D for the log, or for write protection, returned before the flush (I12, F7).
    WriteUnflushed = "write-unflushed" in "O-DIRTY",
    /// A gfn that was write-protected can be made writable without asking (bug-history 17).
    WriteTrackLeft = "write-track-left" in "O-DIRTY",
    /// An entry that links a table and denies something: hardware applies it to everything below, for ever (bug-history 16).
    TableProtected = "table-protected" in "O-INV",
    /// A fault made a leaf that is larger than the host and the slot allowed, or that maps its gfn elsewhere (bug-history 28).
    MappedElsewhere = "mapped-elsewhere" in "O-INV",
    /// The list of NX candidates holds what it must not, or twice (I15, bug-history 26).
    NxList = "nx-list" in "O-LIST",
    /// A table was unlinked before it was accounted for as linked (bug-history 9).
    UnlinkedEarly = "unlinked-early" in "O-LIST",
    /// A leaf where no memslot is, or beyond what its slot allows.
    SlotDiffers = "slot-differs" in "O-MODEL",
    /// A leaf that maps what the host does not map there.
    HostDiffers = "host-differs" in "O-MODEL",
    /// The answers about one gfn fit no order of the operations.
    NotLinearizable = "not-linearizable" in "O-LIN",
    /// mmu_lock was held in another mode than the change needed.
    WrongLockMode = "wrong-lock-mode" in "O-LOCK",
    /// An SPTE changed in a way that needs mmu_lock, without it.
    ChangedUnlocked = "changed-unlocked" in "O-LOCK",
    /// Locks were taken in an order that another task's order contradicts.
    LockOrder = "lock-order" in "O-LOCK",
    /// What may sleep was done under mmu_lock or inside an RCU section.
    SleptAtomic = "slept-atomic" in "O-LOCK",
    /// A leaf was made from a page that was looked up before an invalidation of it had ended (O-SEQ, reliability x).
    StaleLookUp = "stale-look-up" in "O-SEQ",
    /// A work item ran after its VM was gone.
    WorkAfterEnd = "work-after-end" in "O-WORK",
    /// An item of the system's queue ran without a user reference of its VM.
    WorkUnreferenced = "work-unreferenced" in "O-WORK",
    /// A shadow page lived another life than made, zapped, handed to reclamation, freed.
    ShadowLife = "shadow-life" in "O-LIST",
    /// A shadow page was handed to reclamation without a flush since its zap.
    FreedUnflushed = "freed-unflushed" in "O-TLB",
    /// A zap of all shadow pages gave mmu_lock up before it had come ten pages further.
    ZapProgress = "zap-progress" in "O-PROG",
    /// Reverse maps and shadow leaves are not one to one.
    RmapDiffers = "rmap-differs" in "O-LIST",
    /// A shadow page's list of parents is not the set of entries that name it.
    ParentsDiffer = "parents-differ" in "O-LIST",
    /// Hash, active list and the shadow pages that were told are not one set; or an invalid page is on them.
    PagesDiffer = "pages-differ" in "O-LIST",
    /// An unsync shadow page that a parent does not know of, or that may not be one.
    UnsyncDiffers = "unsync-differs" in "O-LIST",
    /// A gfn that holds a shadowed guest page table can be written without asking.
    TrackedWritable = "tracked-writable" in "O-INV",
    /// The reasons against huge pages of a memslot are not what shadow pages come to.
    LpageDiffers = "lpage-differs" in "O-STAT",
    /// A shadow page refers to a memslot whose books are gone (bug-history 37).
    SlotBooksGone = "slot-books-gone" in "O-RCU",
    /// From a valid root a walk comes to an obsolete or invalid shadow page.
    ObsoleteReachable = "obsolete-reachable" in "O-INV",
    /// The engine itself found an invariant broken.
    Engine = "engine" in "O-INV",
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A set of rules.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RuleSet(u128);

impl RuleSet {
    /// With `rule` in it.
    #[must_use]
    pub const fn with(self, rule: Rule) -> Self {
        Self(self.0 | 1 << rule as u32)
    }

    /// Is `rule` in it?
    pub const fn contains(self, rule: Rule) -> bool {
        self.0 >> rule as u32 & 1 != 0
    }
}

impl FromIterator<Rule> for RuleSet {
    fn from_iter<I: IntoIterator<Item = Rule>>(rules: I) -> Self {
        rules.into_iter().fold(Self::default(), Self::with)
    }
}

const _: () = assert!(Rule::ALL.len() <= 128);

impl Rule {
    /// The rule of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|rule| rule.name() == name)
    }
}

/// Classes of owners, as array indices.
pub(crate) const OWNERS: [Owner; 5] = [Owner::Vcpu, Owner::Mmu, Owner::Gift, Owner::Iterator, Owner::Work];

pub(crate) fn slot(owner: Owner) -> usize {
    match owner {
        Owner::Vcpu => 0,
        Owner::Mmu => 1,
        Owner::Gift => 2,
        Owner::Iterator => 3,
        Owner::Work => 4,
    }
}
