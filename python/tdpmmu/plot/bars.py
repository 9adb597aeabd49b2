"""Bars: what a KVM engineer compares first. A panel a scene, a group a design, a bar a measure; log scale."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tdpmmu.plot import style
from tdpmmu.plot.select import Selection, measured
from tdpmmu.results import BenchRun, MicroResult
from tdpmmu.units import format_count, format_ns

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["draw", "draw_micro"]

Measure = tuple[str, Callable[[BenchRun], Any]]
_DROP: list[Measure] = [
    ("vCPU blocked by the drop", lambda r: r.block_drop_ns and r.block_drop_ns.max),
    ("same, root still held by others", lambda r: r.block_baseline_ns and r.block_baseline_ns.max),
    ("until the last table is free", lambda r: (r.teardown or {}).get("last_table_free_ns")),
]
_ZAP: list[Measure] = [
    ("memslot update", lambda r: (r.update_ns or {}).get("total")),
    ("longest exclusive hold", lambda r: (r.update_ns or {}).get("exclusive_longest") or _hold(r)),
    ("vCPU blocked, longest", lambda r: r.block_update_ns and r.block_update_ns.max),
    ("visible to the last vCPU", lambda r: r.visible_last_ns),
]
_UPDATES: list[Measure] = [
    ("update, median", lambda r: ((r.updates or {}).get("update_ns") or {}).get("p50")),
    ("update, longest", lambda r: ((r.updates or {}).get("update_ns") or {}).get("max")),
    ("vCPU blocked, longest", lambda r: r.block_update_ns and r.block_update_ns.max),
]
_FAULT: list[Measure] = [
    ("fault blocked, longest", lambda r: (r.raw.get("blocked_ns") or {}).get("max")),
    ("fault blocked, median", lambda r: (r.raw.get("blocked_ns") or {}).get("p50")),
    ("until the last table is free", lambda r: (r.teardown or {}).get("last_table_free_ns")),
]
_CLOSE: list[Measure] = [
    ("VM closed", lambda r: (r.raw.get("close_ns") or {}).get("total")),
    ("of it, zap_all", lambda r: (r.raw.get("close_ns") or {}).get("zap_all")),
    ("until the last table is free", lambda r: (r.teardown or {}).get("last_table_free_ns")),
]
_EXIT: list[Measure] = [
    (f"{said}: gone after", lambda r, way=way: ((r.process_exit or {}).get(way) or {}).get("exit_ns"))  # type: ignore[misc]
    for way, said in (("sys_exit", "sys.exit"), ("os_exit", "os._exit"), ("exception", "exception"))
]


def _hold(run: BenchRun) -> Any:
    return (run.update_ns or {}).get("exclusive_hold")


def measures(run: BenchRun, drop: bool) -> list[Measure]:
    """Return what the scene of a run is about, most telling first. Times in ns."""
    if run.scene == "process-exit":
        return _EXIT
    if run.updates:
        return _UPDATES
    if run.raw.get("blocked_ns"):
        return _FAULT
    if run.raw.get("close_ns"):
        return _CLOSE
    return _DROP if drop else _ZAP


def _measured(runs: list[BenchRun], drop: bool) -> list[Measure]:
    """Return the measures that some run has: a legend names no bar that is not there."""
    every = measures(runs[0], drop)
    return [measure for measure in every if any(measure[1](run) for run in runs)] or every


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw a panel for each scene and guest of the selection."""
    panels: dict[tuple[Any, ...], list[BenchRun]] = {}
    for run in chosen.runs:
        panels.setdefault((run.scene, run.memory_bytes, run.page), []).append(run)
    drop = chosen.result.experiment == "drop"
    sizes = []
    for runs in panels.values():
        sizes.append(
            0.45
            + 0.19 * len(_measured(runs, drop)) * len(chosen.lines(runs))
            + 0.12 * len(chosen.lines(runs))
        )
    figure.set_size_inches(10, 1.5 + sum(sizes) + 0.35 * len(sizes))
    grid = figure.subplots(len(panels), 1, height_ratios=sizes, squeeze=False)
    for axes, runs in zip(grid[:, 0], panels.values(), strict=True):
        _panel(axes, chosen.lines(runs), _measured(runs, drop), drop)
        if len(panels) > 1:
            axes.set_title(measured(runs[0]), loc="left", fontsize=10)
    first = next(iter(panels.values()))
    finding = _finding(chosen.lines(first), _measured(first, drop)[0])
    reps = max(len(runs) for runs in chosen.lines(first).values())
    note = f"; medians of {reps} repetitions" if reps > 1 else ""
    style.title(figure, finding, (measured(first[0]) if len(panels) == 1 else f"{len(panels)} scenes") + note)
    handles = {
        name: bar for axes in grid[:, 0] for bar, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    style.below(figure, min(4, len(handles)), handles.values())


def _median(runs: list[BenchRun], take: Callable[[BenchRun], Any]) -> float | None:
    found = [value for run in runs if (value := take(run)) is not None]
    return statistics.median(found) if found else None


def _finding(lines: dict[str, list[BenchRun]], measure: Measure) -> str:
    """Say which design is worst in the first measure, and by how much."""
    name, take = measure
    found = {line: value for line, runs in lines.items() if (value := _median(runs, take))}
    if not found:
        return "Nothing was measured"
    found = style.sound(found)
    best, worst = min(found, key=lambda line: found[line]), max(found, key=lambda line: found[line])
    said = name
    if len(found) == 1 or found[worst] < 1.2 * found[best]:
        span = f"{format_ns(found[best])} to {format_ns(found[worst])}"
        return f"{said}: {span if len(found) > 1 else format_ns(found[best])} under {_listed(list(found))}"
    return (
        f"{said}: {format_ns(found[worst])} under {worst}, {style.times(found[worst], found[best])} "
        f"the {format_ns(found[best])} of {best}"
    )


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else "every design" if len(names) > 3 else ", ".join(names)


def _panel(axes: Axes, lines: dict[str, list[BenchRun]], chosen: list[Measure], drop: bool) -> None:
    height = 0.82 / len(chosen)
    drawn_values: list[float] = []
    for at, (name, take) in enumerate(chosen):
        values = [_median(runs, take) or 0.0 for runs in lines.values()]
        drawn_values += [value for value in values if value > 0]
        places = [row + (at - (len(chosen) - 1) / 2) * height for row in range(len(lines))]
        # Not a colour alone: the bars of a group stand in the legend's order.
        drawn = axes.barh(places, values, height=height * 0.88, color=style.COLOURS[at], label=name)
        axes.bar_label(drawn, [format_ns(v) if v else "-" for v in values], padding=3, fontsize=8.5)
    axes.set_xscale("log")
    low, high = min(drawn_values, default=1.0), max(drawn_values, default=10.0)
    axes.set_xlim(low / 3, high * 5)
    for row, runs in enumerate(lines.values()):
        kept = statistics.median(run.retained_table_pages or 0 for run in runs)
        if drop and kept:
            note = f"     nothing is torn down: {format_count(round(kept))} table pages stay"
            place = (axes.get_xlim()[0], row + (len(chosen) - 1) / 2 * height)
            axes.annotate(note, place, va="center", fontsize=8.5, color="#444444")
    # The shadow MMU has no passes to name.
    passes = [runs[0].passes for runs in lines.values()]
    names = [name if of == "-" else f"{name}\n{of}" for name, of in zip(lines, passes, strict=True)]
    axes.set_yticks(range(len(lines)), names)
    axes.invert_yaxis()
    style.ns_axis(axes.xaxis)
    style.bare(axes, "x")


def draw_micro(figure: Figure, result: MicroResult) -> None:
    """Draw ns an operation, and the ratio to this host's limit beside each bar."""
    rows = [row for row in result.rows if row.ns is not None]
    figure.set_size_inches(10, 1.4 + 0.32 * len(rows))
    axes = figure.add_subplot()
    values = [row.ns or 0.0 for row in rows]
    drawn = axes.barh(range(len(rows)), values, color=style.COLOURS[0])
    labels = [
        format_ns(row.ns) + (f" ({row.ratio:.2f} x {row.of})" if row.ratio is not None and row.of else "")
        for row in rows
    ]
    axes.bar_label(drawn, labels, padding=3, fontsize=8.5)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(min(values, default=1.0) / 2, max(values, default=1.0) * 20)
    style.ns_axis(axes.xaxis)
    style.bare(axes, "x")
    worst = max((row for row in rows if row.ratio), key=lambda row: row.ratio or 0, default=None)
    finding = "Cost of one operation"
    if worst is not None:
        finding += f": at most {worst.ratio:.1f} times what this host's memory allows ({worst.name})"
    style.title(
        figure, finding, "ns an operation; in brackets the ratio to this host's limit for the same work"
    )
