//! VMs and their workers: who holds a VM, what a dying one does, and how it ends with work pending.

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use tdpmmu_mmu::{DESIGNS, QueueKind};
use tdpmmu_platform::{Phase, Platform, Real, Role as TaskRole, Task};
use tdpmmu_spte::{KernelProfile, Ownership};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Region, SlotFlags, Vm, VmConfig, VmError};

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

/// A fast zap that waits for workers who are held back, in a thread of its own, and slots_lock with it.
fn stuck_fast_zap(vm: &Arc<Vm<Real>>) -> thread::JoinHandle<()> {
    vm.vcpu(0).expect("free").access(GuestAccess::write(3)).expect("memory");
    let queue = vm.mmu().design().queue().expect("workers");
    queue.hold();
    let zapper = Arc::clone(vm);
    let zap = thread::spawn(move || {
        zapper.fast_zap(&zapper.task("caller", TaskRole::Caller)).expect("it began before the end");
    });
    while queue.waiting() == 0 {
        thread::yield_now();
    }
    zap
}

/// Ticks of `task` that went into waiting for locks.
fn lock_wait(task: &Task<Real>) -> u64 {
    task.meter().phase_ticks(Real::ticks())[Phase::LockWait as usize]
}

#[test]
fn closing_lets_a_fast_zap_go_on_whose_workers_are_held_back() {
    for kind in [QueueKind::PerVm, QueueKind::System] {
        let (ended, end) = mpsc::channel();
        thread::spawn(move || {
            let vm = Arc::new(vm("async-worker", Some(kind)));
            let zap = stuck_fast_zap(&vm);
            // A close that is refused changes nothing.
            let handle = vm.vcpu(1).expect("free");
            assert!(matches!(vm.close(), Err(VmError::Busy { vcpu: 1 })));
            assert!(vm.mmu().design().queue().expect("workers").is_held() && !zap.is_finished());
            drop(handle);
            let report = vm.close().expect("no handle is left");
            assert!(report.is_clean(), "{report:?}");
            assert!(report.phase_ticks[Phase::LockWait as usize] > 0);
            zap.join().expect("no panic");
            ended.send(()).expect("somebody waits");
        });
        end.recv_timeout(Duration::from_secs(60)).expect("it ended, without a panic");
    }
}

#[test]
fn a_harvest_that_waits_for_a_memslot_update_says_so() {
    let vm = Arc::new(Vm::<Real>::new(config("async-worker", None)).expect("a small VM"));
    let task = vm.task("vmm", TaskRole::Caller);
    let hva = vm.side().primary.region(PAGES, 0, 1, true).expect("room");
    let flags = SlotFlags { log_dirty: true, ..SlotFlags::default() };
    vm.set_memslot(&task, &Region { id: 0, as_id: 0, base: 0, pages: PAGES, hva, flags }).expect("memory");
    let zap = stuck_fast_zap(&vm);
    let waiter = Arc::clone(&vm);
    let (begun, begins) = mpsc::channel();
    let harvest = thread::spawn(move || {
        let task = waiter.task("harvest", TaskRole::Caller);
        begun.send(()).expect("somebody waits");
        assert_eq!(waiter.take_dirty_log(&task, 0, 0), Ok(vec![3]));
        lock_wait(&task)
    });
    begins.recv().expect("it begins");
    vm.mmu().design().queue().expect("workers").release();
    assert_ne!(harvest.join().expect("no panic"), 0);
    zap.join().expect("no panic");
    assert_clean(&vm, "harvested");
}
