//! What a fault of the shadow MMU maps: under direct roots, and along the guest's own tables.

use std::sync::atomic::Ordering;

use crate::machine::{Done, Host, Machine, PAGES, PFN, TABLES, WINDOW};
use tdpmmu_platform::Real;
use tdpmmu_shadow::{GuestFault, GuestPte, ShadowFault, ShadowFrame, ShadowOutcome, walk_guest};
use tdpmmu_spte::Access;

const READ_ONLY: Access = Access { write: false, exec: true, user: true };
const NO_EXEC: Access = Access { write: true, exec: false, user: true };

fn through(gfn: u64) -> Done {
    Done::Through { pfn: gfn + PFN, faults: 1 }
}

#[test]
fn a_direct_root_maps_gfns_to_their_frames_as_large_as_slot_and_host_allow() {
    let mut m = Machine::new();
    let root = m.load_direct();
    assert_eq!(m.write(root, 0, 0x403), Ok(through(0x403)));
    assert_eq!(m.hardware(root, 0x403).1, 2, "the slot is too small for 1G");
    assert_eq!(m.write(root, 0, 0x5ff), Ok(Done::Through { pfn: PFN + 0x5ff, faults: 0 }));
    m.host_level = 1;
    assert_eq!(m.read(root, 0, 0x800), Ok(through(0x800)));
    assert_eq!(m.hardware(root, 0x800).1, 1);
    assert_eq!(m.mmu.counts().leaves, [0, 1, 1, 0]);
    m.finish(&[root]);
}

#[test]
fn a_huge_leaf_gives_way_to_small_ones_and_comes_back_over_their_table() {
    let mut m = Machine::new();
    let root = m.load_direct();
    m.write(root, 0, 0x400).expect("memory");
    let flushes = m.flushes();
    m.host_level = 1;
    let fault = ShadowFault::page(0x400, 0x400 + PFN, 1);
    let outcome = m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
    assert!(matches!(outcome, ShadowOutcome::Fixed { level: 1, .. }));
    assert!(m.flushes() > flushes, "the huge translation may be cached");
    assert_eq!(m.translate(root, 0x401, false, false), None);
    assert_eq!(m.mmu.counts().leaves, [0, 1, 0, 0]);
    let fault = ShadowFault::page(0x401, 0x401 + PFN, 2);
    let outcome = m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
    assert!(matches!(outcome, ShadowOutcome::Fixed { level: 2, .. }));
    assert_eq!(
        m.mmu.counts().leaves,
        [0, 1, 1, 0],
        "the small leaf's page is in no tree, and waits with its leaf for its next use"
    );
    m.finish(&[root]);
}

#[test]
fn what_was_fetched_small_under_the_nx_mitigation_is_not_made_huge_by_the_next_read() {
    let mut m = Machine::new();
    let root = m.load_direct();
    let fetch = ShadowFault {
        write: false,
        exec: true,
        huge_page_disallowed: true,
        nx_huge_pages: true,
        ..ShadowFault::page(0x403, 0x403 + PFN, 1)
    };
    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fetch));
    assert_eq!(m.translate(root, 0x403, false, true), Some(0x403 + PFN));
    let read = |page, mitigated| ShadowFault {
        write: false,
        nx_huge_pages: mitigated,
        ..ShadowFault::page(page, page + PFN, 2)
    };
    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &read(0x404, true)));
    assert_eq!(m.hardware(root, 0x404).1, 1, "the table is kept");
    assert!(m.translate(root, 0x403, false, true).is_some());
    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &read(0x600, true)));
    assert_eq!(
        (m.hardware(root, 0x600).1, m.translate(root, 0x600, false, true)),
        (2, None),
        "huge, and not executable"
    );
    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &read(0x405, false)));
    assert_eq!(m.hardware(root, 0x405).1, 2, "without the mitigation nothing keeps it");
    m.finish(&[root]);
}

#[test]
fn beyond_the_slot_an_access_is_emulated_and_the_entry_remembers() {
    let mut m = Machine::new();
    let root = m.load_direct();
    assert_eq!(m.read(root, 0, PAGES + 5), Ok(Done::Emulated));
    assert!(m.mmu.format().is_mmio(m.hardware(root, PAGES + 5).0));
    m.finish(&[root]);
}

#[test]
fn a_guest_reaches_what_its_tables_say_and_gets_their_faults() {
    for levels in [4, 5] {
        let mut m = Machine::with("6.12", levels);
        let cr3 = m.process();
        m.map_raw(cr3, 0x1234, 0x77, 1, Access::ALL);
        m.map_raw(cr3, 0x1235, 0x78, 1, READ_ONLY);
        m.map_raw(cr3, 0x1236, 0x79, 1, NO_EXEC);
        let root = m.load(cr3);
        assert_eq!(m.write(root, cr3, 0x1234), Ok(through(0x77)));
        assert_eq!(m.read(root, cr3, 0x1235), Ok(through(0x78)));
        assert_eq!(m.write(root, cr3, 0x1235), Err(GuestFault::Protection { page: 0x1235, level: 1 }));
        assert_eq!(
            m.translate(root, 0x1235, true, false),
            None,
            "hardware must not write what the guest forbids"
        );
        assert_eq!(
            m.access(root, cr3, 0x1236, false, true),
            Err(GuestFault::Protection { page: 0x1236, level: 1 })
        );
        m.write(root, cr3, 0x1236).expect("writable");
        assert_eq!(m.translate(root, 0x1236, false, true), None);
        assert_eq!(m.read(root, cr3, 0x1237), Err(GuestFault::NotPresent { page: 0x1237, level: 1 }));
        assert_eq!(
            m.read(root, cr3, 0x9999_9999),
            Err(GuestFault::NotPresent { page: 0x9999_9999, level: 4.min(levels) })
        );
        m.finish(&[root]);
    }
}

#[test]
fn an_upper_entry_without_write_takes_it_from_all_below_and_the_table_has_a_page_for_each_view() {
    let mut m = Machine::new();
    let cr3 = m.process();
    m.map_raw(cr3, 0x1234, 0x77, 1, Access::ALL);
    let (table, _) = m.entry_of(cr3, 0x1234, 1);
    // The same table once more, read-only, a GiB further.
    m.map_raw(cr3, 0x1234 + (1 << 18) + 0x200, 0x78, 1, Access::ALL);
    let (upper, at) = m.entry_of(cr3, 0x1234 + (1 << 18), 2);
    m.host.poke(upper, at, GuestPte::table(table).0 & !GuestPte::WRITE);
    let root = m.load(cr3);
    assert_eq!(m.write(root, cr3, 0x1234), Ok(through(0x77)));
    let second = 0x1234 + (1 << 18);
    assert_eq!(m.read(root, cr3, second), Ok(through(0x77)));
    assert_eq!(m.write(root, cr3, second), Err(GuestFault::Protection { page: second, level: 1 }));
    let shadows = m.shadows_of(table);
    assert_eq!(shadows.len(), 2);
    assert_ne!(shadows[0].role, shadows[1].role);
    m.finish(&[root]);
}

#[test]
fn a_huge_guest_page_is_one_leaf_where_the_host_has_one_and_a_direct_page_where_not() {
    for (host_level, tables) in [(2, 0), (1, 1)] {
        let mut m = Machine::new();
        m.host_level = host_level;
        let cr3 = m.process();
        m.map_raw(cr3, 0x1200, 0x400, 2, READ_ONLY);
        let root = m.load(cr3);
        assert_eq!(m.read(root, cr3, 0x1217), Ok(through(0x417)));
        assert_eq!(m.hardware(root, 0x1217).1, host_level);
        assert_eq!(m.translate(root, 0x1217, true, false), None);
        let direct: Vec<_> = m.pages().into_iter().filter(|page| page.role.direct()).collect();
        assert_eq!(direct.len(), tables);
        if let [page] = &direct[..] {
            assert_eq!((page.gfn, page.role.level()), (0x400, 1));
        }
        m.finish(&[root]);
    }
}

#[test]
fn no_huge_leaf_covers_a_shadowed_table() {
    let mut m = Machine::new();
    let cr3 = m.process();
    // The guest maps its tables' 2 MiB huge, beside the window.
    m.map_raw(cr3, 0x20_0000, TABLES, 2, Access::ALL);
    let root = m.load(cr3);
    let page = 0x20_0000 + 0x100;
    assert_eq!(m.write(root, cr3, page), Ok(through(TABLES + 0x100)));
    assert_eq!(m.hardware(root, page).1, 1, "the root's own table lies in that 2 MiB");
    assert_eq!(m.write(root, cr3, 0x20_0000), Ok(Done::Emulated), "which is cr3, an upper table");
    assert_eq!(m.translate(root, 0x20_0000, false, false), Some(TABLES + PFN));
    m.finish(&[root]);
}

#[test]
fn a_leaf_that_was_writable_before_its_gfn_became_a_table_is_protected_and_flushed() {
    let mut m = Machine::new();
    let cr3 = m.process();
    m.map_raw(cr3, 0x1234, 0x77, 1, Access::ALL);
    let root = m.load(cr3);
    // The guest writes a table that nobody shadows yet: the one for page 0x4_0000.
    m.map_raw(cr3, 0x4_0000, 0x99, 1, Access::ALL);
    let (table, at) = m.entry_of(cr3, 0x4_0000, 1);
    let window = WINDOW + (table - TABLES);
    assert!(matches!(m.write(root, cr3, window), Ok(Done::Through { .. })));
    assert!(m.shadows_of(table).is_empty());
    let flushes = m.flushes();
    m.read(root, cr3, 0x4_0000).expect("mapped");
    assert_eq!(m.translate(root, window, true, false), None, "it is shadowed, and synced");
    assert!(m.translate(root, window, false, false).is_some());
    assert!(m.flushes() > flushes);
    // Level 1 may go unsync: the write goes through, and the page knows.
    assert!(matches!(m.store(root, cr3, table, at, 0), Done::Through { .. }));
    assert!(m.shadows_of(table)[0].unsync);
    m.finish(&[root]);
}

#[test]
fn an_entry_that_changes_between_the_walk_and_the_page_is_not_mapped() {
    // The n-th read of a guest entry after the walk's own: each place where the map step looks again.
    for nth in 1..=4 {
        let mut m = Machine::new();
        let cr3 = m.process();
        m.map_raw(cr3, 0x1234, 0x77, 1, Access::ALL);
        let root = m.load(cr3);
        let (table, at) = m.entry_of(cr3, 0x1234, 1);
        let change = move |host: &Host| host.poke(table, at, GuestPte::leaf(0x78, 1, Access::ALL).0);
        *m.host.before_read.lock().expect("no panic") = Some((4 + nth, Box::new(change)));
        assert_eq!(m.fault(root, cr3, 0x1234, false, false), Ok(ShadowOutcome::Retry), "read {nth}");
        assert_eq!(m.translate(root, 0x1234, false, false), None);
        assert_eq!(m.read(root, cr3, 0x1234), Ok(through(0x78)));
        m.finish(&[root]);
    }
}

#[test]
fn what_the_guest_has_written_and_we_have_not_heard_of_yet_is_not_mixed_with_what_was_there() {
    // Of each level: the entry names another page from here on; the write is emulated, memory first, and another vCPU faults before we are told.
    for level in [1, 2, 3] {
        let mut m = Machine::new();
        m.host_level = 1;
        let cr3 = m.process();
        let leaf = level.min(2);
        m.map_raw(cr3, 0x1200, 0x400, leaf, Access::ALL);
        m.map_raw(cr3, 0x1400, 0x800, leaf, Access::ALL);
        m.map_raw(cr3, 0x20_1200, 0x600, leaf, Access::ALL);
        let root = m.load(cr3);
        m.read(root, cr3, 0x1201).ok();
        m.read(root, cr3, 0x1200).expect("mapped");
        let (table, at) = m.entry_of(cr3, 0x1200, level);
        let (other, there) = m.entry_of(cr3, 0x20_1200, level);
        let was = m.host.peek(table, at);
        m.host.poke(table, at, m.host.peek(other, there));
        m.fault(root, cr3, 0x1202, false, false).ok();
        m.locked(|mmu, guard, _| mmu.page_track_write(guard, 0, table, at * 8, 8));
        assert_eq!(m.read(root, cr3, 0x1200), Ok(through(0x600)), "level {level}");
        // The guest takes it back. A neighbour's fault links the page of the table that was there: nothing of the other is in it.
        m.host.poke(table, at, was);
        m.locked(|mmu, guard, _| mmu.page_track_write(guard, 0, table, at * 8, 8));
        m.read(root, cr3, 0x1400).expect("mapped");
        let found = m.translate(root, 0x1202, false, false);
        assert!(found.is_none() || found == Some(0x402 + PFN), "level {level}: {found:x?}");
        assert_eq!(m.mmu.violations(), Vec::<String>::new());
        m.finish(&[root]);
    }
}

#[test]
fn two_gfns_of_one_frame_are_told_apart_where_a_leaf_is_made_again() {
    let mut m = Machine::new();
    let cr3 = m.process();
    m.map_raw(cr3, 0x1234, 0x77, 1, Access::ALL);
    let root = m.load(cr3);
    m.read(root, cr3, 0x1234).expect("mapped");
    let (table, at) = m.entry_of(cr3, 0x1234, 1);
    // The guest points the page to gfn 0x78, which the same frame backs, and flushes nothing yet.
    m.store(root, cr3, table, at, GuestPte::leaf(0x78, 1, Access::ALL).0);
    let walk = walk_guest::<Real>(&*m.host, 0, cr3, 4, 0x1234, false, false).expect("present");
    let frame = ShadowFrame::Page { pfn: 0x77 + PFN, writable: true };
    let fault = ShadowFault { gva: 0x1234, frame, guest: Some(walk), ..ShadowFault::page(0x78, 0, 1) };
    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
    let of = |m: &mut Machine, gfn| m.locked(|mmu, guard, _| mmu.rmap_of(guard, 0, gfn, 1).len());
    assert_eq!((of(&mut m, 0x77), of(&mut m, 0x78)), (0, 1));
    m.finish(&[root]);
}

#[test]
fn two_processes_that_share_a_table_share_its_page() {
    let mut m = Machine::new();
    let (one, two) = (m.process(), m.process());
    m.map_raw(one, 0x1234, 0x77, 1, Access::ALL);
    let (upper, at) = m.entry_of(one, 0x1234, 4);
    m.host.poke(two, at, m.host.peek(upper, at));
    let roots = [m.load(one), m.load(two)];
    m.read(roots[0], one, 0x1234).expect("mapped");
    assert_eq!(m.read(roots[1], two, 0x1234), Ok(through(0x77)));
    let (table, _) = m.entry_of(one, 0x1234, 3);
    let shadows = m.shadows_of(table);
    assert_eq!((shadows.len(), shadows[0].parents.len()), (1, 2));
    m.finish(&roots);
}

#[test]
fn a_root_is_found_again_and_its_table_is_write_protected_from_the_load_on() {
    let mut m = Machine::new();
    let (one, two) = (m.process(), m.process());
    let first = m.load(one);
    assert!(matches!(m.write(first, one, WINDOW + (two - TABLES)), Ok(Done::Through { .. })));
    let second = m.load(two);
    assert_eq!(m.translate(first, WINDOW + (two - TABLES), true, false), None);
    assert_eq!(m.write(first, one, WINDOW + (two - TABLES)), Ok(Done::Emulated));
    assert_eq!(m.load(one), first);
    m.finish(&[first, first, second]);
}

#[test]
fn what_is_made_writable_in_a_logged_slot_is_told_to_the_log() {
    let mut m = Machine::new();
    let cr3 = m.process();
    m.map_raw(cr3, 0x1234, 0x77, 1, Access::ALL);
    let root = m.load(cr3);
    m.dirty_tracked = true;
    m.write(root, cr3, 0x1234).expect("writable");
    assert_eq!(m.host.dirtied.load(Ordering::Relaxed), 1);
    m.finish(&[root]);
}

#[test]
fn a_page_of_the_host_that_is_read_only_is_never_writable_and_another_frame_replaces_the_leaf() {
    // Before 6.13 a leaf that is made again over a writable one lacks Dirty.
    let mut m = Machine::with("7.2", 4);
    let root = m.load_direct();
    m.host.writable.store(false, Ordering::Relaxed);
    let fault = ShadowFault {
        frame: ShadowFrame::Page { pfn: 0x5_0000, writable: false },
        write: false,
        ..ShadowFault::page(0x77, 0, 1)
    };
    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
    assert_eq!(
        (m.translate(root, 0x77, false, false), m.translate(root, 0x77, true, false)),
        (Some(0x5_0000), None)
    );
    let flushes = m.flushes();
    let fault = ShadowFault::page(0x77, 0x6_0000, 1);
    m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
    assert_eq!(m.translate(root, 0x77, true, false), Some(0x6_0000));
    assert!(m.flushes() > flushes);
    assert_eq!(m.mmu.counts().leaves, [0, 1, 0, 0]);
    let again = m.locked(|mmu, guard, cache| mmu.map(guard, cache, root, &fault));
    assert_eq!(again, ShadowOutcome::Spurious);
    m.finish(&[root]);
}
