"""`explore`, `bugs`, `torture`, `explain`, `simulate` through the face: results, stories, bad input."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

import tdpmmu
from conftest import ROOT, Cli
from tdpmmu import errors, found, found_table

#: The flawed pair of the mails: which design, and in which protocol it falls.
FLAWED = [("system-workqueue", "root-lifecycle"), ("no-second-phase", "fault-zap")]
REQUIRED = {1, 3, 4, 5, 7, 9, 10, 11, 13, 14, 15, 17, 19, 20, 21, 22, 23, 27, 28, 29, 31}
#: Those of the shadow MMU, and the walk without either of its barriers.
REQUIRED_OF_SHADOW = {"25", "33", "35", "36", "37", "44b", "44c"}
SHADOW = [p.name for p in tdpmmu.protocols() if p.name.startswith("shadow-")]
QUICK = {"schedules": 60, "seed": 1}


def number(bug: tdpmmu.Exhibit) -> int | None:
    digits = "".join(c for c in bug.id if c.isdigit())
    return int(digits) if bug.id[0].isdigit() else None


@pytest.fixture(scope="module")
def underflow() -> tdpmmu.Exploration:
    return tdpmmu.explore("root-lifecycle", design="system-workqueue", seed=1)


def test_the_flawed_design_of_the_mails_is_found_out(underflow: tdpmmu.Exploration) -> None:
    violation = underflow.violation
    assert violation is not None
    assert not underflow.ok
    assert violation.preemptions <= 3
    assert violation.seed in found_table.render_exploration(underflow)


def test_a_found_schedule_is_found_again_on_any_number_of_jobs(underflow: tdpmmu.Exploration) -> None:
    again = tdpmmu.explore("root-lifecycle", design="system-workqueue", seed=1, jobs=1)
    assert again.violation is not None
    assert underflow.violation is not None
    assert again.schedules == underflow.schedules
    assert again.violation.seed == underflow.violation.seed


def test_its_story_names_threads_values_and_counts(underflow: tdpmmu.Exploration, tmp_path: Path) -> None:
    assert underflow.violation is not None
    story = tdpmmu.explain(underflow.violation.seed)
    assert story.rule == underflow.violation.rule
    assert max(map(len, story.text.splitlines())) <= 160
    assert "root" in story.text
    file = tmp_path / "found.json"
    file.write_text(underflow.to_json())
    for same in (tdpmmu.explain(underflow), tdpmmu.explain(file)):
        assert same.text == story.text
    assert story._repr_html_() == story.html
    assert story.html.lstrip().startswith("<")
    assert "<script src" not in story.html


@pytest.mark.parametrize("name", [p.name for p in tdpmmu.protocols()])
def test_a_sound_design_has_no_violation_in_a_short_search(name: str) -> None:
    result = tdpmmu.explore(name, design="sync", **QUICK)
    assert result.ok, found_table.render_exploration(result)
    assert result.schedules == QUICK["schedules"]
    assert result.sites_forced
    assert result.bound["text"]


@pytest.mark.parametrize("name", SHADOW)
def test_shadow_pages_hold_in_a_short_search(name: str) -> None:
    result = tdpmmu.explore(name, design="shadow-gen", **QUICK)
    assert result.ok, found_table.render_exploration(result)
    assert result.schedules == QUICK["schedules"]
    assert any("shadow" in site.lower() for site in result.sites_forced)


def test_an_l2_beside_a_tdp_mmu_is_nothing_for_a_shadow_design() -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="shadow-gen"):
        tdpmmu.explore("nested-quota", design="shadow-gen", **QUICK)


def test_results_survive_a_round_trip(underflow: tdpmmu.Exploration) -> None:
    again = tdpmmu.load(underflow.to_json())
    assert again == underflow
    assert isinstance(again, tdpmmu.Exploration)
    assert underflow.to_rows()


def test_the_museum_has_what_history_asks_for() -> None:
    known = tdpmmu.exhibits()
    numbers = {n for n in map(number, known) if n is not None}
    assert numbers >= REQUIRED
    assert len(numbers) >= 30
    assert {bug.id for bug in known} >= REQUIRED_OF_SHADOW
    for bug in known:
        assert bug.title, bug.id
        assert bug.cause, bug.id
        assert found_table.render_exhibit(bug)
    assert len({bug.id for bug in known}) == len(known)


@pytest.mark.parametrize("bug", ["1", "21", "35"])
def test_a_demonstration_catches_the_bug_and_nothing_without_it(bug: str) -> None:
    result = tdpmmu.demo(bug, seeds=1)
    (shown,) = result.bugs
    assert result.ok, found_table.render_museum(result)
    assert shown.caught
    assert not shown.false_alarm
    assert shown.oracle
    assert shown.story


def test_the_program_in_the_docs_is_searched() -> None:
    text = (ROOT / "docs" / "exploring.md").read_text()
    program = json.loads(text.split("```json\n")[1].split("```")[0])
    result = tdpmmu.explore(program, **QUICK)
    assert result.ok, found_table.render_exploration(result)
    assert result.protocol == program["name"]
    program["threads"][0]["acts"] = [{"act": "levitate"}]
    with pytest.raises(tdpmmu.InvalidArgument, match="levitate"):
        tdpmmu.explore(program)


def test_allocation_failures_are_clean() -> None:
    result = tdpmmu.allocation_failures("fault-zap", design="sync")
    assert result.sites > 0
    assert len(result.runs) == 2 * result.sites
    assert any(run.retried_ok for run in result.runs)
    assert all(run.clean for run in result.runs)
    assert result.ok, found_table.render_allocations(result)


def test_torture_counts_what_it_did() -> None:
    result = tdpmmu.torture(1.0, seed=1, design="sync", profile="6.12")
    assert result.ok, found_table.render_torture(result)
    assert result.operations > 0
    assert result.seed == 1


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: tdpmmu.explore("root-lifecylce"), "root-lifecycle"),
        (lambda: tdpmmu.explore("fault-zap", design="sink"), "sync"),
        (lambda: tdpmmu.explore("fault-zap", schedules=0), "schedules"),
        (lambda: tdpmmu.explore("fault-zap", memory="arm"), "memory"),
        (lambda: tdpmmu.explore("fault-zap", strategy="luck"), "strategy"),
        (lambda: tdpmmu.explore("fault-zap", faults="alloc=x"), "alloc"),
        (lambda: tdpmmu.explore("fault-zap", bug="99"), "99"),
        (lambda: tdpmmu.demo("99"), "99"),
        (lambda: tdpmmu.demo([]), "bugs"),
        (lambda: tdpmmu.torture(-1), "seconds"),
        (lambda: tdpmmu.torture(float("nan")), "seconds"),
        (lambda: tdpmmu.explain("v1:nonsense"), "v1:PROGRAM"),
        (lambda: tdpmmu.explain("{}"), "failed"),
        (lambda: tdpmmu.simulate(vcpus=0), "vcpus"),
        (lambda: tdpmmu.simulate(memory="64X"), "64X"),
    ],
)
def test_bad_input_is_told_by_value_and_rule(call, named: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(errors.InvalidArgument, match=named):
        call()


def test_a_timeout_ends_a_search() -> None:
    with pytest.raises(tdpmmu.StallError):
        tdpmmu.explore("root-lifecycle", design="sync", schedules=10**9, timeout=0.5)


def test_progress_is_told_and_its_exception_comes_back() -> None:
    def fail(phase: str, fraction: float) -> None:
        raise RuntimeError(f"{phase} at {fraction}")

    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        tdpmmu.explore("root-lifecycle", design="sync", schedules=10**9, progress=fail)
    assert time.monotonic() - begin < 60


def test_searches_run_side_by_side() -> None:
    results: list[tdpmmu.Exploration] = []

    def search() -> None:
        results.append(tdpmmu.explore("fault-zap", design="sync", schedules=30, seed=5, jobs=1))

    threads = [threading.Thread(target=search) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({json.dumps(r.sites_forced, sort_keys=True) for r in results}) == 1


def test_the_command_line_says_what_it_found(cli: Cli, tmp_path: Path) -> None:
    listed = cli("explore", "--list")
    assert listed.code == 0
    assert "root-lifecycle" in listed.out
    file = tmp_path / "found.json"
    ran = cli(
        "explore", "root-lifecycle", "--design", "system-workqueue", "--seed", "1", "-o", file, timeout=300
    )
    assert ran.code == 1, ran.err
    assert "violation:" in ran.out
    told = cli("explain", file, "-o", tmp_path / "story.html", timeout=300)
    assert told.code == 0, told.err
    assert (tmp_path / "story.html").read_text().lstrip().startswith("<")
    shown = cli("bugs", "show", "21")
    assert shown.code == 0
    assert "21" in shown.out
    assert cli("bugs", "list", "--json").out.startswith("{")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["explore"], 2),
        (["explore", "fault-zap", "--strategy", "luck"], 2),
        (["explore", "no-such"], 2),
        (["explore", "no-such.json"], 3),
        (["bugs", "show", "99"], 2),
        (["bugs", "demo"], 2),
        (["bugs", "demo", "1", "--all"], 2),
        (["explain", "no-such-file.json"], 3),
        (["torture", "--seconds", "0"], 2),
        (["simulate", "zap", "--memory", "x"], 2),
    ],
)
def test_bad_arguments_have_their_exit_code(cli: Cli, arguments: list[str], code: int) -> None:
    ran = cli(*arguments)
    assert ran.code == code, ran.err
    assert ran.err


def test_every_kind_of_result_prints() -> None:
    museum = found.Museum.from_raw(
        {
            "schema": "tdpmmu.bugs/1",
            "seconds": 1,
            "bugs": [
                {"id": "1", "title": "t", "caught": True, "schedules_median": 3, "oracle": "O-TLB"},
                {"id": "2", "title": "u", "caught": False, "false_alarm": True},
            ],
        }
    )
    text = found_table.render_museum(museum)
    assert "caught 1 of 2" in text
    assert "1 false alarms" in text
    assert not museum.ok
    assert [row["id"] for row in museum.to_rows()] == ["1", "2"]
    failed = found.AllocationFailures.from_raw(
        {"schema": "tdpmmu.faults/1", "sites": 2, "ok": False, "runs": [{"k": 1, "site": "AllocFault"}]}
    )
    assert "not clean: request 1 at AllocFault" in found_table.render_allocations(failed)
    assert not failed.ok
    torture = found.Torture.from_raw(
        {
            "schema": "tdpmmu.torture/1",
            "seconds": 2,
            "operations": 10,
            "violations": [{"rule": "r", "what": "w"}],
        }
    )
    assert "violation: episode ?: w" in found_table.render_torture(torture)
