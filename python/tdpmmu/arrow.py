"""Results as Arrow tables and Parquet files, there and back (`pip install 'tdpmmu[arrow]'`).

A row is a run. Nested numbers become columns whose dotted names carry the unit (`teardown.ns_per_spte`);
curves, attribution and backlog series are list columns; host, build, limits and the request, which belong to
the whole file, are JSON in the schema's metadata under `tdpmmu`. What went out that way comes back the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from tdpmmu.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ["METADATA", "from_parquet", "to_table"]

METADATA = b"tdpmmu"
Raw = Mapping[str, Any]
#: Of a run: pairs of numbers, and what the two are called in the list column.
_PAIRS = {
    "curves": ("value", "count"),
    "rcu.backlog_series": ("t_ns", "pages"),
    "shadow.retained_series": ("t_ns", "pages"),
    "fit.points": ("sptes", "ns"),
}


def _pyarrow() -> Any:
    try:
        import pyarrow
    except ImportError as error:
        raise Unsupported("Arrow export needs pyarrow: pip install 'tdpmmu[arrow]'") from error
    return pyarrow


def to_table(rows: list[Raw], about: Raw) -> pa.Table:
    """Return one row an object; `about` goes to the metadata as JSON text.

    Raises:
        Unsupported: pyarrow is not installed.
    """
    pa = _pyarrow()
    flat = [_flatten(row, "") for row in rows]
    columns: dict[str, Any] = {}
    as_json: list[str] = []
    for name in dict.fromkeys(name for row in flat for name in row):
        values = [row.get(name) for row in flat]
        try:
            columns[name] = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
            as_json.append(name)
            columns[name] = pa.array([None if value is None else json.dumps(value) for value in values])
    header = {"about": about, "json_columns": as_json, "columns": list(columns)}
    return pa.table(columns).replace_schema_metadata({METADATA: json.dumps(header).encode()})


def from_parquet(data: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object of a result that was written as Parquet; times and sizes in the units they had.

    Raises:
        InvalidArgument: not Parquet, or not a result of tdpmmu.
        Unsupported: pyarrow is not installed.
    """
    pa = _pyarrow()
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(pa.BufferReader(data))
    except (pa.ArrowException, OSError) as error:
        raise InvalidArgument(f"{source} is not Parquet: {error}") from error
    try:
        header = json.loads((table.schema.metadata or {})[METADATA])
        raw = dict(header["about"])
        rows_name, as_json = raw.pop("rows_are"), set(header["json_columns"])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidArgument(
            f"{source} is not a result of tdpmmu: its schema has no such metadata"
        ) from error
    raw[rows_name] = [_nest(row, as_json) for row in table.to_pylist()]
    return raw


def _flatten(raw: Raw, prefix: str) -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in raw.items():
        path = prefix + name
        if isinstance(value, Mapping):
            out.update(_flatten(value, path + "."))
        else:
            pair = _PAIRS.get(path) or _PAIRS.get(prefix.rstrip("."))
            if pair and isinstance(value, list):
                value = [dict(zip(pair, item, strict=True)) for item in value]
            out[path] = value
    return out


def _nest(row: Raw, as_json: set[str]) -> dict[str, Any]:
    """Undo `_flatten`. A value that is absent in this row but not in others is left out."""
    out: dict[str, Any] = {}
    for path, value in row.items():
        if value is None:
            # Either null, or of an object that this run does not have: None both times for whoever asks.
            if "." not in path:
                out.setdefault(path, None)
            continue
        if path in as_json:
            value = json.loads(value)
        elif isinstance(value, list):
            value = [_without_nulls(item) for item in value]
        *parents, last = path.split(".")
        pair = _PAIRS.get(path) or _PAIRS.get(".".join(parents))
        if pair and isinstance(value, list):
            value = [[item[name] for name in pair] for item in value]
        at = out
        for parent in parents:
            inner = at.get(parent)
            if not isinstance(inner, dict):
                inner = at[parent] = {}
            at = inner
        at[last] = value
    return out


def _without_nulls(item: Any) -> Any:
    """Leave out what a struct has only because another struct of its column has it."""
    if not isinstance(item, dict):
        return item
    return {name: _without_nulls(value) for name, value in item.items() if value is not None}
