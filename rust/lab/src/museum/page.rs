//! The catalogue as a page: what `docs/museum.md` holds.

use std::fmt::Write;

use super::cards;

/// Numbers of the history that have no exhibit, and why.
pub const ABSENT: &[(u32, &str)] = &[
    (
        12,
        "the fix of 11 read the header of a root that has none (PAE and nested roots); every root of this engine has one",
    ),
    (32, "private memory and its attributes are not built"),
    (38, "how many CPUs a worker takes is a matter of time: `bench zap` and `simulate` measure it"),
    (43, "the recovery is called here, it has no thread that could be woken too early"),
];

const HEAD: &str = "# The museum

Bugs that Linux had (or a patch on its list), put back into this engine one at a time, at the place where they were. Each is a mutation of a line or two behind `P::bug(..)`, which is `false` at compile time on the
real platform: what is measured has none of it.

```
tdpmmu bugs list                 the table below
tdpmmu bugs show 21              cause, interleaving, mutation, program
tdpmmu bugs demo 21              search, until an oracle fires; the shortest schedule; its story; a seed that replays
tdpmmu bugs demo --all --json    every exhibit, five seeds, and the same budget with the bug off
```

An exhibit has a small program: the threads that have to meet, and no more. Which oracle is to fire is written nowhere; the demonstration reports which did. With the bug off the same search, with the same seeds and as
many schedules, must find nothing. Five exhibits (24, 30, 34, 40, 42) are about what no general judge can know, a mapping level or the mode of a lock: their programs carry an expectation, which is reported as the rule `expectation`.
What a cleverer schedule is not needed for shows at once: 19, 20, 35 and 39 break a budget in any schedule, 33, 36 and 37 need no second thread, 15 is shown as the kernel showed it, by a warning. 44a to 44c need store buffers.

This page is written by `TDPMMU_BLESS=1 cargo test -p tdpmmu-lab --test museum the_page`, and a test compares it.

";

/// The page.
pub fn page() -> String {
    let mut page = HEAD.to_owned();
    // Writing to a string cannot fail.
    let _ = writeln!(
        page,
        "| id | title | class | Linux | reference | mutation |\n| --- | --- | --- | --- | --- | --- |"
    );
    for card in cards() {
        let _ = writeln!(
            page,
            "| {} | {} | {} | {} | {} | `{}`: {} |",
            card.id, card.title, card.class, card.kernels, card.reference, card.file, card.mutation
        );
    }
    page += "\nNumbers of the history without an exhibit:\n\n| number | why |\n| --- | --- |\n";
    for (number, why) in ABSENT {
        let _ = writeln!(page, "| {number} | {why} |");
    }
    page
}
