//! Contents of guest memory, where somebody reads them: the pages that hold the guest's own page tables.
//!
//! **Guarantee.** A word that was stored is read back by everybody, whichever vCPU, whichever address space and whatever became of the frame behind it: the host that takes a page of tables away
//! swaps it out and in again. What was never declared has no contents: it reads as zero (no entry of a guest is present there), and what is stored is lost.
//!
//! **Mechanism.** Windows of gfns, declared once ([`GuestMemory::declare`]) and never taken back; in each a word per entry, in memory that exists from its first touch on. Reads take no lock: the list of
//! windows only grows. Both address spaces show the same memory, as VMMs arrange it; a memslot that moves leaves the contents at their gfns, which a real one takes along.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;

use tdpmmu_platform::{Platform, Site};
use tdpmmu_table::Lazy;

use crate::VmError;

/// Words of a page.
pub const WORDS: u64 = 512;
/// Most windows of one VM.
pub const MAX_WINDOWS: usize = 64;
/// Most pages of a window: 64 GiB of tables.
pub const MAX_WINDOW_PAGES: u64 = 1 << 24;

struct Window {
    gfns: Range<u64>,
    words: Lazy<AtomicU64>,
}

/// The words of guest memory that are kept.
pub struct GuestMemory {
    windows: [OnceLock<Window>; MAX_WINDOWS],
}

impl Default for GuestMemory {
    fn default() -> Self {
        Self { windows: [const { OnceLock::new() }; MAX_WINDOWS] }
    }
}

impl GuestMemory {
    /// The pages `gfns` have contents from now on, zero at first. A range that is declared already stays as it is.
    ///
    /// # Errors
    /// [`VmError::BadRange`] for an empty range, one of more than [`MAX_WINDOW_PAGES`], or one that overlaps another; [`VmError::Host`] without address space or after [`MAX_WINDOWS`] ranges.
    pub fn declare(&self, gfns: Range<u64>) -> Result<(), VmError> {
        let bad = |rule| Err(VmError::BadRange { as_id: 0, start: gfns.start, end: gfns.end, rule });
        if gfns.is_empty() || gfns.end - gfns.start > MAX_WINDOW_PAGES {
            return bad("guest memory with contents is declared in ranges of 1 to 2^24 pages");
        }
        let host = |reason: String| VmError::Host { what: "the contents of guest memory", reason };
        let words = Lazy::new(((gfns.end - gfns.start) * WORDS) as usize).map_err(|e| host(e.to_string()))?;
        let mut new = Window { gfns: gfns.clone(), words };
        for cell in &self.windows {
            new = match cell.set(new) {
                Ok(()) => return Ok(()),
                Err(back) => back,
            };
            if let Some(window) = cell.get() {
                if window.gfns == gfns {
                    return Ok(());
                }
                if window.gfns.start < gfns.end && gfns.start < window.gfns.end {
                    return bad("it overlaps a range of guest memory with contents");
                }
            }
        }
        Err(host(format!("{MAX_WINDOWS} ranges are declared already")))
    }

    fn windows(&self) -> impl Iterator<Item = &Window> {
        self.windows.iter().map_while(OnceLock::get)
    }

    /// The ranges that have contents.
    pub fn declared(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.windows().map(|window| window.gfns.clone())
    }

    /// Has `gfn` contents?
    pub fn holds(&self, gfn: u64) -> bool {
        self.windows().any(|window| window.gfns.contains(&gfn))
    }

    #[inline]
    fn word(&self, gfn: u64, index: u16) -> Option<&AtomicU64> {
        let window = self.windows().find(|window| window.gfns.contains(&gfn))?;
        window.words.get(((gfn - window.gfns.start) * WORDS + u64::from(index) % WORDS) as usize)
    }

    /// Word `index` of page `gfn`; 0 where nothing has contents.
    #[inline]
    pub fn read<P: Platform>(&self, gfn: u64, index: u16) -> u64 {
        self.word(gfn, index).map_or(0, |word| P::load(word, Site::GuestMemory))
    }

    /// Stores word `index` of page `gfn`. False: the page has no contents, and the value is lost.
    #[inline]
    pub fn write<P: Platform>(&self, gfn: u64, index: u16, value: u64) -> bool {
        let word = self.word(gfn, index);
        if let Some(word) = word {
            P::store(word, value, Site::GuestMemory);
        }
        word.is_some()
    }
}

#[cfg(test)]
mod tests {
    use tdpmmu_platform::Real;

    use super::*;

    #[test]
    fn what_is_stored_in_a_declared_page_is_read_back_and_the_rest_is_lost() {
        let memory = GuestMemory::default();
        memory.declare(100..104).expect("room");
        memory.declare(200..201).expect("room");
        assert!(memory.write::<Real>(103, 511, 7) && memory.write::<Real>(200, 0, 8));
        assert!(!memory.write::<Real>(104, 0, 9));
        assert_eq!(
            [(103, 511), (200, 0), (104, 0), (100, 0)].map(|(g, i)| memory.read::<Real>(g, i)),
            [7, 8, 0, 0]
        );
    }

    #[test]
    fn a_range_is_declared_once_and_overlaps_no_other() {
        let memory = GuestMemory::default();
        memory.declare(100..104).expect("room");
        memory.write::<Real>(100, 0, 5);
        memory.declare(100..104).expect("the same again");
        assert_eq!(memory.read::<Real>(100, 0), 5);
        assert!(memory.declare(103..105).is_err() && memory.declare(5..5).is_err());
        assert!(memory.declared().eq(std::iter::once(100..104)));
    }
}
