"""What a call from Python costs: `pytest --benchmark-enable tests/test_benchmarks.py`; else all run once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tdpmmu import VM, FaultOutcome

BATCH = 100_000


@pytest.fixture(scope="module")
def vm() -> Iterator[VM]:
    with VM("1G", seed=1) as made:
        made.populate()
        yield made


def test_one_fault_that_hits(benchmark: Any, vm: VM) -> None:
    vm.fault(7)
    # A guest entry a call: the hardware may have to walk again.
    assert benchmark(vm.fault, 7).outcome in (FaultOutcome.TLB_HIT, FaultOutcome.WALK)


def test_a_batch_of_hits(benchmark: Any, vm: VM) -> None:
    gfns = np.full(BATCH, 7, dtype=np.uint64)
    outcomes = benchmark(vm.fault_batch, gfns)
    assert set(outcomes.tolist()[1:]) == {FaultOutcome.TLB_HIT}


def test_a_batch_of_random_accesses(benchmark: Any, vm: VM) -> None:
    gfns = np.random.default_rng(1).integers(0, 1 << 18, BATCH, dtype=np.uint64)
    assert set(benchmark(vm.fault_batch, gfns)) <= {FaultOutcome.TLB_HIT, FaultOutcome.WALK}


def test_a_batch_of_lookups(benchmark: Any, vm: VM) -> None:
    gfns = np.random.default_rng(1).integers(0, 1 << 18, BATCH, dtype=np.uint64)
    assert benchmark(vm.lookup_batch, gfns)["level"].all()


def test_every_mapping_of_a_gigabyte(benchmark: Any, vm: VM) -> None:
    assert len(benchmark(vm.mappings)) == 1 << 18
