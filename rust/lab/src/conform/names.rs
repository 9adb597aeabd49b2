//! Names for what differs from run to run: tables, roots, frames.
//!
//! **Guarantee.** Two histories that do the same at the same places get the same names, whatever pages they happened to use. A table is named when an entry begins to point to
//! it, and by its frame from then on; a root when it is made.

use std::collections::HashMap;

/// A root whose name is not known.
pub const NO_ROOT: u32 = u32::MAX;
/// A table whose name is not known.
pub const NO_TABLE: u64 = (1 << 40) - 1;

const PRESENT: u64 = 1 << 11;
const LARGE: u64 = 1 << 7;
const PFN: u64 = ((1 << 52) - 1) & !0xfff;

/// Name of the `n`-th root of an address space.
pub fn root_name(as_id: u8, n: u32) -> u32 {
    u32::from(as_id) << 24 | n
}

/// A root's name for people.
pub fn root_text(name: u32) -> String {
    match name {
        NO_ROOT => "root ?".to_owned(),
        name => format!("root {}.{}", name >> 24, name & 0xff_ffff),
    }
}

/// One SPTE transition with names in the place of table frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Change {
    /// Name of the root.
    pub root: u32,
    /// Address space.
    pub as_id: u8,
    /// Level of the entry.
    pub level: u8,
    /// First gfn of the entry.
    pub gfn: u64,
    /// Value before.
    pub old: u64,
    /// Value after.
    pub new: u64,
}

/// Does `value` point to a table?
pub fn is_table(value: u64, level: u8) -> bool {
    value & PRESENT != 0 && level > 1 && value & LARGE == 0
}

/// Is `value` a present leaf?
pub fn is_leaf(value: u64, level: u8) -> bool {
    value & PRESENT != 0 && (level == 1 || value & LARGE != 0)
}

/// The table's number in a named value.
pub fn table_of(value: u64) -> u64 {
    (value & PFN) >> 12
}

/// The bits of a named value that are no frame.
pub fn bits_of(value: u64) -> u64 {
    value & !PFN
}

/// Where an entry is: address space, level, gfn.
pub type Place = (u8, u8, u64);

/// Gives names, in the order of events.
#[derive(Default)]
pub struct Names {
    /// By VM and frame: the place that points to the table, and its number there.
    tables: HashMap<(u64, u64), (Place, u64)>,
    installed: HashMap<Place, u64>,
}

impl Names {
    /// The change `old -> new`, named. `vm`: whose page numbers these are, where they are not the machine's.
    pub fn change(&mut self, vm: u64, root: u32, at: (u8, u64, u8), old: u64, new: u64) -> Change {
        let (as_id, gfn, level) = at;
        let place = (as_id, level, gfn);
        let old = if is_table(old, level) {
            // A table that hangs elsewhere, or was never seen to be installed, has no name here.
            let known = self.tables.get(&(vm, old & PFN)).filter(|(there, _)| *there == place);
            bits_of(old) | known.map_or(NO_TABLE, |(_, name)| *name) << 12
        } else {
            old
        };
        let new = if is_table(new, level) {
            let count = self.installed.entry(place).or_default();
            let name = *count;
            *count += 1;
            self.tables.insert((vm, new & PFN), (place, name));
            bits_of(new) | name << 12
        } else {
            new
        };
        Change { root, as_id, level, gfn, old, new }
    }
}

/// Names for frames of leaves in recordings that do not tell them: the place of a frame's first appearance, and how many appeared there before it. Given out for both
/// sides by one of these; not by order, since of racing vCPUs nobody knows which was first.
#[derive(Default)]
pub struct FrameNames {
    numbers: HashMap<(Place, u64), u64>,
}

impl FrameNames {
    /// Renames the frames of one side.
    pub fn rename<'a>(&mut self, changes: impl Iterator<Item = &'a mut Change>) {
        let mut frames: HashMap<u64, u64> = HashMap::new();
        let mut appeared: HashMap<Place, u64> = HashMap::new();
        for change in changes {
            let place = (change.as_id, change.level, change.gfn);
            for value in [&mut change.old, &mut change.new] {
                if !is_leaf(*value, change.level) {
                    continue;
                }
                let name = *frames.entry(*value & PFN).or_insert_with(|| {
                    let before = appeared.entry(place).or_default();
                    let next = self.numbers.len() as u64;
                    let name = *self.numbers.entry((place, *before)).or_insert(next);
                    *before += 1;
                    name
                });
                *value = bits_of(*value) | name << 12;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_places_get_the_same_names_whatever_the_pages() {
        let run = |pages: [u64; 2]| {
            let mut names = Names::default();
            [
                names.change(0, 0, (0, 0x200, 2), 0, pages[0] << 12 | 0x827),
                names.change(0, 0, (0, 0x200, 2), pages[0] << 12 | 0x827, 0),
                names.change(0, 0, (0, 0x200, 2), 0, pages[1] << 12 | 0x827),
            ]
        };
        assert_eq!(run([7, 9]), run([100, 3]));
        assert_eq!(table_of(run([7, 9])[2].new), 1, "the second table at its place");
        assert_eq!(run([5, 5])[1].old, 0x827, "the first");
    }

    #[test]
    fn frames_of_leaves_are_kept_unless_they_were_invented() {
        let mut names = Names::default();
        let mut changes = [
            names.change(0, 0, (0, 1, 1), 0, 0x1234e67),
            names.change(0, 0, (0, 2, 1), 0, 0x9999e67),
            names.change(0, 0, (0, 1, 1), 0x1234e67, 0x5a0),
        ];
        assert_eq!(changes[0].new, 0x1234e67);
        FrameNames::default().rename(changes.iter_mut());
        assert_eq!((changes[0].new, changes[1].new), (0xe67, 0x1e67));
        assert_eq!((changes[2].old, changes[2].new), (0xe67, 0x5a0));
    }

    #[test]
    fn invented_frames_are_the_same_up_to_order_and_two_of_them_are_never_one() {
        let run = |frames: &mut FrameNames, order: &[(u64, u64)]| {
            let mut names = Names::default();
            let change = |&(gfn, pfn): &(u64, u64)| names.change(0, 0, (0, gfn, 1), 0, pfn << 12 | 0xe67);
            let mut changes: Vec<Change> = order.iter().map(change).collect();
            frames.rename(changes.iter_mut());
            changes.sort_unstable();
            changes
        };
        let mut frames = FrameNames::default();
        let first = run(&mut frames, &[(1, 0x50), (2, 0x60), (3, 0x50)]);
        assert_eq!(first, run(&mut frames, &[(2, 7), (1, 9), (3, 9)]));
        assert_ne!(first, run(&mut frames, &[(1, 9), (2, 9), (3, 9)]), "merged");
        assert_ne!(first, run(&mut frames, &[(1, 7), (2, 8), (3, 9)]), "split");
    }
}
