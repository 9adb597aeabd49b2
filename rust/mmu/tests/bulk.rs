//! Bulk population when tables are short: it counts what it mapped, sleeps nowhere under mmu_lock, and finds single pages.

mod common;

use std::sync::atomic::Ordering;

use common::{Cpu, Setup, end};
use tdpmmu_mmu::{BulkError, BulkMap, MapOutcome};
use tdpmmu_spte::Spte;
use tdpmmu_spte::geometry::{index, span};
use tdpmmu_table::PoolError;

fn bulk(cpu: &mut Cpu, gfns: std::ops::Range<u64>) -> Result<u64, BulkError> {
    let made = cpu.mmu.format().make_leaf(&tdpmmu_spte::MakeLeaf::default());
    let map = BulkMap { first_pfn: 0x10_0000 + gfns.start, gfns, level: 1, template: made.spte };
    let mut guard = cpu.mmu.lock.read(&cpu.task);
    cpu.mmu.populate_bulk(&mut guard, &mut cpu.cache, cpu.root, &map)
}

#[test]
fn a_refused_bulk_population_counts_what_it_mapped() {
    let mmu = Setup { max_tables: 40, ..Setup::default() }.build();
    let mut cpu = Cpu::new(&mmu);
    let error = bulk(&mut cpu, 0..60 * span(2)).expect_err("60 leaf tables do not fit into 40");
    assert!(matches!(error, BulkError::Pool(PoolError::Exhausted { .. })), "{error}");
    let counts = mmu.count(&cpu.task, cpu.root);
    assert!(counts.leaves[1] > 0, "some of it fitted");
    assert_eq!(mmu.leaf_pages()[0] as u64, counts.leaves[1]);
    assert_eq!(mmu.linked_tables() as u64, counts.all_tables() - 1);
    cpu.drop_root();
    end(&cpu.close());
}

#[test]
fn a_bulk_population_whose_cache_runs_dry_refills_it_without_sleeping() {
    // `might_sleep` under mmu_lock panics in builds with debug assertions.
    let mmu = Setup::default().build();
    let mut cpu = Cpu::new(&mmu);
    cpu.cache.drain(mmu.pool());
    assert_eq!(bulk(&mut cpu, 5..2 * span(2) + 5), Ok(2 * span(2)));
    cpu.drop_root();
    end(&cpu.close());
}

#[test]
fn bulk_population_fills_a_pool_to_its_last_page() {
    let mmu = Setup { max_tables: 100, ..Setup::default() }.build();
    let mut cpu = Cpu::new(&mmu);
    cpu.cache.drain(mmu.pool());
    // The root and two tables above; no whole word of 64 free pages is left for long.
    for i in 0..97 {
        assert_eq!(bulk(&mut cpu, i * span(2)..(i + 1) * span(2)), Ok(span(2)), "2 MiB number {i}");
        cpu.cache.drain(mmu.pool());
    }
    assert_eq!(mmu.pool().stats().taken, 100);
    assert!(bulk(&mut cpu, 97 * span(2)..98 * span(2)).is_err());
    cpu.drop_root();
    end(&cpu.close());
}

#[test]
fn bulk_population_leaves_larger_leaves_as_they_are_and_goes_on_after_them() {
    let mmu = Setup::default().build();
    let mut cpu = Cpu::new(&mmu);
    for (gfn, level) in [(span(2), 2), (span(3), 3)] {
        assert!(matches!(cpu.fault(gfn, level), MapOutcome::Fixed { .. }));
    }
    assert_eq!(
        bulk(&mut cpu, 0..3 * span(2)),
        Ok(2 * span(2)),
        "a whole table, the 2 MiB leaf, a whole table"
    );
    assert_eq!(bulk(&mut cpu, span(2) + 5..3 * span(2) + 7), Ok(7), "from the middle of it");
    assert_eq!(bulk(&mut cpu, span(3) + 9..2 * span(3)), Ok(0), "all of it under the 1 GiB leaf");
    let counts = mmu.count(&cpu.task, cpu.root);
    assert_eq!((counts.leaves[1], counts.leaves[2], counts.leaves[3]), (2 * span(2) + 7, 1, 1));
    assert_eq!(mmu.leaf_pages(), [2 * span(2) as i64 + 7, 1, 1]);
    cpu.drop_root();
    end(&cpu.close());
}

#[test]
fn bulk_population_waits_out_a_frozen_entry_and_leaves_no_hole() {
    for level in [1, 2] {
        let mmu = Setup::default().build();
        let mut cpu = Cpu::new(&mmu);
        // The path to the entry at gfn 3 (level 1) or 0 (level 2).
        let gfn = if level == 1 { 3 } else { 0 };
        assert_eq!(bulk(&mut cpu, span(2) * 4..span(2) * 4 + 1), Ok(1));
        if level == 1 {
            assert_eq!(bulk(&mut cpu, 0..1), Ok(1));
        }
        let mut table = cpu.root;
        for at in (level + 1..=4).rev() {
            table = Spte(mmu.pool().entries(table)[index(gfn, at)].load(Ordering::Acquire)).pfn() as u32;
        }
        let cell = &mmu.pool().entries(table)[index(gfn, level)];
        cell.store(mmu.format().frozen().raw(), Ordering::Release);
        let made = std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(20));
                cell.store(mmu.format().empty().raw(), Ordering::Release);
            });
            bulk(&mut cpu, 0..span(2))
        });
        assert_eq!(made, Ok(if level == 1 { span(2) - 1 } else { span(2) }), "level {level}");
        assert_eq!(mmu.count(&cpu.task, cpu.root).leaves[1], span(2) + 1, "level {level}: a hole");
        cpu.drop_root();
        end(&cpu.close());
    }
}
