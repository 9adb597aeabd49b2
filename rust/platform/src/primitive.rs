//! The words and sleeps that the protocols are built from: `std` and futex, or loom's under `--cfg loom`.
//!
//! The lock and the RCU epoch import from here and from nowhere else, so that loom explores the very code that runs.
//! Constants that only trade speed (spins, slots) shrink under loom: its searches must reach the sleeping paths.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, AtomicU64, Ordering},
};

/// Spins before a queued waiter sleeps.
pub(crate) const SPINS: u32 = if cfg!(loom) { 0 } else { 100 };

#[cfg(not(loom))]
pub(crate) fn relax() {
    std::hint::spin_loop();
}

#[cfg(loom)]
pub(crate) fn relax() {
    loom::thread::yield_now();
}

/// Keeps its value from sharing a cache line with a neighbour; two lines, since x86 fetches them in pairs.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct CachePadded<T>(pub T);

impl<T> std::ops::Deref for CachePadded<T> {
    type Target = T;
    #[inline(always)]
    fn deref(&self) -> &T {
        &self.0
    }
}

/// A 32-bit word on which threads sleep.
///
/// `wait` returns at once if the word is not `expected`, else sleeps until a `wake`. Under loom the sleep is a
/// condition variable and not a spin on the value: a wake-up that the protocol forgets is then a deadlock that
/// loom reports, although the word has changed.
#[derive(Debug)]
pub(crate) struct Sleep {
    pub word: AtomicU32,
    #[cfg(loom)]
    queue: (loom::sync::Mutex<()>, loom::sync::Condvar),
}

impl Sleep {
    pub fn new(value: u32) -> Self {
        Sleep {
            word: AtomicU32::new(value),
            #[cfg(loom)]
            queue: (loom::sync::Mutex::new(()), loom::sync::Condvar::new()),
        }
    }

    #[cfg(not(loom))]
    pub fn wait(&self, expected: u32) {
        crate::futex::wait(&self.word, expected, None);
    }

    #[cfg(not(loom))]
    pub fn wake_all(&self) {
        crate::futex::wake(&self.word, i32::MAX as u32);
    }

    #[cfg(loom)]
    pub fn wait(&self, expected: u32) {
        let guard = self.queue.0.lock().unwrap();
        if self.word.load(Ordering::SeqCst) == expected {
            drop(self.queue.1.wait(guard).unwrap());
        }
    }

    #[cfg(loom)]
    pub fn wake_all(&self) {
        let _guard = self.queue.0.lock().unwrap();
        self.queue.1.notify_all();
    }
}
