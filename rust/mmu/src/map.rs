//! The fault's map step: install one leaf, building the tables above it.
//!
//! **Guarantee.** A fault that returns [`MapOutcome::Retry`] has changed nothing it owes and leaked no page; of several vCPUs that race for an entry one wins, the others
//! retry. A leaf is installed at the goal level, one lower for each table on the way that the NX mitigation keeps, and nowhere else. Nothing is ever written over a frozen entry, and the test for it precedes
//! every other (bug-history 27, 28).
//!
//! **Mechanism.** Shared lock, RCU section, one descent from the root: each entry is read once, decided upon, and changed by compare-exchange. A new table is complete (header and
//! 512 entries) before the compare-exchange that links it, and is not touched by the linker afterwards (rule R9). A huge leaf in the way is split in
//! place (6.2+), or zapped and replaced by an empty table (5.19-6.1: freeze, flush, empty, link). What the leaf holds is `make_leaf`'s business, old entry included: up to 6.12
//! a leaf that is made again over a writable one lacks Dirty; from 6.14 on a leaf that allows the access is left as it is, and a prefetch changes none.

use std::sync::atomic::Ordering;

use tdpmmu_platform::{Bug, Event, Fault, Guard, Platform, Shared, Site, Task};
use tdpmmu_spte::geometry::{ENTRIES, index, round_down, span};
use tdpmmu_spte::{
    Access, AdMode, AtomicZapOrder, FormatKind, LEVEL_1G, MadeLeaf, MakeLeaf, MarkDirty, ReplaceFlushSpan,
    Role, SplitInFault, Spte,
};
use tdpmmu_table::{PoolError, TableCache};

use crate::TdpMmu;
use crate::change::{self, At};
use crate::ledger::Ledger;

/// What a gfn is backed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame {
    /// A host page: the frame of the faulting gfn, and whether the host maps it writable.
    Page {
        /// Host frame of the faulting gfn (not aligned to the goal level).
        pfn: u64,
        /// May the guest write it?
        writable: bool,
    },
    /// No memslot: an MMIO SPTE of this memslot generation.
    Mmio {
        /// The generation to store (its low 19 bits are kept).
        generation: u64,
    },
}

/// One fault, resolved as far as the lock.
#[derive(Clone, Copy, Debug)]
pub struct MapFault {
    /// The faulting gfn.
    pub gfn: u64,
    /// Address space (1: SMM).
    pub as_id: u8,
    /// What backs it.
    pub frame: Frame,
    /// Level to map at: 1 (4K), 2 (2M) or 3 (1G). 1 where the slot logs dirty pages, and for a fetch under the NX mitigation.
    pub goal_level: u8,
    /// Level that slot and host would allow without the NX mitigation; 1 where the slot logs dirty pages. At least `goal_level`.
    pub req_level: u8,
    /// A fetch under the NX mitigation: huge mappings are out of the question for it.
    pub huge_page_disallowed: bool,
    /// A write access.
    pub write: bool,
    /// An instruction fetch.
    pub exec: bool,
    /// Not asked for by the guest: no Accessed bit.
    pub prefetch: bool,
    /// The slot logs dirty pages.
    pub dirty_tracked: bool,
}

impl MapFault {
    /// A write to `gfn` of address space 0, backed by a writable host page `pfn`, to be mapped at `level`: what most faults are.
    pub const fn page(gfn: u64, pfn: u64, level: u8) -> Self {
        Self {
            gfn,
            as_id: 0,
            frame: Frame::Page { pfn, writable: true },
            goal_level: level,
            req_level: level,
            huge_page_disallowed: false,
            write: true,
            exec: false,
            prefetch: false,
            dirty_tracked: false,
        }
    }
}

/// What became of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MapOutcome {
    /// The leaf is installed.
    Fixed {
        /// Its level.
        level: u8,
        /// Its value.
        spte: Spte,
    },
    /// It was there already.
    Spurious,
    /// Somebody else was faster or owns an entry on the path: fault again.
    Retry,
    /// MMIO: emulate the access.
    Emulate,
    /// The page may not be written by the guest: emulate the write.
    WriteProtected,
}

impl<P: Platform> TdpMmu<P> {
    /// Tables that a fault may need: one for each level below the root, and one to spare for a root.
    pub fn fault_tables(&self) -> usize {
        self.root_level() as usize
    }

    /// Fills `cache` so that a fault cannot fail for want of a table; outside all locks. New pages are empty (512 non-present values).
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] at the cap.
    #[inline]
    pub fn top_up(&self, task: &Task<P>, cache: &mut TableCache) -> Result<(), PoolError> {
        self.top_up_at(task, cache, Site::AllocFault)
    }

    #[inline(always)]
    pub(crate) fn top_up_at(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        site: Site,
    ) -> Result<(), PoolError> {
        // Asked also where the cache has enough: a fault at each place where it might not have had.
        self.may_allocate(site, self.fault_tables() as u64)?;
        if cache.len() >= self.fault_tables() {
            return Ok(());
        }
        self.refill(task, cache, site)
    }

    /// A place where the pool is asked for `wanted` tables: fault injection may have it refuse.
    #[inline(always)]
    pub(crate) fn may_allocate(&self, site: Site, wanted: u64) -> Result<(), PoolError> {
        if P::inject(Fault::Alloc, site) {
            let in_use = self.pool().stats().taken;
            return Err(PoolError::Exhausted { in_use, cap: self.pool().cap(), wanted });
        }
        Ok(())
    }

    #[cold]
    fn refill(&self, task: &Task<P>, cache: &mut TableCache, site: Site) -> Result<(), PoolError> {
        task.might_sleep();
        P::point(site);
        if !cache.has_tally() {
            cache.adopt(self.new_tally());
        }
        cache.top_up(self.pool(), self.fault_tables(), |page| self.fill_empty(page))
    }

    pub(crate) fn fill_empty(&self, table: u32) {
        let empty = self.format().empty().raw();
        for entry in self.pool().entries(table) {
            entry.store(empty, Ordering::Relaxed);
        }
    }

    /// Takes an empty page from the cache and writes its header.
    pub(crate) fn pop_table(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        role: u32,
        gfn: u64,
        level: u8,
        parent: Option<(u32, u16)>,
    ) -> Result<u32, PoolError> {
        let Some(table) = cache.pop() else {
            let stats = self.pool().stats();
            return Err(PoolError::Exhausted { in_use: stats.taken, cap: self.pool().cap(), wanted: 1 });
        };
        P::point(Site::TableAlloc);
        self.pool().meta(table).init(role, gfn, level, parent);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::TableAlloc { table, level, gfn });
        }
        Ok(table)
    }

    /// Maps one gfn under `root`. The caller holds the lock shared, has topped the cache up and has tested for staleness.
    pub fn map(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        cache: &mut TableCache,
        root: u32,
        fault: &MapFault,
    ) -> MapOutcome {
        self.map_at(guard, cache, root, fault).0
    }

    /// As [`TdpMmu::map`], and the level that the fault ended at: less than its goal where the NX mitigation keeps a table.
    #[inline]
    pub fn map_at(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        cache: &mut TableCache,
        root: u32,
        fault: &MapFault,
    ) -> (MapOutcome, u8) {
        let task = guard.task();
        let _rcu = (!P::bug(Bug::C08)).then(|| task.rcu_read());
        match self.descend(task, cache, root, fault) {
            Ok((table, old, level)) => {
                let cell = &self.pool().entries(table)[index(fault.gfn, level)];
                (self.map_leaf(task, cache, cell, goal(root, fault, level), old, fault), level)
            }
            Err(outcome) => (outcome, fault.goal_level),
        }
    }

    /// Maps `count` gfns from `first.gfn` on to consecutive frames, as many faults would, but with one descent and one
    /// booking: up to the end of the table that holds the first leaf. Returns how many are mapped now (new or found so);
    /// fewer than asked and room for mean that the next one must go through [`TdpMmu::map`].
    pub fn map_range(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        cache: &mut TableCache,
        root: u32,
        first: &MapFault,
        count: u64,
    ) -> Result<u64, MapOutcome> {
        let Frame::Page { pfn, writable } = first.frame else { return Err(MapOutcome::Emulate) };
        let task = guard.task();
        let _rcu = task.rcu_read();
        let (table, _, level) = self.descend(task, cache, root, first)?;
        if level != first.goal_level {
            return Ok(0);
        }
        let (slot, unit) = (index(first.gfn, first.goal_level), span(first.goal_level));
        let cells = &self.pool().entries(table)[slot..];
        let room = count.min(cells.len() as u64);
        let goal = goal(root, first, level);
        let empty = self.format().empty();
        let template = self.leaf_for(first, goal, pfn & !(unit - 1), writable, empty);
        // One step a leaf, nothing else: the fast loop ends at the first entry that is not simply empty.
        let plain = self.observer().is_none() && !template.mark_dirty;
        let (mut new, mut done) = (0, 0);
        while done < room {
            if plain {
                let mut leaf = template.spte.raw() + ((done * unit) << 12);
                let run = cells[done as usize..room as usize].iter().take_while(|cell| {
                    let fresh = P::cmpxchg(cell, empty.raw(), leaf, Site::SpteInstall).is_ok();
                    leaf += unit << 12;
                    fresh
                });
                let run = run.count() as u64;
                new += run;
                done += run;
                if done == room {
                    break;
                }
            }
            // Something is there, or somebody wants to know: the single step has all the cases.
            let gfn = first.gfn + done * unit;
            let frame = Frame::Page { pfn: pfn + done * unit, writable };
            let (fault, at) = (MapFault { gfn, frame, ..*first }, At { gfn: goal.gfn + done * unit, ..goal });
            let cell = &cells[done as usize];
            let old = Spte(P::load(cell, Site::SpteRead));
            let frozen = self.format().is_frozen(old);
            if frozen || self.map_leaf(task, cache, cell, at, old, &fault) == MapOutcome::Retry {
                break;
            }
            done += 1;
        }
        task.count(0, new);
        self.leaves_made(cache, first.goal_level, new as i64);
        Ok(done)
    }

    /// Walks from `root` to the table of the goal level, linking what is missing. Returns that table, the entry found in it, and the level: one
    /// less than the goal for each table on the way that the NX mitigation keeps (a huge leaf there would be split again by the next fetch).
    #[inline]
    fn descend(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        root: u32,
        fault: &MapFault,
    ) -> Result<(u32, Spte, u8), MapOutcome> {
        let (mut table, mut level, mut goal) = (root, self.root_level(), fault.goal_level);
        loop {
            let slot = index(fault.gfn, level);
            let old = Spte(P::load(&self.pool().entries(table)[slot], Site::SpteRead));
            task.count(1, 0);
            // 6.2-rc: the goal was tested first.
            if self.format().is_frozen(old) && !(P::bug(Bug::B27) && level == goal) {
                // 6.2-rc: who fell out of the loop here went on to the leaf step.
                return if P::bug(Bug::B28) && level <= LEVEL_1G {
                    Ok((table, old, level))
                } else {
                    Err(MapOutcome::Retry)
                };
            }
            if level == goal {
                if level == 1 || !old.is_table(level) || !self.nx_huge_pages() || !self.nx_keeps_table(old) {
                    return Ok((table, old, level));
                }
                goal -= 1;
            }
            table = if old.is_table(level) {
                old.pfn() as u32
            } else {
                let at = At { as_id: fault.as_id, root, gfn: round_down(fault.gfn, level), level };
                self.link_below(task, cache, table, at, old, fault).ok_or(MapOutcome::Retry)?
            };
            level -= 1;
        }
    }

    /// How Accessed and Dirty of leaves under `root` are kept: an L2's entries are write-protected for logging, since PML writes down the gfns of its own
    /// address space, not L1's.
    #[inline]
    fn ad_mode(&self, root: u32) -> AdMode {
        // A format without a choice takes none.
        if self.format().kind == FormatKind::Npt {
            return AdMode::Enabled;
        }
        let (role, layout) = (Role(self.pool().meta(root).role()), self.profile().role_layout);
        if role.ad_disabled(layout) {
            AdMode::Disabled
        } else if role.guest_mode(layout) {
            AdMode::WriteProtect
        } else {
            AdMode::Enabled
        }
    }

    /// The leaf that a fault wants at `at`, over `old`.
    #[inline]
    fn leaf_for(&self, fault: &MapFault, at: At, pfn: u64, writable: bool, old: Spte) -> MadeLeaf {
        self.format().make_leaf(&MakeLeaf {
            pfn,
            level: at.level,
            access: Access::ALL,
            prefetch: fault.prefetch,
            host_writable: writable,
            write_protected: false,
            old,
            dirty_tracked: fault.dirty_tracked,
            ad_mode: self.ad_mode(at.root),
            nx_mitigation: at.level > 1 && self.nx_huge_pages(),
            remake: self.profile().remake_dirty,
        })
    }

    #[inline]
    fn map_leaf(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        cell: &std::sync::atomic::AtomicU64,
        at: At,
        old: Spte,
        fault: &MapFault,
    ) -> MapOutcome {
        let format = self.format();
        if old.is_leaf(at.level)
            && let Some(outcome) = self.over_leaf(at, old, fault)
        {
            return outcome;
        }
        let mut marks = false;
        let (new, outcome) = match fault.frame {
            Frame::Mmio { generation } => {
                (format.mmio(fault.gfn, Access::ALL, generation), MapOutcome::Emulate)
            }
            Frame::Page { pfn, writable } => {
                let pfn = pfn & !(span(at.level) - 1);
                let made = self.leaf_for(fault, at, pfn, writable, old);
                if made.mark_dirty {
                    marks = self.mark_made(task, at, old, fault);
                }
                let outcome = if made.write_protected && fault.write {
                    MapOutcome::WriteProtected
                } else {
                    MapOutcome::Fixed { level: at.level, spte: made.spte }
                };
                (made.spte, outcome)
            }
        };
        if new == old {
            return if outcome == MapOutcome::Emulate { outcome } else { MapOutcome::Spurious };
        }
        if P::cmpxchg(cell, old.raw(), new.raw(), Site::SpteInstall).is_err() {
            task.meter().count_retries(1);
            if P::bug(Bug::C12) {
                self.leaves_made(cache, at.level, 1);
            }
            return MapOutcome::Retry;
        }
        task.count(0, 1);
        if !old.is_present() && !marks && self.observer().is_none() {
            // The common case, without a ledger: a leaf where nothing was.
            if new.is_present() {
                self.leaves_made(cache, at.level, 1);
            }
            return outcome;
        }
        let mut ledger = Ledger::default();
        change::changed::<P, Shared>(self, task, &mut ledger, at, old, new);
        ledger.settle(self);
        if marks {
            self.host().gfn_dirty(task, fault.as_id, fault.gfn);
        }
        if old.is_table(at.level) {
            // Small translations with other permissions may be cached.
            let level = match self.profile().replace_flush_span {
                ReplaceFlushSpan::Entry => at.level,
                ReplaceFlushSpan::ContainingTable => at.level + 1,
            };
            let from = round_down(at.gfn, level);
            self.flush(task, Some(from..from + span(level)));
        }
        outcome
    }

    /// A leaf is there already: does that end the fault?
    #[inline]
    fn over_leaf(&self, at: At, old: Spte, fault: &MapFault) -> Option<MapOutcome> {
        // 6.14 on: what allows the access is not made again, and nothing is made for a guest that has not asked.
        if self.profile().spurious_if_allowed
            && (fault.prefetch || self.format().allows(old, fault.write, fault.exec))
        {
            return Some(MapOutcome::Spurious);
        }
        if let Frame::Page { pfn, .. } = fault.frame
            && old.pfn() != pfn & !(span(at.level) - 1)
        {
            self.violation("a fault found another frame behind a present leaf (rule R5)");
            return Some(MapOutcome::Retry);
        }
        None
    }

    /// W is about to be granted in a slot that logs dirty pages: the maker marks the gfn now, or (true) its bookkeeping will, once the entry is
    /// written, if it gained W.
    #[cold]
    fn mark_made(&self, task: &Task<P>, at: At, old: Spte, fault: &MapFault) -> bool {
        match self.profile().mark_dirty {
            // The W bit of an MMIO entry is no permission: another frame comes in its place.
            MarkDirty::Always => at.level == 1 && !(old.is_present() && self.format().is_writable(old)),
            MarkDirty::ExclusiveOnly | MarkDirty::Never => {
                self.host().gfn_dirty(task, fault.as_id, fault.gfn);
                false
            }
        }
    }

    /// Puts a table under an entry that has none. `None`: lost a race; nothing is left behind.
    #[cold]
    fn link_below(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        parent: u32,
        at: At,
        old: Spte,
        fault: &MapFault,
    ) -> Option<u32> {
        let slot = index(at.gfn, at.level) as u16;
        let cell = &self.pool().entries(parent)[slot as usize];
        let huge = old.is_leaf(at.level);
        let split = huge && self.profile().split_in_fault == SplitInFault::Split;
        let mut expected = old;
        if huge && !split {
            expected = self.zap_huge_leaf(task, cell, at, old)?;
        }
        let role = Role(self.pool().meta(parent).role()).child().raw();
        // The cache was topped up outside the lock : an empty one means a caller skipped that.
        let table = match self.pop_table(task, cache, role, at.gfn, at.level - 1, Some((parent, slot))) {
            Ok(table) => table,
            Err(_) => {
                self.violation("a fault ran out of cached tables under mmu_lock");
                return None;
            }
        };
        if fault.huge_page_disallowed {
            self.nx_before_link(table);
        }
        if split {
            let nx = self.nx_huge_pages();
            for (i, entry) in self.pool().entries(table).iter().enumerate() {
                let child = self.format().split_child(old, at.level, i, nx);
                entry.store(child.raw(), Ordering::Relaxed);
            }
        }
        let new = self.format().table(u64::from(table), false);
        if P::cmpxchg(cell, expected.raw(), new.raw(), Site::SptePublish).is_err() {
            task.meter().count_retries(1);
            if split {
                self.fill_empty(table);
            }
            cache.push(table);
            return None;
        }
        task.count(0, 1);
        self.tables_linked(1);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::TableLink { table, parent, index: slot });
        }
        let mut ledger = Ledger::default();
        if split {
            // The children are 512 leaves one level down that no event announces.
            ledger.leaf(at.level - 1, ENTRIES as i64);
        }
        change::changed::<P, Shared>(self, task, &mut ledger, at, expected, new);
        ledger.settle(self);
        if fault.huge_page_disallowed && fault.req_level >= at.level {
            self.nx_after_link(table);
        }
        Some(table)
    }

    /// 5.19-6.1: a huge leaf in the way is frozen, flushed and emptied before a table is linked. The empty store is told by nobody, where the bookkeeping stands
    /// before the flush (recorded in 6.1: leaf to frozen, then empty to table).
    fn zap_huge_leaf(
        &self,
        task: &Task<P>,
        cell: &std::sync::atomic::AtomicU64,
        at: At,
        old: Spte,
    ) -> Option<Spte> {
        let (frozen, empty) = (self.format().frozen(), self.format().empty());
        if P::cmpxchg(cell, old.raw(), frozen.raw(), Site::SpteFreeze).is_err() {
            task.meter().count_retries(1);
            return None;
        }
        let book = |new: Spte| {
            let mut ledger = Ledger::default();
            change::changed::<P, Shared>(self, task, &mut ledger, at, old, new);
            ledger.settle(self);
        };
        let before = self.profile().atomic_zap_order == AtomicZapOrder::BookkeepingBeforeFlush;
        if before {
            book(frozen);
        } else {
            change::tell_frozen(self, task, at, old);
        }
        self.flush(task, Some(at.gfn..at.gfn + span(at.level)));
        P::store(cell, empty.raw(), Site::SpteZap);
        task.count(0, 2);
        if !before {
            book(empty);
        }
        Some(empty)
    }
}

/// Where the leaf of `fault` belongs when it is mapped at `level`.
fn goal(root: u32, fault: &MapFault, level: u8) -> At {
    At { as_id: fault.as_id, root, gfn: round_down(fault.gfn, level), level }
}
