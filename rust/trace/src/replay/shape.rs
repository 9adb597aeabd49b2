//! A tree as it was at one moment, small enough to keep: runs of leafs instead of entries.
//!
//! A guest's memory is mostly mapped in runs of one level, so that a tree of many gigabytes takes a few hundred of them; an
//! adversary's tree is cut at [`MOST_RUNS`] and says so.

use super::tree::{Forest, Known, NONE, TableId};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{ENTRIES, Format, Spte};

/// Most runs and bare tables of one tree.
pub const MOST_RUNS: usize = 1 << 20;
/// Most trees that are kept of a recording.
pub const MOST_SHAPES: usize = 4096;

/// Leafs in a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First gfn, in pages of 4 KiB.
    pub gfn: u64,
    /// Level of the leafs, 1 to 3.
    pub level: u8,
    /// How many.
    pub count: u64,
    /// With W.
    pub writable: bool,
    /// With D.
    pub dirty: bool,
}

/// One tree.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RootShape {
    /// Address space.
    pub as_id: u8,
    /// Level of the root, 4 or 5.
    pub level: u8,
    /// Its leafs in the order of gfns.
    pub runs: Vec<Run>,
    /// Tables without any present entry: first gfn, level of their entries.
    pub bare: Vec<(u64, u8)>,
    /// Page-table pages, the root included.
    pub tables: u64,
    /// Entries whose content was not known.
    pub unknown: u64,
    /// Cut: the tree has more runs than are kept.
    pub cut: bool,
}

impl RootShape {
    /// Leafs of any level.
    pub fn leafs(&self) -> u64 {
        self.runs.iter().map(|r| r.count).sum()
    }
}

/// The trees that one zap met, each as it was before the first removal from it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Shape {
    /// Number of the zap in the replay's list.
    pub zap: usize,
    /// The trees.
    pub roots: Vec<RootShape>,
}

/// The shape of the tree below `root`, a table of level `level`.
pub(crate) fn take(forest: &Forest, format: &Format, root: TableId, as_id: u8, level: u8) -> RootShape {
    let mut shape = RootShape { as_id, level, ..RootShape::default() };
    if forest.holds(root) {
        walk(forest, format, root, &mut shape);
    }
    shape
}

/// As deep as the tree has levels.
fn walk(forest: &Forest, format: &Format, id: TableId, shape: &mut RootShape) {
    let table = forest.table(id);
    shape.tables += 1;
    let mut any = false;
    for i in 0..ENTRIES {
        let child = table.child(i);
        if child != NONE {
            any = true;
            walk(forest, format, child, shape);
            continue;
        }
        if table.known[i] == Known::Unknown {
            shape.unknown += 1;
            continue;
        }
        let value = Spte(table.entries[i]);
        if !value.is_leaf(table.level) || table.level > 3 {
            continue;
        }
        any = true;
        if shape.runs.len() + shape.bare.len() >= MOST_RUNS {
            shape.cut = true;
            return;
        }
        let gfn = table.gfn + i as u64 * span(table.level);
        let (writable, dirty) = (format.is_writable(value), value.0 & format.dirty != 0);
        match shape.runs.last_mut() {
            Some(run)
                if (run.level, run.writable, run.dirty) == (table.level, writable, dirty)
                    && run.gfn + run.count * span(run.level) == gfn =>
            {
                run.count += 1;
            }
            _ => shape.runs.push(Run { gfn, level: table.level, count: 1, writable, dirty }),
        }
    }
    if !any && table.level < shape.level && shape.bare.len() < MOST_RUNS {
        shape.bare.push((table.gfn, table.level));
    }
}
