"""A recording of real KVM: what was mapped when, what zapped it and how long that took, and the storms.

`pages` is guest memory by leaf size and the memory of its tables; `causes` is who zapped, for how long in
all; `storms` is each zap at its time and length, storms shaded; `recording` is the three on one page. Times
count from the first event.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tdpmmu.errors import InvalidArgument
from tdpmmu.plot import style
from tdpmmu.recorded import Replay
from tdpmmu.units import format_count, format_ns, format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["KINDS", "draw"]

KINDS = ("recording", "pages", "causes", "storms")

_SIZES = (
    ("pages_4k", "4 KiB leafs", 1, "#0072B2"),
    ("pages_2m", "2 MiB leafs", 512, "#56B4E9"),
    ("pages_1g", "1 GiB leafs", 512 * 512, "#B9DDF2"),
)
_TABLES = "#E69F00"
#: A cause keeps its colour from picture to picture; those that are kin share one and differ by marker.
_CAUSES: dict[str, tuple[str, str]] = {
    "memslot_delete": ("#D55E00", "o"),
    "memslot_move": ("#D55E00", "s"),
    "memslot_update": ("#D55E00", "D"),
    "fast_zap": ("#D55E00", "^"),
    "nx_toggle": ("#CC79A7", "s"),
    "nx_recovery": ("#CC79A7", "o"),
    "notifier": ("#0072B2", "o"),
    "dirty_log": ("#009E73", "o"),
    "collapse": ("#009E73", "s"),
    "teardown": ("#000000", "o"),
    "worker": ("#000000", "s"),
    "root_drop": ("#E69F00", "o"),
    "slot_leafs": ("#56B4E9", "s"),
    "replace": ("#56B4E9", "o"),
}
_OTHER = ("#888888", "o")
_MOST_POINTS = 20_000


def draw(figure: Figure, result: Replay, kind: str) -> None:
    """Draw one kind of picture of a recording. Times in ns, scaled on the axes.

    Raises:
        InvalidArgument: the recording has nothing of what the kind shows.
    """
    if kind == "pages" and result.timeline is None:
        raise InvalidArgument(
            "result: the recording has no timeline: no SPTE changes, or an older version's report"
        )
    if kind in ("causes", "storms") and not _zaps(result):
        raise InvalidArgument("result: the recording has no zap to draw")
    if kind == "recording" and result.timeline is None and not _zaps(result):
        raise InvalidArgument("result: the recording has neither a timeline nor zaps to draw")
    parts = [kind] if kind != "recording" else _parts(result)
    causes = _by_cause(result)
    heights = {"pages": 3.4, "causes": 0.9 + 0.32 * max(len(causes), 1), "storms": 3.0}
    rows = [heights[part] for part in parts]
    figure.set_size_inches(11, sum(rows) + 0.9)
    grid = figure.subplots(len(parts), 1, height_ratios=rows, squeeze=False)
    for part, axes in zip(parts, grid[:, 0], strict=True):
        {"pages": _pages, "causes": _causes, "storms": _storms}[part](axes, result)
    end = _end(result)
    for part, axes in zip(parts, grid[:, 0], strict=True):
        if part != "causes":
            axes.set_xlim(0, end * 1.01)
            style.ns_axis(axes.xaxis)
            axes.set_xlabel("time since the first event")
    style.title(figure, _finding(result), _measured(result))


def _parts(result: Replay) -> list[str]:
    parts = ["pages"] if result.timeline is not None else []
    return [*parts, "storms", "causes"] if _zaps(result) else parts


def _begin(result: Replay) -> int:
    return int(result.raw.get("begin_ns") or 0)


def _end(result: Replay) -> float:
    ends = [int(result.raw.get("span_ns") or 0)]
    if result.timeline is not None:
        ends.append(result.timeline.t_ns[-1])
    ends += [at + took for at, took, _, _ in _zaps(result)[-1:]]
    return float(max(ends)) or 1.0


def _zaps(result: Replay) -> list[tuple[int, int, str, int]]:
    """Return (start, duration, cause, entries) of each zap, times in ns from the first event, in order."""
    begin = _begin(result)
    found = []
    for zap in result.zaps:
        entries = zap.get("entries") or {}
        count = sum(entries.values()) if isinstance(entries, dict) else int(entries)
        cause = str(zap.get("refined") or zap.get("cause") or "other")
        found.append((int(zap.get("t0_ns") or 0) - begin, int(zap.get("duration_ns") or 0), cause, count))
    return sorted(found)


class _Cause(NamedTuple):
    cause: str
    zaps: int
    entries: int
    total: int
    longest: int


def _by_cause(result: Replay) -> list[_Cause]:
    """Return the zaps summed by cause, times in ns, the longest total first."""
    sums: dict[str, list[int]] = {}
    for one in result.causes:
        sums[str(one.get("cause", "?"))] = [
            int(one.get(k) or 0) for k in ("zaps", "entries", "total_ns", "max_ns")
        ]
    for _, took, cause, entries in () if sums else _zaps(result):
        row = sums.setdefault(cause, [0, 0, 0, 0])
        row[:] = [row[0] + 1, row[1] + entries, row[2] + took, max(row[3], took)]
    return sorted((_Cause(cause, *row) for cause, row in sums.items()), key=lambda row: -row.total)


def _said(cause: str) -> str:
    return cause.replace("_", " ").replace("nx", "NX")


def _shade(axes: Axes, result: Replay) -> None:
    begin, least = _begin(result), _end(result) / 400  # narrower than a few pixels nobody would see it
    for storm in result.storms:
        colour = _CAUSES.get(str(storm.get("cause")), _OTHER)[0]
        first = int(storm["t0_ns"]) - begin
        last = max(int(storm["t1_ns"]) - begin, first + least)
        axes.axvspan(first, last, color=colour, alpha=0.2, linewidth=0)


def _size_axis(axis: Any, top: float) -> None:
    """Label an axis of bytes at round binary sizes, six at most."""
    step = 4096.0
    while top / step > 6:
        step *= 2
    axis.set_ticks([step * at for at in range(int(top / step) + 1)])
    axis.set_major_formatter(lambda value, _: format_size(round(value)))


def _pages(axes: Axes, result: Replay) -> None:
    timeline = result.timeline
    assert timeline is not None
    _shade(axes, result)
    times = list(timeline.t_ns)
    floor = [0.0] * len(times)
    for name, label, size, colour in _SIZES:
        counts = getattr(timeline, name)
        if not any(counts):
            continue
        top = [below + count * size * 4096 for below, count in zip(floor, counts, strict=True)]
        said = f"{label}, at most {format_count(max(counts))}"
        axes.fill_between(times, floor, top, step="post", color=colour, linewidth=0, label=said)
        floor = top
    height = (max(floor) or 4096) * 1.08
    axes.set_ylim(0, height)
    _size_axis(axes.yaxis, height)
    axes.set_ylabel("guest memory mapped")
    right = axes.twinx()
    most = max(timeline.tables)
    right.step(times, [count * 4096 for count in timeline.tables], where="post", color=_TABLES, linewidth=1.6,
               label=f"tables, at most {format_count(most)} ({format_size(most * 4096)})")  # fmt: skip
    right.set_ylim(0, (most or 1) * 4096 * 1.25)
    _size_axis(right.yaxis, (most or 1) * 4096 * 1.25)
    right.set_ylabel("page-table memory")
    style.bare(axes)
    right.grid(False)
    right.spines["top"].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    more, said_more = right.get_legend_handles_labels()
    axes.legend(
        handles + more, labels + said_more, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, fontsize=9
    )


def _causes(axes: Axes, result: Replay) -> None:
    rows = _by_cause(result)
    most = max((row.total for row in rows), default=1) or 1
    for place, (cause, zaps, entries, total, longest) in enumerate(rows):
        colour = _CAUSES.get(cause, _OTHER)[0]
        axes.barh(place, total, height=0.66, color=colour, alpha=0.45, linewidth=0)
        axes.barh(place, longest, height=0.66, color=colour, linewidth=0)
        said = (
            f"{format_ns(total)} in {format_count(zaps)} zap{'s' if zaps != 1 else ''}, longest "
            f"{format_ns(longest)}, "
            f"{format_count(entries)} {'entry' if entries == 1 else 'entries'}"
        )
        inside = total > 0.55 * most
        ink = "white" if inside and total == longest else "#222222"
        axes.annotate(
            said, (total, place), xytext=(-5 if inside else 5, 0), textcoords="offset points", va="center",
            ha="right" if inside else "left", fontsize=9, color=ink,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [_said(row.cause) for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.02)
    style.ns_axis(axes.xaxis)
    axes.set_xlabel("time in zaps, all together (dark: the longest of them)")
    style.bare(axes, "x")


def _storms(axes: Axes, result: Replay) -> None:
    _shade(axes, result)
    zaps = _zaps(result)
    shown = sorted(zaps, key=lambda zap: -zap[1])[:_MOST_POINTS]
    # A zap of one event has no length: it stands at the foot of the axis.
    low, high = (
        min((took for _, took, _, _ in zaps if took), default=1000),
        max(took for _, took, _, _ in zaps),
    )
    drawn: dict[str, list[tuple[int, int, int]]] = {}
    for at, took, cause, entries in shown:
        drawn.setdefault(cause, []).append((at, max(took, low // 2), entries))
    for cause, points in sorted(drawn.items(), key=lambda item: -len(item[1])):
        colour, marker = _CAUSES.get(cause, _OTHER)
        axes.scatter(
            [at for at, _, _ in points],
            [took for _, took, _ in points],
            s=[9 + min(entries, 262_144) ** 0.5 / 2 for _, _, entries in points],
            color=colour, marker=marker, alpha=0.75, linewidth=0,
            label=f"{_said(cause)} ({format_count(len(points))})",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_ylim(low / 3, max(high, low) * 2)
    style.ns_axis(axes.yaxis)
    axes.set_ylabel("length of the zap")
    if any(took == 0 for _, took, _, _ in zaps):
        said = "at the foot: zaps of a single event, of no length"
        axes.annotate(said, (1, 0), xycoords="axes fraction", xytext=(-4, 4), textcoords="offset points",
                      ha="right", va="bottom", fontsize=8, color="#666666")  # fmt: skip
    style.bare(axes)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=5, fontsize=9, markerscale=0.9)


def _finding(result: Replay) -> str:
    rows = _by_cause(result)
    said = []
    if result.timeline is not None:
        sums = [
            sum(getattr(result.timeline, name)[at] * size * 4096 for name, _, size, _ in _SIZES)
            for at in range(len(result.timeline.t_ns))
        ]
        said.append(
            f"{format_size(max(sums))} mapped at most, by "
            f"{format_size(max(result.timeline.table_bytes))} of tables"
        )
    if rows:
        longest = max(rows, key=lambda row: row.longest)
        said.append(f"the longest zap took {format_ns(longest.longest)} ({_said(longest.cause)})")
    storms = int(result.raw.get("storms_total") or len(result.storms))
    if storms:
        said.append(f"{format_count(storms)} storm{'s' if storms != 1 else ''} of zaps (shaded)")
    return "; ".join(said)


def _measured(result: Replay) -> str:
    # A recording of a collection is known by its folders, not by `trace.txt.gz`.
    parts = result.file.split("/")
    name = "/".join(parts[-3:-1]) if len(parts) > 2 and parts[-1].startswith("trace.") else parts[-1]
    lost = int(result.raw.get("lost") or 0)
    return (
        f"{name}: kernel {result.kernel}, {format_count(result.transitions)} SPTE transitions, "
        f"{format_count(len(result.zaps))} zaps in {format_ns(_end(result))}"
        + (f"; {format_count(lost)} events lost" if lost else "")
    )
