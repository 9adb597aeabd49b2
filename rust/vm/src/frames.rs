//! Host page frames: numbers with an owner, re-issued at once.
//!
//! **Guarantee.** Every mapping names the owner that it was made for, and every write-back through it (Dirty, Accessed) is checked
//! against the frame's owner of this instant. A frame changes hands at the moment of its release, and the allocator hands out the most
//! recently released frame first. So a write-back that comes after the notifier returned (use-after-free in the kernel: bugs 11, 13, 22)
//! is a counted violation here, not luck.
//!
//! **Mechanism.** A frame number handed out is `tag << 35 | frame`: 35 bits of frame (128 TiB: a guest of 64 TiB does not fit 34, since the host keeps a
//! run for itself) and 4 bits of owner tag fit the PFN field of an EPT or NPT entry below the reserved bit 51 that marks MMIO. The SPTE thus carries its owner; nothing need be looked up.
//! Tags are kept per run of 512 aligned frames; a run of which single frames were released is *broken* and has a byte per frame. Dirty and
//! Accessed are bitmaps, one atomic OR per 64 frames of a run. All arrays are lazily committed (`lazy.rs`): what was
//! never issued costs nothing. A tag wraps after 16 releases of one frame, so a violation that spans exactly a multiple of 16 re-issues is missed.

use std::io;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering::Acquire, Ordering::Relaxed, Ordering::Release};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use tdpmmu_platform::{Event, NO_TASK, Observer};

use tdpmmu_table::Lazy;

/// Frames that share one owner tag while none was released singly: 2 MiB.
pub const RUN: u64 = 512;
/// Bits of a frame number without its tag.
pub const FRAME_BITS: u32 = 35;
/// Bits of the owner tag above them.
pub const TAG_BITS: u32 = 4;

const FRAME_MASK: u64 = (1 << FRAME_BITS) - 1;
const TAG_MASK: u8 = (1 << TAG_BITS) - 1;
// Bit 51 of an entry, bit 39 of its frame number, marks MMIO on NPT.
const _: () = assert!(FRAME_BITS + TAG_BITS <= 39);
/// Run tag of a broken run.
const BROKEN: u8 = 0xff;
/// Violations kept with their details.
const KEPT: usize = 16;

/// A write-back, or an access, through a mapping whose frame belongs to somebody else by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnerViolation {
    /// The frame, without tag.
    pub frame: u64,
    /// The tag that the mapping was made for.
    pub made_for: u8,
    /// The tag of the present owner.
    pub owned_by: u8,
    /// What was done through the stale mapping.
    pub what: WriteBack,
}

/// What came through a mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteBack {
    /// Dirty state, at zap.
    Dirty,
    /// Accessed state, at zap.
    Accessed,
    /// A guest access through a TLB.
    Guest,
}

impl WriteBack {
    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            WriteBack::Dirty => "a write-back of Dirty",
            WriteBack::Accessed => "a write-back of Accessed",
            WriteBack::Guest => "a guest's access",
        }
    }
}

/// Totals since creation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FrameStats {
    /// Frames issued.
    pub issued: u64,
    /// Frames released.
    pub released: u64,
    /// Frames in dirty write-backs.
    pub dirtied: u64,
    /// Frames in accessed write-backs.
    pub accessed: u64,
    /// Write-backs and accesses that met a foreign owner: must stay 0.
    pub violations: u64,
}

#[derive(Default)]
struct Free {
    next: u64,
    singles: Vec<u64>,
    runs: Vec<u64>,
    gigs: Vec<u64>,
}

/// All frames of the host.
pub struct Frames {
    run_tag: Lazy<AtomicU8>,
    page_tag: Lazy<AtomicU8>,
    dirty: Lazy<AtomicU64>,
    accessed: Lazy<AtomicU64>,
    free: Mutex<Free>,
    limit: u64,
    issued: AtomicU64,
    released: AtomicU64,
    dirtied: AtomicU64,
    accesses: AtomicU64,
    violations: AtomicU64,
    kept: Mutex<Vec<OwnerViolation>>,
    observer: OnceLock<Arc<dyn Observer>>,
}

impl Frames {
    /// A host with `limit` frames, cut to 2^35.
    ///
    /// # Errors
    /// The host's refusal of address space.
    pub fn new(limit: u64) -> io::Result<Self> {
        let limit = limit.next_multiple_of(RUN * RUN).min(1 << FRAME_BITS);
        Ok(Self {
            run_tag: Lazy::new((limit / RUN) as usize)?,
            page_tag: Lazy::new(limit as usize)?,
            dirty: Lazy::new((limit / 64) as usize)?,
            accessed: Lazy::new((limit / 64) as usize)?,
            free: Mutex::new(Free { next: RUN, ..Free::default() }),
            limit,
            issued: AtomicU64::new(0),
            released: AtomicU64::new(0),
            dirtied: AtomicU64::new(0),
            accesses: AtomicU64::new(0),
            violations: AtomicU64::new(0),
            kept: Mutex::new(Vec::new()),
            observer: OnceLock::new(),
        })
    }

    /// `observer` is told of releases and of violations from now on; the first one given stays.
    pub fn tell(&self, observer: Arc<dyn Observer>) {
        let _first = self.observer.set(observer);
    }

    /// The frame of a tagged number.
    #[inline(always)]
    pub const fn frame(pfn: u64) -> u64 {
        pfn & FRAME_MASK
    }

    /// The owner tag of a tagged number.
    #[inline(always)]
    pub const fn tag(pfn: u64) -> u8 {
        (pfn >> FRAME_BITS) as u8 & TAG_MASK
    }

    fn owner(&self, frame: u64) -> Option<u8> {
        let tag = self.run_tag.get((frame / RUN) as usize)?.load(Acquire);
        if tag == BROKEN { Some(self.page_tag.get(frame as usize)?.load(Acquire)) } else { Some(tag) }
    }

    fn tagged(&self, frame: u64) -> u64 {
        frame | u64::from(self.owner(frame).unwrap_or(0)) << FRAME_BITS
    }

    /// Issues `count` contiguous frames aligned to `count` (1, 512 or 512 * 512); the most recently released first.
    /// `None`: the host has no such run left.
    pub fn issue(&self, count: u64) -> Option<u64> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let frame = match count {
            1 => match free.singles.pop() {
                Some(frame) => frame,
                None => {
                    // Break a fresh run into singles, lowest number first out.
                    let run = Self::take_run(&mut free, self.limit)?;
                    free.singles.extend((run + 1..run + RUN).rev());
                    run
                }
            },
            RUN => Self::take_run(&mut free, self.limit)?,
            _ => match free.gigs.pop() {
                Some(frame) => frame,
                None => {
                    let frame = free.next.next_multiple_of(RUN * RUN);
                    if frame + RUN * RUN > self.limit {
                        return None;
                    }
                    let gap = free.next;
                    free.runs.extend((gap / RUN..frame / RUN).rev().map(|run| run * RUN));
                    free.next = frame + RUN * RUN;
                    frame
                }
            },
        };
        drop(free);
        self.issued.fetch_add(count, Relaxed);
        Some(self.tagged(frame))
    }

    fn take_run(free: &mut Free, limit: u64) -> Option<u64> {
        if let Some(run) = free.runs.pop() {
            return Some(run);
        }
        if free.next + RUN <= limit {
            free.next += RUN;
            return Some(free.next - RUN);
        }
        let gig = free.gigs.pop()?;
        free.runs.extend((gig / RUN + 1..gig / RUN + RUN).rev().map(|run| run * RUN));
        Some(gig)
    }

    /// The frames `[pfn, pfn + count)` change hands now: 1, or whole aligned runs of 512.
    pub fn release(&self, pfn: u64, count: u64) {
        if let Some(observer) = self.observer.get() {
            observer.event(NO_TASK, &Event::FrameRelease { pfn, count });
        }
        let frame = Self::frame(pfn);
        if count < RUN {
            for frame in frame..frame + count {
                self.release_one(frame);
            }
        } else {
            for run in (frame..frame + count).step_by(RUN as usize) {
                self.release_run(run);
            }
        }
        self.released.fetch_add(count, Relaxed);
    }

    fn bump(tag: u8) -> u8 {
        (tag + 1) & TAG_MASK
    }

    fn release_one(&self, frame: u64) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let base = frame / RUN * RUN;
        let Some(run) = self.run_tag.get((frame / RUN) as usize) else { return };
        let tag = run.load(Relaxed);
        if tag != BROKEN {
            for page in self.page_tag.slice(base as usize, (base + RUN) as usize) {
                page.store(tag, Relaxed);
            }
            run.store(BROKEN, Release);
        }
        if let Some(page) = self.page_tag.get(frame as usize) {
            page.store(Self::bump(page.load(Relaxed)), Release);
        }
        for map in [&self.dirty, &self.accessed] {
            if let Some(word) = map.get((frame / 64) as usize) {
                word.fetch_and(!(1 << (frame % 64)), Relaxed);
            }
        }
        free.singles.push(frame);
    }

    fn release_run(&self, base: u64) {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(run) = self.run_tag.get((base / RUN) as usize) else { return };
        let tag = run.load(Relaxed);
        if tag == BROKEN {
            for page in self.page_tag.slice(base as usize, (base + RUN) as usize) {
                page.store(Self::bump(page.load(Relaxed)), Release);
            }
        } else {
            run.store(Self::bump(tag), Release);
        }
        for map in [&self.dirty, &self.accessed] {
            for word in map.slice((base / 64) as usize, ((base + RUN) / 64) as usize) {
                word.store(0, Relaxed);
            }
        }
        free.runs.push(base);
    }

    /// Does the frame still belong to the owner that `pfn` was issued to?
    #[inline]
    pub fn owned(&self, pfn: u64) -> bool {
        self.owner(Self::frame(pfn)) == Some(Self::tag(pfn))
    }

    #[cold]
    fn violated(&self, pfn: u64, what: WriteBack) {
        self.violations.fetch_add(1, Relaxed);
        if let Some(observer) = self.observer.get() {
            observer.event(NO_TASK, &Event::FrameStale { pfn, what: what.name() });
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() < KEPT {
            let frame = Self::frame(pfn);
            let owned_by = self.owner(frame).unwrap_or(u8::MAX);
            kept.push(OwnerViolation { frame, made_for: Self::tag(pfn), owned_by, what });
        }
    }

    /// A guest access came through a translation to `pfn`: is it the owner's?
    #[inline]
    pub fn check_access(&self, pfn: u64) {
        if !self.owned(pfn) {
            self.violated(pfn, WriteBack::Guest);
        }
    }

    fn mark(&self, map: &Lazy<AtomicU64>, pfn: u64, count: u64, what: WriteBack) {
        let tag = Self::tag(pfn);
        let (mut frame, end) = (Self::frame(pfn), Self::frame(pfn) + count);
        while frame < end {
            let run_end = ((frame / RUN + 1) * RUN).min(end);
            match self.run_tag.get((frame / RUN) as usize).map(|t| t.load(Acquire)) {
                Some(owner) if owner == tag => Self::set(map, frame, run_end),
                Some(BROKEN) => {
                    for frame in frame..run_end {
                        if self.owner(frame) == Some(tag) {
                            Self::set(map, frame, frame + 1);
                        } else {
                            self.violated(frame | u64::from(tag) << FRAME_BITS, what);
                        }
                    }
                }
                _ => self.violated(frame | u64::from(tag) << FRAME_BITS, what),
            }
            frame = run_end;
        }
    }

    /// Sets the bits `[from, to)` of one run, a word at a time. Without a look first: on memory that was never touched a
    /// read maps the host's zero page, and the write after it costs a copy and an IPI to every CPU.
    #[inline]
    fn set(map: &Lazy<AtomicU64>, from: u64, to: u64) {
        let mut frame = from;
        while frame < to {
            let end = ((frame / 64 + 1) * 64).min(to);
            let bits = (u64::MAX >> (64 - (end - frame))) << (frame % 64);
            if let Some(word) = map.get((frame / 64) as usize) {
                word.fetch_or(bits, Relaxed);
            }
            frame = end;
        }
    }

    /// Write-back of Dirty for a contiguous run.
    pub fn mark_dirty(&self, pfn: u64, count: u64) {
        self.mark(&self.dirty, pfn, count, WriteBack::Dirty);
        self.dirtied.fetch_add(count, Relaxed);
    }

    /// Write-back of Dirty for the frames `pfn + n` of each bit n of `mask`; `pfn` is a multiple of 64.
    pub fn mark_dirty_masked(&self, pfn: u64, mask: u64) {
        let (frame, tag) = (Self::frame(pfn), Self::tag(pfn));
        if self.run_tag.get((frame / RUN) as usize).map(|t| t.load(Acquire)) == Some(tag)
            && let Some(word) = self.dirty.get((frame / 64) as usize)
        {
            word.fetch_or(mask, Relaxed);
        } else {
            let mut left = mask;
            while left != 0 {
                self.mark(&self.dirty, pfn + u64::from(left.trailing_zeros()), 1, WriteBack::Dirty);
                left &= left - 1;
            }
        }
        self.dirtied.fetch_add(u64::from(mask.count_ones()), Relaxed);
    }

    /// Write-back of Accessed for a contiguous run.
    pub fn mark_accessed(&self, pfn: u64, count: u64) {
        self.mark(&self.accessed, pfn, count, WriteBack::Accessed);
        self.accesses.fetch_add(count, Relaxed);
    }

    /// Is the frame's dirty flag set?
    pub fn is_dirty(&self, pfn: u64) -> bool {
        let frame = Self::frame(pfn);
        self.dirty.get((frame / 64) as usize).is_some_and(|w| w.load(Relaxed) >> (frame % 64) & 1 != 0)
    }

    /// Is the frame's accessed flag set?
    pub fn is_accessed(&self, pfn: u64) -> bool {
        let frame = Self::frame(pfn);
        self.accessed.get((frame / 64) as usize).is_some_and(|w| w.load(Relaxed) >> (frame % 64) & 1 != 0)
    }

    /// Totals now.
    pub fn stats(&self) -> FrameStats {
        FrameStats {
            issued: self.issued.load(Relaxed),
            released: self.released.load(Relaxed),
            dirtied: self.dirtied.load(Relaxed),
            accessed: self.accesses.load(Relaxed),
            violations: self.violations.load(Relaxed),
        }
    }

    /// The first violations, with details.
    pub fn violations(&self) -> Vec<OwnerViolation> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frames() -> Frames {
        Frames::new(RUN * RUN * 4).expect("address space")
    }

    #[test]
    fn a_released_frame_is_issued_next_to_another_owner() {
        let frames = frames();
        for count in [1, RUN] {
            let first = frames.issue(count).expect("room");
            frames.release(first, count);
            let second = frames.issue(count).expect("room");
            assert_eq!(Frames::frame(first), Frames::frame(second));
            assert_ne!(Frames::tag(first), Frames::tag(second));
            assert!(frames.owned(second) && !frames.owned(first));
        }
    }

    #[test]
    fn a_late_write_back_is_a_violation_with_its_details() {
        let frames = frames();
        let run = frames.issue(RUN).expect("room");
        frames.mark_dirty(run, RUN);
        assert_eq!(frames.stats().violations, 0);
        frames.release(run + 3, 1);
        assert!(!frames.is_dirty(run + 3) && frames.is_dirty(run + 4));
        frames.mark_dirty(run, RUN);
        assert_eq!(frames.stats().violations, 1);
        let seen = frames.violations()[0];
        assert_eq!((seen.frame, seen.what), (Frames::frame(run) + 3, WriteBack::Dirty));
        assert!(!frames.is_dirty(run + 3), "the new owner's flag is untouched");
    }

    #[test]
    fn a_gig_is_aligned_and_the_gap_before_it_is_not_lost() {
        let frames = frames();
        let run = frames.issue(RUN).expect("room");
        let gig = frames.issue(RUN * RUN).expect("room");
        assert_eq!(Frames::frame(gig) % (RUN * RUN), 0);
        let next = frames.issue(RUN).expect("room");
        assert_eq!(Frames::frame(next), Frames::frame(run) + RUN);
    }

    #[test]
    fn the_host_runs_out_of_frames_at_its_limit() {
        let frames = Frames::new(1).expect("address space");
        let mut issued = 0;
        while frames.issue(RUN).is_some() {
            issued += RUN;
        }
        assert_eq!(issued, RUN * RUN - RUN, "all but the run of frame 0");
    }

    #[test]
    fn marking_covers_exactly_the_run() {
        let frames = frames();
        let gig = frames.issue(RUN * RUN).expect("room");
        frames.mark_accessed(gig + 100, 1000);
        for (frame, want) in [(99, false), (100, true), (1099, true), (1100, false)] {
            assert_eq!(frames.is_accessed(gig + frame), want, "frame {frame}");
        }
        assert_eq!(frames.stats().accessed, 1000);
    }
    #[test]
    fn a_mask_marks_what_as_many_single_marks_do() {
        let frames = frames();
        let (run, other) = (frames.issue(RUN).expect("room"), frames.issue(RUN).expect("room"));
        let mask = 1 | 1 << 5 | 1 << 63;
        frames.mark_dirty_masked(run + 64, mask);
        for n in 0..RUN {
            let marked = (64..128).contains(&n) && mask >> (n - 64) & 1 != 0;
            assert_eq!((frames.is_dirty(run + n), frames.is_dirty(other + n)), (marked, false), "frame {n}");
        }
        assert_eq!((frames.stats().dirtied, frames.stats().violations), (3, 0));
        // Frame 69 has got another owner: the run is no whole any more.
        frames.release(run + 69, 1);
        frames.mark_dirty_masked(run + 64, mask | 1 << 7);
        assert!(!frames.is_dirty(run + 69) && frames.is_dirty(run + 71));
        assert_eq!((frames.stats().dirtied, frames.stats().violations), (7, 1));
        assert_eq!(frames.violations()[0].frame, Frames::frame(run) + 69);
    }
}
