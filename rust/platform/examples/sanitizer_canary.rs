//! Defects on purpose, one per sanitizer: a build that does not report its own proves nothing about the others.
//!
//! `scripts/sanitize` runs each under the same flags and suppressions as the tests, and fails when the report is missing (or, for
//! `clean`, when there is one). Reads are made in functions of this file: what precompiled std reads, no sanitizer of a stable toolchain sees.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use tdpmmu_platform::{Mutex, Real};

struct Shared(UnsafeCell<u64>);

// SAFETY: it is not: `race` has two threads write to it at once, which is what the sanitizer is to find. `clean` orders all accesses by a lock.
unsafe impl Sync for Shared {}

static PLAIN: Shared = Shared(UnsafeCell::new(0));
static READY: AtomicU32 = AtomicU32::new(0);
static LOOSE: AtomicBool = AtomicBool::new(false);

#[inline(never)]
fn read(address: *const u64) -> u64 {
    // SAFETY: none; the caller passes memory that was freed. Only sanitized builds run this.
    unsafe { address.read_volatile() }
}

#[inline(never)]
fn bump() {
    // SAFETY: none in `race`; in `clean` the caller holds the lock.
    unsafe { *PLAIN.0.get() += 1 }
}

fn use_after_free() {
    let boxed = Box::new(7u64);
    let address: *const u64 = &raw const *boxed;
    drop(boxed);
    println!("read {}", read(address));
}

fn leak() {
    let kept = vec![1u8; 4096 * 10];
    println!("{}", kept.len());
    std::mem::forget(kept);
}

/// Both threads are there before either writes, and nothing orders the writes.
fn race() {
    two(|| (0..1000).for_each(|_| bump()));
}

/// A lock whose release is not one: the classic defect of a lock of one's own.
fn weak_lock() {
    two(|| {
        for _ in 0..1000 {
            while LOOSE.swap(true, Ordering::Relaxed) {
                thread::yield_now();
            }
            bump();
            LOOSE.store(false, Ordering::Relaxed);
        }
    });
}

/// The house's own mutex, contended: no report.
fn clean() {
    static LOCK: std::sync::OnceLock<Mutex<Real, ()>> = std::sync::OnceLock::new();
    LOCK.get_or_init(|| Mutex::new(()));
    two(|| {
        for _ in 0..1000 {
            let _held = LOCK.get().expect("made above").lock();
            bump();
        }
    });
}

fn two(body: impl Fn() + Copy + Send + 'static) {
    let threads = [0, 1].map(|_| {
        thread::spawn(move || {
            READY.fetch_add(1, Ordering::SeqCst);
            while READY.load(Ordering::SeqCst) < 2 {
                std::hint::spin_loop();
            }
            body();
        })
    });
    for thread in threads {
        thread.join().expect("no panic");
    }
}

fn main() {
    let which = std::env::args().nth(1).unwrap_or_default();
    match which.as_str() {
        "use-after-free" => use_after_free(),
        "leak" => leak(),
        "race" => race(),
        "weak-lock" => weak_lock(),
        "clean" => clean(),
        _ => {
            eprintln!("usage: sanitizer_canary use-after-free|leak|race|weak-lock|clean");
            std::process::exit(2);
        }
    }
}
