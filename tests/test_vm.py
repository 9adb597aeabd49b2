"""The live machine: what it maps and zaps, who may use it when, and what it refuses."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import tdpmmu
from tdpmmu import VM, FaultOutcome

DESIGNS = ("inline", "async-worker", "sync")
SLOW_PATH = (FaultOutcome.SLOW_FAULT,)
MAPPED = (FaultOutcome.TLB_HIT, FaultOutcome.WALK, FaultOutcome.FAST_FAULT, FaultOutcome.SLOW_FAULT)


@pytest.fixture(params=DESIGNS)
def vm(request: pytest.FixtureRequest) -> Iterator[VM]:
    with VM("256M", design=request.param, vcpus=2, seed=1, check="cheap") as made:
        yield made


def test_a_gigabyte_of_4k_pages_is_262144_sptes_counted_in_the_tree(vm: VM) -> None:
    stats = vm.populate(page="4K")
    assert stats.sptes == 65_536
    now = vm.stats()
    assert (now.pages_4k, now.pages_2m, now.pages_1g) == (65_536, 0, 0)
    assert now.table_pages == tdpmmu.table_pages("256M")
    assert vm.verify() == ()


@pytest.mark.parametrize(("page", "counts"), [("2M", (0, 512, 0)), ("1G", (0, 0, 1))])
def test_huge_pages_map_where_alignment_allows(page: str, counts: tuple[int, int, int]) -> None:
    with VM("1G", page=page, seed=1) as vm:
        vm.populate()
        stats = vm.stats()
        assert (stats.pages_4k, stats.pages_2m, stats.pages_1g) == counts
        assert stats.sptes == sum(counts)
        assert stats.table_bytes == tdpmmu.table_bytes("1G", page)


def test_the_unaligned_head_and_tail_use_small_pages() -> None:
    with VM(page="2M", seed=1) as vm:
        vm.add_memslot(500, 512 + 24)
        vm.populate()
        stats = vm.stats()
        assert (stats.pages_4k, stats.pages_2m) == (24, 1)


def test_populating_by_racing_faults_maps_the_same(vm: VM) -> None:
    vm.populate(range(4096), mode="fault", threads=2)
    assert vm.stats().pages_4k == 4096
    assert all(vm.lookup_batch(np.arange(4096))["level"] == 1)
    assert vm.verify() == ()


def test_a_first_touch_faults_and_a_second_hits(vm: VM) -> None:
    assert vm.fault(7, write=True).outcome in SLOW_PATH
    again = vm.fault(7, write=True)
    assert again.outcome in (FaultOutcome.TLB_HIT, FaultOutcome.WALK)
    found = vm.lookup(7)
    assert found is not None
    assert (found.pfn, found.page) == (again.pfn, again.page)


def test_a_gfn_without_memslot_is_an_outcome_and_no_error(vm: VM) -> None:
    assert vm.fault(1 << 30).outcome is FaultOutcome.EMULATE
    assert vm.lookup(1 << 30) is None


def test_what_is_not_mapped_is_none_or_level_0(vm: VM) -> None:
    assert vm.lookup(3) is None
    assert vm.lookup_batch([3, 4])["level"].tolist() == [0, 0]


def test_batches_do_what_single_calls_do(vm: VM) -> None:
    gfns = np.array([5, 5, 900, 1 << 30, 5], dtype=np.uint64)
    outcomes = vm.fault_batch(gfns, write=True)
    assert outcomes.dtype == np.uint8
    assert FaultOutcome(outcomes[0]) in SLOW_PATH
    assert FaultOutcome(outcomes[1]) is FaultOutcome.TLB_HIT
    assert FaultOutcome(outcomes[3]) is FaultOutcome.EMULATE
    found = vm.lookup_batch(gfns)
    assert found["level"].tolist()[3] == 0
    one = vm.lookup(900)
    assert one is not None
    assert int(found["pfn"][2]) == one.pfn
    assert int(found["spte"][2]) == one.spte


def test_no_two_gfns_share_a_frame(vm: VM) -> None:
    vm.populate(page="4K")
    found = vm.mappings()
    assert len(found) == 65_536
    assert len(np.unique(found["pfn"])) == 65_536
    assert found["gfn"].tolist() == sorted(found["gfn"].tolist())


def test_unmapping_a_range_unmaps_it_and_nothing_else(vm: VM) -> None:
    vm.populate(page="4K")
    report = vm.unmap(range(100, 200))
    assert report.sptes == 100
    levels = vm.lookup_batch(np.arange(300))["level"]
    assert levels[100:200].sum() == 0
    assert levels[:100].all()
    assert levels[200:].all()
    assert vm.verify() == ()


def test_a_fast_zap_leaves_no_leaf_and_the_guest_faults_anew(vm: VM) -> None:
    vm.populate(page="4K")
    vm.fault(9)
    report = vm.zap("all")
    assert report.sptes == 65_536
    assert report.wall_ns > 0
    assert vm.stats().sptes == 0
    assert vm.fault(9).outcome in SLOW_PATH
    assert vm.verify() == ()


@pytest.mark.parametrize("design", DESIGNS)
def test_dropping_the_last_root_differs_by_who_owns_it(design: str) -> None:
    with VM("64M", design=design, seed=1) as vm:
        vm.populate(page="4K")
        vm.fault(0)
        vm.drop_root()
        deadline = time.monotonic() + 20
        while design == "async-worker" and vm.stats().sptes and time.monotonic() < deadline:
            time.sleep(0.01)
        assert vm.stats().sptes == (16_384 if design == "sync" else 0)
        report = vm.close()
        assert report is not None
        assert (report.table_pages_leaked, report.violations) == (0, ())


def test_deleting_a_memslot_zaps_it() -> None:
    with VM(seed=1) as vm:
        slot = vm.add_memslot(0x1000, 512)
        vm.populate()
        assert vm.lookup(0x1000) is not None
        assert vm.delete_memslot(slot).sptes == 512
        assert vm.lookup(0x1000) is None
        assert vm.memslots() == ()
        assert vm.fault(0x1000).outcome is FaultOutcome.EMULATE


def test_memslots_come_back_as_they_were_added() -> None:
    with VM("1M", seed=1) as vm:
        other = vm.add_memslot(0x800, 16, readonly=True)
        assert other.slot == 1
        assert other.gfns == range(0x800, 0x810)
        assert vm.memslots()[1] == other
        assert vm.fault(0x800, write=True).outcome is FaultOutcome.EMULATE, "read-only memory takes no write"


@pytest.mark.parametrize(
    ("base", "npages", "slot", "named"),
    [
        (0xF0, 0x20, 5, "0xf0..0x110"),
        (0x1000, 1, 0, "0"),
        (0, 1, 5, "0x0..0x1"),
        (0, 0, 5, "npages=0"),
        ((1 << 36) - 1, 2, 5, "ends beyond gfn"),
        (1 << 36, 1, 5, "base_gfn=0x1000000000"),
        (-1, 1, 5, "base_gfn=-0x1"),
        (0x1000, 1, -1, "slot=-1"),
        (0x1000, 1, 40_000, "slot=40000"),
    ],
)
def test_a_memslot_that_breaks_a_rule_is_refused_and_named(
    base: int, npages: int, slot: int, named: str
) -> None:
    with VM("1M", seed=1) as vm:
        with pytest.raises(tdpmmu.InvalidArgument) as caught:
            vm.add_memslot(base, npages, slot=slot)
        assert named in str(caught.value)
        assert len(vm.memslots()) == 1


BAD_CONFIG: list[tuple[dict[str, Any], str]] = [
    ({"memory": "64X"}, "memory='64X'"),
    ({"memory": True}, "memory=True"),
    ({"memory": 1e12}, "memory="),
    ({"memory": -1}, "memory=-1"),
    ({"memory": 0}, "memory=0"),
    ({"memory": "512T"}, "at most 256 TiB"),
    ({"levels": 3}, "levels=3"),
    ({"levels": True}, "levels=True"),
    ({"vcpus": 0}, "vcpus=0"),
    ({"design": "inlin"}, "did you mean 'inline'"),
    ({"profile": "6.13"}, "profile='6.13'"),
    ({"passes": ("1G", "4K")}, "passes"),
    ({"passes": "4K,2M"}, "root"),
    ({"ownership": "both"}, "ownership='both'"),
    ({"design": "inline", "ownership": "mmu"}, "zapped inline"),
    ({"preempt": "fully"}, "preempt='fully'"),
    ({"tick": "4"}, ""),
    ({"tick": 0}, "tick=0"),
    ({"max_table_bytes": 4096}, "max_table_bytes=4096"),
    ({"seed": -1}, "seed=-1"),
    ({"check": "all"}, "check='all'"),
    ({"config": tdpmmu.VMConfig.make(), "vcpus": 2}, "not both"),
]


@pytest.mark.parametrize(("options", "named"), [case for case in BAD_CONFIG if case[1]])
def test_a_configuration_that_breaks_a_rule_is_refused_and_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument) as caught:
        VM(**options)
    assert named in str(caught.value)


@pytest.mark.parametrize("gfn", [-1, 1 << 36, 1 << 64, 1 << 200, True, 1.0, float("nan")])
def test_a_gfn_out_of_range_is_refused(gfn: Any) -> None:
    with VM("1M", seed=1) as vm:
        for call in (vm.fault, vm.lookup):
            with pytest.raises(tdpmmu.InvalidArgument, match="gfn="):
                call(gfn)


def test_five_levels_reach_further() -> None:
    with VM(levels=5, seed=1) as vm:
        vm.add_memslot((1 << 40) - 8, 8)
        assert vm.fault((1 << 40) - 1).outcome in SLOW_PATH
        with pytest.raises(tdpmmu.InvalidArgument, match="5 levels"):
            vm.fault(1 << 40)


@pytest.mark.parametrize("gfn", ["abc", None, [1], b"1"])
def test_a_wrong_type_is_a_type_error_with_the_name(gfn: Any) -> None:
    with VM("1M", seed=1) as vm, pytest.raises(TypeError, match="gfn="):
        vm.fault(gfn)


@pytest.mark.parametrize("gfns", [[[1, 2]], [1.5], [-1], [1 << 36], np.array([True])])
def test_a_batch_that_is_no_list_of_gfns_is_refused(gfns: Any) -> None:
    with VM("1M", seed=1) as vm:
        for call in (vm.fault_batch, vm.lookup_batch):
            with pytest.raises(tdpmmu.InvalidArgument, match="gfns"):
                call(gfns)


def test_empty_batches_and_ranges_do_nothing(vm: VM) -> None:
    assert len(vm.fault_batch([])) == 0
    assert len(vm.lookup_batch(np.array([], dtype=np.int32))) == 0
    assert vm.populate(range(0)).sptes == 0
    assert vm.populate(range(5, 1)).sptes == 0
    assert vm.unmap(range(9, 9)).sptes == 0
    assert len(vm.mappings(range(0))) == 0


def test_a_range_with_a_step_is_refused(vm: VM) -> None:
    for call in (vm.populate, vm.unmap, vm.mappings):
        with pytest.raises(tdpmmu.InvalidArgument, match="step"):
            call(range(0, 8, 2))


def test_a_strided_and_a_wide_array_are_read_right(vm: VM) -> None:
    vm.populate(range(64))
    every_other = np.arange(128, dtype=np.int64)[::2]
    assert vm.lookup_batch(every_other)["level"].tolist() == [1] * 32 + [0] * 32


def test_a_vcpu_out_of_range_is_refused(vm: VM) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="vcpu=2"):
        vm.fault(0, vcpu=2)


def test_two_threads_on_one_vcpu_are_refused_as_busy() -> None:
    with VM("1G", vcpus=1, seed=1) as vm:
        gfns = np.random.default_rng(1).integers(0, 1 << 18, 3_000_000).astype(np.uint64)
        busy = 0
        worker = threading.Thread(target=vm.fault_batch, args=(gfns,))
        worker.start()
        while worker.is_alive() and not busy:
            try:
                vm.fault(0)
            except tdpmmu.Busy:
                busy += 1
        worker.join()
        assert busy


def test_many_threads_work_on_one_machine(vm: VM) -> None:
    errors: list[BaseException] = []

    def work(vcpu: int) -> None:
        try:
            rng = np.random.default_rng(vcpu)
            for _ in range(20):
                vm.fault_batch(rng.integers(0, 65_536, 500).astype(np.uint64), vcpu=vcpu, write=True)
                vm.lookup_batch(rng.integers(0, 65_536, 500).astype(np.uint64))
                vm.stats()
        except BaseException as error:
            errors.append(error)

    def zap() -> None:
        try:
            for _ in range(10):
                vm.fast_zap()
                vm.unmap(range(1000, 2000))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(v,)) for v in range(2)] + [threading.Thread(target=zap)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert vm.verify() == ()


def test_closing_frees_every_table_and_twice_is_no_error() -> None:
    vm = VM("64M", seed=1)
    vm.populate()
    report = vm.close()
    assert report is not None
    assert (report.table_pages_leaked, report.violations) == (0, ())
    assert vm.close() is None
    assert vm.closed
    assert "closed" in repr(vm)


@pytest.mark.parametrize(
    "call",
    [
        lambda vm: vm.fault(0),
        lambda vm: vm.fault_batch([0]),
        lambda vm: vm.lookup(0),
        lambda vm: vm.lookup_batch([0]),
        lambda vm: vm.mappings(),
        lambda vm: vm.populate(),
        lambda vm: vm.unmap(range(4)),
        lambda vm: vm.zap(),
        lambda vm: vm.drop_root(),
        lambda vm: vm.stats(),
        lambda vm: vm.verify(),
        lambda vm: vm.memslots(),
        lambda vm: vm.add_memslot(1 << 20, 1),
        lambda vm: vm.delete_memslot(0),
    ],
)
def test_a_closed_machine_does_nothing_more(call: Any) -> None:
    vm = VM("1M", seed=1)
    vm.close()
    with pytest.raises(tdpmmu.Closed, match="closed"):
        call(vm)


def test_close_while_somebody_is_inside_says_who() -> None:
    vm = VM("1G", seed=1)
    gfns = np.random.default_rng(1).integers(0, 1 << 18, 20_000_000).astype(np.uint64)
    worker = threading.Thread(target=vm.fault_batch, args=(gfns,))
    worker.start()
    time.sleep(0.3)
    inside = worker.is_alive()
    try:
        if inside:
            with pytest.raises(tdpmmu.StallError, match="fault_batch"):
                vm.close(timeout=0)
    finally:
        worker.join()
        report = vm.close()
    assert inside
    assert report is not None, "the close that gave up did not count"
    assert report.violations == ()
    assert vm.close() is None


def test_a_callback_may_zap_the_machine_that_it_watches() -> None:
    with VM("8G", seed=1) as vm:
        vm.populate(mode="fault", progress=lambda phase, part: vm.unmap(range(512)))
        assert vm.verify() == ()


def test_a_callback_cannot_wait_for_its_own_call_to_end() -> None:
    vm = VM("16G", seed=1)
    with pytest.raises(tdpmmu.StallError, match="populate"):
        vm.populate(mode="fault", progress=lambda phase, part: vm.close(timeout=0.05))
    assert vm.close() is not None


def test_a_machine_is_not_pickled_or_copied_but_its_configuration_is() -> None:
    with VM("1M", seed=1) as vm:
        for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match="VMConfig"):
                attempt(vm)
        config = pickle.loads(pickle.dumps(vm.config))
    assert config == vm.config
    with VM(config=config) as twin:
        assert twin.memslots()[0].npages == 256


def test_a_seed_is_drawn_and_shown() -> None:
    assert tdpmmu.VMConfig.make(seed=None).seed != tdpmmu.VMConfig.make(seed=None).seed
    assert tdpmmu.VMConfig.make(seed=7).seed == 7


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_and_ends_well() -> None:
    with VM("1M", seed=1) as vm:
        vm.fault(0)
        child = os.fork()
        if child == 0:
            try:
                vm.fault(0)
            except tdpmmu.ForkedError as error:
                os._exit(0 if "spawn" in str(error) else 3)
            except BaseException:
                os._exit(2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert vm.fault(0).outcome in MAPPED, "the parent's machine works on"


def test_a_forked_child_may_exit_the_ordinary_way_and_make_its_own() -> None:
    code = """
import os, sys, warnings
warnings.simplefilter("ignore", DeprecationWarning)
import tdpmmu
vm = tdpmmu.VM("1M", seed=1)
vm.fault(0)
child = os.fork()
if child == 0:
    with tdpmmu.VM("1M", seed=1) as mine:
        mine.fault(3)
    del vm
    sys.exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
vm.close()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_machine_that_was_forgotten_warns_and_is_freed() -> None:
    vm = VM("1M", seed=1)
    vm.fault(0)
    box = [vm]
    del vm
    with pytest.warns(ResourceWarning, match="unclosed"):
        box.clear()
    gc.collect()


def test_an_interpreter_that_ends_with_an_open_machine_ends_well() -> None:
    code = "import tdpmmu; vm = tdpmmu.VM('64M', seed=1); vm.populate(); vm.fault(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_more_than_the_host_has_is_refused_before_anything_is_allocated() -> None:
    with VM("64T", seed=1) as vm:
        with pytest.raises(tdpmmu.OutOfTableMemory) as caught:
            vm.populate()
        assert "64 TiB of 4K pages needs 128.3 GiB of page tables" in str(caught.value)
        assert caught.value.needed_bytes == pytest.approx(tdpmmu.table_bytes("64T"), rel=1e-3)
        assert 0 < caught.value.available_bytes < caught.value.needed_bytes
        assert vm.stats().table_pages == 0


def test_a_cap_on_table_memory_is_kept_and_named() -> None:
    with VM("1G", max_table_bytes="64K", seed=1) as vm:
        with pytest.raises(tdpmmu.OutOfTableMemory):
            vm.populate(page="4K")
        assert vm.stats().table_bytes <= 64 << 10
        vm.zap()
        assert vm.fault(0).outcome in SLOW_PATH, "and the machine works on"


def test_running_vcpus_access_what_they_were_told(vm: VM) -> None:
    report = vm.run(accesses=10_000, gfns=range(1024), write=0.5)
    assert report.per_vcpu == (10_000, 10_000)
    assert report.accesses == sum(report.outcomes.values()) == 20_000
    assert report.outcomes[FaultOutcome.TLB_HIT] > 0
    assert report.outcomes[FaultOutcome.EMULATE] == 0
    assert 0 < vm.stats().pages_4k <= 1024
    assert vm.verify() == ()


def test_a_zap_under_running_vcpus_makes_them_fault_again(vm: VM) -> None:
    vm.populate()
    report = vm.run(seconds=0.5, during=lambda: [vm.fast_zap() for _ in range(3)])
    assert isinstance(report.during, list)
    assert len(report.during) == 3
    assert report.outcomes[FaultOutcome.SLOW_FAULT] + report.outcomes[FaultOutcome.RETRY] > 0
    assert vm.verify() == ()


def test_the_same_seed_makes_the_same_accesses() -> None:
    def mapped() -> list[int]:
        with VM("16M", vcpus=1, seed=5) as vm:
            vm.run(accesses=500)
            return vm.mappings()["gfn"].tolist()

    assert mapped() == mapped()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"seconds": 1, "accesses": 1},
        {"accesses": -1},
        {"seconds": -1.0},
        {"accesses": 1, "write": 1.5},
        {"accesses": 1, "vcpus": 3},
        {"accesses": 1, "gfns": range(0)},
        {"accesses": 1, "gfns": range(0, 9, 3)},
    ],
)
def test_a_run_that_breaks_a_rule_is_refused(vm: VM, options: dict[str, Any]) -> None:
    with pytest.raises(tdpmmu.InvalidArgument):
        vm.run(**options)


def test_an_error_in_a_vcpu_comes_to_the_caller() -> None:
    with VM("1G", max_table_bytes="64K", seed=1) as vm, pytest.raises(tdpmmu.OutOfTableMemory):
        vm.run(seconds=20)


CTRL_C = """
import os, signal, sys, threading, time
import tdpmmu
vm = tdpmmu.VM("128G", vcpus=1, seed=1)
sent = None
def interrupt():
    global sent
    time.sleep(0.5)
    sent = time.monotonic()
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=interrupt).start()
try:
    vm.populate(mode="fault", threads=1)
except KeyboardInterrupt:
    print("interrupted")
vm.fault(3)
print("usable", vm.verify())
vm.close()
"""


def test_ctrl_c_ends_a_populate_and_the_machine_stays_usable() -> None:
    done = subprocess.run([sys.executable, "-c", CTRL_C], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "interrupted\nusable ()\n"


def test_a_timeout_ends_a_populate() -> None:
    with VM("128G", vcpus=1, seed=1) as vm:
        with pytest.raises(tdpmmu.StallError):
            vm.populate(mode="fault", threads=1, timeout=0.2)
        assert vm.stats().sptes > 0
        assert vm.verify() == ()


def test_progress_is_told_while_a_populate_runs() -> None:
    seen: list[tuple[str, float]] = []
    with VM("8G", seed=1) as vm:
        vm.populate(mode="fault", progress=lambda phase, part: seen.append((phase, part)))
    assert seen
    assert all(0 <= part <= 1 for _, part in seen)


class AgainstADictionary(RuleBasedStateMachine):
    """Any order of operations: the machine and a plain set of mapped gfns agree. 4K pages only."""

    vm: VM
    PAGES = 2048

    @initialize(design=st.sampled_from(DESIGNS), profile=st.sampled_from(["5.18", "6.1", "6.12", "7.2"]))
    def make(self, design: str, profile: str) -> None:
        self.vm = VM(self.PAGES * 4096, design=design, profile=profile, seed=1, check="cheap")
        self.mapped: set[int] = set()

    @rule(gfn=st.integers(0, PAGES - 1), write=st.booleans())
    def fault(self, gfn: int, write: bool) -> None:
        outcome = self.vm.fault(gfn, write=write).outcome
        assert outcome in MAPPED
        if gfn not in self.mapped:
            assert outcome is FaultOutcome.SLOW_FAULT
        self.mapped.add(gfn)

    @rule(start=st.integers(0, PAGES - 1), length=st.integers(0, 700))
    def populate(self, start: int, length: int) -> None:
        gfns = range(start, min(start + length, self.PAGES))
        self.vm.populate(gfns)
        self.mapped |= set(gfns)

    @rule(start=st.integers(0, PAGES - 1), length=st.integers(0, 700))
    def unmap(self, start: int, length: int) -> None:
        gfns = range(start, min(start + length, self.PAGES))
        assert self.vm.unmap(gfns).sptes == len(self.mapped & set(gfns))
        self.mapped -= set(gfns)

    @precondition(lambda self: bool(self.mapped))
    @rule()
    def zap(self) -> None:
        assert self.vm.zap().sptes == len(self.mapped)
        self.mapped.clear()

    @invariant()
    def they_agree(self) -> None:
        if hasattr(self, "vm"):
            found = self.vm.mappings()["gfn"].tolist()
            assert found == sorted(self.mapped)
            assert self.vm.stats().pages_4k == len(self.mapped)

    def teardown(self) -> None:
        if hasattr(self, "vm"):
            assert self.vm.verify() == ()
            report = self.vm.close()
            assert report is not None
            assert (report.table_pages_leaked, report.violations) == (0, ())


TestAgainstADictionary = AgainstADictionary.TestCase
TestAgainstADictionary.settings = settings(max_examples=25, stateful_step_count=20, deadline=None)


@given(st.lists(st.integers(0, (1 << 18) - 1), max_size=200))
@settings(max_examples=20, deadline=None)
def test_lookups_find_exactly_what_was_faulted_in(gfns: list[int]) -> None:
    with VM("1G", seed=1) as vm:
        vm.fault_batch(np.array(gfns, dtype=np.uint64))
        probe = np.arange(0, 1 << 18, 97, dtype=np.uint64)
        found = vm.lookup_batch(probe)["level"] > 0
        assert found.tolist() == [int(gfn) in set(gfns) for gfn in probe]
