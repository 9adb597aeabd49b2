"""Recordings of real KVM: read, rebuild the tables, verify every old value."""

from __future__ import annotations

import json
import os
from collections.abc import Callable

from tdpmmu import _names, _native
from tdpmmu.bench import between, check_timeout
from tdpmmu.results import Replay

__all__ = ["replay"]


def replay(
    path: str | os.PathLike[str],
    *,
    profile: str | None = None,
    check: bool = False,
    strict: bool = False,
    vm_of: int | None = None,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> Replay:
    """Rebuild the page tables of a recording (ftrace, trace-cmd or perf text, plain or gzip).

    Args:
        path: the recording; `-` is standard input.
        profile: kernel profile, `NAME[,switch=value]`; None takes the parent folder's name, or infers it.
        check: verify every old value. A malformed line is then an error.
        strict: a malformed line is an error.
        vm_of: only the VM of this process id.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Returns:
        The report; `ok` is False where an old value does not chain. That is not an exception.

    Raises:
        OSError: the file cannot be opened or read.
        TraceError: it is not a recording, or (strict) has a malformed line.
        InvalidArgument: an unknown profile, or one that cannot be inferred.
        StallError: not finished within `timeout` seconds.
    """
    if profile is not None:
        _names.profile(profile)
    if vm_of is not None:
        vm_of = between(vm_of, 0, (1 << 32) - 1, "vm_of")
    text = _native.replay(
        os.fspath(path),
        profile=profile,
        check=check,
        strict=strict or check,
        vm_of=vm_of,
        progress=progress,
        timeout=check_timeout(timeout),
    )
    return Replay.from_raw(json.loads(text))
