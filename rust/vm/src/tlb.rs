//! A vCPU's TLB and paging-structure caches: what keeps using a translation after its entry is gone.
//!
//! **Guarantee (of the danger, so to speak).** Nothing here watches the tables. A translation, or a pointer to a table, stays usable until it is evicted by
//! another one or until a *delivered* flush empties it; entries are tagged by the root's page, so a root that is left behind is only
//! unreachable, not flushed: if its page becomes a root again, the old translations are live again unless the load flushes
//! that tag. Whoever forgets a flush is found out here, not forgiven.
//!
//! **Mechanism.** One small set-associative array per page size, one direct-mapped array per upper level. A hit compares two words.
//! A write hits only where W and Dirty were seen at the fill: otherwise hardware walks again to set Dirty.

use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{LEVEL_1G, LEVEL_4K};

const WAYS: usize = 4;
const SETS: [usize; 3] = [256, 64, 4];
const STRUCTURES: usize = 32;
const EMPTY: u64 = u64::MAX;

/// A cached translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    tag: u64,
    root: u32,
    /// Level of the leaf.
    pub level: u8,
    /// Writes may go through.
    pub write: bool,
    /// Fetches may go through.
    pub exec: bool,
    /// The leaf as it was at the fill.
    pub spte: Spte,
}

impl Translation {
    /// Frame number behind `gfn` by this translation.
    #[inline]
    pub fn pfn(&self, gfn: u64) -> u64 {
        let low = (1u64 << (9 * (u32::from(self.level) - 1))) - 1;
        (self.spte.pfn() & !low) | gfn & low
    }
}

const NOTHING: Translation =
    Translation { tag: EMPTY, root: 0, level: 1, write: false, exec: false, spte: Spte(0) };

#[derive(Clone, Copy)]
struct Structure {
    tag: u64,
    root: u32,
    table: u32,
}

/// Counts of a TLB's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TlbStats {
    /// Translations filled.
    pub fills: u64,
    /// Flushes of everything.
    pub flushes: u64,
    /// Flushes of one root's tag (a load of that root).
    pub local_flushes: u64,
}

/// The translation caches of one vCPU; used by its thread alone.
pub struct Tlb {
    pages: [Vec<[Translation; WAYS]>; 3],
    /// Bit per level: something of that size was filled since the last full flush. Spares the probes of sizes not in use.
    sizes: u8,
    victim: u32,
    structures: [[Structure; STRUCTURES]; 3],
    stats: TlbStats,
}

impl Default for Tlb {
    fn default() -> Self {
        Self {
            pages: SETS.map(|sets| vec![[NOTHING; WAYS]; sets]),
            sizes: 0,
            victim: 0,
            structures: [[Structure { tag: EMPTY, root: 0, table: 0 }; STRUCTURES]; 3],
            stats: TlbStats::default(),
        }
    }
}

const fn shift(level: u8) -> u32 {
    9 * (level as u32 - 1)
}

impl Tlb {
    /// The translation of `gfn` under `root` that allows the access.
    #[inline]
    pub fn lookup(&self, root: u32, gfn: u64, write: bool, exec: bool) -> Option<&Translation> {
        let mut level = LEVEL_4K;
        while level <= LEVEL_1G {
            if self.sizes >> level & 1 != 0 {
                let tag = gfn >> shift(level);
                let sets = &self.pages[level as usize - 1];
                let set = &sets[tag as usize & (sets.len() - 1)];
                for entry in set {
                    if entry.tag == tag && entry.root == root {
                        return ((entry.write || !write) && (entry.exec || !exec)).then_some(entry);
                    }
                }
            }
            level += 1;
        }
        None
    }

    /// Caches a leaf. `write`: W and Dirty were both seen.
    pub fn fill(&mut self, root: u32, gfn: u64, level: u8, spte: Spte, write: bool, exec: bool) {
        let tag = gfn >> shift(level);
        let sets = &mut self.pages[level as usize - 1];
        let mask = sets.len() - 1;
        let set = &mut sets[tag as usize & mask];
        let way = set.iter().position(|e| e.tag == tag && e.root == root).unwrap_or_else(|| {
            set.iter().position(|e| e.tag == EMPTY).unwrap_or_else(|| {
                self.victim = self.victim.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (self.victim >> 16) as usize % WAYS
            })
        });
        set[way] = Translation { tag, root, level, write, exec, spte };
        self.sizes |= 1 << level;
        self.stats.fills += 1;
    }

    /// The lowest table on the path to `gfn` that is cached: (its level, its index).
    #[inline]
    pub fn structure(&self, root: u32, gfn: u64) -> Option<(u8, u32)> {
        for level in 1..=3u8 {
            let tag = gfn >> shift(level + 1);
            let entry = &self.structures[level as usize - 1][tag as usize % STRUCTURES];
            if entry.tag == tag && entry.root == root {
                return Some((level, entry.table));
            }
        }
        None
    }

    /// Caches that the table of `level` (1..=3) on the path to `gfn` is `table`.
    #[inline]
    pub fn fill_structure(&mut self, root: u32, gfn: u64, level: u8, table: u32) {
        if (1..=3).contains(&level) {
            let tag = gfn >> shift(level + 1);
            self.structures[level as usize - 1][tag as usize % STRUCTURES] = Structure { tag, root, table };
        }
    }

    /// Drops what is cached about `gfn` under `root`, as hardware does when an access faults.
    pub fn invalidate(&mut self, root: u32, gfn: u64) {
        for level in LEVEL_4K..=LEVEL_1G {
            let tag = gfn >> shift(level);
            let sets = &mut self.pages[level as usize - 1];
            let mask = sets.len() - 1;
            for entry in &mut sets[tag as usize & mask] {
                if entry.tag == tag && entry.root == root {
                    entry.tag = EMPTY;
                }
            }
            let tag = gfn >> shift(level + 1);
            let entry = &mut self.structures[level as usize - 1][tag as usize % STRUCTURES];
            if entry.tag == tag && entry.root == root {
                entry.tag = EMPTY;
            }
        }
    }

    /// A delivered flush: everything goes.
    pub fn flush(&mut self) {
        self.drop_where(|_| true);
        self.sizes = 0;
        self.stats.flushes += 1;
    }

    /// The local flush of a root load: what is tagged with `root` goes.
    pub fn flush_root(&mut self, root: u32) {
        self.drop_where(|r| r == root);
        self.stats.local_flushes += 1;
    }

    fn drop_where(&mut self, hit: impl Fn(u32) -> bool) {
        for (i, sets) in self.pages.iter_mut().enumerate() {
            if self.sizes >> (i + 1) & 1 != 0 {
                for entry in sets.iter_mut().flatten() {
                    if hit(entry.root) {
                        entry.tag = EMPTY;
                    }
                }
            }
        }
        for entry in self.structures.iter_mut().flatten() {
            if hit(entry.root) {
                entry.tag = EMPTY;
            }
        }
    }

    /// Translations cached under `root` now.
    pub fn count(&self, root: u32) -> usize {
        self.pages.iter().flatten().flatten().filter(|e| e.tag != EMPTY && e.root == root).count()
    }

    /// Counts so far.
    pub fn stats(&self) -> TlbStats {
        self.stats
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spte(pfn: u64) -> Spte {
        Spte(pfn << 12)
    }

    #[test]
    fn a_translation_stays_until_it_is_flushed() {
        let mut tlb = Tlb::default();
        tlb.fill(7, 0x12345, 1, spte(0x999), true, false);
        assert_eq!(tlb.lookup(7, 0x12345, true, false).map(|t| t.pfn(0x12345)), Some(0x999));
        assert!(tlb.lookup(8, 0x12345, false, false).is_none(), "another root's tag");
        tlb.flush_root(8);
        assert!(tlb.lookup(7, 0x12345, false, false).is_some());
        tlb.flush_root(7);
        assert!(tlb.lookup(7, 0x12345, false, false).is_none());
    }

    #[test]
    fn a_root_page_that_comes_back_finds_its_old_translations_unless_the_load_flushes() {
        let mut tlb = Tlb::default();
        tlb.fill(7, 1, 1, spte(5), true, true);
        // The vCPU loads root 9, then a new root that happens to get page 7.
        tlb.flush_root(9);
        assert!(tlb.lookup(7, 1, false, false).is_some(), "this is the danger");
        tlb.flush_root(7);
        assert!(tlb.lookup(7, 1, false, false).is_none());
    }

    #[test]
    fn a_write_needs_a_dirty_writable_fill() {
        let mut tlb = Tlb::default();
        tlb.fill(1, 3, 1, spte(5), false, true);
        assert!(tlb.lookup(1, 3, true, false).is_none() && tlb.lookup(1, 3, false, true).is_some());
        tlb.fill(1, 3, 1, spte(5), true, true);
        assert!(tlb.lookup(1, 3, true, false).is_some());
        assert_eq!(tlb.count(1), 1, "the better entry replaced the other");
    }

    #[test]
    fn huge_translations_cover_their_span() {
        let mut tlb = Tlb::default();
        tlb.fill(1, 512 * 512 + 5, 3, spte(1 << 18), true, true);
        let hit = tlb.lookup(1, 2 * 512 * 512 - 1, true, true).expect("same GiB");
        assert_eq!(hit.pfn(2 * 512 * 512 - 1), (1 << 18) + 512 * 512 - 1);
        assert!(tlb.lookup(1, 2 * 512 * 512, false, false).is_none());
    }

    #[test]
    fn the_lowest_cached_table_is_where_a_walk_begins() {
        let mut tlb = Tlb::default();
        tlb.fill_structure(1, 0x40000, 3, 30);
        assert_eq!(tlb.structure(1, 0x40001), Some((3, 30)));
        tlb.fill_structure(1, 0x40000, 1, 10);
        assert_eq!(tlb.structure(1, 0x40001), Some((1, 10)));
        assert_eq!(tlb.structure(1, 0x40200), Some((3, 30)));
        tlb.flush();
        assert_eq!(tlb.structure(1, 0x40001), None);
    }

    #[test]
    fn a_full_set_evicts_one_and_keeps_the_rest() {
        let mut tlb = Tlb::default();
        for i in 0..5u64 {
            tlb.fill(1, i * 256, 1, spte(i), true, true);
        }
        assert_eq!(tlb.count(1), 4);
        assert!(tlb.lookup(1, 4 * 256, true, true).is_some());
    }
}
