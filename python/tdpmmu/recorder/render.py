"""The commands that make a recording, as a shell script by tool. Sizes of buffers in KiB, memory in bytes.

The kprobes are the same for all tools: they are made once, by tracefs, and each tool then enables them by
name. The offsets inside `struct kvm_mmu_page` are asked of the host's BTF: they are those of its build.
"""

from __future__ import annotations

from tdpmmu.recorder.catalogue import TRACE_POINTS, Probe, TracePoint, Version
from tdpmmu.recorder.probes import CALLBACKS, OFFSETS, PROBES

__all__ = ["FORMATS", "chosen", "commands", "probe_line"]

FORMATS = ("trace-cmd", "perf", "ftrace")
TRACEFS = "/sys/kernel/tracing"
GROUP = "tdp"
_NEEDS = {"must": 0, "should": 1, "may": 2}


def chosen(
    kernel: Version, everything: bool
) -> tuple[list[TracePoint], list[tuple[Probe, str]], list[tuple[Probe, str]]]:
    """Return the trace points, the probes and their definitions, and those that it cannot have, with why."""
    most = _NEEDS["may" if everything else "should"]
    points = [p for p in TRACE_POINTS if p.there(kernel) and _NEEDS[p.need] <= most]
    probes, missing = [], []
    for probe in PROBES + CALLBACKS:
        if _NEEDS[probe.need] > most:
            continue
        line = probe_line(probe, kernel)
        function = probe.function(kernel)
        if line is not None:
            probes.append((probe, line))
        elif function is not None:
            missing.append((probe, function.why))
    return points, probes, missing


def probe_line(probe: Probe, kernel: Version) -> str | None:
    """Return the line for `kprobe_events`, `$NAME` where an offset belongs; None for nothing to probe."""
    function = probe.function(kernel)
    if function is None or function.name is None:
        return None
    arguments = "" if probe.at_return else "".join(f" {name}={value}" for name, value in function.arguments)
    return f"{'r' if probe.at_return else 'p'}:{GROUP}/{probe.name} {function.name}{arguments}"


def commands(kernel: Version, tool: str, buffer_kib: int, everything: bool) -> dict[str, str]:
    """Return the steps in order, by title: what to run on the host, as a shell script of its own."""
    points, probes, _ = chosen(kernel, everything)
    names = [probe.name for probe, _ in probes]
    steps = {"probes": _make_probes(probes)}
    if tool == "trace-cmd":
        steps |= _trace_cmd(points, bool(names), buffer_kib)
    elif tool == "perf":
        steps |= _perf(points, bool(names), buffer_kib)
    else:
        steps |= _ftrace(points, bool(names), buffer_kib)
    steps["probes away"] = (
        f'cd {TRACEFS} && for p in {" ".join(names)}; do echo "-:{GROUP}/$p" >> kprobe_events; done'
    )
    steps["check"] = _check(tool)
    return steps


def _make_probes(probes: list[tuple[Probe, str]]) -> str:
    lines = [
        "# the fields of struct kvm_mmu_page in this very build; pahole is in the package dwarves",
        "at() { pahole --btf_base /sys/kernel/btf/vmlinux -C kvm_mmu_page /sys/kernel/btf/kvm |",
        r'       sed -nE "s|.*[ *]$1[; ].*/\* +([0-9]+) .*|\1|p" | head -1; }',
        "; ".join(f"{name}=$(at {member})" for name, member in OFFSETS) + "; SPT_OF_RCU=$((SPT - RCU))",
        f"cd {TRACEFS}",
        'probe() { echo "$1" >> kprobe_events || echo "not there: $1"; }',
    ]
    for _, line in probes:
        lines.append(f'probe "{line}"')
    return "\n".join(lines)


def _filter(point: TracePoint) -> str:
    return f"{point.system}:{point.name}"


def _trace_cmd(points: list[TracePoint], probes: bool, buffer_kib: int) -> dict[str, str]:
    events = [_filter(point) for point in points] + ([GROUP] if probes else [])
    listed = " \\\n    ".join(f"-e {event}" for event in events)
    return {
        "record": f"trace-cmd record -C mono -b {buffer_kib} -o kvm.dat \\\n    {listed} \\\n    sleep 60",
        "text": "trace-cmd report -t kvm.dat | gzip -1 > kvm.txt.gz    # or hand kvm.dat to replay as it is",
    }


def _perf(points: list[TracePoint], probes: bool, buffer_kib: int) -> dict[str, str]:
    events = [_filter(point) for point in points] + ([f"'{GROUP}:*'"] if probes else [])
    listed = " \\\n    ".join(f"-e {event}" for event in events)
    pages = 1 << max(2, (buffer_kib // 4 - 1).bit_length())
    return {
        "record": f"perf record -a -k CLOCK_MONOTONIC -m {pages} -o kvm.data \\\n    {listed} \\\n    sleep "
        "60",
        "text": "perf script -i kvm.data --ns -F comm,pid,tid,cpu,time,event,trace | gzip -1 > kvm.txt.gz",
    }


def _ftrace(points: list[TracePoint], probes: bool, buffer_kib: int) -> dict[str, str]:
    enable = " ".join(f"{point.system}/{point.name}" for point in points) + (f" {GROUP}" if probes else "")
    return {
        "record": "\n".join(
            [
                f"cd {TRACEFS} && echo 0 > tracing_on && echo nop > current_tracer && echo > trace",
                "echo mono > trace_clock",
                f"echo {buffer_kib} > buffer_size_kb",
                "echo 1 > options/record-tgid; echo 65536 > saved_cmdlines_size",
                f"for e in {enable}; do echo 1 > events/$e/enable; done",
                "# a pipe, so that the buffers are emptied while the guest runs: `trace` alone keeps what "
                "fits",
                "cat trace_pipe | gzip -1 > /var/tmp/kvm.txt.gz & reader=$!",
                "echo 1 > tracing_on; sleep 60; echo 0 > tracing_on",
                "sleep 2; kill $reader; echo 0 > events/enable",
            ]
        ),
        "text": "# it is text already: /var/tmp/kvm.txt.gz",
    }


def _check(tool: str) -> str:
    lines = []
    if tool == "trace-cmd":
        lines.append(
            "trace-cmd report --stat kvm.dat | grep -iE 'overrun|dropped|commit overrun'    # every count "
            "must be 0"
        )
    elif tool == "perf":
        lines.append("perf report -i kvm.data --stats | grep -i lost    # there must be none")
    else:
        lines.append(f"grep -H overrun {TRACEFS}/per_cpu/cpu*/stats    # every count must be 0")
    lines += [
        f"awk '$NF' {TRACEFS}/kprobe_profile    # last column: probes that were missed; all must be 0",
        "zcat kvm.txt.gz | grep -c LOST    # 0: nothing was lost. replay marks what follows a loss as "
        "unknown, not wrong",
        "tdpmmu replay --check kvm.txt.gz    # mismatch 0, and `unknown` small beside `same`",
    ]
    return "\n".join(lines)
