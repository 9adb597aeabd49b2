//! Filling a guest's memory: in bulk, or by faults that race.
//!
//! **Guarantee.** Both leave what the guest's own faults would leave. Bulk population takes the same two precautions as a fault: the notifier sequence is sampled before
//! frames are looked up and tested under mmu_lock, and the lock is held shared, so that it may run beside vCPUs.
//!
//! **Mechanism.** Bulk: pieces of at most 1 GiB, handed to the threads of a pool of our own; each piece goes as far as slot, host mapping level and contiguous frames reach.
//! By faults: one thread per vCPU, all over the same gfns from different starting points, so that they meet.

use std::ops::Range;
use std::sync::Mutex as StdMutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;
use tdpmmu_mmu::{BulkError, BulkMap};
use tdpmmu_platform::{MeterSnapshot, Platform, Role as TaskRole, Task};
use tdpmmu_spte::geometry::{round_down, span};
use tdpmmu_spte::{Access, AdMode, LEVEL_1G, LEVEL_4K, MakeLeaf, Spte};
use tdpmmu_table::TableCache;

use crate::fault::FaultOutcome;
use crate::slots::SlotReader;
use crate::walker::GuestAccess;
use crate::{Vcpu, Vm, VmError};

/// Accessed and Dirty of bulk-populated leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AdMix {
    /// Neither: as prefetched, never touched.
    Untouched,
    /// Accessed, not Dirty: read (or written and cleaned).
    Clean,
    /// Accessed and Dirty.
    Dirty,
    /// Of each 100 pieces of 2 MiB this many are Dirty, the others Clean; which, follows from the seed.
    Percent(u8, u64),
}

/// How to populate in bulk.
#[derive(Clone, Copy, Debug)]
pub struct BulkOptions {
    /// Largest leaf level to use, 1..=3.
    pub level: u8,
    /// Accessed and Dirty.
    pub ad: AdMix,
    /// Threads; 0: one per CPU.
    pub threads: usize,
}

impl Default for BulkOptions {
    fn default() -> Self {
        Self { level: LEVEL_4K, ad: AdMix::Dirty, threads: 0 }
    }
}

/// Progress and cancellation of something long.
#[derive(Debug, Default)]
pub struct Progress {
    /// Set to stop soon.
    pub cancel: AtomicBool,
    /// Pages done.
    pub done: AtomicU64,
}

/// SplitMix64: which 2 MiB pieces are dirty.
pub(crate) fn mix(seed: u64, n: u64) -> u64 {
    let mut z = seed.wrapping_add(n.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What one populating thread needs.
struct Hand<P: Platform> {
    task: Task<P>,
    cache: TableCache,
    slots: SlotReader<P>,
}

impl<P: Platform> Vm<P> {
    /// A leaf of `level` with frame 0 as bulk population writes it.
    pub(crate) fn template(&self, level: u8, writable: bool, ad: AdMix) -> Spte {
        let format = self.mmu().format();
        let made = format.make_leaf(&MakeLeaf {
            pfn: 0,
            level,
            access: Access::ALL,
            prefetch: ad == AdMix::Untouched,
            host_writable: writable,
            ad_mode: if format.ad_bits { AdMode::Enabled } else { AdMode::Disabled },
            nx_mitigation: self.mmu().nx_huge_pages(),
            remake: self.mmu().profile().remake_dirty,
            ..MakeLeaf::default()
        });
        // Without hardware A/D a writable leaf *is* dirty: W stands for D.
        match ad {
            AdMix::Untouched | AdMix::Clean if format.ad_bits => format.without_dirty(made.spte),
            _ => made.spte,
        }
    }

    /// Populates `gfns` of the address space that `vcpu` is in (1 in SMM) under its current root, which keeps the reference. Returns the leaves made. Pages that are
    /// mapped already stay. A vCPU on shadow pages makes them one by one, as its faults would, whatever `threads` says; where they shadow the guest's tables, `gfns` are virtual pages, which these must map.
    ///
    /// # Errors
    /// [`VmError::BadRange`] where no memslot is; [`VmError::Pool`], [`VmError::HostFull`], [`VmError::Cancelled`]: what was done stays.
    pub fn populate_bulk(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        gfns: Range<u64>,
        options: &BulkOptions,
        progress: &Progress,
    ) -> Result<u64, VmError> {
        vcpu.leave();
        let root = vcpu.root()?;
        let as_id = vcpu.role().as_id();
        let bad = |rule| VmError::BadRange { as_id, start: gfns.start, end: gfns.end, rule };
        if gfns.is_empty() || gfns.end > self.mmu().max_gfn() && !vcpu.core.mmu.guest {
            return Err(bad("a range to populate is not empty and ends within the guest's address space"));
        }
        if !(LEVEL_4K..=LEVEL_1G).contains(&options.level) {
            return Err(bad("leaves are 4K (1), 2M (2) or 1G (3)"));
        }
        if vcpu.core.mmu.shadow {
            return self.populate_shadow(vcpu, gfns, options, progress);
        }
        let gig = span(LEVEL_1G);
        let pieces: Vec<Range<u64>> = (gfns.start / gig..gfns.end.div_ceil(gig))
            .map(|n| (n * gig).max(gfns.start)..((n + 1) * gig).min(gfns.end))
            .collect();
        if !P::BULK {
            return self.populate_pieces(root, as_id, pieces, options, progress);
        }
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(options.threads)
            .thread_name(|n| format!("populate-{n}"))
            .build()
            .map_err(|e| VmError::Host { what: "threads to populate", reason: e.to_string() })?;
        let idle: StdMutex<Vec<Hand<P>>> = StdMutex::new(Vec::new());
        let result = pool.install(|| {
            pieces
                .par_iter()
                .map(|piece| {
                    if progress.cancel.load(Relaxed) {
                        return Err(VmError::Cancelled);
                    }
                    let idle_hand = idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
                    let mut hand = idle_hand.unwrap_or_else(|| Hand {
                        task: self.task("populate", TaskRole::Populate),
                        cache: TableCache::default(),
                        slots: self.side().slots.reader("populate"),
                    });
                    let made = self.populate_piece(&mut hand, root, as_id, piece.clone(), options);
                    idle.lock().unwrap_or_else(PoisonError::into_inner).push(hand);
                    progress.done.fetch_add(piece.end - piece.start, Relaxed);
                    made
                })
                .try_reduce(|| 0, |a, b| Ok(a + b))
        });
        for mut hand in idle.into_inner().unwrap_or_else(PoisonError::into_inner) {
            hand.cache.drain(self.mmu().pool());
        }
        result
    }

    /// One piece after the other, by the calling task.
    fn populate_pieces(
        &self,
        root: u32,
        as_id: u8,
        pieces: Vec<Range<u64>>,
        options: &BulkOptions,
        progress: &Progress,
    ) -> Result<u64, VmError> {
        let mut hand = Hand {
            task: self.task("populate", TaskRole::Populate),
            cache: TableCache::default(),
            slots: self.side().slots.reader("populate"),
        };
        let made = pieces.into_iter().try_fold(0, |sum, piece| {
            if progress.cancel.load(Relaxed) {
                return Err(VmError::Cancelled);
            }
            let pages = piece.end - piece.start;
            let made = self.populate_piece(&mut hand, root, as_id, piece, options)?;
            progress.done.fetch_add(pages, Relaxed);
            Ok(sum + made)
        });
        hand.cache.drain(self.mmu().pool());
        made
    }

    fn populate_piece(
        &self,
        hand: &mut Hand<P>,
        root: u32,
        as_id: u8,
        piece: Range<u64>,
        options: &BulkOptions,
    ) -> Result<u64, VmError> {
        let (mmu, side) = (self.mmu(), self.side());
        let Hand { task, cache, slots } = hand;
        let (mut gfn, mut made) = (piece.start, 0);
        while gfn < piece.end {
            mmu.top_up(task, cache)?;
            let set = slots.enter();
            let seq = side.invalidation.sample::<P>();
            let Some(slot) = set.find(as_id, gfn).filter(|slot| !slot.invalid) else {
                let rule = "no memslot covers it";
                return Err(VmError::BadRange { as_id, start: gfn, end: piece.end, rule });
            };
            let (page, mut len) =
                side.primary.fault_in_run(slot.hva_of(gfn), piece.end.min(slot.gfns().end) - gfn)?;
            let mut level =
                slot.max_level(gfn).min(page.level).min(options.level).min(self.rules().max_level);
            while level > LEVEL_4K && (!gfn.is_multiple_of(span(level)) || len < span(level)) {
                level -= 1;
            }
            // Small leaves only up to where larger ones may begin; a mixed A/D only within its piece.
            if level < options.level {
                len = len.min(round_down(gfn, level + 1) + span(level + 1) - gfn);
            }
            let ad = match options.ad {
                AdMix::Percent(percent, seed) => {
                    let piece = gfn / span(2).max(span(level));
                    len = len.min((piece + 1) * span(2).max(span(level)) - gfn);
                    if mix(seed, piece) % 100 < u64::from(percent) { AdMix::Dirty } else { AdMix::Clean }
                }
                fixed => fixed,
            };
            len -= len % span(level);
            let map = BulkMap {
                gfns: gfn..gfn + len,
                first_pfn: page.pfn,
                level,
                template: self.template(level, page.writable && !slot.flags.readonly, ad),
            };
            let logged = slot.flags.log_dirty && map.template.raw() & mmu.format().write != 0;
            if logged && side.rings.is_some() {
                let rule = "no vCPU makes these pages writable, so no ring would tell: populate by faults while the slot logs";
                return Err(VmError::BadRange { as_id, start: gfn, end: piece.end, rule });
            }
            let mut guard = mmu.lock.read(task);
            if mmu.is_obsolete(root) {
                return Err(VmError::Mmu("the root to populate was invalidated by a fast zap".into()));
            }
            if side.invalidation.must_retry_range(&guard, &map.gfns, seq) {
                continue;
            }
            made += mmu.populate_bulk(&mut guard, cache, root, &map).map_err(|error| match error {
                BulkError::Pool(error) => VmError::Pool(error),
                other => VmError::Mmu(other.to_string()),
            })?;
            drop(guard);
            if logged {
                for gfn in map.gfns.clone() {
                    side.slots.mark_dirty(as_id, gfn);
                }
            }
            gfn += len;
        }
        Ok(made)
    }

    /// Populates `gfns` by page faults from `vcpus` (all of them at once, over the same gfns). Each vCPU begins at another place, so
    /// that they race for upper tables and, where their paths cross, for leaves. Returns the leaves installed and each thread's measurements.
    ///
    /// # Errors
    /// The first error of any vCPU: [`VmError::Busy`], [`VmError::Pool`], [`VmError::HostFull`], [`VmError::Cancelled`].
    pub fn populate_by_faults(
        &self,
        vcpus: Range<usize>,
        gfns: Range<u64>,
        write: bool,
        progress: &Progress,
    ) -> Result<(u64, Vec<MeterSnapshot>), VmError> {
        let count = vcpus.len().max(1) as u64;
        let pages = gfns.end.saturating_sub(gfns.start);
        let run = |id: usize, nth: u64| -> Result<(u64, MeterSnapshot), VmError> {
            let mut vcpu = self.vcpu(id)?;
            let mut fixed = 0;
            // Each vCPU asks for every page, its own share first.
            let offset = pages / count * nth;
            let mut at = 0;
            while at < pages {
                if at.is_multiple_of(4096) && progress.cancel.load(Relaxed) {
                    return Err(VmError::Cancelled);
                }
                let gfn = gfns.start + (offset + at) % pages;
                let access = GuestAccess { gfn, write, exec: false };
                // Hardware faults only where it finds nothing; two vCPUs that both found nothing race on.
                vcpu.root()?;
                let there = vcpu.lookup(gfn);
                if there.is_some_and(|(spte, _)| self.mmu().format().allows(spte, write, false)) {
                    at += 1;
                    continue;
                }
                match vcpu.fault(access, there.is_some())? {
                    FaultOutcome::Retry => {
                        // A fast zap beside us leaves an obsolete root: only a guest entry services the request to drop it.
                        if progress.cancel.load(Relaxed) || !vcpu.enter()? {
                            return Err(VmError::Cancelled);
                        }
                        vcpu.leave();
                        // The page is still missing: the guest would fault again.
                        vcpu.before_retry();
                        continue;
                    }
                    FaultOutcome::Fixed { .. } => {
                        fixed += 1;
                        progress.done.fetch_add(1, Relaxed);
                    }
                    FaultOutcome::Fast(_) | FaultOutcome::Spurious | FaultOutcome::Emulate => {}
                }
                at += 1;
            }
            Ok((fixed, vcpu.task().meter().take()))
        };
        // On a platform that has no threads of the host's, one vCPU after the other: who wants them to race starts them itself.
        let in_turn = || vcpus.clone().enumerate().map(|(nth, id)| run(id, nth as u64)).collect();
        let results: Vec<Result<(u64, MeterSnapshot), VmError>> = if !P::BULK {
            in_turn()
        } else {
            std::thread::scope(|scope| {
                let handles: Vec<_> = vcpus
                    .clone()
                    .enumerate()
                    .map(|(nth, id)| {
                        std::thread::Builder::new()
                            .name(format!("vcpu-{id}"))
                            .spawn_scoped(scope, move || run(id, nth as u64))
                            .map_err(|e| VmError::Host { what: "a vCPU thread", reason: e.to_string() })
                    })
                    .collect();
                handles
                    .into_iter()
                    .map(|handle| {
                        handle?
                            .join()
                            .unwrap_or_else(|_| Err(VmError::Mmu("a populating vCPU panicked".into())))
                    })
                    .collect()
            })
        };
        let (mut fixed, mut meters) = (0, Vec::new());
        for result in results {
            let (n, meter) = result?;
            fixed += n;
            meters.push(meter);
        }
        Ok((fixed, meters))
    }
}
