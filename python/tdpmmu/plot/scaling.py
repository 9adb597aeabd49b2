"""Scaling: `zap-64t`. What was built, the line through it, and what that says of sizes that were not.

Filled points were built and torn down; the line and its band are their fit; the hollow point at 64 TiB was
not run, and says so. The band is the 95 % prediction interval of one more run: it widens away from the sizes
that were built, which is the honest part of the picture.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tdpmmu.plot import style
from tdpmmu.plot.select import Selection
from tdpmmu.results import BenchRun
from tdpmmu.student import t_quantile
from tdpmmu.units import PAGE_BYTES, format_ns, format_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

_SAID = {"block_drop_ns.max": "vCPU blocked by the drop", "update_ns.total": "memslot update"}
#: More bands than this hide each other; the bars at the extrapolated points stay.
_BANDS = 3


@dataclass(frozen=True, slots=True)
class _Line:
    """One design's fit, ready to draw. Times in ns, sizes in bytes."""

    name: str
    look: dict[str, Any]
    sizes: np.ndarray
    ns: np.ndarray
    fit: Any
    guess: Any
    #: The slope cannot be told from none.
    flat: bool

    @property
    def at_most(self) -> float:
        """The upper end of what the extrapolated size may take."""
        interval = self.guess.get("ci95")
        return float(interval[1] if interval else self.guess["ns"])

    @property
    def label(self) -> str:
        """The extrapolated time, with its interval; what a flat line says instead."""
        if self.flat:
            return f"{self.name}: no growth found (at most {format_ns(max(self.at_most, 0))})"
        interval = self.guess.get("ci95")
        span = f" ({format_ns(max(interval[0], 0))} .. {format_ns(interval[1])})" if interval else ""
        return f"{self.name}: {format_ns(self.guess['ns'])}{span}"


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw points, line, band and the extrapolated point of each design."""
    runs = [run for run in chosen.runs if run.fit and run.fit.get("points")]
    if not runs:
        chosen.first_scene(lambda run: run.fit, "no run has a fit; measure with --scene zap-64t")
    page = PAGE_BYTES.get(runs[0].page, 4096)
    lines = _lines(chosen, runs, page)
    figure.set_size_inches(11, 6.0)
    axes = figure.add_subplot()
    built = max(float(line.sizes.max()) for line in lines)
    edge = max(built, *(float(line.guess["sptes"]) * page for line in lines if line.guess))
    low = min(float(line.sizes.min()) for line in lines)
    for nth, line in enumerate(lines):
        # Error bars stand side by side, their points do not.
        _one(axes, line, page, len(lines) <= _BANDS, 2 ** (0.16 * (nth - (len(lines) - 1) / 2)))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    heights = [float(line.ns.max()) for line in lines] + [line.at_most for line in lines if line.guess]
    axes.set_ylim(min(float(line.ns.min()) for line in lines) / 8, max(heights) * 4)
    # The text beside the extrapolated points stands in a margin of its own.
    axes.set_xlim(low / 1.6, edge * (edge / low) ** 0.62)
    first, last = round(math.log2(low)), round(math.log2(edge))
    exponents = range(last, first - 1, -max(1, math.ceil((last - first) / 7)))
    axes.set_xticks([2.0**e for e in exponents], [format_size(2**e) for e in exponents])
    axes.minorticks_off()
    style.ns_axis(axes.yaxis)
    of = str(lines[0].fit["of"])
    axes.set_ylabel(_SAID.get(of, of))
    axes.set_xlabel(f"guest memory, mapped with {runs[0].page} pages", loc="left")
    style.bare(axes)
    axes.axvline(built * 1.3, color="#888888", linewidth=0.9, linestyle=(0, (3, 3)))
    bottom = axes.get_ylim()[0]
    for x, text, side in ((built * 1.15, "built", "right"), (built * 1.5, "extrapolated, not run", "left")):
        axes.annotate(
            text, (x, bottom), xytext=(0, 5), textcoords="offset points", ha=side, fontsize=9, color="#555555"
        )
    _spread(axes, [line for line in lines if line.guess], edge)
    style.title(figure, _finding(lines, of), f"{runs[0].scene}: sizes built up to {format_size(built)}; {of}")
    style.below(figure, 3)


def _lines(chosen: Selection, runs: list[BenchRun], page: int) -> list[_Line]:
    out: list[_Line] = []
    seen: dict[str, int] = {}
    for name, (run, *_) in chosen.lines(runs).items():  # repetitions share a line
        fit: Any = run.fit
        nth = seen.setdefault(run.design, 0)
        seen[run.design] += 1
        sptes, ns = (np.array(column, dtype=np.float64) for column in zip(*fit["points"], strict=True))
        guess = max(fit.get("at") or [{}], key=lambda at: at.get("sptes", 0))
        error, freedom = fit.get("ns_per_spte_se"), len(sptes) - 2
        least = t_quantile(0.975, freedom) * error if error is not None and freedom > 0 else 0.0
        flat = fit["ns_per_spte"] <= least
        out.append(_Line(name, style.design_style(name, nth), sptes * page, ns, fit, guess, flat))
    return out


def _one(axes: Any, line: _Line, page: int, band: bool, aside: float) -> None:
    colour, fit = line.look["color"], line.fit
    axes.plot(line.sizes, line.ns, linestyle="none", marker=line.look["marker"], color=colour, markersize=6)
    x = float(line.guess["sptes"]) * page if line.guess else float(line.sizes.max())
    reach = np.geomspace(line.sizes.min(), x, 200)
    if line.flat:
        level = math.exp(float(np.log(line.ns).mean()))
        label = f"{line.name}: no growth found"
        look = {"color": colour, "linestyle": line.look["linestyle"], "linewidth": 1.2}
        axes.plot([reach[0], x], [level, level], label=label, **look)
        if line.guess and line.at_most > 0:
            bar, top = x * aside, max(line.at_most, level)
            axes.plot([bar, bar], [level, top], color=colour, linewidth=1.2)
            axes.plot([bar], [top], marker="_", markersize=9, color=colour, linestyle="none")
        return
    middle = fit["intercept_ns"] + fit["ns_per_spte"] * reach / page
    label = f"{line.name}: {fit['ns_per_spte']:.3g}"
    if fit.get("ns_per_spte_se") is not None:
        label += f" +- {fit['ns_per_spte_se']:.2g}"
    solid = middle > float(line.ns.min()) / 4
    axes.plot(
        reach[solid],
        middle[solid],
        color=colour,
        linestyle=line.look["linestyle"],
        label=f"{label} ns an SPTE",
    )
    half = _half_width(line.sizes, line.ns, reach) if band else None
    if half is not None:
        floor = float(line.ns.min()) / 6
        low, high = np.maximum(middle - half, floor), np.maximum(middle + half, floor)
        axes.fill_between(reach, low, high, color=colour, alpha=0.15, linewidth=0)
    if line.guess and line.guess["ns"] > 0:
        interval = line.guess.get("ci95")
        if interval:
            ends = [max(interval[0], float(line.ns.min()) / 6), interval[1]]
            axes.plot([x * aside, x * aside], ends, color=colour, linewidth=1.2)
        axes.plot(
            [x], [line.guess["ns"]], linestyle="none", marker=line.look["marker"], markersize=9,
            markerfacecolor="white", markeredgecolor=colour, markeredgewidth=1.8, zorder=5,
        )  # fmt: skip


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


def _spread(axes: Any, lines: list[_Line], edge: float) -> None:
    """Write what each line says at the largest size beside its point, moved apart where points are close."""
    low, high = (math.log(end) for end in axes.get_ylim())
    room = (high - low) * 0.048
    wanted = []
    for line in lines:
        y = math.exp(float(np.log(line.ns).mean())) if line.flat else max(line.guess["ns"], 1.0)
        wanted.append((math.log(y), line))
    wanted.sort(key=lambda pair: -pair[0])
    places: list[float] = []
    for y, _ in wanted:
        places.append(min(y, places[-1] - room) if places else min(y, high - room))
    # Pushed down below the axis: the whole heap moves up.
    lift = max(0.0, low + room - places[-1]) if places else 0.0
    for at, (y, line) in zip(places, wanted, strict=True):
        axes.annotate(
            line.label,
            (edge * 1.12, math.exp(y)),
            xytext=(edge * 1.7, math.exp(at + lift)),
            ha="left",
            va="center",
            fontsize=9,
            color="#222222",
            arrowprops={
                "arrowstyle": "-",
                "color": line.look["color"],
                "linewidth": 0.8,
                "relpos": (0, 0.5),
            },
        )


def _finding(lines: list[_Line], of: str) -> str:
    what = _SAID.get(of, of)
    known = {line.name: line for line in lines if line.guess}
    if not known:
        return f"{what} against guest size"
    size = format_size(max(line.guess["memory_bytes"] for line in known.values()))
    growing = style.sound({name: line.guess["ns"] for name, line in known.items() if not line.flat})
    flat = sorted((n for n, line in known.items() if line.flat), key=lambda n: known[n].at_most)
    if not growing:
        return f"{what}: no growth with the guest found under {', '.join(flat[:3])}"
    worst = max(growing, key=lambda name: growing[name])
    text = f"{what}, extrapolated to {size}: {format_ns(growing[worst])} under {worst}"
    if flat:
        return f"{text}, no growth found under {', '.join(flat[:3])}"
    best = min(growing, key=lambda name: growing[name])
    return text if best == worst else f"{text}, {format_ns(growing[best])} under {best}"
