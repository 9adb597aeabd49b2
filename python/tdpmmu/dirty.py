"""What `bench dirty` measured, a course a row: how a log is kept, and what each phase of it cost.

A course is one way through the phases: a protocol, huge pages split ahead or not, one page in so many
written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdpmmu.results import MicroResult, MicroRow
from tdpmmu.table import render as columns
from tdpmmu.table import render_micro
from tdpmmu.units import format_count, format_ns, format_size

__all__ = ["PHASES", "Course", "courses", "measured", "render"]

#: The phases in their order, and how they are said. `total` is all up to the first writes, and no phase.
PHASES = {
    "enable": "enable",
    "first-clear": "first clear",
    "write": "first write",
    "harvest": "harvest",
    "rewrite": "write again",
    "disable": "disable",
    "refault": "write after",
}


@dataclass(frozen=True, slots=True)
class Course:
    """One way through the phases.

    Attributes:
        protocol: how written pages are found, such as `get` or `ring`.
        eager: huge pages were split when logging started; None where there were none.
        density: one page in so many was written, a count.
        phases: the rows by phase; times in ns.
    """

    protocol: str
    eager: bool | None
    density: int
    phases: Mapping[str, MicroRow]

    @property
    def name(self) -> str:
        """The protocol, and how huge pages were split."""
        return self.protocol + {True: ", eager split", False: ", split in faults", None: ""}[self.eager]

    def total_ns(self, phase: str) -> int | None:
        """Return how long a phase took, in ns; None where it was not run."""
        row = self.phases.get(phase)
        return None if row is None else row.raw.get("total_ns")


def courses(result: MicroResult) -> list[Course]:
    """Return the courses of a result in the order run; none where it is of another experiment."""
    found: dict[tuple[Any, ...], dict[str, MicroRow]] = {}
    for row in result.rows:
        phase = row.raw.get("phase")
        if phase is not None:
            key = tuple(row.raw.get(name) for name in ("protocol", "eager", "density"))
            found.setdefault(key, {})[str(phase)] = row
    return [
        Course(str(protocol), eager, int(density or 1), rows)
        for (protocol, eager, density), rows in found.items()
    ]


def often(density: int) -> str:
    """Return how many pages are written, for people."""
    return "every page written" if density == 1 else f"1 page in {format_count(density)} written"


def measured(result: MicroResult) -> str:
    """Return which guest was measured: size, pages, kernel."""
    config = result.raw.get("config") or {}
    size = format_size(int(config.get("memory_bytes") or 0))
    kernel = config.get("kernel_profile", "?")
    return f"{size} of {config.get('page', '?')} pages, kernel {kernel}"


def render(result: MicroResult, wide: bool = False) -> str:
    """Return what each phase cost an operation, then what eager splitting is worth where both were run.

    Every row with its limit where `wide`. Times in ns an operation above, scaled totals below.
    """
    every = courses(result)
    if not every:
        return render_micro(result)
    parts = [f"{measured(result)}; ns an operation, in brackets the ratio to this host's limit\n"]
    parts += [_costs([c for c in every if c.density == density]) for density in _densities(every)]
    compared = _compared(every)
    if compared:
        parts.append(f"Eager split on and off: the whole phase\n\n{compared}")
    if wide:
        parts.append(render_micro(result))
    return "\n".join(parts)


def _densities(every: list[Course]) -> list[int]:
    return list(dict.fromkeys(course.density for course in every))


def _costs(same: list[Course]) -> str:
    shown = [phase for phase in PHASES if any(phase in course.phases for course in same)]
    rows = [[c.name, *(_cost(c.phases.get(phase)) for phase in shown)] for c in same]
    return columns([often(same[0].density), *(PHASES[phase] for phase in shown)], rows)


def _cost(row: MicroRow | None) -> str:
    if row is None or row.ns is None:
        return "-"
    text = f"{row.ns:.1f}" if row.ns < 100 else f"{row.ns:,.0f}"
    return text if row.ratio is None else f"{text} ({row.ratio:.1f})"


def _compared(every: list[Course]) -> str:
    """Return the classic comparison: a row a protocol and density that was run both ways."""
    pairs: dict[tuple[str, int], dict[bool, Course]] = {}
    for course in every:
        if course.eager is not None:
            pairs.setdefault((course.protocol, course.density), {})[course.eager] = course
    rows = []
    for (protocol, density), ways in pairs.items():
        if len(ways) < 2:
            continue
        cells = [f"{protocol}, {often(density)}"]
        for phase in ("enable", "write", "total", "harvest"):
            cells += [_time(ways[eager].total_ns(phase)) for eager in (True, False)]
        rows.append(cells)
    heads = ["enable", "first write", "both", "harvest"]
    header = ["", *(f"{head}\n{way}" for head in heads for way in ("eager", "lazy"))]
    return columns(header, rows) if rows else ""


def _time(ns: int | None) -> str:
    return "-" if ns is None else format_ns(ns)
