//! The values that the switches of a [`KernelProfile`](crate::KernelProfile) can take, each with its spelling.

use crate::make::RemakeDirty;
use crate::passes::Passes;
use crate::role::RoleLayout;

/// A value that can be written in `--profile NAME,switch=value`.
pub trait SwitchValue: Sized + PartialEq {
    /// From its spelling.
    fn parse(text: &str) -> Option<Self>;
    /// Its spelling.
    fn text(&self) -> String;
    /// What may be written, for the error.
    fn choices() -> String;
}

/// An enum whose variants have spellings.
macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum $name { $($(#[$vdoc])* $variant),+ }
        spelled!($name { $($variant = $text),+ });
    };
}

/// The spellings of an enum.
macro_rules! spelled {
    ($name:ident { $($variant:ident = $text:literal),+ }) => {
        impl SwitchValue for $name {
            fn parse(text: &str) -> Option<$name> {
                match text { $($text => Some($name::$variant),)+ _ => None }
            }
            fn text(&self) -> String {
                match self { $($name::$variant => $text),+ }.to_owned()
            }
            fn choices() -> String {
                [$($text),+].join(", ")
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(match self { $($name::$variant => $text),+ })
            }
        }
    };
}

choice! {
    /// Who owns a new root's first reference.
    Ownership {
        /// The vCPU that allocates it: its last vCPU tears it down.
        Vcpu = "vcpu",
        /// The MMU has one beside the vCPU's: a root lives until it is invalidated.
        Mmu = "mmu",
    }
}
choice! {
    /// Mode in which mmu_lock is held.
    LockMode {
        /// For writing (a spinlock in 5.10).
        Exclusive = "exclusive",
        /// For reading.
        Shared = "shared",
    }
}
choice! {
    /// Where bookkeeping stands in the atomic zap (freeze, flush, store empty).
    AtomicZapOrder {
        /// Before the flush, with the frozen value as the new one.
        BookkeepingBeforeFlush = "before-flush",
        /// After flush and empty store: others wait less on the frozen entry.
        AfterFlush = "after-flush",
    }
}
choice! {
    /// What disabling dirty logging does to tables that could be huge leafs.
    Collapse {
        /// Zaps each small leaf; a later fault replaces the empty table.
        ZapLeaf = "zap-leaf",
        /// Zaps the table: freeze, flush, empty.
        ZapFreeze = "zap-freeze",
        /// Replaces the table by the huge leaf.
        RecoverInPlace = "recover",
    }
}
choice! {
    /// What a fault does that needs a table where a huge leaf is.
    SplitInFault {
        /// Zaps the leaf atomically, then links an empty table.
        ZapThenLink = "zap-then-link",
        /// Replaces it by a table with 512 equivalent children.
        Split = "split",
    }
}
choice! {
    /// When the host page hears that the guest accessed or wrote it.
    WriteBack {
        /// When the leaf loses the bit or goes away.
        AtZap = "at-zap",
        /// When the leaf is made.
        AtCreation = "at-creation",
    }
}
choice! {
    /// What aging holds.
    Aging {
        /// The exclusive mmu_lock.
        WriteLock = "write-lock",
        /// Only an RCU section; its compare-exchange may fail.
        LocklessRcu = "lockless-rcu",
    }
}
choice! {
    /// How aging takes the Accessed bit of a leaf.
    AgingWrite {
        /// A value computed from the snapshot, through the exclusive set path (without the lock: as `cmpxchg`).
        SetPath = "set-path",
        /// An atomic AND; under the exclusive lock a plain store if the leaf is not volatile. Without the lock it must be certain that no
        /// other entry has the bit, the frozen value included.
        And = "and",
        /// A compare-exchange of a leaf that is looked at again each time it is lost.
        CompareExchange = "cmpxchg",
    }
}
choice! {
    /// What NX recovery zaps for one table.
    NxZap {
        /// Every entry of its gfns, under all roots of its address space.
        Range = "range",
        /// The one entry that links it.
        Entry = "entry",
    }
}
choice! {
    /// Which roots a walk visits.
    RootSet {
        /// Invalidated ones too.
        All = "all",
        /// Valid ones only.
        Valid = "valid",
    }
}
choice! {
    /// Where CLEAR decides between clearing D and clearing W.
    DirtyOrWrite {
        /// By each entry's A/D mode.
        PerSpte = "per-spte",
        /// Once, by the root's role.
        PerRoot = "per-root",
    }
}
choice! {
    /// How clearing of dirty bits for a chunk of 64 pages writes an entry.
    ClearDirty {
        /// A value computed from the snapshot, through the exclusive set path with all its bookkeeping.
        SetPath = "set-path",
        /// An atomic AND (plain store if not volatile), traced by itself.
        AtomicAnd = "atomic-and",
    }
}
choice! {
    /// Splitting huge leafs ahead of dirty logging.
    EagerSplit {
        /// Does not exist.
        None = "none",
        /// Allocates under the lock without waiting, drops the lock only if that fails.
        NowaitFirst = "nowait-first",
        /// Always drops the lock to allocate.
        AlwaysUnlock = "always-unlock",
    }
}
choice! {
    /// What is flushed after a fault replaced a table by a huge leaf.
    ReplaceFlushSpan {
        /// The whole span of the table that contains the entry: 512 times too much.
        ContainingTable = "containing-table",
        /// The entry's own span.
        Entry = "entry",
    }
}
choice! {
    /// How the holder of the exclusive lock writes a leaf.
    ExclusiveWrite {
        /// Always by a plain store: can lose A, D or W.
        Store = "store",
        /// By an exchange where the leaf is volatile.
        SwapVolatile = "swap-volatile",
    }
}
choice! {
    /// When a changed entry marks its gfn dirty in the slot (beside what a fault marks).
    MarkDirty {
        /// On every change that grants W at level 1.
        Always = "always",
        /// Only on those under the exclusive lock.
        ExclusiveOnly = "exclusive-only",
        /// Never: the maker of the entry does.
        Never = "never",
    }
}
choice! {
    /// How an iterator goes on after it dropped the lock.
    YieldStyle {
        /// Walks again to where it was, then advances: can skip an entry (bug-history 2).
        Refresh = "refresh",
        /// Restarts inside the reschedule check; `continue` then advances (bug-history 3, up to 5.15).
        Restart = "restart",
        /// Marks itself yielded, and the next advance restarts.
        Flag = "flag",
    }
}
choice! {
    /// When a removed table's memory is freed.
    Grace {
        /// At once, after a flush, under the spinlock.
        Immediate = "immediate",
        /// By RCU, after a flush of the table's range.
        FlushThenRcu = "flush-then-rcu",
        /// By RCU; the flush is the caller's debt.
        Rcu = "rcu",
    }
}
choice! {
    /// In which unit a fault compares itself with a running notification.
    NotifierUnit {
        /// Host virtual addresses.
        Hva = "hva",
        /// Guest frame numbers.
        Gfn = "gfn",
    }
}

spelled!(RemakeDirty { SkipWhenOldWritable = "skip-when-old-writable", AlwaysSet = "always-set" });
spelled!(RoleLayout { Access3 = "access3", Access4 = "access4" });

impl SwitchValue for bool {
    fn parse(text: &str) -> Option<bool> {
        match text {
            "on" | "true" | "yes" | "1" => Some(true),
            "off" | "false" | "no" | "0" => Some(false),
            _ => None,
        }
    }

    fn text(&self) -> String {
        if *self { "on" } else { "off" }.to_owned()
    }

    fn choices() -> String {
        "on, off".to_owned()
    }
}

impl SwitchValue for u64 {
    fn parse(text: &str) -> Option<u64> {
        match text.strip_prefix("0x") {
            // A sign is no digit, though the standard parser takes one.
            Some(hex) if !hex.starts_with('+') => u64::from_str_radix(hex, 16).ok(),
            None if !text.starts_with('+') => text.parse().ok(),
            _ => None,
        }
    }

    fn text(&self) -> String {
        format!("{self:#x}")
    }

    fn choices() -> String {
        "a 64-bit number, 0x for hex".to_owned()
    }
}

impl SwitchValue for Passes {
    fn parse(text: &str) -> Option<Passes> {
        Passes::parse(text).ok()
    }

    fn text(&self) -> String {
        self.to_string().replace(',', "+")
    }

    fn choices() -> String {
        "rising levels joined by +, ending in root: 4K+2M+1G+root".to_owned()
    }
}

/// The name of a zap design.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct DesignName(pub &'static str);

impl SwitchValue for DesignName {
    fn parse(text: &str) -> Option<DesignName> {
        crate::profile::DESIGNS.iter().find(|d| **d == text).map(|d| DesignName(d))
    }

    fn text(&self) -> String {
        self.0.to_owned()
    }

    fn choices() -> String {
        crate::profile::DESIGNS.join(", ")
    }
}
