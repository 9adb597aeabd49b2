"""Recordings of real KVM through the face: verdicts, bad files, cancellation."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tdpmmu
from conftest import Cli, as_id, recordings, shared_recordings

HEAD = "# tracer: nop\n"
SPTE = (
    " qemu-8397    [002] .....  1404.{us:06d}: kvm_tdp_mmu_spte_changed: "
    "as id 0 gfn {gfn:x} level 1 old_spte {old:x} new_spte {new:x}\n"
)


def line(us: int, gfn: int, old: int, new: int) -> str:
    return SPTE.format(us=us, gfn=gfn, old=old, new=new)


EMPTY, LEAF = 0x8000000000000000, 0x12345E67
# The tables above the leaf: without them the recording begins in the middle, and less can be checked.
TABLES = "".join(
    line(0, 0, EMPTY, 0x1110827 + (level << 12)).replace("level 1", f"level {level}") for level in (4, 3, 2)
)
GOOD = HEAD + TABLES + line(1, 5, EMPTY, LEAF) + line(2, 5, LEAF, EMPTY)
BAD = HEAD + TABLES + line(1, 5, EMPTY, LEAF) + line(2, 5, LEAF + 0x1000, EMPTY)


def plain(tmp_path: Path, text: str | bytes, name: str = "trace.txt") -> Path:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize("recording", recordings(), ids=as_id)
def test_every_carried_recording_chains(recording: Path) -> None:
    report = tdpmmu.replay(recording, check=True)
    assert report.ok
    assert report.kernel.startswith(recording.parent.parent.name)
    assert report.transitions > 0
    assert sum(report.checked.values()) >= report.transitions
    assert report.checked["same"] > report.transitions / 2


@pytest.mark.slow
@pytest.mark.parametrize("recording", shared_recordings(), ids=as_id)
def test_every_shared_recording_chains(recording: Path) -> None:
    assert tdpmmu.replay(recording, check=True).ok


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("recording", recordings()[:4], ids=as_id)
def test_one_changed_old_value_is_caught(tmp_path: Path, recording: Path, seed: int) -> None:
    text = gzip.decompress(recording.read_bytes()).decode()
    leafs = list(re.finditer(r"level 1 old_spte ([0-9a-f]*)[0-9a-f]{4}e67 new_spte", text))
    if not leafs:
        pytest.skip("no old 4K leaf in this recording")
    place = random.Random(seed).choice(leafs).start(1)
    changed = text[:place] + ("1" if text[place] != "1" else "2") + text[place + 1 :]
    report = tdpmmu.replay(plain(tmp_path, changed), check=True, profile=recording.parent.parent.name)
    assert not report.ok
    assert report.checked["mismatch"] >= 1
    assert report.mismatches


def test_a_report_lists_zaps_with_their_cause_and_duration() -> None:
    for recording in recordings():
        zaps = tdpmmu.replay(recording).zaps
        if zaps:
            assert {"cause", "duration_ns"} <= set(zaps[0])
            return
    pytest.skip("no carried recording has a zap")


def test_good_lines_chain_and_a_wrong_old_value_does_not(tmp_path: Path) -> None:
    good = tdpmmu.replay(plain(tmp_path, GOOD), check=True, profile="6.12")
    assert (good.ok, good.transitions) == (True, 5)
    bad = tdpmmu.replay(plain(tmp_path, BAD), check=True, profile="6.12")
    assert (bad.ok, bad.checked["mismatch"]) == (False, 1)


def test_gzip_and_plain_text_give_the_same_report(tmp_path: Path) -> None:
    first = tdpmmu.replay(plain(tmp_path, GOOD), profile="6.12").raw
    second = tdpmmu.replay(plain(tmp_path, gzip.compress(GOOD.encode()), "t.gz"), profile="6.12").raw
    assert {k: v for k, v in first.items() if k != "file"} == {k: v for k, v in second.items() if k != "file"}


def test_check_exits_1_on_a_mismatch_and_0_without(cli: Cli, tmp_path: Path) -> None:
    good = cli("replay", "--check", "--profile", "6.12", "--json", plain(tmp_path, GOOD))
    assert good.code == 0
    assert json.loads(good.out)["schema"] == "tdpmmu.replay/1"
    bad = cli("replay", "--check", "--profile", "6.12", plain(tmp_path, BAD))
    assert bad.code == 1
    assert "mismatch 1" in bad.out, "the report is shown all the same"
    assert "check failed" in bad.err


def test_a_recording_comes_from_standard_input(cli: Cli) -> None:
    ran = cli("replay", "-", "--check", "--profile", "6.12", stdin=GOOD.encode())
    assert ran.code == 0, ran.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD.encode("utf-16"), "UTF-16"),
        (b"\x17\x08Dtracing6\0" + bytes(100), "damaged trace.dat"),
        (b"\x7fELF" + bytes(200), "not ftrace text"),
        (gzip.compress(GOOD.encode() * 50)[:-40], "gzip"),
        (HEAD.encode() + b" bash-1 [000] d..2 1.000001: sched_switch: prev_comm=bash\n", "sched_switch"),
    ],
    ids=["utf16", "trace.dat", "elf", "cut-gzip", "no-kvm"],
)
def test_what_is_no_recording_is_3_and_says_what_it_is(
    cli: Cli, tmp_path: Path, content: bytes, message: str
) -> None:
    ran = cli("replay", "--profile", "6.12", plain(tmp_path, content))
    assert ran.code == 3, ran.err
    assert message in ran.err
    with pytest.raises(tdpmmu.TraceError) as caught:
        tdpmmu.replay(plain(tmp_path, content), profile="6.12")
    assert caught.value.path.endswith("trace.txt")


def test_a_malformed_line_is_named_when_strict(cli: Cli, tmp_path: Path) -> None:
    broken = GOOD.replace("old_spte 12345e67", "old_spte zzz")
    path = plain(tmp_path, broken)
    with pytest.raises(tdpmmu.TraceError) as caught:
        tdpmmu.replay(path, profile="6.12", strict=True)
    assert caught.value.line == 6
    assert "zzz" in caught.value.text
    assert cli("replay", path, "--profile", "6.12", "--check").code == 3


@pytest.mark.parametrize("kind", ["missing", "folder", "secret"])
def test_a_file_that_cannot_be_opened_is_an_os_error_and_3(cli: Cli, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "there"
    if kind == "folder":
        path.mkdir()
    if kind == "secret":
        path.write_text(GOOD)
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    with pytest.raises(OSError, match="there"):
        tdpmmu.replay(path, profile="6.12")
    ran = cli("replay", path)
    assert ran.code == 3
    assert "there" in ran.err


def test_an_empty_recording_is_no_error(tmp_path: Path) -> None:
    report = tdpmmu.replay(plain(tmp_path, ""), profile="6.12")
    assert (report.events, report.transitions, report.ok) == (0, 0, True)


def test_a_check_of_nothing_is_no_success(cli: Cli, tmp_path: Path) -> None:
    ran = cli("replay", "--check", "--profile", "6.12", plain(tmp_path, ""))
    assert ran.code == 3
    assert "nothing that --check could verify" in ran.err


def test_an_unknown_profile_is_refused_with_the_closest(tmp_path: Path) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=r"6\.12"):
        tdpmmu.replay(plain(tmp_path, GOOD), profile="6.21")


def test_the_result_goes_to_a_file_by_suffix(cli: Cli, tmp_path: Path) -> None:
    source = plain(tmp_path, GOOD)
    for suffix in (".json", ".jsonl", ".csv", ".txt"):
        target = tmp_path / f"out{suffix}"
        assert cli("replay", source, "--profile", "6.12", "-o", target).code == 0
        assert target.exists()
    assert tdpmmu.load((tmp_path / "out.json").read_text()).raw["transitions"] == 5


def long_recording(path: Path) -> Path:
    """A recording that takes seconds to read: small compressed, large in text."""
    block = io.StringIO()
    for at in range(2_000):
        block.write(line(at, at, EMPTY, LEAF))
        block.write(line(at, at, LEAF, EMPTY))
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(HEAD.encode())
        for _ in range(2_500):
            file.write(block.getvalue().encode())
    return path


@pytest.mark.slow
def test_ctrl_c_ends_a_long_replay(tmp_path: Path) -> None:
    path = long_recording(tmp_path / "long.gz")
    command = [sys.executable, "-m", "tdpmmu", "replay", "--profile", "6.12", str(path)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as child:
        time.sleep(1.0)
        assert child.poll() is None, "it must be long enough to interrupt"
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=30) == 130


@pytest.mark.slow
def test_a_timeout_ends_a_long_replay_with_124(cli: Cli, tmp_path: Path) -> None:
    path = long_recording(tmp_path / "long.gz")
    assert cli("replay", "--profile", "6.12", "--timeout", "0.2", path).code == 124
