//! The rebuilt tables: an arena of 512-entry tables, hung below roots.
//!
//! A table keeps each entry's value, how that value is known ([`Known`]), and which table hangs below. A table that was
//! unlinked stays reachable through its root's list of dying tables until its removal is complete.

use tdpmmu_spte::ENTRIES;
use tdpmmu_spte::geometry::{index, table_span};

pub(crate) type TableId = u32;
pub(crate) type RootId = u32;
pub(crate) const NONE: u32 = u32::MAX;

/// How an entry's value is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Known {
    /// By an event on it, or because its table was new.
    Traced,
    /// By a fast page fault since.
    Fast,
    /// By the split that filled it.
    Split,
    /// Frozen in a linked table: its owner empties it without an event (atomic zap up to 6.9).
    Frozen,
    /// By its first event after a time it was not known: the line before that one may stand after it.
    Blind,
    /// As it was before events were lost: its next event tells whether they touched it.
    Doubted,
    /// Not at all: before the recording, or after a loss.
    Unknown,
}

/// Where a table is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Life {
    Linked,
    Dying,
}

pub(crate) struct Table {
    pub(crate) level: u8,
    pub(crate) gfn: u64,
    /// Physical address, 0 when not known.
    pub(crate) pa: u64,
    pub(crate) root: RootId,
    pub(crate) life: Life,
    pub(crate) entries: Box<[u64; ENTRIES]>,
    pub(crate) known: Box<[Known; ENTRIES]>,
    children: Option<Box<[TableId; ENTRIES]>>,
    /// The table and index of the entry that points here.
    parent: Option<(TableId, usize)>,
    /// `kvm_mmu_prepare_zap_page` was seen for it.
    pub(crate) prepared: bool,
    /// Not seen from its birth on.
    pub(crate) adopted: bool,
    /// Removed under the shared lock, which freezes every entry.
    pub(crate) shared_removal: bool,
}

impl Table {
    pub(crate) fn covers(&self, gfn: u64) -> bool {
        gfn >= self.gfn && gfn - self.gfn < table_span(self.level)
    }

    /// The first entry that a removal under the shared lock has not frozen.
    pub(crate) fn first_open(&self, frozen: u64) -> Option<usize> {
        (0..ENTRIES).find(|&i| self.entries[i] != frozen || self.known[i] == Known::Frozen)
    }

    pub(crate) fn child(&self, i: usize) -> TableId {
        self.children.as_ref().map_or(NONE, |c| c[i])
    }
}

pub(crate) struct Root {
    /// Kernel address of its table, 0 when it was inferred.
    pub(crate) spt: u64,
    pub(crate) as_id: u8,
    pub(crate) level: u8,
    pub(crate) table: TableId,
    pub(crate) vm: usize,
    pub(crate) live: bool,
    pub(crate) dying: Vec<TableId>,
}

#[derive(Default)]
pub(crate) struct Forest {
    tables: Vec<Option<Table>>,
    free: Vec<TableId>,
    pub(crate) roots: Vec<Root>,
    pub(crate) live_tables: u64,
    pub(crate) peak_tables: u64,
}

/// Result of a search for an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Entry(TableId, usize),
    /// The path ends in an entry whose content is not known; the table and the index of that entry.
    Blind(TableId, usize),
    Missing,
}

impl Forest {
    pub(crate) fn table(&self, id: TableId) -> &Table {
        self.tables[id as usize].as_ref().expect("a table id is used only while its table is in the forest")
    }

    pub(crate) fn table_mut(&mut self, id: TableId) -> &mut Table {
        self.tables[id as usize].as_mut().expect("a table id is used only while its table is in the forest")
    }

    pub(crate) fn holds(&self, id: TableId) -> bool {
        self.tables.get(id as usize).is_some_and(Option::is_some)
    }

    pub(crate) fn new_table(
        &mut self,
        root: RootId,
        level: u8,
        gfn: u64,
        pa: u64,
        value: u64,
        known: Known,
    ) -> TableId {
        let children = (level > 1).then(|| Box::new([NONE; ENTRIES]));
        let table = Table {
            level,
            gfn,
            pa,
            root,
            life: Life::Linked,
            entries: Box::new([value; ENTRIES]),
            known: Box::new([known; ENTRIES]),
            children,
            parent: None,
            prepared: false,
            adopted: false,
            shared_removal: false,
        };
        self.live_tables += 1;
        self.peak_tables = self.peak_tables.max(self.live_tables);
        if let Some(id) = self.free.pop() {
            self.tables[id as usize] = Some(table);
            id
        } else {
            self.tables.push(Some(table));
            (self.tables.len() - 1) as TableId
        }
    }

    /// Hangs `child` below entry `i` of `table`.
    pub(crate) fn hang(&mut self, table: TableId, i: usize, child: TableId) {
        if let Some(children) = &mut self.table_mut(table).children {
            children[i] = child;
            self.table_mut(child).parent = Some((table, i));
        }
    }

    /// Takes whatever hangs below entry `i` of `table` off.
    pub(crate) fn unhang(&mut self, table: TableId, i: usize) {
        let Some(children) = &mut self.table_mut(table).children else { return };
        let child = std::mem::replace(&mut children[i], NONE);
        if child != NONE {
            self.table_mut(child).parent = None;
        }
    }

    /// Takes the table, and what still hangs below it, out of the forest; gives the physical addresses.
    pub(crate) fn drop_table(&mut self, id: TableId, freed: &mut Vec<u64>) {
        if let Some((above, i)) = self.tables[id as usize].as_ref().and_then(|t| t.parent) {
            self.unhang(above, i);
        }
        let Some(table) = self.tables[id as usize].take() else { return };
        self.live_tables -= 1;
        freed.push(table.pa);
        if table.life == Life::Dying {
            self.roots[table.root as usize].dying.retain(|&d| d != id);
        }
        if let Some(children) = &table.children {
            for &child in children.iter().filter(|&&c| c != NONE) {
                self.table_mut(child).parent = None;
                self.drop_table(child, freed);
            }
        }
        self.free.push(id);
    }

    /// Every table in the forest.
    pub(crate) fn for_each_table(&mut self, mut f: impl FnMut(&mut Table)) {
        self.tables.iter_mut().flatten().for_each(&mut f);
    }

    /// The entry at `level` that maps `gfn` below `from`.
    pub(crate) fn walk(&self, from: TableId, level: u8, gfn: u64) -> Found {
        let mut id = from;
        loop {
            let table = self.table(id);
            if table.level < level || !table.covers(gfn) {
                return Found::Missing;
            }
            let i = index(gfn, table.level);
            if table.level == level {
                return Found::Entry(id, i);
            }
            match table.child(i) {
                NONE if matches!(table.known[i], Known::Unknown | Known::Doubted) => {
                    return Found::Blind(id, i);
                }
                NONE => return Found::Missing,
                child => id = child,
            }
        }
    }

    /// As [`Forest::walk`] from the root, then through the tables that are being removed.
    pub(crate) fn find(&self, root: RootId, level: u8, gfn: u64) -> Found {
        let r = &self.roots[root as usize];
        let found = if self.holds(r.table) { self.walk(r.table, level, gfn) } else { Found::Missing };
        if found != Found::Missing {
            return found;
        }
        for &dying in r.dying.iter().rev() {
            if let found @ Found::Entry(..) = self.walk(dying, level, gfn) {
                return found;
            }
        }
        Found::Missing
    }

    /// The lowest entry that is no table on the path to `gfn`, as a lockless walk ends.
    pub(crate) fn find_leaf(&self, root: RootId, gfn: u64) -> Option<(TableId, usize)> {
        let mut id = self.roots[root as usize].table;
        loop {
            if !self.holds(id) || !self.table(id).covers(gfn) {
                return None;
            }
            let table = self.table(id);
            let i = index(gfn, table.level);
            match table.child(i) {
                NONE => return Some((id, i)),
                child => id = child,
            }
        }
    }
}
