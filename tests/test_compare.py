"""`compare`: what it calls worse, what it leaves undecided, and what it refuses."""

from __future__ import annotations

import copy
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import documents
import tdpmmu
from conftest import Cli
from tdpmmu import student, table

Raw = dict[str, Any]


def noisy(seed: int, *, slower: float = 1.0, reps: int = 5, spread: float = 0.02) -> Raw:
    """A drop result whose blocks scatter by `spread`, `slower` times as long under async-worker."""
    rng = random.Random(seed)
    raw = documents.bench("drop")
    raw["runs"] = []
    for rep in range(reps):
        for design, blocked in (("inline", 2_400_000), ("async-worker", 11_000)):
            factor = slower if design == "async-worker" else 1.0
            ns = round(blocked * factor * math.exp(rng.gauss(0, spread)))
            raw["runs"].append(documents.run(design, rep, drop=True, blocked=ns))
    return raw


def load(raw: Raw) -> tdpmmu.BenchResult:
    result = tdpmmu.load(json.dumps(raw))
    assert isinstance(result, tdpmmu.BenchResult)
    return result


def rows(comparison: tdpmmu.Comparison, field: str) -> dict[str, tdpmmu.ComparisonRow]:
    return {row.key["design"]: row for row in comparison.rows if row.field == field}


@pytest.mark.parametrize("make", [documents.bench, documents.scenes, lambda: noisy(1), documents.scaling])
def test_a_result_against_itself_is_never_worse(make: Callable[[], Raw]) -> None:
    result = load(make())
    found = tdpmmu.compare(result, result)
    assert found.rows
    assert (found.worse, found.better) == ((), ())
    assert {row.ratio for row in found.rows} == {1.0}


def test_what_is_slower_beyond_its_scatter_is_worse_and_only_that() -> None:
    found = tdpmmu.compare(load(noisy(1)), load(noisy(2, slower=1.5)))
    blocked = rows(found, "block_drop_ns.max")
    assert blocked["async-worker"].worse
    assert blocked["async-worker"].ratio == pytest.approx(1.5, rel=0.05)
    interval = blocked["async-worker"].ci95
    assert interval is not None
    assert interval[0] < 1.5 < interval[1]
    assert not blocked["inline"].worse
    assert [row.field for row in found.worse] == ["block_drop_ns.max"]
    back = tdpmmu.compare(load(noisy(2, slower=1.5)), load(noisy(1)))
    assert [row.field for row in back.better] == ["block_drop_ns.max"]
    assert back.worse == ()


def test_the_same_ratio_is_undecided_where_the_repetitions_scatter_as_much() -> None:
    found = tdpmmu.compare(load(noisy(3, spread=0.8)), load(noisy(4, spread=0.8, slower=1.5)))
    assert found.worse == ()


def test_the_threshold_says_how_much_is_too_much() -> None:
    a, b = load(noisy(1, spread=0.001)), load(noisy(2, spread=0.001, slower=1.1))
    assert tdpmmu.compare(a, b).worse
    assert not tdpmmu.compare(a, b, threshold=0.2).worse


def test_fewer_than_three_repetitions_have_no_interval_and_a_plain_factor() -> None:
    a, b = load(noisy(1, reps=2)), load(noisy(2, reps=2, slower=1.5))
    found = tdpmmu.compare(a, b)
    row = rows(found, "block_drop_ns.max")["async-worker"]
    assert (row.n_a, row.n_b, row.ci95, row.worse) == (2, 2, None, True)
    assert not tdpmmu.compare(a, b, factor=2.0).worse
    assert any("fewer than 3 repetitions" in note for note in found.notes)


def equal_samples(seed: int, *, reps: int = 3, designs: int = 8, spread: float = 0.15) -> tuple[Raw, Raw]:
    """Two zap results of the same machine: `designs` times ten headline and other figures that scatter."""
    rng = random.Random(seed)

    def around(middle: float) -> int:
        return round(middle * math.exp(rng.gauss(0, spread)))

    def one() -> Raw:
        raw = documents.bench("zap")
        raw["runs"] = []
        for rep in range(reps):
            for number in range(designs):
                run = documents.run(f"design-{number}", rep, drop=False, blocked=4_000_000)
                middles = {"total": 4e6, "lock_wait": 3e4, "exclusive_hold": 9e4, "zap": 4e6}
                run["update_ns"] = {name: around(ns) for name, ns in middles.items()}
                run["visible_last_ns"] = around(90_000)
                blocked = {"p50": around(2e4), "p99": around(5e4), "max": around(9e4)}
                run["block_update_ns"] = {"count": 2, **blocked}
                run["step_ns"] = {"count": 9_000, "p99": around(4e4), "max": around(8e4)}
                run["teardown"] = None
                raw["runs"].append(run)
        return raw

    return one(), one()


def test_two_equal_samples_are_not_worse_by_the_number_of_their_rows() -> None:
    seeds, called_worse, by_interval = 60, 0, 0
    for seed in range(seeds):
        found = tdpmmu.compare(*map(load, equal_samples(seed)))
        scattering = [row for row in found.rows if row.ci95 is not None and row.ratio != 1.0]
        assert len(scattering) == 80
        called_worse += bool(found.worse)
        by_interval += any(row.ci95 is not None and row.ci95[0] > 1.05 for row in found.rows)
    assert called_worse <= seeds // 20
    assert by_interval > seeds // 4, "the intervals alone would have called many worse"


def test_with_few_repetitions_only_headline_figures_have_a_verdict() -> None:
    a, b = equal_samples(1, reps=2, spread=0.001)
    for run in b["runs"]:
        run["update_ns"]["total"] *= 2
        run["update_ns"]["lock_wait"] *= 2
        run["visible_last_ns"] *= 2
        for name in ("p50", "p99", "max"):
            run["block_update_ns"][name] *= 2
    found = tdpmmu.compare(load(a), load(b))
    assert {row.field for row in found.worse} == {"update_ns.total"}
    mute = {row.field for row in found.rows if row.worse is None}
    assert mute >= {"block_update_ns.max", "block_update_ns.p99", "visible_last_ns", "update_ns.lock_wait"}
    assert all(row.better is None for row in found.rows if row.worse is None)
    assert found.raw["not_judged"] == sum(row.worse is None for row in found.rows)
    assert "not judged" in table.render_comparison(found)
    assert tdpmmu.load(found.to_json()) == found


def test_a_tail_that_a_repetition_lacks_has_no_verdict() -> None:
    a, b = equal_samples(1, reps=4, spread=0.001)
    for run in b["runs"]:
        run["step_ns"]["max"] *= 2
        run["block_update_ns"]["max"] *= 2
    for run in a["runs"]:
        if run["rep"] == 0:
            run["step_ns"]["max"] = None
    found = tdpmmu.compare(load(a), load(b))
    assert {row.worse for row in found.rows if row.field == "step_ns.max"} == {None}
    assert {row.worse for row in found.rows if row.field == "block_update_ns.max"} == {True}


@pytest.mark.parametrize("reps", [1, 2, 3, 5])
@pytest.mark.parametrize(("kind", "path"), [("zap", "update_ns.total"), ("drop", "block_drop_ns.max")])
@pytest.mark.parametrize("stable", [True, False])
def test_a_doubled_headline_is_1_and_the_same_file_is_0(
    cli: Cli, tmp_path: Path, reps: int, kind: str, path: str, stable: bool
) -> None:
    raw = noisy(1, reps=reps) if kind == "drop" else equal_samples(1, reps=reps, spread=0.03)[0]
    raw["limits"]["stable"] = stable
    doubled = copy.deepcopy(raw)
    field, part = path.split(".")
    for run in doubled["runs"]:
        run[field][part] *= 2
    for name, document in (("a", raw), ("b", doubled)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    ran = cli("compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert ran.code == 1, ran.err
    assert {row["field"] for row in json.loads(ran.out)["rows"] if row["worse"]} == {path}
    assert ("unstable host" in ran.err) == (not stable)
    same = cli("compare", tmp_path / "a.json", tmp_path / "a.json")
    assert same.code == 0, same.err
    assert ("unstable host" in same.err) == (not stable)


@pytest.mark.parametrize("field", ["table_pages_leaked", "violations", "sptes_mapped_at_return"])
def test_a_count_that_must_stay_zero_is_worse_at_one(field: str) -> None:
    a, b = noisy(1), noisy(1)
    for run in a["runs"] + b["runs"]:
        run[field] = 0
    b["runs"][0][field] = 1
    found = tdpmmu.compare(load(a), load(b))
    assert [(row.field, row.a, row.b, row.ratio) for row in found.worse] == [(field, 0, 1, None)]
    assert json.loads(found.to_json())["worse"] == 1


def test_times_below_the_clocks_own_cost_are_all_alike() -> None:
    a, b = documents.bench("zap"), documents.bench("zap")
    for run in a["runs"]:
        run["update_ns"]["lock_wait"] = 3
    for run in b["runs"]:
        run["update_ns"]["lock_wait"] = 80
    assert rows(tdpmmu.compare(load(a), load(b)), "update_ns.lock_wait")["sync"].ratio == 1.0


def test_per_limit_takes_a_slower_host_out() -> None:
    a, b = noisy(1), noisy(1)
    b["limits"]["swap_ns"] = 2 * a["limits"]["swap_ns"]
    for run in b["runs"]:
        run["block_drop_ns"]["max"] *= 2
    assert tdpmmu.compare(load(a), load(b)).worse
    found = tdpmmu.compare(load(a), load(b), per_limit="swap_ns")
    assert not [row for row in found.worse if row.field == "block_drop_ns.max"]
    with pytest.raises(tdpmmu.InvalidArgument, match="per_limit='nothing'"):
        tdpmmu.compare(load(a), load(b), per_limit="nothing")


def test_runs_match_by_what_they_measured() -> None:
    a, b = noisy(1), noisy(1)
    for run in b["runs"]:
        if run["design"] == "inline":
            run["passes"] = "1G,root"
    found = tdpmmu.compare(load(a), load(b))
    assert {row.key["design"] for row in found.rows} == {"async-worker"}
    assert [key["passes"] for key in found.only_a] == ["root"]
    assert [key["passes"] for key in found.only_b] == ["1G,root"]
    assert sum("only in" in note for note in found.notes) == 2


def test_what_a_reader_must_know_is_noted() -> None:
    a, b = noisy(1), noisy(1)
    b["host"]["cpus"] = 64
    b["limits"]["stable"] = False
    b["config"]["workers"], a["config"]["workers"] = 4, 1
    b["build"]["profile"] = "debug"
    notes = "\n".join(tdpmmu.compare(load(a), load(b)).notes)
    for said in ("cpus is 2", "unstable host", "workers is 1 and 4", "release against debug"):
        assert said in notes


def test_micro_results_are_compared_by_operation() -> None:
    a, b = documents.micro(), documents.micro()
    b["rows"][1]["ns"] *= 2
    found = tdpmmu.compare(*(tdpmmu.load(json.dumps(raw)) for raw in (a, b)))  # type: ignore[arg-type]
    assert [row.key["name"] for row in found.worse] == ["populate, bulk"]


@pytest.mark.parametrize("suffix", ["json", "parquet"])
def test_files_of_either_format_compare_alike(tmp_path: Path, suffix: str) -> None:
    result = load(documents.scenes(reps=3))
    path = tmp_path / f"r.{suffix}"
    if suffix == "json":
        path.write_text(result.to_json())
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(result.to_arrow(), path)
    found = tdpmmu.compare(result, path)
    assert len(found.rows) == len(tdpmmu.compare(result, result).rows)
    assert {row.ratio for row in found.rows} == {1.0}
    assert found.only_a == found.only_b == ()


def test_a_comparison_is_a_document_like_the_others() -> None:
    found = tdpmmu.compare(load(noisy(1)), load(noisy(2, slower=1.5)))
    back = tdpmmu.load(found.to_json())
    assert isinstance(back, tdpmmu.Comparison)
    assert back.raw == json.loads(found.to_json())
    assert back.worse == found.worse
    assert found.to_rows()[0]["field"] == "block_drop_ns.max"
    assert found.raw["schema"] == "tdpmmu.compare/1"
    for row in found.raw["rows"]:
        assert {"field", "a", "b", "ratio", "ci95", "worse"} <= row.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, "threshold=-0.1"),
        ({"threshold": 1.0}, "threshold"),
        ({"factor": 1.0}, "factor=1.0"),
    ],
)
def test_a_threshold_that_makes_no_sense_is_refused(options: Raw, message: str) -> None:
    result = load(noisy(1))
    with pytest.raises(tdpmmu.InvalidArgument, match=message):
        tdpmmu.compare(result, result, **options)


def test_results_without_a_run_in_common_are_refused() -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="no run in common"):
        tdpmmu.compare(load(documents.bench("drop")), load(documents.bench("zap")))
    with pytest.raises(tdpmmu.InvalidArgument, match="no run in common"):
        tdpmmu.compare(load(noisy(1)), load({**noisy(1), "runs": []}))


def test_students_t_is_the_one_in_the_tables() -> None:
    for freedom, value in ((1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042)):
        assert student.t_quantile(0.975, freedom) == pytest.approx(value, abs=5e-4)
    assert student.t_quantile(0.95, 5) == pytest.approx(2.015, abs=5e-4)


def test_welchs_test_and_welchs_interval_agree() -> None:
    rng = random.Random(3)
    for _ in range(50):
        a = [rng.gauss(0, 1) for _ in range(3)]
        b = [rng.gauss(1, 2) for _ in range(5)]
        low, high = student.welch_interval(a, b)
        assert student.welch_above(a, b, low) == pytest.approx(0.025, rel=1e-6)
        assert student.welch_above(a, b, high) == pytest.approx(0.975, rel=1e-6)
    assert 0 < student.welch_above([0, 1e-3, 2e-3], [9, 9.001, 9.002], 0.0) < 1e-12, "a tail keeps its digits"
    assert student.welch_above([1, 1, 1], [2, 2, 2], 0.5) == 0
    assert student.welch_above([1, 1, 1], [2, 2, 2], 1.0) == 1


def test_holm_asks_most_of_the_first_and_stops_at_the_first_that_fails() -> None:
    assert student.holm([]) == []
    assert student.holm([0.05]) == [True]
    assert student.holm([0.04, 0.001, 0.02]) == [True, True, True]
    assert student.holm([0.04, 0.001, 0.03]) == [False, True, False]
    assert student.holm([0.02, 0.03, 0.04]) == [False, False, False]


def test_an_interval_holds_the_truth_19_times_of_20() -> None:
    rng = random.Random(7)
    inside = 0
    for _ in range(1_000):
        a = [rng.gauss(0, 1) for _ in range(4)]
        b = [rng.gauss(0.5, 3) for _ in range(6)]
        low, high = student.welch_interval(a, b)
        inside += low <= 0.5 <= high
    assert 930 <= inside <= 970


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    made = {"same": noisy(1), "worse": noisy(2, slower=1.5), "other": documents.bench("zap")}
    for name, raw in made.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(raw))
    (tmp_path / "bad.json").write_text('{"schema": "tdpmmu.bench.zap/1", "runs": 7}')
    wrong = documents.bench("zap")
    wrong["runs"][0]["update_ns"] = [1]
    (tmp_path / "wrong.json").write_text(json.dumps(wrong))
    (tmp_path / "bad.parquet").write_bytes(b"not parquet")
    (tmp_path / "replay.json").write_text(json.dumps(documents.replay()))
    return {path.name: path for path in tmp_path.iterdir()}


def test_the_exit_code_says_whether_it_is_worse(cli: Cli, files: dict[str, Path]) -> None:
    same = cli("compare", files["same.json"], files["same.json"])
    assert same.code == 0, same.err
    assert "0 worse" in same.out
    worse = cli("compare", files["same.json"], files["worse.json"])
    assert worse.code == 1
    assert "WORSE" in worse.out
    assert "block_drop_ns.max" in worse.out
    assert "worse: 1 of" in worse.err
    assert cli("compare", files["worse.json"], files["same.json"]).code == 0
    assert cli("compare", files["same.json"], files["worse.json"], "--threshold", "0.9").code == 0
    everything = cli("compare", files["same.json"], files["same.json"], "--all")
    assert everything.out.count("\n") > 30


def test_compare_prints_json_and_writes_files(cli: Cli, files: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "c.csv"
    ran = cli("compare", files["same.json"], files["worse.json"], "--json", "-o", target, "--quiet")
    assert ran.code == 1
    raw = json.loads(ran.out)
    assert raw["schema"] == "tdpmmu.compare/1"
    assert raw["worse"] == sum(row["worse"] for row in raw["rows"]) == 1
    assert len(target.read_text().splitlines()) == 1 + len(raw["rows"])


@pytest.mark.parametrize(
    ("a", "b", "code", "message"),
    [
        ("same.json", "nothing.json", 3, "nothing.json"),
        ("bad.json", "same.json", 3, "bad.json"),
        ("wrong.json", "wrong.json", 3, "runs[0].update_ns is [1], expected an object"),
        ("same.json", "bad.parquet", 3, "bad.parquet"),
        ("same.json", "other.json", 2, "no run in common"),
        ("same.json", "replay.json", 2, "cannot be compared"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    cli: Cli, files: dict[str, Path], tmp_path: Path, a: str, b: str, code: int, message: str
) -> None:
    if b.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    ran = cli("compare", tmp_path / a, tmp_path / b)
    assert ran.code == code, ran.err
    assert message in ran.err
    assert ran.out == ""


def test_a_comparison_changes_neither_result() -> None:
    raw = noisy(1)
    before = copy.deepcopy(raw)
    result = load(raw)
    tdpmmu.compare(result, result, per_limit="swap_ns")
    assert result.raw == before
