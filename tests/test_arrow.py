"""Arrow and Parquet: a row a run, units in names, nothing lost on the way there and back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest

import documents
import tdpmmu
from conftest import Cli

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")


def load(raw: dict[str, Any]) -> Any:
    return tdpmmu.load(json.dumps(raw))


def there_and_back(result: Any, folder: Path) -> Any:
    path = folder / "r.parquet"
    parquet.write_table(result.to_arrow(), path)
    return tdpmmu.load_file(path)


def without_nothing(value: Any) -> Any:
    """Without nulls: a column is null where a run has no such object, and where it has a null."""
    if isinstance(value, dict):
        kept = {name: without_nothing(inner) for name, inner in value.items() if inner is not None}
        return {name: inner for name, inner in kept.items() if inner != {}}
    return [without_nothing(inner) for inner in value] if isinstance(value, list) else value


@pytest.mark.parametrize(
    "raw",
    [
        documents.scenes(reps=2),
        documents.scaling(),
        documents.bench("drop"),
        documents.micro(),
        documents.both_mmus(),
        documents.versus(),
        documents.reclaim(),
    ],
)
def test_a_result_comes_back_from_parquet_as_it_was(tmp_path: Path, raw: dict[str, Any]) -> None:
    result = load(raw)
    back = there_and_back(result, tmp_path)
    assert type(back) is type(result)
    assert without_nothing(back.raw) == without_nothing(dict(result.raw))


def test_columns_have_units_and_curves_are_lists_of_pairs() -> None:
    table = load(documents.scenes()).to_arrow()
    assert table.num_rows == 3
    assert {"update_ns.total", "teardown.ns_per_spte", "memory_bytes", "teardown.cpu_ns.worker"} <= set(
        table.column_names
    )
    curve = table.schema.field("curves.access_ns").type
    assert pa.types.is_list(curve)
    assert {field.name for field in curve.value_type} == {"value", "count"}
    first = table.column("curves.access_ns")[0].as_py()
    assert sum(bucket["count"] for bucket in first) == 20_000
    assert table.column("sptes").type == pa.int64()


def test_what_belongs_to_the_whole_file_is_in_its_metadata() -> None:
    result = load(documents.scenes())
    about = json.loads(result.to_arrow().schema.metadata[b"tdpmmu"])["about"]
    assert about["host"] == result.host
    assert about["config"] == result.config
    assert about["schema"] == "tdpmmu.bench.zap/1"
    assert "runs" not in about


def test_whoever_takes_an_arrow_stream_takes_a_result() -> None:
    result = load(documents.scenes())
    assert pa.table(result).num_rows == 3
    assert pa.RecordBatchReader.from_stream(result).schema == result.to_arrow().schema


def test_flat_rows_leave_pictures_out() -> None:
    row = load(documents.scenes()).to_rows()[0]
    assert not [name for name in row if "curves" in name or "timeline" in name or "series" in name]
    assert row["others.accesses_late"] == 12


@pytest.mark.parametrize("data", [b"", b"PAR1", b"{}"])
def test_what_is_not_parquet_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(data)
    with pytest.raises(tdpmmu.InvalidArgument, match=r"x\.parquet is not Parquet"):
        tdpmmu.load_file(path)


def test_somebody_elses_parquet_is_refused(tmp_path: Path) -> None:
    sink = io.BytesIO()
    parquet.write_table(pa.table({"design": ["sync"]}), sink)
    path = tmp_path / "x.parquet"
    path.write_bytes(sink.getvalue())
    with pytest.raises(tdpmmu.InvalidArgument, match="not a result of tdpmmu"):
        tdpmmu.load_file(path)


def test_a_real_result_survives_parquet(cli: Cli, tmp_path: Path) -> None:
    common = [
        "bench",
        "zap",
        "--memory",
        "16M",
        "--no-check",
        "--design",
        "inline,async-worker",
        "--seed",
        "1",
    ]
    ran = cli(*common, "--timeline", "--json", "-o", tmp_path / "r.parquet")
    assert ran.code == 0, ran.err
    back = tdpmmu.load_file(tmp_path / "r.parquet")
    assert without_nothing(dict(back.raw)) == without_nothing(json.loads(ran.out))
