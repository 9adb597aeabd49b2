"""Results about recordings of real KVM, frozen and typed: a replay, and a conformance report.

Times are ns of the recording's clock unless a name says otherwise; gfns and frames count 4 KiB pages.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from tdpmmu.results import Raw, _Document

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["ConformCase", "ConformReport", "Replay", "Timeline"]


@dataclass(frozen=True, slots=True)
class Timeline:
    """What was mapped when, at most 2,000 points: times in ns from the first event, counts, bytes.

    Attributes:
        t_ns: when, in ns since the first event of the recording.
        pages_4k: leafs of 4 KiB, a count.
        pages_2m: leafs of 2 MiB, a count.
        pages_1g: leafs of 1 GiB, a count.
        tables: page-table pages, roots included.
        table_bytes: their memory, in bytes.
    """

    t_ns: tuple[int, ...]
    pages_4k: tuple[int, ...]
    pages_2m: tuple[int, ...]
    pages_1g: tuple[int, ...]
    tables: tuple[int, ...]
    table_bytes: tuple[int, ...]

    @classmethod
    def from_raw(cls, raw: Raw | None, begin_ns: int = 0) -> Timeline | None:
        """Return the typed view; None where there is none. Times in ns, `begin_ns` is their zero."""
        if not raw or not raw.get("t_ns"):
            return None
        columns = {name: tuple(int(v) for v in raw.get(name) or ()) for name in cls.__slots__}
        columns["t_ns"] = tuple(at - begin_ns for at in columns["t_ns"])
        length = len(columns["t_ns"])
        for name, column in columns.items():
            if len(column) != length:
                raise ValueError(f"timeline.{name} has {len(column)} points, t_ns has {length}")
        return cls(**columns)

    def to_numpy(self) -> dict[str, npt.NDArray[np.int64]]:
        """Return the columns as int64 arrays of one length, by name; times in ns, memory in bytes."""
        import numpy as np

        return {name: np.array(getattr(self, name), dtype=np.int64) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Replay(_Document):
    """What a recording of real KVM holds, and whether its old values chain.

    Attributes:
        file: the recording.
        kernel: the kernel profile it was read under.
        events: events read.
        transitions: SPTE changes read.
        checked: transitions by verdict: same, hw_ad, fast_pf, silent_unfreeze, split_child, reordered,
            unknown, mismatch.
        mismatches: the unexplained ones, with line, gfn, level, expected and got.
        roots: roots seen, or None where the recording does not name them.
        tables_peak: most page-table pages alive at once, in pages.
        zaps: the zaps with cause, start and duration in ns, and entries by level.
        timeline: pages by level and table memory over time.
        causes: zaps summed by cause, the longest total first, times in ns.
        storms: stretches of many zaps for one cause, close together; times in ns.
        faults: counts of the guest's faults by kind.
        top_operations: the longest operations, in ns.
        vms: the VMs told apart, an object each.
        losses: where the recorder lost events; what they touched is unknown, not wrong.
        what_if: the recorded zaps run through a design, or None; ns measured on this machine.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "zaps"

    schema: str
    file: str
    kernel: str
    events: int
    transitions: int
    checked: Raw
    mismatches: tuple[Raw, ...]
    roots: Any
    tables_peak: int | None
    zaps: tuple[Raw, ...]
    timeline: Timeline | None = field(repr=False)
    causes: tuple[Raw, ...] = field(repr=False)
    storms: tuple[Raw, ...] = field(repr=False)
    faults: Raw = field(repr=False)
    top_operations: tuple[Raw, ...] = field(repr=False)
    vms: tuple[Raw, ...] = field(repr=False)
    losses: tuple[Raw, ...] = field(repr=False)
    what_if: Raw | None = field(repr=False)
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Replay:
        """Return the typed view of a report object."""
        return cls(
            schema=str(raw.get("schema", "")),
            file=str(raw.get("file", "")),
            kernel=str(raw.get("kernel", "")),
            events=int(raw.get("events", 0)),
            transitions=int(raw.get("transitions", 0)),
            checked=raw.get("checked") or {},
            mismatches=tuple(raw.get("mismatches", ())),
            roots=raw.get("roots"),
            tables_peak=raw.get("tables_peak"),
            zaps=tuple(raw.get("zaps", ())),
            timeline=Timeline.from_raw(raw.get("timeline"), int(raw.get("begin_ns") or 0)),
            causes=tuple(raw.get("causes") or ()),
            storms=tuple(raw.get("storms") or ()),
            faults=raw.get("faults") or {},
            top_operations=tuple(raw.get("top_operations") or ()),
            vms=tuple(raw.get("per_vm") or ()),
            losses=tuple(raw.get("losses") or ()),
            what_if=raw.get("what_if"),
            raw=raw,
        )

    @property
    def ok(self) -> bool:
        """True where no check failed."""
        return not self.checked.get("mismatch") and not self.mismatches

    def _rows(self) -> list[Raw]:
        return list(self.zaps)


@dataclass(frozen=True, slots=True)
class ConformCase:
    """One recording held against the engine. All numbers are counts.

    Attributes:
        name: the recording, by kernel and scenario.
        kernel: the kernel profile of the engine.
        operations: operations of its script that were run.
        expected: SPTE transitions recorded.
        matched: of them, those that the engine made, too, where and as it should.
        undetermined: transitions that hardware alone decides (aging).
        mismatches: an object each: the operation, what was expected, what the engine did instead.
        skipped: operations not run, and why.
        differences: everything that differs, listed or not: transitions, tables, statistics, results.
        left_over: transitions that the engine made and KVM did not.
        births: page-table pages born; empty where the recording does not tell.
        deaths: page-table pages torn down; empty where the recording does not tell.
        statistics: KVM's own statistics after each operation: compared, mismatched.
        per_kind: transitions by cause.
        raw: the whole JSON object.
    """

    name: str
    kernel: str
    operations: int
    expected: int
    matched: int
    undetermined: int
    mismatches: tuple[Raw, ...]
    skipped: tuple[Raw, ...]
    differences: int
    left_over: int
    births: Raw = field(repr=False)
    deaths: Raw = field(repr=False)
    statistics: Raw = field(repr=False)
    per_kind: Raw = field(repr=False)
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> ConformCase:
        """Return the typed view of one element of `cases`."""
        return cls(
            name=str(raw.get("name", "")),
            kernel=str(raw.get("kernel", "")),
            operations=int(raw.get("operations", 0)),
            expected=int(raw.get("expected", 0)),
            matched=int(raw.get("matched", 0)),
            undetermined=int(raw.get("undetermined", 0)),
            mismatches=tuple(raw.get("mismatches") or ()),
            skipped=tuple(raw.get("skipped") or ()),
            differences=int(raw.get("differences", len(raw.get("mismatches") or ()))),
            left_over=int(raw.get("left_over", 0)),
            births=_object(raw.get("births")),
            deaths=_object(raw.get("deaths")),
            statistics=_object(raw.get("statistics")),
            per_kind=_object(raw.get("per_kind")),
            raw=raw,
        )

    @property
    def ok(self) -> bool:
        """True where the engine did all that KVM did, and nothing else."""
        return not self.differences and not self.mismatches and not self.skipped


@dataclass(frozen=True, slots=True)
class ConformReport(_Document):
    """Recordings of real KVM held against the engine, entry by entry.

    Attributes:
        schema: `tdpmmu.conform/1`.
        cases: one per recording, in the order given.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "cases"

    schema: str
    cases: tuple[ConformCase, ...]
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> ConformReport:
        """Return the typed view of a report object."""
        cases = tuple(ConformCase.from_raw(case) for case in raw.get("cases", ()))
        return cls(str(raw.get("schema", "")), cases, raw)

    def __repr__(self) -> str:
        matched, expected = (
            sum(getattr(case, name) for case in self.cases) for name in ("matched", "expected")
        )
        return f"ConformReport(cases={len(self.cases)}, matched={matched}, expected={expected}, ok={self.ok})"

    @property
    def ok(self) -> bool:
        """True where every case is."""
        return all(case.ok for case in self.cases)

    def _rows(self) -> list[Raw]:
        return [case.raw for case in self.cases]


def _object(raw: object) -> Raw:
    return raw if isinstance(raw, Mapping) else {}
