//! An L1 on the TDP MMU that runs an L2 on shadow pages of the tables it keeps for it.

use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread;

use tdpmmu_platform::{Real, Role};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{AccessOutcome, GuestAccess, GuestOs, ShadowSpec, Vcpu, Vm, VmConfig, VmError};

/// Where L1 keeps its tables: in the memory that it has, mapped huge by the TDP MMU until one of them is shadowed.
const TABLES: std::ops::Range<u64> = 0x800..0xc00;
const PAGES: u64 = 4096;

fn machine(edit: impl FnOnce(&mut VmConfig)) -> (Vm<Real>, GuestOs<Real>) {
    let mut config = VmConfig {
        design: Some("sync".into()),
        shadow: ShadowSpec { nested: true, ..ShadowSpec::default() },
        vcpus: 2,
        max_tables: 4000,
        hugepages: false,
        quarantine: true,
        host_pages: 1 << 21,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    };
    edit(&mut config);
    let vm = Vm::<Real>::new(config).expect("a small VM");
    let task = vm.task("setup", Role::Caller);
    vm.add_memory(&task, 0, PAGES, 2).expect("room");
    (vm, GuestOs::new(0, TABLES))
}

fn assert_clean(vm: &Vm<Real>) {
    assert_eq!(vm.shadow().expect("nested").violations(), Vec::<String>::new());
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
}

/// The frame that L2 reaches at its page.
fn frame(vcpu: &mut Vcpu<'_, Real>, page: u64) -> u64 {
    vcpu.access(GuestAccess::read(page)).expect("mapped");
    let (spte, level) = vcpu.lookup(page).expect("a leaf");
    let within = (1 << (9 * (level - 1))) - 1;
    spte.pfn() & !within | page & within
}

fn host_frame(vm: &Vm<Real>, gfn: u64) -> u64 {
    let set = vm.slots();
    let slot = set.find(0, gfn).expect("memory");
    vm.side().primary.lookup(slot.hva_of(gfn)).expect("backed").pfn
}

#[test]
fn an_l2_reaches_what_its_l1_maps_for_it_and_not_longer() {
    let (vm, os) = machine(|_| ());
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in (0..PAGES).step_by(64) {
        vcpu.access(GuestAccess::write(gfn)).expect("memory");
    }
    assert_eq!(vcpu.lookup(TABLES.start).map(|(_, level)| level), Some(2), "the TDP MMU maps L1 huge");
    let ncr3 = os.new_process(&vm).expect("a table");
    for n in 0..40 {
        os.map(&mut vcpu, ncr3, 7000 + n, n, 1, true).expect("L1 maps");
    }
    let levels = vm.guest_levels();
    for round in 0..4 {
        vcpu.enter_l2(ncr3, levels).expect("nested");
        assert!(vcpu.in_l2());
        for n in 0..40 {
            vcpu.access(GuestAccess::write(7000 + n)).expect("mapped");
            let expected = if n == 3 && round > 0 { 500 + round - 1 } else { n };
            assert_eq!(frame(&mut vcpu, 7000 + n), host_frame(&vm, expected), "round {round}");
        }
        assert!(matches!(vcpu.access(GuestAccess::read(6999)), Err(VmError::GuestFault { .. })));
        vcpu.leave_l2();
        // L1 stores to a table that is shadowed: emulated, as the TDP MMU has it write-protected.
        let walk = os.translate(&vm, ncr3, 7003).expect("mapped");
        let before = vcpu.stats().tracked_writes;
        os.map(&mut vcpu, ncr3, 7003, 500 + round, 1, true).expect("L1 maps");
        assert!(vcpu.stats().tracked_writes > before, "table {:#x}", walk.tables[1]);
        let (spte, _) = vcpu.lookup(walk.tables[1]).expect("mapped since the boot");
        assert!(!vm.mmu().format().is_writable(spte));
        // Its neighbours are L1's own: mapped small, as the huge page over them may not be written.
        assert!(
            vcpu.access(GuestAccess::write(TABLES.start + 300)).expect("memory") < AccessOutcome::Emulate
        );
        assert_eq!(vcpu.lookup(TABLES.start + 300).map(|(_, level)| level), Some(1));
    }
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn a_table_that_is_shadowed_no_more_is_written_by_l1_itself_again() {
    let (vm, os) = machine(|_| ());
    let mut vcpu = vm.vcpu(0).expect("free");
    let ncr3 = os.new_process(&vm).expect("a table");
    os.map(&mut vcpu, ncr3, 7000, 1, 1, true).expect("L1 maps");
    vcpu.enter_l2(ncr3, vm.guest_levels()).expect("nested");
    vcpu.access(GuestAccess::read(7000)).expect("mapped");
    vcpu.leave_l2();
    assert_eq!(vcpu.write_guest(ncr3, 300, 0), Ok(AccessOutcome::Emulate));
    vcpu.leave();
    vm.fast_zap(&vm.task("owner", Role::Caller)).expect("open");
    // The old root is gone with the reload.
    vcpu.access(GuestAccess::read(1)).expect("memory");
    assert!(vcpu.write_guest(ncr3, 300, 0).expect("memory") < AccessOutcome::Emulate);
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn both_mmus_lose_what_the_host_and_the_slots_take() {
    for quirk in [true, false] {
        let (vm, os) = machine(|_| ());
        vm.set_slot_zap_all(quirk).expect("6.12 has the quirk");
        let task = vm.task("owner", Role::Caller);
        let ids = vm.add_memory(&task, 0x4000, 512, 1).expect("room");
        let mut vcpu = vm.vcpu(0).expect("free");
        let ncr3 = os.new_process(&vm).expect("a table");
        os.map(&mut vcpu, ncr3, 7000, 5, 1, true).expect("L1 maps");
        os.map(&mut vcpu, ncr3, 7001, 0x4001, 1, true).expect("L1 maps");
        vcpu.access(GuestAccess::write(5)).expect("memory");
        vcpu.enter_l2(ncr3, vm.guest_levels()).expect("nested");
        let before = frame(&mut vcpu, 7000);
        vcpu.access(GuestAccess::write(7001)).expect("mapped");
        vcpu.leave();
        // What the host maps huge is given out as 512 small pieces again.
        assert_eq!(vm.unmap_gfns(&task, 5..6, true), Ok(1));
        assert_eq!(vcpu.lookup(7000), None);
        assert_ne!(frame(&mut vcpu, 7000), before);
        vcpu.leave();
        vm.delete_memslot(&task, 0, ids[0]).expect("there");
        assert_eq!(vcpu.access(GuestAccess::read(7001)), Ok(AccessOutcome::Emulate), "nothing is there");
        vcpu.leave_l2();
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_slot_with_nested_tables_in_it_may_go() {
    for quirk in [true, false] {
        let (vm, _) = machine(|_| ());
        vm.set_slot_zap_all(quirk).expect("6.12 has the quirk");
        let task = vm.task("owner", Role::Caller);
        let ids = vm.add_memory(&task, 0x4000, 512, 1).expect("room");
        let os = GuestOs::<Real>::new(0, 0x4000..0x4200);
        let ncr3 = os.new_process(&vm).expect("a table");
        os.build_linear(&vm, ncr3, 0..256, 0, 1).expect("tables");
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.enter_l2(ncr3, vm.guest_levels()).expect("nested");
        for page in 0..256 {
            vcpu.access(GuestAccess::write(page)).expect("mapped");
        }
        vcpu.leave();
        vm.delete_memslot(&task, 0, ids[0]).expect("there");
        assert_eq!(vm.shadow().expect("nested").violations(), Vec::<String>::new());
        assert!(vcpu.access(GuestAccess::read(300)).is_err(), "its tables are gone");
        vcpu.leave_l2();
        vcpu.access(GuestAccess::write(1)).expect("L1 runs on");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_quota_of_few_pages_serves_a_large_l2() {
    let (vm, os) = machine(|config| config.shadow.quota = Some(12));
    let ncr3 = os.new_process(&vm).expect("a table");
    // Each page of L2's behind a table of its own.
    let mut vcpu = vm.vcpu(0).expect("free");
    for n in 0..60 {
        os.map(&mut vcpu, ncr3, n << 9, n, 1, true).expect("L1 maps");
    }
    vcpu.enter_l2(ncr3, vm.guest_levels()).expect("nested");
    for _ in 0..3 {
        for n in 0..60 {
            vcpu.access(GuestAccess::write(n << 9)).expect("mapped");
        }
    }
    let counts = vm.shadow().expect("nested").counts();
    assert!(counts.pages <= 12 && counts.reclaimed > 100, "{counts:?}");
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn l1_and_l2_run_beside_zaps_and_host_unmaps() {
    for quota in [None, Some(24)] {
        let (vm, os) = machine(|config| config.shadow.quota = quota);
        let ncr3 = os.new_process(&vm).expect("a table");
        os.build_linear(&vm, ncr3, 0..1024, 0, 1).expect("tables");
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let (vm, os, stop) = (&vm, &os, &stop);
            scope.spawn(move || {
                let mut vcpu = vm.vcpu(0).expect("free");
                let mut n = 0u64;
                while !stop.load(Relaxed) {
                    vcpu.enter_l2(ncr3, vm.guest_levels()).expect("nested");
                    for _ in 0..50 {
                        n = n.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                        vcpu.access(GuestAccess::write(n >> 33 & 1023)).expect("mapped");
                    }
                    vcpu.leave_l2();
                    vcpu.access(GuestAccess::write(n >> 40 & 1023)).expect("memory");
                }
            });
            scope.spawn(move || {
                let mut vcpu = vm.vcpu(1).expect("free");
                let mut n = 0;
                while !stop.load(Relaxed) {
                    n += 1;
                    os.map(&mut vcpu, ncr3, 2048 + n % 512, n % 1024, 1, true).expect("L1 maps");
                    vcpu.access(GuestAccess::write(n % 1024)).expect("memory");
                }
            });
            let task = vm.task("owner", Role::Caller);
            for n in 0..100 {
                vm.unmap_gfns(&task, n * 7..n * 7 + 9, true).expect("open");
                if n % 4 == 0 {
                    vm.fast_zap(&task).expect("open");
                }
                thread::yield_now();
            }
            stop.store(true, Relaxed);
        });
        assert_clean(&vm);
    }
}

#[test]
fn only_a_vm_with_nested_has_an_l2() {
    let (vm, _) = machine(|config| config.shadow.nested = false);
    let mut vcpu = vm.vcpu(0).expect("free");
    assert!(matches!(vcpu.enter_l2(5, 4), Err(VmError::NeedsShadow { .. })));
    assert!(matches!(vcpu.set_cr3(5), Err(VmError::NeedsShadow { .. })));
    assert!(vm.shadow().is_none() && vcpu.walk_shadow(0).is_none());
    vcpu.leave_l2();
    vcpu.access(GuestAccess::write(1)).expect("memory");
    drop(vcpu);
    assert!(vm.close().expect("no handle is left").is_clean());
}
