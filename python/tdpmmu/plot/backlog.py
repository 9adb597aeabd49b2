"""Backlog: page-table pages that were unlinked and wait for a grace period, over time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdpmmu.plot import style
from tdpmmu.plot.select import Selection, measured
from tdpmmu.results import BenchRun
from tdpmmu.units import format_count, format_ns, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw", "mib", "pages_of"]


def _series(run: BenchRun) -> list[list[float]]:
    return list((run.raw.get("rcu") or {}).get("backlog_series") or ())


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw a stepped line a design; the repetition with the highest peak stands for it."""
    runs = chosen.first_scene(_series, "no run has a backlog series; measure again with this version")
    lines = {
        name: max(same, key=lambda run: max(pages for _, pages in _series(run)))
        for name, same in chosen.lines(runs).items()
    }
    figure.set_size_inches(10, 5.0)
    axes = figure.add_subplot()
    peaks: dict[str, tuple[float, float]] = {}
    seen: dict[str, int] = {}
    for name, run in lines.items():
        nth = seen.setdefault(run.design, 0)
        seen[run.design] += 1
        look = style.design_style(name, nth)
        marker = look.pop("marker")
        series = _series(run)
        # Before the first point nothing waits.
        times, pages = [0.0, *(p[0] for p in series)], [0.0, *(p[1] for p in series)]
        peak = max(pages)
        at = times[pages.index(peak)]
        peaks[name] = (peak, at)
        label = f"{name}: {format_count(round(peak))} pages ({format_size(peak * 4096)}) at {format_ns(at)}"
        axes.step(times, pages, where="post", label=label, **look)
        axes.plot([at], [peak], marker=marker, color=look["color"], markersize=6)
    axes.set_xlim(left=0)
    axes.set_ylim(0, max(peak for peak, _ in peaks.values()) * 1.08 or 1)
    style.ns_axis(axes.xaxis)
    axes.set_xlabel("time since the request began")
    axes.yaxis.set_major_formatter(lambda value, _: format_count(round(value)))
    axes.set_ylabel("table pages waiting for a grace period")
    right = axes.secondary_yaxis("right", functions=(mib, pages_of))
    right.set_ylabel("MiB")
    right.spines["right"].set_visible(False)
    style.bare(axes)
    found = style.sound({name: peak for name, (peak, _) in peaks.items()})
    low, high = min(found, key=lambda name: found[name]), max(found, key=lambda name: found[name])
    finding = f"At most {format_size(found[high] * 4096)} of tables wait for a grace period"
    if found[high] > 1.1 * found[low]:
        finding += f" under {high}, {format_size(found[low] * 4096)} under {low}"
    elif len(found) > 1:
        finding += ", under each design"
    style.title(figure, finding, measured(runs[0]))
    style.below(figure, 2)


def mib(pages: Any) -> Any:
    """Return MiB of so many pages of 4 KiB."""
    return pages * 4096 / 2**20


def pages_of(size: Any) -> Any:
    """Return how many pages of 4 KiB so many MiB are."""
    return size * 2**20 / 4096
