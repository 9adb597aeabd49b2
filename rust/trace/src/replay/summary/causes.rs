//! Why zaps happened, told from what the recording holds; sums by cause; storms.
//!
//! The cause of a stretch of removals is what KVM does (fast zap, notifier ...). What made KVM do it is the *refined* cause.
//! It is taken from the operation that the marks name, else from who did it: only the process that owns a VM may change its
//! memslots, so a fast zap by another process is a change of `nx_huge_pages`, and one by its own a change of memslots. Where
//! neither tells, the cause stays as it is.
//!
//! A *storm* is a run of at least [`STORM_ZAPS`] zaps of one refined cause, each beginning at most [`STORM_GAP_NS`] after the
//! end of the one before.

use crate::replay::report::Zap;
use serde::Serialize;
use std::collections::BTreeMap;

/// Fewest zaps of a storm.
pub const STORM_ZAPS: u64 = 8;
/// Longest pause within a storm in ns.
pub const STORM_GAP_NS: u64 = 10_000_000;
/// Most storms that are listed.
const LISTED_STORMS: usize = 1000;

/// The zaps of one cause.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct CauseSum {
    /// The refined cause.
    pub cause: &'static str,
    /// Zaps.
    pub zaps: u64,
    /// Entries that they zapped, leafs and tables.
    pub entries: u64,
    /// Of these, leafs.
    pub leafs: u64,
    /// Page-table pages that they removed.
    pub tables: u64,
    /// Sum of their durations in ns.
    pub total_ns: u64,
    /// The longest one in ns.
    pub max_ns: u64,
}

/// Many zaps of one cause in quick succession.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct Storm {
    /// The refined cause.
    pub cause: &'static str,
    /// Begin of the first zap, ns of the recording's clock.
    pub t0_ns: u64,
    /// End of the last zap.
    pub t1_ns: u64,
    /// Zaps.
    pub zaps: u64,
    /// Entries that they zapped.
    pub entries: u64,
    /// Page-table pages that they removed.
    pub tables: u64,
}

/// What is known of the circumstances of a zap.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Known<'a> {
    /// Kind of the innermost operation that the marks name in this thread.
    pub(crate) operation: Option<&'a str>,
    /// Does the thread belong to the process that owns the VM?
    pub(crate) own_process: Option<bool>,
}

/// The refined cause.
pub(crate) fn refine(cause: &'static str, known: Known<'_>) -> &'static str {
    match (cause, known.operation, known.own_process) {
        ("fast_zap" | "slot_leafs" | "root_drop" | "other", Some("set_memslot:delete"), _) => {
            "memslot_delete"
        }
        ("fast_zap" | "slot_leafs" | "root_drop" | "other", Some("set_memslot:move"), _) => "memslot_move",
        ("fast_zap", Some("write_file"), _) => "nx_toggle",
        ("fast_zap", None, Some(true)) => "memslot_update",
        ("fast_zap", None, Some(false)) => "nx_toggle",
        ("collapse", ..) => "dirty_log",
        _ => cause,
    }
}

#[derive(Default)]
pub(crate) struct Causes {
    sums: BTreeMap<&'static str, CauseSum>,
    /// The run that is under way, by cause.
    open: BTreeMap<&'static str, Storm>,
    storms: Vec<Storm>,
    storms_total: u64,
}

impl Causes {
    pub(crate) fn add(&mut self, zap: &Zap) {
        let cause = zap.refined;
        let entries: u64 = zap.entries.values().sum();
        let end = zap.t0_ns.saturating_add(zap.duration_ns);
        let sum = self.sums.entry(cause).or_insert(CauseSum {
            cause,
            zaps: 0,
            entries: 0,
            leafs: 0,
            tables: 0,
            total_ns: 0,
            max_ns: 0,
        });
        sum.zaps += 1;
        sum.entries += entries;
        sum.leafs += zap.leafs;
        sum.tables += zap.tables;
        sum.total_ns = sum.total_ns.saturating_add(zap.duration_ns);
        sum.max_ns = sum.max_ns.max(zap.duration_ns);
        let fresh = Storm { cause, t0_ns: zap.t0_ns, t1_ns: end, zaps: 1, entries, tables: zap.tables };
        match self.open.get_mut(cause) {
            Some(run) if zap.t0_ns <= run.t1_ns.saturating_add(STORM_GAP_NS) => {
                run.zaps += 1;
                run.entries += entries;
                run.tables += zap.tables;
                run.t0_ns = run.t0_ns.min(zap.t0_ns);
                run.t1_ns = run.t1_ns.max(end);
            }
            _ => {
                if let Some(run) = self.open.insert(cause, fresh) {
                    self.over(run);
                }
            }
        }
    }

    fn over(&mut self, run: Storm) {
        if run.zaps >= STORM_ZAPS {
            self.storms_total += 1;
            if self.storms.len() < LISTED_STORMS {
                self.storms.push(run);
            }
        }
    }

    /// Sums, largest time first; storms by time; how many storms there were.
    pub(crate) fn finish(mut self) -> (Vec<CauseSum>, Vec<Storm>, u64) {
        for run in std::mem::take(&mut self.open).into_values() {
            self.over(run);
        }
        let mut sums: Vec<CauseSum> = self.sums.into_values().collect();
        sums.sort_by(|a, b| b.total_ns.cmp(&a.total_ns).then(a.cause.cmp(b.cause)));
        self.storms.sort_by_key(|s| (s.t0_ns, s.cause));
        (sums, self.storms, self.storms_total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn zap(refined: &'static str, t0_ns: u64, duration_ns: u64) -> Zap {
        Zap { refined, t0_ns, duration_ns, entries: [(1, 3)].into(), leafs: 3, ..Zap::default() }
    }

    #[test]
    fn eight_zaps_in_quick_succession_are_a_storm_and_seven_are_none() {
        for (zaps, storms) in [(7, 0), (8, 1), (50, 1)] {
            let mut causes = Causes::default();
            (0..zaps).for_each(|n| causes.add(&zap("notifier", n * STORM_GAP_NS, 1)));
            let (sums, listed, total) = causes.finish();
            assert_eq!((listed.len() as u64, total), (storms, storms), "{zaps} zaps");
            assert_eq!((sums[0].zaps, sums[0].entries, sums[0].max_ns), (zaps, 3 * zaps, 1));
            if let Some(storm) = listed.first() {
                assert_eq!((storm.t0_ns, storm.t1_ns), (0, (zaps - 1) * STORM_GAP_NS + 1));
            }
        }
    }

    #[test]
    fn a_pause_or_another_cause_ends_no_run_of_a_cause_but_its_own() {
        let mut causes = Causes::default();
        (0..8).for_each(|n| {
            causes.add(&zap("notifier", n * 1000, 10));
            causes.add(&zap("teardown", n * 100_000_000, 10));
        });
        (0..8).for_each(|n| causes.add(&zap("notifier", 20_000_000 + n * 1000, 10)));
        let (_, storms, _) = causes.finish();
        let told: Vec<_> = storms.iter().map(|s| (s.cause, s.t0_ns, s.zaps)).collect();
        assert_eq!(told, [("notifier", 0, 8), ("notifier", 20_000_000, 8)]);
    }

    #[test]
    fn a_fast_zap_is_told_by_the_mark_or_by_whose_process_did_it_or_not_at_all() {
        let by = |operation, own_process| refine("fast_zap", Known { operation, own_process });
        assert_eq!(by(Some("set_memslot:delete"), None), "memslot_delete");
        assert_eq!(by(Some("write_file"), Some(true)), "nx_toggle");
        assert_eq!(by(None, Some(false)), "nx_toggle");
        assert_eq!(by(None, Some(true)), "memslot_update");
        assert_eq!(by(None, None), "fast_zap");
        assert_eq!(refine("notifier", Known::default()), "notifier");
    }
}
