"""Time line: a track a thread, coloured by what it did, with the lock it held in a thin line above.

A panel a design, the first repetition of each, on one axis of time since the request began: what one design
does in the caller another does in a worker, and the eye finds it at the same place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tdpmmu.errors import InvalidArgument
from tdpmmu.plot import style
from tdpmmu.plot.select import Selection, measured
from tdpmmu.results import BenchRun
from tdpmmu.units import format_ns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw"]

_MOST = 6
_LOCKS = {
    "shared": ("#999999", "mmu_lock held, shared"),
    "exclusive": ("#000000", "mmu_lock held, exclusive"),
}
_ROLES = ("caller", "vcpu", "other", "worker", "rcu")


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw a panel a design."""
    runs = chosen.first_scene(
        lambda run: (run.raw.get("timeline") or {}).get("tracks"),
        "no run has a timeline; measure with --timeline",
    )
    lines = {name: same[0] for name, same in chosen.lines(runs).items()}
    if len(lines) > _MOST:
        raise InvalidArgument(f"result: {len(lines)} time lines, at most {_MOST} fit; choose with designs")
    end = max(_end(run) for run in lines.values())
    tracks = {name: _tracks(run, end) for name, run in lines.items()}
    rows = [len(found) for found in tracks.values()]
    figure.set_size_inches(11, 1.7 + 0.42 * sum(rows) + 0.55 * len(rows))
    grid = figure.subplots(len(lines), 1, sharex=True, height_ratios=[n + 0.8 for n in rows], squeeze=False)
    used: set[str] = set()
    for axes, (name, run) in zip(grid[:, 0], lines.items(), strict=True):
        used |= _panel(axes, name, run, tracks[name], end)
    grid[-1, 0].set_xlim(-0.01 * end, end * 1.01)
    style.ns_axis(grid[-1, 0].xaxis)
    grid[-1, 0].set_xlabel("time since the request began")
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Patch(facecolor=colour, label=label)
        for phase, (label, colour) in style.PHASES.items()
        if phase in used
    ]
    handles += [
        Line2D([], [], color=colour, linewidth=3, label=label)
        for mode, (colour, label) in _LOCKS.items()
        if mode in used
    ]
    style.title(figure, _finding(lines), measured(runs[0]))
    style.below(figure, 4, handles)


def _tracks(run: BenchRun, end: float) -> list[Any]:
    """Return who does something until `end`, by role: who asked, who runs, who works, who frees."""
    tracks = [
        track
        for track in run.raw["timeline"]["tracks"]
        if any(start < end and stop > 0 for start, stop, _ in track["slices"])
    ]
    return sorted(tracks, key=lambda track: _ROLES.index(track["role"]) if track["role"] in _ROLES else 9)


def _end(run: BenchRun) -> float:
    """Return where the picture of a run ends, in ns: a little after the last that the teardown did."""
    freed = (run.teardown or {}).get("last_table_free_ns")
    last = max((s[1] for t in run.raw["timeline"]["tracks"] for s in t["slices"]), default=1)
    return float(min(last, freed * 1.08) if freed else last)


def _panel(axes: Axes, name: str, run: BenchRun, tracks: list[Any], end: float) -> set[str]:
    used: set[str] = set()
    least = end / 4000  # narrower than a pixel: drawn a pixel wide, so that it is seen at all
    for row, track in enumerate(tracks):
        spans: dict[str, list[tuple[float, float]]] = {}
        for start, stop, phase in track["slices"]:
            if start < end and stop > 0:
                first = max(start, 0)
                spans.setdefault(phase, []).append((first, max(min(stop, end) - first, least)))
        # What a thread does most is drawn first, so that the short does not vanish under it.
        for phase in sorted(spans, key=lambda phase: -sum(width for _, width in spans[phase])):
            colour = style.PHASES.get(phase, (phase, "#999999"))[1]
            axes.broken_barh(spans[phase], (row - 0.3, 0.6), facecolors=colour, linewidth=0)
            used.add(phase)
        for mode, (colour, _) in _LOCKS.items():
            held = [
                (max(a, 0), max(min(b, end) - max(a, 0), least))
                for a, b, found in track.get("locks", ())
                if found == mode and a < end and b > 0
            ]
            if held:
                axes.broken_barh(held, (row - 0.44, 0.1), facecolors=colour, linewidth=0)
                used.add(mode)
    for number, (at, said) in enumerate(_few(run.raw["timeline"].get("marks") or (), end)):
        axes.axvline(at, color="#222222", linewidth=0.8, linestyle=(0, (2, 2)))
        left = at > 0.75 * end
        axes.annotate(
            said,
            (at, -0.62 - 0.42 * (number % 2)),
            xytext=(-4 if left else 4, 0),
            textcoords="offset points",
            ha="right" if left else "left",
            va="center",
            fontsize=8,
            color="#222222",
        )
    axes.set_yticks(range(len(tracks)), [track["thread"] for track in tracks])
    axes.set_ylim(len(tracks) - 0.5, -1.3)
    axes.set_title(f"{name}, passes {run.passes}", loc="left", fontsize=10, fontweight="bold")
    style.bare(axes, "x")
    return used


def _few(marks: Any, end: float) -> list[tuple[float, str]]:
    """Return marks that have room for their text: of those close together, the first."""
    out: list[tuple[float, str]] = []
    for at, said in sorted(tuple(mark) for mark in marks):
        if 0 <= at <= end and (len(out) < 2 or at - out[-2][0] > 0.22 * end) and len(out) < 6:
            out.append((at, said))
    return out


def _finding(lines: dict[str, BenchRun]) -> str:
    said = []
    for name, run in lines.items():
        payers = [row for row in run.attribution if row.get("pays")]
        if not payers:
            continue
        most = max(payers, key=lambda row: (row.get("ns") or {}).get("spte_work", 0))
        work = (most.get("ns") or {}).get("spte_work", 0)
        who = {"vcpu": "vCPU", "rcu": "RCU thread"}.get(most["role"], most["role"])
        said.append(f"{format_ns(work)} in the {who} under {name}")
    return "SPTE work: " + ", ".join(said[:4]) if said else "What each thread did during the teardown"
