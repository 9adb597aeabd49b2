//! The mmu_notifier protocol: no SPTE from a pfn that the host took away survives.
//!
//! **Guarantee.** No SPTE can be installed from a pfn that was looked up before an overlapping *begin* and still be there after the matching
//! *end*.
//!
//! **Mechanism.** *begin*, under mmu_lock exclusive: `in_progress += 1`, the range is widened, SPTEs are zapped, TLBs flushed. *end*,
//! exclusive as well: `seq += 1`, then `in_progress -= 1`. A fault samples `seq`, *then* looks the pfn up, takes mmu_lock shared and installs only
//! if no invalidation of its gfn is in progress and `seq` is unchanged.
//!
//! | the fault samples seq | the pfn was read | what stops it |
//! | --- | --- | --- |
//! | before begin, locks before begin | before | nothing: the begin zaps what it installs |
//! | before begin, locks between begin and end | before or after the host's own zap | `in_progress` and the range |
//! | before end, locks after end | maybe before | `seq` differs |
//! | after end | after | nothing: the pfn is the new one |
//!
//! `seq` is compared at full width: compared as an `int` it hung guests after 2^31 invalidations (Linux 5.16-6.2).

use std::ops::Range;
use std::sync::atomic::AtomicU64;

use tdpmmu_platform::{Bug, Exclusive, Guard, Mode, Platform, Site};

/// mmu_invalidate_seq, mmu_invalidate_in_progress and the range, for one address space numbering of gfns.
#[derive(Debug, Default)]
pub struct Invalidation {
    seq: AtomicU64,
    in_progress: AtomicU64,
    start: AtomicU64,
    end: AtomicU64,
}

impl Invalidation {
    /// Samples the sequence. The pfn must be looked up after this returns.
    #[inline]
    pub fn sample<P: Platform>(&self) -> u64 {
        // The acquire load is the read barrier between the sample and the lookup.
        P::load(&self.seq, Site::NotifierSeq)
    }

    /// Begins an invalidation of `range` (gfns).
    pub fn begin<P: Platform>(&self, _lock: &Guard<'_, P, Exclusive>, range: &Range<u64>) {
        let before = P::load(&self.in_progress, Site::NotifierBegin);
        // Invalidations that overlap in time share one covering range: too wide costs a retry, too narrow a page.
        let (start, end) = if before == 0 {
            (range.start, range.end)
        } else {
            let start = P::load(&self.start, Site::NotifierBegin).min(range.start);
            (start, P::load(&self.end, Site::NotifierBegin).max(range.end))
        };
        P::store(&self.start, start, Site::NotifierBegin);
        P::store(&self.end, end, Site::NotifierBegin);
        P::store(&self.in_progress, before + 1, Site::NotifierBegin);
    }

    /// Ends an invalidation.
    pub fn end<P: Platform>(&self, _lock: &Guard<'_, P, Exclusive>) {
        let seq = P::load(&self.seq, Site::NotifierEnd);
        P::store(&self.seq, seq + 1, Site::NotifierEnd);
        let left = P::load(&self.in_progress, Site::NotifierEnd);
        P::store(&self.in_progress, left.saturating_sub(1), Site::NotifierEnd);
    }

    /// Must a fault on `gfn` that sampled `seq` try again? Definite, because mmu_lock is held.
    #[inline]
    pub fn must_retry<P: Platform, M: Mode>(&self, _lock: &Guard<'_, P, M>, gfn: u64, seq: u64) -> bool {
        // 5.16-6.2: an int, which the compare extends by its sign.
        let seq = if P::bug(Bug::B29) { seq as i32 as u64 } else { seq };
        self.looks_stale::<P>(gfn, seq)
    }

    /// [`Invalidation::must_retry`] for a whole range of gfns.
    pub fn must_retry_range<P: Platform, M: Mode>(
        &self,
        _lock: &Guard<'_, P, M>,
        gfns: &Range<u64>,
        seq: u64,
    ) -> bool {
        let overlaps = P::load(&self.in_progress, Site::NotifierSeq) != 0
            && gfns.start < P::load(&self.end, Site::NotifierSeq)
            && P::load(&self.start, Site::NotifierSeq) < gfns.end;
        overlaps || P::load(&self.seq, Site::NotifierSeq) != seq && !P::bug(Bug::C07)
    }

    /// The same question without the lock: a hint that saves work (6.8 and later), never a permission.
    #[inline]
    pub fn looks_stale<P: Platform>(&self, gfn: u64, seq: u64) -> bool {
        if P::load(&self.in_progress, Site::NotifierSeq) != 0
            && gfn >= P::load(&self.start, Site::NotifierSeq)
            && gfn < P::load(&self.end, Site::NotifierSeq)
        {
            return true;
        }
        P::load(&self.seq, Site::NotifierSeq) != seq && !P::bug(Bug::C07)
    }

    /// A VM that has seen `seq` invalidations already; before its first fault.
    pub fn start_at<P: Platform>(&self, seq: u64) {
        P::store(&self.seq, seq, Site::NotifierEnd);
    }

    /// Ended invalidations so far.
    pub fn count<P: Platform>(&self) -> u64 {
        P::load(&self.seq, Site::NotifierSeq)
    }
}
