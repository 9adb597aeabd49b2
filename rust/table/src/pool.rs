//! The pool: pages by index, a hard cap, exact counts, caches that a task tops up before it takes a lock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tdpmmu_platform::{Event, NIL, NO_TASK, Observer, Reclaim};

use tdpmmu_spte::Spte;

use crate::arena::Arena;
use crate::freemap::{FreeMap, WORD_PAGES};
use crate::quarantine::{Quarantine, was_written};
use crate::{Entries, TABLE_BYTES, TableFlag, TableMeta, Tally, Uniform};

/// How large the pool may become, and what backs it.
#[derive(Clone, Copy, Debug)]
pub struct PoolConfig {
    /// Most tables that may exist at once.
    pub max_tables: u32,
    /// Ask for transparent huge pages.
    pub hugepages: bool,
    /// Poison what comes back from RCU, and use it again only when nothing else is left.
    pub quarantine: bool,
}

/// Why the pool could not serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// The cap is reached.
    #[error("out of table memory: {in_use} of {cap} page-table pages in use, {wanted} more wanted")]
    Exhausted {
        /// Tables in use or cached.
        in_use: u64,
        /// The cap, in tables.
        cap: u64,
        /// Tables asked for.
        wanted: u64,
    },
    /// The host refused address space or memory.
    #[error("the host refused {bytes} bytes for page tables: {reason}")]
    Host {
        /// Bytes asked for.
        bytes: u64,
        /// The host's word.
        reason: String,
    },
}

/// Exact counts, in tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PoolStats {
    /// Taken from the free map: in use plus cached.
    pub taken: u64,
    /// Highest `taken` so far.
    pub peak: u64,
    /// Allocations since creation.
    pub allocs: u64,
    /// Frees since creation.
    pub frees: u64,
    /// Requests refused by the cap.
    pub cap_hits: u64,
    /// Frees of a page that was free already: must stay 0.
    pub double_frees: u64,
    /// Pages that were written to in quarantine, found as they left it: must stay 0.
    pub overwritten: u64,
}

/// Table pages by index. Index 0 is never handed out, so that no entry points to it by accident.
pub struct TablePool {
    tables: Arena<Entries>,
    meta: Arena<TableMeta>,
    free: FreeMap,
    take: Mutex<()>,
    cap: u32,
    taken: AtomicU64,
    peak: AtomicU64,
    allocs: AtomicU64,
    frees: AtomicU64,
    cap_hits: AtomicU64,
    double_frees: AtomicU64,
    overwritten: AtomicU64,
    quarantine: Option<Quarantine>,
    committed: AtomicU64,
    observer: Option<Arc<dyn Observer>>,
    clock: Option<fn() -> u64>,
    last_reclaim: AtomicU64,
    waiting: AtomicU64,
    waiting_peak: AtomicU64,
    uniform: Option<Arc<Uniform>>,
}

impl TablePool {
    /// Reserves address space for `max_tables`; commits nothing.
    ///
    /// # Errors
    /// [`PoolError::Host`] when the host refuses the reservation.
    pub fn new(config: PoolConfig) -> Result<Self, PoolError> {
        // One word of slack: the page with index 0 and the word it spoils for runs.
        let len = config.max_tables as usize + 2 * WORD_PAGES;
        let host = |error: std::io::Error| PoolError::Host {
            bytes: (len * TABLE_BYTES) as u64,
            reason: error.to_string(),
        };
        Ok(Self {
            tables: Arena::reserve(len, config.hugepages).map_err(host)?,
            meta: Arena::reserve(len, config.hugepages).map_err(host)?,
            free: FreeMap::new(WORD_PAGES, len),
            take: Mutex::new(()),
            cap: config.max_tables,
            taken: AtomicU64::new(0),
            peak: AtomicU64::new(0),
            allocs: AtomicU64::new(0),
            frees: AtomicU64::new(0),
            cap_hits: AtomicU64::new(0),
            double_frees: AtomicU64::new(0),
            overwritten: AtomicU64::new(0),
            quarantine: config.quarantine.then(|| Quarantine::new(len)),
            committed: AtomicU64::new(0),
            observer: None,
            clock: None,
            last_reclaim: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            waiting_peak: AtomicU64::new(0),
            uniform: None,
        })
    }

    /// The same pool, stamping with `clock` when pages come back from RCU.
    #[must_use]
    pub fn clocked(mut self, clock: fn() -> u64) -> Self {
        self.clock = Some(clock);
        self
    }

    /// The same pool, able to hold leaf tables by count: for platforms whose accesses ask ([`Uniform`]).
    #[must_use]
    pub fn holding_by_count(mut self) -> Self {
        // SAFETY: the arena lives as long as the pool, and who expands or settles a table has it in hand.
        self.uniform = Some(Arc::new(unsafe { Uniform::new(self.tables.base(), self.tables.len()) }));
        self
    }

    /// The tables held by count, where the pool does that.
    #[inline]
    pub fn by_count(&self) -> Option<&Arc<Uniform>> {
        self.uniform.as_ref()
    }

    /// The begin of the tables, and their bytes.
    pub fn words(&self) -> (*const u8, usize) {
        (self.tables.base().as_ptr().cast_const().cast(), self.tables.len() * TABLE_BYTES)
    }

    /// When the last page came back from RCU, by the clock of [`TablePool::clocked`]; 0 before the first, or without one.
    pub fn last_reclaim(&self) -> u64 {
        self.last_reclaim.load(Ordering::Acquire)
    }

    /// The same pool, telling `observer` of every page that comes back from RCU.
    #[must_use]
    pub fn observed(mut self, observer: Option<Arc<dyn Observer>>) -> Self {
        self.observer = observer;
        self
    }

    /// Before the page is free: its next user's events must come later.
    #[inline]
    fn tell_free(&self, table: u32) {
        if let Some(observer) = &self.observer {
            observer.event(NO_TASK, &Event::TableFree { table });
        }
    }

    /// The cap, in tables.
    pub fn cap(&self) -> u64 {
        u64::from(self.cap)
    }

    /// Bytes of bookkeeping a table costs beside its 4 KiB: metadata and its bit.
    pub const fn overhead_bytes_per_table() -> f64 {
        size_of::<TableMeta>() as f64 + 1.0 / 8.0
    }

    /// Touches the first `tables` pages and headers now, outside any timed region.
    ///
    /// # Errors
    /// [`PoolError::Host`] when the host has not so much memory.
    pub fn prefault(&self, tables: u64) -> Result<(), PoolError> {
        if self.uniform.is_some() {
            return Ok(());
        }
        let to = (tables as usize + WORD_PAGES).min(self.cap as usize + 2 * WORD_PAGES);
        let from = self.committed.load(Ordering::Relaxed) as usize;
        let host = |error: std::io::Error| PoolError::Host {
            bytes: ((to - from.min(to)) * TABLE_BYTES) as u64,
            reason: error.to_string(),
        };
        self.tables.commit(from, to).map_err(host)?;
        self.meta.commit(from, to).map_err(host)?;
        self.committed.fetch_max(to as u64, Ordering::Relaxed);
        Ok(())
    }

    /// The 512 entries of table `index`.
    #[inline(always)]
    pub fn entries(&self, index: u32) -> &Entries {
        self.tables.get(index)
    }

    /// The entries of the table that the non-leaf `entry` points to. A walk's critical path: the frame bits of an entry *are* the
    /// table's byte offset, so that no shift stands between one read and the next.
    #[inline(always)]
    pub fn child_entries(&self, entry: Spte) -> &Entries {
        self.tables.at_offset(entry.raw() & Spte::PFN_MASK)
    }

    /// Where the tables lie: the first byte, and how many. For names in stories.
    pub fn region(&self) -> (*const u8, usize) {
        (self.tables.address(0).cast(), (self.cap as usize + 2 * WORD_PAGES) * TABLE_BYTES)
    }

    /// A name for the entry `offset` bytes into [`TablePool::region`].
    pub fn entry_name(&self, offset: usize) -> String {
        let table = (offset / TABLE_BYTES) as u32;
        format!("table {table} (level {})", self.meta(table).level())
    }

    /// The header of table `index`.
    #[inline(always)]
    pub fn meta(&self, index: u32) -> &TableMeta {
        self.meta.get(index)
    }

    /// Where the table lies, for prefetch hints only.
    #[inline(always)]
    pub fn address(&self, index: u32) -> *const Entries {
        self.tables.address(index)
    }

    fn reserve_count(&self, want: u64) -> Result<(), PoolError> {
        let cap = u64::from(self.cap);
        let taken = self
            .taken
            .fetch_update(Ordering::AcqRel, Ordering::Relaxed, |t| (t + want <= cap).then_some(t + want));
        match taken {
            Ok(before) => {
                self.peak.fetch_max(before + want, Ordering::Relaxed);
                Ok(())
            }
            Err(in_use) => {
                self.cap_hits.fetch_add(1, Ordering::Relaxed);
                Err(PoolError::Exhausted { in_use, cap, wanted: want })
            }
        }
    }

    /// Takes a run of `pages` neighbouring tables (1..=512), contents unspecified; the caller fills them whole.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] at the cap, or when no such run is left.
    pub fn alloc_run(&self, pages: usize) -> Result<u32, PoolError> {
        self.reserve_count(pages as u64)?;
        let run = {
            let _turn = self.take.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            loop {
                let run = self.free.take_run(pages);
                if run.is_some() || !self.end_quarantine() {
                    break run;
                }
            }
        };
        match run {
            Some(first) => {
                self.allocs.fetch_add(pages as u64, Ordering::Relaxed);
                Ok(first)
            }
            None => {
                let in_use = self.taken.fetch_sub(pages as u64, Ordering::AcqRel) - pages as u64;
                Err(PoolError::Exhausted { in_use, cap: u64::from(self.cap), wanted: pages as u64 })
            }
        }
    }

    /// The page that has been in quarantine longest becomes free; false: there is none. The caller serialises takers.
    #[cold]
    fn end_quarantine(&self) -> bool {
        let Some(page) = self.quarantine.as_ref().and_then(Quarantine::release) else { return false };
        let entries = self.entries(page);
        if was_written(entries) {
            self.overwritten.fetch_add(1, Ordering::Relaxed);
        }
        entries.iter().for_each(|entry| entry.store(0, Ordering::Relaxed));
        self.free.give(page)
    }

    /// The pages in quarantine that somebody has written to since they came back: must be none.
    pub fn overwritten(&self) -> Vec<u32> {
        let pages = self.quarantine.as_ref().map_or_else(Vec::new, Quarantine::pages);
        pages.into_iter().filter(|&page| was_written(self.entries(page))).collect()
    }

    /// Is the page in quarantine?
    pub fn is_quarantined(&self, index: u32) -> bool {
        self.quarantine.as_ref().is_some_and(|quarantine| quarantine.holds(index))
    }

    /// A page has come back from RCU: into quarantine.
    #[cold]
    fn isolate(&self, quarantine: &Quarantine, page: u32) {
        if self.free.has(page) || !quarantine.take_in(page, self.entries(page)) {
            self.double_frees.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.frees.fetch_add(1, Ordering::Relaxed);
        self.taken.fetch_sub(1, Ordering::AcqRel);
    }

    /// Gives one page back at once: only for a page that was never published.
    pub fn free_unpublished(&self, index: u32) {
        if self.is_quarantined(index) {
            self.double_frees.fetch_add(1, Ordering::Relaxed);
            return;
        }
        if let Some(uniform) = &self.uniform {
            uniform.release(index);
        }
        self.give(index as usize / WORD_PAGES, 1 << (index as usize % WORD_PAGES));
    }

    fn give(&self, word: usize, mask: u64) {
        let n = u64::from(mask.count_ones());
        let twice = self.free.give_word(word, mask);
        if twice != 0 {
            self.double_frees.fetch_add(u64::from(twice.count_ones()), Ordering::Relaxed);
        }
        let n = n - u64::from(twice.count_ones());
        self.frees.fetch_add(n, Ordering::Relaxed);
        self.taken.fetch_sub(n, Ordering::AcqRel);
    }

    /// The pages of `chain` are about to be handed to whoever frees them once no reader can be inside: they count as waiting until
    /// [`Reclaim::reclaim`] has them.
    pub fn begin_waiting(&self, chain: &DeadChain) {
        for page in chain.pages(self) {
            self.meta(page).set(TableFlag::Waiting);
        }
        let now = self.waiting.fetch_add(u64::from(chain.len()), Ordering::Relaxed) + u64::from(chain.len());
        self.waiting_peak.fetch_max(now, Ordering::Relaxed);
    }

    #[cold]
    fn stop_waiting(&self, page: u32) {
        if self.meta(page).clear(TableFlag::Waiting) {
            self.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Pages that wait for readers ([`TablePool::begin_waiting`]).
    pub fn waiting(&self) -> u64 {
        self.waiting.load(Ordering::Relaxed)
    }

    /// The most that waited at once.
    pub fn waiting_peak(&self) -> u64 {
        self.waiting_peak.load(Ordering::Relaxed)
    }

    /// The counts now.
    pub fn stats(&self) -> PoolStats {
        PoolStats {
            taken: self.taken.load(Ordering::Acquire),
            peak: self.peak.load(Ordering::Relaxed),
            allocs: self.allocs.load(Ordering::Relaxed),
            frees: self.frees.load(Ordering::Relaxed),
            cap_hits: self.cap_hits.load(Ordering::Relaxed),
            double_frees: self.double_frees.load(Ordering::Relaxed),
            overwritten: self.overwritten.load(Ordering::Relaxed),
        }
    }
}

impl Reclaim for TablePool {
    /// Frees a chain linked through `rcu_link`; neighbours go back with one atomic operation per 64.
    fn reclaim(&self, head: u32) -> usize {
        let (mut at, mut freed) = (head, 0);
        let (mut word, mut mask) = (usize::MAX, 0u64);
        while at != NIL {
            // The link must be read before the page is given back: its next user overwrites it.
            let next = self.meta(at).rcu_link.load(Ordering::Acquire);
            let (w, bit) = (at as usize / WORD_PAGES, 1u64 << (at as usize % WORD_PAGES));
            if w != word || mask & bit != 0 {
                if mask != 0 {
                    self.give(word, mask);
                }
                (word, mask) = (w, 0);
            }
            self.tell_free(at);
            if self.meta(at).has(TableFlag::Waiting) {
                self.stop_waiting(at);
            }
            if let Some(uniform) = &self.uniform {
                uniform.release(at);
            }
            match &self.quarantine {
                Some(quarantine) => self.isolate(quarantine, at),
                None => mask |= bit,
            }
            freed += 1;
            at = next;
        }
        if mask != 0 {
            self.give(word, mask);
        }
        // Once a chain: the pages of one chain are back when the last is.
        if let Some(clock) = self.clock.filter(|_| freed != 0) {
            self.last_reclaim.fetch_max(clock(), Ordering::AcqRel);
        }
        freed
    }
}

/// A task's private stock of pages, topped up outside locks so that a fault never allocates under one.
#[derive(Default)]
pub struct TableCache {
    pages: Vec<u32>,
    tally: Option<Arc<Tally>>,
}

impl TableCache {
    /// Pages taken at a time: enough for several faults that need a full path.
    const REFILL: usize = 16;

    /// Makes sure that `min` pages can be popped; `init` sees each new one once.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] at the cap; what was cached stays cached.
    pub fn top_up(
        &mut self,
        pool: &TablePool,
        min: usize,
        mut init: impl FnMut(u32),
    ) -> Result<(), PoolError> {
        if self.pages.len() >= min {
            return Ok(());
        }
        // Near the cap the comfortable refill may fail where the needed one succeeds.
        for want in [Self::REFILL.max(min) - self.pages.len(), min - self.pages.len()] {
            match pool.reserve_count(want as u64) {
                Ok(()) => {
                    let had = self.pages.len();
                    let got = {
                        let _turn = pool.take.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
                        let mut got = pool.free.take_some(&mut self.pages, want);
                        while self.pages.len() < min && pool.end_quarantine() {
                            got += pool.free.take_some(&mut self.pages, 1);
                        }
                        got
                    };
                    pool.allocs.fetch_add(got as u64, Ordering::Relaxed);
                    if got < want {
                        pool.taken.fetch_sub((want - got) as u64, Ordering::AcqRel);
                    }
                    self.pages[had..].iter().for_each(|&page| init(page));
                    // Popping takes from the end: lowest index first keeps runs.
                    self.pages.sort_unstable_by(|a, b| b.cmp(a));
                    if self.pages.len() >= min {
                        return Ok(());
                    }
                }
                Err(error) if want + self.pages.len() == min => return Err(error),
                Err(_) => {}
            }
        }
        Err(PoolError::Exhausted { in_use: pool.stats().taken, cap: pool.cap(), wanted: min as u64 })
    }

    /// One page, contents unspecified.
    pub fn pop(&mut self) -> Option<u32> {
        self.pages.pop()
    }

    /// Puts back a page that was popped and never published.
    pub fn push(&mut self, index: u32) {
        self.pages.push(index);
    }

    /// Gives the cache a counter of its own; whoever made it sums.
    pub fn adopt(&mut self, tally: Arc<Tally>) {
        self.tally = Some(tally);
    }

    /// Has it a counter?
    pub fn has_tally(&self) -> bool {
        self.tally.is_some()
    }

    /// Counts `count` leaves of `level` on the cache's own counter; false: it has none.
    #[inline]
    pub fn count_leaves(&mut self, level: u8, count: i64) -> bool {
        match &self.tally {
            Some(tally) => {
                tally.add(level, count);
                true
            }
            None => false,
        }
    }

    /// Pages in stock.
    pub fn len(&self) -> usize {
        self.pages.len()
    }

    /// Nothing in stock?
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty()
    }

    /// Gives the stock back to the pool.
    pub fn drain(&mut self, pool: &TablePool) {
        for index in self.pages.drain(..) {
            pool.free_unpublished(index);
        }
    }
}

/// A chain of dead tables, built by the task that unlinked them and spliced into RCU in one step.
pub struct DeadChain {
    head: u32,
    tail: u32,
    count: u32,
}

impl Default for DeadChain {
    fn default() -> Self {
        Self { head: NIL, tail: NIL, count: 0 }
    }
}

impl DeadChain {
    /// Appends `index`, linking through its own header.
    #[inline]
    pub fn push(&mut self, pool: &TablePool, index: u32) {
        pool.meta(index).rcu_link.store(NIL, Ordering::Relaxed);
        if self.tail == NIL {
            self.head = index;
        } else {
            pool.meta(self.tail).rcu_link.store(index, Ordering::Relaxed);
        }
        self.tail = index;
        self.count += 1;
    }

    /// Tables in the chain.
    pub fn len(&self) -> u32 {
        self.count
    }

    /// No table in the chain?
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// The tables in the chain, in the order in which they came.
    pub fn pages<'p>(&self, pool: &'p TablePool) -> impl Iterator<Item = u32> + 'p {
        std::iter::successors((self.head != NIL).then_some(self.head), |&at| {
            let next = pool.meta(at).rcu_link.load(Ordering::Relaxed);
            (next != NIL).then_some(next)
        })
    }

    /// Takes (head, tail's link, count) and leaves the chain empty.
    pub fn take<'p>(&mut self, pool: &'p TablePool) -> Option<(u32, &'p AtomicU32, u32)> {
        let (head, tail, count) = (self.head, self.tail, self.count);
        *self = Self::default();
        (head != NIL).then(|| (head, &pool.meta(tail).rcu_link, count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(max_tables: u32) -> TablePool {
        TablePool::new(PoolConfig { max_tables, hugepages: false, quarantine: false })
            .expect("a small reservation")
    }

    #[test]
    fn the_cap_is_hard_and_the_count_exact() {
        let pool = pool(10);
        let mut cache = TableCache::default();
        cache.top_up(&pool, 5, |_| {}).expect("room");
        assert_eq!(pool.stats().taken, 5, "the comfortable refill did not fit, the needed one did");
        let mut other = TableCache::default();
        other.top_up(&pool, 5, |_| {}).expect("room for exactly five");
        let error = other.top_up(&pool, 6, |_| {}).expect_err("one too many");
        assert_eq!(error, PoolError::Exhausted { in_use: 10, cap: 10, wanted: 1 });
        cache.drain(&pool);
        other.drain(&pool);
        assert_eq!(pool.stats().taken, 0);
        assert_eq!(pool.stats().cap_hits, 4, "three comfortable refills, and the page too many");
    }

    #[test]
    fn a_chain_is_reclaimed_whole_and_its_run_comes_back() {
        // Room for one such run and no other.
        let pool = pool(512);
        let first = pool.alloc_run(512).expect("room");
        let mut chain = DeadChain::default();
        for i in 0..512 {
            chain.push(&pool, first + i);
        }
        let (head, tail, count) = chain.take(&pool).expect("not empty");
        assert_eq!((count, tail.load(Ordering::Relaxed)), (512, NIL));
        assert_eq!(pool.reclaim(head), 512);
        assert_eq!(pool.stats().taken, 0);
        assert_eq!(pool.alloc_run(512), Ok(first));
    }

    #[test]
    fn only_what_comes_back_from_rcu_moves_the_stamp_of_the_last_reclaim() {
        static NOW: AtomicU64 = AtomicU64::new(7);
        let pool = pool(64).clocked(|| NOW.load(Ordering::Relaxed));
        let (first, second) = (pool.alloc_run(1).expect("room"), pool.alloc_run(1).expect("room"));
        pool.free_unpublished(first);
        assert_eq!(pool.reclaim(NIL), 0);
        assert_eq!(pool.last_reclaim(), 0, "neither an unpublished page nor an empty chain");
        let mut chain = DeadChain::default();
        chain.push(&pool, second);
        let (head, _, _) = chain.take(&pool).expect("not empty");
        assert_eq!(pool.reclaim(head), 1);
        assert_eq!(pool.last_reclaim(), 7);
        NOW.store(9, Ordering::Relaxed);
        assert_eq!(pool.last_reclaim(), 7);
    }

    #[test]
    fn pages_wait_until_they_are_reclaimed_and_the_peak_stays() {
        let pool = pool(64);
        let (first, second) = (pool.alloc_run(1).expect("room"), pool.alloc_run(1).expect("room"));
        let (mut waits, mut does_not) = (DeadChain::default(), DeadChain::default());
        waits.push(&pool, first);
        does_not.push(&pool, second);
        assert_eq!(waits.pages(&pool).collect::<Vec<_>>(), [first]);
        pool.begin_waiting(&waits);
        for chain in [&mut does_not, &mut waits] {
            assert_eq!(pool.waiting(), 1);
            let (head, _, _) = chain.take(&pool).expect("not empty");
            assert_eq!(pool.reclaim(head), 1);
        }
        assert_eq!((pool.waiting(), pool.waiting_peak(), pool.stats().taken), (0, 1, 0));
        assert!(!pool.meta(first).has(TableFlag::Waiting));
    }

    #[test]
    fn freeing_twice_is_counted_and_corrupts_no_count() {
        let pool = pool(64);
        let page = pool.alloc_run(1).expect("room");
        pool.free_unpublished(page);
        pool.free_unpublished(page);
        let stats = pool.stats();
        assert_eq!((stats.double_frees, stats.taken), (1, 0));
    }

    #[test]
    fn a_page_from_rcu_waits_poisoned_until_nothing_else_is_left_and_tells_who_wrote_to_it() {
        let config = PoolConfig { max_tables: 4, hugepages: false, quarantine: true };
        let pool = TablePool::new(config).expect("a small reservation");
        let free = |page| {
            let mut chain = DeadChain::default();
            chain.push(&pool, page);
            let (head, _, _) = chain.take(&pool).expect("not empty");
            assert_eq!(pool.reclaim(head), 1);
        };
        let (first, second) = (pool.alloc_run(1).expect("room"), pool.alloc_run(1).expect("room"));
        let poisoned = |page| pool.entries(page).iter().all(|e| e.load(Ordering::Relaxed) == Spte::POISON);
        free(first);
        free(second);
        assert!(poisoned(first) && poisoned(second) && pool.is_quarantined(first));
        assert_eq!(pool.stats().taken, 0);
        free(first);
        pool.free_unpublished(second);
        assert_eq!((pool.stats().double_frees, pool.stats().taken), (2, 0));
        // As many other pages as the free map has; each comes back as never published.
        for _ in 0..WORD_PAGES {
            let page = pool.alloc_run(1).expect("room");
            assert!(page != first && page != second);
            pool.free_unpublished(page);
        }
        assert_eq!(pool.overwritten(), []);
        pool.entries(second)[17].store(1, Ordering::Relaxed);
        assert_eq!(pool.overwritten(), [second]);
        // All that is free at once: the quarantine gives its own last, and in order.
        let all = pool.free.count() as usize;
        let mut taken = Vec::new();
        assert_eq!(pool.free.take_some(&mut taken, all), all);
        assert_eq!(pool.alloc_run(1), Ok(first));
        assert_eq!((pool.alloc_run(1), pool.stats().overwritten), (Ok(second), 1));
        assert!(pool.alloc_run(1).is_err());
    }

    #[test]
    fn index_zero_is_never_a_table() {
        let pool = pool(200);
        let mut seen = Vec::new();
        while let Ok(run) = pool.alloc_run(1) {
            seen.push(run);
        }
        assert_eq!(seen.len(), 200);
        assert!(!seen.contains(&0));
    }
}
