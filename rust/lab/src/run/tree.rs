//! What is mapped, in whichever MMU it is: counted entry by entry, not computed.

use tdpmmu_mmu::Counts;
use tdpmmu_platform::{Platform, Site, Task};
use tdpmmu_shadow::{PageInfo, ShadowMmu};
use tdpmmu_spte::geometry::ENTRIES;
use tdpmmu_spte::{Ownership, Spte};

use super::Shared;
use crate::outcome::LastState;

impl<P: Platform> Shared<'_, P> {
    /// The shadow MMU, where the vCPUs run on it.
    pub(super) fn shadow(&self) -> Option<&ShadowMmu<P>> {
        self.scenario.vm.shadow.as_ref().and_then(|_| self.vm.shadow())
    }

    /// Remote flushes so far: of one MMU, or of both.
    pub(super) fn flushes(&self) -> u64 {
        if self.shadow().is_some() { self.vm.side().flushes() } else { self.vm.mmu().flushes() }
    }

    /// Is so much mapped again by now? By the counts that the MMU keeps, which may be a little behind; the shadow MMU counts obsolete leaves too, so there the tables decide.
    pub(super) fn is_mapped(&self, leaves: u64) -> bool {
        match self.shadow() {
            None => self.vm.mmu().leaf_pages().iter().map(|&n| n.max(0) as u64).sum::<u64>() >= leaves,
            Some(shadow) => {
                let counts = shadow.counts();
                let current = counts.pages.saturating_sub(counts.obsolete + counts.zapped_held);
                current * ENTRIES as u64 >= leaves
            }
        }
    }

    /// One table's entries.
    fn count_entries(
        &self,
        table: u32,
        level: u8,
        counts: &mut Counts,
        mut child: impl FnMut(u32, &mut Counts),
    ) {
        counts.tables[usize::from(level)] += 1;
        for entry in self.vm.mmu().pool().entries(table) {
            let entry = Spte(P::load(entry, Site::TableMeta));
            if entry.is_leaf(level) {
                counts.leaves[usize::from(level)] += 1;
            } else if level > 1 && entry.is_table(level) {
                child(entry.pfn() as u32, counts);
            } else if entry.raw() != 0 {
                counts.others += 1;
            }
        }
    }

    fn count_below(&self, table: u32, level: u8, counts: &mut Counts) {
        let mut children = Vec::new();
        self.count_entries(table, level, counts, |child, _| children.push(child));
        for child in children {
            self.count_below(child, level - 1, counts);
        }
    }

    /// The shadow pages that `which` chooses, under the lock.
    fn count_pages(
        &self,
        task: &Task<P>,
        shadow: &ShadowMmu<P>,
        which: impl Fn(&PageInfo) -> bool,
    ) -> Counts {
        let mut counts = Counts::default();
        let guard = self.vm.mmu().lock.write(task);
        for page in shadow.pages(&guard).iter().filter(|page| which(page)) {
            self.count_entries(page.table, page.role.level(), &mut counts, |_, _| {});
        }
        counts
    }

    /// Everything under `root`, or all that is of use: every entry is read.
    pub(super) fn count(&self, task: &Task<P>, root: Option<u32>) -> Counts {
        let mmu = self.vm.mmu();
        match (self.shadow(), root) {
            (None, Some(root)) => mmu.count(task, root),
            (None, None) => mmu.count_all(task),
            (Some(shadow), Some(root)) => {
                let _guard = mmu.lock.write(task);
                let mut counts = Counts::default();
                self.count_below(root, shadow.root_level(root), &mut counts);
                counts
            }
            (Some(shadow), None) => self.count_pages(task, shadow, is_current),
        }
    }

    /// Present leaves under invalid roots, or in zapped or obsolete pages: what a fast zap leaves none of.
    pub(super) fn stale_leaves(&self, task: &Task<P>) -> u64 {
        match self.shadow() {
            None => self.vm.sptes_under_obsolete_roots(task),
            Some(shadow) => {
                let counts = shadow.counts();
                if counts.obsolete + counts.zapped_held == 0 {
                    return 0;
                }
                self.count_pages(task, shadow, |page| !is_current(page)).sptes()
            }
        }
    }

    /// What valid roots hold; in the shadow MMU, where a root without a vCPU is a page like any other, all that is current.
    pub(super) fn last_state(&self, task: &Task<P>) -> LastState {
        let mmu = self.vm.mmu();
        if let Some(shadow) = self.shadow() {
            let counts = self.count(task, None);
            let guard = mmu.lock.write(task);
            let roots =
                shadow.pages(&guard).iter().filter(|page| is_current(page) && page.root_count > 0).count();
            return LastState { sptes: counts.sptes(), tables: counts.all_tables(), roots: roots as u64 };
        }
        let mut state = LastState::default();
        for root in mmu.valid_roots(task) {
            let counts = mmu.count(task, root);
            state.roots += 1;
            state.sptes += counts.sptes();
            state.tables += counts.all_tables();
        }
        state
    }

    /// What is left when everything is torn down; `dropped`: the root that was.
    pub(super) fn rest(&self, task: &Task<P>, dropped: Option<u32>) -> Rest {
        let mmu = self.vm.mmu();
        if let Some(shadow) = self.shadow() {
            let counts = shadow.counts();
            // A root that nobody holds stays in the cache with all below it.
            let kept = dropped.filter(|&root| !shadow.is_obsolete(root));
            return Rest {
                tables: counts.pages,
                stale: counts.zapped_held,
                retained: kept.map_or(0, |root| self.count(task, Some(root)).all_tables()),
            };
        }
        let _rcu = task.rcu_read();
        let stale = mmu
            .listed_roots()
            .filter(|root| mmu.is_obsolete(*root))
            .map(|root| mmu.count(task, root).all_tables())
            .sum();
        // Still listed and valid: the MMU's reference keeps it (a freed page can be a root again, but not at once).
        let kept = dropped.filter(|root| mmu.listed_roots().any(|r| r == *root) && !mmu.is_obsolete(*root));
        let owned = mmu.ownership() == Ownership::Mmu;
        Rest {
            tables: mmu.linked_tables().max(0) as u64 + mmu.listed_roots().count() as u64,
            stale,
            retained: kept.filter(|_| owned).map_or(0, |root| mmu.count(task, root).all_tables()),
        }
    }
}

fn is_current(page: &PageInfo) -> bool {
    !page.obsolete && !page.invalid
}

/// Tables that stay after a teardown.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rest {
    /// All, without vCPUs' caches.
    pub(super) tables: u64,
    /// Under invalid roots that somebody still holds.
    pub(super) stale: u64,
    /// Under the root that was dropped.
    pub(super) retained: u64,
}
