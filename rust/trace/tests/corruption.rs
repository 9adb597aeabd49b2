//! A replay that finds nothing proves something only if it finds what is there: single corruptions of real recordings.

mod common;

use common::{Random, check, field, kernel, lines, shipped, with_field};

fn places(text: &[String]) -> Vec<usize> {
    (0..text.len()).filter(|&i| text[i].contains(" kvm_tdp_mmu_spte_changed: ")).collect()
}

/// An edit: what stands in place of some lines; `None` is a dropped line.
type Edit = Vec<(usize, Option<String>)>;

/// Replays copies of every shipped recording, each with one edit; every one must be caught.
fn each_is_caught(what: &str, tries: usize, edit: impl Fn(&[String], usize, &mut Random) -> Option<Edit>) {
    let mut total = 0;
    for (n, path) in shipped().into_iter().enumerate() {
        let text = lines(&path);
        let (places, name) = (places(&text), kernel(&path));
        let mut random = Random(0x7d9_0000 + n as u64);
        let mut done = 0;
        for _ in 0..100 * tries {
            let at = places[random.below(places.len())];
            let Some(edit) = edit(&text, at, &mut random) else { continue };
            let edited: Vec<&str> = (0..text.len())
                .filter_map(|k| match edit.iter().find(|(line, _)| *line == k) {
                    None => Some(text[k].as_str()),
                    Some((_, replacement)) => replacement.as_deref(),
                })
                .collect();
            let mismatches =
                check(&name, &edited).expect("an edited line is still well-formed").checked.mismatch;
            let (line, shown) = (at + 1, text[at].trim_start());
            assert!(mismatches > 0, "{what} at line {line} of {} was not caught: {shown}", path.display());
            done += 1;
            if done == tries {
                break;
            }
        }
        total += done;
    }
    assert!(total > 0, "{what}: nothing to edit in any recording");
}

fn flip(text: &[String], at: usize, name: &str, bits: u64) -> Option<Edit> {
    let (_, _, value) = field(&text[at], name);
    Some(vec![(at, Some(with_field(&text[at], name, value ^ bits)))])
}

#[test]
fn one_changed_old_value_is_caught() {
    each_is_caught("an old value", 8, |text, at, random| {
        let (_, _, value) = field(&text[at], "old_spte");
        let bit = 1 << random.below(64);
        // A and D appear without an event: hardware sets them.
        let hardware = bit & (1 << 5 | 1 << 6) & !value != 0;
        (!hardware).then(|| flip(text, at, "old_spte", bit))?
    });
}

#[test]
fn one_changed_new_value_is_caught() {
    each_is_caught("a new value", 8, |text, at, random| flip(text, at, "new_spte", 1 << random.below(64)));
}

#[test]
fn one_dropped_change_is_caught() {
    each_is_caught("a dropped event", 8, |_, at, _| Some(vec![(at, None)]));
}

#[test]
fn a_taken_bit_that_an_explanation_could_add_is_caught() {
    // A, D and W: hardware and the fast fault add them, so a replay that shrugs at these bits passes them.
    each_is_caught("a cleared A, D or W", 8, |text, at, random| {
        let (_, _, value) = field(&text[at], "new_spte");
        let bit = [1 << 1, 1 << 5, 1 << 6][random.below(3)];
        (value & 1 << 11 != 0 && value & bit != 0).then(|| flip(text, at, "new_spte", bit))?
    });
}

#[test]
fn two_changes_of_one_thread_swapped_are_no_reordering() {
    let entry = |line: &str| {
        let text = line.split("as id ").nth(1).unwrap_or("");
        text.split(" old_spte").next().unwrap_or("").to_owned()
    };
    let thread = |line: &str| line.split(']').next().unwrap_or("").to_owned();
    each_is_caught("a swap within a thread", 4, |text, at, _| {
        let mut later = (at + 1..text.len().min(at + 20_000))
            .filter(|&k| text[k].contains(" kvm_tdp_mmu_spte_changed: "));
        let next =
            later.find(|&k| entry(&text[k]) == entry(&text[at]) && thread(&text[k]) == thread(&text[at]))?;
        let split = |k: usize| text[k].split_at(text[k].find("as id ").unwrap_or(0));
        let ((head_a, body_a), (head_b, body_b)) = (split(at), split(next));
        (body_a != body_b).then_some(())?;
        Some(vec![(at, Some(format!("{head_a}{body_b}"))), (next, Some(format!("{head_b}{body_a}")))])
    });
}

#[test]
fn a_table_of_another_page_is_caught() {
    each_is_caught("another child page", 4, |text, at, random| {
        let (_, _, value) = field(&text[at], "new_spte");
        (value & 0xfff == 0x827).then(|| flip(text, at, "new_spte", 0x1000 << random.below(12)))?
    });
}
