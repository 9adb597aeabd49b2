//! Dirty logging with the judge listening: eager split and write protection, alone and beside faults, unmaps and zaps.

mod common;
#[path = "common/dice.rs"]
mod dice;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Barrier, Mutex};

use common::{Cpu, Setup, World, frame_of, page_fault, template};
use dice::Dice;
use tdpmmu_mmu::{BulkMap, FastOutcome, MapOutcome};
use tdpmmu_platform::{Preempt, Role, TaskConfig};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{EagerSplit, Spte};
use tdpmmu_table::PoolError;

/// Profiles that split, in both ways of taking a table; with and without hardware A/D.
const SPLITTERS: [&str; 5] = ["5.18", "6.1-async", "6.1", "6.12", "7.2"];

fn populated(world: &World, cpu: &mut Cpu, level: u8, leaves: u64) {
    let map = BulkMap {
        gfns: 0..leaves * span(level),
        first_pfn: frame_of(0),
        level,
        template: template(&world.mmu, level, false),
    };
    assert_eq!(cpu.bulk(&map), Ok(leaves));
}

fn leaves(world: &World, root: u32) -> Vec<(u64, u8, Spte)> {
    let mut all = Vec::new();
    world.mmu.leaves(&world.task(), root, 0..world.mmu.max_gfn(), &mut |gfn, level, spte| {
        all.push((gfn, level, spte));
    });
    all
}

#[test]
fn a_split_changes_the_size_of_leaves_and_nothing_else() {
    for profile in SPLITTERS {
        for force_yield in [None, Some(1)] {
            let world = Setup { profile, force_yield, ..Setup::default() }.build();
            let task = world.task();
            let mut cpu = Cpu::new(&world, 0);
            populated(&world, &mut cpu, 2, 3);
            let root = cpu.root.expect("loaded");
            let before = leaves(&world, root);
            let flushes = world.mmu.flushes();
            // The second leaf alone, then all.
            assert_eq!(world.mmu.split_huge_pages(&task, 0, span(2)..2 * span(2), 1), Ok(1));
            assert_eq!(world.mmu.leaf_pages(), [512, 2, 0]);
            world.check(&task, "one was split");
            assert_eq!(world.mmu.split_huge_pages(&task, 0, 0..3 * span(2), 1), Ok(2));
            assert_eq!(world.mmu.split_huge_pages(&task, 0, 0..3 * span(2), 1), Ok(0));
            let format = world.mmu.format();
            let expected: Vec<_> = before
                .iter()
                .flat_map(|&(gfn, level, huge)| {
                    (0..512).map(move |i| {
                        (gfn + i, level - 1, format.split_child(huge, level, i as usize, false))
                    })
                })
                .collect();
            assert_eq!(leaves(&world, root), expected, "{profile}");
            assert_eq!(world.mmu.flushes(), flushes, "the same translations: no flush");
            assert_eq!((world.mmu.leaf_pages(), world.mmu.linked_tables()), ([3 * 512, 0, 0], 2 + 3));
            world.check(&task, "all are split");
            cpu.close();
            drop(task);
            world.end();
        }
    }
}

#[test]
fn a_gibibyte_is_split_twice_and_only_in_its_own_address_space() {
    let world = Setup { force_yield: Some(2), ..Setup::default() }.build();
    let task = world.task();
    let (mut cpu, mut smm) = (Cpu::new(&world, 0), Cpu::new(&world, 1));
    populated(&world, &mut cpu, 3, 1);
    populated(&world, &mut smm, 2, 2);
    assert_eq!(world.mmu.split_huge_pages(&task, 0, 0..span(3), 2), Ok(1));
    assert_eq!(world.mmu.leaf_pages(), [0, 512 + 2, 0]);
    assert_eq!(world.mmu.split_huge_pages(&task, 0, 0..span(3), 1), Ok(512));
    assert_eq!(world.mmu.leaf_pages(), [512 * 512, 2, 0]);
    assert_eq!(world.mmu.write_protect(&task, 1, 0..span(3), 1), 2, "huge ones are protected as they are");
    world.check(&task, "split to the bottom");
    world.fast_zap(&task);
    assert_eq!(world.mmu.leaf_pages(), [0, 0, 0]);
    cpu.close();
    smm.close();
    drop(task);
    world.end();
}

#[test]
fn a_kernel_before_5_18_leaves_the_split_to_the_write_fault() {
    let world = Setup { profile: "5.15", design: "inline", ..Setup::default() }.build();
    assert_eq!(world.mmu.profile().eager_split, EagerSplit::None);
    let task = world.task();
    let mut cpu = Cpu::new(&world, 0);
    populated(&world, &mut cpu, 2, 2);
    assert_eq!(world.mmu.split_huge_pages(&task, 0, 0..2 * span(2), 1), Ok(0));
    assert_eq!(world.mmu.write_protect(&task, 0, 0..2 * span(2), 1), 2);
    let root = cpu.root.expect("loaded");
    let tracked = world.mmu.fast_page_fault(&cpu.task, root, 0, 7, true, false, true);
    assert_eq!(tracked, FastOutcome::Declined, "a huge page of a logging slot is never made writable");
    let fault = tdpmmu_mmu::MapFault { dirty_tracked: true, ..page_fault(0, 7, 1, true) };
    assert!(matches!(cpu.fault(&fault), Ok(MapOutcome::Fixed { level: 1, .. })));
    assert_eq!(world.mmu.leaf_pages(), [1, 1, 0], "zapped and linked, not split");
    world.check(&task, "after the fault");
    cpu.close();
    drop(task);
    world.end();
}

#[test]
fn protection_takes_w_and_leaves_the_rest_and_the_fast_fault_gives_it_back() {
    for profile in SPLITTERS {
        for batch in [512, 7, 1] {
            let world = Setup { profile, batch, force_yield: Some(3), ..Setup::default() }.build();
            let task = world.task();
            let mut cpu = Cpu::new(&world, 0);
            populated(&world, &mut cpu, 1, 1024);
            let root = cpu.root.expect("loaded");
            let before = leaves(&world, root);
            // From the middle of one table to the middle of the next.
            assert_eq!(world.mmu.write_protect(&task, 0, 100..700, 1), 600);
            assert_eq!(world.mmu.write_protect(&task, 0, 100..700, 1), 0);
            let format = *world.mmu.format();
            for (&(gfn, _, was), (_, _, is)) in before.iter().zip(leaves(&world, root)) {
                let expected = if (100..700).contains(&gfn) { format.without_write(was) } else { was };
                assert_eq!(is, expected, "{profile} gfn {gfn:#x}");
            }
            assert_eq!(cpu.fast_fault(650, true), FastOutcome::Fixed(before[650].2));
            assert_eq!(cpu.fast_fault(50, true), FastOutcome::Spurious);
            // By mask: what has no W, and what is no 4 KiB leaf, is left alone.
            let mut guard = world.mmu.lock.write(&task);
            assert_eq!(world.mmu.clear_dirty_masked(&mut guard, 0, 640, 1 << 10 | 1 << 11, true), 1);
            assert_eq!(world.mmu.clear_dirty_masked(&mut guard, 0, 5000, u64::MAX, true), 0);
            assert_eq!(world.mmu.clear_dirty_masked(&mut guard, 1, 0, u64::MAX, true), 0);
            drop(guard);
            assert_eq!(leaves(&world, root)[650].2, format.without_write(before[650].2));
            world.check(&task, "after all");
            cpu.close();
            drop(task);
            world.end();
        }
    }
}

#[test]
fn a_split_without_tables_stops_and_loses_nothing() {
    for profile in ["6.1", "6.12"] {
        let world = Setup { profile, max_tables: 40, ..Setup::default() }.build();
        let task = world.task();
        let mut cpu = Cpu::new(&world, 0);
        populated(&world, &mut cpu, 2, 64);
        let error = world.mmu.split_huge_pages(&task, 0, 0..64 * span(2), 1).expect_err("64 tables");
        assert!(matches!(error, PoolError::Exhausted { cap: 40, .. }), "{error}");
        let [small, huge, _] = world.mmu.leaf_pages();
        assert!(small > 0 && small % 512 == 0 && small / 512 + huge == 64, "{profile}: {small} {huge}");
        assert_eq!(world.mmu.write_protect(&task, 0, 0..64 * span(2), 1), (small + huge) as u64);
        world.check(&task, "half split");
        cpu.close();
        drop(task);
        world.end();
    }
}

/// Faults of both sizes, fast faults, unmaps, zaps and harvests beside splits and protections, all over the same four huge pages.
fn race(setup: &Setup) -> World {
    let world = setup.build();
    let (begin, over, slots_lock) = (Barrier::new(5), AtomicBool::new(false), Mutex::new(()));
    let pages = 4 * span(2);
    let splits = std::thread::scope(|scope| {
        let (world, begin, over, slots_lock) = (&world, &begin, &over, &slots_lock);
        let cpus: Vec<_> = (0..2u64)
            .map(|id| {
                scope.spawn(move || {
                    let mut dice = Dice(0x51ed_270b ^ (id + 1));
                    let mut cpu = Cpu::new(world, 0);
                    begin.wait();
                    for _ in 0..1500 {
                        if cpu.is_stale() {
                            cpu.drop_root();
                        }
                        let gfn = dice.roll(pages);
                        match dice.roll(16) {
                            0 => cpu.drop_root(),
                            1..=6 => cpu.access(gfn, 2, true),
                            7..=11 => {
                                cpu.fast_fault(gfn, true);
                            }
                            _ => cpu.access(gfn, 1, dice.roll(2) == 0),
                        }
                    }
                    cpu.close();
                })
            })
            .collect();
        let zapper = move |seed: u64, zaps: bool| {
            let mut dice = Dice(seed);
            let task = world.mmu.task("host", Role::Caller);
            begin.wait();
            while !over.load(Ordering::Acquire) {
                let gfn = dice.roll(pages);
                if zaps && dice.roll(4) == 0 {
                    let _held = slots_lock.lock();
                    world.fast_zap(&task);
                } else {
                    world.unmap(&task, 0, gfn..gfn + 1 + dice.roll(900));
                }
                std::thread::yield_now();
            }
        };
        scope.spawn(move || zapper(77, false));
        scope.spawn(move || zapper(78, true));
        let logger = scope.spawn(move || {
            let mut dice = Dice(99);
            let config = TaskConfig {
                preempt: Preempt::Full,
                force_yield: world.setup.force_yield,
                ..Default::default()
            };
            let task = tdpmmu_platform::Task::with_observer(
                world.mmu.rcu(),
                "logger",
                Role::Caller,
                config,
                Some(world.judge.clone()),
            );
            let mut splits = 0;
            begin.wait();
            while !over.load(Ordering::Acquire) {
                // As its callers do, except for the VM's own destruction: not beside a fast zap, or beside one.
                let held = (dice.roll(2) == 0).then(|| slots_lock.lock());
                splits += world.mmu.split_huge_pages(&task, 0, 0..pages, 1).unwrap_or(0);
                world.mmu.write_protect(&task, 0, dice.roll(span(2))..pages, 1 + dice.roll(2) as u8);
                drop(held);
                let mut guard = world.mmu.lock.write(&task);
                world.mmu.clear_dirty_masked(&mut guard, 0, dice.roll(pages / 64) * 64, dice.0, true);
                if dice.roll(4) == 0 {
                    world.judge.check_locked(&world.mmu, &guard);
                }
            }
            splits
        });
        for cpu in cpus {
            cpu.join().expect("no vCPU panics");
        }
        over.store(true, Ordering::Release);
        logger.join().expect("no panic")
    });
    assert!(splits > 0, "{setup:?}: nothing was ever split");
    world
}

#[test]
fn splits_and_protections_beside_faults_unmaps_and_zaps_break_no_rule() {
    for (design, profile) in [
        ("inline", "6.12"),
        ("async-worker", "6.1-async"),
        ("sync", "6.1"),
        ("sync", "6.12"),
        ("sync", "7.2"),
    ] {
        for (batch, force_yield, max_tables) in [(512, None, 4096), (7, Some(1), 4096), (512, Some(3), 60)] {
            let world = race(&Setup {
                profile,
                design,
                batch,
                force_yield,
                max_tables,
                workers: 2,
                ..Setup::default()
            });
            let task = world.task();
            world.settle(&task);
            world.check(&task, "after the race");
            drop(task);
            world.end();
        }
    }
}
