"""The scene process-exit: a process drops a large root and ends at once, with the teardown still under way.

The kernel's own version of the question is a module that must not go away under a work item. Here the process
is what goes away: its workers must neither hold it up, nor run on in memory that is no longer there. A child
process builds a guest, lets the vCPU drop its root and leaves, in each of four ways; measured are its exit
code and the time from the decision to leave until the process is gone. Anything but the expected exit code,
output on stderr that Python itself did not write, or a child that does not end, is a violation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from tdpmmu import _names, _native, units
from tdpmmu.errors import InternalError, OracleViolation, StallError

__all__ = ["WAYS", "play"]

#: How the process ends, and with which exit code: `exception` is Python's own for one that nobody caught.
WAYS = {"sys_exit": 0, "os_exit": 0, "exception": 1, "thread": 0}
_HANGS_AFTER = 120.0
_POLL = 0.05
Progress = Callable[[str, float], object]


def play(
    request: dict[str, Any], *, progress: Progress | None = None, timeout: float | None = None
) -> dict[str, Any]:
    """Play the scenes of a `bench drop` request: process-exit here, the others below; times in ns.

    Raises:
        OracleViolation: a process hung, crashed or talked; what was measured is in `partial`.
        StallError: not finished within `timeout` seconds.
        InvalidArgument, OutOfTableMemory: as in `bench.drop`.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    others = [scene for scene in request["scenes"] if scene != _names.PROCESS_EXIT]
    # Alone, the request is still checked below: that brings host, build, limits and the effective settings.
    native = {**request, "scenes": others or [_names.scenes_of("drop")[0]]}
    if not others:
        native.update(memory_bytes=units.PAGE_BYTES[request["page"]] * 16, drop_loop=0, check=False, reps=1)
    result: dict[str, Any] = json.loads(
        _native.bench("drop", json.dumps(native), progress=progress, timeout=timeout)
    )
    settings = _settings(result["runs"], _unmeasured(result["runs"]))
    if not others:
        result["runs"] = []
    result["config"] = {**result.get("config", {}), **request}
    total = len(settings) * request["reps"] * len(WAYS)
    done = 0
    for rep in range(request["reps"]):
        for about in settings:
            run = {**about, "rep": rep, "memory_bytes": request["memory_bytes"], "violation_list": []}
            ends: dict[str, Any] = {}
            for way in WAYS:
                name = f"{about['design']}: a process ends ({way})"

                def tick(name: str = name, part: float = done / total) -> None:
                    if progress is not None:
                        progress(name, part)
                    if deadline is not None and time.monotonic() > deadline:
                        raise StallError(f"timeout: not finished within {timeout} seconds ({name})")

                ends[way], counted = _one(request, run, way, tick)
                run.update(counted)
                done += 1
            run["violation_list"] = [
                wrong for end in ends.values() if (wrong := end.pop("wrong")) is not None
            ]
            run["violations"] = len(run["violation_list"])
            run["process_exit"] = ends
            result["runs"].append(run)
    broken = [wrong for run in result["runs"] for wrong in run["violation_list"]]
    if broken:
        raise OracleViolation(f"process-exit: {broken[0]}", partial=json.dumps(result))
    return result


#: What a run of this scene says of its design, taken from the native side's run of the same settings.
_SAID: tuple[str, ...] = ("design", "passes", "ownership", "preempt", "tick_ns", "kernel_profile", "flawed")
_SAID += ("workers", "worker_queue")


def _unmeasured(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return every key that runs of the native side have, with nothing in it: a reader may ask for any."""
    return {name: [] if isinstance(value, list) else None for run in runs for name, value in run.items()}


def _settings(runs: list[dict[str, Any]], nothing: dict[str, Any]) -> list[dict[str, Any]]:
    """Return each combination of design and settings once, in the order run; all else as in `nothing`."""
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        if run.get("shadow"):
            continue  # nothing is handed on that could be pending
        about = {**nothing, **{name: run[name] for name in _SAID if name in run}}
        about.update(scene=_names.PROCESS_EXIT, page=run["page"], extrapolated=False, populated_by="bulk")
        found.setdefault(json.dumps(about), about)
    return list(found.values())


def _one(
    request: dict[str, Any], run: dict[str, Any], way: str, tick: Callable[[], None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Let one child leave, and return how it ended and what it had built."""
    job = {
        "way": way,
        "memory": request["memory_bytes"],
        "page": request["page"],
        "levels": request["levels"],
        "design": run["design"],
        "passes": run["passes"],
        "ownership": run["ownership"],
        "preempt": run["preempt"],
        "profile": run["kernel_profile"],
        "workers": request.get("workers", 1),
        "worker_cpus": request.get("worker_cpus", []),
        "worker_queue": request.get("worker_queue"),
        "seed": request["seed"],
    }
    command = [sys.executable, "-m", "tdpmmu._leaver", json.dumps(job)]
    begin = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            ended = _wait(child, begin, tick)
            if ended is None:
                child.kill()
            out, err = child.communicate()
        finally:
            child.kill()
    code = child.returncode
    expected = WAYS[way]
    wrong = _wrong(way, code, expected, ended is None, err)
    try:
        told = json.loads(out)
    except ValueError:
        if wrong is None or (ended is not None and code == expected):
            raise InternalError(f"process-exit: the child said {out!r} {err!r}") from None
        return {"exit_code": code, "expected_exit_code": expected, "exit_ns": None, "wrong": wrong}, {}
    end = {
        "exit_code": code,
        "expected_exit_code": expected,
        "exit_ns": None if ended is None else ended - told["leaves_at_ns"],
        "tables_pending": told["tables_pending"],
        "wrong": wrong and f"{run['design']}: {wrong}",
    }
    return end, {name: told[name] for name in ("sptes", "table_pages", "table_bytes", "vcpus")}


def _wait(child: subprocess.Popen[str], begin: float, tick: Callable[[], None]) -> int | None:
    """Return when the child was gone, on the monotonic clock in ns; None if it does not end."""
    # A pipe's worth of output fits without a reader: the child says one line, and a traceback at most.
    while time.monotonic() - begin < _HANGS_AFTER:
        tick()
        for ended in _exits_within(child, _POLL):
            return ended
    return None


def _exits_within(child: subprocess.Popen[str], seconds: float) -> Iterator[int]:
    try:
        # Unlike `wait` with a timeout, which sleeps between looks, this wakes when the process ends.
        handle = os.pidfd_open(child.pid)
    except OSError:
        try:
            child.wait(seconds)
        except subprocess.TimeoutExpired:
            return
        yield time.monotonic_ns()
        return
    import select

    try:
        ready, _, _ = select.select([handle], [], [], seconds)
        if ready:
            yield time.monotonic_ns()
    finally:
        os.close(handle)


def _wrong(way: str, code: int, expected: int, hung: bool, err: str) -> str | None:
    """Return what is wrong with an end, or None."""
    if hung:
        return f"{way}: the process did not end within {_HANGS_AFTER:.0f} s"
    if code != expected:
        return f"{way}: exit code {code}, expected {expected}: {err.strip()[-400:]}"
    lines = err.splitlines()
    if (
        way == "exception"
        and lines
        and lines[0].startswith("Traceback")
        and lines[-1] == f"RuntimeError: {way}"
    ):
        return None
    return f"{way}: it said {err.strip()[-400:]!r}" if lines else None
