//! A lock hold that its observer hears of, for who checks the order of locks.

use std::ops::{Deref, DerefMut};

use tdpmmu_platform::{Event, LockClass, Platform, Task};

/// The guard of a lock of one class; its release is told before it happens, its taking after.
pub(crate) struct Told<'a, P: Platform, G> {
    guard: G,
    task: &'a Task<P>,
    lock: LockClass,
}

impl<'a, P: Platform, G> Told<'a, P, G> {
    /// The lock was taken.
    pub(crate) fn taken(guard: G, task: &'a Task<P>, lock: LockClass, shared: bool) -> Self {
        task.detail(|| Event::Acquire { lock, shared });
        Self { guard, task, lock }
    }
}

impl<P: Platform, G> Drop for Told<'_, P, G> {
    fn drop(&mut self) {
        self.task.detail(|| Event::Release { lock: self.lock });
    }
}

impl<P: Platform, G: Deref> Deref for Told<'_, P, G> {
    type Target = G::Target;
    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<P: Platform, G: DerefMut> DerefMut for Told<'_, P, G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}
