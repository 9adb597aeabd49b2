//! Leaf tables held by count: a machine larger than this one.
//!
//! **Guarantee.** A table that is held by count reads as the page would that it stands for, and the first change makes it that page ([`HeldWords::expand`]). What changes as a
//! whole ([`Uniform::set_all`]) stays a description. A page that has become one value again goes back to the host ([`Uniform::settle`]).
//!
//! **Mechanism.** A bulk population makes runs of tables whose entries follow each other: first entry, step from entry to entry, stride from table to table. A run is one
//! record, however many tables it has; tables that change whole leave it at its ends, or split it. A bit a table says "not a page", so that who asks about pages pays one
//! load. Only platforms with [`Platform::BY_COUNT`](tdpmmu_platform::Platform::BY_COUNT) have any of this.

use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tdpmmu_platform::HeldWords;

use crate::{Entries, TABLE_BYTES};

/// What a table that is held by count contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// Its entry 0.
    pub first: u64,
    /// From each entry to the next; 0: all are the same.
    pub step: u64,
}

impl Held {
    /// Entry `index`.
    #[inline]
    pub const fn entry(self, index: usize) -> u64 {
        self.first.wrapping_add(self.step.wrapping_mul(index as u64))
    }
}

/// Tables that follow each other, each as `Held` says, the first entry `stride` further from table to table.
#[derive(Clone, Copy, Debug)]
struct Run {
    tables: u32,
    held: Held,
    stride: u64,
}

impl Run {
    fn at(&self, n: u32) -> Held {
        Held { first: self.held.first.wrapping_add(self.stride.wrapping_mul(u64::from(n))), ..self.held }
    }

    fn continues_in(&self, next: &Run) -> bool {
        self.held.step == next.held.step && self.stride == next.stride && self.at(self.tables) == next.held
    }
}

/// How many tables were what.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UniformStats {
    /// Held by count now.
    pub held: u64,
    /// Held by count at most, at a time.
    pub held_peak: u64,
    /// Runs that describe them now.
    pub runs: u64,
    /// Made real because a single word was to change.
    pub expanded: u64,
    /// Of these, given back when all of their words had become the same.
    pub settled: u64,
    /// Changes of whole tables in one event.
    pub whole: u64,
}

#[derive(Default)]
struct Books {
    runs: BTreeMap<u32, Run>,
    expanded: BTreeSet<u32>,
    stats: UniformStats,
}

impl Books {
    /// The run that has `table`, and where it begins.
    fn find(&self, table: u32) -> Option<(u32, Run)> {
        let (&begin, &run) = self.runs.range(..=table).next_back()?;
        (table - begin < run.tables).then_some((begin, run))
    }

    /// Takes `table` out of its run.
    fn take(&mut self, table: u32) -> Option<Held> {
        let (begin, run) = self.find(table)?;
        let n = table - begin;
        if n == 0 {
            self.runs.remove(&begin);
        } else {
            self.runs.insert(begin, Run { tables: n, ..run });
        }
        if n + 1 < run.tables {
            self.runs.insert(table + 1, Run { tables: run.tables - n - 1, held: run.at(n + 1), ..run });
        }
        self.stats.held -= 1;
        Some(run.at(n))
    }

    /// Adds a run, as a part of the one before it where it continues that.
    fn put(&mut self, table: u32, run: Run) {
        self.stats.held += u64::from(run.tables);
        self.stats.held_peak = self.stats.held_peak.max(self.stats.held);
        if let Some((_, before)) = self
            .runs
            .range_mut(..table)
            .next_back()
            .filter(|(begin, before)| **begin + before.tables == table && before.continues_in(&run))
        {
            before.tables += run.tables;
            return;
        }
        self.runs.insert(table, run);
    }
}

/// The tables of a pool that are held by count. See the module's text.
pub struct Uniform {
    pages: NonNull<Entries>,
    bits: Vec<AtomicU64>,
    books: Mutex<Books>,
}

// SAFETY: `pages` is the pool's arena, whose elements are atomics; everything else is an atomic or behind a mutex.
unsafe impl Send for Uniform {}
// SAFETY: as above.
unsafe impl Sync for Uniform {}

impl Uniform {
    /// # Safety
    /// `pages` is the begin of `len` tables that stay mapped as long as anybody expands or settles one.
    pub(crate) unsafe fn new(pages: NonNull<Entries>, len: usize) -> Self {
        Self {
            pages,
            bits: (0..len.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            books: Mutex::default(),
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[inline(always)]
    fn bit(&self, table: u32) -> (&AtomicU64, u64) {
        (&self.bits[table as usize / 64], 1 << (table % 64))
    }

    /// Is the table held by count?
    #[inline(always)]
    pub fn holds(&self, table: u32) -> bool {
        let (word, bit) = self.bit(table);
        word.load(Ordering::Relaxed) & bit != 0
    }

    fn entries(&self, table: u32) -> &Entries {
        debug_assert!((table as usize) < self.bits.len() * 64);
        // SAFETY: a table of the pool, which is mapped while it is in use (the promise of `new`); zero bytes are valid atomics.
        unsafe { self.pages.add(table as usize).as_ref() }
    }

    /// Holds `tables` tables from `table` on, which are nobody's pages yet: entry i of table n is `first + n * stride + i * step`.
    pub fn hold(&self, table: u32, tables: u32, first: u64, step: u64, stride: u64) {
        for n in table..table + tables {
            let (word, bit) = self.bit(n);
            word.fetch_or(bit, Ordering::Relaxed);
        }
        let mut books = self.books();
        for n in table..table + tables {
            books.expanded.remove(&n);
        }
        books.put(table, Run { tables, held: Held { first, step }, stride });
    }

    /// What the table contains, if it is held by count.
    pub fn get(&self, table: u32) -> Option<Held> {
        if !self.holds(table) {
            return None;
        }
        self.books().find(table).map(|(begin, run)| run.at(table - begin))
    }

    /// Every entry of a table that is held becomes `value`, in one event.
    pub fn set_all(&self, table: u32, value: u64) {
        let mut books = self.books();
        if books.take(table).is_some() {
            books.stats.whole += 1;
            books.put(table, Run { tables: 1, held: Held { first: value, step: 0 }, stride: 0 });
        }
    }

    /// The table is nobody's any more.
    pub fn release(&self, table: u32) {
        let (word, bit) = self.bit(table);
        let held = word.fetch_and(!bit, Ordering::Relaxed) & bit != 0;
        let mut books = self.books();
        if held {
            books.take(table);
        } else {
            books.expanded.remove(&table);
        }
    }

    /// An expanded table that has come to hold one value only is held by count again, and its page goes back to the host.
    pub fn settle(&self, table: u32) {
        let mut books = self.books();
        if !books.expanded.contains(&table) {
            return;
        }
        let entries = self.entries(table);
        let value = entries[0].load(Ordering::Relaxed);
        if entries.iter().any(|entry| entry.load(Ordering::Relaxed) != value) {
            return;
        }
        books.expanded.remove(&table);
        books.stats.settled += 1;
        books.put(table, Run { tables: 1, held: Held { first: value, step: 0 }, stride: 0 });
        let (word, bit) = self.bit(table);
        word.fetch_or(bit, Ordering::Relaxed);
        // SAFETY: one page of the pool's private mapping; its contents are of no use any more, and reads of it are answered from the books.
        unsafe {
            libc::madvise(std::ptr::from_ref(entries).cast_mut().cast(), TABLE_BYTES, libc::MADV_DONTNEED)
        };
    }

    /// The counts so far.
    pub fn stats(&self) -> UniformStats {
        let books = self.books();
        UniformStats { runs: books.runs.len() as u64, ..books.stats }
    }
}

impl HeldWords for Uniform {
    fn read(&self, offset: usize) -> Option<u64> {
        let held = self.get((offset / TABLE_BYTES) as u32)?;
        Some(held.entry(offset % TABLE_BYTES / 8))
    }

    fn expand(&self, offset: usize) {
        let table = (offset / TABLE_BYTES) as u32;
        if !self.holds(table) {
            return;
        }
        let mut books = self.books();
        let Some(held) = books.take(table) else { return };
        for (index, entry) in self.entries(table).iter().enumerate() {
            entry.store(held.entry(index), Ordering::Relaxed);
        }
        books.stats.expanded += 1;
        books.expanded.insert(table);
        let (word, bit) = self.bit(table);
        word.fetch_and(!bit, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use crate::{PoolConfig, TablePool};

    use super::*;

    fn pool() -> TablePool {
        let config = PoolConfig { max_tables: 4096, hugepages: false, quarantine: false };
        TablePool::new(config).expect("a small reservation").holding_by_count()
    }

    fn offset(table: u32, index: usize) -> usize {
        table as usize * TABLE_BYTES + index * 8
    }

    #[test]
    fn a_run_of_tables_is_one_record_and_reads_like_its_pages() {
        let pool = pool();
        let held = pool.by_count().expect("asked for");
        let run = pool.alloc_run(512).expect("room");
        held.hold(run, 512, 0x1007, 1 << 12, 512 << 12);
        for (table, index) in [(0, 0), (0, 511), (1, 0), (511, 511)] {
            let flat = u64::from(table) * 512 + index as u64;
            assert_eq!(held.read(offset(run + table, index)), Some(0x1007 + (flat << 12)));
        }
        assert_eq!(held.read(offset(run + 512, 0)), None);
        assert_eq!((held.stats().held, held.stats().runs), (512, 1));
    }

    #[test]
    fn a_change_makes_one_page_real_and_one_value_gives_it_back() {
        let pool = pool();
        let held = pool.by_count().expect("asked for");
        let run = pool.alloc_run(8).expect("room");
        held.hold(run, 8, 0x1007, 1 << 12, 512 << 12);
        held.expand(offset(run + 3, 9));
        assert!(!held.holds(run + 3) && held.holds(run + 2) && held.holds(run + 4));
        let page = pool.entries(run + 3);
        for (index, entry) in page.iter().enumerate() {
            assert_eq!(entry.load(Ordering::Relaxed), 0x1007 + ((3 * 512 + index as u64) << 12));
        }
        held.settle(run + 3);
        assert!(!held.holds(run + 3), "its words differ");
        page.iter().for_each(|entry| entry.store(5, Ordering::Relaxed));
        held.settle(run + 3);
        assert_eq!(held.read(offset(run + 3, 77)), Some(5));
        assert_eq!(page[77].load(Ordering::Relaxed), 0, "the page is the host's again");
        let stats = held.stats();
        assert_eq!((stats.expanded, stats.settled, stats.held, stats.runs), (1, 1, 8, 3));
    }

    #[test]
    fn tables_that_change_whole_in_order_stay_two_records() {
        let pool = pool();
        let held = pool.by_count().expect("asked for");
        let run = pool.alloc_run(64).expect("room");
        held.hold(run, 64, 0x1007, 1 << 12, 512 << 12);
        for n in 0..40 {
            held.set_all(run + n, 0);
        }
        assert_eq!((held.stats().runs, held.stats().whole), (2, 40));
        assert_eq!(held.get(run + 39), Some(Held { first: 0, step: 0 }));
        assert_eq!(held.get(run + 40).map(|held| held.first), Some(0x1007 + ((40 * 512) << 12)));
        for n in 0..64 {
            held.release(run + n);
        }
        assert_eq!((held.stats().held, held.stats().runs, held.get(run + 50)), (0, 0, None));
    }
}
