//! Two address spaces: system management mode has its own roots and its own memslots, and whatever acts on all acts on both.

use std::sync::mpsc;
use std::thread;

use tdpmmu_mmu::DESIGNS;
use tdpmmu_platform::{Real, Role as TaskRole, Task};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::request::{FREE_OBSOLETE_ROOTS, RELOAD};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Region, SlotFlags, Vm, VmConfig};

const GIG: u64 = 512 * 512;

fn vm(design: &str, vcpus: usize) -> (Vm<Real>, Task<Real>) {
    let vm = Vm::new(VmConfig {
        design: Some(design.into()),
        vcpus,
        max_tables: 20_000,
        hugepages: false,
        host_pages: 64 * GIG,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    })
    .expect("a small VM");
    let task = vm.task("test", TaskRole::Caller);
    (vm, task)
}

fn sound() -> impl Iterator<Item = &'static str> {
    DESIGNS.iter().filter(|design| !design.flawed).map(|design| design.name)
}

fn assert_clean(vm: &Vm<Real>) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn an_smi_changes_root_and_memslots_and_rsm_changes_them_back() {
    for design in sound() {
        let (vm, task) = vm(design, 1);
        vm.add_memory(&task, 0, 1024, 1).expect("memory");
        let mut vcpu = vm.vcpu(0).expect("free");
        vcpu.access(GuestAccess::write(5)).expect("mapped");
        let root = vcpu.current_root().expect("loaded");
        vcpu.enter_smm();
        assert!(vcpu.in_smm() && vcpu.current_root().is_none(), "the context was reset");
        assert_eq!(vcpu.access(GuestAccess::read(5)).expect("no slot in space 1"), AccessOutcome::Emulate);
        vcpu.leave();
        assert_eq!(vm.share_memory_with_smm(&task).expect("room"), [0]);
        assert_eq!(vm.share_memory_with_smm(&task).expect("nothing to do"), []);
        assert_eq!(vcpu.access(GuestAccess::write(5)).expect("memory"), AccessOutcome::SlowFault);
        let smm_root = vcpu.current_root().expect("loaded");
        assert_eq!((vm.mmu().as_id(root), vm.mmu().as_id(smm_root)), (0, 1), "{design}");
        assert!(vm.mmu().lookup(vcpu.task(), smm_root, 5).is_some());
        // Nothing to switch: nothing is dropped.
        vcpu.enter_smm();
        assert_eq!(vcpu.current_root(), Some(smm_root));
        vcpu.exit_smm();
        assert!(!vcpu.in_smm() && vcpu.current_root().is_none());
        let outcome = vcpu.access(GuestAccess::write(5)).expect("memory");
        // Who owns a reference of its own keeps the tables that the SMI dropped.
        let kept = vm.mmu().ownership() == tdpmmu_spte::Ownership::Mmu;
        let expected = if kept { AccessOutcome::Walk } else { AccessOutcome::SlowFault };
        assert_eq!(outcome, expected, "{design}");
        assert_eq!(vcpu.stats().loads, 3);
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_fast_zap_leaves_nothing_in_either_space_and_a_slot_of_one_is_gone_in_that_one() {
    for design in sound() {
        let (vm, task) = vm(design, 2);
        vm.add_memory(&task, 0, 1024, 1).expect("memory");
        vm.share_memory_with_smm(&task).expect("room");
        let (mut normal, mut smm) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
        smm.enter_smm();
        let touch = |normal: &mut tdpmmu_vm::Vcpu<'_, Real>, smm: &mut tdpmmu_vm::Vcpu<'_, Real>| {
            for gfn in [1, 600] {
                normal.access(GuestAccess::write(gfn)).expect("memory");
                smm.access(GuestAccess::write(gfn)).expect("memory");
            }
            normal.leave();
            smm.leave();
            assert_eq!(vm.mmu().leaf_pages(), [4, 0, 0]);
        };
        touch(&mut normal, &mut smm);
        let roots = vm.mmu().valid_roots(&task);
        assert_eq!((roots.len(), vm.mmu().count_leaves_of(&task, &roots)), (2, 4), "{design}");
        vm.fast_zap(&task).expect("open");
        assert_eq!(vm.mmu().leaf_pages(), [0, 0, 0], "{design}");
        assert_eq!(vm.sptes_under_obsolete_roots(&task), 0, "{design}");
        assert_eq!(vm.mmu().count_leaves_of(&task, &roots), 0, "{design}");
        touch(&mut normal, &mut smm);
        // The frame goes: from both.
        vm.unmap_gfns(&task, 1..2, true).expect("open");
        assert_eq!(vm.mmu().leaf_pages(), [2, 0, 0], "{design}");
        vm.delete_memslot(&task, 1, 0).expect("there");
        assert_eq!(normal.access(GuestAccess::write(600)).expect("memory"), AccessOutcome::SlowFault);
        assert_eq!(smm.access(GuestAccess::write(600)).expect("none"), AccessOutcome::Emulate);
        drop((normal, smm));
        assert_clean(&vm);
    }
}

#[test]
fn logging_in_one_space_protects_that_one() {
    let (vm, task) = vm("sync", 2);
    vm.add_memory(&task, 0, 1024, 2).expect("memory");
    vm.share_memory_with_smm(&task).expect("room");
    let (mut normal, mut smm) = (vm.vcpu(0).expect("free"), vm.vcpu(1).expect("free"));
    smm.enter_smm();
    for vcpu in [&mut normal, &mut smm] {
        vcpu.access(GuestAccess::write(7)).expect("2 MiB");
        vcpu.leave();
    }
    let slot = vm.slots().find(1, 0).expect("there").clone();
    let region = Region {
        id: slot.id,
        as_id: 1,
        base: slot.base,
        pages: slot.pages,
        hva: slot.hva,
        flags: SlotFlags { log_dirty: true, readonly: false },
    };
    vm.set_memslot(&task, &region).expect("flags");
    assert_eq!(vm.mmu().leaf_pages(), [512, 1, 0]);
    assert_eq!(normal.access(GuestAccess::write(9)).expect("mapped"), AccessOutcome::Walk);
    assert_eq!(smm.access(GuestAccess::write(9)).expect("mapped"), AccessOutcome::FastFault);
    normal.leave();
    smm.leave();
    assert_eq!(vm.take_dirty_log(&task, 1, 0).expect("logs"), [9]);
    drop((normal, smm));
    assert_clean(&vm);
}

#[test]
fn a_halted_vcpu_holds_up_no_fast_zap_and_runs_on_no_stale_root_afterwards() {
    for design in sound() {
        let (vm, task) = vm(design, 1);
        vm.add_memory(&task, 0, 1024, 1).expect("memory");
        thread::scope(|scope| {
            let vm = &vm;
            let (sender, woken) = mpsc::channel();
            scope.spawn(move || {
                let mut vcpu = vm.vcpu(0).expect("free");
                for gfn in [1, 2, 700] {
                    vcpu.access(GuestAccess::write(gfn)).expect("mapped");
                }
                let (root, loads) = (vcpu.current_root().expect("loaded"), vcpu.stats().loads);
                assert!(vcpu.halt(None));
                // Not yet in the guest, the requests not serviced: whoever faults under what it holds must be sent back.
                let stale = vm.mmu().is_obsolete(root);
                let early = vcpu.fault(GuestAccess::write(1), false).expect("memory");
                let outcome = vcpu.access(GuestAccess::write(1)).expect("memory");
                sender.send((root, stale, early, outcome, vcpu.stats().loads - loads)).expect("main waits");
                vcpu.leave();
            });
            let state = vm.vcpu_state(0).expect("there");
            while !state.halted() {
                thread::yield_now();
            }
            let times = vm.fast_zap(&task).expect("returns although the request is not serviced");
            assert_eq!(times.kicked, 0, "{design}");
            assert!(state.halted() && state.is_requested::<Real>(FREE_OBSOLETE_ROOTS | RELOAD), "{design}");
            assert_eq!(vm.mmu().leaf_pages(), [0, 0, 0], "{design}: zapped under the halted vCPU");
            assert_eq!(vm.sptes_under_obsolete_roots(&task), 0, "{design}");
            vm.wake(0);
            let (root, stale, early, outcome, loads) = woken.recv().expect("the vCPU sends");
            if stale {
                assert_eq!(early, tdpmmu_vm::FaultOutcome::Retry, "{design}");
                assert!(!vm.mmu().valid_roots(&task).contains(&root), "{design}: off the list or invalid");
                assert_eq!((outcome, loads), (AccessOutcome::SlowFault, 1), "{design}");
            }
            assert_eq!(vm.mmu().leaf_pages(), [1, 0, 0], "{design}");
        });
        assert_clean(&vm);
    }
}
