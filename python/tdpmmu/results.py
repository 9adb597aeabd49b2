"""Results as frozen, typed objects. Names carry units: `_ns` nanoseconds, `_bytes` bytes.

Each result keeps the JSON object it came from in `raw`, so nothing that the native side adds is lost; the
typed attributes are what most people read. A field that a design does not have is None.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from tdpmmu import shape
from tdpmmu.errors import InvalidArgument
from tdpmmu.shadow import ShadowRun

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from tdpmmu.comparison import Comparison
    from tdpmmu.found import AllocationFailures, Exploration, Museum, Story, Torture
    from tdpmmu.mmus import Versus
    from tdpmmu.recorded import ConformReport, Replay

__all__ = [
    "BenchResult",
    "BenchRun",
    "MicroResult",
    "MicroRow",
    "Percentiles",
    "load",
    "load_file",
]

Raw = Mapping[str, Any]

#: What a run or a result carries for pictures, not for tables: left out of flat rows.
SERIES = ("curves", "timeline", "backlog_series", "retained_series")


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution by its count and percentiles; the unit is that of the field it stands in.

    A percentile with too few samples behind it (fewer than 10/(1-q)) is None, never a guess.
    """

    count: int
    min: int | None
    p50: int | None
    p90: int | None
    p99: int | None
    p999: int | None
    max: int | None

    @classmethod
    def from_raw(cls, raw: object) -> Percentiles | None:
        """Return the distribution of a JSON object, or None where there is none."""
        if not isinstance(raw, Mapping):
            return None
        values = {name: raw.get(name) for name in ("min", "p50", "p90", "p99", "p999", "max")}
        return cls(count=int(raw.get("count", 0)), **values)


@dataclass(frozen=True, slots=True)
class BenchRun:
    """One repetition of `bench zap` or `bench drop` under one design. Times in nanoseconds.

    Attributes:
        scene: what happened to the guest, as a KVM engineer would call it.
        flawed: the design is wrong on purpose: its violations are the result.
        sptes: present leaf SPTEs at the start, counted in the tree.
        update_ns: parts of the memslot update (`bench zap`): total, lock_wait, exclusive_hold, ...
        block_drop_ns: how long the vCPU that dropped its root was blocked (`bench drop`).
        block_baseline_ns: the same where others still hold the root.
        retained_table_pages: tables that stay because the MMU owns a reference.
        teardown: stamps and costs of the teardown, or None where nothing was torn down.
        step_units: SPTE reads and writes between two reschedule checks (no unit).
        updates: count and times of the updates, in scenes that have many.
        attribution: a thread each: its role, its time in ns by phase, whether it took part in the teardown.
        others: what those lost who did not ask for the zap, in ns.
        fit: `zap-64t`: the line through sizes that were built, and what it says of 64 TiB (extrapolated).
        process_exit: how a process ended that left work pending, by the way it ended; times in ns.
        shadow: of a design of the shadow MMU: its pages, its batches, what it retained; else None.
        curves: sparse histograms by field, as [value, count] pairs.
        raw: the whole JSON object.
    """

    scene: str
    design: str
    flawed: bool
    passes: str
    ownership: str
    preempt: str
    kernel_profile: str
    rep: int
    memory_bytes: int
    page: str
    vcpus: int
    sptes: int
    table_pages: int
    table_bytes: int
    update_ns: Raw | None
    block_drop_ns: Percentiles | None
    block_baseline_ns: Percentiles | None
    block_update_ns: Percentiles | None
    visible_ns: Percentiles | None
    visible_last_ns: int | None
    access_ns: Percentiles | None
    step_units: Percentiles | None
    step_ns: Percentiles | None
    retained_table_pages: int | None
    drop_loop: Raw | None
    teardown: Raw | None
    yields: int | None
    table_pages_leaked: int | None
    violations: int | None
    updates: Raw | None
    attribution: tuple[Raw, ...] = field(repr=False)
    others: Raw | None
    fit: Raw | None
    process_exit: Raw | None
    shadow: ShadowRun | None
    curves: Mapping[str, Any] = field(repr=False)
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> BenchRun:
        """Return the typed view of one element of `runs`."""
        h = Percentiles.from_raw
        # Results of before there were scenes have the one of their experiment.
        scene = raw.get("scene") or ("memslot-delete" if raw.get("update_ns") else "cr0-wp")
        return cls(
            scene=str(scene),
            design=str(raw.get("design", "?")),
            flawed=bool(raw.get("flawed")),
            passes=str(raw.get("passes", "?")),
            ownership=str(raw.get("ownership", "?")),
            preempt=str(raw.get("preempt", "?")),
            kernel_profile=str(raw.get("kernel_profile", "?")),
            rep=int(raw.get("rep", 0)),
            memory_bytes=int(raw.get("memory_bytes", 0)),
            page=str(raw.get("page", "?")),
            vcpus=int(raw.get("vcpus", 0)),
            sptes=int(raw.get("sptes", 0)),
            table_pages=int(raw.get("table_pages", 0)),
            table_bytes=int(raw.get("table_bytes", 0)),
            update_ns=raw.get("update_ns"),
            block_drop_ns=h(raw.get("block_drop_ns")),
            block_baseline_ns=h(raw.get("block_baseline_ns")),
            block_update_ns=h(raw.get("block_update_ns")),
            visible_ns=h(raw.get("visible_ns")),
            visible_last_ns=raw.get("visible_last_ns"),
            access_ns=h(raw.get("access_ns")),
            step_units=h(raw.get("step_units")),
            step_ns=h(raw.get("step_ns")),
            retained_table_pages=raw.get("retained_table_pages"),
            drop_loop=raw.get("drop_loop"),
            teardown=raw.get("teardown"),
            yields=raw.get("yields"),
            table_pages_leaked=raw.get("table_pages_leaked"),
            violations=raw.get("violations"),
            updates=raw.get("updates"),
            attribution=tuple(raw.get("attribution") or ()),
            others=raw.get("others"),
            fit=raw.get("fit"),
            process_exit=raw.get("process_exit"),
            shadow=ShadowRun.from_raw(raw.get("shadow")),
            curves=raw.get("curves") or {},
            raw=raw,
        )


class _Document:
    """What all results share: the JSON they came from and its exports. No units of its own."""

    __slots__ = ()
    _ROWS: ClassVar[str] = "rows"
    raw: Raw

    def to_json(self, indent: int | None = None) -> str:
        """Return the result as JSON text, exactly as the native side gave it."""
        return json.dumps(self.raw, indent=indent)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict a row, for a table or a sheet; nested names are joined by a dot.

        Lists become JSON text. Curves and time lines, which are for pictures, are left to `to_arrow`.
        """
        return [dict(flatten(row)) for row in self._rows()]

    def to_numpy(self) -> dict[str, np.ndarray]:
        """Return the numeric columns of `to_rows` as float64 arrays, NaN where a row has no value."""
        import numpy as np

        rows = self.to_rows()
        columns: dict[str, np.ndarray] = {}
        for name in dict.fromkeys(name for row in rows for name in row):
            values = [row.get(name) for row in rows]
            if all(v is None or (isinstance(v, (int, float)) and not isinstance(v, bool)) for v in values):
                columns[name] = np.array([float("nan") if v is None else v for v in values], dtype=np.float64)
        return columns

    def to_arrow(self) -> pa.Table:
        """Return an Arrow table, a row a run: dotted names with units, curves and series as list columns.

        Host, build, limits and request are JSON in the schema's metadata, under `tdpmmu`.

        Raises:
            Unsupported: pyarrow is not installed (`pip install 'tdpmmu[arrow]'`).
        """
        from tdpmmu.arrow import to_table

        rows = self._rows()
        about = {name: value for name, value in self.raw.items() if value is not self.raw.get(self._ROWS)}
        return to_table(rows, {**about, "rows_are": self._ROWS})

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """Give the Arrow table to whoever takes one (pandas, polars, duckdb) without a copy."""
        return self.to_arrow().__arrow_c_stream__(requested_schema)

    def _rows(self) -> list[Raw]:
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class BenchResult(_Document):
    """What `bench zap` or `bench drop` measured.

    Attributes:
        schema: `tdpmmu.bench.zap/1`.
        experiment: `zap` or `drop`.
        limits: ns per 8-byte entry that this host's memory allows, measured in the same run.
        runs: one per design and repetition, in the order run.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "runs"

    schema: str
    experiment: str
    seed: int | None
    host: Raw
    build: Raw
    config: Raw
    limits: Raw
    runs: tuple[BenchRun, ...]
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> BenchResult:
        """Return the typed view of a result object."""
        return cls(
            schema=str(raw.get("schema", "")),
            experiment=str(raw.get("experiment", "zap")),
            seed=raw.get("seed"),
            host=raw.get("host") or {},
            build=raw.get("build") or {},
            config=raw.get("config") or {},
            limits=raw.get("limits") or {},
            runs=tuple(BenchRun.from_raw(run) for run in raw.get("runs", ())),
            raw=raw,
        )

    def __repr__(self) -> str:
        designs, scenes = ({getattr(run, name) for run in self.runs} for name in ("design", "scene"))
        return (
            f"BenchResult(experiment={self.experiment!r}, designs={len(designs)}, scenes={len(scenes)}, "
            f"runs={len(self.runs)}, seed={self.seed!r})"
        )

    def _rows(self) -> list[Raw]:
        return [run.raw for run in self.runs]


@dataclass(frozen=True, slots=True)
class MicroRow:
    """One measured operation: `ns` each, and its ratio to the limit named `of` (None where there is none).

    `goal` is what the design asks for, in the unit of `ratio` where there is one, else in ns.
    """

    name: str
    ns: float | None
    ratio: float | None
    of: str | None
    goal: float | None
    raw: Raw = field(repr=False)


@dataclass(frozen=True, slots=True)
class MicroResult(_Document):
    """What `bench populate`, `fault`, `walk` or `rcu` measured, in nanoseconds an operation.

    Attributes:
        limits: ns per 8-byte entry that this host's memory allows, measured in the same run.
        rows: one per operation.
        raw: the whole JSON object.
    """

    schema: str
    seed: int | None
    limits: Raw
    rows: tuple[MicroRow, ...]
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> MicroResult:
        """Return the typed view of a result object."""
        rows = tuple(
            MicroRow(
                str(row.get("name", "?")),
                row.get("ns"),
                row.get("ratio"),
                row.get("of"),
                row.get("goal"),
                row,
            )
            for row in raw.get("rows", ())
        )
        return cls(str(raw.get("schema", "")), raw.get("seed"), raw.get("limits") or {}, rows, raw)

    def _rows(self) -> list[Raw]:
        return [row.raw for row in self.rows]


def flatten(raw: Raw, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested objects as (dotted name, value); lists become JSON text, series go."""
    for name, value in raw.items():
        if name in SERIES:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, (list, tuple)) else value


Document: TypeAlias = (
    "BenchResult | MicroResult | Versus | Replay | ConformReport | Comparison"
    " | Exploration | Museum | Torture | AllocationFailures | Story"
)
#: Schemas of `tdpmmu.found`, in the order of its classes below.
_FOUND = ("tdpmmu.explore/", "tdpmmu.bugs/", "tdpmmu.torture/", "tdpmmu.faults/", "tdpmmu.story/")


def load(text: str | bytes, source: str = "the text") -> Document:
    """Return the typed result of JSON text that `--json` or `-o FILE.json` wrote.

    Raises:
        InvalidArgument: not JSON, or not a schema of tdpmmu; `source` names it in the message.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{source} is not JSON: {error}") from error
    return typed(raw, source)


def load_file(path: str | os.PathLike[str]) -> Document:
    """Return the typed result of a file that `-o` wrote: Parquet where the suffix says so, else JSON text.

    Raises:
        OSError: it cannot be read.
        InvalidArgument: not what its suffix says, or not a result of tdpmmu; the message names the file.
        Unsupported: Parquet, and pyarrow is not installed.
    """
    where = Path(path)
    data = where.read_bytes()
    if where.suffix.lower() != ".parquet":
        return load(data, str(where))
    from tdpmmu.arrow import from_parquet

    return typed(from_parquet(data, str(where)), str(where))


def typed(raw: object, source: str = "the object") -> Document:
    """Return the typed view of a result that is a JSON object already.

    Raises:
        InvalidArgument: not a schema of tdpmmu, or not its fields; `source` names it in the message.
    """
    schema = raw.get("schema", "") if isinstance(raw, dict) else ""
    if not isinstance(schema, str):
        schema = ""
    assert isinstance(raw, dict) or not schema
    try:
        if isinstance(raw, dict):
            shape.check(raw)
        return _by_schema(schema, raw, source)  # type: ignore[arg-type]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"{source} has the schema {schema!r}, but not its fields: {error}") from error


def _by_schema(schema: str, raw: Raw, source: str) -> Document:
    if schema.startswith("tdpmmu.bench."):
        return BenchResult.from_raw(raw)
    if schema.startswith("tdpmmu.micro/"):
        return MicroResult.from_raw(raw)
    if schema.startswith("tdpmmu.replay/"):
        from tdpmmu.recorded import Replay

        return Replay.from_raw(raw)
    if schema.startswith("tdpmmu.conform/"):
        from tdpmmu.recorded import ConformReport

        return ConformReport.from_raw(raw)
    if schema.startswith("tdpmmu.simulate/"):
        return BenchResult.from_raw(raw)
    if schema.startswith(_FOUND):
        from tdpmmu import found

        kinds = (found.Exploration, found.Museum, found.Torture, found.AllocationFailures, found.Story)
        return kinds[[schema.startswith(one) for one in _FOUND].index(True)].from_raw(raw)
    if schema.startswith("tdpmmu.versus/"):
        from tdpmmu.mmus import Versus

        return Versus.from_raw(raw)
    if schema.startswith("tdpmmu.compare/"):
        from tdpmmu.comparison import Comparison

        return Comparison.from_raw(raw)
    raise InvalidArgument(f"{source} is not a result of tdpmmu: its schema is {schema or None!r}")
