"""The two MMUs of KVM for the same guest: what their tables weigh, what faults and zaps of everything cost.

`tdp` is the TDP MMU; `shadow-direct` the shadow MMU where hardware translates guest addresses (what KVM did
with EPT and NPT before there was a TDP MMU); `shadow-guest` the shadow MMU without such hardware (the guest's
own tables are shadowed).
"""

from __future__ import annotations

import json
import secrets
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, SupportsIndex

from tdpmmu import _names, _native, units
from tdpmmu.bench import MAX_VCPUS, between, check_timeout
from tdpmmu.errors import InvalidArgument
from tdpmmu.results import Raw, _Document

__all__ = ["MMUS", "Versus", "VersusCell", "VersusRow", "versus", "versus_config"]

Progress = Callable[[str, float], object]
Size = str | SupportsIndex
#: In the order shown.
MMUS = ("tdp", "shadow-direct", "shadow-guest")
#: What is measured in each repetition, and has a median in a cell. Names carry units.
MEASURES = (
    "sptes",
    "tables_bytes",
    "metadata_bytes",
    "rmap_bytes",
    "guest_table_bytes",
    "fault_ns",
    "zap_visible_ns",
    "zap_hold_ns",
    "zap_longest_hold_ns",
    "zap_call_ns",
    "zap_total_ns",
    "zap_cpu_ns",
    "refault_ns",
)


@dataclass(frozen=True, slots=True)
class VersusRow:
    """One repetition for one guest under one MMU. Times in ns, memory in bytes; None where nothing applies.

    Attributes:
        mmu: one of `MMUS`.
        design: the zap design that it ran.
        sptes: leaf SPTEs at the start, a count.
        tables_bytes: page-table pages of the MMU.
        metadata_bytes: what it keeps beside each table page.
        rmap_bytes: reverse maps, parent lists and lpage_info; the TDP MMU has none of its own.
        guest_table_bytes: the guest's own page tables, where the MMU shadows them.
        fault_ns: a guest access that faults, all vCPUs at once on memory of their own: the mean.
        zap_visible_ns: from the zap's begin until the last vCPU has mapped a page under a new root.
        zap_hold_ns: the first exclusive hold of mmu_lock.
        zap_longest_hold_ns: the longest one.
        zap_call_ns: the call that zaps, entry to return.
        zap_total_ns: until the last table is free.
        zap_cpu_ns: CPU time of all who took part.
        refault_ns: from the zap's begin until the working sets are mapped again.
        overcommit: there were more threads than CPUs: times contain the host's scheduling.
        raw: the whole JSON object.
    """

    mmu: str
    design: str
    memory_bytes: int
    page: str
    vcpus: int
    rep: int
    overcommit: bool
    sptes: int | None
    tables_bytes: int | None
    metadata_bytes: int | None
    rmap_bytes: int | None
    guest_table_bytes: int | None
    fault_ns: float | None
    zap_visible_ns: int | None
    zap_hold_ns: int | None
    zap_longest_hold_ns: int | None
    zap_call_ns: int | None
    zap_total_ns: int | None
    zap_cpu_ns: int | None
    refault_ns: int | None
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> VersusRow:
        """Return the typed view of one element of `rows`."""
        return cls(
            mmu=str(raw.get("mmu", "?")),
            design=str(raw.get("design", "?")),
            memory_bytes=int(raw.get("memory_bytes") or 0),
            page=str(raw.get("page", "?")),
            vcpus=int(raw.get("vcpus") or 0),
            rep=int(raw.get("rep") or 0),
            overcommit=bool(raw.get("overcommit")),
            **{name: raw.get(name) for name in MEASURES},
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class VersusCell:
    """One guest under one MMU: the medians of its repetitions. Times in ns, memory in bytes."""

    mmu: str
    memory_bytes: int
    vcpus: int
    rows: tuple[VersusRow, ...]

    def median(self, measure: str) -> float | None:
        """Return the median of a measure, a name out of `VersusRow` with its unit; None where it has none."""
        found = [value for row in self.rows if (value := getattr(row, measure)) is not None]
        return statistics.median(found) if found else None

    @property
    def books_bytes(self) -> float | None:
        """What the MMU keeps beside its tables, in bytes: metadata, reverse maps, lpage_info."""
        parts = [part for name in ("metadata_bytes", "rmap_bytes") if (part := self.median(name)) is not None]
        return sum(parts) if parts else None

    @property
    def memory(self) -> float | None:
        """Tables and what is kept beside them, in bytes; the guest's own tables are the guest's."""
        tables = self.median("tables_bytes")
        return None if tables is None else tables + (self.books_bytes or 0)


@dataclass(frozen=True, slots=True)
class Versus(_Document):
    """What `versus` measured: a row a repetition, guest and MMU, run in turns in one process.

    Attributes:
        schema: `tdpmmu.versus/1`.
        limits: ns per 8-byte entry that this host's memory allows, measured in the same run.
        rows: in the order run.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "rows"

    schema: str
    seed: int | None
    host: Raw
    build: Raw
    config: Raw
    limits: Raw
    rows: tuple[VersusRow, ...]
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Versus:
        """Return the typed view of a result object."""
        return cls(
            schema=str(raw.get("schema", "")),
            seed=raw.get("seed"),
            host=raw.get("host") or {},
            build=raw.get("build") or {},
            config=raw.get("config") or {},
            limits=raw.get("limits") or {},
            rows=tuple(VersusRow.from_raw(row) for row in raw.get("rows", ())),
            raw=raw,
        )

    def __repr__(self) -> str:
        guests = {(row.memory_bytes, row.vcpus) for row in self.rows}
        return f"Versus(guests={len(guests)}, rows={len(self.rows)}, seed={self.seed!r})"

    def cells(self) -> tuple[VersusCell, ...]:
        """Return the medians: by guest size in bytes, then vCPUs, then MMU in the order of `MMUS`."""
        found: dict[tuple[int, int, int, str], list[VersusRow]] = {}
        for row in self.rows:
            order = MMUS.index(row.mmu) if row.mmu in MMUS else len(MMUS)
            found.setdefault((row.memory_bytes, row.vcpus, order, row.mmu), []).append(row)
        return tuple(
            VersusCell(mmu, memory, vcpus, tuple(rows))
            for (memory, vcpus, _, mmu), rows in sorted(found.items(), key=lambda item: item[0])
        )

    def cell(self, mmu: str, memory: Size, vcpus: int) -> VersusCell:
        """Return the medians of one guest under one MMU; `memory` in bytes or as text.

        Raises:
            InvalidArgument: there is no such row; the message has those there are.
        """
        wanted = (_names.one_of(mmu, MMUS, "mmu"), units.parse_size(memory, "memory"), vcpus)
        every = self.cells()
        for cell in every:
            if (cell.mmu, cell.memory_bytes, cell.vcpus) == wanted:
                return cell
        there = ", ".join(
            dict.fromkeys(f"{units.format_size(c.memory_bytes)} with {c.vcpus} vCPUs" for c in every)
        )
        raise InvalidArgument(
            f"mmu={mmu!r}, memory={memory!r}, vcpus={vcpus!r}: not measured (there are {there})"
        )

    def _rows(self) -> list[Raw]:
        return [row.raw for row in self.rows]


def versus_config(
    *,
    memory: Size | Iterable[Size] = ("1G", "4G"),
    vcpus: int | Iterable[int] = (1, 2),
    page: Size = "4K",
    reps: int = 3,
    profile: str = "6.12",
    seed: int | None = None,
    max_memory: Size | None = None,
) -> dict[str, Any]:
    """Return the configuration object that the native side takes, after checking every value.

    Arguments and errors: see `versus`; sizes in bytes.
    """
    page_text = units.parse_page(page)
    step = units.PAGE_BYTES[page_text]
    limit = units.max_gfn(4) * 4096
    sizes = []
    for one in _several(memory):
        size = units.parse_size(one, "memory")
        if size == 0 or size % step or size > limit:
            raise InvalidArgument(
                f"memory={one!r}: must be a multiple of the page size {page_text}, at least one page and at "
                f"most {units.format_size(limit)}"
            )
        sizes.append(size)
    counts = [between(one, 1, MAX_VCPUS, "vcpus") for one in _several(vcpus)]
    for name, found in (("memory", sizes), ("vcpus", counts)):
        if not found:
            raise InvalidArgument(f"{name}: expected at least one")
    config: dict[str, Any] = {
        "memory_bytes": list(dict.fromkeys(sizes)),
        "page": page_text,
        "vcpus": list(dict.fromkeys(counts)),
        "reps": between(reps, 1, 1_000_000, "reps"),
        "kernel_profile": _names.profile(profile),
        "seed": secrets.randbits(63) if seed is None else between(seed, 0, (1 << 64) - 1, "seed"),
    }
    if max_memory is not None:
        config["max_memory_bytes"] = units.parse_size(max_memory, "max_memory")
    return config


def versus(
    *,
    memory: Size | Iterable[Size] = ("1G", "4G"),
    vcpus: int | Iterable[int] = (1, 2),
    page: Size = "4K",
    reps: int = 3,
    profile: str = "6.12",
    seed: int | None = None,
    max_memory: Size | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> Versus:
    """Measure the same guests under the TDP MMU and under the shadow MMU, in turns, in this process.

    Args:
        memory: guest sizes in bytes or as text: one, or several.
        vcpus: numbers of running vCPUs: one, or several. Each goes with each size.
        page: size of the mappings, 4K, 2M or 1G.
        reps: repetitions of each, a count.
        profile: kernel profile, `NAME[,switch=value]`.
        seed: of the guests' accesses; drawn where None.
        max_memory: refuse to use more than this, in bytes.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Returns:
        Times in ns, memory in bytes, a row a repetition.

    Raises:
        InvalidArgument: a value breaks a rule; the message names it.
        OutOfTableMemory: the largest guest does not fit; found before anything is allocated.
        OracleViolation: a check failed after a run.
        StallError: not finished within `timeout` seconds.
    """
    config = versus_config(
        memory=memory, vcpus=vcpus, page=page, reps=reps, profile=profile, seed=seed, max_memory=max_memory
    )
    return measure(config, progress=progress, timeout=timeout)


def measure(
    config: dict[str, Any], *, progress: Progress | None = None, timeout: float | None = None
) -> Versus:
    """Run a checked configuration (see `versus_config`); times in ns. Errors: see `versus`."""
    answer = _native.bench("versus", json.dumps(config), progress=progress, timeout=check_timeout(timeout))
    return Versus.from_raw(json.loads(answer))


def _several(values: Any) -> list[Any]:
    """Return what is one value or several as a list; text may be several by commas."""
    if isinstance(values, str):
        return [part.strip() for part in values.split(",")]
    return list(values) if isinstance(values, Iterable) else [values]
