"""The two MMUs side by side: a panel a measure, a colour an MMU, a dash a number of vCPUs.

Both axes are logarithmic: lines of slope one are proportional to the guest, level ones do not know it. With
one guest size the panels go by vCPUs instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tdpmmu.mmus import MMUS, Versus, VersusCell
from tdpmmu.plot import style
from tdpmmu.units import format_ns, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

Take = Callable[[VersusCell], float | None]
_COLOURS = {"tdp": style.COLOURS[0], "shadow-direct": style.COLOURS[5], "shadow-guest": style.COLOURS[2]}
_MARKERS = {"tdp": "o", "shadow-direct": "s", "shadow-guest": "^"}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def _of(measure: str) -> Take:
    return lambda cell: cell.median(measure)


_PANELS: list[tuple[str, Take, bool]] = [
    ("zap-all: visible to the last vCPU", _of("zap_visible_ns"), True),
    ("zap-all: first exclusive hold", _of("zap_hold_ns"), True),
    ("zap-all: in total, to the last table", _of("zap_total_ns"), True),
    ("memory: tables and what is kept beside them", lambda cell: cell.memory, False),
    ("one page fault", _of("fault_ns"), True),
    ("zap-all: CPU time of all who took part", _of("zap_cpu_ns"), True),
]


def draw(figure: Figure, result: Versus) -> None:
    """Draw the panels that have something, three in a row."""
    cells = result.cells()
    panels = [panel for panel in _PANELS if any(panel[1](cell) for cell in cells)]
    rows = max(1, math.ceil(len(panels) / 3))
    figure.set_size_inches(13, 1.2 + 3.5 * rows)
    grid = figure.subplots(rows, min(3, max(1, len(panels))), squeeze=False)
    handles: dict[str, Any] = {}
    flat = [axes for line in grid for axes in line]
    for axes, (said, take, time) in zip(flat, panels, strict=False):
        _panel(axes, cells, take, time)
        axes.set_title(said, loc="left", fontsize=10)
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    reps = max(len(cell.rows) for cell in cells)
    first = cells[0].rows[0]
    designs = {cell.mmu: cell.rows[0].design for cell in cells}
    about = ", ".join(f"{mmu} by {designs[mmu]}" for mmu in MMUS if mmu in designs)
    note = f"; medians of {reps} repetitions" if reps > 1 else ""
    style.title(figure, _finding(cells), f"{first.page} pages; {about}{note}")
    style.below(figure, max(len({cell.vcpus for cell in cells}), 3), handles.values())


def _panel(axes: Axes, cells: tuple[VersusCell, ...], take: Take, time: bool) -> None:
    sizes = sorted({cell.memory_bytes for cell in cells})
    counts = sorted({cell.vcpus for cell in cells})
    by_size = len(sizes) > 1 or len(counts) == 1
    values: list[float] = []
    for mmu in dict.fromkeys(cell.mmu for cell in cells):
        mine = [cell for cell in cells if cell.mmu == mmu]
        for nth, group in enumerate(counts if by_size else sizes):
            line = [cell for cell in mine if (cell.vcpus if by_size else cell.memory_bytes) == group]
            points = [
                (cell.memory_bytes if by_size else cell.vcpus, value)
                for cell in line
                if (value := take(cell))
            ]
            if not points:
                continue
            values += [value for _, value in points]
            label = f"{mmu}, {group} vCPU{'s' if group != 1 else ''}" if by_size else mmu
            axes.plot(
                *zip(*points, strict=True),
                label=label,
                color=_COLOURS.get(mmu, "#555555"),
                marker=_MARKERS.get(mmu, "D"),
                markerfacecolor="white" if nth % 2 else _COLOURS.get(mmu, "#555555"),
                markersize=6,
                linestyle=_DASHES[nth % len(_DASHES)],
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sizes if by_size else counts
    axes.set_xticks(ticks, [format_size(t) if by_size else str(t) for t in ticks])
    axes.set_xlim(ticks[0] / 1.25, ticks[-1] * 1.25)
    axes.minorticks_off()
    axes.set_xlabel("guest memory" if by_size else "vCPUs", loc="left")
    low, high = min(values), max(values)
    # A flat panel still spans a decade: noise must not look like growth.
    middle = math.sqrt(low * high)
    axes.set_ylim(min(low / 1.6, middle / 3.3), max(high * 1.6, middle * 3.3))
    _ticks(axes, time)
    style.bare(axes)


def _ticks(axes: Axes, time: bool) -> None:
    """Put y ticks at round values: decades of time, powers of two of memory."""
    low, high = axes.get_ylim()
    base = 10.0 if time else 2.0
    first, last = math.ceil(math.log(low, base)), math.floor(math.log(high, base))
    step = max(1, math.ceil((last - first) / 5))
    places = [base**e for e in range(first, last + 1, step)]
    if time and len(places) < 3:
        places = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
    places = [place for place in places if low <= place <= high]
    axes.set_yticks(places, [format_ns(p) if time else format_size(p) for p in places])


def _finding(cells: tuple[VersusCell, ...]) -> str:
    """Say what a zap of everything in the largest guest costs the vCPUs, and what it costs in all."""
    size = max(cell.memory_bytes for cell in cells)
    vcpus = max(cell.vcpus for cell in cells if cell.memory_bytes == size)
    there = {cell.mmu: cell for cell in cells if (cell.memory_bytes, cell.vcpus) == (size, vcpus)}
    parts = []
    for said, measure in (("visible after", "zap_visible_ns"), ("over after", "zap_total_ns")):
        found = {mmu: ns for mmu in MMUS if mmu in there and (ns := there[mmu].median(measure))}
        if found:
            parts.append(said + " " + ", ".join(f"{format_ns(ns)} ({mmu})" for mmu, ns in found.items()))
    if not parts:
        return "The two MMUs side by side"
    return f"zap-all of {format_size(size)}, {vcpus} vCPUs: " + "; ".join(parts)
