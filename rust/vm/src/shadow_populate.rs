//! Bulk population of shadow pages.
//!
//! **Guarantee.** What faults of this one vCPU would leave, page after page, with Accessed and Dirty as asked for; beside running vCPUs.
//!
//! **Mechanism.** Direct pages: a table's worth of neighbouring frames in one step of the shadow MMU's ([`DirectRun`]), one hold each. Everything else, and what such a step declines, goes through the map step page by page: each leaf has its
//! reverse map, each table its parents. What is saved there is the way to it: mmu_lock is taken once for many pages, and given up when the table cache runs low or somebody waits for the lock. The notifier's sequence is sampled before the frames of a
//! stretch are looked up, and tested under the lock.

use std::ops::Range;
use std::sync::atomic::Ordering::Relaxed;

use tdpmmu_mmu::Frame;
use tdpmmu_platform::{Event, Exclusive, Guard, Platform, Site};
use tdpmmu_shadow::{DirectRun, GuestWalk, ShadowOutcome, walk_guest};
use tdpmmu_spte::geometry::{MAX_LEVEL, index, round_down, span};
use tdpmmu_spte::{LEVEL_2M, LEVEL_4K, Spte};

use crate::fault::{Resolved, resolve};
use crate::populate::mix as piece_number;
use crate::vcpu::VcpuCore;
use crate::walker::GuestAccess;
use crate::{AdMix, BulkOptions, HostAnswer, Progress, Vcpu, Vm, VmError};

/// Most pages that are looked up before one hold of the lock.
const STRETCH: usize = 256;

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
            let (as_id, id) = (vcpu.role().as_id(), vcpu.id());
            self.top_up_shadow(&vcpu.task, shadow, &mut vcpu.core.cache)?;
            if !vcpu.core.mmu.guest
                && let Some(done) = self.populate_run(vcpu, root, at..pages.end, options)?
            {
                made += done.1;
                progress.done.fetch_add(done.0, Relaxed);
                at += done.0;
                if done.0 == 0 {
                    vcpu.before_retry();
                }
                continue;
            }
            let VcpuCore { slots, cache, mmu: context, .. } = &mut *vcpu.core;
            let set = slots.enter();
            let seq = self.side().invalidation.sample::<P>();
            let guest = context.guest.then_some((context.frame, context.levels));
            next.clear();
            let mut ahead = at;
            while next.len() < STRETCH && ahead < pages.end {
                let (one, level) = self.next_page(&set, as_id, guest, ahead, options, seq, id)?;
                ahead = (round_down(ahead, level) + span(level)).min(pages.end);
                next.push(one);
            }
            let mut guard = self.mmu().lock.write(&vcpu.task);
            for one in &next {
                // The first one is made however contended the lock is.
                if one.page != before && (cache.len() < usize::from(MAX_LEVEL) || guard.should_yield()) {
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
                let fault = self.shadow_fault_of(&one.resolved, one.page, one.walk);
                let small = shadow.counts().leaves[usize::from(LEVEL_4K)];
                match shadow.map(&mut guard, cache, root, &fault) {
                    ShadowOutcome::Fixed { level, .. } => {
                        made += 1;
                        self.set_ad(&guard, root, one.page, level, one.ad);
                        at = round_down(one.page, level) + span(level);
                    }
                    ShadowOutcome::Spurious => at = one.page + 1,
                    // A table that is shadowed: it is mapped read-only, if it was not before.
                    ShadowOutcome::WriteProtected => {
                        made += shadow.counts().leaves[usize::from(LEVEL_4K)].saturating_sub(small);
                        at = one.page + 1;
                    }
                    ShadowOutcome::Emulate => at = one.page + 1,
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

    /// Neighbouring frames from the start of `gfns` on, as far as one table, one host mapping and one memslot reach. (Pages done, leaves made); `None`: one by one.
    fn populate_run(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        root: u32,
        gfns: Range<u64>,
        options: &BulkOptions,
    ) -> Result<Option<(u64, u64)>, VmError> {
        let shadow = self.needs_shadow("shadow pages")?;
        let VcpuCore { slots, cache, mmu: context, .. } = &mut *vcpu.core;
        let (set, as_id, side) = (slots.enter(), context.role.as_id(), self.side());
        let seq = side.invalidation.sample::<P>();
        let gfn = gfns.start;
        let Some(slot) = set.find(as_id, gfn).filter(|slot| !slot.invalid) else { return Ok(None) };
        if slot.flags.log_dirty {
            return Ok(None);
        }
        let (page, mut len) =
            side.primary.fault_in_run(slot.hva_of(gfn), gfns.end.min(slot.gfns().end) - gfn)?;
        let mut level = slot.max_level(gfn).min(page.level).min(options.level).min(self.rules().max_level);
        while level > LEVEL_4K && (!gfn.is_multiple_of(span(level)) || len < span(level)) {
            level -= 1;
        }
        // To the end of the table; small leaves only up to where larger ones may begin; a mixed A/D only within its piece.
        len = len.min(round_down(gfn, level + 1) + span(level + 1) - gfn);
        if level < options.level {
            len = len.min(round_down(gfn, level + 1) + span(level + 1) - gfn);
        }
        let (ad, piece) = self.ad_of(options.ad, gfn, level);
        len = len.min(piece);
        len -= len % span(level);
        let template = self.template(level, page.writable && !slot.flags.readonly, ad);
        let run = DirectRun {
            gfn,
            level,
            first: Spte(template.raw() | page.pfn << Spte::PFN_SHIFT),
            count: len / span(level),
        };
        let mut guard = self.mmu().lock.write(&vcpu.task);
        if !shadow.make_pages_available(&mut guard) {
            return Err(self.out_of_quota());
        }
        if shadow.is_obsolete(root) || side.invalidation.must_retry_range(&guard, &(gfn..gfn + len), seq) {
            return Ok(Some((0, 0)));
        }
        let books = side.slots.books();
        match shadow.map_direct_run(&guard, &books, cache, root, &run)? {
            (0, _) => Ok(None),
            (entries, made) => Ok(Some((entries * span(level), made))),
        }
    }

    /// Accessed and Dirty of the leaf for `page`, and how far they go.
    fn ad_of(&self, mix: AdMix, page: u64, level: u8) -> (AdMix, u64) {
        match mix {
            AdMix::Percent(percent, seed) => {
                let unit = span(LEVEL_2M).max(span(level));
                let dirty = piece_number(seed, page / unit) % 100 < u64::from(percent);
                (if dirty { AdMix::Dirty } else { AdMix::Clean }, (page / unit + 1) * unit - page)
            }
            fixed => (fixed, u64::MAX),
        }
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
        vcpu: usize,
    ) -> Result<(Next, u8), VmError> {
        let side = self.side();
        let walk = match guest {
            None => None,
            Some((cr3, levels)) => {
                let walk = walk_guest::<P>(side, as_id, cr3, levels, page, false, false);
                Some(walk.map_err(|fault| VmError::GuestFault { vcpu, fault })?)
            }
        };
        let gfn = walk.as_ref().map_or(page, |walk| walk.gfn);
        let Some(slot) = set.find(as_id, gfn).filter(|slot| !slot.invalid) else {
            let rule = "no memslot covers it";
            return Err(VmError::BadRange { as_id, start: gfn, end: gfn.saturating_add(1), rule });
        };
        let writable = !slot.flags.readonly && walk.as_ref().is_none_or(|walk| walk.access.write);
        let (ad, _) = self.ad_of(options.ad, page, options.level);
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
    fn set_ad(&self, lock: &Guard<'_, P, Exclusive>, root: u32, page: u64, level: u8, ad: AdMix) {
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
        let old = P::fetch_and(cell, !gone, Site::SpteAd);
        lock.task().detail(|| Event::SpteMarked {
            root,
            table,
            gfn: round_down(page, level),
            level,
            old,
            new: old & !gone,
        });
    }
}
