"""`conform` through the face: verdicts, predictions that need no values, bad folders."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest

import tdpmmu
from conftest import SHARED, Cli, as_id, recordings

SCRIPTED = [path.parent for path in recordings() if (path.parent / "script.json").exists()]
SMALL = SCRIPTED[:1]
REPORT = {
    "schema": "tdpmmu.conform/1",
    "cases": [
        {"name": "a", "kernel": "6.12", "operations": 3, "expected": 10, "matched": 10, "undetermined": 0},
        {
            "name": "b",
            "kernel": "6.1",
            "operations": 2,
            "expected": 5,
            "matched": 3,
            "undetermined": 1,
            "differences": 4,
            "mismatches": [
                {
                    "operation": 7,
                    "kind": "set_memslot",
                    "thread": "tdptrace-180",
                    "line": 12,
                    "rule": "in sequence",
                    "expected": "0 -> e67",
                    "got": "",
                    "recorded": ["0 -> e67"],
                    "predicted": [],
                }
            ]
            * 4,
            "skipped": [{"operation": 9, "why": "no such thing"}],
            "births": {"expected": 3, "differences": 1},
        },
    ],
}


def copy(folder: Path, to: Path) -> Path:
    """A recording under a folder with its kernel's name."""
    place = to / folder.parent.name / folder.name
    shutil.copytree(folder, place)
    return place


@pytest.mark.parametrize("folder", SCRIPTED, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_a_carried_recording_conforms(folder: Path) -> None:
    report = tdpmmu.conform(folder)
    assert report.ok, report.cases[0].mismatches[:1]
    (case,) = report.cases
    assert case.expected > 0
    assert case.matched + case.undetermined == case.expected
    assert case.operations > 0
    assert case.statistics["mismatched"] == 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", sorted(SHARED.glob("*/*/script.json")), ids=as_id)
def test_every_shared_recording_with_a_script_conforms(path: Path) -> None:
    assert tdpmmu.conform(path.parent).ok


def test_many_recordings_are_one_report(cli: Cli, tmp_path: Path) -> None:
    ran = cli("conform", *SCRIPTED[:2], "-o", tmp_path / "out.json", "-q")
    assert ran.code == 0, ran.err
    loaded = tdpmmu.load_file(tmp_path / "out.json")
    assert isinstance(loaded, tdpmmu.ConformReport)
    assert len(loaded.cases) == len(SCRIPTED[:2])
    assert "recordings conform" in ran.out
    rows = loaded.to_rows()
    assert rows[0]["expected"] == loaded.cases[0].expected


@pytest.mark.parametrize("folder", SMALL, ids=lambda folder: folder.name)
def test_another_kernels_policy_fails_where_it_should(cli: Cli, folder: Path) -> None:
    ran = cli("conform", folder, "--profile", "6.1,frozen=0x1a0", "--json")
    assert ran.code == 1, ran.err
    raw = json.loads(ran.out)
    assert raw["cases"][0]["differences"] > 0
    assert "check failed" in ran.err
    shown = cli("conform", folder, "--profile", "6.1,frozen=0x1a0")
    assert "expected" in shown.out
    assert "line" in shown.out


@pytest.mark.parametrize("folder", SMALL, ids=lambda folder: folder.name)
def test_a_prediction_needs_no_recorded_value(cli: Cli, tmp_path: Path, folder: Path) -> None:
    blanked = tmp_path / folder.parent.name / folder.name
    blanked.parent.mkdir()
    ran = cli("conform", folder, "--blank", blanked)
    assert ran.code == 0, ran.err
    assert tdpmmu.predict(blanked) == tdpmmu.predict(folder)
    for name, place in (("a", folder), ("b", blanked)):
        assert cli("conform", place, "--predict", "-o", tmp_path / f"{name}.json", "-q").code == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert json.loads((tmp_path / "a.json").read_text())["transitions"]
    assert cli("conform", folder, "--blank", blanked).code == 2, "it is there already"


def test_a_recording_without_a_script_is_3_and_says_so(cli: Cli, tmp_path: Path) -> None:
    place = copy(SMALL[0], tmp_path)
    (place / "script.json").unlink()
    ran = cli("conform", place)
    assert ran.code == 3
    assert "script.json" in ran.err
    with pytest.raises(tdpmmu.TraceError, match=r"script\.json") as caught:
        tdpmmu.conform(place)
    assert str(place) in caught.value.path


def test_a_folder_of_recordings_stands_for_those_with_a_script(cli: Cli, tmp_path: Path) -> None:
    kernel = SMALL[0].parent.name
    place = tmp_path / "traces" / kernel
    shutil.copytree(SMALL[0], place / "whole")
    shutil.copytree(SMALL[0], place / "bare")
    (place / "bare" / "script.json").unlink()
    for folder in (place, place.parent):
        ran = cli("conform", folder, "--json")
        assert ran.code == 0, ran.err
        assert [case["name"] for case in json.loads(ran.out)["cases"]] == ["whole"]
        assert "bare has no script.json" in ran.err
    # Asked for by name, it is refused, and the others are run all the same.
    ran = cli("conform", place / "bare", place / "whole", "--json")
    assert ran.code == 3
    assert [case["name"] for case in json.loads(ran.out)["cases"]] == ["whole"]
    assert "bare: script.json is missing" in ran.err


def test_a_broken_script_is_3_with_its_line(cli: Cli, tmp_path: Path) -> None:
    place = copy(SMALL[0], tmp_path)
    text = (place / "script.json").read_text().splitlines(keepends=True)
    (place / "script.json").write_text("".join([*text[:2], '{"op": zzz}\n', *text[3:]]))
    ran = cli("conform", place)
    assert ran.code == 3, ran.err
    assert "script.json" in ran.err


def test_a_cut_trace_is_3(cli: Cli, tmp_path: Path) -> None:
    place = copy(SMALL[0], tmp_path)
    trace = place / "trace.txt.gz"
    trace.write_bytes(trace.read_bytes()[:-200])
    ran = cli("conform", place)
    assert ran.code == 3, ran.err
    assert "gzip" in ran.err


def test_a_malformed_line_is_3_with_its_number(cli: Cli, tmp_path: Path) -> None:
    place = copy(SMALL[0], tmp_path)
    trace = place / "trace.txt.gz"
    text = gzip.decompress(trace.read_bytes()).decode().replace(" new_spte ", " new_spte zzz", 1)
    trace.write_bytes(gzip.compress(text.encode(), 1))
    ran = cli("conform", place)
    assert ran.code == 3, ran.err
    with pytest.raises(tdpmmu.TraceError) as caught:
        tdpmmu.conform(place)
    assert caught.value.line > 1


def test_a_folder_that_names_no_kernel_needs_a_profile(cli: Cli, tmp_path: Path) -> None:
    place = tmp_path / "mine" / "recording"
    shutil.copytree(SMALL[0], place)
    assert cli("conform", place).code == 2
    assert cli("conform", place, "--profile", SMALL[0].parent.name).code == 0


@pytest.mark.parametrize(
    "arguments",
    [(), ("--predict", "A", "B"), ("--predict", "--blank", "x", "A"), ("--predict", "A", "-o", "p.csv")],
)
def test_what_makes_no_sense_is_2(cli: Cli, arguments: tuple[str, ...]) -> None:
    assert cli("conform", *arguments).code == 2


def test_a_timeout_ends_a_run_with_124(cli: Cli) -> None:
    ran = cli("conform", *SCRIPTED, "--timeout", "0.01")
    assert ran.code == 124, ran.err


def test_a_folder_that_is_not_there_is_3(cli: Cli, tmp_path: Path) -> None:
    ran = cli("conform", tmp_path / "nothing")
    assert ran.code == 3
    assert "nothing" in ran.err


def test_no_recording_is_refused() -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="at least one"):
        tdpmmu.conform([])
    with pytest.raises(tdpmmu.InvalidArgument, match=r"6\.12"):
        tdpmmu.conform(SMALL, profile="6.21")


def test_a_report_shows_its_differences_and_what_was_skipped() -> None:
    from tdpmmu import recorded_table

    report = tdpmmu.load(json.dumps(REPORT))
    assert isinstance(report, tdpmmu.ConformReport)
    assert (report.ok, [case.ok for case in report.cases]) == (False, [True, False])
    assert "ok=False" in repr(report)
    text = recorded_table.render_conform(report)
    assert "operation 7, set_memslot, thread tdptrace-180, line 12: in sequence" in text
    assert "0 -> e67" in text
    assert "1 more differences" in text
    assert "operation 9 skipped: no such thing" in text
    assert "births: 1 differ" in text
    assert "1 of 2 recordings conform; 13 of 15 transitions matched" in text
