//! Every design zaps everything and leaks nothing, also when every check yields.

mod common;
#[path = "common/deadline.rs"]
mod deadline;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use common::{Cpu, Setup, end, fast_zap};
use deadline::must_end;
use tdpmmu_mmu::{DESIGNS, DesignInfo, MapOutcome, design};
use tdpmmu_platform::{Real, Role, Task, TaskConfig};
use tdpmmu_spte::geometry::span;

/// One entry in each of several top-level slots, and dense and sparse stretches of every page size.
fn populate(cpu: &mut Cpu) -> BTreeSet<(u64, u8)> {
    let mut mapped = BTreeSet::new();
    let mut map = |cpu: &mut Cpu, gfn: u64, level: u8| {
        assert!(matches!(cpu.fault(gfn, level), MapOutcome::Fixed { .. }), "gfn {gfn:#x} at level {level}");
        mapped.insert((gfn, level));
    };
    for slot in [0, 1, 5, 200, 511] {
        map(cpu, slot * span(4) + 7, 1);
    }
    for gfn in 0x200..0x200 + 700 {
        map(cpu, gfn, 1);
    }
    for i in 0..20 {
        map(cpu, 3 * span(3) + i * span(2), 2);
    }
    map(cpu, 7 * span(3), 3);
    mapped
}

fn found(cpu: &Cpu) -> BTreeSet<(u64, u8)> {
    let mut set = BTreeSet::new();
    cpu.mmu.leaves(&cpu.task, cpu.root, 0..cpu.mmu.max_gfn(), &mut |gfn, level, _| {
        set.insert((gfn, level));
    });
    set
}

fn sound() -> impl Iterator<Item = &'static DesignInfo> {
    DESIGNS.iter().filter(|d| !d.flawed)
}

/// Does a fast zap leave the roots valid?
fn keeps_roots(design: &str) -> bool {
    design::info(design).expect("known").obligations.keeps_roots
}

fn all_setups() -> Vec<Setup> {
    let mut setups = Vec::new();
    for design in sound() {
        for passes in [None, Some("root"), Some("1G,root"), Some("4K,2M,1G,root")] {
            for (batch, force_yield) in [(512, None), (512, Some(1)), (1, Some(1)), (7, Some(3))] {
                for profile in ["6.1", "6.12", "7.2"] {
                    setups.push(Setup {
                        profile,
                        design: design.name,
                        passes,
                        batch,
                        force_yield,
                        ..Setup::default()
                    });
                }
            }
        }
    }
    setups
}

#[test]
fn a_fast_zap_leaves_nothing_and_leaks_nothing_in_any_design_passes_or_yield_pattern() {
    for setup in all_setups() {
        let name = format!(
            "{} {:?} batch {} yield {:?}",
            setup.design, setup.passes, setup.batch, setup.force_yield
        );
        let setup_design = setup.design;
        let mmu = setup.build();
        let mut cpu = Cpu::new(&mmu);
        let mapped = populate(&mut cpu);
        assert_eq!(found(&cpu), mapped, "{name}");
        let task = mmu.task("caller", Role::Caller);
        fast_zap(&mmu, &task);
        assert_eq!(mmu.is_obsolete(cpu.root), !keeps_roots(setup_design), "{name}");
        assert_eq!(found(&cpu), BTreeSet::new(), "{name}: an entry survived the fast zap");
        assert_eq!(mmu.leaf_pages(), [0; 3], "{name}: statistics");
        cpu.drop_root();
        drop(task);
        let mmu = cpu.close();
        end(&mmu);
    }
}

#[test]
fn dropping_the_last_reference_tears_down_or_retains_as_the_design_says() {
    for setup in all_setups() {
        let design = setup.design;
        let mmu = setup.build();
        let mut cpu = Cpu::new(&mmu);
        let mapped = populate(&mut cpu);
        cpu.drop_root();
        match design {
            "sync" | "async-worker-owned" => assert_eq!(
                mmu.leaf_pages().iter().sum::<i64>(),
                mapped.len() as i64,
                "the MMU's own reference keeps it"
            ),
            "in-place" | "inline" | "defunct-flag" | "second-list" => {
                assert_eq!(mmu.leaf_pages(), [0; 3], "zapped before the put returned")
            }
            _ => {}
        }
        let mmu = cpu.close();
        end(&mmu);
    }
}

#[test]
fn a_yield_at_every_top_level_entry_skips_none() {
    // Bug-history 5: 5.10-5.15 advanced past the entry that was current at the yield.
    for design in sound() {
        let profile = if design.needs_stale_root_check { "5.18" } else { "5.15" };
        let setup = Setup {
            profile,
            design: design.name,
            passes: Some("root"),
            force_yield: Some(1),
            ..Setup::default()
        };
        let mmu = setup.build();
        let mut cpu = Cpu::new(&mmu);
        for slot in 0..512 {
            assert!(matches!(cpu.fault(slot * span(4), 1), MapOutcome::Fixed { .. }));
        }
        let task = mmu.task("caller", Role::Caller);
        fast_zap(&mmu, &task);
        assert_eq!(mmu.count(&cpu.task, cpu.root).sptes(), 0, "{}", design.name);
        let workers: u64 = mmu.design().take_worker_reports().iter().map(|r| r.meter.yields).sum();
        let yields = task.meter().yields.get() + workers;
        // At the first entry there is no progress to yield after.
        assert!(yields >= 511, "{}: only {yields} yields: the test forced none", design.name);
        cpu.drop_root();
        drop(task);
        end(&cpu.close());
    }
}

#[test]
fn an_unmap_removes_the_range_and_nothing_else_and_takes_straddling_huge_leaves_whole() {
    for force_yield in [None, Some(1)] {
        let mmu = Setup { force_yield, ..Setup::default() }.build();
        let mut cpu = Cpu::new(&mmu);
        let mapped = populate(&mut cpu);
        let range = 0x280..3 * span(3) + span(2) + 1;
        let task = mmu.task("notifier", Role::Caller);
        {
            let mut guard = mmu.lock.write(&task);
            let mut debt = mmu.unmap(&mut guard, 0, range.clone(), true);
            mmu.pay(&task, &mut debt);
        }
        let kept: BTreeSet<_> =
            mapped.into_iter().filter(|&(g, l)| g + span(l) <= range.start || g >= range.end).collect();
        assert_eq!(found(&cpu), kept);
        assert!(mmu.flushes() > 0, "leaves were removed under a valid root");
        drop(task);
        cpu.drop_root();
        end(&cpu.close());
    }
}

#[test]
fn passes_bound_the_step_between_two_checks() {
    let mut steps = Vec::new();
    for passes in ["root", "1G,root", "4K,2M,1G,root"] {
        let mmu = Setup { passes: Some(passes), ..Setup::default() }.build();
        let mut cpu = Cpu::new(&mmu);
        for gfn in (0..4 * span(2)).chain(span(3)..span(3) + span(2)) {
            cpu.fault(gfn, 1);
        }
        let config = tdpmmu_platform::TaskConfig { measure: true, ..Default::default() };
        let task = tdpmmu_platform::Task::new(mmu.rcu(), "caller", Role::Caller, config);
        fast_zap(&mmu, &task);
        steps.push(task.meter().take().histograms.expect("measured").step_units.summary().max.unwrap_or(0));
        drop(task);
        cpu.drop_root();
        end(&cpu.close());
    }
    assert!(steps[2] <= 1300, "a leaf table: 512 reads and 512 writes, got {}", steps[2]);
    assert!(steps[1] > 4 * 512 && steps[0] > steps[1] && steps[1] > steps[2], "{steps:?}");
}

#[test]
fn a_root_is_shared_by_equal_roles_and_survives_its_first_user() {
    for design in sound() {
        let mmu = Setup { design: design.name, ..Setup::default() }.build();
        let mut a = Cpu::new(&mmu);
        let b = Cpu::new(&mmu);
        assert_eq!(a.root, b.root);
        a.fault(1, 1);
        a.drop_root();
        assert_eq!(mmu.leaf_pages()[0], 1, "the other vCPU still holds it");
        let mut b = b;
        b.drop_root();
        a.close();
        end(&b.close());
    }
}

#[test]
fn two_fast_zaps_in_a_row_put_each_gift_once() {
    for design in sound() {
        let mmu = Setup { design: design.name, ..Setup::default() }.build();
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(3, 1);
        let task = mmu.task("caller", Role::Caller);
        for _ in 0..3 {
            fast_zap(&mmu, &task);
        }
        assert_eq!(mmu.refs(cpu.root), 1, "{}: only the vCPU's is left", design.name);
        drop(task);
        cpu.drop_root();
        end(&cpu.close());
    }
}

#[test]
fn racing_faults_install_each_gfn_once_and_leak_no_table() {
    let mmu = Setup { max_tables: 8192, ..Setup::default() }.build();
    let threads: Vec<_> = (0..3)
        .map(|seed| {
            let mmu = Arc::clone(&mmu);
            std::thread::spawn(move || {
                let mut cpu = Cpu::new(&mmu);
                for i in 0..20_000u64 {
                    let gfn = (i * 7919 + seed * 13) % 4096;
                    while cpu.fault(gfn * 37, 1) == MapOutcome::Retry {}
                }
                cpu.drop_root();
                cpu.close();
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("no panic");
    }
    let task = mmu.task("count", Role::Observer);
    let counts = mmu.count_all(&task);
    assert_eq!(counts.leaves[1], 4096);
    assert_eq!(mmu.leaf_pages()[0], 4096);
    assert_eq!(mmu.linked_tables() as u64, counts.all_tables() - counts.tables[4]);
    drop(task);
    end(&mmu);
}

#[test]
fn a_zap_that_may_not_yield_is_one_step() {
    // The last put of `inline`: 5.13-5.17 test for a reschedule nowhere in it, whatever the passes.
    let mmu = Setup { design: "inline", passes: Some("4K,2M,1G,root"), ..Setup::default() }.build();
    let mut cpu = Cpu::new(&mmu);
    populate(&mut cpu);
    let config = TaskConfig { measure: true, ..TaskConfig::default() };
    let task = Task::<Real>::new(mmu.rcu(), "measured", Role::Vcpu, config);
    mmu.put_roots(&task, &[cpu.root]);
    let meter = task.meter().take();
    let steps = meter.histograms.expect("a measuring task").step_units.summary();
    assert_eq!((steps.count, steps.max), (1, Some(meter.entry_reads + meter.entry_writes)));
    cpu.cache.drain(mmu.pool());
    assert_eq!(mmu.uninit(&cpu.task), Default::default());
}

#[test]
fn the_queue_delay_is_that_of_zaps_and_of_nothing_else() {
    let mmu = Setup { design: "async-worker", ..Setup::default() }.build();
    let mut cpu = Cpu::new(&mmu);
    mmu.put_roots(&cpu.task, &[cpu.root]);
    drop(mmu.design().take_worker_reports());
    assert_eq!(mmu.design().queue_ns().map(|h| h.count()), Some(1));
    cpu.cache.drain(mmu.pool());
    assert_eq!(mmu.uninit(&cpu.task), Default::default());
}

#[test]
fn the_last_table_to_come_back_is_stamped_after_the_zap_that_unlinked_it() {
    let mmu = Setup::default().build();
    let mut cpu = Cpu::new(&mmu);
    populate(&mut cpu);
    assert_eq!((mmu.last_table_free(), mmu.last_zap_end()), (0, 0), "nothing has been zapped or freed");
    let task = mmu.task("caller", Role::Caller);
    fast_zap(&mmu, &task);
    let zapped = mmu.last_zap_end();
    cpu.drop_root();
    drop(task);
    end(&cpu.close());
    assert!(mmu.last_table_free() > zapped && zapped > 0, "the root itself came back last");
}

#[test]
fn callers_that_ask_the_workers_for_reports_at_once_take_turns() {
    must_end(|| {
        let mmu = Setup { design: "async-worker", workers: 2, ..Setup::default() }.build();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..200).for_each(|_| drop(mmu.design().take_worker_reports())));
            }
        });
        assert_eq!(mmu.design().take_worker_reports().len(), 2, "one of each worker");
        end(&mmu);
    });
}

#[test]
fn a_shutdown_between_two_requests_for_a_report_hangs_nobody() {
    must_end(|| {
        for _ in 0..40 {
            // Many workers: a request is nearly always half made.
            let mmu = Setup { design: "async-worker", workers: 48, ..Setup::default() }.build();
            let over = AtomicBool::new(false);
            thread::scope(|scope| {
                scope.spawn(|| {
                    while !over.load(Ordering::Acquire) {
                        drop(mmu.design().take_worker_reports());
                    }
                });
                thread::sleep(Duration::from_millis(1));
                end(&mmu);
                over.store(true, Ordering::Release);
            });
        }
    });
}

#[test]
fn the_last_put_of_an_empty_root_does_not_move_the_end_of_the_zap() {
    for design in sound() {
        let mmu = Setup { design: design.name, ..Setup::default() }.build();
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(3, 1);
        let task = mmu.task("caller", Role::Caller);
        fast_zap(&mmu, &task);
        let zapped = mmu.last_zap_end();
        assert!(zapped > 0, "{}", design.name);
        cpu.drop_root();
        drop(task);
        end(&cpu.close());
        assert_eq!(mmu.last_zap_end(), zapped, "{}", design.name);
    }
}

#[test]
fn an_unmap_reaches_invalid_roots_from_5_18_on() {
    for (profile, left) in [("5.15", 1), ("5.18", 0), ("6.12", 0)] {
        let mmu = Setup { profile, design: "inline", ..Setup::default() }.build();
        let mut cpu = Cpu::new(&mmu);
        cpu.fault(3, 1);
        let task = mmu.task("notifier", Role::Caller);
        {
            let mut guard = mmu.lock.write(&task);
            mmu.fast_zap_invalidate(&mut guard);
            let mut debt = mmu.unmap(&mut guard, 0, 0..512, true);
            mmu.pay(&task, &mut debt);
        }
        assert_eq!(mmu.leaf_pages()[0], left, "{profile}");
        mmu.fast_zap_finish(&task);
        cpu.drop_root();
        drop(task);
        end(&cpu.close());
    }
}

#[test]
fn an_unmap_takes_whole_tables_along_up_to_5_17_and_only_leaves_since() {
    for (profile, whole) in [("5.10", true), ("5.15", true), ("5.18", false), ("6.1", false), ("7.2", false)]
    {
        for force_yield in [None, Some(1)] {
            let mmu = Setup { profile, force_yield, ..Setup::default() }.build();
            let mut cpu = Cpu::new(&mmu);
            for gfn in [5, span(2), 2 * span(2) - 1, 3 * span(2) + 9] {
                assert!(matches!(cpu.fault(gfn, 1), MapOutcome::Fixed { .. }));
            }
            let task = mmu.task("caller", Role::Caller);
            let (tables, flushes) = (mmu.linked_tables(), mmu.flushes());
            {
                let mut guard = mmu.lock.write(&task);
                // Up to the middle of the first table, all of the second, nothing of the fourth.
                let mut debt = mmu.unmap(&mut guard, 0, 6..3 * span(2), true);
                assert_eq!(
                    debt.is_owed(),
                    !whole && force_yield.is_none(),
                    "{profile}: paid with the table, or at a yield"
                );
                mmu.pay(&task, &mut debt);
            }
            assert_eq!(tables - mmu.linked_tables(), i64::from(whole), "{profile}");
            assert_eq!(mmu.flushes() - flushes, 1, "{profile}: before the table goes to RCU, or at the end");
            let left: Vec<_> = found(&cpu).into_iter().map(|(gfn, _)| gfn).collect();
            let pages = if mmu.profile().page_stats { [2, 0, 0] } else { [0; 3] };
            assert_eq!((left, mmu.leaf_pages()), (vec![5, 3 * span(2) + 9], pages), "{profile}");
            drop(task);
            fast_zap(&mmu, &cpu.task);
            cpu.drop_root();
            let mmu = cpu.close();
            end(&mmu);
        }
    }
}
