"""Retained: shadow pages that are obsolete or zapped, and still in memory, over the time of a zap.

A generation number makes a zap of everything one store; the pages behind it go later, or when memory is
short.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdpmmu.plot import style
from tdpmmu.plot.backlog import mib, pages_of
from tdpmmu.plot.select import Selection, measured
from tdpmmu.results import BenchRun
from tdpmmu.units import format_count, format_ns, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]


def _peak(run: BenchRun) -> int:
    return max((pages for _, pages in run.shadow.retained), default=0) if run.shadow else 0


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw a stepped line a shadow design; the repetition with the highest peak stands for it."""
    runs = chosen.first_scene(
        lambda run: run.shadow and run.shadow.retained,
        "no run says what the shadow MMU retained; measure with --design shadow-gen",
    )
    lines = {name: max(same, key=_peak) for name, same in chosen.lines(runs).items()}
    figure.set_size_inches(10, 5.0)
    axes = figure.add_subplot()
    gone: dict[str, int] = {}
    kept: dict[str, int] = {}
    drawn: list[tuple[list[int], list[int], str, dict[str, Any]]] = []
    for name, run in lines.items():
        assert run.shadow is not None
        look = style.design_style(name, 0)
        marker = look.pop("marker")
        times = [0, *(at for at, _ in run.shadow.retained)]
        pages = [0, *(count for _, count in run.shadow.retained)]
        peak = max(pages)
        label = f"{name}: {format_count(peak)} pages ({format_size(peak * 4096)}) at most"
        if not peak:
            label = f"{name}: none"
        elif pages[-1]:
            kept[name] = pages[-1]
            label += f", {format_size(pages[-1] * 4096)} stay"
        else:
            # The end of the last stretch in which something was there.
            gone[name] = next(
                t for t, n in zip(times, pages, strict=True) if t >= times[_last(pages)] and not n
            )
            label += f", gone after {format_ns(gone[name])}"
        at = pages.index(peak)
        drawn.append((times, pages, label, look))
        if peak:
            axes.plot([times[at]], [peak], marker=marker, color=look["color"], markersize=6)
    # What comes after the last page has gone is of no interest; what stays does so to the edge.
    edge = 1.4 * max(gone.values()) if gone else max(times[-1] for times, _, _, _ in drawn)
    for times, pages, label, look in drawn:
        axes.step([*times, max(times[-1], edge)], [*pages, pages[-1]], where="post", label=label, **look)
    axes.set_xlim(0, edge or 1)
    axes.set_ylim(0, max(_peak(run) for run in lines.values()) * 1.08 or 1)
    style.ns_axis(axes.xaxis)
    axes.set_xlabel("time since the request began", loc="left")
    axes.yaxis.set_major_formatter(lambda value, _: format_count(round(value)))
    axes.set_ylabel("shadow pages, obsolete or zapped, not yet free")
    right = axes.secondary_yaxis("right", functions=(mib, pages_of))
    right.set_ylabel("MiB")
    right.spines["right"].set_visible(False)
    style.bare(axes)
    worst = max(lines, key=lambda name: (_peak(lines[name]), name not in kept))
    finding = f"{format_size(_peak(lines[worst]) * 4096)} of obsolete tables at most, under {worst}"
    if kept:
        most = max(kept, key=lambda name: kept[name])
        finding += f"; {format_size(kept[most] * 4096)} stay under {most}"
    elif worst in gone:
        finding += f"; gone after {format_ns(gone[worst])}"
    style.title(figure, finding, measured(runs[0]))
    style.below(figure, 1 if len(lines) < 3 else 2)


def _last(pages: list[int]) -> int:
    """Return where something is there for the last time; 0 where nothing ever is."""
    return max((at for at, count in enumerate(pages) if count), default=0)
