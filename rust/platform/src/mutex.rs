//! A sleeping mutex over the platform's futex: slots_lock and the like.

use std::{
    cell::UnsafeCell,
    fmt,
    marker::PhantomData,
    ops::{Deref, DerefMut},
    sync::atomic::{AtomicU32, Ordering},
};

use crate::{api::Platform, site::Site};

const FREE: u32 = 0;
const HELD: u32 = 1;
/// Held, and somebody may sleep.
const AWAITED: u32 = 2;

/// A mutex whose waiters sleep. Not fair, and a panic does not poison it.
pub struct Mutex<P, T: ?Sized> {
    state: AtomicU32,
    _platform: PhantomData<fn() -> P>,
    value: UnsafeCell<T>,
}

// SAFETY: the mutex hands out `&mut T` to one thread at a time; that needs `T: Send` and no more.
unsafe impl<P, T: ?Sized + Send> Send for Mutex<P, T> {}
// SAFETY: as above: sharing the mutex moves access to `T` between threads, never shares it.
unsafe impl<P, T: ?Sized + Send> Sync for Mutex<P, T> {}

impl<P: Platform, T> Mutex<P, T> {
    /// An unlocked mutex around `value`.
    pub const fn new(value: T) -> Self {
        Mutex { state: AtomicU32::new(FREE), _platform: PhantomData, value: UnsafeCell::new(value) }
    }

    /// The value, without the mutex.
    pub fn into_inner(self) -> T {
        self.value.into_inner()
    }
}

impl<P: Platform, T: ?Sized> Mutex<P, T> {
    /// Waits for the mutex.
    #[inline]
    pub fn lock(&self) -> MutexGuard<'_, P, T> {
        P::locked(Site::Mutex);
        if self.state.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_err() {
            self.lock_contended();
        }
        MutexGuard { mutex: self, _not_send: PhantomData }
    }

    /// Takes the mutex if it is free.
    pub fn try_lock(&self) -> Option<MutexGuard<'_, P, T>> {
        P::locked(Site::Mutex);
        self.state
            .compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed)
            .is_ok()
            .then_some(MutexGuard { mutex: self, _not_send: PhantomData })
    }

    #[cold]
    fn lock_contended(&self) {
        for _ in 0..if P::SPINS { 100 } else { 0 } {
            if self.state.load(Ordering::Relaxed) == FREE
                && self.state.compare_exchange(FREE, HELD, Ordering::Acquire, Ordering::Relaxed).is_ok()
            {
                return;
            }
            P::relax(Site::Mutex);
        }
        // From here on the mutex is taken as awaited: whoever slept once cannot tell whether others still do.
        while self.state.swap(AWAITED, Ordering::Acquire) != FREE {
            P::futex_wait(&self.state, AWAITED, None);
        }
    }
}

impl<P: Platform, T: ?Sized + fmt::Debug> fmt::Debug for Mutex<P, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.try_lock() {
            Some(guard) => f.debug_tuple("Mutex").field(&&*guard).finish(),
            None => f.write_str("Mutex(<locked>)"),
        }
    }
}

/// A hold of a [`Mutex`].
#[must_use = "the mutex is released when the guard is dropped"]
pub struct MutexGuard<'a, P: Platform, T: ?Sized> {
    mutex: &'a Mutex<P, T>,
    /// Like a kernel mutex, unlocked by the thread that locked it.
    _not_send: PhantomData<*const ()>,
}

// SAFETY: a shared guard gives `&T` and nothing else.
unsafe impl<P: Platform, T: ?Sized + Sync> Sync for MutexGuard<'_, P, T> {}

impl<P: Platform, T: ?Sized> Deref for MutexGuard<'_, P, T> {
    type Target = T;
    fn deref(&self) -> &T {
        // SAFETY: the guard exists only while `state` is not FREE and its thread made it so: no `&mut T` elsewhere.
        unsafe { &*self.mutex.value.get() }
    }
}

impl<P: Platform, T: ?Sized> DerefMut for MutexGuard<'_, P, T> {
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as in `deref`; `&mut self` excludes other borrows through this guard.
        unsafe { &mut *self.mutex.value.get() }
    }
}

impl<P: Platform, T: ?Sized> Drop for MutexGuard<'_, P, T> {
    #[inline]
    fn drop(&mut self) {
        P::settle(Site::Mutex);
        if self.mutex.state.swap(FREE, Ordering::Release) == AWAITED {
            P::futex_wake(&self.mutex.state, 1);
        }
        P::point(Site::Mutex);
    }
}
