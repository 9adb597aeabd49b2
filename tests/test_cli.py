"""The command line's conventions: exit codes, what goes where, files, and no traceback (`cli` sees to it)."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

import documents
import tdpmmu
from conftest import Cli


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "result.json"
    path.write_text(json.dumps(documents.bench("drop")))
    return path


def test_version_and_help_are_data_and_succeed(cli: Cli) -> None:
    ran = cli("--version")
    assert (ran.code, ran.err) == (0, "")
    assert tdpmmu.__version__ in ran.out
    for command in (
        [],
        ["bench"],
        ["bench", "zap"],
        ["bench", "rcu"],
        ["replay"],
        ["info"],
        ["plot"],
        ["versus"],
    ):
        ran = cli(*command, "--help")
        assert (ran.code, ran.err) == (0, ""), command
        assert "Usage:" in ran.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "No such command"),
        (["bench", "zap", "--nothing"], "No such option"),
        (["bench", "drop", "--memory", "64X"], "memory='64X'"),
        (["bench", "drop", "--memory", "1.5K"], "memory='1.5K'"),
        (["bench", "drop", "--memory", "0"], "memory='0'"),
        (["bench", "drop", "--memory", "4097"], "multiple of the page size"),
        (["bench", "drop", "--memory", "512T"], "at most 256 TiB"),
        (["bench", "drop", "--memory", "6K", "--page", "2M"], "multiple of the page size 2M"),
        (["bench", "drop", "--page", "8K"], "4K, 2M, 1G"),
        (["bench", "drop", "--vcpus", "0"], "vcpus=0"),
        (["bench", "drop", "--vcpus", "x"], "'x' is not a valid integer"),
        (["bench", "drop", "--reps", "0"], "reps=0"),
        (["bench", "drop", "--design", "inlin"], "did you mean 'inline'"),
        (["bench", "drop", "--design", "inline,snyc"], "did you mean 'sync'"),
        (["bench", "zap", "--design", "sync", "--paging", "guest"], "of the shadow MMU only"),
        (["bench", "zap", "--design", "shadow-gen", "--quota", "1"], "quota=1"),
        (["bench", "walk", "--reclaim", "rcuu"], "did you mean 'rcu'"),
        (["bench", "drop", "--passes", "root,4K"], "passes"),
        (["bench", "drop", "--passes", "4K,2M"], "root"),
        (["bench", "drop", "--ownership", "me"], "known: vcpu, mmu"),
        (["bench", "drop", "--preempt", "ful"], "did you mean 'full'"),
        (["bench", "drop", "--tick", "4x"], "tick='4x'"),
        (["bench", "drop", "--tick", "0"], "tick='0'"),
        (["bench", "drop", "--profile", "6.13"], "profile='6.13'"),
        (["bench", "drop", "--profile", "6.12,nothing=1"], "nothing"),
        (["bench", "drop", "--populate", "slow"], "populate='slow'"),
        (["bench", "drop", "--seed", "-1"], "seed=-1"),
        (["bench", "drop", "--timeout", "-1"], "timeout=-1"),
        (["bench", "drop", "--timeout", "nan"], "timeout=nan"),
        (["bench", "drop", "-o", "x.docx"], "unknown suffix '.docx'"),
        (["bench", "drop", "-o", "/no/such/folder/x.json"], "not a directory"),
        (["replay", "x", "--profile", "6"], "profile='6'"),
        (["replay", "x", "--vm-of", "-5"], "vm_of=-5"),
        (["replay"], "Missing argument"),
        (["plot", "x.json"], "Missing option"),
        (["plot", "x.json", "-o", "x.gif"], "expected a suffix"),
    ],
)
def test_a_usage_error_is_2_and_names_the_value(
    cli: Cli, tmp_path: Path, arguments: list[str], message: str
) -> None:
    ran = cli(*arguments, cwd=tmp_path)
    assert ran.code == 2, ran.err
    assert ran.out == ""
    assert message in ran.err


def test_an_output_that_exists_is_refused_before_the_work_and_kept(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "there.json"
    path.write_text("precious")
    ran = cli("bench", "drop", "--memory", "256T", "-o", path)
    assert ran.code == 2
    assert "--force" in ran.err
    assert path.read_text() == "precious"


def test_a_chart_is_written_whole_and_not_over_another(cli: Cli, tmp_path: Path, result: Path) -> None:
    pytest.importorskip("matplotlib")
    chart = tmp_path / "chart.svg"
    assert cli("plot", result, "-o", chart).code == 0
    first = chart.read_bytes()
    assert first.startswith(b"<?xml")
    assert stat.S_IMODE(chart.stat().st_mode) & 0o600 == 0o600
    assert cli("plot", result, "-o", chart).code == 2
    assert cli("plot", result, "-o", chart, "--force", "--quiet").err == ""
    assert chart.read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["chart.svg", "result.json"], (
        "no temporary file stays"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "No such file"), (b"{", "not JSON"), (b'{"schema": "x/1"}', "not a result")],
)
def test_a_bad_input_file_is_3(cli: Cli, tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "in.json"
    if content is not None:
        path.write_bytes(content)
    ran = cli("plot", path, "-o", tmp_path / "x.svg")
    assert ran.code == 3
    assert message in ran.err
    assert "in.json" in ran.err


@pytest.mark.parametrize("command", ["plot", "compare"])
def test_a_field_of_a_wrong_type_is_a_bad_input_file(
    cli: Cli, tmp_path: Path, result: Path, command: str
) -> None:
    raw = json.loads(result.read_text())
    raw["runs"][0]["block_drop_ns"]["max"] = "long"
    path = tmp_path / "wrong.json"
    path.write_text(json.dumps(raw))
    rest = ("-o", tmp_path / "x.svg") if command == "plot" else (result,)
    ran = cli(command, path, *rest)
    assert ran.code == 3, ran.err
    assert "wrong.json" in ran.err
    assert "runs[0].block_drop_ns.max is 'long', expected a number" in ran.err


def test_a_full_disk_under_a_recording_is_4_and_named(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    # The draft beside the trace is where the disk is full: its name has the number of the process.
    script = 'ln -s /dev/full .x.pftrace.$$; exec "$0" -m tdpmmu "$@"'
    asked = "bench drop --memory 4M --design inline --scene cr0-wp --drop-loop 1 --no-check --seed 1"
    done = subprocess.run(
        ["sh", "-c", script, sys.executable, *asked.split(), "-o", "x.pftrace"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 4, done.stderr
    assert "error: x.pftrace: No space left" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bench_help_says_where_the_other_columns_are(cli: Cli) -> None:
    assert "--wide" in cli("bench", "--help").out


def test_an_output_folder_that_cannot_be_written_is_4(cli: Cli, tmp_path: Path, result: Path) -> None:
    pytest.importorskip("matplotlib")
    full = Path("/proc/self/x.svg")
    ran = cli("plot", result, "-o", full)
    assert ran.code == 4
    assert "x.svg" in ran.err


def test_a_full_disk_under_stdout_is_4_and_said(result: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with full.open("wb") as sink:
        command = [sys.executable, "-m", "tdpmmu", "--version"]
        done = subprocess.run(
            command, stdout=sink, stderr=subprocess.PIPE, text=True, check=False, timeout=60
        )
    assert done.returncode == 4
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_reader_that_goes_away_is_quiet() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "tdpmmu", "--help"],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.stderr == ""
    assert done.returncode == 141


def test_debug_shows_where_it_broke(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tdpmmu", "bench", "drop", "--memory", "64X", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Traceback" in done.stderr
    assert "InvalidArgument" in done.stderr


def test_one_cpu_is_warned_of() -> None:
    one = min(os.sched_getaffinity(0))
    command = [
        sys.executable,
        "-m",
        "tdpmmu",
        "bench",
        "drop",
        "--memory",
        "4M",
        "--drop-loop",
        "4",
        "--no-check",
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=100,
        preexec_fn=lambda: os.sched_setaffinity(0, {one}),
    )
    assert "one CPU" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupt_is_130_and_prompt(tmp_path: Path) -> None:
    # Standard input never comes: only the signal can end it.
    command = [sys.executable, "-m", "tdpmmu", "replay", "-", "--profile", "6.12"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        time.sleep(1.5)
        assert child.poll() is None
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=20) == 130
        assert child.stderr is not None
        assert b"Traceback" not in child.stderr.read()


def test_info_prints_the_kernels_and_their_switches(cli: Cli, tmp_path: Path) -> None:
    ran = cli("info", "--profiles")
    assert ran.code == 0, ran.err
    assert "collapse" in ran.out
    assert "    zap-freeze: 6.1-async, 6.1, 6.6, 6.9, 6.12" in ran.out
    raw = json.loads(cli("info", "--profiles", "--json").out)
    assert raw["schema"] == "tdpmmu.profiles/1"
    assert raw["profiles"][-1] == "7.2"
    assert cli("info", "--profiles", "-o", tmp_path / "p.csv", "-q").code == 0
    assert (tmp_path / "p.csv").read_text().startswith("switch,5.10,")
