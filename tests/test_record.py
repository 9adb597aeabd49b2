"""`record-help`: what it prints runs, names what replay reads, and agrees with the recordings."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
from pathlib import Path

import pytest

import tdpmmu
from conftest import ROOT, Cli, as_id, recordings
from tdpmmu import recorder
from tdpmmu.recorder import probes
from tdpmmu.recorder.catalogue import KERNELS, TRACE_POINTS

VERSIONS = [f"{major}.{minor}" for major, minor in KERNELS]


@pytest.mark.parametrize("tool", recorder.FORMATS)
@pytest.mark.parametrize("kernel", VERSIONS)
def test_every_step_is_a_shell_script(kernel: str, tool: str) -> None:
    for everything in (False, True):
        helped = tdpmmu.record_help(kernel, tool, everything=everything)
        assert list(helped.steps) == ["probes", "record", "text", "probes away", "check"]
        for title, script in {**helped.steps, "all": helped.text}.items():
            done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
            assert done.returncode == 0, (title, done.stderr)


@pytest.mark.parametrize("kernel", VERSIONS)
def test_every_probe_and_trace_point_is_one_that_replay_reads(kernel: str) -> None:
    reader = (ROOT / "rust" / "trace" / "src" / "parse.rs").read_text()
    helped = tdpmmu.record_help(kernel, everything=True)
    for name in [p["name"] for p in helped.probes] + [p["event"].split(":")[1] for p in helped.trace_points]:
        assert f'b"{name}"' in reader, name


def test_every_probe_is_there_or_missing_with_a_reason() -> None:
    known = {probe.name for probe in probes.PROBES + probes.CALLBACKS}
    for kernel in VERSIONS:
        helped = tdpmmu.record_help(kernel, everything=True)
        there, missing = ({p["name"] for p in found} for found in (helped.probes, helped.missing))
        assert not there & missing
        assert there | missing == known
        assert all(row["why"] for row in helped.missing)


@pytest.mark.parametrize("recording", recordings(), ids=as_id)
def test_the_functions_are_those_of_the_recordings(recording: Path) -> None:
    kernel = recording.parent.parent.name.removesuffix("-async")
    helped = tdpmmu.record_help(kernel, everything=True)
    promised = {p["name"]: p["definition"].split()[1] for p in helped.probes}
    # What a rebuilt module or a stable kernel has beyond its version is no contradiction.
    absent = {p["name"] for p in helped.missing}
    found: dict[str, str] = {}
    with gzip.open(recording, "rt") as lines:
        for line in lines:
            match = re.search(r": (\w+): \((?:\S+ \[\w+\] <- |\S+ <- )?(\w+)", line)
            if match:
                found.setdefault(match[1], match[2])
    compared = 0
    for name, function in found.items():
        if name in promised:
            assert promised[name] == function, name
            compared += 1
        else:
            assert name not in absent, f"{name} is recorded, but said not to exist"
    assert compared > 3 or not found


@pytest.mark.parametrize("recording", recordings(), ids=as_id)
def test_the_arguments_have_the_names_of_the_recordings(recording: Path) -> None:
    kernel = recording.parent.parent.name.removesuffix("-async")
    promised = {
        p["name"]: set(re.findall(r" (\w+)=", p["definition"]))
        for p in tdpmmu.record_help(kernel, everything=True).probes
    }
    seen: set[str] = set()
    with gzip.open(recording, "rt") as lines:
        for line in lines:
            match = re.search(r": (\w+): \(", line)
            if match and match[1] in promised and match[1] not in seen:
                seen.add(match[1])
                printed = set(re.findall(r" (\w+)=", line[match.end() :]))
                # A recording may print more; what is promised must be there.
                assert promised[match[1]] <= printed | {"spt", "sp", "vcpu", "kvm"}, line
    assert seen or kernel


def test_the_offsets_are_read_from_what_pahole_prints(tmp_path: Path) -> None:
    fake = tmp_path / "pahole"
    fake.write_text(
        "#!/bin/sh\ncat <<'END'\n"
        "struct kvm_mmu_page {\n"
        "\tstruct list_head           link;                 /*     0    16 */\n"
        "\tunion kvm_mmu_page_role    role;                 /*    40     4 */\n"
        "\tgfn_t                      gfn;                  /*    48     8 */\n"
        "\tu64 *                      spt;                  /*    56     8 */\n"
        "\tunion {\n"
        "\t\tint                root_count;           /*    80     4 */\n"
        "\t\trefcount_t         tdp_mmu_root_count;   /*    80     4 */\n"
        "\t};                                               /*    80     4 */\n"
        "\tstruct callback_head       rcu_head __attribute__((__aligned__(8))); /*   168    16 */\n"
        "};\nEND\n"
    )
    fake.chmod(0o755)
    script = tdpmmu.record_help("6.12").steps["probes"]
    offsets = "\n".join(line for line in script.splitlines() if not line.startswith(("cd ", "probe")))
    done = subprocess.run(
        ["bash", "-c", offsets + "\necho $SPT $ROLE $GFN $REFS $RCU $SPT_OF_RCU"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
        text=True,
        capture_output=True,
        check=True,
    )
    assert done.stdout.split() == ["56", "40", "48", "80", "168", "-112"]


def test_the_buffers_follow_the_memory() -> None:
    small, large = (tdpmmu.record_help("6.12", memory=memory) for memory in ("1G", "1T"))
    assert small.buffer_kib < large.buffer_kib
    assert f"-b {large.buffer_kib}" in large.steps["record"]
    assert large.raw["zap_events"] == 1 << 28


def test_spte_changes_are_recorded_wherever_they_can_be() -> None:
    for kernel in VERSIONS:
        events = [p["event"] for p in tdpmmu.record_help(kernel).trace_points]
        assert ("kvmmmu:kvm_tdp_mmu_spte_changed" in events) == (kernel != "5.10")
    assert "5.11" in tdpmmu.record_help("5.10").notes[0]
    assert all(point.buys for point in TRACE_POINTS)


def test_a_kernel_between_two_takes_the_older_functions_and_says_so() -> None:
    helped = tdpmmu.record_help("6.8.0-45-generic")
    assert helped.kernel == "6.8"
    assert helped.probes == tdpmmu.record_help("6.6").probes
    assert any("6.6" in note for note in helped.notes)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"kernel": "5.4"}, "5.10"),
        ({"kernel": "six"}, "version"),
        ({"kernel": "6.12", "format": "bpftrace"}, "trace-cmd"),
        ({"kernel": "6.12", "memory": "much"}, "memory"),
    ],
)
def test_what_cannot_be_helped_is_refused_by_name(arguments: dict[str, str], said: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=said):
        tdpmmu.record_help(**arguments)  # type: ignore[arg-type]


def test_the_command_prints_a_script_or_json(cli: Cli, tmp_path: Path) -> None:
    ran = cli("record-help", "--kernel", "6.1")
    assert ran.code == 0, ran.err
    assert "kvm_tdp_mmu_spte_changed" in ran.out
    assert subprocess.run(["bash", "-n"], input=ran.out.encode(), check=False).returncode == 0
    ran = cli("record-help", "--kernel", "7.2", "--format", "perf", "--json")
    raw = json.loads(ran.out)
    assert (raw["schema"], raw["tool"]) == ("tdpmmu.record-help/1", "perf")
    assert cli("record-help", "--kernel", "6.12", "-o", tmp_path / "probes.csv", "-q").code == 0
    assert (tmp_path / "probes.csv").read_text().startswith("kind,name")
    assert cli("record-help", "--kernel", "4.19").code == 2
    assert cli("record-help", "--format", "dtrace", "--kernel", "6.12").code == 2
