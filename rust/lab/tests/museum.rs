//! The museum, exhibit by exhibit: with the bug on an oracle fires, whichever; with it off none does.
//!
//! One seed each, and few schedules with the bug off, so that it fits a build; `the_whole_museum` has them all.

use tdpmmu_lab::Control;
use tdpmmu_lab::museum::{ABSENT, Budget, Demo, demo, demo_all, entries, find, page};

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
