"""A VM of tdpmmu and the reference model side by side: each operation is done to both, both say the same."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import tdpmmu
from reference.kernel import KERNELS, Kernel
from reference.machine import TLB_HIT, Machine, Refused, RingFull, Slot
from reference.tree import FLAGS, HOST_W, HUGE, MMU_W, NX, PRESENT, A, D, P, Tree, U, W

COUNTS = ("pf_taken", "pf_fixed", "pf_fast", "pf_spurious", "pf_emulate", "pf_mmio_spte_created")
LEVELS = {"4K": 1, "2M": 2, "1G": 3}


class Pair:
    """The two, and what is known of the frames: the model names them, the engine numbers them."""

    def __init__(
        self,
        profile: str,
        *,
        kernel: Kernel | None = None,
        page: str = "2M",
        vcpus: int = 1,
        **options: Any,
    ) -> None:
        kernel = kernel or KERNELS[profile]
        self.vm = tdpmmu.VM(
            profile=profile, design=KERNELS[profile].design, page=page, vcpus=vcpus, seed=1, check="cheap",
            max_table_bytes="64M", **options,
        )  # fmt: skip
        self.model = Machine(
            kernel,
            vcpus=vcpus,
            level=LEVELS[page],
            ring=options.get("dirty_ring"),
            d_bits=options.get("dirty_mode") == "d-bits",
            nx=options.get("nx_huge_pages", False),
            eager=options.get("eager_page_split", True),
            generation=options.get("memslot_generation", 0),
        )
        self.frames: dict[int, int] = {}
        self.steps = 0

    def close(self) -> None:
        report = self.vm.close()
        assert report is not None
        assert (report.table_pages_leaked, report.violations) == (0, ())

    # -- one operation

    def both(
        self,
        engine: Callable[[], object],
        model: Callable[[], object],
        refusal: type[Exception] = tdpmmu.InvalidArgument,
    ) -> Any:
        """Do it to both; what the model refuses the engine must refuse, by a typed error. Return it."""
        self.steps += 1
        try:
            expected = model()
        except Refused:
            with pytest.raises(refusal) as caught:
                engine()
            assert str(caught.value)
            return None
        except RingFull:
            with pytest.raises(tdpmmu.DirtyRingFull):
                engine()
            return None
        got = engine()
        if expected is not None:
            assert got == expected, (got, expected)
        return expected

    def access(self, vcpu: int, gfn: int, *, write: bool = False, fetch: bool = False) -> None:
        self.steps += 1
        kind: tuple[Any, ...] = (vcpu, gfn, write, fetch)
        may_hit = self.model.may_hit(*kind)
        try:
            got = self.vm.fault(gfn, vcpu=vcpu, write=write, exec=fetch)
        except tdpmmu.DirtyRingFull:
            with pytest.raises(RingFull):
                self.model.access(*kind)
            return
        except tdpmmu.InvalidArgument:
            with pytest.raises(Refused):
                self.model.access(*kind)
            return
        if got.outcome == TLB_HIT:
            assert may_hit, "a translation that nobody cached, or that a flush took away"
            return
        expected = self.model.access(*kind)
        assert int(got.outcome) == expected, (kind, got.outcome, expected)

    def refused(self, call: Callable[[], object], kind: type[Exception] = tdpmmu.InvalidArgument) -> None:
        """A call with a bad argument: a typed error that says something, and nothing has changed."""
        self.steps += 1
        before = self.snapshot()
        with pytest.raises(kind) as caught:
            call()
        assert len(str(caught.value)) > 8
        assert self.snapshot() == before

    def snapshot(self) -> tuple[Any, ...]:
        stats = self.vm.stats()
        return (
            tuple(self.vm.mappings(as_id=space).tobytes() for space in (0, 1)),
            self.vm.memslots(),
            tuple(self.vm.memslot_generation(space) for space in (0, 1)),
            tuple(getattr(stats, name) for name in (*COUNTS, "pages_4k", "pages_2m", "table_pages")),
        )

    # -- the state

    def check(self) -> None:
        """Every leaf by its value, every count, every memslot."""
        for space in (0, 1):
            self._check_leafs(space, self.model.trees[space] or Tree())
        slots = sorted(self.model.slots.values(), key=lambda s: (s.as_id, s.base))
        assert [
            (s.slot, s.as_id, s.base_gfn, s.npages, s.readonly, s.dirty_log) for s in self.vm.memslots()
        ] == [(s.id, s.as_id, s.base, s.pages, s.readonly, s.log) for s in slots]
        assert [self.vm.memslot_generation(space) for space in (0, 1)] == self.model.generations
        self._check_stats()

    def _check_leafs(self, space: int, tree: Tree) -> None:
        rows = self.vm.mappings(as_id=space)
        keys = sorted(tree.leafs, key=lambda key: key[1])
        wanted = np.array(
            [(gfn, tree.leafs[level, gfn].flags, level) for level, gfn in keys], dtype=np.uint64
        )
        wanted = wanted.reshape(-1, 3)
        flags = from_ept(rows["spte"]) if self.vm.config.format == "ept" else rows["spte"] & np.uint64(FLAGS)
        got = np.stack([rows["gfn"], flags, rows["level"]], axis=1)
        if not np.array_equal(got, wanted):
            raise AssertionError(difference(space, got, wanted))
        for key, pfn in zip(keys, rows["pfn"].tolist(), strict=True):
            name = tree.leafs[key].frame
            assert self.frames.setdefault(name, pfn) == pfn, f"another frame behind gfn {key[1]:#x}"

    def _check_stats(self) -> None:
        trees = [tree for tree in self.model.trees if tree is not None]
        pages = tuple(sum(key[0] == level for tree in trees for key in tree.leafs) for level in (1, 2, 3))
        tables = sum(len(tree.tables) for tree in trees)
        wanted = {name: self.model.counts[name] for name in COUNTS}
        wanted["nx_lpage_splits"] = len(self.model.candidates)
        deadline = time.monotonic() + 20
        while True:
            stats = self.vm.stats()
            got_pages = (stats.pages_4k, stats.pages_2m, stats.pages_1g)
            same = stats.table_pages - stats.roots == tables
            if self.model.kernel.counts_pages:
                same = same and got_pages == pages
            # A worker may have a root to zap still: its counts fall, and nothing else moves.
            if same or self.model.kernel.mmu_owns_roots or time.monotonic() > deadline:
                break
            time.sleep(0.002)
        assert stats.table_pages - stats.roots == tables, (stats.table_pages - stats.roots, tables)
        if self.model.kernel.counts_pages:
            assert got_pages == pages
        assert {name: getattr(stats, name) for name in wanted} == wanted

    def slots(self) -> list[Slot]:
        return sorted(self.model.slots.values(), key=lambda s: (s.as_id, s.id))


#: Where EPT has what the model's bits say: (bit there, bit of the model).
EPT = ((0, P), (1, W), (8, A), (9, D), (7, HUGE), (57, HOST_W), (58, MMU_W), (11, PRESENT))


def from_ept(sptes: Any) -> Any:
    """The bits of EPT entries as AMD has them: X is a permission there, NX here. No memory types."""
    out = np.full(sptes.shape, U, dtype=np.uint64)
    for bit, flag in EPT:
        out |= np.where(sptes >> np.uint64(bit) & np.uint64(1), np.uint64(flag), np.uint64(0))
    return out | np.where(sptes & np.uint64(4), np.uint64(0), np.uint64(NX))


def difference(space: int, got: Any, wanted: Any) -> str:
    """Say where two lists of leafs differ first."""
    left = {(int(level), int(gfn)): int(flags) for gfn, flags, level in got}
    right = {(int(level), int(gfn)): int(flags) for gfn, flags, level in wanted}
    keys = sorted(
        (key for key in left.keys() | right.keys() if left.get(key) != right.get(key)), key=lambda k: k[1]
    )
    lines = [f"address space {space}: {len(keys)} leafs differ (level, gfn, engine, model):"]
    for level, gfn in keys[:8]:
        values = [f"{table[level, gfn]:x}" if (level, gfn) in table else "-" for table in (left, right)]
        lines.append(f"  {level} {gfn:#x} {values[0]} {values[1]}")
    return "\n".join(lines)
