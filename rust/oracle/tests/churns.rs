//! Slot churn: a memslot that comes and goes a hundred times under running guests leaves nothing behind that tells which design tore it down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use tdpmmu_mmu::{Counts, DESIGNS};
use tdpmmu_oracle::{Judge, Rules};
use tdpmmu_platform::{Observer, Preempt, Real, Role, TaskConfig};
use tdpmmu_spte::KernelProfile;
use tdpmmu_vm::{AccessOutcome, GuestAccess, Region, SlotFlags, SlotUpdate, Vm, VmConfig};

const CHURNS: u64 = 100;
const VCPUS: usize = 2;
/// Memory that stays: a leaf table of 4 KiB pages, then three pages of 2 MiB.
const SMALL: std::ops::Range<u64> = 0..512;
const LARGE: std::ops::Range<u64> = 512..4 * 512;
/// The slot that comes and goes, in another GiB: a table more at level 2 and at level 1.
const CHURNED: std::ops::Range<u64> = (1 << 18)..(1 << 18) + 512;

/// What is there when every page has been touched: the same whoever tore down what was there before.
fn expected() -> Counts {
    Counts {
        leaves: [0, 1024, 3, 0, 0, 0],
        // Two leaf tables, a level-2 table for each GiB, one of level 3, and the root.
        tables: [0, 2, 2, 1, 1, 0],
        others: 0,
    }
}

fn pages() -> impl Iterator<Item = u64> {
    SMALL.chain(LARGE).chain(CHURNED)
}

/// Touches pages of all slots in an order of its own until `over`, then every page once.
fn guest(vm: &Vm<Real>, id: usize, over: &AtomicBool, steps: &AtomicU64) {
    let mut vcpu = vm.vcpu(id).expect("free");
    let all: Vec<_> = pages().collect();
    let mut at = 0x9e37_79b9_7f4a_7c15 ^ id as u64;
    while !over.load(Ordering::Acquire) {
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        // Every other access goes to the slot that comes and goes: where it is gone, the access is emulated.
        let from = if at >> 63 == 0 { &all[..] } else { &all[all.len() - 512..] };
        let gfn = from[(at >> 33) as usize % from.len()];
        vcpu.access(GuestAccess { gfn, write: at >> 32 & 1 == 0, exec: false }).expect("room for tables");
        steps.fetch_add(1, Ordering::Relaxed);
    }
    for gfn in all {
        let outcome = vcpu.access(GuestAccess::write(gfn)).expect("room for tables");
        assert!(!matches!(outcome, AccessOutcome::Emulate | AccessOutcome::Stopped), "{gfn:#x}: {outcome:?}");
    }
    assert!(
        vcpu.stats().loads >= 1 && vcpu.stats().emulated > 0,
        "the guest met a gone slot: {:?}",
        vcpu.stats()
    );
}

struct End {
    counts: Counts,
    listed: usize,
    zaps: u64,
}

fn churn(design: &str, force_yield: Option<u32>) -> End {
    let profile = KernelProfile::named("6.12").expect("known");
    let mut config = VmConfig {
        design: Some(design.into()),
        vcpus: VCPUS,
        max_tables: 4096,
        hugepages: false,
        host_pages: 1 << 20,
        check_frames: true,
        batch: if force_yield.is_some() { 7 } else { 512 },
        workers: 2,
        task: TaskConfig { preempt: Preempt::Full, force_yield, ..TaskConfig::default() },
        ..VmConfig::new(profile)
    };
    let judge = Judge::new(Rules::of(&profile, config.format.with_maxphyaddr(config.maxphyaddr), design));
    config.observer = Some(Arc::clone(&judge) as Arc<dyn Observer>);
    let vm = Vm::<Real>::new(config).expect("a small VM");
    let task = vm.task("vmm", Role::Caller);
    let region = |id, gfns: &std::ops::Range<u64>, level| {
        let pages = gfns.end - gfns.start;
        let hva = vm.side().primary.region(pages, gfns.start, level, true).expect("room");
        Region { id, as_id: 0, base: gfns.start, pages, hva, flags: SlotFlags::default() }
    };
    let churned = region(2, &CHURNED, 1);
    for stays in [region(0, &SMALL, 1), region(1, &LARGE, 2)] {
        vm.set_memslot(&task, &stays).expect("room");
    }

    let (over, steps) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; VCPUS]);
    let mut zaps = 0;
    thread::scope(|scope| {
        let (vm, over, steps) = (&vm, &over, &steps);
        let guests: Vec<_> =
            (0..VCPUS).map(|id| scope.spawn(move || guest(vm, id, over, &steps[id]))).collect();
        // One guest or `all` of them have made some accesses since.
        let progress = |all: bool| {
            let from: Vec<_> = steps.iter().map(|own| own.load(Ordering::Relaxed)).collect();
            let moved = |(own, from): (&AtomicU64, &u64)| own.load(Ordering::Relaxed) >= from + 20;
            while if all { !steps.iter().zip(&from).all(moved) } else { !steps.iter().zip(&from).any(moved) }
            {
                // A guest that died cannot be waited for; the scope tells why.
                assert!(!guests.iter().any(thread::ScopedJoinHandle::is_finished), "a guest has ended");
                thread::sleep(Duration::from_micros(20));
            }
        };
        for n in 0..CHURNS {
            assert_eq!(vm.set_memslot(&task, &churned), Ok(SlotUpdate::Created));
            progress(false);
            vm.delete_memslot(&task, 0, churned.id).expect("there");
            zaps += 1;
            // None sleeps through all of it.
            progress(n % 25 == 0);
        }
        assert_eq!(vm.set_memslot(&task, &churned), Ok(SlotUpdate::Created));
        over.store(true, Ordering::Release);
    });

    vm.mmu().design().quiesce();
    judge.check_quiet(vm.mmu(), &task);
    let counts = vm.mmu().count_all(&task);
    let listed = {
        let _rcu = task.rcu_read();
        vm.mmu().listed_roots().count()
    };
    let what = format!("{design}, yielding {force_yield:?}");
    assert_eq!(vm.mmu().valid_roots(&task).len(), listed, "{what}: nobody holds an old root");
    assert_eq!(vm.mmu().violations(), Vec::<String>::new(), "{what}");
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{what}: {report:?} {:?}", vm.side().primary.frames().violations());
    judge.finish(vm.mmu(), &task);
    let found = judge.violations();
    assert!(found.is_empty(), "{what}: {} violations, first: {:?}", judge.count(), found.first());
    assert!(judge.events() > 0, "{what}: the judge heard nothing");
    End { counts, listed, zaps }
}

#[test]
fn a_hundred_slot_churns_end_alike_in_every_design() {
    for design in DESIGNS.iter().filter(|design| !design.flawed) {
        for force_yield in [None, Some(2)] {
            let end = churn(design.name, force_yield);
            assert_eq!(end.zaps, CHURNS);
            assert_eq!((end.counts, end.listed), (expected(), 1), "{}", design.name);
        }
    }
}
