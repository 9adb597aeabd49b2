//! A prediction from operations: what one thread's faults, zaps and populations must leave, said as simply as possible.
//!
//! The other oracles ask whether the reports and the tree agree; an engine that skips an entry and says so passes them. This one says what
//! the operations *mean*: a map per root from (gfn, level) to a table or an entry, no locks, no iterator, no batches. Only the making of
//! an entry from its facts is shared with the engine (`tdpmmu_spte`, tested against recordings).

use std::collections::BTreeMap;
use std::ops::Range;

use tdpmmu_mmu::{BulkMap, FastOutcome, Frame, MapFault, MapOutcome};
use tdpmmu_spte::geometry::{ENTRIES, round_down, span};
use tdpmmu_spte::{Access, AdMode, EagerSplit, Format, KernelProfile, MakeLeaf, SplitInFault, Spte};

/// What an entry holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    /// A pointer to a table one level down.
    Table,
    /// A leaf, or an MMIO value.
    Entry(Spte),
}

/// One root's entries, by first gfn and level.
type Entries = BTreeMap<(u64, u8), Node>;

struct Root {
    as_id: u8,
    entries: Entries,
}

/// See the module text.
pub struct Sequential {
    profile: KernelProfile,
    format: Format,
    root_level: u8,
    max_gfn: u64,
    roots: BTreeMap<u32, Root>,
}

impl Sequential {
    /// No roots yet. Faults and zaps end below `max_gfn`.
    pub fn new(profile: KernelProfile, format: Format, root_level: u8, max_gfn: u64) -> Self {
        Self { profile, format, root_level, max_gfn, roots: BTreeMap::new() }
    }

    /// `root` exists from here on; nothing happens if it did before.
    pub fn load(&mut self, root: u32, as_id: u8) {
        self.roots.entry(root).or_insert(Root { as_id, entries: Entries::new() });
    }

    /// `root` and everything in it are gone.
    pub fn drop_root(&mut self, root: u32) {
        self.roots.remove(&root);
    }

    /// Every root is empty.
    pub fn zap_all(&mut self) {
        for root in self.roots.values_mut() {
            root.entries.clear();
        }
    }

    /// The roots that exist.
    pub fn roots(&self) -> impl Iterator<Item = u32> {
        self.roots.keys().copied()
    }

    /// The entries of `root`, empty ones left out.
    pub fn entries(&self, root: u32) -> impl Iterator<Item = (&(u64, u8), &Node)> {
        self.roots.get(&root).into_iter().flat_map(|r| &r.entries)
    }

    fn remove_below(entries: &mut Entries, gfn: u64, level: u8) {
        let below: Vec<(u64, u8)> = entries
            .range((gfn, 0)..(gfn + span(level), 0))
            .map(|(&at, _)| at)
            .filter(|&(_, l)| l < level)
            .collect();
        for at in below {
            entries.remove(&at);
        }
    }

    /// A fault that finds everything settled.
    pub fn fault(&mut self, root: u32, fault: &MapFault) -> MapOutcome {
        let (format, profile) = (self.format, self.profile);
        let Some(root) = self.roots.get_mut(&root) else { return MapOutcome::Retry };
        let entries = &mut root.entries;
        for level in (fault.goal_level + 1..=self.root_level).rev() {
            let base = round_down(fault.gfn, level);
            let was = entries.insert((base, level), Node::Table);
            if let Some(Node::Entry(huge)) = was
                && huge.is_leaf(level)
                && profile.split_in_fault == SplitInFault::Split
            {
                for i in 0..ENTRIES {
                    let child = format.split_child(huge, level, i, false);
                    entries.insert((base + i as u64 * span(level - 1), level - 1), Node::Entry(child));
                }
            }
        }
        let level = fault.goal_level;
        let base = round_down(fault.gfn, level);
        let (pfn, writable) = match fault.frame {
            Frame::Mmio { generation } => {
                let value = format.mmio(fault.gfn, Access::ALL, generation);
                Self::remove_below(entries, base, level);
                entries.insert((base, level), Node::Entry(value));
                return MapOutcome::Emulate;
            }
            Frame::Page { pfn, writable } => (round_down(pfn, level), writable),
        };
        let old = match entries.get(&(base, level)) {
            None => format.empty(),
            Some(Node::Entry(spte)) => *spte,
            // Any table will do: only its permissions are looked at.
            Some(Node::Table) => format.table(1, false),
        };
        if profile.spurious_if_allowed && old.is_leaf(level) && format.allows(old, fault.write, fault.exec) {
            return MapOutcome::Spurious;
        }
        let made = format.make_leaf(&MakeLeaf {
            pfn,
            level,
            access: Access::ALL,
            prefetch: fault.prefetch,
            host_writable: writable,
            write_protected: false,
            old,
            dirty_tracked: fault.dirty_tracked,
            ad_mode: AdMode::Enabled,
            nx_mitigation: false,
            remake: profile.remake_dirty,
        });
        if old == made.spte {
            return MapOutcome::Spurious;
        }
        Self::remove_below(entries, base, level);
        entries.insert((base, level), Node::Entry(made.spte));
        MapOutcome::Fixed { level, spte: made.spte }
    }

    /// A fast page fault.
    pub fn fast_fault(&mut self, root: u32, gfn: u64, write: bool, exec: bool) -> FastOutcome {
        let format = self.format;
        let Some(root) = self.roots.get_mut(&root) else { return FastOutcome::Declined };
        for level in 1..=3 {
            let Some(Node::Entry(spte)) = root.entries.get_mut(&(round_down(gfn, level), level)) else {
                continue;
            };
            if !spte.is_leaf(level) {
                continue;
            }
            if !format.is_access_tracked(*spte) && format.allows(*spte, write, exec) {
                return FastOutcome::Spurious;
            }
            let mut new = format.restore_access_track(*spte);
            if write && format.is_mmu_writable(new) {
                new = format.with_write(new);
            }
            if new == *spte || !format.allows(new, write, exec) {
                return FastOutcome::Declined;
            }
            *spte = new;
            return FastOutcome::Fixed(new);
        }
        FastOutcome::Declined
    }

    /// Every leaf and MMIO-free page of `range` in one address space goes, in every root; a huge leaf that straddles goes whole. Up to 5.17 a table that lies wholly inside
    /// goes with all that is in it.
    pub fn unmap(&mut self, as_id: u8, range: Range<u64>) {
        let end = range.end.min(self.max_gfn);
        let whole = self.profile.unmap_frees_tables;
        for root in self.roots.values_mut().filter(|r| r.as_id == as_id) {
            let inside = |&(&(gfn, level), node): &(&(u64, u8), &Node)| {
                matches!(node, Node::Table) && range.start <= gfn && gfn + span(level) <= range.end
            };
            let gone: Vec<_> =
                root.entries.iter().filter(|at| whole && inside(at)).map(|(&at, _)| at).collect();
            for (gfn, level) in gone {
                Self::remove_below(&mut root.entries, gfn, level);
                root.entries.remove(&(gfn, level));
            }
            root.entries.retain(|&(gfn, level), node| match node {
                Node::Entry(spte) if spte.is_leaf(level) => gfn >= end || gfn + span(level) <= range.start,
                _ => true,
            });
        }
    }

    /// The leaves of one address space that `range` touches, of level `at_least` and above: (root, gfn, level, value).
    fn leaves_in(&self, as_id: u8, range: &Range<u64>, at_least: u8) -> Vec<(u32, u64, u8, Spte)> {
        let end = range.end.min(self.max_gfn);
        let in_space = self.roots.iter().filter(|(_, root)| root.as_id == as_id);
        in_space
            .flat_map(|(&id, root)| root.entries.iter().map(move |(&at, &node)| (id, at, node)))
            .filter_map(|(id, (gfn, level), node)| match node {
                Node::Entry(spte) if spte.is_leaf(level) => Some((id, gfn, level, spte)),
                _ => None,
            })
            .filter(|&(_, gfn, level, _)| level >= at_least && gfn < end && gfn + span(level) > range.start)
            .collect()
    }

    /// Eager split to `target`, one size after the other; returns how many leaves were split. Kernels without it do nothing.
    pub fn split(&mut self, as_id: u8, range: Range<u64>, target: u8) -> u64 {
        if self.profile.eager_split == EagerSplit::None {
            return 0;
        }
        let mut split = 0;
        for level in (target + 1..=3).rev() {
            for (id, gfn, _, huge) in self.leaves_in(as_id, &range, level) {
                let Some(root) = self.roots.get_mut(&id) else { continue };
                root.entries.insert((gfn, level), Node::Table);
                for i in 0..ENTRIES {
                    let child = self.format.split_child(huge, level, i, false);
                    let at = (gfn + i as u64 * span(level - 1), level - 1);
                    root.entries.insert(at, Node::Entry(child));
                }
                split += 1;
            }
        }
        split
    }

    /// W goes from every leaf of `min_level` and above that `range` touches; returns how many had it.
    pub fn write_protect(&mut self, as_id: u8, range: Range<u64>, min_level: u8) -> u64 {
        let mut changed = 0;
        for (id, gfn, level, spte) in self.leaves_in(as_id, &range, min_level) {
            if self.format.is_writable(spte)
                && let Some(root) = self.roots.get_mut(&id)
            {
                root.entries.insert((gfn, level), Node::Entry(self.format.without_write(spte)));
                changed += 1;
            }
        }
        changed
    }

    /// As [`Sequential::write_protect`] for the 4 KiB leaves of `base + n` for each bit n of `mask`.
    pub fn write_protect_masked(&mut self, as_id: u8, base: u64, mask: u64) -> u64 {
        (0..64).filter(|n| mask >> n & 1 != 0).map(|n| self.protect_small(as_id, base + n)).sum()
    }

    fn protect_small(&mut self, as_id: u8, gfn: u64) -> u64 {
        let mut changed = 0;
        for (id, at, level, spte) in self.leaves_in(as_id, &(gfn..gfn + 1), 1) {
            if level == 1
                && self.format.is_writable(spte)
                && let Some(root) = self.roots.get_mut(&id)
            {
                root.entries.insert((at, 1), Node::Entry(self.format.without_write(spte)));
                changed += 1;
            }
        }
        changed
    }

    /// Bulk population: new leaves where nothing is, a larger leaf stays; `None` where the engine must refuse (an MMIO entry on the path).
    pub fn bulk(&mut self, root: u32, map: &BulkMap) -> Option<u64> {
        let root_level = self.root_level;
        let entries = &mut self.roots.get_mut(&root)?.entries;
        let mut new = 0;
        let mut gfn = map.gfns.start;
        'gfns: while gfn < map.gfns.end {
            for level in (map.level + 1..=root_level).rev() {
                match entries.entry((round_down(gfn, level), level)).or_insert(Node::Table) {
                    Node::Table => {}
                    Node::Entry(spte) if spte.is_leaf(level) => {
                        gfn = round_down(gfn, level) + span(level);
                        continue 'gfns;
                    }
                    Node::Entry(_) => return None,
                }
            }
            let leaf = map.template.with_pfn(map.first_pfn + (gfn - map.gfns.start));
            entries.entry((gfn, map.level)).or_insert_with(|| {
                new += 1;
                Node::Entry(leaf)
            });
            gfn += span(map.level);
        }
        Some(new)
    }
}
