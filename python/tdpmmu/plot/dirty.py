"""Dirty logging: a bar a course, a part a phase. Eager splitting moves time from writing to enabling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdpmmu.dirty import PHASES, Course, courses, measured, often
from tdpmmu.plot import style
from tdpmmu.results import MicroResult
from tdpmmu.units import format_ns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

#: By phase. What the guest pays is orange and pink, what the VMM pays is blue and green.
_COLOURS = {
    "enable": "#0072B2",
    "first-clear": "#003F66",
    "write": "#E69F00",
    "harvest": "#009E73",
    "rewrite": "#F3CF7A",
    "disable": "#56B4E9",
    "refault": "#CC79A7",
}
_DARK = ("#0072B2", "#003F66", "#009E73")


def draw(figure: Figure, result: MicroResult) -> None:
    """Draw a panel a density, a bar a protocol and way of splitting, a part a phase."""
    every = courses(result)
    panels: dict[int, list[Course]] = {}
    for course in every:
        panels.setdefault(course.density, []).append(course)
    heights = [0.55 + 0.32 * len(same) for same in panels.values()]
    figure.set_size_inches(10.5, 1.5 + sum(heights) + 0.4 * len(heights))
    grid = figure.subplots(len(panels), 1, height_ratios=heights, squeeze=False)
    handles: dict[str, Any] = {}
    for axes, (density, same) in zip(grid[:, 0], panels.items(), strict=True):
        widest = max(sum(course.total_ns(phase) or 0 for phase in PHASES) for course in same) or 1
        for at, course in enumerate(same):
            left = 0
            for phase, said in PHASES.items():
                width = course.total_ns(phase) or 0
                if not width:
                    continue
                colour = _COLOURS[phase]
                bar = axes.barh(
                    at, width, left=left, height=0.74, color=colour, label=said, edgecolor="white"
                )
                handles.setdefault(said, bar)
                if width > 0.075 * widest:
                    axes.text(
                        left + width / 2, at, format_ns(width), ha="center", va="center", fontsize=8,
                        color="white" if colour in _DARK else "black",
                    )  # fmt: skip
                left += width
            axes.text(left + 0.008 * widest, at, format_ns(left), va="center", fontsize=8.5, color="#444444")
        axes.set_yticks(range(len(same)), [course.name for course in same])
        axes.invert_yaxis()
        axes.set_xlim(0, widest * 1.12)
        axes.set_title(often(density), loc="left", fontsize=10)
        style.ns_axis(axes.xaxis)
        style.bare(axes, "x")
    style.title(
        figure,
        _finding(every),
        measured(result) + "; the guest writes after enabling, again, and after the end",
    )
    style.below(figure, len(handles), [handles[said] for said in PHASES.values() if said in handles])


def _finding(every: list[Course]) -> str:
    """Say what eager splitting changes where both ways were run, else what the first course came to."""
    for course in every:
        other = next(
            (
                o
                for o in every
                if (o.protocol, o.density) == (course.protocol, course.density)
                and course.eager
                and o.eager is False
            ),
            None,
        )
        if other is None:
            continue
        pairs = [(course.total_ns(phase) or 0, other.total_ns(phase) or 0) for phase in ("enable", "write")]
        (enable, lazy_enable), (write, lazy_write) = pairs
        return (
            f"Eager split: logging is on after {format_ns(enable)} instead of {format_ns(lazy_enable)}, "
            f"the guest's first writes take {format_ns(write)} instead of {format_ns(lazy_write)} "
            f"({course.protocol}, {often(course.density)})"
        )
    first = every[0]
    parts = [(PHASES[phase], first.total_ns(phase)) for phase in ("enable", "write", "harvest")]
    said = ", ".join(f"{name} {format_ns(ns)}" for name, ns in parts if ns is not None)
    return f"Dirty logging by {first.protocol}: {said} ({often(first.density)})"
