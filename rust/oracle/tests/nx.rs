//! The judge beside the NX mitigation and aging: recovery, fetches, data faults, write protection and fast zaps at once leave one history per entry.

mod common;
#[path = "common/dice.rs"]
mod dice;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Cpu, Setup, World, frame_of};
use dice::Dice;
use tdpmmu_mmu::MapFault;
use tdpmmu_platform::Role;
use tdpmmu_spte::FormatKind;

const REGIONS: u64 = 8;
const STEPS: u64 = 3000;

fn guest(world: &World, id: u64) {
    let mut dice = Dice(0x9e37_79b9 * (id + 1));
    let mut cpu = Cpu::new(world, 0);
    for _ in 0..STEPS {
        if cpu.is_stale() {
            cpu.drop_root();
        }
        let gfn = dice.roll(REGIONS) * 512 + dice.roll(512);
        match dice.roll(4) {
            0 => {
                let page = MapFault::page(gfn, frame_of(gfn), 1);
                let fetch =
                    MapFault { write: false, exec: true, req_level: 2, huge_page_disallowed: true, ..page };
                let _ = cpu.fault(&fetch).expect("room for tables");
            }
            1 => {
                cpu.fast_fault(gfn, true);
            }
            2 => cpu.access(gfn, 2, true),
            _ => cpu.access(gfn, 1, dice.roll(2) == 0),
        }
    }
    cpu.close();
}

fn storm(setup: &Setup) {
    let world = setup.build();
    world.mmu.set_nx_huge_pages(true);
    let (over, recovered) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let guests: Vec<_> = (0..2)
            .map(|id| {
                let world = &world;
                scope.spawn(move || guest(world, id))
            })
            .collect();
        scope.spawn(|| {
            let task = world.mmu.task("kvm-nx-lpage-re", Role::Worker);
            while !over.load(Ordering::Relaxed) {
                let some = world.mmu.nx_splits().div_ceil(2);
                recovered.fetch_add(world.mmu.recover_nx(&task, some, &|_, _| false), Ordering::Relaxed);
                std::thread::yield_now();
            }
        });
        scope.spawn(|| {
            let task = world.task();
            let mut dice = Dice(99);
            while !over.load(Ordering::Relaxed) {
                let at = dice.roll(REGIONS) * 512;
                match dice.roll(12) {
                    0 => world.fast_zap(&task),
                    1..=3 => world.unmap(&task, 0, at + 100..at + 300),
                    4..=7 => {
                        world.mmu.write_protect(&task, 0, at..at + 512, 1);
                    }
                    _ => {
                        world.mmu.age(&task, 0, at..at + 700);
                    }
                }
                std::thread::yield_now();
            }
        });
        let ends: Vec<_> = guests.into_iter().map(|guest| guest.join()).collect();
        over.store(true, Ordering::Relaxed);
        assert!(ends.iter().all(|end| end.is_ok()), "a guest failed");
    });
    let task = world.task();
    world.settle(&task);
    world.check(&task, "at rest");
    world.fast_zap(&task);
    world.settle(&task);
    assert_eq!(world.mmu.nx_candidates(), []);
    world.check(&task, "after the last zap");
    drop(task);
    world.end();
}

#[test]
fn nx_recovery_and_aging_leave_no_contradiction_in_any_kernel() {
    for (profile, design) in [
        ("5.18", "async-worker"),
        ("6.1", "sync"),
        ("6.6", "sync"),
        ("6.9", "sync"),
        ("6.12", "sync"),
        ("6.18", "sync"),
        ("7.2", "sync"),
    ] {
        for kind in [FormatKind::Npt, FormatKind::Ept] {
            storm(&Setup { profile, kind, design, batch: 7, force_yield: Some(3), ..Setup::default() });
        }
    }
}
