"""Recordings of real KVM: rebuild their tables and verify every old value, or run their operations again."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tdpmmu import _names, _native
from tdpmmu.bench import between, check_timeout
from tdpmmu.recorded import ConformReport, Replay

__all__ = ["blank", "conform", "predict", "recordings_in", "replay"]

_TRACES = ("trace.txt.gz", "trace.txt")
_SCRIPT = "script.json"


def replay(
    path: str | os.PathLike[str],
    *,
    profile: str | None = None,
    check: bool = False,
    strict: bool = False,
    vm_of: int | None = None,
    what_if: str | None = None,
    perfetto: str | os.PathLike[str] | None = None,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> Replay:
    """Rebuild the page tables of a recording (trace.dat; ftrace, trace-cmd or perf text, plain or gzip).

    Args:
        path: the recording; `-` is standard input.
        profile: kernel profile, `NAME[,switch=value]`; None takes the parent folder's name, or infers it.
        check: verify every old value. A malformed line is then an error.
        strict: a malformed line is an error.
        vm_of: only the VM of this process id.
        what_if: a zap design, by name: the recorded zaps run through it for real, on trees of the recorded
            shape, and the report tells whom they blocked. Its ns are measured on this machine.
        perfetto: write a Perfetto trace of the recording to this file.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Returns:
        The report; `ok` is False where an old value does not chain. That is not an exception.

    Raises:
        OSError: the file cannot be opened or read, or `perfetto` cannot be written.
        TraceError: it is not a recording, or (strict) has a malformed line.
        InvalidArgument: an unknown profile or design, or a profile that cannot be inferred.
        StallError: not finished within `timeout` seconds.
    """
    if profile is not None:
        _names.profile(profile)
    if vm_of is not None:
        vm_of = between(vm_of, 0, (1 << 32) - 1, "vm_of")
    if what_if is not None:
        _names.design(what_if, "what_if")
    text = _native.replay(
        os.fspath(path),
        profile=profile,
        check=check,
        strict=strict or check,
        vm_of=vm_of,
        what_if=what_if,
        perfetto=None if perfetto is None else os.fspath(perfetto),
        progress=progress,
        timeout=check_timeout(timeout),
    )
    return Replay.from_raw(json.loads(text))


def recordings_in(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> tuple[list[Path], list[Path]]:
    """Return the recordings that folders hold: those with a script, and those without one. No units.

    A folder that is a recording, or holds none, is taken as it is. Of a folder of recordings, or of folders
    of them (`kvm-traces`, `kvm-traces/6.12`), its recordings are taken, in the order of their names; only
    those appear in the second list, where nobody asked for the recording by its name.

    Raises:
        OSError: a folder cannot be listed.
    """
    given = [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)
    scripted: list[Path] = []
    bare: list[Path] = []
    for path in map(Path, given):
        found = [] if _is_recording(path) else [p for depth in ("*", "*/*") for p in path.glob(depth)]
        found = sorted(p for p in found if _is_recording(p))
        bare += [p for p in found if not (p / _SCRIPT).exists()]
        scripted += [p for p in found if (p / _SCRIPT).exists()] if found else [path]
    return scripted, bare


def _is_recording(path: Path) -> bool:
    return any((path / name).exists() for name in (*_TRACES, _SCRIPT))


def conform(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    profile: str | None = None,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> ConformReport:
    """Run recordings' operations through the engine and compare every SPTE transition with what KVM did.

    Only operations, the host's answers and the order of events are taken from a recording; every value is
    computed.

    Args:
        paths: folders with `trace.txt.gz`, `script.json` and `params.txt`, one or many; a folder of such
            folders stands for those in it that have a script (`recordings_in`).
        profile: kernel profile, `NAME[,switch=value]`; None is the name of the folder above it.
        progress: called as `progress(phase, fraction)` on the calling thread.
        timeout: seconds; None is for ever.

    Returns:
        The report, in counts of transitions; `ok` is False where something differs. That is not an exception.

    Raises:
        OSError: a file cannot be opened or read.
        TraceError: a recording without a script, or a file that breaks its format.
        InvalidArgument: no recording, or an unknown profile.
        StallError: not finished within `timeout` seconds.
        InternalError: the engine did not come to an end.
    """
    scripted, _ = recordings_in(paths)
    folders = [os.fspath(path) for path in scripted]
    if profile is not None:
        _names.profile(profile)
    text = _native.conform(folders, profile=profile, progress=progress, timeout=check_timeout(timeout))
    return ConformReport.from_raw(json.loads(text))


def predict(
    path: str | os.PathLike[str],
    *,
    profile: str | None = None,
    progress: Callable[[str, float], object] | None = None,
    timeout: float | None = None,
) -> dict[str, Any]:
    """Return what the engine does for a recording's operations, without a look at what KVM made of them.

    It is the same for a copy that `blank` made. Units are those of the names; gfns are hexadecimal text.

    Raises:
        OSError, TraceError, InvalidArgument, StallError, InternalError: see `conform`.
    """
    if profile is not None:
        _names.profile(profile)
    text = _native.predict(
        os.fspath(path), profile=profile, progress=progress, timeout=check_timeout(timeout)
    )
    return dict(json.loads(text))


def blank(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Copy a recording to the folder `out` without the values that a prediction must not need. No units.

    Raises:
        OSError: a file cannot be read or written.
        TraceError: the recording cannot be read.
    """
    _native.blank(os.fspath(path), os.fspath(out))
