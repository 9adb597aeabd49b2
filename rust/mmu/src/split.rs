//! Eager split: huge leaves become tables of smaller ones before anybody writes.
//!
//! **Guarantee.** A split changes no translation and no permission: the 512 children are what the huge leaf was, one level down, with its W, Dirty and
//! Accessed, so no flush is owed. Who walks beside it sees the huge leaf or the complete table, nothing between. A split that finds no table left stops;
//! what is huge still stays mapped, and a write to it is split by its own fault (eager splitting is best effort in every kernel that has it).
//!
//! **Mechanism.** Shared lock, valid roots, in preorder: a 1 GiB leaf becomes a table of 2 MiB ones, which the walk then meets. The table is filled, then linked by
//! compare-exchange of the very value it was filled from; hardware that sets Dirty meanwhile makes the exchange fail and the table is filled anew.
//! Where the table comes from is the profile's: 5.18 to 6.10 take one under the lock if that needs no waiting, later kernels give up lock and RCU section for
//! every one (`eager-split`); both restart the walk at the same entry then. 5.10 and 5.15 do not split: their write faults do.

use std::ops::Range;
use std::sync::atomic::Ordering;

use tdpmmu_platform::{Event, Guard, Phase, Platform, Shared, Site, Task};
use tdpmmu_spte::geometry::ENTRIES;
use tdpmmu_spte::{EagerSplit, Role};
use tdpmmu_table::{PoolError, TableCache};

use crate::TdpMmu;
use crate::root::Which;
use crate::walk::{Entry, Walk, Yield};

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
        if self.profile().eager_split == EagerSplit::None {
            return Ok(0);
        }
        let (mut tables, mut done) = (Tables::default(), Ok(0));
        let mut guard = self.lock.read(task);
        self.for_each_root(&mut guard, Which::Valid, |guard, root| {
            if let Ok(before) = done
                && self.as_id(root) == as_id
            {
                done = self.split_root(guard, root, gfns.clone(), target, &mut tables).map(|n| before + n);
            }
        });
        drop(guard);
        tables.stock.drain(self.pool());
        if let Some(table) = tables.at_hand {
            self.pool().free_unpublished(table);
        }
        done
    }

    fn split_root(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        root: u32,
        gfns: Range<u64>,
        target: u8,
        tables: &mut Tables,
    ) -> Result<u64, PoolError> {
        let nowait = self.profile().eager_split == EagerSplit::NowaitFirst;
        let _work = guard.task().phase(Phase::SpteWork);
        let (mut split, mut shortage) = (0, None);
        let mut walk = Walk::new(self, guard, root, target + 1, gfns, Yield::Allowed);
        while let Some(entry) = walk.next_entry() {
            let Some(mut entry) = entry.or_yield() else { continue };
            if !entry.old().is_leaf(entry.level()) {
                continue;
            }
            // It may have been invalidated while the lock was given up: no guest runs on it, and its zap is under way.
            if self.is_obsolete(root) {
                break;
            }
            if tables.at_hand.is_none() && nowait && tables.stock.top_up(self.pool(), 1, |_| {}).is_ok() {
                tables.at_hand = tables.stock.pop();
            }
            let Some(table) = tables.at_hand.take() else {
                let stock = &mut tables.stock;
                let got = entry.unlocked_for(|task| {
                    // Waiting for the lock afterwards is booked as such by the lock.
                    let _allocating = task.phase(Phase::Other);
                    task.might_sleep();
                    stock.top_up(self.pool(), 1, |_| {})
                });
                match got {
                    Ok(()) => tables.at_hand = tables.stock.pop(),
                    Err(error) => {
                        shortage = Some(error);
                        break;
                    }
                }
                continue;
            };
            if self.split_leaf(&mut entry, table) {
                split += 1;
            } else {
                tables.at_hand = Some(table);
            }
        }
        walk.finish_and_flush();
        shortage.map_or(Ok(split), Err)
    }

    /// Links `table` in the place of the huge leaf that `entry` stands on; false: the entry is no leaf any more, the table still the caller's.
    fn split_leaf(&self, entry: &mut Entry<'_, '_, '_, P, Shared>, table: u32) -> bool {
        let (gfn, level) = (entry.gfn(), entry.level());
        let (parent, index) = (entry.table(), entry.index());
        let task = entry.walk.task();
        let role = Role(self.pool().meta(parent).role()).child().raw();
        self.pool().meta(table).init(role, gfn, level - 1, Some((parent, index)));
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::TableAlloc { table, level: level - 1, gfn });
        }
        let link = self.format().table(u64::from(table), false);
        loop {
            let huge = entry.old();
            if !huge.is_leaf(level) {
                return false;
            }
            for (i, cell) in self.pool().entries(table).iter().enumerate() {
                cell.store(self.format().split_child(huge, level, i, false).raw(), Ordering::Relaxed);
            }
            task.count(0, ENTRIES as u64);
            if entry.set_as(link, Site::SpteSplit).is_ok() {
                break;
            }
        }
        // From here on somebody else may be tearing the table down already (rule R9): only its number is used.
        self.tables_linked(1);
        entry.walk.ledger.leaf(level - 1, ENTRIES as i64);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::TableLink { table, parent, index });
        }
        true
    }
}
