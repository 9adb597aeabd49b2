"""Plain-text tables, and what stands in them for each result. Works over ssh, needs no colour."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from tdpmmu.comparison import Comparison
from tdpmmu.results import BenchResult, BenchRun, MicroResult, Percentiles
from tdpmmu.units import format_count, format_ns, format_size

__all__ = ["WIDTH", "render", "render_bench", "render_comparison", "render_micro"]

Cell = Callable[[BenchRun], Any]


def render(header: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return an aligned table: the columns `left` to the left, the others to the right, two blanks between.

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
            c.ljust(w) if at in left else c.rjust(w)
            for at, (c, w) in enumerate(zip(row, widths, strict=True))
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
#: No table is wider than this unless that is asked for: what a terminal beside an editor shows.
WIDTH = 118


class Column(NamedTuple):
    """A heading, what to take from a run, how to write it, and how early it is left out for lack of room.

    Rank 0 is never left out; of the others the highest goes first, all of it; `_WIDE` is for wide ones only.
    """

    heading: str
    take: Cell
    write: Write
    rank: int = 0


_WIDE = 9


def _whole(value: Any) -> int | None:
    return None if value is None else round(value)


def _count(value: Any) -> str:
    return format_count(_whole(value))


def _rate(value: Any) -> str:
    return "-" if value is None else f"{value:.2f}"


def _raw(*path: str) -> Cell:
    return lambda run: _get(run.raw, *path)


def _plain(column: Column) -> str:
    return column.heading.replace("-\n", "").replace("\n", " ")


def _teardown(*path: str) -> Cell:
    return lambda run: _get(run.teardown, *path)


def _per_spte(run: BenchRun) -> Any:
    """Return the cost of a zap per SPTE mapped: of one zap, and of one that walked from a root."""
    return None if run.updates is not None else _get(run.teardown, "ns_per_spte") or None


def _per_entry(run: BenchRun) -> Any:
    """Return the cost per entry written, where that per SPTE says nothing: many zaps, trees of all sizes."""
    return None if run.updates is None else _get(run.teardown, "ns_per_entry") or None


def _payer(run: BenchRun) -> str | None:
    """Return who spent most CPU on taking SPTEs away: the caller, a vCPU or a worker."""
    spent = {who: _get(run.teardown, "cpu_ns", who) or 0 for who in ("caller", "vcpu", "worker")}
    most = max(spent, key=lambda who: spent[who])
    return most if spent[most] else None


def _text(value: Any) -> str:
    return "-" if value is None else str(value)


# A column in which no run has anything is left out.
_COST = [
    Column("step max\nSPTE ops", lambda r: _get(r.step_units, "max"), _count),
    Column("step max\ntime", lambda r: _longest_step(r), format_ns, _WIDE),
    Column("zap\nns/SPTE", _per_spte, _rate),
    Column("zap\nns/entry", lambda r: _per_entry(r), _rate),
    Column("last table\nfreed", _teardown("last_table_free_ns"), format_ns, 5),
    Column("CPUs\nused", _teardown("cpus_used"), _rate, 1),
    Column("mostly\nby", _payer, _text, 2),
    Column("tables\nretained", lambda r: r.retained_table_pages or None, _count, 1),
    Column("waiting\npages", _raw("rcu", "backlog_pages_peak"), _count, _WIDE),
    Column("yields", lambda r: r.yields, _count, _WIDE),
    Column("lock\nhand-offs", _raw("lock", "handoffs"), _count, _WIDE),
    Column("CPU of\ncaller", _teardown("cpu_ns", "caller"), format_ns, _WIDE),
    Column("CPU of\nvCPUs", _teardown("cpu_ns", "vcpu"), format_ns, _WIDE),
    Column("CPU of\nworkers", _teardown("cpu_ns", "worker"), format_ns, _WIDE),
    Column("CPU of\nRCU", _teardown("cpu_ns", "rcu"), format_ns, _WIDE),
]
# What must be 0 in a sound design. Shown as sums, so that one bad repetition is not hidden by a median.
_FAULTS = [
    Column("mapped at\nreturn", _raw("sptes_mapped_at_return"), _count),
    Column("leaked", lambda r: r.table_pages_leaked, _count),
    Column("viola-\ntions", lambda r: r.violations, _count),
]
_DROP = [
    Column("vCPU blocked\nby the drop", lambda r: _get(r.block_drop_ns, "max"), format_ns),
    Column("baseline", lambda r: _get(r.block_baseline_ns, "max"), format_ns),
    Column("small roots\np50", lambda r: _get(r.drop_loop, "block_drop_ns", "p50"), format_ns, _WIDE),
    Column("small roots\np99.9", lambda r: _get(r.drop_loop, "block_drop_ns", "p999"), format_ns, 4),
    Column("baseline\np99.9", lambda r: _get(r.drop_loop, "block_baseline_ns", "p999"), format_ns, 4),
]
_UPDATE = Column("memslot\nupdate", lambda r: _get(r.update_ns, "total"), format_ns)
_ZAP = [
    Column("first\nexcl. hold", lambda r: _get(r.update_ns, "exclusive_hold"), format_ns, _WIDE),
    Column("longest\nexcl. hold", lambda r: _longest_hold(r), format_ns),
    Column("blocked\nvCPU p50", lambda r: _get(r.block_update_ns, "p50"), format_ns, _WIDE),
    Column("blocked\nvCPU max", lambda r: _get(r.block_update_ns, "max"), format_ns),
    Column("visible to\nlast vCPU", lambda r: r.visible_last_ns, format_ns, 3),
]
# The shadow MMU zaps in holds of its own, and what it takes out of use stays in memory for a while.
_SHADOW = [
    Column("first\nexcl. hold", lambda r: _get(r.update_ns, "exclusive_hold"), format_ns),
    Column("pages kept\nat most", lambda r: r.shadow and r.shadow.retained_peak, _count),
    Column("kept at\nthe end", lambda r: (r.shadow and r.shadow.retained_at_end) or None, _count, 3),
    Column("longest\nbatch", lambda r: r.shadow and r.shadow.longest_batch, _count, 6),
    Column("batches", lambda r: r.shadow and r.shadow.batches, _count, _WIDE),
    Column("restarts", lambda r: (r.shadow and r.shadow.restarts) or None, _count, _WIDE),
    Column("shadow\npages", lambda r: r.shadow and r.shadow.pages_at_t0, _count, _WIDE),
    Column("pages\nzapped", lambda r: r.shadow and r.shadow.zapped, _count, _WIDE),
]
_UPDATES = [
    Column("updates", lambda r: _get(r.updates, "count"), _count, 4),
    Column("update\np50", lambda r: _get(r.updates, "update_ns", "p50"), format_ns, 2),
    Column("update\np99", lambda r: _get(r.updates, "update_ns", "p99"), format_ns, 6),
    Column("update\nmax", lambda r: _get(r.updates, "update_ns", "max"), format_ns),
]
_SPECIAL = [
    Column("who came\nlater waited", _raw("waiting", "wait_ns", "max"), format_ns),
    Column("fault blocked\np50", _raw("blocked_ns", "p50"), format_ns),
    Column("fault blocked\nmax", _raw("blocked_ns", "max"), format_ns),
    Column("woken: first\naccess after", _raw("wake_ns", "max"), format_ns),
    Column("dirty log\nenabled in", _raw("prepare_ns"), format_ns),
    Column("VM closed\nin", _raw("close_ns", "total"), format_ns),
    Column("of it,\nzap_all", _raw("close_ns", "zap_all"), format_ns),
    Column("migra-\ntions", _raw("migrations"), _count),
    Column("slot gone\nand back", _raw("cycle_ns", "p50"), format_ns),
]
_EXIT = [
    Column("tables\npending", _raw("process_exit", "sys_exit", "tables_pending"), _count),
    Column("sys.exit:\ngone after", _raw("process_exit", "sys_exit", "exit_ns"), format_ns),
    Column("os._exit:\ngone after", _raw("process_exit", "os_exit", "exit_ns"), format_ns),
    Column("exception:\ngone after", _raw("process_exit", "exception", "exit_ns"), format_ns),
    Column("daemon thread\nin a zap", _raw("process_exit", "thread", "exit_ns"), format_ns),
    Column("exit\ncodes", lambda r: _exit_codes(r), _text),
]


def _exit_codes(run: BenchRun) -> str | None:
    """Return `as told` where each process ended with the code that it was to end with, else the others."""
    wrong = [
        f"{way} {end.get('exit_code')}, not {end.get('expected_exit_code')}"
        for way, end in (run.process_exit or {}).items()
        if end.get("exit_code") != end.get("expected_exit_code")
    ]
    return "; ".join(wrong) or ("as told" if run.process_exit else None)


def _longest_hold(run: BenchRun) -> Any:
    longest = _get(run.update_ns, "exclusive_longest")
    return _get(run.update_ns, "exclusive_hold") if longest is None else longest


def _columns(run: BenchRun, drop: bool, shadow: bool) -> list[Column]:
    """Return what the scene of a run is about, most telling first."""
    if run.scene == "process-exit":
        return _EXIT
    head = _DROP if drop else [*(_UPDATES if run.updates is not None else [_UPDATE]), *_ZAP]
    # What only this scene has comes first.
    special = [column for column in _SPECIAL if column.take(run) is not None]
    if shadow and not drop:
        # The first hold stands once, and stays.
        own = {column.heading for column in _SHADOW}
        rest = [c._replace(rank=_rank(c)) for c in head[1:] if c.heading not in own]
        costs = [c._replace(rank=c.rank + (0 < c.rank < _WIDE - 1)) for c in _COST]
        return [*special, head[0], _SHADOW[0], *rest, *_SHADOW[1:], *costs]
    return [*special, *head, *_COST]


def _rank(column: Column) -> int:
    """Return how early a column goes where designs of both MMUs stand together: first the blocked vCPU."""
    return column.rank if column.rank >= _WIDE else int(column.heading.startswith("blocked"))


def render_bench(result: BenchResult, wide: bool = False) -> str:
    """Return a table a scene and guest, one row a design: what a KVM engineer compares.

    Medians over repetitions, times scaled. What must be 0 is summed over repetitions instead, and has a
    column only where it is not. Every column where `wide`; else what matters most, in `WIDTH` characters.
    """
    if not result.runs:
        return "no runs\n"
    parts: dict[tuple[Any, ...], list[BenchRun]] = {}
    for run in result.runs:
        parts.setdefault((run.scene, run.memory_bytes, run.page, run.vcpus), []).append(run)
    several = len({run.scene for run in result.runs}) > 1 or result.runs[0].raw.get("scene") is not None
    out = [_part(runs, result.experiment == "drop", several, wide) for runs in parts.values()]
    out += [text for text in [_fits(result, wide)] if text]
    return "\n".join(out)


def _part(runs: list[BenchRun], drop: bool, named: bool, wide: bool) -> str:
    groups: dict[tuple[str, ...], list[BenchRun]] = {}
    for run in runs:
        shadow = (run.shadow.paging, run.shadow.reclaim) if run.shadow else ("-", "-")
        groups.setdefault((run.design, run.passes, run.ownership, run.preempt, *shadow), []).append(run)
    # Who is who: whatever two rows of a design differ in, and the passes, which explain most of the rest.
    keys = list(groups)
    designs = {key[0] for key in keys}
    names = ["design", "passes", "owner", "preempt", "paging", "reclaim"]
    shown = [
        at
        for at, name in enumerate(names)
        if at == 0
        or (any(key[at] != "-" for key in keys) and (wide or name == "passes"))
        or len({(key[0], key[at]) for key in keys}) > len(designs)
    ]
    table = {names[at]: [key[at] for key in keys] for at in shown}
    table["design"] = [_marked(same[0]) for same in groups.values()]

    faults = {column: [_sum(column, same) for same in groups.values()] for column in _FAULTS}
    columns = [
        *_columns(runs[0], drop, any(run.shadow for run in runs)),
        *(c for c in _FAULTS if wide or any(faults[c])),
    ]
    ranks = {}
    for column in columns:
        cells = [
            column.write(faults[column][at] if column in faults else _middle(column, same))
            for at, same in enumerate(groups.values())
        ]
        if (wide or column.rank < _WIDE) and any(cell != "-" for cell in cells):
            table[column.heading], ranks[column.heading] = cells, column.rank
    while not wide and _width(table) > WIDTH and any(ranks.values()):
        worst = max(ranks.values())
        for heading in [heading for heading, rank in ranks.items() if rank == worst]:
            del ranks[heading], table[heading]

    first = runs[0]
    sptes = sorted({run.sptes for run in runs})
    reps = max(len(same) for same in groups.values())
    title = (
        (f"{first.scene}: " if named else "")
        + f"{format_size(first.memory_bytes)} of {first.page} pages, "
        + " to ".join(format_count(count) for count in dict.fromkeys((sptes[0], sptes[-1])))
        + f" SPTEs, {format_size(max(run.table_bytes for run in runs))} of tables, {first.vcpus} vCPUs"
        + (f"; medians of {reps} repetitions" if reps > 1 else "")
    )
    unseen = [column for column in _FAULTS if column.heading not in table]
    clean = [_plain(c) for c in unseen if all(value is not None for value in faults[c])]
    # Where a design keeps its roots nobody counts what is still mapped.
    partly = [_plain(c) for c in unseen if 0 < sum(v is not None for v in faults[c]) < len(faults[c])]
    rows = list(zip(*table.values(), strict=True))
    return (
        f"{title}\n\n"
        + render(list(table), rows)
        + (f"\n0 in every row: {', '.join(clean)}\n" if clean else "")
        + (f"0 wherever it was counted: {', '.join(partly)}\n" if partly else "")
        + _published(first)
    )


def _published(run: BenchRun) -> str:
    """Return what somebody else measured, and what this result has to say to it."""
    told = run.raw.get("published")
    if not told:
        return ""

    def said(before: str, after: str, ratio: str) -> str:
        if told.get(before) is None or told.get(after) is None:
            return "not both measured"
        return f"{told[before]:.3g} ms -> {told[after]:.3g} ms, {told[ratio]:.3f} of it"

    return (
        f"\nPublished: {told.get('source')}; {told.get('what')}:\n"
        f"{said('before_ms', 'after_ms', 'ratio')}. "
        f"Here, shadow-walk -> shadow-gen: {said('our_before_ms', 'our_after_ms', 'our_ratio')}.\n"
    )


def _marked(run: BenchRun) -> str:
    return f"{run.design} (flawed)" if run.flawed else run.design


def _sum(column: Column, runs: Sequence[BenchRun]) -> Any:
    values = [value for run in runs if (value := column.take(run)) is not None]
    return sum(values) if values else None


def _middle(column: Column, runs: Sequence[BenchRun]) -> Any:
    """Return the median of repetitions; of what is no number, the most frequent."""
    values = [value for run in runs if (value := column.take(run)) is not None]
    if not values:
        return None
    return statistics.mode(values) if isinstance(values[0], str) else statistics.median(values)


def _width(table: Mapping[str, Sequence[str]]) -> int:
    widths = [max(len(text) for text in (*heading.split("\n"), *cells)) for heading, cells in table.items()]
    return sum(widths) + 2 * (len(widths) - 1)


def _fits(result: BenchResult, wide: bool) -> str:
    """Return the lines through the sizes that were built, and what they say of sizes that were not."""
    rows: list[dict[str, str]] = []
    fitted: dict[str, None] = {}
    for run in result.runs:
        for guess in (run.fit or {}).get("at", ()):
            fit: Any = run.fit
            fitted[str(fit.get("of", "?"))] = None
            interval = guess.get("ci95")
            low, high = (max(float(end), 0.0) for end in interval) if interval else (0.0, 0.0)
            error = fit.get("ns_per_spte_se")
            rows.append(
                {
                    "design": _marked(run),
                    "passes": run.passes,
                    "preempt": run.preempt,
                    "sizes\nbuilt": format_count(len(fit.get("points", ()))),
                    "r2": "-" if fit.get("r2") is None else f"{fit['r2']:.4f}",
                    "ns/SPTE": f"{fit.get('ns_per_spte', 0.0):.3g}"
                    + (f" +- {error:.2g}" if error is not None else ""),
                    "guest": format_size(guess["memory_bytes"]),
                    "time": format_ns(max(guess["ns"], 0)),
                    "95 % interval": f"{format_ns(low)} .. {format_ns(high)}" if interval else "-",
                    "": ("extrapolated" if guess.get("extrapolated", True) else "")
                    + (", growth undecided" if interval and low == 0 else ""),
                }
            )
    if not rows:
        return ""
    rows = [
        dict(row) for row in dict.fromkeys(tuple(row.items()) for row in rows)
    ]  # repetitions share a line
    designs = {row["design"] for row in rows}
    for name in ("passes", "preempt", "sizes\nbuilt", "r2"):
        tells = name in ("passes", "preempt") and len({(r["design"], r[name]) for r in rows}) > len(designs)
        if not wide and not tells:
            for row in rows:
                del row[name]
    return (
        f"{', '.join(fitted)}: a line through the sizes that were built; what lies beyond was not run:\n\n"
        + render(list(rows[0]), [list(row.values()) for row in rows])
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
                "WORSE" if row.worse else "better" if row.better else "?" if row.worse is None else "",
            ]
        )
    heads = ["field", "a", "b", "b / a", "95 % interval", "reps", ""]
    out = [f"{title}\n\n" + render(heads, rows) for title, rows in parts.items()]
    worse, better = len(result.worse), len(result.better)
    mute = sum(row.worse is None for row in result.rows)
    out.append(
        f"{format_count(len(result.rows))} fields compared: {worse} worse, {better} better, "
        f"{len(result.rows) - worse - better - mute} alike or undecided"
        + (f", {mute} not judged (too few repetitions have it)" if mute else "")
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
