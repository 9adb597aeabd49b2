//! Threads of a platform that borrow from who starts them.
//!
//! **Guarantee.** Every thread that was started has ended when [`all`] returns or unwinds; so what it borrows outlives it. A panic of one is its result and nobody else's.
//!
//! **Mechanism.** `std::thread::scope` knows OS threads only. A platform starts what lives for ever; the lifetime is put away here, and the join that makes up for it cannot be
//! skipped.

use std::any::Any;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use tdpmmu_platform::{JoinHandle, Platform};

/// How a thread ended: what it returned, or its panic.
pub(super) type Ended<R> = Result<R, Box<dyn Any + Send>>;

/// Joins what is left, whatever happens.
struct Joined(Vec<JoinHandle>);

impl Drop for Joined {
    fn drop(&mut self) {
        for handle in self.0.drain(..) {
            let _ = handle.join();
        }
    }
}

/// Runs every job in a thread of its own, by name; `refused` is called when the host refuses one. The ends, in the order of the jobs.
pub(super) fn all<P: Platform, R: Send>(
    jobs: Vec<(String, impl FnOnce() -> R + Send)>,
    refused: impl Fn(),
) -> Vec<io::Result<Ended<R>>> {
    let ends: Vec<Arc<Mutex<Option<Ended<R>>>>> = jobs.iter().map(|_| Arc::default()).collect();
    let mut started = Joined(Vec::new());
    let mut errors: Vec<Option<io::Error>> = Vec::new();
    for ((name, job), end) in jobs.into_iter().zip(&ends) {
        let end = end.clone();
        let body: Box<dyn FnOnce() + Send + '_> = Box::new(move || {
            let ended = std::panic::catch_unwind(std::panic::AssertUnwindSafe(job));
            *end.lock().unwrap_or_else(PoisonError::into_inner) = Some(ended);
        });
        // SAFETY: only the lifetime changes. The thread is joined by `started` before this function returns or unwinds, and the closure is gone by then: it is
        // consumed by its call, or dropped by a platform that refuses it.
        let body: Box<dyn FnOnce() + Send + 'static> = unsafe { std::mem::transmute(body) };
        match P::spawn(&name, body) {
            Ok(handle) => {
                started.0.push(handle);
                errors.push(None);
            }
            Err(error) => {
                refused();
                errors.push(Some(error));
            }
        }
    }
    drop(started);
    let taken = ends.iter().map(|end| end.lock().unwrap_or_else(PoisonError::into_inner).take());
    let lost = || Err(Box::new("the thread was given up") as Box<dyn Any + Send>);
    taken.zip(errors).map(|(end, error)| error.map_or_else(|| Ok(end.unwrap_or_else(lost)), Err)).collect()
}
