//! Who is inside an object, so that it can be closed.
//!
//! Guarantee: after [`Gate::close`] has returned `Ok`, nobody is inside and nobody will be. A call that comes
//! late gets [`Fault::Closed`]; a close that cannot wait longer says who is inside, and leaves the object open
//! for those, closed for all others. In a forked child every call is refused: the threads that the object
//! leans on do not exist there, and its locks may be held by them for ever.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::error::Fault;

pub struct Gate {
    what: &'static str,
    owner: u32,
    state: Mutex<State>,
    left: Condvar,
}

#[derive(Default)]
struct State {
    closing: bool,
    finished: bool,
    inside: Vec<&'static str>,
}

/// Being inside. Leaves when dropped.
pub struct Pass<'a> {
    gate: &'a Gate,
    name: &'static str,
}

impl Gate {
    /// `what` is the object's name in messages.
    pub fn new(what: &'static str) -> Gate {
        Gate { what, owner: std::process::id(), state: Mutex::default(), left: Condvar::new() }
    }

    /// True in a child of the process that made the object.
    pub fn forked(&self) -> bool {
        std::process::id() != self.owner
    }

    pub fn closed(&self) -> bool {
        self.lock().closing
    }

    /// Errors: forked, or closed.
    pub fn enter(&self, name: &'static str) -> Result<Pass<'_>, Fault> {
        self.check_fork()?;
        let mut state = self.lock();
        if state.closing {
            return Err(Fault::Closed(format!("{name}: the {} is closed", self.what)));
        }
        state.inside.push(name);
        Ok(Pass { gate: self, name })
    }

    /// Closes the gate and waits until nobody is inside, at most `timeout`; `None` is for ever. `false` from
    /// `go_on`, which is asked every few milliseconds, ends the waiting as well.
    ///
    /// Returns whether the teardown is still to be done: false after [`Gate::finish`].
    pub fn close(&self, timeout: Option<Duration>, go_on: impl Fn() -> bool) -> Result<bool, Fault> {
        self.check_fork()?;
        let deadline = timeout.and_then(|t| Instant::now().checked_add(t));
        let mut state = self.lock();
        state.closing = true;
        while !state.inside.is_empty() {
            let now = Instant::now();
            if deadline.is_some_and(|at| now >= at) {
                let who = state.inside.join(", ");
                return Err(Fault::Stall(format!("close: still inside the {}: {who}", self.what)));
            }
            if !go_on() {
                return Err(Fault::Cancelled);
            }
            let wait = Duration::from_millis(10);
            let wait = deadline.map_or(wait, |at| at.saturating_duration_since(now).min(wait));
            state = self.left.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(!state.finished)
    }

    /// The teardown that [`Gate::close`] made way for is done.
    pub fn finish(&self) {
        self.lock().finished = true;
    }

    pub fn finished(&self) -> bool {
        self.lock().finished
    }

    fn check_fork(&self) -> Result<(), Fault> {
        if self.forked() {
            return Err(Fault::Forked(format!(
                "this {} belongs to process {} and its threads are not in this fork of it; use the \"spawn\" \
                 start method, or make the {} in the child",
                self.what, self.owner, self.what
            )));
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.lock();
        if let Some(at) = state.inside.iter().position(|name| *name == self.name) {
            state.inside.swap_remove(at);
        }
        if state.closing && state.inside.is_empty() {
            self.gate.left.notify_all();
        }
    }
}
