//! Bulk population of shadow pages.
//!
//! **Guarantee.** What faults of this one vCPU would leave, page after page, with Accessed and Dirty as asked for; beside running vCPUs.
//!
//! **Mechanism.** There is no bulk form of the shadow MMU's map step: each leaf has its reverse map, each table its parents. What is saved is the way to it: mmu_lock is taken once for many pages, and given up when the table cache
//! runs low, when somebody waits for the lock, and at the end of a memslot. The notifier's sequence is sampled before the frames of a stretch are looked up, and tested under the lock.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_mmu::Frame;
use tdpmmu_platform::{Exclusive, Guard, Platform, Site};
use tdpmmu_shadow::{GuestWalk, ShadowOutcome, walk_guest};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{index, round_down, span};

use crate::fault::{Resolved, resolve};
use crate::populate::mix;
use crate::vcpu::VcpuCore;
use crate::walker::GuestAccess;
use crate::{AdMix, BulkOptions, HostAnswer, Progress, Vcpu, Vm, VmError};

/// Most pages that are looked up before one hold of the lock.
const STRETCH: usize = 256;
/// Tables that a map step may take from the cache: one a level, and a root's.
const TABLES: usize = 6;

/// A page that is about to be mapped.
struct Next {
    page: u64,
    resolved: Resolved,
    walk: Option<GuestWalk>,
    ad: AdMix,
}

impl<P: Platform> Vm<P> {
    /// Maps `pages`, gfns or the guest's virtual pages, under the current root of `vcpu`. Returns the leaves made.
    pub(crate) fn populate_shadow(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        pages: Range<u64>,
        options: &BulkOptions,
        progress: &Progress,
    ) -> Result<u64, VmError> {
        let shadow = self.needs_shadow("shadow pages")?;
        let (mut at, mut made) = (pages.start, 0);
        let mut next = Vec::with_capacity(STRETCH);
        while at < pages.end {
            if progress.cancel.load(Relaxed) {
                return Err(VmError::Cancelled);
            }
            // Reclaim of the quota, or a fast zap, may have taken the root: its request is serviced here, as a vCPU does between two faults.
            if !vcpu.reload()? {
                return Err(VmError::Cancelled);
            }
            let root = vcpu.root()?;
            let before = at;
            let as_id = vcpu.role().as_id();
            let VcpuCore { slots, cache, mmu: context, .. } = &mut *vcpu.core;
            self.top_up_shadow(&vcpu.task, shadow, cache)?;
            let set = slots.enter();
            let seq = self.side().invalidation.sample::<P>();
            next.clear();
            // Where there may be one table a page, a stretch is as long as the cache; where a table serves 512, longer.
            let mut ahead = at;
            while next.len() < STRETCH && ahead < pages.end {
                let (one, level) = self.next_page(
                    &set,
                    as_id,
                    context.guest.then_some((context.frame, context.levels)),
                    ahead,
                    options,
                    seq,
                )?;
                ahead = (round_down(ahead, level) + span(level)).min(pages.end);
                next.push(one);
            }
            let mut guard = self.mmu().lock.write(&vcpu.task);
            for one in &next {
                if cache.len() < TABLES && one.page != before || guard.should_yield() && one.page != before {
                    break;
                }
                if !shadow.make_pages_available(&mut guard) {
                    return Err(self.out_of_quota());
                }
                P::point(Site::FaultStale);
                let gfn = one.resolved.access.gfn;
                if shadow.is_obsolete(root) || self.side().invalidation.must_retry(&guard, gfn, seq) {
                    break;
                }
                let mut fault = self.shadow_fault_of(&one.resolved, one.page, one.walk);
                match shadow.map(&mut guard, cache, root, &fault) {
                    ShadowOutcome::Fixed { level, .. } => {
                        made += 1;
                        self.set_ad(&guard, root, one.page, level, one.ad);
                        at = round_down(one.page, level) + span(level);
                    }
                    ShadowOutcome::Spurious => at = one.page + 1,
                    // A table that is shadowed is mapped read-only, for who only reads it.
                    ShadowOutcome::WriteProtected if one.resolved.access.write => {
                        fault.write = false;
                        if let ShadowOutcome::Fixed { .. } = shadow.map(&mut guard, cache, root, &fault) {
                            made += 1;
                        }
                        at = one.page + 1;
                    }
                    ShadowOutcome::WriteProtected | ShadowOutcome::Emulate => at = one.page + 1,
                    ShadowOutcome::Retry => break,
                }
            }
            drop(guard);
            drop(set);
            if at == before {
                vcpu.before_retry();
            }
            at = at.min(pages.end);
            progress.done.fetch_add(at - before, Relaxed);
        }
        Ok(made)
    }

    /// What is behind `page`, and the level by which it may be mapped at most.
    fn next_page(
        &self,
        set: &crate::slots::SlotSet,
        as_id: u8,
        guest: Option<(u64, u8)>,
        page: u64,
        options: &BulkOptions,
        seq: u64,
    ) -> Result<(Next, u8), VmError> {
        let side = self.side();
        let walk = match guest {
            None => None,
            Some((cr3, levels)) => {
                let walk = walk_guest::<P>(side, as_id, cr3, levels, page, false, false);
                Some(walk.map_err(|fault| VmError::GuestFault { vcpu: 0, fault })?)
            }
        };
        let gfn = walk.as_ref().map_or(page, |walk| walk.gfn);
        let Some(slot) = set.find(as_id, gfn).filter(|slot| !slot.invalid) else {
            let rule = "no memslot covers it";
            return Err(VmError::BadRange { as_id, start: gfn, end: gfn.saturating_add(1), rule });
        };
        let writable = !slot.flags.readonly && walk.as_ref().is_none_or(|walk| walk.access.write);
        let ad = match options.ad {
            AdMix::Percent(percent, seed) => {
                let dirty = mix(seed, page / span(2)) % 100 < u64::from(percent);
                if dirty { AdMix::Dirty } else { AdMix::Clean }
            }
            fixed => fixed,
        };
        let host = side.primary.fault_in(slot.hva_of(gfn), false)?;
        let write = writable && host.writable && ad == AdMix::Dirty;
        let level = host.level.min(options.level);
        let answer = HostAnswer { pfn: host.pfn, level, host_level: level, writable: host.writable };
        let access = GuestAccess { gfn, write, exec: false };
        let resolved = resolve(self, slot, access, answer, ad == AdMix::Untouched, seq);
        let level = walk.as_ref().map_or(resolved.goal, |walk| resolved.goal.min(walk.level));
        debug_assert!(matches!(resolved.frame, Frame::Page { .. }));
        Ok((Next { page, resolved, walk, ad }, level))
    }

    /// A leaf was made as its fault makes it: writable ones dirty, all but prefetched ones accessed.
    fn set_ad(&self, _lock: &Guard<'_, P, Exclusive>, root: u32, page: u64, level: u8, ad: AdMix) {
        let (mmu, format) = (self.mmu(), self.mmu().format());
        if !format.ad_bits || ad == AdMix::Dirty {
            return;
        }
        let mut table = root;
        let mut at = self.needs_shadow("shadow pages").map_or(0, |shadow| shadow.root_level(root));
        while at > level {
            table = Spte(P::load(&mmu.pool().entries(table)[index(page, at)], Site::ShadowWalk)).pfn() as u32;
            at -= 1;
        }
        let cell = &mmu.pool().entries(table)[index(page, level)];
        let gone = format.dirty | if ad == AdMix::Untouched { format.accessed } else { 0 };
        P::fetch_and(cell, !gone, Site::SpteAd);
    }
}
