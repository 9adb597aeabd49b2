//! Where a fast zap's time went, by design. No timing assertions: only what must add up.

use tdpmmu_mmu::DESIGNS;
use tdpmmu_platform::{Real, Role as TaskRole, TaskConfig};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{FastZapTimes, GuestAccess, Vm, VmConfig};

fn zap(design: &str, force_yield: Option<u32>) -> (FastZapTimes, u64) {
    let vm = Vm::<Real>::new(VmConfig {
        design: Some(design.into()),
        max_tables: 4_000,
        hugepages: false,
        host_pages: 1 << 22,
        ..VmConfig::new(KernelProfile::named("6.12").expect("known"))
    })
    .expect("a small VM");
    let task = vm.task_with("vmm", TaskRole::Caller, TaskConfig { force_yield, ..TaskConfig::default() });
    vm.add_memory(&task, 0, 64 * 512, 1).expect("memory");
    {
        let mut vcpu = vm.vcpu(0).expect("free");
        for n in 0..64 {
            vcpu.access(GuestAccess::write(n * 512 + n)).expect("memory");
        }
    }
    // Holds before the request are not the request's.
    drop(vm.mmu().lock.write(&task));
    let yields = task.meter().yields.get();
    let times = vm.fast_zap(&task).expect("open");
    let broken = task.meter().yields.get() - yields;
    assert_eq!(vm.mmu().leaf_pages(), [0, 0, 0], "{design}");
    assert!(vm.close().expect("no handle").is_clean(), "{design}");
    (times, broken)
}

#[test]
fn the_exclusive_holds_of_a_fast_zap_are_told_apart() {
    for design in DESIGNS.iter().filter(|design| !design.flawed) {
        for force_yield in [None, Some(1)] {
            let (times, yields) = zap(design.name, force_yield);
            let what = format!("{} {force_yield:?} {times:?}", design.name);
            assert!(times.exclusive_hold_ns <= times.exclusive_longest_ns, "{what}");
            assert!(times.exclusive_longest_ns <= times.exclusive_total_ns, "{what}");
            assert!(times.exclusive_total_ns <= times.total_ns, "{what}");
            if design.obligations.keeps_roots {
                // It zaps under the exclusive lock, and breaks it.
                assert_eq!(times.exclusive_holds, 1 + yields, "{what}");
                assert_eq!(times.exclusive_holds > 1, force_yield.is_some(), "{what}");
            } else {
                assert_eq!(times.exclusive_holds, 1, "{what}: the rest is done shared");
                assert_eq!(times.exclusive_hold_ns, times.exclusive_total_ns, "{what}");
            }
        }
    }
}
