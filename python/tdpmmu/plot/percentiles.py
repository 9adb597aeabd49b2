"""Percentiles: a whole distribution, a curve a design, on HdrHistogram's axis.

The horizontal axis is 1/(1-q), logarithmic: each nine of a percentile has the same width, and the tail, which
is what a guest notices, has most of the room. A curve ends at its largest sample; where fewer than ten
samples lie beyond a percentile, the curve is thin: that part is single events.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tdpmmu.errors import InvalidArgument
from tdpmmu.plot import style
from tdpmmu.plot.select import Selection, measured
from tdpmmu.units import format_count, format_ns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

#: In the order preferred when nobody says which, and what each is.
FIELDS = {
    "update_ns": "one update of many",
    "block_drop_ns": "vCPU blocked by dropping its root",
    "access_ns": "a guest's access, from when it was due",
    "block_update_ns": "vCPU blocked by a memslot update",
    "step_units": "SPTE operations between two reschedule checks",
    "reader_wait_ns": "wait for mmu_lock, shared",
    "writer_wait_ns": "wait for mmu_lock, exclusive",
}
_ENOUGH = 100
#: Bucket values, how many samples lie below each, and the count of samples.
Merged = tuple[np.ndarray, np.ndarray, int]


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw one curve a design, repetitions merged."""
    field = chosen.field or _usual(chosen)
    known = list(dict.fromkeys(name for run in chosen.runs for name in run.curves))
    why = f"no run has a curve of {field} (known: {', '.join(known) or 'none'})"
    runs = chosen.first_scene(lambda run: run.curves.get(field), why)
    time = field.endswith("_ns")
    figure.set_size_inches(10, 5.4)
    axes = figure.add_subplot()
    found: dict[str, Merged] = {}
    most = 10.0
    seen: dict[str, int] = {}
    for name, same in chosen.lines(runs).items():
        values, below, count = merged([run.curves[field] for run in same])
        nth = seen.setdefault(same[0].design, 0)
        seen[same[0].design] += 1
        look = style.design_style(name, nth)
        look.pop("marker")
        x = count / (count - below)
        # Each bucket is reached at the share of samples below it, and lasts until the next.
        solid = x <= count / 10
        label = f"{name} ({format_count(count)} samples)"
        axes.step(x[solid], values[solid], where="post", label=label, **look)
        rest = max(0, int(solid.sum()) - 1)
        axes.step(x[rest:], values[rest:], where="post", linewidth=0.8, **{**look, "label": "_"})
        axes.plot([x[-1], count], [values[-1], values[-1]], linewidth=0.8, **look)
        axes.plot([count], [values[-1]], marker="o", markersize=3.5, color=look["color"], clip_on=False)
        most = max(most, count)
        found[name] = (values, below, count)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(1, most * 1.15)
    # The shortest hundredth says nothing about a wait, and would take half of the height.
    floors = [_at(*merged, 0.01) for merged in found.values()]
    axes.set_ylim(bottom=min(floors) / 1.3)
    nines = [10.0**n for n in range(int(np.log10(most)) + 1)]
    axes.set_xticks([1, 2, *nines[1:]], ["0 %", "50 %", *(_percent(x) for x in nines[1:])])
    axes.xaxis.set_minor_locator(_no_ticks())
    axes.set_xlabel(
        "share of samples that are no longer, a nine a step"
        if time
        else "share of samples that are no larger"
    )
    if time:
        style.ns_axis(axes.yaxis)
    else:
        axes.yaxis.set_major_formatter(lambda value, _: format_count(round(value)))
    axes.set_ylabel(FIELDS.get(field, field))
    style.bare(axes)
    style.title(
        figure,
        _finding(field, found, time),
        f"{measured(runs[0])}; {field}: {FIELDS.get(field, 'distribution')}",
    )
    style.below(figure, 2 if len(found) < 7 else 3)


def merged(curves: list[list[list[int]]]) -> Merged:
    """Return bucket values, how many samples lie below each bucket, and the count of samples."""
    total: dict[int, int] = {}
    for curve in curves:
        for value, count in curve:
            total[value] = total.get(value, 0) + count
    values = np.array(sorted(total), dtype=np.float64)
    counts = np.array([total[int(value)] for value in values], dtype=np.int64)
    below = np.concatenate([[0], np.cumsum(counts)[:-1]])
    return np.maximum(values, 0.5), below, int(counts.sum())


def _usual(chosen: Selection) -> str:
    found: Mapping[str, int] = {
        name: max(
            (sum(c for _, c in run.curves[name]) for run in chosen.runs if run.curves.get(name)), default=0
        )
        for name in FIELDS
    }
    for name, count in found.items():
        if count >= _ENOUGH:
            return name
    best = max(found, key=lambda name: found[name])
    if not found[best]:
        raise InvalidArgument("result: no run has curves; measure again with this version")
    return best


def _at(values: np.ndarray, below: np.ndarray, count: int, q: float) -> float:
    return float(values[max(0, int(np.searchsorted(below, q * count, side="right")) - 1)])


def _percent(x: float) -> str:
    digits = max(0, len(str(int(x))) - 3)
    return f"{100 * (1 - 1 / x):.{digits}f} %"


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _finding(field: str, found: dict[str, Merged], time: bool) -> str:
    """Compare the designs at the furthest percentile that all of them have ten samples beyond."""
    fewest = min(count for _, _, count in found.values())
    one_in = 10.0 ** int(np.log10(max(fewest / 10, 1)))
    tails = {name: _at(*merged, 1 - 1 / one_in) for name, merged in found.items()}
    if one_in == 1:
        tails = {name: float(values[-1]) for name, (values, _, _) in found.items()}
    tails = style.sound(tails)
    best, worst = min(tails, key=lambda name: tails[name]), max(tails, key=lambda name: tails[name])
    write = format_ns if time else (lambda value: format_count(round(value or 0)))
    what = FIELDS.get(field, field).split(",")[0]
    share = f"one in {format_count(round(one_in))}" if one_in > 1 else "the longest"
    verb = "exceeds" if one_in > 1 else "is"
    said = f"{what}: {share} {verb} {write(tails[worst])} under {worst}"
    if len(tails) == 1:
        return said
    if tails[worst] < 1.2 * tails[best]:
        return f"{what}: {share} {verb} about {write(tails[worst])} under each design"
    return f"{said}, {write(tails[best])} under {best}"
