//! Walks without mmu_lock: look-up, and the fast page fault.
//!
//! **Guarantee.** A walk reads only pages that its [`Section`] keeps; what it returns was true of each entry at the moment of its read, nothing more. The fast fault changes one leaf by
//! compare-exchange from the value that it judged, adds permissions that the leaf itself proves may be added, and changes nothing else.
//!
//! **Mechanism.** Under mmu_lock a leaf that the fast fault may change is exchanged, never stored over (it is volatile: `Format::is_volatile`), so neither side loses the other's change. The fast fault is for direct
//! pages alone, as in KVM: entry and gfn of a leaf in an indirect page belong together only under the lock (the guest's table changes, the page is synced, and the same entry maps another
//! gfn), and the gfn is what the dirty log wants to be told.

use tdpmmu_platform::{Event, Fault, Platform, Site, Task};
use tdpmmu_spte::geometry::{MAX_LEVEL, index, round_down};
use tdpmmu_spte::{Role, Spte};

use crate::ShadowMmu;
use crate::reclaim::{ModeWord, Section};

/// What a lockless walk saw, from the root down.
#[derive(Clone, Copy, Debug)]
pub struct ShadowWalk {
    /// The entry read at each level (index 1 to 5); zero where none was read.
    pub sptes: [Spte; MAX_LEVEL as usize + 1],
    /// The shadow page that the lowest entry lies in.
    pub table: u32,
    /// The lowest level reached.
    pub level: u8,
}

impl ShadowWalk {
    /// The last entry on the path.
    pub fn last(&self) -> Spte {
        self.sptes[usize::from(self.level)]
    }

    /// The leaf, if the walk ended in one, with its level.
    pub fn leaf(&self) -> Option<(Spte, u8)> {
        self.last().is_leaf(self.level).then_some((self.last(), self.level))
    }
}

/// What became of a fast page fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FastOutcome {
    /// The leaf was fixed without mmu_lock.
    Fixed(Spte),
    /// The access is allowed already.
    Spurious,
    /// Not a case for the fast path.
    Declined,
}

impl<P: Platform> ShadowMmu<P> {
    /// The entries that translate the page `gva` (a gfn, under a direct root) below `root`, which the caller holds a reference on.
    #[inline]
    pub fn walk_lockless<W: ModeWord>(&self, section: &Section<'_, P, W>, root: u32, gva: u64) -> ShadowWalk {
        let task = section.task();
        let level = self.root_level(root);
        let mut walk = ShadowWalk { sptes: [Spte(0); MAX_LEVEL as usize + 1], table: root, level };
        loop {
            task.detail(|| Event::ShadowWalked { table: walk.table });
            let cell = &self.pool().entries(walk.table)[index(gva, walk.level)];
            let entry = Spte(P::load(cell, Site::ShadowWalk));
            walk.sptes[usize::from(walk.level)] = entry;
            if walk.level == 1 || !entry.is_table(walk.level) {
                return walk;
            }
            walk.table = entry.pfn() as u32;
            walk.level -= 1;
            lose_cpu::<P>(Site::ShadowWalk);
        }
    }

    /// Tries to resolve a fault of `task` on the page `gva` without mmu_lock: gives an access-tracked leaf its permissions back, or W to a leaf that is MMU-writable. `slot_tracked`: the memslot logs
    /// dirty pages (a huge leaf is then left to the slow path); `mark` is told the first gfn of what became writable, after the change. Under a root that is not direct it declines.
    pub fn fast_page_fault<W: ModeWord>(
        &self,
        section: &Section<'_, P, W>,
        root: u32,
        gva: u64,
        write: bool,
        exec: bool,
        slot_tracked: bool,
        mark: impl FnOnce(u64),
    ) -> FastOutcome {
        // As many attempts as the kernel makes before it takes the slow path.
        const ATTEMPTS: usize = 5;
        let (task, format) = (section.task(), self.format());
        if !Role(self.pool().meta(root).role()).direct() {
            return FastOutcome::Declined;
        }
        for _ in 0..ATTEMPTS {
            let walk = self.walk_lockless(section, root, gva);
            let Some((old, level)) = walk.leaf() else { return FastOutcome::Declined };
            if !format.is_access_tracked(old) && format.allows(old, write, exec) {
                return FastOutcome::Spurious;
            }
            let mut new = format.restore_access_track(old);
            if new != old && format.software_ad {
                new = Spte(new.raw() | format.accessed);
            }
            if write && format.is_mmu_writable(new) && !(level > 1 && slot_tracked) {
                new = format.with_write(new);
            }
            if new == old || !format.allows(new, write, exec) {
                return FastOutcome::Declined;
            }
            let cell = &self.pool().entries(walk.table)[index(gva, level)];
            if P::cmpxchg(cell, old.raw(), new.raw(), Site::SpteFast).is_ok() {
                self.told_fixed(task, root, &walk, gva, old, new);
                if format.is_writable(new) && !format.is_writable(old) {
                    mark(round_down(gva, level));
                }
                return FastOutcome::Fixed(new);
            }
            task.meter().count_retries(1);
        }
        FastOutcome::Declined
    }

    fn told_fixed(&self, task: &Task<P>, root: u32, walk: &ShadowWalk, gva: u64, old: Spte, new: Spte) {
        task.count(0, 1);
        task.detail(|| Event::SpteMarked {
            root,
            table: walk.table,
            gfn: round_down(gva, walk.level),
            level: walk.level,
            old: old.raw(),
            new: new.raw(),
        });
    }
}

/// Fault injection: the task loses its CPU here, for as long as the fault says.
#[inline(always)]
fn lose_cpu<P: Platform>(site: Site) {
    for _ in 0..P::inject_for(Fault::VcpuPause, site) {
        P::yield_cpu(site);
    }
}
