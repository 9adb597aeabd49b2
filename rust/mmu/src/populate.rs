//! Population in bulk: whole tables filled before they are linked.
//!
//! **Guarantee.** The result is what faults would have built: the same entries, headers, counts and events, checked entry by entry in a test. Linking is by compare-exchange under the
//! shared lock, so bulk population may run beside faults and beside itself.
//!
//! **Mechanism.** One call handles at most one GiB, so that callers parallelise by GiB. Leaf tables that a range covers whole come as one run from the
//! pool and are written once, front to back; nothing is zeroed first. What is covered in part, or exists already, goes entry by entry.

use std::ops::Range;

use tdpmmu_platform::{Event, Guard, Platform, Shared, Site, Task};
use tdpmmu_spte::geometry::{index, round_down, span};
use tdpmmu_spte::{Role, Spte};
use tdpmmu_table::{PoolError, TableCache};

use crate::TdpMmu;

/// What to map: `gfns` to the consecutive frames from `first_pfn`.
#[derive(Clone, Debug)]
pub struct BulkMap {
    /// Gfns, within one GiB, aligned to `level`.
    pub gfns: Range<u64>,
    /// Frame of `gfns.start`, aligned to `level`.
    pub first_pfn: u64,
    /// Leaf level.
    pub level: u8,
    /// A leaf of that level with frame 0: its permission and A/D bits are those of every leaf made here.
    pub template: Spte,
}

/// Bulk population stopped.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BulkError {
    /// No table left.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The range does not fit the rules of [`BulkMap`].
    #[error("bulk range {0:x?} is not aligned to level {1} within one GiB")]
    Range(Range<u64>, u8),
}

/// Where the leaves at a gfn belong.
enum Spot {
    /// Into this table.
    Table(u32),
    /// Nowhere: a leaf of this level, above theirs, maps the gfn already.
    Mapped(u8),
}

impl<P: Platform> TdpMmu<P> {
    /// Maps `map` under `root`; returns how many leaves were new. Present entries stay as they are, larger leaves too.
    ///
    /// # Errors
    /// [`BulkError`]; leaves mapped so far stay.
    pub fn populate_bulk(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        cache: &mut TableCache,
        root: u32,
        map: &BulkMap,
    ) -> Result<u64, BulkError> {
        let unit = span(map.level);
        let gfns = &map.gfns;
        let aligned = gfns.start.is_multiple_of(unit) && gfns.end.is_multiple_of(unit);
        if gfns.is_empty()
            || !aligned
            || round_down(gfns.start, 3) != round_down(gfns.end - 1, 3)
            || map.level > 3
        {
            return Err(BulkError::Range(gfns.clone(), map.level));
        }
        let task = guard.task();
        let _rcu = task.rcu_read();
        let mut new = 0;
        let done = self.fill_range(task, cache, root, map, &mut new);
        // Also after an error: what was mapped stays, so it counts.
        self.add_leaves(map.level, new as i64);
        done.map(|()| new)
    }

    fn fill_range(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        root: u32,
        map: &BulkMap,
        new: &mut u64,
    ) -> Result<(), BulkError> {
        let (gfns, unit) = (&map.gfns, span(map.level));
        let mut gfn = gfns.start;
        while gfn < gfns.end {
            // The table that holds the leaves at `gfn`, and how far the range goes on in it.
            let table_end = (round_down(gfn, map.level + 1) + span(map.level + 1)).min(gfns.end);
            let whole = map.level == 1 && table_end - gfn == span(2);
            if whole && let Some(tables) = self.fill_tables(task, cache, root, map, gfn)? {
                *new += tables * span(2);
                gfn += tables * span(2);
                continue;
            }
            let table = match self.table_for(task, cache, root, gfn, map.level)? {
                Spot::Table(table) => table,
                Spot::Mapped(level) => {
                    gfn = (round_down(gfn, level) + span(level)).min(gfns.end);
                    continue;
                }
            };
            while gfn < table_end {
                let cell = &self.pool().entries(table)[index(gfn, map.level)];
                let leaf = map.template.with_pfn(map.first_pfn + (gfn - gfns.start));
                match P::cmpxchg(cell, self.format().empty().raw(), leaf.raw(), Site::SpteInstall) {
                    Ok(_) => {
                        self.tell_leaf(task, root, gfn, map.level, leaf);
                        *new += 1;
                    }
                    // Its owner will empty it, or the whole table is dead and stays frozen: from the root again.
                    Err(seen) if self.format().is_frozen(Spte(seen)) => {
                        P::relax(Site::SpteInstall);
                        break;
                    }
                    Err(_) => {}
                }
                gfn += unit;
            }
        }
        Ok(())
    }

    /// Fills and links leaf tables for as many whole 2 MiB from `gfn` on as have no table yet. `None`: the first one has.
    fn fill_tables(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        root: u32,
        map: &BulkMap,
        gfn: u64,
    ) -> Result<Option<u64>, BulkError> {
        let Spot::Table(parent) = self.table_for(task, cache, root, gfn, 2)? else { return Ok(None) };
        let first = index(gfn, 2);
        let empty = self.format().empty().raw();
        let limit = (map.gfns.end - gfn) / span(2);
        let vacant = self.pool().entries(parent)[first..]
            .iter()
            .take(limit as usize)
            .take_while(|e| P::load(e, Site::SpteRead) == empty)
            .count();
        if vacant == 0 {
            return Ok(None);
        }
        P::point(Site::AllocBulk);
        self.may_allocate(Site::AllocBulk, vacant as u64)?;
        let (run, count) = match self.pool().alloc_run(vacant) {
            Ok(run) => (run, vacant),
            // No such run left: one at a time still works.
            Err(_) => (self.pool().alloc_run(1)?, 1),
        };
        let role = Role(self.pool().meta(parent).role()).child().raw();
        let leaf_at = |base: u64| map.template.with_pfn(map.first_pfn + (base - map.gfns.start));
        // Consecutive frames under one template: on a platform that can, a description is enough.
        let by_count = if P::BY_COUNT { self.pool().by_count() } else { None };
        if let Some(uniform) = by_count {
            uniform.hold(run, count as u32, leaf_at(gfn).raw(), 1 << 12, span(2) << 12);
        }
        for i in 0..count {
            let (table, base) = (run + i as u32, gfn + i as u64 * span(2));
            self.pool().meta(table).init(role, base, 1, Some((parent, (first + i) as u16)));
            if by_count.is_some() {
                continue;
            }
            // SAFETY: the run was taken from the pool above and is linked below, after `fill_done`: until then nobody else knows it.
            unsafe { self.pool().fill_unpublished::<P>(table, leaf_at(base).raw(), 1 << 12) };
        }
        self.pool().fill_done();
        let mut linked = 0;
        for i in 0..count {
            let (table, slot) = (run + i as u32, (first + i) as u16);
            let base = gfn + i as u64 * span(2);
            let leaf = leaf_at(base);
            if let Some(observer) = self.observer() {
                observer.event(task.id(), &Event::TableAlloc { table, level: 1, gfn: base });
            }
            let link = self.format().table(u64::from(table), false);
            let cell = &self.pool().entries(parent)[slot as usize];
            if P::cmpxchg(cell, empty, link.raw(), Site::SptePublish).is_err() {
                // A fault was faster: give back what is left of the run and go on entry by entry.
                for rest in i..count {
                    self.pool().free_unpublished(run + rest as u32);
                }
                break;
            }
            linked += 1;
            self.tell_table(task, root, parent, slot, table, base, link);
            if self.observer().is_some() {
                for j in 0..span(2) {
                    self.tell_leaf(task, root, base + j, 1, Spte(leaf.raw() + (j << 12)));
                }
            }
        }
        self.tables_linked(linked);
        Ok((linked > 0).then_some(linked))
    }

    /// The table of level `level` that covers `gfn`, linking what is missing above it, unless a larger leaf maps the gfn. Waits out who owns a frozen
    /// entry on the way.
    fn table_for(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        root: u32,
        gfn: u64,
        level: u8,
    ) -> Result<Spot, BulkError> {
        let (mut table, mut at) = (root, self.root_level());
        while at > level {
            let slot = index(gfn, at);
            let cell = &self.pool().entries(table)[slot];
            let seen = Spte(P::load(cell, Site::SpteRead));
            if seen.is_table(at) {
                table = seen.pfn() as u32;
                at -= 1;
                continue;
            }
            if seen.is_leaf(at) {
                return Ok(Spot::Mapped(at));
            }
            if self.format().is_frozen(seen) {
                P::relax(Site::SpteRead);
                // The table itself may be dead by now, and its entries frozen for good.
                (table, at) = (root, self.root_level());
                continue;
            }
            if seen != self.format().empty() {
                return Err(BulkError::Range(gfn..gfn + span(at), at));
            }
            // A topped-up cache lasts for the path and the two ends, unless zaps undo it meanwhile. No sleeping here: mmu_lock is held.
            if cache.is_empty() {
                P::point(Site::AllocBulk);
                self.may_allocate(Site::AllocBulk, 1)?;
                cache.top_up(self.pool(), 1, |page| self.fill_empty(page))?;
            }
            let role = Role(self.pool().meta(table).role()).child().raw();
            let base = round_down(gfn, at);
            let child = self.pop_table(task, cache, role, base, at - 1, Some((table, slot as u16)))?;
            let link = self.format().table(u64::from(child), false);
            if P::cmpxchg(cell, seen.raw(), link.raw(), Site::SptePublish).is_err() {
                cache.push(child);
                continue;
            }
            self.tables_linked(1);
            self.tell_table(task, root, table, slot as u16, child, base, link);
            table = child;
            at -= 1;
        }
        Ok(Spot::Table(table))
    }

    fn tell_leaf(&self, task: &Task<P>, root: u32, gfn: u64, level: u8, new: Spte) {
        if let Some(observer) = self.observer() {
            let (as_id, old) = (self.as_id(root), self.format().empty().raw());
            observer.event(
                task.id(),
                &Event::SpteChanged { as_id, root, gfn, level, old, new: new.raw(), shared: true },
            );
        }
    }

    fn tell_table(
        &self,
        task: &Task<P>,
        root: u32,
        parent: u32,
        slot: u16,
        table: u32,
        gfn: u64,
        link: Spte,
    ) {
        if let Some(observer) = self.observer() {
            let level = self.pool().meta(table).level();
            observer.event(task.id(), &Event::TableLink { table, parent, index: slot });
            let (as_id, old) = (self.as_id(root), self.format().empty().raw());
            observer.event(
                task.id(),
                &Event::SpteChanged {
                    as_id,
                    root,
                    gfn,
                    level: level + 1,
                    old,
                    new: link.raw(),
                    shared: true,
                },
            );
        }
    }
}
