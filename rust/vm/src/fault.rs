//! The fault pipeline: from a gfn that hardware could not translate to an SPTE.
//!
//! **Guarantee.** An SPTE is installed only under a root that is valid, from a memslot that is not about to go, with a frame that the host has not taken back; each of the three
//! is tested *after* mmu_lock was taken shared, by tests that the other side changes only under mmu_lock exclusive. Everything that can
//! sleep or fail (memory for tables, the host's page) happens before the lock.
//!
//! **Mechanism**, in the order of `direct_page_fault`:
//!
//! 1. fast page fault: no lock, for leaves that prove what they may become
//! 2. table cache topped up
//! 3. `mmu_invalidate_seq` sampled; read barrier
//! 4. memslot looked up under SRCU: none is MMIO, INVALID means retry
//! 5. (6.12) the notifier asked without the lock: saves the work, decides nothing
//! 6. the host's page, its mapping level; the smallest of what slot, host, dirty logging and the NX mitigation allow
//! 7. mmu_lock shared
//! 8. stale? root obsolete (5.16 and later), notifier in progress over the gfn, or sequence moved
//! 9. map; unlock
//!
//! [`Vcpu::fault`] is all of it. [`Vcpu::fast_fault`] is stage 1, [`Vcpu::map_page`] and [`Vcpu::map_mmio`] are the others with the host's answer given by the
//! caller: for who replays a real host.

use tdpmmu_mmu::{FastOutcome, Frame, MapFault, MapOutcome};
use tdpmmu_platform::{Bug, Event, Platform, Site, Task};
use tdpmmu_spte::mmio::GENERATION_MASK;
use tdpmmu_spte::{LEVEL_4K, Spte};
use tdpmmu_table::TableCache;

use crate::slot::MemSlot;
use crate::slots::UPDATE_IN_PROGRESS;
use crate::stats::FaultCounts;
use crate::vcpu::VcpuCore;
use crate::walker::{GuestAccess, HardwareFault};
use crate::{Vcpu, Vm, VmError};

/// What became of one pass through the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultOutcome {
    /// Fixed without mmu_lock.
    Fast(Spte),
    /// A leaf was installed.
    Fixed {
        /// Its level.
        level: u8,
        /// Its value.
        spte: Spte,
    },
    /// The access was allowed already.
    Spurious,
    /// Something moved: the guest faults again.
    Retry,
    /// No memory there, or a write to read-only memory: emulate.
    Emulate,
}

/// What the host says about one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostAnswer {
    /// Host frame of the faulting gfn, not aligned to any level.
    pub pfn: u64,
    /// Level to map at, 1 to 3: what host, memslot, dirty logging and NX mitigation allowed together. What our memslot does not allow is cut.
    pub level: u8,
    /// Level of the host's own mapping, 1 to 3; only which tables are candidates of the NX recovery depends on it.
    pub host_level: u8,
    /// The host maps it writable.
    pub writable: bool,
}

/// What a fault knows when it takes mmu_lock.
#[derive(Clone, Copy)]
pub(crate) struct Resolved {
    pub(crate) access: GuestAccess,
    pub(crate) as_id: u8,
    pub(crate) frame: Frame,
    /// The level to map at.
    pub(crate) goal: u8,
    /// What slot and host would have allowed, had the NX mitigation no say.
    wanted: u8,
    /// A fetch under the NX mitigation.
    pub(crate) disallowed: bool,
    pub(crate) tracked: bool,
    pub(crate) prefetch: bool,
    /// The notifier's sequence, where a memslot is behind the gfn.
    pub(crate) seq: Option<u64>,
}

impl<'v, P: Platform> Vcpu<'v, P> {
    /// Handles the exit that `hardware` caused.
    ///
    /// # Errors
    /// As [`Vcpu::fault`].
    pub(crate) fn page_fault(
        &mut self,
        access: GuestAccess,
        hardware: HardwareFault,
    ) -> Result<FaultOutcome, VmError> {
        match hardware {
            HardwareFault::Mmio(spte) if self.mmio_is_current(spte) => Ok(FaultOutcome::Emulate),
            // A stale MMIO entry is never zapped; the slow path replaces it (I16).
            HardwareFault::Mmio(_) | HardwareFault::NotPresent => self.fault(access, false),
            HardwareFault::Protection => self.fault(access, true),
        }
    }

    /// Does the entry carry the generation of this vCPU's address space, with no update under way? Else it is refused, and the next fault replaces it.
    pub fn mmio_is_current(&self, spte: Spte) -> bool {
        let generation = self.core.slots.generation(self.core.mmu.role.as_id());
        generation & UPDATE_IN_PROGRESS == 0 && self.vm.mmu().format().mmio_is_current(spte, generation)
    }

    /// One pass through the pipeline for `access`; `present`: hardware found a leaf that does not allow it.
    /// Leaves the guest first, as an exit does: a fast zap that holds mmu_lock waits until no vCPU is in the guest.
    ///
    /// # Errors
    /// [`VmError::GuestFault`] where the guest's own tables do not allow the access; [`VmError::Pool`] out of tables; [`VmError::Quota`] out of shadow pages; [`VmError::HostFull`] and [`VmError::BadHva`] when the host has no page to give; [`VmError::RingFull`] when the dirty ring has
    /// no room at all (a vCPU that enters the guest first never gets that far).
    #[inline]
    pub fn fault(&mut self, access: GuestAccess, present: bool) -> Result<FaultOutcome, VmError> {
        self.leave();
        let root = self.root()?;
        if self.core.mmu.shadow {
            return self.shadow_fault(root, access, present);
        }
        if let Some(outcome) = self.try_fast(root, access, present) {
            self.counts().fault(outcome);
            return Ok(outcome);
        }
        self.slow_fault(root, access, false, &mut 0)
    }

    /// Stage 1 alone, if it applies: settled without mmu_lock, or `None` for the slow path. Leaves the guest; loads no root, without one there is nothing to fix.
    pub fn fast_fault(&mut self, access: GuestAccess, present: bool) -> Option<FaultOutcome> {
        self.leave();
        let root = self.current_root()?;
        let outcome = if self.core.mmu.shadow {
            self.try_fast_shadow(root, access, present)?
        } else {
            self.try_fast(root, access, present)?
        };
        self.counts().fault(outcome);
        Some(outcome)
    }

    /// Stages 2 to 9 for a page of a memslot, with the host's answer given. Where no memslot is, or an INVALID one, or a write meets a read-only one,
    /// the answer is not used. The notifier is asked as of this call.
    ///
    /// # Errors
    /// [`VmError::NeedsTdp`] for a vCPU on shadow pages; [`VmError::Pool`] out of tables; [`VmError::BadAnswer`] for a level or frame that cannot be.
    pub fn map_page(
        &mut self,
        access: GuestAccess,
        page: HostAnswer,
        prefetch: bool,
    ) -> Result<FaultOutcome, VmError> {
        page.check()?;
        self.needs_tdp("a fault with the host's answer given")?;
        self.leave();
        let root = self.root()?;
        let (vm, counts) = (self.vm, self.counts());
        vm.mmu().top_up(&self.task, &mut self.core.cache)?;
        let seq = vm.side().invalidation.sample::<P>();
        self.check_ring()?;
        let VcpuCore { slots, cache, mmu: context, .. } = &mut *self.core;
        let (slots, as_id) = (slots.enter(), context.role.as_id());
        let slot = slots.find(as_id, access.gfn).map(|slot| &**slot);
        let resolved = match behind(vm, slot, access, as_id, prefetch) {
            Behind::Settled(outcome) => return Ok(counts.settled(outcome, prefetch)),
            Behind::Nothing(resolved) => resolved,
            Behind::Slot(slot) => resolve(vm, slot, access, page, prefetch, seq),
        };
        Ok(vm.map(&self.task, counts, cache, root, &resolved, &mut 0))
    }

    /// As [`Vcpu::map_page`] where no memslot is: an MMIO entry of the present generation. Where there is one, it is not known what is behind it.
    ///
    /// # Errors
    /// [`VmError::NeedsTdp`] for a vCPU on shadow pages; [`VmError::Pool`] out of tables; [`VmError::BadRange`] where a memslot is.
    pub fn map_mmio(&mut self, access: GuestAccess, prefetch: bool) -> Result<FaultOutcome, VmError> {
        self.needs_tdp("a fault with the host's answer given")?;
        self.leave();
        let root = self.root()?;
        let (vm, counts) = (self.vm, self.counts());
        vm.mmu().top_up(&self.task, &mut self.core.cache)?;
        self.check_ring()?;
        let VcpuCore { slots, cache, mmu: context, .. } = &mut *self.core;
        let (slots, as_id) = (slots.enter(), context.role.as_id());
        let slot = slots.find(as_id, access.gfn).map(|slot| &**slot);
        match behind(vm, slot, access, as_id, prefetch) {
            Behind::Settled(outcome) => Ok(counts.settled(outcome, prefetch)),
            Behind::Nothing(resolved) => Ok(vm.map(&self.task, counts, cache, root, &resolved, &mut 0)),
            Behind::Slot(_) => {
                let (start, end) = (access.gfn, access.gfn.saturating_add(1));
                Err(VmError::BadRange { as_id, start, end, rule: "a memslot covers it" })
            }
        }
    }

    #[inline(always)]
    fn try_fast(&mut self, root: u32, access: GuestAccess, present: bool) -> Option<FaultOutcome> {
        let GuestAccess { gfn, write, exec } = access;
        let (mmu, rules) = (self.vm.mmu(), self.vm.rules());
        if !rules.fast_page_fault || !(present && write || !rules.ad_bits) {
            return None;
        }
        let as_id = self.core.mmu.role.as_id();
        // A ring without room is the slow path's to tell.
        self.check_ring().ok()?;
        let slots = self.core.slots.enter();
        let slot = slots.find(as_id, gfn);
        let tracked = slot.is_some_and(|slot| slot.flags.log_dirty);
        // The memslot stays as long as our read section, its bitmap with it: no lock that vCPUs share.
        let mark = |gfn| match slot.and_then(|slot| slot.dirty.as_ref()) {
            Some(dirty) => dirty.mark::<P>(gfn),
            None => {
                if let Some(slot) = slot.filter(|_| tracked) {
                    self.vm.side().push_dirty(&self.task, slot.id, as_id, gfn - slot.base);
                    self.task.observe(|| Event::DirtyMark { as_id, gfn });
                }
            }
        };
        match mmu.fast_page_fault_marking(&self.task, root, gfn, write, exec, tracked, mark) {
            FastOutcome::Fixed(spte) => Some(FaultOutcome::Fast(spte)),
            FastOutcome::Spurious => {
                self.counts().fast_spurious();
                Some(FaultOutcome::Spurious)
            }
            FastOutcome::Declined => None,
        }
    }

    /// Stages 2 to 9; `ended` is told the level that the fault ended at. It counts what it comes to: an outcome that is looked at once more on its way out costs a fault a
    /// tenth of its time.
    #[inline(always)]
    pub(crate) fn slow_fault(
        &mut self,
        root: u32,
        access: GuestAccess,
        prefetch: bool,
        ended: &mut u8,
    ) -> Result<FaultOutcome, VmError> {
        let (vm, counts) = (self.vm, self.counts());
        let (mmu, side, rules) = (vm.mmu(), vm.side(), vm.rules());
        self.check_ring()?;
        let VcpuCore { slots, cache, mmu: context, .. } = &mut *self.core;
        let (slots, as_id) = (slots.enter(), context.role.as_id());
        mmu.top_up(&self.task, cache)?;
        let seq = side.invalidation.sample::<P>();
        let slot = slots.find(as_id, access.gfn).map(|slot| &**slot);
        let resolved = match behind(vm, slot, access, as_id, prefetch) {
            Behind::Settled(outcome) => return Ok(counts.settled(outcome, prefetch)),
            Behind::Nothing(resolved) => resolved,
            Behind::Slot(slot) => {
                if rules.early_check && side.invalidation.looks_stale::<P>(access.gfn, seq) {
                    return Ok(counts.settled(FaultOutcome::Retry, prefetch));
                }
                let (hva, gfn) = (slot.hva_of(access.gfn), access.gfn);
                self.task.observe(|| Event::LookUp { as_id, gfn });
                P::point(Site::FaultPfn);
                let page = side.primary.fault_in(hva, access.write)?;
                if access.write && !page.writable {
                    // The host copies the page for this write, and its own notification has moved the sequence: look again.
                    vm.break_cow(&self.task, hva)?;
                    return Ok(counts.settled(FaultOutcome::Retry, prefetch));
                }
                let (pfn, level, writable) = (page.pfn, page.level, page.writable);
                self.task.observe(|| Event::Resolved {
                    as_id,
                    gfn,
                    pfn,
                    level: level.min(slot.max_level(gfn)),
                });
                resolve(
                    vm,
                    slot,
                    access,
                    HostAnswer { pfn, level, host_level: level, writable },
                    prefetch,
                    seq,
                )
            }
        };
        Ok(vm.map(&self.task, counts, cache, root, &resolved, ended))
    }

    /// For what only the TDP MMU can do.
    pub(crate) fn needs_tdp(&self, what: &'static str) -> Result<(), VmError> {
        if self.core.mmu.shadow { Err(VmError::NeedsTdp { what }) } else { Ok(()) }
    }

    /// What this task dirties goes to this vCPU's ring, where there are rings: is there room?
    #[inline(always)]
    pub(crate) fn check_ring(&self) -> Result<(), VmError> {
        match &self.vm.side().rings {
            Some(rings) if rings.full(self.id()) => Err(VmError::RingFull { vcpu: self.id() }),
            _ => Ok(()),
        }
    }

    /// The fault is about to be made again: somebody else has to get on first. Where a schedule decides who runs it is told so, or it might choose this vCPU for ever.
    pub(crate) fn before_retry(&self) {
        self.task.might_sleep();
        if !P::SPINS {
            P::relax(Site::FaultStale);
        }
    }

    #[inline]
    pub(crate) fn counts(&self) -> &'v FaultCounts {
        &self.vm.counts[self.id()]
    }
}

/// What is behind a gfn, as far as the memslot tells.
pub(crate) enum Behind<'s> {
    /// The fault ends here.
    Settled(FaultOutcome),
    /// No memslot: an MMIO entry.
    Nothing(Resolved),
    /// A memslot that may be asked for its page.
    Slot(&'s MemSlot),
}

#[inline(always)]
pub(crate) fn behind<'s, P: Platform>(
    vm: &Vm<P>,
    slot: Option<&'s MemSlot>,
    access: GuestAccess,
    as_id: u8,
    prefetch: bool,
) -> Behind<'s> {
    match slot {
        // Where an MMIO entry cannot be told from memory, or the gfn cannot be reached, none is made.
        None if !vm.mmu().format().mmio_caching || access.gfn >= vm.mmu().max_gfn() => {
            Behind::Settled(FaultOutcome::Emulate)
        }
        None => Behind::Nothing(Resolved {
            access,
            as_id,
            frame: Frame::Mmio { generation: vm.side().slots.generation(as_id) & GENERATION_MASK },
            goal: LEVEL_4K,
            wanted: LEVEL_4K,
            disallowed: false,
            tracked: false,
            prefetch,
            seq: None,
        }),
        Some(slot) if slot.invalid => Behind::Settled(FaultOutcome::Retry),
        Some(slot) if slot.flags.readonly && access.write => Behind::Settled(FaultOutcome::Emulate),
        Some(slot) => Behind::Slot(slot),
    }
}

/// kvm_mmu_hugepage_adjust: the level to map at.
#[inline(always)]
pub(crate) fn resolve<P: Platform>(
    vm: &Vm<P>,
    slot: &MemSlot,
    access: GuestAccess,
    page: HostAnswer,
    prefetch: bool,
    seq: u64,
) -> Resolved {
    let tracked = slot.flags.log_dirty;
    // A slot that logs returns before anything is computed: such a fault makes no candidate of the NX recovery either.
    let cap = if tracked { LEVEL_4K } else { slot.max_level(access.gfn).min(vm.rules().max_level) };
    let wanted = cap.min(page.host_level.max(page.level));
    let disallowed = access.exec && vm.mmu().nx_huge_pages();
    let goal = if disallowed { LEVEL_4K } else { cap.min(page.level) };
    Resolved {
        access,
        as_id: slot.as_id,
        frame: Frame::Page { pfn: page.pfn, writable: page.writable && !slot.flags.readonly },
        goal,
        wanted,
        disallowed,
        tracked,
        prefetch,
        seq: Some(seq),
    }
}

impl HostAnswer {
    fn check(&self) -> Result<(), VmError> {
        let bad = |rule| Err(VmError::BadAnswer { answer: *self, rule });
        if !(1..=3).contains(&self.level) || !(1..=3).contains(&self.host_level) {
            return bad("levels are 1 (4K), 2 (2M) and 3 (1G)");
        }
        if self.pfn >= 1 << 40 {
            return bad("a frame number has 40 bits");
        }
        Ok(())
    }
}

impl<P: Platform> Vm<P> {
    /// Stages 7 to 9, counted; `ended` is told the level that the map step ended at.
    #[inline(always)]
    fn map(
        &self,
        task: &Task<P>,
        counts: &FaultCounts,
        cache: &mut TableCache,
        root: u32,
        fault: &Resolved,
        ended: &mut u8,
    ) -> FaultOutcome {
        let (mmu, side, rules) = (self.mmu(), self.side(), self.rules());
        let &Resolved { access, as_id, frame, goal, wanted, disallowed, tracked, prefetch, seq } = fault;
        let mut guard = mmu.lock.read(task);
        P::point(Site::FaultStale);
        // 5.13-5.15 asked the notifier only, whatever had become of the root.
        if rules.stale_root_check && mmu.is_obsolete(root) && !P::bug(Bug::B11)
            || seq.is_some_and(|seq| side.invalidation.must_retry(&guard, access.gfn, seq))
        {
            return counts.settled(FaultOutcome::Retry, prefetch);
        }
        if P::bug(Bug::B25)
            && let (Some(mut guard), Some(shadow)) = (guard.taken_for_exclusive(), self.shadow())
        {
            shadow.make_pages_available(&mut guard);
        }
        let (frame, goal) = if rules.nested {
            // By value: what has an address is kept in memory on the way of those that are not nested, too.
            match self.nested_limits(&guard, as_id, access.gfn, access.write, frame, goal) {
                Some(limits) => limits,
                None => return counts.settled(FaultOutcome::Emulate, prefetch),
            }
        } else {
            (frame, goal)
        };
        let fault = MapFault {
            gfn: access.gfn,
            as_id,
            frame,
            goal_level: goal,
            req_level: wanted,
            huge_page_disallowed: disallowed,
            write: access.write,
            exec: access.exec,
            prefetch,
            dirty_tracked: tracked,
        };
        let (mapped, level) = mmu.map_at(&mut guard, cache, root, &fault);
        drop(guard);
        *ended = level;
        let outcome = match mapped {
            MapOutcome::Fixed { level, spte } => FaultOutcome::Fixed { level, spte },
            MapOutcome::Spurious => FaultOutcome::Spurious,
            MapOutcome::Retry => FaultOutcome::Retry,
            MapOutcome::Emulate => {
                counts.mmio_created();
                FaultOutcome::Emulate
            }
            MapOutcome::WriteProtected => FaultOutcome::Emulate,
        };
        counts.settled(outcome, prefetch)
    }
}
