"""The two MMUs side by side: the result, its table and picture, and the command that makes them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest

import documents
import tdpmmu
from conftest import ROOT, Cli
from tdpmmu import mmus, mmus_table, plot, table
from tdpmmu.cli.output import encode

MMUS = ("tdp", "shadow-direct", "shadow-guest")
PAGE = ROOT / "docs" / "tdp-against-shadow.md"


def load(raw: dict[str, Any]) -> Any:
    return tdpmmu.load(json.dumps(raw))


@pytest.fixture(scope="module")
def measured() -> tdpmmu.Versus:
    return tdpmmu.versus(memory=["16M", "32M"], vcpus=2, reps=1, seed=1)


def test_a_result_comes_back_typed_and_goes_out_unchanged() -> None:
    raw = documents.versus()
    result = load(raw)
    assert type(result) is tdpmmu.Versus
    assert json.loads(result.to_json()) == raw
    assert repr(result) == "Versus(guests=6, rows=54, seed=7)"
    assert result.to_rows()[0]["mmu"] == "tdp"
    assert result.to_numpy()["zap_total_ns"].size == 54


def test_a_cell_has_the_medians_of_its_repetitions() -> None:
    result = load(documents.versus(reps=3))
    cell = result.cell("shadow-direct", "16G", 2)
    assert len(cell.rows) == 3
    assert cell.median("zap_visible_ns") == 121_200
    assert cell.median("rmap_bytes") == 32 << 20
    assert cell.books_bytes == cell.median("metadata_bytes") + (32 << 20)
    assert cell.memory == cell.median("tables_bytes") + cell.books_bytes
    assert [c.mmu for c in result.cells()[:3]] == list(MMUS)
    with pytest.raises(tdpmmu.InvalidArgument, match="there are 4 GiB with 1 vCPUs"):
        result.cell("tdp", "5G", 1)
    with pytest.raises(tdpmmu.InvalidArgument, match="did you mean 'tdp'"):
        result.cell("tpd", "4G", 1)


def test_what_was_not_measured_is_none_and_a_dash() -> None:
    raw = documents.versus((4,), (1,), reps=1)
    for row in raw["rows"]:
        row["zap_cpu_ns"] = None
        if row["mmu"] == "tdp":
            row["rmap_bytes"] = row["refault_ns"] = None
    result = load(raw)
    assert result.cell("tdp", "4G", 1).median("refault_ns") is None
    text = mmus_table.render_versus(result)
    assert "CPU" not in text.replace("vCPU", ""), "no row has it"
    assert next(line for line in text.splitlines() if line.startswith("4 GiB")).endswith(" -")
    assert "grows by" not in text, "one size does not grow"


def test_the_table_fits_and_says_what_grows() -> None:
    text = mmus_table.render_versus(load(documents.versus()))
    assert max(map(len, text.splitlines())) <= table.WIDTH
    assert "medians of 3 repetitions" in text
    grown = text.partition("From 4 GiB to 64 GiB, 16 times the guest")[2].splitlines()
    rows = {tuple(line.split()[:2]): line.split()[2::2] for line in grown if line.strip()[:1].isdigit()}
    assert len(rows) == 6
    visible, _, total, *_ = rows["2", "shadow-guest"]
    assert (visible, total) == ("1.00", "16.0")


def test_long_figures_leave_columns_out_before_they_break_the_table() -> None:
    raw = documents.versus()
    for row in raw["rows"]:
        for name in ("tables_bytes", "metadata_bytes"):
            row[name] = row[name] * 1023 + 7 * 1024
    text = mmus_table.render_versus(load(raw))
    assert max(map(len, text.splitlines())) <= table.WIDTH
    assert "visible" in text


@pytest.mark.parametrize(("sizes", "vcpus"), [((4, 16, 64), (1, 2)), ((4,), (1, 2, 4)), ((4,), (1,))])
def test_the_picture_has_a_panel_a_measure(sizes: tuple[int, ...], vcpus: tuple[int, ...]) -> None:
    pytest.importorskip("matplotlib")
    result = load(documents.versus(sizes, vcpus))
    picture = plot.draw(result)
    said = "\n".join(re.findall(r"<!--(.*?)-->", picture.decode(), re.DOTALL))
    for text in ("visible to the last vCPU", "in total", "memory:", "one page fault", *MMUS):
        assert text in said
    assert ("guest memory" if len(sizes) > 1 or len(vcpus) == 1 else "vCPUs") in said


@pytest.mark.parametrize(
    ("options", "named"),
    [({"kind": "bars"}, "one picture"), ({"scene": "x"}, "scene="), ({"designs": ["sync"]}, "designs=")],
)
def test_a_picture_takes_no_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=named):
        plot.draw(load(documents.versus()), **options)


def test_a_damaged_file_is_refused_by_its_path() -> None:
    raw = documents.versus()
    raw["rows"][3]["zap_hold_ns"] = "long"
    with pytest.raises(tdpmmu.InvalidArgument, match=r"rows\[3\].zap_hold_ns is 'long', expected a number"):
        load(raw)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"memory": []}, "memory: expected at least one"),
        ({"vcpus": []}, "vcpus: expected at least one"),
        ({"memory": "4X"}, "memory='4X'"),
        ({"memory": ["1G", 4097]}, "multiple of the page size"),
        ({"memory": "512T"}, "at most 256 TiB"),
        ({"vcpus": [1, 0]}, "vcpus=0"),
        ({"vcpus": True}, "vcpus=True"),
        ({"page": "8K"}, "4K, 2M, 1G"),
        ({"reps": 0}, "reps=0"),
        ({"profile": "6"}, "profile='6'"),
        ({"seed": -1}, "seed=-1"),
        ({"timeout": -1.0}, "timeout=-1.0"),
    ],
)
def test_bad_input_is_told_by_value_and_rule(options: dict[str, Any], named: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=re.escape(named)):
        tdpmmu.versus(**options)


def test_values_that_come_twice_are_run_once() -> None:
    config = mmus.versus_config(memory="64M,16M,64M", vcpus=(2, 2), seed=1)
    assert config["memory_bytes"] == [64 << 20, 16 << 20]
    assert config["vcpus"] == [2]


def test_a_run_measures_every_guest_under_every_mmu(measured: tdpmmu.Versus) -> None:
    assert measured.schema == "tdpmmu.versus/1"
    assert {(c.mmu, c.memory_bytes, c.vcpus) for c in measured.cells()} == {
        (mmu, size << 20, 2) for mmu in MMUS for size in (16, 32)
    }
    for row in measured.rows:
        assert row.sptes is not None
        assert row.sptes >= row.memory_bytes >> 12, "every page is mapped when the zap begins"
        assert row.tables_bytes is not None
        assert row.tables_bytes >= tdpmmu.table_bytes(row.memory_bytes) - 4096
        assert row.fault_ns is not None
        assert row.fault_ns > 0
        for name in ("zap_visible_ns", "zap_hold_ns", "zap_total_ns", "zap_cpu_ns"):
            assert getattr(row, name) > 0, (row.mmu, name)
        assert row.zap_longest_hold_ns is not None
        assert row.zap_hold_ns is not None
        assert row.zap_longest_hold_ns >= row.zap_hold_ns
        assert row.design == ("sync" if row.mmu == "tdp" else "shadow-gen")


def test_only_the_shadow_mmu_keeps_reverse_maps_and_only_a_shadowed_guest_tables(
    measured: tdpmmu.Versus,
) -> None:
    for cell in measured.cells():
        rmaps, own = cell.median("rmap_bytes"), cell.median("guest_table_bytes")
        assert rmaps is not None
        # One word a page of 4 KiB at the least.
        assert rmaps == 0 if cell.mmu == "tdp" else rmaps >= cell.memory_bytes >> 9
        assert bool(own) == (cell.mmu == "shadow-guest")


def test_the_command_prints_a_table_and_draws(cli: Cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = ("-o", tmp_path / "v.json", "--plot", tmp_path / "v.png")
    ran = cli("versus", "--memory", "16M", "--vcpus", "1", "--reps", "1", "--seed", "1", *files, timeout=110)
    assert ran.code == 0, ran.err
    assert ran.out.startswith("The same guest under two MMUs: 4K pages, kernel 6.12")
    assert max(map(len, ran.out.splitlines())) <= table.WIDTH
    assert (tmp_path / "v.png").read_bytes().startswith(b"\x89PNG")
    saved = tdpmmu.load_file(tmp_path / "v.json")
    assert isinstance(saved, tdpmmu.Versus)
    assert saved.seed == 1
    assert cli("plot", tmp_path / "v.json", "-o", tmp_path / "x.svg", "--kind", "bars").code == 2


def test_its_rows_are_a_sheet_and_its_table_says_what_grows(measured: tdpmmu.Versus) -> None:
    sheet = encode(measured, ".csv", mmus_table.render_versus).decode()
    assert [row["mmu"] for row in csv.DictReader(sheet.splitlines())] == [row.mmu for row in measured.rows]
    assert "From 16 MiB to 32 MiB, 2 times the guest" in mmus_table.render_versus(measured)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--vcpus", "one"], 2, "vcpus='one'"),
        (["--memory", "4Q"], 2, "memory='4Q'"),
        (["--reps", "0"], 2, "reps=0"),
        (["--plot", "x.gif"], 2, "expected a suffix"),
        (["--plot", "x.svg", "-o", "x.svg"], 2, "its own name"),
        (["--memory", "64T"], 4, "64 TiB"),
        (["--memory", "1G", "--max-memory", "1M"], 4, "1 GiB"),
    ],
)
def test_bad_arguments_have_their_exit_code(
    cli: Cli, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    ran = cli("versus", *arguments, cwd=tmp_path)
    assert ran.code == code, ran.err
    assert said in ran.err
    assert list(tmp_path.iterdir()) == []


def test_the_program_in_the_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    exec(compile(code, str(PAGE), "exec"), {})
    assert int(capsys.readouterr().out.split()[1]) > 0


def test_the_page_has_a_place_for_each_block_and_says_every_field() -> None:
    page = PAGE.read_text()
    for name in ("versus", "zap", "churn", "reclaim"):
        assert f"<!-- {name} -->" in page
        assert f"<!-- end of {name} -->" in page
    for field in mmus.MEASURES:
        assert f"`{field}`" in page, field
    for heading, _, _, _ in mmus_table._COLUMNS:
        words = heading.replace("\n", " ")
        assert f"| {words} |" in page, words
