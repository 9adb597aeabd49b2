//! The result of a replay: schema `tdpmmu.replay/1`.

use super::record::Recorded;
use super::shape::Shape;
use super::summary::{Ambiguous, CauseSum, FaultCounts, Operation, PerVm, Storm, Timeline};
use crate::reader::BadLine;
use serde::Serialize;
use std::collections::BTreeMap;

/// Most mismatches that are listed; `checked.mismatch` counts all.
pub const LISTED_MISMATCHES: usize = 100;

/// How the old values compare with the rebuilt tables. Each transition is counted once.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Checked {
    /// The old value is the one that was rebuilt.
    pub same: u64,
    /// The hardware has set A, or A and D of a writable leaf, since.
    pub hw_ad: u64,
    /// The lockless fast page fault has added W since.
    pub fast_pf: u64,
    /// A frozen entry of a live table was emptied without an event (atomic zap up to 6.9).
    pub silent_unfreeze: u64,
    /// First event on a child that a split filled in, with exactly the value it was filled with.
    pub split_child: u64,
    /// The line stands after the line of a later change of the same entry, made by another thread; in order the chain is whole.
    pub reordered: u64,
    /// Not checkable: events were lost, or the recording began in the middle of the VM's life.
    pub unknown: u64,
    /// Everything that does not fit, whatever its kind; see `mismatch_kinds`.
    pub mismatch: u64,
}

/// One thing that does not fit.
#[derive(Clone, Debug, Serialize)]
pub struct Mismatch {
    /// What kind: `old_value`, `transition`, `removal`, `birth`, `death`, `observation`, `statistics`, `announced`, `no_table`.
    pub kind: &'static str,
    /// Line number in the recording, from 1.
    pub line: u64,
    /// Time in ns of the recording's clock.
    pub t_ns: u64,
    /// Thread id.
    pub pid: u32,
    /// Address space.
    pub as_id: u8,
    /// First gfn of the entry.
    pub gfn: u64,
    /// Level of the entry.
    pub level: u8,
    /// The rebuilt value, hexadecimal.
    pub expected: String,
    /// The recorded value, hexadecimal.
    pub got: String,
    /// The rule in words.
    pub rule: String,
}

/// Births of page-table pages.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Births {
    /// Linked after an allocation event of the same thread, gfn and level.
    pub traced: u64,
    /// Linked without such an event in the recording.
    pub inferred: u64,
    /// Allocated and never linked: the link lost its race.
    pub unlinked: u64,
}

/// Deaths of page-table pages.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
pub struct Deaths {
    /// Freed in an event of the recording, after a complete removal.
    pub traced: u64,
    /// Removed, but the recording has no event of the freeing (yet).
    pub inferred: u64,
    /// Freed pages that were never part of a rebuilt tree.
    pub unmatched: u64,
}

/// Comparisons with KVM's own leaf counts.
#[derive(Clone, Copy, Debug, Default, Serialize, PartialEq, Eq)]
pub struct StatChecks {
    /// Equal at a quiet point.
    pub matched: u64,
    /// Different at a quiet point; also in `checked.mismatch`.
    pub mismatched: u64,
    /// Not compared: something was running, events were lost, or the VM is ambiguous.
    pub skipped: u64,
}

/// One zap: a stretch of removals by one thread for one cause.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Zap {
    /// `fast_zap`, `notifier`, `slot_leafs`, `collapse`, `nx_recovery`, `teardown`, `worker`, `root_drop`, `replace`, `other`.
    pub cause: &'static str,
    /// What made KVM do it, where that can be told: `memslot_delete`, `memslot_move`, `memslot_update`, `nx_toggle`, `dirty_log`; else
    /// as `cause`.
    pub refined: &'static str,
    /// Kind of the operation that the marks of a test program name.
    pub trigger: Option<String>,
    /// Its VM's number in `per_vm`; null where it removed nothing.
    pub vm: Option<u64>,
    /// Begin, ns of the recording's clock.
    pub t0_ns: u64,
    /// From the begin to the end of the stretch.
    pub duration_ns: u64,
    /// Thread id.
    pub pid: u32,
    /// Thread name.
    pub comm: String,
    /// Present leafs and tables that were zapped, by level.
    pub entries: BTreeMap<u8, u64>,
    /// Of these, leafs.
    pub leafs: u64,
    /// Page-table pages removed.
    pub tables: u64,
    /// Yields, where `iter_restart` is recorded; else null.
    pub yields: Option<u64>,
}

/// Most losses that are listed.
pub const LISTED_LOSSES: usize = 1000;

/// Events were lost.
#[derive(Clone, Copy, Debug, Serialize, PartialEq, Eq)]
pub struct Loss {
    /// Where the recording goes on, ns of its clock.
    pub t_ns: u64,
    /// Of which CPU, where it is said.
    pub cpu: Option<u32>,
    /// How many, where it is said.
    pub count: Option<u64>,
}

/// The result of a replay.
#[derive(Clone, Debug, Serialize)]
pub struct Replay {
    /// `tdpmmu.replay/1`
    pub schema: &'static str,
    /// The recording, `-` for standard input.
    pub file: String,
    /// The kernel profile in use.
    pub kernel: String,
    /// Where the profile's name is from: `given`, `folder`, `inferred`.
    pub profile_from: &'static str,
    /// Entry format, `npt` or `ept`; null when no present entry was seen.
    pub format: Option<&'static str>,
    /// Events of any kind.
    pub events: u64,
    /// SPTE changes.
    pub transitions: u64,
    /// How the old values compare.
    pub checked: Checked,
    /// `checked.mismatch` by kind.
    pub mismatch_kinds: BTreeMap<&'static str, u64>,
    /// The first mismatches.
    pub mismatches: Vec<Mismatch>,
    /// Roots, by address and generation; null without events that tell roots apart.
    pub roots: Option<u64>,
    /// Virtual machines told apart.
    pub vms: u64,
    /// Most page-table pages alive at once, roots included.
    pub tables_peak: u64,
    /// Page-table pages still linked at the end, roots included.
    pub tables_at_end: u64,
    /// Time of the first event, ns of the recording's clock.
    pub begin_ns: u64,
    /// Mapped pages and table memory over time.
    pub timeline: Timeline,
    /// The zaps by refined cause.
    pub causes: Vec<CauseSum>,
    /// Many zaps in quick succession.
    pub storms: Vec<Storm>,
    /// Storms, listed or not.
    pub storms_total: u64,
    /// Faults by kind.
    pub faults: FaultCounts,
    /// The longest operations.
    pub top_operations: Vec<Operation>,
    /// The VMs.
    pub per_vm: Vec<PerVm>,
    /// Changes whose VM cannot be told.
    pub ambiguous: Ambiguous,
    /// Where events were lost; the first of them.
    pub losses: Vec<Loss>,
    /// What another design would have made of the zaps: filled in by the laboratory.
    pub what_if: Option<serde_json::Value>,
    /// What the recording is: `text`, `trace.dat v6`, `trace.dat v7`.
    pub input: &'static str,
    /// What each thread did, where it was asked for: for Perfetto.
    #[serde(skip)]
    pub recorded: Option<Recorded>,
    /// The trees before the zaps, where they were asked for: for what-if.
    #[serde(skip)]
    pub shapes: Vec<Shape>,
    /// Births of page-table pages.
    pub births: Births,
    /// Deaths of page-table pages.
    pub deaths: Deaths,
    /// Comparisons with KVM's own leaf counts.
    pub stat_checks: StatChecks,
    /// Values seen in other events (`kvm_mmu_set_spte`) that equal the rebuilt ones.
    pub observations: u64,
    /// The zaps, in order of their ends.
    pub zaps: Vec<Zap>,
    /// Lines of the recording.
    pub lines: u64,
    /// Bytes of (decompressed) text.
    pub bytes: u64,
    /// Lines that could not be read.
    pub bad_lines: u64,
    /// The first of them.
    pub bad: Vec<BadLine>,
    /// Events that the recorder says it lost.
    pub lost: u64,
    /// Lines whose time is before the line above.
    pub time_backwards: u64,
    /// First to last event, ns.
    pub span_ns: u64,
    /// What a reader of the result should know.
    pub notes: Vec<String>,
}
