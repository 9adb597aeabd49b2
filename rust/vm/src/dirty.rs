//! Dirty logging: how it starts and ends, and how what was written is collected.
//!
//! **Guarantee.** A write that completes after [`Vm::set_memslot`] has turned logging on is in a later log, and so is one that completes after [`Vm::get_dirty_log`] or
//! [`Vm::clear_dirty_log`] has returned. No page is unmapped for it. What was marked before is reported until it is taken.
//!
//! **Mechanism.** The slot with its bitmap is published first and SRCU waited for, so that every fault from then on maps 4 KiB and marks what it
//! makes writable. What happens to the leaves that are there depends on how the log is to be kept:
//!
//! | | enabling | taking a page's bit |
//! | --- | --- | --- |
//! | write protection | huge leaves are split (`eager_page_split`, 5.18 on), W is taken from every leaf, one flush | W is taken from its 4 KiB leaf |
//! | D bits (PML) | huge leaves are split, D is taken from every leaf, W from what is still huge, one flush | D is taken from its 4 KiB leaf |
//! | either, initially all set | nothing: every page counts as dirty (5.10 protects the huge leaves) | huge leaves around the pages are split, or protected so that their next write splits them; then as above |
//!
//! A write faults from then on, and the fault marks; or hardware sets D and logs the page (`hwlog.rs`).
//!
//! | a write goes through | and is |
//! | --- | --- |
//! | a huge or writable translation, before the flush | part of the time before the log began |
//! | an SPTE that the walk has yet to protect | the same: the call has not returned |
//! | an SPTE that was protected, by a fault | marked after W was set; the mark may be early in the next log, never missing |
//! | an SPTE that another vCPU's fast fault has made writable and has yet to mark | in this log, or in the next: the mark comes in any case |
//!
//! Harvesting takes the bits first and protects second: a write in between sets its bit again and is reported twice, never lost. GET does both at
//! once, for the slot, under one exclusive hold; with *manual protection* GET only reads, and CLEAR takes the bits that the caller names and that are set, 64
//! pages at a time, again under one exclusive hold. The flush comes after the hold.
//!
//! When logging ends, what the host maps huge becomes huge again, by the profile's `collapse`.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use tdpmmu_mmu::Harvest;
use tdpmmu_platform::{Event, Exclusive, Guard, Phase, Platform, Task};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{LEVEL_2M, LEVEL_4K};

use crate::slot::{DirtyBitmap, MemSlot};
use crate::slots::Logs;
use crate::{Vm, VmError};

/// How dirty pages are told apart from clean ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DirtyMode {
    /// Clean pages are write-protected: AMD, and Intel without PML.
    #[default]
    WriteProtect,
    /// Clean pages have no D bit, and hardware logs each that gets one: Intel with PML.
    DBits,
}

/// What one GET returned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirtyLog {
    /// First gfn of the slot.
    pub base: u64,
    /// Pages of the slot.
    pub pages: u64,
    /// One bit a page, the first in bit 0 of the first word.
    pub words: Vec<u64>,
}

impl DirtyLog {
    /// The dirty gfns, ascending.
    pub fn gfns(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().flat_map(move |(n, &word)| {
            let bits = std::iter::successors((word != 0).then_some(word), |bits| {
                let left = bits & (bits - 1);
                (left != 0).then_some(left)
            });
            bits.map(move |bits| self.base + n as u64 * 64 + u64::from(bits.trailing_zeros()))
        })
    }

    /// Dirty pages.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// What may change while the VM runs.
pub(crate) struct Protocol {
    manual: AtomicBool,
    all_set: AtomicBool,
    eager: AtomicBool,
    mode: AtomicU8,
}

impl Protocol {
    pub(crate) fn new(eager: bool, mode: DirtyMode) -> Self {
        Self {
            manual: AtomicBool::new(false),
            all_set: AtomicBool::new(false),
            eager: AtomicBool::new(eager),
            mode: AtomicU8::new(u8::from(mode == DirtyMode::DBits)),
        }
    }

    pub(crate) fn mode(&self) -> DirtyMode {
        if self.mode.load(Ordering::Relaxed) == 0 { DirtyMode::WriteProtect } else { DirtyMode::DBits }
    }
}

fn tell_taken<P: Platform>(task: &Task<P>, slot: &MemSlot, word: usize, mask: u64) {
    if mask != 0 {
        let (as_id, base) = (slot.as_id, slot.base + word as u64 * 64);
        task.observe(|| Event::DirtyTake { as_id, base, mask });
    }
}

fn tell_returned<P: Platform>(task: &Task<P>, slot: &MemSlot) {
    task.observe(|| Event::LogReturn { as_id: slot.as_id, start: slot.base, end: slot.base + slot.pages });
}

impl<P: Platform> Vm<P> {
    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: `manual`: GET only reads, CLEAR protects; `initially_set`: a new log begins with every page dirty and nothing
    /// protected. Holds for slots that begin to log afterwards, and for every GET from now on.
    ///
    /// # Errors
    /// [`VmError::Config`] for `initially_set` without `manual` (EINVAL); [`VmError::Closed`].
    pub fn enable_dirty_log_protect(
        &self,
        task: &Task<P>,
        manual: bool,
        initially_set: bool,
    ) -> Result<(), VmError> {
        if initially_set && !manual {
            let rule = "a log that is all set at first needs manual protection";
            return Err(VmError::Config { what: "initially_set", value: "true".into(), rule });
        }
        let _slots = self.lock_slots(task);
        self.open()?;
        self.protocol.manual.store(manual, Ordering::Relaxed);
        self.protocol.all_set.store(initially_set, Ordering::Relaxed);
        Ok(())
    }

    /// The module parameter `eager_page_split`, from now on: split huge leaves when logging starts (or when an initially-all-set page is cleared), not when they are
    /// written. No effect in kernels before 5.18.
    pub fn set_eager_page_split(&self, on: bool) {
        self.protocol.eager.store(on, Ordering::Relaxed);
    }

    /// How slots that begin to log keep their log.
    pub(crate) fn logs(&self) -> Logs {
        if self.side().rings.is_some() {
            Logs::Ring
        } else {
            Logs::Bitmap { all_set: self.protocol.all_set.load(Ordering::Relaxed) }
        }
    }

    /// kvm_mmu_slot_apply_flags: logging has just been turned on or off for `new`, which is published; slots_lock is held. Only for a change of flags: a slot that is
    /// created or moved has no leaves, and those of a read-only one can neither be dirtied nor made writable.
    pub(crate) fn apply_flags(&self, task: &Task<P>, old: &MemSlot, new: &MemSlot) {
        if new.flags.readonly || old.flags.log_dirty == new.flags.log_dirty {
            return;
        }
        if new.flags.log_dirty {
            self.start_dirty_log(task, new);
            let all_set = self.protocol.all_set.load(Ordering::Relaxed);
            task.observe(|| Event::LogBegin {
                as_id: new.as_id,
                start: new.base,
                end: new.base + new.pages,
                all_set,
            });
        } else {
            self.stop_dirty_log(task, new);
        }
    }

    fn start_dirty_log(&self, task: &Task<P>, slot: &MemSlot) {
        let (mmu, as_id, gfns) = (self.mmu(), slot.as_id, slot.gfns());
        if self.protocol.all_set.load(Ordering::Relaxed) {
            if mmu.profile().init_set_protects_huge {
                self.write_protect_shadow(task, as_id, gfns.clone(), LEVEL_2M);
                mmu.write_protect(task, as_id, gfns.clone(), LEVEL_2M);
                mmu.flush(task, Some(gfns));
            }
            return;
        }
        if self.protocol.eager.load(Ordering::Relaxed) {
            // Best effort, as in KVM: what stays huge for want of a table is protected below and split by its write fault.
            let _shortage = mmu.split_huge_pages(task, as_id, gfns.clone(), LEVEL_4K);
        }
        // Shadow pages are protected in either mode: what hardware logs of an L2 would be addresses of L2's. They are not split ahead: the next write to a huge leaf does.
        self.write_protect_shadow(task, as_id, gfns.clone(), LEVEL_4K);
        match self.protocol.mode() {
            DirtyMode::WriteProtect => {
                mmu.write_protect(task, as_id, gfns.clone(), LEVEL_4K);
            }
            DirtyMode::DBits => {
                mmu.clear_dirty(task, as_id, gfns.clone());
                mmu.write_protect(task, as_id, gfns.clone(), LEVEL_2M);
            }
        }
        // In any case: W may have been taken by who flushes later, and what it was taken from may still be cached.
        mmu.flush(task, Some(gfns));
    }

    fn stop_dirty_log(&self, task: &Task<P>, slot: &MemSlot) {
        let level = |gfn| {
            if !slot.contains(gfn) {
                self.mmu().violation("lpage_info was asked for a gfn outside of its slot");
                return LEVEL_4K;
            }
            slot.max_level(gfn).min(self.host_level(slot.hva_of(gfn)))
        };
        self.collapse_shadow(task, slot, &level);
        self.mmu().collapse(task, slot.as_id, slot.gfns(), &level);
    }

    /// The level by which the host maps `hva` now, 1 where it does not.
    pub(crate) fn host_level(&self, hva: u64) -> u8 {
        let level = match &self.host_level {
            Some(answer) => answer(hva),
            None => self.side().primary.lookup(hva).map_or(LEVEL_4K, |page| page.level),
        };
        level.clamp(LEVEL_4K, self.rules().max_level)
    }

    /// Begins a hold of mmu_lock in which pages of `slot` are taken for clean.
    pub(crate) fn harvest<'h, 'a>(
        &'h self,
        guard: &'h mut Guard<'a, P, Exclusive>,
        slot: &MemSlot,
    ) -> Harvest<'h, 'a, P> {
        let protect = self.protocol.mode() == DirtyMode::WriteProtect;
        self.mmu().harvest(guard, slot.as_id, protect)
    }

    /// Takes what `take` takes of the `words` of the slot's log and protects it, in one exclusive hold; `peek` tells what it will be, or nearly so: the entries of a few
    /// words ahead are asked for, as each may lie in a table of its own.
    fn take_for_clean(
        &self,
        task: &Task<P>,
        slot: &MemSlot,
        words: Range<usize>,
        peek: impl Fn(usize) -> u64,
        mut take: impl FnMut(usize) -> u64,
    ) {
        const AHEAD: usize = 8;
        let mut guard = self.mmu().lock.write(task);
        let _work = task.phase(Phase::SpteWork);
        let mut harvest = self.harvest(&mut guard, slot);
        let (mut ahead, mut expected) = (words.start, 0);
        for n in words.clone() {
            while expected < AHEAD && ahead < words.end {
                let mask = peek(ahead);
                if mask != 0 {
                    harvest.expect(slot.base + ahead as u64 * 64, mask);
                    expected += 1;
                }
                ahead += 1;
            }
            let mask = take(n);
            if mask != 0 {
                expected = expected.saturating_sub(1);
                self.protect_dirty(&mut harvest, slot, n as u64 * 64, mask);
            }
        }
    }

    /// kvm_arch_mmu_enable_log_dirty_pt_masked: the pages `offset + n` of `slot` for each bit n of `mask` are taken for clean; the next write to each is seen. The flush
    /// is the caller's, after the hold.
    pub(crate) fn protect_dirty(
        &self,
        harvest: &mut Harvest<'_, '_, P>,
        slot: &MemSlot,
        offset: u64,
        mask: u64,
    ) {
        let base = slot.base + offset;
        if self.protocol.all_set.load(Ordering::Relaxed) && !self.mmu().profile().init_set_protects_huge {
            let first = base + u64::from(mask.trailing_zeros());
            let last = base + u64::from(63 - mask.leading_zeros());
            if self.shadow().is_some() || !harvest.is_small(first, last) {
                harvest.interrupt(|guard| self.break_huge(guard, slot.as_id, first, last));
            }
        }
        if self.shadow().is_some() {
            harvest.interrupt(|guard| self.write_protect_shadow_masked(guard, slot.as_id, base, mask));
        }
        harvest.clear(base, mask);
    }

    /// What is huge around the pages `first` to `last` of an initially-all-set log is split, or protected so that its next write splits it.
    fn break_huge(&self, guard: &mut Guard<'_, P, Exclusive>, as_id: u8, first: u64, last: u64) {
        let mmu = self.mmu();
        if self.protocol.eager.load(Ordering::Relaxed) {
            // 6.1 leaves out the last page, and with it a huge leaf that only that page begins.
            let end = last + u64::from(mmu.profile().clear_split_inclusive);
            let _shortage = mmu.split_huge_pages_exclusive(guard, as_id, first..end, LEVEL_4K);
        }
        // W and MMU-writable: what is still huge is split by its next write, not fixed without the lock. The flush after the hold serves these too: a
        // write through an old translation until then is one before this call returned.
        if let Some(shadow) = self.shadow() {
            shadow.write_protect(guard, as_id, first..last + 1, LEVEL_2M);
        }
        mmu.write_protect_gfn(guard, as_id, first, LEVEL_2M);
        // The kernel compares the pages rounded *up*: of two huge pages the second is missed if only its very first page is named.
        let up = |gfn: u64| gfn.next_multiple_of(span(LEVEL_2M));
        if up(first) != up(last) {
            mmu.write_protect_gfn(guard, as_id, last, LEVEL_2M);
        }
    }

    /// The slot and its bitmap, by the rules of GET and CLEAR; slots_lock is held.
    fn logging<'s>(
        &self,
        slot: Option<&'s Arc<MemSlot>>,
        as_id: u8,
        id: u16,
    ) -> Result<(&'s MemSlot, &'s DirtyBitmap), VmError> {
        if self.side().rings.is_some() {
            return Err(VmError::OtherLog { what: "a dirty bitmap", has: "rings" });
        }
        let slot = slot.ok_or(VmError::NoSlot { as_id, id })?;
        let dirty = slot.dirty.as_ref().ok_or(VmError::NotLogging { as_id, id })?;
        Ok((slot, dirty))
    }

    /// KVM_GET_DIRTY_LOG: what was written since it was last taken. Without manual protection it is taken by this call: one exclusive hold of mmu_lock for the whole
    /// slot, and one flush after it if anything was dirty. With it, nothing changes.
    ///
    /// # Errors
    /// [`VmError::OtherLog`] in a VM with rings (ENXIO), [`VmError::NoSlot`] and [`VmError::NotLogging`] (ENOENT), [`VmError::Closed`].
    pub fn get_dirty_log(&self, task: &Task<P>, as_id: u8, id: u16) -> Result<DirtyLog, VmError> {
        let slots = self.lock_slots(task);
        self.open()?;
        let set = slots.set();
        let (slot, dirty) = self.logging(set.by_id(as_id, id), as_id, id)?;
        self.sync_hardware_logs();
        let mut words = vec![0; slot.pages.div_ceil(64) as usize];
        if self.protocol.manual.load(Ordering::Relaxed) {
            for (n, word) in words.iter_mut().enumerate() {
                *word = dirty.word::<P>(n);
            }
        } else {
            let take = |n| {
                words[n] = dirty.take_word::<P>(n);
                tell_taken(task, slot, n, words[n]);
                words[n]
            };
            self.take_for_clean(task, slot, 0..dirty.words(), |n| dirty.word::<P>(n), take);
            // After the unlock: who reads an entry as protected and flushes nothing is served by this flush, since MMU-writable was left.
            if words.iter().any(|&word| word != 0) {
                self.mmu().flush(task, Some(slot.gfns()));
            }
        }
        tell_returned(task, slot);
        Ok(DirtyLog { base: slot.base, pages: slot.pages, words })
    }

    /// KVM_CLEAR_DIRTY_LOG: of the `pages` from `first_page` of the slot on, those whose bit is set in `words` and that are dirty are taken for clean again. Returns how
    /// many. Works with or without manual protection.
    ///
    /// # Errors
    /// As [`Vm::get_dirty_log`]; [`VmError::DirtyLog`] (EINVAL) for a first page that is not a multiple of 64, pages beyond the slot, a number of pages that is no multiple of 64 and
    /// does not reach the slot's end, or a number of words that is not the number of pages over 64, rounded up.
    pub fn clear_dirty_log(
        &self,
        task: &Task<P>,
        as_id: u8,
        id: u16,
        first_page: u64,
        pages: u64,
        words: &[u64],
    ) -> Result<u64, VmError> {
        let slots = self.lock_slots(task);
        self.open()?;
        let bad = |value: String, rule| Err(VmError::DirtyLog { as_id, id, value, rule });
        if !first_page.is_multiple_of(64) {
            return bad(format!("first page {first_page:#x}"), "the first page is a multiple of 64");
        }
        let set = slots.set();
        let (slot, dirty) = self.logging(set.by_id(as_id, id), as_id, id)?;
        let Some(left) = slot.pages.checked_sub(first_page).filter(|&left| pages <= left) else {
            let value = format!("pages {first_page:#x} and {pages:#x} more of {:#x}", slot.pages);
            return bad(value, "the pages are inside the slot");
        };
        if pages < left && !pages.is_multiple_of(64) {
            let rule = "the number of pages is a multiple of 64, or reaches the end of the slot";
            return bad(format!("{pages:#x} pages of the {left:#x} that are left"), rule);
        }
        if words.len() as u64 != pages.div_ceil(64) {
            return bad(format!("{} words for {pages:#x} pages", words.len()), "one word for each 64 pages");
        }
        self.sync_hardware_logs();
        // Bits beyond the slot's end are never set.
        let (from, mut cleared) = ((first_page / 64) as usize, 0);
        let peek = |n| dirty.word::<P>(n) & words[n - from];
        let take = |n| {
            let mask = dirty.clear_word::<P>(n, words[n - from]);
            tell_taken(task, slot, n, mask);
            cleared += u64::from(mask.count_ones());
            mask
        };
        self.take_for_clean(task, slot, from..from + words.len(), peek, take);
        if cleared != 0 {
            self.mmu().flush(task, Some(slot.gfns()));
        }
        tell_returned(task, slot);
        Ok(cleared)
    }

    /// The gfns of [`Vm::get_dirty_log`].
    ///
    /// # Errors
    /// As [`Vm::get_dirty_log`].
    pub fn take_dirty_log(&self, task: &Task<P>, as_id: u8, id: u16) -> Result<Vec<u64>, VmError> {
        Ok(self.get_dirty_log(task, as_id, id)?.gfns().collect())
    }
}
