"""How to record KVM's TDP MMU on a host of one's own, so that `replay` can rebuild it.

What a kernel can be asked depends on its version: trace points came, functions were renamed, inlined and
removed. The lists are in `catalogue`, the commands in `render`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, SupportsIndex

from tdpmmu import _names, units
from tdpmmu.errors import InvalidArgument
from tdpmmu.recorder.catalogue import KERNELS, TRACE_POINTS, Version
from tdpmmu.recorder.render import FORMATS, chosen, commands

__all__ = ["FORMATS", "RecordHelp", "record_help"]

#: Bytes that one event takes in a ring buffer: the record, its header, a share of the page's.
EVENT_BYTES = 56
#: A text line of it, uncompressed.
LINE_BYTES = 140
#: The buffer has to hold what comes while nobody reads: a quarter of a zap of everything, spread over 8 CPUs.
_SHARE = 32


@dataclass(frozen=True, slots=True)
class RecordHelp:
    """How to record on one kernel with one tool. Sizes in bytes, buffers in KiB a CPU.

    Attributes:
        kernel: the version that the commands are for, as text.
        tool: `trace-cmd`, `perf` or `ftrace`.
        buffer_kib: the ring buffer of each CPU, in KiB.
        steps: shell scripts by title, in the order to run them.
        trace_points: an object each: `event`, `need`, `buys`, `rate`, `sure`.
        probes: an object each: `name`, `definition`, `need`, `buys`, `sure`.
        missing: probes that this kernel cannot have, an object each: `name`, `why`.
        notes: what else decides whether a recording can be checked.
        raw: everything, as a JSON object of the schema `tdpmmu.record-help/1`.
    """

    kernel: str
    tool: str
    buffer_kib: int
    steps: dict[str, str]
    trace_points: tuple[dict[str, str], ...]
    probes: tuple[dict[str, str], ...]
    missing: tuple[dict[str, str], ...]
    notes: tuple[str, ...]
    raw: dict[str, Any] = field(repr=False)

    def to_json(self, indent: int | None = None) -> str:
        """Return everything as JSON text."""
        return json.dumps(self.raw, indent=indent)

    def to_rows(self) -> list[dict[str, Any]]:
        """Return a flat dict a trace point or probe, for a table or a sheet. No units."""
        points = [{"kind": "trace point", "name": p["event"], **p} for p in self.trace_points]
        probes = [{"kind": "kprobe", **p} for p in self.probes]
        missing = [{"kind": "not there", **p} for p in self.missing]
        return [{k: v for k, v in row.items() if k != "event"} for row in (*points, *probes, *missing)]

    def to_arrow(self) -> Any:
        """Return the rows as an Arrow table, text columns.

        Raises:
            Unsupported: pyarrow is not installed (`pip install 'tdpmmu[arrow]'`).
        """
        from tdpmmu.arrow import to_table

        rows: list[Mapping[str, Any]] = [*self.to_rows()]
        return to_table(rows, {"schema": self.raw["schema"], "kernel": self.kernel})

    @property
    def text(self) -> str:
        """What `tdpmmu record-help` prints: a shell script whose comments explain it."""
        lines = [
            f"# Recording KVM's TDP MMU on Linux {self.kernel} with {self.tool}. Run as root, step by step."
        ]
        lines += _wrapped(self.notes, "#")
        titles = {
            "probes": "1. the kprobes, by tracefs, once for all tools",
            "record": "2. record: start it, then do to the VM what you want to see",
            "text": "3. as text",
            "probes away": "4. take the probes away again",
            "check": "5. is it whole?",
        }
        for title, script in self.steps.items():
            lines += ["", f"# {titles.get(title, title)}", script]
        lines += ["", "# What each event buys (must, should; --all adds what may help):"]
        for point in self.trace_points:
            lines += _wrapped((f"{point['event']} ({point['need']}; {point['rate']}): {point['buys']}",), "#")
        for probe in self.probes:
            unsure = "" if probe["sure"] == "recorded" else f", by {probe['sure']}"
            lines += _wrapped((f"{probe['name']} ({probe['need']}{unsure}): {probe['buys']}",), "#")
        if self.missing:
            lines += ["", f"# What Linux {self.kernel} has nothing for:"]
            lines += _wrapped(tuple(f"{row['name']}: {row['why']}" for row in self.missing), "#")
        return "\n".join(lines) + "\n"


def record_help(
    kernel: str | None = None,
    format: str = "trace-cmd",
    *,
    memory: str | SupportsIndex = "16G",
    everything: bool = False,
) -> RecordHelp:
    """Return how to record on a kernel: trace points, kprobes, buffers, clock, and how to check the result.

    Args:
        kernel: a version such as `6.12` or what `uname -r` prints; None is the running kernel's.
        format: the tool, `trace-cmd`, `perf` or `ftrace`.
        memory: guest memory in bytes or as text: it sizes the buffers for a zap of all of it in 4 KiB pages.
        everything: also the events that only sometimes help.

    Raises:
        InvalidArgument: an unknown tool, no version, or a kernel older than 5.10.
        TypeError: a value of the wrong type.
    """
    tool = _names.one_of(format, FORMATS, "format")
    version = _version(os.uname().release if kernel is None else kernel)
    size = units.parse_size(memory, "memory")
    pages = -(-size // 4096)
    least, most = 4096, 1 << 20
    buffer_kib = min(max(pages * EVENT_BYTES // _SHARE // 1024, least), most)
    points, probes, missing = chosen(version, everything)
    raw: dict[str, Any] = {
        "schema": "tdpmmu.record-help/1",
        "kernel": f"{version[0]}.{version[1]}",
        "tool": tool,
        "memory_bytes": size,
        "buffer_kib": buffer_kib,
        "event_bytes": EVENT_BYTES,
        "zap_events": pages,
        "zap_text_bytes": pages * LINE_BYTES,
        "steps": commands(version, tool, buffer_kib, everything),
        "trace_points": [
            {"event": f"{p.system}:{p.name}", "need": p.need, "buys": p.buys, "rate": p.rate, "sure": p.sure}
            for p in points
        ],
        "probes": [
            {
                "name": probe.name,
                "definition": line,
                "need": probe.need,
                "buys": probe.buys,
                "sure": _sure(probe, version),
            }
            for probe, line in probes
        ],
        "missing": [{"name": probe.name, "why": why} for probe, why in missing],
        "notes": _notes(version, tool, size, pages),
    }
    return RecordHelp(
        kernel=raw["kernel"],
        tool=tool,
        buffer_kib=buffer_kib,
        steps=raw["steps"],
        trace_points=tuple(raw["trace_points"]),
        probes=tuple(raw["probes"]),
        missing=tuple(raw["missing"]),
        notes=tuple(raw["notes"]),
        raw=raw,
    )


def _sure(probe: Any, version: Version) -> str:
    function = probe.function(version)
    # A row that a recording shows holds for the kernels recorded; between them it is read in sources.
    return function.sure if function.sure != "recorded" or version in ((6, 1), (6, 12), (7, 2)) else "source"


def _version(text: object) -> Version:
    if not isinstance(text, str):
        raise TypeError(f"kernel={text!r}: expected text, not {type(text).__name__}")
    match = re.match(r"v?(\d{1,3})\.(\d{1,3})(?![\d])", text.strip())
    if match is None:
        raise InvalidArgument(f"kernel={text!r}: expected a version such as 6.12, or what uname -r prints")
    version = (int(match[1]), int(match[2]))
    if version < KERNELS[0]:
        raise InvalidArgument(f"kernel={text!r}: the TDP MMU came with 5.10")
    return version


def _notes(version: Version, tool: str, size: int, pages: int) -> list[str]:
    notes = [
        "The clock is mono (CLOCK_MONOTONIC): the same for all CPUs, and for what the VMM logs by itself.",
        f"A zap of {units.format_size(size)} in 4 KiB pages is {units.format_count(pages)} events, about "
        f"{units.format_size(pages * EVENT_BYTES)} in the buffers and "
        f"{units.format_size(pages * LINE_BYTES)} of "
        "text. To see only tables and huge pages, filter: "
        + {
            "trace-cmd": "-f 'level > 1' behind -e kvmmmu:kvm_tdp_mmu_spte_changed.",
            "perf": "--filter 'level > 1' behind -e kvmmmu:kvm_tdp_mmu_spte_changed.",
            "ftrace": "echo 'level > 1' > events/kvmmmu/kvm_tdp_mmu_spte_changed/filter.",
        }[tool]
        + " Zaps keep their times and tables; leafs cannot be checked then.",
        "Begin before the VM is made. What was there before the recording is unknown to replay until it "
        "changes.",
        "Record the whole host or all threads of the VMM: zaps run also in kworker, kvm-nx-lpage-re, ksmd, "
        "khugepaged and kdamond. With several VMs replay goes by process: ftrace prints it (record-tgid), "
        "perf, too (pid).",
        "Name what you do, and replay lists it by time: echo 'OP 1 begin memslot_delete {\"vm\":1}' > "
        "/sys/kernel/tracing/trace_marker, and 'OP 1 end memslot_delete {}' when it is done.",
        "Kernels of distributions backport: 6.1.y zaps as 6.6 does. replay infers the profile; "
        "--profile sets it.",
        "kprobes slow the path they sit on: times are an order, not a cost. For times, leave out hcs, "
        "iter_start and put_root, or all probes.",
    ]
    if version < (5, 11):
        notes.insert(
            0,
            "Linux 5.10 has no kvm_tdp_mmu_spte_changed (5.11 brought it): SPTE changes cannot be recorded.",
        )
    if version < (5, 18):
        notes.append(
            "Before 5.18 no probe can print a root: with SMM, or more than one root, entries are told apart "
            "by their "
            "old values, and some stay unknown."
        )
    if version < (6, 10):
        notes.append(
            "Up to 6.9 an atomic zap leaves a frozen value and empties it without an event; replay knows "
            "(silent_unfreeze)."
        )
    if version not in KERNELS:
        nearest = max(known for known in KERNELS if known <= version)
        notes.append(
            f"Functions of {version[0]}.{version[1]} are taken to be those of {nearest[0]}.{nearest[1]}: a "
            "probe that is "
            "not there says so, and the others go on."
        )
    return notes


def _wrapped(texts: tuple[str, ...] | list[str], mark: str) -> list[str]:
    import textwrap

    return [
        line
        for text in texts
        for line in textwrap.wrap(
            text,
            100,
            initial_indent=f"{mark}  - ",
            subsequent_indent=f"{mark}    ",
            break_long_words=False,
            break_on_hyphens=False,
        )
    ]


assert all(point.need in ("must", "should", "may") for point in TRACE_POINTS)
