"""The shadow MMU from Python: a VM on shadow pages, guests with tables of their own, its benches."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import documents
import tdpmmu
from conftest import Cli
from tdpmmu import VM, FaultOutcome, _names, bench, reclaim_table, table

DESIGNS = ("shadow-walk", "shadow-walk-break", "shadow-gen-kept", "shadow-gen", "shadow-slot")
PAGINGS = ("direct", "guest")
KINDS = ("counter", "ipi", "membarrier", "rcu", "epoch")
#: These leave no page of an older generation once a zap has returned.
AT_ONCE = ("shadow-walk", "shadow-walk-break", "shadow-gen")


def clean(vm: VM) -> None:
    assert vm.verify() == ()
    report = vm.close()
    assert report is not None
    assert (report.table_pages_leaked, report.violations) == (0, ())


@pytest.fixture(params=[(design, paging) for design in DESIGNS for paging in PAGINGS], ids="-".join)
def vm(request: pytest.FixtureRequest) -> Iterator[VM]:
    design, paging = request.param
    with VM("64M", design=design, paging=paging, vcpus=2, seed=1, check="cheap") as made:
        yield made


@pytest.fixture
def guest_vm() -> Iterator[VM]:
    with VM("16M", design="shadow-gen", paging="guest", vcpus=2, seed=1, check="cheap") as made:
        yield made


def test_the_designs_and_kinds_are_known_by_name() -> None:
    assert _names.shadow_designs() == DESIGNS
    assert _names.reclaims() == KINDS
    assert not set(DESIGNS) & set(_names.catalogue()["sound_designs"]), "all is of the TDP MMU"
    assert _names.designs("shadow") == list(DESIGNS)
    assert _names.designs(["sync", "shadow,all"])[: len(DESIGNS) + 1] == ["sync", *DESIGNS]
    assert not set(DESIGNS) & set(_names.flawed())


# -- a VM on shadow pages


def test_populating_maps_every_page_and_counts_it(vm: VM) -> None:
    stats = vm.populate()
    assert stats.sptes == 16_384
    now = vm.stats()
    assert (now.pages_4k, now.pages_2m) == (16_384, 0)
    assert now.shadow is not None
    assert now.shadow["pages"] == now.table_pages >= tdpmmu.table_pages("64M")
    assert (now.shadow["paging"], now.shadow["reclaim"]) == (vm.config.paging, "ipi")
    assert all(vm.lookup_batch(np.arange(16_384))["level"] == 1)
    clean(vm)


def test_a_first_touch_faults_and_a_second_hits(vm: VM) -> None:
    assert vm.fault(7, write=True).outcome is FaultOutcome.SLOW_FAULT
    again = vm.fault(7, write=True)
    assert again.outcome in (FaultOutcome.TLB_HIT, FaultOutcome.WALK)
    found = vm.lookup(7)
    assert found is not None
    assert (found.pfn, found.page) == (again.pfn, again.page)
    assert vm.lookup(8) is None
    assert vm.mappings().tolist() == [(7, found.spte, found.pfn, 1)]


def test_a_zap_of_everything_leaves_nothing_mapped_and_the_guest_faults_anew(vm: VM) -> None:
    vm.populate()
    vm.fault(9)
    report = vm.zap("all")
    assert report.wall_ns > 0
    shadow = vm.stats().shadow
    assert shadow is not None
    if vm.config.design != "shadow-slot":
        assert vm.lookup(9) is None
        assert vm.fault(9).outcome is FaultOutcome.SLOW_FAULT
    if vm.config.design in AT_ONCE:
        assert report.sptes == 16_384
        assert shadow["obsolete"] == 0
    if vm.config.design == "shadow-gen-kept":
        assert shadow["obsolete"] > 30, "kept until memory is short"
        assert report.sptes == 0
    clean(vm)


def test_unmapping_a_range_unmaps_it_and_nothing_else(vm: VM) -> None:
    vm.populate()
    assert vm.unmap(range(100, 200)).sptes == 100
    levels = vm.lookup_batch(np.arange(300))["level"]
    assert levels[100:200].sum() == 0
    assert levels[:100].all()
    assert levels[200:].all()
    clean(vm)


def test_churning_a_memslot_leaks_nothing(vm: VM) -> None:
    vm.populate(range(2048))
    for _ in range(20):
        slot = vm.add_memslot(1 << 20, 512)
        vm.delete_memslot(slot)
        vm.fault(5, write=True)
    clean(vm)


def test_vcpus_run_beside_zaps(vm: VM) -> None:
    ran = vm.run(seconds=0.1, during=lambda: [vm.zap() for _ in range(10)])
    assert ran.accesses > 0
    assert min(ran.per_vcpu) > 0
    assert ran.outcomes[FaultOutcome.GUEST_FAULT] == 0
    clean(vm)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_reclamation_frees_what_is_zapped(kind: str) -> None:
    with VM("32M", design="shadow-gen", reclaim=kind, vcpus=2, seed=1) as vm:
        vm.populate()
        stop = threading.Event()

        def walk() -> None:
            while not stop.is_set():
                vm.lookup_batch(np.arange(0, 8192, 64))

        reader = threading.Thread(target=walk)
        reader.start()
        try:
            for _ in range(20):
                vm.zap()
                vm.populate(range(1024))
        finally:
            stop.set()
            reader.join()
        shadow = vm.stats().shadow
        assert shadow is not None
        assert shadow["toggles"] == 20
        assert shadow["reclaim"] == kind
        if kind in ("ipi", "membarrier"):
            assert shadow["waiting"] == 0, "the freer waits, no page does"
        clean(vm)


def test_a_quota_bounds_the_pages_and_every_access_still_works() -> None:
    with VM("256M", design="shadow-gen", quota=64, vcpus=1, seed=1, check="cheap") as vm:
        for gfn in range(0, 65_536, 256):
            assert vm.fault(gfn, write=True).outcome in (FaultOutcome.SLOW_FAULT, FaultOutcome.WALK)
            shadow = vm.stats().shadow
            assert shadow is not None
            assert shadow["pages"] <= 64
        assert shadow["reclaimed"] > 60
        clean(vm)


def test_huge_pages_are_mapped_huge() -> None:
    with VM("1G", page="2M", design="shadow-gen", seed=1) as vm:
        vm.populate()
        assert (vm.stats().pages_4k, vm.stats().pages_2m) == (0, 512)
        found = vm.mappings()
        assert found["level"].tolist() == [2] * 512
        clean(vm)


def test_dirty_logging_finds_what_was_written(vm: VM) -> None:
    vm.populate(range(1024))
    slot = next(slot for slot in vm.memslots() if slot.base_gfn == 0)
    vm.set_memslot_flags(slot, dirty_log=True)
    vm.fault_batch([3, 700, 701], write=True)
    log = vm.get_dirty_log(slot)
    assert {3, 700, 701} <= set(log.gfns.tolist())
    assert log.count < 64
    assert vm.get_dirty_log(slot).count == 0
    vm.fault(700, write=True)
    assert vm.get_dirty_log(slot).gfns.tolist() == [700]
    clean(vm)


# -- what makes no sense there


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"design": "shadow-gen", "passes": "1G,root"}, "passes='1G,root' with design shadow-gen"),
        ({"design": "shadow-gen", "ownership": "mmu"}, "ownership='mmu'"),
        ({"design": "shadow-gen", "workers": 2}, "workers=2"),
        ({"design": "shadow-gen", "worker_queue": "system"}, "worker_queue='system'"),
        ({"design": "shadow-gen", "paging": "tdp"}, "known: direct, guest"),
        ({"design": "shadow-gen", "reclaim": "epochs"}, "did you mean 'epoch'"),
        ({"design": "shadow-gen", "quota": 3}, "quota=3"),
        ({"design": "shadow-gen", "dirty_mode": "d-bits"}, "d-bits|DBits"),
        ({"design": "shadow-jen"}, "did you mean 'shadow-gen'"),
        ({"design": "sync", "paging": "guest"}, "paging='guest' with design sync"),
        ({"design": "sync", "reclaim": "ipi"}, "reclaim='ipi'"),
        ({"quota": 100}, "quota=100 with design"),
    ],
)
def test_what_an_mmu_does_not_have_is_refused_by_name(options: dict[str, Any], named: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=named):
        VM("16M", **options).close()


def test_what_only_the_tdp_mmu_can_do_is_unsupported(vm: VM) -> None:
    vm.populate(range(512))
    before = vm.stats().sptes
    for call in (vm.recover_nx, lambda: vm.pre_fault(range(16))):
        with pytest.raises(tdpmmu.Unsupported, match="TDP MMU"):
            call()
    assert vm.stats().sptes == before
    if vm.config.paging == "direct":
        with pytest.raises(tdpmmu.Unsupported, match="paging 'direct'"):
            vm.guest  # noqa: B018
    clean(vm)


def test_a_vm_on_the_tdp_mmu_has_no_shadow_block_and_no_guest() -> None:
    with VM("16M", seed=1) as vm:
        assert vm.stats().shadow is None
        with pytest.raises(tdpmmu.Unsupported, match="design 'sync'"):
            vm.guest  # noqa: B018


# -- a guest with tables of its own


def test_the_first_process_maps_all_memory_one_to_one(guest_vm: VM) -> None:
    boot = guest_vm.guest.boot
    assert boot == guest_vm.guest.boot
    found = boot.translate(77)
    assert found == tdpmmu.GuestMapping(77, 77, "4K", True)
    assert boot.translate(4096) is None
    assert guest_vm.fault(4095).outcome is FaultOutcome.SLOW_FAULT
    assert guest_vm.fault(4096).outcome is FaultOutcome.GUEST_FAULT, (
        "nobody mapped it: the guest's page fault"
    )
    clean(guest_vm)


def test_a_process_sees_what_it_maps_and_no_more(guest_vm: VM) -> None:
    guest = guest_vm.guest
    process = guest.process()
    assert process != guest.boot
    process.map(0x123456, 9)
    process.map(0x123457, 10, writable=False)
    assert process.translate(0x123456) == tdpmmu.GuestMapping(0x123456, 9, "4K", True)
    assert process.translate(0x123457) == tdpmmu.GuestMapping(0x123457, 10, "4K", False)
    process.switch(vcpu=1)
    there = guest_vm.fault(0x123456, write=True, vcpu=1)
    assert there.outcome is FaultOutcome.SLOW_FAULT
    assert there.pfn == guest_vm.fault(9).pfn, "the other vCPU has it at its gfn"
    assert guest_vm.fault(9, vcpu=1).outcome is FaultOutcome.GUEST_FAULT
    assert guest_vm.fault(0x123457, vcpu=1).outcome is FaultOutcome.SLOW_FAULT
    assert guest_vm.fault(0x123457, write=True, vcpu=1).outcome is FaultOutcome.GUEST_FAULT
    clean(guest_vm)


def test_what_a_process_unmaps_is_gone_after_an_invalidation(guest_vm: VM) -> None:
    guest = guest_vm.guest
    process = guest.process()
    process.map(64, 5)
    process.switch()
    assert guest_vm.fault(64, write=True).pfn is not None
    assert process.unmap(64)
    assert not process.unmap(64)
    guest.invalidate(64)
    assert guest_vm.fault(64).outcome is FaultOutcome.GUEST_FAULT
    process.map(64, 6)
    guest.flush()
    moved = guest_vm.fault(64)
    guest.boot.switch()
    assert moved.pfn == guest_vm.fault(6).pfn
    clean(guest_vm)


def test_one_frame_mapped_twice_is_unmapped_twice(guest_vm: VM) -> None:
    process = guest_vm.guest.process()
    for gva in (1000, 2000):
        process.map(gva, 12)
    process.switch()
    first, second = (guest_vm.fault(gva, write=True) for gva in (1000, 2000))
    assert first.pfn == second.pfn
    assert guest_vm.unmap(range(12, 13)).sptes == 2
    assert guest_vm.lookup(1000) is None
    assert guest_vm.lookup(2000) is None
    clean(guest_vm)


def test_a_guest_that_keeps_remapping_is_shadowed_rightly(guest_vm: VM) -> None:
    rng = np.random.default_rng(1)
    guest = guest_vm.guest
    processes = [guest.process() for _ in range(3)]
    known: list[dict[int, int]] = [{} for _ in processes]
    for _ in range(600):
        which = int(rng.integers(3))
        gva, gfn = int(rng.integers(1 << 20)) & 0xFFF, int(rng.integers(2048))
        process, tables = processes[which], known[which]
        process.switch()
        kind = rng.integers(4)
        if kind < 2:
            process.map(gva, gfn)
            guest.invalidate(gva)
            tables[gva] = gfn
        elif tables and kind == 2:
            gone = next(iter(tables))
            assert process.unmap(gone)
            guest.invalidate(gone)
            del tables[gone]
        elif tables:
            probe = next(reversed(tables))
            assert guest_vm.fault(probe, write=True).pfn is not None
        if rng.integers(100) == 0:
            guest_vm.zap()
    for process, tables in zip(processes, known, strict=True):
        process.switch()
        for gva, gfn in tables.items():
            assert process.translate(gva) == tdpmmu.GuestMapping(gva, gfn, "4K", True)
            through = guest_vm.fault(gva, write=True)
            assert through.pfn is not None
    assert guest_vm.verify() == ()
    frames: dict[int, int] = {}
    guest.boot.switch()
    for gfn in {gfn for tables in known for gfn in tables.values()}:
        pfn = guest_vm.fault(gfn).pfn
        assert pfn is not None
        frames[gfn] = pfn
    for process, tables in zip(processes, known, strict=True):
        process.switch()
        for gva, gfn in tables.items():
            assert guest_vm.fault(gva).pfn == frames[gfn]
    clean(guest_vm)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda guest: guest.boot.map(-1, 0), "gva=-0x1"),
        (lambda guest: guest.boot.map(0, 1 << 36), "gfn=0x1000000000"),
        (lambda guest: guest.boot.map(1, 0, page="2M"), "a multiple of 0x200"),
        (lambda guest: guest.boot.map(0, 0, vcpu=2), "vcpu=2"),
        (lambda guest: guest.boot.map(0, 0, page="8K"), "4K, 2M, 1G"),
        (lambda guest: guest.invalidate(1 << 40), "gva="),
        (lambda guest: guest.boot.map(True, 0), "gva=True"),
    ],
)
def test_a_bad_page_number_is_told_by_value_and_rule(guest_vm: VM, call: Any, named: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=named):
        call(guest_vm.guest)
    clean(guest_vm)


def test_a_closed_vm_has_no_guest_that_does_anything(guest_vm: VM) -> None:
    guest = guest_vm.guest
    boot = guest.boot
    guest_vm.close()
    for call in (guest.process, lambda: boot.map(0, 0), boot.switch, lambda: guest.boot):
        with pytest.raises(tdpmmu.Closed):
            call()


# -- benches


@pytest.fixture(scope="module")
def zapped() -> tdpmmu.BenchResult:
    return bench.zap(memory="16M", seed=1, working_set="1M", design=["shadow", "sync"])


def test_bench_zap_runs_designs_of_both_mmus(zapped: tdpmmu.BenchResult) -> None:
    assert [run.design for run in zapped.runs] == [*DESIGNS, "sync"]
    for run in zapped.runs:
        assert run.sptes == 4096
        assert run.violations == 0
        assert run.table_pages_leaked == 0
        if run.design == "sync":
            assert run.shadow is None
            continue
        assert (run.passes, run.ownership) == ("-", "-")
        assert run.raw["lock_mode"] == "exclusive"
        assert run.shadow is not None
        assert (run.shadow.paging, run.shadow.reclaim) == ("direct", "ipi")
        assert run.shadow.pages_at_t0 is not None
        assert run.shadow.pages_at_t0 >= run.table_pages - 1
        times = [at for at, _ in run.shadow.retained]
        assert times == sorted(times)


def test_only_kept_pages_are_there_when_it_is_over(zapped: tdpmmu.BenchResult) -> None:
    left = {run.design: run.shadow.retained_at_end for run in zapped.runs if run.shadow}
    assert left["shadow-gen-kept"]
    for design in AT_ONCE:
        assert left[design] == 0, left


def test_its_table_has_the_first_hold_and_fits(zapped: tdpmmu.BenchResult) -> None:
    text = table.render_bench(zapped)
    assert max(map(len, text.splitlines())) <= table.WIDTH
    for heading in ("first", "visible to", "pages kept"):
        assert heading in text
    again = tdpmmu.load(zapped.to_json())
    assert table.render_bench(again) == text  # type: ignore[arg-type]


def test_a_run_for_each_kind_of_reclamation_is_told_apart() -> None:
    result = bench.zap(memory="16M", seed=1, design="shadow-gen", reclaim=["ipi", "rcu"], check=False)
    assert [run.shadow.reclaim for run in result.runs if run.shadow] == ["ipi", "rcu"]
    text = table.render_bench(result)
    assert "reclaim" in text
    found = tdpmmu.compare(result, result)
    assert {row.key["shadow.reclaim"] for row in found.rows} == {"ipi", "rcu"}


def test_guest_paging_is_measured_too() -> None:
    run = bench.zap(memory="16M", seed=1, design="shadow-gen", paging="guest", check=False).runs[0]
    assert run.shadow is not None
    assert run.shadow.paging == "guest"
    assert run.sptes >= 4096


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"design": "sync", "paging": "guest"}, "of the shadow MMU only"),
        ({"quota": 64}, "of the shadow MMU only"),
        ({"design": "shadow-gen", "quota": 63}, "quota=63"),
        ({"design": "shadow-gen", "paging": "gust"}, "did you mean 'guest'"),
        ({"design": "shadow-gen", "passes": "root"}, "passes"),
        ({"design": "shadow-gen", "ownership": "mmu"}, "ownership"),
        ({"reclaim": "ipi"}, "of the shadow MMU only"),
    ],
)
def test_options_of_the_other_mmu_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match=named):
        bench.zap(memory="16M", **options)


def test_a_process_with_work_pending_is_none_of_the_shadow_mmus() -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="process-exit"):
        bench.drop(memory="16M", scene="process-exit", design="shadow-gen")


def test_what_keeps_pages_for_walkers_has_a_row_a_kind() -> None:
    kinds = ("ipi", "epoch")  # one where the freer waits, one where pages do; all of them take half a minute
    result = bench.walk(memory="16M", reclaim=kinds, seed=1)
    assert list(dict.fromkeys(row.raw["reclaim"] for row in result.rows)) == list(kinds)
    by = {(row.raw["reclaim"], row.raw["what"]): row for row in result.rows}
    for kind in kinds:
        assert by[kind, "walk"].ns
        assert by[kind, "walk"].of == "ipi"
        waiting = by[kind, "stalled-waiting"].raw["pages"]
        assert (waiting == 0) == (kind == "ipi"), (kind, waiting)
    text = reclaim_table.render(result)
    assert max(map(len, text.splitlines())) <= table.WIDTH


def test_reclaim_is_an_option_by_name(cli: Cli) -> None:
    assert cli("bench", "walk", "--reclaim", "ipc").code == 2
    said = cli("bench", "walk", "--help").out
    for kind in KINDS:
        assert f"  {kind} " in said
    told = cli("info").out
    for name in (*DESIGNS, *KINDS):
        assert f"  {name}" in told
    facts = json.loads(cli("info", "--json").out)
    assert [kind["name"] for kind in facts["reclaim"]] == list(KINDS)
    assert [info["name"] for info in facts["designs"] if info["mmu"] == "shadow"] == list(DESIGNS)


def test_a_reclaim_table_holds_the_kinds_against_ipi() -> None:
    result = tdpmmu.load(json.dumps(documents.reclaim()))
    text = reclaim_table.render(result)  # type: ignore[arg-type]
    counter = next(line for line in text.splitlines() if line.startswith("counter"))
    assert counter.split()[:6] == ["counter", "61.0", "ns", "159", "ns", "2.60"]
    assert "Over kind ipi of the same run" in text
    alone = tdpmmu.load(json.dumps(documents.reclaim(("rcu",))))
    assert "Over kind" not in reclaim_table.render(alone)  # type: ignore[arg-type]
