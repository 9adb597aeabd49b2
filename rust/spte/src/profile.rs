//! What differs between kernels, as one value.
//!
//! # The guarantee
//!
//! A [`KernelProfile`] decides every behaviour in which the modelled kernels differ; code asks the profile, never a
//! version number. `KernelProfile::named("6.12")` is that kernel; `named("6.12,passes=1G+root")` is that kernel with
//! one switch changed, and prints as just that. A profile that could not work (a frozen value that hardware
//! would use, or that is taken for empty) is refused when it is parsed.
//!
//! # How sure
//!
//! *Recorded* kernels are 6.1.176, 6.12.95 and 7.2.13: where a recording shows a switch, it is right. `6.1-async` is
//! that 6.1 rebuilt with 6.1.0's workqueue. 5.10, 5.15, 5.18 and 6.6 are read from sources, or from a changelog where a
//! switch says so; 7.2's locking is read from trees around 6.17, and what no recording of it decides is marked
//! "assumed". Note that 6.1.y is not mainline 6.1: it took the synchronous zap and the MMU-owned reference.
//! 6.9 and 6.18 are put together: 6.9 is 6.6 with the changes that are known to have come with 6.8 and 6.9 (passes, root
//! locks, valid roots only, ranges of gfns), of which the lock of the root free is from memory. 6.18 is 6.12 with what
//! 6.13 to 6.18 changed (creation-time write-back, recovery in place, lockless aging, NX recovery under the shared lock); that
//! its frozen value and its role word are still 6.12's, and that a removed table is told before its children, is assumed:
//! 7.2 is the first kernel recorded otherwise.
//! One encoding is shared by all: bit 11 means present and 0x5a0 is frozen also under 5.10, which had neither; nothing
//! that 5.10 does can tell.
//!
//! # What obeys
//!
//! The engine and the VM read these switches today. Encoding: nonpresent, frozen, role. Roots and zaps: passes, ownership, the name of
//! the design, root-load-lock, root-free-lock, unmap-invalid-roots, invalid-root-owes-flush, children-first, page-stats.
//! Faults: atomic-zap, split-in-fault, replace-flush, remake-dirty, spurious-if-allowed, mark-dirty, fast-page-fault,
//! stale-root-check, write-back. NX: nx-recovery-lock, nx-zap, nx-skips-dirty-slots, nx-adjust-flag-test, nx-flag-before-publish.
//! Notifiers: unmap-frees-tables, notifier-unit, notifier-range-all, zap-range-roots, zap-range-by-space, aging, aging-write, aging-roots, aging-flush,
//! ad-in-software, set-spte-gfn. Prefaults: prefault-retries-invalid-slot. Dirty logging: eager-split, clear-split-inclusive, init-set-protects-huge, clear-dirty-roots, clear-dirty-write,
//! dirty-or-write, protect-gfn-needs-w, collapse. Memslots: slot-zap-quirk.
//!
//! The others are on record only, and changing them changes nothing. Nobody here could tell: level-mismatch-retries (a descent of this
//! engine ends at its goal or retries), write-protected-result (no shadow MMU refuses a write), uninit-lock (what it tears down is
//! empty by then). Done in one way for all: shared faults (fault-lock), RCU (grace), the `yielded` flag (yield), an
//! exchange for volatile leaves (exclusive-write).
//!
//! So 5.10 and 5.15 run here without their plain stores under the exclusive lock, which lose Dirty and Accessed bits; 5.10's spinlock and immediate frees are not
//! built either. What 5.15 does to invalid roots on an unmap (it skips them) and in a fault (it maps under them) is. Up to 5.16 the lockless fault leaves every
//! huge leaf to the slow path; here it leaves only those of slots that log, as since 10c30de01921 (5.17).

use std::fmt;

use crate::format::{Format, FormatKind};
use crate::make::RemakeDirty;
use crate::passes::Passes;
use crate::role::RoleLayout;
use crate::spte::Spte;
use crate::suggest::closest;
use crate::switch::*;

/// Every zap design by name; `rust/mmu/src/design` holds those that exist.
pub const DESIGNS: &[&str] = &[
    "in-place",
    "inline",
    "defunct-flag",
    "system-workqueue",
    "no-second-phase",
    "second-list",
    "second-list-worker",
    "async-worker",
    "async-worker-owned",
    "sync",
    "reap",
    "shadow-walk",
    "shadow-walk-break",
    "shadow-gen-kept",
    "shadow-gen",
    "shadow-slot",
];

/// The struct, and its switches by name.
macro_rules! profile {
    ($($(#[doc = $doc:literal])+ $field:ident: $ty:ty = $text:literal),+ $(,)?) => {
        /// The switches in which kernels differ. Each names its source.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct KernelProfile {
            /// The profile's name without changed switches, as in [`KernelProfile::ALL`].
            pub name: &'static str,
            /// The zap design that the kernel has.
            pub design: &'static str,
            $($(#[doc = $doc])+ pub $field: $ty),+
        }

        impl KernelProfile {
            /// Every switch that `NAME,switch=value` can set.
            pub const SWITCHES: &'static [&'static str] = &["design", $($text),+];

            /// Each switch with what it decides, which kernels have which value, and where that is known from; in the order
            /// of [`KernelProfile::SWITCHES`].
            pub const EXPLAINED: &'static [(&'static str, &'static str)] = &[
                ("design", "Who zaps a dead root, and when: the strategy that the kernel has (see the zap designs)."),
                $(($text, concat!($($doc),+).trim_ascii())),+
            ];

            /// Set the switch `name` from the spelling of its value.
            ///
            /// Errors: no such switch; a value that the switch cannot take.
            pub fn set(&mut self, name: &str, value: &str) -> Result<(), ProfileError> {
                match name {
                    "design" => self.design = read::<DesignName>(name, value)?.0,
                    $($text => self.$field = read::<$ty>(name, value)?,)+
                    _ => return Err(ProfileError::UnknownSwitch {
                        switch: name.to_owned(),
                        closest: closest(name, Self::SWITCHES),
                    }),
                }
                Ok(())
            }

            /// All switches and the spelling of their values, in the order of [`KernelProfile::SWITCHES`].
            pub fn switches(&self) -> Vec<(&'static str, String)> {
                vec![("design", self.design.to_owned()), $(($text, self.$field.text())),+]
            }
        }
    };
}

profile! {
    /// The empty value. 0; bit 63 from 6.10 on (recorded: 6.12, 7.2), so that EPT entries suppress #VE.
    format_nonpresent: u64 = "nonpresent",
    /// The frozen value. 0x5a0 (recorded: 6.1), with bit 63 (recorded: 6.12); 0x1a0 with bit 63 (recorded: 7.2).
    format_frozen: u64 = "frozen",
    /// Fields of the role word (recorded: three access bits in 6.1 and 6.12, four in 7.2).
    role_layout: RoleLayout = "role",
    /// Passes of a root's teardown: root up to 5.17; 1G,root 5.18-6.8 (1b6043e8e584); all levels from 6.9 (8ca983631f3c).
    passes: Passes = "passes",
    /// First reference: the vCPU's; the MMU's too from 6.4 on (edbdb43fc96b; 6.1.y stable took it).
    ownership: Ownership = "ownership",
    /// Mode of mmu_lock in a page fault: spinlock in 5.10, shared from 5.12 on.
    fault_lock: LockMode = "fault-lock",
    /// Removed tables: freed at once (5.10); RCU after a range flush (5.12-5.17); RCU only from 5.18 (bb95dfb9e2df).
    grace: Grace = "grace",
    /// Iterator after a yield: the `yielded` flag since 5.16 (3a0f64de479c).
    yield_style: YieldStyle = "yield",
    /// Leafs under the exclusive lock: plain stores before 5.18 (ba3a6120a4e7).
    exclusive_write: ExclusiveWrite = "exclusive-write",
    /// Atomic zap: bookkeeping after the flush from 6.10 (aca48556c592); 6.13 on has no atomic zap (7.2: moot).
    atomic_zap_order: AtomicZapOrder = "atomic-zap",
    /// Disabling dirty logging: leafs up to 5.18; tables (recorded: 6.1, 6.12); in place from 6.13 (13e2e4f62a4b; recorded: 7.2).
    collapse: Collapse = "collapse",
    /// Fault below a huge leaf: zap and link up to 6.1, split from 6.6 on (recorded: 6.1, 6.12, 7.2).
    split_in_fault: SplitInFault = "split-in-fault",
    /// Eager split: from 5.18 (7c554d8e51a9); 6.12 always drops the lock to allocate (6.1 sources: NOWAIT first).
    eager_split: EagerSplit = "eager-split",
    /// CLEAR in initially-all-set mode splits up to and including its last gfn (6.12 sources; 6.1 excludes it; 7.2 assumed).
    clear_split_inclusive: bool = "clear-split-inclusive",
    /// An initially-all-set log protects huge leafs when it is enabled (5.10); when the pages around them are cleared from 5.14 on (3ad93562093c, from a changelog).
    init_set_protects_huge: bool = "init-set-protects-huge",
    /// Dirty and Accessed reach the host page at zap up to 6.12, at creation from 6.13 (aa85986e7150).
    write_back: WriteBack = "write-back",
    /// Marking gfns dirty in a changed entry's bookkeeping: always up to 5.18; exclusive only in 6.1; not from 6.6 on.
    mark_dirty: MarkDirty = "mark-dirty",
    /// D of an entry re-made over a writable one: skipped up to 6.12, set in 7.2 (recorded in all three).
    remake_dirty: RemakeDirty = "remake-dirty",
    /// A fault on a present leaf that allows the access changes nothing (sources around 6.17; recorded for 7.2 in part).
    spurious_if_allowed: bool = "spurious-if-allowed",
    /// Leaf step at the wrong level: retries (6.12, 50a9ac25985c); warns and goes on before.
    level_mismatch_retries: bool = "level-mismatch-retries",
    /// A write refused by the shadow MMU has a result of its own (6.12), not "emulate".
    write_protected_result: bool = "write-protected-result",
    /// The lockless fast page fault serves TDP entries (5.15 on, from a changelog).
    fast_page_fault: bool = "fast-page-fault",
    /// A fault checks whether its root has been invalidated (5.16 on, a955cad84cda).
    stale_root_check: bool = "stale-root-check",
    /// Aging: under the exclusive lock up to 6.14, without lock from 6.15 (b146a9b34aed).
    aging: Aging = "aging",
    /// Aging of a leaf: the set path up to 6.3 (recorded nowhere; 6.1 sources), AND or store from 6.4 on (6.12 sources). What 6.15 on does without
    /// lock is an AND by its sources, beside a frozen value that has the bit (7.2's is recorded): assumed to look again.
    aging_write: AgingWrite = "aging-write",
    /// Aging asks invalid roots too up to 6.12, only valid ones from 6.13 on (526e609f0567).
    aging_roots: RootSet = "aging-roots",
    /// clear_flush_young flushes what was young: up to 6.12; not from 6.13 on (b9883ee40d7e, from a changelog).
    aging_flush: bool = "aging-flush",
    /// A prefault of a slot that is about to go: retried up to 6.17; given up (EAGAIN) from 6.18 on (3ccbf6f47098, from a changelog).
    prefault_retries_invalid_slot: bool = "prefault-retries-invalid-slot",
    /// An EPT without hardware A/D has the two bits kept by software, from 6.13 on (3835819fb1b3, 53510b912518,
    /// 7971801b5618); before, an entry was accessed unless it was access-tracked.
    ad_in_software: bool = "ad-in-software",
    /// NX recovery: exclusive up to 6.17, shared from 6.18 (a57750909580).
    nx_recovery_lock: LockMode = "nx-recovery-lock",
    /// NX recovery zaps a range up to 5.17, the one entry from 5.18 on (c10743a1824b).
    nx_zap: NxZap = "nx-zap",
    /// NX recovery leaves tables of dirty-logged slots alone (6.12 sources; 6.1 never looks).
    nx_skips_dirty_slots: bool = "nx-skips-dirty-slots",
    /// The step down from a huge mapping under the mitigation looks at the table's own flag (6.12 sources; bug-history 42).
    nx_adjust_flag_test: bool = "nx-adjust-flag-test",
    /// The disallowed flag of a new table is written before it is published (6.2 on, 61f94478547b; bug-history 9, 26).
    nx_flag_before_publish: bool = "nx-flag-before-publish",
    /// Root load: exclusive up to 6.8, shared from 6.9 on.
    root_load_lock: LockMode = "root-load-lock",
    /// A vCPU dropping its roots: exclusive in 6.1, shared for TDP roots in 6.12.
    root_free_lock: LockMode = "root-free-lock",
    /// Destruction of the VM tears invalidated roots down: shared lock up to 6.13, exclusive since mirror roots.
    uninit_lock: LockMode = "uninit-lock",
    /// Clearing dirty bits by mask and write-protecting one gfn visits invalid roots too (6.1 sources; 6.12: valid).
    clear_dirty_roots: RootSet = "clear-dirty-roots",
    /// Write-protecting one gfn stops at an entry that lacks W already and leaves its MMU-writable (up to 5.16); from 5.17 on it takes that too (7c8a4742c4ab).
    protect_gfn_needs_w: bool = "protect-gfn-needs-w",
    /// Write of a cleared dirty bit (6.1 sources: set path; 6.12: atomic AND).
    clear_dirty_write: ClearDirty = "clear-dirty-write",
    /// D or W: by entry in 6.1, by root from 6.9 on (2673dfb591a3).
    dirty_or_write: DirtyOrWrite = "dirty-or-write",
    /// Zapping leafs of a range (kvm_zap_gfn_range): all roots in 6.1, valid ones in 6.12.
    zap_range_roots: RootSet = "zap-range-roots",
    /// Zapping leafs of a range visits one address space after the other (up to 6.5), or all roots in the order of the list (441a5dfcd968, 6.6).
    zap_range_by_space: bool = "zap-range-by-space",
    /// Notifier unmap reaches invalidated roots (5.18 on, d62007edf01f).
    unmap_invalid_roots: bool = "unmap-invalid-roots",
    /// Notifier unmap removes whole tables inside its range (5.10-5.17); leafs only from 5.18 on.
    unmap_frees_tables: bool = "unmap-frees-tables",
    /// Leafs zapped below an invalid root owe a flush (up to 6.8; fcdffe97f80e).
    invalid_root_owes_flush: bool = "invalid-root-owes-flush",
    /// kvm_zap_gfn_range blocks every concurrent fault, not only those in its range (6.1 sources; 5.x assumed alike).
    notifier_range_all: bool = "notifier-range-all",
    /// Unit of the notifier's range: hva in 6.1, gfn in 6.12.
    notifier_unit: NotifierUnit = "notifier-unit",
    /// The change_pte callback exists (up to 6.9, from a changelog; recorded: 6.1 has it, 7.2 not).
    set_spte_gfn: bool = "set-spte-gfn",
    /// Flush after a fault replaced a table (6.1 sources: the containing table; 6.12: the entry).
    replace_flush_span: ReplaceFlushSpan = "replace-flush",
    /// Memslot deletion without fast zap where the quirk is off (6.12, aa8d1f48d353).
    slot_zap_quirk: bool = "slot-zap-quirk",
    /// Removing a table reports its children before the entry itself (recorded: 7.2).
    children_before_parent_events: bool = "children-first",
    /// Per-size counts of leafs are kept (5.15 on, from a changelog).
    page_stats: bool = "page-stats",
}

/// Linux 5.10: TDP MMU under a spinlock.
const V5_10: KernelProfile = KernelProfile {
    name: "5.10",
    design: "in-place",
    format_nonpresent: 0,
    format_frozen: 0x5a0,
    role_layout: RoleLayout::Access3,
    passes: Passes::ROOT,
    ownership: Ownership::Vcpu,
    fault_lock: LockMode::Exclusive,
    grace: Grace::Immediate,
    yield_style: YieldStyle::Refresh,
    exclusive_write: ExclusiveWrite::Store,
    atomic_zap_order: AtomicZapOrder::BookkeepingBeforeFlush,
    collapse: Collapse::ZapLeaf,
    split_in_fault: SplitInFault::ZapThenLink,
    eager_split: EagerSplit::None,
    clear_split_inclusive: false,
    init_set_protects_huge: true,
    write_back: WriteBack::AtZap,
    mark_dirty: MarkDirty::Always,
    remake_dirty: RemakeDirty::SkipWhenOldWritable,
    spurious_if_allowed: false,
    level_mismatch_retries: false,
    write_protected_result: false,
    fast_page_fault: false,
    stale_root_check: false,
    aging: Aging::WriteLock,
    aging_write: AgingWrite::SetPath,
    aging_roots: RootSet::All,
    aging_flush: true,
    prefault_retries_invalid_slot: true,
    ad_in_software: false,
    nx_recovery_lock: LockMode::Exclusive,
    nx_zap: NxZap::Range,
    nx_skips_dirty_slots: false,
    nx_adjust_flag_test: false,
    nx_flag_before_publish: false,
    root_load_lock: LockMode::Exclusive,
    root_free_lock: LockMode::Exclusive,
    uninit_lock: LockMode::Exclusive,
    clear_dirty_roots: RootSet::All,
    protect_gfn_needs_w: true,
    clear_dirty_write: ClearDirty::SetPath,
    dirty_or_write: DirtyOrWrite::PerSpte,
    zap_range_roots: RootSet::All,
    zap_range_by_space: true,
    unmap_invalid_roots: false,
    unmap_frees_tables: true,
    invalid_root_owes_flush: true,
    notifier_range_all: true,
    notifier_unit: NotifierUnit::Hva,
    set_spte_gfn: true,
    replace_flush_span: ReplaceFlushSpan::ContainingTable,
    slot_zap_quirk: false,
    children_before_parent_events: false,
    page_stats: false,
};

/// Linux 5.15: shared lock, RCU, invalidation; the last put tears down.
const V5_15: KernelProfile = KernelProfile {
    name: "5.15",
    design: "inline",
    fault_lock: LockMode::Shared,
    grace: Grace::FlushThenRcu,
    yield_style: YieldStyle::Restart,
    fast_page_fault: true,
    uninit_lock: LockMode::Shared,
    init_set_protects_huge: false,
    page_stats: true,
    ..V5_10
};

/// Linux 5.18: the per-VM worker, two passes.
const V5_18: KernelProfile = KernelProfile {
    name: "5.18",
    design: "async-worker",
    passes: Passes::ROOT_1G,
    grace: Grace::Rcu,
    yield_style: YieldStyle::Flag,
    exclusive_write: ExclusiveWrite::SwapVolatile,
    eager_split: EagerSplit::NowaitFirst,
    stale_root_check: true,
    nx_zap: NxZap::Entry,
    unmap_invalid_roots: true,
    protect_gfn_needs_w: false,
    unmap_frees_tables: false,
    ..V5_15
};

/// Linux 6.1.0: 5.18's worker, a later collapse.
const V6_1_ASYNC: KernelProfile = KernelProfile {
    name: "6.1-async",
    collapse: Collapse::ZapFreeze,
    mark_dirty: MarkDirty::ExclusiveOnly,
    ..V5_18
};

/// Linux 6.1.y stable: zap in the fast-zap task, the MMU owns a reference.
const V6_1: KernelProfile =
    KernelProfile { name: "6.1", design: "sync", ownership: Ownership::Mmu, ..V6_1_ASYNC };

/// Linux 6.6: no worker in mainline either; a fault splits; NX flags before the link; aging and clearing by AND.
const V6_6: KernelProfile = KernelProfile {
    name: "6.6",
    split_in_fault: SplitInFault::Split,
    mark_dirty: MarkDirty::Never,
    level_mismatch_retries: true,
    aging_write: AgingWrite::And,
    nx_skips_dirty_slots: true,
    nx_adjust_flag_test: true,
    nx_flag_before_publish: true,
    clear_dirty_write: ClearDirty::AtomicAnd,
    replace_flush_span: ReplaceFlushSpan::Entry,
    zap_range_by_space: false,
    ..V6_1
};

/// Linux 6.9: four passes, roots loaded and freed under the shared lock, only valid roots for all but unmaps.
const V6_9: KernelProfile = KernelProfile {
    name: "6.9",
    passes: Passes::ALL,
    root_load_lock: LockMode::Shared,
    root_free_lock: LockMode::Shared,
    clear_dirty_roots: RootSet::Valid,
    dirty_or_write: DirtyOrWrite::PerRoot,
    zap_range_roots: RootSet::Valid,
    invalid_root_owes_flush: false,
    notifier_range_all: false,
    notifier_unit: NotifierUnit::Gfn,
    ..V6_6
};

/// Linux 6.12.
const V6_12: KernelProfile = KernelProfile {
    name: "6.12",
    format_nonpresent: Format::BIT63,
    format_frozen: Format::BIT63 | 0x5a0,
    atomic_zap_order: AtomicZapOrder::AfterFlush,
    eager_split: EagerSplit::AlwaysUnlock,
    clear_split_inclusive: true,
    write_protected_result: true,
    set_spte_gfn: false,
    slot_zap_quirk: true,
    ..V6_9
};

/// Linux 6.18: no write-back at zap, collapse in place, aging without the lock, NX recovery under the shared one.
const V6_18: KernelProfile = KernelProfile {
    name: "6.18",
    collapse: Collapse::RecoverInPlace,
    write_back: WriteBack::AtCreation,
    remake_dirty: RemakeDirty::AlwaysSet,
    spurious_if_allowed: true,
    aging: Aging::LocklessRcu,
    aging_write: AgingWrite::CompareExchange,
    aging_roots: RootSet::Valid,
    aging_flush: false,
    prefault_retries_invalid_slot: false,
    ad_in_software: true,
    nx_recovery_lock: LockMode::Shared,
    uninit_lock: LockMode::Exclusive,
    ..V6_12
};

/// Linux 7.2.
const V7_2: KernelProfile = KernelProfile {
    name: "7.2",
    format_frozen: Format::BIT63 | 0x1a0,
    role_layout: RoleLayout::Access4,
    children_before_parent_events: true,
    ..V6_18
};

impl KernelProfile {
    /// All profiles, oldest first.
    pub const ALL: &'static [KernelProfile] =
        &[V5_10, V5_15, V5_18, V6_1_ASYNC, V6_1, V6_6, V6_9, V6_12, V6_18, V7_2];

    /// Their names, oldest first.
    pub const NAMES: &'static [&'static str] =
        &["5.10", "5.15", "5.18", "6.1-async", "6.1", "6.6", "6.9", "6.12", "6.18", "7.2"];

    /// A profile by name, with switches changed: `NAME[,switch=value]...`.
    ///
    /// Errors: the name or a switch is unknown (with the closest known one); a value that its switch cannot take; a
    /// switch without `=`; values that contradict each other.
    pub fn named(text: &str) -> Result<KernelProfile, ProfileError> {
        let mut words = text.split(',').map(str::trim);
        let name = words.next().unwrap_or_default();
        let mut profile = *KernelProfile::ALL.iter().find(|p| p.name == name).ok_or_else(|| {
            UnknownProfile { name: name.to_owned(), closest: closest(name, Self::NAMES), known: Self::NAMES }
        })?;
        for word in words {
            let (switch, value) =
                word.split_once('=').ok_or_else(|| ProfileError::NoValue { switch: word.to_owned() })?;
            profile.set(switch.trim(), value.trim())?;
        }
        profile.check()?;
        Ok(profile)
    }

    /// Refuse empty and frozen values that hardware or a predicate would mistake for something else.
    ///
    /// Errors: the value and the rule it breaks.
    pub fn check(&self) -> Result<(), ProfileError> {
        let mapped = Spte::PRESENT | Spte::PFN_MASK | 0b111;
        let error = |switch, value, rule| Err(ProfileError::Encoding { switch, value, rule });
        if !matches!(self.format_nonpresent, 0 | Format::BIT63) {
            return error("nonpresent", self.format_nonpresent, "must be 0 or bit 63 alone");
        }
        if self.format_frozen & mapped != 0 {
            return error(
                "frozen",
                self.format_frozen,
                "must have neither bits 0-2, nor bit 11, nor frame bits",
            );
        }
        if self.format_frozen & !Format::BIT63 == 0 {
            return error("frozen", self.format_frozen, "must differ from the empty values 0 and bit 63");
        }
        Ok(())
    }

    /// The kernel's entry format. EPT: with exec-only mappings and hardware A/D; [`KernelProfile::ept`] has the others.
    pub const fn format(&self, kind: FormatKind) -> Format {
        match kind {
            FormatKind::Npt => {
                let lockless = matches!(self.aging, Aging::LocklessRcu);
                Format::npt(self.format_nonpresent, self.format_frozen).with_lockless_aging(lockless)
            }
            FormatKind::Ept => self.ept(true, true),
        }
    }

    /// The kernel's EPT format on a CPU that has or lacks exec-only mappings, and Accessed and Dirty bits.
    pub const fn ept(&self, exec_only: bool, ad_bits: bool) -> Format {
        let lockless = matches!(self.aging, Aging::LocklessRcu);
        Format::ept(self.format_nonpresent, self.format_frozen, exec_only, ad_bits)
            .with_lockless_aging(lockless)
            .with_software_ad(self.ad_in_software)
    }
}

impl Default for KernelProfile {
    /// 6.12.
    fn default() -> KernelProfile {
        V6_12
    }
}

impl fmt::Display for KernelProfile {
    /// The name, then the switches that differ from it: what [`KernelProfile::named`] reads.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        let Some(base) = KernelProfile::ALL.iter().find(|p| p.name == self.name) else { return Ok(()) };
        for ((switch, value), (_, plain)) in self.switches().into_iter().zip(base.switches()) {
            if value != plain {
                write!(f, ",{switch}={value}")?;
            }
        }
        Ok(())
    }
}

impl std::str::FromStr for KernelProfile {
    type Err = ProfileError;

    fn from_str(text: &str) -> Result<KernelProfile, ProfileError> {
        KernelProfile::named(text)
    }
}

/// A profile that does not exist.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnknownProfile {
    /// What was given.
    pub name: String,
    /// The nearest name, if one is near.
    pub closest: Option<&'static str>,
    /// All names.
    pub known: &'static [&'static str],
}

/// Why a profile could not be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProfileError {
    /// No profile of that name.
    UnknownProfile(UnknownProfile),
    /// No switch of that name.
    UnknownSwitch {
        /// What was given.
        switch: String,
        /// The nearest name, if one is near.
        closest: Option<&'static str>,
    },
    /// A value that the switch cannot take.
    BadValue {
        /// The switch.
        switch: String,
        /// What was given.
        value: String,
        /// What may be given.
        choices: String,
    },
    /// A switch without `=value`.
    NoValue {
        /// What was given.
        switch: String,
    },
    /// An empty or frozen value that cannot work.
    Encoding {
        /// The switch.
        switch: &'static str,
        /// Its value.
        value: u64,
        /// The rule it breaks.
        rule: &'static str,
    },
}

impl From<UnknownProfile> for ProfileError {
    fn from(error: UnknownProfile) -> ProfileError {
        ProfileError::UnknownProfile(error)
    }
}

impl fmt::Display for UnknownProfile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "profile {:?}: must be one of {}", self.name, self.known.join(", "))?;
        self.closest.map_or(Ok(()), |c| write!(f, "; did you mean {c}?"))
    }
}

impl fmt::Display for ProfileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ProfileError::UnknownProfile(error) => error.fmt(f),
            ProfileError::UnknownSwitch { switch, closest: Some(c) } => {
                write!(f, "profile switch {switch:?}: unknown; did you mean {c}?")
            }
            ProfileError::UnknownSwitch { switch, closest: None } => {
                write!(f, "profile switch {switch:?}: must be one of {}", KernelProfile::SWITCHES.join(", "))
            }
            ProfileError::BadValue { switch, value, choices } => {
                write!(f, "profile switch {switch}={value:?}: must be {choices}")
            }
            ProfileError::NoValue { switch } => {
                write!(f, "profile switch {switch:?}: must be written switch=value")
            }
            ProfileError::Encoding { switch, value, rule } => {
                write!(f, "profile switch {switch}={value:#x}: {rule}")
            }
        }
    }
}

impl std::error::Error for UnknownProfile {}
impl std::error::Error for ProfileError {}

/// Read a switch's value, or say what it can be.
fn read<T: SwitchValue>(switch: &str, value: &str) -> Result<T, ProfileError> {
    T::parse(value).ok_or_else(|| ProfileError::BadValue {
        switch: switch.to_owned(),
        value: value.to_owned(),
        choices: T::choices(),
    })
}
