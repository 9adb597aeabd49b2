//! Per huge frame of a memslot: how many reasons there are against mapping it huge.

use std::io;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use tdpmmu_spte::geometry::{LEVEL_1G, LEVEL_2M, span};
use tdpmmu_table::Lazy;

/// Per huge frame, how many reasons there are against mapping it huge (lpage_info).
///
/// Ends that are not aligned count as one reason each; a slot whose guest and host addresses are not congruent can never be mapped
/// huge at that level. Each shadowed guest page table is a reason at its gfn.
pub struct LpageInfo {
    base: u64,
    pages: u64,
    congruent: [bool; 2],
    counts: [Lazy<AtomicU32>; 2],
}

impl LpageInfo {
    /// The ledger of `[base, base + pages)` backed from host virtual page `hva` on.
    ///
    /// # Errors
    /// What the host says when it refuses the address space.
    pub fn new(base: u64, pages: u64, hva: u64) -> io::Result<Self> {
        let table = |level: u8| {
            let frames = (base + pages - 1) / span(level) - base / span(level) + 1;
            Lazy::new(frames as usize)
        };
        let info = Self {
            base,
            pages,
            congruent: [LEVEL_2M, LEVEL_1G].map(|level| (base ^ hva).is_multiple_of(span(level))),
            counts: [table(LEVEL_2M)?, table(LEVEL_1G)?],
        };
        info.align();
        Ok(info)
    }

    /// A reason at each end that is not aligned.
    fn align(&self) {
        let end = self.base + self.pages;
        for level in [LEVEL_2M, LEVEL_1G] {
            if !self.base.is_multiple_of(span(level)) {
                self.adjust(self.base, level, 1);
            }
            if !end.is_multiple_of(span(level)) {
                self.adjust(end - 1, level, 1);
            }
        }
    }

    /// Every reason goes but alignment: what counted for shadowed tables counts no more. O(huge frames).
    pub fn reset(&self) {
        for counts in &self.counts {
            // What was never touched reads as zero, and is not made real by a store.
            for count in counts.slice(0, counts.len()).iter().filter(|count| count.load(Relaxed) != 0) {
                count.store(0, Relaxed);
            }
        }
        self.align();
    }

    #[inline]
    fn cell(&self, base: u64, gfn: u64, level: u8) -> Option<&AtomicU32> {
        self.counts[usize::from(level) - 2].get((gfn / span(level) - base / span(level)) as usize)
    }

    /// Is there a reason against mapping `gfn` at `level` (2 or 3)?
    #[inline]
    pub fn disallowed(&self, base: u64, gfn: u64, level: u8) -> bool {
        !self.congruent[usize::from(level) - 2]
            || self.cell(base, gfn, level).is_none_or(|c| c.load(Relaxed) != 0)
    }

    /// Reasons against mapping `gfn` at `level` (2 or 3), alignment included.
    pub fn reasons(&self, gfn: u64, level: u8) -> u32 {
        self.cell(self.base, gfn, level).map_or(0, |cell| cell.load(Relaxed))
    }

    /// Adds (or takes away) a reason at `level` (2 or 3).
    pub fn adjust(&self, gfn: u64, level: u8, delta: i32) {
        if let Some(cell) = self.cell(self.base, gfn, level) {
            cell.fetch_add(delta as u32, Relaxed);
        }
    }
}
