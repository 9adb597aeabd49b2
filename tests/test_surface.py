"""The whole surface of a VM against a plain reference model, by random operations, kernel by kernel.

Each step is one operation with good arguments, or a call that must be refused and change nothing. After each,
every leaf of both address spaces, the memslots and KVM's statistics are compared.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import tdpmmu
from reference.kernel import KERNELS, Kernel
from reference.machine import Slot
from surface import Pair

#: Where memslots begin and how long they are, in pages: aligned and not, whole huge pages and parts.
BASES = (0x0, 0x10, 0x123, 0x200, 0x400, 0x601, 0x800, 0x40000)
SIZES = (1, 64, 100, 512, 512, 513, 1024, 1024, 1200)
#: Which page of a slot: its ends, and places around the edges of words and huge pages.
PLACES = st.sampled_from((0, 1, 5, 63, 64, 65, 127, 255, 300, 511, 512, 513, 700, 1023)) | st.integers(
    0, 1199
)
SPANS = st.sampled_from((1, 1, 2, 64, 70, 512, 600))
KINDS = st.sampled_from(((False, False), (True, False), (True, False), (False, True)))
#: Which memslot: mostly the first.
AT = st.sampled_from((0, 0, 0, 0, 1, 2, 3, 5))


@dataclass(frozen=True, repr=False)
class Operation:
    """One thing that can be done: how often among all, and the strategies of its arguments."""

    name: str
    weight: int
    needs_slots: bool
    arguments: dict[str, st.SearchStrategy[Any]]

    def __repr__(self) -> str:
        return self.name


OPERATIONS: list[Operation] = []


def operation(weight: int, *, needs_slots: bool = False, **arguments: st.SearchStrategy[Any]) -> Any:
    """Register a method of the machine. One rule chooses among them: many rules would not be chosen alike."""

    def register(method: Any) -> Any:
        OPERATIONS.append(Operation(method.__name__, weight, needs_slots, arguments))
        return method

    return register


class Surface(RuleBasedStateMachine):
    """The rules; a kernel's machine is made from it below."""

    profile = "6.12"
    #: What the model takes it for; None is the same.
    kernel: Kernel | None = None

    pair: Pair

    @initialize(
        page=st.sampled_from(("4K", "2M", "2M", "2M", "1G")),
        vcpus=st.integers(1, 2),
        d_bits=st.sampled_from((False, False, True)),
        ring=st.sampled_from((None, None, None, None, 1024)),
        nx=st.sampled_from((False, False, True)),
        eager=st.booleans(),
        generation=st.sampled_from((0, 0, (1 << 19) - 8)),
        format=st.sampled_from(("npt", "npt", "ept")),
        touches=st.lists(st.tuples(PLACES, KINDS), max_size=8),
    )
    def start(
        self,
        page: str,
        vcpus: int,
        d_bits: bool,
        ring: int | None,
        nx: bool,
        eager: bool,
        generation: int,
        format: str,
        touches: list[tuple[int, tuple[bool, bool]]],
    ) -> None:
        self.pair = Pair(
            self.profile,
            kernel=self.kernel,
            page=page,
            vcpus=vcpus,
            dirty_mode="d-bits" if d_bits else "write-protect",
            dirty_ring=ring,
            nx_huge_pages=nx,
            eager_page_split=eager,
            memslot_generation=generation,
            format=format,
        )
        self.vm, self.model = self.pair.vm, self.pair.model
        self.add(0, 0x200, 1024, False, False, None, True, None)
        # Something to lose: two huge pages, or a few small ones, by each kind of access.
        for number, (place, kind) in enumerate(touches):
            self.pair.access(number % vcpus, 0x200 + place % 1024, write=kind[0], fetch=kind[1])

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            assert self.vm.verify() == ()
            self.pair.close()

    @invariant()
    def nothing_differs(self) -> None:
        if hasattr(self, "pair"):
            self.pair.check()

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        weighted = [one for one in OPERATIONS for _ in range(one.weight)]
        one = data.draw(st.sampled_from(weighted), label="operation")
        if one.needs_slots and not self.model.slots:
            return
        arguments = {name: data.draw(strategy, label=name) for name, strategy in one.arguments.items()}
        note(f"{one.name}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})")
        getattr(self, one.name)(**arguments)

    # -- memslots

    def add(
        self,
        space: int,
        base: int,
        pages: int,
        readonly: bool,
        log: bool,
        page: str | None,
        writable: bool,
        shares: Slot | None,
    ) -> None:
        used = {s.id for s in self.model.slots.values() if s.as_id == space}
        number = next(n for n in range(99) if n not in used)
        level = {"4K": 1, "2M": 2, "1G": 3}[page or self.vm.config.page]
        handle = None if shares is None else self.handle(shares)
        self.pair.both(
            lambda: self.vm.add_memslot(base, pages, slot=number, as_id=space, readonly=readonly,
                                        dirty_log=log, page=page, host_writable=writable,
                                        shares=handle).base_gfn,
            lambda: self.model.add_slot(space, number, base, pages, readonly=readonly, log=log, level=level,
                                        writable=writable, shares=shares).base,
        )  # fmt: skip

    def handle(self, slot: Slot) -> tdpmmu.Memslot:
        return tdpmmu.Memslot(slot.id, slot.as_id, slot.base, slot.pages, slot.readonly, slot.log)

    def some(self, at: int) -> Slot:
        slots = self.pair.slots()
        return slots[at % len(slots)]

    def gfn(self, at: int, place: int) -> int:
        slot = self.some(at)
        return slot.base + place % slot.pages

    def piece(self, at: int, place: int, span: int) -> range:
        slot = self.some(at)
        first = place % slot.pages
        return range(slot.base + first, slot.base + min(first + span, slot.pages))

    @operation(
        2,
        space=st.sampled_from((0, 0, 1)),
        base=st.sampled_from(BASES),
        pages=st.sampled_from(SIZES),
        readonly=st.sampled_from((False, False, False, True)),
        log=st.sampled_from((False, False, True)),
        page=st.sampled_from((None, None, "4K")),
        writable=st.sampled_from((True, True, True, False)),
    )
    def add_memslot(
        self, space: int, base: int, pages: int, readonly: bool, log: bool, page: str | None, writable: bool
    ) -> None:
        self.add(space, base, pages, readonly, log, page, writable, None)

    @operation(
        1,
        needs_slots=True,
        at=AT,
        space=st.integers(0, 1),
        base=st.sampled_from(BASES),
        shorter=st.sampled_from((0, 0, 1, -1)),
    )
    def add_memslot_on_shared_memory(self, at: int, space: int, base: int, shorter: int) -> None:
        slot = self.some(at)
        self.add(space, base, max(slot.pages - shorter, 1), False, False, None, True, slot)

    @operation(1)
    def share_with_smm(self) -> None:
        self.pair.both(lambda: len(self.vm.share_memory_with_smm()), self.model.share_with_smm)

    @operation(1, needs_slots=True, at=AT)
    def delete_memslot(self, at: int) -> None:
        slot = self.some(at)
        self.pair.both(
            lambda: self.vm.delete_memslot(self.handle(slot)) and None, lambda: self.model.delete_slot(slot)
        )

    @operation(1, needs_slots=True, at=AT, base=st.sampled_from(BASES))
    def move_memslot(self, at: int, base: int) -> None:
        slot = self.some(at)
        handle = self.handle(slot)
        self.pair.both(
            lambda: self.vm.move_memslot(handle, base).raw["update"] == "moved",
            lambda: self.model.move_slot(slot, base),
        )

    @operation(5, needs_slots=True, at=AT, on=st.booleans())
    def set_dirty_log(self, at: int, on: bool) -> None:
        slot = self.some(at)
        self.pair.both(
            lambda: self.vm.set_memslot_flags(slot.id, as_id=slot.as_id, dirty_log=on).dirty_log,
            lambda: self.model.set_log(slot, on) or on,
        )

    @operation(1, on=st.booleans())
    def slot_zap_quirk(self, on: bool) -> None:
        if not self.model.kernel.slot_zap_quirk:
            self.pair.refused(lambda: self.vm.set_slot_zap_all(on), tdpmmu.Unsupported)
            return
        self.vm.set_slot_zap_all(on)
        self.model.zap_all = on

    # -- the guest

    @operation(8, needs_slots=True, vcpu=st.integers(0, 1), at=AT, place=PLACES, kind=KINDS)
    def access(self, vcpu: int, at: int, place: int, kind: tuple[bool, bool]) -> None:
        self.pair.access(vcpu % len(self.model.vcpus), self.gfn(at, place), write=kind[0], fetch=kind[1])

    @operation(
        3,
        needs_slots=True,
        vcpu=st.integers(0, 1),
        at=AT,
        place=PLACES,
        step=st.sampled_from((1, 1, 3, 64)),
        write=st.booleans(),
    )
    def access_many(self, vcpu: int, at: int, place: int, step: int, write: bool) -> None:
        for n in range(24):
            self.pair.access(vcpu % len(self.model.vcpus), self.gfn(at, place + n * step), write=write)

    @operation(
        6,
        needs_slots=True,
        vcpu=st.integers(0, 1),
        at=AT,
        places=st.lists(PLACES, min_size=2, max_size=6),
        kind=KINDS,
    )
    def access_some(self, vcpu: int, at: int, places: list[int], kind: tuple[bool, bool]) -> None:
        for place in places:
            self.pair.access(vcpu % len(self.model.vcpus), self.gfn(at, place), write=kind[0], fetch=kind[1])

    @operation(5, needs_slots=True, vcpu=st.integers(0, 1), at=AT, place=PLACES, far=st.booleans())
    def write_then_log_then_write(self, vcpu: int, at: int, place: int, far: bool) -> None:
        """What a migration does: the order in which most of the rules of logging meet."""
        number, slot = vcpu % len(self.model.vcpus), self.some(at)
        for on in (True, True, False):
            self.pair.access(number, self.gfn(at, place + 512 * far), write=True)
            self.set_dirty_log(at, on)
            self.pair.check()
            if slot.log and self.model.ring_size is None:
                (self.get_dirty_log if not self.model.manual else self.clear_one)(at)
                self.pair.check()

    def clear_one(self, at: int) -> None:
        """Take one word of the log, as a VMM does that sends in pieces."""
        slot = self.some(at)
        words = sorted({page // 64 for page in slot.dirty or ()})
        if words:
            word = words[len(words) // 2]
            size = min(64, slot.pages - word * 64)
            self.clear_dirty_log(at, word * 64, size, 1, 0)

    @operation(
        3,
        needs_slots=True,
        at=AT,
        page=st.sampled_from((0, 63, 64, 511, 512, 512)),
        pages=st.sampled_from((1, 1, 64, 65)),
        eager=st.sampled_from((True, True, False)),
    )
    def clear_what_was_all_set(self, at: int, page: int, pages: int, eager: bool) -> None:
        """An initially-all-set log over huge pages, of which CLEAR takes a few small ones."""
        slot = self.some(at)
        self.set_dirty_log(at, False)
        self.dirty_log_protect(True, True)
        self.eager_page_split(eager)
        for place in (0, 511, 512):
            self.pair.access(0, slot.base + place % slot.pages, write=True)
        self.set_dirty_log(at, True)
        self.pair.check()
        if slot.dirty is not None and page < slot.pages:
            first = page // 64 * 64
            count = min(128, slot.pages - first) // 64 * 64 or slot.pages - first
            bits = np.zeros(count, dtype=bool)
            bits[page - first : page - first + pages] = True
            wanted = {first + int(n) for n in np.flatnonzero(bits)}
            self.pair.both(
                lambda: self.vm.clear_dirty_log(self.handle(slot), bits, first_page=first, npages=count),
                lambda: self.model.clear_log(slot, first, count, wanted),
            )
            self.pair.check()
        self.pair.access(0, slot.base + page % slot.pages, write=True)

    @operation(3, needs_slots=True, at=AT, place=PLACES, log=st.booleans(), ratio=st.sampled_from((1, 2)))
    def fetch_beside_a_log(self, at: int, place: int, log: bool, ratio: int) -> None:
        """Tables that a fetch forced, and tables that logging made: which of them make a fault step down, and
        which of them recovery takes."""
        self.nx_huge_pages(True)
        self.pair.access(0, self.gfn(at, place), fetch=True)
        self.pair.check()
        self.set_dirty_log(at, True)
        self.pair.access(0, self.gfn(at, place + 512), write=True)
        self.pair.check()
        if not log:
            self.set_dirty_log(at, False)
        self.pair.check()
        for far in (0, 512):
            self.pair.access(0, self.gfn(at, place + far + 1))
        self.pair.check()
        self.recover_nx(ratio)

    @operation(2, needs_slots=True, at=AT, place=PLACES, log=st.booleans())
    def protect_what_is_written(self, at: int, place: int, log: bool) -> None:
        """Shadow paging protects a page for good, whether logging has protected it before or not."""
        self.pair.access(0, self.gfn(at, place), write=True)
        self.set_dirty_log(at, log)
        self.pair.check()
        for _ in range(2):
            self.write_protect(at, place)
            self.pair.check()
        self.pair.access(0, self.gfn(at, place), write=True)
        self.pair.check()

    @operation(2, needs_slots=True, at=AT, place=PLACES, nx=st.booleans(), then=KINDS)
    def small_pages_become_a_huge_one(self, at: int, place: int, nx: bool, then: tuple[bool, bool]) -> None:
        """khugepaged: the next fault finds a table, where nothing but the mitigation may keep it."""
        slot = self.some(at)
        self.nx_huge_pages(nx)
        self.replace_page(at, place, True)
        for step in (0, 1):
            self.pair.access(0, self.gfn(at, place + step), write=True)
        self.pair.check()
        if slot.as_id == 0:
            self.promote(at, 0, slot.pages)
            self.pair.check()
        for step in (0, 1, 2):
            self.pair.access(0, self.gfn(at, place + step), write=then[0], fetch=then[1])
            self.pair.check()

    @operation(2, gfn=st.sampled_from((0x601, 0x800, 0x40000)), write=st.booleans(), then=KINDS)
    def memory_where_mmio_was(self, gfn: int, write: bool, then: tuple[bool, bool]) -> None:
        self.pair.access(0, gfn, write=write)
        self.add(self.model.vcpus[0].space, gfn, 64, False, False, None, True, None)
        self.pair.check()
        self.pair.access(0, gfn, write=then[0], fetch=then[1])
        self.pair.check()

    @operation(4, needs_slots=True, vcpu=st.integers(0, 1), at=AT, place=PLACES, other=PLACES)
    def fetch_from_what_is_huge(self, vcpu: int, at: int, place: int, other: int) -> None:
        """What the NX mitigation is for: data first, then code in the same huge page, then data again."""
        number = vcpu % len(self.model.vcpus)
        for gfn, write, fetch in (
            (self.gfn(at, place), True, False),
            (self.gfn(at, other), False, True),
            (self.gfn(at, place + 1), False, False),
        ):
            self.pair.access(number, gfn, write=write, fetch=fetch)
            self.pair.check()

    @operation(
        2,
        vcpu=st.integers(0, 1),
        gfn=st.sampled_from((0x3FF, 0x5000, 0x601, 0x7FFFF, 0x10)),
        write=st.booleans(),
    )
    def access_anywhere(self, vcpu: int, gfn: int, write: bool) -> None:
        self.pair.access(vcpu % len(self.model.vcpus), gfn, write=write)

    @operation(4, needs_slots=True, vcpu=st.integers(0, 1), at=AT, place=PLACES, span=SPANS)
    def pre_fault(self, vcpu: int, at: int, place: int, span: int) -> None:
        number = vcpu % len(self.model.vcpus)
        gfns = self.piece(at, place, span)
        self.pair.both(
            lambda: self.vm.pre_fault(gfns, vcpu=number),
            lambda: self.model.pre_fault(number, gfns.start, gfns.stop),
        )

    @operation(2, vcpu=st.integers(0, 1), on=st.booleans())
    def system_management_mode(self, vcpu: int, on: bool) -> None:
        number = vcpu % len(self.model.vcpus)
        self.pair.both(lambda: self.vm.set_smm(number, on), lambda: self.model.set_smm(number, on))
        assert self.vm.in_smm(number) == on

    @operation(1, vcpu=st.integers(0, 1))
    def drop_root(self, vcpu: int) -> None:
        number = vcpu % len(self.model.vcpus)
        self.pair.both(lambda: self.vm.drop_root(number) and None, lambda: self.model.drop_root(number))

    # -- the host

    @operation(2, needs_slots=True, at=AT, place=PLACES, span=SPANS)
    def unmap(self, at: int, place: int, span: int) -> None:
        gfns = self.piece(at, place, span)
        self.pair.both(lambda: self.vm.unmap(gfns) and None, lambda: self.model.unmap(gfns.start, gfns.stop))

    @operation(3, needs_slots=True, at=AT, place=PLACES, span=st.sampled_from((512, 600, 1024)))
    def promote(self, at: int, place: int, span: int) -> None:
        gfns = self.piece(at, place, span)
        self.pair.both(lambda: self.vm.promote(gfns), lambda: self.model.promote(gfns.start, gfns.stop))

    @operation(2, needs_slots=True, at=AT, place=PLACES, writable=st.booleans())
    def replace_page(self, at: int, place: int, writable: bool) -> None:
        slot = self.some(at)
        gfn = slot.base + place % slot.pages
        self.pair.both(
            lambda: self.vm.replace_page(gfn, as_id=slot.as_id, writable=writable) and None,
            lambda: self.model.replace_page(slot, gfn, writable),
        )

    @operation(2, needs_slots=True, at=AT, place=PLACES, span=SPANS, flush=st.booleans())
    def age(self, at: int, place: int, span: int, flush: bool) -> None:
        gfns, space = self.piece(at, place, span), self.some(at).as_id
        self.pair.both(
            lambda: self.vm.age(gfns, as_id=space, flush=flush),
            lambda: self.model.age(space, gfns.start, gfns.stop, flush=flush),
        )

    @operation(1, needs_slots=True, at=AT, place=PLACES, span=SPANS, clear=st.booleans())
    def age_batch(self, at: int, place: int, span: int, clear: bool) -> None:
        gfns, space = self.piece(at, place, min(span, 64)), self.some(at).as_id
        self.pair.both(
            lambda: self.vm.age_batch(list(gfns), as_id=space, clear=clear).tolist(),
            lambda: [self.model.age(space, gfn, gfn + 1, clear=clear) for gfn in gfns],
        )

    @operation(1, needs_slots=True, at=AT, place=PLACES, span=SPANS)
    def test_age(self, at: int, place: int, span: int) -> None:
        gfns, space = self.piece(at, place, span), self.some(at).as_id
        self.pair.both(
            lambda: self.vm.test_age(gfns, as_id=space),
            lambda: self.model.age(space, gfns.start, gfns.stop, clear=False),
        )

    @operation(2, needs_slots=True, at=AT, place=PLACES, writable=st.booleans())
    def change_pte(self, at: int, place: int, writable: bool) -> None:
        gfn = self.gfn(at, place)
        if not self.model.kernel.change_pte:
            self.pair.refused(lambda: self.vm.change_pte(gfn, writable=writable), tdpmmu.Unsupported)
            return
        self.pair.both(
            lambda: self.vm.change_pte(gfn, writable=writable), lambda: self.model.change_pte(gfn, writable)
        )

    # -- dirty logs

    @operation(3, manual=st.booleans(), all_set=st.booleans())
    def dirty_log_protect(self, manual: bool, all_set: bool) -> None:
        if all_set and not manual:
            self.pair.refused(lambda: self.vm.enable_dirty_log_protect(manual=False, initially_set=True))
            return
        self.vm.enable_dirty_log_protect(manual=manual, initially_set=all_set)
        self.model.manual, self.model.all_set = manual, all_set

    @operation(1, on=st.booleans())
    def eager_page_split(self, on: bool) -> None:
        self.vm.set_eager_page_split(on)
        self.model.eager = on

    @operation(4, needs_slots=True, at=AT)
    def get_dirty_log(self, at: int) -> None:
        slot = self.some(at)
        self.pair.both(
            lambda: set(np.flatnonzero(self.vm.get_dirty_log(self.handle(slot)).dirty).tolist()),
            lambda: self.model.get_log(slot),
        )

    @operation(
        5,
        needs_slots=True,
        at=AT,
        first=st.sampled_from((0, 0, 0, 64, 512, 5)),
        npages=st.sampled_from((None, None, 64, 128, 512, 70)),
        every=st.sampled_from((1, 1, 2, 7, 600)),
        offset=st.integers(0, 63),
    )
    def clear_dirty_log(self, at: int, first: int, npages: int | None, every: int, offset: int) -> None:
        slot = self.some(at)
        count = max(slot.pages - first, 0) if npages is None else npages
        bits = (np.arange(count) + offset) % every == 0
        wanted = {first + int(n) for n in np.flatnonzero(bits)}
        self.pair.both(
            lambda: self.vm.clear_dirty_log(self.handle(slot), bits, first_page=first, npages=count),
            lambda: self.model.clear_log(slot, first, count, wanted),
        )

    @operation(2, vcpu=st.integers(0, 1))
    def harvest_ring(self, vcpu: int) -> None:
        number = vcpu % len(self.model.vcpus)
        self.pair.both(
            lambda: [tuple(row) for row in self.vm.dirty_ring(number).tolist()],
            lambda: self.model.harvest(number),
        )

    @operation(3)
    def reset_rings(self) -> None:
        self.pair.both(self.vm.reset_dirty_rings, self.model.reset_rings)

    # -- zaps, NX, protection

    @operation(1)
    def fast_zap(self) -> None:
        self.pair.both(lambda: self.vm.fast_zap() and None, self.model.fast_zap)

    @operation(2, needs_slots=True, at=AT, place=PLACES, span=SPANS)
    def zap_gfn_range(self, at: int, place: int, span: int) -> None:
        gfns = self.piece(at, place, span)
        self.pair.both(
            lambda: self.vm.zap_gfn_range(gfns) and None,
            lambda: self.model.zap_gfn_range(gfns.start, gfns.stop),
        )

    @operation(2, needs_slots=True, at=AT, place=PLACES)
    def write_protect(self, at: int, place: int) -> None:
        gfn, space = self.gfn(at, place), self.some(at).as_id
        self.pair.both(
            lambda: self.vm.write_protect_gfn(gfn, as_id=space), lambda: self.model.write_protect(space, gfn)
        )

    @operation(1, on=st.booleans())
    def nx_huge_pages(self, on: bool) -> None:
        self.pair.both(lambda: self.vm.set_nx_huge_pages(on) is not None, lambda: self.model.set_nx(on))
        assert self.vm.nx_huge_pages == on

    @operation(4, ratio=st.sampled_from((0, 1, 1, 2, 60)))
    def recover_nx(self, ratio: int) -> None:
        self.pair.both(lambda: self.vm.recover_nx(ratio), lambda: self.model.recover_nx(ratio))

    # -- what must be refused

    @operation(5, which=st.integers(0, 99))
    def bad_call(self, which: int) -> None:
        vm, most = self.vm, self.vm.config.max_gfn
        vcpus = len(self.model.vcpus)
        calls: list[Any] = [
            lambda: vm.add_memslot(0, 0),
            lambda: vm.add_memslot(most, 1),
            lambda: vm.add_memslot(most - 1, 2),
            lambda: vm.add_memslot(-1, 1),
            lambda: vm.add_memslot(0x200000, 1, as_id=2),
            lambda: vm.add_memslot(0x200000, 1, slot=32764),
            lambda: vm.add_memslot(0x200000, 1, page="3M"),
            lambda: vm.add_memslot(0x200000, 1, shares=tdpmmu.Memslot(98, 0, 0, 1, False, False)),
            lambda: vm.delete_memslot(98),
            lambda: vm.delete_memslot(0, as_id=7),
            lambda: vm.move_memslot(98, 0),
            lambda: vm.set_memslot_flags(98, dirty_log=True),
            lambda: vm.fault(most),
            lambda: vm.fault(0, vcpu=vcpus),
            lambda: vm.fault_batch([-1]),
            lambda: vm.fault_batch([[1]]),
            lambda: vm.pre_fault(range(0)),
            lambda: vm.pre_fault(range(0, 8, 2)),
            lambda: vm.pre_fault(range(1), vcpu=vcpus),
            lambda: vm.unmap(range(0x300000, 0x300001)),
            lambda: vm.unmap(range(0, 8, 2)),
            lambda: vm.promote(range(512), "4K"),
            lambda: vm.promote(range(0x300000, 0x300200)),
            lambda: vm.age(range(0x300000, 0x300001)),
            lambda: vm.age(range(1), as_id=2),
            lambda: vm.age_batch([0x300000]),
            lambda: vm.test_age(range(most - 1, most + 1)),
            lambda: vm.get_dirty_log(98),
            lambda: vm.clear_dirty_log(98),
            lambda: vm.clear_dirty_log(0, np.ones(3)),
            lambda: vm.clear_dirty_log(0, np.ones(64, dtype=bool), npages=128),
            lambda: vm.clear_dirty_log(0, first_page=-64),
            lambda: vm.dirty_ring(vcpus),
            lambda: vm.recover_nx(-1),
            lambda: vm.recover_nx(1 << 32),
            lambda: vm.zap_gfn_range(range(0)),
            lambda: vm.zap_gfn_range(range(most, most + 1)),
            lambda: vm.write_protect_gfn(0x300000),
            lambda: vm.write_protect_gfn(most),
            lambda: vm.replace_page(0x300000),
            lambda: vm.set_smm(vcpus, True),
            lambda: vm.memslot_generation(2),
            lambda: vm.lookup(0, as_id=3),
            lambda: vm.mappings(range(0, 4, 3)),
            lambda: vm.drop_root(vcpus),
        ]
        if self.model.slots:
            slot = self.handle(self.some(which))
            calls.append(lambda: vm.set_memslot_flags(slot, readonly=not slot.readonly))
            calls.append(lambda: vm.add_memslot(slot.base_gfn, 1, as_id=slot.as_id))
            calls.append(lambda: vm.add_memslot(0x300000, 1, slot=slot.slot, as_id=slot.as_id))
        self.pair.refused(calls[which % len(calls)])


SLOW = bool(os.environ.get("TDPMMU_SLOW"))
#: A long run that fails says so at once; the short one looks for the shortest way there.
QUICK = (Phase.explicit, Phase.reuse, Phase.generate)
PHASES = QUICK if SLOW else (*QUICK, Phase.shrink)
#: Where the engine and a model of another kernel must part: one policy each.
OTHERS = (
    ("6.12", {"fast_fault": False}),
    ("6.12", {"eager_split": False}),
    ("6.12", {"fault_splits": False}),
    ("6.12", {"clear_splits_last": False}),
    ("6.12", {"dirty_always": True}),
    ("6.12", {"leaves_alone": True}),
    ("6.12", {"collapse": "recover"}),
    ("6.12", {"collapse": "leafs"}),
    ("6.12", {"any_table_steps_down": True}),
    ("6.12", {"recovery_skips_logged": False}),
    ("7.2", {"dirty_always": False}),
    ("7.2", {"leaves_alone": False}),
    ("7.2", {"collapse": "tables"}),
    ("6.1", {"clear_splits_last": True}),
    ("6.1", {"any_table_steps_down": False}),
    ("6.1", {"mmu_owns_roots": False}),
    ("5.18", {"mmu_owns_roots": True}),
    ("5.18", {"unmap_frees_tables": True}),
    ("5.18", {"protects_what_is_writable": True}),
    ("5.18", {"marks_again": True}),
    ("5.10", {"keeps_roots": False}),
    ("5.10", {"all_set_protects": False}),
)


def run(profile: str, examples: int, steps: int, kernel: Kernel | None = None) -> None:
    """Let the machine run under one kernel's profile."""
    case = type("Case", (Surface,), {"profile": profile, "kernel": kernel}).TestCase  # type: ignore[attr-defined]
    case.settings = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=PHASES if kernel is None else QUICK,
        database=None,
        print_blob=True,
    )
    case("runTest").runTest()


@pytest.mark.parametrize("profile", KERNELS)
def test_no_operation_differs_from_the_model(profile: str) -> None:
    run(profile, 12, 30)


@pytest.mark.parametrize(("profile", "changed"), OTHERS if SLOW else [OTHERS[1], OTHERS[12], OTHERS[15]])
def test_a_model_of_another_policy_is_found_out(profile: str, changed: dict[str, Any]) -> None:
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        run(profile, 400 if SLOW else 60, 50, replace(KERNELS[profile], **changed))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("profile", KERNELS)
def test_ten_thousand_operations_do_not_differ_from_the_model(profile: str) -> None:
    """A thousand and more a kernel; TDPMMU_SURFACE_EXAMPLES times 50 of them."""
    run(profile, int(os.environ.get("TDPMMU_SURFACE_EXAMPLES", "25")), 50)
