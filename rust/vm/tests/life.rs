//! One VM's life, single-threaded: memory, faults, fast zap, teardown, in every design.

use std::sync::atomic::Ordering;

use tdpmmu_mmu::DESIGNS;
use tdpmmu_platform::{Real, Role as TaskRole, Task};
use tdpmmu_spte::{EagerSplit, FormatKind, KernelProfile, Ownership};
use tdpmmu_vm::request;
use tdpmmu_vm::{
    AccessOutcome, AdMix, BulkOptions, FaultOutcome, GuestAccess, Progress, Region, SlotFlags, SlotUpdate,
    Vm, VmConfig, VmError,
};

/// Every design that is meant to be right.
fn sound() -> impl Iterator<Item = &'static str> {
    DESIGNS.iter().filter(|design| !design.flawed).map(|design| design.name)
}

const GIG: u64 = 512 * 512;

fn config(design: &str) -> VmConfig {
    VmConfig {
        design: Some(design.into()),
        vcpus: 2,
        max_tables: 40_000,
        hugepages: false,
        host_pages: 64 * GIG,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    }
}

fn vm(design: &str) -> (Vm<Real>, Task<Real>) {
    let vm = Vm::new(config(design)).expect("a small VM");
    let task = vm.task("test", TaskRole::Caller);
    (vm, task)
}

fn assert_clean(vm: &Vm<Real>) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_vm_faults_is_zapped_and_torn_down_in_every_design() {
    for design in sound() {
        let (vm, task) = vm(design);
        vm.add_memory(&task, 0, GIG, 1).expect("memory");
        {
            let mut vcpu = vm.vcpu(0).expect("free");
            for gfn in [0, 1, 511, 512, GIG - 1] {
                let outcome = vcpu.access(GuestAccess::write(gfn)).expect("memory is there");
                assert_eq!(outcome, AccessOutcome::SlowFault, "{design} {gfn:#x}");
                assert_eq!(vcpu.access(GuestAccess::write(gfn)).expect("mapped"), AccessOutcome::TlbHit);
            }
            assert_eq!(vm.mmu().leaf_pages(), [5, 0, 0]);
        }
        let times = vm.fast_zap(&task).expect("open");
        assert!(times.total_ns >= times.exclusive_hold_ns && times.kicked == 0, "{design} {times:?}");
        assert_eq!(vm.mmu().leaf_pages(), [0, 0, 0], "{design}");
        {
            let mut vcpu = vm.vcpu(0).expect("free");
            assert_eq!(
                vcpu.access(GuestAccess::write(0)).expect("refault"),
                AccessOutcome::SlowFault,
                "{design}"
            );
        }
        assert_clean(&vm);
        assert_eq!(vm.mmu().pool().stats().taken, 0);
        assert_clean(&vm);
        assert!(matches!(vm.vcpu(0), Err(VmError::Closed)));
        assert_eq!(vm.fast_zap(&task), Err(VmError::Closed));
    }
}

#[test]
fn dropping_a_root_zaps_it_unless_the_mmu_owns_a_reference() {
    for design in sound() {
        let (vm, task) = vm(design);
        vm.add_memory(&task, 0, GIG, 1).expect("memory");
        {
            let mut vcpu = vm.vcpu(0).expect("free");
            vcpu.access(GuestAccess::write(5)).expect("mapped");
            let before = vcpu.current_root();
            let after = vcpu.drop_root().expect("a page");
            vm.mmu().design().quiesce();
            if vm.mmu().ownership() == Ownership::Mmu {
                assert_eq!(Some(after), before, "found again by its role");
                assert_eq!(vm.mmu().leaf_pages()[0], 1);
                assert_eq!(vcpu.access(GuestAccess::write(5)).expect("still mapped"), AccessOutcome::Walk);
            } else {
                assert_eq!(vm.mmu().leaf_pages()[0], 0, "{design}");
                assert_eq!(vcpu.access(GuestAccess::write(5)).expect("mapped"), AccessOutcome::SlowFault);
            }
        }
        assert_clean(&vm);
    }
}

#[test]
fn bulk_population_counts_what_faults_would_have_made() {
    for (level, want) in [(1u8, [GIG + 512, 0, 0]), (2, [0, 513, 0]), (3, [0, 1, 1])] {
        let (vm, task) = vm("sync");
        vm.add_memory(&task, 0, GIG + 512, 3).expect("memory");
        {
            let mut vcpu = vm.vcpu(0).expect("free");
            let options = BulkOptions { level, ad: AdMix::Clean, threads: 2 };
            let progress = Progress::default();
            let made = vm.populate_bulk(&mut vcpu, 0..GIG + 512, &options, &progress).expect("room");
            assert_eq!(made, want.iter().sum::<u64>(), "level {level}");
            assert_eq!(progress.done.load(Ordering::Relaxed), GIG + 512);
            assert_eq!(vm.mmu().leaf_pages().map(|n| n as u64), want);
            let root = vcpu.current_root().expect("loaded");
            assert_eq!(vm.mmu().count(&task, root).sptes(), made, "counted in the tree");
            assert_eq!(vcpu.access(GuestAccess::write(77)).expect("mapped"), AccessOutcome::Walk);
            let again = vm.populate_bulk(&mut vcpu, 0..GIG + 512, &options, &progress).expect("room");
            assert_eq!(again, 0, "what is mapped stays");
        }
        assert_clean(&vm);
    }
}

#[test]
fn every_page_has_the_level_that_slot_and_host_allow() {
    let (vm, task) = vm("sync");
    // Guest 1 GiB + 3 pages in: congruent to the host by construction, cut at both ends.
    vm.add_memory(&task, GIG + 3, 2 * GIG, 3).expect("memory");
    {
        let mut vcpu = vm.vcpu(0).expect("free");
        for (gfn, level) in [(GIG + 3, 1), (GIG + 512, 2), (2 * GIG, 3), (3 * GIG, 1)] {
            match vcpu.fault(GuestAccess::read(gfn), false).expect("memory") {
                FaultOutcome::Fixed { level: got, spte } => {
                    assert_eq!(got, level, "gfn {gfn:#x}");
                    let hva = vm.slots().find(0, gfn).expect("slot").hva_of(gfn);
                    let page = vm.side().primary.lookup(hva).expect("backed");
                    let mask = [0, 511, GIG - 1][usize::from(level) - 1];
                    assert_eq!(spte.pfn(), page.pfn & !mask, "gfn {gfn:#x}");
                }
                other => panic!("gfn {gfn:#x}: {other:?}"),
            }
        }
    }
    assert_clean(&vm);
}

#[test]
fn a_gfn_without_memory_is_emulated_until_a_slot_appears() {
    let (vm, task) = vm("sync");
    vm.add_memory(&task, 0, 512, 1).expect("memory");
    let mut vcpu = vm.vcpu(0).expect("free");
    assert_eq!(vcpu.access(GuestAccess::read(0x1000)).expect("mmio"), AccessOutcome::Emulate);
    let emulated = vcpu.stats().emulated;
    assert_eq!(vcpu.access(GuestAccess::read(0x1000)).expect("mmio, cached"), AccessOutcome::Emulate);
    assert_eq!(vcpu.stats().emulated, emulated + 1);
    vcpu.leave();
    vm.add_memory(&task, 0x1000, 512, 1).expect("memory");
    let outcome = vcpu.access(GuestAccess::read(0x1000)).expect("memory now");
    assert_eq!(outcome, AccessOutcome::SlowFault, "the stale MMIO entry was replaced");
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn memslot_updates_follow_kvms_rules_and_name_both_ranges() {
    let (vm, task) = vm("sync");
    let region =
        |id, base, pages, hva| Region { id, as_id: 0, base, pages, hva, flags: SlotFlags::default() };
    let generation = || vm.slots().generations[0];
    let primary = &vm.side().primary;
    let hva = primary.region(GIG, 0, 1, true).expect("room");
    assert_eq!(vm.set_memslot(&task, &region(1, 0x1000, 0x100, hva)), Ok(SlotUpdate::Created));
    assert_eq!(generation(), 2);
    assert_eq!(vm.set_memslot(&task, &region(1, 0x1000, 0x100, hva)), Ok(SlotUpdate::Nothing));
    assert_eq!(generation(), 2);
    let error = vm.set_memslot(&task, &region(2, 0x10ff, 0x100, hva)).expect_err("one page in common");
    let text = error.to_string();
    assert!(text.contains("0x10ff..0x11ff") && text.contains("0x1000..0x1100"), "{text}");
    assert!(matches!(error, VmError::SlotOverlap { other: 1, .. }));
    let refused = [
        (region(1, 0x1000, 0x101, hva), "size"),
        (region(1, 0x1000, 0x100, hva + 1), "host address"),
        (region(40_000, 0, 1, hva), "slot ids"),
        (region(3, 0, 1 << 31, hva), "2^31 - 1"),
        (region(3, 1 << 60, 1, hva), "address space"),
        (Region { as_id: 2, ..region(3, 0, 1, hva) }, "two address spaces"),
        (
            Region {
                flags: SlotFlags { readonly: true, ..Default::default() },
                ..region(1, 0x1000, 0x100, hva)
            },
            "READONLY",
        ),
    ];
    for (wish, rule) in refused {
        let error = vm.set_memslot(&task, &wish).expect_err(rule);
        assert!(error.to_string().contains(rule), "{error} should name: {rule}");
    }
    assert_eq!(vm.delete_memslot(&task, 0, 9), Err(VmError::NoSlot { as_id: 0, id: 9 }));
    assert_eq!(generation(), 2, "refusals cost no generation");
    assert!(matches!(vm.set_memslot(&task, &region(1, 0x8000, 0x100, hva)), Ok(SlotUpdate::Moved(_))));
    assert_eq!(generation(), 6, "a move is two publications");
    let logging =
        Region { flags: SlotFlags { log_dirty: true, readonly: false }, ..region(1, 0x8000, 0x100, hva) };
    assert_eq!(vm.set_memslot(&task, &logging), Ok(SlotUpdate::Flags));
    assert_eq!(generation(), 8);
    vm.delete_memslot(&task, 0, 1).expect("there");
    assert_eq!(generation(), 12);
    assert_clean(&vm);
}

#[test]
fn a_write_is_in_the_dirty_log_once_and_again_after_the_next_write() {
    let (vm, task) = vm("sync");
    let hva = vm.side().primary.region(2 * GIG, 0, 3, true).expect("room");
    let plain = Region { id: 0, as_id: 0, base: 0, pages: 2 * GIG, hva, flags: SlotFlags::default() };
    vm.set_memslot(&task, &plain).expect("room");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.access(GuestAccess::write(7)).expect("mapped huge and writable before logging");
    vcpu.leave();
    let logging = Region { flags: SlotFlags { log_dirty: true, readonly: false }, ..plain };
    vm.set_memslot(&task, &logging).expect("flags");
    assert_eq!(vm.mmu().leaf_pages(), [GIG as i64, 0, 0], "split, and nothing unmapped");
    for gfn in [7, 64, 700] {
        let outcome = vcpu.access(GuestAccess::write(gfn)).expect("mapped");
        assert_eq!(outcome, AccessOutcome::FastFault, "gfn {gfn}: protected, and fixed without mmu_lock");
    }
    assert_eq!(vcpu.access(GuestAccess::write(7)).expect("mapped"), AccessOutcome::TlbHit);
    // A read of what is mapped is no fault. One that faults maps writable where the host does, and is reported for that: KVM errs on this side.
    assert_eq!(vcpu.access(GuestAccess::read(9)).expect("mapped"), AccessOutcome::Walk);
    assert_eq!(vcpu.access(GuestAccess::read(GIG + 9)).expect("memory"), AccessOutcome::SlowFault);
    vcpu.leave();
    assert_eq!(vm.take_dirty_log(&task, 0, 0).expect("logs"), [7, 64, 700, GIG + 9]);
    assert_eq!(vm.take_dirty_log(&task, 0, 0).expect("logs"), []);
    assert_eq!(vcpu.access(GuestAccess::write(64)).expect("seen again"), AccessOutcome::FastFault);
    vcpu.leave();
    assert_eq!(vm.take_dirty_log(&task, 0, 0).expect("logs"), [64]);
    assert_eq!(vm.mmu().leaf_pages(), [GIG as i64 + 1, 0, 0], "harvesting unmaps nothing");
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn dirty_logging_works_as_each_kernel_does_it() {
    for (profile, design) in
        [("5.10", "inline"), ("5.15", "inline"), ("5.18", "async-worker"), ("6.1", "sync"), ("7.2", "sync")]
    {
        let kernel = KernelProfile::named(profile).expect("known");
        let vm = Vm::<Real>::new(VmConfig {
            profile: kernel,
            format: kernel.format(FormatKind::Npt),
            ..config(design)
        })
        .expect("a small VM");
        let task = vm.task("test", TaskRole::Caller);
        let hva = vm.side().primary.region(1024, 0, 2, true).expect("room");
        let plain = Region { id: 3, as_id: 0, base: 0, pages: 1024, hva, flags: SlotFlags::default() };
        vm.set_memslot(&task, &plain).expect("room");
        let mut vcpu = vm.vcpu(0).expect("free");
        for gfn in [1, 513] {
            vcpu.access(GuestAccess::write(gfn)).expect("two huge pages");
        }
        vcpu.leave();
        let flags = SlotFlags { log_dirty: true, readonly: false };
        vm.set_memslot(&task, &Region { flags, ..plain }).expect("flags");
        let splits = kernel.eager_split != EagerSplit::None;
        let expected = if splits { [1024, 0] } else { [0, 2] };
        assert_eq!(vm.mmu().count_all(&task).leaves[1..3], expected, "{profile}");
        assert_eq!(vcpu.access(GuestAccess::read(600)).expect("mapped"), AccessOutcome::Walk, "{profile}");
        let fast = splits && kernel.fast_page_fault;
        let outcome = vcpu.access(GuestAccess::write(514)).expect("mapped");
        assert_eq!(outcome == AccessOutcome::FastFault, fast, "{profile}: {outcome:?}");
        vcpu.leave();
        assert_eq!(vm.take_dirty_log(&task, 0, 3).expect("logs"), [514], "{profile}");
        assert_eq!(vm.take_dirty_log(&task, 0, 3).expect("logs"), [], "{profile}");
        vcpu.access(GuestAccess::write(514)).expect("seen again");
        vcpu.leave();
        assert_eq!(vm.take_dirty_log(&task, 0, 3).expect("logs"), [514], "{profile}");
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_frame_that_the_host_takes_is_neither_mapped_nor_cached_afterwards() {
    let (vm, task) = vm("sync");
    vm.add_memory(&task, 0, GIG, 3).expect("memory");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.access(GuestAccess::write(1000)).expect("mapped 1 GiB");
    vcpu.leave();
    assert_eq!(vm.unmap_gfns(&task, 1000..1001, true).expect("open"), 1);
    assert_eq!(vm.mmu().leaf_pages(), [0, 0, 0], "a huge leaf that straddles the range goes whole");
    assert_eq!(vcpu.access(GuestAccess::write(1000)).expect("a new frame"), AccessOutcome::SlowFault);
    assert_eq!(vcpu.access(GuestAccess::write(5)).expect("2 MiB"), AccessOutcome::SlowFault);
    drop(vcpu);
    let error = vm.unmap_gfns(&task, GIG - 1..GIG + 1, true).expect_err("beyond the slot");
    assert!(matches!(error, VmError::BadRange { start: GIG, .. }), "{error}");
    assert_clean(&vm);
}

#[test]
fn a_vcpu_handle_is_exclusive_and_close_says_so() {
    let (vm, _task) = vm("inline");
    let held = vm.vcpu(1).expect("free");
    assert!(matches!(vm.vcpu(1), Err(VmError::Busy { vcpu: 1 })));
    assert!(matches!(vm.vcpu(2), Err(VmError::NoVcpu { vcpu: 2, count: 2 })));
    vm.vcpu_state(0).expect("a vCPU").request::<Real>(request::STOP);
    assert!(matches!(vm.close(), Err(VmError::Busy { vcpu: 1 })));
    let stopped = [0, 1].map(|id| vm.vcpu_state(id).expect("a vCPU").is_requested::<Real>(request::STOP));
    assert_eq!(
        stopped,
        [true, false],
        "a close that is refused stops nobody, and lets nobody run who was stopped"
    );
    drop(held);
    assert_clean(&vm);
}

#[test]
fn configurations_that_make_no_sense_are_refused_with_the_reason() {
    let base = config("inline");
    let cases = [
        (VmConfig { vcpus: 0, ..base.clone() }, "KVM_MAX_VCPUS"),
        (VmConfig { root_level: 3, ..base.clone() }, "4 or 5"),
        (VmConfig { design: Some("inlin".into()), ..base.clone() }, "zap design"),
        (VmConfig { ownership: Some(tdpmmu_spte::Ownership::Mmu), ..base.clone() }, "zapped inline"),
        (VmConfig { maxphyaddr: 64, ..base.clone() }, "52"),
        (VmConfig { max_level: 4, ..base.clone() }, "1G"),
    ];
    for (config, rule) in cases {
        match Vm::<Real>::new(config) {
            Err(error) => assert!(error.to_string().contains(rule), "{error} should name: {rule}"),
            Ok(_) => panic!("accepted, against the rule: {rule}"),
        }
    }
}

#[test]
fn running_out_of_tables_is_an_error_and_the_vm_survives_it() {
    let config = VmConfig { max_tables: 12, ..config("sync") };
    let vm = Vm::<Real>::new(config).expect("a tiny VM");
    let task = vm.task("test", TaskRole::Caller);
    vm.add_memory(&task, 0, GIG, 1).expect("memory");
    {
        let mut vcpu = vm.vcpu(0).expect("free");
        let error = (0..64).find_map(|n| vcpu.access(GuestAccess::read(n * 512)).err()).expect("12 tables");
        assert!(matches!(error, VmError::Pool(_)), "{error}");
        assert_ne!(vcpu.access(GuestAccess::read(0)).expect("still mapped"), AccessOutcome::Stopped);
    }
    vm.fast_zap(&task).expect("open");
    assert_clean(&vm);
}

#[test]
fn a_second_root_of_another_role_is_kept_and_found_again() {
    let (vm, task) = vm("sync");
    vm.add_memory(&task, 0, GIG, 1).expect("memory");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.access(GuestAccess::write(1)).expect("mapped");
    let (first, role) = (vcpu.current_root(), vcpu.role());
    let layout = vm.mmu().profile().role_layout;
    let mut fields = layout.unpack(role);
    fields.cr0_wp = false;
    vcpu.switch_role(layout.pack(&fields));
    assert_eq!(vcpu.access(GuestAccess::write(1)).expect("other tables"), AccessOutcome::SlowFault);
    assert_ne!(vcpu.current_root(), first);
    vcpu.switch_role(role);
    assert_eq!(vcpu.current_root(), first);
    assert_eq!(
        vcpu.access(GuestAccess::write(1)).expect("still mapped"),
        AccessOutcome::Walk,
        "its tag was flushed"
    );
    vcpu.leave();
    vm.fast_zap(&task).expect("open");
    assert_eq!(vm.mmu().leaf_pages(), [0, 0, 0], "both roots");
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn a_population_by_faults_leaves_no_hole_where_a_fault_had_to_retry() {
    let (vm, task) = vm("sync");
    vm.add_memory(&task, 0, 64, 1).expect("memory");
    vm.side().invalidation.begin(&vm.mmu().lock.write(&task), &(0..64));
    let progress = Progress::default();
    let (fixed, _) = std::thread::scope(|scope| {
        let populating = scope.spawn(|| vm.populate_by_faults(0..1, 0..64, true, &progress));
        // While the notifier runs every fault retries; long enough for a population that gives up.
        std::thread::sleep(std::time::Duration::from_millis(20));
        vm.side().invalidation.end(&vm.mmu().lock.write(&task));
        populating.join().expect("no panic")
    })
    .expect("populated");
    assert_eq!((fixed, vm.mmu().leaf_pages()), (64, [64, 0, 0]));
    assert_clean(&vm);
}

#[test]
fn a_guest_of_64_tib_fits_beside_another_slot() {
    let pages = 1 << 34;
    let config = VmConfig { host_pages: pages + 64, check_frames: false, ..config("sync") };
    let vm = Vm::<Real>::new(config).expect("64 TiB and 64 pages");
    let task = vm.task("test", TaskRole::Caller);
    vm.add_memory(&task, 0, pages, 3).expect("64 TiB");
    vm.add_memory(&task, pages, 64, 1).expect("the slot beside it");
    {
        let mut vcpu = vm.vcpu(0).expect("free");
        // Untouched: the bitmaps of 2^34 frames would take 2 GiB each.
        let options = BulkOptions { level: 3, ad: AdMix::Untouched, threads: 1 };
        let made = vm.populate_bulk(&mut vcpu, 0..pages, &options, &Progress::default()).expect("room");
        assert_eq!(made, 65_536);
        for gfn in [pages, pages + 63] {
            assert_eq!(vcpu.access(GuestAccess::read(gfn)).expect("memory"), AccessOutcome::SlowFault);
        }
    }
    assert_eq!(vm.mmu().leaf_pages(), [2, 0, 65_536]);
    assert_clean(&vm);
}

#[test]
fn a_host_larger_than_a_frame_number_is_refused() {
    let config = VmConfig { host_pages: tdpmmu_vm::MAX_HOST_PAGES + 1, ..config("sync") };
    assert!(matches!(Vm::<Real>::new(config), Err(VmError::Config { what: "host_pages", .. })));
}

#[test]
fn a_design_that_relies_on_the_stale_root_test_is_refused_where_faults_do_not_make_it() {
    let with = |design: &str, profile: &str| {
        let profile = KernelProfile::named(profile).expect("known");
        VmConfig { design: Some(design.into()), ..VmConfig::new(profile) }.check()
    };
    for design in ["sync", "async-worker"] {
        for profile in ["5.10", "5.15"] {
            let error = with(design, profile).expect_err("a fault may map under a root that was zapped");
            let text = error.to_string();
            assert!(text.contains(design) && text.contains(profile) && text.contains("obsolete"), "{text}");
        }
        assert!(with(design, "5.18").is_ok());
    }
    assert!(with("inline", "5.15").is_ok(), "its last put zaps what came late");
}

#[test]
fn a_fault_leaves_the_guest_first() {
    let (vm, task) = vm("sync");
    vm.add_memory(&task, 0, GIG, 1).expect("memory");
    let mut vcpu = vm.vcpu(0).expect("free");
    assert!(vcpu.enter().expect("room for a root") && vcpu.in_guest());
    assert!(matches!(vcpu.fault(GuestAccess::write(5), false), Ok(FaultOutcome::Fixed { .. })));
    assert!(!vcpu.in_guest(), "a fast zap would wait for it under the lock that the fault wants");
    drop(vcpu);
    assert_clean(&vm);
}
