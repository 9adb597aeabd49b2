"""Results: typed, frozen, and exported without loss."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest

import documents
import tdpmmu
from tdpmmu import plot, recorded_table, table
from tdpmmu.results import flatten


def load(raw: dict[str, Any]) -> Any:
    return tdpmmu.load(json.dumps(raw))


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (documents.bench("drop"), tdpmmu.BenchResult),
        (documents.bench("zap"), tdpmmu.BenchResult),
        (documents.micro(), tdpmmu.MicroResult),
        (documents.both_mmus(), tdpmmu.BenchResult),
        (documents.versus(), tdpmmu.Versus),
        (documents.reclaim(), tdpmmu.MicroResult),
        (documents.replay(), tdpmmu.Replay),
    ],
)
def test_a_document_comes_back_typed_and_goes_out_unchanged(raw: dict[str, Any], kind: type) -> None:
    result = load(raw)
    assert type(result) is kind
    assert json.loads(result.to_json()) == raw
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.schema = "other"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '{"schema": "other/1"}', '{"schema": 7}', b"\xff\xfe"]
)
def test_what_is_no_result_is_refused(text: str | bytes) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="the file"):
        tdpmmu.load(text, "the file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"update_ns": [1]}, r"runs\[2\].update_ns is \[1\], expected an object"),
        ({"update_ns": {"total": "1"}}, r"update_ns.total is '1', expected a number"),
        ({"sptes": True}, "sptes is True, expected a number"),
        ({"rcu": {"backlog_series": [[1, None], 3]}}, r"backlog_series\[1\] is 3, expected a list"),
        ({"attribution": {"thread": "x"}}, "attribution is .*, expected a list"),
        ({"teardown": {"cpu_ns": 5}}, "teardown.cpu_ns is 5, expected an object"),
        ({"scene": 5}, "scene is 5, expected text"),
        ({"shadow": {"retained_series": [[0, "x"]]}}, r"shadow.retained_series\[0\]\[1\] is 'x'"),
        ({"shadow": {"zapped": "all"}}, "shadow.zapped is 'all', expected a number"),
    ],
)
def test_a_field_of_a_wrong_type_is_refused_by_its_path(change: dict[str, Any], message: str) -> None:
    raw = documents.bench("zap")
    raw["runs"][2].update(change)
    with pytest.raises(tdpmmu.InvalidArgument, match=message):
        load(raw)


def test_fields_of_other_versions_and_nulls_are_no_wrong_type() -> None:
    raw = documents.scenes()
    raw["runs"][0] = dict.fromkeys(raw["runs"][0]) | {"rep": 0, "vcpus": 1, "sptes": 1, "later_ns": ["x"]}
    raw["runs"][0] |= {"memory_bytes": 4096, "table_pages": 1, "table_bytes": 4096}
    assert load(raw).runs[0].update_ns is None


def test_a_result_is_a_line_where_it_is_shown() -> None:
    shown = repr(load(documents.bench("drop")))
    assert shown == "BenchResult(experiment='drop', designs=3, scenes=1, runs=9, seed=7)"


def test_a_run_has_the_numbers_of_its_document() -> None:
    run = load(documents.bench("drop")).runs[0]
    assert (run.design, run.sptes, run.rep) == ("inline", 262_144, 0)
    assert run.block_drop_ns.max == 2_400_000
    assert run.block_drop_ns.p999 is None, "no percentile without samples"
    assert run.update_ns is None, "a drop has no memslot update"


def test_rows_are_flat_and_lose_nothing() -> None:
    result = load(documents.bench("zap"))
    rows = result.to_rows()
    assert len(rows) == 9
    assert rows[0]["update_ns.total"] == result.runs[0].update_ns["total"]
    assert rows[0]["step_units.max"] == 512
    assert dict(flatten({"a": {"b": [1, 2]}, "c": None})) == {"a.b": "[1, 2]", "c": None}


def test_numeric_columns_become_arrays_with_nan_for_nothing() -> None:
    columns = load(documents.bench("drop")).to_numpy()
    assert columns["sptes"].dtype == np.float64
    assert set(columns["sptes"]) == {262_144.0}
    assert math.isnan(columns["step_units.p999"][0])
    assert "design" not in columns


def test_an_arrow_table_has_every_column() -> None:
    pytest.importorskip("pyarrow")
    result = load(documents.bench("drop"))
    arrow = result.to_arrow()
    assert arrow.num_rows == 9
    assert arrow.column("design").to_pylist()[:3] == ["inline", "async-worker", "sync"]
    assert set(arrow.column_names) == {name for row in result.to_rows() for name in row}


def test_the_table_of_a_drop_has_a_row_a_design_and_medians() -> None:
    text = table.render_bench(load(documents.bench("drop")))
    rows = {
        line.split()[0]: line for line in text.splitlines() if line and line.split()[0] in ("inline", "sync")
    }
    assert "2.40 ms" in rows["inline"]
    assert "medians of 3 repetitions" in text
    assert "515" in rows["sync"], "what stays is shown"
    assert "262,144 SPTEs" in text


def test_the_table_of_a_zap_shows_the_update() -> None:
    text = table.render_bench(load(documents.bench("zap")))
    assert "memslot" in text
    assert "excl. hold" in text
    assert "baseline" not in text, "columns of the other experiment stay away"


def test_a_table_fits_a_terminal_and_a_wide_one_has_more() -> None:
    result = load(documents.scenes())
    narrow, wide = table.render_bench(result), table.render_bench(result, wide=True)
    assert max(map(len, narrow.splitlines())) <= table.WIDTH
    for heading in ("yields", "owner", "hand-offs", "CPU of"):
        assert heading in wide
        assert heading not in narrow


def test_what_must_be_0_is_a_line_where_it_is_and_a_column_where_it_is_not() -> None:
    sound = documents.scenes()
    sound["runs"] = [run for run in sound["runs"] if not run["flawed"]]
    text = table.render_bench(load(sound))
    assert "0 in every row: mapped at return, leaked, violations" in text
    sound["runs"][-1]["table_pages_leaked"] = 3
    text = table.render_bench(load(sound))
    assert "0 in every row: mapped at return, violations" in text
    assert "leaked" in text.split("---")[0], "a column, whatever else has to go"


def test_a_cost_per_spte_is_not_shown_of_many_zaps() -> None:
    raw = documents.scenes()
    assert "ns/SPTE" in table.render_bench(load(raw))
    for run in raw["runs"]:
        run["updates"] = {"count": 100, "update_ns": documents.percentiles(5_000)}
    text = table.render_bench(load(raw))
    assert "ns/entry" in text
    assert "ns/SPTE" not in text


def test_the_tables_of_the_others_show_what_they_hold() -> None:
    assert "write_ns" in table.render_micro(load(documents.micro()))
    text = recorded_table.render_replay(load(documents.replay(2)))
    assert "mismatch 2" in text
    assert "got 5a0" in text
    memslot = next(line for line in text.splitlines() if line.startswith("memslot"))
    assert memslot.split()[1:4] == ["2", "4", "us"], "count and total"


def test_a_table_of_nothing_says_so() -> None:
    assert table.render_bench(load(documents.bench() | {"runs": []})) == "no runs\n"
    assert table.render_micro(load(documents.micro() | {"rows": []})) == "no rows\n"


def test_columns_line_up() -> None:
    lines = table.render(["name", "a\nb"], [["x", "1"], ["longer", "22"]]).splitlines()
    assert len({line.rstrip().rfind("1") for line in lines if "1" in line}) == 1
    assert lines[-1].endswith("22")
    assert set(lines[2]) == {"-", " "}


@pytest.mark.parametrize("raw", [documents.bench("drop"), documents.bench("zap"), documents.micro()])
@pytest.mark.parametrize(("kind", "magic"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_a_result_is_drawn(raw: dict[str, Any], kind: str, magic: bytes) -> None:
    pytest.importorskip("matplotlib")
    assert plot.draw(load(raw), kind).startswith(magic)


def test_the_same_result_draws_the_same_svg() -> None:
    pytest.importorskip("matplotlib")
    result = load(documents.bench("drop"))
    assert plot.draw(result) == plot.draw(result)


def test_what_has_no_chart_is_refused() -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="neither a timeline nor zaps"):
        plot.draw(load(documents.replay() | {"zaps": []}))
    with pytest.raises(tdpmmu.InvalidArgument, match="no runs"):
        plot.draw(load(documents.bench() | {"runs": []}))
    with pytest.raises(tdpmmu.InvalidArgument, match="svg, png, pdf"):
        plot.draw(load(documents.bench()), "gif")
