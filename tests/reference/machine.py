"""The VM: memslots, vCPUs, faults, and what the VMM and the host do to them.

Every method is one operation of `tdpmmu.VM`, done at once. What it returns is what the engine must return;
`Refused` is where the engine must refuse, and then nothing has changed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from reference.host import RUN, SPAN, HostRefuses, Region
from reference.kernel import Kernel
from reference.tree import HOST_W, HUGE, MMU_W, NX, PRESENT, ROOT_LEVEL, A, D, Key, Leaf, P, Tree, U, W, down

GENERATION = (1 << 19) - 1
TLB_HIT, WALK, FAST, SLOW, RETRY, EMULATE = range(6)
RESERVED, HARDWARE_LOG = 64, 512

__all__ = ["EMULATE", "TLB_HIT", "Machine", "Refused", "RingFull", "Slot"]


class Refused(Exception):
    """KVM refuses: nothing changes."""


class RingFull(Exception):
    """The vCPU's ring has no room: it does not enter the guest."""


@dataclass(eq=False)
class Slot:
    as_id: int
    id: int
    base: int
    pages: int
    readonly: bool
    log: bool
    region: Region
    #: Dirty pages by offset; None without a log, or with rings.
    dirty: set[int] | None = None

    @property
    def end(self) -> int:
        return self.base + self.pages

    def hva(self, gfn: int) -> int:
        return self.region.first + gfn - self.base

    def max_level(self, gfn: int) -> int:
        if self.log:
            return 1
        for level in (3, 2):
            span = SPAN[level]
            aligned = self.base % span == self.region.first % span
            frame = down(gfn, level)
            if aligned and self.base <= frame and frame + span <= self.end:
                return level
        return 1


@dataclass
class Vcpu:
    smm: bool = False
    #: Has a root of its address space.
    rooted: bool = False
    #: A zap has asked it to drop its roots (before 5.18: all of them).
    must_drop: bool = False
    #: Translations that it may have cached: may they write, may they fetch.
    tlb: dict[Key, tuple[bool, bool]] = field(default_factory=dict)
    ring: list[tuple[int, int, int]] = field(default_factory=list)
    harvested: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def space(self) -> int:
        return int(self.smm)


class Machine:
    def __init__(
        self,
        kernel: Kernel,
        *,
        vcpus: int,
        level: int,
        ring: int | None = None,
        d_bits: bool = False,
        nx: bool = False,
        eager: bool = True,
        generation: int = 0,
    ) -> None:
        self.kernel, self.level, self.ring_size, self.d_bits, self.nx = kernel, level, ring, d_bits, nx
        self.eager, self.manual, self.all_set, self.zap_all = eager, False, False, True
        self.slots: dict[Key, Slot] = {}
        # Each address space starts at its own number and steps by how many spaces there are.
        self.generations = [generation, generation + 1]
        self.vcpus = [Vcpu() for _ in range(vcpus)]
        self.trees: list[Tree | None] = [None, None]
        #: Tables that stand where a huge leaf could, oldest first: (space, level, gfn).
        self.candidates: list[tuple[int, int, int]] = []
        self.counts = dict.fromkeys(
            ("pf_taken", "pf_fixed", "pf_fast", "pf_spurious", "pf_emulate", "pf_mmio_spte_created"), 0
        )

    # -- memslots

    def slot_of(self, space: int, gfn: int) -> Slot | None:
        return next((s for s in self.slots.values() if s.as_id == space and s.base <= gfn < s.end), None)

    def _free(self, space: int, base: int, pages: int, but: Slot | None = None) -> bool:
        return not any(
            s is not but and s.as_id == space and s.base < base + pages and base < s.end
            for s in self.slots.values()
        )

    def _step(self, space: int, steps: int = 1) -> None:
        for _ in range(steps):
            self.generations[space] += 2
            # The part that MMIO entries carry begins anew: old ones would look current.
            if self.generations[space] & GENERATION & ~1 == 0:
                self.fast_zap()

    def _new_log(self, pages: int, kept: set[int] | None = None) -> set[int] | None:
        if self.ring_size is not None:
            return None
        if kept is not None:
            return kept
        return set(range(pages)) if self.all_set else set()

    def add_slot(
        self,
        space: int,
        id: int,
        base: int,
        pages: int,
        *,
        readonly: bool,
        log: bool,
        level: int,
        writable: bool,
        shares: Slot | None,
    ) -> Slot:
        if (space, id) in self.slots or not self._free(space, base, pages):
            raise Refused
        if shares is not None and pages > shares.pages:
            raise Refused
        region = shares.region if shares else Region(base, pages, level, writable)
        slot = Slot(space, id, base, pages, readonly, log, region, self._new_log(pages) if log else None)
        self.slots[space, id] = slot
        self._step(space)
        return slot

    def share_with_smm(self) -> int:
        made = 0
        for slot in sorted((s for s in self.slots.values() if s.as_id == 0), key=lambda s: s.base):
            if (1, slot.id) in self.slots:
                continue
            self.add_slot(1, slot.id, slot.base, slot.pages, readonly=slot.readonly, log=slot.log,
                          level=slot.region.level, writable=slot.region.writable, shares=slot)  # fmt: skip
            made += 1
        return made

    def delete_slot(self, slot: Slot) -> None:
        self._step(slot.as_id)
        self._zap_slot(slot)
        del self.slots[slot.as_id, slot.id]
        self._step(slot.as_id)

    def move_slot(self, slot: Slot, base: int) -> bool:
        if base == slot.base:
            return False
        if not self._free(slot.as_id, base, slot.pages, but=slot):
            raise Refused
        self._step(slot.as_id)
        self._zap_slot(slot)
        slot.base = base
        if slot.log:
            slot.dirty = self._new_log(slot.pages, slot.dirty)
        self._step(slot.as_id)
        return True

    def _zap_slot(self, slot: Slot) -> None:
        if self.zap_all:
            self.fast_zap()
        else:
            self._zap_leafs(slot.as_id, slot.base, slot.end)

    def set_log(self, slot: Slot, on: bool) -> None:
        if slot.log == on:
            return
        slot.log = on
        slot.dirty = self._new_log(slot.pages) if on else None
        self._step(slot.as_id)
        if slot.readonly:
            return
        (self._start_log if on else self._stop_log)(slot)

    def _start_log(self, slot: Slot) -> None:
        tree = self.trees[slot.as_id] or Tree()
        if self.all_set:
            if self.kernel.all_set_protects:
                self._clear(tree, slot, slot.base, slot.end, W, least=2)
                self._flush()
            return
        if self.eager and self.kernel.eager_split:
            for level in (3, 2):
                for key in tree.within(slot.base, slot.end):
                    if key[0] == level:
                        tree.split(key, self.nx)
        if self.d_bits:
            self._clear(tree, slot, slot.base, slot.end, D)
            self._clear(tree, slot, slot.base, slot.end, W, least=2)
        else:
            self._clear(tree, slot, slot.base, slot.end, W)
        self._flush()

    @staticmethod
    def _clear(tree: Tree, slot: Slot, start: int, end: int, bits: int, least: int = 1) -> None:
        for key in tree.within(start, end):
            if key[0] >= least:
                tree.leafs[key].flags &= ~bits

    def _stop_log(self, slot: Slot) -> None:
        """What the host maps huge may be huge again."""
        tree = self.trees[slot.as_id]
        if tree is None:
            return

        def largest(gfn: int) -> int:
            page = slot.region.lookup(slot.hva(gfn))
            return min(slot.max_level(gfn), page.level if page else 1, self.level)

        if self.kernel.collapse == "leafs":
            for key in tree.within(slot.base, slot.end):
                if largest(max(key[1], slot.base)) > key[0]:
                    del tree.leafs[key]
                    self._flush()
            return
        # The larger first: what goes with it is not looked at.
        for level in (3, 2):
            for base in sorted(b for at, b in tree.tables if at == level and slot.base <= b < slot.end):
                if (level, base) not in tree.tables or largest(base) < level:
                    continue
                below = tree.within(base, base + SPAN[level])
                if self.kernel.collapse == "recover":
                    if not below:
                        continue
                    first_key = below[0]
                    first = tree.leafs[first_key]
                    self._forget(slot.as_id, tree.remove(level, base))
                    nx = NX if self.nx else 0
                    frame = first.frame - (first_key[1] - base)
                    tree.leafs[level, base] = Leaf(first.flags | HUGE | nx, frame)
                else:
                    self._forget(slot.as_id, tree.remove(level, base))
                self._flush()

    # -- zaps

    def fast_zap(self) -> None:
        """Everything goes, and every vCPU needs another root."""
        for vcpu in self.vcpus:
            vcpu.tlb.clear()
            vcpu.must_drop = True
            if not self.kernel.keeps_roots:
                vcpu.rooted = False
        self.candidates.clear()
        for space in (0, 1):
            if self.trees[space] is not None:
                self.trees[space] = Tree() if self.kernel.keeps_roots else None

    def _forget(self, space: int, tables: list[Key]) -> None:
        gone = {(space, *key) for key in tables}
        self.candidates = [known for known in self.candidates if known not in gone]

    def _zap_leafs(self, space: int, start: int, end: int) -> None:
        tree = self.trees[space]
        if tree is not None:
            if self.kernel.unmap_frees_tables:
                inside = [k for k in tree.tables if start <= k[1] and k[1] + SPAN[k[0]] <= end]
                for key in inside:
                    self._forget(space, tree.remove(*key))
            for key in tree.within(start, end):
                del tree.leafs[key]
        self._flush()

    def _flush(self) -> None:
        for vcpu in self.vcpus:
            vcpu.tlb.clear()

    def zap_gfn_range(self, start: int, end: int) -> None:
        for space in (0, 1):
            self._zap_leafs(space, start, end)

    def _behind(self, region: Region, start: int, end: int) -> list[tuple[int, int, int]]:
        """The gfns that map host addresses, in every memslot: (space, start, end)."""
        found = []
        for slot in self.slots.values():
            if slot.region is region:
                low, high = max(start, region.first), min(end, region.first + slot.pages)
                if low < high:
                    base = slot.base - region.first
                    found.append((slot.as_id, base + low, base + high))
        return found

    def _pieces(self, space: int, start: int, end: int) -> list[tuple[Slot, int, int]]:
        """A range of gfns slot by slot."""
        found = []
        while start < end:
            slot = self.slot_of(space, start)
            if slot is None:
                raise Refused
            stop = min(end, slot.end)
            found.append((slot, start, stop))
            start = stop
        return found

    def unmap(self, start: int, end: int) -> None:
        for slot, low, high in self._pieces(0, start, end):
            first, last = slot.hva(low), slot.hva(high - 1) + 1
            self._announce(slot.region, *slot.region.announced(first, last))
            slot.region.unmap(first, last)

    def _announce(self, region: Region, start: int, end: int) -> None:
        for space, low, high in self._behind(region, start, end):
            self._zap_leafs(space, low, high)

    def replace_page(self, slot: Slot, gfn: int, writable: bool) -> None:
        if writable and not slot.region.writable:
            raise Refused
        hva = slot.hva(gfn)
        self._announce(slot.region, *slot.region.announced(hva, hva + 1))
        slot.region.replace(hva, writable)

    def promote(self, start: int, end: int) -> int:
        done = 0
        for slot, low, high in self._pieces(0, start, end):
            first, last = -(-slot.hva(low) // RUN) * RUN, (slot.hva(high - 1) + 1) // RUN * RUN
            if first < last:
                self._announce(slot.region, *slot.region.announced(first, last))
                done += slot.region.promote(first, last)
        return done

    # -- what the host asks and protects

    def age(self, space: int, start: int, end: int, *, flush: bool = False, clear: bool = True) -> bool:
        young = False
        for slot, low, high in self._pieces(space, start, end):
            for other, first, last in self._behind(slot.region, slot.hva(low), slot.hva(high - 1) + 1):
                tree = self.trees[other]
                for key in tree.within(first, last) if tree else []:
                    young |= bool(tree.leafs[key].flags & A)  # type: ignore[union-attr]
                    if clear:
                        tree.leafs[key].flags &= ~A  # type: ignore[union-attr]
        if flush and young and self.kernel.aging_flushes:
            self._flush()
        return young

    def change_pte(self, gfn: int, writable: bool) -> bool:
        slot = self.slot_of(0, gfn)
        if slot is None:
            raise Refused
        page = slot.region.lookup(slot.hva(gfn))
        if page is None:
            return False
        changed = False
        for space, low, _ in self._behind(slot.region, slot.hva(gfn), slot.hva(gfn) + 1):
            tree = self.trees[space]
            leaf = tree.leafs.get((1, low)) if tree else None
            if leaf is None:
                continue
            changed = True
            if writable and page.writable:
                del tree.leafs[1, low]  # type: ignore[union-attr]
            else:
                leaf.flags &= ~(W | MMU_W | HOST_W | A)
        if changed:
            self._flush()
        return changed

    def write_protect(self, space: int, gfn: int) -> bool:
        if self.slot_of(space, gfn) is None:
            raise Refused
        tree = self.trees[space]
        found = tree.find(gfn) if tree else None
        if found is None or not found[1].flags & self._protectable:
            return False
        found[1].flags &= ~(W | MMU_W)
        self._flush()
        return True

    @property
    def _protectable(self) -> int:
        return W if self.kernel.protects_what_is_writable else MMU_W

    def set_nx(self, on: bool) -> bool:
        if self.nx == on:
            return False
        self.nx = on
        self.fast_zap()
        return True

    def recover_nx(self, ratio: int) -> int:
        if ratio == 0:
            return 0
        zapped = 0
        for _ in range(-(-len(self.candidates) // ratio)):
            if not self.candidates:
                break
            space, level, base = self.candidates.pop(0)
            tree = self.trees[space]
            assert tree is not None
            slot = self.slot_of(space, base)
            if self.kernel.recovery_skips_logged and slot is not None and slot.log:
                tree.tables[level, base] = False
                continue
            self._forget(space, tree.remove(level, base))
            zapped += 1
        if zapped:
            self._flush()
        return zapped

    # -- dirty logs

    def _logging(self, slot: Slot | None) -> set[int]:
        if self.ring_size is not None or slot is None or slot.dirty is None:
            raise Refused
        return slot.dirty

    def get_log(self, slot: Slot) -> set[int]:
        dirty = self._logging(slot)
        taken = set(dirty)
        if not self.manual:
            self._take(slot, taken)
        return taken

    def clear_log(self, slot: Slot, first: int, pages: int, wanted: set[int]) -> int:
        left = slot.pages - first
        if first % 64:
            raise Refused
        dirty = self._logging(slot)
        if pages > left or (pages < left and pages % 64):
            raise Refused
        taken = dirty & wanted
        self._take(slot, taken)
        return len(taken)

    def _take(self, slot: Slot, pages: set[int]) -> None:
        if slot.dirty is not None:
            slot.dirty -= pages
        for word in sorted({page // 64 for page in pages}):
            self._protect(slot, sorted(page for page in pages if page // 64 == word))
        if pages:
            self._flush()

    def _protect(self, slot: Slot, pages: list[int]) -> None:
        """Takes up to 64 pages for clean."""
        tree = self.trees[slot.as_id]
        if tree is None:
            return
        gfns = [slot.base + page for page in pages]
        if self.all_set and not self.kernel.all_set_protects:
            first, last = gfns[0], gfns[-1]
            if self.eager and self.kernel.eager_split:
                for level in (3, 2):
                    for key in tree.within(first, last + self.kernel.clear_splits_last):
                        if key[0] == level:
                            tree.split(key, self.nx)
            ends = {first} if down(first + RUN - 1, 2) == down(last + RUN - 1, 2) else {first, last}
            for gfn in ends:
                found = tree.find(gfn)
                if found and found[0][0] >= 2 and found[1].flags & self._protectable:
                    found[1].flags &= ~(W | MMU_W)
        for gfn in gfns:
            leaf = tree.leafs.get((1, gfn))
            if leaf is not None:
                leaf.flags &= ~(D if self.d_bits else W)

    def _mark(self, vcpu: Vcpu, gfn: int) -> None:
        slot = self.slot_of(vcpu.space, gfn)
        if slot is None or not slot.log:
            return
        if self.ring_size is not None:
            vcpu.ring.append((slot.id, slot.as_id, gfn - slot.base))
        elif slot.dirty is not None:
            slot.dirty.add(gfn - slot.base)

    def _soft_full(self, vcpu: Vcpu) -> bool:
        if self.ring_size is None:
            return False
        kept = RESERVED + (HARDWARE_LOG if self.d_bits else 0)
        return len(vcpu.ring) + len(vcpu.harvested) >= self.ring_size - kept

    def harvest(self, vcpu: int) -> list[tuple[int, int, int]]:
        if self.ring_size is None:
            raise Refused
        found, self.vcpus[vcpu].ring = self.vcpus[vcpu].ring, []
        self.vcpus[vcpu].harvested += found
        return found

    def reset_rings(self) -> int:
        if self.ring_size is None:
            raise Refused
        count = 0
        for vcpu in self.vcpus:
            count += len(vcpu.harvested)
            for number, space, offset in vcpu.harvested:
                slot = self.slots.get((space, number))
                if slot is not None and offset < slot.pages:
                    self._take(slot, {offset})
            vcpu.harvested = []
        return count

    # -- vCPUs

    def _drop(self, vcpu: Vcpu) -> None:
        """Gives its root back; the last takes the tables along, where the MMU has no reference."""
        if not vcpu.rooted:
            return
        vcpu.rooted = False
        others = any(v.rooted and v.space == vcpu.space for v in self.vcpus)
        tree = self.trees[vcpu.space]
        if not others and not self.kernel.mmu_owns_roots and tree is not None:
            self._forget(vcpu.space, list(tree.tables))
            self.trees[vcpu.space] = None

    def _enter(self, vcpu: Vcpu) -> Tree:
        if vcpu.must_drop:
            vcpu.must_drop = False
            if self.kernel.drops_all_roots:
                self._drop(vcpu)
        if self._soft_full(vcpu):
            raise RingFull
        return self._load(vcpu)

    def _load(self, vcpu: Vcpu) -> Tree:
        if not vcpu.rooted:
            vcpu.rooted = True
            vcpu.tlb.clear()
        tree = self.trees[vcpu.space]
        if tree is None:
            tree = self.trees[vcpu.space] = Tree()
        return tree

    def drop_root(self, number: int) -> None:
        vcpu = self.vcpus[number]
        self._drop(vcpu)
        self._load(vcpu)

    def set_smm(self, number: int, on: bool) -> None:
        vcpu = self.vcpus[number]
        if vcpu.smm != on:
            self._drop(vcpu)
            vcpu.smm = on

    def may_hit(self, number: int, gfn: int, write: bool, fetch: bool) -> bool:
        """May the vCPU have a translation that lets the access through?"""
        cached = self.vcpus[number].tlb
        found = [
            cached[level, down(gfn, level)] for level in (1, 2, 3) if (level, down(gfn, level)) in cached
        ]
        return any((w or not write) and (x or not fetch) for w, x in found)

    def access(self, number: int, gfn: int, write: bool, fetch: bool) -> int:
        """An access that no TLB serves; returns what it came to."""
        vcpu = self.vcpus[number]
        outcome = WALK
        while True:
            tree = self._enter(vcpu)
            found = tree.find(gfn)
            if found is not None and allows(found[1].flags, write, fetch):
                self._walked(vcpu, gfn, *found, write)
                return outcome
            if found is None and tree.mmio.get(gfn) == self.generations[vcpu.space] & GENERATION:
                return EMULATE
            try:
                done = self._fault(vcpu, tree, gfn, write, fetch, present=found is not None)
            except HostRefuses:
                raise Refused from None
            outcome = max(outcome, done)
            if done == EMULATE:
                return EMULATE

    def _walked(self, vcpu: Vcpu, gfn: int, key: Key, leaf: Leaf, write: bool) -> None:
        newly = write and not leaf.flags & D
        leaf.flags |= A | (D if write else 0)
        if newly and self.d_bits and any(s.log for s in self.slots.values()):
            self._mark(vcpu, gfn)
        dirty_write = bool(leaf.flags & W and leaf.flags & D)
        vcpu.tlb[key] = (dirty_write, not leaf.flags & NX)

    def _fault(self, vcpu: Vcpu, tree: Tree, gfn: int, write: bool, fetch: bool, *, present: bool) -> int:
        slot = self.slot_of(vcpu.space, gfn)
        if self.kernel.fast_fault and present and write:
            found = tree.find(gfn)
            assert found is not None
            (level, base), leaf = found
            if leaf.flags & MMU_W and not (level > 1 and slot is not None and slot.log):
                leaf.flags |= W
                self._mark(vcpu, base)
                for name in ("pf_taken", "pf_fast", "pf_fixed"):
                    self.counts[name] += 1
                return FAST
        outcome, _ = self._slow(vcpu, tree, gfn, write, fetch, prefetch=False)
        self.counts["pf_taken"] += 1
        name = {SLOW: "pf_fixed", WALK: "pf_spurious", EMULATE: "pf_emulate"}.get(outcome)
        if name:
            self.counts[name] += 1
        return SLOW if outcome == WALK else outcome

    def _slow(
        self, vcpu: Vcpu, tree: Tree, gfn: int, write: bool, fetch: bool, *, prefetch: bool
    ) -> tuple[int, int]:
        """The slow path: SLOW where a leaf was made, WALK where nothing had to change; and the level."""
        slot = self.slot_of(vcpu.space, gfn)
        if slot is None:
            self._link(tree, vcpu.space, gfn, 1, 1, disallowed=False)
            tree.mmio[gfn] = self.generations[vcpu.space] & GENERATION
            self.counts["pf_mmio_spte_created"] += 1
            return EMULATE, 1
        if slot.readonly and write:
            return EMULATE, 1
        page = slot.region.fault_in(slot.hva(gfn), write)
        if write and not page.writable:
            self.replace_page(slot, gfn, True)
            return RETRY, 1
        allowed = min(slot.max_level(gfn), self.level, page.level)
        disallowed = fetch and self.nx
        goal = 1 if disallowed else allowed
        goal = self._link(tree, vcpu.space, gfn, goal, allowed, disallowed=disallowed)
        return self._leaf(vcpu, tree, slot, gfn, goal, page.writable and not slot.readonly, write, fetch,
                          prefetch), goal  # fmt: skip

    def _link(self, tree: Tree, space: int, gfn: int, goal: int, wanted: int, *, disallowed: bool) -> int:
        """Makes the tables down to the level of the leaf; returns that level."""
        level = ROOT_LEVEL
        while True:
            key = (level, down(gfn, level))
            if level == goal:
                stays = key in tree.tables and (self.kernel.any_table_steps_down or tree.tables[key])
                if level == 1 or not (self.nx and stays):
                    return goal
                goal -= 1
            if key not in tree.tables:
                if key in tree.leafs and self.kernel.fault_splits:
                    tree.split(key, self.nx)
                elif key in tree.leafs:
                    del tree.leafs[key]
                    self._flush()
                listed = disallowed and wanted >= level
                # Up to 6.1 only what is listed is flagged, and nothing asks for the flag.
                tree.tables[key] = disallowed and (listed or not self.kernel.any_table_steps_down)
                if listed:
                    self.candidates.append((space, *key))
            level -= 1

    def _leaf(
        self,
        vcpu: Vcpu,
        tree: Tree,
        slot: Slot,
        gfn: int,
        level: int,
        writable: bool,
        write: bool,
        fetch: bool,
        prefetch: bool,
    ) -> int:
        key = (level, down(gfn, level))
        old = tree.leafs.get(key)
        if old is not None and self.kernel.leaves_alone and (prefetch or allows(old.flags, write, fetch)):
            return WALK
        flags = PRESENT | P | U
        if not prefetch:
            flags |= A
        if level > 1:
            flags |= HUGE | (NX if self.nx else 0)
        if writable:
            was_writable = bool(old and old.flags & W) or (level == 1 and gfn in tree.mmio)
            flags |= HOST_W | MMU_W | W
            if self.kernel.dirty_always or not was_writable:
                flags |= D
            if slot.log and (self.kernel.marks_again or not (old and old.flags & W)):
                self._mark(vcpu, gfn)
        if old is not None and old.flags == flags:
            return WALK
        if key in tree.tables:
            self._forget(vcpu.space, tree.remove(*key))
            self._flush()
        tree.mmio.pop(gfn, None)
        hva = slot.hva(key[1])
        frame = slot.region.frames[hva]
        assert old is None or old.frame == frame
        tree.leafs[key] = Leaf(flags, frame)
        return SLOW

    def pre_fault(self, number: int, start: int, end: int) -> int:
        vcpu = self.vcpus[number]
        at = start
        while at < end:
            try:
                tree = self._enter(vcpu)
                outcome, level = self._slow(vcpu, tree, at, False, False, prefetch=True)
            except RingFull:
                if at == start:
                    raise
                return end - at
            if outcome == EMULATE:
                if at == start:
                    raise Refused
                return end - at
            at = down(at, level) + SPAN[level]
        return 0


def allows(flags: int, write: bool, fetch: bool) -> bool:
    return not (write and not flags & W) and not (fetch and flags & NX)
