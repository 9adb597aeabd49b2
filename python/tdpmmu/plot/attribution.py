"""Attribution: where the time of a zap went, by phase, in each thread that paid; and what the others lost."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from tdpmmu.plot import style
from tdpmmu.plot.select import Selection, measured
from tdpmmu.results import BenchRun
from tdpmmu.units import format_ns

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw"]

#: What those lost who did not ask for the zap; not phases of the teardown, so hatched.
_LOSSES = {
    "lock_wait_ns": ("others: wait for mmu_lock", "#D55E00"),
    "kicked_ns": ("others: kicked out of the guest", "#E69F00"),
    "run_delay_ns": ("others: wait for a CPU", "#AAAAAA"),
}
_SAID = {"vcpu": "vCPU", "rcu": "RCU thread"}
_ROLES = {"caller": "caller", "rcu": "RCU thread"}


def draw(figure: Figure, chosen: Selection) -> None:
    """Draw a group a design, a bar a thread that took part, and a bar of what the others lost."""
    runs = chosen.first_scene(
        lambda run: [row for row in run.attribution if "pays" in row] or run.others,
        "no run says who paid; measure again with this version",
    )
    lines = chosen.lines(runs)
    rows: list[tuple[str, str, dict[str, float], bool]] = []
    for name, same in lines.items():
        found = _threads(same)
        rows += [(name, thread, parts, False) for thread, parts in found.items()]
        lost = {field: _median(run.others or {} for run in same)(field) for field in _LOSSES}
        rows.append((name, "the others lost", lost, True))
    figure.set_size_inches(11, 1.9 + 0.34 * len(rows) + 0.12 * len(lines))
    axes = figure.add_subplot()
    places, at, last = [], 0.0, None
    for name, *_ in rows:
        at += 0 if last is None else 1.0 if name == last else 1.55
        places.append(at)
        last = name
    widest = max((sum(parts.values()) for _, _, parts, _ in rows), default=1.0) or 1.0
    used: dict[str, Any] = {}
    for place, (_, _, parts, hatched) in zip(places, rows, strict=True):
        left = 0.0
        legend = _LOSSES if hatched else style.PHASES
        for part, (label, colour) in legend.items():
            width = parts.get(part, 0.0)
            if width <= 0:
                continue
            bar = axes.barh(
                place, width, left=left, height=0.78, color=colour, label=label,
                hatch="////" if hatched else None, edgecolor="white", linewidth=0.3,
            )  # fmt: skip
            used.setdefault(label, bar)
            if width > 0.07 * widest:
                dark = colour in ("#0072B2", "#555555", "#D55E00", "#009E73") and not hatched
                text = format_ns(width)
                axes.text(
                    left + width / 2, place, text, ha="center", va="center", fontsize=8.5,
                    color="white" if dark else "black",
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1} if hatched else None,
                )  # fmt: skip
            left += width
        axes.text(left + 0.008 * widest, place, format_ns(left), va="center", fontsize=8.5, color="#444444")
    axes.set_yticks(places, [thread for _, thread, _, _ in rows])
    indent = 26 + 5.6 * max(len(thread) for _, thread, _, _ in rows)
    for name in lines:
        own = [place for place, row in zip(places, rows, strict=True) if row[0] == name]
        axes.annotate(
            name.replace(" (flawed)", "\n(flawed)").replace(", ", "\n"),
            (0, (own[0] + own[-1]) / 2),
            xytext=(-indent, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="center",
            fontweight="bold",
        )
    axes.invert_yaxis()
    axes.set_xlim(0, widest * 1.12)
    style.ns_axis(axes.xaxis)
    axes.set_xlabel("time")
    style.bare(axes, "x")
    reps = max(len(same) for same in lines.values())
    note = f"; medians of {reps} repetitions" if reps > 1 else ""
    style.title(figure, _finding(lines), measured(runs[0]) + note)
    style.below(figure, 4, used.values())


def _median(objects: Any) -> Any:
    found = list(objects)
    return lambda name: float(statistics.median([item.get(name) or 0 for item in found] or [0]))


def _threads(runs: list[BenchRun]) -> dict[str, dict[str, float]]:
    """Return ns by phase of each thread that took part, the median over repetitions of each phase."""
    parts: dict[str, list[Any]] = {}
    for run in runs:
        paid = [row for row in run.attribution if row.get("pays")]
        # Whoever made the request is in it from end to end. The others have a life beside it, a guest or
        # sleep, that no teardown costs.
        asker = "caller" if any(row["role"] == "caller" for row in paid) else "vcpu"
        for row in paid:
            if row["role"] == asker:
                own = row["ns"]
            else:
                own = {phase: ns for phase, ns in row["ns"].items() if phase != "other"}
            if any(own.values()):
                # One caller and one RCU thread: their role says more than their name.
                label = str(_ROLES.get(row["role"], row["thread"]))
                parts.setdefault(label, []).append(own)
    return {label: {phase: _median(found)(phase) for phase in style.PHASES} for label, found in parts.items()}


def _finding(lines: dict[str, list[BenchRun]]) -> str:
    """Say, for the first designs, which role spent most of the CPU time of the teardown."""
    said = []
    for name, runs in lines.items():
        cpu: dict[str, float] = {}
        for run in runs:
            for role, ns in ((run.teardown or {}).get("cpu_ns") or {}).items():
                cpu[role] = cpu.get(role, 0) + ns
        total = sum(cpu.values())
        if total and not runs[0].flawed:
            role = max(cpu, key=lambda role: cpu[role])
            said.append(f"{100 * cpu[role] / total:.0f} % in the {_SAID.get(role, role)} under {name}")
    return "CPU time of the teardown: " + ", ".join(said[:4]) if said else "Where the time of a zap went"
