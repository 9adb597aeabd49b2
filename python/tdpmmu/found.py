"""What searches found, frozen and typed: explorations, the museum, torture, allocation failures, stories.

Each keeps the JSON object it came from in `raw`. Counts are counts of what their names say; seconds are
wall-clock seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from tdpmmu.results import Raw, _Document

__all__ = [
    "Allocation",
    "AllocationFailures",
    "BugDemo",
    "Exhibit",
    "Exploration",
    "Museum",
    "Protocol",
    "Story",
    "Torture",
    "Violation",
]


@dataclass(frozen=True, slots=True)
class Violation:
    """A broken rule, and the schedule that broke it. Counts have no unit.

    Attributes:
        rule: which rule, by name.
        oracle: the family of oracles that it belongs to, such as `O-REF`.
        what: the obligation that was not met, in words.
        seed: text that replays it: `explain(seed)`.
        preemptions: switches of the shortest schedule found that no thread asked for.
        story: the interleaving as columns of text, one per thread.
        raw: the whole JSON object.
    """

    rule: str
    oracle: str
    what: str
    seed: str
    preemptions: int
    story: str = field(repr=False)
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: object) -> Violation | None:
        """Return the typed view of a JSON object, or None where there is none."""
        if not isinstance(raw, Mapping):
            return None
        return cls(
            rule=str(raw.get("rule", "")),
            oracle=str(raw.get("oracle") or ""),
            what=str(raw.get("what") or ""),
            seed=str(raw.get("seed") or ""),
            preemptions=int(raw.get("preemptions") or 0),
            story=str(raw.get("story") or ""),
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class Exploration(_Document):
    """What a search through the interleavings of one program found.

    Attributes:
        protocol: the program, by name.
        design: the zap design it ran under.
        profile: the kernel profile it ran under.
        seed: of the search; the same seed searches the same schedules.
        schedules: how many were run, a count.
        seconds: how long it took, in seconds.
        sites_forced: schedule sites at which a thread was switched away, with counts.
        bound: what the number of schedules buys, with its text.
        violation: the first violation by number of schedule, or None.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "violation"

    schema: str
    protocol: str
    design: str
    profile: str
    seed: int | None
    schedules: int
    seconds: float
    sites_forced: Raw = field(repr=False)
    bound: Raw = field(repr=False)
    violation: Violation | None
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Exploration:
        """Return the typed view of a result object."""
        return cls(
            schema=str(raw.get("schema", "")),
            protocol=str(raw.get("protocol", "")),
            design=str(raw.get("design", "")),
            profile=str(raw.get("profile", "")),
            seed=raw.get("seed"),
            schedules=int(raw.get("schedules") or 0),
            seconds=float(raw.get("seconds") or 0.0),
            sites_forced=_object(raw.get("sites_forced")),
            bound=_object(raw.get("bound")),
            violation=Violation.from_raw(raw.get("violation")),
            raw=raw,
        )

    @property
    def ok(self) -> bool:
        """True where no rule was broken."""
        return self.violation is None

    def _rows(self) -> list[Raw]:
        flat = {name: value for name, value in self.raw.items() if name not in ("program", "sites_passed")}
        return [flat]


@dataclass(frozen=True, slots=True)
class Protocol:
    """A program that `explore` knows by name.

    Attributes:
        name: what `explore` takes.
        about: what races with what.
        threads: how many threads it has, a count.
    """

    name: str
    about: str
    threads: int


@dataclass(frozen=True, slots=True)
class Exhibit:
    """A bug that was really there, and can be switched on. Texts; nothing has a unit.

    Attributes:
        id: its number in the museum, with a letter where it has variants.
        title: what went wrong, in a line.
        kind: what the world saw, such as `use-after-free`.
        kernels: which kernels had it.
        reference: where history tells of it.
        cause: why it went wrong.
        interleaving: how it comes about.
        catcher: what shows it: `simulation`, `tso`, `virtual-time`, ...
        raw: the whole JSON object.
    """

    id: str
    title: str
    kind: str
    kernels: str
    reference: str = field(repr=False)
    cause: str = field(repr=False)
    interleaving: str = field(repr=False)
    catcher: str
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Exhibit:
        """Return the typed view of one element of `bugs`."""
        named = {name: str(raw.get(name) or "") for name in cls.__slots__ if name not in ("kind", "raw")}
        return cls(**named, kind=str(raw.get("class") or ""), raw=raw)


@dataclass(frozen=True, slots=True)
class BugDemo:
    """One bug, searched for with it on and with it off.

    Attributes:
        id: its number in the museum.
        title: what went wrong, in a line.
        caught: with the bug on an oracle fired, for every seed.
        false_alarm: with the bug off, something fired too.
        schedules_median: schedules until an oracle fired, the median over the seeds; None: not caught.
        oracle: who fired.
        catcher: what shows it, such as `simulation`.
        seed: text that replays the catch, or empty.
        story: the interleaving as columns of text, where it was asked for.
        raw: the whole JSON object.
    """

    id: str
    title: str
    caught: bool
    false_alarm: bool
    schedules_median: float | None
    oracle: str
    catcher: str
    seed: str
    story: str = field(repr=False)
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> BugDemo:
        """Return the typed view of one element of `bugs`."""
        texts = {
            name: str(raw.get(name) or "") for name in ("id", "title", "oracle", "catcher", "seed", "story")
        }
        return cls(
            **texts,
            caught=bool(raw.get("caught")),
            false_alarm=bool(raw.get("false_alarm")),
            schedules_median=raw.get("schedules_median"),
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class Museum(_Document):
    """Bugs that were really there, each searched for with it on and off.

    Attributes:
        bugs: one per bug, in the order of their numbers.
        seconds: how long it took, in seconds.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "bugs"

    schema: str
    bugs: tuple[BugDemo, ...]
    seconds: float
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Museum:
        """Return the typed view of a result object."""
        bugs = tuple(BugDemo.from_raw(bug) for bug in raw.get("bugs", ()))
        return cls(str(raw.get("schema", "")), bugs, float(raw.get("seconds") or 0.0), raw)

    def __repr__(self) -> str:
        return f"Museum(caught={self.caught}, total={len(self.bugs)}, false_alarms={self.false_alarms})"

    @property
    def caught(self) -> int:
        """How many bugs were caught, a count."""
        return sum(bug.caught for bug in self.bugs)

    @property
    def false_alarms(self) -> int:
        """How many bugs had something fire while they were off, a count."""
        return sum(bug.false_alarm for bug in self.bugs)

    @property
    def ok(self) -> bool:
        """True where all were caught and nothing fired without a bug."""
        return self.caught == len(self.bugs) and not self.false_alarms

    def _rows(self) -> list[Raw]:
        return [{name: value for name, value in bug.raw.items() if name != "story"} for bug in self.bugs]


@dataclass(frozen=True, slots=True)
class Torture(_Document):
    """What random operations from many real threads came to, under every oracle that can listen there.

    Attributes:
        seconds: how long it ran, in seconds.
        operations: how many were performed, a count.
        seed: repeats each thread's operations; real threads interleave as they like.
        violations: an object each: rule, what, root, gfn.
        faults: an object per kind of fault: how often it was asked for, and how often it struck.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "violations"

    schema: str
    seconds: float
    operations: int
    seed: int | None
    violations: tuple[Any, ...]
    faults: tuple[Any, ...] = field(repr=False)
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Torture:
        """Return the typed view of a result object."""
        found = raw.get("violations")
        return cls(
            schema=str(raw.get("schema", "")),
            seconds=float(raw.get("seconds") or 0.0),
            operations=int(raw.get("operations") or 0),
            seed=raw.get("seed"),
            violations=tuple(found) if isinstance(found, (list, tuple)) else (),
            faults=tuple(raw.get("faults") or ()),
            raw=raw,
        )

    @property
    def ok(self) -> bool:
        """True where no rule was broken."""
        return not self.violations

    def _rows(self) -> list[Raw]:
        return [
            {"violation": found} if not isinstance(found, Mapping) else found for found in self.violations
        ]


@dataclass(frozen=True, slots=True)
class Allocation:
    """One run in which an allocation of table pages failed. Counts have no unit.

    Attributes:
        k: which request failed, from 1.
        site: the place in the engine where it was made.
        from_here_on: all later requests failed too.
        error: the typed error that the operation ended with, as text; empty where the engine did without.
        leaked: table pages that did not come back, a count.
        retried_ok: the same operation succeeded when made again; None where it could not.
        clean: the typed error and no other, nothing leaked, no rule broken, the retry succeeded.
        raw: the whole JSON object.
    """

    k: int
    site: str
    from_here_on: bool
    error: str
    leaked: int
    retried_ok: bool | None
    clean: bool
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Allocation:
        """Return the typed view of one element of `runs`."""
        return cls(
            k=int(raw.get("k") or 0),
            site=str(raw.get("site") or ""),
            from_here_on=bool(raw.get("from_here_on")),
            error=str(raw.get("error") or ""),
            leaked=int(raw.get("leaked") or 0),
            retried_ok=raw.get("retried_ok"),
            clean=bool(raw.get("clean")),
            raw=raw,
        )


@dataclass(frozen=True, slots=True)
class AllocationFailures(_Document):
    """A program run again and again, each time with another of its allocations failing.

    Attributes:
        sites: requests for table pages in a run without faults, a count.
        by_site: the same, by the place in the engine where they are made.
        runs: for each request one run in which it alone fails, and one in which all after it do, too.
        ok: every run was clean.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "runs"

    schema: str
    sites: int
    by_site: Raw = field(repr=False)
    runs: tuple[Allocation, ...] = field(repr=False)
    ok: bool
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> AllocationFailures:
        """Return the typed view of a result object."""
        return cls(
            schema=str(raw.get("schema", "")),
            sites=int(raw.get("sites") or 0),
            by_site=_object(raw.get("by_site")),
            runs=tuple(Allocation.from_raw(run) for run in raw.get("runs", ())),
            ok=bool(raw.get("ok")),
            raw=raw,
        )

    def _rows(self) -> list[Raw]:
        return [run.raw for run in self.runs]


@dataclass(frozen=True, slots=True)
class Story(_Document):
    """A failure told: columns per thread, SPTE values, reference counts. In a notebook it shows itself.

    Attributes:
        title: what failed, in a line.
        rule: the rule that was broken; empty where none was.
        text: the story as text, 120 columns for three threads.
        html: the same for a browser, in one piece.
        raw: the whole JSON object.
    """

    _ROWS: ClassVar[str] = "steps"

    schema: str
    title: str
    rule: str
    text: str = field(repr=False)
    html: str = field(repr=False)
    raw: Raw = field(repr=False)

    @classmethod
    def from_raw(cls, raw: Raw) -> Story:
        """Return the typed view of a result object."""
        texts = {name: str(raw.get(name) or "") for name in ("schema", "title", "rule", "text", "html")}
        return cls(**texts, raw=raw)

    def __str__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        return self.html

    def _rows(self) -> list[Raw]:
        return list(self.raw.get("steps") or ())


def _object(raw: object) -> Raw:
    return raw if isinstance(raw, Mapping) else {}
