//! The iterator: preorder over the entries of one root, restartable after a yield.
//!
//! **Guarantee.** Entries come parents first, ascending, each at most once per pass over its table, and an entry that was snapshotted but
//! not handled before a yield is visited again. Between two yields the pair (target gfn, preorder position) strictly
//! grows, so a walk that is made to yield at every entry still ends.
//!
//! **Mechanism.** `target` is the gfn that the walk has reached; *only a side step moves it*. After a yield nothing that was
//! remembered about tables may be used (they may be gone), so the walk restarts from the root towards `target`. `yielded_at` remembers
//! the target of the last restart: no second yield before it moved. A step down re-reads the entry first: a snapshot may name
//! a table that is dead by now. `yielded` makes the next advance a plain restart, so that nothing is skipped (bug-history 5: Linux 5.10-5.15
//! advanced past the top-level entry it had just restarted on).

use tdpmmu_platform::{Platform, Site};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{ENTRIES, index, round_down, span};
use tdpmmu_table::TablePool;

/// Deepest table hierarchy: 5 levels.
pub const MAX_LEVEL: u8 = 5;

/// Where a walk is. Plain state: locks, RCU and debts are in `walk.rs`.
#[derive(Clone, Debug)]
pub struct TdpIter {
    target: u64,
    yielded_at: Option<u64>,
    path: [u32; MAX_LEVEL as usize + 1],
    root_level: u8,
    min_level: u8,
    level: u8,
    index: u16,
    gfn: u64,
    old: Spte,
    valid: bool,
    yielded: bool,
}

impl TdpIter {
    /// Starts at `target` in the table `root` of level `root_level`, never stepping below `min_level`.
    pub fn start<P: Platform>(
        pool: &TablePool,
        root: u32,
        root_level: u8,
        min_level: u8,
        target: u64,
    ) -> Self {
        let mut iter = Self {
            target,
            yielded_at: None,
            path: [root; MAX_LEVEL as usize + 1],
            root_level,
            min_level,
            level: root_level,
            index: 0,
            gfn: 0,
            old: Spte(0),
            valid: false,
            yielded: false,
        };
        iter.restart::<P>(pool);
        iter
    }

    /// Back to the root's entry of `target`, as after a yield.
    pub(crate) fn restart<P: Platform>(&mut self, pool: &TablePool) {
        self.yielded = false;
        self.yielded_at = Some(self.target);
        self.level = self.root_level;
        self.place(self.target);
        self.reread::<P>(pool);
        self.valid = true;
    }

    fn place(&mut self, gfn: u64) {
        self.gfn = round_down(gfn, self.level);
        self.index = index(gfn, self.level) as u16;
    }

    /// Snapshots the current entry again and returns it.
    #[inline]
    pub fn reread<P: Platform>(&mut self, pool: &TablePool) -> Spte {
        self.old = Spte(P::load(&pool.entries(self.table())[self.index as usize], Site::SpteRead));
        self.old
    }

    /// Replaces the snapshot by a value that a failed compare-exchange returned.
    #[inline]
    pub fn refresh(&mut self, seen: Spte) {
        self.old = seen;
    }

    fn try_down<P: Platform>(&mut self, pool: &TablePool) -> bool {
        if self.level == self.min_level {
            return false;
        }
        let fresh = self.reread::<P>(pool);
        if !fresh.is_table(self.level) {
            return false;
        }
        self.level -= 1;
        self.path[self.level as usize] = fresh.pfn() as u32;
        self.place(self.target);
        self.reread::<P>(pool);
        true
    }

    fn try_side<P: Platform>(&mut self, pool: &TablePool) -> bool {
        if self.index as usize == ENTRIES - 1 {
            return false;
        }
        self.index += 1;
        self.gfn += span(self.level);
        self.target = self.gfn;
        self.reread::<P>(pool);
        true
    }

    fn try_up(&mut self) -> bool {
        if self.level == self.root_level {
            return false;
        }
        self.level += 1;
        self.place(self.gfn);
        true
    }

    /// Moves on: a restart if the last step yielded, else down, side, or up.
    pub fn advance<P: Platform>(&mut self, pool: &TablePool) {
        if self.yielded {
            self.restart::<P>(pool);
            return;
        }
        if self.try_down::<P>(pool) {
            return;
        }
        while !self.try_side::<P>(pool) {
            if !self.try_up() {
                self.valid = false;
                return;
            }
        }
    }

    /// The entries from the current one to `end` (exclusive) of this table have been handled as a batch.
    pub fn handled_until(&mut self, end: u16) {
        let skipped = end - 1 - self.index;
        self.index += skipped;
        self.gfn += u64::from(skipped) * span(self.level);
        self.target = self.gfn;
    }

    /// May the walk yield here? Not twice at one target: that would be no progress.
    pub fn may_yield(&self) -> bool {
        self.yielded_at != Some(self.target)
    }

    /// The walk has dropped its protections: the next advance restarts.
    pub fn mark_yielded(&mut self) {
        self.yielded = true;
    }

    /// Still inside the tree?
    pub fn valid(&self) -> bool {
        self.valid
    }

    /// Has the last step yielded, so that the snapshot is void?
    pub fn yielded(&self) -> bool {
        self.yielded
    }

    /// First gfn of the current entry.
    pub fn gfn(&self) -> u64 {
        self.gfn
    }

    /// Level of the current entry.
    pub fn level(&self) -> u8 {
        self.level
    }

    /// The table that holds the current entry.
    #[inline]
    pub fn table(&self) -> u32 {
        self.path[self.level as usize]
    }

    /// Index of the current entry in its table.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The snapshot.
    pub fn old(&self) -> Spte {
        self.old
    }

    /// The root of the walk.
    pub fn root(&self) -> u32 {
        self.path[self.root_level as usize]
    }
}
