//! The end of dirty logging: tables that the host could map by one huge page give way to a huge leaf.
//!
//! **Guarantee.** A table goes only if a single leaf could map all that it maps, by the word of the caller for each entry: the host's page is large enough and the slot
//! allows it. Nobody can translate through the removed table once this has returned or its lock was given up. What the guest wrote through it has reached the
//! host page (kernels up to 6.12).
//!
//! **Mechanism.** Shared lock, valid roots, only entries whose first gfn lies inside the slot: what begins before it also maps what is not the slot's. Three generations
//! (`collapse`):
//!
//! | | meets | does | a huge leaf comes |
//! | --- | --- | --- | --- |
//! | `zap-leaf` (5.10-5.18) | leaves | zaps each one that could be larger; the emptied table stays | by a fault, over the table |
//! | `zap-freeze` (6.1-6.12) | tables | freezes the entry, flushes its span, empties it; the subtree is torn down | by a fault |
//! | `recover` (6.13 on) | tables | makes the huge leaf from the first leaf found below, exchanges it for the table | at once |
//!
//! Between freeze and store the frozen value keeps faults out (rule F4). Its bookkeeping stands before the flush in 6.1, whose change to empty nobody is told of, and after the
//! store in 6.12, whose change to frozen nobody is told of (`atomic-zap`). Recovery maps the same frames, so its flush can wait for the next yield or
//! the end. A huge leaf is as writable as the first leaf was: write-protected, it is fixed by a later fault. Under the NX mitigation it loses X. A table without
//! leaves is left alone.
//!
//! 5.10 does its zap under the exclusive lock, with one flush at the end; here it shares the lock as its successors do.

use std::ops::Range;

use tdpmmu_platform::{Bug, Guard, Phase, Platform, Shared, Site, Task};
use tdpmmu_spte::geometry::{ENTRIES, LEVEL_1G, LEVEL_2M, LEVEL_4K};
use tdpmmu_spte::{Collapse, Spte};

use crate::TdpMmu;
use crate::root::Which;
use crate::walk::{Entry, Lost, Walk, Yield};

impl<P: Platform> TdpMmu<P> {
    /// Logging has ended for the slot `gfns` of one address space: zaps or replaces what could be mapped larger, under its valid roots. `max_level` says for a gfn of the slot the largest
    /// level (1 to 3) that slot and host allow; it is asked with mmu_lock held. Takes mmu_lock shared; nothing is owed afterwards. Returns how many entries
    /// changed: leaves zapped, tables zapped, or tables replaced.
    pub fn collapse(
        &self,
        task: &Task<P>,
        as_id: u8,
        gfns: Range<u64>,
        max_level: &dyn Fn(u64) -> u8,
    ) -> u64 {
        let mut changed = 0;
        let mut guard = self.lock.read(task);
        self.for_each_root(&mut guard, Which::Valid, |guard, root| {
            if self.as_id(root) != as_id {
                return;
            }
            let _work = task.phase(Phase::SpteWork);
            changed += match self.profile().collapse {
                Collapse::ZapLeaf => self.zap_small_leaves(guard, root, &gfns, max_level),
                Collapse::ZapFreeze => self.zap_small_tables(guard, root, &gfns, max_level),
                Collapse::RecoverInPlace => self.recover_huge_leaves(guard, root, &gfns, max_level),
            };
        });
        changed
    }

    fn zap_small_leaves(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        root: u32,
        slot: &Range<u64>,
        max_level: &dyn Fn(u64) -> u8,
    ) -> u64 {
        self.change_each(guard, root, LEVEL_4K, slot, |entry| {
            let small = entry.old().is_leaf(entry.level())
                && slot.contains(&entry.gfn())
                && entry.level() < max_level(entry.gfn());
            small.then(|| entry.zap_atomically())
        })
    }

    fn zap_small_tables(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        root: u32,
        slot: &Range<u64>,
        max_level: &dyn Fn(u64) -> u8,
    ) -> u64 {
        self.change_each(guard, root, LEVEL_2M, slot, |entry| {
            entry.could_be_leaf(slot, max_level).then(|| entry.zap_atomically())
        })
    }

    fn recover_huge_leaves(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        root: u32,
        slot: &Range<u64>,
        max_level: &dyn Fn(u64) -> u8,
    ) -> u64 {
        self.change_each(guard, root, LEVEL_2M, slot, |entry| {
            if !entry.could_be_leaf(slot, max_level) {
                return None;
            }
            let (table, level) = (entry.old().pfn() as u32, entry.level());
            let small = self.first_leaf(entry.walk.task(), table, level - 1)?;
            let huge = self.format().collapse(small, level, self.nx_huge_pages());
            let done = entry.set_as(huge, Site::SpteInstall);
            if done.is_ok() {
                // Paid before the next yield, and before the RCU section ends: tables are freed.
                entry.owe_flush();
            }
            Some(done)
        })
    }

    /// Offers each entry of `slot` from level `min_level` up to `change`, which says nothing where there is nothing to do; an entry that somebody else was faster at is
    /// offered again, after a check. Returns how many changed.
    fn change_each(
        &self,
        guard: &mut Guard<'_, P, Shared>,
        root: u32,
        min_level: u8,
        slot: &Range<u64>,
        mut change: impl FnMut(&mut Entry<'_, '_, '_, P, Shared>) -> Option<Result<(), Lost>>,
    ) -> u64 {
        let mut changed = 0;
        let mut walk = Walk::new(self, guard, root, min_level, slot.clone(), Yield::Allowed);
        'walk: while let Some(mut entry) = walk.next_entry() {
            loop {
                let Some(here) = entry.or_yield() else { continue 'walk };
                entry = here;
                match change(&mut entry) {
                    None => continue 'walk,
                    Some(Ok(())) => {
                        changed += 1;
                        continue 'walk;
                    }
                    Some(Err(Lost)) => {}
                }
            }
        }
        walk.finish_and_flush();
        changed
    }

    /// The first present leaf under `table`, in preorder. Inside the walk's RCU section.
    fn first_leaf(&self, task: &Task<P>, table: u32, level: u8) -> Option<Spte> {
        for index in 0..ENTRIES {
            let spte = Spte(P::load(&self.pool().entries(table)[index], Site::SpteRead));
            task.count(1, 0);
            if spte.is_leaf(level) {
                return Some(spte);
            }
            if spte.is_table(level)
                && let Some(leaf) = self.first_leaf(task, spte.pfn() as u32, level - 1)
            {
                return Some(leaf);
            }
        }
        None
    }
}

impl<P: Platform> Entry<'_, '_, '_, P, Shared> {
    /// A table inside the slot in whose place the host and the slot would allow a leaf?
    fn could_be_leaf(&self, slot: &Range<u64>, max_level: &dyn Fn(u64) -> u8) -> bool {
        self.level() <= LEVEL_1G
            && self.old().is_table(self.level())
            // 5.10-6.5: an upper entry that begins before the slot was asked for too.
            && (slot.contains(&self.gfn()) || P::bug(Bug::B41))
            && max_level(self.gfn()) >= self.level()
    }
}
