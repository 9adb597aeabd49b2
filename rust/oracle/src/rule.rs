//! What can be broken, and the record of what was.

use std::fmt;

use tdpmmu_mmu::{Obligations, design};
use tdpmmu_platform::Owner;
use tdpmmu_spte::{Format, KernelProfile};

macro_rules! rules {
    ($($(#[$doc:meta])* $variant:ident = $name:literal),+ $(,)?) => {
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
        }
    };
}

rules! {
    /// The tree holds what no report accounts for, or lacks what was reported.
    TreeDiffers = "tree-differs",
    /// Reports about one word that no order can join into a history.
    BrokenHistory = "broken-history",
    /// A frozen entry was changed by another than its owner (I8, R1).
    FrozenChanged = "frozen-changed",
    /// A frozen entry in a live table although nobody is at work.
    FrozenLeft = "frozen-left",
    /// A present leaf changed its frame (R5).
    LeafMoved = "leaf-moved",
    /// An entry that cannot be: permission bits, alignment or level (I13).
    MalformedSpte = "malformed-spte",
    /// One non-present value replaced another for no reason.
    IdleChange = "idle-change",
    /// Page statistics or table count differ from a recount (I10, O-STAT).
    StatsDiffer = "stats-differ",
    /// A table's header does not say where the table is.
    HeaderDiffers = "header-differs",
    /// A table handed out while it was in use.
    HandedOutTwice = "handed-out-twice",
    /// A table linked twice, or linked without having been allocated.
    LinkedTwice = "linked-twice",
    /// A table unlinked twice, or unlinked without having been linked.
    UnlinkedTwice = "unlinked-twice",
    /// A page freed twice (I9).
    FreedTwice = "freed-twice",
    /// A page freed while it was reachable (I7a).
    FreedWhileLinked = "freed-while-linked",
    /// A table linked below one that is gone, and left there.
    UsedAfterUnlink = "used-after-unlink",
    /// A table that nobody freed, or that waits for no grace period any more.
    TableLeaked = "table-leaked",
    /// The pool's own counters contradict the reports.
    PoolCount = "pool-count",
    /// A reference was put by a class of owner that holds none (I4, bug-history 21).
    PutByNonOwner = "put-by-non-owner",
    /// The owners' references do not add up to the count (O-REF).
    RefsDiffer = "refs-differ",
    /// A count left zero other than by the one legal re-arm (I2).
    Resurrected = "resurrected",
    /// A report names a root that does not exist.
    UnknownRoot = "unknown-root",
    /// The root list is not the set of referenced roots (I1, O-LIST).
    ListDiffers = "list-differs",
    /// A root was freed while somebody held it.
    FreedReferenced = "freed-referenced",
    /// A root was freed without having been invalidated, in a design that invalidates first.
    FreedValid = "freed-valid",
    /// A root was freed with entries in it, or never zapped.
    FreedUnzapped = "freed-unzapped",
    /// A zap of a root that nobody holds, so that a notifier cannot reach it (P-RCH).
    ZapUnreferenced = "zap-unreferenced",
    /// valid -> invalid happened twice (I3).
    InvalidatedTwice = "invalidated-twice",
    /// One transition, two work items (P-1, bug-history 23).
    ScheduledTwice = "scheduled-twice",
    /// A transition that created no obligation to zap (P-1).
    NeverScheduled = "never-scheduled",
    /// A present entry was created under a root that was invalid when mmu_lock was taken (I5, bug-history 11).
    CreatedUnderInvalid = "created-under-invalid",
    /// A fast zap returned with entries present under a root that was there at its begin (I6, P-FZ).
    FastZapLeft = "fast-zap-left",
    /// A fast zap returned without the reference put that came with its obligation.
    GiftKept = "gift-kept",
    /// Two fast zaps at once: slots_lock was not held; or an end without a begin.
    FastZapOverlap = "fast-zap-overlap",
    /// A root was still there at the end (O-END).
    RootLeaked = "root-leaked",
    /// mmu_lock was released with a TLB flush owed (I14, O-DEBT).
    FlushOwed = "flush-owed",
    /// The engine itself found an invariant broken.
    Engine = "engine",
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// One broken rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// What was broken.
    pub rule: Rule,
    /// In words, with the values.
    pub what: String,
    /// Who reported the event that showed it; `NO_TASK` at a check.
    pub task: u32,
    /// The root concerned.
    pub root: Option<u32>,
    /// The gfn concerned.
    pub gfn: Option<u64>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.rule, self.what)?;
        if let Some(root) = self.root {
            write!(f, " [root {root}]")?;
        }
        if let Some(gfn) = self.gfn {
            write!(f, " [gfn {gfn:#x}]")?;
        }
        Ok(())
    }
}

/// What the oracles have found so far. All are counted, the first [`Verdict::KEPT`] are kept.
#[derive(Clone, Debug, Default)]
pub struct Verdict {
    task: u32,
    kept: Vec<Violation>,
    count: u64,
}

impl Verdict {
    /// Violations kept in full.
    pub const KEPT: usize = 200;

    /// Who reports from here on.
    pub fn reported_by(&mut self, task: u32) {
        self.task = task;
    }

    /// Notes a broken rule.
    #[cold]
    pub fn broken(&mut self, rule: Rule, root: Option<u32>, gfn: Option<u64>, what: String) {
        self.count += 1;
        if self.kept.len() < Self::KEPT {
            self.kept.push(Violation { rule, what, task: self.task, root, gfn });
        }
    }

    /// The violations kept, oldest first.
    pub fn violations(&self) -> &[Violation] {
        &self.kept
    }

    /// All violations, kept or not.
    pub fn count(&self) -> u64 {
        self.count
    }
}

/// In what the rules of kernels and designs differ.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// The entries' format.
    pub format: Format,
    /// Page statistics are kept.
    pub page_stats: bool,
    /// What the design promises, and which freedoms it takes.
    pub design: Obligations,
}

impl Rules {
    /// The rules of `profile` with `format` under the zap design named `design`. A design that is not known is judged without
    /// any freedom: invalidate first, schedule once, wait for everybody.
    pub fn of(profile: &KernelProfile, format: Format, design: &str) -> Self {
        Self {
            format,
            page_stats: profile.page_stats,
            design: design::info(design).map_or(Obligations::STRICT, |info| info.obligations),
        }
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
