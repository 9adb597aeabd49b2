//! VMs and their workers: who holds a VM, what a dying one does, and how it ends with work pending.

use std::thread;

use tdpmmu_mmu::{DESIGNS, QueueKind};
use tdpmmu_platform::{Platform, Real, Role as TaskRole};
use tdpmmu_spte::{KernelProfile, Ownership};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Vm, VmConfig, VmError};

const PAGES: u64 = 4 * 512;

/// Designs with workers that are meant to be right.
fn with_workers() -> impl Iterator<Item = &'static str> {
    DESIGNS.iter().filter(|design| !design.flawed && design.queue.is_some()).map(|design| design.name)
}

fn config(design: &str, queue: Option<QueueKind>) -> VmConfig {
    VmConfig {
        design: Some(design.into()),
        worker_queue: queue,
        workers: 2,
        vcpus: 2,
        max_tables: 20_000,
        hugepages: false,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    }
}

fn vm(design: &str, queue: Option<QueueKind>) -> Vm<Real> {
    let vm = Vm::new(config(design, queue)).expect("a small VM");
    vm.add_memory(&vm.task("vmm", TaskRole::Caller), 0, PAGES, 1).expect("memory");
    vm
}

/// Maps some memory, drops the root, and loads another.
fn lose_a_root(vm: &Vm<Real>) {
    let mut vcpu = vm.vcpu(0).expect("free");
    for gfn in 0..100 {
        vcpu.access(GuestAccess::write(gfn * 7)).expect("memory");
    }
    vcpu.drop_root().expect("a page");
}

fn assert_clean(vm: &Vm<Real>, what: &str) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{what}: {report:?}");
    assert_eq!((vm.mmu().pool().stats().taken, vm.users()), (0, 0), "{what}");
}

#[test]
fn closing_with_work_pending_runs_it_first() {
    for design in with_workers() {
        for kind in [QueueKind::PerVm, QueueKind::System] {
            let vm = vm(design, Some(kind));
            let queue = vm.mmu().design().queue().expect("workers");
            queue.hold();
            lose_a_root(&vm);
            lose_a_root(&vm);
            if vm.mmu().ownership() == Ownership::Vcpu {
                assert!(queue.waiting() > 0 && vm.mmu().leaf_pages()[0] == 200, "{design}");
                assert_eq!(vm.users() > 1, kind == QueueKind::System, "{design}: an item holds the VM");
            }
            assert_clean(&vm, design);
        }
    }
}

#[test]
fn dropping_a_vm_with_work_pending_hangs_nobody() {
    for design in with_workers() {
        for kind in [QueueKind::PerVm, QueueKind::System] {
            let vm = vm(design, Some(kind));
            vm.mmu().design().queue().expect("workers").hold();
            lose_a_root(&vm);
            drop(vm);
        }
    }
}

#[test]
fn a_vm_whose_last_file_descriptor_is_closed_zaps_what_it_loses_itself() {
    let vm = vm("async-worker", Some(QueueKind::System));
    assert_eq!((vm.users(), vm.release_user(), vm.release_user()), (1, 0, 0));
    vm.mmu().design().queue().expect("workers").hold();
    lose_a_root(&vm);
    assert_eq!(vm.mmu().leaf_pages()[0], 0, "the vCPU has zapped it, no worker could");
    assert_clean(&vm, "dying");
}

#[test]
fn an_nx_huge_pages_toggle_finds_a_vm_without_users_and_zaps_it() {
    for design in DESIGNS.iter().filter(|design| !design.flawed) {
        for kind in [None, Some(QueueKind::System)] {
            let vm = vm(design.name, kind);
            let task = vm.task("nx_huge_pages", TaskRole::Caller);
            vm.vcpu(0).expect("free").access(GuestAccess::write(3)).expect("memory");
            vm.release_user();
            vm.fast_zap(&task).expect("not closed");
            assert_eq!(vm.mmu().leaf_pages(), [0; 3], "{}", design.name);
            let mut vcpu = vm.vcpu(0).expect("free");
            assert_eq!(vcpu.access(GuestAccess::write(3)), Ok(AccessOutcome::SlowFault), "{}", design.name);
            drop(vcpu);
            assert_clean(&vm, design.name);
        }
    }
}

#[test]
fn two_vms_share_the_systems_workers_and_end_one_after_the_other() {
    for design in with_workers() {
        let (first, second) = (vm(design, Some(QueueKind::System)), vm(design, Some(QueueKind::System)));
        thread::scope(|scope| {
            for vm in [&first, &second] {
                scope.spawn(move || {
                    for _ in 0..30 {
                        lose_a_root(vm);
                    }
                });
                scope.spawn(move || {
                    let task = vm.task("vmm", TaskRole::Caller);
                    for _ in 0..15 {
                        vm.fast_zap(&task).expect("open");
                    }
                });
            }
        });
        assert_clean(&first, design);
        lose_a_root(&second);
        assert_clean(&second, design);
    }
}

#[test]
fn workers_and_their_cpus_are_checked() {
    let refused = |config: VmConfig| Vm::<Real>::new(config).err().expect("refused");
    let error = refused(VmConfig { workers: 0, ..config("async-worker", None) });
    assert!(matches!(error, VmError::Config { what: "workers", .. }), "{error}");
    let error = refused(VmConfig { worker_cpus: vec![4000], ..config("async-worker", None) });
    assert!(
        matches!(&error, VmError::Config { what: "worker_cpus", value, .. } if value == "4000"),
        "{error}"
    );
    let cpus = Real::cpus();
    let vm = Vm::<Real>::new(VmConfig { worker_cpus: cpus, ..config("async-worker", None) });
    assert_clean(&vm.expect("CPUs that this process may use"), "bound");
}
