//! What the MMU asks of the rest of KVM: flushes, and the host's page and memslot dirty state.

use std::ops::Range;

use tdpmmu_platform::{Platform, Task};

/// Upcalls of the MMU. `rust/vm` implements them on its vCPU set and its model of the host's primary MMU.
pub trait MmuHost<P: Platform>: Send + Sync {
    /// Remote TLB flush of `range` in gfns (`None`: everything): returns when no vCPU can use an older translation.
    fn flush_remote(&self, task: &Task<P>, range: Option<Range<u64>>);
    /// The host pages `[pfn, pfn + count)` were written through SPTEs that are going away (kernels up to 6.12); of a huge
    /// page only the first frame is named.
    fn frames_dirty(&self, pfn: u64, count: u64);
    /// As [`MmuHost::frames_dirty`] for the host pages `pfn + n` of each bit n of `mask`; `pfn` is a multiple of 64.
    fn frames_dirty_masked(&self, pfn: u64, mask: u64) {
        let mut left = mask;
        while left != 0 {
            let bit = left.trailing_zeros();
            left &= left - 1;
            self.frames_dirty(pfn + u64::from(bit), 1);
        }
    }
    /// The host pages `[pfn, pfn + count)` were accessed through SPTEs that are going away (kernels up to 6.12).
    fn frames_accessed(&self, pfn: u64, count: u64);
    /// `task` has made `gfn` of address space `as_id` writable: the memslot's dirty bitmap, or the ring of the vCPU that it runs, wants to know.
    fn gfn_dirty(&self, task: &Task<P>, as_id: u8, gfn: u64);
}

/// A host without guests, frames or slots: for tests and for trees that are only built and torn down.
#[derive(Debug, Default)]
pub struct NoHost;

impl<P: Platform> MmuHost<P> for NoHost {
    fn flush_remote(&self, _task: &Task<P>, _range: Option<Range<u64>>) {}
    fn frames_dirty(&self, _pfn: u64, _count: u64) {}
    fn frames_accessed(&self, _pfn: u64, _count: u64) {}
    fn gfn_dirty(&self, _task: &Task<P>, _as_id: u8, _gfn: u64) {}
}
