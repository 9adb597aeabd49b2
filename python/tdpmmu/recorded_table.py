"""Tables of what recordings hold: a replay, a conformance report. Times scaled, counts in full."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tdpmmu.recorded import ConformCase, ConformReport, Replay
from tdpmmu.table import render
from tdpmmu.units import format_count, format_ns, format_size

__all__ = ["render_conform", "render_replay"]

_LISTED = 10


def render_replay(result: Replay) -> str:
    """Return the verdict, the VMs, the faults and the zaps of a recording. Times scaled, counts in full."""
    lines = [
        f"{result.file}: kernel {result.kernel}, {format_count(result.events)} events, "
        f"{format_count(result.transitions)} SPTE transitions"
    ]
    if result.checked:
        parts = ", ".join(f"{name} {format_count(count)}" for name, count in result.checked.items())
        lines.append(f"old values: {parts}")
    lost = result.raw.get("lost")
    if lost:
        lines.append(f"lost events: {format_count(int(lost))}; what they touched is unknown, not wrong")
    ambiguous = (result.raw.get("ambiguous") or {}).get("transitions")
    if ambiguous:
        why = result.raw["ambiguous"].get("why") or "more than one VM"
        lines.append(f"ambiguous: {format_count(int(ambiguous))} transitions ({why})")
    if result.tables_peak is not None:
        size = format_size(result.tables_peak * 4096)
        lines.append(f"page-table pages at most: {format_count(result.tables_peak)} ({size})")
    lines += _faults(result.faults)
    for mismatch in result.mismatches[:_LISTED]:
        lines.append("mismatch: " + ", ".join(f"{name} {value}" for name, value in mismatch.items()))
    if len(result.mismatches) > _LISTED:
        lines.append(f"... and {len(result.mismatches) - _LISTED} more mismatches")
    for part in (_vms, _causes, _storms, _operations, _what_if):
        table = part(result)
        if table:
            lines += ["", table.rstrip()]
    return "\n".join(lines) + "\n"


def _faults(faults: Mapping[str, Any]) -> list[str]:
    counted = [
        f"{name.replace('_', ' ')} {format_count(int(value))}"
        for name, value in faults.items()
        if isinstance(value, int) and not isinstance(value, bool) and value and name != "total"
    ]
    mapped = faults.get("mapped") or {}
    counted += [
        f"mapped {size} {format_count(int(mapped[level]))}"
        for level, size in (("1", "4K"), ("2", "2M"), ("3", "1G"))
        if mapped.get(level)
    ]
    total = f"faults: {format_count(int(faults['total']))}: " if faults.get("total") else "faults: "
    return [total + ", ".join(counted)] if counted else []


def _vms(result: Replay) -> str:
    if len(result.vms) < 2:
        return ""
    rows = [
        [
            str(vm.get("id", "?")),
            f"{vm.get('comm') or '?'} {vm.get('tgid') or ''}".strip(),
            str(vm.get("told_by") or "?"),
            *(format_count(int(vm.get(name) or 0)) for name in ("roots", "transitions", "faults", "zaps")),
        ]
        for vm in result.vms
    ]
    return render(["VM", "process", "told by", "roots", "transitions", "faults", "zaps"], rows)


def _causes(result: Replay) -> str:
    if not result.causes:
        return _zaps_by_cause(result)
    rows = [
        [
            str(cause.get("cause", "?")).replace("_", " "),
            format_count(int(cause.get("zaps") or 0)),
            format_ns(int(cause.get("total_ns") or 0)),
            format_ns(int(cause.get("max_ns") or 0)),
            format_count(int(cause.get("entries") or 0)),
            format_count(int(cause.get("tables") or 0)),
        ]
        for cause in result.causes
    ]
    return render(["zaps by cause", "count", "total", "longest", "entries", "tables"], rows)


def _zaps_by_cause(result: Replay) -> str:
    """Sum the zaps of a report that has no causes: one of an older version."""
    causes: dict[str, list[Any]] = {}
    for zap in result.zaps:
        causes.setdefault(str(zap.get("cause", "?")), []).append(zap)
    rows = []
    for cause, zaps in causes.items():
        times = [int(zap.get("duration_ns") or 0) for zap in zaps]
        counts = [
            format_ns(sum(times)),
            format_ns(max(times)),
            format_count(sum(_entries(zap) for zap in zaps)),
        ]
        tables = format_count(sum(int(zap.get("tables") or 0) for zap in zaps))
        rows.append([cause.replace("_", " "), format_count(len(zaps)), *counts, tables])
    return render(["zaps by cause", "count", "total", "longest", "entries", "tables"], rows) if rows else ""


def _entries(zap: Any) -> int:
    entries = zap.get("entries") or 0
    if isinstance(entries, dict):
        return sum(int(count) for count in entries.values())
    return sum(entries) if isinstance(entries, list) else int(entries)


def _storms(result: Replay) -> str:
    if not result.storms:
        return ""
    begin = int(result.raw.get("begin_ns") or 0)
    worst = sorted(result.storms, key=lambda storm: -int(storm.get("zaps") or 0))[:_LISTED]
    rows = [
        [
            str(storm.get("cause", "?")).replace("_", " "),
            format_ns(int(storm["t0_ns"]) - begin),
            format_ns(int(storm["t1_ns"]) - int(storm["t0_ns"])),
            format_count(int(storm.get("zaps") or 0)),
            format_count(int(storm.get("entries") or 0)),
        ]
        for storm in sorted(worst, key=lambda storm: int(storm["t0_ns"]))
    ]
    total = int(result.raw.get("storms_total") or len(result.storms))
    name = "storms" if total <= _LISTED else f"storms (of {format_count(total)})"
    return render([name, "at", "lasted", "zaps", "entries"], rows)


def _operations(result: Replay) -> str:
    begin = int(result.raw.get("begin_ns") or 0)
    rows = [
        [
            str(operation.get("name", "?")),
            format_ns(int(operation.get("duration_ns") or 0)),
            format_ns(int(operation.get("t0_ns") or begin) - begin),
            f"{operation.get('comm') or '?'}-{operation.get('pid') or '?'}",
            _short(_detail(operation.get("detail")), 44),
        ]
        for operation in result.top_operations[:_LISTED]
    ]
    return render(["longest operations", "took", "at", "thread", ""], rows) if rows else ""


def _detail(detail: object) -> str:
    """Return the parameters of a mark in plain words, where they are an object of few."""
    try:
        found = json.loads(detail) if isinstance(detail, str) else detail
    except ValueError:
        return str(detail)
    if not isinstance(found, dict):
        return "" if found is None else str(detail)
    return ", ".join(f"{name} {value}" for name, value in found.items() if name not in ("vm", "hva"))


def _what_if(result: Replay) -> str:
    raw = result.what_if
    if not raw:
        return ""
    zaps = sorted(raw.get("zaps") or (), key=lambda zap: -int(zap.get("recorded_ns") or 0))[:_LISTED]
    begin = int(result.raw.get("begin_ns") or 0)
    rows = [
        [
            str(zap.get("cause", "?")).replace("_", " "),
            format_ns(int(zap.get("t0_ns") or begin) - begin),
            format_count(int(zap.get("sptes") or 0)),
            *(
                "-" if zap.get(name) is None else format_ns(int(zap[name]))
                for name in ("recorded_ns", "caller_blocked_ns", "vcpu_blocked_max_ns", "background_ns")
            ),
        ]
        for zap in zaps
    ]
    head = [f"what if {raw.get('design', '?')}", "at", "SPTEs", "recorded", "caller", "vCPU", "background"]
    lines = [render(head, rows).rstrip()] if rows else [f"what if {raw.get('design', '?')}: no zap to run"]
    for skipped in raw.get("skipped") or ():
        lines.append(
            f"not run: {format_count(int(skipped.get('zaps') or 0))} of the zaps: {skipped.get('why')}"
        )
    if raw.get("note"):
        lines.append(str(raw["note"]))
    return "\n".join(lines)


def render_conform(result: ConformReport) -> str:
    """Return a line a recording, then the first differences of each that differs. Counts in full."""
    names = ["recording", "profile", "operations", "expected", "matched", "undetermined", "differ", "skipped"]
    numbers = ("operations", "expected", "matched", "undetermined", "differences")
    rows = [
        [
            case.name,
            str(case.raw.get("profile") or case.kernel),
            *(format_count(getattr(case, name)) for name in numbers),
            format_count(len(case.skipped)),
        ]
        for case in result.cases
    ]
    lines = [render(names, rows).rstrip()] if rows else ["no recording"]
    for case in result.cases:
        lines += _differences(case)
    expected, matched = (
        sum(getattr(case, name) for case in result.cases) for name in ("expected", "matched")
    )
    good = sum(case.ok for case in result.cases)
    lines += [
        "",
        f"{format_count(good)} of {format_count(len(result.cases))} recordings conform; "
        f"{format_count(matched)} of {format_count(expected)} transitions matched",
    ]
    return "\n".join(lines) + "\n"


def _differences(case: ConformCase) -> list[str]:
    lines: list[str] = []
    for part in ("births", "deaths", "statistics", "results"):
        found = case.raw.get(part)
        wrong = (found or {}).get("differences", (found or {}).get("mismatched"))
        if wrong:
            lines += ["", f"{case.name}: {part}: {format_count(int(wrong))} differ"]
    for mismatch in case.mismatches[:3]:
        where = [f"operation {mismatch.get('operation', '?')}", str(mismatch.get("kind") or "")]
        where += [f"thread {mismatch['thread']}"] if mismatch.get("thread") else []
        where += [f"line {mismatch['line']}"] if mismatch.get("line") else []
        lines += ["", f"{case.name}: {', '.join(part for part in where if part)}: {mismatch.get('rule', '')}"]
        lines += [f"  {name:<8}  {mismatch.get(name) or '-'}" for name in ("expected", "got")]
        for name in ("recorded", "predicted"):
            if mismatch.get(name):
                lines += [f"  {name}:", *(f"    {_short(item, 140)}" for item in mismatch[name])]
    if len(case.mismatches) > 3:
        more = case.differences - 3
        lines.append(f"  ... and {format_count(more)} more differences")
    for skipped in case.skipped[:3]:
        lines.append(f"{case.name}: operation {skipped.get('operation', '?')} skipped: {skipped.get('why')}")
    return lines


def _short(value: object, width: int) -> str:
    text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= width else text[: width - 3] + "..."
