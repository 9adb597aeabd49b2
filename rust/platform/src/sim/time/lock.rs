//! mmu_lock in virtual time.
//!
//! **Guarantee.** The rules of [`crate::rwlock`]: many readers or one writer, a queue served first in first out, newcomers that read pass readers and no waiting writer.
//!
//! **Mechanism.** One word whose cache line is paid for like any other's, so that hundreds of readers queue for the line even where none excludes another. A waiter spins for
//! [`Costs::lock_spin`](super::Costs), on its CPU, then sleeps; whoever lets it in pays a futex wake-up in the second case only. Being let in is taking the lock: the state
//! changes hands at the release.

use std::{cell::UnsafeCell, collections::VecDeque};

use super::{OUTSIDE, Timed, current_world};
use crate::api::RawRwLock;

#[derive(Default)]
struct State {
    writer: bool,
    readers: u32,
    writers_waiting: u32,
    /// (task, shared, let in).
    queue: VecDeque<(u32, bool)>,
    /// Let in and not gone on yet.
    admitted: Vec<u32>,
}

/// See the module's text.
pub struct TimedLock {
    /// Where its line is.
    word: u64,
    state: UnsafeCell<State>,
}

impl std::fmt::Debug for TimedLock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TimedLock")
    }
}

// SAFETY: a world's tasks run on one thread, one at a time, and a lock is used by the tasks of one world: `State` is never borrowed across a
// switch (`with` below). Outside of a world only its maker uses it.
unsafe impl Send for TimedLock {}
// SAFETY: as above.
unsafe impl Sync for TimedLock {}

impl TimedLock {
    fn with<R>(&self, body: impl FnOnce(&mut State) -> R) -> R {
        // SAFETY: `body` is one of the closures below; none of them makes a call that could switch tasks or come back here.
        body(unsafe { &mut *self.state.get() })
    }

    fn word(&self) -> usize {
        (&raw const self.word).addr()
    }

    fn pay(&self) {
        if let Some(world) = current_world() {
            world.word_written(self.word());
        }
    }

    fn me() -> u32 {
        current_world().map_or(OUTSIDE, |world| world.task())
    }

    fn enter(&self, shared: bool) -> bool {
        self.with(|state| {
            let open = if shared {
                !state.writer && state.writers_waiting == 0
            } else {
                !state.writer && state.readers == 0 && state.queue.is_empty()
            };
            if open {
                if shared { state.readers += 1 } else { state.writer = true }
            }
            open
        })
    }

    fn wait(&self, shared: bool) {
        let me = Self::me();
        self.with(|state| {
            state.queue.push_back((me, shared));
            state.writers_waiting += u32::from(!shared);
        });
        let admitted = || {
            self.with(|state| {
                let place = state.admitted.iter().position(|&task| task == me);
                place.map(|place| state.admitted.swap_remove(place)).is_some()
            })
        };
        let Some(world) = current_world() else { panic!("mmu_lock is held outside of its world") };
        world.spin_for_lock(self.word());
        while !admitted() {
            world.sleep(None);
        }
        // The line comes from whoever let us in.
        self.pay();
    }

    /// Lets in whoever may.
    fn serve(&self) {
        loop {
            let next = self.with(|state| {
                let &(task, shared) = state.queue.front()?;
                if state.writer || !shared && state.readers != 0 {
                    return None;
                }
                state.queue.pop_front();
                if shared {
                    state.readers += 1;
                } else {
                    state.writer = true;
                    state.writers_waiting -= 1;
                }
                state.admitted.push(task);
                Some(task)
            });
            match (next, current_world()) {
                (Some(task), Some(world)) => world.let_in(task),
                _ => return,
            }
        }
    }
}

impl RawRwLock for TimedLock {
    fn new() -> Self {
        TimedLock { word: 0, state: UnsafeCell::default() }
    }

    fn lock_shared(&self) {
        self.lock_shared_or(|| ());
    }

    fn lock_shared_or(&self, waiting: impl FnOnce()) {
        self.pay();
        if !self.enter(true) {
            waiting();
            self.wait(true);
        }
    }

    fn unlock_shared(&self) {
        self.pay();
        let last = self.with(|state| {
            debug_assert!(state.readers > 0, "unlock_shared of a lock that nobody reads");
            state.readers -= 1;
            state.readers == 0
        });
        if last {
            self.serve();
        }
    }

    fn try_lock_shared(&self) -> bool {
        self.pay();
        self.enter(true)
    }

    fn lock_exclusive(&self) {
        self.lock_exclusive_or(|| ());
    }

    fn lock_exclusive_or(&self, waiting: impl FnOnce()) {
        self.pay();
        if !self.enter(false) {
            waiting();
            self.wait(false);
        }
    }

    fn unlock_exclusive(&self) {
        self.pay();
        self.with(|state| {
            debug_assert!(state.writer, "unlock_exclusive of a lock that nobody writes");
            state.writer = false;
        });
        self.serve();
    }

    fn try_lock_exclusive(&self) -> bool {
        self.pay();
        self.enter(false)
    }

    fn is_contended(&self) -> bool {
        // Part of a reschedule check, whose price covers it.
        self.with(|state| state.writers_waiting != 0 || state.writer && !state.queue.is_empty())
    }
}

impl Timed {
    /// So many wait for `lock`.
    pub fn waiters(lock: &TimedLock) -> usize {
        lock.with(|state| state.queue.len())
    }
}
