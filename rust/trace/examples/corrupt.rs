//! How many single corruptions of a recording the replay catches: `corrupt FILE COUNT SEED`. Prints those it misses.

#[path = "../tests/common/mod.rs"]
mod common;

use common::{Random, check, field, kernel, lines, with_field};
use std::path::PathBuf;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let [_, file, count, seed] = args.as_slice() else {
        eprintln!("usage: corrupt FILE COUNT SEED");
        std::process::exit(2);
    };
    let path = PathBuf::from(file);
    let kernel = kernel(&path);
    let original = lines(&path);
    let places: Vec<usize> =
        (0..original.len()).filter(|&i| original[i].contains("kvm_tdp_mmu_spte_changed")).collect();
    let mut random = Random(seed.parse().expect("a number"));
    let mut tally = std::collections::BTreeMap::<&str, (u64, u64)>::new();
    for _ in 0..count.parse::<u64>().expect("a number") {
        let at = places[random.below(places.len())];
        let mut edited = original.clone();
        // The bits that an explanation could swallow, as often as all others.
        let bit = if random.below(2) == 0 {
            [1, 5, 6, 7, 9, 10, 11, 63][random.below(8)]
        } else {
            random.below(64)
        };
        let what = match random.below(3) {
            0 => {
                let (_, _, value) = field(&original[at], "old_spte");
                edited[at] = with_field(&original[at], "old_spte", value ^ 1 << bit);
                "old"
            }
            1 => {
                let (_, _, value) = field(&original[at], "new_spte");
                edited[at] = with_field(&original[at], "new_spte", value ^ 1 << bit);
                "new"
            }
            _ => {
                edited.remove(at);
                "drop"
            }
        };
        let caught = check(&kernel, &edited).map_or(true, |r| r.checked.mismatch > 0);
        let entry = tally.entry(what).or_default();
        entry.0 += 1;
        if !caught {
            entry.1 += 1;
            println!("missed: {what} bit {bit} at line {}: {}", at + 1, original[at].trim_start());
        }
    }
    println!("{file}: {tally:?} (tried, missed)");
}
