//! What a reader keeps in mind: which table is where, who holds which root, which locks are held.

use std::collections::BTreeMap;

use tdpmmu_platform::{Event, Owner};
use tdpmmu_spte::geometry::index;

/// References on one root, by class of owner.
#[derive(Clone, Debug, Default)]
pub(super) struct Refs {
    pub(super) count: u32,
    by: BTreeMap<&'static str, i64>,
}

pub(super) fn owner(owner: Owner) -> &'static str {
    match owner {
        Owner::Vcpu => "vcpu",
        Owner::Mmu => "mmu",
        Owner::Gift => "gift",
        Owner::Iterator => "walk",
        Owner::Work => "work",
    }
}

impl Refs {
    /// `2 refs (mmu 1, vcpu 1)`; who has put what was not theirs stands there with a minus.
    pub(super) fn words(&self) -> String {
        let by: Vec<_> =
            self.by.iter().filter(|(_, n)| **n != 0).map(|(who, n)| format!("{who} {n}")).collect();
        let refs = if self.count == 1 { "ref" } else { "refs" };
        if by.is_empty() {
            format!("{} {refs}", self.count)
        } else {
            format!("{} {refs} ({})", self.count, by.join(", "))
        }
    }
}

#[derive(Default)]
pub(super) struct Books {
    /// (parent, index) -> table.
    children: BTreeMap<(u32, u16), u32>,
    roots: BTreeMap<u32, Refs>,
    root_level: u8,
}

impl Books {
    pub(super) fn new(root_level: u8) -> Self {
        Self { root_level, ..Self::default() }
    }

    /// Before the event is told.
    pub(super) fn note(&mut self, event: &Event) {
        match *event {
            Event::TableLink { table, parent, index } => {
                self.children.insert((parent, index), table);
            }
            Event::TableAlloc { table, .. } => self.children.retain(|(parent, _), _| *parent != table),
            Event::RootAlloc { root, refs, .. } => {
                self.children.retain(|(parent, _), _| *parent != root);
                let mut of = Refs { count: refs, ..Refs::default() };
                of.by.insert(owner(Owner::Vcpu), 1);
                if refs > 1 {
                    of.by.insert(owner(Owner::Mmu), i64::from(refs) - 1);
                }
                self.roots.insert(root, of);
            }
            Event::RootGet { root, refs, owner: by } => self.change(root, refs, by, 1),
            Event::RootPut { root, refs, owner: by } => self.change(root, refs, by, -1),
            Event::RootPass { root, from, to } => {
                let of = self.roots.entry(root).or_default();
                *of.by.entry(owner(from)).or_default() -= 1;
                *of.by.entry(owner(to)).or_default() += 1;
            }
            _ => {}
        }
    }

    fn change(&mut self, root: u32, refs: u32, by: Owner, delta: i64) {
        let of = self.roots.entry(root).or_default();
        of.count = refs;
        *of.by.entry(owner(by)).or_default() += delta;
    }

    pub(super) fn refs(&self, root: u32) -> String {
        self.roots.get(&root).map_or_else(|| "? refs".to_owned(), Refs::words)
    }

    /// Roots that are counted now, with their references.
    pub(super) fn held(&self) -> Vec<(u32, String)> {
        let held = self.roots.iter().filter(|(_, refs)| refs.count != 0);
        held.map(|(root, refs)| (*root, refs.words())).collect()
    }

    /// The entry of `gfn` at `level` under `root`, as `table[index]`, where the way down is known.
    pub(super) fn place(&self, root: u32, gfn: u64, level: u8) -> Option<String> {
        let mut table = root;
        for at in (level + 1..=self.root_level).rev() {
            table = *self.children.get(&(table, index(gfn, at) as u16))?;
        }
        Some(format!("{table}[{}]", index(gfn, level)))
    }
}
