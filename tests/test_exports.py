"""The Perfetto trace and the HdrHistogram log, read by others' libraries and held against the JSON."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import tdpmmu
from conftest import Cli
from tdpmmu import bench

DESIGNS = ("inline", "async-worker", "sync")
SMALL: dict[str, Any] = {"memory": "64M", "working_set": "1M", "seed": 1, "check": False, "drop_loop": 16}


@dataclass
class Track:
    """A track of a trace: its events, and the sums of what began and ended on it."""

    uuid: int
    name: str
    parent: int
    slices: list[tuple[int, int, str, str]] = field(default_factory=list)
    open: list[tuple[int, str, str]] = field(default_factory=list)
    counters: list[tuple[int, int]] = field(default_factory=list)
    flows: list[tuple[int, int, bool, str]] = field(default_factory=list)

    def sums(self, category: str) -> dict[str, int]:
        out: dict[str, int] = defaultdict(int)
        for begin, end, name, found in self.slices:
            if found == category:
                out[name] += end - begin
        return dict(out)


class Trace:
    """A decoded trace: processes by name, and the tracks below them."""

    def __init__(self, data: bytes) -> None:
        pb = pytest.importorskip("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
        trace = pb.Trace()
        trace.ParseFromString(data)
        event = pb.TrackEvent
        self.tracks: dict[int, Track] = {}
        self.processes: dict[str, int] = {}
        names: dict[tuple[int, int], str] = {}
        categories: dict[tuple[int, int], str] = {}
        for packet in trace.packet:
            sequence = packet.trusted_packet_sequence_id
            if packet.HasField("interned_data"):
                names |= {(sequence, n.iid): n.name for n in packet.interned_data.event_names}
                categories |= {(sequence, c.iid): c.name for c in packet.interned_data.event_categories}
            if packet.HasField("track_descriptor"):
                about = packet.track_descriptor
                name = about.name or about.thread.thread_name or about.process.process_name
                self.tracks[about.uuid] = Track(about.uuid, name, about.parent_uuid)
                if about.HasField("process"):
                    self.processes[about.process.process_name] = about.uuid
            if packet.HasField("track_event"):
                found = packet.track_event
                track = self.tracks[found.track_uuid]
                name = found.name or names.get((sequence, found.name_iid), "")
                kind = [*found.categories, *(categories[sequence, iid] for iid in found.category_iids), ""][0]
                if found.type == event.TYPE_SLICE_BEGIN:
                    track.open.append((packet.timestamp, name, kind))
                elif found.type == event.TYPE_SLICE_END:
                    begin, name, kind = track.open.pop()
                    track.slices.append((begin, packet.timestamp, name, kind))
                elif found.type == event.TYPE_COUNTER:
                    track.counters.append((packet.timestamp, found.counter_value))
                track.flows += [(packet.timestamp, flow, False, name) for flow in found.flow_ids]
                track.flows += [(packet.timestamp, flow, True, name) for flow in found.terminating_flow_ids]

    def below(self, uuid: int) -> list[Track]:
        direct = [track for track in self.tracks.values() if track.parent == uuid]
        return direct + [inner for track in direct for inner in self.below(track.uuid)]


@dataclass(frozen=True)
class Exported:
    result: tdpmmu.BenchResult
    trace: Trace
    log: Path


@pytest.fixture(scope="module", params=["zap", "drop"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exports")
    result = getattr(bench, request.param)(
        **SMALL, design=DESIGNS, perfetto=folder / "t.pftrace", hlog=folder / "t.hlog", timeline=True
    )
    return Exported(result, Trace((folder / "t.pftrace").read_bytes()), folder / "t.hlog")


def process_of(trace: Trace, run: tdpmmu.BenchRun) -> int:
    names = [name for name in trace.processes if {run.design, run.passes, run.scene} <= set(name.split())]
    assert len(names) == 1, (run.design, list(trace.processes))
    return trace.processes[names[0]]


def test_each_run_is_a_process_and_each_thread_a_track(exported: Exported) -> None:
    assert len(exported.trace.processes) == len(exported.result.runs)
    for run in exported.result.runs:
        threads = {track.name for track in exported.trace.below(process_of(exported.trace, run))}
        assert {row["thread"] for row in run.attribution} <= threads


def test_every_slice_ends_and_none_before_it_began(exported: Exported) -> None:
    for track in exported.trace.tracks.values():
        assert track.open == [], track.name
        assert all(end >= begin for begin, end, _, _ in track.slices)


def test_the_slices_of_a_thread_add_up_to_its_attribution(exported: Exported) -> None:
    compared = 0
    for run in exported.result.runs:
        tracks = {track.name: track for track in exported.trace.below(process_of(exported.trace, run))}
        for row in run.attribution:
            sums = tracks[row["thread"]].sums("phase")
            assert set(sums) <= set(row["ns"])
            for phase, ns in row["ns"].items():
                # To the rounding of each slice's ends; RCU's thread stamps its books and its slices apart,
                # with whatever interrupts it in between.
                apart = row["thread"] == "tdpmmu-rcu"
                near = pytest.approx(ns, rel=0.05 if apart else 1e-4, abs=50_000 if apart else 50)
                assert sums.get(phase, 0) == near, (
                    run.design,
                    row["thread"],
                    phase,
                )
                compared += ns > 0
            assert sum(sums.values()) == pytest.approx(row["elapsed_ns"], rel=0.05, abs=5_000)
    assert compared > 15


def test_a_root_flows_from_its_invalidation_over_its_zap_to_its_last_free(exported: Exported) -> None:
    torn_down, scheduled = 0, False
    for run in exported.result.runs:
        if run.teardown is None:
            continue
        flows: dict[int, list[tuple[int, bool, str]]] = defaultdict(list)
        for track in exported.trace.below(process_of(exported.trace, run)):
            for at, flow, ends, name in track.flows:
                flows[flow].append((at, ends, name))
        assert flows, run.design
        for steps in flows.values():
            steps.sort()
            assert len(steps) >= 2
            # It ends once, with the batch that has the root's own page, and nothing comes after that.
            assert [ends for _, ends, _ in steps[:-1]].count(True) == 0, steps
            names = [name for _, _, name in steps]
            zap = next(at for at, name in enumerate(names) if name.startswith("zap root"))
            before, after = names[:zap], names[zap + 1 :]
            # Before its zap a root is only invalidated and scheduled; the last put of `inline` zaps at once.
            assert all(name.endswith((" invalidated", " scheduled")) for name in before), names
            scheduled = scheduled or any(name.endswith(" scheduled") for name in before)
            dropped = exported.result.experiment == "drop" and run.design == "inline"
            assert dropped or any(name.endswith(" invalidated") for name in before), names
            if steps[-1][1]:
                assert after[-1] == "free", names
                assert any(name.endswith(" handed to RCU") for name in after[:-1]), names
        assert any(steps[-1][1] for steps in flows.values()), run.design
        torn_down += 1
    assert torn_down >= 2
    assert scheduled


def test_the_counter_of_waiting_pages_reaches_the_peak(exported: Exported) -> None:
    for run in exported.result.runs:
        if run.teardown is None:
            continue
        points = [
            value
            for track in exported.trace.below(process_of(exported.trace, run))
            for _, value in track.counters
        ]
        peak = run.raw["rcu"]["backlog_pages_peak"]
        assert points
        assert max(points) <= peak
        assert max(points) >= 0.5 * peak


def test_the_timeline_in_the_json_is_the_same_story(exported: Exported) -> None:
    for run in exported.result.runs:
        timeline = run.raw["timeline"]
        assert {track["thread"] for track in timeline["tracks"]} == {row["thread"] for row in run.attribution}
        for track in timeline["tracks"]:
            assert len(track["slices"]) <= 2_000
            ends = [stop for _, stop, _ in track["slices"]]
            assert ends == sorted(ends)


def test_a_log_read_by_hdrhistogram_has_the_percentiles_of_the_json(exported: Exported) -> None:
    log = pytest.importorskip("hdrh.log")
    from hdrh.histogram import HdrHistogram

    reader = log.HistogramLogReader(str(exported.log), HdrHistogram(1, 3_600_000_000_000, 3))
    found: dict[str, Any] = {}
    while (histogram := reader.get_next_interval_histogram()) is not None:
        found[histogram.get_tag()] = histogram
    reader.close()
    compared = 0
    for run in exported.result.runs:
        for name, curve in run.curves.items():
            tags = [
                tag
                for tag in found
                if tag.split("/")[-1] == name and run.design in tag.split("/") and run.scene in tag.split("/")
            ]
            assert len(tags) == 1, (run.design, name, list(found))
            histogram = found[tags[0]]
            assert histogram.get_total_count() == sum(count for _, count in curve)
            told = run.raw.get(name)
            if not isinstance(told, dict) or "p50" not in told:
                continue
            for percentile, key in ((50, "p50"), (90, "p90"), (99, "p99"), (99.9, "p999"), (100, "max")):
                if told[key] is not None:
                    # Where a percentile falls between two samples, libraries differ by one of them.
                    one = 100 / told["count"]
                    low, high = (
                        histogram.get_value_at_percentile(min(100, max(0, percentile + off)))
                        for off in (-one, one)
                    )
                    assert low * 0.99 - 2 <= told[key] <= high * 1.01 + 2, (run.design, name, key)
                    compared += 1
    assert compared > 5


def test_the_exports_are_named_on_the_command_line(cli: Cli, tmp_path: Path) -> None:
    common = ["bench", "zap", "--memory", "16M", "--no-check", "--design", "sync", "--seed", "1"]
    trace, log, result = tmp_path / "a.pftrace", tmp_path / "a.hlog", tmp_path / "a.json"
    ran = cli(*common, "--perfetto", trace, "--hlog", log, "-o", result)
    assert ran.code == 0, ran.err
    assert Trace(trace.read_bytes()).processes
    assert log.read_text().startswith("#")
    assert json.loads(result.read_text())["config"]["perfetto"] == str(trace)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.hlog", "a.json", "a.pftrace"]
    before = trace.read_bytes()
    assert cli(*common, "-o", trace).code == 2, "it is there already"
    assert trace.read_bytes() == before
    assert cli(*common, "-o", trace, "--force", "--quiet").code == 0
    assert cli(*common, "-o", tmp_path / "b.hlog").code == 0
    assert cli(*common, "-o", tmp_path / "c.hlog", "--hlog", tmp_path / "d.hlog").code == 2
    assert cli(*common, "--perfetto", tmp_path / "no" / "x.pftrace").code == 2


def test_a_failed_run_leaves_no_half_written_export(cli: Cli, tmp_path: Path) -> None:
    ran = cli("bench", "zap", "--memory", "64T", "--perfetto", tmp_path / "x.pftrace")
    assert ran.code == 4
    assert list(tmp_path.iterdir()) == []
