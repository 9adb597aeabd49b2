//! What is known about a shadow page beside its entries, and beside [`TableMeta`](tdpmmu_table::TableMeta).
//!
//! **Guarantee.** Everything here is written under mmu_lock exclusive only, by relaxed atomics indexed by table; it may be read at any time, and is of one moment only under the lock.
//! A page that comes out of the pool has fresh books ([`Pages::reset`]); nothing outlives a page in them.
//!
//! **Mechanism.** The header that every table has serves a shadow page too: `gfn` (first gfn of a direct page; the guest's own table of an indirect one), `role`, `refs` (root_count),
//! `next`/`prev` (the active list: older, newer), `second` (hash chain), `rcu_link` (the chain of zapped pages). The rest is 32 bytes a table here. The unsync bitmap and the gfns that an
//! indirect page maps are arrays of their own, touched by indirect pages only: a direct page computes its gfns.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use tdpmmu_spte::geometry::{ENTRIES, span};
use tdpmmu_table::{Lazy, TablePool};

/// Words a table in [`Pages::words`].
const WORDS: usize = 4;
/// Words of a bitmap of 512 entries.
const BITMAP: usize = ENTRIES / 64;
/// What stands above the count of unsync children.
const UNSYNC: u64 = 1 << 32;

/// Place of each word.
#[derive(Clone, Copy)]
enum Word {
    /// Generation (low half), hash back link (high half).
    Generation = 0,
    /// Head of the list of parent entries.
    Parents = 1,
    /// Unsync children (low half), [`UNSYNC`].
    Sync = 2,
    /// Guest writes to the shadowed table since the page was last used (write_flooding_count).
    Flooding = 3,
}

/// The books of all shadow pages, by table index.
pub(crate) struct Pages {
    words: Lazy<AtomicU64>,
    bitmaps: Lazy<AtomicU64>,
    gfns: Lazy<AtomicU64>,
}

#[cold]
fn outside(table: u32) -> ! {
    panic!("table {table} lies outside of the pool")
}

/// Bytes of books a page costs beside its table and [`TableMeta`](tdpmmu_table::TableMeta).
pub(crate) const fn bytes_per_page(indirect: bool) -> u64 {
    let words = WORDS + if indirect { BITMAP + ENTRIES } else { 0 };
    (words * size_of::<u64>()) as u64
}

impl Pages {
    /// Books for the tables of `pool`.
    ///
    /// # Errors
    /// What the host says when it refuses the address space.
    pub(crate) fn new(pool: &TablePool) -> io::Result<Self> {
        let tables = pool.words().1 / tdpmmu_table::TABLE_BYTES;
        Ok(Self {
            words: Lazy::new(tables * WORDS)?,
            bitmaps: Lazy::new(tables * BITMAP)?,
            gfns: Lazy::new(tables * ENTRIES)?,
        })
    }

    #[inline(always)]
    fn word(&self, table: u32, word: Word) -> &AtomicU64 {
        match self.words.get(table as usize * WORDS + word as usize) {
            Some(word) => word,
            None => outside(table),
        }
    }

    #[inline]
    fn halves(&self, table: u32, word: Word) -> (u32, u32) {
        let both = self.word(table, word).load(Relaxed);
        (both as u32, (both >> 32) as u32)
    }

    /// Fresh books of a page of this generation.
    pub(crate) fn reset(&self, table: u32, generation: u32, indirect: bool) {
        self.word(table, Word::Generation).store(u64::from(generation), Relaxed);
        for word in [Word::Parents, Word::Sync, Word::Flooding] {
            self.word(table, word).store(0, Relaxed);
        }
        if indirect {
            self.bitmap(table).iter().for_each(|word| word.store(0, Relaxed));
        }
    }

    /// The generation in which the page was made.
    #[inline(always)]
    pub(crate) fn generation(&self, table: u32) -> u32 {
        self.word(table, Word::Generation).load(Relaxed) as u32
    }

    /// The page before this one in its hash chain; 0: it is the first.
    #[inline]
    pub(crate) fn hash_prev(&self, table: u32) -> u32 {
        self.halves(table, Word::Generation).1
    }

    pub(crate) fn set_hash_prev(&self, table: u32, prev: u32) {
        let generation = u64::from(self.generation(table));
        self.word(table, Word::Generation).store(generation | u64::from(prev) << 32, Relaxed);
    }

    /// The head of the list of entries that name the page.
    #[inline]
    pub(crate) fn parents(&self, table: u32) -> &AtomicU64 {
        self.word(table, Word::Parents)
    }

    /// May the guest's table differ from what the page says?
    #[inline]
    pub(crate) fn is_unsync(&self, table: u32) -> bool {
        self.word(table, Word::Sync).load(Relaxed) & UNSYNC != 0
    }

    pub(crate) fn set_unsync(&self, table: u32, on: bool) {
        let word = self.word(table, Word::Sync);
        let rest = word.load(Relaxed) & !UNSYNC;
        word.store(rest | if on { UNSYNC } else { 0 }, Relaxed);
    }

    /// Entries of the page whose child is unsync, or has an unsync page below.
    #[inline]
    pub(crate) fn unsync_children(&self, table: u32) -> u32 {
        self.halves(table, Word::Sync).0
    }

    /// Unsync, or with unsync pages below: somebody must look before the guest may believe it.
    #[inline]
    pub(crate) fn has_unsync(&self, table: u32) -> bool {
        self.word(table, Word::Sync).load(Relaxed) != 0
    }

    fn bitmap(&self, table: u32) -> &[AtomicU64] {
        let first = table as usize * BITMAP;
        self.bitmaps.slice(first, first + BITMAP)
    }

    /// Is the child at entry `index` marked as unsync, or as above one?
    #[inline]
    pub(crate) fn unsync_bit(&self, table: u32, index: u16) -> bool {
        self.bitmap(table)[usize::from(index) / 64].load(Relaxed) >> (index % 64) & 1 != 0
    }

    /// Sets or clears the mark of entry `index`, and counts; false if it was so already.
    pub(crate) fn set_unsync_bit(&self, table: u32, index: u16, on: bool) -> bool {
        let word = &self.bitmap(table)[usize::from(index) / 64];
        let (had, bit) = (word.load(Relaxed), 1 << (index % 64));
        if (had & bit != 0) == on {
            return false;
        }
        word.store(had ^ bit, Relaxed);
        let sync = self.word(table, Word::Sync);
        let count = sync.load(Relaxed);
        sync.store(if on { count + 1 } else { count - 1 }, Relaxed);
        true
    }

    /// The first marked entry at or after `from`.
    pub(crate) fn next_unsync_child(&self, table: u32, from: u16) -> Option<u16> {
        let mut at = usize::from(from);
        while at < ENTRIES {
            let left = self.bitmap(table)[at / 64].load(Relaxed) >> (at % 64);
            if left != 0 {
                return Some((at + left.trailing_zeros() as usize) as u16);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Guest writes to the shadowed table since the page was last used.
    pub(crate) fn flooding(&self, table: u32) -> u32 {
        self.word(table, Word::Flooding).load(Relaxed) as u32
    }

    pub(crate) fn set_flooding(&self, table: u32, count: u32) {
        self.word(table, Word::Flooding).store(u64::from(count), Relaxed);
    }

    /// What an indirect page says of entry `index`: the gfn that it maps, and the guest's access bits (three or four).
    #[inline]
    pub(crate) fn stored(&self, table: u32, index: u16) -> (u64, u8) {
        let at = table as usize * ENTRIES + usize::from(index);
        let word = self.gfns.get(at).map_or(0, |word| word.load(Relaxed));
        (word >> 12, (word & 0xfff) as u8)
    }

    /// See [`Pages::stored`].
    #[inline]
    pub(crate) fn store(&self, table: u32, index: u16, gfn: u64, access: u8) {
        if let Some(word) = self.gfns.get(table as usize * ENTRIES + usize::from(index)) {
            word.store(gfn << 12 | u64::from(access), Relaxed);
        }
    }
}

/// The gfn that entry `index` of a direct page of `level` translates.
#[inline(always)]
pub(crate) fn direct_gfn(base: u64, level: u8, index: u16) -> u64 {
    base + u64::from(index) * span(level)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tdpmmu_table::PoolConfig;

    fn pages() -> Pages {
        let pool = TablePool::new(PoolConfig { max_tables: 64, hugepages: false, quarantine: false });
        Pages::new(&pool.expect("a small reservation")).expect("a small reservation")
    }

    #[test]
    fn the_unsync_count_is_the_number_of_marks_and_survives_the_pages_own_flag() {
        let pages = pages();
        pages.reset(70, 3, true);
        pages.set_unsync(70, true);
        assert!(pages.set_unsync_bit(70, 5, true) && pages.set_unsync_bit(70, 511, true));
        assert!(!pages.set_unsync_bit(70, 5, true));
        assert_eq!((pages.unsync_children(70), pages.is_unsync(70)), (2, true));
        pages.set_unsync(70, false);
        assert_eq!((pages.next_unsync_child(70, 0), pages.next_unsync_child(70, 6)), (Some(5), Some(511)));
        assert!(pages.set_unsync_bit(70, 5, false) && !pages.unsync_bit(70, 5));
        assert_eq!((pages.unsync_children(70), pages.has_unsync(70)), (1, true));
        pages.reset(70, 4, true);
        assert_eq!((pages.next_unsync_child(70, 0), pages.generation(70)), (None, 4));
    }

    #[test]
    fn links_and_generation_share_a_word_without_harm() {
        let pages = pages();
        pages.reset(65, u32::MAX, false);
        pages.set_hash_prev(65, 77);
        assert_eq!((pages.generation(65), pages.hash_prev(65)), (u32::MAX, 77));
        pages.store(65, 9, (1 << 40) - 1, 7);
        assert_eq!(pages.stored(65, 9), ((1 << 40) - 1, 7));
    }
}
