//! Pages of a nested guest's tables under TDP: they go with their last parent, whoever holds them.

use crate::common::{Host, Setup, World, audit::audit, books};
use tdpmmu_platform::{Real, Task};
use tdpmmu_shadow::{GuestPte, ShadowDesign, ShadowFault, ShadowFrame, ShadowOutcome, walk_guest};
use tdpmmu_spte::Access;
use tdpmmu_table::TableCache;

/// L1's tables for its L2: a root of five levels, whose first entry is a root of four.
const ROOT5: u64 = 0x100;
const ROOT4: u64 = 0x101;
/// The tables below, one a level, and a second one of level 1.
const L3: u64 = 0x102;
const L2: u64 = 0x103;
const L1: u64 = 0x104;
const OTHER_L1: u64 = 0x105;

fn world(setup: Setup) -> World {
    let world = World::new(setup);
    world.host.set_books([books(0, 0, 1 << 12)]);
    for (table, child) in [(ROOT5, ROOT4), (ROOT4, L3), (L3, L2), (L2, L1)] {
        world.host.set_word(table, 0, GuestPte::table(child).0);
    }
    world.host.set_word(L2, 1, GuestPte::table(OTHER_L1).0);
    for n in 0..8 {
        world.host.set_word(L1, n, GuestPte::leaf(0x200 + u64::from(n), 1, Access::ALL).0);
        world.host.set_word(OTHER_L1, n, GuestPte::leaf(0x300 + u64::from(n), 1, Access::ALL).0);
    }
    world
}

fn root(world: &World, task: &Task<Real>, cr3: u64, levels: u8) -> u32 {
    let mut cache = world.cache(task);
    let mut guard = world.lock.write(task);
    let root = world.mmu.load_root(&mut guard, &mut cache, 0, cr3, world.nested_role(levels)).expect("room");
    drop(guard);
    cache.drain(&world.pool);
    root
}

fn read(world: &World, task: &Task<Real>, root: u32, cr3: u64, levels: u8, page: u64) -> ShadowOutcome {
    let walk = walk_guest::<Real>(&*world.host, 0, cr3, levels, page, false, false).expect("mapped");
    let frame = ShadowFrame::Page { pfn: 1 << 20 | walk.gfn, writable: true };
    let fault = ShadowFault {
        gfn: walk.gfn,
        frame,
        write: false,
        guest: Some(walk),
        ..ShadowFault::page(page, 0, 1)
    };
    let mut cache = TableCache::default();
    world.mmu.top_up(task, &mut cache).expect("room");
    let mut guard = world.lock.write(task);
    let outcome = world.mmu.map(&mut guard, &mut cache, root, &fault);
    assert_eq!(audit(world, &guard), Vec::<String>::new());
    drop(guard);
    cache.drain(&world.pool);
    outcome
}

fn fixed(outcome: ShadowOutcome) {
    assert!(matches!(outcome, ShadowOutcome::Fixed { level: 1, .. }), "{outcome:?}");
}

#[test]
fn two_roots_of_different_height_share_what_lies_below() {
    // Re-making a leaf sets Dirty again from 6.18 on: it is found as it was.
    let world = world(Setup { tdp_enabled: true, profile: "6.18", ..Setup::default() });
    let task = world.task();
    let five = root(&world, &task, ROOT5, 5);
    fixed(read(&world, &task, five, ROOT5, 5, 3));
    let four = root(&world, &task, ROOT4, 4);
    assert_eq!(read(&world, &task, four, ROOT4, 4, 3), ShadowOutcome::Spurious);
    {
        let guard = world.lock.write(&task);
        let pages = world.mmu.pages(&guard);
        assert_eq!(pages.len(), 5);
        let shared = pages.iter().find(|page| page.table == four).expect("a page");
        assert_eq!((shared.root_count, shared.parents.clone()), (1, vec![(five, 0)]));
        assert_eq!(world.host.protected.lock().expect("unpoisoned").len(), 5, "L1's other MMU was asked");
        assert!(world.mmu.is_shadowed(&guard, 0, L2) && !world.mmu.is_shadowed(&guard, 0, 0x200));
    }
    world.end(&task, &[five, four]);
}

#[test]
fn under_tdp_a_page_goes_with_its_last_parent_and_elsewhere_it_waits() {
    for (tdp_enabled, left) in [(true, 2), (false, 4)] {
        let world = world(Setup { tdp_enabled, ..Setup::default() });
        let task = world.task();
        let four = root(&world, &task, ROOT4, 4);
        fixed(read(&world, &task, four, ROOT4, 4, 3));
        assert_eq!(world.mmu.counts().pages, 4);
        // L1 writes the entry that leads from level 3 to level 2.
        world.host.set_word(L3, 0, 0);
        let mut guard = world.lock.write(&task);
        world.mmu.page_track_write(&mut guard, 0, L3, 0, 8);
        assert_eq!(audit(&world, &guard), Vec::<String>::new());
        drop(guard);
        assert_eq!(world.mmu.counts().pages, left, "tdp_enabled {tdp_enabled}");
        world.end(&task, &[four]);
    }
}

#[test]
fn room_for_a_fault_can_cost_the_faulting_vcpu_its_own_root() {
    let world = world(Setup { tdp_enabled: true, quota: 10, ..Setup::default() });
    let task = world.task();
    let five = root(&world, &task, ROOT5, 5);
    fixed(read(&world, &task, five, ROOT5, 5, 3));
    let four = root(&world, &task, ROOT4, 4);
    fixed(read(&world, &task, four, ROOT4, 4, 512 + 3));
    let mut guard = world.lock.write(&task);
    // Nobody runs on the taller tree any more; it is the oldest page that no vCPU holds.
    world.mmu.put_root(&mut guard, five);
    assert!(!world.mmu.is_obsolete(four));
    let before = Host::count(&world.host.waits);
    assert!(world.mmu.make_pages_available(&mut guard));
    // Passed over as a candidate, reached as a child: it is empty and invalid, and whoever asks now is told.
    assert!(world.mmu.is_obsolete(four));
    assert_eq!(Host::count(&world.host.waits), before + 1);
    assert_eq!((world.mmu.counts().pages, world.mmu.counts().zapped_held), (1, 1));
    assert_eq!(audit(&world, &guard), Vec::<String>::new());
    drop(guard);
    world.end(&task, &[four]);
}

#[test]
fn a_walk_that_takes_children_along_begins_again_and_still_ends() {
    for design in [ShadowDesign::Walk, ShadowDesign::WalkBreak, ShadowDesign::Gen] {
        let world = world(Setup { tdp_enabled: true, design, ..Setup::default() });
        let task = world.task();
        let five = root(&world, &task, ROOT5, 5);
        fixed(read(&world, &task, five, ROOT5, 5, 3));
        fixed(read(&world, &task, five, ROOT5, 5, 512 + 3));
        let four = root(&world, &task, ROOT4, 4);
        assert_eq!(world.mmu.counts().pages, 6);
        world.fast_zap(&task, None);
        let counts = world.mmu.counts();
        // Two held roots. Newest first, each page but the roots goes alone; oldest first, the root takes all.
        assert_eq!((counts.pages, counts.zapped_held, counts.zapped), (2, 2, 4), "{design:?}");
        assert_eq!(counts.restarts, u64::from(design == ShadowDesign::Gen));
        assert!(world.mmu.is_obsolete(five) && world.mmu.is_obsolete(four));
        world.end(&task, &[five, four]);
    }
}
