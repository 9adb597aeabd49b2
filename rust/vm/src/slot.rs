//! One memslot: a run of gfns backed by a run of host virtual pages, with its dirty bitmap and its huge-page ledger.
//!
//! A memslot never changes: an update replaces it (`slots.rs`). What outlives the replacement (dirty bitmap, lpage_info, the shadow MMU's books) is shared by
//! reference, so that a fault that still holds the old one counts into the same books.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tdpmmu_platform::{Platform, Site};
use tdpmmu_spte::geometry::{LEVEL_1G, LEVEL_4K};

use crate::VmError;
use tdpmmu_shadow::{LpageInfo, SlotBooks};
use tdpmmu_table::Lazy;

/// Which of KVM's flags a memslot has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SlotFlags {
    /// KVM_MEM_LOG_DIRTY_PAGES.
    pub log_dirty: bool,
    /// KVM_MEM_READONLY.
    pub readonly: bool,
}

/// A memslot.
#[derive(Clone)]
pub struct MemSlot {
    /// Slot id, unique in its address space.
    pub id: u16,
    /// Address space: 1 is system management mode.
    pub as_id: u8,
    /// First gfn.
    pub base: u64,
    /// Pages.
    pub pages: u64,
    /// First host virtual page.
    pub hva: u64,
    /// Flags.
    pub flags: SlotFlags,
    /// About to be deleted or moved: faults must wait, not map (KVM_MEMSLOT_INVALID).
    pub invalid: bool,
    /// Present while dirty logging is on.
    pub dirty: Option<Arc<DirtyBitmap>>,
    /// Reasons against huge pages.
    pub lpage: Arc<LpageInfo>,
    /// Reverse maps and the same reasons, for the shadow MMU; `None` in a VM without one.
    pub books: Option<Arc<SlotBooks>>,
    /// Publications before this one.
    pub(crate) serial: u64,
}

impl MemSlot {
    /// The gfns covered.
    pub fn gfns(&self) -> Range<u64> {
        self.base..self.base + self.pages
    }

    /// Is `gfn` inside?
    #[inline]
    pub fn contains(&self, gfn: u64) -> bool {
        gfn.wrapping_sub(self.base) < self.pages
    }

    /// The host virtual page behind `gfn`, which must be inside.
    #[inline]
    pub fn hva_of(&self, gfn: u64) -> u64 {
        self.hva + (gfn - self.base)
    }

    /// Gives the slot books, as a VM with shadow pages needs them.
    ///
    /// # Errors
    /// [`VmError::Host`] without address space.
    pub fn keep_books(&mut self) -> Result<(), VmError> {
        let books = SlotBooks::new(self.as_id, self.base, self.pages, Arc::clone(&self.lpage))
            .map_err(|e| VmError::Host { what: "the reverse maps of a memslot", reason: e.to_string() })?;
        self.books = Some(Arc::new(books));
        Ok(())
    }

    /// The gfns behind the part of `hvas` that this slot maps.
    pub fn gfns_of(&self, hvas: &Range<u64>) -> Option<Range<u64>> {
        let start = hvas.start.max(self.hva);
        let end = hvas.end.min(self.hva + self.pages);
        (start < end).then(|| self.base + (start - self.hva)..self.base + (end - self.hva))
    }

    /// The largest level at which `gfn` may be mapped as far as the slot is concerned.
    #[inline]
    pub fn max_level(&self, gfn: u64) -> u8 {
        if self.flags.log_dirty {
            return LEVEL_4K;
        }
        let mut level = LEVEL_1G;
        while level > LEVEL_4K && self.lpage.disallowed(self.base, gfn, level) {
            level -= 1;
        }
        level
    }
}

/// One bit a page: written through since it was last asked for.
pub struct DirtyBitmap {
    base: u64,
    pages: u64,
    words: Arc<Lazy<AtomicU64>>,
}

impl DirtyBitmap {
    /// A clean bitmap for `[base, base + pages)`.
    ///
    /// # Errors
    /// [`VmError::Host`] without address space.
    pub fn new(base: u64, pages: u64) -> Result<Self, VmError> {
        let words = Lazy::new(pages.div_ceil(64) as usize)
            .map_err(|e| VmError::Host { what: "a dirty bitmap", reason: e.to_string() })?;
        Ok(Self { base, pages, words: Arc::new(words) })
    }

    /// The same bits for the slot at another place: who still marks through the old one marks here too.
    pub fn moved_to(&self, base: u64) -> Arc<Self> {
        Arc::new(Self { base, pages: self.pages, words: Arc::clone(&self.words) })
    }

    /// Marks every page.
    pub fn set_all(&self) {
        for (n, word) in self.words.slice(0, self.words.len()).iter().enumerate() {
            let left = self.pages - n as u64 * 64;
            word.store(if left >= 64 { u64::MAX } else { (1 << left) - 1 }, Relaxed);
        }
    }

    /// Marks `gfn`; a gfn outside is ignored. Spares the atomic when the bit is there already.
    #[inline]
    pub fn mark<P: Platform>(&self, gfn: u64) {
        let index = gfn.wrapping_sub(self.base);
        if index < self.pages
            && let Some(word) = self.words.get((index / 64) as usize)
        {
            let bit = 1 << (index % 64);
            if P::load(word, Site::DirtyBitmap) & bit == 0 {
                P::fetch_or(word, bit, Site::DirtyBitmap);
            }
        }
    }

    /// Is `gfn` marked?
    pub fn is_marked(&self, gfn: u64) -> bool {
        let index = gfn.wrapping_sub(self.base);
        index < self.pages
            && self.words.get((index / 64) as usize).is_some_and(|w| w.load(Relaxed) >> (index % 64) & 1 != 0)
    }

    /// Takes (reads and clears) the 64 bits from `base + 64 * word`.
    pub fn take_word<P: Platform>(&self, word: usize) -> u64 {
        self.words.get(word).map_or(0, |w| {
            if P::load(w, Site::DirtyBitmap) == 0 { 0 } else { P::swap(w, 0, Site::DirtyBitmap) }
        })
    }

    /// Clears those of the 64 bits from `base + 64 * word` that `mask` names; returns which of them were set.
    pub fn clear_word<P: Platform>(&self, word: usize, mask: u64) -> u64 {
        match self.words.get(word) {
            Some(cell) if mask != 0 && P::load(cell, Site::DirtyBitmap) & mask != 0 => {
                P::fetch_and(cell, !mask, Site::DirtyBitmap) & mask
            }
            _ => 0,
        }
    }

    /// The 64 bits from `base + 64 * word`.
    pub fn word<P: Platform>(&self, word: usize) -> u64 {
        self.words.get(word).map_or(0, |w| P::load(w, Site::DirtyBitmap))
    }

    /// Words of 64 pages.
    pub fn words(&self) -> usize {
        self.words.len()
    }

    /// Pages marked now.
    pub fn count(&self) -> u64 {
        self.words.slice(0, self.words.len()).iter().map(|w| u64::from(w.load(Relaxed).count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use tdpmmu_platform::Real;
    use tdpmmu_spte::geometry::LEVEL_2M;

    use super::*;

    fn slot(base: u64, pages: u64, hva: u64) -> MemSlot {
        MemSlot {
            id: 0,
            as_id: 0,
            base,
            pages,
            hva,
            flags: SlotFlags::default(),
            invalid: false,
            dirty: None,
            lpage: Arc::new(LpageInfo::new(base, pages, hva).expect("small")),
            books: None,
            serial: 0,
        }
    }

    #[test]
    fn ends_that_are_not_aligned_are_not_mapped_huge() {
        let slot = slot(0x100, 512 * 512 * 2, 0x100);
        assert_eq!(slot.max_level(0x100), LEVEL_4K);
        assert_eq!(slot.max_level(0x1ff), LEVEL_4K);
        assert_eq!(slot.max_level(0x200), LEVEL_2M, "the first whole 2 MiB; its 1 GiB is cut");
        assert_eq!(slot.max_level(512 * 512), LEVEL_1G);
        assert_eq!(slot.max_level(512 * 512 * 2), LEVEL_4K, "the tail of 0x100 pages");
    }

    #[test]
    fn host_addresses_out_of_step_forbid_a_level() {
        assert_eq!(slot(0, 1 << 18, 0x200).max_level(0x400), LEVEL_2M);
        assert_eq!(slot(0, 1 << 18, 0x201).max_level(0x400), LEVEL_4K);
        assert_eq!(slot(0, 1 << 18, 1 << 18).max_level(0x400), LEVEL_1G);
    }

    #[test]
    fn a_reason_can_come_and_go() {
        let slot = slot(0, 1 << 18, 0);
        slot.lpage.adjust(0x400, LEVEL_2M, 1);
        slot.lpage.adjust(0x400, LEVEL_1G, 1);
        assert_eq!(slot.max_level(0x400), LEVEL_4K);
        assert_eq!(slot.max_level(0x600), LEVEL_2M);
        slot.lpage.adjust(0x400, LEVEL_2M, -1);
        slot.lpage.adjust(0x400, LEVEL_1G, -1);
        assert_eq!(slot.max_level(0x400), LEVEL_1G);
    }

    #[test]
    fn dirty_bits_are_taken_once_and_stay_inside_the_slot() {
        let dirty = DirtyBitmap::new(100, 70).expect("small");
        for gfn in [99, 100, 163, 164, 169, 170] {
            dirty.mark::<Real>(gfn);
        }
        assert_eq!(dirty.count(), 4);
        assert_eq!(dirty.take_word::<Real>(0), 1 | 1 << 63);
        assert_eq!(dirty.take_word::<Real>(1), 1 | 1 << 5);
        assert_eq!((dirty.count(), dirty.take_word::<Real>(0)), (0, 0));
    }

    #[test]
    fn a_host_range_is_translated_to_the_part_that_the_slot_maps() {
        let slot = slot(0x1000, 0x100, 0x5000);
        assert_eq!(slot.gfns_of(&(0x4f00..0x5010)), Some(0x1000..0x1010));
        assert_eq!(slot.gfns_of(&(0x50f0..0x6000)), Some(0x10f0..0x1100));
        assert_eq!(slot.gfns_of(&(0x5100..0x6000)), None);
    }
}
