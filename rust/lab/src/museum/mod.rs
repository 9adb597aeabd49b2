//! # The museum: bugs that were really there, found again
//!
//! **Guarantee.** Each exhibit is one defect of Linux's history (or of a patch on its list), put back into our engine at the place where it was, by a mutation of a line or two that does not exist on the real
//! platform. [`demo`] finds a schedule under which an oracle fires that was not told which bug to look for, and shows it; with the bug off, the same budget finds nothing.
//!
//! **Mechanism.** An [`Entry`] has a small [`Program`](crate::program::Program): the threads that have to meet. When concurrency is the cause, meeting at the wrong moment is left to the search. What fires is
//! reported as the judges name it; an entry does not say which.
//!
//! | file | idea |
//! | --- | --- |
//! | `entry.rs` | what an exhibit is |
//! | `card.rs` | the catalogue as data |
//! | `command.rs` | JSON in, JSON out |
//! | `mutation.rs` | where each bug sits in the engine |
//! | `page.rs` | the catalogue as a page; what is not here, and why |
//! | `demo.rs` | both searches, and what they came to |
//! | `early.rs` | 1 to 8: debts, the iterator, RCU |
//! | `roots.rs` | 9 to 13: roots, and who may still reach them |
//! | `dirty.rs` | 14 to 17: Dirty, W, and lost races |
//! | `designs.rs` | 18 to 23, 30, 39, 40: who tears a root down, in which steps, and who waits |
//! | `faults.rs` | 24 to 42: what faults, aging, huge pages and the NX mitigation do to single entries |
//! | `shadow.rs` | 25, 33 to 37, 44: the shadow MMU's reclaim, lists, books and walkers |
//! | `canaries.rs` | no history: each shows that an oracle is awake; and the barrier of 44 |
//!
//! What has no exhibit is named in [`ABSENT`], with the reason.

mod canaries;
mod card;
mod command;
mod demo;
mod designs;
mod dirty;
mod early;
mod entry;
mod faults;
mod mutation;
mod page;
mod roots;
mod shadow;

pub use card::{Card, cards};
pub use command::{command, list_json, show};
pub use demo::{Budget, Demo, Museum, demo, demo_all, demo_of};
pub use entry::{Catcher, Class, Entry, Hints};
pub use mutation::{Mutation, mutation};
pub use page::{ABSENT, page};

/// Every exhibit, in the catalogue's order.
pub fn entries() -> Vec<&'static Entry> {
    let mut all: Vec<&Entry> = [
        early::ENTRIES,
        roots::ENTRIES,
        dirty::ENTRIES,
        designs::ENTRIES,
        faults::ENTRIES,
        shadow::ENTRIES,
        canaries::ENTRIES,
    ]
    .into_iter()
    .flatten()
    .collect();
    all.sort_by_key(|entry| entry.bug);
    all
}

/// The canaries: no history, and not counted; each shows that an oracle is awake.
pub fn canaries() -> &'static [Entry] {
    canaries::CANARIES
}

/// The exhibit, or the canary, of that id.
pub fn find(id: &str) -> Option<&'static Entry> {
    entries().into_iter().chain(canaries()).find(|entry| entry.id().eq_ignore_ascii_case(id))
}

/// The program of the exhibit with that id, for who replays its schedules.
pub fn program_named(id: &str) -> Option<crate::program::Program> {
    Some((find(id)?.program)())
}

#[cfg(test)]
mod tests;
