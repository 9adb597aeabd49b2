//! The pool refuses at every allocation in turn: nothing leaks, no subtree is left half-built, and the retry succeeds.

mod common;

use common::{Cpu, Setup, World, frame_of, page_fault, template};
use tdpmmu_mmu::{BulkError, BulkMap, DESIGNS, MapOutcome};
use tdpmmu_spte::geometry::span;
use tdpmmu_table::PoolError;

/// Takes pages until `left` are left, and gives them back one at a time.
struct Hog {
    pages: Vec<u32>,
}

impl Hog {
    fn leave(world: &World, left: u64) -> Self {
        let pool = world.mmu.pool();
        let mut pages = Vec::new();
        while pool.cap() - pool.stats().taken > left {
            pages.push(pool.alloc_run(1).expect("not at the cap yet"));
        }
        Self { pages }
    }

    fn give(&mut self, world: &World) -> bool {
        self.pages.pop().map(|page| world.mmu.pool().free_unpublished(page)).is_some()
    }

    fn end(mut self, world: &World) {
        while self.give(world) {}
    }
}

#[derive(Clone, Debug)]
enum Work {
    Fault(u64, u8),
    Bulk(std::ops::Range<u64>),
}

fn work() -> Vec<Work> {
    vec![
        Work::Fault(3, 1),
        Work::Fault(span(2), 2),
        // Splits the huge leaf (or zaps it, before 6.2).
        Work::Fault(span(2) + 7, 1),
        Work::Fault(300 * span(4), 1),
        Work::Fault(span(3) + 5 * span(2), 1),
        Work::Bulk(2 * span(3) + 100..2 * span(3) + 4 * span(2) + 9),
        Work::Bulk(5 * span(3)..5 * span(3) + 3 * span(2)),
        Work::Fault(9 * span(4) + span(3), 2),
    ]
}

/// One piece of work; false when the pool refused.
fn attempt(world: &World, cpu: &mut Cpu, work: &Work) -> bool {
    match work {
        Work::Fault(gfn, level) => match cpu.fault(&page_fault(0, *gfn, *level, true)) {
            Ok(MapOutcome::Fixed { .. } | MapOutcome::Spurious) => true,
            Ok(other) => panic!("{work:?}: {other:?}"),
            Err(PoolError::Exhausted { in_use, cap, .. }) => {
                assert!(in_use <= cap);
                false
            }
            Err(error) => panic!("{error}"),
        },
        Work::Bulk(gfns) => {
            let map = BulkMap {
                gfns: gfns.clone(),
                first_pfn: frame_of(gfns.start),
                level: 1,
                template: template(&world.mmu, 1, false),
            };
            match cpu.bulk(&map) {
                Ok(_) => true,
                Err(BulkError::Pool(PoolError::Exhausted { .. })) => false,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

#[test]
fn refusal_at_every_allocation_leaks_nothing_and_the_retry_succeeds() {
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        for profile in ["5.15", "6.1", "6.12"] {
            let mut refusals_at = Vec::new();
            for left in 0..40 {
                let setup = Setup { profile, design: design.name, max_tables: 200, ..Setup::default() };
                let world = setup.build();
                let task = world.task();
                let mut hog = Hog::leave(&world, left);
                let mut cpu = Cpu::new(&world, 0);
                let mut refused = 0;
                for work in work() {
                    while !attempt(&world, &mut cpu, &work) {
                        refused += 1;
                        assert!(refused < 200, "{work:?} never succeeds");
                        world.check(&task, "after a refusal");
                        assert!(hog.give(&world), "{work:?} wants more than the whole pool");
                    }
                    world.check(&task, "after success");
                }
                refusals_at.push(refused);
                for gfn in [3, span(2) + 7, 300 * span(4), 2 * span(3) + 100, 5 * span(3) + 700] {
                    let root = cpu.root.expect("loaded");
                    assert!(world.mmu.lookup(&task, root, gfn).is_some(), "{gfn:#x}");
                }
                // Under the cap a fast zap needs no table at all.
                world.fast_zap(&task);
                world.check(&task, "after the zap");
                cpu.close();
                hog.end(&world);
                drop(task);
                world.end();
            }
            assert!(refusals_at[0] > 10, "{refusals_at:?}: the cap was hardly met");
            assert_eq!(refusals_at.last(), Some(&0), "{refusals_at:?}: at the end everything fits");
        }
    }
}

#[test]
fn a_refused_root_is_nobodys() {
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        let world = Setup { design: design.name, max_tables: 64, ..Setup::default() }.build();
        let mut hog = Hog::leave(&world, 0);
        let mut cpu = Cpu::new(&world, 1);
        let task = world.task();
        assert!(matches!(cpu.load(), Err(PoolError::Exhausted { cap: 64, .. })));
        assert_eq!(cpu.root, None);
        world.check(&task, "after the refusal");
        for _ in 0..world.mmu.fault_tables() {
            assert!(hog.give(&world));
        }
        cpu.load().expect("room again");
        cpu.close();
        hog.end(&world);
        drop(task);
        world.end();
    }
}

#[test]
fn tables_come_back_after_a_zap_and_serve_again() {
    for design in DESIGNS.iter().filter(|d| !d.flawed) {
        let world = Setup { design: design.name, max_tables: 60, ..Setup::default() }.build();
        let task = world.task();
        let mut cpu = Cpu::new(&world, 0);
        for round in 0..6 {
            let mut mapped = 0;
            // One top-level slot each: three tables a fault.
            for slot in 0..512 {
                match cpu.touch(slot * span(4) + round, 1, true) {
                    Ok(_) => mapped += 1,
                    Err(PoolError::Exhausted { .. }) => break,
                    Err(error) => panic!("{error}"),
                }
            }
            assert!((12..60).contains(&mapped), "round {round}: {mapped}");
            world.check(&task, "full");
            world.fast_zap(&task);
            cpu.drop_root();
            world.settle(&task);
            world.check(&task, "empty");
        }
        cpu.close();
        drop(task);
        world.end();
    }
}
