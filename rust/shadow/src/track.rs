//! Writes to the guest's tables that were emulated because the gfn is write-protected.
//!
//! **Guarantee.** When [`ShadowMmu::page_track_write`] returns, no entry of any shadow page says what the written guest entry said before, and none is used from a TLB. What the guest reads from its table and what hardware walks agree.
//!
//! **Mechanism.** The entry is dropped, in each page that shadows the table; the next access faults and finds the new one. Dropping is dear where the memory is no table any more: the guest has freed it and writes plain data there, each write
//! emulated. Two signs give that away. Three writes without a fault through the page in between (write flooding): nobody uses what it maps. And a write that is not aligned to entries, or shorter than four bytes. The page is then zapped, and the memory is
//! writable again. A page of level 1 is left to go unsync instead, which ends the emulation too, and is not counted.

use tdpmmu_platform::{Exclusive, Guard, Phase, Platform};
use tdpmmu_spte::LEVEL_4K;

use crate::ShadowMmu;

/// Writes to a table without a fault through it that make it memory like any other.
const FLOOD: u32 = 3;
/// Bytes of a guest's entry.
const ENTRY: u16 = 8;

/// Is a write of `bytes` at `offset` none that a guest makes to a page table?
fn is_misaligned(offset: u16, bytes: u16) -> bool {
    // Some set the bits of an entry's low byte by a write of one.
    if offset.is_multiple_of(ENTRY) && bytes == 1 {
        return false;
    }
    let last = offset + bytes.max(1) - 1;
    offset / ENTRY != last / ENTRY || bytes < 4
}

impl<P: Platform> ShadowMmu<P> {
    /// The guest has written `bytes` (1 to 8) bytes at `offset` of its page `gfn`, by emulation: the new value is in guest memory, and the lock was taken after it got there. A write beyond the page's end is cut.
    pub fn page_track_write(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfn: u64,
        offset: u16,
        bytes: u16,
    ) {
        let offset = offset.min(4095);
        let bytes = bytes.clamp(1, 4096 - offset);
        let pages: Vec<u32> = self.gpte_pages_of_gfn(guard, as_id, gfn).collect();
        if pages.is_empty() {
            return;
        }
        let task = guard.task();
        let _work = task.phase(Phase::SpteWork);
        let mut owed = self.owe();
        for page in pages {
            // Zapping one may have taken another with it.
            if self.is_obsolete(page) {
                continue;
            }
            if is_misaligned(offset, bytes) || self.is_flooded(page) {
                self.prepare_zap(guard, &owed.books, &mut owed.dead, page);
                continue;
            }
            for at in offset / ENTRY..=(offset + bytes - 1) / ENTRY {
                let dropped = self.drop_spte(guard, &owed.books, &mut owed.dead, page, at);
                owed.flush |= dropped != crate::rmap::Dropped::Nothing;
            }
        }
        self.pay(guard, &mut owed);
    }

    /// Counts a write; is it one too many?
    fn is_flooded(&self, page: u32) -> bool {
        if self.role(page).level() == LEVEL_4K {
            return false;
        }
        let count = self.pages.flooding(page) + 1;
        self.pages.set_flooding(page, count);
        count >= FLOOD
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_within_one_entry_is_aligned_and_any_other_is_not() {
        for (offset, bytes) in [(0, 8), (8, 8), (16, 4), (20, 4), (4088, 8), (24, 1)] {
            assert!(!is_misaligned(offset, bytes), "{bytes} bytes at {offset}");
        }
        for (offset, bytes) in [(4, 8), (7, 2), (0, 2), (1, 1), (8, 16), (6, 4)] {
            assert!(is_misaligned(offset, bytes), "{bytes} bytes at {offset}");
        }
    }
}
