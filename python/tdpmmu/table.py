"""Plain-text tables, and what stands in them for each result. Works over ssh, needs no colour."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from tdpmmu.results import BenchResult, BenchRun, MicroResult, Percentiles, Replay
from tdpmmu.units import format_count, format_ns, format_size

__all__ = ["render", "render_bench", "render_micro", "render_replay"]

Cell = Callable[[BenchRun], Any]


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return an aligned table: the first column to the left, the others to the right, two blanks between.

    A header cell may hold a newline; no unit is added.
    """
    heads = [cell.split("\n") for cell in header]
    depth = max(len(head) for head in heads)
    lines = [[""] * (depth - len(head)) + head for head in heads]
    table = [[head[at] for head in lines] for at in range(depth)] + [list(row) for row in rows]
    widths = [max(len(row[at]) for row in table) for at in range(len(header))]
    out = []
    for number, row in enumerate(table):
        cells = [
            c.ljust(w) if at == 0 else c.rjust(w) for at, (c, w) in enumerate(zip(row, widths, strict=True))
        ]
        out.append("  ".join(cells).rstrip())
        if number == depth - 1:
            out.append("  ".join("-" * w for w in widths))
    return "\n".join(out) + "\n"


def _get(value: Any, *path: str) -> Any:
    for name in path:
        if value is None:
            return None
        value = getattr(value, name) if isinstance(value, Percentiles) else value.get(name)
    return value


def _longest_step(run: BenchRun) -> int | None:
    """Return the longest stretch between two reschedule checks, in ns (CPU time if switched out inside)."""
    found = [v for v in (_get(run.step_ns, "max"), run.raw.get("step_ns_dropped_cpu_max")) if v is not None]
    return max(found, default=None)


# Heading, what to take from a run, how to write it.
_COMMON_TAIL: list[tuple[str, Cell, Callable[[Any], str]]] = [
    ("zap\nns/SPTE", lambda r: _get(r.teardown, "ns_per_spte"), lambda v: "-" if v is None else f"{v:.2f}"),
    ("last table\nfreed", lambda r: _get(r.teardown, "last_table_free_ns"), format_ns),
    ("longest step\nSPTE ops", lambda r: _get(r.step_units, "max"), lambda v: format_count(_whole(v))),
    ("longest\nstep", lambda r: _longest_step(r), format_ns),
    ("tables\nretained", lambda r: r.retained_table_pages, lambda v: format_count(_whole(v))),
    ("yields", lambda r: r.yields, lambda v: format_count(_whole(v))),
    ("leaked", lambda r: r.table_pages_leaked, lambda v: format_count(_whole(v))),
]
_DROP: list[tuple[str, Cell, Callable[[Any], str]]] = [
    ("vCPU blocked\nby the drop", lambda r: _get(r.block_drop_ns, "max"), format_ns),
    ("baseline", lambda r: _get(r.block_baseline_ns, "max"), format_ns),
    ("small roots\np50", lambda r: _get(r.drop_loop, "block_drop_ns", "p50"), format_ns),
    ("small roots\np99.9", lambda r: _get(r.drop_loop, "block_drop_ns", "p999"), format_ns),
    ("baseline\np99.9", lambda r: _get(r.drop_loop, "block_baseline_ns", "p999"), format_ns),
]
_ZAP: list[tuple[str, Cell, Callable[[Any], str]]] = [
    ("memslot\nupdate", lambda r: _get(r.update_ns, "total"), format_ns),
    ("first excl.\nhold", lambda r: _get(r.update_ns, "exclusive_hold"), format_ns),
    ("vCPU blocked\np50", lambda r: _get(r.block_update_ns, "p50"), format_ns),
    ("vCPU blocked\nmax", lambda r: _get(r.block_update_ns, "max"), format_ns),
    ("visible to\nlast vCPU", lambda r: r.visible_last_ns, format_ns),
]


def _whole(value: Any) -> int | None:
    return None if value is None else round(value)


def render_bench(result: BenchResult) -> str:
    """Return one row a design: what a KVM engineer compares. Medians over repetitions; times scaled."""
    if not result.runs:
        return "no runs\n"
    columns = (_DROP if result.experiment == "drop" else _ZAP) + _COMMON_TAIL
    groups: dict[tuple[str, str, str], list[BenchRun]] = {}
    for run in result.runs:
        groups.setdefault((run.design, run.passes, run.ownership), []).append(run)
    rows = []
    for (design, passes, ownership), runs in groups.items():
        row = [design, passes, ownership]
        for _, take, write in columns:
            values = [value for run in runs if (value := take(run)) is not None]
            row.append(write(statistics.median(values) if values else None))
        rows.append(row)
    used = [at for at in range(len(rows[0])) if at < 3 or any(row[at] != "-" for row in rows)]
    header = ["design", "passes", "owner", *(name for name, _, _ in columns)]
    first = result.runs[0]
    reps = max(len(runs) for runs in groups.values())
    title = (
        f"{format_size(first.memory_bytes)} of {first.page} pages, {format_count(first.sptes)} SPTEs, "
        f"{format_size(first.table_bytes)} of tables, {first.vcpus} vCPUs"
        + (f"; medians of {reps} repetitions" if reps > 1 else "")
    )
    return f"{title}\n\n" + render([header[at] for at in used], [[row[at] for at in used] for row in rows])


def render_micro(result: MicroResult) -> str:
    """Return one row an operation: ns, and the ratio to a physical limit of this host."""
    rows = [
        [
            row.name,
            "-" if row.ns is None else f"{row.ns:.3g}" if row.ns < 100 else f"{row.ns:,.0f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            row.of or "-",
            "-" if row.goal is None else f"{row.goal:g}" + ("" if row.of else " ns"),
        ]
        for row in result.rows
    ]
    return render(["operation", "ns", "ratio", "of", "goal"], rows) if rows else "no rows\n"


def render_replay(result: Replay) -> str:
    """Return the verdict, the roots and the zaps of a recording. Times scaled, counts in full."""
    lines = [
        f"{result.file}: kernel {result.kernel}, {format_count(result.events)} events, "
        f"{format_count(result.transitions)} SPTE transitions"
    ]
    if result.checked:
        parts = ", ".join(f"{name} {format_count(count)}" for name, count in result.checked.items())
        lines.append(f"old values: {parts}")
    if result.tables_peak is not None:
        lines.append(f"page-table pages at most: {format_count(result.tables_peak)}")
    for mismatch in result.mismatches[:10]:
        lines.append("mismatch: " + ", ".join(f"{name} {value}" for name, value in mismatch.items()))
    if len(result.mismatches) > 10:
        lines.append(f"... and {len(result.mismatches) - 10} more mismatches")
    if result.zaps:
        causes: dict[str, list[Any]] = {}
        for zap in result.zaps:
            causes.setdefault(str(zap.get("cause", "?")), []).append(zap)
        rows = []
        for cause, zaps in causes.items():
            times = sorted(int(zap.get("duration_ns") or 0) for zap in zaps)
            rows.append(
                [
                    cause,
                    format_count(len(zaps)),
                    format_ns(statistics.median(times)),
                    format_ns(times[-1]),
                    format_count(sum(_entries(zap) for zap in zaps)),
                    format_count(sum(int(zap.get("tables") or 0) for zap in zaps)),
                ]
            )
        lines += [
            "",
            render(["zaps by cause", "count", "median", "longest", "entries", "tables"], rows).rstrip(),
        ]
    return "\n".join(lines) + "\n"


def _entries(zap: Any) -> int:
    entries = zap.get("entries") or 0
    if isinstance(entries, dict):
        return sum(int(count) for count in entries.values())
    return sum(entries) if isinstance(entries, list) else int(entries)
