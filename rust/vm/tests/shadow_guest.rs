//! A guest whose own tables are shadowed: it maps, unmaps, flushes, switches between processes, and loses the memory its tables are in.

use tdpmmu_platform::{Real, Role};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{
    AccessOutcome, GuestAccess, GuestOs, Paging, Region, ShadowSpec, SlotFlags, Vcpu, Vm, VmConfig, VmError,
};

const TABLES: std::ops::Range<u64> = 0x10_0000..0x10_0400;
const PAGES: u64 = 4096;

fn machine(levels: u8, edit: impl FnOnce(&mut VmConfig)) -> (Vm<Real>, GuestOs<Real>) {
    let mut config = VmConfig {
        design: Some("shadow-gen".into()),
        shadow: ShadowSpec { paging: Paging::Guest, ..ShadowSpec::default() },
        root_level: levels,
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
    vm.add_memory(&task, TABLES.start, TABLES.end - TABLES.start, 1).expect("room");
    (vm, GuestOs::new(0, TABLES))
}

fn assert_clean(vm: &Vm<Real>) {
    assert_eq!(vm.shadow().expect("shadow pages").violations(), Vec::<String>::new());
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
}

/// The frame that the vCPU reaches at `gva` now.
fn frame(vcpu: &mut Vcpu<'_, Real>, gva: u64) -> u64 {
    vcpu.access(GuestAccess::read(gva)).expect("mapped");
    vcpu.lookup(gva)
        .map(|(spte, level)| {
            let within = (1 << (9 * (level - 1))) - 1;
            spte.pfn() & !within | gva & within
        })
        .expect("a leaf")
}

fn host_frame(vm: &Vm<Real>, gfn: u64) -> u64 {
    let set = vm.slots();
    let slot = set.find(0, gfn).expect("memory");
    vm.side().primary.lookup(slot.hva_of(gfn)).expect("backed").pfn
}

#[test]
fn a_mapping_is_followed_from_its_first_use_to_the_flush_after_it_changed() {
    for levels in [4, 5] {
        let (vm, os) = machine(levels, |_| ());
        let cr3 = os.new_process(&vm).expect("tables");
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.set_cr3(cr3).expect("shadowed");
        for (gva, gfn) in [(5, 77), (0x3_0000_0005, 78), (6, 79)] {
            os.map(&mut vcpu, cr3, gva, gfn, 1, true).expect("the guest maps");
            assert_eq!(frame(&mut vcpu, gva), host_frame(&vm, gfn));
        }
        // Another page behind an address in use: seen at the latest after INVLPG.
        os.map(&mut vcpu, cr3, 5, 100, 1, true).expect("the guest maps");
        vcpu.invlpg(5);
        assert_eq!(frame(&mut vcpu, 5), host_frame(&vm, 100));
        // And by a flush of everything.
        os.map(&mut vcpu, cr3, 5, 101, 1, true).expect("the guest maps");
        os.map(&mut vcpu, cr3, 6, 102, 1, true).expect("the guest maps");
        vcpu.flush_guest_tlb();
        assert_eq!(frame(&mut vcpu, 5), host_frame(&vm, 101));
        assert_eq!(frame(&mut vcpu, 6), host_frame(&vm, 102));
        assert!(os.unmap(&mut vcpu, cr3, 5).expect("the guest unmaps"));
        vcpu.invlpg(5);
        assert!(matches!(vcpu.access(GuestAccess::read(5)), Err(VmError::GuestFault { .. })));
        assert!(!os.unmap(&mut vcpu, cr3, 5).expect("nothing there"));
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_page_that_turns_read_only_is_not_written_after_the_flush() {
    let (vm, os) = machine(4, |_| ());
    let cr3 = os.new_process(&vm).expect("tables");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_cr3(cr3).expect("shadowed");
    os.map(&mut vcpu, cr3, 9, 200, 1, true).expect("the guest maps");
    vcpu.access(GuestAccess::write(9)).expect("writable");
    os.map(&mut vcpu, cr3, 9, 200, 1, false).expect("the guest maps");
    vcpu.invlpg(9);
    vcpu.access(GuestAccess::read(9)).expect("readable");
    assert!(matches!(vcpu.access(GuestAccess::write(9)), Err(VmError::GuestFault { .. })));
    os.map(&mut vcpu, cr3, 9, 200, 1, true).expect("the guest maps");
    vcpu.invlpg(9);
    vcpu.access(GuestAccess::write(9)).expect("writable again");
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn processes_keep_their_mappings_apart_across_switches_of_cr3() {
    let (vm, os) = machine(4, |_| ());
    let mut vcpu = vm.vcpu(0).expect("free");
    let processes: Vec<u64> = (0..6).map(|_| os.new_process(&vm).expect("tables")).collect();
    for (n, &cr3) in processes.iter().enumerate() {
        vcpu.set_cr3(cr3).expect("shadowed");
        os.map(&mut vcpu, cr3, 1, 300 + n as u64, 1, true).expect("the guest maps");
    }
    for round in 0..3 {
        for (n, &cr3) in processes.iter().enumerate() {
            vcpu.set_cr3(cr3).expect("shadowed");
            assert_eq!(vcpu.cr3(), Some(cr3));
            assert_eq!(frame(&mut vcpu, 1), host_frame(&vm, 300 + n as u64), "round {round}");
        }
        // While another process runs, the first one's page moves: its root comes back in step.
        let cr3 = processes[0];
        os.map(&mut vcpu, cr3, 1, 400 + round, 1, true).expect("the guest maps");
        vcpu.set_cr3(cr3).expect("shadowed");
        assert_eq!(frame(&mut vcpu, 1), host_frame(&vm, 400 + round));
        os.map(&mut vcpu, cr3, 1, 300, 1, true).expect("the guest maps");
        vcpu.invlpg(1);
    }
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn what_one_vcpu_maps_the_other_sees_and_what_it_unmaps_after_its_own_flush() {
    let (vm, os) = machine(4, |_| ());
    let cr3 = os.new_process(&vm).expect("tables");
    let (mut one, mut two) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
    one.set_cr3(cr3).expect("shadowed");
    two.set_cr3(cr3).expect("shadowed");
    for n in 0..200 {
        let gva = 0x1000 + n % 20;
        two.leave();
        os.map(&mut one, cr3, gva, n, 1, true).expect("the guest maps");
        one.invlpg(gva);
        one.leave();
        two.invlpg(gva);
        assert_eq!(frame(&mut two, gva), host_frame(&vm, n), "map {n}");
        two.leave();
        assert_eq!(frame(&mut one, gva), host_frame(&vm, n));
        one.leave();
        assert!(os.unmap(&mut two, cr3, gva).expect("the guest unmaps"));
        two.invlpg(gva);
        two.leave();
        one.invlpg(gva);
        assert!(matches!(one.access(GuestAccess::write(gva)), Err(VmError::GuestFault { .. })));
        one.leave();
    }
    drop((one, two));
    assert_clean(&vm);
}

#[test]
fn stores_to_tables_are_emulated_until_the_guest_is_let_write_them() {
    let (vm, os) = machine(4, |_| ());
    let cr3 = os.new_process(&vm).expect("tables");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_cr3(cr3).expect("shadowed");
    os.map(&mut vcpu, cr3, 0, 10, 1, true).expect("the guest maps");
    vcpu.access(GuestAccess::read(0)).expect("mapped: the table is shadowed now");
    // The top table is shadowed for as long as it is a root: it stays write-protected.
    let gva = os.table_gva(&vm, cr3);
    let before = vcpu.stats().tracked_writes;
    let old = vcpu.read_guest(gva, 17).expect("the direct map");
    assert_eq!(vcpu.write_guest(gva, 17, old).expect("the guest stores"), AccessOutcome::Emulate);
    assert_eq!(vcpu.stats().tracked_writes, before + 1);
    // A table of level 1 is let go out of step: the guest writes it by itself.
    let walk = os.translate(&vm, cr3, 0).expect("mapped");
    let leaf_table = os.table_gva(&vm, walk.tables[1]);
    vcpu.write_guest(leaf_table, 3, 0).expect("the guest stores");
    let outcome = vcpu.write_guest(leaf_table, 4, 0).expect("the guest stores");
    assert_ne!(outcome, AccessOutcome::Emulate);
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn huge_pages_of_the_guest_are_huge_where_slot_and_host_allow() {
    let (vm, os) = machine(4, |_| ());
    let cr3 = os.new_process(&vm).expect("tables");
    os.build_linear(&vm, cr3, 0..PAGES, 0, 2).expect("tables");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_cr3(cr3).expect("shadowed");
    vcpu.access(GuestAccess::write(513)).expect("mapped");
    assert_eq!(vcpu.lookup(513).map(|(_, level)| level), Some(2));
    // A 4 KiB page of the guest is one however large the host's is.
    os.map(&mut vcpu, cr3, 0x8000, 1024, 1, true).expect("the guest maps");
    vcpu.access(GuestAccess::write(0x8000)).expect("mapped");
    assert_eq!(vcpu.lookup(0x8000).map(|(_, level)| level), Some(1));
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn memory_that_the_host_takes_away_comes_back_with_another_frame_under_the_same_address() {
    let (vm, os) = machine(4, |_| ());
    let cr3 = os.new_process(&vm).expect("tables");
    let task = vm.task("host", Role::Caller);
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_cr3(cr3).expect("shadowed");
    os.map(&mut vcpu, cr3, 5, 77, 1, true).expect("the guest maps");
    let before = frame(&mut vcpu, 5);
    vcpu.leave();
    assert_eq!(vm.unmap_gfns(&task, 77..78, true), Ok(1));
    assert_eq!(vcpu.lookup(5), None, "found by the reverse map of the gfn");
    assert_ne!(frame(&mut vcpu, 5), before);
    // The tables' own pages, too.
    vcpu.leave();
    vm.unmap_gfns(&task, TABLES.start..TABLES.start + 64, true).expect("open");
    os.map(&mut vcpu, cr3, 5, 78, 1, true).expect("the guest maps");
    vcpu.invlpg(5);
    assert_eq!(frame(&mut vcpu, 5), host_frame(&vm, 78));
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn a_slot_may_go_with_the_tables_in_it() {
    for design in ["shadow-walk", "shadow-gen", "shadow-gen-kept", "shadow-slot"] {
        let (vm, os) = machine(4, |config| config.design = Some(design.into()));
        let cr3 = os.new_process(&vm).expect("tables");
        os.build_linear(&vm, cr3, 0..64, 0, 1).expect("tables");
        let task = vm.task("owner", Role::Caller);
        let tables = vm.slots().find(0, TABLES.start).map(|slot| (slot.id, slot.hva)).expect("there");
        for _ in 0..3 {
            let mut vcpu = vm.vcpu(0).expect("free");
            vcpu.set_cr3(cr3).expect("shadowed");
            for gva in 0..64 {
                vcpu.access(GuestAccess::write(gva)).expect("mapped");
            }
            drop(vcpu);
            vm.delete_memslot(&task, 0, tables.0).expect("there");
            let mut vcpu = vm.vcpu(0).expect("free");
            let lost = vcpu.access(GuestAccess::write(70));
            assert!(
                matches!(lost, Err(VmError::BadRange { .. } | VmError::GuestFault { .. })),
                "{design}: {lost:?}"
            );
            drop(vcpu);
            let region = Region {
                id: tables.0,
                as_id: 0,
                base: TABLES.start,
                pages: TABLES.end - TABLES.start,
                hva: tables.1,
                flags: SlotFlags::default(),
            };
            vm.set_memslot(&task, &region).expect("free");
        }
        assert_clean(&vm);
    }
}

#[test]
fn written_pages_are_logged_whoever_writes_them() {
    let (vm, os) = machine(4, |_| ());
    let cr3 = os.new_process(&vm).expect("tables");
    os.build_linear(&vm, cr3, 0..PAGES, 0, 2).expect("tables");
    let task = vm.task("owner", Role::Caller);
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_cr3(cr3).expect("shadowed");
    for gva in [0, 3, 600] {
        vcpu.access(GuestAccess::write(gva)).expect("mapped");
    }
    vcpu.leave();
    for id in [0, 1] {
        let slot = vm.slots().by_id(0, id).map(|slot| (slot.base, slot.pages, slot.hva)).expect("there");
        let flags = SlotFlags { log_dirty: true, ..SlotFlags::default() };
        let region = Region { id, as_id: 0, base: slot.0, pages: slot.1, hva: slot.2, flags };
        vm.set_memslot(&task, &region).expect("only flags");
    }
    assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![]));
    vcpu.access(GuestAccess::write(3)).expect("mapped");
    vcpu.access(GuestAccess::write(601)).expect("mapped");
    assert_eq!(vcpu.lookup(3).map(|(_, level)| level), Some(1), "a slot that logs is mapped small");
    vcpu.leave();
    assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![3, 601]));
    vcpu.access(GuestAccess::write(3)).expect("mapped");
    vcpu.leave();
    assert_eq!(vm.take_dirty_log(&task, 0, 0), Ok(vec![3]), "protected again by the harvest");
    // A store that is emulated.
    vm.take_dirty_log(&task, 0, 1).expect("logs");
    let gva = os.table_gva(&vm, cr3);
    assert_eq!(vcpu.write_guest(gva, 17, 0).expect("the guest stores"), AccessOutcome::Emulate);
    vcpu.leave();
    assert!(vm.take_dirty_log(&task, 0, 1).expect("logs").contains(&cr3));
    drop(vcpu);
    assert_clean(&vm);
}
