"""Result documents as the native side writes them, small, for the tests of what reads them."""

from __future__ import annotations

import random
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


FLAWED = ("system-workqueue", "no-second-phase")


def curve(middle: float, spread: float, samples: int, seed: int) -> list[list[int]]:
    """A sparse histogram as the native side writes it: values to three digits, with how often each came."""
    rng = random.Random(seed)
    found: dict[int, int] = {}
    for _ in range(samples):
        value = int(rng.lognormvariate(0, spread) * middle)
        digits = max(0, len(str(value)) - 3)
        value = value // 10**digits * 10**digits
        found[value] = found.get(value, 0) + 1
    return [[value, found[value]] for value in sorted(found)]


def scene_run(design: str, rep: int, *, scene: str = "memslot-delete", blocked: int = 4_000_000) -> Raw:
    """A run of `bench zap` with everything that a picture is drawn from. Times in ns."""
    out = run(design, rep, drop=False, blocked=blocked)
    payer = {"inline": "caller", "sync": "caller"}.get(design, "worker")
    seed = sum(design.encode()) + rep
    work, wait = int(blocked * 0.8), int(blocked * 0.2)
    mine = {"spte_work": work, "lock_wait": wait // 2, "flush": wait - wait // 2}
    asked = mine if payer == "caller" else {"queue_delay": blocked}
    threads = [
        ("vmm", "caller", True, asked),
        ("vcpu-0", "vcpu", False, {"other": blocked - 9_000, "lock_wait": 9_000}),
        ("vcpu-1", "vcpu", False, {"other": blocked}),
        ("tdpmmu-rcu", "rcu", True, {"grace_period": blocked // 4, "free": blocked // 5}),
    ]
    if payer == "worker":
        threads.insert(3, ("worker-0", "worker", True, mine))
    out.update(
        scene=scene,
        preempt="full",
        kernel_profile="6.12",
        sharing="local",
        flawed=design in FLAWED,
        workers=1,
        worker_queue="per-vm" if payer == "worker" else None,
        sptes_mapped_at_return=4_096 if design in FLAWED else 0,
        violations=2 if design in FLAWED else 0,
        fit=None,
        updates=None,
        teardown={
            "ns_per_spte": 8.25,
            "ns_per_entry": 8.2,
            "fz_return_ns": blocked,
            "last_spte_unreachable_ns": blocked,
            "last_table_free_ns": int(blocked * 1.3),
            "entry_writes": 262_144,
            "cpus_used": 0.9,
            "cpu_ns": {"caller": 0, "vcpu": 0, "worker": 0, "rcu": blocked // 5, payer: work},
        },
        rcu={
            "flavour": "membarrier",
            "backlog_pages_peak": 515,
            "backlog_series": [[blocked // 8 * n, min(515, 70 * n)] for n in range(1, 9)]
            + [[int(blocked * 1.3), 0]],
        },
        lock={"handoffs": 1, "contended": 2},
        others={
            "lock_wait_ns": 9_000,
            "kicked_ns": 60_000,
            "run_delay_ns": blocked // 3,
            "accesses_late": 12,
        },
        attribution=[
            {
                "thread": name,
                "role": role,
                "cpu": at % 2,
                "cpu_ns": sum(ns.values()) // 2,
                "pays": pays,
                "ns": ns,
                "elapsed_ns": sum(ns.values()),
                "run_delay_ns": 0,
            }
            for at, (name, role, pays, ns) in enumerate(threads)
        ],
        curves={
            "access_ns": curve(90, 1.4 if payer == "worker" else 1.9, 20_000, seed),
            "block_update_ns": [[30_000, 1], [41_000, 1]],
            "step_units": curve(200, 0.4, 400, seed),
        },
        timeline={
            "tracks": [track(name, role, ns) for name, role, _, ns in threads],
            "marks": marks(blocked),
        },
    )
    return out


def track(name: str, role: str, ns: Raw) -> Raw:
    """The slices of a thread: its phases one after the other, cut in five."""
    slices, at = [], 0
    for _ in range(5):
        for phase, length in ns.items():
            slices.append([at, at + length // 5, phase])
            at += length // 5
    locks = [[start, stop, "shared"] for start, stop, phase in slices if phase == "spte_work"]
    if role == "caller":
        locks.append([200, 40_000, "exclusive"])
    return {"thread": name, "role": role, "slices": slices, "locks": locks}


def marks(blocked: int) -> list[list[Any]]:
    end = int(blocked * 1.3)
    return [
        [150, "root 5 invalidated"],
        [900, "root 5 scheduled"],
        [blocked, "root 5 zapped"],
        [end, "last free"],
    ]


def scenes(designs: tuple[str, ...] = ("inline", "async-worker", "sync"), *, reps: int = 1) -> Raw:
    """A result of `bench zap` as of the scenes, with series."""
    blocked = {"inline": 4_000_000, "async-worker": 4_400_000, "sync": 8_800_000, "no-second-phase": 60_000}
    runs = [scene_run(d, rep, blocked=blocked[d] + 1_000 * rep) for rep in range(reps) for d in designs]
    config = {"memory_bytes": 1 << 30, "designs": list(designs), "sharing": "local"}
    return {**bench("zap"), "config": config, "runs": runs}


def scaling(designs: tuple[str, ...] = ("inline", "async-worker")) -> Raw:
    """A result of `bench drop --scene zap-64t`: sizes that were built, and the line through them."""
    each = {"inline": 7.3, "async-worker": 0.0002}
    runs = []
    for design in designs:
        slope, base = each[design], 12_000.0
        points = []
        for n, wobble in enumerate((1.01, 0.98, 1.02, 0.995)):
            sptes = (1 << 22) << n
            points.append([sptes, int((base + slope * sptes) * wobble)])
            one = run(design, 0, drop=True, blocked=points[-1][1])
            one.update(scene="zap-64t", sptes=sptes, memory_bytes=sptes * 4096, flawed=False, fit=None)
            one.update(preempt="full", kernel_profile="6.12")
            runs.append(one)
        guess = base + slope * (1 << 34)
        runs[-1]["fit"] = {
            "of": "block_drop_ns.max",
            "points": points,
            "ns_per_spte": slope,
            "ns_per_spte_se": slope * 0.02 + 1e-5,
            "intercept_ns": base,
            "r2": 0.9993 if design == "inline" else 0.12,
            "at": [
                {
                    "memory_bytes": 1 << 46,
                    "sptes": 1 << 34,
                    "ns": guess,
                    "ci95": [guess * 0.9, guess * 1.1],
                    "extrapolated": True,
                }
            ],
        }
    return {**bench("drop"), "runs": runs}


def micro() -> Raw:
    rows = [
        {"name": "enter and leave", "ns": 0.42, "ratio": None, "of": None, "goal": 0.5},
        {"name": "populate, bulk", "ns": 1.05, "ratio": 1.19, "of": "write_ns", "goal": 1.2},
    ]
    return {"schema": "tdpmmu.micro/1", "seed": 7, "limits": {"write_ns": 0.88}, "rows": rows}


def shadow_block(pages: int, zap_ns: int, *, kept: bool = False, reclaim: str = "ipi") -> Raw:
    """What a run says of the shadow MMU: obsolete at once, then zapped in eight steps, or kept."""
    left = [pages - pages * n // 8 for n in range(9)]
    series = [[zap_ns * n // 8 + 500, pages if kept else count] for n, count in enumerate(left)]
    return {
        "paging": "direct",
        "reclaim": reclaim,
        "quota": None,
        "pages_at_t0": pages,
        "zapped": 0 if kept else pages,
        "batches": 0 if kept else pages // 10,
        "longest_batch": 0 if kept else 13,
        "restarts": 0,
        "reclaimed": 0,
        "guest_table_pages": 0,
        "retained_peak": pages,
        "retained_at_return": pages if kept else 0,
        "retained_at_end": pages if kept else 0,
        "waiting_peak": 0,
        "retained_series": series,
    }


def both_mmus(designs: tuple[str, ...] = ("shadow-walk", "shadow-gen", "shadow-gen-kept", "sync")) -> Raw:
    """A result of `bench zap` under designs of both MMUs."""
    raw = scenes(("inline", "async-worker", "sync"))
    blocked = {"shadow-walk": 9_000_000, "shadow-gen": 60_000, "shadow-gen-kept": 40_000, "sync": 30_000}
    raw["runs"] = [scene_run(design, 0, blocked=8_000_000) for design in designs]
    for run in raw["runs"]:
        if run["design"].startswith("shadow-"):
            run.update(passes="-", ownership="-", lock_mode="exclusive")
            run["shadow"] = shadow_block(515, 8_000_000, kept=run["design"] == "shadow-gen-kept")
        run["update_ns"]["exclusive_hold"] = blocked[run["design"]]
    return raw


def versus(sizes: tuple[int, ...] = (4, 16, 64), vcpus: tuple[int, ...] = (1, 2), reps: int = 3) -> Raw:
    """A result of `versus`: what grows with the guest, and what does not. Sizes in GiB."""
    rows = []
    each = {
        "tdp": (350, 40_000, 4.2e6),
        "shadow-direct": (420, 60_000, 8.1e6),
        "shadow-guest": (640, 80_000, 9e6),
    }
    for rep in range(reps):
        for size in sizes:
            for cpus in vcpus:
                for mmu, (fault, visible, per_gib) in each.items():
                    wobble = 1 + 0.01 * rep
                    tables = (size << 30) // 512 + 12_288
                    rows.append(
                        {
                            "mmu": mmu,
                            "design": "sync" if mmu == "tdp" else "shadow-gen",
                            "memory_bytes": size << 30,
                            "page": "4K",
                            "vcpus": cpus,
                            "rep": rep,
                            "overcommit": cpus > 1,
                            "sptes": size << 18,
                            "tables_bytes": tables,
                            "metadata_bytes": tables // 64,
                            "rmap_bytes": 0 if mmu == "tdp" else size << 21,
                            "guest_table_bytes": tables if mmu == "shadow-guest" else 0,
                            "fault_ns": fault * cpus * wobble,
                            "zap_visible_ns": int(visible * cpus * wobble),
                            "zap_hold_ns": int(9_000 * wobble),
                            "zap_longest_hold_ns": int((9_000 if mmu == "tdp" else 25_000) * wobble),
                            "zap_call_ns": int(per_gib * size * wobble * 0.9),
                            "zap_total_ns": int(per_gib * size * wobble),
                            "zap_cpu_ns": int(per_gib * size * wobble * 1.1),
                            "refault_ns": int(2e6 * wobble),
                        }
                    )
    return {
        "schema": "tdpmmu.versus/1",
        "seed": 7,
        "host": {"cpus": 2},
        "build": {"profile": "release"},
        "config": {"kernel_profile": "6.12", "memory_bytes": [size << 30 for size in sizes], "reps": reps},
        "limits": {"swap_ns": 5.8, "stable": True},
        "rows": rows,
    }


def reclaim(kinds: tuple[str, ...] = ("counter", "ipi", "rcu")) -> Raw:
    """A result of `bench walk --reclaim`: rows as the native side writes them, kind after kind."""
    walk = {"counter": 61.0, "ipi": 18.5, "rcu": 12.0}
    rows: list[Raw] = []
    for kind in kinds:
        deferred = kind in ("rcu", "counter")

        def row(what: str, ns: float | None, kind: str = kind, **more: Any) -> None:
            base = {"readers": 1, "scaling": None, "p99": None, "max": None, "pages": None, "stall_ms": None}
            rows.append(
                {
                    "name": f"{what}, {kind}",
                    "ns": ns,
                    "ratio": None,
                    "of": None,
                    "count": 100,
                    "goal": None,
                    "reclaim": kind,
                    "what": what,
                    **base,
                    **more,
                }
            )

        row("walk", walk[kind], scaling=1.0, ratio=walk[kind] / walk["ipi"], of="ipi")
        spread = 2.6 if kind == "counter" else 1.02
        row(
            "walk", walk[kind] * spread, readers=2, scaling=spread, ratio=walk[kind] * spread / 18.9, of="ipi"
        )
        row("free", 22_000.0 if deferred else 6_100.0, p99=41_000, max=90_000)
        row("waiting", None, pages=420 if deferred else 0)
        row("stalled-free", 20_100_000.0, stall_ms=20)
        row("stalled-call", 9_000.0 if deferred else 20_000_000.0, stall_ms=20)
        row("stalled-waiting", None, pages=34_000 if deferred else 0, stall_ms=20)
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
