"""Protocols searched for the interleaving that breaks them: the same engine, on a simulated platform.

A simulated run is a function of its seed and schedule: what it found can be replayed, shortened and told.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tdpmmu import _names, _native, results, units
from tdpmmu.bench import between, check_timeout
from tdpmmu.errors import InvalidArgument
from tdpmmu.found import (
    AllocationFailures,
    Exhibit,
    Exploration,
    Museum,
    Protocol,
    Story,
    Torture,
)

__all__ = [
    "allocation_failures",
    "demo",
    "exhibits",
    "explain",
    "explore",
    "protocols",
    "simulate",
    "torture",
]

Progress = Callable[[str, float], object]
_U64 = (1 << 64) - 1
#: A program, as a name or as data: see `protocols`, and docs/simulation.md for the data.
Program = str | Mapping[str, Any]


def _ask(
    kind: str, config: Mapping[str, Any], progress: Progress | None, timeout: float | None
) -> dict[str, Any]:
    """Return the native side's answer; settings that are None are left to their defaults there."""
    told = json.dumps({name: value for name, value in config.items() if value is not None})
    return dict(json.loads(_native.prove(kind, told, progress=progress, timeout=check_timeout(timeout))))


def _program(program: Program) -> dict[str, Any]:
    if isinstance(program, str):
        return {"protocol": program}
    if isinstance(program, Mapping):
        return {"program": dict(program)}
    raise TypeError(f"program: expected a name or an object, not {type(program).__name__}")


def _known(design: str | None, profile: str | None) -> None:
    """Refuse a design or a profile that nobody knows."""
    if design is not None:
        _names.design(design, "design")
    if profile is not None:
        _names.profile(profile)


def _count(value: int | None, most: int, name: str, least: int = 1) -> int | None:
    return None if value is None else between(value, least, most, name)


def _seconds(value: float | None, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r}: expected seconds, not {type(value).__name__}")
    if not math.isfinite(value) or value <= 0:
        raise InvalidArgument(f"{name}={value!r}: must be a finite number of seconds above 0")
    return float(value)


def _faults(faults: str | Iterable[str] | None) -> list[str] | None:
    if faults is None:
        return None
    return [faults] if isinstance(faults, str) else [str(fault) for fault in faults]


def protocols() -> list[Protocol]:
    """Return the programs that `explore` knows by name: what races with what. No units."""
    found = _ask("protocols", {}, None, None)["protocols"]
    return [Protocol(str(p["name"]), str(p["about"]), int(p.get("threads") or 0)) for p in found]


def explore(
    program: Program,
    *,
    design: str | None = None,
    profile: str | None = None,
    passes: str | None = None,
    ownership: str | None = None,
    schedules: int | None = None,
    seconds: float | None = None,
    seed: int | None = None,
    memory: str | None = None,
    strategy: str | None = None,
    depth: int | None = None,
    preemptions: int | None = None,
    jobs: int | None = None,
    faults: str | Iterable[str] | None = None,
    bug: str | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> Exploration:
    """Search a program's interleavings for one that breaks a rule; shorten it and tell it.

    Args:
        program: a name from `protocols()`, or a program as data (`machine`, `setup`, `threads`).
        design: the zap design; None is the profile's own.
        profile: kernel profile, `NAME[,switch=value]`.
        passes: zap passes such as `1G,root`; None is the design's.
        ownership: who owns the first reference, `vcpu` or `mmu`; None is the design's.
        schedules: how many to try, a count; None is the default budget.
        seconds: stop after so many seconds, whatever has been tried.
        seed: of the search; the same seed finds the same, on any number of jobs. None is 0.
        memory: `sc`, `tso` (store buffers) or `mix`.
        strategy: `random`, `pct`, `dfs`, `targeted` or `mix`.
        depth: of `pct`: ordering constraints of the bugs it is to find, a count.
        preemptions: of `dfs`: switches that no thread asked for, at most, a count.
        jobs: threads that search; None is one per CPU.
        faults: fault plans such as `alloc=7` or `worker=die`.
        bug: a bug of the museum that is switched on.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Returns:
        What was searched and found. A violation is a result, not an exception.

    Raises:
        InvalidArgument: a name that is not known, or a program that breaks a rule.
        StallError: not finished within `timeout` seconds.
    """
    _known(design, profile)
    config = {
        **_program(program),
        "design": design,
        "profile": profile,
        "passes": passes,
        "ownership": ownership,
        "schedules": _count(schedules, _U64, "schedules"),
        "seconds": _seconds(seconds, "seconds"),
        "seed": _count(seed, _U64, "seed", 0),
        "memory": memory,
        "strategy": strategy,
        "depth": _count(depth, 64, "depth"),
        "preemptions": _count(preemptions, 64, "preemptions", 0),
        "jobs": _count(jobs, 4096, "jobs"),
        "faults": _faults(faults),
        "bug": bug,
    }
    return Exploration.from_raw(_ask("explore", config, progress, timeout))


def allocation_failures(
    program: Program,
    *,
    design: str | None = None,
    profile: str | None = None,
    seed: int | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> AllocationFailures:
    """Run a program once per allocation it makes, with that one failing, and once more for all from it on.

    Each run must end with the typed error, leak nothing, and succeed when it is tried again.

    Args:
        program: a name from `protocols()`, or a program as data.
        design: the zap design; None is the profile's own.
        profile: kernel profile, `NAME[,switch=value]`.
        seed: of the schedule.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Raises:
        InvalidArgument: a name that is not known, or a program that breaks a rule.
        StallError: not finished within `timeout` seconds.
    """
    _known(design, profile)
    config = {
        **_program(program),
        "design": design,
        "profile": profile,
        "seed": _count(seed, _U64, "seed", 0),
    }
    return AllocationFailures.from_raw(_ask("faults", config, progress, timeout))


def exhibits() -> list[Exhibit]:
    """Return the museum's bugs: title, cause, interleaving and reference as text. No units."""
    return [Exhibit.from_raw(bug) for bug in _ask("museum", {}, None, None)["bugs"]]


def demo(
    bugs: str | Iterable[str] | None = None,
    *,
    seeds: int | None = None,
    schedules: int | None = None,
    seed: int | None = None,
    jobs: int | None = None,
    story: bool | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> Museum:
    """Switch bugs of the museum on, one by one, and search until an oracle fires; then search with it off.

    Args:
        bugs: their numbers, such as `21` or `4a`; None is all.
        seeds: searches per bug, of which the median counts.
        schedules: how many to try per search, a count; None is each bug's own budget.
        seed: the first seed.
        jobs: threads that search; None is one per CPU.
        story: tell each catch as text; None: only where one bug was asked for.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Raises:
        InvalidArgument: a bug that is not in the museum.
        StallError: not finished within `timeout` seconds.
    """
    ids = [] if bugs is None else [bugs] if isinstance(bugs, str) else [str(bug) for bug in bugs]
    if bugs is not None and not ids:
        raise InvalidArgument("bugs=[]: expected at least one, or None for all")
    config = {
        "ids": ids,
        "seeds": _count(seeds, 1000, "seeds"),
        "schedules": _count(schedules, _U64, "schedules"),
        "seed": _count(seed, _U64, "seed", 0),
        "jobs": _count(jobs, 4096, "jobs"),
        "story": len(ids) == 1 if story is None else bool(story),
    }
    return Museum.from_raw(_ask("demo", config, progress, timeout))


def torture(
    seconds: float = 10.0,
    *,
    seed: int | None = None,
    threads: int | None = None,
    profile: str | None = None,
    design: str | None = None,
    faults: str | Iterable[str] | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> Torture:
    """Perform random operations from many real threads, under every oracle that can listen there.

    Args:
        seconds: how long, in seconds.
        seed: repeats each thread's operations; None is drawn.
        threads: how many act, a count; None is a few per CPU.
        profile: kernel profile, `NAME[,switch=value]`; None is several in turn.
        design: the zap design; None is the sound ones in turn.
        faults: fault plans such as `yield=all` or `worker=stall`.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Raises:
        InvalidArgument: a value out of range, or a name that is not known.
        StallError: not finished within `timeout` seconds.
    """
    _known(design, profile)
    config = {
        "seconds": _seconds(seconds, "seconds"),
        "seed": _count(seed, _U64, "seed", 0),
        "threads": _count(threads, 4096, "threads"),
        "profile": profile,
        "design": design,
        "faults": _faults(faults),
    }
    return Torture.from_raw(_ask("torture", config, progress, timeout))


def explain(
    failure: str | os.PathLike[str] | Exploration | Museum,
    *,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> Story:
    """Tell a failure: what each thread did, with SPTE values and reference counts. No units.

    Args:
        failure: a seed such as `v1:...`, a result, or a file that `-o FILE.json` wrote.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Returns:
        The story; its `text` is for a terminal, and a notebook shows it as HTML.

    Raises:
        OSError: the file cannot be read.
        InvalidArgument: neither a seed nor a result that holds a failure.
        StallError: not finished within `timeout` seconds.
    """
    if isinstance(failure, (Exploration, Museum)):
        text = failure.to_json()
    else:
        text = os.fspath(failure)
        if not text.lstrip().startswith(("v1:", "{")):
            text = Path(text).read_text(encoding="utf-8", errors="replace")
    return Story.from_raw(_ask("explain", {"text": text, "html": True}, progress, timeout))


def simulate(
    *,
    vcpus: int = 416,
    memory: int | str = "12T",
    page: str = "4K",
    cpus: int | None = None,
    designs: str | Sequence[str] = "sync",
    passes: str | Sequence[str] | None = None,
    preempt: str | None = None,
    profile: str | None = None,
    ownership: str | None = None,
    workers: int | None = None,
    seed: int | None = None,
    costs: Mapping[str, float] | None = None,
    error_sizes: Iterable[int | str] = (),
    error_reps: int | None = None,
    progress: Progress | None = None,
    timeout: float | None = None,
) -> results.BenchResult:
    """Zap a guest in virtual time: as many vCPUs and as much memory as you like, on a simulated host.

    Args:
        vcpus: vCPUs of the guest, a count.
        memory: guest memory in bytes, or a size such as `12T`.
        page: page size, `4K`, `2M` or `1G`.
        cpus: CPUs of the simulated host; None is a few more than vCPUs.
        designs: zap designs by name; `all` is the sound ones.
        passes: zap passes such as `1G,root`, each for a run of its own; None is each design's.
        preempt: `none`, `voluntary` or `full`.
        profile: kernel profile, `NAME[,switch=value]`.
        ownership: who owns the first reference, `vcpu` or `mmu`; None is the design's.
        workers: worker threads of designs that have a queue, a count.
        seed: of the guest's accesses.
        costs: prices in ns by name; those that are missing are calibrated on this host.
        error_sizes: also zap guests of these sizes for real, in bytes or as sizes, and say how far off the
            model is.
        error_reps: repetitions of each of these, a count.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Returns:
        As of `bench.zap`, times in ns of virtual time; `raw` has `machine`, `model` and `model_error`.

    Raises:
        InvalidArgument: a value out of range, or a name that is not known.
        OutOfTableMemory: more than this host can hold.
        StallError: not finished within `timeout` seconds.
    """
    if profile is not None:
        _names.profile(profile)
    names = [designs] if isinstance(designs, str) else list(designs)
    for name in names:
        if name != "all":
            _names.design(name, "designs")
    config = {
        "vcpus": _count(vcpus, 4096, "vcpus"),
        "memory_bytes": units.parse_size(memory),
        "page": page,
        "cpus": _count(cpus, 1 << 16, "cpus"),
        "designs": names,
        "passes": passes,
        "preempt": preempt,
        "profile": profile,
        "ownership": ownership,
        "workers": _count(workers, 4096, "workers"),
        "seed": _count(seed, _U64, "seed", 0),
        "costs": None if costs is None else {str(name): float(ns) for name, ns in costs.items()},
        "error_sizes": [units.parse_size(size) for size in error_sizes],
        "error_reps": _count(error_reps, 100, "error_reps"),
    }
    return results.BenchResult.from_raw(_ask("simulate", config, progress, timeout))
