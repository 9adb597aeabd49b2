"""What `bench walk` measured, as a table: walks, or what each way to keep pages for walkers costs."""

from __future__ import annotations

from typing import Any

from tdpmmu.results import MicroResult
from tdpmmu.table import render as columns
from tdpmmu.table import render_micro
from tdpmmu.units import format_count, format_ns

__all__ = ["render"]

#: Of each kind, in this order: heading, what the row measures, which of its fields, how it is written.
_TIME, _COUNT = "time", "count"
_CELLS = (
    ("free\np50", "free", "ns", _TIME),
    ("free\np99", "free", "p99", _TIME),
    ("free\nmax", "free", "max", _TIME),
    ("waiting\npages", "waiting", "pages", _COUNT),
    ("stalled:\nfree", "stalled-free", "ns", _TIME),
    ("stalled:\nzap call", "stalled-call", "ns", _TIME),
    ("stalled:\nwaiting", "stalled-waiting", "pages", _COUNT),
)


def render(result: MicroResult) -> str:
    """Return a row a way to keep pages where the result is of `--reclaim`, else a row a walk. Times in ns.

    Below the rows, ratios to the kind `ipi` of the same run.
    """
    rows = [row.raw for row in result.rows if row.raw.get("reclaim") is not None]
    if not rows:
        return render_micro(result)
    kinds = list(dict.fromkeys(str(row["reclaim"]) for row in rows))
    by: dict[tuple[Any, ...], Any] = {
        (row["reclaim"], row["what"], row.get("readers") if row["what"] == "walk" else None): row
        for row in rows
    }
    counts = sorted({row["readers"] for row in rows if row["what"] == "walk"})
    heads = ["kind", *(f"a walk,\n{_readers(count)}" for count in counts)]
    if len(counts) > 1:
        heads.append("scaling")
    heads += [heading for heading, _, _, _ in _CELLS]
    table = []
    for kind in kinds:
        walks = [by.get((kind, "walk", count)) or {} for count in counts]
        cells = [kind, *(_time(walk.get("ns")) for walk in walks)]
        if len(counts) > 1:
            scaling = walks[-1].get("scaling")
            cells.append("-" if scaling is None else f"{scaling:.2f} x")
        for _, what, field, unit in _CELLS:
            value = (by.get((kind, what, None)) or {}).get(field)
            cells.append(_time(value) if unit == _TIME else format_count(value))
        table.append(cells)
    stalls = sorted({row["stall_ms"] for row in rows if row.get("stall_ms")})
    title = "Lockless walks of shadow pages, and what keeps zapped pages for them"
    if stalls:
        title += f".\nStalled: a reader loses its CPU inside a walk for {stalls[-1]} ms"
    return f"{title}\n\n{columns(heads, table)}{_ratios(rows)}"


def _ratios(rows: list[Any]) -> str:
    """Return what each kind takes over what `ipi` takes: a row a kind, a column a measurement."""
    names: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.get("ratio") is not None:
            what = "walk, " + _readers(row["readers"]) if row["what"] == "walk" else str(row["what"])
            names.setdefault(str(row["reclaim"]), {})[what] = row["ratio"]
    heads = list(dict.fromkeys(what for found in names.values() for what in found))
    if not heads or len(names) < 2:
        return ""
    table = [
        [kind, *(f"{found[what]:.2f}" if what in found else "-" for what in heads)]
        for kind, found in names.items()
    ]
    return "\nOver kind ipi of the same run:\n\n" + columns(
        ["kind", *(head.replace(", ", ",\n", 1) for head in heads)], table
    )


def _readers(count: int) -> str:
    return f"{count} reader{'s' if count != 1 else ''}"


def _time(ns: float | None) -> str:
    return "-" if ns is None else f"{ns:.1f} ns" if ns < 99.95 else format_ns(ns)
