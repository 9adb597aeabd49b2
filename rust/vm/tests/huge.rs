//! A huge page in the place of a table: the faulting vCPU tears the subtree down itself.

use tdpmmu_platform::{Phase, Real, Role as TaskRole, Task, TaskConfig};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{
    AccessOutcome, AdMix, BulkOptions, FaultOutcome, GuestAccess, Progress, Region, SlotFlags, Vm, VmConfig,
    VmError,
};

const GIG: u64 = 512 * 512;
/// Entry writes of a shared teardown of a GiB of 4 KiB tables, and of the leaf that replaces it.
const TEARDOWN: u64 = 1 + 512 + 512 * 512;

fn vm(profile: &str, vcpus: usize) -> (Vm<Real>, Task<Real>) {
    let vm = Vm::new(VmConfig {
        vcpus,
        max_tables: 20_000,
        hugepages: false,
        host_pages: 64 * GIG,
        check_frames: true,
        ..VmConfig::new(KernelProfile::named(profile).expect("known"))
    })
    .expect("a small VM");
    let task = vm.task("test", TaskRole::Caller);
    (vm, task)
}

fn populate(vm: &Vm<Real>, pages: u64) {
    let options = BulkOptions { level: 1, ad: AdMix::Dirty, threads: 1 };
    let mut vcpu = vm.vcpu(0).expect("free");
    assert_eq!(vm.populate_bulk(&mut vcpu, 0..pages, &options, &Progress::default()), Ok(pages));
}

fn assert_clean(vm: &Vm<Real>) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
}

#[test]
fn a_fault_after_the_host_has_grown_its_pages_tears_the_empty_tables_down() {
    for profile in ["6.1", "6.12", "7.2"] {
        let (vm, task) = vm(profile, 1);
        vm.add_memory(&task, 0, 2 * GIG, 1).expect("memory");
        populate(&vm, 2 * GIG);
        assert_eq!(vm.promote_gfns(&task, 0..2 * GIG - 1, 3), Ok(GIG), "the second GiB is not whole");
        assert_eq!(vm.mmu().leaf_pages(), [GIG as i64, 0, 0], "and neither changed nor announced");
        assert_eq!(vm.mmu().linked_tables(), 1 + 2 + 1024, "the tables stay");
        let mut vcpu = vm.vcpu(0).expect("free");
        let (writes, flushes) = (vcpu.task().meter().entry_writes.get(), vm.mmu().flushes());
        let outcome = vcpu.fault(GuestAccess::write(77), false).expect("memory");
        assert!(matches!(outcome, FaultOutcome::Fixed { level: 3, .. }), "{profile}: {outcome:?}");
        assert_eq!(
            vcpu.task().meter().entry_writes.get() - writes,
            TEARDOWN,
            "{profile}: by the vCPU itself"
        );
        assert_eq!(vm.mmu().flushes() - flushes, 1, "small translations may be cached");
        let left = (vm.mmu().leaf_pages(), vm.mmu().linked_tables());
        assert_eq!(left, ([GIG as i64, 0, 1], 1 + 1 + 512), "{profile}");
        assert_eq!(vcpu.access(GuestAccess::write(GIG + 3)).expect("mapped"), AccessOutcome::Walk);
        drop(vcpu);
        assert_clean(&vm);
    }
}

#[test]
fn a_fault_into_a_hole_of_a_table_of_live_leaves_replaces_them_all() {
    // The host has mapped 1 GiB pages all along; the guest's tables are of 4 KiB for another reason (logging that ended).
    let (vm, task) = vm("6.12", 2);
    vm.add_memory(&task, 0, GIG, 3).expect("memory");
    populate(&vm, GIG - 1);
    let mut other = vm.vcpu(1).expect("free");
    assert_eq!(other.access(GuestAccess::write(9)).expect("mapped"), AccessOutcome::Walk);
    let other_root = other.current_root().expect("loaded");
    other.leave();
    let dirtied = vm.side().primary.frames().stats().dirtied;
    let mut vcpu = vm.vcpu(0).expect("free");
    let writes = vcpu.task().meter().entry_writes.get();
    let outcome = vcpu.fault(GuestAccess::write(GIG - 1), false).expect("memory");
    assert!(matches!(outcome, FaultOutcome::Fixed { level: 3, .. }), "{outcome:?}");
    assert_eq!(vcpu.task().meter().entry_writes.get() - writes, TEARDOWN);
    assert_eq!((vm.mmu().leaf_pages(), vm.mmu().linked_tables()), ([0, 0, 1], 1));
    let written_back = vm.side().primary.frames().stats().dirtied - dirtied;
    assert_eq!(written_back, GIG - 1, "each leaf's Dirty reached its frame");
    assert_eq!(vm.mmu().valid_roots(&task), [other_root]);
    assert_eq!(other.access(GuestAccess::write(9)).expect("mapped"), AccessOutcome::Walk, "flushed");
    drop((vcpu, other));
    assert_clean(&vm);
}

#[test]
fn a_promotion_names_what_it_cannot_do() {
    let (vm, task) = vm("6.12", 1);
    vm.add_memory(&task, 0, GIG, 2).expect("memory");
    for level in [1, 4] {
        let error = vm.promote_gfns(&task, 0..GIG, level).expect_err("no such huge page");
        assert!(matches!(error, VmError::BadRange { .. }) && error.to_string().contains("1G (3)"), "{error}");
    }
    let error = vm.promote_gfns(&task, 0..GIG + 1, 2).expect_err("beyond the slot");
    assert!(matches!(error, VmError::BadRange { start: GIG, .. }), "{error}");
    assert_clean(&vm);
}

#[test]
fn the_table_of_an_eager_split_is_no_work_on_sptes() {
    let (vm, _) = vm("6.12", 1);
    let task = vm.task_with("vmm", TaskRole::Caller, TaskConfig { record: true, ..TaskConfig::default() });
    let hva = vm.side().primary.region(3 * 512, 0, 2, true).expect("room");
    let region = |log_dirty| {
        let flags = SlotFlags { log_dirty, ..SlotFlags::default() };
        Region { id: 0, as_id: 0, base: 0, pages: 3 * 512, hva, flags }
    };
    vm.set_memslot(&task, &region(false)).expect("memory");
    for piece in 0..3 {
        vm.vcpu(0).expect("free").access(GuestAccess::write(piece * 512)).expect("memory");
    }
    assert_eq!(vm.mmu().leaf_pages(), [0, 3, 0]);
    vm.set_memslot(&task, &region(true)).expect("the same memory");
    assert_eq!(vm.mmu().leaf_pages(), [3 * 512, 0, 0]);
    let recording = task.meter().take().recording.expect("asked for");
    let work = recording.slices.iter().filter(|slice| slice.phase == Phase::SpteWork).count();
    // The split, cut in two by each allocation of a table outside of the lock, and the write protection.
    assert_eq!(work, 1 + 3 + 1, "{:?}", recording.slices);
    assert_clean(&vm);
}
