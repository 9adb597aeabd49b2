//! Publishing a table, and freezing an entry while it is flushed, under loom.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test --release --test loom_freeze`.
//!
//! *Publish*: whoever finds a table through its parent entry finds what was written to it before. *Freeze*: between the removal of an entry and the flush nobody
//! installs another; whoever installs after the thaw comes after the flush. *Teardown*: an installer that found a table before it was unlinked either has its entry
//! found by the teardown, or fails. Each ordering and each step taken away must be found.
#![cfg(loom)]

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

mod mutant {
    pub const NONE: u8 = 0;
    /// The exchange that links the table does not release.
    pub const PLAIN_PUBLISH: u8 = 1;
    /// The walker's load does not acquire.
    pub const PLAIN_WALK: u8 = 2;
    /// The entry becomes empty at once; the flush comes after.
    pub const NO_FREEZE: u8 = 3;
    /// The thaw does not release.
    pub const PLAIN_THAW: u8 = 4;
    /// The installer's exchange does not acquire.
    pub const PLAIN_INSTALL: u8 = 5;
    /// The installer takes a frozen entry for an empty one.
    pub const INSTALLS_OVER_FROZEN: u8 = 6;
    /// The teardown leaves entries alone that look empty.
    pub const SKIPS_EMPTY: u8 = 7;
    /// The teardown reads and then writes.
    pub const LOAD_THEN_STORE: u8 = 8;
}

const EMPTY: u64 = 0;
/// Not present, and not empty.
const FROZEN: u64 = 0x5a0;
const TABLE: u64 = 1 << 12 | 1;
const LEAF: u64 = 2 << 12 | 1;

fn bounded(body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(body);
}

/// An entry, and what its owner writes beside it: a table's header, or the book of flushes.
struct Entry {
    word: AtomicU64,
    beside: UnsafeCell<u64>,
}

// SAFETY: `beside` is ordered by the protocol on `word`; loom's UnsafeCell checks that.
unsafe impl Sync for Entry {}
// SAFETY: as above.
unsafe impl Send for Entry {}

impl Entry {
    fn new(word: u64) -> Arc<Self> {
        Arc::new(Entry { word: AtomicU64::new(word), beside: UnsafeCell::new(0) })
    }

    fn write(&self, value: u64) {
        // SAFETY: only the owner of the entry's transition writes; loom checks it.
        self.beside.with_mut(|beside| unsafe { *beside = value });
    }

    fn read(&self) -> u64 {
        // SAFETY: after the transition was seen; loom checks it.
        self.beside.with(|beside| unsafe { *beside })
    }
}

fn publish_against_walk<const M: u8>() {
    bounded(|| {
        let entry = Entry::new(EMPTY);
        let walker = {
            let entry = entry.clone();
            let order = if M == mutant::PLAIN_WALK { Ordering::Relaxed } else { Ordering::Acquire };
            thread::spawn(move || {
                if entry.word.load(order) == TABLE {
                    assert_eq!(entry.read(), 9, "a table was found before its header");
                }
            })
        };
        entry.write(9);
        let order = if M == mutant::PLAIN_PUBLISH { Ordering::Relaxed } else { Ordering::AcqRel };
        entry.word.compare_exchange(EMPTY, TABLE, order, Ordering::Relaxed).unwrap();
        walker.join().unwrap();
    });
}

#[test]
fn a_table_that_is_found_is_whole() {
    publish_against_walk::<{ mutant::NONE }>();
}

#[test]
#[should_panic]
fn canary_published_without_release() {
    publish_against_walk::<{ mutant::PLAIN_PUBLISH }>();
}

#[test]
#[should_panic]
fn canary_walked_without_acquire() {
    publish_against_walk::<{ mutant::PLAIN_WALK }>();
}

/// The zapper removes a leaf and flushes; the installer maps the gfn again when the entry is empty.
fn freeze_against_install<const M: u8>() {
    bounded(|| {
        let entry = Entry::new(LEAF);
        let installer = {
            let entry = entry.clone();
            thread::spawn(move || {
                for _ in 0..2 {
                    let seen = entry.word.load(Ordering::Relaxed);
                    let empty = seen == EMPTY || M == mutant::INSTALLS_OVER_FROZEN && seen == FROZEN;
                    let order = if M == mutant::PLAIN_INSTALL { Ordering::Relaxed } else { Ordering::AcqRel };
                    if empty && entry.word.compare_exchange(seen, TABLE, order, Ordering::Relaxed).is_ok() {
                        assert_eq!(entry.read(), 1, "installed before the flush of what was there");
                        return;
                    }
                    thread::yield_now();
                }
            })
        };
        if M == mutant::NO_FREEZE {
            entry.word.compare_exchange(LEAF, EMPTY, Ordering::AcqRel, Ordering::Relaxed).unwrap();
            entry.write(1);
        } else {
            entry.word.compare_exchange(LEAF, FROZEN, Ordering::AcqRel, Ordering::Relaxed).unwrap();
            // The flush.
            entry.write(1);
            let order = if M == mutant::PLAIN_THAW { Ordering::Relaxed } else { Ordering::Release };
            entry.word.store(EMPTY, order);
        }
        installer.join().unwrap();
    });
}

#[test]
fn nobody_installs_before_the_flush() {
    freeze_against_install::<{ mutant::NONE }>();
}

#[test]
#[should_panic]
fn canary_removed_without_a_freeze() {
    freeze_against_install::<{ mutant::NO_FREEZE }>();
}

#[test]
#[should_panic]
fn canary_thawed_without_release() {
    freeze_against_install::<{ mutant::PLAIN_THAW }>();
}

#[test]
#[should_panic]
fn canary_installed_without_acquire() {
    freeze_against_install::<{ mutant::PLAIN_INSTALL }>();
}

#[test]
#[should_panic]
fn canary_installed_over_frozen() {
    freeze_against_install::<{ mutant::INSTALLS_OVER_FROZEN }>();
}

/// A table under a parent entry: the teardown unlinks it and takes what its entry holds; an installer that found the table maps a leaf in it.
fn teardown_against_install<const M: u8>() {
    bounded(|| {
        let parent = Entry::new(TABLE);
        let child = Entry::new(EMPTY);
        let installer = {
            let (parent, child) = (parent.clone(), child.clone());
            thread::spawn(move || {
                parent.word.load(Ordering::Acquire) == TABLE
                    && child.word.compare_exchange(EMPTY, LEAF, Ordering::AcqRel, Ordering::Relaxed).is_ok()
            })
        };
        parent.word.swap(EMPTY, Ordering::AcqRel);
        let taken = match M {
            mutant::SKIPS_EMPTY if child.word.load(Ordering::Acquire) == EMPTY => EMPTY,
            mutant::LOAD_THEN_STORE => {
                let seen = child.word.load(Ordering::Acquire);
                child.word.store(FROZEN, Ordering::Release);
                seen
            }
            _ => child.word.swap(FROZEN, Ordering::AcqRel),
        };
        let installed = installer.join().unwrap();
        assert_eq!(
            installed,
            taken == LEAF,
            "a leaf was installed and not taken, or taken and not installed"
        );
    });
}

#[test]
fn what_was_installed_in_an_unlinked_table_is_taken() {
    teardown_against_install::<{ mutant::NONE }>();
}

#[test]
#[should_panic]
fn canary_teardown_that_skips_empty_entries() {
    teardown_against_install::<{ mutant::SKIPS_EMPTY }>();
}

#[test]
#[should_panic]
fn canary_teardown_that_reads_and_then_writes() {
    teardown_against_install::<{ mutant::LOAD_THEN_STORE }>();
}
