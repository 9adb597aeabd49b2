//! Eager split: huge leaves become tables of smaller ones before anybody writes.
//!
//! **Guarantee.** A split changes no translation and no permission: the 512 children are what the huge leaf was, one level down, with its W, Dirty and
//! Accessed, so no flush is owed. (Under the NX mitigation children of 4 KiB get X back.) Who walks beside it sees the huge leaf or the complete table, nothing between. A
//! split that finds no table left stops; what is huge still stays mapped, and a write to it is split by its own fault (eager splitting is best effort in
//! every kernel that has it).
//!
//! **Mechanism.** Valid roots, in preorder: a 1 GiB leaf becomes a table of 2 MiB ones, which the walk then meets. The table is filled, then linked in the place of the very value
//! it was filled from. The start of logging splits a whole slot under the shared lock by compare-exchange; hardware that sets Dirty meanwhile makes it fail, and the
//! entry is looked at anew. CLEAR splits the pages it is about to protect under the exclusive lock it holds.
//! Where the table comes from is the profile's: 5.18 to 6.10 take one under the lock if that needs no waiting, later kernels give up lock and RCU section for
//! every one (`eager-split`); both restart the walk at the same entry then. 5.10 and 5.15 do not split: their write faults do.

use std::ops::Range;
use std::sync::atomic::Ordering;

use tdpmmu_platform::{Event, Exclusive, Guard, Mode, Phase, Platform, Site, Task};
use tdpmmu_spte::geometry::ENTRIES;
use tdpmmu_spte::{EagerSplit, Role};
use tdpmmu_table::{PoolError, TableCache};

use crate::TdpMmu;
use crate::design::Held;
use crate::root::Which;
use crate::walk::{Entry, Lost, Walk, Yield};

/// Where the tables of a split come from: one at hand, and a stock that is filled outside of the lock.
#[derive(Default)]
struct Tables {
    at_hand: Option<u32>,
    stock: TableCache,
}

impl<P: Platform> TdpMmu<P> {
    /// Splits every leaf above level `target` (1 or 2) in `gfns` of one address space, under its valid roots. Returns how many leaves were split; none
    /// in a kernel that does not split eagerly. Takes mmu_lock shared; the caller holds slots_lock and does not hold mmu_lock.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`]: no table left. What was split stays split, the rest stays huge.
    pub fn split_huge_pages(
        &self,
        task: &Task<P>,
        as_id: u8,
        gfns: Range<u64>,
        target: u8,
    ) -> Result<u64, PoolError> {
        let mut guard = self.lock.read(task);
        self.split_in(&mut guard, as_id, gfns, target)
    }

    /// As [`TdpMmu::split_huge_pages`], under the exclusive lock that the caller holds (CLEAR in the initially-all-set mode). The lock is given up for each table
    /// that must be waited for, and at yields: a flush that the caller owes must be paid before, or noted at the guard and paid by nobody else.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] as there; the lock is held again.
    pub fn split_huge_pages_exclusive(
        &self,
        guard: &mut Guard<'_, P, Exclusive>,
        as_id: u8,
        gfns: Range<u64>,
        target: u8,
    ) -> Result<u64, PoolError> {
        self.split_in(guard, as_id, gfns, target)
    }

    fn split_in<'a, M: Mode>(
        &self,
        guard: &mut Guard<'a, P, M>,
        as_id: u8,
        gfns: Range<u64>,
        target: u8,
    ) -> Result<u64, PoolError>
    where
        for<'g> Held<'g, 'a, P>: From<&'g mut Guard<'a, P, M>>,
    {
        if self.profile().eager_split == EagerSplit::None {
            return Ok(0);
        }
        let (mut tables, mut done) = (Tables::default(), Ok(0));
        self.for_each_root(guard, Which::Valid, |guard, root| {
            // The kernel goes on to the next root only while tables last.
            if let Ok(before) = done
                && self.as_id(root) == as_id
            {
                done = self.split_root(guard, root, gfns.clone(), target, &mut tables).map(|n| before + n);
            }
        });
        P::point(Site::TableFree);
        tables.stock.drain(self.pool());
        if let Some(table) = tables.at_hand {
            self.pool().free_unpublished(table);
        }
        done
    }

    fn split_root<M: Mode>(
        &self,
        guard: &mut Guard<'_, P, M>,
        root: u32,
        gfns: Range<u64>,
        target: u8,
        tables: &mut Tables,
    ) -> Result<u64, PoolError> {
        let nowait = self.profile().eager_split == EagerSplit::NowaitFirst;
        let _work = guard.task().phase(Phase::SpteWork);
        let (mut split, mut shortage) = (0, None);
        let mut walk = Walk::new(self, guard, root, target + 1, gfns, Yield::Allowed);
        'walk: while let Some(mut entry) = walk.next_entry() {
            // An entry that somebody else changed is looked at again, and checks again.
            loop {
                let Some(here) = entry.or_yield() else { continue 'walk };
                entry = here;
                if !entry.old().is_leaf(entry.level()) {
                    continue 'walk;
                }
                // It may have been invalidated while the lock was given up: no guest runs on it, and its zap is under way.
                if self.is_obsolete(root) {
                    break 'walk;
                }
                if tables.at_hand.is_none()
                    && nowait
                    && self.may_allocate(Site::AllocSplit, 1).is_ok()
                    && tables.stock.top_up(self.pool(), 1, |_| {}).is_ok()
                {
                    tables.at_hand = tables.stock.pop();
                }
                let Some(table) = tables.at_hand.take() else {
                    match self.table_for_split(entry, &mut tables.stock) {
                        Ok(()) => tables.at_hand = tables.stock.pop(),
                        Err(error) => {
                            shortage = Some(error);
                            break 'walk;
                        }
                    }
                    continue 'walk;
                };
                if self.split_leaf(&mut entry, table).is_ok() {
                    split += 1;
                    continue 'walk;
                }
                tables.at_hand = Some(table);
            }
        }
        walk.finish_and_flush();
        shortage.map_or(Ok(split), Err)
    }

    /// Waits for a table with the lock given up; the entry is void afterwards.
    fn table_for_split<M: Mode>(
        &self,
        entry: Entry<'_, '_, '_, P, M>,
        stock: &mut TableCache,
    ) -> Result<(), PoolError> {
        entry.unlocked_for(|task| {
            // Waiting for the lock afterwards is booked as such by the lock.
            let _allocating = task.phase(Phase::Other);
            task.might_sleep();
            P::point(Site::AllocSplit);
            self.may_allocate(Site::AllocSplit, 1)?;
            stock.top_up(self.pool(), 1, |_| {})
        })
    }

    /// Links `table` in the place of the huge leaf that `entry` stands on; lost, the table is still the caller's.
    fn split_leaf<M: Mode>(&self, entry: &mut Entry<'_, '_, '_, P, M>, table: u32) -> Result<(), Lost> {
        let (gfn, level, huge) = (entry.gfn(), entry.level(), entry.old());
        let (parent, index) = (entry.table(), entry.index());
        let task = entry.walk.task();
        let role = Role(self.pool().meta(parent).role()).child().raw();
        self.pool().meta(table).init(role, gfn, level - 1, Some((parent, index)));
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::TableAlloc { table, level: level - 1, gfn });
        }
        let nx = self.nx_huge_pages();
        for (i, cell) in self.pool().entries(table).iter().enumerate() {
            let child = self.format().split_child(huge, level, i, nx);
            cell.store(child.raw(), Ordering::Relaxed);
        }
        task.count(0, ENTRIES as u64);
        let link = self.format().table(u64::from(table), !self.format().ad_bits);
        entry.set_as(link, Site::SpteSplit)?;
        // From here on somebody else may be tearing the table down already (rule R9): only its number is used.
        self.tables_linked(1);
        entry.walk.ledger.leaf(level - 1, ENTRIES as i64);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::TableLink { table, parent, index });
        }
        Ok(())
    }
}
