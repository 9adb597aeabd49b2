//! The lock under loom: every interleaving of a few threads, with sleeps that only a wake-up ends.
//!
//! Run with `RUSTFLAGS="--cfg loom" LOOM_MAX_PREEMPTIONS=2 cargo test --release --test loom_lock`.
//! loom reports a thread that is never woken as a deadlock; the canaries at the end show that it does.
#![cfg(loom)]

use loom::{
    cell::UnsafeCell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};
use tdpmmu_platform::{
    RawRwLock,
    rwlock::{QueuedLock, mutant},
};

/// A lock and what it protects; loom panics on overlapping or unordered accesses to the value.
struct Cell<const M: u8> {
    lock: QueuedLock<M>,
    value: UnsafeCell<u64>,
}

// SAFETY: the value is accessed with the lock held; loom's UnsafeCell checks exactly that.
unsafe impl<const M: u8> Sync for Cell<M> {}
// SAFETY: as above.
unsafe impl<const M: u8> Send for Cell<M> {}

impl<const M: u8> Cell<M> {
    fn new() -> Arc<Self> {
        Arc::new(Cell { lock: QueuedLock::new(), value: UnsafeCell::new(0) })
    }

    fn bump(&self) {
        self.lock.lock_exclusive();
        // SAFETY: the exclusive hold; loom checks it.
        self.value.with_mut(|v| unsafe { *v += 1 });
        self.lock.unlock_exclusive();
    }

    fn get(&self) -> u64 {
        self.lock.lock_shared();
        // SAFETY: the shared hold; loom checks it.
        let v = self.value.with(|v| unsafe { *v });
        self.lock.unlock_shared();
        v
    }
}

fn bounded(threads_body: impl Fn() + Sync + Send + 'static) {
    let mut builder = loom::model::Builder::new();
    // LOOM_MAX_PREEMPTIONS, where given, has been read by the builder.
    builder.preemption_bound = builder.preemption_bound.or(Some(2));
    builder.check(threads_body);
}

fn two_writers_and_a_reader<const M: u8>() {
    bounded(|| {
        let cell = Cell::<M>::new();
        let a = cell.clone();
        let b = cell.clone();
        let writer = thread::spawn(move || a.bump());
        let reader = thread::spawn(move || b.get());
        cell.bump();
        writer.join().unwrap();
        assert!(reader.join().unwrap() <= 2);
        assert_eq!(cell.get(), 2);
        assert!(!cell.lock.is_contended());
    });
}

fn two_readers_and_a_writer<const M: u8>() {
    bounded(|| {
        let cell = Cell::<M>::new();
        let a = cell.clone();
        let b = cell.clone();
        let writer = thread::spawn(move || a.bump());
        let reader = thread::spawn(move || b.get());
        cell.get();
        writer.join().unwrap();
        reader.join().unwrap();
        assert_eq!(cell.get(), 1);
    });
}

fn a_newcomer_does_not_pass_a_queued_writer<const M: u8>() {
    bounded(|| {
        let lock = Arc::new(QueuedLock::<M>::new());
        let entered = Arc::new(AtomicBool::new(false));
        lock.lock_shared();
        let writer = {
            let (lock, entered) = (lock.clone(), entered.clone());
            thread::spawn(move || {
                lock.lock_exclusive();
                entered.store(true, Ordering::Relaxed);
                lock.unlock_exclusive();
            })
        };
        while !lock.is_contended() {
            thread::yield_now();
        }
        let newcomer = {
            let (lock, entered) = (lock.clone(), entered.clone());
            thread::spawn(move || {
                lock.lock_shared();
                assert!(entered.load(Ordering::Relaxed), "a reader passed the queued writer");
                lock.unlock_shared();
            })
        };
        assert!(!lock.try_lock_exclusive());
        lock.unlock_shared();
        writer.join().unwrap();
        newcomer.join().unwrap();
    });
}

fn a_retake_hands_the_lock_over<const M: u8>(shared: bool) {
    bounded(move || {
        let lock = Arc::new(QueuedLock::<M>::new());
        let entered = Arc::new(AtomicBool::new(false));
        lock.lock_exclusive();
        let waiter = {
            let (lock, entered) = (lock.clone(), entered.clone());
            thread::spawn(move || {
                if shared {
                    lock.lock_shared();
                    entered.store(true, Ordering::Relaxed);
                    lock.unlock_shared();
                } else {
                    lock.lock_exclusive();
                    entered.store(true, Ordering::Relaxed);
                    lock.unlock_exclusive();
                }
            })
        };
        while !lock.is_contended() {
            thread::yield_now();
        }
        lock.unlock_exclusive();
        lock.lock_exclusive();
        assert!(entered.load(Ordering::Relaxed), "the lock was not handed to the waiter");
        lock.unlock_exclusive();
        waiter.join().unwrap();
    });
}

#[test]
fn writers_and_readers_exclude_each_other_and_nobody_is_forgotten() {
    two_writers_and_a_reader::<{ mutant::NONE }>();
}

#[test]
fn readers_leaving_let_the_writer_in() {
    two_readers_and_a_writer::<{ mutant::NONE }>();
}

#[test]
fn a_queued_writer_blocks_new_readers() {
    a_newcomer_does_not_pass_a_queued_writer::<{ mutant::NONE }>();
}

#[test]
fn unlock_and_lock_hands_over_to_a_waiting_reader() {
    a_retake_hands_the_lock_over::<{ mutant::NONE }>(true);
}

#[test]
fn unlock_and_lock_hands_over_to_a_waiting_writer() {
    a_retake_hands_the_lock_over::<{ mutant::NONE }>(false);
}

#[test]
fn try_lock_excludes_too() {
    bounded(|| {
        let cell = Cell::<{ mutant::NONE }>::new();
        let other = cell.clone();
        let writer = thread::spawn(move || {
            if other.lock.try_lock_exclusive() {
                // SAFETY: the exclusive hold; loom checks it.
                other.value.with_mut(|v| unsafe { *v += 1 });
                other.lock.unlock_exclusive();
            }
        });
        if cell.lock.try_lock_shared() {
            // SAFETY: the shared hold; loom checks it.
            cell.value.with(|v| unsafe { *v });
            cell.lock.unlock_shared();
        }
        writer.join().unwrap();
    });
}

// Canaries: each defect must be found. Each runs in a process of its own, because loom unwinds blocked threads after
// a deadlock and their destructors abort.

fn must_fail(canary: &str, message: &str) {
    let exe = std::env::current_exe().unwrap();
    let run = std::process::Command::new(exe)
        .args([&format!("canary::{canary}"), "--exact", "--ignored", "--nocapture"])
        .env("RUST_BACKTRACE", "0")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&run.stderr).into_owned() + &String::from_utf8_lossy(&run.stdout);
    assert!(said.contains("running 1 test"), "no canary of that name: {canary}");
    assert!(!run.status.success(), "{canary} was not caught");
    assert!(said.contains(message), "{canary} failed for another reason:\n{said}");
}

mod canary {
    use super::*;

    #[test]
    #[ignore = "must fail: started by the test of its catcher"]
    fn blind_head() {
        two_writers_and_a_reader::<{ mutant::BLIND_HEAD }>();
    }

    #[test]
    #[ignore = "must fail: started by the test of its catcher"]
    fn silent_newcomer() {
        two_readers_and_a_writer::<{ mutant::SILENT_NEWCOMER }>();
    }

    #[test]
    #[ignore = "must fail: started by the test of its catcher"]
    fn silent_server() {
        two_writers_and_a_reader::<{ mutant::SILENT_SERVER }>();
    }

    #[test]
    #[ignore = "must fail: started by the test of its catcher"]
    fn barging_reader() {
        a_newcomer_does_not_pass_a_queued_writer::<{ mutant::BARGING_READER }>();
    }

    #[test]
    #[ignore = "must fail: started by the test of its catcher"]
    fn rash_writer() {
        two_readers_and_a_writer::<{ mutant::RASH_WRITER }>();
    }
}

#[test]
fn a_head_that_sleeps_blindly_is_caught() {
    must_fail("blind_head", "deadlock");
}

#[test]
fn a_newcomer_that_keeps_the_wake_up_is_caught() {
    must_fail("silent_newcomer", "deadlock");
}

#[test]
fn a_server_that_does_not_wake_is_caught() {
    must_fail("silent_server", "deadlock");
}

#[test]
fn a_barging_reader_is_caught() {
    must_fail("barging_reader", "passed the queued writer");
}

#[test]
fn a_writer_among_readers_is_caught() {
    must_fail("rash_writer", "Causality violation");
}
