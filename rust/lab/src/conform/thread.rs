//! One OS thread per recorded thread, and a baton.
//!
//! **Guarantee.** Inputs are carried out in their order, each by the thread that was recorded to do it, one at a time; a walk that gave up mmu_lock in the recording gives it up
//! here after as many changed entries, and what other threads did meanwhile is done meanwhile.
//!
//! **Mechanism.** The stage hands input after input to its owner. An operation that yields hands the baton on from inside, and gets it back at its
//! `iter_restart`: that is why threads are needed at all, since a walk in the middle lives on a stack. A walk that holds the lock shared stands aside for the faults that were recorded
//! between its changes, without giving the lock up. Where nothing of the kind happened, nothing is ever handed over in the middle. A stage
//! that stands still for [`PATIENCE`] fails the case, and says where.

use std::cell::Cell;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tdpmmu_platform::{Pace, YieldPoint};

use super::inputs::{Input, What};

/// A stage on which nothing moves for so long has a deadlock.
pub const PATIENCE: Duration = Duration::from_secs(60);

thread_local! {
    /// What this thread is at: (thread, input); `None` in threads that are not ours.
    static CURRENT: Cell<Option<(u32, u32)>> = const { Cell::new(None) };
    /// Entries that this thread has changed since its last input that was no restart.
    static CHANGED: Cell<u32> = const { Cell::new(0) };
}

/// Thread and input that the calling thread is at.
pub fn current() -> Option<(u32, u32)> {
    CURRENT.get()
}

/// The calling thread has changed an entry.
pub fn count_change() {
    CHANGED.set(CHANGED.get() + 1);
}

struct State {
    next: usize,
    busy: bool,
    stopped: bool,
    failure: Option<String>,
}

/// The order of things. Shared by all threads of a case.
pub struct Stage {
    inputs: Arc<[Input]>,
    /// For each input, the next one of the same thread.
    following: Vec<u32>,
    state: Mutex<State>,
    turns: Vec<Condvar>,
    yields: AtomicU64,
}

const NONE: u32 = u32::MAX;

impl Stage {
    /// A stage for `threads` threads.
    pub fn new(inputs: Arc<[Input]>, threads: usize) -> Self {
        let mut last = vec![NONE; threads];
        let mut following = vec![NONE; inputs.len()];
        for (at, input) in inputs.iter().enumerate().rev() {
            following[at] = last[input.thread as usize];
            last[input.thread as usize] = at as u32;
        }
        Self {
            inputs,
            following,
            state: Mutex::new(State { next: 0, busy: false, stopped: false, failure: None }),
            turns: (0..threads).map(|_| Condvar::new()).collect(),
            yields: AtomicU64::new(0),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for this thread's turn and takes its next input; `None`: no more.
    pub fn take(&self, thread: u32) -> Option<usize> {
        let mut state = self.state();
        loop {
            if state.stopped || state.next == self.inputs.len() {
                return None;
            }
            if !state.busy && self.inputs[state.next].thread == thread {
                break;
            }
            let before = state.next;
            let (now, waited) = self.turns[thread as usize]
                .wait_timeout(state, PATIENCE)
                .unwrap_or_else(PoisonError::into_inner);
            state = now;
            if waited.timed_out() && state.next == before && state.busy && !state.stopped {
                let at = self.inputs[before.saturating_sub(1)];
                state.failure = Some(format!(
                    "line {}: {} by thread {} does not end: the engine waits for something that comes later in the recording",
                    at.line,
                    at.what.name(),
                    at.thread
                ));
                self.stop_locked(&mut state);
            }
        }
        let at = state.next;
        state.next += 1;
        state.busy = true;
        drop(state);
        if !matches!(self.inputs[at].what, What::Restart { .. } | What::Resume { .. }) {
            CHANGED.set(0);
        }
        CURRENT.set(Some((thread, at as u32)));
        Some(at)
    }

    /// Gives the baton on.
    pub fn release(&self, thread: u32) {
        let mut state = self.state();
        state.busy = false;
        match self.inputs.get(state.next) {
            Some(next) if next.thread != thread => self.turns[next.thread as usize].notify_one(),
            Some(_) => {}
            None => self.turns.iter().for_each(Condvar::notify_all),
        }
    }

    fn stop_locked(&self, state: &mut State) {
        state.stopped = true;
        self.turns.iter().for_each(Condvar::notify_all);
    }

    /// Ends the case, with a reason if it is a failure.
    pub fn stop(&self, failure: Option<String>) {
        let mut state = self.state();
        if state.failure.is_none() {
            state.failure = failure;
        }
        self.stop_locked(&mut state);
    }

    /// Yields that were recorded and taken.
    pub fn yields(&self) -> u64 {
        self.yields.load(Ordering::Relaxed)
    }

    /// Why it failed.
    pub fn failure(&self) -> Option<String> {
        self.state().failure.clone()
    }

    /// Where the walk that the calling thread is in gives way next: after how many changes, from which gfn on, and whether it keeps its lock.
    fn planned(&self) -> Option<(u32, Option<u64>, bool)> {
        let (_, at) = CURRENT.get()?;
        let next = self.inputs.get(*self.following.get(at as usize)? as usize)?;
        match next.what {
            What::Restart { after, gfn } => Some((after, gfn, false)),
            What::Resume { after } => Some((after, None, true)),
            _ => None,
        }
    }

    /// Hands the baton on from inside an operation and waits for the input at which it goes on.
    /// False: the case has ended meanwhile.
    fn stand_aside(&self) -> bool {
        let Some((thread, _)) = CURRENT.get() else { return false };
        self.release(thread);
        self.take(thread).is_some()
    }
}

impl Pace for Stage {
    fn wants_yield(&self, _task: u32, at: YieldPoint) -> bool {
        while let Some((after, gfn, keeps)) = self.planned() {
            if CHANGED.get() < after || gfn.is_some_and(|gfn| at.gfn < gfn) {
                return false;
            }
            if !keeps {
                return true;
            }
            // The lock stays with the walk: it is shared, and so is what the others want (`order.rs`).
            if !self.stand_aside() {
                return false;
            }
        }
        false
    }

    fn unlocked(&self, _task: u32) {
        // Also called where the lock is given up for an allocation: then the recording may have no restart of its own.
        if self.planned().is_some_and(|(after, _, keeps)| !keeps && CHANGED.get() >= after) {
            self.yields.fetch_add(1, Ordering::Relaxed);
            self.stand_aside();
        }
    }
}
