//! What is mapped, in whichever MMU it is: counted, not computed.

use tdpmmu_mmu::Counts;
use tdpmmu_platform::{Platform, Task};
use tdpmmu_spte::Ownership;

use super::Shared;
use crate::outcome::LastState;

impl<P: Platform> Shared<'_, P> {
    /// Leaves mapped now, old or new: from the counts that the MMU keeps, which may be a little behind.
    pub(super) fn mapped_leaves(&self) -> u64 {
        self.vm.mmu().leaf_pages().iter().map(|&n| n.max(0) as u64).sum()
    }

    /// Everything under `root`, or under all roots: every entry is read.
    pub(super) fn count(&self, task: &Task<P>, root: Option<u32>) -> Counts {
        let mmu = self.vm.mmu();
        match root {
            Some(root) => mmu.count(task, root),
            None => mmu.count_all(task),
        }
    }

    /// What valid roots hold.
    pub(super) fn last_state(&self, task: &Task<P>) -> LastState {
        let mmu = self.vm.mmu();
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
