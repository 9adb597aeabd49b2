"""Result documents as the native side writes them, small, for the tests of what reads them."""

from __future__ import annotations

from typing import Any

Raw = dict[str, Any]


def percentiles(top: int, count: int = 20_000) -> Raw:
    return {
        "count": count,
        "min": top // 9,
        "p50": top // 4,
        "p90": top // 3,
        "p99": top // 2,
        "p999": None,
        "max": top,
    }


def run(design: str, rep: int, *, drop: bool, blocked: int) -> Raw:
    out: Raw = {
        "design": design,
        "passes": "root" if design == "inline" else "1G,root",
        "ownership": "mmu" if design == "sync" else "vcpu",
        "lock_mode": "shared",
        "rep": rep,
        "memory_bytes": 1 << 30,
        "page": "4K",
        "vcpus": 2,
        "sptes": 262_144,
        "table_pages": 515,
        "table_bytes": 515 * 4096,
        "extrapolated": False,
        "step_units": percentiles(512),
        "step_ns": percentiles(5_000),
        "yields": 3,
        "table_pages_leaked": 0,
        "violations": None,
        "retained_table_pages": 515 if design == "sync" and drop else 0,
        "teardown": None
        if design == "sync" and drop
        else {"ns_per_spte": 8.25, "last_table_free_ns": 2_500_000},
    }
    if drop:
        out["block_drop_ns"] = percentiles(blocked, 1)
        out["block_baseline_ns"] = percentiles(9_000)
        out["drop_loop"] = {"root_sptes": 512, "count": 10_000, "block_drop_ns": percentiles(20_000)}
    else:
        out["update_ns"] = {"total": blocked, "lock_wait": 100, "exclusive_hold": 900, "zap": blocked - 1_000}
        out["block_update_ns"] = percentiles(30_000)
        out["visible_ns"] = percentiles(90_000)
        out["visible_last_ns"] = 90_000
    return out


def bench(kind: str = "drop") -> Raw:
    drop = kind == "drop"
    blocked = {"inline": 2_400_000, "async-worker": 11_000, "sync": 10_000}
    return {
        "schema": "tdpmmu.bench.zap/1",
        "experiment": kind,
        "seed": 7,
        "host": {"cpus": 2},
        "build": {"profile": "release"},
        "config": {"memory_bytes": 1 << 30},
        "limits": {"swap_ns": 5.8, "stable": True},
        "runs": [run(d, rep, drop=drop, blocked=ns + rep) for rep in range(3) for d, ns in blocked.items()],
    }


def micro() -> Raw:
    rows = [
        {"name": "enter and leave", "ns": 0.42, "ratio": None, "of": None, "goal": 0.5},
        {"name": "populate, bulk", "ns": 1.05, "ratio": 1.19, "of": "write_ns", "goal": 1.2},
    ]
    return {"schema": "tdpmmu.micro/1", "seed": 7, "limits": {"write_ns": 0.88}, "rows": rows}


def replay(mismatches: int = 0) -> Raw:
    zaps = [
        {
            "cause": "memslot",
            "t0_ns": 10,
            "duration_ns": 1_000,
            "entries": {"1": 5, "2": 1},
            "tables": 2,
        },
        {"cause": "memslot", "t0_ns": 90, "duration_ns": 3_000, "entries": {"1": 1}, "tables": 1},
        {"cause": "notifier", "t0_ns": 50, "duration_ns": 500, "entries": {}, "tables": 0},
    ]
    wrong = [
        {"line": 12 + n, "gfn": "1f", "level": 1, "expected": "0", "got": "5a0"} for n in range(mismatches)
    ]
    return {
        "schema": "tdpmmu.replay/1",
        "file": "trace.txt",
        "kernel": "6.12",
        "events": 1_000,
        "transitions": 400,
        "checked": {"same": 390, "hw_ad": 10, "mismatch": mismatches},
        "mismatches": wrong,
        "roots": 2,
        "tables_peak": 9,
        "zaps": zaps,
    }
