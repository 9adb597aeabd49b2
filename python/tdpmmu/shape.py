"""What is an object, a list or a number in a result, so that a damaged file is refused where it is read.

Unknown names are let through, and so is null everywhere: results of older and newer versions stay readable.
Nothing here has a unit.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdpmmu.shadow import COUNTS

__all__ = ["check"]

Shape = Any  # a kind by name, or an object of shapes, or a list with the shape of its items


class _Leaf:
    def __init__(self, said: str, *kinds: type) -> None:
        self.said, self.kinds = said, kinds

    def fits(self, value: object) -> bool:
        return isinstance(value, self.kinds) and (bool in self.kinds or not isinstance(value, bool))


NUMBER = _Leaf("a number", int, float)
TEXT = _Leaf("text", str)
EITHER = _Leaf("a number or text", int, float, str)
#: An object of numbers, whatever their names; a distribution is one.
NUMBERS: Shape = {"*": NUMBER}
#: Pairs or triples: a curve, a series, slices of a track.
TUPLES: Shape = [[EITHER]]

_RUN: Shape = {
    **dict.fromkeys(("scene", "design", "passes", "ownership", "preempt", "kernel_profile", "page"), TEXT),
    **dict.fromkeys(("rep", "memory_bytes", "vcpus", "sptes", "table_pages", "table_bytes"), NUMBER),
    **dict.fromkeys(("visible_last_ns", "prepare_ns", "migrations", "toggles", "yields", "retries"), NUMBER),
    **dict.fromkeys(("step_ns_dropped", "step_ns_dropped_cpu_max", "retained_table_pages"), NUMBER),
    **dict.fromkeys(("sptes_mapped_at_return", "table_pages_leaked", "violations"), NUMBER),
    "pool_peak_pages": NUMBER,
    **dict.fromkeys(("update_ns", "block_drop_ns", "block_baseline_ns", "block_update_ns"), NUMBERS),
    **dict.fromkeys(("visible_ns", "access_ns", "step_units", "step_ns", "queue_ns", "blocked_ns"), NUMBERS),
    **dict.fromkeys(("wake_ns", "close_ns", "populate", "refault", "others", "final"), NUMBERS),
    "access_ns_by_outcome": {"*": NUMBERS},
    "updates": {"count": NUMBER, "update_ns": NUMBERS},
    "waiting": {"what": TEXT, "wait_ns": NUMBERS},
    "drop_loop": {
        **dict.fromkeys(("root_sptes", "count", "worker_wakes"), NUMBER),
        **dict.fromkeys(("block_drop_ns", "block_drop_woken_ns", "block_baseline_ns"), NUMBERS),
    },
    "teardown": {"cpu_ns": NUMBERS, "*": NUMBER},
    "lock": {
        **dict.fromkeys(("read_hold_ns", "write_hold_ns", "reader_wait_ns", "writer_wait_ns"), NUMBERS),
        "*": NUMBER,
    },
    "rcu": {
        "flavour": TEXT,
        "section_ns": NUMBERS,
        "grace_period_ns": NUMBERS,
        "backlog_pages_peak": NUMBER,
        "backlog_series": [[NUMBER]],
    },
    "attribution": [{"thread": TEXT, "role": TEXT, "ns": NUMBERS, "cpu_ns": NUMBER, "elapsed_ns": NUMBER}],
    "timeline": {
        "tracks": [{"thread": TEXT, "role": TEXT, "slices": TUPLES, "locks": TUPLES}],
        "marks": TUPLES,
    },
    "fit": {
        **dict.fromkeys(("ns_per_spte", "ns_per_spte_se", "intercept_ns", "r2"), NUMBER),
        "of": TEXT,
        "points": [[NUMBER]],
        "at": [{"memory_bytes": NUMBER, "sptes": NUMBER, "ns": NUMBER, "ci95": [NUMBER]}],
    },
    "process_exit": {"*": NUMBERS},
    "cycle_ns": NUMBERS,
    "published": {"*": EITHER},
    "shadow": {
        **dict.fromkeys(("paging", "reclaim"), TEXT),
        **dict.fromkeys(COUNTS, NUMBER),
        "retained_series": [[NUMBER]],
    },
    "curves": {"*": [[NUMBER]]},
    "violation_list": [TEXT],
}
_VERSUS: Shape = {
    **dict.fromkeys(("mmu", "design", "page"), TEXT),
    **dict.fromkeys(("memory_bytes", "vcpus", "rep"), NUMBER),
    **dict.fromkeys(("sptes", "tables_bytes", "metadata_bytes", "rmap_bytes", "guest_table_bytes"), NUMBER),
    **dict.fromkeys(("fault_ns", "zap_visible_ns", "zap_hold_ns", "zap_longest_hold_ns"), NUMBER),
    **dict.fromkeys(("zap_call_ns", "zap_total_ns", "zap_cpu_ns", "refault_ns"), NUMBER),
}
_OPERATION: Shape = {
    **dict.fromkeys(("ns", "ratio", "goal", "count", "density", "total_ns"), NUMBER),
    **dict.fromkeys(("readers", "scaling", "p99", "max", "pages", "stall_ms"), NUMBER),
    **dict.fromkeys(("name", "phase", "page", "protocol", "reclaim", "what"), TEXT),
}
_ABOUT: Shape = {"host": {}, "build": {}, "config": {}, "limits": {}}
_ENTRIES: Shape = {"cause": TEXT, **dict.fromkeys(("zaps", "entries", "tables", "leafs"), NUMBER)}
_REPLAY: Shape = {
    **dict.fromkeys(("file", "kernel", "input"), TEXT),
    **dict.fromkeys(("events", "transitions", "tables_peak", "begin_ns", "span_ns", "storms_total"), NUMBER),
    "lost": NUMBER,
    "checked": NUMBERS,
    "mismatches": [{}],
    "zaps": [{"cause": TEXT, "refined": TEXT, **dict.fromkeys(("t0_ns", "duration_ns", "tables"), NUMBER)}],
    "timeline": {"*": [NUMBER]},
    "causes": [{**_ENTRIES, **dict.fromkeys(("total_ns", "max_ns"), NUMBER)}],
    "storms": [{**_ENTRIES, **dict.fromkeys(("t0_ns", "t1_ns"), NUMBER)}],
    "faults": {"mapped": NUMBERS},
    "top_operations": [{"name": TEXT, **dict.fromkeys(("t0_ns", "duration_ns"), NUMBER)}],
    "per_vm": [{**dict.fromkeys(("roots", "transitions", "faults", "zaps"), NUMBER)}],
    "ambiguous": {"transitions": NUMBER, "why": TEXT},
    "losses": [{}],
    "what_if": {
        "design": TEXT,
        "zaps": [
            {
                "cause": TEXT,
                **dict.fromkeys(("t0_ns", "sptes", "recorded_ns", "caller_blocked_ns"), NUMBER),
                **dict.fromkeys(("vcpu_blocked_max_ns", "background_ns"), NUMBER),
            }
        ],
        "skipped": [{"why": TEXT, "zaps": NUMBER}],
    },
}
_LIVES: Shape = {**dict.fromkeys(("expected", "matched", "unlinked", "differences"), NUMBER)}
_CASE: Shape = {
    **dict.fromkeys(("name", "kernel", "profile"), TEXT),
    **dict.fromkeys(("operations", "inputs", "expected", "matched", "undetermined"), NUMBER),
    **dict.fromkeys(("left_over", "differences", "races"), NUMBER),
    "mismatches": [{"recorded": [TEXT], "predicted": [TEXT]}],
    "skipped": [{"why": TEXT}],
    "births": _LIVES,
    "deaths": _LIVES,
    "statistics": {"compared": NUMBER, "mismatched": NUMBER},
    "results": {"compared": NUMBER, "mismatched": NUMBER},
    "per_kind": {"*": NUMBERS},
}
_SHAPES: dict[str, Shape] = {
    "tdpmmu.replay/": _REPLAY,
    "tdpmmu.conform/": {"cases": [_CASE]},
    "tdpmmu.bench.": {**_ABOUT, "experiment": TEXT, "runs": [_RUN]},
    "tdpmmu.micro/": {**_ABOUT, "rows": [_OPERATION]},
    "tdpmmu.versus/": {**_ABOUT, "rows": [_VERSUS]},
}


def check(raw: Mapping[str, Any]) -> None:
    """Compare a result's object with what its schema says.

    Raises:
        TypeError: a field is not of its type; the message names it by its path.
    """
    schema = str(raw.get("schema", ""))
    for begin, shape in _SHAPES.items():
        if schema.startswith(begin):
            _check(raw, shape, "")


def _check(value: Any, shape: Shape, path: str) -> None:
    if value is None:
        return
    if isinstance(shape, _Leaf):
        if not shape.fits(value):
            raise TypeError(f"{path} is {_short(value)}, expected {shape.said}")
    elif isinstance(shape, list):
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"{path} is {_short(value)}, expected a list")
        for at, item in enumerate(value):
            _check(item, shape[0], f"{path}[{at}]")
    else:
        if not isinstance(value, Mapping):
            raise TypeError(f"{path} is {_short(value)}, expected an object")
        for name, item in value.items():
            inner = shape.get(name, shape.get("*"))
            if inner is not None:
                _check(item, inner, f"{path}.{name}" if path else name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
