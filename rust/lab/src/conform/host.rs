//! The host's answers that stand in no line: how large it maps what nobody faults on.
//!
//! When dirty logging ends, and for the list of NX candidates, KVM asks the host for its mapping level. No event tells the answer. It is carried over: the last level that the
//! host gave a fault on the same 2 MiB when no cap hid it, else what the memory's kind promises. A transparent huge page is split first when a part of it is taken away or copied on
//! write: that is told by a notification of the whole from inside another, or from a write. Any other of the whole leaves nothing known.

use std::collections::{BTreeMap, HashMap, HashSet};

const PAGES_2M: u64 = 512;
const PAGES_1G: u64 = 512 * 512;

/// A memslot as the script asked for it.
#[derive(Clone, Copy, Debug)]
pub struct Slot {
    /// First gfn.
    pub base: u64,
    /// Pages.
    pub pages: u64,
    /// First host virtual page.
    pub hva: u64,
    /// Logs dirty pages.
    pub logs: bool,
}

impl Slot {
    /// Largest level that the slot's alignment allows at `gfn`.
    fn cap(&self, gfn: u64) -> u8 {
        let fits = |unit: u64| {
            let first = gfn / unit * unit;
            (self.base ^ self.hva).is_multiple_of(unit)
                && first >= self.base
                && first + unit <= self.base + self.pages
        };
        match () {
            () if fits(PAGES_1G) => 3,
            () if fits(PAGES_2M) => 2,
            () => 1,
        }
    }
}

/// What backs memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// 4 KiB pages and no others.
    Small,
    /// Transparent huge pages where they fit.
    Transparent,
    /// Huge pages of 2 MiB, always.
    Huge2m,
    /// Huge pages of 1 GiB, always.
    Huge1g,
}

impl Kind {
    fn named(kind: &str) -> Self {
        match kind {
            "hugetlb1g" => Kind::Huge1g,
            "hugetlb2m" => Kind::Huge2m,
            kind if kind.starts_with("thp") => Kind::Transparent,
            _ => Kind::Small,
        }
    }

    /// The level that memory of this kind gets at first.
    fn level(self) -> u8 {
        match self {
            Kind::Small => 1,
            Kind::Transparent | Kind::Huge2m => 2,
            Kind::Huge1g => 3,
        }
    }
}

/// What is known of the host's memory.
#[derive(Default)]
pub struct HostMemory {
    /// Kinds of memory by first page, with their ends.
    kinds: BTreeMap<u64, (u64, Kind)>,
    /// Level by 2 MiB piece.
    known: HashMap<u64, u8>,
    /// Pieces that get no huge page.
    small: HashSet<u64>,
    slots: HashMap<(u64, u8, u16), Slot>,
}

impl HostMemory {
    /// A slot of VM `vm` is made or changed, on memory of this kind.
    pub fn set_slot(&mut self, vm: u64, as_id: u8, id: u16, slot: Slot, kind: &str) {
        let end = slot.hva + slot.pages;
        if kind != "none" && !kind.is_empty() {
            self.kinds.insert(slot.hva, (end, Kind::named(kind)));
        }
        self.slots.insert((vm, as_id, id), slot);
    }

    /// A slot is gone.
    pub fn delete_slot(&mut self, vm: u64, as_id: u8, id: u16) {
        self.slots.remove(&(vm, as_id, id));
    }

    fn slot_at(&self, vm: u64, as_id: u8, gfn: u64) -> Option<&Slot> {
        let of = |(key, slot): &(&(u64, u8, u16), &Slot)| {
            key.0 == vm && key.1 == as_id && gfn.wrapping_sub(slot.base) < slot.pages
        };
        self.slots.iter().find(of).map(|(_, slot)| slot)
    }

    /// The host page behind a gfn, and what its memory's kind promises.
    pub fn page_at(&self, vm: u64, as_id: u8, gfn: u64) -> Option<u64> {
        self.slot_at(vm, as_id, gfn).map(|slot| slot.hva + (gfn - slot.base))
    }

    /// A fault on `gfn` was given `level`. `hidden`: a cap other than the slot's alignment was in force.
    pub fn faulted(&mut self, vm: u64, as_id: u8, gfn: u64, level: u8, hidden: bool) {
        let Some(slot) = self.slot_at(vm, as_id, gfn).copied() else { return };
        if slot.logs || hidden {
            return;
        }
        let cap = slot.cap(gfn);
        if level < cap || level > 1 {
            self.known.insert((slot.hva + (gfn - slot.base)) / PAGES_2M, level);
        }
    }

    /// The host takes pages `[start, end)` away. `split`: from inside another change, or for a write: then what goes is a huge mapping, and the pages stay. Otherwise a piece
    /// that is mapped by small pages keeps its page table, and gets small pages again.
    pub fn taken(&mut self, start: u64, end: u64, split: bool) {
        if end <= start || end - start > PAGES_1G * 1024 {
            return;
        }
        for piece in start.div_ceil(PAGES_2M)..end / PAGES_2M {
            if self.kind_at(piece * PAGES_2M) != Some(Kind::Transparent) {
                continue;
            }
            if split {
                self.known.insert(piece, 1);
            } else if self.known.get(&piece) == Some(&2) {
                self.known.remove(&piece);
            }
        }
    }

    /// MADV_NOHUGEPAGE, or its end, for pages `[start, end)`.
    pub fn advise_small(&mut self, start: u64, end: u64, small: bool) {
        if end <= start || end - start > PAGES_1G * 1024 {
            return;
        }
        for piece in start / PAGES_2M..end.div_ceil(PAGES_2M) {
            if small {
                self.small.insert(piece);
            } else {
                self.small.remove(&piece);
            }
        }
    }

    /// The host has gathered pages `[start, end)` into huge ones (MADV_COLLAPSE).
    pub fn gathered(&mut self, start: u64, end: u64) {
        if end <= start || end - start > PAGES_1G * 1024 {
            return;
        }
        for piece in start.div_ceil(PAGES_2M)..end / PAGES_2M {
            if self.kind_at(piece * PAGES_2M) == Some(Kind::Transparent) {
                self.known.insert(piece, 2);
            }
        }
    }

    fn kind_at(&self, page: u64) -> Option<Kind> {
        let (_, &(end, kind)) = self.kinds.range(..=page).next_back()?;
        (page < end).then_some(kind)
    }

    /// Level at which the host maps this page.
    pub fn level(&self, page: u64) -> u8 {
        if let Some(&level) = self.known.get(&(page / PAGES_2M)) {
            return level;
        }
        if self.small.contains(&(page / PAGES_2M)) {
            return 1;
        }
        self.kind_at(page).map_or(1, Kind::level)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory() -> HostMemory {
        let mut host = HostMemory::default();
        let slot = Slot { base: 0x180000, pages: 0x2000, hva: 0x7fa9d7000, logs: false };
        host.set_slot(1, 0, 2, slot, "thp");
        host
    }

    #[test]
    fn the_last_level_that_no_cap_hid_is_carried_over() {
        let mut host = memory();
        assert_eq!(host.level(0x7fa9d7000), 2, "its kind promises 2M");
        host.faulted(1, 0, 0x180000, 1, true);
        assert_eq!(host.level(0x7fa9d7000), 2, "hidden");
        host.faulted(1, 0, 0x180005, 1, false);
        assert_eq!(host.level(0x7fa9d7000), 1);
        assert_eq!(host.level(0x7fa9d7200), 2, "another piece");
        host.taken(0x7fa9d7000, 0x7fa9d7200, false);
        assert_eq!(host.level(0x7fa9d7000), 1, "its page table stays");
        host.gathered(0x7fa9d7000, 0x7fa9d7200);
        assert_eq!(host.level(0x7fa9d71ff), 2);
        host.taken(0x7fa9d7000, 0x7fa9d7200, true);
        assert_eq!(host.level(0x7fa9d71ff), 1, "its mapping was split");
        assert_eq!(host.level(0x7fa9d9000), 1, "no memory of ours");
    }

    #[test]
    fn a_slots_alignment_is_a_cap_that_tells_nothing() {
        let mut host = memory();
        host.set_slot(1, 0, 3, Slot { base: 0x1001, pages: 0x400, hva: 0x7fa9d7200, logs: false }, "none");
        host.faulted(1, 0, 0x1001, 1, false);
        assert_eq!(host.level(0x7fa9d7200), 2);
    }
}
