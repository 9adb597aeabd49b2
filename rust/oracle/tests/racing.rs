//! Threads that race for one tree, with the judge listening and sampling: faults of all sizes, bulk population and the fast page fault
//! against fast zaps, unmaps, dropped roots, in two address spaces.

mod common;
#[path = "common/dice.rs"]
mod dice;

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::{Cpu, Setup, World, frame_of, template};
use dice::Dice;
use tdpmmu_mmu::{BulkMap, DESIGNS, QueueKind, Which};
use tdpmmu_platform::Role;
use tdpmmu_spte::geometry::span;

impl Dice {
    fn gfn(&mut self) -> u64 {
        let base = [0, 0, span(3), 9 * span(4)][self.roll(4) as usize];
        base + self.roll(3) * span(2) + self.roll(512)
    }
}

struct Race {
    cpus: usize,
    steps: u64,
    /// Threads that do memslot updates and notifier unmaps.
    zappers: usize,
}

fn vcpu(world: &World, id: usize, steps: u64, done: &AtomicU64) {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15 ^ (id as u64 + 1));
    let mut cpu = Cpu::new(world, u8::from(id % 3 == 2));
    for _ in 0..steps {
        if cpu.is_stale() {
            cpu.drop_root();
        }
        let gfn = dice.gfn();
        match dice.roll(40) {
            0 => cpu.drop_root(),
            1..=3 => {
                let start = gfn & !(span(2) - 1);
                let map = BulkMap {
                    gfns: start..start + span(2) * (1 + dice.roll(2)),
                    first_pfn: frame_of(start),
                    level: 1,
                    template: template(&world.mmu, 1, dice.roll(2) == 0),
                };
                // A huge leaf may be in the way: refused, nothing lost.
                let _ = cpu.bulk(&map);
            }
            4..=9 => {
                cpu.fast_fault(gfn, true);
            }
            10..=13 => cpu.access(gfn, 2, true),
            14 => cpu.access(gfn, 3, false),
            _ => cpu.access(gfn, 1, dice.roll(2) == 0),
        }
        done.fetch_add(1, Ordering::Relaxed);
    }
    cpu.close();
}

fn race(setup: &Setup, race: &Race) -> World {
    let world = setup.build();
    let slots_lock = std::sync::Mutex::new(());
    let (begin, over, done) =
        (Barrier::new(race.cpus + race.zappers), AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let mut cpus = Vec::new();
        for id in 0..race.cpus {
            let (world, begin, done) = (&world, &begin, &done);
            cpus.push(scope.spawn(move || {
                begin.wait();
                vcpu(world, id, race.steps, done);
            }));
        }
        for id in 0..race.zappers {
            let (world, begin, over, slots_lock) = (&world, &begin, &over, &slots_lock);
            scope.spawn(move || {
                let mut dice = Dice(0xdead_beef + id as u64);
                let task = world.mmu.task("zapper", Role::Caller);
                begin.wait();
                while !over.load(Ordering::Acquire) {
                    match dice.roll(8) {
                        0..=2 => {
                            let _held = slots_lock.lock();
                            world.fast_zap(&task);
                        }
                        3..=6 => {
                            let gfn = dice.gfn();
                            world.unmap(&task, dice.roll(2) as u8, gfn..gfn + 1 + dice.roll(600));
                        }
                        // A sample in the middle of it all.
                        _ => {
                            let guard = world.mmu.lock.write(&task);
                            world.judge.check_locked(&world.mmu, &guard);
                        }
                    }
                }
            });
        }
        for cpu in cpus {
            cpu.join().expect("no vCPU panics");
        }
        over.store(true, Ordering::Release);
    });
    assert_eq!(done.load(Ordering::Relaxed), race.cpus as u64 * race.steps);
    world
}

#[test]
fn racing_faults_zaps_and_reloads_break_no_rule_in_any_design() {
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        for profile in ["5.15", "6.1-async", "6.1", "6.12", "7.2"] {
            for (batch, force_yield) in [(512, None), (7, Some(2))] {
                let setup = Setup {
                    profile,
                    design: design.name,
                    batch,
                    force_yield,
                    workers: 2,
                    ..Setup::default()
                };
                let world = race(&setup, &Race { cpus: 3, steps: 400, zappers: 1 });
                let task = world.task();
                world.settle(&task);
                world.check(&task, "after the race");
                drop(task);
                world.end();
            }
        }
    }
}

#[test]
fn racing_on_the_systems_queue_breaks_no_rule_in_any_design_with_workers() {
    for design in DESIGNS.iter().filter(|d| !d.flawed && d.queue.is_some()) {
        for force_yield in [None, Some(1)] {
            let setup = Setup {
                design: design.name,
                queue: Some(QueueKind::System),
                force_yield,
                workers: 3,
                ..Setup::default()
            };
            race(&setup, &Race { cpus: 3, steps: 400, zappers: 2 }).end();
        }
    }
}

#[test]
fn two_zappers_share_slots_lock_and_break_no_rule() {
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        let setup = Setup { design: design.name, force_yield: Some(1), workers: 2, ..Setup::default() };
        race(&setup, &Race { cpus: 2, steps: 600, zappers: 2 }).end();
    }
}

#[test]
fn a_pool_that_is_nearly_empty_makes_races_retry_and_not_leak() {
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        // Three caches of 16 and a few tables: exhaustion happens all the time, the zapper gives back. Where the host let the
        // vCPUs run one after the other it may not, and such a race shows nothing.
        let setup = Setup { design: design.name, max_tables: 80, ..Setup::default() };
        let met = (0..20).any(|_| {
            let world = race(&setup, &Race { cpus: 3, steps: 400, zappers: 1 });
            let hits = world.mmu.pool().stats().cap_hits;
            world.end();
            hits > 0
        });
        assert!(met, "{}: the cap was never met", design.name);
    }
}

#[test]
fn references_taken_beside_zaps_add_up() {
    // Walks over the root list beside loads, drops and fast zaps: the ledger counts each of them.
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        let setup = Setup { design: design.name, ..Setup::default() };
        let world = setup.build();
        let (over, seen) = (AtomicBool::new(false), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let (world, over, seen) = (&world, &over, &seen);
            scope.spawn(move || {
                let task = world.mmu.task("walker", Role::Caller);
                while !over.load(Ordering::Acquire) {
                    let mut guard = world.mmu.lock.read(&task);
                    world.mmu.for_each_root(&mut guard, Which::Valid, |guard, _| {
                        seen.fetch_add(1, Ordering::Relaxed);
                        guard.relock();
                    });
                }
            });
            let task = world.task();
            let mut cpu = Cpu::new(world, 0);
            let mut i = 0;
            // At least so many rounds, and some of them in company.
            while i < 400 || seen.load(Ordering::Relaxed) < 50 {
                cpu.access(i % 512, 1, true);
                if i.is_multiple_of(5) {
                    cpu.drop_root();
                }
                if i.is_multiple_of(7) {
                    world.fast_zap(&task);
                }
                i += 1;
            }
            over.store(true, Ordering::Release);
            cpu.close();
        });
        world.end();
    }
}
