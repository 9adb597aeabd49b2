//! A VM on shadow pages, from its first fault to its end.

use tdpmmu_platform::{Real, Role};
use tdpmmu_shadow::{ReclaimKind, SHADOW_DESIGNS};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{
    AccessOutcome, BulkOptions, GuestAccess, GuestOs, Paging, Progress, ShadowSpec, Vcpu, Vm, VmConfig,
    VmError,
};

/// Where the guest's tables lie, far from its memory.
const TABLES: std::ops::Range<u64> = 0x10_0000..0x10_0400;

fn config(design: &str, paging: Paging) -> VmConfig {
    VmConfig {
        design: Some(design.into()),
        shadow: ShadowSpec { paging, ..ShadowSpec::default() },
        vcpus: 2,
        max_tables: 4000,
        hugepages: false,
        quarantine: true,
        host_pages: 1 << 21,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    }
}

fn machine(config: VmConfig, level: u8) -> (Vm<Real>, GuestOs<Real>) {
    let vm = Vm::<Real>::new(config).expect("a small VM");
    let task = vm.task("setup", Role::Caller);
    vm.add_memory(&task, 0, 4096, level).expect("room");
    vm.add_memory(&task, TABLES.start, TABLES.end - TABLES.start, 1).expect("room");
    (vm, GuestOs::new(0, TABLES))
}

/// A process that maps the guest's memory one to one, in each vCPU; nothing under direct paging.
fn boot(vm: &Vm<Real>, os: &GuestOs<Real>, level: u8) {
    if vm.paging() == Paging::Guest {
        let cr3 = os.new_process(vm).expect("tables");
        os.build_linear(vm, cr3, 0..4096, 0, level).expect("tables");
        for id in 0..vm.vcpu_count() {
            vm.vcpu(id).expect("free").set_cr3(cr3).expect("the guest's tables are shadowed");
        }
    }
}

fn assert_clean(vm: &Vm<Real>) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
    assert!(report.shadow.is_some());
}

fn each(body: impl Fn(&str, Paging)) {
    for info in SHADOW_DESIGNS {
        for paging in [Paging::Direct, Paging::Guest] {
            body(info.name, paging);
        }
    }
}

#[test]
fn memory_is_filled_by_faults_zapped_filled_again_and_all_is_given_back() {
    each(|design, paging| {
        let (vm, os) = machine(config(design, paging), 1);
        boot(&vm, &os, 1);
        let task = vm.task("owner", Role::Caller);
        for round in 0..3 {
            let mut vcpu = vm.vcpu(0).expect("free");
            for gfn in 0..1024 {
                let first = vcpu.access(GuestAccess::write(gfn)).expect("memory");
                assert_eq!(first, AccessOutcome::SlowFault, "{design} {paging:?} round {round} gfn {gfn:#x}");
                assert_eq!(vcpu.access(GuestAccess::write(gfn)), Ok(AccessOutcome::TlbHit));
            }
            let (spte, level) = vcpu.walk_shadow(1023).expect("mapped");
            assert_eq!((level, vm.mmu().format().is_writable(spte)), (1, true));
            drop(vcpu);
            assert!(vm.stats().pages_4k >= 1024);
            vm.fast_zap(&task).expect("open");
            if design != "shadow-gen-kept" {
                assert_eq!(vm.stats().pages_4k, 0, "{design} {paging:?}");
            }
        }
        assert_clean(&vm);
    });
}

#[test]
fn bulk_population_makes_what_faults_make() {
    for paging in [Paging::Direct, Paging::Guest] {
        for level in [1, 2] {
            let (vm, os) = machine(config("shadow-gen", paging), level);
            boot(&vm, &os, level);
            let mut vcpu = vm.vcpu(0).expect("free");
            vcpu.reload().expect("a root");
            let options = BulkOptions { level, ..BulkOptions::default() };
            let made = vm.populate_bulk(&mut vcpu, 0..4096, &options, &Progress::default()).expect("memory");
            assert_eq!(made, 4096 >> (9 * (level - 1)));
            for gfn in (0..4096).step_by(61) {
                assert!(vcpu.access(GuestAccess::write(gfn)).expect("mapped") <= AccessOutcome::Walk);
                let (_, at) = vcpu.lookup(gfn).expect("mapped");
                assert_eq!(at, level, "{paging:?} gfn {gfn:#x}");
            }
            let stats = vm.stats();
            assert_eq!(stats.pf_fixed, 0, "{paging:?}: nothing is left for a fault");
            drop(vcpu);
            assert_clean(&vm);
        }
    }
}

#[test]
fn bulk_population_leaves_larger_pages_and_takes_the_place_of_smaller_ones() {
    let (vm, os) = machine(config("shadow-gen", Paging::Direct), 2);
    boot(&vm, &os, 2);
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.access(GuestAccess::write(0)).expect("memory");
    assert_eq!(vcpu.lookup(0).map(|leaf| leaf.1), Some(2));
    let bulk = |vcpu: &mut Vcpu<'_, Real>, pages, level| {
        let options = BulkOptions { level, ..BulkOptions::default() };
        vm.populate_bulk(vcpu, pages, &options, &Progress::default()).expect("memory")
    };
    assert_eq!(bulk(&mut vcpu, 0..1024, 1), 512, "the first 512 are there, by one leaf");
    assert_eq!(vcpu.lookup(7).map(|leaf| leaf.1), Some(2));
    assert_eq!(vcpu.lookup(600).map(|leaf| leaf.1), Some(1));
    assert!(bulk(&mut vcpu, 0..4096, 2) >= 6);
    for gfn in [0, 600, 2000] {
        assert_eq!(vcpu.lookup(gfn).map(|leaf| leaf.1), Some(2), "gfn {gfn}");
        assert!(vcpu.access(GuestAccess::write(gfn)).expect("mapped") <= AccessOutcome::SlowFault);
    }
    drop(vcpu);
    vm.unmap_gfns(&vm.task("host", Role::Caller), 0..4096, true).expect("a slot");
    assert_eq!(vm.vcpu(0).expect("free").lookup(600), None, "no reverse map was lost");
    assert_clean(&vm);
}

#[test]
fn a_guest_that_is_asked_to_stop_is_not_told_that_its_store_was_made() {
    let (vm, os) = machine(config("shadow-gen", Paging::Guest), 1);
    let cr3 = os.new_process(&vm).expect("room");
    os.build_linear(&vm, cr3, 0..64, 0, 1).expect("room");
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.set_cr3(cr3).expect("paging guest");
    vm.stop_vcpus(&vm.task("vmm", Role::Caller));
    let refused = os.map(&mut vcpu, cr3, 0x4_0000, 7, 1, true);
    assert!(matches!(refused, Err(VmError::Cancelled)), "{refused:?}");
    vm.resume();
    os.map(&mut vcpu, cr3, 0x4_0000, 7, 1, true).expect("nothing is in the way");
    assert_eq!(os.translate(&vm, cr3, 0x4_0000).map(|walk| walk.gfn), Some(7));
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn what_the_shrinker_gives_back_is_there_for_who_needed_it_under_every_reclamation() {
    for reclaim in ReclaimKind::ALL {
        let mut config = config("shadow-gen-kept", Paging::Direct);
        config.shadow.reclaim = reclaim;
        // Room for one generation of pages, and for what caches of tables hold.
        config.max_tables = 64;
        let (vm, _) = machine(config, 1);
        let task = vm.task("vmm", Role::Caller);
        let mut vcpu = vm.vcpu(0).expect("free");
        for _ in 0..20 {
            for gfn in (0..4096).step_by(512) {
                vcpu.access(GuestAccess::write(gfn)).expect("obsolete pages make room");
            }
            vcpu.leave();
            vm.fast_zap(&task).expect("open");
        }
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn walks_without_the_lock_see_what_faults_have_made_under_every_reclamation() {
    for reclaim in ReclaimKind::ALL {
        let mut config = config("shadow-gen", Paging::Direct);
        config.shadow.reclaim = reclaim;
        let (vm, _) = machine(config, 1);
        let task = vm.task("owner", Role::Caller);
        let mut vcpu = vm.vcpu(0).expect("free");
        for _ in 0..3 {
            for gfn in 0..64 {
                vcpu.access(GuestAccess::write(gfn)).expect("memory");
                assert!(vcpu.walk_shadow(gfn).is_some(), "{reclaim}");
            }
            vcpu.leave();
            vm.fast_zap(&task).expect("open");
        }
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn what_does_not_go_together_is_refused_by_name() {
    let base = config("shadow-gen", Paging::Direct);
    let with = |edit: &dyn Fn(&mut VmConfig)| {
        let mut config = base.clone();
        edit(&mut config);
        match Vm::<Real>::new(config) {
            Err(VmError::Config { what, .. }) => what,
            Err(other) => panic!("{other}"),
            Ok(_) => "nothing",
        }
    };
    assert_eq!(with(&|c| c.passes = Some(tdpmmu_spte::Passes::ROOT)), "passes");
    assert_eq!(with(&|c| c.ownership = Some(tdpmmu_spte::Ownership::Mmu)), "ownership");
    assert_eq!(with(&|c| c.shadow.paging = Paging::Tdp), "paging");
    assert_eq!(with(&|c| c.shadow.nested = true), "nested");
    assert_eq!(with(&|c| c.shadow.quota = Some(3)), "quota");
    assert_eq!(with(&|c| c.dirty_mode = tdpmmu_vm::DirtyMode::DBits), "dirty_mode");
    assert_eq!(with(&|_| ()), "nothing");
}

#[test]
fn a_guest_without_a_table_is_told_and_a_hole_in_its_tables_is_its_own_fault() {
    let (vm, os) = machine(config("shadow-gen", Paging::Guest), 1);
    let mut vcpu = vm.vcpu(0).expect("free");
    assert_eq!(vcpu.access(GuestAccess::read(5)), Err(VmError::NoCr3 { vcpu: 0 }));
    let cr3 = os.new_process(&vm).expect("tables");
    vcpu.set_cr3(cr3).expect("shadowed");
    assert!(matches!(vcpu.access(GuestAccess::read(5)), Err(VmError::GuestFault { vcpu: 0, .. })));
    os.map(&mut vcpu, cr3, 5, 77, 1, false).expect("the guest maps it");
    vcpu.access(GuestAccess::read(5)).expect("mapped now");
    assert!(matches!(vcpu.access(GuestAccess::write(5)), Err(VmError::GuestFault { .. })), "read-only");
    assert_eq!(vcpu.stats().guest_faults, 2);
    drop(vcpu);
    assert_clean(&vm);
}

#[test]
fn every_kernels_rules_hold_in_both_address_spaces() {
    for profile in KernelProfile::ALL {
        for paging in [Paging::Direct, Paging::Guest] {
            let mut config = config("shadow-gen", paging);
            config.profile = *profile;
            config.format = profile.format(tdpmmu_spte::FormatKind::Npt);
            let (vm, os) = machine(config, 1);
            boot(&vm, &os, 1);
            let task = vm.task("owner", Role::Caller);
            vm.share_memory_with_smm(&task).expect("the same memory");
            let mut vcpu = vm.vcpu(0).expect("free");
            for round in 0..2 {
                for smm in [false, true] {
                    if smm {
                        vcpu.enter_smm();
                    } else {
                        vcpu.exit_smm();
                    }
                    for gfn in (0..2048).step_by(97) {
                        vcpu.access(GuestAccess::write(gfn)).expect("memory");
                    }
                    vcpu.leave();
                    vm.unmap_gfns(&task, 97..98, true).expect("there");
                    assert_eq!(vcpu.lookup(97), None, "{} {paging:?} round {round}", profile.name);
                    assert!(vm.age_gfns(&task, 194..195).expect("there"), "it was accessed");
                }
                vm.fast_zap(&task).expect("open");
            }
            drop(vcpu);
            assert_clean(&vm);
        }
    }
}
