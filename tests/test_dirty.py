"""`bench dirty`: its options, its result from the engine, its tables and its picture."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import tdpmmu
from conftest import Cli
from tdpmmu import bench, dirty, plot

PHASES = {"enable": 8.0, "write": 90.0, "harvest": 7.0, "rewrite": 80.0, "disable": 6.0, "refault": 300.0}
Raw = dict[str, Any]


def row(phase: str, ns: float, eager: bool | None, density: int = 1, protocol: str = "get") -> Raw:
    count = 1000 // density
    limit = "cmpxchg_ns" if phase in ("enable", "write") else None
    return {
        "name": f"{phase}: {protocol}, 2M, {eager}, {density}",
        "ns": ns,
        "ratio": ns / 7.2 if limit else None,
        "of": limit,
        "count": count,
        "goal": None,
        "phase": phase,
        "page": "2M",
        "eager": eager,
        "protocol": protocol,
        "density": density,
        "total_ns": int(ns * count),
        "mapped_4k": 1000,
        "mapped_2m": 0,
        "mapped_1g": 0,
    }


def document(eager: tuple[bool | None, ...] = (True, False), densities: tuple[int, ...] = (1, 8)) -> Raw:
    rows = []
    for way in eager:
        for density in densities:
            # Without the split ahead, enabling is next to nothing and the first writes pay.
            shift = 0.5 if way is False else 1.0
            took = {**PHASES, "enable": PHASES["enable"] * shift, "write": PHASES["write"] / shift}
            took["total"] = took["enable"] + took["write"]
            rows += [row(phase, ns, way, density) for phase, ns in took.items()]
    return {
        "schema": "tdpmmu.micro/1",
        "experiment": "dirty",
        "config": {"memory_bytes": 1 << 30, "page": "2M", "kernel_profile": "6.12"},
        "seed": 1,
        "limits": {"cmpxchg_ns": 7.2},
        "rows": rows,
    }


def load(raw: Raw) -> tdpmmu.MicroResult:
    result = tdpmmu.load(json.dumps(raw))
    assert isinstance(result, tdpmmu.MicroResult)
    return result


def words(picture: bytes) -> str:
    """Return the text of an SVG: matplotlib leaves each as a comment."""
    return "\n".join(re.findall(r"<!-- (.*?) -->", picture.decode(), re.DOTALL))


def test_a_course_is_a_protocol_a_way_to_split_and_a_density() -> None:
    found = dirty.courses(load(document()))
    assert [(c.name, c.density) for c in found] == [
        ("get, eager split", 1),
        ("get, eager split", 8),
        ("get, split in faults", 1),
        ("get, split in faults", 8),
    ]
    assert found[1].total_ns("write") == 90 * 125
    assert found[0].total_ns("collect") is None


def test_the_table_has_each_phase_and_the_classic_comparison() -> None:
    text = dirty.render(load(document()))
    assert text.startswith("1 GiB of 2M pages, kernel 6.12")
    assert "every page written" in text
    assert "1 page in 8 written" in text
    line = next(line for line in text.splitlines() if line.startswith("get, eager split"))
    assert "90.0 (12.5)" in line, "the ratio to the limit beside it"
    assert "Eager split on and off" in text
    assert max(map(len, text.splitlines())) <= 118
    both = next(line for line in text.splitlines() if line.startswith("get, every page written"))
    assert both.removeprefix("get, every page written").split()[:4] == ["8", "us", "4", "us"]
    assert "cmpxchg_ns" in dirty.render(load(document()), wide=True), "each row with its limit"


def test_one_way_alone_is_compared_with_nothing() -> None:
    assert "Eager split on and off" not in dirty.render(load(document(eager=(False,))))
    assert "split" not in dirty.render(load(document(eager=(None,))))


def test_the_picture_says_what_eager_splitting_changes() -> None:
    said = words(plot.draw(load(document())))
    assert "Eager split: logging is on after 8 us instead of 4 us" in said
    assert "1 page in 8 written" in said
    assert "first write" in said
    alone = words(plot.draw(load(document(eager=(None,)))))
    assert "Dirty logging by get" in alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"protocol": "rings"}, "did you mean 'ring'"),
        ({"eager": "yes"}, "known: on, off"),
        ({"density": 0}, "density=0"),
        ({"density": [1, 1 << 40]}, "density=1099511627776"),
        ({"density": []}, "at least one"),
        ({"eager": "on"}, "no huge page to split"),
        ({"eager": "on", "page": "2M", "profile": "5.15", "design": "inline"}, "does not split ahead"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=re.escape(message)):
        bench.dirty(memory="16M", **options)


def test_the_others_have_no_such_options() -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="an option of bench dirty, not of bench walk"):
        bench.walk(memory="16M", density=8)


def test_the_engine_gives_every_phase() -> None:
    result = bench.dirty(memory="16M", page="2M", protocol="get", density=[8], seed=1)
    found = dirty.courses(result)
    assert [course.eager for course in found] == [True, False]
    for course in found:
        assert set(dirty.PHASES) - {"first-clear"} <= set(course.phases)
        assert course.phases["harvest"].raw["count"] == 4096 // 8


def test_the_command_writes_table_and_picture(cli: Cli, tmp_path: Path) -> None:
    picture = tmp_path / "dirty.svg"
    arguments = ("bench", "dirty", "--memory", "16M", "--page", "2M", "--protocol", "get", "--density", "1,8")
    ran = cli(*arguments, "--seed", "1", "-o", picture)
    assert ran.code == 0, ran.err
    assert "Eager split on and off" in ran.out
    assert "first write" in words(picture.read_bytes())
    assert cli("bench", "dirty", "--density", "x").code == 2
    assert cli("bench", "walk", "--density", "8").code == 2
