//! No two designs are the same: for each pair of the designs a test, named after what they differ in.
//!
//! **Guarantee.** Each test runs one probe, a schedule that ends in a number, on both designs and knows the number of each. A design that is
//! added to [`DESIGNS`] fails here until it is told apart from every other. `docs/designs-compared.md` has the numbers of
//! all designs and all probes; they are read from there and compared too.
//!
//! **Mechanism.** Workers are held back until somebody waits for them; what another task does in between is done at a schedule point (`common/staged.rs`). No
//! number here is a time.

mod probes;
#[path = "../common/staged.rs"]
mod staged;
#[path = "../common/world.rs"]
mod world;

use probes::*;
use tdpmmu_mmu::DESIGNS;
use world::{EXCLUSIVE_WRITES, LEAVES, SHARED_WRITES};

/// A test of a pair: `name: probe, first number, second number;`.
macro_rules! pairs {
    ($($name:ident: $probe:ident, $a:literal $x:expr, $b:literal $y:expr;)+) => {
        $(#[test]
        fn $name() {
            assert_ne!($x, $y, "no difference");
            assert_eq!(($probe($a), $probe($b)), ($x, $y), "{} of {} and {}", stringify!($probe), $a, $b);
        })+

        /// The name of each test above and its designs.
        const PAIRS: &[(&str, &str, &str)] = &[$((stringify!($name), $a, $b)),+];
    };
}

pairs! {
    in_place_and_inline_differ_in_the_roots_that_stay_valid_in_a_fast_zap:
        valid_roots_after_the_exclusive_hold, "in-place" 3, "inline" 0;
    in_place_and_defunct_flag_differ_in_what_a_fast_zap_writes_under_the_exclusive_lock:
        entries_written_in_the_exclusive_hold, "in-place" EXCLUSIVE_WRITES, "defunct-flag" 0;
    in_place_and_system_workqueue_differ_in_what_a_vcpu_writes_to_drop_a_root:
        entries_written_by_who_drops_a_root, "in-place" SHARED_WRITES, "system-workqueue" 0;
    in_place_and_no_second_phase_differ_in_what_is_mapped_when_a_fast_zap_returns:
        sptes_mapped_when_the_fast_zap_returns, "in-place" 0, "no-second-phase" LEAVES;
    in_place_and_second_list_differ_in_the_yields_of_the_last_put:
        yields_in_the_last_put, "in-place" 0, "second-list" 9;
    in_place_and_second_list_worker_differ_in_the_work_items_for_three_dropped_roots:
        work_items_queued_for_three_dropped_roots, "in-place" 0, "second-list-worker" 1;
    in_place_and_async_worker_differ_in_what_the_caller_of_a_fast_zap_writes:
        entries_written_by_the_caller_of_a_fast_zap, "in-place" EXCLUSIVE_WRITES, "async-worker" 0;
    in_place_and_async_worker_owned_differ_in_the_references_at_birth:
        references_at_birth, "in-place" 1, "async-worker-owned" 2;
    in_place_and_sync_differ_in_the_roots_kept_when_no_vcpu_has_one:
        valid_roots_when_no_vcpu_has_one, "in-place" 0, "sync" 1;
    inline_and_defunct_flag_differ_in_the_yields_of_the_last_put:
        yields_in_the_last_put, "inline" 0, "defunct-flag" 9;
    inline_and_system_workqueue_differ_in_the_user_references_that_dropped_roots_hold:
        user_references_after_three_roots_were_dropped, "inline" 1, "system-workqueue" 4;
    inline_and_no_second_phase_differ_in_what_workers_write_for_a_fast_zap:
        entries_written_by_the_workers_of_a_fast_zap, "inline" 0, "no-second-phase" SHARED_WRITES;
    inline_and_second_list_differ_in_whether_a_notifier_finds_a_root_in_its_last_put:
        roots_listed_while_their_sptes_are_there, "inline" 0, "second-list" 1;
    inline_and_second_list_worker_differ_in_what_a_vcpu_writes_to_drop_a_root:
        entries_written_by_who_drops_a_root, "inline" SHARED_WRITES, "second-list-worker" 0;
    inline_and_async_worker_differ_in_what_the_caller_of_a_fast_zap_writes:
        entries_written_by_the_caller_of_a_fast_zap, "inline" SHARED_WRITES, "async-worker" 0;
    inline_and_async_worker_owned_differ_in_the_roots_kept_when_no_vcpu_has_one:
        valid_roots_when_no_vcpu_has_one, "inline" 0, "async-worker-owned" 1;
    inline_and_sync_differ_in_the_references_at_birth:
        references_at_birth, "inline" 1, "sync" 2;
    defunct_flag_and_system_workqueue_differ_in_what_a_root_lost_between_the_phases_breaks:
        violations_when_a_root_is_lost_between_the_phases, "defunct-flag" 0, "system-workqueue" 1;
    defunct_flag_and_no_second_phase_differ_in_what_is_mapped_when_a_fast_zap_returns:
        sptes_mapped_when_the_fast_zap_returns, "defunct-flag" 0, "no-second-phase" LEAVES;
    defunct_flag_and_second_list_differ_in_the_gift_on_a_root_in_its_last_put:
        references_of_a_dropped_root_in_a_fast_zap, "defunct-flag" 1, "second-list" 2;
    defunct_flag_and_second_list_worker_differ_in_the_yields_of_the_last_put:
        yields_in_the_last_put, "defunct-flag" 9, "second-list-worker" 0;
    defunct_flag_and_async_worker_differ_in_what_a_vcpu_writes_to_drop_a_root:
        entries_written_by_who_drops_a_root, "defunct-flag" SHARED_WRITES, "async-worker" 0;
    defunct_flag_and_async_worker_owned_differ_in_the_work_items_for_a_fast_zap:
        work_items_queued_by_a_fast_zap_of_three_roots, "defunct-flag" 0, "async-worker-owned" 3;
    defunct_flag_and_sync_differ_in_the_second_gift_on_a_halted_vcpus_root:
        references_of_a_halted_vcpus_root_in_the_second_fast_zap, "defunct-flag" 2, "sync" 1;
    system_workqueue_and_no_second_phase_differ_in_what_is_mapped_when_a_fast_zap_returns:
        sptes_mapped_when_the_fast_zap_returns, "system-workqueue" 0, "no-second-phase" LEAVES;
    system_workqueue_and_second_list_differ_in_what_a_root_lost_between_the_phases_breaks:
        violations_when_a_root_is_lost_between_the_phases, "system-workqueue" 1, "second-list" 0;
    system_workqueue_and_second_list_worker_differ_in_the_work_items_for_three_dropped_roots:
        work_items_queued_for_three_dropped_roots, "system-workqueue" 3, "second-list-worker" 1;
    system_workqueue_and_async_worker_differ_in_the_gift_on_a_root_that_is_queued_already:
        references_of_a_dropped_root_in_a_fast_zap, "system-workqueue" 2, "async-worker" 1;
    system_workqueue_and_async_worker_owned_differ_in_the_roots_kept_when_no_vcpu_has_one:
        valid_roots_when_no_vcpu_has_one, "system-workqueue" 0, "async-worker-owned" 1;
    system_workqueue_and_sync_differ_in_what_a_vcpu_of_a_dying_vm_writes_to_drop_a_root:
        entries_written_by_who_drops_a_root_of_a_dying_vm, "system-workqueue" SHARED_WRITES, "sync" 0;
    no_second_phase_and_second_list_differ_in_what_the_caller_of_a_fast_zap_writes:
        entries_written_by_the_caller_of_a_fast_zap, "no-second-phase" 0, "second-list" SHARED_WRITES;
    no_second_phase_and_second_list_worker_differ_in_what_a_vcpu_of_a_dying_vm_writes_to_drop_a_root:
        entries_written_by_who_drops_a_root_of_a_dying_vm, "no-second-phase" SHARED_WRITES, "second-list-worker" 0;
    no_second_phase_and_async_worker_differ_in_what_is_mapped_when_a_fast_zap_returns:
        sptes_mapped_when_the_fast_zap_returns, "no-second-phase" LEAVES, "async-worker" 0;
    no_second_phase_and_async_worker_owned_differ_in_the_work_items_for_three_dropped_roots:
        work_items_queued_for_three_dropped_roots, "no-second-phase" 3, "async-worker-owned" 0;
    no_second_phase_and_sync_differ_in_what_workers_write_for_a_fast_zap:
        entries_written_by_the_workers_of_a_fast_zap, "no-second-phase" SHARED_WRITES, "sync" 0;
    second_list_and_second_list_worker_differ_in_what_a_vcpu_writes_to_drop_a_root:
        entries_written_by_who_drops_a_root, "second-list" SHARED_WRITES, "second-list-worker" 0;
    second_list_and_async_worker_differ_in_the_second_gift_on_a_halted_vcpus_root:
        references_of_a_halted_vcpus_root_in_the_second_fast_zap, "second-list" 2, "async-worker" 1;
    second_list_and_async_worker_owned_differ_in_what_the_caller_of_a_fast_zap_writes:
        entries_written_by_the_caller_of_a_fast_zap, "second-list" SHARED_WRITES, "async-worker-owned" 0;
    second_list_and_sync_differ_in_the_yields_of_the_last_put:
        yields_in_the_last_put, "second-list" 9, "sync" 0;
    second_list_worker_and_async_worker_differ_in_the_work_items_for_three_dropped_roots:
        work_items_queued_for_three_dropped_roots, "second-list-worker" 1, "async-worker" 3;
    second_list_worker_and_async_worker_owned_differ_in_the_work_items_for_a_fast_zap:
        work_items_queued_by_a_fast_zap_of_three_roots, "second-list-worker" 1, "async-worker-owned" 3;
    second_list_worker_and_sync_differ_in_what_the_caller_of_a_fast_zap_writes:
        entries_written_by_the_caller_of_a_fast_zap, "second-list-worker" 0, "sync" SHARED_WRITES;
    async_worker_and_async_worker_owned_differ_in_the_references_at_birth:
        references_at_birth, "async-worker" 1, "async-worker-owned" 2;
    async_worker_and_sync_differ_in_the_work_items_for_three_dropped_roots:
        work_items_queued_for_three_dropped_roots, "async-worker" 3, "sync" 0;
    async_worker_owned_and_sync_differ_in_what_the_caller_of_a_fast_zap_writes:
        entries_written_by_the_caller_of_a_fast_zap, "async-worker-owned" 0, "sync" SHARED_WRITES;
}

#[test]
fn every_pair_of_designs_has_its_test() {
    let mut missing = Vec::new();
    for (i, a) in DESIGNS.iter().enumerate() {
        for b in &DESIGNS[i + 1..] {
            let named = format!("{}_and_{}_differ_in_", a.name, b.name).replace('-', "_");
            let tested =
                |&&(name, x, y): &&(&str, &str, &str)| (x, y) == (a.name, b.name) && name.starts_with(&named);
            if PAIRS.iter().filter(tested).count() != 1 {
                missing.push(format!("{named}..."));
            }
        }
    }
    assert!(missing.is_empty(), "not told apart: {missing:?}");
    assert_eq!(PAIRS.len(), DESIGNS.len() * (DESIGNS.len() - 1) / 2);
}

/// The cells of a line of a Markdown table.
fn cells(line: &str) -> Vec<&str> {
    line.trim().trim_matches('|').split('|').map(|cell| cell.trim().trim_matches('`')).collect()
}

#[test]
fn the_table_of_the_documentation_is_what_the_probes_find() {
    let text = include_str!("../../../../docs/designs-compared.md");
    let head = text.lines().find(|line| line.starts_with("| probe")).expect("a table of probes");
    let names = DESIGNS.iter().map(|d| format!("{}{}", d.name, if d.flawed { " (flawed)" } else { "" }));
    assert_eq!(cells(head)[1..], names.collect::<Vec<_>>());
    for (name, probe) in PROBES {
        let row = text.lines().find(|line| line.starts_with(&format!("| `{name}` |")));
        let found: Vec<_> = DESIGNS.iter().map(|design| probe(design.name).to_string()).collect();
        let row = row.unwrap_or_else(|| panic!("no row for it: | `{name}` | {} |", found.join(" | ")));
        assert_eq!(cells(row)[1..], found, "{name}");
    }
}
