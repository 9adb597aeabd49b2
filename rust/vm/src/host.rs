//! The host's primary MMU: which frame backs a host virtual page, at which mapping level, writable or not.
//!
//! **Guarantee.** A lookup takes one or two loads and no lock. Between the begin and the end of a notifier the host's own page table entry goes away
//! and then its frame changes hands ([`crate::frames`]); a fault that read the entry before is stopped by the notifier
//! sequence, never by this module.
//!
//! **Mechanism.** Nothing is materialised. One word per 2 MiB of host virtual memory holds the first frame of an aligned run of
//! 512 and how the host maps it; only where single pages were unmapped does the piece fall back to a word per page. Frames arrive on first
//! touch, 512 at a time (1 GiB at a time where the region asks for it): page-by-page backing would cost a word a page and
//! change nothing that a second-stage MMU can see.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Mutex, PoisonError};

use crate::VmError;
use crate::frames::{Frames, RUN};
use tdpmmu_table::Lazy;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const LEVEL_SHIFT: u32 = 2;
const MIXED: u64 = 16;
const PFN_SHIFT: u32 = 12;
const GIG: u64 = RUN * RUN;

/// How the host maps one page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostPage {
    /// Tagged frame number ([`crate::frames`]).
    pub pfn: u64,
    /// Level of the host's mapping: 1 = 4 KiB, 2 = 2 MiB, 3 = 1 GiB.
    pub level: u8,
    /// May be written through.
    pub writable: bool,
}

#[derive(Clone, Copy, Debug)]
struct Vma {
    end: u64,
    level: u8,
    writable: bool,
}

/// The primary MMU of the VMM's process. Addresses are host virtual page numbers.
pub struct PrimaryMmu {
    frames: Frames,
    chunks: Lazy<AtomicU64>,
    pages: Lazy<AtomicU64>,
    state: Mutex<State>,
}

struct State {
    next: u64,
    vmas: BTreeMap<u64, Vma>,
}

impl State {
    fn vma(&self, hva: u64) -> Option<(u64, Vma)> {
        let (&start, &vma) = self.vmas.range(..=hva).next_back()?;
        (hva < vma.end).then_some((start, vma))
    }
}

impl PrimaryMmu {
    /// A host that can map `pages` pages and has as many frames, rounded up, with a GiB to spare.
    ///
    /// # Errors
    /// [`VmError::Host`] when the host refuses address space for the books.
    pub fn new(pages: u64) -> Result<Self, VmError> {
        let host = |error: std::io::Error| VmError::Host {
            what: "the model of host memory",
            reason: error.to_string(),
        };
        let span = pages.next_multiple_of(GIG) + 2 * GIG;
        Ok(Self {
            frames: Frames::new(span).map_err(host)?,
            chunks: Lazy::new((span / RUN) as usize).map_err(host)?,
            pages: Lazy::new(span as usize).map_err(host)?,
            state: Mutex::new(State { next: GIG, vmas: BTreeMap::new() }),
        })
    }

    /// The host's frames and their owners.
    pub fn frames(&self) -> &Frames {
        &self.frames
    }

    /// Creates an anonymous region of `pages` pages (mmap) whose start is congruent to `like` modulo 1 GiB, so that guest and
    /// host huge pages line up; returns its first page. `level`: the largest host mapping it gets.
    ///
    /// # Errors
    /// [`VmError::HostFull`] when no address space is left.
    pub fn region(&self, pages: u64, like: u64, level: u8, writable: bool) -> Result<u64, VmError> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let start = state.next + like % GIG;
        let left = (self.pages.len() as u64).saturating_sub(start);
        // Compared so that nothing wraps, whatever was asked for.
        if pages == 0 || pages > left {
            return Err(VmError::HostFull { pages, left });
        }
        let end = start + pages;
        state.next = end.next_multiple_of(GIG);
        state.vmas.insert(start, Vma { end, level: level.clamp(1, 3), writable });
        Ok(start)
    }

    /// The host's mapping of `hva`, if it has one. Lockless.
    #[inline(always)]
    pub fn lookup(&self, hva: u64) -> Option<HostPage> {
        let chunk = self.chunks.get((hva / RUN) as usize)?.load(Acquire);
        if chunk & (PRESENT | MIXED) == PRESENT {
            return Some(HostPage {
                pfn: (chunk >> PFN_SHIFT) + hva % RUN,
                level: (chunk >> LEVEL_SHIFT & 3) as u8,
                writable: chunk & WRITE != 0,
            });
        }
        self.lookup_page(hva, chunk)
    }

    #[cold]
    fn lookup_page(&self, hva: u64, chunk: u64) -> Option<HostPage> {
        if chunk & MIXED == 0 {
            return None;
        }
        let page = self.pages.get(hva as usize)?.load(Acquire);
        (page & PRESENT != 0).then_some(HostPage {
            pfn: page >> PFN_SHIFT,
            level: 1,
            writable: page & WRITE != 0,
        })
    }

    /// The host's mapping of `hva`, made if it does not exist (get_user_pages). A page that is there and not writable, in a region that is, is returned as it
    /// is also for a write: who asked must have it copied.
    ///
    /// # Errors
    /// [`VmError::BadHva`] outside every region, or for a write to a region that cannot be written; [`VmError::HostFull`].
    #[inline(always)]
    pub fn fault_in(&self, hva: u64, write: bool) -> Result<HostPage, VmError> {
        match self.lookup(hva) {
            Some(page) if page.writable || !write => Ok(page),
            _ => self.fault_in_slow(hva, write),
        }
    }

    #[cold]
    fn fault_in_slow(&self, hva: u64, write: bool) -> Result<HostPage, VmError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some((start, vma)) = state.vma(hva) else {
            return Err(VmError::BadHva { hva, rule: "no region maps it" });
        };
        if write && !vma.writable {
            return Err(VmError::BadHva { hva, rule: "the region is read-only" });
        }
        if self.lookup(hva).is_none() {
            self.back(hva, start, vma)?;
        }
        // Still under the lock that unmapping takes: the page cannot go between its arrival and this look.
        self.lookup(hva).ok_or(VmError::HostFull { pages: 1, left: 0 })
    }

    /// Backs the page, with the whole piece around it where nothing of it is mapped yet.
    fn back(&self, hva: u64, start: u64, vma: Vma) -> Result<(), VmError> {
        let full = |pages| VmError::HostFull { pages, left: 0 };
        let flags = PRESENT | if vma.writable { WRITE } else { 0 };
        let chunk = (hva / RUN) as usize;
        let inside = |base: u64, span: u64| start <= base && base + span <= vma.end;
        let whole = inside(hva / RUN * RUN, RUN);
        if self.chunk(chunk) & MIXED != 0 || !whole {
            if !whole && let Some(cell) = self.chunks.get(chunk) {
                // The region ends inside this piece: page by page, so that nothing outside it is ever mapped.
                cell.store(PRESENT | MIXED, Release);
            }
            let pfn = self.frames.issue(1).ok_or(full(1))?;
            if let Some(page) = self.pages.get(hva as usize) {
                page.store(pfn << PFN_SHIFT | flags, Release);
            }
            return Ok(());
        }
        let gig = hva / GIG * GIG;
        let first = (gig / RUN) as usize;
        if vma.level == 3
            && inside(gig, GIG)
            && self.chunks.slice(first, first + RUN as usize).iter().all(|c| c.load(Relaxed) == 0)
            && let Some(pfn) = self.frames.issue(GIG)
        {
            for (i, cell) in self.chunks.slice(first, first + RUN as usize).iter().enumerate() {
                cell.store((pfn + i as u64 * RUN) << PFN_SHIFT | flags | 3 << LEVEL_SHIFT, Release);
            }
            return Ok(());
        }
        let level = u64::from(vma.level.min(2));
        let pfn = self.frames.issue(RUN).ok_or(full(RUN))?;
        if let Some(cell) = self.chunks.get(chunk) {
            cell.store(pfn << PFN_SHIFT | flags | level << LEVEL_SHIFT, Release);
        }
        Ok(())
    }

    fn chunk(&self, chunk: usize) -> u64 {
        self.chunks.get(chunk).map_or(0, |c| c.load(Relaxed))
    }

    /// May `hva` be mapped, writable or not?
    ///
    /// # Errors
    /// [`VmError::BadHva`] outside every region, or for a write to a region that cannot be written.
    pub fn may_map(&self, hva: u64, writable: bool) -> Result<(), VmError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match state.vma(hva) {
            None => Err(VmError::BadHva { hva, rule: "no region maps it" }),
            Some((_, vma)) if writable && !vma.writable => {
                Err(VmError::BadHva { hva, rule: "the region is read-only" })
            }
            Some(_) => Ok(()),
        }
    }

    /// Puts another frame behind `hva`, and releases the one that was there; what it cuts is mapped by smaller pages from now on. The caller runs it between the begin and the
    /// end of a notifier. Returns the frame.
    ///
    /// # Errors
    /// [`VmError::HostFull`]: nothing is behind `hva` then.
    pub fn replace(&self, hva: u64, writable: bool) -> Result<u64, VmError> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.unmap_locked(&state, hva..hva + 1);
        let chunk = (hva / RUN) as usize;
        if let Some(cell) = self.chunks.get(chunk)
            && cell.load(Relaxed) & MIXED == 0
        {
            // Nothing of the piece was mapped: page by page from now on.
            cell.store(PRESENT | MIXED, Release);
        }
        let pfn = self.frames.issue(1).ok_or(VmError::HostFull { pages: 1, left: 0 })?;
        if let Some(page) = self.pages.get(hva as usize) {
            page.store(pfn << PFN_SHIFT | PRESENT | if writable { WRITE } else { 0 }, Release);
        }
        Ok(pfn)
    }

    /// The longest stretch from `hva`, at most `pages`, that is backed by consecutive frames of one owner tag; backs it first.
    /// For bulk population.
    ///
    /// # Errors
    /// As [`PrimaryMmu::fault_in`].
    pub fn fault_in_run(&self, hva: u64, pages: u64) -> Result<(HostPage, u64), VmError> {
        let first = self.fault_in(hva, false)?;
        let mut len = (RUN - hva % RUN).min(pages);
        if self.chunk((hva / RUN) as usize) & MIXED != 0 {
            return Ok((first, 1));
        }
        while len < pages {
            let next = self.fault_in(hva + len, false)?;
            if next != (HostPage { pfn: first.pfn + len, ..first })
                || self.chunk(((hva + len) / RUN) as usize) & MIXED != 0
            {
                break;
            }
            len = (len + RUN).min(pages);
        }
        Ok((first, len))
    }

    /// The range that a notifier must announce when the host unmaps `range`: a huge mapping that the range cuts is split first, and the split
    /// invalidates all of it. Otherwise a fault beside the range could still install the huge mapping that it had read before.
    pub fn announced(&self, range: &Range<u64>) -> Range<u64> {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let span = |hva: u64| {
            let chunk = self.chunk((hva / RUN) as usize);
            // What is not mapped yet may become as large as the region allows at any moment; what is mapped grows only under mmap_lock.
            let level = match chunk {
                _ if chunk & MIXED != 0 => 1,
                _ if chunk & PRESENT != 0 => (chunk >> LEVEL_SHIFT & 3) as u8,
                _ => state.vma(hva).map_or(1, |(_, vma)| vma.level),
            };
            [1, 1, RUN, GIG][usize::from(level)]
        };
        if range.is_empty() {
            return range.clone();
        }
        let (first, last) = (span(range.start), span(range.end - 1));
        range.start / first * first..(range.end - 1) / last * last + last
    }

    /// Removes the host's own mappings of `range` and releases their frames (munmap, MADV_DONTNEED). The caller runs it between the begin and the
    /// end of a notifier. Returns how many pages were mapped.
    pub fn unmap(&self, range: Range<u64>) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.unmap_locked(&state, range)
    }

    fn unmap_locked(&self, _state: &State, range: Range<u64>) -> u64 {
        let end = range.end.min(self.pages.len() as u64);
        let (mut hva, mut unmapped) = (range.start, 0);
        while hva < end {
            let base = hva / RUN * RUN;
            let stop = (base + RUN).min(end);
            let Some(cell) = self.chunks.get((base / RUN) as usize) else { break };
            let chunk = cell.load(Relaxed);
            if chunk & PRESENT != 0 && chunk & MIXED == 0 {
                if chunk >> LEVEL_SHIFT & 3 == 3 {
                    self.demote(base);
                }
                if hva == base && stop == base + RUN {
                    cell.store(0, Release);
                    self.frames.release(chunk >> PFN_SHIFT, RUN);
                    unmapped += RUN;
                    hva = stop;
                    continue;
                }
                self.mix(base, chunk);
            }
            if cell.load(Relaxed) & MIXED != 0 {
                for page in self.pages.slice(hva as usize, stop as usize) {
                    let old = page.swap(0, Release);
                    if old & PRESENT != 0 {
                        self.frames.release(old >> PFN_SHIFT, 1);
                        unmapped += 1;
                    }
                }
            }
            hva = stop;
        }
        unmapped
    }

    /// The host maps every aligned piece of `level` (2 or 3) that lies in `range` and in one region by a page of that size from now on (khugepaged,
    /// MADV_COLLAPSE). Frames that are one aligned run already stay; others are copied: their frames change hands. The caller
    /// holds mmap_lock and is between the begin and the end of a notifier. Returns the pages now mapped at `level` or above; less where no such run of frames is left.
    pub fn promote(&self, range: Range<u64>, level: u8) -> u64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let span = if level >= 3 { GIG } else { RUN };
        let end = range.end.min(self.pages.len() as u64);
        let (mut base, mut promoted) = (range.start.next_multiple_of(span), 0);
        while base.saturating_add(span) <= end {
            let piece = base..base + span;
            base += span;
            let Some((_, vma)) = state.vma(piece.start).filter(|(_, vma)| piece.end <= vma.end) else {
                continue;
            };
            let bits = u64::from(level.clamp(2, 3)) << LEVEL_SHIFT;
            let first = match self.one_run(&piece) {
                Some(first) => first,
                None => {
                    self.unmap_locked(&state, piece.clone());
                    // Without such a run the piece comes back page by page, as it is touched.
                    let Some(pfn) = self.frames.issue(span) else { continue };
                    pfn << PFN_SHIFT | PRESENT | if vma.writable { WRITE } else { 0 }
                }
            };
            let cells = self.chunks.slice((piece.start / RUN) as usize, (piece.end / RUN) as usize);
            for (i, cell) in cells.iter().enumerate() {
                let larger = cell.load(Relaxed) & 3 << LEVEL_SHIFT;
                cell.store(
                    (first + ((i as u64 * RUN) << PFN_SHIFT)) & !(3 << LEVEL_SHIFT) | bits.max(larger),
                    Release,
                );
            }
            promoted += span;
        }
        promoted
    }

    /// The word of the piece's first 2 MiB, if the piece is mapped whole, in one way, by one run of frames that is aligned as the piece is.
    fn one_run(&self, piece: &Range<u64>) -> Option<u64> {
        let first = self.chunk((piece.start / RUN) as usize);
        let aligned = Frames::frame(first >> PFN_SHIFT).is_multiple_of(piece.end - piece.start);
        let level = !(3 << LEVEL_SHIFT);
        let joined = (0..(piece.end - piece.start) / RUN).all(|i| {
            let chunk = self.chunk((piece.start / RUN + i) as usize);
            chunk & MIXED == 0 && chunk & level == (first & level) + ((i * RUN) << PFN_SHIFT)
        });
        (first & PRESENT != 0 && aligned && joined).then_some(first)
    }

    /// Splits a 1 GiB host mapping into 2 MiB ones.
    fn demote(&self, hva: u64) {
        let first = (hva / GIG * RUN) as usize;
        for cell in self.chunks.slice(first, first + RUN as usize) {
            let chunk = cell.load(Relaxed);
            if chunk & PRESENT != 0 && chunk >> LEVEL_SHIFT & 3 == 3 {
                cell.store(chunk & !(3 << LEVEL_SHIFT) | 2 << LEVEL_SHIFT, Release);
            }
        }
    }

    /// Gives a piece one word per page. The pages are complete before the piece says so.
    fn mix(&self, base: u64, chunk: u64) {
        for (i, page) in self.pages.slice(base as usize, (base + RUN) as usize).iter().enumerate() {
            page.store(((chunk >> PFN_SHIFT) + i as u64) << PFN_SHIFT | chunk & (PRESENT | WRITE), Relaxed);
        }
        if let Some(cell) = self.chunks.get((base / RUN) as usize) {
            cell.store(PRESENT | MIXED, Release);
        }
    }

    /// Ends the region that starts at `start` (munmap of all of it); the caller runs it between the begin and the end of a notifier.
    ///
    /// # Errors
    /// [`VmError::BadHva`] when no region starts there.
    pub fn unregion(&self, start: u64) -> Result<u64, VmError> {
        let vma = self.state.lock().unwrap_or_else(PoisonError::into_inner).vmas.remove(&start);
        let vma = vma.ok_or(VmError::BadHva { hva: start, rule: "no region starts there" })?;
        Ok(self.unmap(start..vma.end))
    }

    /// Is all of `range` inside one region?
    pub fn covers(&self, range: &Range<u64>) -> bool {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.vma(range.start).is_some_and(|(_, vma)| range.end <= vma.end)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> PrimaryMmu {
        PrimaryMmu::new(8 * GIG).expect("address space")
    }

    #[test]
    fn a_region_is_backed_on_first_touch_at_its_level() {
        let host = host();
        for level in 1..=3u8 {
            let start = host.region(2 * GIG, 0, level, true).expect("room");
            assert_eq!(host.lookup(start), None);
            let page = host.fault_in(start + 5, true).expect("backed");
            assert_eq!(page.level, level);
            let span = [0, 1, RUN, GIG][level as usize];
            assert_eq!(Frames::frame(page.pfn) % span, 5 % span, "aligned like the host maps it");
        }
    }

    #[test]
    fn unmapping_one_page_re_issues_only_that_frame() {
        let host = host();
        let start = host.region(GIG, 0, 3, true).expect("room");
        let before = host.fault_in(start + 7, true).expect("backed");
        assert_eq!(host.unmap(start + 7..start + 8), 1);
        assert_eq!(host.lookup(start + 7), None);
        assert_eq!(host.lookup(start + 8).map(|p| (p.level, p.pfn)), Some((1, before.pfn + 1)));
        assert_eq!(host.lookup(start + RUN).map(|p| p.level), Some(2), "the 1 GiB mapping was split");
        let after = host.fault_in(start + 7, true).expect("backed again");
        assert_eq!(Frames::frame(after.pfn), Frames::frame(before.pfn), "re-issued at once");
        assert!(!host.frames().owned(before.pfn) && host.frames().owned(after.pfn));
    }

    #[test]
    fn a_promoted_piece_keeps_its_frames_where_they_are_one_run_and_is_copied_elsewhere() {
        let host = host();
        let start = host.region(2 * GIG, 0, 2, true).expect("room");
        let small = host.fault_in(start + 3, true).expect("backed");
        assert_eq!(host.promote(start..start + RUN + 1, 2), RUN);
        assert_eq!(host.lookup(start + 3), Some(small), "2 MiB already");
        // The whole GiB was never backed, or not by one run.
        assert_eq!(host.promote(start..start + 2 * GIG - 1, 3), GIG);
        let huge = host.lookup(start + 3).expect("backed");
        assert_eq!((huge.level, Frames::frame(huge.pfn) % GIG), (3, 3));
        assert!(!host.frames().owned(small.pfn), "copied: the old frame has another owner");
        assert_eq!(host.announced(&(start + 7..start + 8)), start..start + GIG);
        assert_eq!(host.lookup(start + GIG), None, "only whole pieces");
        // One page goes; the rest is mapped smaller, and a promotion cannot keep what is broken.
        host.unmap(start + 7..start + 8);
        assert_eq!(host.lookup(start + RUN).map(|p| p.level), Some(2));
        assert_eq!(host.promote(start + RUN..start + 2 * RUN, 3), 0, "no piece of a GiB lies in it");
        assert_eq!(host.promote(start..start + GIG, 3), GIG);
        assert!(!host.frames().owned(huge.pfn) && host.lookup(start + 7).is_some_and(|p| p.level == 3));
        let kept = host.lookup(start).expect("backed");
        assert_eq!(host.promote(start..start + GIG, 2), GIG);
        assert_eq!(host.lookup(start), Some(kept), "larger than asked for stays");
        assert_eq!(host.frames().stats().violations, 0);
    }

    #[test]
    fn the_announcement_covers_every_mapping_that_the_unmap_splits() {
        let host = host();
        for (level, span) in [(1u8, 1), (2, RUN), (3, GIG)] {
            let start = host.region(2 * GIG, 0, level, true).expect("room");
            assert_eq!(host.announced(&(start + 600..start + 601)), {
                let at = 600 / span * span;
                start + at..start + at + span
            });
        }
        let start = host.region(GIG, 0, 3, true).expect("room");
        host.fault_in(start, true).expect("backed");
        host.unmap(start + 600..start + 601);
        assert_eq!(host.announced(&(start + 602..start + 603)), start + 602..start + 603, "split already");
        assert_eq!(
            host.announced(&(start + 3..start + 4)),
            start..start + RUN,
            "its GiB was split into 2 MiB"
        );
    }

    #[test]
    fn a_region_keeps_the_guests_misalignment() {
        let host = host();
        let start = host.region(10, 3, 2, true).expect("room");
        assert_eq!(start % GIG, 3);
        assert_eq!(host.fault_in(start, true).expect("backed").level, 1, "2 MiB would reach outside");
        assert!(matches!(host.fault_in(start + 10, false), Err(VmError::BadHva { .. })));
        assert!(matches!(host.fault_in(start - 1, false), Err(VmError::BadHva { .. })));
    }

    #[test]
    fn a_region_that_would_wrap_is_refused_and_takes_no_room() {
        let host = host();
        for pages in [u64::MAX, u64::MAX - GIG, u64::MAX - GIG + 1] {
            let error = host.region(pages, 0, 1, true).expect_err("more than there is");
            assert!(matches!(error, VmError::HostFull { pages: asked, .. } if asked == pages), "{error}");
        }
        host.region(8 * GIG, 0, 1, true).expect("all of it is left");
    }

    #[test]
    fn a_read_only_region_refuses_writes() {
        let host = host();
        let start = host.region(10, 0, 1, false).expect("room");
        assert!(!host.fault_in(start, false).expect("readable").writable);
        assert!(matches!(host.fault_in(start, true), Err(VmError::BadHva { .. })));
    }

    #[test]
    fn a_run_is_as_long_as_frames_follow_each_other() {
        let host = host();
        let start = host.region(4 * RUN, 0, 1, true).expect("room");
        assert_eq!(host.fault_in_run(start, 4 * RUN).expect("backed").1, 4 * RUN);
        host.unmap(start + 2 * RUN..start + 2 * RUN + 1);
        assert_eq!(host.fault_in_run(start, 4 * RUN).expect("backed").1, 2 * RUN);
    }
}
