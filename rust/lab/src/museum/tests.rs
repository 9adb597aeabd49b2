//! What holds of the catalogue without running it.

use tdpmmu_platform::Bug;

use super::{cards, entries, find};

#[test]
fn each_exhibit_is_a_bug_of_its_own_with_a_program_that_makes_sense() {
    let all = entries();
    assert!(!all.is_empty());
    for (at, entry) in all.iter().enumerate() {
        assert!(all[..at].iter().all(|other| other.bug != entry.bug), "{} twice", entry.id());
        assert!(!entry.bug.is_canary(), "{} is nobody's history", entry.id());
        (entry.program)().check().unwrap_or_else(|error| panic!("{}: {error}", entry.id()));
    }
}

#[test]
fn an_exhibit_or_canary_is_found_by_its_id_in_any_case_and_nothing_else_is() {
    assert_eq!(find("4A").map(|entry| entry.bug), Some(Bug::B04a));
    assert!(find("c01").is_some_and(|entry| entry.bug.is_canary()));
    assert!(find("4").is_none() && find("C").is_none() && find("").is_none());
}

#[test]
fn a_card_says_where_history_tells_of_the_bug() {
    for card in cards() {
        let text = card.to_string();
        for part in [card.reference, card.cause, card.interleaving, card.kernels] {
            assert!(part.len() > 3 && text.contains(part), "{}: {part:?}", card.id);
        }
    }
}
