"""Experiments: how long vCPUs are blocked, what a memslot update takes, what one operation costs.

Each function validates, runs the experiment in the native part with the GIL released, and returns a frozen
result. `progress(phase, fraction)` is called on the calling thread; `timeout` is in seconds (None: for ever).
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from tdpmmu import _names, _native, units
from tdpmmu.errors import InvalidArgument
from tdpmmu.results import BenchResult, MicroResult
from tdpmmu.shadow import PAGINGS

__all__ = ["dirty", "drop", "fault", "populate", "rcu", "walk", "zap"]

Progress = Callable[[str, float], object]
Size = str | SupportsIndex
MAX_VCPUS = 1024
MAX_WORKERS = 1024
AD_MIX = ("clean", "accessed", "dirty")
#: Whose pages a single operation of the shadow MMU uses.
SHADOW_DESIGN = "shadow-gen"
#: Fewest shadow pages of a VM (KVM_MIN_ALLOC_MMU_PAGES).
LEAST_QUOTA = 64
#: `bench dirty`: how written pages are found.
PROTOCOLS = ("get", "clear-64", "clear", "init-set", "ring", "d-bits")


def config(
    *,
    memory: Size = "1G",
    page: Size = "4K",
    vcpus: int = 2,
    levels: int = 4,
    design: str | Iterable[str] = "all",
    scene: str | Iterable[str] | None = None,
    passes: str | Iterable[str] | None = None,
    ownership: str | None = None,
    preempt: str | Iterable[str] = "full",
    tick: Size = "4ms",
    profile: str = "6.12",
    reps: int = 1,
    seed: int | None = None,
    working_set: Size | None = None,
    arrival_ns: int | None = None,
    populate: str = "bulk",
    writeback: str | None = None,
    ad_mix: str | None = None,
    check: bool = True,
    drop_loop: int | None = None,
    workers: int | None = None,
    max_memory: Size | None = None,
    sharing: str | None = None,
    worker_cpus: Iterable[int] | None = None,
    worker_queue: str | None = None,
    vcpu_cpus: Iterable[int] | None = None,
    churns: int | None = None,
    protocol: str | Iterable[str] | None = None,
    eager: str | Iterable[str] | None = None,
    density: int | Iterable[int] | None = None,
    paging: str | None = None,
    quota: int | None = None,
    reclaim: str | Iterable[str] | None = None,
    timeline: bool = False,
    perfetto: str | os.PathLike[str] | None = None,
    hlog: str | os.PathLike[str] | None = None,
    experiment: str = "zap",
) -> dict[str, Any]:
    """Return the configuration object that the native side takes, after checking every value.

    Sizes are in bytes or text with a binary suffix, `tick` in ns or text with a unit. None leaves the choice
    to the design's historic default, then the profile, or takes the experiment's default. A seed is
    drawn where none is given. `design`, `scene`, `passes` and `preempt` take several: a run each.

    Args:
        memory: guest memory in bytes.
        page: size of the mappings, one of 4K, 2M, 1G.
        vcpus: running vCPU threads.
        levels: 4 or 5.
        design: zap designs; `all` is every sound one of the TDP MMU, `shadow` every one of the shadow MMU; a
            flawed one must be named.
        scene: what happens to the guest; None is the experiment's usual one, `all` is each of them.
        passes: zap passes, such as `4K,2M,1G,root`.
        ownership: who owns a root's first reference, `vcpu` or `mmu`.
        preempt: `none`, `voluntary` or `full`.
        tick: CPU time in ns after which a task is asked to yield.
        profile: kernel profile.
        reps: repetitions of each run.
        seed: of the guests' accesses.
        working_set: what each vCPU touches, in bytes.
        arrival_ns: a vCPU's accesses are this many ns apart (open loop).
        populate: `bulk` or `fault`.
        writeback: A/D of removed leafs, `none` or `bitmap`.
        ad_mix: A/D of the leafs before, `clean`, `accessed` or `dirty`.
        check: a further repetition, untimed, with every oracle listening.
        drop_loop: drops of small roots (`bench drop`), a count.
        workers: worker threads of designs that have a queue.
        max_memory: refuse to use more than this, in bytes.
        sharing: how the vCPUs' working sets overlap, `local`, `pipeline` or `global`.
        worker_cpus: CPUs that the workers are pinned to, in turn.
        worker_queue: `per-vm` or `system`, against the design's own.
        vcpu_cpus: CPUs that the vCPUs are pinned to, in turn.
        churns: cycles of the scene slot-churn, a count.
        protocol: how written pages are found, of `PROTOCOLS`, several or `all` (`bench dirty`); None is all.
        eager: split huge pages when logging starts, `on`, `off` or both (`bench dirty`); None is what
            makes sense.
        density: one page in so many is written, a count, or several (`bench dirty`); None is 1, 8 and 512.
        paging: of designs of the shadow MMU: `direct` (hardware translates guest addresses) or `guest` (the
            guest's own tables are shadowed); None is direct.
        quota: most shadow pages that a VM may have, a count; None is no limit.
        reclaim: how freed shadow pages are kept from lockless walkers, by name, several or `all`: a run each;
            None is `ipi`. `bench walk`: what each of them costs; None walks the TDP MMU.
        timeline: keep each thread's phases in the result, for `plot --kind timeline`.
        perfetto: write a Perfetto trace to this file.
        hlog: write HdrHistogram logs to this file.
        experiment: what the configuration is for, `zap`, `drop` or one of the micro experiments.

    Raises:
        InvalidArgument: a value breaks a rule; the message names it.
        TypeError: a value of the wrong type.
    """
    page_text = units.parse_page(page)
    memory_bytes = units.parse_size(memory, "memory")
    if levels not in (4, 5) or isinstance(levels, (bool, float)):
        raise InvalidArgument(f"levels={levels!r}: expected 4 or 5")
    limit = units.max_gfn(levels) * 4096
    step = units.PAGE_BYTES[page_text]
    if memory_bytes == 0 or memory_bytes % step or memory_bytes > limit:
        raise InvalidArgument(
            f"memory={memory!r}: must be a multiple of the page size {page_text}, at least one page "
            f"and at most {units.format_size(limit)} with {levels} levels"
        )
    out: dict[str, Any] = {
        "memory_bytes": memory_bytes,
        "page": page_text,
        "vcpus": between(vcpus, 1, MAX_VCPUS, "vcpus"),
        "levels": levels,
        # `all` stays: which designs are sound under the profile is decided below.
        "designs": ["all"] if design in ("all", ("all",), ["all"]) else _names.designs(design),
        "preempt": _one_or_list(_names.each_of(preempt, _names.PREEMPT, "preempt")),
        "tick_ns": units.parse_time(tick, "tick"),
        "kernel_profile": _names.profile(profile),
        "reps": between(reps, 1, 1_000_000, "reps"),
        "seed": secrets.randbits(63) if seed is None else between(seed, 0, (1 << 64) - 1, "seed"),
        "populate": _names.one_of(populate, _names.POPULATE, "populate"),
        "check": bool(check),
    }
    if out["tick_ns"] == 0:
        raise InvalidArgument(f"tick={tick!r}: must be above 0")
    if passes is not None:
        out["passes"] = _one_or_list(_names.passes_list(passes))
    if scene is not None:
        out["scenes"] = _names.scenes(scene, experiment)
    if ownership is not None:
        out["ownership"] = _names.one_of(ownership, _names.OWNERSHIP, "ownership")
    if working_set is not None:
        out["working_set_bytes"] = units.parse_size(working_set, "working_set")
    if arrival_ns is not None:
        out["arrival_ns"] = between(arrival_ns, 1, 10**12, "arrival_ns")
    if writeback is not None:
        out["writeback"] = _names.one_of(writeback, _names.WRITEBACK, "writeback")
    if ad_mix is not None:
        out["ad_mix"] = _names.one_of(ad_mix, AD_MIX, "ad_mix")
    if workers is not None:
        out["workers"] = between(workers, 1, MAX_WORKERS, "workers")
    if drop_loop is not None:
        out["drop_loop"] = between(drop_loop, 0, 10**9, "drop_loop")
    if max_memory is not None:
        out["max_memory_bytes"] = units.parse_size(max_memory, "max_memory")
    if sharing is not None:
        out["sharing"] = _names.one_of(sharing, _names.SHARING, "sharing")
    for name, cpus in (("worker_cpus", worker_cpus), ("vcpu_cpus", vcpu_cpus)):
        if cpus is not None:
            out[name] = cpu_numbers(cpus, name)
    if worker_queue is not None:
        out["worker_queue"] = _names.one_of(worker_queue, _names.QUEUES, "worker_queue")
    if churns is not None:
        out["churns"] = between(churns, 1, 10**6, "churns")
    for name, given in (("protocol", protocol), ("eager", eager), ("density", density)):
        if given is not None and experiment != "dirty":
            raise InvalidArgument(f"{name}={given!r}: an option of bench dirty, not of bench {experiment}")
    if protocol is not None:
        found = _names.each_of(protocol, (*PROTOCOLS, "all"), "protocol")
        out["protocols"] = list(PROTOCOLS) if "all" in found else found
    if eager is not None:
        out["eager"] = _names.each_of(eager, ("on", "off"), "eager")
    if density is not None:
        several = density if isinstance(density, Iterable) and not isinstance(density, str) else [density]
        out["densities"] = [between(each, 1, memory_bytes // 4096, "density") for each in several]
        if not out["densities"]:
            raise InvalidArgument("density: expected at least one")
    out.update(_shadow(out["designs"], experiment, paging=paging, quota=quota, reclaim=reclaim))
    if timeline:
        out["timeline"] = True
    for name, path in (("perfetto", perfetto), ("hlog", hlog)):
        if path is not None:
            out[name] = os.fspath(path)
    return out


def _shadow(
    designs: list[str],
    experiment: str,
    *,
    paging: str | None,
    quota: int | None,
    reclaim: str | Iterable[str] | None,
) -> dict[str, Any]:
    """Return the part of a configuration that only the shadow MMU has, after checking it."""
    out: dict[str, Any] = {}
    if paging is not None:
        out["paging"] = _names.one_of(paging, PAGINGS, "paging")
    if quota is not None:
        out["quota"] = between(quota, LEAST_QUOTA, (1 << 32) - 1, "quota")
    if reclaim is not None:
        kinds = _names.each_of(reclaim, (*_names.reclaims(), "all"), "reclaim")
        out["reclaim"] = list(_names.reclaims()) if "all" in kinds else kinds
    if out and not set(designs) & set(_names.shadow_designs()):
        if experiment in ("zap", "drop") or designs != ["all"]:
            name, value = next(iter(out.items()))
            raise InvalidArgument(
                f"{name}={value!r}: of the shadow MMU only; give one of its designs "
                f"({', '.join(_names.shadow_designs())}), or shadow for all of them"
            )
        # A single operation has no zap to compare: the design of most kernels will do.
        out["designs"] = [SHADOW_DESIGN]
    return out


def _one_or_list(values: list[str]) -> str | list[str]:
    return values[0] if len(values) == 1 else values


def cpu_numbers(values: Iterable[int], name: str) -> list[int]:
    """Return CPU numbers, each one that this process may run on.

    Raises:
        InvalidArgument: it may not.
        TypeError: not numbers.
    """
    cpus = [between(cpu, 0, 1 << 20, name) for cpu in values]
    allowed = os.sched_getaffinity(0)
    for cpu in cpus:
        if cpu not in allowed:
            may = ", ".join(map(str, sorted(allowed)))
            raise InvalidArgument(f"{name}={cpu}: this process may not run on that CPU (it may on {may})")
    return cpus


def between(value: object, low: int, high: int, name: str) -> int:
    """Return `value` as an int within bounds, both included.

    Raises:
        InvalidArgument: outside, a bool or a float.
        TypeError: no kind of number.
    """
    number = units.as_int(value, name)
    if not low <= number <= high:
        raise InvalidArgument(f"{name}={value!r}: must be from {low:,} to {high:,}")
    return number


def check_timeout(timeout: float | None) -> float | None:
    """Return a timeout in seconds, None for ever.

    Raises:
        InvalidArgument: negative, or not a number.
        TypeError: not a number type.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(f"timeout={timeout!r}: expected seconds or None, not {type(timeout).__name__}")
    if math.isnan(timeout) or timeout < 0:
        raise InvalidArgument(f"timeout={timeout!r}: must be at least 0 seconds, or None for ever")
    return None if math.isinf(timeout) else float(timeout)


def zap(*, progress: Progress | None = None, timeout: float | None = None, **options: Any) -> BenchResult:
    """Measure a memslot update under running vCPUs: a fast zap of every root. Options: see `config`.

    Returns:
        Times in ns, one run per design and repetition.

    Raises:
        InvalidArgument: an option breaks a rule, or a pair of options makes no sense.
        OutOfTableMemory: the tables do not fit; found before anything is allocated.
        OracleViolation: a check failed during or after the run.
        StallError: not finished within `timeout` seconds.
    """
    return BenchResult.from_raw(_run("zap", options, progress, timeout))


def drop(*, progress: Progress | None = None, timeout: float | None = None, **options: Any) -> BenchResult:
    """Measure how long a vCPU is blocked that drops the last reference to its root. Options: see `config`.

    Returns:
        Times in ns, one run per design and repetition.

    Raises:
        InvalidArgument: an option breaks a rule, or a pair of options makes no sense.
        OutOfTableMemory: the tables do not fit; found before anything is allocated.
        OracleViolation: a check failed during or after the run.
        StallError: not finished within `timeout` seconds.
    """
    return BenchResult.from_raw(_run("drop", options, progress, timeout))


def populate(
    *, progress: Progress | None = None, timeout: float | None = None, **options: Any
) -> MicroResult:
    """Measure mapping a guest, in bulk and through faults, in ns per SPTE. Options and errors: see `zap`."""
    return MicroResult.from_raw(_run("populate", options, progress, timeout))


def fault(*, progress: Progress | None = None, timeout: float | None = None, **options: Any) -> MicroResult:
    """Measure one page fault through the complete path, in ns. Options and errors: see `zap`."""
    return MicroResult.from_raw(_run("fault", options, progress, timeout))


def walk(*, progress: Progress | None = None, timeout: float | None = None, **options: Any) -> MicroResult:
    """Measure a lockless walk, in ns; with `reclaim` what keeps shadow pages for walkers, and its price.

    Options and errors: see `config` and `zap`.
    """
    return MicroResult.from_raw(_run("walk", options, progress, timeout))


def rcu(*, progress: Progress | None = None, timeout: float | None = None, **options: Any) -> MicroResult:
    """Measure an RCU read section and deferred freeing, in ns. Options and errors: see `zap`."""
    return MicroResult.from_raw(_run("rcu", options, progress, timeout))


def dirty(*, progress: Progress | None = None, timeout: float | None = None, **options: Any) -> MicroResult:
    """Measure dirty logging phase by phase, in ns an operation. Options and errors: see `config` and `zap`.

    The phases: enable, first write, harvest, write again, disable, and what the guest pays to be mapped
    huge again.
    """
    return MicroResult.from_raw(_run("dirty", options, progress, timeout))


def _run(
    kind: str, options: dict[str, Any], progress: Progress | None, timeout: float | None
) -> dict[str, Any]:
    request = config(**options, experiment=kind)
    return measure(kind, request, progress=progress, timeout=timeout)


def measure(
    kind: str, request: dict[str, Any], *, progress: Progress | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """Run a checked request (see `config`) and return the result object; times in ns.

    The scene process-exit is played here, by child processes; all others below.

    Raises:
        InvalidArgument, OutOfTableMemory, OracleViolation, StallError: see `zap`.
    """
    from tdpmmu import process_exit

    patience = check_timeout(timeout)
    scenes = request.get("scenes") or ()
    only_shadow = set(request["designs"]) <= set(_names.shadow_designs())
    if only_shadow and _names.PROCESS_EXIT in scenes:
        raise InvalidArgument(
            f"scene={_names.PROCESS_EXIT!r} with design {', '.join(request['designs'])}: the shadow "
            "MMU hands no work on that could be pending; name a design of the TDP MMU"
        )
    if only_shadow or kind != "drop" or not {_names.PROCESS_EXIT, "all"}.intersection(scenes):
        return dict(json.loads(_native.bench(kind, json.dumps(request), progress=progress, timeout=patience)))
    return process_exit.play(request, progress=progress, timeout=patience)
