"""What a replay holds over time: timeline, causes, storms, faults, VMs; pictures, trace and what-if."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import documents
import tdpmmu
from conftest import Cli, as_id, recordings
from tdpmmu import plot, recorded_table
from test_exports import Trace
from test_plot import words

LARGE = max(recordings(), key=lambda path: path.stat().st_size)
NX = next(path for path in recordings() if path.parent.name == "k_nx")


def with_time() -> dict[str, Any]:
    """A replay with everything that newer versions tell."""
    raw = documents.replay()
    return raw | {
        "begin_ns": 1_000,
        "span_ns": 5_000_000,
        "timeline": {
            "t_ns": [1_000, 2_000_000, 5_001_000],
            "pages_4k": [0, 512, 3],
            "pages_2m": [0, 2, 0],
            "pages_1g": [0, 0, 0],
            "tables": [1, 6, 2],
            "table_bytes": [4096, 24576, 8192],
        },
        "causes": [
            {
                "cause": "memslot_delete",
                "zaps": 2,
                "entries": 7,
                "tables": 3,
                "total_ns": 4_000,
                "max_ns": 3_000,
            },
            {"cause": "notifier", "zaps": 9, "entries": 9, "tables": 0, "total_ns": 900, "max_ns": 300},
        ],
        "storms": [
            {"cause": "notifier", "t0_ns": 1_500, "t1_ns": 90_000, "zaps": 9, "entries": 9, "tables": 0}
        ],
        "storms_total": 1,
        "faults": {"total": 12, "read": 4, "write": 8, "fast_fixed": 2, "mapped": {"1": 9, "2": 1, "3": 0}},
        "top_operations": [
            {
                "name": "set_memslot",
                "detail": '{"vm":1,"why":"delete"}',
                "t0_ns": 2_000,
                "duration_ns": 9_000,
                "pid": 7,
                "comm": "qemu",
            }
        ],
        "per_vm": [
            {
                "id": n,
                "comm": "qemu",
                "tgid": 7 + n,
                "told_by": "process",
                "roots": 1,
                "transitions": 5,
                "faults": 2,
                "zaps": 1,
            }
            for n in range(2)
        ],
        "lost": 3,
        "losses": [{"t_ns": 4_000, "cpu": 1, "count": 3}],
        "ambiguous": {"transitions": 4, "why": "two VMs in one process"},
        "what_if": {
            "design": "inline",
            "profile": "6.12",
            "zaps": [
                {
                    "t0_ns": 2_000,
                    "cause": "memslot_delete",
                    "sptes": 512,
                    "recorded_ns": 3_000,
                    "caller_blocked_ns": 10,
                    "vcpu_blocked_max_ns": 20,
                    "background_ns": None,
                }
            ],
            "skipped": [{"why": "nothing was mapped", "zaps": 2}],
            "note": "times of this machine",
        },
    }


def load(raw: dict[str, Any]) -> tdpmmu.Replay:
    found = tdpmmu.load(json.dumps(raw))
    assert isinstance(found, tdpmmu.Replay)
    return found


@pytest.mark.parametrize("recording", recordings(), ids=as_id)
def test_a_recording_has_a_timeline_that_adds_up(recording: Path) -> None:
    report = tdpmmu.replay(recording)
    timeline = report.timeline
    assert timeline is not None
    columns = timeline.to_numpy()
    assert set(columns) == {"t_ns", "pages_4k", "pages_2m", "pages_1g", "tables", "table_bytes"}
    assert all(
        column.dtype == np.int64 and column.shape == columns["t_ns"].shape for column in columns.values()
    )
    assert 1 < columns["t_ns"].size <= 2_000
    assert columns["t_ns"][0] >= 0
    assert (np.diff(columns["t_ns"]) >= 0).all()
    assert (columns["table_bytes"] == columns["tables"] * 4096).all()
    assert columns["tables"].max() == report.tables_peak
    assert sum(cause["zaps"] for cause in report.causes) == len(report.zaps)
    assert sum(vm["transitions"] for vm in report.vms) <= report.transitions


def test_the_table_shows_all_of_it() -> None:
    text = recorded_table.render_replay(load(with_time()))
    for said in (
        "lost events: 3",
        "ambiguous: 4 transitions (two VMs in one process)",
        "faults: 12: read 4, write 8, fast fixed 2, mapped 4K 9, mapped 2M 1",
        "memslot delete",
        "why delete",
        "qemu 8",
        "what if inline",
        "not run: 2 of the zaps: nothing was mapped",
        "times of this machine",
    ):
        assert said in text, said
    storm = next(line for line in text.splitlines() if line.startswith("notifier") and "500 ns" in line)
    assert storm.split()[-2:] == ["9", "9"]


def test_a_timeline_of_uneven_columns_is_refused() -> None:
    raw = with_time()
    raw["timeline"]["tables"].pop()
    with pytest.raises(tdpmmu.InvalidArgument, match=r"timeline\.tables has 2 points"):
        load(raw)


@pytest.mark.parametrize("kind", plot.RECORDED_KINDS)
@pytest.mark.parametrize(("format", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_each_kind_is_drawn_in_each_format(kind: str, format: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    assert plot.draw(load(with_time()), format, kind=kind).startswith(magic)


def test_a_picture_says_what_was_found() -> None:
    pytest.importorskip("matplotlib")
    said = words(plot.draw(load(with_time())))
    joined = " ".join(said.split())
    assert "6 MiB mapped at most, by 24 KiB of tables" in joined
    assert "1 storm of zaps (shaded)" in joined
    assert "3 events lost" in joined
    for part in ("memslot delete", "notifier", "4 KiB leafs, at most 512", "tables, at most 6 (24 KiB)"):
        assert part in said, part
    assert plot.draw(load(with_time())) == plot.draw(load(with_time()))


def test_a_report_of_an_older_version_is_drawn_by_its_zaps() -> None:
    pytest.importorskip("matplotlib")
    said = words(plot.draw(load(documents.replay())))
    assert "memslot" in said
    assert "4 KiB leafs" not in said


def test_the_command_draws_and_traces(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture, trace, result = tmp_path / "a.png", tmp_path / "a.pftrace", tmp_path / "a.json"
    ran = cli("replay", LARGE, "--plot", picture, "--perfetto", trace, "-o", result, "-q")
    assert ran.code == 0, ran.err
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert Trace(trace.read_bytes()).processes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.pftrace", "a.png"]
    assert cli("plot", result, "-o", tmp_path / "b.svg", "--kind", "causes").code == 0
    assert cli("plot", result, "-o", tmp_path / "c.svg", "--kind", "bars").code == 2
    before = trace.read_bytes()
    assert cli("replay", LARGE, "--perfetto", trace).code == 2, "it is there already"
    assert trace.read_bytes() == before
    assert cli("replay", LARGE, "--plot", tmp_path / "x.gif").code == 2
    assert cli("replay", LARGE, "--plot", tmp_path / "x.svg", "--perfetto", tmp_path / "x.svg").code == 2


def test_a_failed_replay_leaves_no_trace_behind(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"\x7fELF" + bytes(200))
    ran = cli("replay", tmp_path / "bad.txt", "--profile", "6.12", "--perfetto", tmp_path / "x.pftrace")
    assert ran.code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["bad.txt"]


def test_the_trace_of_a_replay_tells_of_its_zaps(tmp_path: Path) -> None:
    report = tdpmmu.replay(LARGE, perfetto=tmp_path / "t.pftrace")
    trace = Trace((tmp_path / "t.pftrace").read_bytes())
    slices = [one for track in trace.tracks.values() for one in track.slices]
    assert len(slices) >= len([zap for zap in report.zaps if zap["duration_ns"]])
    assert any(track.counters for track in trace.tracks.values())


@pytest.mark.parametrize("design", ["sync", "inline"])
def test_what_if_runs_the_recorded_zaps_through_a_design(cli: Cli, design: str) -> None:
    ran = cli("replay", NX, "--what-if", design, "--json", "-q", timeout=120)
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)["what_if"]
    assert found["design"] == design
    accounted = len(found["zaps"]) + sum(skipped["zaps"] for skipped in found["skipped"])
    assert accounted == len(json.loads(ran.out)["zaps"])
    # The recording deletes a memslot: that zap is run, on as many SPTEs as were there.
    (deletion,) = [zap for zap in found["zaps"] if zap["cause"] == "memslot_delete"]
    assert deletion["sptes"] > 500
    assert deletion["caller_blocked_ns"] > 0
    assert deletion["recorded_ns"] > 0


def test_what_if_with_an_unknown_design_names_the_closest(cli: Cli) -> None:
    ran = cli("replay", LARGE, "--what-if", "in-line")
    assert ran.code == 2
    assert "inline" in ran.err


@pytest.mark.parametrize(
    "path",
    [
        "causes",
        "storms",
        "timeline.t_ns",
        "per_vm",
        "top_operations",
        "what_if.zaps",
        "zaps",
        "faults.mapped",
    ],
)
@pytest.mark.parametrize("damage", [5, "x", [5], {"a": []}])
def test_a_damaged_report_is_refused_where_it_is_read_or_shown_as_it_is(path: str, damage: object) -> None:
    raw = with_time()
    place = raw
    *above, last = path.split(".")
    for name in above:
        place = place[name]
    place[last] = damage
    # What can be taken for an empty part is; all else is refused, and by its place.
    with contextlib.suppress(tdpmmu.InvalidArgument):
        assert recorded_table.render_replay(load(raw))
