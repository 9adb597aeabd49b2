"""Plain-text tables, and what stands in them for each result. Works over ssh, needs no colour."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tdpmmu.comparison import Comparison
from tdpmmu.results import BenchResult, BenchRun, MicroResult, Percentiles, Replay
from tdpmmu.units import format_count, format_ns, format_size

__all__ = ["render", "render_bench", "render_comparison", "render_micro", "render_replay"]

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
        if isinstance(value, Percentiles):
            value = getattr(value, name)
        else:
            value = value.get(name) if isinstance(value, Mapping) else None
    return value


def _longest_step(run: BenchRun) -> int | None:
    """Return the longest stretch between two reschedule checks, in ns (CPU time if switched out inside)."""
    found = [v for v in (_get(run.step_ns, "max"), run.raw.get("step_ns_dropped_cpu_max")) if v is not None]
    return max(found, default=None)


Write = Callable[[Any], str]
Column = tuple[str, Cell, Write]


def _whole(value: Any) -> int | None:
    return None if value is None else round(value)


def _count(value: Any) -> str:
    return format_count(_whole(value))


def _rate(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"


def _raw(*path: str) -> Cell:
    return lambda run: _get(run.raw, *path)


# Heading, what to take from a run, how to write it. A column in which no run has anything is left out.
_COST: list[Column] = [
    ("zap\nns/SPTE", lambda r: _get(r.teardown, "ns_per_spte"), _rate),
    ("last table\nfreed", lambda r: _get(r.teardown, "last_table_free_ns"), format_ns),
    ("CPUs\nused", lambda r: _get(r.teardown, "cpus_used"), _rate),
    ("longest step\nSPTE ops", lambda r: _get(r.step_units, "max"), _count),
    ("longest\nstep", lambda r: _longest_step(r), format_ns),
    ("tables\nretained", lambda r: r.retained_table_pages or None, _count),
    ("waiting\npages", _raw("rcu", "backlog_pages_peak"), _count),
    ("yields", lambda r: r.yields, _count),
]
# What must be 0 in a sound design. Shown as sums, so that one bad repetition is not hidden by a median.
_FAULTS: list[Column] = [
    ("mapped at\nreturn", _raw("sptes_mapped_at_return"), _count),
    ("leaked", lambda r: r.table_pages_leaked, _count),
    ("viola-\ntions", lambda r: r.violations, _count),
]
_DROP: list[Column] = [
    ("vCPU blocked\nby the drop", lambda r: _get(r.block_drop_ns, "max"), format_ns),
    ("baseline", lambda r: _get(r.block_baseline_ns, "max"), format_ns),
    ("small roots\np50", lambda r: _get(r.drop_loop, "block_drop_ns", "p50"), format_ns),
    ("small roots\np99.9", lambda r: _get(r.drop_loop, "block_drop_ns", "p999"), format_ns),
    ("baseline\np99.9", lambda r: _get(r.drop_loop, "block_baseline_ns", "p999"), format_ns),
]
_ZAP: list[Column] = [
    ("memslot\nupdate", lambda r: _get(r.update_ns, "total"), format_ns),
    ("first excl.\nhold", lambda r: _get(r.update_ns, "exclusive_hold"), format_ns),
    ("longest\nexcl. hold", lambda r: _unlike(r.update_ns, "exclusive_longest", "exclusive_hold"), format_ns),
    ("vCPU blocked\np50", lambda r: _get(r.block_update_ns, "p50"), format_ns),
    ("vCPU blocked\nmax", lambda r: _get(r.block_update_ns, "max"), format_ns),
    ("visible to\nlast vCPU", lambda r: r.visible_last_ns, format_ns),
]
_UPDATES: list[Column] = [
    ("updates", lambda r: _get(r.updates, "count"), _count),
    ("update\np50", lambda r: _get(r.updates, "update_ns", "p50"), format_ns),
    ("update\np99", lambda r: _get(r.updates, "update_ns", "p99"), format_ns),
    ("update\nmax", lambda r: _get(r.updates, "update_ns", "max"), format_ns),
]
_SPECIAL: list[Column] = [
    ("who came\nlater waited", _raw("waiting", "wait_ns", "max"), format_ns),
    ("fault blocked\np50", _raw("blocked_ns", "p50"), format_ns),
    ("fault blocked\nmax", _raw("blocked_ns", "max"), format_ns),
    ("woken: first\naccess after", _raw("wake_ns", "max"), format_ns),
    ("dirty log\nenabled in", _raw("prepare_ns"), format_ns),
    ("VM closed\nin", _raw("close_ns", "total"), format_ns),
    ("of it,\nzap_all", _raw("close_ns", "zap_all"), format_ns),
    ("migra-\ntions", _raw("migrations"), _count),
]
_EXIT: list[Column] = [
    ("tables\npending", _raw("process_exit", "sys_exit", "tables_pending"), _count),
    ("sys.exit:\ngone after", _raw("process_exit", "sys_exit", "exit_ns"), format_ns),
    ("os._exit:\ngone after", _raw("process_exit", "os_exit", "exit_ns"), format_ns),
    ("exception:\ngone after", _raw("process_exit", "exception", "exit_ns"), format_ns),
    ("daemon thread\nin a zap", _raw("process_exit", "thread", "exit_ns"), format_ns),
]


def _unlike(raw: Any, name: str, other: str) -> Any:
    """Return a field where it says something that another does not."""
    value = _get(raw, name)
    return None if value == _get(raw, other) else value


def _columns(run: BenchRun, drop: bool) -> list[Column]:
    """Return what the scene of a run is about, most telling first."""
    if run.scene == "process-exit":
        return [*_EXIT, *_FAULTS]
    head = _DROP if drop else _ZAP
    if run.updates is not None:
        head = [*_UPDATES, *head[1:]]  # and not the last one's time beside those of all
    # What only this scene has comes first.
    head = [*(column for column in _SPECIAL if column[1](run) is not None), *head]
    return [*head, *_COST, *_FAULTS]


def render_bench(result: BenchResult) -> str:
    """Return a table a scene and guest, one row a design: what a KVM engineer compares.

    Medians over repetitions, times scaled. What must be 0 is summed over repetitions instead.
    """
    if not result.runs:
        return "no runs\n"
    parts: dict[tuple[Any, ...], list[BenchRun]] = {}
    for run in result.runs:
        parts.setdefault((run.scene, run.memory_bytes, run.page, run.vcpus), []).append(run)
    several = len({run.scene for run in result.runs}) > 1 or result.runs[0].raw.get("scene") is not None
    out = [_part(runs, result.experiment == "drop", several) for runs in parts.values()]
    out += [text for text in [_fits(result)] if text]
    return "\n".join(out)


def _part(runs: list[BenchRun], drop: bool, named: bool) -> str:
    groups: dict[tuple[str, ...], list[BenchRun]] = {}
    for run in runs:
        groups.setdefault((run.design, run.passes, run.ownership, run.preempt), []).append(run)
    columns = _columns(runs[0], drop)
    rows = []
    for (design, passes, ownership, preempt), same in groups.items():
        row = [f"{design} (flawed)" if same[0].flawed else design, passes, ownership, preempt]
        for column in columns:
            _, take, write = column
            values = [value for run in same if (value := take(run)) is not None]
            whole = sum(values) if column in _FAULTS and values else None
            row.append(write(whole if whole is not None else statistics.median(values) if values else None))
        rows.append(row)
    heads = ["design", "passes", "owner", "preempt", *(name for name, _, _ in columns)]
    first = runs[0]
    # The same in every row says nothing, and the width is needed.
    same_preempt = len({row[3] for row in rows}) == 1
    used = [
        at
        for at in range(len(heads))
        if at < 3 or (at == 3 and not same_preempt) or (at > 3 and any(row[at] != "-" for row in rows))
    ]
    reps = max(len(same) for same in groups.values())
    title = (
        (f"{first.scene}: " if named else "")
        + f"{format_size(first.memory_bytes)} of {first.page} pages, {format_count(first.sptes)} SPTEs, "
        + f"{format_size(first.table_bytes)} of tables, {first.vcpus} vCPUs"
        + (f"; medians of {reps} repetitions" if reps > 1 else "")
    )
    return f"{title}\n\n" + render([heads[at] for at in used], [[row[at] for at in used] for row in rows])


def _fits(result: BenchResult) -> str:
    """Return the lines through the sizes that were built, and what they say of sizes that were not."""
    rows = []
    for run in result.runs:
        for guess in (run.fit or {}).get("at", ()):
            fit: Any = run.fit
            interval = guess.get("ci95")
            low, high = (max(float(end), 0.0) for end in interval) if interval else (0.0, 0.0)
            error = fit.get("ns_per_spte_se")
            rows.append(
                [
                    f"{run.design} (flawed)" if run.flawed else run.design,
                    run.passes,
                    str(fit.get("of", "?")),
                    format_count(len(fit.get("points", ()))),
                    f"{fit.get('ns_per_spte', 0.0):.3g}" + (f" +- {error:.2g}" if error is not None else ""),
                    "-" if fit.get("r2") is None else f"{fit['r2']:.4f}",
                    format_size(guess["memory_bytes"]),
                    format_ns(max(guess["ns"], 0)),
                    f"{format_ns(low)} .. {format_ns(high)}" if interval else "-",
                    ("extrapolated" if guess.get("extrapolated", True) else "")
                    + ("; growth not told from none" if interval and low == 0 else ""),
                ]
            )
    if not rows:
        return ""
    heads = ["design", "passes", "of", "sizes\nbuilt", "ns/SPTE", "r2", "guest", "time", "95 % interval", ""]
    return "A line through the sizes that were built; what lies beyond them was not run:\n\n" + render(
        heads, rows
    )


def render_comparison(result: Comparison, everything: bool = False) -> str:
    """Return what became worse and what became better; all rows where `everything`. Times scaled."""
    shown = [row for row in result.rows if everything or row.worse or row.better]
    scaled = result.raw.get("per_limit") is not None
    parts: dict[str, list[list[str]]] = {}
    for row in shown:
        key = row.key
        if "name" in key:
            title = str(key["name"])
        else:
            title = (
                f"{key.get('scene')}: {key.get('design')}, passes {key.get('passes')}, owner "
                f"{key.get('ownership')}, preempt {key.get('preempt')}, "
                f"{format_size(key.get('memory_bytes') or 0)} of {key.get('page')} pages, "
                f"{key.get('vcpus')} vCPUs"
            )
        time = row.field.endswith("_ns") or "_ns." in row.field
        write: Write = format_ns if time and not scaled else lambda value: f"{value:,.4g}"
        parts.setdefault(title, []).append(
            [
                row.field,
                write(row.a),
                write(row.b),
                "-" if row.ratio is None else f"{row.ratio:.3f}",
                "-" if row.ci95 is None else f"{row.ci95[0]:.3f} .. {row.ci95[1]:.3f}",
                f"{row.n_a}, {row.n_b}",
                "WORSE" if row.worse else "better" if row.better else "",
            ]
        )
    heads = ["field", "a", "b", "b / a", "95 % interval", "reps", ""]
    out = [f"{title}\n\n" + render(heads, rows) for title, rows in parts.items()]
    worse, better = len(result.worse), len(result.better)
    out.append(
        f"{format_count(len(result.rows))} fields compared: {worse} worse, {better} better, "
        f"{len(result.rows) - worse - better} alike or undecided"
        + (f" (times in units of {result.raw['per_limit']})" if scaled else "")
        + "\n"
    )
    return "\n".join(out)


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
