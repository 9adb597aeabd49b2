//! The rest of KVM as the two MMUs see it: the vCPUs to flush, the host's pages, the dirty bitmaps, the guest's memory.
//!
//! Kept apart from [`crate::Vm`] so that the MMUs can own a reference to it without a cycle.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, OnceLock, Weak};

use tdpmmu_mmu::{MmuHost, TdpMmu};
use tdpmmu_platform::{Event, Exclusive, Fault, Guard, Platform, Site, Task};
use tdpmmu_shadow::{BookSet, ShadowHost};

use crate::guest_memory::GuestMemory;
use crate::host::PrimaryMmu;
use crate::notifier::Invalidation;
use crate::request::{self, Kicks, VcpuState, make_all_cpus_request, pause};
use crate::ring::{RingEntry, Rings};
use crate::slots::Memslots;

/// What the MMU calls up into.
pub struct HostSide<P: Platform> {
    /// The host's primary MMU.
    pub primary: PrimaryMmu,
    /// The memslots.
    pub slots: Arc<Memslots<P>>,
    /// mmu_notifier state.
    pub invalidation: Invalidation,
    /// Guest pages with contents: those that hold the guest's tables.
    pub memory: GuestMemory,
    /// The request that makes vCPUs drop their obsolete roots.
    pub(crate) reload: u64,
    /// The TDP MMU, where its leaves and shadow pages meet in one gfn.
    tdp: OnceLock<Weak<TdpMmu<P>>>,
    pub(crate) vcpus: Vec<Arc<VcpuState>>,
    kicks: AtomicU64,
    kick_wait_ns: AtomicU64,
    flushes: AtomicU64,
    flushes_that_kicked: AtomicU64,
    pub(crate) rings: Option<Rings<P>>,
    lost_entries: AtomicU64,
}

impl<P: Platform> HostSide<P> {
    pub(crate) fn new(
        primary: PrimaryMmu,
        slots: Arc<Memslots<P>>,
        vcpus: usize,
        rings: Option<Rings<P>>,
        reload: u64,
    ) -> Self {
        Self {
            primary,
            slots,
            invalidation: Invalidation::default(),
            memory: GuestMemory::default(),
            reload,
            tdp: OnceLock::new(),
            vcpus: (0..vcpus).map(|_| Arc::default()).collect(),
            kicks: AtomicU64::new(0),
            kick_wait_ns: AtomicU64::new(0),
            flushes: AtomicU64::new(0),
            flushes_that_kicked: AtomicU64::new(0),
            rings,
            lost_entries: AtomicU64::new(0),
        }
    }

    /// Shadow pages will stand for tables that vCPUs reach by this MMU.
    pub(crate) fn know_tdp(&self, mmu: &Arc<TdpMmu<P>>) {
        let _first = self.tdp.set(Arc::downgrade(mmu));
    }

    /// A request to every vCPU; counts the kicks.
    pub fn request_all(&self, task: &Task<P>, bits: u64) -> Kicks {
        let kicks = make_all_cpus_request(task, &self.vcpus, bits);
        self.kicks.fetch_add(u64::from(kicks.kicked), Relaxed);
        self.kick_wait_ns.fetch_add(kicks.wait_ns, Relaxed);
        kicks
    }

    /// vCPUs kicked out of the guest so far.
    pub fn kicks(&self) -> u64 {
        self.kicks.load(Relaxed)
    }

    /// Remote flushes delivered so far.
    pub fn flushes(&self) -> u64 {
        self.flushes.load(Relaxed)
    }

    /// Of these, those that met a vCPU in the guest.
    pub fn flushes_that_kicked(&self) -> u64 {
        self.flushes_that_kicked.load(Relaxed)
    }

    /// Dirty pages that no ring took, because it was full or no vCPU ran: must stay 0.
    pub fn lost_entries(&self) -> u64 {
        self.lost_entries.load(Relaxed)
    }

    /// Pushes a page of a slot that logs, for who knows the slot; nothing without rings.
    pub(crate) fn push_dirty(&self, task: &Task<P>, slot: u16, as_id: u8, offset: u64) {
        if let Some(rings) = &self.rings {
            self.push(task, rings, RingEntry { slot, as_id, offset });
        }
    }

    fn push(&self, task: &Task<P>, rings: &Rings<P>, entry: RingEntry) {
        if !task.vcpu().is_some_and(|vcpu| rings.push(vcpu, entry)) {
            self.lost_entries.fetch_add(1, Relaxed);
        }
    }

    /// A remote flush, delivered: every vCPU was in the guest or in a lockless walk when it was asked, and is not any more, or flushes before its next entry.
    fn deliver_flush(&self, task: &Task<P>) {
        // As KVM without ranged flushes of its hypervisor: everything, on every vCPU, before its next entry.
        pause::<P>(Fault::FlushDelay, Site::TlbFlush);
        if P::inject(Fault::FlushExtra, Site::TlbFlush) {
            self.request_all(task, request::TLB_FLUSH | request::WAIT | request::NO_WAKEUP);
        }
        self.flushes.fetch_add(1, Relaxed);
        let kicks = self.request_all(task, request::TLB_FLUSH | request::WAIT | request::NO_WAKEUP);
        if kicks.kicked != 0 {
            self.flushes_that_kicked.fetch_add(1, Relaxed);
        }
    }

    /// Time spent in requests so far, in nanoseconds.
    pub fn kick_wait_ns(&self) -> u64 {
        self.kick_wait_ns.load(Relaxed)
    }
}

impl<P: Platform> MmuHost<P> for HostSide<P> {
    fn flush_remote(&self, task: &Task<P>, _range: Option<Range<u64>>) {
        self.deliver_flush(task);
    }

    fn frames_dirty(&self, pfn: u64, count: u64) {
        self.primary.frames().mark_dirty(pfn, count);
    }

    fn frames_dirty_masked(&self, pfn: u64, mask: u64) {
        self.primary.frames().mark_dirty_masked(pfn, mask);
    }

    fn frames_accessed(&self, pfn: u64, count: u64) {
        self.primary.frames().mark_accessed(pfn, count);
    }

    fn gfn_dirty(&self, task: &Task<P>, as_id: u8, gfn: u64) {
        let Some(rings) = &self.rings else { return self.slots.mark_dirty(as_id, gfn) };
        // Who has the slot in hand calls `push_dirty`, and takes no lock that vCPUs share.
        if !self.slots.any_logs() {
            return;
        }
        if let Some((slot, offset)) = self.slots.logging_slot(as_id, gfn) {
            self.push(task, rings, RingEntry { slot, as_id, offset });
            task.observe(|| Event::DirtyMark { as_id, gfn });
        }
    }
}

impl<P: Platform> ShadowHost<P> for HostSide<P> {
    fn flush_remote(&self, task: &Task<P>) {
        task.observe(|| Event::FlushBegin { start: 0, end: u64::MAX });
        self.deliver_flush(task);
        task.observe(|| Event::FlushEnd { start: 0, end: u64::MAX });
    }

    fn request_reload(&self, task: &Task<P>, wait: bool) {
        let wait = if wait { request::WAIT } else { 0 };
        self.request_all(task, self.reload | request::NO_WAKEUP | wait);
    }

    fn books(&self) -> Arc<BookSet> {
        self.slots.books()
    }

    fn read_guest(&self, _as_id: u8, gfn: u64, index: u16) -> u64 {
        self.memory.read::<P>(gfn, index)
    }

    fn frames_dirty(&self, pfn: u64, count: u64) {
        self.primary.frames().mark_dirty(pfn, count);
    }

    fn frames_accessed(&self, pfn: u64, count: u64) {
        self.primary.frames().mark_accessed(pfn, count);
    }

    fn write_protect_gfn(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
        min_level: u8,
    ) -> bool {
        let tdp = self.tdp.get().and_then(Weak::upgrade);
        tdp.is_some_and(|mmu| mmu.write_protect_gfn(guard, as_id, gfn, min_level))
    }

    fn gfn_dirty(&self, task: &Task<P>, as_id: u8, gfn: u64) {
        MmuHost::gfn_dirty(self, task, as_id, gfn);
    }
}
