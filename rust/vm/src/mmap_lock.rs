//! mmap_lock: the host's own lock around what it maps, and who only needs that to stay.
//!
//! A lock of the platform, not of `std`: it is held over a whole invalidation, mmu_lock and flushes included, so that a platform that runs one
//! thread at a time must see who waits for it. Fair, as the host's is.

use tdpmmu_platform::{Platform, RawRwLock, Site};

/// See the module text.
pub(crate) struct MmapLock<P: Platform>(P::RwLock);

impl<P: Platform> MmapLock<P> {
    pub(crate) fn new() -> Self {
        Self(P::RwLock::new())
    }

    /// For who changes what the host maps.
    pub(crate) fn write(&self) -> MmapWrite<'_, P> {
        P::point(Site::HostPage);
        self.0.lock_exclusive();
        MmapWrite(self)
    }

    /// For who only needs it to stay.
    pub(crate) fn read(&self) -> MmapRead<'_, P> {
        P::point(Site::HostPage);
        self.0.lock_shared();
        MmapRead(self)
    }
}

/// mmap_lock, exclusive.
#[must_use = "the lock is released when the guard is dropped"]
pub(crate) struct MmapWrite<'a, P: Platform>(&'a MmapLock<P>);

impl<P: Platform> Drop for MmapWrite<'_, P> {
    fn drop(&mut self) {
        self.0.0.unlock_exclusive();
    }
}

/// mmap_lock, shared.
#[must_use = "the lock is released when the guard is dropped"]
pub(crate) struct MmapRead<'a, P: Platform>(&'a MmapLock<P>);

impl<P: Platform> Drop for MmapRead<'_, P> {
    fn drop(&mut self) {
        self.0.0.unlock_shared();
    }
}
