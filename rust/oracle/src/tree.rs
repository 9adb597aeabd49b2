//! What is there: a full read of every listed root, which trusts nothing that it reads.

use std::collections::{BTreeMap, BTreeSet};

use tdpmmu_mmu::TdpMmu;
use tdpmmu_platform::{Exclusive, Guard, Platform, Site};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Role, Spte};

use crate::model::Key;
use crate::rule::Rule;
use crate::verdict::Verdict;

/// A table that was reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeenTable {
    /// Pool index.
    pub table: u32,
    /// The root it was reached from.
    pub root: u32,
    /// Its level.
    pub level: u8,
    /// Its first gfn.
    pub gfn: u64,
    /// The entry that links it.
    pub parent: Option<(u32, u16)>,
}

/// Everything under the listed roots.
#[derive(Clone, Debug, Default)]
pub struct Tree {
    /// Listed roots: count and invalid bit.
    pub roots: BTreeMap<u32, (u32, bool)>,
    /// Entries that are not empty.
    pub entries: BTreeMap<Key, Spte>,
    /// Tables that are no roots.
    pub tables: Vec<SeenTable>,
    /// Present leaves by level (1..=5).
    pub leaves: [i64; 6],
}

impl Tree {
    /// Reads everything. The exclusive lock keeps all writers out but hardware and the fast page fault.
    pub fn read<P: Platform>(
        mmu: &TdpMmu<P>,
        _guard: &Guard<'_, P, Exclusive>,
        verdict: &mut Verdict,
    ) -> Tree {
        let mut tree = Tree::default();
        let mut seen = BTreeSet::new();
        for root in mmu.listed_roots() {
            if tree.roots.insert(root, (mmu.refs(root), mmu.is_obsolete(root))).is_some() {
                verdict.broken(Rule::ListDiffers, Some(root), None, "listed twice".to_owned());
                break;
            }
            let meta = mmu.pool().meta(root);
            if meta.level() != mmu.root_level() || meta.gfn() != 0 || meta.parent().is_some() {
                let what = format!(
                    "a root with level {}, gfn {:#x}, parent {:?}",
                    meta.level(),
                    meta.gfn(),
                    meta.parent()
                );
                verdict.broken(Rule::HeaderDiffers, Some(root), None, what);
            }
            seen.insert(root);
            tree.descend(mmu, root, root, mmu.root_level(), 0, &mut seen, verdict);
        }
        tree
    }

    fn descend<P: Platform>(
        &mut self,
        mmu: &TdpMmu<P>,
        root: u32,
        table: u32,
        level: u8,
        base: u64,
        seen: &mut BTreeSet<u32>,
        verdict: &mut Verdict,
    ) {
        let (format, pool) = (mmu.format(), mmu.pool());
        for (index, cell) in pool.entries(table).iter().enumerate() {
            let spte = Spte(P::load(cell, Site::SpteRead));
            if format.is_empty(spte) {
                continue;
            }
            let gfn = base + index as u64 * span(level);
            let key = Key { as_id: mmu.as_id(root), root, gfn, level };
            if format.is_frozen(spte) {
                let what = format!("frozen at level {level}, and nobody can own it");
                verdict.broken(Rule::FrozenLeft, Some(root), Some(gfn), what);
                continue;
            }
            self.entries.insert(key, spte);
            if spte.is_leaf(level) {
                self.leaves[level as usize] += 1;
                continue;
            }
            if !spte.is_table(level) {
                continue;
            }
            let child = spte.pfn();
            // Index 0 is never a table; beyond the cap and its slack (two words of the free map) lies no memory of the pool.
            if child == 0 || child >= pool.cap() + 128 || !seen.insert(child as u32) {
                let what =
                    format!("entry {spte:?} at level {level} names page {child}, no table or linked already");
                verdict.broken(Rule::TreeDiffers, Some(root), Some(gfn), what);
                continue;
            }
            let child = child as u32;
            let meta = pool.meta(child);
            let here = (gfn, level - 1, Some((table, index as u16)));
            let role = Role(pool.meta(table).role()).child();
            // A root's invalid bit comes later than its children: they keep the role they were made with.
            let layout = mmu.profile().role_layout;
            let same_role = Role(meta.role()).with_invalid(layout) == role.with_invalid(layout);
            if (meta.gfn(), meta.level(), meta.parent()) != here || !same_role {
                let what = format!(
                    "table {child} says gfn {:#x} level {} parent {:?} role {:#x}, it is at {here:x?}",
                    meta.gfn(),
                    meta.level(),
                    meta.parent(),
                    meta.role()
                );
                verdict.broken(Rule::HeaderDiffers, Some(root), Some(gfn), what);
            }
            self.tables.push(SeenTable {
                table: child,
                root,
                level: level - 1,
                gfn,
                parent: Some((table, index as u16)),
            });
            self.descend(mmu, root, child, level - 1, gfn, seen, verdict);
        }
    }
}
