//! A harvest of many masks does what as many calls do, in the same order, whatever it remembers and asks for ahead.

mod common;
#[path = "common/heard.rs"]
mod heard;

use std::collections::BTreeSet;
use std::sync::Arc;

use common::{Cpu, Mmu, Setup};
use heard::{Ear, Heard};
use tdpmmu_mmu::MapOutcome;
use tdpmmu_platform::Role;

const GIB: u64 = 1 << 18;

fn world(profile: &'static str, batch: u16) -> (Arc<Mmu>, Arc<Ear>) {
    let ear = Ear::new();
    let setup = Setup { profile, batch, observer: Some(ear.clone()), ..Setup::default() };
    (setup.build_on(ear.clone()).expect("a small pool"), ear)
}

fn map(cpu: &mut Cpu, gfns: impl IntoIterator<Item = u64>, level: u8) {
    for gfn in gfns {
        let outcome = cpu.fault(gfn, level);
        assert!(matches!(outcome, MapOutcome::Fixed { .. }), "gfn {gfn:#x}: {outcome:?}");
    }
}

/// A root with what a harvest can meet: whole and thin tables, the end of a GiB, huge leaves, nothing; another address space beside it.
fn cpus(mmu: &Arc<Mmu>) -> [Cpu; 2] {
    let (mut cpu, mut smm) = (Cpu::new(mmu), Cpu::of_space(mmu, 1));
    map(&mut cpu, (0..1024).chain((1024..9216).step_by(100)).chain(GIB - 64..GIB + 64), 1);
    map(&mut cpu, [16_384], 2);
    map(&mut cpu, [2 * GIB], 3);
    map(&mut smm, 0..512, 1);
    [cpu, smm]
}

fn close(cpus: [Cpu; 2], mmu: &Arc<Mmu>) {
    for mut cpu in cpus {
        cpu.drop_root();
        cpu.close();
    }
    let task = mmu.task("end", Role::Caller);
    common::fast_zap(mmu, &task);
    drop(task);
    common::end(mmu);
}

/// Masks back and forth, some of them over the border of a table.
fn masks() -> Vec<(u64, u64)> {
    let mut masks: Vec<_> = (0..9216).step_by(64).map(|base| (base, 0x8421_0842_1084_2111 ^ base)).collect();
    let others = [480, 0, GIB - 32, GIB, 16_384, 2 * GIB, 3 * GIB, 9_000, GIB - 64, 40, 511];
    masks.extend(others.map(|base| (base, u64::MAX)));
    masks
}

fn changes(heard: &[Heard]) -> Vec<&Heard> {
    heard.iter().filter(|what| matches!(what, Heard::Spte(..))).collect()
}

/// Frames booked as dirty: what is told in one mask or in several runs is the same.
fn dirty(heard: &[Heard]) -> BTreeSet<u64> {
    let runs = heard.iter().filter_map(|what| match what {
        &Heard::Dirty(pfn, count) => Some(pfn..pfn + count),
        _ => None,
    });
    runs.flatten().collect()
}

#[test]
fn many_masks_of_one_harvest_are_as_many_calls() {
    for profile in ["5.15", "6.1", "6.6", "6.12", "7.2"] {
        for wrprot in [true, false] {
            let [called, harvested] = [false, true].map(|whole| {
                let (mmu, ear) = world(profile, 512);
                let cpus = cpus(&mmu);
                let task = mmu.task("vmm", Role::Caller);
                let mut guard = mmu.lock.write(&task);
                ear.take();
                let counts: Vec<u64> = if whole {
                    let mut harvest = mmu.harvest(&mut guard, 0, wrprot);
                    let masks = masks();
                    (0..masks.len())
                        .map(|n| {
                            // What is expected need not come next, nor at all.
                            for &(base, mask) in masks.iter().skip(n + 1).step_by(7).take(8) {
                                harvest.expect(base, mask);
                            }
                            harvest.clear(masks[n].0, masks[n].1)
                        })
                        .collect()
                } else {
                    let one = |(base, mask)| mmu.clear_dirty_masked(&mut guard, 0, base, mask, wrprot);
                    masks().into_iter().map(one).collect()
                };
                let heard = ear.take();
                drop(guard);
                drop(task);
                close(cpus, &mmu);
                (counts, heard)
            });
            assert!(called.0.iter().sum::<u64>() > 300, "{profile}: something is there to clear");
            assert_eq!(called.0, harvested.0, "{profile}: what each mask cleared");
            assert_eq!(changes(&called.1), changes(&harvested.1), "{profile}: in the same order");
            assert_eq!(dirty(&called.1), dirty(&harvested.1), "{profile}: the same frames");
        }
    }
}

#[test]
fn expecting_changes_nothing() {
    let (mmu, ear) = world("6.12", 512);
    let cpus = cpus(&mmu);
    let task = mmu.task("vmm", Role::Caller);
    let mut guard = mmu.lock.write(&task);
    let mut harvest = mmu.harvest(&mut guard, 0, true);
    harvest.clear(0, 1);
    harvest.interrupt(|_| ear.take());
    harvest.clear(0, 1);
    // At odd places too: the end of the address space, masks that leave their table.
    for base in [0, 100, 500, 511, GIB - 1, 16_384, 2 * GIB, mmu.max_gfn() - 1, mmu.max_gfn()] {
        harvest.expect(base, u64::MAX);
        harvest.expect(base, 1 << 63);
        harvest.expect(base, 0);
    }
    drop(harvest);
    drop(guard);
    assert_eq!(ear.take(), []);
    drop(task);
    close(cpus, &mmu);
}

#[test]
fn a_table_that_came_or_went_in_an_interruption_is_seen() {
    let (mmu, ear) = world("6.12", 512);
    let cpus = cpus(&mmu);
    let task = mmu.task("vmm", Role::Caller);
    let mut guard = mmu.lock.write(&task);
    let mut harvest = mmu.harvest(&mut guard, 0, true);
    assert_eq!(harvest.clear(16_384, u64::MAX), 0, "a huge leaf is left alone");
    let split = harvest.interrupt(|guard| mmu.split_huge_pages_exclusive(guard, 0, 16_384..16_448, 1));
    assert_eq!(split, Ok(1));
    assert_eq!(harvest.clear(16_384, u64::MAX), 64, "its children are not");
    ear.take();
    assert_eq!(harvest.clear(64, 0b11), 2);
    let frames: BTreeSet<u64> = [64, 65]
        .map(|gfn| cpus[0].mmu.lookup(&cpus[0].task, cpus[0].root, gfn))
        .map(|leaf| leaf.expect("mapped").0.pfn())
        .into();
    harvest.interrupt(|_| {
        assert!(dirty(&ear.take()).is_superset(&frames), "booked before the lock can be given up");
    });
    drop(harvest);
    drop(guard);
    drop(task);
    close(cpus, &mmu);
}

#[test]
fn only_what_small_tables_translate_everywhere_is_known_to_be_small() {
    for (batch, known) in [(512, true), (1, false)] {
        let (mmu, _) = world("6.12", batch);
        let cpus = cpus(&mmu);
        let task = mmu.task("vmm", Role::Caller);
        let mut guard = mmu.lock.write(&task);
        let mut harvest = mmu.harvest(&mut guard, 0, true);
        assert_eq!(harvest.is_small(0, 63), known, "at batch 1 each walk is made");
        assert_eq!(harvest.is_small(500, 563), known, "two tables");
        for (first, last) in [(16_384, 16_447), (16_383, 16_384), (2 * GIB, 2 * GIB), (3 * GIB, 3 * GIB + 63)]
        {
            assert!(!harvest.is_small(first, last), "{first:#x} to {last:#x}");
        }
        drop(harvest);
        drop(guard);
        drop(task);
        close(cpus, &mmu);
    }
}
