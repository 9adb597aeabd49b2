//! Unsync pages: what the guest may do unseen, and when it is seen.

use crate::machine::{Done, Machine, PFN, TABLES, WINDOW};
use proptest::prelude::*;
use tdpmmu_platform::Real;
use tdpmmu_shadow::{GuestPte, walk_guest};
use tdpmmu_spte::Access;

const READ_ONLY: Access = Access { write: false, exec: true, user: true };

/// A process with pages 0x1000.. mapped to gfns 0x100.., all read once.
fn running(pages: u64) -> (Machine, u64, u32) {
    let mut m = Machine::new();
    let cr3 = m.process();
    for n in 0..pages {
        m.map_raw(cr3, 0x1000 + n, 0x100 + n, 1, Access::ALL);
    }
    let root = m.load(cr3);
    for n in 0..pages {
        m.write(root, cr3, 0x1000 + n).expect("mapped");
    }
    (m, cr3, root)
}

#[test]
fn a_change_and_a_flush_are_seen_and_before_the_flush_the_old_translation_may_be_used() {
    let (mut m, cr3, root) = running(3);
    let (table, at) = m.entry_of(cr3, 0x1000, 1);
    let done = m.store(root, cr3, table, at, GuestPte::leaf(0x500, 1, Access::ALL).0);
    assert!(matches!(done, Done::Through { .. }), "level 1 goes unsync: no emulation");
    m.store(root, cr3, table, at + 1, 0);
    assert_eq!(m.translate(root, 0x1000, false, false), Some(0x100 + PFN), "as a TLB would have it");
    assert_eq!(m.translate(root, 0x1001, false, false), Some(0x101 + PFN));
    let flushes = m.flushes();
    m.flush(root);
    assert!(m.flushes() > flushes);
    assert_eq!(m.translate(root, 0x1000, false, false), None);
    assert_eq!(m.read(root, cr3, 0x1000), Ok(Done::Through { pfn: 0x500 + PFN, faults: 1 }));
    assert!(m.read(root, cr3, 0x1001).is_err());
    assert_eq!(m.translate(root, 0x1002, true, false), Some(0x102 + PFN), "what did not change stays");
    m.finish(&[root]);
}

#[test]
fn a_sync_makes_the_table_read_only_again_and_the_next_write_unsync_again() {
    let (mut m, cr3, root) = running(1);
    let (table, at) = m.entry_of(cr3, 0x1000, 1);
    let window = WINDOW + (table - TABLES);
    for round in 0..3 {
        m.store(root, cr3, table, at + 7, round);
        let page = m.shadows_of(table).remove(0);
        assert!(page.unsync && m.translate(root, window, true, false).is_some());
        let top = m.pages().into_iter().find(|page| page.table == root).expect("the root");
        assert_eq!(top.unsync_children, 1);
        m.flush(root);
        let page = m.shadows_of(table).remove(0);
        assert!(!page.unsync);
        assert_eq!(m.translate(root, window, true, false), None);
        let top = m.pages().into_iter().find(|page| page.table == root).expect("the root");
        assert_eq!(top.unsync_children, 0);
    }
    m.finish(&[root]);
}

#[test]
fn a_flush_with_nothing_unsync_costs_no_flush_of_ours() {
    let (mut m, _, root) = running(3);
    let flushes = m.flushes();
    m.flush(root);
    assert_eq!(m.flushes(), flushes);
    m.finish(&[root]);
}

#[test]
fn invlpg_looks_at_one_entry_and_leaves_the_page_unsync() {
    let (mut m, cr3, root) = running(2);
    let (table, at) = m.entry_of(cr3, 0x1000, 1);
    m.store(root, cr3, table, at, 0);
    m.store(root, cr3, table, at + 1, 0);
    m.locked(|mmu, guard, _| mmu.invlpg(guard, root, 0x1000));
    assert_eq!(m.translate(root, 0x1000, false, false), None);
    assert!(m.translate(root, 0x1001, false, false).is_some());
    assert!(m.shadows_of(table)[0].unsync);
    m.finish(&[root]);
}

#[test]
fn less_permission_is_taken_and_more_is_given_without_losing_the_page() {
    let (mut m, cr3, root) = running(1);
    let (table, at) = m.entry_of(cr3, 0x1000, 1);
    m.store(root, cr3, table, at, GuestPte::leaf(0x100, 1, READ_ONLY).0);
    m.flush(root);
    assert_eq!(m.translate(root, 0x1000, true, false), None);
    assert_eq!(m.translate(root, 0x1000, false, false), Some(0x100 + PFN));
    m.store(root, cr3, table, at, GuestPte::leaf(0x100, 1, Access::ALL).0);
    m.flush(root);
    assert_eq!(m.translate(root, 0x1000, true, false), Some(0x100 + PFN));
    m.finish(&[root]);
}

#[test]
fn a_page_is_compared_when_another_tree_links_it_and_an_upper_table_has_no_unsync_page() {
    let (mut m, cr3, root) = running(1);
    let (table, at) = m.entry_of(cr3, 0x1000, 1);
    m.store(root, cr3, table, at, GuestPte::leaf(0x500, 1, Access::ALL).0);
    // Another process links the same table of level 1.
    let other = m.process();
    m.map_raw(other, 0x1000, 0, 1, Access::ALL);
    let (upper, slot) = m.entry_of(other, 0x1000, 2);
    m.host.poke(upper, slot, GuestPte::table(table).0);
    let second = m.load(other);
    assert_eq!(m.read(second, other, 0x1000), Ok(Done::Through { pfn: 0x500 + PFN, faults: 1 }));
    assert_eq!(m.shadows_of(table).len(), 1);
    // And a third uses it as an upper table: as its root.
    let third = m.load(table);
    let shadows = m.shadows_of(table);
    assert_eq!(shadows.len(), 1, "the unsync page of level 1 is gone: {shadows:?}");
    assert_eq!(shadows[0].table, third);
    m.finish(&[root, second, third]);
}

#[test]
fn a_tree_that_links_an_unsync_page_anew_sees_what_the_guest_has_written_at_once() {
    // The other process shares the table of this level: the unsync page itself, or one above it.
    for shared in [1, 2] {
        let (mut m, cr3, root) = running(2);
        let (table, at) = m.entry_of(cr3, 0x1000, 1);
        m.store(root, cr3, table, at, GuestPte::leaf(0x500, 1, Access::ALL).0);
        assert!(m.shadows_of(table)[0].unsync);
        let other = m.process();
        m.map_raw(other, 0x1000, 0, 1, Access::ALL);
        let (upper, slot) = m.entry_of(other, 0x1000, shared + 1);
        let (there, _) = m.entry_of(cr3, 0x1000, shared);
        m.host.poke(upper, slot, GuestPte::table(there).0);
        let second = m.load(other);
        // A fault on the neighbour links the page. Of page 0x1000 this tree had no translation: there was nothing to flush.
        m.read(second, other, 0x1001).expect("mapped");
        let found = m.translate(second, 0x1000, false, false);
        assert!(found.is_none() || found == Some(0x500 + PFN), "level {shared}: {found:x?}");
        m.finish(&[root, second]);
    }
}

#[test]
fn many_unsync_pages_are_synced_in_batches_with_a_flush_each() {
    let mut m = Machine::new();
    let cr3 = m.process();
    for n in 0..40 {
        m.map_raw(cr3, 0x1_0000 + n * 512, 0x100 + n, 1, Access::ALL);
    }
    let root = m.load(cr3);
    for n in 0..40 {
        m.read(root, cr3, 0x1_0000 + n * 512).expect("mapped");
        let (table, at) = m.entry_of(cr3, 0x1_0000 + n * 512, 1);
        m.store(root, cr3, table, at, 0);
    }
    let flushes = m.flushes();
    m.flush(root);
    // 16, 16, 8: one before each comparison, and one for what the last has dropped.
    assert_eq!(m.flushes() - flushes, 4);
    assert!(m.pages().iter().all(|page| !page.unsync && page.unsync_children == 0));
    for n in 0..40 {
        assert_eq!(m.translate(root, 0x1_0000 + n * 512, false, false), None);
    }
    m.finish(&[root]);
}

/// After a flush hardware has nothing that the guest's tables do not say, and writes no table that a synced page shadows.
fn agrees(m: &mut Machine, cr3: u64, root: u32, pages: &[u64]) -> Result<(), TestCaseError> {
    for &page in pages {
        let walk = walk_guest::<Real>(&*m.host, 0, cr3, m.levels, page, false, false).ok();
        if let Some(pfn) = m.translate(root, page, false, false) {
            let walk = walk
                .ok_or_else(|| TestCaseError::fail(format!("page {page:#x}: the guest has taken it back")))?;
            prop_assert_eq!(pfn, walk.gfn + PFN, "page {:#x}", page);
            if m.translate(root, page, true, false).is_some() {
                prop_assert!(walk.access.write, "page {:#x} is read-only", page);
                prop_assert!(
                    m.shadows_of(walk.gfn).iter().all(|shadow| shadow.unsync),
                    "page {page:#x} is a synced table"
                );
            }
            if m.translate(root, page, false, true).is_some() {
                prop_assert!(walk.access.exec, "page {:#x} is not executable", page);
            }
        }
    }
    Ok(())
}

#[derive(Clone, Debug)]
enum Step {
    Read(usize),
    Write(usize),
    Fetch(usize),
    /// The guest points a leaf elsewhere (level 1), or takes it away.
    Change(usize, Option<(u64, u64)>),
    /// The guest points an upper entry to the table of another region, or takes it away.
    Upper(usize, Option<usize>),
    Invlpg(usize),
    Flush,
    OtherProcess,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0usize..12).prop_map(Step::Read),
        4 => (0usize..12).prop_map(Step::Write),
        1 => (0usize..12).prop_map(Step::Fetch),
        4 => (0usize..12, prop::option::of((0u64..0x60, 0u64..8))).prop_map(|(at, to)| Step::Change(at, to)),
        1 => (0usize..3, prop::option::of(0usize..3)).prop_map(|(at, to)| Step::Upper(at, to)),
        1 => (0usize..12).prop_map(Step::Invlpg),
        2 => Just(Step::Flush),
        1 => Just(Step::OtherProcess),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]
    #[test]
    fn whatever_the_guest_does_after_a_flush_hardware_says_what_its_tables_say(steps in steps(), new in any::<bool>()) {
        let mut m = Machine::with(if new { "7.2" } else { "6.12" }, 4);
        let cr3s = [m.process(), m.process()];
        // Three regions of 2 MiB, four pages in each; gfns below 0x60 + TABLES may be tables.
        let pages: Vec<u64> = (0..12).map(|n| 0x1_0000 + n / 4 * 512 + n % 4).collect();
        for &page in &pages {
            for cr3 in cr3s {
                m.map_raw(cr3, page, 0x100 + page % 512, 1, Access::ALL);
            }
        }
        let roots = [m.load(cr3s[0]), m.load(cr3s[1])];
        let mut now = 0;
        // The guest's kernel knows its tables, whatever it has unlinked.
        let leaf: Vec<Vec<u64>> = cr3s.iter().map(|&cr3| (0..3).map(|n| m.entry_of(cr3, pages[n * 4], 1).0).collect()).collect();
        let upper: Vec<(u64, u16)> = cr3s.iter().map(|&cr3| m.entry_of(cr3, pages[0], 2)).collect();
        for step in steps {
            let (cr3, root) = (cr3s[now], roots[now]);
            match step {
                Step::Read(at) => { let _ = m.read(root, cr3, pages[at]); }
                Step::Write(at) => {
                    // A guest that writes to its tables by chance would have them be anything: only those that are none.
                    let target = walk_guest::<Real>(&*m.host, 0, cr3, 4, pages[at], true, false).ok();
                    if let Some(walk) = target
                        && let Ok(Done::Emulated) = m.write(root, cr3, pages[at])
                    {
                        m.locked(|mmu, guard, _| mmu.page_track_write(guard, 0, walk.gfn, 0, 8));
                    }
                }
                Step::Fetch(at) => { let _ = m.access(root, cr3, pages[at], false, true); }
                Step::Change(at, to) => {
                    let entry = to.map_or(0, |(gfn, bits)| GuestPte::leaf(TABLES + gfn, 1, Access::from_bits(bits)).0);
                    m.store(root, cr3, leaf[now][at / 4], (pages[at] % 512) as u16, entry);
                }
                Step::Upper(at, to) => {
                    let entry = to.map_or(0, |to| GuestPte::table(leaf[now][to]).0);
                    m.store(root, cr3, upper[now].0, upper[now].1 + at as u16, entry);
                }
                Step::Invlpg(at) => m.locked(|mmu, guard, _| mmu.invlpg(guard, root, pages[at])),
                Step::Flush => {
                    m.flush(root);
                    agrees(&mut m, cr3, root, &pages)?;
                }
                Step::OtherProcess => {
                    // A CR3 load syncs the root that it loads.
                    now = 1 - now;
                    m.flush(roots[now]);
                    agrees(&mut m, cr3s[now], roots[now], &pages)?;
                }
            }
            prop_assert_eq!(m.mmu.violations(), Vec::<String>::new());
        }
        m.finish(&roots);
    }
}
