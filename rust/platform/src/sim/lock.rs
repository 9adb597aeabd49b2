//! The reader-writer lock of the simulation: fair, first in first out.
//!
//! Many readers or one writer; whoever cannot enter queues, a newcomer passes nobody who waits to write, and a release hands the lock to the head of the queue
//! (and to the readers right behind a reader), as the real platform's lock does. A waiter's place and its grant are decided at the release, so that what a
//! schedule chooses is only who runs.

use std::{
    collections::VecDeque,
    sync::{Mutex, MutexGuard, PoisonError},
};

use super::{report::Kind, scheduler, world};
use crate::{api::RawRwLock, site::Site};

/// See the module's text. Outside of a run it can be taken while it is free, and waiting is a panic: nobody would ever wake up.
#[derive(Debug)]
pub struct SimRwLock {
    /// Held for a few instructions, never across a switch.
    state: Mutex<Lock>,
}

#[derive(Debug, Default)]
struct Lock {
    readers: u32,
    writer: bool,
    /// Task and mode (shared).
    queue: VecDeque<(u32, bool)>,
}

impl Lock {
    fn admits(&self, shared: bool) -> bool {
        if shared { !self.writer } else { !self.writer && self.readers == 0 }
    }

    fn writers_wait(&self) -> bool {
        self.queue.iter().any(|(_, shared)| !shared)
    }

    fn enter(&mut self, shared: bool) {
        if shared { self.readers += 1 } else { self.writer = true }
    }

    fn try_enter(&mut self, shared: bool) -> bool {
        let admits = self.admits(shared) && if shared { !self.writers_wait() } else { self.queue.is_empty() };
        if admits {
            self.enter(shared);
        }
        admits
    }
}

fn abandoned() -> bool {
    world::with(|world| world.abandoned.is_some()).unwrap_or(false)
}

impl SimRwLock {
    fn state(&self) -> MutexGuard<'_, Lock> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn key(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }

    fn try_take(&self, shared: bool) -> bool {
        scheduler::settle(Site::LockAcquire);
        if abandoned() {
            return true;
        }
        let taken = self.state().try_enter(shared);
        if taken {
            self.taken(shared);
        }
        taken
    }

    fn take(&self, shared: bool, waiting: impl FnOnce()) {
        if self.try_take(shared) {
            return;
        }
        waiting();
        let Some(task) = world::with(|world| world.current) else {
            panic!("a lock of the simulation is held and nobody could release it: no run on this OS thread");
        };
        self.state().queue.push_back((task, shared));
        let why = if shared { "mmu_lock, to read" } else { "mmu_lock, to write" };
        while !abandoned() && self.state().queue.iter().any(|(waiter, _)| *waiter == task) {
            scheduler::block(self.key(), why, Site::LockAcquire, None);
        }
        self.taken(shared);
    }

    fn taken(&self, shared: bool) {
        world::with(|world| {
            world.drain_all(world.current);
            let task = world.task();
            task.held += 1;
            if task.held == 1 {
                task.step_since = task.accesses;
            }
            world.mix(0x10C4_0000 | u64::from(shared) << 8 | u64::from(world.current));
            world.note(Site::LockAcquire, Kind::Lock, 0, u64::from(shared), || mode(shared));
        });
    }

    fn release(&self, shared: bool) {
        scheduler::settle(Site::LockRelease);
        let over = world::with(|world| {
            if world.abandoned.is_some() {
                return true;
            }
            world.drain_all(world.current);
            world.step_ends();
            let task = world.task();
            debug_assert!(task.held != 0, "{} releases a lock that it does not hold", task.name);
            task.held = task.held.saturating_sub(1);
            world.mix(0x0DD1_0000 | u64::from(shared) << 8 | u64::from(world.current));
            world.note(Site::LockRelease, Kind::Unlock, 0, u64::from(shared), || mode(shared));
            false
        });
        let mut state = self.state();
        if shared {
            state.readers = state.readers.saturating_sub(1);
        } else {
            state.writer = false;
        }
        if over == Some(true) {
            return;
        }
        while let Some(&(task, shared)) = state.queue.front() {
            if !state.admits(shared) {
                break;
            }
            state.enter(shared);
            state.queue.pop_front();
            world::with(|world| world.wake_task(task));
        }
    }
}

fn mode(shared: bool) -> String {
    if shared { "shared" } else { "exclusive" }.to_owned()
}

impl RawRwLock for SimRwLock {
    fn new() -> Self {
        SimRwLock { state: Mutex::default() }
    }

    fn lock_shared(&self) {
        self.take(true, || ());
    }

    fn unlock_shared(&self) {
        self.release(true);
    }

    fn try_lock_shared(&self) -> bool {
        self.try_take(true)
    }

    fn lock_exclusive(&self) {
        self.take(false, || ());
    }

    fn unlock_exclusive(&self) {
        self.release(false);
    }

    fn try_lock_exclusive(&self) -> bool {
        self.try_take(false)
    }

    fn is_contended(&self) -> bool {
        let state = self.state();
        state.writers_wait() || state.writer && !state.queue.is_empty()
    }

    fn lock_shared_or(&self, waiting: impl FnOnce()) {
        self.take(true, waiting);
    }

    fn lock_exclusive_or(&self, waiting: impl FnOnce()) {
        self.take(false, waiting);
    }
}
