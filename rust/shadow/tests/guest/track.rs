//! Writes to shadowed tables that were emulated: seen at once, and too many of them end the shadow.

use crate::machine::{Done, Machine, PFN, TABLES, WINDOW};
use tdpmmu_shadow::GuestPte;
use tdpmmu_spte::Access;

fn running() -> (Machine, u64, u32, (u64, u16)) {
    let mut m = Machine::new();
    let cr3 = m.process();
    m.map_raw(cr3, 0x1000, 0x100, 1, Access::ALL);
    let root = m.load(cr3);
    m.read(root, cr3, 0x1000).expect("mapped");
    let upper = m.entry_of(cr3, 0x1000, 2);
    (m, cr3, root, upper)
}

#[test]
fn a_write_to_an_upper_table_is_emulated_and_seen_without_a_flush_of_the_guest() {
    let (mut m, cr3, root, (table, at)) = running();
    let (flushes, other) = (m.flushes(), m.new_table());
    m.host.poke(other, 0, GuestPte::leaf(0x500, 1, Access::ALL).0);
    assert_eq!(m.store(root, cr3, table, at, GuestPte::table(other).0), Done::Emulated);
    assert!(m.flushes() > flushes);
    assert_eq!(m.translate(root, 0x1000, false, false), None);
    assert_eq!(m.read(root, cr3, 0x1000), Ok(Done::Through { pfn: 0x500 + PFN, faults: 1 }));
    m.finish(&[root]);
}

#[test]
fn an_upper_table_never_goes_unsync() {
    let (mut m, cr3, root, (table, at)) = running();
    m.store(root, cr3, table, at + 9, 0);
    let shadows = m.shadows_of(table);
    assert!(!shadows.is_empty() && shadows.iter().all(|page| !page.unsync));
    assert_eq!(m.translate(root, WINDOW + (table - TABLES), true, false), None);
    m.finish(&[root]);
}

#[test]
fn three_writes_without_a_fault_between_zap_the_page_and_the_memory_is_writable_again() {
    let (mut m, cr3, root, (table, at)) = running();
    for n in 0..2 {
        assert_eq!(m.store(root, cr3, table, at + 9 + n, 0), Done::Emulated);
        assert_eq!(m.shadows_of(table)[0].flooding, u32::from(n) + 1);
    }
    assert_eq!(m.store(root, cr3, table, at + 9, 0), Done::Emulated);
    assert!(m.shadows_of(table).is_empty());
    assert!(matches!(m.store(root, cr3, table, at + 9, 0), Done::Through { .. }));
    assert_eq!(
        m.read(root, cr3, 0x1000),
        Ok(Done::Through { pfn: 0x100 + PFN, faults: 1 }),
        "and a fault shadows it again"
    );
    m.finish(&[root]);
}

#[test]
fn a_fault_through_the_table_starts_the_count_again() {
    let (mut m, cr3, root, (table, at)) = running();
    for round in 0..5 {
        for n in 0..2 {
            assert_eq!(m.store(root, cr3, table, at + 9 + n, 0), Done::Emulated, "round {round}");
        }
        let (leaf, slot) = m.entry_of(cr3, 0x1000, 1);
        // Something below is used for the first time.
        m.host.poke(leaf, slot + 1 + round, GuestPte::leaf(0x200, 1, Access::ALL).0);
        m.read(root, cr3, 0x1001 + u64::from(round)).expect("mapped");
        assert_eq!(m.shadows_of(table)[0].flooding, 0);
    }
    m.finish(&[root]);
}

#[test]
fn a_write_that_no_guest_makes_to_a_table_zaps_it_at_once() {
    for (offset, bytes, zaps) in
        [(4, 8, true), (16, 2, true), (3, 1, true), (16, 4, false), (20, 4, false), (16, 1, false)]
    {
        let (mut m, _, root, (table, _)) = running();
        m.locked(|mmu, guard, _| mmu.page_track_write(guard, 0, table, offset, bytes));
        assert_eq!(m.shadows_of(table).is_empty(), zaps, "{bytes} bytes at {offset}");
        m.finish(&[root]);
    }
}

#[test]
fn a_write_beside_any_table_changes_nothing_and_a_root_that_is_flooded_is_reloaded() {
    let (mut m, cr3, root, _) = running();
    let before = (m.pages().len(), m.flushes());
    m.locked(|mmu, guard, _| mmu.page_track_write(guard, 0, 0x100, 0, 8));
    assert_eq!((m.pages().len(), m.flushes()), before);
    for _ in 0..3 {
        m.locked(|mmu, guard, _| mmu.page_track_write(guard, 0, cr3, 4000, 8));
    }
    assert!(m.mmu.is_obsolete(root));
    assert_eq!(m.host.reloads.load(std::sync::atomic::Ordering::Relaxed), 1);
    let fresh = m.load(cr3);
    assert_ne!(fresh, root);
    assert_eq!(m.read(fresh, cr3, 0x1000), Ok(Done::Through { pfn: 0x100 + PFN, faults: 1 }));
    m.finish(&[root, fresh]);
}
