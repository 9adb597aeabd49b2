"""Experiments through the face: small ones, for their shape and their sense, never for their timing."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tdpmmu
from conftest import Cli
from tdpmmu import _names, bench

DESIGNS = (
    "in-place",
    "inline",
    "defunct-flag",
    "second-list",
    "second-list-worker",
    "async-worker",
    "async-worker-owned",
    "sync",
)
FLAWED = ("system-workqueue", "no-second-phase")
H_FIELDS = {"count", "min", "p50", "p90", "p99", "p999", "max"}
SMALL: dict[str, Any] = {"memory": "64M", "drop_loop": 64, "seed": 1, "working_set": "1M"}


@pytest.fixture(scope="module")
def dropped() -> tdpmmu.BenchResult:
    return bench.drop(**SMALL)


@pytest.fixture(scope="module")
def zapped() -> tdpmmu.BenchResult:
    return bench.zap(**SMALL, reps=2)


def test_all_is_every_sound_design_in_order(dropped: tdpmmu.BenchResult) -> None:
    assert tuple(run.design for run in dropped.runs) == DESIGNS
    assert dropped.experiment == "drop"
    assert dropped.seed == 1
    assert dropped.build["version"] == tdpmmu.__version__
    assert dropped.limits


def test_sptes_are_counted_and_nothing_leaks(dropped: tdpmmu.BenchResult, zapped: tdpmmu.BenchResult) -> None:
    for run in (*dropped.runs, *zapped.runs):
        assert run.sptes == 16_384
        assert run.table_pages == tdpmmu.table_pages("64M")
        assert run.table_bytes == run.table_pages * 4096
        assert run.table_pages_leaked == 0
        assert run.violations == 0
        assert run.raw["extrapolated"] is False


def test_who_owns_the_first_reference_decides_what_a_drop_tears_down(dropped: tdpmmu.BenchResult) -> None:
    runs = {run.design: run for run in dropped.runs}
    owners = {design for design, run in runs.items() if run.ownership == "mmu"}
    assert owners == {"async-worker-owned", "sync"}
    inline, worker, sync = (runs[design] for design in ("inline", "async-worker", "sync"))
    assert inline.teardown is not None
    assert inline.teardown["entry_writes"] >= inline.sptes
    assert inline.teardown["cpu_ns"]["worker"] == 0
    assert worker.teardown is not None
    assert worker.teardown["cpu_ns"]["worker"] > 0
    assert sync.teardown is None, "nothing is torn down"
    assert sync.retained_table_pages is not None
    assert sync.retained_table_pages >= sync.table_pages
    assert inline.retained_table_pages == 0


def test_a_drop_has_its_baseline_and_its_loop(dropped: tdpmmu.BenchResult) -> None:
    for run in dropped.runs:
        assert run.block_drop_ns is not None
        assert run.block_drop_ns.count >= 1
        assert run.block_baseline_ns is not None
        assert run.block_baseline_ns.max is not None
        assert run.drop_loop is not None
        assert run.drop_loop["count"] == 64
        assert set(run.drop_loop["block_drop_ns"]) == H_FIELDS
        assert run.drop_loop["block_drop_ns"]["p999"] is None, "64 drops have no p99.9"


def test_a_zap_says_where_the_update_spent_its_time(zapped: tdpmmu.BenchResult) -> None:
    assert [(run.design, run.rep) for run in zapped.runs] == [(d, rep) for d in DESIGNS for rep in range(2)]
    for run in zapped.runs:
        parts = run.update_ns
        assert parts is not None
        assert parts["total"] >= parts["exclusive_hold"] + parts["lock_wait"]
        assert parts["exclusive_longest"] <= parts["exclusive_total"]
        assert run.teardown is not None, "a memslot update tears down under every design"
        assert run.teardown["last_table_free_ns"] >= 0


def test_a_list_of_settings_makes_a_run_each() -> None:
    result = bench.zap(
        **{**SMALL, "memory": "16M"},
        design=["async-worker", "sync"],
        passes=["1G,root", "4K,2M,1G,root"],
        preempt=["none", "full"],
        check=False,
    )
    found = [(run.design, run.passes, run.preempt) for run in result.runs]
    assert len(set(found)) == len(found) == 8


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("1G,root", "1G,root"),
        (["1G,root"], "1G,root"),
        (["1G", "root"], "1G,root"),
        (["root", "1G,root"], ["root", "1G,root"]),
        (["4K", "2M", "1G", "root"], "4K,2M,1G,root"),
    ],
)
def test_passes_are_one_text_or_its_parts_or_several(given: Any, sent: Any) -> None:
    assert bench.config(passes=given)["passes"] == sent


def test_all_stays_all_so_that_a_profile_may_leave_designs_out() -> None:
    assert bench.config(design="all", scene="all")["designs"] == ["all"]
    assert bench.config(scene=["memslot-move", "all"])["scenes"] == ["all"]
    assert bench.config(design=["sync", "all"])["designs"][0] == "sync"
    old = bench.drop(**{**SMALL, "memory": "4M"}, profile="5.15", check=False)
    assert [run.design for run in old.runs] == ["in-place", "inline"]


def test_a_flawed_design_is_marked_wherever_it_is_named(cli: Cli) -> None:
    assert tuple(_names.flawed()) == FLAWED
    ran = cli(
        "bench", "zap", "--memory", "16M", "--design", "no-second-phase,sync", "--no-check", "--seed", "1"
    )
    assert ran.code == 0, ran.err
    assert "no-second-phase (flawed)" in ran.out
    assert "no-second-phase (flawed): its violations are the result" in ran.err
    assert "sync (flawed)" not in ran.out
    for command in (("bench", "zap", "--help"), ("info",)):
        said = cli(*command).out
        for design in FLAWED:
            assert f"{design} (flawed)" in said
    result = bench.zap(memory="16M", design=FLAWED, check=False, seed=1)
    assert [run.flawed for run in result.runs] == [True, True]


@pytest.mark.parametrize(
    "scene", ["slot-churn", "several-roots", "waiting-notifier", "vm-teardown", "zap-64t"]
)
def test_a_scene_comes_back_with_its_own_columns(cli: Cli, scene: str) -> None:
    kind = "drop" if scene == "vm-teardown" else "zap"
    own = {
        "slot-churn": "updates",
        "several-roots": "memslot",
        "waiting-notifier": "later waited",
        "vm-teardown": "VM closed",
        "zap-64t": "extrapolated",
    }
    options = ("--design", "async-worker", "--no-check", "--seed", "1", "--churns", "5")
    ran = cli("bench", kind, "--memory", "64M", "--scene", scene, *options)
    assert ran.code == 0, ran.err
    assert ran.out.startswith(f"{scene}: ")
    assert own[scene] in ran.out


def test_a_picture_is_an_output_format(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    common = ["bench", "zap", "--memory", "4M", "--no-check", "--design", "sync", "--seed", "1", "-o"]
    assert cli(*common, tmp_path / "r.svg").code == 0
    assert (tmp_path / "r.svg").read_bytes().startswith(b"<?xml")
    assert cli("bench", "rcu", "-o", tmp_path / "r.pftrace").code == 2


def test_finer_passes_make_smaller_steps() -> None:
    def longest(passes: str) -> int:
        result = bench.zap(**SMALL, design="sync", passes=passes, check=False)
        units = result.runs[0].step_units
        assert units is not None
        assert units.max is not None
        return units.max

    assert longest("4K,2M,1G,root") * 4 < longest("1G,root")


def test_attributed_times_add_up(dropped: tdpmmu.BenchResult) -> None:
    for run in dropped.runs:
        for thread in run.raw["attribution"]:
            total = sum(thread["ns"].values())
            assert total == pytest.approx(thread["elapsed_ns"], rel=0.05, abs=1_000), thread


def test_a_run_by_racing_faults_maps_the_same() -> None:
    run = bench.drop(**{**SMALL, "memory": "8M"}, design="inline", populate="fault", check=False).runs[0]
    assert run.sptes == 2048
    assert run.raw["populated_by"] == "fault"


@pytest.mark.parametrize("kind", ["populate", "fault", "walk", "rcu"])
def test_a_micro_experiment_has_rows_with_their_limits(kind: str) -> None:
    result = getattr(bench, kind)(memory="64M", seed=1)
    assert result.schema == "tdpmmu.micro/1"
    assert result.rows
    for row in result.rows:
        assert row.ns is not None
        assert row.ns > 0
        if row.of is not None:
            assert row.ratio is not None
            assert row.ratio > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"design": "inline", "ownership": "mmu"}, "makes no sense"),
        ({"memory": "64X"}, "memory='64X'"),
        ({"profile": "6.12,passes=3G"}, "3G"),
        ({"arrival_ns": 0}, "arrival_ns=0"),
        ({"drop_loop": -1}, "drop_loop=-1"),
        ({"workers": 0}, "workers=0"),
        ({"design": []}, "at least one"),
        ({"vcpus": True}, "vcpus=True"),
        ({"timeout": -1.0}, "timeout=-1.0"),
        ({"scene": "cr0wp"}, "did you mean 'cr0-wp'"),
        ({"scene": []}, "at least one scene"),
        ({"scene": "memslot-delete"}, "a scene of bench zap"),
        ({"sharing": "globl"}, "did you mean 'global'"),
        ({"worker_queue": "shared"}, "known: per-vm, system"),
        ({"worker_cpus": [1 << 19]}, "may not run on that CPU"),
        ({"vcpu_cpus": [-1]}, "vcpu_cpus=-1"),
        ({"churns": 0}, "churns=0"),
        ({"passes": []}, "passes"),
        ({"preempt": ["full", "never"]}, "preempt='never'"),
        ({"scene": "all", "design": "no-such"}, "design='no-such'"),
    ],
)
def test_an_option_that_breaks_a_rule_is_refused_and_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument) as caught:
        bench.drop(**{"memory": "4M", **options})
    assert message in str(caught.value)


def test_what_does_not_fit_is_refused_with_the_figure_and_4(cli: Cli) -> None:
    with pytest.raises(tdpmmu.OutOfTableMemory) as caught:
        bench.drop(memory="64T")
    assert caught.value.needed_bytes > tdpmmu.table_bytes("64T")
    ran = cli("bench", "drop", "--memory", "64T")
    assert ran.code == 4
    assert "64 TiB of 4K pages" in ran.err
    assert "128.3 GiB" in ran.err
    assert cli("bench", "drop", "--memory", "1G", "--max-memory", "1M").code == 4


def test_progress_names_the_phase() -> None:
    seen: list[str] = []
    bench.drop(**SMALL, design="inline", progress=lambda phase, part: seen.append(phase))
    assert seen
    assert any("inline" in phase or "limits" in phase or "populat" in phase for phase in seen)


def test_a_timeout_stops_an_experiment() -> None:
    with pytest.raises(tdpmmu.StallError, match="timeout"):
        bench.drop(memory="4G", reps=50, timeout=0.3)


def test_the_table_is_on_stdout_and_the_talk_on_stderr(cli: Cli, tmp_path: Path) -> None:
    common = [
        "bench",
        "drop",
        "--memory",
        "16M",
        "--drop-loop",
        "16",
        "--no-check",
        "--design",
        "inline,sync",
    ]
    ran = cli(*common, "-o", tmp_path / "r.json")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[0].startswith("cr0-wp: 16 MiB of 4K pages, 4,096 SPTEs")
    assert "seed:" in ran.err
    assert "seed" not in ran.out
    saved = tdpmmu.load((tmp_path / "r.json").read_text())
    assert isinstance(saved, tdpmmu.BenchResult)
    assert [run.design for run in saved.runs] == ["inline", "sync"]
    quiet = cli(*common, "--json", "--quiet", "--seed", "9")
    raw = json.loads(quiet.out)
    assert raw["seed"] == 9
    assert [run["design"] for run in raw["runs"]] == ["inline", "sync"]
    assert not [line for line in quiet.err.splitlines() if "warning" not in line]


def test_results_are_written_in_every_format(cli: Cli, tmp_path: Path) -> None:
    common = ["bench", "zap", "--memory", "4M", "--no-check", "--design", "sync", "--quiet", "-o"]
    for suffix in ("csv", "jsonl", "txt"):
        assert cli(*common, tmp_path / f"r.{suffix}").code == 0
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["sptes"] == "1024"
    assert json.loads((tmp_path / "r.jsonl").read_text())["update_ns.total"] > 0
    assert "sync" in (tmp_path / "r.txt").read_text()


def test_a_parquet_file_is_read_back(cli: Cli, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    target = tmp_path / "r.parquet"
    ran = cli("bench", "zap", "--memory", "4M", "--no-check", "--design", "all", "-o", target)
    assert ran.code == 0, ran.err
    assert parquet.read_table(target).column("design").to_pylist() == list(DESIGNS)


def test_info_says_what_a_result_depends_on(cli: Cli) -> None:
    facts = tdpmmu.info()
    assert facts["host"]["cpus"] >= 1
    assert facts["build"] == tdpmmu.build_info()
    ran = cli("info", "--json")
    assert json.loads(ran.out)["host"]["memory_bytes"] > 0
    assert "host.rcu_flavour" in cli("info").out


def test_ctrl_c_ends_a_bench_with_130_and_soon() -> None:
    command = [sys.executable, "-m", "tdpmmu", "bench", "zap", "--memory", "16G", "--reps", "50", "--quiet"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        time.sleep(3)
        assert child.poll() is None
        os.kill(child.pid, signal.SIGINT)
        code = child.wait(timeout=30)
        assert child.stderr is not None
        assert child.stdout is not None
        assert (code, child.stdout.read()) == (130, b"")
        assert b"Traceback" not in child.stderr.read()


@pytest.mark.parametrize("cpus", ["3-1", "0-99999999999", "0-", "-1", "a", ""])
def test_a_list_of_cpus_that_is_none_is_a_usage_error(cli: Cli, cpus: str) -> None:
    ran = cli("bench", "zap", "--worker-cpus", cpus)
    assert ran.code == 2
    assert f"worker_cpus={cpus!r}" in ran.err


def test_each_file_has_a_name_of_its_own(cli: Cli, tmp_path: Path) -> None:
    one = tmp_path / "x.json"
    for files in (["--perfetto", one, "--hlog", one], ["-o", one, "--hlog", one]):
        ran = cli("bench", "zap", "--memory", "4M", *files)
        assert ran.code == 2
        assert "its own name" in ran.err
    assert list(tmp_path.iterdir()) == []
