"""A process, an interpreter or a machine that ends while a teardown is still under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import tdpmmu
from conftest import Cli
from tdpmmu import VM, _names, bench, process_exit

WORKERS = tuple(
    info["name"]
    for info in _names.catalogue()["design_info"]
    if "worker" in info["name"] or info["name"] == "system-workqueue"
)
REQUEST: dict[str, Any] = {"page": "4K", "levels": 4, "seed": 1, "memory_bytes": 1 << 26}
RUN: dict[str, Any] = {
    "design": "async-worker",
    "passes": "1G,root",
    "ownership": "vcpu",
    "preempt": "full",
    "kernel_profile": "6.12",
}


def python(code: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, check=False
    )


def test_a_process_may_end_at_any_point_of_a_teardown() -> None:
    result = bench.drop(memory="4G", design=["async-worker", "sync"], scene="process-exit", seed=3)
    assert [run.design for run in result.runs] == ["async-worker", "sync"]
    for run in result.runs:
        assert run.scene == "process-exit"
        assert run.sptes == 1_048_576
        assert run.table_pages == tdpmmu.table_pages("4G")
        assert run.violations == 0
        assert run.process_exit is not None
        assert set(run.process_exit) == set(process_exit.WAYS)
        for way, end in run.process_exit.items():
            assert end["exit_code"] == end["expected_exit_code"] == process_exit.WAYS[way]
            assert end["exit_ns"] > 0
        assert {"table_pages_leaked", "lock", "rcu", "attribution", "timeline", "final"} <= run.raw.keys()
    worker, sync = result.runs
    assert worker.process_exit is not None
    # A worker can only be overtaken by a child that the host keeps waiting, and not each time.
    pending = [end["tables_pending"] for end in worker.process_exit.values() if end["tables_pending"]]
    assert max(pending) > 100, "it left with the work pending"
    assert sync.passes == "4K,2M,1G,root", "the effective settings are the native side's"
    assert result.limits
    assert result.host


def test_it_is_a_scene_among_others(cli: Cli, tmp_path: Path) -> None:
    target = tmp_path / "r.json"
    ran = cli(
        *("bench", "drop", "--memory", "64M", "--design", "async-worker", "--scene", "cr0-wp,process-exit"),
        *("--drop-loop", "16", "--no-check", "--seed", "1", "-o", target),
    )
    assert ran.code == 0, ran.err
    saved = tdpmmu.load(target.read_text())
    assert isinstance(saved, tdpmmu.BenchResult)
    assert [run.scene for run in saved.runs] == ["cr0-wp", "process-exit"]
    engine, played = (run.raw for run in saved.runs)
    assert engine.keys() <= played.keys()
    assert [raw["table_pages_leaked"] for raw in saved.raw["runs"]] == [0, None]
    for name in ("sptes_mapped_at_return", "lock", "rcu", "teardown", "step_units"):
        assert played[name] is None, name
    assert played["attribution"] == []
    assert "process-exit: 64 MiB" in ran.out
    assert "daemon thread" in ran.out


@pytest.mark.parametrize("design", WORKERS)
@pytest.mark.parametrize("queue", ["per-vm", "system"])
def test_the_interpreter_ends_with_work_pending_under_every_worker_design(design: str, queue: str) -> None:
    done = python(
        f"""
import tdpmmu
vm = tdpmmu.VM("1G", design={design!r}, worker_queue={queue!r}, workers=2, seed=1)
vm.populate()
vm.fault(0)
vm.drop_root(0)
"""
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_process_that_says_something_or_ends_otherwise_is_wrong() -> None:
    wrong = process_exit._wrong
    assert wrong("sys_exit", 0, 0, False, "") is None
    assert "exit code -11, expected 0" in str(wrong("sys_exit", -11, 0, False, ""))
    assert "it said" in str(wrong("os_exit", 0, 0, False, "thread panicked at"))
    assert "did not end" in str(wrong("thread", 0, 0, True, ""))
    own = "Traceback (most recent call last):\n  ...\nRuntimeError: exception\n"
    assert wrong("exception", 1, 1, False, own) is None
    assert "it said" in str(wrong("exception", 1, 1, False, own + "terminate called\n"))


def stand_in(tmp_path: Path, script: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def test_a_process_that_does_not_end_is_found_and_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process_exit, "_HANGS_AFTER", 0.3)
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, "exec sleep 600"))
    end, _ = process_exit._one(REQUEST, RUN, "sys_exit", lambda: None)
    assert "did not end" in end["wrong"]
    assert end["exit_ns"] is None


def test_a_process_that_crashes_is_a_violation_with_its_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = dict.fromkeys(("sptes", "table_pages", "table_bytes", "vcpus", "tables_pending"), 1)
    script = f"echo '{json.dumps({**told, 'leaves_at_ns': 1})}'; kill -SEGV $$"
    monkeypatch.setattr(sys, "executable", stand_in(tmp_path, script))
    with pytest.raises(tdpmmu.OracleViolation, match="exit code -11") as caught:
        bench.drop(memory="4M", design="inline", scene="process-exit", seed=1)
    assert caught.value.partial is not None
    partial = tdpmmu.load(caught.value.partial)
    assert isinstance(partial, tdpmmu.BenchResult)
    assert partial.runs[0].violations == len(process_exit.WAYS)


def test_a_timeout_ends_the_scene() -> None:
    begin = time.monotonic()
    with pytest.raises(tdpmmu.StallError, match="timeout"):
        bench.drop(memory="256M", design="all", scene="process-exit", reps=50, timeout=6, seed=1)
    assert time.monotonic() - begin < 60


@pytest.mark.parametrize("design", ["async-worker", "second-list-worker"])
def test_close_with_work_pending_waits_for_it_and_leaks_nothing(design: str) -> None:
    vm = VM("2G", design=design, seed=1)
    vm.populate()
    vm.fault(0)
    vm.drop_root(0)
    reports: list[Any] = []
    threads = [threading.Thread(target=lambda: reports.append(vm.close())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done = [report for report in reports if report is not None]
    assert done, "whoever came while it was being closed has the same report"
    assert {(report.table_pages_leaked, report.violations) for report in done} == {(0, ())}
    assert vm.close() is None


def test_a_machine_dropped_with_work_pending_is_freed() -> None:
    for _ in range(3):
        box = [VM("256M", design="async-worker", seed=1)]
        box[0].populate()
        box[0].fault(0)
        box[0].drop_root(0)
        with pytest.warns(ResourceWarning, match="unclosed"):
            box.clear()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("queue", ["per-vm", "system"])
def test_a_fork_with_work_pending_leaves_both_sides_well(queue: str) -> None:
    with VM("1G", design="async-worker", worker_queue=queue, seed=1) as vm:
        vm.populate()
        vm.fault(0)
        vm.drop_root(0)
        child = os.fork()
        if child == 0:
            try:
                vm.drop_root(0)
            except tdpmmu.ForkedError:
                os._exit(0)
            except BaseException:
                os._exit(2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        vm.fast_zap()
        assert vm.stats().sptes == 0
        assert vm.verify() == ()


def test_a_forked_child_works_on_with_machines_of_its_own_on_the_system_queue() -> None:
    done = python(
        """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tdpmmu
def use():
    with tdpmmu.VM("256M", design="async-worker", worker_queue="system", seed=1) as vm:
        vm.populate(); vm.fault(0); vm.drop_root(0); vm.fast_zap()
use()
child = os.fork()
if child == 0:
    use()
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
use()
"""
    )
    assert (done.returncode, done.stderr) == (0, "")
