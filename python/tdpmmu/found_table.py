"""Tables and stories of what searches found. Counts in full, times in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tdpmmu.found import AllocationFailures, Exhibit, Exploration, Museum, Protocol, Torture, Violation
from tdpmmu.results import BenchResult
from tdpmmu.table import render, render_bench
from tdpmmu.units import format_count, format_ns, format_size

__all__ = [
    "render_allocations",
    "render_exhibit",
    "render_exhibits",
    "render_exploration",
    "render_museum",
    "render_protocols",
    "render_simulation",
    "render_torture",
]

_WIDTH = 110
#: Longest seed that is printed.
_PASTED = 2000


def render_protocols(found: list[Protocol]) -> str:
    """Return the programs by name, with what races in each, as text."""
    rows = [[p.name, format_count(p.threads), p.about] for p in found]
    return render(["protocol", "threads", "what races"], rows, left=(0, 2))


def render_exploration(result: Exploration) -> str:
    """Return what was searched, what that buys, the sites forced, and the story of a violation, as text."""
    lines = [
        f"{result.protocol} under {result.design}, kernel {result.profile}{_aggravated(result)}: "
        f"{format_count(result.schedules)} schedules in {result.seconds:.1f} s, seed {result.seed}"
    ]
    if result.bound.get("text"):
        lines.append(str(result.bound["text"]))
    forced = {name: int(n) for name, n in result.sites_forced.items() if n}
    if forced:
        shown = ", ".join(
            f"{name} {format_count(n)}" for name, n in sorted(forced.items(), key=lambda f: -f[1])
        )
        lines += _wrapped(f"switched at {format_count(len(forced))} sites: {shown}")
    if result.violation is None:
        lines.append("no violation")
    else:
        lines += ["", *_violation(result.violation)]
    return "\n".join(lines) + "\n"


def _aggravated(result: Exploration) -> str:
    """What was wrong on purpose."""
    bug, faults = result.raw.get("bug"), str(result.raw.get("faults") or "")
    told = f", with bug {bug}" if bug else ""
    return told + (f", faults {faults}" if faults not in ("", "none") else "")


def _violation(found: Violation) -> list[str]:
    oracle = f" ({found.oracle})" if found.oracle else ""
    lines = [f"violation: {found.rule}{oracle}: {found.what}"]
    lines.append(f"preemptions in the shortest schedule found: {found.preemptions}")
    if len(found.seed) > _PASTED:
        lines.append(f"replay: the seed has {format_count(len(found.seed))} characters; explain a file of -o")
    elif found.seed:
        lines.append(f"replay: tdpmmu explain '{found.seed}'")
    if found.story:
        lines += ["", found.story.rstrip()]
    return lines


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, _WIDTH, subsequent_indent="    ", break_long_words=False)


def render_exhibits(found: list[Exhibit]) -> str:
    """Return the museum's catalogue, a line a bug, as text."""
    rows = [[bug.id, bug.title, bug.kind, bug.kernels, bug.catcher] for bug in found]
    return render(["bug", "title", "class", "kernels", "shown by"], rows, left=(0, 1, 2, 3, 4))


def render_exhibit(bug: Exhibit) -> str:
    """Return all that the museum knows of one bug, as text."""
    lines = [f"{bug.id}. {bug.title}", f"{bug.kind}; {bug.kernels}; shown by {bug.catcher}"]
    for head, text in (
        ("History", bug.reference),
        ("Cause", bug.cause),
        ("How it comes about", bug.interleaving),
        ("Here", str(bug.raw.get("mutation") or "")),
    ):
        if text:
            lines += ["", *_wrapped(f"{head}: {text}")]
    return "\n".join(lines) + "\n"


def render_museum(result: Museum) -> str:
    """Return a row per bug, the sum, and the stories that were asked for, as text."""
    rows = [
        [
            bug.id,
            bug.title,
            "yes" if bug.caught else "NO",
            "-" if bug.schedules_median is None else format_count(round(bug.schedules_median)),
            bug.oracle or "-",
            bug.catcher,
            "YES" if bug.false_alarm else "no",
        ]
        for bug in result.bugs
    ]
    header = ["bug", "title", "caught", "schedules\n(median)", "oracle", "shown by", "false\nalarm"]
    lines = [render(header, rows, left=(0, 1, 4, 5))]
    alarms = f"{format_count(result.false_alarms)} false alarms with bugs off"
    lines.append(
        f"caught {format_count(result.caught)} of {format_count(len(result.bugs))}; {alarms}; "
        f"{result.seconds:.0f} s"
    )
    for bug in result.bugs:
        if bug.story:
            lines += ["", bug.story.rstrip()]
        if bug.story and bug.seed:
            lines.append(f"replay: tdpmmu explain '{bug.seed}'")
    return "\n".join(lines) + "\n"


def render_torture(result: Torture) -> str:
    """Return how much was done to the real platform, by operation, and what broke, as text."""
    lines = [
        f"{format_count(result.operations)} operations in {result.seconds:.1f} s, seed {result.seed}, "
        f"{format_count(len(result.violations))} violations"
    ]
    done = result.raw.get("by_operation")
    if isinstance(done, Mapping):
        told = [(name, row.get("done")) for name, row in done.items() if isinstance(row, Mapping)]
        shown = ", ".join(f"{name} {format_count(int(n))}" for name, n in told if _whole(n) and n)
        lines += _wrapped(f"operations: {shown}")
    struck = [f for f in result.faults if isinstance(f, Mapping) and f.get("struck")]
    if struck:
        told_faults = ", ".join(f"{f.get('fault')} {format_count(int(f['struck']))}" for f in struck)
        lines += _wrapped(f"faults that struck: {told_faults}")
    proves = result.raw.get("proves")
    if isinstance(proves, Mapping) and proves.get("text"):
        lines += _wrapped(str(proves["text"]))
    lines += [f"violation: {_said(found)}" for found in result.violations[:20]]
    return "\n".join(lines) + "\n"


def _whole(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _said(found: Any) -> str:
    if isinstance(found, Mapping):
        if "what" in found:
            return f"episode {found.get('episode', '?')}: {found['what']}"
        return ", ".join(f"{name} {value}" for name, value in found.items() if value is not None)
    return str(found)


def render_allocations(result: AllocationFailures) -> str:
    """Return which allocations failed in turn, and what was not clean, as text."""
    sites = ", ".join(f"{name} {format_count(int(n))}" for name, n in result.by_site.items() if _whole(n))
    bad = [run for run in result.runs if not run.clean]
    retried = sum(run.retried_ok is True for run in result.runs)
    lines = [
        f"{format_count(result.sites)} allocations ({sites}), each failed alone and with all after it: "
        f"{format_count(len(result.runs))} runs, {format_count(len(result.runs) - len(bad))} clean; "
        f"of those that failed alone {format_count(retried)} succeeded when made again, others did without"
    ]
    lines += [f"not clean: request {run.k} at {run.site}: {_said(run.raw)}" for run in bad]
    return "\n".join(lines) + "\n"


def render_simulation(result: BenchResult) -> str:
    """Return what the simulated zaps took, in virtual time, and by what factor the model is off, as text."""
    cpus = (result.raw.get("machine") or {}).get("cpus")
    lines = [
        f"virtual time on {format_count(int(cpus or 0))} CPUs: computed from calibrated costs, not measured",
        "",
        render_bench(result).rstrip(),
    ]
    for run in result.runs:
        held = run.raw.get("by_count")
        if isinstance(held, Mapping):
            counts = [(name, n) for name, n in held.items() if _whole(n)]
            told = ", ".join(f"{name.replace('_', ' ')} {format_count(int(n))}" for name, n in counts)
            lines += _wrapped(f"{run.design}: leaf tables held by count: {told}")
    error = result.raw.get("model_error")
    if isinstance(error, Mapping) and error.get("rows"):
        rows = [
            [
                format_size(int(row["memory_bytes"])),
                str(row.get("design", "")),
                str(row["field"]),
                format_ns(float(row["measured"]["median"])),
                format_ns(float(row["predicted"])),
                "-" if row.get("factor") is None else f"{row['factor']:.2f}",
            ]
            for row in error["rows"]
        ]
        header = ["guest", "design", "field", "measured\n(median)", "simulated", "factor"]
        heading = f"the model against this host's {error.get('cpus')} CPUs, {error.get('reps')} repetitions"
        lines += ["", heading, "", render(header, rows, left=(0, 1, 2)).rstrip()]
    return "\n".join(lines) + "\n"
