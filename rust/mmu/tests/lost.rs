//! What the dirty-logging walks do when somebody else changes an entry between their look and their write: an act chosen, not hoped for, at the
//! very instruction.

mod common;
#[path = "common/heard.rs"]
mod heard;
#[path = "common/staged.rs"]
mod staged;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::channel;

use common::{Cpu, Setup};
use heard::{Ear, Heard};
use staged::{Staged, stage, unstage};
use tdpmmu_mmu::{Leftovers, MapOutcome, TdpMmu};
use tdpmmu_platform::{Role, Site, Task};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::index;

type Mmu = TdpMmu<Staged>;

const PROFILES: [&str; 5] = ["5.18", "6.1", "6.12", "6.18", "7.2"];

fn of(profile: &'static str, batch: u16) -> (Arc<Mmu>, Arc<Ear>, Cpu<Staged>) {
    let ear = Ear::new();
    let setup = Setup { profile, batch, observer: Some(ear.clone()), ..Setup::default() };
    let mmu = setup.build_on::<Staged>(ear.clone()).expect("a small pool");
    let cpu = Cpu::new(&mmu);
    (mmu, ear, cpu)
}

fn map(cpu: &mut Cpu<Staged>, gfns: impl IntoIterator<Item = u64>, level: u8) {
    for gfn in gfns {
        assert!(matches!(cpu.fault(gfn, level), MapOutcome::Fixed { .. }), "gfn {gfn:#x}");
    }
}

fn caller(mmu: &Mmu) -> Task<Staged> {
    mmu.task("caller", Role::Caller)
}

/// The lowest entry over `gfn`, and its level.
fn entry(mmu: &Mmu, root: u32, gfn: u64) -> (Spte, u8) {
    let task = mmu.task("looks", Role::Observer);
    let walk = mmu.walk_lockless(&task, root, gfn);
    (walk.last(), walk.level)
}

/// Changes the lowest entry over `gfn`, as hardware or another CPU does.
fn change(mmu: &Mmu, root: u32, gfn: u64, change: impl FnOnce(u64) -> u64) {
    let task = mmu.task("elsewhere", Role::Vcpu);
    let walk = mmu.walk_lockless(&task, root, gfn);
    let cell = &mmu.pool().entries(walk.table)[index(gfn, walk.level)];
    cell.store(change(walk.last().raw()), Ordering::SeqCst);
}

/// Ends the VM; nothing was leaked, frozen for ever or freed twice.
fn end(mmu: Arc<Mmu>, mut cpu: Cpu<Staged>) {
    cpu.drop_root();
    cpu.close();
    let task = caller(&mmu);
    mmu.fast_zap_invalidate(&mut mmu.lock.write(&task));
    mmu.fast_zap_finish(&task);
    let left = mmu.uninit(&task);
    let stats = mmu.pool().stats();
    assert_eq!((left, stats.taken, stats.double_frees), (Leftovers::default(), 0, 0));
    assert_eq!(mmu.violations(), Vec::<String>::new());
}

#[test]
fn hardware_that_sets_dirty_meanwhile_is_not_overwritten() {
    for profile in PROFILES {
        for (batch, gfn, level) in [(1, 7, 1), (512, 7, 1), (1, 0, 2), (512, 0, 2)] {
            let (mmu, _ear, mut cpu) = of(profile, batch);
            map(&mut cpu, [gfn], level);
            let (task, root, format) = (caller(&mmu), cpu.root, *mmu.format());
            change(&mmu, root, gfn, |raw| raw & !format.dirty);
            let there = Arc::clone(&mmu);
            stage(0, Site::SpteProtect, move || change(&there, root, gfn, |raw| raw | format.dirty));
            assert_eq!(mmu.write_protect(&task, 0, 0..512, 1), 1, "{profile}");
            assert!(!unstage(Site::SpteProtect), "it came between");
            let (spte, _) = entry(&mmu, root, gfn);
            assert!(
                !format.is_writable(spte) && spte.raw() & format.dirty != 0,
                "{profile} level {level}: {spte:?}"
            );
            drop(task);
            end(mmu, cpu);
        }
    }
}

#[test]
fn a_leaf_that_is_split_meanwhile_is_not_taken_for_one_and_its_children_are_met() {
    for profile in PROFILES {
        for dirty in [false, true] {
            let (mmu, _ear, mut cpu) = of(profile, 1);
            map(&mut cpu, [0], 2);
            let (task, root, format) = (caller(&mmu), cpu.root, *mmu.format());
            let there = Arc::clone(&mmu);
            stage(0, Site::SpteProtect, move || {
                let other = caller(&there);
                assert_eq!(there.split_huge_pages(&other, 0, 0..1, 1), Ok(1));
            });
            let changed = if dirty {
                mmu.clear_dirty(&task, 0, 0..512)
            } else {
                mmu.write_protect(&task, 0, 0..512, 1)
            };
            assert!(!unstage(Site::SpteProtect));
            assert_eq!(changed, 512, "{profile}: all the children (3354ef5a592d: a table is no leaf)");
            let walk = mmu.walk_lockless(&task, root, 0);
            assert!(walk.sptes[2].is_table(2) && format.is_writable(walk.sptes[2]), "{profile}");
            drop(task);
            end(mmu, cpu);
        }
    }
}

#[test]
fn an_entry_that_goes_meanwhile_is_left_alone() {
    for profile in PROFILES {
        let (mmu, ear, mut cpu) = of(profile, 1);
        map(&mut cpu, [0], 2);
        let (task, root, format) = (caller(&mmu), cpu.root, *mmu.format());
        let huge = entry(&mmu, root, 0).0;
        let empty = |mmu: &Arc<Mmu>| {
            let there = Arc::clone(mmu);
            move || change(&there, root, 0, |_| there.format().empty().raw())
        };
        stage(0, Site::SpteProtect, empty(&mmu));
        assert_eq!(mmu.write_protect(&task, 0, 0..512, 1), 0, "{profile}");
        assert!(!unstage(Site::SpteProtect));
        change(&mmu, root, 0, |_| huge.raw());
        stage(0, Site::SpteProtect, empty(&mmu));
        assert_eq!(mmu.clear_dirty(&task, 0, 0..512), 0, "{profile}");
        assert!(!unstage(Site::SpteProtect));
        change(&mmu, root, 0, |_| huge.raw());
        stage(0, Site::SpteSplit, empty(&mmu));
        ear.take();
        let tables = mmu.pool().stats().taken;
        assert_eq!(mmu.split_huge_pages(&task, 0, 0..512, 1), Ok(0), "{profile}");
        assert!(!unstage(Site::SpteSplit));
        assert_eq!((ear.sptes(), mmu.pool().stats().taken), (vec![], tables), "{profile}: no table is left");
        assert_eq!(entry(&mmu, root, 0), (format.empty(), 2));
        // As it was, for the statistics.
        change(&mmu, root, 0, |_| huge.raw());
        drop(task);
        end(mmu, cpu);
    }
}

#[test]
fn a_split_that_loses_to_hardware_fills_its_table_anew() {
    for profile in PROFILES {
        let (mmu, _ear, mut cpu) = of(profile, 1);
        map(&mut cpu, [0], 2);
        let (task, root, format) = (caller(&mmu), cpu.root, *mmu.format());
        change(&mmu, root, 0, |raw| raw & !format.dirty);
        let there = Arc::clone(&mmu);
        stage(0, Site::SpteSplit, move || change(&there, root, 0, |raw| raw | format.dirty));
        assert_eq!(mmu.split_huge_pages(&task, 0, 0..512, 1), Ok(1), "{profile}");
        assert!(!unstage(Site::SpteSplit));
        for gfn in [0, 100, 511] {
            let (spte, level) = entry(&mmu, root, gfn);
            assert!(level == 1 && spte.raw() & format.dirty != 0, "{profile}: {spte:?} at level {level}");
        }
        drop(task);
        end(mmu, cpu);
    }
}

#[test]
fn a_table_that_became_a_leaf_meanwhile_is_not_collapsed_again() {
    for (profile, site) in [
        ("6.1", Site::SpteFreeze),
        ("6.12", Site::SpteFreeze),
        ("6.18", Site::SpteInstall),
        ("7.2", Site::SpteInstall),
    ] {
        let (mmu, _ear, mut cpu) = of(profile, 1);
        map(&mut cpu, 0..512, 1);
        let (task, root) = (caller(&mmu), cpu.root);
        // A fault of another vCPU, where the host has made one page of it. (It drops its root later: that may take the lock exclusively.)
        let mut other = Cpu::new(&mmu);
        let (gives, takes) = channel();
        stage(0, site, move || {
            map(&mut other, [3], 2);
            gives.send(other).expect("somebody takes it");
        });
        assert_eq!(mmu.collapse(&task, 0, 0..512, &|_| 2), 0, "{profile}");
        assert!(!unstage(site));
        let (spte, level) = entry(&mmu, root, 0);
        assert!(spte.is_leaf(2) && level == 2, "{profile}");
        assert_eq!((mmu.leaf_pages(), mmu.linked_tables()), ([0, 1, 0], 2), "{profile}");
        let mut other = takes.recv().expect("the fault was there");
        other.drop_root();
        other.close();
        drop(task);
        end(mmu, cpu);
    }
}

#[test]
fn a_leaf_that_changes_meanwhile_is_zapped_all_the_same_by_the_oldest_collapse() {
    let (mmu, ear, mut cpu) = of("5.18", 1);
    map(&mut cpu, [7], 1);
    let (task, root, format) = (caller(&mmu), cpu.root, *mmu.format());
    change(&mmu, root, 7, |raw| raw & !format.dirty);
    let there = Arc::clone(&mmu);
    stage(0, Site::SpteFreeze, move || change(&there, root, 7, |raw| raw | format.dirty));
    ear.take();
    assert_eq!(mmu.collapse(&task, 0, 0..512, &|_| 2), 1);
    assert!(!unstage(Site::SpteFreeze));
    assert!(ear.take().contains(&Heard::Dirty(0x10_0007, 1)), "the late D reached the host");
    drop(task);
    end(mmu, cpu);
}

#[test]
fn dirty_that_comes_while_w_is_harvested_stays_in_the_entry_or_reaches_the_host() {
    for (profile, site) in [("6.1", Site::SpteZap), ("6.12", Site::SpteProtect), ("7.2", Site::SpteProtect)] {
        let (mmu, ear, mut cpu) = of(profile, 1);
        map(&mut cpu, [7], 1);
        let (task, root, format) = (caller(&mmu), cpu.root, *mmu.format());
        change(&mmu, root, 7, |raw| raw & !format.dirty);
        let there = Arc::clone(&mmu);
        stage(0, site, move || change(&there, root, 7, |raw| raw | format.dirty));
        ear.take();
        assert_eq!(mmu.clear_dirty_masked(&mut mmu.lock.write(&task), 0, 0, 1 << 7, true), 1);
        assert!(!unstage(site), "{profile}");
        let (spte, _) = entry(&mmu, root, 7);
        assert!(!format.is_writable(spte));
        // 6.1 writes what it computed before: the D that came goes with the exchange, and is booked.
        assert_eq!(spte.raw() & format.dirty != 0, profile != "6.1", "{profile}");
        assert_eq!(ear.take().contains(&Heard::Dirty(0x10_0007, 1)), profile != "7.2", "{profile}");
        drop(task);
        end(mmu, cpu);
    }
}
