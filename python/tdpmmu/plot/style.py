"""How all charts look: fonts, colours, axes in scaled units, and the two lines above each picture."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tdpmmu.units import format_ns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "PHASES", "RC", "bare", "below", "design_style", "ns_axis", "sound", "times", "title"]

#: The salt keeps the ids of an SVG stable: the same result draws the same file.
RC: Any = {
    "svg.hashsalt": "tdpmmu",
    "font.size": 10,
    "axes.labelsize": 10,
    "axes.titlesize": 10,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
}
# Okabe and Ito's colours: told apart by readers who see fewer of them.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#F0E442")
#: What a thread does, in the order stacked: the work first, then what it waits for.
PHASES = {
    "spte_work": ("SPTE work", "#0072B2"),
    "free": ("free tables", "#009E73"),
    "flush": ("TLB flush", "#F0E442"),
    "kick_wait": ("wait for kicked vCPUs", "#E69F00"),
    "lock_wait": ("wait for mmu_lock", "#D55E00"),
    "yield": ("yielded", "#CC79A7"),
    "queue_delay": ("wait for a worker", "#555555"),
    "grace_period": ("wait for a grace period", "#56B4E9"),
    "other": ("other (guest, faults, sleep)", "#E4E4E4"),
}
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
_MARKERS = "osD^vPX*<>"
#: The designs that a session compares most keep their colour from picture to picture.
_DESIGNS = (
    "inline",
    "async-worker",
    "sync",
    "second-list",
    "in-place",
    "defunct-flag",
    "async-worker-owned",
    "second-list-worker",
    "system-workqueue",
    "no-second-phase",
    "shadow-gen",
    "shadow-walk",
    "shadow-gen-kept",
    "shadow-walk-break",
    "shadow-slot",
)


def design_style(name: str, nth: int) -> dict[str, Any]:
    """Return colour, dash and marker of a curve: by design, and by dash where it has several (`nth`)."""
    flawed = name.split(",")[0].endswith("(flawed)")
    design = name.split(",")[0].removesuffix(" (flawed)")
    at = _DESIGNS.index(design) if design in _DESIGNS else len(_DESIGNS) + sum(design.encode()) % 7
    return {
        # What a flawed design reaches is no achievement: it stays in the background.
        "color": "#8A8A8A" if flawed else COLOURS[at % 7],
        "linestyle": _DASHES[(at // 7 + nth + flawed) % len(_DASHES)],
        "marker": _MARKERS[at % len(_MARKERS)],
    }


_WIDTH = 88


def title(figure: Figure, finding: str, measured: str) -> None:
    """Put what was found above what was measured, over the whole picture, and keep the room for it free."""
    # The field's own spelling stays: vCPU.
    start = finding[:1] if finding.startswith("vCPU") else finding[:1].upper()
    lines = textwrap.wrap(start + finding[1:], _WIDTH, break_on_hyphens=False)
    width, height = figure.get_size_inches()
    room = 0.26 * len(lines) + 0.34
    figure.set_size_inches(width, height + room - 0.45)
    height += room - 0.45
    engine = figure.get_layout_engine()
    assert engine is not None
    engine.set(rect=(0, 0, 1, 1 - room / height))  # type: ignore[call-arg]
    left = 0.1 / width
    for at, line in enumerate(lines):
        place = 1 - (0.1 + 0.26 * at) / height
        figure.text(left, place, line, fontsize=12.5, fontweight="bold", va="top")
    place = 1 - (0.1 + 0.26 * len(lines)) / height
    figure.text(left, place, measured, fontsize=9, color="#444444", va="top")


def sound(found: dict[str, float]) -> dict[str, float]:
    """Leave out the flawed designs, unless there is nothing else: no finding rests on them."""
    return {name: value for name, value in found.items() if "(flawed)" not in name} or found


def ns_axis(axis: Any) -> None:
    """Label an axis of nanoseconds in scaled units."""
    axis.set_major_formatter(lambda value, _: format_ns(value))


def bare(axes: Axes, grid: str = "both") -> None:
    """Leave away the lines that say nothing."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.grid(False)
    axes.grid(True, axis=grid)  # type: ignore[arg-type]
    axes.tick_params(length=3, color="#666666")


def times(high: float, low: float) -> str:
    """Return a ratio for people: `36,000 times`, `1.3 times`."""
    ratio = high / low if low else float("inf")
    if ratio >= 100:
        digits = 10 ** (len(str(int(ratio))) - 2)
        return f"{round(ratio / digits) * digits:,} times"
    return f"{ratio:.0f} times" if ratio >= 9.5 else f"{ratio:.1f} times"


def below(axes: Axes | Figure, columns: int, handles: Iterable[Any] | None = None) -> None:
    """Put the legend outside, under the picture, where it hides nothing."""
    options: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "fontsize": 9}
    if handles is not None:
        options["handles"] = list(handles)
    axes.legend(**options)
