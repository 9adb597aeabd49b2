"""The second-stage tables of one address space: leafs by level and gfn, and which entries are tables."""

from __future__ import annotations

from dataclasses import dataclass, field

from reference.host import SPAN

P, W, U, A, D, HUGE, HOST_W, MMU_W, PRESENT = (1 << n for n in (0, 1, 2, 5, 6, 7, 9, 10, 11))
NX = 1 << 63
#: What a value has beside its frame.
FLAGS = 0xFFF | NX
ROOT_LEVEL = 4

Key = tuple[int, int]  # level, first gfn


def down(gfn: int, level: int) -> int:
    return gfn // SPAN[level] * SPAN[level]


@dataclass
class Leaf:
    flags: int
    #: The name of the first page's frame.
    frame: int


@dataclass
class Tree:
    """`tables` has the entries that are tables, True for one that a fetch forced under the NX mitigation."""

    leafs: dict[Key, Leaf] = field(default_factory=dict)
    tables: dict[Key, bool] = field(default_factory=dict)
    mmio: dict[int, int] = field(default_factory=dict)

    def find(self, gfn: int) -> tuple[Key, Leaf] | None:
        for level in (1, 2, 3):
            key = (level, down(gfn, level))
            if key in self.leafs:
                return key, self.leafs[key]
        return None

    def within(self, start: int, end: int) -> list[Key]:
        """The leafs that meet a range of gfns, ascending."""
        found = [key for key in self.leafs if key[1] < end and start < key[1] + SPAN[key[0]]]
        return sorted(found, key=lambda key: key[1])

    def remove(self, level: int, base: int) -> list[Key]:
        """Takes the table under an entry away, with all below; returns the tables that went."""
        end = base + SPAN[level]

        def below(key: Key) -> bool:
            return key[0] <= level and base <= key[1] < end

        gone = [key for key in self.tables if below(key)]
        for key in gone:
            del self.tables[key]
        for key in [key for key in self.leafs if below(key)]:
            del self.leafs[key]
        for gfn in [gfn for gfn in self.mmio if base <= gfn < end]:
            del self.mmio[gfn]
        return gone

    def split(self, key: Key, nx: bool) -> None:
        """One huge leaf becomes 512 smaller ones with its rights; at 4 KiB with X under the mitigation."""
        level, base = key
        leaf = self.leafs.pop(key)
        flags = leaf.flags
        if level == 2:
            flags &= ~HUGE
            if nx:
                flags &= ~NX
        self.tables[key] = False
        for n in range(512):
            step = n * SPAN[level - 1]
            self.leafs[level - 1, base + step] = Leaf(flags, leaf.frame + step)
