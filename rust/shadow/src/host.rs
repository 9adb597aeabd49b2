//! What the shadow MMU asks of the rest of KVM.

use std::sync::Arc;

use tdpmmu_platform::{Exclusive, Guard, Platform, Task};

use crate::BookSet;

/// Upcalls. `rust/vm` implements them on its vCPU set, its memslots and its model of guest memory.
pub trait ShadowHost<P: Platform>: Send + Sync {
    /// Returns when no vCPU can use an older translation any more: each one that was in the guest has left it and flushes before it enters again, and each one that was in a
    /// lockless walk (`READING_SHADOW_PAGE_TABLES`) has ended it.
    fn flush_remote(&self, task: &Task<P>);
    /// Every vCPU is to drop the roots that it has cached and that are obsolete, before its next guest entry; `wait`: and none is in the guest entry in which this found it.
    fn request_reload(&self, task: &Task<P>, wait: bool);
    /// The books of the memslots now, INVALID ones too.
    fn books(&self) -> Arc<BookSet>;
    /// The guest's page table entry: word `index` of the guest page `gfn`.
    fn read_guest(&self, as_id: u8, gfn: u64, index: u16) -> u64;
    /// The host page `pfn` (and `count - 1` behind it) was written through SPTEs that are going away (kernels up to 6.12).
    fn frames_dirty(&self, pfn: u64, count: u64);
    /// As [`ShadowHost::frames_dirty`], for Accessed.
    fn frames_accessed(&self, pfn: u64, count: u64);
    /// `gfn` holds a guest page table from here on: leaves of `min_level` and above that the VM's *other* MMU has for it lose W, and cannot get it back without mmu_lock. True: one did, and a flush is owed.
    fn write_protect_gfn(
        &self,
        _guard: &mut Guard<'_, P, Exclusive>,
        _as_id: u8,
        _gfn: u64,
        _min_level: u8,
    ) -> bool {
        false
    }
    /// `task` has made `gfn` writable: the memslot's dirty log wants to know.
    fn gfn_dirty(&self, task: &Task<P>, as_id: u8, gfn: u64);
}
