//! The museum, exhibit by exhibit: with the bug on an oracle fires, whichever; with it off none does.
//!
//! One seed each, and few schedules with the bug off, so that it fits a build; `the_whole_museum` has them all.

use tdpmmu_lab::museum::{
    ABSENT, Budget, Demo, canaries, command, demo, demo_all, entries, find, page, show,
};
use tdpmmu_lab::{Control, LabError};

/// Schedules with the bug off, in a build.
const CLEAN: u64 = 150;

fn judged(shown: &Demo) {
    assert!(shown.caught, "{}: nothing fired in {:?} schedules", shown.id, shown.schedules);
    assert!(!shown.false_alarm, "{}: fired with the bug off: {:?}", shown.id, shown.alarm);
    assert!(shown.oracle.is_some() && shown.schedules_clean > 0);
}

fn exhibit(id: &str) {
    let entry = find(id).expect("an exhibit");
    let budget = Budget { seeds: 1, clean: Some(CLEAN), ..Budget::default() };
    judged(&demo(entry, &budget, &Control::silent()).expect("a demonstration"));
}

macro_rules! exhibits {
    ($($name:ident = $id:literal),+ $(,)?) => {
        $(
            #[test]
            fn $name() {
                exhibit($id);
            }
        )+
    };
}

exhibits! {
    the_debt_of_an_earlier_root_is_missed = "1",
    an_nx_recovery_without_a_flush_is_found = "2",
    an_nx_recovery_that_forgets_its_debt_is_found = "3",
    a_walk_that_does_not_look_is_found = "4a",
    a_walk_that_goes_nowhere_is_found = "4b",
    an_entry_that_is_skipped_after_a_yield_is_found = "5",
    a_list_read_outside_of_rcu_is_found = "6",
    a_flush_after_the_read_section_is_found = "7",
    a_flush_that_begins_too_late_is_found = "8",
    books_that_are_written_after_the_link_are_found = "9",
    a_root_visited_without_a_reference_is_found = "10",
    a_fault_under_an_invalid_root_is_found = "11",
    an_unmap_that_skips_invalid_roots_is_found = "13",
    a_store_that_loses_dirty_is_found = "14",
    a_retry_on_an_entry_that_is_gone_is_found = "15",
    a_retry_that_protects_a_table_is_found = "16",
    a_write_protection_that_stops_early_is_found = "17",
    writes_of_an_l2_that_are_not_logged_are_found = "18",
    a_last_put_that_zaps_everything_is_found = "19",
    a_zap_in_one_section_is_found = "20",
    a_gift_that_nobody_gave_is_found = "21",
    a_fast_zap_that_does_not_wait_is_found = "22a",
    a_fast_zap_that_waits_for_its_own_work_only_is_found = "22b",
    a_mark_that_is_taken_without_a_zap_is_found = "22c",
    an_item_that_is_queued_twice_is_found = "23",
    tables_that_a_range_zap_leaves_are_found = "24",
    a_reclaim_under_the_shared_lock_is_found = "25",
    a_candidate_that_is_dead_is_found = "26",
    a_leaf_over_a_frozen_entry_is_found = "27",
    a_leaf_at_a_level_that_was_not_reached_is_found = "28",
    a_sequence_cut_to_an_int_is_found = "29",
    roots_that_are_built_again_are_found = "30",
    a_frozen_entry_that_aging_thaws_is_found = "31",
    a_root_that_its_own_fault_reclaims_is_found = "33",
    a_recovery_in_the_wrong_address_space_is_found = "34",
    a_batch_that_never_fills_is_found = "35",
    a_zapped_root_on_the_list_is_found = "36",
    a_page_that_outlives_its_slot_is_found = "37",
    a_gib_between_two_checks_is_found = "39",
    a_root_that_is_loaded_alone_is_found = "40",
    a_gfn_before_its_slot_is_found = "41",
    a_small_table_that_stays_is_found = "42",
    a_guest_entry_without_its_barrier_is_found = "44a",
    a_lockless_walk_without_its_barrier_is_found = "44b",
    a_freer_without_its_barrier_is_found = "44c",
}

/// None of them is of the museum: they show that its judges are awake.
#[test]
fn each_canary_is_heard() {
    for canary in canaries() {
        let budget = Budget { seeds: 1, clean: Some(20), ..Budget::default() };
        judged(&demo(canary, &budget, &Control::silent()).expect("a demonstration"));
    }
}

#[test]
#[ignore = "minutes: all exhibits, five seeds, the whole budget twice; in release"]
fn the_whole_museum() {
    let museum = demo_all(&Budget::default(), &Control::silent()).expect("a museum");
    for shown in &museum.bugs {
        println!("{:>4}  {:?}  {:?}  {}", shown.id, shown.schedules, shown.oracle, shown.catcher);
    }
    println!("{} of {} in {:.0} s", museum.caught, museum.total, museum.seconds);
    museum.bugs.iter().for_each(judged);
}

#[test]
fn the_page_of_the_museum_is_the_catalogue() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/museum.md");
    if std::env::var_os("TDPMMU_BLESS").is_some() {
        std::fs::write(&file, page()).expect("docs/museum.md");
    }
    let written = std::fs::read_to_string(&file).expect("docs/museum.md");
    assert!(written == page(), "docs/museum.md is not what the catalogue says: TDPMMU_BLESS=1");
}

#[test]
fn every_number_of_the_history_is_shown_or_its_absence_explained() {
    let shown = |number| entries().iter().any(|entry| entry.bug.number() == Some(number));
    for number in 1..=44 {
        let absent = ABSENT.iter().any(|(absent, _)| *absent == number);
        assert!(shown(number) != absent, "bug {number}");
    }
}

#[test]
fn a_demonstration_is_asked_for_and_answered_as_json() {
    let answer = command(r#"{"ids": ["17"], "seeds": 2, "schedules": 20, "jobs": 1}"#, &Control::silent());
    let answer: serde_json::Value = serde_json::from_str(&answer.expect("an answer")).expect("JSON");
    assert_eq!((&answer["schema"], &answer["caught"]), (&"tdpmmu.bugs/1".into(), &1.into()));
    let row = &answer["bugs"][0];
    assert_eq!((&row["id"], &row["false_alarm"]), (&"17".into(), &false.into()));
    assert!(row["schedules_median"].is_u64() && row["oracle"].is_string() && row["schedule"].is_string());
}

#[test]
fn a_request_that_makes_no_sense_is_refused_by_name_and_rule() {
    for (request, says) in [
        (r#"{"ids": ["45"]}"#, "bug=\"45\""),
        (r#"{"seeds": 0}"#, "at least one seed"),
        (r#"{"schedules": 0}"#, "one schedule"),
        (r#"{"seed": -1}"#, "the request"),
        (r#"{"bugs": 1}"#, "bugs"),
    ] {
        match command(request, &Control::silent()) {
            Err(LabError::Usage(what)) => assert!(what.contains(says), "{request}: {what}"),
            other => panic!("{request}: {other:?}"),
        }
    }
    assert!(matches!(show("12"), Err(LabError::Usage(_))));
}

#[test]
fn a_demonstration_that_is_cancelled_ends() {
    let control = Control::silent();
    control.flag().store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(matches!(command("{}", &control), Err(LabError::Cancelled)));
}
