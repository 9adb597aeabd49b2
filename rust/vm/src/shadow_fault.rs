//! The fault pipeline of a vCPU on shadow pages.
//!
//! **Guarantee.** As that of the TDP MMU (`fault.rs`): an SPTE is made only under a root that is current, from a memslot that is not about to go and a frame that the host has not taken back; and, where the guest's own
//! tables are shadowed, only from entries that these still hold. Each is tested under mmu_lock, held exclusively, *after* the last thing in that hold that could have changed it.
//!
//! **Mechanism**, in the order of `direct_page_fault` and `FNAME(page_fault)`:
//!
//! 1. fast page fault, under a direct root: no lock
//! 2. the guest's tables are walked; what they refuse is the guest's own page fault. They must lie in memslots
//! 3. table cache topped up; `mmu_invalidate_seq` sampled; memslot and host page of the gfn that came out
//! 4. mmu_lock exclusive
//! 5. room is made in the quota (`make_mmu_pages_available`): the oldest pages go
//! 6. stale? root obsolete or invalid, notifier over the gfn, sequence moved
//! 7. map, which reads the guest's entries and lpage_info again: a table that was shadowed meanwhile forbids a huge page; unlock
//!
//! 5 comes before 6. Up to 7.1 it came after (bug-history 33, CVE-2026-64561): making room can zap the very root that the fault was found to be current, by recursion, and what is mapped below it then is born invalid. The order is
//! the same in every profile here; the other one is a defect of the museum. So is testing the root at all: 5.16 began (a955cad84cda), and who maps under a zapped root before that loses work, not memory.
//!
//! An L1 on the TDP MMU whose L2 runs on shadow pages shares gfns with them: a TDP fault on a gfn that holds a table of L1's for L2 maps it read-only ([`Vm::nested_limits`]), so that each store to it is emulated. KVM lets level-1
//! tables go unsync there, too; here they are not.

use tdpmmu_mmu::Frame;
use tdpmmu_platform::{Bug, Event, Guard, Mode, Platform, Site, Task};
use tdpmmu_shadow::{FastOutcome, GuestWalk, ShadowFault, ShadowFrame, ShadowMmu, ShadowOutcome, walk_guest};
use tdpmmu_spte::{LEVEL_1G, LEVEL_4K};
use tdpmmu_table::{PoolError, TableCache};

use crate::fault::{Behind, Resolved, behind, resolve};
use crate::slots::SlotSet;
use crate::vcpu::VcpuCore;
use crate::walker::GuestAccess;
use crate::{FaultOutcome, HostAnswer, Vcpu, Vm, VmError};

/// Do the guest's tables on the path lie in memory?
enum Tables {
    There,
    /// A memslot with one of them is about to go.
    Going,
    /// There is no memslot at the gfn of the table of that level.
    Missing(u8),
}

fn tables_of(walk: &GuestWalk, slots: &SlotSet, as_id: u8) -> Tables {
    for level in (walk.level..=walk.levels).rev() {
        match slots.find(as_id, walk.tables[usize::from(level)]) {
            None => return Tables::Missing(level),
            Some(slot) if slot.invalid => return Tables::Going,
            Some(_) => {}
        }
    }
    Tables::There
}

impl<P: Platform> Vcpu<'_, P> {
    /// Stage 1. `None`: the slow path decides.
    pub(crate) fn try_fast_shadow(
        &mut self,
        root: u32,
        access: GuestAccess,
        present: bool,
    ) -> Option<FaultOutcome> {
        let GuestAccess { gfn, write, exec } = access;
        let rules = self.vm.rules();
        if self.core.mmu.guest || !rules.fast_shadow_fault || !(present && write || !rules.ad_bits) {
            return None;
        }
        self.check_ring().ok()?;
        let (shadow, walker) = (self.vm.shadow()?, self.walker.as_ref()?);
        let as_id = self.core.mmu.role.as_id();
        let slots = self.core.slots.enter();
        let slot = slots.find(as_id, gfn);
        let tracked = slot.is_some_and(|slot| slot.flags.log_dirty);
        let mark = |gfn| match slot.and_then(|slot| slot.dirty.as_ref()) {
            Some(dirty) => dirty.mark::<P>(gfn),
            None => {
                if let Some(slot) = slot.filter(|_| tracked) {
                    self.vm.side().push_dirty(&self.task, slot.id, as_id, gfn - slot.base);
                    self.task.observe(|| Event::DirtyMark { as_id, gfn });
                }
            }
        };
        let section = walker.begin(&self.task);
        match shadow.fast_page_fault(&section, root, gfn, write, exec, tracked, mark) {
            FastOutcome::Fixed(spte) => Some(FaultOutcome::Fast(spte)),
            FastOutcome::Spurious => {
                self.counts().fast_spurious();
                Some(FaultOutcome::Spurious)
            }
            FastOutcome::Declined => None,
        }
    }

    /// A fault on `root`, a shadow page.
    #[inline(never)]
    pub(crate) fn shadow_fault(
        &mut self,
        root: u32,
        access: GuestAccess,
        present: bool,
    ) -> Result<FaultOutcome, VmError> {
        if let Some(outcome) = self.try_fast_shadow(root, access, present) {
            self.counts().fault(outcome);
            return Ok(outcome);
        }
        self.slow_shadow_fault(root, access, false)
    }

    /// Stages 2 to 7, counted.
    pub(crate) fn slow_shadow_fault(
        &mut self,
        root: u32,
        access: GuestAccess,
        prefetch: bool,
    ) -> Result<FaultOutcome, VmError> {
        let (vm, counts, vcpu) = (self.vm, self.counts(), self.id());
        let (mmu, side, rules) = (vm.mmu(), vm.side(), vm.rules());
        let shadow = vm.needs_shadow("a fault on shadow pages")?;
        self.check_ring()?;
        let VcpuCore { slots, cache, mmu: context, stats, .. } = &mut *self.core;
        let (slots, as_id) = (slots.enter(), context.role.as_id());
        let mut walk = None;
        // What the guest's tables translate to; the rest is about that.
        let mut physical = access;
        if context.guest {
            let found = walk_guest::<P>(
                side,
                as_id,
                context.frame,
                context.levels,
                access.gfn,
                access.write,
                access.exec,
            );
            let found = found.map_err(|fault| {
                stats.guest_faults += 1;
                VmError::GuestFault { vcpu, fault }
            })?;
            match tables_of(&found, &slots, as_id) {
                Tables::There => {}
                Tables::Going => return Ok(counts.settled(FaultOutcome::Retry, prefetch)),
                Tables::Missing(level) => {
                    // The guest walks into a hole: nothing is present there.
                    stats.guest_faults += 1;
                    let fault = tdpmmu_shadow::GuestFault::NotPresent { page: access.gfn, level };
                    return Err(VmError::GuestFault { vcpu, fault });
                }
            }
            physical.gfn = found.gfn;
            walk = Some(found);
        }
        vm.top_up_shadow(&self.task, shadow, cache)?;
        let seq = side.invalidation.sample::<P>();
        let gfn = physical.gfn;
        let slot = slots.find(as_id, gfn).map(|slot| &**slot);
        let resolved = match behind(vm, slot, physical, as_id, prefetch) {
            Behind::Settled(outcome) => return Ok(counts.settled(outcome, prefetch)),
            Behind::Nothing(resolved) => resolved,
            Behind::Slot(slot) => {
                if rules.early_check && side.invalidation.looks_stale::<P>(gfn, seq) {
                    return Ok(counts.settled(FaultOutcome::Retry, prefetch));
                }
                let hva = slot.hva_of(gfn);
                self.task.observe(|| Event::LookUp { as_id, gfn });
                P::point(Site::FaultPfn);
                let page = side.primary.fault_in(hva, access.write)?;
                if access.write && !page.writable {
                    vm.break_cow(&self.task, hva)?;
                    return Ok(counts.settled(FaultOutcome::Retry, prefetch));
                }
                let (pfn, level, writable) = (page.pfn, page.level, page.writable);
                let told = level.min(slot.max_level(gfn));
                self.task.observe(|| Event::Resolved { as_id, gfn, pfn, level: told });
                let answer = HostAnswer { pfn, level, host_level: level, writable };
                resolve(vm, slot, physical, answer, prefetch, seq)
            }
        };
        let mut guard = mmu.lock.write(&self.task);
        // What this hold has changed is tested after it was changed.
        let room_first = !P::bug(Bug::B33);
        if room_first && !shadow.make_pages_available(&mut guard) {
            return Err(vm.out_of_quota());
        }
        P::point(Site::FaultStale);
        if shadow.is_obsolete(root)
            || resolved.seq.is_some_and(|seq| side.invalidation.must_retry(&guard, gfn, seq))
        {
            return Ok(counts.settled(FaultOutcome::Retry, prefetch));
        }
        if !room_first && !shadow.make_pages_available(&mut guard) {
            return Err(vm.out_of_quota());
        }
        let fault = vm.shadow_fault_of(&resolved, access.gfn, walk);
        let mapped = shadow.map(&mut guard, cache, root, &fault);
        drop(guard);
        let outcome = match mapped {
            ShadowOutcome::Fixed { level, spte } => FaultOutcome::Fixed { level, spte },
            ShadowOutcome::Spurious => FaultOutcome::Spurious,
            ShadowOutcome::Retry => FaultOutcome::Retry,
            ShadowOutcome::Emulate => {
                counts.mmio_created();
                FaultOutcome::Emulate
            }
            ShadowOutcome::WriteProtected => FaultOutcome::Emulate,
        };
        Ok(counts.settled(outcome, prefetch))
    }

    /// The root that the context wants, found or made. Puts nothing in the cache.
    pub(crate) fn load_shadow_root(&mut self) -> Result<u32, VmError> {
        let (vm, vcpu) = (self.vm, self.id());
        let shadow = vm.needs_shadow("a root of shadow pages")?;
        let VcpuCore { slots, cache, mmu: context, .. } = &mut *self.core;
        let (slots, as_id) = (slots.enter(), context.role.as_id());
        if context.guest {
            if !context.has_frame {
                return Err(VmError::NoCr3 { vcpu });
            }
            if slots.find(as_id, context.frame).is_none_or(|slot| slot.invalid) {
                let (start, end) = (context.frame, context.frame.saturating_add(1));
                let rule = "the top of the guest's page tables is in no memslot (a real guest dies of it)";
                return Err(VmError::BadRange { as_id, start, end, rule });
            }
        }
        vm.top_up_shadow(&self.task, shadow, cache)?;
        let mut guard = vm.mmu().lock.write(&self.task);
        if !shadow.make_pages_available(&mut guard) {
            return Err(vm.out_of_quota());
        }
        let root = shadow.load_root(&mut guard, cache, as_id, context.frame, context.role)?;
        if context.guest {
            // What was found may be out of step with the guest's tables.
            shadow.sync_roots(&mut guard, &[root]);
        }
        Ok(root)
    }

    /// Brings what is unsync below `roots`, which shadow tables of the guest's, into step with these.
    pub(crate) fn sync_roots(&mut self, roots: &[u32]) {
        if self.core.mmu.guest
            && let Some(shadow) = self.vm.shadow()
        {
            let _slots = self.core.slots.enter();
            let mut guard = self.vm.mmu().lock.write(&self.task);
            shadow.sync_roots(&mut guard, roots);
        }
    }
}

impl<P: Platform> Vm<P> {
    /// What the map step is told; `page` is what the vCPU asked for.
    pub(crate) fn shadow_fault_of(
        &self,
        resolved: &Resolved,
        page: u64,
        walk: Option<GuestWalk>,
    ) -> ShadowFault {
        let &Resolved { access, as_id, frame, goal, disallowed, tracked, prefetch, .. } = resolved;
        ShadowFault {
            as_id,
            gva: page,
            gfn: access.gfn,
            frame: match frame {
                Frame::Page { pfn, writable } => ShadowFrame::Page { pfn, writable },
                Frame::Mmio { generation } => ShadowFrame::Mmio { generation },
            },
            goal_level: walk.as_ref().map_or(goal, |walk| goal.min(walk.level)).min(LEVEL_1G),
            write: access.write,
            exec: access.exec,
            prefetch,
            dirty_tracked: tracked,
            huge_page_disallowed: disallowed,
            nx_huge_pages: self.mmu().nx_huge_pages(),
            guest: walk,
        }
    }

    /// The shadow MMU, for who cannot do without.
    pub(crate) fn needs_shadow(&self, what: &'static str) -> Result<&ShadowMmu<P>, VmError> {
        let rule = "it takes a shadow design, or nested";
        self.shadow().ok_or(VmError::NeedsShadow { what, rule })
    }

    /// Tables for one fault; where the pool has none left, pages that only wait to be reclaimed go (the kernel's shrinker, which the allocator would call).
    pub(crate) fn top_up_shadow(
        &self,
        task: &Task<P>,
        shadow: &ShadowMmu<P>,
        cache: &mut TableCache,
    ) -> Result<(), VmError> {
        // In one hold, without a check: half of what one call of the kernel's shrinker scans.
        const BATCH: u64 = 64;
        match shadow.top_up(task, cache) {
            Err(PoolError::Exhausted { .. }) if shadow.counts().obsolete != 0 => {
                shadow.shrink(&mut self.mmu().lock.write(task), BATCH);
                if !shadow.reclamation().kind().frees_at_once() {
                    // On their way back, and no use to who needs them now.
                    shadow.reclamation().drain(task);
                }
                Ok(shadow.top_up(task, cache)?)
            }
            other => Ok(other?),
        }
    }

    pub(crate) fn out_of_quota(&self) -> VmError {
        VmError::Quota { quota: self.quota.unwrap_or(u32::MAX) }
    }

    /// A TDP fault in a VM that has shadow pages, too: the frame and level that it may map while mmu_lock is held. A gfn that holds a table of the guest's is not written behind the shadow MMU's back:
    /// `None` for a write, which is emulated (`page_fault_handle_page_track`).
    #[cold]
    #[inline(never)]
    pub(crate) fn nested_limits<M: Mode>(
        &self,
        guard: &Guard<'_, P, M>,
        as_id: u8,
        gfn: u64,
        write: bool,
        frame: Frame,
        mut goal: u8,
    ) -> Option<(Frame, u8)> {
        let (Some(shadow), Frame::Page { pfn, writable }) = (self.shadow(), frame) else {
            return Some((frame, goal));
        };
        if let Some(slot) = self.side().slots.books().find(as_id, gfn) {
            while goal > LEVEL_4K && slot.lpage.disallowed(slot.base, gfn, goal) {
                goal -= 1;
            }
        }
        let shadowed = shadow.is_shadowed(guard, as_id, gfn);
        let frame = Frame::Page { pfn, writable: writable && !shadowed };
        (!shadowed || !write).then_some((frame, goal))
    }
}
