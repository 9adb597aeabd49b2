//! Bulk population builds what faults build: entry by entry, header by header, count by count.

mod common;

use std::collections::BTreeMap;

use common::{Cpu, Setup, World, frame_of, page_fault, template};
use tdpmmu_mmu::{BulkError, BulkMap, MapOutcome};
use tdpmmu_oracle::{Tree, Verdict};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{FormatKind, Spte};

/// A tree without the pool's indices, which two trees need not share.
#[derive(Debug, PartialEq, Eq, Default)]
struct Shape {
    /// By gfn and level; a table is only said to be one.
    entries: BTreeMap<(u64, u8), (bool, u64)>,
    /// Tables' headers: role, parent's (level, gfn) and index; by gfn and level.
    headers: BTreeMap<(u64, u8), (u32, u8, u64, u16)>,
    leaf_pages: [i64; 3],
    linked: i64,
}

fn shape(world: &World) -> Shape {
    let task = world.task();
    let guard = world.mmu.lock.write(&task);
    let mut verdict = Verdict::default();
    let tree = Tree::read(&world.mmu, &guard, &mut verdict);
    assert_eq!(verdict.violations(), []);
    let pfn_mask = Spte::PFN_MASK;
    let mut shape =
        Shape { leaf_pages: world.mmu.leaf_pages(), linked: world.mmu.linked_tables(), ..Shape::default() };
    for (key, spte) in tree.entries {
        let table = spte.is_table(key.level);
        let raw = if table { spte.raw() & !pfn_mask } else { spte.raw() };
        shape.entries.insert((key.gfn, key.level), (table, raw));
    }
    for seen in tree.tables {
        let meta = world.mmu.pool().meta(seen.table);
        let (parent, index) = meta.parent().expect("not a root");
        let above = world.mmu.pool().meta(parent);
        let header = (meta.role(), above.level(), above.gfn(), index);
        assert!(shape.headers.insert((meta.gfn(), meta.level()), header).is_none());
    }
    shape
}

struct Case {
    gfns: std::ops::Range<u64>,
    level: u8,
    /// Present before.
    before: Vec<(u64, u8)>,
}

fn cases() -> Vec<Case> {
    let case = |gfns, level, before: &[(u64, u8)]| Case { gfns, level, before: before.to_vec() };
    vec![
        case(0..1, 1, &[]),
        case(0..span(2), 1, &[]),
        // More tables than one word of the pool's free map.
        case(0..70 * span(2), 1, &[]),
        case(17..span(2) - 1, 1, &[]),
        case(100..5 * span(2) + 3, 1, &[]),
        case(span(3) - 5..span(3), 1, &[]),
        // Leaves and tables of others in the way, at both ends and in the middle.
        case(0..6 * span(2), 1, &[(0, 1), (2 * span(2) + 5, 1), (6 * span(2) - 1, 1)]),
        case(300..4 * span(2), 1, &[(span(2) + 1, 1), (5 * span(2), 1)]),
        case(7 * span(3)..7 * span(3) + 40 * span(2), 2, &[(7 * span(3) + 3 * span(2), 2)]),
        case(511 * span(4)..511 * span(4) + span(3), 3, &[]),
    ]
}

#[test]
fn bulk_population_is_what_faults_would_have_built() {
    for &profile in common::PROFILES {
        let both = [FormatKind::Npt, FormatKind::Ept];
        for &kind in if profile == "6.12" { &both[..] } else { &both[..1] } {
            for (i, case) in cases().into_iter().enumerate() {
                for as_id in [0, 1] {
                    let build = |bulk: bool| {
                        let setup = Setup { profile, kind, ..Setup::default() };
                        let world = setup.build();
                        let mut cpu = Cpu::new(&world, as_id);
                        for &(gfn, level) in &case.before {
                            cpu.access(gfn, level, true);
                        }
                        let unit = span(case.level);
                        let mut new = 0;
                        if bulk {
                            let template = template(&world.mmu, case.level, false);
                            let map = BulkMap {
                                gfns: case.gfns.clone(),
                                first_pfn: frame_of(case.gfns.start),
                                level: case.level,
                                template,
                            };
                            new = cpu.bulk(&map).expect("room");
                        } else {
                            for gfn in case.gfns.clone().step_by(unit as usize) {
                                // What is mapped faults no more.
                                let root = cpu.load().expect("room");
                                if world.mmu.lookup(&cpu.task, root, gfn).is_some() {
                                    continue;
                                }
                                match cpu.touch(gfn, case.level, true).expect("room") {
                                    MapOutcome::Fixed { .. } => new += 1,
                                    MapOutcome::Spurious => {}
                                    other => panic!("{other:?}"),
                                }
                            }
                        }
                        let built = shape(&world);
                        let task = world.task();
                        world.check(&task, "populated");
                        drop(task);
                        cpu.close();
                        world.end();
                        (built, new)
                    };
                    let (bulk, faults) = (build(true), build(false));
                    assert_eq!(bulk.0.leaf_pages, faults.0.leaf_pages, "{profile} case {i}");
                    assert!(bulk == faults, "{profile} {kind:?} case {i}: bulk and faults differ");
                    assert!(bulk.1 > 0, "case {i} mapped nothing");
                }
            }
        }
    }
}

#[test]
fn bulk_population_refuses_ranges_that_it_cannot_mean() {
    let world = Setup::default().build();
    let mut cpu = Cpu::new(&world, 0);
    let template = template(&world.mmu, 1, false);
    for (gfns, level) in [(5..5, 1), (1..span(2), 2), (span(3) - 1..span(3) + 1, 1), (0..span(4), 4)] {
        let map = BulkMap { gfns: gfns.clone(), first_pfn: 0, level, template };
        assert_eq!(cpu.bulk(&map), Err(BulkError::Range(gfns, level)));
    }
    cpu.close();
    world.end();
}

#[test]
fn a_difference_between_bulk_and_faults_would_be_seen() {
    let build = |write: bool| {
        let world = Setup::default().build();
        let mut cpu = Cpu::new(&world, 0);
        let mut fault = page_fault(0, 9, 1, true);
        if !write {
            fault.frame = tdpmmu_mmu::Frame::Page { pfn: frame_of(9), writable: false };
        }
        cpu.fault(&fault).expect("room");
        let built = shape(&world);
        cpu.close();
        world.end();
        built
    };
    assert_eq!(build(true), build(true));
    assert_ne!(build(true), build(false));
}
