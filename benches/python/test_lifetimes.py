"""A VM's life and a result's: `pytest benches/python --benchmark-enable`."""

from __future__ import annotations

from typing import Any

import pytest

import tdpmmu
from tdpmmu import VM


def test_a_vm_from_creation_to_close(benchmark: Any) -> None:
    def life() -> int | None:
        report = VM("16M", seed=1).close()
        return None if report is None else report.table_pages_leaked

    assert benchmark(life) == 0


@pytest.mark.parametrize("memory", ["64M", "1G"])
def test_a_vm_populated_and_closed(benchmark: Any, memory: str) -> None:
    def life() -> int:
        with VM(memory, seed=1) as vm:
            return vm.populate().sptes

    assert benchmark(life) == tdpmmu.units.parse_size(memory) // 4096


@pytest.fixture(scope="module")
def result() -> str:
    return tdpmmu.bench.zap(memory="64M", vcpus=1, reps=1, seed=1).to_json()


def test_a_result_from_json(benchmark: Any, result: str) -> None:
    parsed = benchmark(tdpmmu.load, result)
    assert parsed.to_json() == result


def test_a_result_as_rows(benchmark: Any, result: str) -> None:
    parsed = tdpmmu.load(result)
    assert len(benchmark(parsed.to_rows)) == len(parsed.runs)
