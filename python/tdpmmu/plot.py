"""Charts of results, by matplotlib (`pip install 'tdpmmu[plot]'`), to files: no display is needed."""

from __future__ import annotations

import io
import statistics
from typing import TYPE_CHECKING, Any

from tdpmmu.errors import InvalidArgument, Unsupported
from tdpmmu.results import BenchResult, BenchRun, MicroResult
from tdpmmu.units import format_count, format_ns, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["FORMATS", "draw"]

FORMATS = ("svg", "png", "pdf")
# Okabe and Ito's colours: told apart by readers who see fewer of them.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")

Take = Any


def draw(result: object, kind: str = "svg") -> bytes:
    """Return the chart of a result as a file's bytes.

    A drop or zap becomes bars by design on a logarithmic axis of ns; a micro result becomes bars of the
    ratio to this host's limit. `kind` is `svg`, `png` or `pdf`.

    Raises:
        Unsupported: matplotlib is not installed.
        InvalidArgument: a format or a result that has no chart.
    """
    if kind not in FORMATS:
        raise InvalidArgument(f"kind={kind!r}: expected one of {', '.join(FORMATS)}")
    if not isinstance(result, (BenchResult, MicroResult)):
        raise InvalidArgument(f"result: a {type(result).__name__} has no chart; expected a bench result")
    if not (result.runs if isinstance(result, BenchResult) else result.rows):
        raise InvalidArgument("result: nothing to draw, it has no runs")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise Unsupported("charts need matplotlib: pip install 'tdpmmu[plot]'") from error
    # A figure without pyplot touches no display and no global state. The salt keeps the ids of an SVG stable.
    with mpl.rc_context({"svg.hashsalt": "tdpmmu", "font.size": 9}):
        figure = Figure(figsize=(8, 4.2), layout="constrained")
        axes = figure.add_subplot()
        if isinstance(result, BenchResult):
            _bench(axes, result)
        else:
            _micro(axes, result)
        sink = io.BytesIO()
        figure.savefig(sink, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None)
    return sink.getvalue()


def _bench(axes: Axes, result: BenchResult) -> None:
    if result.experiment == "drop":
        title = "A vCPU drops the last reference to its root"
        bars: list[tuple[str, Take]] = [
            ("vCPU blocked", lambda r: r.block_drop_ns and r.block_drop_ns.max),
            ("same, root still held by others", lambda r: r.block_baseline_ns and r.block_baseline_ns.max),
            ("until the last table is free", lambda r: (r.teardown or {}).get("last_table_free_ns")),
        ]
    else:
        title = "A memslot update under running vCPUs"
        bars = [
            ("memslot update", lambda r: (r.update_ns or {}).get("total")),
            ("first exclusive hold", lambda r: (r.update_ns or {}).get("exclusive_hold")),
            ("vCPU blocked, longest", lambda r: r.block_update_ns and r.block_update_ns.max),
            ("visible to the last vCPU", lambda r: r.visible_last_ns),
        ]
    groups: dict[str, list[BenchRun]] = {}
    for run in result.runs:
        groups.setdefault(f"{run.design}\n{run.passes}", []).append(run)
    height = 0.8 / len(bars)
    for at, (name, take) in enumerate(bars):
        found = [[v for run in runs if (v := take(run))] for runs in groups.values()]
        values = [statistics.median(v) if v else 0.0 for v in found]
        places = [row + (at - (len(bars) - 1) / 2) * height for row in range(len(groups))]
        drawn = axes.barh(places, values, height=height * 0.92, color=_COLOURS[at], label=name)
        axes.bar_label(drawn, [format_ns(v) if v else "-" for v in values], padding=3, fontsize=8)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(max(low / 2, 1.0), high * 6)
    for row, runs in enumerate(groups.values()):
        kept = statistics.median(run.retained_table_pages or 0 for run in runs)
        if result.experiment == "drop" and kept:
            note = f"nothing is torn down: {format_count(round(kept))} page-table pages stay"
            place = (axes.get_xlim()[0] * 1.1, row + (len(bars) - 1) / 2 * height)
            axes.annotate(note, place, va="center", fontsize=8)
    axes.set_yticks(range(len(groups)), list(groups))
    axes.invert_yaxis()
    axes.xaxis.set_major_formatter(lambda value, _: format_ns(value))
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=2, frameon=False)
    first = result.runs[0]
    axes.set_title(
        f"{title}: {format_size(first.memory_bytes)} of {first.page} pages "
        f"({format_count(first.sptes)} SPTEs), {first.vcpus} vCPUs",
        fontsize=10,
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _micro(axes: Axes, result: MicroResult) -> None:
    rows = [row for row in result.rows if row.ns is not None]
    values = [row.ns or 0.0 for row in rows]
    drawn = axes.barh(range(len(rows)), values, color=_COLOURS[0])
    labels = [
        format_ns(row.ns) + (f" ({row.ratio:.2f} x {row.of})" if row.ratio is not None and row.of else "")
        for row in rows
    ]
    axes.bar_label(drawn, labels, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row.name for row in rows])
    axes.invert_yaxis()
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low / 2, high * 20)
    axes.xaxis.set_major_formatter(lambda value, _: format_ns(value))
    axes.set_title("Cost of one operation", fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
