//! What is counted: readable at any time without the lock, exact when nobody holds it.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering::Relaxed};

use tdpmmu_platform::{Platform, Task};

use crate::{ShadowMmu, page};

/// Counters. Written under mmu_lock exclusive only, so a plain load and store adds.
#[derive(Default)]
pub(crate) struct Tallies {
    /// Pages that exist: made, and not yet prepared for their end, or still held as roots.
    pub pages: Counter,
    pub pages_peak: Counter,
    /// Of these, those that shadow a table of the guest.
    pub indirect: Counter,
    pub indirect_peak: Counter,
    /// Pages on the active list that are of an older generation.
    pub obsolete: Counter,
    /// Zapped roots that somebody holds.
    pub zapped_held: Counter,
    /// Zapped pages that wait for the commit of a walk that has given the lock up.
    pub zapped_kept: Counter,
    /// The most of these, with what reclamation held then.
    pub waiting_peak: Counter,
    pub leaves: [AtomicI64; 4],
    pub toggles: Counter,
    pub zapped: Counter,
    pub batches: Counter,
    pub longest_batch: Counter,
    pub restarts: Counter,
    pub reclaimed: Counter,
}

/// A counter with one writer at a time.
#[derive(Default)]
pub(crate) struct Counter(AtomicU64);

impl Counter {
    #[inline]
    pub(crate) fn get(&self) -> u64 {
        self.0.load(Relaxed)
    }

    #[inline]
    pub(crate) fn set(&self, value: u64) {
        self.0.store(value, Relaxed);
    }

    #[inline]
    pub(crate) fn add(&self, count: u64) {
        self.set(self.get() + count);
    }

    #[inline]
    pub(crate) fn sub(&self, count: u64) {
        debug_assert!(self.get() >= count, "a count of shadow pages went below zero");
        self.set(self.get().saturating_sub(count));
    }

    /// At least `value` from here on.
    #[inline]
    pub(crate) fn raise(&self, value: u64) {
        if value > self.get() {
            self.set(value);
        }
    }
}

/// Counts of a shadow MMU; pages unless said otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowCounts {
    /// In existence: made, and not zapped, or zapped and held as a root.
    pub pages: u64,
    /// The most of these at once.
    pub pages_peak: u64,
    /// Of `pages`, those that shadow a table of the guest.
    pub indirect: u64,
    /// Of `pages`, those of an older generation that nobody has zapped yet.
    pub obsolete: u64,
    /// Of `pages`, roots that were zapped and are held by vCPUs.
    pub zapped_held: u64,
    /// Zapped and not yet free: waiting for the commit of a walk, or for readers.
    pub waiting: u64,
    /// The most of these at once.
    pub waiting_peak: u64,
    /// Present leaves by level (1 to 3); all zero where the profile keeps no page statistics.
    pub leaves: [u64; 4],
    /// Times that everything was made obsolete.
    pub toggles: u64,
    /// Zapped since the beginning.
    pub zapped: u64,
    /// Stretches of obsolete pages that were zapped between two reschedule checks.
    pub batches: u64,
    /// The most pages zapped in one of these.
    pub longest_batch: u64,
    /// Times that a walk over the list began again: after a yield, or because children were zapped with a page.
    pub restarts: u64,
    /// Zapped for the quota.
    pub reclaimed: u64,
}

/// What is left when a VM is gone: all zero, or something leaked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowLeftovers {
    /// Pages on the active list.
    pub listed: u64,
    /// Pages in the hash, listed or not.
    pub hashed: u64,
    /// Zapped roots that somebody still holds.
    pub held_roots: u64,
    /// Pages that were zapped and are not free.
    pub waiting: u64,
    /// Present leaves by the statistics.
    pub leaves: i64,
    /// Chunks of reverse maps and parent lists.
    pub chunks: u64,
}

impl ShadowLeftovers {
    /// Nothing is left.
    pub fn is_clean(&self) -> bool {
        *self == Self::default()
    }
}

/// Memory beside the tables, in bytes, at its high-water mark. What lies with memslots ([`crate::SlotBooks::bytes_touched`]) is not in it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowMemory {
    /// Books of pages: headers, links, generations, hash.
    pub page_bytes: u64,
    /// The gfns and unsync marks of pages that shadow a table of the guest.
    pub gfn_bytes: u64,
    /// Chunks of reverse maps and parent lists.
    pub list_bytes: u64,
}

/// Bytes that a shadow page costs beside its 4 KiB table, at most and without chunks of lists: its header and its books.
pub const fn overhead_bytes_per_page(indirect: bool) -> u64 {
    size_of::<tdpmmu_table::TableMeta>() as u64 + page::bytes_per_page(indirect)
}

impl<P: Platform> ShadowMmu<P> {
    /// The counts now.
    pub fn counts(&self) -> ShadowCounts {
        let t = &self.tallies;
        let waiting = t.zapped_kept.get() + self.reclaim.waiting();
        ShadowCounts {
            pages: t.pages.get(),
            pages_peak: t.pages_peak.get(),
            indirect: t.indirect.get(),
            obsolete: t.obsolete.get(),
            zapped_held: t.zapped_held.get(),
            waiting,
            waiting_peak: t.waiting_peak.get().max(self.reclaim.waiting_peak()).max(waiting),
            leaves: [0, 1, 2, 3].map(|level| self.leaves(level).max(0) as u64),
            toggles: t.toggles.get(),
            zapped: t.zapped.get(),
            batches: t.batches.get(),
            longest_batch: t.longest_batch.get(),
            restarts: t.restarts.get(),
            reclaimed: t.reclaimed.get(),
        }
    }

    pub(crate) fn leaves(&self, level: usize) -> i64 {
        self.tallies.leaves[level].load(Relaxed)
    }

    /// `delta` leaves of `level` more.
    #[inline]
    pub(crate) fn count_leaves(&self, level: u8, delta: i64) {
        if self.config.profile.page_stats {
            let leaves = &self.tallies.leaves[usize::from(level)];
            leaves.store(leaves.load(Relaxed) + delta, Relaxed);
        }
    }

    /// Memory touched so far, beside the tables.
    pub fn memory(&self) -> ShadowMemory {
        let (pages, indirect) = (self.tallies.pages_peak.get(), self.tallies.indirect_peak.get());
        let direct_bytes = overhead_bytes_per_page(false);
        ShadowMemory {
            page_bytes: pages * direct_bytes,
            gfn_bytes: indirect * (overhead_bytes_per_page(true) - direct_bytes),
            list_bytes: self.lists.bytes(),
        }
    }

    /// The end of the VM, after [`ShadowMmu::zap_all`] and the last put of a root: waits until every page is free and says what was left behind. Under no lock, in no section.
    pub fn uninit(&self, task: &Task<P>) -> ShadowLeftovers {
        self.reclaim.drain(task);
        let t = &self.tallies;
        ShadowLeftovers {
            listed: self.listed(),
            hashed: self.hashed_pages().count() as u64,
            held_roots: t.zapped_held.get(),
            waiting: t.zapped_kept.get() + self.reclaim.waiting(),
            leaves: (1..4).map(|level| self.leaves(level)).sum(),
            chunks: self.lists.used(),
        }
    }
}
