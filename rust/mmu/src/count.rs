//! Counting what is really there: a full read of a tree, independent of the statistics it is compared with.

use tdpmmu_platform::{Platform, Site, Task};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::ENTRIES;

use tdpmmu_table::Entries;
use tdpmmu_table::prefetch::{Intent, LINE, prefetch};

use crate::TdpMmu;

/// What a full walk of one root found. Indices are levels 1..=5.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Present leaves by level.
    pub leaves: [u64; 6],
    /// Tables by level, the root included.
    pub tables: [u64; 6],
    /// Entries that are neither empty nor present (frozen, MMIO).
    pub others: u64,
}

impl Counts {
    /// Present leaves of all sizes.
    pub fn sptes(&self) -> u64 {
        self.leaves.iter().sum()
    }

    /// Tables of all levels.
    pub fn all_tables(&self) -> u64 {
        self.tables.iter().sum()
    }

    fn add(&mut self, other: &Counts) {
        for level in 0..self.leaves.len() {
            self.leaves[level] += other.leaves[level];
            self.tables[level] += other.tables[level];
        }
        self.others += other.others;
    }
}

impl<P: Platform> TdpMmu<P> {
    /// Reads every entry under `root` and counts. The tree may change meanwhile; the answer is then of no one moment.
    pub fn count(&self, task: &Task<P>, root: u32) -> Counts {
        let _rcu = task.rcu_read();
        self.count_table(root, self.root_level(), None)
    }

    /// As [`TdpMmu::count`], over every listed root.
    pub fn count_all(&self, task: &Task<P>) -> Counts {
        let _rcu = task.rcu_read();
        let mut sum = Counts::default();
        for root in self.listed_roots() {
            sum.add(&self.count_table(root, self.root_level(), None));
        }
        sum
    }

    /// Listed roots that are not invalid now: those that a fast zap which begins now must leave nothing mapped under.
    pub fn valid_roots(&self, task: &Task<P>) -> Vec<u32> {
        let _rcu = task.rcu_read();
        self.listed_roots().filter(|&root| !self.is_obsolete(root)).collect()
    }

    /// Present leaves under listed roots that are invalid. After a fast zap of a sound design 0: each root that it found valid is invalid and either empty or off
    /// the list. (A worker may still be at a root that was invalidated *since*, by a vCPU's last put: ask before vCPUs may drop roots.)
    pub fn sptes_under_obsolete_roots(&self, task: &Task<P>) -> u64 {
        let _rcu = task.rcu_read();
        let obsolete = self.listed_roots().filter(|&root| self.is_obsolete(root));
        obsolete.map(|root| self.count_table(root, self.root_level(), None).sptes()).sum()
    }

    /// Present leaves under those of `roots` that are listed. For designs that keep roots valid (in-place): the roots of [`TdpMmu::valid_roots`] before the
    /// zap, counted after it. What vCPUs have faulted in again since counts too, so hold them off or subtract what they made; and a page
    /// that was freed and became a root again is taken for the old root, which cannot happen while its users keep it.
    pub fn count_leaves_of(&self, task: &Task<P>, roots: &[u32]) -> u64 {
        let _rcu = task.rcu_read();
        let listed = self.listed_roots().filter(|root| roots.contains(root));
        listed.map(|root| self.count_table(root, self.root_level(), None).sptes()).sum()
    }

    fn count_table(&self, table: u32, level: u8, next: Option<&Entries>) -> Counts {
        let mut counts = Counts::default();
        counts.tables[level as usize] = 1;
        let entries = self.pool().entries(table);
        if level == 1 {
            if P::BY_COUNT
                && let Some(held) = self.pool().by_count().and_then(|uniform| uniform.get(table))
            {
                // The present bit is none of those that differ from entry to entry.
                let (spte, all) = (Spte(held.first), ENTRIES as u64);
                let present = spte.is_present();
                counts.leaves[1] = if present { all } else { 0 };
                counts.others = if present || spte == self.format().empty() { 0 } else { all };
                return counts;
            }
            // Branch-free: this loop reads every SPTE of the guest.
            let (mut present, mut empty) = (0u64, 0u64);
            for (n, line) in entries.as_chunks::<LINE>().0.iter().enumerate() {
                if let Some(next) = next {
                    prefetch(next, n * LINE, Intent::Read);
                }
                for entry in line {
                    let spte = Spte(P::load(entry, Site::SpteRead));
                    present += u64::from(spte.is_present());
                    empty += u64::from(spte == self.format().empty());
                }
            }
            counts.leaves[1] = present;
            counts.others = ENTRIES as u64 - present - empty;
            return counts;
        }
        for (index, entry) in entries.iter().enumerate() {
            let spte = Spte(P::load(entry, Site::SpteRead));
            if spte.is_table(level) {
                let next = entries.get(index + 1).map(|next| Spte(P::load(next, Site::SpteRead)));
                let next = next
                    .filter(|next| level == 2 && next.is_table(2))
                    .map(|next| self.pool().child_entries(next));
                counts.add(&self.count_table(spte.pfn() as u32, level - 1, next));
            } else if spte.is_present() {
                counts.leaves[level as usize] += 1;
            } else if spte != self.format().empty() {
                counts.others += 1;
            }
        }
        counts
    }

    /// Visits every present leaf of `range` under `root`: (first gfn, level, value), ascending. A snapshot, inside one RCU section.
    pub fn leaves(
        &self,
        task: &Task<P>,
        root: u32,
        range: std::ops::Range<u64>,
        visit: &mut dyn FnMut(u64, u8, Spte),
    ) {
        let _rcu = task.rcu_read();
        self.visit(root, self.root_level(), 0, &range, visit);
    }

    fn visit(
        &self,
        table: u32,
        level: u8,
        base: u64,
        range: &std::ops::Range<u64>,
        visit: &mut dyn FnMut(u64, u8, Spte),
    ) {
        let span = tdpmmu_spte::geometry::span(level);
        let first = range.start.saturating_sub(base) / span;
        for index in first..ENTRIES as u64 {
            let gfn = base + index * span;
            if gfn >= range.end {
                return;
            }
            let spte = Spte(P::load(&self.pool().entries(table)[index as usize], Site::SpteRead));
            if spte.is_table(level) {
                self.visit(spte.pfn() as u32, level - 1, gfn, range, visit);
            } else if spte.is_leaf(level) {
                visit(gfn, level, spte);
            }
        }
    }
}
