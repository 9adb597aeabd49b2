"""Two results of the same experiments: what became slower, by how much, and how sure that is.

**How it is judged.** Runs are matched by what they measured (experiment, scene, design, passes, ownership,
preemption, memory, page size, vCPUs, kernel profile); the repetitions of a match are the sample. Times and
counts scatter by factors, so the ratio is that of the geometric means, b over a, and its 95 % interval is
Welch's t on the logarithms. A field is worse when the ratio is above 1 + threshold beyond doubt, better when
it is below 1 - threshold beyond doubt. Counts that must not grow at all (leaks, violations, SPTEs still
mapped when the fast zap returned) are worse when they grew. Everything that is judged is better when it is
lower.

**Beyond doubt.** An interval is right 19 times of 20, and a comparison has hundreds of rows: by their
intervals alone some rows of two equal results would be worse. So `worse` is Holm-corrected: the one-sided
p-values of Welch's test against 1 + threshold, at 4 % for all headline figures together and at 1 % for all
other rows, which are many and would drown the few that an experiment is about. Of 20 comparisons of equal
samples at most one has a row that is worse, however many rows there are. `ci95` stays the plain interval of
its own row.

**Few repetitions.** With fewer than three on a side there is no scatter to hold a ratio against. The headline
figures are then held against a plain factor; all others, maxima and tail percentiles among them, have no
verdict (None). Other maxima and tail percentiles have none either where some repetition lacks them: which do
is no accident.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from tdpmmu.errors import InvalidArgument
from tdpmmu.results import BenchResult, MicroResult, Raw, _Document, load_file
from tdpmmu.student import holm, welch_above, welch_interval
from tdpmmu.units import format_ns

__all__ = ["FACTOR", "FIELDS", "THRESHOLD", "Comparison", "ComparisonRow", "compare"]

THRESHOLD = 0.05
FACTOR = 1.25
#: Fewer repetitions than this on a side give no interval.
ENOUGH = 3
#: How often a comparison of equal samples may have a headline figure that is worse, and another row.
LEVELS = {True: 0.04, False: 0.01}
#: A time below this many ns counts as this many: reading the clock at both ends costs about as much.
CLOCK_NS = 100.0

Kind = Literal["ns", "rate", "count", "never"]
Source = str | os.PathLike[str] | BenchResult | MicroResult


@dataclass(frozen=True, slots=True)
class Judged:
    """A field of a run that matters, by its path; lower is better.

    Attributes:
        kind: `ns` is a time, `rate` ns per something, `count` a number, `never` a number that must not grow.
        headline: what an experiment is about: judged by a plain factor where repetitions are few.
    """

    path: str
    kind: Kind
    headline: bool = False

    @property
    def tail(self) -> bool:
        """True of a maximum or a tail percentile."""
        return self.path.endswith((".max", ".p99", ".p999"))


def _parts(path: str, *parts: str, kind: Kind = "ns", headline: bool = False) -> list[Judged]:
    return [Judged(f"{path}.{part}", kind, headline) for part in parts]


#: What is compared, in the order shown. A field that a run does not have is left out.
FIELDS: tuple[Judged, ...] = (
    *_parts("update_ns", "total", "exclusive_hold", "exclusive_total", "exclusive_longest", headline=True),
    *_parts("update_ns", "lock_wait", "kick_wait", "zap"),
    *_parts("updates.update_ns", "p50", "p99", "max"),
    Judged("block_drop_ns.max", "ns", headline=True),
    *_parts("drop_loop.block_drop_ns", "p50", "p99", "p999"),
    *_parts("block_update_ns", "p50", "p99", "max"),
    Judged("visible_last_ns", "ns"),
    *_parts("access_ns", "p99", "p999"),
    *_parts("teardown", "fz_return_ns", "last_spte_unreachable_ns", headline=True),
    *_parts("teardown", "last_table_free_ns", "cpu_ns", headline=True),
    *_parts("teardown", "ns_per_spte", "ns_per_entry", kind="rate", headline=True),
    Judged("teardown.entry_writes", "count", headline=True),
    Judged("step_units.p99", "count"),
    Judged("step_units.max", "count", headline=True),
    *_parts("step_ns", "p99", "max"),
    Judged("queue_ns.max", "ns"),
    Judged("rcu.grace_period_ns.max", "ns"),
    Judged("rcu.backlog_pages_peak", "count"),
    Judged("shadow.longest_batch", "count"),
    Judged("shadow.retained_peak", "count"),
    *_parts("cycle_ns", "p50", "max"),
    Judged("refault.wall_ns", "ns"),
    *_parts("others", "lock_wait_ns", "kicked_ns"),
    Judged("others.accesses_late", "count"),
    Judged("pool_peak_pages", "count"),
    *_parts("waiting.wait_ns", "p50", "max"),
    *_parts("blocked_ns", "p50", "max"),
    Judged("wake_ns.max", "ns"),
    Judged("prepare_ns", "ns"),
    *_parts("close_ns", "total", "zap_all"),
    Judged("fit.ns_per_spte", "rate"),
    *(Judged(f"process_exit.{way}.exit_ns", "ns") for way in ("sys_exit", "os_exit", "exception", "thread")),
    Judged("ns", "rate", headline=True),  # of a micro result
    *(Judged(name, "never") for name in ("table_pages_leaked", "sptes_mapped_at_return", "violations")),
)

#: What two runs must have in common to be the same measurement.
KEY = (
    "experiment",
    "scene",
    "design",
    "passes",
    "ownership",
    "preempt",
    "memory_bytes",
    "page",
    "vcpus",
    "kernel_profile",
    "shadow.paging",
    "shadow.reclaim",
    "name",
)
#: Of the request: what does not decide what is measured, and what the key has already.
_FREE = {"reps", "seed", "check", "max_memory_bytes", "designs", "scenes", "perfetto", "hlog", "timeline"}
_FREE |= {"memory_bytes", "page", "passes", "ownership", "preempt", "vcpus", "kernel_profile"}
_FREE |= {"paging", "reclaim"}
_HOST = ("cpu", "cpus", "kernel", "hypervisor", "memory_bytes", "thp", "clock", "rcu_flavour")


@dataclass(frozen=True, slots=True)
class ComparisonRow:
    """One field of one measurement in both results. Times in ns, unless divided by a limit.

    Attributes:
        key: what was measured: scene, design, passes and so on, by name.
        field: its dotted name in a run.
        a: geometric mean over the repetitions of the first result.
        b: the same of the second.
        n_a: repetitions in the first.
        n_b: repetitions in the second.
        ratio: b / a; None where a is 0 and b is not.
        ci95: the 95 % interval of the ratio, or None where there are too few repetitions for one.
        worse: b is higher beyond doubt (Holm-corrected over all rows with an interval), or beyond the plain
            factor where there are few repetitions; None: not judged. Lower is better in all of them.
        better: the same the other way round.
    """

    key: Raw
    field: str
    a: float
    b: float
    n_a: int
    n_b: int
    ratio: float | None
    ci95: tuple[float, float] | None
    worse: bool | None
    better: bool | None


@dataclass(frozen=True, slots=True)
class Comparison(_Document):
    """Two results, field by field. Ratios are b over a; lower is better everywhere.

    Attributes:
        schema: `tdpmmu.compare/1`.
        a: the first result's file, host, build and seed.
        b: the same of the second.
        rows: one per measurement and field.
        notes: what a reader must know before believing the rows, one sentence each.
        only_a: measurements that the second result lacks.
        only_b: measurements that the first result lacks.
        raw: the whole JSON object.
    """

    schema: str
    a: Raw
    b: Raw
    rows: tuple[ComparisonRow, ...]
    notes: tuple[str, ...]
    only_a: tuple[Raw, ...]
    only_b: tuple[Raw, ...]
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Comparison:
        """Return the typed view of a comparison object."""
        names = ("field", "a", "b", "n_a", "n_b", "ratio", "worse", "better")
        rows = tuple(
            ComparisonRow(
                key={name: row[name] for name in KEY if name in row},
                ci95=None if row.get("ci95") is None else (row["ci95"][0], row["ci95"][1]),
                **{name: row[name] for name in names},
            )
            for row in raw.get("rows", ())
        )
        return cls(
            schema=str(raw.get("schema", "")),
            a=raw.get("a") or {},
            b=raw.get("b") or {},
            rows=rows,
            notes=tuple(raw.get("notes", ())),
            only_a=tuple(raw.get("only_a", ())),
            only_b=tuple(raw.get("only_b", ())),
            raw=raw,
        )

    @property
    def worse(self) -> tuple[ComparisonRow, ...]:
        """The rows that are worse in b, in the order of the fields. Times in ns."""
        return tuple(row for row in self.rows if row.worse)

    @property
    def better(self) -> tuple[ComparisonRow, ...]:
        """The rows that are better in b, in the order of the fields. Times in ns."""
        return tuple(row for row in self.rows if row.better)

    def _rows(self) -> list[Raw]:
        return list(self.raw.get("rows", ()))


def compare(
    a: Source,
    b: Source,
    *,
    threshold: float = THRESHOLD,
    factor: float = FACTOR,
    per_limit: str | None = None,
) -> Comparison:
    """Compare two results of `bench`, or the files that hold them (.json or .parquet); b against a.

    Args:
        a: what was.
        b: what is.
        threshold: the ratio must be more than this above 1, beyond doubt, to be worse; 0.05 is 5 %.
        factor: with fewer than three repetitions on a side: a headline figure's ratio above this is worse.
        per_limit: divide times by this limit of the same result, such as `swap_ns`: for two hosts.

    Returns:
        Ratios of geometric means with 95 % intervals (Welch's t on logarithms), verdicts that are
        Holm-corrected over all rows, and notes. Times in ns.

    Raises:
        OSError: a file cannot be read.
        InvalidArgument: not a result, no measurement in common, a bad threshold, or no such limit.
    """
    if not 0 <= threshold < 1:
        raise InvalidArgument(f"threshold={threshold!r}: must be at least 0 and below 1")
    if not 1 < factor < math.inf:
        raise InvalidArgument(f"factor={factor!r}: must be above 1")
    sides = [_Side(source, name, per_limit) for source, name in ((a, "a"), (b, "b"))]
    left, right = sides
    common = [key for key in left.runs if key in right.runs]
    if not common:
        raise InvalidArgument(
            f"{left.label} and {right.label} have no run in common (runs match by {', '.join(KEY[:-1])})"
        )
    rows: list[dict[str, Any]] = []
    tests: list[_Test] = []
    for key in common:
        for judged in FIELDS:
            values = [side.values(key, judged) for side in sides]
            if all(values):
                complete = [len(found) for found in values] == [len(side.runs[key]) for side in sides]
                verdict, test = _judge(values[0], values[1], judged, complete, threshold, factor)
                rows.append({**_described(key), "field": judged.path, **verdict})
                if test is not None:
                    tests.append(test._replace(row=rows[-1]))
    for verdict_name in ("worse", "better"):
        for headline, level in LEVELS.items():
            family = [test for test in tests if test.headline == headline]
            held = holm([getattr(test, verdict_name) for test in family], level)
            for test, holds in zip(family, held, strict=True):
                test.row[verdict_name] = holds
    only = [
        [_described(key) for key in one.runs if key not in other.runs] for one, other in (sides, sides[::-1])
    ]
    raw = {
        "schema": "tdpmmu.compare/1",
        "a": left.about(),
        "b": right.about(),
        "threshold": threshold,
        "factor": factor,
        "per_limit": per_limit,
        "worse": sum(bool(row["worse"]) for row in rows),
        "better": sum(bool(row["better"]) for row in rows),
        "not_judged": sum(row["worse"] is None for row in rows),
        "notes": list(_notes(left, right, common, only, factor)),
        "only_a": only[0],
        "only_b": only[1],
        "rows": rows,
    }
    return Comparison.from_raw(raw)


Key = tuple[Any, ...]


def _described(key: Key) -> dict[str, Any]:
    return {name: value for name, value in zip(KEY, key, strict=True) if value is not None}


class _Side:
    """One of the two results: its runs by key."""

    def __init__(self, source: Source, name: str, per_limit: str | None) -> None:
        if isinstance(source, (BenchResult, MicroResult)):
            self.label, result = f"the result {name}", source
        else:
            self.label = os.fspath(source)
            loaded = load_file(self.label)
            if not isinstance(loaded, (BenchResult, MicroResult)):
                kind = type(loaded).__name__
                raise InvalidArgument(f"{self.label}: a {kind} cannot be compared; expected a bench result")
            result = loaded
        self.result = result
        self.scale = 1.0
        if per_limit is not None:
            limit = result.limits.get(per_limit)
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit <= 0:
                known = [name for name in result.limits if name.endswith("_ns")]
                raise InvalidArgument(
                    f"per_limit={per_limit!r}: not among the limits of {self.label} "
                    f"({', '.join(known) or 'it has none'})"
                )
            self.scale = float(limit)
        self.runs: dict[Key, list[Raw]] = {}
        if isinstance(result, MicroResult):
            for row in result.rows:
                self.runs.setdefault(self._key(row.raw, "micro"), []).append(row.raw)
        else:
            for run in result.runs:
                identity = {**run.raw, "scene": run.scene}
                self.runs.setdefault(self._key(identity, result.experiment), []).append(run.raw)

    @staticmethod
    def _key(raw: Raw, experiment: str) -> Key:
        shadow = raw.get("shadow") or {}
        flat = {**raw, **{f"shadow.{name}": value for name, value in shadow.items()}}
        return (experiment, *(flat.get(name) for name in KEY[1:]))

    def values(self, key: Key, judged: Judged) -> list[float]:
        """Return the field in every repetition that has it, in ns or per limit."""
        found = [value for raw in self.runs[key] if (value := _number(raw, judged.path)) is not None]
        if judged.kind == "ns":
            return [max(value, CLOCK_NS) / self.scale for value in found]
        if judged.kind == "rate":
            return [value / self.scale for value in found if value > 0]
        return found

    def about(self) -> dict[str, Any]:
        """Return what the reader must know of it."""
        raw = self.result.raw
        return {
            "file": self.label,
            "seed": raw.get("seed"),
            "host": raw.get("host"),
            "build": raw.get("build"),
            "limits_stable": self.result.limits.get("stable"),
        }


def _number(raw: Raw, path: str) -> float | None:
    value: Any = raw
    for name in path.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(name)
    if path == "teardown.cpu_ns" and isinstance(value, Mapping):
        # Who paid may change with the design; that all of them together paid more is worse.
        value = sum(part for part in value.values() if isinstance(part, (int, float)))
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)


class _Test(NamedTuple):
    """A row whose verdict waits for all others: how likely its ratio is, were it not worse or not better."""

    row: dict[str, Any]
    headline: bool
    worse: float
    better: float


def _judge(
    a: list[float], b: list[float], judged: Judged, complete: bool, threshold: float, factor: float
) -> tuple[dict[str, Any], _Test | None]:
    """Return a row without its key, and the test that its verdict hangs on, if it has one."""
    kind = judged.kind
    if kind == "never":
        top_a, top_b = max(a), max(b)
        ratio = top_b / top_a if top_a else 1.0 if not top_b else None
        out: dict[str, Any] = {"a": top_a, "b": top_b, "ratio": ratio, "ci95": None}
        return {**out, "n_a": len(a), "n_b": len(b), "worse": top_b > top_a, "better": top_b < top_a}, None
    # A count of 0 has no logarithm, and one of none is no different from one of one.
    logs = [[math.log(max(value, 1.0) if kind == "count" else value) for value in side] for side in (a, b)]
    means = [statistics.fmean(side) for side in logs]
    ratio = math.exp(means[1] - means[0])
    interval: list[float] | None = None
    worse: bool | None = None
    better: bool | None = None
    test: _Test | None = None
    if min(len(a), len(b)) >= ENOUGH:
        low, high = welch_interval(logs[0], logs[1])
        interval = [math.exp(min(low, 700)), math.exp(min(high, 700))]
        if complete or judged.headline or not judged.tail:
            up = welch_above(logs[0], logs[1], math.log(1 + threshold))
            down = welch_above(logs[1], logs[0], -math.log(1 - threshold))
            test = _Test({}, judged.headline, up, down)
    elif judged.headline:
        worse, better = ratio > factor, ratio < 1 / factor
    shown = [
        statistics.fmean(side) if kind == "count" and min(side) < 1 else math.exp(mean)
        for side, mean in zip((a, b), means, strict=True)
    ]
    sizes = {"n_a": len(a), "n_b": len(b)}
    out = {"a": shown[0], "b": shown[1], **sizes, "ratio": ratio, "ci95": interval}
    return {**out, "worse": worse, "better": better}, test


def _notes(
    left: _Side, right: _Side, common: list[Key], only: list[list[dict[str, Any]]], factor: float
) -> Iterable[str]:
    hosts = [side.result.raw.get("host") or {} for side in (left, right)]
    for name in _HOST:
        one, other = (host.get(name) for host in hosts)
        if one != other:
            yield f"different hosts: {name} is {one} in {left.label} and {other} in {right.label}"
    builds = [side.result.raw.get("build") or {} for side in (left, right)]
    if builds[0].get("profile") != builds[1].get("profile"):
        yield f"different builds: {builds[0].get('profile')} against {builds[1].get('profile')}"
    for side in (left, right):
        if side.result.limits.get("stable") is False:
            yield f"unstable host: its limits drifted by more than 10 % during {side.label}"
    speeds = [side.result.limits.get("swap_ns") for side in (left, right)]
    if all(isinstance(speed, (int, float)) and speed > 0 for speed in speeds):
        drift = speeds[1] / speeds[0]  # type: ignore[operator]
        if not 0.9 <= drift <= 1.1:
            yield (
                f"a swap of an SPTE took {format_ns(speeds[0])} in {left.label} "
                f"and {format_ns(speeds[1])} in {right.label}: consider --per-limit"
            )
    requests = [side.result.raw.get("config") or {} for side in (left, right)]
    for name in sorted((requests[0].keys() & requests[1].keys()) - _FREE):
        if requests[0][name] != requests[1][name]:
            one, other = (json.dumps(request[name]) for request in requests)
            yield f"different requests: {name} is {one} and {other}"
    short = sum(min(len(side.runs[key]) for side in (left, right)) < ENOUGH for key in common)
    if short:
        yield (
            f"{short} of {len(common)} measurements have fewer than {ENOUGH} repetitions on a side: "
            f"no interval; headline figures are judged by the factor {factor:g}, the others not at all"
        )
    for side, missing in zip((left, right), only, strict=True):
        if missing:
            yield f"{len(missing)} measurements are only in {side.label}"
