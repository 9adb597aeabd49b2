//! Walks without mmu_lock: look-up, and the fast page fault.
//!
//! **Guarantee.** A lockless walk reads tables that RCU keeps; what it returns was true of each entry at the moment of its read, nothing more. The fast fault
//! changes one leaf by compare-exchange from the snapshot that it judged, adds permissions that the entry itself proves may be added, and changes nothing else.
//!
//! **Mechanism.** The fast fault may hit a leaf in a table that was unlinked meanwhile; harmless, as teardown exchanges volatile leaves atomically and the memory is not
//! recycled before the section ends.

use tdpmmu_platform::{Bug, Event, Fault, Platform, RcuGuard, Site, Task};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{ENTRIES, index, round_down};

use crate::TdpMmu;
use crate::iter::MAX_LEVEL;

/// What a lockless walk saw, from the root down.
#[derive(Clone, Copy, Debug)]
pub struct LocklessWalk {
    /// The entry read at each level (index 1..=5); zero where none was read.
    pub sptes: [Spte; MAX_LEVEL as usize + 1],
    /// The table that the lowest entry lies in.
    pub table: u32,
    /// The lowest level reached.
    pub level: u8,
}

impl LocklessWalk {
    /// The last entry on the path.
    pub fn last(&self) -> Spte {
        self.sptes[self.level as usize]
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

impl<P: Platform> TdpMmu<P> {
    /// The entries that translate `gfn` under `root`.
    #[inline]
    pub fn walk_lockless(&self, task: &Task<P>, root: u32, gfn: u64) -> LocklessWalk {
        let _rcu = (!P::bug(Bug::C05)).then(|| task.rcu_read());
        task.detail(|| Event::RcuRead { what: "the tables below a root" });
        let mut walk =
            LocklessWalk { sptes: [Spte(0); MAX_LEVEL as usize + 1], table: root, level: self.root_level() };
        loop {
            let entry =
                Spte(P::load(&self.pool().entries(walk.table)[index(gfn, walk.level)], Site::WalkLockless));
            walk.sptes[walk.level as usize] = entry;
            if walk.level == 1 || !entry.is_table(walk.level) {
                return walk;
            }
            walk.table = entry.pfn() as u32;
            walk.level -= 1;
            self.lose_cpu(Site::WalkLockless);
        }
    }

    /// Fault injection: the task loses its CPU here, for as long as the fault says.
    #[inline(always)]
    fn lose_cpu(&self, site: Site) {
        for _ in 0..P::inject_for(Fault::VcpuPause, site) {
            P::yield_cpu(site);
        }
    }

    /// Only the leaf of `gfn` under `root`: the cheapest look-up there is.
    #[inline]
    pub fn lookup(&self, task: &Task<P>, root: u32, gfn: u64) -> Option<(Spte, u8)> {
        self.lookup_within(&task.rcu_read(), root, gfn)
    }

    /// As [`TdpMmu::lookup`], in a section that is open already: for many look-ups in a row.
    #[inline]
    pub fn lookup_within(&self, _section: &RcuGuard<'_, P>, root: u32, gfn: u64) -> Option<(Spte, u8)> {
        let pool = self.pool();
        let mut entries = pool.entries(root);
        let mut level = self.root_level();
        let mut shift = 9 * u32::from(level - 1);
        // Five reads at most; the shift is carried, not recomputed from the level.
        loop {
            let entry = Spte(P::load(&entries[(gfn >> shift) as usize % ENTRIES], Site::WalkLockless));
            if shift == 0 || !entry.is_table(level) {
                return entry.is_leaf(level).then_some((entry, level));
            }
            entries = pool.child_entries(entry);
            self.lose_cpu(Site::WalkLockless);
            shift -= 9;
            level -= 1;
        }
    }

    /// Tries to resolve a fault without mmu_lock: restores an access-tracked leaf, or gives W back to a leaf that is MMU-writable. `slot_tracked`:
    /// the memslot logs dirty pages (a huge leaf is then left to the slow path, which splits it).
    pub fn fast_page_fault(
        &self,
        task: &Task<P>,
        root: u32,
        as_id: u8,
        gfn: u64,
        write: bool,
        exec: bool,
        slot_tracked: bool,
    ) -> FastOutcome {
        let mark = |gfn| self.host().gfn_dirty(task, as_id, gfn);
        self.fast_page_fault_marking(task, root, gfn, write, exec, slot_tracked, mark)
    }

    /// As [`TdpMmu::fast_page_fault`], for who has the memslot at hand: `mark` is told the gfn that became writable, after the change.
    #[inline]
    pub fn fast_page_fault_marking(
        &self,
        task: &Task<P>,
        root: u32,
        gfn: u64,
        write: bool,
        exec: bool,
        slot_tracked: bool,
        mark: impl FnOnce(u64),
    ) -> FastOutcome {
        let format = self.format();
        // As many attempts as the kernel makes before it takes the slow path.
        const ATTEMPTS: usize = 5;
        let _rcu = task.rcu_read();
        for _ in 0..ATTEMPTS {
            let walk = self.walk_lockless(task, root, gfn);
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
            let cell = &self.pool().entries(walk.table)[index(gfn, level)];
            if P::cmpxchg(cell, old.raw(), new.raw(), Site::SpteFast).is_ok() {
                task.count(0, 1);
                task.detail(|| Event::SpteMarked {
                    root,
                    table: walk.table,
                    gfn: round_down(gfn, level),
                    level,
                    old: old.raw(),
                    new: new.raw(),
                });
                if format.is_writable(new) && !format.is_writable(old) {
                    mark(round_down(gfn, level));
                }
                return FastOutcome::Fixed(new);
            }
            task.meter().count_retries(1);
        }
        FastOutcome::Declined
    }
}
