//! Memslot updates: generations of the address spaces, their wrap, logs of new and moving slots, deletion without a fast zap.

#[path = "common/small.rs"]
mod common;

use common::{assert_clean, flags, leaf, slot, small};
use tdpmmu_platform::Role as TaskRole;
use tdpmmu_vm::{AccessOutcome, GuestAccess, Region, SlotUpdate, VmError};

/// Where the 19 bits that MMIO entries keep come round.
const WRAP: u64 = 1 << 19;

#[test]
fn each_address_space_counts_its_own_publications_in_steps_of_two() {
    let (vm, _) = small("6.12", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    let generations = || vm.slots().generations;
    assert_eq!(generations(), [0, 1]);
    let low = slot(&vm, &task, 0, 0, 512, 1);
    assert_eq!(generations(), [2, 1], "create is one");
    vm.set_memslot(&task, &Region { as_id: 1, ..low }).expect("the other space");
    assert_eq!(generations(), [2, 3]);
    assert_eq!(vm.set_memslot(&task, &low), Ok(SlotUpdate::Nothing));
    assert_eq!(generations(), [2, 3], "identical parameters are none");
    vm.set_memslot(&task, &Region { flags: flags(true, false), ..low }).expect("flags");
    assert_eq!(generations(), [4, 3], "flags are one");
    vm.set_memslot(&task, &Region { base: 0x1000, ..low }).expect("moves");
    assert_eq!(generations(), [8, 3], "a move is two");
    vm.delete_memslot(&task, 1, 0).expect("there");
    assert_eq!(generations(), [8, 7], "and so is a deletion");
    assert_clean(&vm);
}

#[test]
fn an_mmio_entry_carries_its_spaces_generation_and_is_refused_after_the_next_publication_there_alone() {
    let (vm, _) = small("6.12", |config| config.vcpus = 2);
    let task = vm.task("vmm", TaskRole::Caller);
    let low = slot(&vm, &task, 0, 0, 512, 1);
    let (mut a, mut b) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
    b.enter_smm();
    let mmio = |vcpu: &mut tdpmmu_vm::Vcpu<'_, _>| {
        assert_eq!(vcpu.access(GuestAccess::read(0x5000)), Ok(AccessOutcome::Emulate));
        vcpu.leave();
        let root = vcpu.current_root().expect("loaded");
        vm.mmu().walk_lockless(vcpu.task(), root, 0x5000).last()
    };
    let (in_a, in_b) = (mmio(&mut a), mmio(&mut b));
    let format = vm.mmu().format();
    assert_eq!((format.mmio_generation(in_a), format.mmio_generation(in_b)), (2, 1));
    vm.set_memslot(&task, &Region { flags: flags(true, false), ..low }).expect("flags");
    assert!(!a.mmio_is_current(in_a) && b.mmio_is_current(in_b));
    assert_eq!(format.mmio_generation(mmio(&mut a)), 4, "replaced by the next fault");
    drop((a, b));
    assert_clean(&vm);
}

#[test]
fn a_generation_that_wraps_zaps_everything_before_it_counts() {
    for kernel in ["6.1", "6.12", "7.2"] {
        // The third publication of space 0 wraps: an INVALID one, whose deletion zaps a second time.
        let (vm, _) = small(kernel, |config| config.memslot_generation = WRAP - 6);
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 512, 1);
        slot(&vm, &task, 1, 0x1000, 512, 1);
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.fault(GuestAccess::write(3), false).expect("memory");
        let before = vcpu.current_root().expect("loaded");
        let zaps = |vcpu: &mut tdpmmu_vm::Vcpu<'_, _>| {
            assert_eq!(vcpu.reload(), Ok(true));
            vcpu.current_root().expect("loaded")
        };
        assert_eq!(vm.slots().generations, [WRAP - 2, WRAP - 5]);
        assert_eq!(zaps(&mut vcpu), before, "{kernel}: not yet");
        vm.delete_memslot(&task, 0, 1).expect("there");
        assert_eq!(vm.slots().generations, [WRAP + 2, WRAP - 5]);
        let after = zaps(&mut vcpu);
        vcpu.fault(GuestAccess::write(3), false).expect("memory");
        // Creation and flags zap nothing otherwise.
        slot(&vm, &task, 1, 0x1000, 512, 1);
        assert_eq!(zaps(&mut vcpu), after, "{kernel}");
        drop(vcpu);
        assert_clean(&vm);

        // The wrap alone: the creation of a slot.
        let (vm, _) = small(kernel, |config| config.memslot_generation = WRAP - 4);
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 512, 1);
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.fault(GuestAccess::write(3), false).expect("memory");
        slot(&vm, &task, 1, 0x1000, 512, 1);
        assert_eq!(vm.stats().pages_4k, 0, "{kernel}: all is gone, entries of generation 0 with it");
        // And the other space wraps by itself, on an odd number.
        assert_eq!(vcpu.reload(), Ok(true));
        vcpu.fault(GuestAccess::write(3), false).expect("memory");
        let smm = Region { as_id: 1, flags: flags(false, false), ..region_of(&vm, 1) };
        vm.set_memslot(&task, &smm).expect("free");
        assert_eq!((vm.slots().generations[1], vm.stats().pages_4k), (WRAP - 1, 1), "{kernel}");
        vm.delete_memslot(&task, 1, 1).expect("there");
        assert_eq!(vm.slots().generations[1], WRAP + 3);
        drop(vcpu);
        assert_clean(&vm);
    }
    let odd = small_error(|config| config.memslot_generation = 3);
    assert!(matches!(odd, VmError::Config { what: "memslot_generation", .. }), "{odd}");
}

fn region_of(vm: &tdpmmu_vm::Vm<tdpmmu_platform::Real>, id: u16) -> Region {
    let set = vm.slots();
    let slot = set.by_id(0, id).expect("there");
    Region { id, as_id: 0, base: slot.base, pages: slot.pages, hva: slot.hva, flags: slot.flags }
}

fn small_error(edit: impl FnOnce(&mut tdpmmu_vm::VmConfig)) -> VmError {
    let mut config = tdpmmu_vm::VmConfig::new(tdpmmu_spte::KernelProfile::default());
    edit(&mut config);
    tdpmmu_vm::Vm::<tdpmmu_platform::Real>::new(config).err().expect("refused")
}

#[test]
fn the_flag_at_creation_changes_no_spte_and_the_log_begins_clean_or_all_set() {
    for all_set in [false, true] {
        let (vm, heard) = small("6.12", |_| {});
        let task = vm.task("vmm", TaskRole::Caller);
        vm.enable_dirty_log_protect(&task, true, all_set).expect("both or manual alone");
        let hva = vm.side().primary.region(100, 0, 1, true).expect("room");
        let region = Region { id: 0, as_id: 0, base: 0, pages: 100, hva, flags: flags(true, false) };
        assert_eq!(vm.set_memslot(&task, &region), Ok(SlotUpdate::Created));
        assert_eq!((heard.take(), vm.stats().remote_tlb_flush_requests), (vec![], 0));
        let log = vm.get_dirty_log(&task, 0, 0).expect("logs");
        assert_eq!(log.count(), if all_set { 100 } else { 0 });
        assert_eq!(log.gfns().count() as u64, log.count(), "none beyond the slot");
        assert_clean(&vm);
    }
    let (vm, _) = small("6.12", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    let error = vm.enable_dirty_log_protect(&task, false, true).expect_err("EINVAL");
    assert!(matches!(error, VmError::Config { what: "initially_set", .. }), "{error}");
}

#[test]
fn a_slot_that_moves_takes_its_log_along() {
    let (vm, _) = small("6.12", |_| {});
    let task = vm.task("vmm", TaskRole::Caller);
    let plain = slot(&vm, &task, 0, 0, 512, 1);
    let logs = Region { flags: flags(true, false), ..plain };
    vm.set_memslot(&task, &logs).expect("flags");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.fault(GuestAccess::write(7), false).expect("memory");
    assert!(matches!(vm.set_memslot(&task, &Region { base: 0x4000, ..logs }), Ok(SlotUpdate::Moved(_))));
    assert_eq!(vcpu.reload(), Ok(true));
    vcpu.fault(GuestAccess::write(0x4009), false).expect("memory");
    assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![0x4007, 0x4009]));
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn without_the_quirk_only_the_slots_leaves_go_and_the_root_stays() {
    for kernel in ["6.12", "7.2"] {
        let (vm, heard) = small(kernel, |config| config.vcpus = 2);
        let task = vm.task("vmm", TaskRole::Caller);
        slot(&vm, &task, 0, 0, 512, 1);
        let second = slot(&vm, &task, 1, 0x1000, 512, 1);
        vm.share_memory_with_smm(&task).expect("free");
        let (mut a, mut b) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
        b.enter_smm();
        for gfn in [3, 0x1003] {
            a.fault(GuestAccess::write(gfn), false).expect("memory");
            b.fault(GuestAccess::write(gfn), false).expect("memory");
        }
        let root = a.current_root();
        vm.set_slot_zap_all(false).expect("the kernel has the quirk");
        heard.take();
        assert!(matches!(
            vm.set_memslot(&task, &Region { base: 0x2000, ..second }),
            Ok(SlotUpdate::Moved(_))
        ));
        let events = heard.take();
        assert_eq!(events.len(), 1, "{kernel}: {events:x?}");
        assert_eq!((events[0].0, events[0].1), (0x1003, 1));
        assert!(leaf(&b, 0x1003).is_some(), "{kernel}: the other space has its own slot");
        vm.delete_memslot(&task, 1, 1).expect("there");
        assert!(leaf(&b, 0x1003).is_none() && leaf(&b, 3).is_some() && leaf(&a, 3).is_some());
        assert_eq!(a.reload(), Ok(true));
        assert_eq!(a.current_root(), root, "{kernel}: it was never invalidated");
        vm.set_slot_zap_all(true).expect("the kernel has the quirk");
        vm.delete_memslot(&task, 0, 1).expect("there");
        assert_eq!(vm.stats().pages_4k, 0, "{kernel}");
        drop((a, b));
        assert_clean(&vm);
    }
    let (vm, _) = small("6.1", |_| {});
    let error = vm.set_slot_zap_all(false).expect_err("6.12 is the first");
    assert!(matches!(error, VmError::Unsupported { kernel: "6.1", .. }), "{error}");
}
