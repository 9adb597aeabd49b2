//! What is done by reverse maps: unmapping, write protection, dirty clearing, aging; slots that go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::common::{Host, Setup, World, audit::audit, books};
use tdpmmu_platform::{Event, Observer, TaskConfig};
use tdpmmu_shadow::{ShadowDesign, SlotPages};
use tdpmmu_spte::Spte;

const TABLE: u64 = 512;

/// The leaf of `gfn` under `root`, whatever its level.
fn leaf(world: &World, root: u32, gfn: u64) -> Spte {
    let (mut table, mut level) = (root, world.mmu.root_level(root));
    loop {
        let entry = &world.pool.entries(table)[tdpmmu_spte::geometry::index(gfn, level)];
        let spte = Spte(entry.load(Relaxed));
        if !spte.is_table(level) {
            return spte;
        }
        (table, level) = (spte.pfn() as u32, level - 1);
    }
}

#[test]
fn an_unmap_takes_what_lies_in_the_range_and_nothing_else() {
    let world = World::with_slot(ShadowDesign::Gen, 1 << 20);
    let task = world.task();
    let root = world.direct_root(&task);
    world.fill(&task, root, 0, 1, 4 * TABLE);
    world.fill(&task, root, 8 * TABLE, 2, 4);
    let mut guard = world.lock.write(&task);
    assert!(world.mmu.unmap(&mut guard, 0, 100..700, true));
    assert_eq!(world.mmu.counts().leaves, [0, 4 * TABLE - 600, 4, 0]);
    assert!(leaf(&world, root, 99).is_present() && leaf(&world, root, 700).is_present());
    assert!(!leaf(&world, root, 100).is_present() && !leaf(&world, root, 699).is_present());
    // A huge leaf that the range touches goes whole.
    assert!(world.mmu.unmap(&mut guard, 0, 9 * TABLE + 1..9 * TABLE + 2, true));
    assert_eq!(world.mmu.counts().leaves, [0, 4 * TABLE - 600, 3, 0]);
    assert!(!world.mmu.unmap(&mut guard, 0, 100..700, true), "nothing left, nothing owed");
    assert!(!world.mmu.unmap(&mut guard, 1, 0..1 << 20, true), "another address space");
    assert_eq!(audit(&world, &guard), Vec::<String>::new());
    drop(guard);
    world.end(&task, &[root]);
}

#[test]
fn a_notifier_reaches_pages_that_are_obsolete_and_kept() {
    let world = World::with_slot(ShadowDesign::GenKept, 1 << 20);
    let task = world.task();
    let old = world.direct_root(&task);
    world.fill(&task, old, 0, 1, 10);
    // Another slot goes: the leaves of this one stay where they are, in pages that nobody uses.
    let other = books(0, 1 << 21, 512);
    world.fast_zap(&task, Some(&other));
    assert_eq!(world.mmu.counts().leaves[1], 10);
    let mut guard = world.lock.write(&task);
    assert!(world.mmu.unmap(&mut guard, 0, 0..10, true));
    assert_eq!(world.mmu.counts().leaves[1], 0);
    drop(guard);
    world.end(&task, &[old]);
}

/// Counts releases of the lock, and those at which a flush was owed.
#[derive(Default)]
struct Releases {
    all: AtomicU64,
    owing: AtomicU64,
}

impl Observer for Releases {
    fn event(&self, _task: u32, event: &Event) {
        if let Event::Unlock { debt, .. } = event {
            self.all.fetch_add(1, Relaxed);
            self.owing.fetch_add(u64::from(*debt), Relaxed);
        }
    }
}

#[test]
fn an_unmap_that_gives_the_lock_up_has_flushed_before() {
    for may_yield in [true, false] {
        let releases = Arc::new(Releases::default());
        let world = World::new(Setup { observer: Some(Arc::clone(&releases) as _), ..Setup::default() });
        world.host.set_books([books(0, 0, 1 << 20)]);
        let task = world.task_with(TaskConfig { force_yield: Some(1), ..TaskConfig::default() });
        let root = world.direct_root(&task);
        world.fill(&task, root, 0, 1, 2 * TABLE);
        let mut guard = world.lock.write(&task);
        let before = (releases.all.load(Relaxed), Host::count(&world.host.flushes));
        let owed = world.mmu.unmap(&mut guard, 0, 0..2 * TABLE, may_yield);
        let yields = releases.all.load(Relaxed) - before.0;
        let flushes = Host::count(&world.host.flushes) - before.1;
        if may_yield {
            // A check each 64 heads, and each time somebody had zapped: nothing is left for the caller.
            assert_eq!((flushes, owed), (16, false));
            assert!(yields >= 16);
        } else {
            assert_eq!((yields, flushes, owed), (0, 0, true));
        }
        assert_eq!(releases.owing.load(Relaxed), 0);
        drop(guard);
        world.end(&task, &[root]);
    }
}

#[test]
fn write_protection_for_logging_can_be_taken_back_by_the_fast_path_and_dirty_is_not_lost() {
    let world = World::with_slot(ShadowDesign::Gen, 1 << 20);
    let task = world.task();
    let root = world.direct_root(&task);
    world.fill(&task, root, 0, 1, 10);
    world.fill(&task, root, TABLE, 2, 1);
    let format = *world.mmu.format();
    let guard = world.lock.write(&task);
    assert!(world.mmu.write_protect(&guard, 0, 0..2 * TABLE, 2), "the huge leaf");
    assert!(format.is_writable(leaf(&world, root, 3)) && !format.is_writable(leaf(&world, root, TABLE)));
    assert!(world.mmu.write_protect(&guard, 0, 0..5, 1));
    let spte = leaf(&world, root, 3);
    assert!(!format.is_writable(spte) && format.is_mmu_writable(spte) && format.is_dirty(spte));
    assert!(!world.mmu.write_protect(&guard, 0, 0..5, 1), "done already");
    assert_eq!(Host::count(&world.host.dirty), 0);
    assert!(world.mmu.clear_dirty(&guard, 0, 0..1));
    assert!(!format.is_dirty(leaf(&world, root, 0)));
    assert_eq!(Host::count(&world.host.dirty), 1, "what the entry forgets the host knows");
    drop(guard);
    world.end(&task, &[root]);
}

#[test]
fn aging_takes_the_mark_once_and_a_test_takes_none() {
    let world = World::with_slot(ShadowDesign::Gen, 1 << 20);
    let task = world.task();
    let root = world.direct_root(&task);
    world.fill(&task, root, 0, 1, 10);
    let guard = world.lock.write(&task);
    assert!(world.mmu.test_age(&guard, 0, 0..10) && world.mmu.test_age(&guard, 0, 0..10));
    assert!(world.mmu.age(&guard, 0, 0..10));
    assert!(!world.mmu.test_age(&guard, 0, 0..10) && !world.mmu.age(&guard, 0, 0..10));
    assert!(leaf(&world, root, 3).is_present());
    drop(guard);
    world.end(&task, &[root]);
}

#[test]
fn a_page_that_is_mapped_a_thousand_times_has_its_reverse_map_recycled() {
    // Each process is a direct root of its own here: the same gfn, in as many tables.
    let world = World::new(Setup { max_tables: 1 << 14, ..Setup::default() });
    world.host.set_books([books(0, 0, 512)]);
    let task = world.task();
    let layout = world.mmu.profile().role_layout;
    let mut roots = Vec::new();
    for n in 0..=1000u32 {
        // The bits above the address space's number tell the roles apart, as quadrants and the like do.
        let fields = layout.unpack(world.role(true));
        let role = layout.pack(&tdpmmu_spte::RoleFields {
            access: (n % 8) as u8,
            quadrant: (n / 8 % 4) as u8,
            efer_nx: n / 32 % 2 != 0,
            cr0_wp: n / 64 % 2 != 0,
            smep_andnot_wp: n / 128 % 2 != 0,
            smap_andnot_wp: n / 256 % 2 != 0,
            passthrough: n / 512 % 2 != 0,
            ..fields
        });
        let mut cache = world.cache(&task);
        let mut guard = world.lock.write(&task);
        let root = world.mmu.load_root(&mut guard, &mut cache, 0, 0, role).expect("room");
        drop(guard);
        cache.drain(&world.pool);
        world.fill(&task, root, 5, 1, 1);
        roots.push(root);
        if n == 999 {
            assert_eq!((world.mmu.counts().leaves[1], Host::count(&world.host.flushes)), (1000, 0));
            assert!(world.mmu.memory().list_bytes >= 1000 / 14 * 128);
        }
    }
    assert_eq!((world.mmu.counts().leaves[1], Host::count(&world.host.flushes)), (0, 1));
    world.end(&task, &roots);
}

#[test]
fn a_slot_zap_keeps_other_slots_and_the_root() {
    for pages in [SlotPages::All, SlotPages::Shadowing] {
        let world = World::new(Setup { design: ShadowDesign::Slot, ..Setup::default() });
        let dying = books(0, 1 << 20, 4 * TABLE);
        world.host.set_books([books(0, 0, 1 << 19), Arc::clone(&dying)]);
        let task = world.task();
        let root = world.direct_root(&task);
        world.fill(&task, root, 0, 1, 100);
        world.fill(&task, root, 1 << 20, 1, 4 * TABLE);
        let mut guard = world.lock.write(&task);
        world.mmu.zap_slot(&mut guard, &dying, pages);
        assert_eq!(world.mmu.counts().leaves[1], 100);
        assert!(!world.mmu.is_obsolete(root));
        // 5.1 took the direct pages of its gfns, too: four of level 1, and the one of level 2 that begins in it.
        let gone = if pages == SlotPages::All { 5 } else { 0 };
        assert_eq!(world.mmu.counts().zapped, gone);
        assert!(Host::count(&world.host.flushes) >= 1);
        drop(guard);
        world.host.set_books([books(0, 1 << 30, 1)]);
        assert_eq!(world.mmu.violations(), Vec::<String>::new());
    }
}
