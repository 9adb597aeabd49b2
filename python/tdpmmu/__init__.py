"""tdpmmu: a laboratory for the teardown of second-stage page tables.

Linux KVM's TDP MMU as real, concurrent data structures in an ordinary process. `VM` is a live machine to map,
fault, zap and inspect; `bench` measures zap designs; `replay` checks recordings of real KVM.

Every size is in bytes, every time in nanoseconds, unless a name says otherwise.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tdpmmu import _native
from tdpmmu.errors import (
    Busy,
    Closed,
    DirtyRingFull,
    ForkedError,
    InternalError,
    InvalidArgument,
    OracleViolation,
    OutOfTableMemory,
    StallError,
    TdpMmuError,
    TraceError,
    Unsupported,
)
from tdpmmu.units import pages, parse_size, table_bytes, table_pages

if TYPE_CHECKING:
    from tdpmmu import bench, plot
    from tdpmmu.comparison import Comparison, ComparisonRow, compare
    from tdpmmu.found import (
        Allocation,
        AllocationFailures,
        BugDemo,
        Exhibit,
        Exploration,
        Museum,
        Protocol,
        Story,
        Torture,
        Violation,
    )
    from tdpmmu.guest import Guest, GuestMapping, GuestProcess
    from tdpmmu.machine import (
        MAPPING_DTYPE,
        RING_DTYPE,
        CloseReport,
        DirtyLog,
        FaultOutcome,
        FaultResult,
        LeafMapping,
        Memslot,
        PopulateStats,
        VMConfig,
        VMStats,
        ZapReport,
    )
    from tdpmmu.mmus import Versus, VersusCell, VersusRow, versus
    from tdpmmu.proof import (
        allocation_failures,
        demo,
        exhibits,
        explain,
        explore,
        protocols,
        simulate,
        torture,
    )
    from tdpmmu.recorded import ConformCase, ConformReport, Replay, Timeline
    from tdpmmu.recorder import RecordHelp, record_help
    from tdpmmu.recording import blank, conform, predict, replay
    from tdpmmu.results import (
        BenchResult,
        BenchRun,
        MicroResult,
        MicroRow,
        Percentiles,
        load,
        load_file,
    )
    from tdpmmu.shadow import ShadowRun
    from tdpmmu.vm import VM
    from tdpmmu.workload import RunReport

__all__ = [
    "MAPPING_DTYPE",
    "RING_DTYPE",
    "VM",
    "Allocation",
    "AllocationFailures",
    "BenchResult",
    "BenchRun",
    "BugDemo",
    "Busy",
    "CloseReport",
    "Closed",
    "Comparison",
    "ComparisonRow",
    "ConformCase",
    "ConformReport",
    "DirtyLog",
    "DirtyRingFull",
    "Exhibit",
    "Exploration",
    "FaultOutcome",
    "FaultResult",
    "ForkedError",
    "Guest",
    "GuestMapping",
    "GuestProcess",
    "InternalError",
    "InvalidArgument",
    "LeafMapping",
    "Memslot",
    "MicroResult",
    "MicroRow",
    "Museum",
    "OracleViolation",
    "OutOfTableMemory",
    "Percentiles",
    "PopulateStats",
    "Protocol",
    "RecordHelp",
    "Replay",
    "RunReport",
    "ShadowRun",
    "StallError",
    "Story",
    "TdpMmuError",
    "Timeline",
    "Torture",
    "TraceError",
    "Unsupported",
    "VMConfig",
    "VMStats",
    "Versus",
    "VersusCell",
    "VersusRow",
    "Violation",
    "ZapReport",
    "__version__",
    "allocation_failures",
    "bench",
    "blank",
    "build_info",
    "compare",
    "conform",
    "demo",
    "exhibits",
    "explain",
    "explore",
    "info",
    "load",
    "load_file",
    "pages",
    "parse_size",
    "plot",
    "policies",
    "predict",
    "protocols",
    "record_help",
    "replay",
    "simulate",
    "table_bytes",
    "table_pages",
    "torture",
    "versus",
]

# Loaded at first use: the command line must answer `--help` before numpy could be imported.
_LAZY = {
    "MAPPING_DTYPE": "machine",
    "RING_DTYPE": "machine",
    "CloseReport": "machine",
    "DirtyLog": "machine",
    "FaultOutcome": "machine",
    "FaultResult": "machine",
    "LeafMapping": "machine",
    "Memslot": "machine",
    "PopulateStats": "machine",
    "VMConfig": "machine",
    "VMStats": "machine",
    "ZapReport": "machine",
    "RunReport": "workload",
    "VM": "vm",
    "Guest": "guest",
    "GuestMapping": "guest",
    "GuestProcess": "guest",
    "BenchResult": "results",
    "BenchRun": "results",
    "MicroResult": "results",
    "MicroRow": "results",
    "Percentiles": "results",
    "ConformCase": "recorded",
    "ConformReport": "recorded",
    "Replay": "recorded",
    "Timeline": "recorded",
    "ShadowRun": "shadow",
    "Versus": "mmus",
    "VersusCell": "mmus",
    "VersusRow": "mmus",
    "versus": "mmus",
    "load": "results",
    "load_file": "results",
    "Comparison": "comparison",
    "ComparisonRow": "comparison",
    "compare": "comparison",
    "blank": "recording",
    "conform": "recording",
    "predict": "recording",
    "replay": "recording",
    "RecordHelp": "recorder",
    "record_help": "recorder",
    "Allocation": "found",
    "AllocationFailures": "found",
    "BugDemo": "found",
    "Exhibit": "found",
    "Exploration": "found",
    "Museum": "found",
    "Protocol": "found",
    "Story": "found",
    "Torture": "found",
    "Violation": "found",
    "allocation_failures": "proof",
    "demo": "proof",
    "exhibits": "proof",
    "explain": "proof",
    "explore": "proof",
    "protocols": "proof",
    "simulate": "proof",
    "torture": "proof",
    "bench": "",
    "plot": "",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'tdpmmu' has no attribute {name!r}")
    import importlib

    home = _LAZY[name]
    value: Any = importlib.import_module(f"tdpmmu.{home or name}")
    if home:
        value = getattr(value, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def build_info() -> dict[str, Any]:
    """Return what this binary is: `profile`, `version`, `git`, `target`, `debug_assertions`."""
    return dict(json.loads(_native.build_info()))


def info() -> dict[str, Any]:
    """Return what this host and this build are: clock, CPUs, memory in bytes; designs and scenes by name.

    Raises:
        Unsupported: the host cannot be probed.
    """
    from tdpmmu import _names

    known: dict[str, Any] = json.loads(_native.info())
    about = {(scene["experiment"], scene["name"]): scene for scene in _names.catalogue()["scene_info"]}
    scenes = [
        {"experiment": experiment, "name": name, "summary": summary, **about.get((experiment, name), {})}
        for experiment in ("zap", "drop")
        for name, summary in _names.scene_summaries(experiment)
    ]
    catalogue = _names.catalogue()
    return {
        **known,
        "designs": list(catalogue["design_info"]),
        "reclaim": list(catalogue["reclaim_info"]),
        "scenes": scenes,
    }


def policies() -> dict[str, Any]:
    """Return in what the modelled kernels differ: each switch, its text and source, its value in each.

    Values are spelled as in `NAME,switch=value`; none has a unit.
    """
    return dict(json.loads(_native.policies()))


__version__: str = build_info()["version"]
