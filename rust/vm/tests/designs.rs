//! Each kernel with the design that it had, and what the oldest does to vCPUs.

use tdpmmu_mmu::{DESIGNS, design};
use tdpmmu_platform::{Real, Role as TaskRole};
use tdpmmu_spte::{FormatKind, KernelProfile};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Vm, VmConfig};

const PAGES: u64 = 4 * 512;

fn config(profile: &str, design: Option<&str>) -> VmConfig {
    let profile = KernelProfile::named(profile).expect("known");
    VmConfig {
        format: profile.format(FormatKind::Npt),
        design: design.map(Into::into),
        vcpus: 2,
        max_tables: 20_000,
        hugepages: false,
        check_frames: true,
        ..VmConfig::new(profile)
    }
}

fn vm(profile: &str, design: Option<&str>) -> Vm<Real> {
    let vm = Vm::new(config(profile, design)).expect("a small VM");
    vm.add_memory(&vm.task("vmm", TaskRole::Caller), 0, PAGES, 1).expect("memory");
    vm
}

fn assert_clean(vm: &Vm<Real>, what: &str) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{what}: {report:?}");
}

#[test]
fn every_kernel_runs_the_design_that_it_had() {
    for (profile, expected) in [
        ("5.10", "in-place"),
        ("5.15", "inline"),
        ("5.18", "async-worker"),
        ("6.1-async", "async-worker"),
        ("6.1", "sync"),
        ("6.12", "sync"),
        ("7.2", "sync"),
    ] {
        let vm = vm(profile, None);
        assert_eq!(vm.mmu().design().name(), expected, "{profile}");
        assert_eq!(
            Some(vm.mmu().passes()),
            design::info(expected).expect("known").passes.or(Some(vm.mmu().profile().passes))
        );
        let task = vm.task("vmm", TaskRole::Caller);
        for _ in 0..3 {
            let mut vcpu = vm.vcpu(0).expect("free");
            assert_eq!(vcpu.access(GuestAccess::write(3)), Ok(AccessOutcome::SlowFault), "{profile}");
            drop(vcpu);
            vm.fast_zap(&task).expect("open");
            assert_eq!(vm.mmu().leaf_pages(), [0; 3], "{profile}");
        }
        vm.vcpu(0).expect("free").drop_root().expect("a page");
        assert_clean(&vm, profile);
    }
}

#[test]
fn before_5_18_a_fast_zap_makes_every_vcpu_load_its_root_again_and_in_place_finds_the_same() {
    for (profile, design) in [("5.10", "in-place"), ("6.12", "in-place"), ("5.15", "inline")] {
        let vm = vm(profile, Some(design));
        let task = vm.task("vmm", TaskRole::Caller);
        let (mut one, mut two) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
        for vcpu in [&mut one, &mut two] {
            vcpu.access(GuestAccess::write(3)).expect("memory");
            vcpu.leave();
        }
        let before = one.current_root();
        assert_eq!(before, two.current_root());
        vm.fast_zap(&task).expect("open");
        // The first one drops the root and finds it again, since the other still holds it; where it is valid.
        assert_eq!(one.access(GuestAccess::write(3)), Ok(AccessOutcome::SlowFault), "{profile} {design}");
        assert_eq!(one.current_root() == before, design == "in-place", "{profile} {design}");
        assert_eq!(one.stats().loads, 2, "{profile} {design}");
        one.leave();
        two.access(GuestAccess::write(3)).expect("memory");
        assert_eq!((two.stats().loads, two.current_root()), (2, one.current_root()), "{profile} {design}");
        drop((one, two));
        assert_clean(&vm, design);
    }
}

#[test]
fn the_worker_kernel_of_6_4_is_a_profile_with_another_design() {
    let vm = vm("6.12", Some("async-worker-owned"));
    let mut vcpu = vm.vcpu(0).expect("free");
    vcpu.access(GuestAccess::write(3)).expect("memory");
    let before = vcpu.current_root();
    assert_eq!(Some(vcpu.drop_root().expect("there")), before, "the MMU has kept it");
    assert_eq!(vcpu.access(GuestAccess::write(3)), Ok(AccessOutcome::Walk), "and what it maps");
    drop(vcpu);
    vm.fast_zap(&vm.task("vmm", TaskRole::Caller)).expect("open");
    assert_eq!(vm.mmu().leaf_pages(), [0; 3]);
    assert_clean(&vm, "owned");
}

#[test]
fn designs_that_zap_once_are_refused_where_faults_do_not_look() {
    for design in DESIGNS {
        let built = Vm::<Real>::new(config("5.15", Some(design.name)));
        assert_eq!(built.is_err(), design.needs_stale_root_check, "{}", design.name);
        if let Err(error) = built {
            assert!(error.to_string().contains("obsolete"), "{error}");
        }
    }
}
