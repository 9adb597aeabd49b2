"""The operations of a VM beyond map and zap, one by one: what they take, return and refuse."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import tdpmmu
from tdpmmu import VM, FaultOutcome


@pytest.fixture
def vm() -> object:
    with VM(profile="6.12", page="2M", seed=1) as machine:
        machine.add_memslot(0x200, 1024)
        yield machine


def test_a_dirty_log_has_an_array_and_its_gfns(vm: VM) -> None:
    slot = vm.set_memslot_flags(vm.memslots()[0], dirty_log=True)
    assert slot.dirty_log
    vm.fault_batch([0x200, 0x3FF, 0x5FF], write=True)
    vm.fault(0x300)
    log = vm.get_dirty_log(slot)
    assert (log.slot, log.as_id, log.base_gfn, log.npages) == (0, 0, 0x200, 1024)
    assert log.dirty.dtype == np.bool_
    assert log.dirty.shape == (1024,)
    # The reader's page is dirty, too: it was mapped writable.
    assert log.gfns.tolist() == [0x200, 0x300, 0x3FF, 0x5FF]
    assert log.gfns.dtype == np.uint64
    assert log.count == 4
    assert vm.get_dirty_log(0).count == 0, "taken"


def test_manual_protection_takes_what_it_is_told(vm: VM) -> None:
    vm.enable_dirty_log_protect(manual=True, initially_set=True)
    slot = vm.set_memslot_flags(0, dirty_log=True)
    assert vm.get_dirty_log(slot).count == 1024
    assert vm.get_dirty_log(slot).count == 1024, "GET only reads"
    some = np.zeros(128, dtype=bool)
    some[[0, 5, 127]] = True
    assert vm.clear_dirty_log(slot, some, first_page=64) == 3
    left = np.flatnonzero(~vm.get_dirty_log(slot).dirty)
    assert left.tolist() == [64, 69, 191]
    assert vm.clear_dirty_log(slot) == 1021
    assert vm.clear_dirty_log(slot, npages=64) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"first_page": 5}, "multiple of 64"),
        ({"first_page": 1024, "npages": 64}, "inside the slot"),
        ({"npages": 70}, "multiple of 64"),
        ({"dirty": np.ones(4)}, "bool"),
        ({"dirty": np.ones((2, 2), dtype=bool)}, "one dimension"),
        ({"dirty": np.ones(64, dtype=bool), "npages": 128}, "one bool a page"),
    ],
)
def test_a_clear_that_kvm_refuses_names_the_rule(vm: VM, arguments: dict[str, object], said: str) -> None:
    vm.set_memslot_flags(0, dirty_log=True)
    with pytest.raises(tdpmmu.InvalidArgument, match=said):
        vm.clear_dirty_log(0, **arguments)  # type: ignore[arg-type]


def test_a_log_that_is_off_or_a_ring_instead_of_it_is_refused(vm: VM) -> None:
    with pytest.raises(tdpmmu.InvalidArgument, match="does not log"):
        vm.get_dirty_log(0)
    with pytest.raises(tdpmmu.InvalidArgument, match="collects dirty pages in"):
        vm.dirty_ring()
    with pytest.raises(tdpmmu.InvalidArgument, match="no memslot 7"):
        vm.get_dirty_log(7)
    with pytest.raises(tdpmmu.InvalidArgument, match="manual"):
        vm.enable_dirty_log_protect(manual=False, initially_set=True)


def test_a_ring_fills_is_harvested_and_reset() -> None:
    with VM(profile="6.12", dirty_ring=256, vcpus=2, seed=1) as vm:
        vm.add_memslot(0, 1024, dirty_log=True)
        for gfn in (5, 3, 9):
            vm.fault(gfn, write=True, vcpu=1)
        assert vm.dirty_ring(0).size == 0
        ring = vm.dirty_ring(1)
        assert ring.dtype == tdpmmu.RING_DTYPE
        assert ring["offset"].tolist() == [5, 3, 9]
        assert set(ring["slot"].tolist()) == set(ring["as_id"].tolist()) == {0}
        assert vm.dirty_ring(1).size == 0, "harvested"
        assert vm.reset_dirty_rings() == 3
        assert vm.fault(5, write=True, vcpu=1).outcome == FaultOutcome.FAST_FAULT, "protected again"
        with pytest.raises(tdpmmu.DirtyRingFull, match="vCPU 0"):
            vm.fault_batch(range(100, 400), write=True)
        assert vm.dirty_ring(0).size == 192
        with pytest.raises(tdpmmu.DirtyRingFull):
            vm.fault(0)
        vm.reset_dirty_rings()
        vm.fault(0)
    with pytest.raises(tdpmmu.InvalidArgument, match="power of two"):
        VM(dirty_ring=300)


def test_a_moved_memslot_is_elsewhere_and_costs_two_generations(vm: VM) -> None:
    vm.fault_batch(range(0x200, 0x300), write=True)
    before = vm.memslot_generation()
    report = vm.move_memslot(0, 0x10_0000)
    assert report.raw["update"] == "moved"
    assert report.sptes == 1, "one leaf of 2M"
    assert vm.memslots()[0].base_gfn == 0x10_0000
    assert vm.memslot_generation() == before + 4
    assert vm.lookup(0x200) is None
    assert vm.move_memslot(0, 0x10_0000).raw["update"] == "nothing"
    assert vm.memslot_generation() == before + 4
    with pytest.raises(tdpmmu.InvalidArgument, match="READONLY"):
        vm.set_memslot_flags(0, readonly=True)


def test_logging_splits_and_its_end_makes_huge_again() -> None:
    for profile, after in (("6.12", None), ("7.2", "2M")):
        with VM(profile=profile, page="2M", seed=1) as vm:
            vm.add_memslot(0, 512)
            assert vm.fault(7, write=True).page == "2M"
            vm.set_memslot_flags(0, dirty_log=True)
            assert vm.stats().pages_4k == 512
            vm.set_memslot_flags(0, dirty_log=False)
            found = vm.lookup(7)
            assert (found.page if found else None) == after, profile


def test_deletion_without_the_quirk_leaves_the_rest(vm: VM) -> None:
    vm.add_memslot(0x1000, 512)
    vm.fault(0x200), vm.fault(0x1000)
    vm.set_slot_zap_all(False)
    vm.delete_memslot(0)
    assert vm.lookup(0x200) is None
    assert vm.lookup(0x1000) is not None
    with VM(profile="6.1") as old, pytest.raises(tdpmmu.Unsupported, match=r"6\.1"):
        old.set_slot_zap_all(False)


def test_aging_tells_who_was_accessed(vm: VM) -> None:
    vm.fault_batch([0x200, 0x400])
    assert vm.test_age(range(0x200, 0x201))
    assert vm.age_batch([0x200, 0x400, 0x5FF]).tolist() == [True, True, False]
    assert not vm.age(range(0x200, 0x600))
    assert vm.age_batch([0x200], clear=False).dtype == np.bool_
    vm.fast_zap()
    vm.fault(0x200)
    assert vm.age(range(0x200, 0x600), flush=True)
    vm.fault(0x200)
    assert vm.age(range(0x200, 0x600)), "the flush made the vCPU walk again"
    assert vm.age_batch([]).size == 0


def test_change_pte_is_where_kernels_have_it() -> None:
    with VM(profile="6.1", seed=1) as vm:
        vm.add_memslot(0, 64)
        vm.fault(3, write=True)
        assert vm.change_pte(3, writable=False)
        found = vm.lookup(3)
        assert found is not None
        assert not found.spte & 2, "read-only"
        assert vm.change_pte(3, writable=True)
        assert vm.lookup(3) is None
        assert not vm.change_pte(4), "nothing is mapped there"
    with VM(profile="6.12") as vm, pytest.raises(tdpmmu.Unsupported, match="change_pte"):
        vm.change_pte(3)


def test_a_replaced_page_has_another_frame(vm: VM) -> None:
    first = vm.fault(0x210, write=True)
    frame = vm.replace_page(0x210, writable=False)
    assert vm.lookup(0x210) is None
    read = vm.fault(0x210)
    assert (read.pfn, read.page) == (frame, "4K")
    assert read.pfn != first.pfn
    copied = vm.fault(0x210, write=True)
    assert copied.pfn != frame, "the host copies the page for the write"
    assert vm.promote(range(0x200, 0x400)) == 512
    assert vm.fault(0x210).page == "2M"
    with pytest.raises(tdpmmu.InvalidArgument, match="2M or 1G"):
        vm.promote(range(0x200, 0x400), "4K")


def test_nx_splits_and_recovery(vm: VM) -> None:
    assert not vm.nx_huge_pages
    assert vm.set_nx_huge_pages(False) is None
    report = vm.set_nx_huge_pages(True)
    assert report is not None
    assert vm.nx_huge_pages
    assert vm.fault(0x200).page == "2M"
    assert vm.fault(0x210, exec=True).page == "4K"
    assert vm.stats().nx_lpage_splits == 1
    assert vm.recover_nx(0) == 0
    assert vm.recover_nx() == 1
    assert vm.stats().nx_lpage_splits == 0
    assert vm.fault(0x200).page == "2M"


def test_prefaulting_maps_without_accessed(vm: VM) -> None:
    assert vm.pre_fault(range(0x200, 0x401)) == 0
    assert vm.stats().pages_2m == 2
    assert not vm.test_age(range(0x200, 0x600))
    assert vm.stats().pf_taken == 0, "no fault of the guest's"
    assert vm.pre_fault(range(0x5FE, 0x602)) == 2, "the memslot ends before"
    with pytest.raises(tdpmmu.InvalidArgument, match="no memslot"):
        vm.pre_fault(range(0x700, 0x701))


def test_a_protected_gfn_is_written_by_a_slow_fault_only(vm: VM) -> None:
    vm.fault(0x200, write=True)
    assert vm.write_protect_gfn(0x210)
    assert not vm.write_protect_gfn(0x210), "it could not be written any more"
    assert vm.fault(0x210, write=True).outcome == FaultOutcome.SLOW_FAULT
    report = vm.zap_gfn_range(range(0x200, 0x201))
    assert report.sptes == 1
    assert vm.lookup(0x200) is None


def test_each_address_space_has_its_own_tree(vm: VM) -> None:
    assert [slot.as_id for slot in vm.share_memory_with_smm()] == [1]
    assert vm.share_memory_with_smm() == ()
    vm.fault(0x200)
    vm.set_smm(0, True)
    assert vm.in_smm()
    smm = vm.fault(0x200)
    assert vm.lookup(0x200, as_id=1) is not None
    assert vm.mappings(as_id=1)["gfn"].tolist() == [0x200]
    assert vm.lookup_batch([0x200], as_id=0)["pfn"].tolist() == [smm.pfn], "the same host memory"
    vm.unmap(range(0x200, 0x201))
    assert vm.lookup(0x200, as_id=1) is None, "the host takes it from both"
    vm.set_smm(0, False)
    assert not vm.in_smm()


def test_statistics_count_as_kvm_does(vm: VM) -> None:
    vm.fault(0x200, write=True)
    vm.set_memslot_flags(0, dirty_log=True)
    vm.fault(0x200, write=True)
    vm.fault(0x9000)
    stats = vm.stats()
    assert (stats.pf_taken, stats.pf_fixed, stats.pf_fast, stats.pf_emulate) == (3, 2, 1, 1)
    assert (stats.pf_spurious, stats.pf_mmio_spte_created, stats.pages_4k) == (0, 1, 1024 - 512)
    assert stats.remote_tlb_flush <= stats.remote_tlb_flush_requests


@pytest.mark.parametrize("profile", ["5.10", "6.1", "6.12", "7.2"])
@pytest.mark.parametrize("format", ["npt", "ept"])
@pytest.mark.parametrize("dirty_mode", ["write-protect", "d-bits"])
def test_no_write_is_missing_from_the_log_under_fire(profile: str, format: str, dirty_mode: str) -> None:
    options = {"format": format, "dirty_mode": dirty_mode, "page": "2M", "vcpus": 2, "seed": 1}
    with VM(profile=profile, **options) as vm:
        slot = vm.add_memslot(0, 1024)
        vm.fault_batch(range(1024), write=True)
        vm.set_memslot_flags(slot, dirty_log=True)
        written: list[int] = []
        stop = threading.Event()

        def guest() -> None:
            for gfn in np.random.default_rng(1).integers(0, 1024, 4000).tolist():
                if stop.is_set():
                    return
                vm.fault(gfn, write=True, vcpu=1)
                written.append(gfn)

        found: set[int] = set()
        thread = threading.Thread(target=guest)
        thread.start()
        try:
            while thread.is_alive():
                found |= set(vm.get_dirty_log(slot).gfns.tolist())
        finally:
            stop.set()
            thread.join()
        found |= set(vm.get_dirty_log(slot).gfns.tolist())
        assert set(written) <= found
        assert vm.verify() == ()


def test_a_configuration_with_the_new_fields_is_checked() -> None:
    made = tdpmmu.VMConfig.make(dirty_ring=512, dirty_mode="d-bits", memslot_generation=6, format="ept")
    assert (made.dirty_ring, made.eager_page_split, made.nx_huge_pages) == (512, True, False)
    for wrong in ({"dirty_mode": "pml"}, {"format": "amd"}, {"dirty_ring": 0}, {"memslot_generation": -1}):
        with pytest.raises(tdpmmu.InvalidArgument):
            tdpmmu.VMConfig.make(**wrong)  # type: ignore[arg-type]
    with pytest.raises(tdpmmu.InvalidArgument, match="even"):
        VM(memslot_generation=7)
