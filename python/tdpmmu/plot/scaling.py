"""Scaling: `zap-64t`. What was built, the line through it, and what that says of sizes that were not.

Filled points were built and torn down; the line and its band are their fit; the hollow point at 64 TiB was
not run, and says so. The band is the 95 % prediction interval of one more run: it widens away from the sizes
that were built, which is the honest part of the picture.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tdpmmu.plot import style
from tdpmmu.plot.select import Selection, name_of
from tdpmmu.student import t_quantile
from tdpmmu.units import PAGE_BYTES, format_ns, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

_SAID = {"block_drop_ns.max": "vCPU blocked by the drop", "update_ns.total": "memslot update"}


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw points, line, band and the extrapolated point of each design."""
    fits = [run for run in chosen.runs if run.fit and run.fit.get("points")]
    if not fits:
        chosen.first_scene(lambda run: run.fit, "no run has a fit; measure with --scene zap-64t")
    figure.set_size_inches(10, 6.0)
    axes = figure.add_subplot()
    page = PAGE_BYTES.get(fits[0].page, 4096)
    said: list[tuple[str, float, Any]] = []
    labels: list[tuple[float, float, str, str]] = []
    seen: dict[str, int] = {}
    edge = 0.0
    for run in fits:
        fit: Any = run.fit
        name = name_of(run) + (f", {run.passes}" if sum(r.design == run.design for r in fits) > 1 else "")
        nth = seen.setdefault(run.design, 0)
        seen[run.design] += 1
        look = style.design_style(name, nth)
        sptes, ns = (np.array(column, dtype=np.float64) for column in zip(*fit["points"], strict=True))
        axes.plot(
            sptes * page, ns, linestyle="none", marker=look["marker"], color=look["color"], markersize=6
        )
        ahead = [guess["sptes"] for guess in fit.get("at", ())]
        reach = np.geomspace(sptes.min(), max([sptes.max(), *ahead]), 200)
        middle = fit["intercept_ns"] + fit["ns_per_spte"] * reach
        label = f"{name}: {fit['ns_per_spte']:.3g} ns an SPTE"
        if fit.get("ns_per_spte_se") is not None:
            label += f" +- {fit['ns_per_spte_se']:.2g}"
        solid = middle > 0
        axes.plot(
            reach[solid] * page, middle[solid], color=look["color"], linestyle=look["linestyle"], label=label
        )
        half = _half_width(sptes, ns, reach)
        if half is not None:
            floor = max(float(ns.min()) / 30, 1.0)
            low, high = np.maximum(middle - half, floor), np.maximum(middle + half, floor)
            axes.fill_between(reach * page, low, high, color=look["color"], alpha=0.13, linewidth=0)
        for guess in fit.get("at", ()):
            x, y = guess["sptes"] * page, guess["ns"]
            edge = max(edge, x)
            said.append((name, y, guess))
            if y <= 0:
                continue
            axes.plot(
                [x], [y], linestyle="none", marker=look["marker"], markersize=9, markerfacecolor="white",
                markeredgecolor=look["color"], markeredgewidth=1.8, zorder=5,
            )  # fmt: skip
            low, high = guess.get("ci95") or (None, None)
            span = "" if low is None else f" ({format_ns(max(low, 0))} .. {format_ns(high)})"
            labels.append((x, y, f"extrapolated: {format_ns(y)}{span}", look["color"]))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    low_x, high_x = axes.get_xlim()
    axes.set_xlim(low_x, max(high_x, edge * 2.0))
    first, last = (round(math.log2(x)) for x in (low_x, edge or high_x))
    exponents = range(last, first - 1, -max(1, math.ceil((last - first) / 9)))
    axes.set_xticks([2.0**e for e in exponents], [format_size(2**e) for e in exponents])
    axes.minorticks_off()
    style.ns_axis(axes.yaxis)
    of = str(fits[0].fit["of"]) if fits[0].fit else ""
    axes.set_ylabel(_SAID.get(of, of))
    axes.set_xlabel(f"guest memory, mapped with {fits[0].page} pages")
    style.bare(axes)
    built = max(float(p[0]) for run in fits for p in (run.fit or {})["points"]) * page
    axes.axvline(built * 1.4, color="#888888", linewidth=0.9, linestyle=(0, (3, 3)))
    bottom = axes.get_ylim()[0]
    for x, text, side in (
        (built * 1.25, "built and torn down", "right"),
        (built * 1.6, "extrapolated, not run", "left"),
    ):
        axes.annotate(
            text,
            (x, bottom),
            xytext=(0, 5),
            textcoords="offset points",
            ha=side,
            fontsize=8.5,
            color="#555555",
        )
    _spread(axes, labels)
    style.title(figure, _finding(said, of), f"{fits[0].scene}: sizes built up to {format_size(built)}; {of}")
    style.below(figure, 2 if len(fits) < 7 else 3)


def _half_width(x: np.ndarray, y: np.ndarray, at: np.ndarray) -> np.ndarray | None:
    """Return half the 95 % prediction interval of the least-squares line at `at`; None below three points."""
    freedom = len(x) - 2
    if freedom < 1:
        return None
    mean = x.mean()
    spread = float(((x - mean) ** 2).sum())
    slope = float(((x - mean) * (y - y.mean())).sum()) / spread
    left = y - (y.mean() + slope * (x - mean))
    sigma = math.sqrt(float((left**2).sum()) / freedom)
    return np.asarray(
        t_quantile(0.975, freedom) * sigma * np.sqrt(1 + 1 / len(x) + (at - mean) ** 2 / spread)
    )


def _spread(axes: Any, labels: list[tuple[float, float, str, str]]) -> None:
    """Write the labels beside their points, moved apart where points lie on each other."""
    if not labels:
        return
    low, high = (math.log(edge) for edge in axes.get_ylim())
    room = (high - low) * 0.042
    taken = math.inf
    for x, y, text, colour in sorted(labels, key=lambda label: -label[1]):
        at = min(math.log(y), taken - room)
        taken = at
        axes.annotate(
            text, (x, y), xytext=(x / 1.5, math.exp(at)), ha="right", va="center", fontsize=8.5, color=colour,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8},
        )  # fmt: skip


def _finding(said: list[tuple[str, float, Any]], of: str) -> str:
    if not said:
        return "Time against guest size"
    largest = max(guess["memory_bytes"] for *_, guess in said)
    found = {name: ns for name, ns, guess in said if guess["memory_bytes"] == largest}
    found = style.sound(found)
    worst, best = max(found, key=lambda n: found[n]), min(found, key=lambda n: found[n])
    what = _SAID.get(of, of)
    size = format_size(largest)
    text = f"{what}, extrapolated to {size}: {format_ns(found[worst])} under {worst}"
    if len(found) > 1:
        text += f", {format_ns(max(found[best], 0))} under {best}"
    return text
