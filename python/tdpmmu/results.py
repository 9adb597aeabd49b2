"""Results as frozen, typed objects. Names carry units: `_ns` nanoseconds, `_bytes` bytes.

Each result keeps the JSON object it came from in `raw`, so nothing that the native side adds is lost; the
typed attributes are what most people read. A field that a design does not have is None.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tdpmmu.errors import InvalidArgument, Unsupported

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

__all__ = ["BenchResult", "BenchRun", "MicroResult", "MicroRow", "Percentiles", "Replay", "load"]

Raw = Mapping[str, Any]


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
        sptes: present leaf SPTEs at the start, counted in the tree.
        update_ns: parts of the memslot update (`bench zap`): total, lock_wait, exclusive_hold, ...
        block_drop_ns: how long the vCPU that dropped its root was blocked (`bench drop`).
        block_baseline_ns: the same where others still hold the root.
        retained_table_pages: tables that stay because the MMU owns a reference.
        teardown: stamps and costs of the teardown, or None where nothing was torn down.
        step_units: SPTE reads and writes between two reschedule checks (no unit).
        raw: the whole JSON object.
    """

    design: str
    passes: str
    ownership: str
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
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> BenchRun:
        """Return the typed view of one element of `runs`."""
        h = Percentiles.from_raw
        return cls(
            design=str(raw.get("design", "?")),
            passes=str(raw.get("passes", "?")),
            ownership=str(raw.get("ownership", "?")),
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
            raw=raw,
        )


class _Document:
    """What all results share: the JSON they came from and its exports. No units of its own."""

    __slots__ = ()
    raw: Raw

    def to_json(self, indent: int | None = None) -> str:
        """Return the result as JSON text, exactly as the native side gave it."""
        return json.dumps(self.raw, indent=indent)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return one flat dict a row; nested names are joined by a dot (`teardown.ns_per_spte`)."""
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
        """Return `to_rows` as an Arrow table.

        Raises:
            Unsupported: pyarrow is not installed (`pip install 'tdpmmu[arrow]'`).
        """
        try:
            import pyarrow as pa
        except ImportError as error:
            raise Unsupported("Arrow export needs pyarrow: pip install 'tdpmmu[arrow]'") from error
        rows = self.to_rows()
        names = list(dict.fromkeys(name for row in rows for name in row))
        return pa.table({name: [row.get(name) for row in rows] for name in names})

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


@dataclass(frozen=True, slots=True)
class Replay(_Document):
    """What a recording of real KVM holds, and whether its old values chain.

    Attributes:
        file: the recording.
        kernel: the kernel profile it was read under.
        events: events read.
        transitions: SPTE changes read.
        checked: transitions by verdict: same, hw_ad, fast_pf, silent_unfreeze, split_child, reordered,
            unknown, mismatch.
        mismatches: the unexplained ones, with line, gfn, level, expected and got.
        roots: roots seen, or None where the recording does not name them.
        tables_peak: most page-table pages alive at once, in pages.
        zaps: the zaps with cause, start and duration in ns, and entries by level.
        raw: the whole JSON object.
    """

    schema: str
    file: str
    kernel: str
    events: int
    transitions: int
    checked: Raw
    mismatches: tuple[Raw, ...]
    roots: Any
    tables_peak: int | None
    zaps: tuple[Raw, ...]
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Replay:
        """Return the typed view of a report object."""
        return cls(
            schema=str(raw.get("schema", "")),
            file=str(raw.get("file", "")),
            kernel=str(raw.get("kernel", "")),
            events=int(raw.get("events", 0)),
            transitions=int(raw.get("transitions", 0)),
            checked=raw.get("checked") or {},
            mismatches=tuple(raw.get("mismatches", ())),
            roots=raw.get("roots"),
            tables_peak=raw.get("tables_peak"),
            zaps=tuple(raw.get("zaps", ())),
            raw=raw,
        )

    @property
    def ok(self) -> bool:
        """True where no check failed."""
        return not self.checked.get("mismatch") and not self.mismatches

    def _rows(self) -> list[Raw]:
        return list(self.zaps)


def flatten(raw: Raw, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested objects as (dotted name, value); lists become JSON text."""
    for name, value in raw.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, (list, tuple)) else value


def load(text: str | bytes, source: str = "the text") -> BenchResult | MicroResult | Replay:
    """Return the typed result of JSON text that `--json` or `-o FILE.json` wrote.

    Raises:
        InvalidArgument: not JSON, or not a schema of tdpmmu; `source` names it in the message.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise InvalidArgument(f"{source} is not JSON: {error}") from error
    schema = raw.get("schema", "") if isinstance(raw, dict) else ""
    if not isinstance(schema, str):
        schema = ""
    if schema.startswith("tdpmmu.bench."):
        return BenchResult.from_raw(raw)
    if schema.startswith("tdpmmu.micro/"):
        return MicroResult.from_raw(raw)
    if schema.startswith("tdpmmu.replay/"):
        return Replay.from_raw(raw)
    raise InvalidArgument(f"{source} is not a result of tdpmmu: its schema is {schema or None!r}")
