"""What a `VM` is made from and what its methods return: frozen, typed, with units in the names."""

from __future__ import annotations

import enum
import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

import numpy as np
import numpy.typing as npt

from tdpmmu import _names, units
from tdpmmu.bench import LEAST_QUOTA, MAX_WORKERS, between, cpu_numbers
from tdpmmu.errors import InvalidArgument
from tdpmmu.shadow import PAGINGS

__all__ = [
    "MAPPING_DTYPE",
    "RING_DTYPE",
    "CloseReport",
    "DirtyLog",
    "FaultOutcome",
    "FaultResult",
    "LeafMapping",
    "Memslot",
    "PopulateStats",
    "VMConfig",
    "VMStats",
    "ZapReport",
]

Size = str | SupportsIndex
CHECKS = ("off", "cheap")
DIRTY_MODES = ("write-protect", "d-bits")
ENTRY_FORMATS = ("npt", "ept")

#: What `lookup_batch` and `mappings` give for each gfn; `level` 0 means not mapped.
MAPPING_DTYPE = np.dtype([("gfn", "<u8"), ("spte", "<u8"), ("pfn", "<u8"), ("level", "<u8")])
#: What `dirty_ring` gives for each page that a vCPU wrote: `offset` counts 4 KiB pages from the slot's first.
RING_DTYPE = np.dtype([("slot", "<u8"), ("as_id", "<u8"), ("offset", "<u8")])


class FaultOutcome(enum.IntEnum):
    """What a guest access came to. All are outcomes for the guest, none is an error. No units."""

    TLB_HIT = 0
    WALK = 1
    FAST_FAULT = 2
    SLOW_FAULT = 3
    RETRY = 4  # as SLOW_FAULT, after a race was lost
    EMULATE = 5
    GUEST_FAULT = 6  # the guest's own tables do not allow it: its page fault, not the host's


@dataclass(frozen=True, slots=True)
class FaultResult:
    """One access: `outcome`, and the mapping after it (page size as text, frame number), None without one."""

    gfn: int
    outcome: FaultOutcome
    page: str | None
    pfn: int | None


@dataclass(frozen=True, slots=True)
class LeafMapping:
    """A leaf SPTE: a guest page and its host frame, both counted in 4 KiB pages, and the entry's value."""

    gfn: int
    pfn: int
    level: int
    spte: int

    @property
    def page(self) -> str:
        """The page size as text: `4K`, `2M` or `1G`."""
        return ("4K", "2M", "1G")[self.level - 1]


@dataclass(frozen=True, slots=True)
class Memslot:
    """A range of guest memory: `base_gfn` and `npages` in 4 KiB pages."""

    slot: int
    as_id: int
    base_gfn: int
    npages: int
    readonly: bool
    dirty_log: bool

    @property
    def gfns(self) -> range:
        """The gfns that it covers, in 4 KiB pages."""
        return range(self.base_gfn, self.base_gfn + self.npages)


@dataclass(frozen=True, slots=True)
class DirtyLog:
    """What one KVM_GET_DIRTY_LOG returned: gfns in 4 KiB pages.

    Attributes:
        slot: the memslot's id.
        as_id: its address space.
        base_gfn: its first gfn.
        npages: its pages.
        dirty: one bool a page of the slot, in order: an array of `npages`.
    """

    slot: int
    as_id: int
    base_gfn: int
    npages: int
    dirty: npt.NDArray[np.bool_] = field(repr=False)

    @property
    def gfns(self) -> npt.NDArray[np.uint64]:
        """The dirty gfns, ascending."""
        return np.flatnonzero(self.dirty).astype(np.uint64) + np.uint64(self.base_gfn)

    @property
    def count(self) -> int:
        """Dirty pages of 4 KiB, a count."""
        return int(np.count_nonzero(self.dirty))


@dataclass(frozen=True, slots=True)
class PopulateStats:
    """What populating did: leaf SPTEs made, page-table pages in use after it, wall-clock time in ns."""

    sptes: int
    table_pages: int
    wall_ns: int

    @property
    def ns_per_spte(self) -> float:
        """Wall-clock ns per leaf SPTE made; NaN where none was."""
        return self.wall_ns / self.sptes if self.sptes else math.nan


@dataclass(frozen=True, slots=True)
class ZapReport:
    """What a zap took: wall-clock time in ns, leaf SPTEs unmapped, page-table pages before and after it.

    Attributes:
        raw: everything the native side reported, by name; times in ns.
    """

    wall_ns: int
    sptes: int
    table_pages_before: int
    table_pages_after: int
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class VMStats:
    """Counts at one moment, as KVM counts them. Page sizes count leafs; tables are 4 KiB pages.

    Attributes:
        pages_4k: leaf SPTEs of 4 KiB.
        pages_2m: leaf SPTEs of 2 MiB.
        pages_1g: leaf SPTEs of 1 GiB.
        table_pages: page-table pages in use, those that wait for a grace period included.
        roots: roots on the list, invalid ones included; of the shadow MMU those that vCPUs hold.
        pf_taken: guest faults that were handled.
        pf_fixed: faults that made the access possible, fast ones included.
        pf_fast: faults settled without mmu_lock.
        pf_spurious: faults that found the access allowed.
        pf_emulate: accesses that had to be emulated.
        pf_mmio_spte_created: MMIO entries installed.
        nx_lpage_splits: tables that stand where the NX mitigation forbids a huge leaf.
        remote_tlb_flush: remote flushes that kicked a vCPU.
        remote_tlb_flush_requests: remote flushes.
        shadow: counts of the shadow MMU by name, in pages unless it says otherwise: `pages`, `obsolete`,
            `waiting`, `zapped`, ...; None in a VM without one.
        raw: everything the native side reported, by name.
    """

    pages_4k: int
    pages_2m: int
    pages_1g: int
    table_pages: int
    roots: int
    pf_taken: int
    pf_fixed: int
    pf_fast: int
    pf_spurious: int
    pf_emulate: int
    pf_mmio_spte_created: int
    nx_lpage_splits: int
    remote_tlb_flush: int
    remote_tlb_flush_requests: int
    shadow: Mapping[str, Any] | None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Mapping[str, Any]) -> VMStats:
        """Return the typed view of what the native side reported. Counts."""
        return cls(**{name: raw[name] for name in cls.__slots__ if name != "raw"}, raw=raw)

    @property
    def sptes(self) -> int:
        """Leaf SPTEs of all sizes, a count."""
        return self.pages_4k + self.pages_2m + self.pages_1g

    @property
    def table_bytes(self) -> int:
        """Page-table memory in bytes."""
        return self.table_pages * 4096


@dataclass(frozen=True, slots=True)
class CloseReport:
    """What closing took (ns), page-table pages that were never freed (0 is right), violations as text."""

    wall_ns: int
    table_pages_leaked: int
    violations: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class VMConfig:
    """A machine to make, as data: picklable, comparable, every value checked, defaults filled in.

    `page` is the largest page that the host backs guest memory with. Sizes in bytes, `tick_ns` in ns;
    None leaves the choice to the design, then the profile.

    Attributes:
        eager_page_split: huge leafs are split when dirty logging starts, not when they are written.
        dirty_mode: how dirty pages are told: `write-protect`, or `d-bits` with a log of hardware (PML).
        dirty_ring: entries of each vCPU's dirty ring; None is a bitmap a slot.
        nx_huge_pages: the NX mitigation is on from the start.
        memslot_generation: what address space 0 begins with, even; for tests of the wrap of MMIO generations.
        format: entries as AMD has them (`npt`) or Intel (`ept`).
        paging: of a design of the shadow MMU: `direct` (hardware translates guest addresses: tdp_mmu=N) or
            `guest` (the guest's own tables are shadowed; what faults and look-ups take is a virtual page
            number of the vCPU's process then); None: a design of the TDP MMU.
        reclaim: how its zapped pages are kept from lockless walkers; None: a design of the TDP MMU.
        quota: most shadow pages, a count; None is no limit.
    """

    levels: int
    vcpus: int
    design: str
    kernel_profile: str
    passes: str | None
    ownership: str | None
    preempt: str
    tick_ns: int
    memory_bytes: int | None
    page: str
    max_table_bytes: int | None
    seed: int
    check: str
    workers: int = 1
    worker_cpus: tuple[int, ...] = ()
    worker_queue: str | None = None
    eager_page_split: bool = True
    dirty_mode: str = "write-protect"
    dirty_ring: int | None = None
    nx_huge_pages: bool = False
    memslot_generation: int = 0
    format: str = "npt"
    paging: str | None = None
    reclaim: str | None = None
    quota: int | None = None

    @classmethod
    def make(
        cls,
        memory: Size | None = None,
        *,
        levels: int = 4,
        vcpus: int = 1,
        design: str | None = None,
        profile: str = "6.12",
        passes: str | Iterable[str] | None = None,
        ownership: str | None = None,
        preempt: str = "full",
        tick: Size = "4ms",
        page: Size = "4K",
        max_table_bytes: Size | None = None,
        seed: int | None = None,
        check: str = "off",
        workers: int = 1,
        worker_cpus: Iterable[int] = (),
        worker_queue: str | None = None,
        eager_page_split: bool = True,
        dirty_mode: str = "write-protect",
        dirty_ring: int | None = None,
        nx_huge_pages: bool = False,
        memslot_generation: int = 0,
        format: str = "npt",
        paging: str | None = None,
        reclaim: str | None = None,
        quota: int | None = None,
    ) -> VMConfig:
        """Check the arguments of `VM` and return them as a configuration. Sizes in bytes, times in ns.

        `design` None is the one that the profile's kernel has.
        `workers`, `worker_cpus` and `worker_queue` (`per-vm` or `system`) are for designs that have workers.
        `paging`, `reclaim` and `quota` are for designs of the shadow MMU, which has neither passes nor a
        first reference that somebody could own.
        The rest is in the class's text.

        Raises:
            InvalidArgument: a value breaks a rule; the message names the parameter, the value and the rule.
            TypeError: a value of the wrong type.
        """
        if units.as_int(levels, "levels") not in (4, 5):
            raise InvalidArgument(f"levels={levels!r}: expected 4 or 5")
        memory_bytes = None
        if memory is not None:
            memory_bytes = units.parse_size(memory, "memory")
            limit = units.max_gfn(levels) * 4096
            if not 0 < memory_bytes <= limit or memory_bytes % 4096:
                most = units.format_size(limit)
                raise InvalidArgument(
                    f"memory={memory!r}: must be a multiple of 4 KiB, above 0 and at most {most} "
                    f"with {levels} levels"
                )
        tick_ns = units.parse_time(tick, "tick")
        if tick_ns == 0:
            raise InvalidArgument(f"tick={tick!r}: must be above 0")
        cap = None if max_table_bytes is None else units.parse_size(max_table_bytes, "max_table_bytes")
        if cap is not None and cap < 4096 * levels:
            raise InvalidArgument(
                f"max_table_bytes={max_table_bytes!r}: one path needs {4096 * levels} bytes"
            )
        chosen = _names.design_of(profile) if design is None else _names.design(design)
        shadow = chosen in _names.shadow_designs()
        _one_mmu(
            chosen,
            shadow,
            paging=paging,
            reclaim=reclaim,
            quota=quota,
            passes=passes,
            ownership=ownership,
            workers=None if workers == 1 else workers,
            worker_cpus=worker_cpus or None,
            worker_queue=worker_queue,
        )
        return cls(
            levels=levels,
            vcpus=between(vcpus, 1, 1024, "vcpus"),
            design=chosen,
            kernel_profile=_names.profile(profile),
            passes=None if passes is None else _names.passes(passes),
            ownership=None if ownership is None else _names.one_of(ownership, _names.OWNERSHIP, "ownership"),
            preempt=_names.one_of(preempt, _names.PREEMPT, "preempt"),
            tick_ns=tick_ns,
            memory_bytes=memory_bytes,
            page=units.parse_page(page),
            max_table_bytes=cap,
            seed=secrets.randbits(63) if seed is None else between(seed, 0, (1 << 64) - 1, "seed"),
            check=_names.one_of(check, CHECKS, "check"),
            workers=between(workers, 1, MAX_WORKERS, "workers"),
            worker_cpus=tuple(cpu_numbers(worker_cpus, "worker_cpus")),
            worker_queue=None
            if worker_queue is None
            else _names.one_of(worker_queue, _names.QUEUES, "worker_queue"),
            eager_page_split=bool(eager_page_split),
            dirty_mode=_names.one_of(dirty_mode, DIRTY_MODES, "dirty_mode"),
            dirty_ring=None if dirty_ring is None else between(dirty_ring, 1, 1 << 31, "dirty_ring"),
            nx_huge_pages=bool(nx_huge_pages),
            memslot_generation=between(memslot_generation, 0, (1 << 60) - 1, "memslot_generation"),
            format=_names.one_of(format, ENTRY_FORMATS, "format"),
            paging=_names.one_of(paging or PAGINGS[0], PAGINGS, "paging") if shadow else None,
            reclaim=_names.one_of(reclaim or "ipi", _names.reclaims(), "reclaim") if shadow else None,
            quota=None if quota is None else between(quota, LEAST_QUOTA, (1 << 32) - 1, "quota"),
        )

    @property
    def max_gfn(self) -> int:
        """The end of the guest-physical space, exclusive, in 4 KiB pages: 2^36 or 2^40."""
        return units.max_gfn(self.levels)


def _one_mmu(design: str, shadow: bool, **options: object) -> None:
    """Refuse what the MMU of a design does not have."""
    own = ("paging", "reclaim", "quota")
    for name, value in options.items():
        if value is None or (name in own) == shadow:
            continue
        if shadow:
            why = "the shadow MMU zaps page by page, in its caller, and nobody owns a root's first reference"
        else:
            why = f"of the shadow MMU only ({', '.join(_names.shadow_designs())})"
        raise InvalidArgument(f"{name}={value!r} with design {design}: {why}")
