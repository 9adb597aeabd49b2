//! Huge leaves split ahead of logging and rebuilt after it, as each kernel does it: the events in their order, the flushes between them, what is left.

mod common;
#[path = "common/heard.rs"]
mod heard;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use common::{Cpu, Setup};
use heard::{Ear, Heard, bare};
use tdpmmu_mmu::{MapOutcome, TdpMmu};
use tdpmmu_platform::{Pace, Real, Role, Task, TaskConfig, YieldPoint};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Format, MakeLeaf, Spte};
use tdpmmu_table::PoolError;

type Mmu = TdpMmu<Real>;

/// Kernels that split ahead of logging.
const SPLITTERS: [&str; 7] = ["5.18", "6.1", "6.6", "6.9", "6.12", "6.18", "7.2"];

/// An MMU that checks at each entry, as the kernel does, and what it tells.
fn of(profile: &'static str) -> (Arc<Mmu>, Arc<Ear>) {
    let ear = Ear::new();
    let setup = Setup { profile, batch: 1, observer: Some(ear.clone()), ..Setup::default() };
    (setup.build_on::<Real>(ear.clone()).expect("a small pool"), ear)
}

fn caller(mmu: &Mmu) -> Task<Real> {
    mmu.task("caller", Role::Caller)
}

fn map(cpu: &mut Cpu, gfns: impl IntoIterator<Item = u64>, level: u8) {
    for gfn in gfns {
        let outcome = cpu.fault(gfn, level);
        assert!(matches!(outcome, MapOutcome::Fixed { .. }), "gfn {gfn:#x}: {outcome:?}");
    }
}

fn close(cpus: impl IntoIterator<Item = Cpu>, mmu: &Arc<Mmu>) {
    for mut cpu in cpus {
        cpu.drop_root();
        cpu.close();
    }
    let task = caller(mmu);
    common::fast_zap(mmu, &task);
    drop(task);
    common::end(mmu);
}

/// A writable leaf without its frame.
fn leaf(format: &Format, level: u8) -> u64 {
    bare(format.make_leaf(&MakeLeaf { level, ..MakeLeaf::default() }).spte.raw())
}

/// A table's entry without its frame.
fn table(format: &Format) -> u64 {
    bare(format.table(0, false).raw())
}

/// (gfn, level, value) of every leaf.
fn leaves(cpu: &Cpu) -> Vec<(u64, u8, Spte)> {
    let mut found = Vec::new();
    let all = 0..cpu.mmu.max_gfn();
    cpu.mmu.leaves(&cpu.task, cpu.root, all, &mut |gfn, level, spte| found.push((gfn, level, spte)));
    found
}

/// Counts how often mmu_lock was given up in the middle of a walk; nobody yields.
#[derive(Default)]
struct GivenUp(AtomicU64);

impl Pace for GivenUp {
    fn wants_yield(&self, _task: u32, _at: YieldPoint) -> bool {
        false
    }

    fn unlocked(&self, _task: u32) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn paced(mmu: &Mmu, pace: Arc<dyn Pace>) -> Task<Real> {
    let config = TaskConfig { pace: Some(pace), ..TaskConfig::default() };
    Task::new(mmu.rcu(), "paced", Role::Caller, config)
}

#[test]
fn a_split_is_one_event_a_leaf_with_the_lock_given_up_where_its_kernel_does() {
    for profile in SPLITTERS {
        for exclusive in [false, true] {
            let (mmu, ear) = of(profile);
            let mut cpu = Cpu::new(&mmu);
            map(&mut cpu, [0, 512, 1024], 2);
            let before = leaves(&cpu);
            let given_up = Arc::new(GivenUp::default());
            let task = paced(&mmu, given_up.clone());
            let format = *mmu.format();
            ear.take();
            let split = if exclusive {
                mmu.split_huge_pages_exclusive(&mut mmu.lock.write(&task), 0, 512..1025, 1)
            } else {
                mmu.split_huge_pages(&task, 0, 512..1025, 1)
            };
            assert_eq!(split, Ok(2), "{profile}");
            let event = |gfn| Heard::Spte(gfn, 2, leaf(&format, 2), table(&format), !exclusive);
            assert_eq!(
                entries_and_flushes(&ear),
                [event(512), event(1024)],
                "{profile}: no flush, no event of a child"
            );
            let waits = ["6.12", "6.18", "7.2"].contains(&profile);
            assert_eq!(
                given_up.0.load(Ordering::Relaxed),
                if waits { 2 } else { 0 },
                "{profile}: one a table"
            );
            let mut expected = vec![before[0]];
            for &(gfn, level, huge) in &before[1..] {
                let child = |i| format.split_child(huge, level, i, false);
                expected.extend((0..512).map(|i| (gfn + i as u64, 1, child(i))));
            }
            assert_eq!(leaves(&cpu), expected, "{profile}");
            assert_eq!(mmu.leaf_pages(), [1024, 1, 0]);
            drop(task);
            close([cpu], &mmu);
        }
    }
}

#[test]
fn a_gibibyte_is_split_once_or_to_the_bottom_in_preorder() {
    for profile in SPLITTERS {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [0], 3);
        let task = caller(&mmu);
        ear.take();
        let mut guard = mmu.lock.write(&task);
        assert_eq!(mmu.split_huge_pages_exclusive(&mut guard, 0, 0..64, 2), Ok(1), "{profile}: to 2M");
        assert_eq!(mmu.split_huge_pages_exclusive(&mut guard, 0, 0..64, 2), Ok(0));
        assert_eq!(
            mmu.split_huge_pages_exclusive(&mut guard, 0, 500..513, 1),
            Ok(2),
            "{profile}: what the range touches"
        );
        drop(guard);
        let places: Vec<_> = ear.sptes().iter().map(|&(gfn, level, ..)| (gfn, level)).collect();
        assert_eq!(places, [(0, 3), (0, 2), (512, 2)], "{profile}");
        assert_eq!(mmu.leaf_pages(), [1024, 510, 0]);
        drop(task);
        close([cpu], &mmu);
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [0], 3);
        let task = caller(&mmu);
        ear.take();
        assert_eq!(mmu.split_huge_pages(&task, 0, 0..1024, 1), Ok(3), "{profile}: 1G, and two of its 2M");
        let places: Vec<_> = ear.sptes().iter().map(|&(gfn, level, ..)| (gfn, level)).collect();
        assert_eq!(places, [(0, 3), (0, 2), (512, 2)], "{profile}");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn under_the_nx_mitigation_small_children_may_be_executed_and_huge_ones_not() {
    for profile in SPLITTERS {
        let (mmu, _ear) = of(profile);
        mmu.set_nx_huge_pages(true);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [0], 3);
        let task = caller(&mmu);
        let format = *mmu.format();
        assert_eq!(mmu.split_huge_pages(&task, 0, 0..1, 1), Ok(2));
        for (gfn, level, spte) in leaves(&cpu) {
            assert_eq!(format.is_executable(spte), level == 1, "{profile}: gfn {gfn:#x} at level {level}");
        }
        assert_eq!(mmu.nx_splits(), 0, "{profile}: no candidate for recovery");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn a_split_under_the_exclusive_lock_stops_without_tables_and_holds_the_lock() {
    for profile in ["6.1", "6.12", "7.2"] {
        let mmu = Setup { profile, max_tables: 24, ..Setup::default() }.build();
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, (0..64).map(|n| n * 512), 2);
        let task = caller(&mmu);
        let mut guard = mmu.lock.write(&task);
        let error = mmu.split_huge_pages_exclusive(&mut guard, 0, 0..64 * 512, 1).expect_err("64 tables");
        assert!(matches!(error, PoolError::Exhausted { cap: 24, .. }), "{error}");
        assert!(task.holds_mmu_lock());
        let [small, huge, _] = mmu.leaf_pages();
        assert!(small > 0 && small % 512 == 0 && small / 512 + huge == 64, "{profile}: {small} {huge}");
        drop(guard);
        drop(task);
        close([cpu], &mmu);
    }
}

/// The changes of entries and the flushes since the last call.
fn entries_and_flushes(ear: &Ear) -> Vec<Heard> {
    ear.take().into_iter().filter(|h| matches!(h, Heard::Spte(..) | Heard::Flush(_))).collect()
}

/// All that one table of 512 leaves tells when it goes, its own entry aside.
fn children(first: u64, olds: impl Fn(u64) -> u64, frozen: u64) -> Vec<Heard> {
    (0..512).map(|i| Heard::Spte(first + i, 1, olds(i), frozen, true)).collect()
}

/// Two full tables: of the first, the leaves from the 64th on are write-protected, of the second all are.
fn logged(cpu: &mut Cpu) -> impl Fn(u64) -> u64 + use<> {
    map(cpu, 0..1024, 1);
    let task = caller(&cpu.mmu);
    assert_eq!(cpu.mmu.write_protect(&task, 0, 64..1024, 1), 960);
    let (e67, write) = (leaf(cpu.mmu.format(), 1), cpu.mmu.format().write);
    move |gfn| if gfn < 64 { e67 } else { e67 & !write }
}

#[test]
fn up_to_5_18_the_end_of_logging_zaps_leaf_by_leaf_and_leaves_the_table() {
    for profile in ["5.15", "5.18"] {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, 0..3, 1);
        map(&mut cpu, [512], 1);
        map(&mut cpu, [1024], 2);
        let task = caller(&mmu);
        let tables = mmu.linked_tables();
        ear.take();
        let zapped = mmu.collapse(&task, 0, 1..2048, &|gfn| if gfn < 512 { 2 } else { 1 });
        assert_eq!(zapped, 2, "{profile}: what begins in the slot and could be larger");
        let (e67, frozen) = (leaf(mmu.format(), 1), bare(mmu.format().frozen().raw()));
        let one = |gfn| [Heard::Spte(gfn, 1, e67, frozen, true), Heard::Flush(Some(gfn..gfn + 1))];
        assert_eq!(
            entries_and_flushes(&ear),
            [one(1), one(2)].concat(),
            "{profile}: the change to empty is told to nobody"
        );
        assert_eq!(mmu.linked_tables(), tables);
        let left: Vec<_> = leaves(&cpu).iter().map(|&(gfn, level, _)| (gfn, level)).collect();
        assert_eq!(left, [(0, 1), (512, 1), (1024, 2)], "{profile}");
        assert_eq!(mmu.leaf_pages(), [2, 1, 0]);
        assert!(matches!(cpu.fault(1, 1), MapOutcome::Fixed { .. }), "{profile}: nothing is frozen for ever");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn in_6_1_a_table_is_frozen_and_torn_down_then_flushed_then_silently_emptied() {
    for profile in ["6.1", "6.6", "6.9"] {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        let olds = logged(&mut cpu);
        let task = caller(&mmu);
        let (frozen, table) = (bare(mmu.format().frozen().raw()), table(mmu.format()));
        ear.take();
        assert_eq!(mmu.collapse(&task, 0, 0..1024, &|_| 2), 2);
        let mut expected = Vec::new();
        for first in [0, 512] {
            expected.push(Heard::Spte(first, 2, table, frozen, true));
            expected.extend(children(first, |i| olds(first + i), frozen));
            expected.push(Heard::Flush(Some(first..first + 512)));
        }
        assert_eq!(entries_and_flushes(&ear), expected, "{profile}");
        assert_eq!((leaves(&cpu), mmu.leaf_pages(), mmu.linked_tables()), (vec![], [0; 3], 2), "{profile}");
        assert!(
            matches!(cpu.fault(5, 2), MapOutcome::Fixed { level: 2, .. }),
            "{profile}: it comes back huge"
        );
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn in_6_12_the_freeze_is_silent_the_flush_comes_first_and_the_event_says_empty() {
    let (mmu, ear) = of("6.12");
    let mut cpu = Cpu::new(&mmu);
    let olds = logged(&mut cpu);
    let task = caller(&mmu);
    let (frozen, empty) = (bare(mmu.format().frozen().raw()), bare(mmu.format().empty().raw()));
    ear.take();
    assert_eq!(mmu.collapse(&task, 0, 0..1024, &|_| 2), 2);
    let mut expected = Vec::new();
    for first in [0, 512] {
        expected.push(Heard::Flush(Some(first..first + 512)));
        expected.push(Heard::Spte(first, 2, table(mmu.format()), empty, true));
        expected.extend(children(first, |i| olds(first + i), frozen));
    }
    assert_eq!(entries_and_flushes(&ear), expected);
    assert_eq!((leaves(&cpu), mmu.leaf_pages(), mmu.linked_tables()), (vec![], [0; 3], 2));
    assert!(matches!(cpu.fault(5, 2), MapOutcome::Fixed { level: 2, .. }), "it comes back huge");
    drop(task);
    close([cpu], &mmu);
}

#[test]
fn since_6_13_a_table_becomes_the_huge_leaf_of_its_first_child_and_one_flush_pays_for_all() {
    for profile in ["6.18", "7.2"] {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        let olds = logged(&mut cpu);
        let (task, format) = (caller(&mmu), *mmu.format());
        let frozen = bare(format.frozen().raw());
        let huge = [leaf(&format, 2), leaf(&format, 2) & !format.write];
        ear.take();
        assert_eq!(mmu.collapse(&task, 0, 0..1024, &|_| 2), 2);
        let mut expected = Vec::new();
        for (first, huge) in [(0, huge[0]), (512, huge[1])] {
            let entry = Heard::Spte(first, 2, table(&format), huge, true);
            let children = children(first, |i| olds(first + i), frozen);
            // Recorded: 7.2 tells of the children first. (6.18: taken from its sources' neighbours, parent first.)
            if mmu.profile().children_before_parent_events {
                expected.extend(children);
                expected.push(entry);
            } else {
                expected.push(entry);
                expected.extend(children);
            }
        }
        expected.push(Heard::Flush(Some(0..1024)));
        assert_eq!(entries_and_flushes(&ear), expected, "{profile}");
        let frames: Vec<_> =
            leaves(&cpu).iter().map(|&(gfn, level, spte)| (gfn, level, spte.pfn())).collect();
        assert_eq!(frames, [(0, 2, 0x10_0000), (512, 2, 0x10_0200)], "{profile}: the same frames");
        assert_eq!((mmu.leaf_pages(), mmu.linked_tables()), ([0, 2, 0], 2), "{profile}");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn a_recovered_leaf_is_made_from_the_first_present_child_and_aligned() {
    for profile in ["6.18", "7.2"] {
        let (mmu, _ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        // The first children are missing; the first present one has no W, the next has.
        map(&mut cpu, [37, 38], 1);
        let task = caller(&mmu);
        mmu.write_protect(&task, 0, 37..38, 1);
        assert_eq!(mmu.collapse(&task, 0, 0..512, &|_| 2), 1);
        let format = *mmu.format();
        let found = leaves(&cpu);
        assert_eq!((found.len(), found[0].0, found[0].1), (1, 0, 2));
        assert_eq!(bare(found[0].2.raw()), leaf(&format, 2) & !format.write, "{profile}");
        assert_eq!(found[0].2.pfn(), 0x10_0000, "{profile}: aligned down");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn a_table_without_leaves_is_left_where_leaves_are_wanted_and_zapped_where_it_is_zapped() {
    for (profile, changes) in [("6.1", 1), ("6.12", 1), ("6.18", 0), ("7.2", 0)] {
        let (mmu, _ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, 0..3, 1);
        let task = caller(&mmu);
        {
            let mut guard = mmu.lock.write(&task);
            let mut debt = mmu.unmap(&mut guard, 0, 0..512, false);
            mmu.pay(&task, &mut debt);
        }
        assert_eq!(mmu.collapse(&task, 0, 0..512, &|_| 2), changes, "{profile}");
        assert_eq!(mmu.linked_tables(), 3 - changes as i64, "{profile}");
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn a_gibibyte_of_tables_goes_at_once_where_the_host_allows_it() {
    for profile in ["6.1", "6.12", "6.18", "7.2"] {
        let (mmu, _ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [3, 600], 1);
        map(&mut cpu, [1024], 2);
        let (task, flushes) = (caller(&mmu), mmu.flushes());
        assert_eq!(mmu.collapse(&task, 0, 0..span(3), &|_| 3), 1, "{profile}: nothing is met below it");
        assert_eq!((mmu.flushes() - flushes, mmu.linked_tables()), (1, 1), "{profile}");
        let found: Vec<_> = leaves(&cpu).iter().map(|&(gfn, level, spte)| (gfn, level, spte.pfn())).collect();
        let recovers = ["6.18", "7.2"].contains(&profile);
        assert_eq!(found, if recovers { vec![(0, 3, 0x10_0000)] } else { vec![] }, "{profile}");
        assert_eq!(mmu.leaf_pages(), [0, 0, i64::from(recovers)]);
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn what_begins_outside_of_the_slot_or_is_small_in_the_host_stays() {
    for profile in ["5.18", "6.1", "6.12", "6.18", "7.2"] {
        let (mmu, ear) = of(profile);
        let (mut cpu, mut smm) = (Cpu::new(&mmu), Cpu::of_space(&mmu, 1));
        map(&mut cpu, [7, 600, 1100], 1);
        map(&mut smm, [600], 1);
        let task = caller(&mmu);
        ear.take();
        // The slot begins inside the first table; the host has small pages behind the third; the 1 GiB entry begins before the slot.
        let asked = Mutex::new(Vec::new());
        let host = |gfn: u64| {
            asked.lock().expect("unpoisoned").push(gfn);
            if gfn < 1024 { 3 } else { 1 }
        };
        let changed = mmu.collapse(&task, 0, 8..1536, &host);
        assert_eq!(changed, 1, "{profile}");
        let asked = asked.into_inner().expect("unpoisoned");
        assert!(
            asked.iter().all(|gfn| (8..1536).contains(gfn)),
            "{profile}: never asked about others: {asked:x?}"
        );
        let first = ear.sptes().iter().map(|&(gfn, ..)| gfn).find(|gfn| *gfn != 0);
        assert!(first.is_some_and(|gfn| (512..1024).contains(&gfn)), "{profile}");
        let kept: Vec<_> = leaves(&cpu).iter().filter(|leaf| leaf.1 == 1).map(|leaf| leaf.0).collect();
        assert_eq!(kept, [7, 1100], "{profile}");
        assert_eq!(leaves(&smm).len(), 1, "{profile}: another address space");
        drop(task);
        close([cpu, smm], &mmu);
    }
}

#[test]
fn an_invalid_root_is_neither_split_nor_collapsed() {
    for profile in ["5.18", "6.1", "6.12", "7.2"] {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [7], 1);
        map(&mut cpu, [512], 2);
        let task = caller(&mmu);
        mmu.fast_zap_invalidate(&mut mmu.lock.write(&task));
        ear.take();
        assert_eq!(mmu.collapse(&task, 0, 0..1024, &|_| 3), 0, "{profile}");
        assert_eq!(mmu.split_huge_pages(&task, 0, 0..1024, 1), Ok(0), "{profile}");
        assert_eq!(mmu.split_huge_pages_exclusive(&mut mmu.lock.write(&task), 0, 0..1024, 1), Ok(0));
        assert_eq!(
            mmu.clear_dirty(&task, 0, 0..1024) + mmu.write_protect(&task, 0, 0..1024, 1),
            0,
            "{profile}"
        );
        assert_eq!(ear.take(), [], "{profile}");
        mmu.fast_zap_finish(&task);
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn a_recovered_leaf_loses_x_under_the_nx_mitigation() {
    for (nx, executable) in [(false, true), (true, false)] {
        let (mmu, _ear) = of("7.2");
        mmu.set_nx_huge_pages(nx);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [0], 1);
        let task = caller(&mmu);
        assert_eq!(mmu.collapse(&task, 0, 0..512, &|_| 2), 1);
        assert_eq!(mmu.format().is_executable(leaves(&cpu)[0].2), executable);
        drop(task);
        close([cpu], &mmu);
    }
}

#[test]
fn what_the_guest_wrote_through_a_collapsed_table_reaches_the_host_up_to_6_12() {
    for (profile, told) in [("5.18", true), ("6.1", true), ("6.12", true), ("6.18", false), ("7.2", false)] {
        let (mmu, ear) = of(profile);
        let mut cpu = Cpu::new(&mmu);
        map(&mut cpu, [9], 1);
        let task = caller(&mmu);
        ear.take();
        assert_eq!(mmu.collapse(&task, 0, 0..512, &|_| 2), 1);
        assert_eq!(ear.take().contains(&Heard::Dirty(0x10_0009, 1)), told, "{profile}");
        drop(task);
        close([cpu], &mmu);
    }
}
