//! Whole VMs with the judge listening: guests in both address spaces beside a host that takes pages away and maps larger ones, logging that
//! comes and goes, and memslot updates.

#[path = "common/dice.rs"]
mod dice;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use dice::Dice;
use tdpmmu_mmu::DESIGNS;
use tdpmmu_oracle::{Check, Judge, Rules};
use tdpmmu_platform::{Observer, Preempt, Real, Role, TaskConfig};
use tdpmmu_spte::{EagerSplit, KernelProfile};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Region, SlotFlags, Vm, VmConfig};

const PAGES: u64 = 4 * 512;

fn judged(profile: &str, design: &str, force_yield: Option<u32>, batch: u16) -> (Vm<Real>, Arc<Judge>) {
    let profile = KernelProfile::named(profile).expect("known");
    let mut config = VmConfig {
        design: Some(design.into()),
        vcpus: 3,
        max_tables: 4096,
        hugepages: false,
        host_pages: 1 << 22,
        check_frames: true,
        batch,
        workers: 2,
        task: TaskConfig { preempt: Preempt::Full, force_yield, ..TaskConfig::default() },
        ..VmConfig::new(profile)
    };
    // Everything that can be judged on real threads.
    let rules = Rules::of(&profile, config.format.with_maxphyaddr(config.maxphyaddr), design);
    let judge = Judge::new(rules.on::<Real>().check(Check::Full));
    let observer: Arc<dyn Observer> = judge.clone();
    config.observer = Some(observer);
    (Vm::new(config).expect("a small VM"), judge)
}

fn assert_clean(judge: &Judge, when: &str) {
    let found = judge.violations();
    let text = found.iter().take(8).map(ToString::to_string).collect::<Vec<_>>().join("\n");
    assert!(found.is_empty(), "{when}: {} violations, first:\n{text}", judge.count());
}

fn guest(vm: &Vm<Real>, id: usize, steps: &AtomicU64) {
    let mut vcpu = vm.vcpu(id).expect("free");
    let mut dice = Dice(0x9e37_79b9 + id as u64);
    loop {
        let access = GuestAccess { gfn: dice.roll(PAGES), write: dice.roll(2) == 0, exec: false };
        if vcpu.access(access).expect("memory is there") == AccessOutcome::Stopped {
            return;
        }
        match dice.roll(400) {
            // The third is the one that firmware interrupts.
            0 if id == 2 && vcpu.in_smm() => vcpu.exit_smm(),
            0 if id == 2 => vcpu.enter_smm(),
            1 => {
                vcpu.drop_root().expect("a page");
            }
            2..=9 => {
                vcpu.speculate(dice.roll(PAGES));
            }
            _ => {}
        }
        steps.fetch_add(1, Ordering::Relaxed);
    }
}

/// Returns how often a huge page went when logging began: chance in one run, not in all.
fn run(profile: &str, design: &str, force_yield: Option<u32>, batch: u16) -> u64 {
    let what = format!("{profile} {design} {force_yield:?} {batch}");
    let (vm, judge) = judged(profile, design, force_yield, batch);
    let task = vm.task("vmm", Role::Caller);
    let hva = vm.side().primary.region(PAGES, 0, 2, true).expect("room");
    let plain = Region { id: 0, as_id: 0, base: 0, pages: PAGES, hva, flags: SlotFlags::default() };
    let logging = Region { flags: SlotFlags { log_dirty: true, readonly: false }, ..plain };
    vm.set_memslot(&task, &plain).expect("room");
    vm.share_memory_with_smm(&task).expect("room");
    let (over, steps, promoted) = (AtomicBool::new(false), AtomicU64::new(0), AtomicU64::new(0));
    let (mut split, mut dirty) = (0, 0);
    std::thread::scope(|scope| {
        let (vm, over, steps, promoted) = (&vm, &over, &steps, &promoted);
        for id in 0..3 {
            scope.spawn(move || guest(vm, id, steps));
        }
        scope.spawn(move || {
            let task = vm.task("host", Role::Caller);
            let mut dice = Dice(5);
            while !over.load(Ordering::Acquire) {
                let gfn = dice.roll(PAGES - 40);
                if dice.roll(3) == 0 {
                    let piece = gfn / 512 * 512;
                    promoted.fetch_add(
                        vm.promote_gfns(&task, piece..piece + 512, 2).expect("open"),
                        Ordering::Relaxed,
                    );
                } else {
                    vm.unmap_gfns(&task, gfn..gfn + 1 + dice.roll(30), true).expect("open");
                }
                std::thread::yield_now();
            }
        });
        let progress = |n: u64| {
            let until = steps.load(Ordering::Relaxed) + n;
            while steps.load(Ordering::Relaxed) < until {
                std::thread::yield_now();
            }
        };
        for round in 0..6 {
            progress(200);
            let huge = vm.mmu().leaf_pages()[1];
            vm.set_memslot(&task, &logging).expect("flags");
            split += u64::from(huge > vm.mmu().leaf_pages()[1]);
            for _ in 0..2 {
                progress(100);
                dirty += vm.take_dirty_log(&task, 0, 0).expect("logs").len();
            }
            if round % 3 == 0 {
                vm.fast_zap(&task).expect("open");
            }
            vm.set_memslot(&task, &plain).expect("flags");
            if round % 4 == 3 {
                vm.delete_memslot(&task, 1, 0).expect("there");
                vm.share_memory_with_smm(&task).expect("room");
            }
        }
        over.store(true, Ordering::Release);
        vm.stop_vcpus(&task);
    });
    vm.resume();
    assert!(dirty > 0 && promoted.load(Ordering::Relaxed) > 0, "{what}: {dirty} dirty");
    vm.mmu().design().quiesce();
    judge.check_quiet(vm.mmu(), &task);
    assert_clean(&judge, &what);
    let report = vm.close().expect("no handle");
    assert!(report.is_clean(), "{what}: {report:?} {:?}", vm.side().primary.frames().violations());
    judge.finish(vm.mmu(), &task);
    assert_clean(&judge, &what);
    split
}

#[test]
fn guests_in_two_spaces_beside_a_restless_host_and_logging_break_no_rule_in_any_design() {
    let mut split = 0;
    for design in DESIGNS.iter().filter(|design| !design.flawed) {
        for (force_yield, batch) in [(None, 512), (Some(2), 7)] {
            split += run("6.12", design.name, force_yield, batch);
        }
    }
    assert!(split > 0, "no huge page ever went when logging began");
}

#[test]
fn and_under_no_kernel_that_splits() {
    for (profile, design) in
        [("5.18", "async-worker"), ("6.1-async", "async-worker"), ("6.1", "sync"), ("7.2", "sync")]
    {
        assert_ne!(KernelProfile::named(profile).expect("known").eager_split, EagerSplit::None);
        run(profile, design, Some(3), 512);
    }
}
