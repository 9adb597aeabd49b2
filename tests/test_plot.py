"""Charts: each kind is drawn from what it needs, says what it found, and refuses what it cannot draw."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import documents
import tdpmmu
from conftest import Cli
from tdpmmu import plot

pytest.importorskip("matplotlib")

ALL = ("inline", "async-worker", "sync", "no-second-phase")


def load(raw: dict[str, Any]) -> Any:
    return tdpmmu.load(json.dumps(raw))


def words(svg: bytes) -> str:
    """What an SVG says: matplotlib leaves each text as a comment above its glyphs."""
    return "\n".join(re.findall(r"<!--(.*?)-->", svg.decode(), re.DOTALL))


RAWS = {
    "bars": lambda: documents.scenes(ALL, reps=3),
    "percentiles": lambda: documents.scenes(ALL),
    "timeline": lambda: documents.scenes(),
    "scaling": documents.scaling,
    "attribution": lambda: documents.scenes(ALL, reps=2),
    "backlog": lambda: documents.scenes(ALL),
    "retained": lambda: documents.both_mmus(("shadow-walk", "shadow-gen", "shadow-gen-kept")),
}


def test_every_kind_is_tested_here() -> None:
    assert set(RAWS) == set(plot.KINDS)


@pytest.mark.parametrize("kind", plot.KINDS)
@pytest.mark.parametrize(("format", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_each_kind_is_drawn_in_each_format(kind: str, format: str, magic: bytes) -> None:
    assert plot.draw(load(RAWS[kind]()), format, kind=kind).startswith(magic)


@pytest.mark.parametrize("kind", plot.KINDS)
def test_a_picture_names_its_designs_and_what_was_measured(kind: str) -> None:
    raw = RAWS[kind]()
    said = words(plot.draw(load(raw), kind=kind))
    for design in {run["design"] for run in raw["runs"]}:
        assert design in said, design
    assert raw["runs"][0]["scene"] in said
    if any(run["design"] == "no-second-phase" for run in raw["runs"]):
        assert "(flawed)" in said


@pytest.mark.parametrize("kind", ["percentiles", "timeline"])
def test_the_same_result_draws_the_same_file(kind: str) -> None:
    result = load(RAWS[kind]())
    assert plot.draw(result, kind=kind) == plot.draw(result, kind=kind)


def test_no_finding_rests_on_a_flawed_design() -> None:
    said = words(plot.draw(load(documents.scenes(ALL)), kind="bars")).splitlines()
    title = next(line for line in said if "memslot update:" in line.lower())
    assert "no-second-phase" not in title
    assert "8.80 ms under sync" in title


def test_what_was_not_run_says_so() -> None:
    said = words(plot.draw(load(documents.scaling()), kind="scaling"))
    assert "extrapolated to 64 TiB: 125 s under inline" in said.replace("\n", " ")
    assert "extrapolated, not run" in said


def test_what_stays_and_what_goes_is_told_apart() -> None:
    said = words(plot.draw(load(documents.both_mmus()), kind="retained")).replace("\n", " ")
    assert "MiB stay under" in said
    assert "2.0 MiB) at most, 2.0 MiB stay" in said
    assert "gone after 8.00 ms" in said
    assert "sync" not in said, "it keeps no obsolete pages"


def test_scenes_get_a_panel_each() -> None:
    raw = documents.scenes()
    raw["runs"] += [documents.scene_run("sync", 0, scene="halted-vcpu")]
    said = words(plot.draw(load(raw)))
    assert "2 scenes" in said
    assert "halted-vcpu: 1 GiB" in said
    one = words(plot.draw(load(raw), scene="halted-vcpu"))
    assert "memslot-delete" not in one


def test_results_from_before_the_scenes_are_drawn() -> None:
    for kind in ("drop", "zap"):
        assert plot.draw(load(documents.bench(kind))).startswith(b"<?xml")
    assert plot.draw(load(documents.micro())).startswith(b"<?xml")


def test_a_chosen_field_and_design_are_drawn() -> None:
    picture = plot.draw(load(documents.scenes()), kind="percentiles", field="step_units", designs=["inline"])
    said = words(picture)
    assert "step_units" in said
    assert "async-worker" not in said


@pytest.mark.parametrize(
    ("raw", "options", "message"),
    [
        (documents.bench(), {"format": "gif"}, "svg, png, pdf"),
        (documents.bench(), {"kind": "bar"}, "did you mean 'bars'"),
        (documents.bench() | {"runs": []}, {}, "no runs"),
        (documents.replay() | {"zaps": []}, {}, "neither a timeline nor zaps"),
        (documents.replay(), {"kind": "pages"}, "no timeline"),
        (documents.replay(), {"kind": "bars"}, "known: recording, pages, causes, storms"),
        (documents.replay(), {"scene": "cr0-wp"}, "a recording has none"),
        ({"schema": "tdpmmu.conform/1", "cases": []}, {}, "ConformReport has no chart"),
        (documents.micro(), {"kind": "timeline"}, "bars only"),
        (documents.bench(), {"kind": "timeline"}, "--timeline"),
        (documents.bench(), {"kind": "scaling"}, "zap-64t"),
        (documents.bench(), {"kind": "attribution"}, "who paid"),
        (documents.bench(), {"kind": "backlog"}, "backlog"),
        (documents.scenes(), {"kind": "retained"}, "--design shadow-gen"),
        (documents.bench(), {"kind": "percentiles"}, "no run has curves"),
        (documents.bench(), {"field": "access_ns"}, "only percentiles"),
        (documents.scenes(), {"kind": "percentiles", "field": "nothing"}, "known: access_ns"),
        (documents.bench(), {"scene": "cr0wp"}, "did you mean 'cr0-wp'"),
        (documents.bench(), {"designs": ["async"]}, "design='async'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(raw: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=re.escape(message)):
        plot.draw(load(raw), **options)


def test_plots_come_from_the_command_line(cli: Cli, tmp_path: Path) -> None:
    source = tmp_path / "r.json"
    source.write_text(json.dumps(documents.scenes()))
    ran = cli("plot", source, "-o", tmp_path / "p.svg", "--kind", "percentiles", "--design", "inline,sync")
    assert ran.code == 0, ran.err
    assert "async-worker" not in words((tmp_path / "p.svg").read_bytes())
    assert cli("plot", source, "-o", tmp_path / "q.svg", "--kind", "nothing").code == 2
    assert cli("plot", source, "-o", tmp_path / "q.svg", "--kind", "scaling").code == 2
    assert not (tmp_path / "q.svg").exists()


def test_a_parquet_file_is_drawn_like_its_json(tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    result = load(documents.scenes())
    parquet.write_table(result.to_arrow(), tmp_path / "r.parquet")
    back = tdpmmu.load_file(tmp_path / "r.parquet")
    for kind in ("timeline", "attribution"):
        assert plot.draw(back, kind=kind) == plot.draw(result, kind=kind), kind


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("blocked_ns", {"max": 77_000, "p50": 40_000}, "fault blocked, longest"),
        ("close_ns", {"total": 900_000, "zap_all": 400_000}, "VM closed"),
    ],
)
def test_a_scene_without_the_usual_measures_shows_its_own(
    field: str, value: dict[str, int], said: str
) -> None:
    raw = documents.scenes()
    for run in raw["runs"]:
        run.update({field: value, "update_ns": None, "block_update_ns": None, "visible_last_ns": None})
    text = words(plot.draw(load(raw)))
    assert said in text
    assert "Nothing was measured" not in text
    assert "memslot update" not in text, "no bar, no name"
