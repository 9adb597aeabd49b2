"""Experiments: how long vCPUs are blocked, what a memslot update takes, what one operation costs.

Each function validates, runs the experiment in the native part with the GIL released, and returns a frozen
result. `progress(phase, fraction)` is called on the calling thread; `timeout` is in seconds (None: for ever).
"""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from tdpmmu import _names, _native, units
from tdpmmu.errors import InvalidArgument
from tdpmmu.results import BenchResult, MicroResult

__all__ = ["drop", "fault", "populate", "rcu", "walk", "zap"]

Progress = Callable[[str, float], object]
Size = str | SupportsIndex
MAX_VCPUS = 1024
AD_MIX = ("clean", "accessed", "dirty")


def config(
    *,
    memory: Size = "1G",
    page: Size = "4K",
    vcpus: int = 2,
    levels: int = 4,
    design: str | Iterable[str] = "all",
    passes: str | Iterable[str] | None = None,
    ownership: str | None = None,
    preempt: str = "full",
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
) -> dict[str, Any]:
    """Return the configuration object that the native side takes, after checking every value.

    Sizes are in bytes or text with a binary suffix, `tick` in ns or text with a unit. None leaves the choice
    to the design's historic default, then the profile, or takes the experiment's default. A seed is
    drawn where none is given.

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
        "designs": _names.designs(design),
        "preempt": _names.one_of(preempt, _names.PREEMPT, "preempt"),
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
        out["passes"] = _names.passes(passes)
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
        out["workers"] = between(workers, 1, 1024, "workers")
    if drop_loop is not None:
        out["drop_loop"] = between(drop_loop, 0, 10**9, "drop_loop")
    if max_memory is not None:
        out["max_memory_bytes"] = units.parse_size(max_memory, "max_memory")
    return out


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
    """Measure a lockless walk, in ns. Options and errors: see `zap`."""
    return MicroResult.from_raw(_run("walk", options, progress, timeout))


def rcu(*, progress: Progress | None = None, timeout: float | None = None, **options: Any) -> MicroResult:
    """Measure an RCU read section and deferred freeing, in ns. Options and errors: see `zap`."""
    return MicroResult.from_raw(_run("rcu", options, progress, timeout))


def _run(
    kind: str, options: dict[str, Any], progress: Progress | None, timeout: float | None
) -> dict[str, Any]:
    text = json.dumps(config(**options))
    result = json.loads(_native.bench(kind, text, progress=progress, timeout=check_timeout(timeout)))
    assert isinstance(result, dict)
    return result
