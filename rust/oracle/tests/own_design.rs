//! A zap design from outside the engine, whole, in a VM with guests, a restless host and the judge: what `docs/designs.md` explains.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tdpmmu_mmu::{DesignInfo, Held, Obligations, OtherOwnership, TdpMmu, Yield, ZapDesign, design};
use tdpmmu_oracle::{Judge, Rules};
use tdpmmu_platform::{Exclusive, Guard, Owner, Platform, Real, Role, Task};
use tdpmmu_spte::{KernelProfile, Ownership};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Vm, VmConfig};

// ---- the design: begin ----

/// `deferred`: nobody zaps a root when it is lost; the next fast zap does, or the end of the VM. No vCPU is blocked, no worker
/// runs, and memory waits.
#[derive(Default)]
struct Deferred {
    owed: Mutex<Vec<u32>>,
}

impl Deferred {
    /// The root is invalid and carries one [`Owner::Work`] reference: it is zapped and put once, by whoever takes it from the list.
    fn owe<P: Platform>(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32) {
        mmu.note_scheduled(task, root);
        self.owed.lock().unwrap_or_else(PoisonError::into_inner).push(root);
    }
}

impl<P: Platform> ZapDesign<P> for Deferred {
    fn name(&self) -> &'static str {
        "deferred"
    }

    fn last_put(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, _held: Held<'_, '_, P>) {
        if mmu.invalidate_root(task, root) {
            mmu.rearm_root(task, root);
            self.owe(mmu, task, root);
        } else {
            mmu.retire_root(task, root);
        }
    }

    fn invalidate(&self, mmu: &TdpMmu<P>, guard: &mut Guard<'_, P, Exclusive>) {
        let task = guard.task();
        for root in mmu.listed_roots() {
            if !mmu.is_obsolete(root) && mmu.get_root(task, root, Owner::Work) {
                mmu.invalidate_root(task, root);
                self.owe(mmu, task, root);
            }
        }
    }

    fn finish(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        loop {
            let next = self.owed.lock().unwrap_or_else(PoisonError::into_inner).pop();
            let Some(root) = next else { return };
            let mut guard = mmu.lock.read(task);
            mmu.zap_root(&mut guard, root, Yield::Allowed);
            mmu.put_root(task, root, Owner::Work, Held::Shared(&mut guard));
        }
    }

    fn drain(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.finish(mmu, task);
    }
}

const DEFERRED: DesignInfo = DesignInfo {
    name: "deferred",
    mainline: "none",
    summary: "the next fast zap zaps what was lost",
    passes: None,
    ownership: Ownership::Vcpu,
    other_ownership: OtherOwnership::Refused("a last put is what makes a root wait"),
    needs_stale_root_check: true,
    queue: None,
    obligations: Obligations::STRICT,
    flawed: false,
};

fn register() {
    // Once in a process; the second test that comes here finds it there.
    let _ = design::register::<Real>(DEFERRED, |_| Arc::<Deferred>::default());
}

// ---- the design: end ----

fn judged() -> (Vm<Real>, Arc<Judge>) {
    register();
    let profile = KernelProfile::named("6.12").expect("known");
    let config = VmConfig {
        design: Some("deferred".into()),
        vcpus: 2,
        max_tables: 20_000,
        hugepages: false,
        check_frames: true,
        ..VmConfig::new(profile)
    };
    let judge = Judge::new(Rules::of(&profile, config.format.with_maxphyaddr(config.maxphyaddr), "deferred"));
    let vm = Vm::new(VmConfig { observer: Some(judge.clone()), ..config }).expect("a small VM");
    (vm, judge)
}

fn end(vm: &Vm<Real>, judge: &Judge, task: Task<Real>) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
    judge.finish(vm.mmu(), &task);
    assert!(judge.violations().is_empty(), "{:#?}", judge.violations());
    assert!(judge.events() > 0);
}

#[test]
fn the_design_itself_is_under_80_lines() {
    let text = include_str!("own_design.rs");
    let inside = text.lines().skip_while(|line| !line.contains("design: begin")).skip(1);
    let lines =
        inside.take_while(|line| !line.contains("design: end")).filter(|line| !line.trim().is_empty());
    let count = lines.count();
    assert!((40..80).contains(&count), "{count}");
}

#[test]
fn a_lost_root_waits_for_the_next_fast_zap() {
    let (vm, judge) = judged();
    let task = vm.task("vmm", Role::Caller);
    vm.add_memory(&task, 0, 4096, 1).expect("memory");
    let mut vcpu = vm.vcpu(0).expect("free");
    for lost in 0..3 {
        assert_eq!(vcpu.access(GuestAccess::write(5)), Ok(AccessOutcome::SlowFault));
        assert_eq!(vm.mmu().leaf_pages()[0], 1 + lost);
        vcpu.drop_root().expect("a page");
    }
    vcpu.leave();
    vm.fast_zap(&task).expect("open");
    assert_eq!(vm.mmu().leaf_pages()[0], 0);
    assert_eq!(vcpu.access(GuestAccess::write(5)), Ok(AccessOutcome::SlowFault));
    vcpu.drop_root().expect("a page");
    drop(vcpu);
    end(&vm, &judge, task);
}

#[test]
fn guests_that_race_with_fast_zaps_and_a_restless_host_break_no_rule() {
    let (vm, judge) = judged();
    let task = vm.task("vmm", Role::Caller);
    let pages = 2048;
    vm.add_memory(&task, 0, pages, 2).expect("memory");
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (vm, over) = (&vm, &over);
        for id in 0..2 {
            scope.spawn(move || {
                let mut vcpu = vm.vcpu(id).expect("free");
                for n in 0u64.. {
                    if over.load(Ordering::Acquire) {
                        return;
                    }
                    vcpu.access(GuestAccess::write(n * 37 % pages)).expect("memory");
                    if n.is_multiple_of(61) {
                        vcpu.drop_root().expect("a page");
                    }
                }
            });
        }
        for n in 0..60 {
            vm.fast_zap(&task).expect("open");
            vm.unmap_gfns(&task, n * 16..n * 16 + 40, true).expect("memory");
            if n.is_multiple_of(10) {
                judge.check_locked(vm.mmu(), &vm.mmu().lock.write(&task));
            }
        }
        over.store(true, Ordering::Release);
    });
    end(&vm, &judge, task);
}
