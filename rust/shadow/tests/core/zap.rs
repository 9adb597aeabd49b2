//! Zaps of everything: what ends them, what they leave, and when they give the lock up.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::common::{Host, Setup, World, books};
use tdpmmu_platform::{Event, Observer, Preempt, TaskConfig};
use tdpmmu_shadow::{SHADOW_DESIGNS, ShadowDesign};

/// 512 pages fill a table.
const TABLE: u64 = 512;

#[test]
fn every_design_leaves_nothing_mapped_that_was_mapped_before() {
    for info in SHADOW_DESIGNS {
        let world = World::with_slot(info.design, 1 << 20);
        let task = world.task();
        let root = world.direct_root(&task);
        assert_eq!(world.fill(&task, root, 0, 1, 20 * TABLE), 20 * TABLE);
        assert_eq!(world.fill(&task, root, 1 << 19, 2, 100), 100);
        let counts = world.mmu.counts();
        assert_eq!((counts.leaves[1], counts.leaves[2]), (20 * TABLE, 100), "{}", info.name);
        let slot = Arc::clone(world.mmu.books().find(0, 0).expect("a slot"));
        world.fast_zap(&task, Some(&slot));
        let counts = world.mmu.counts();
        assert_eq!(counts.leaves, [0; 4], "{}", info.name);
        assert_eq!(world.mmu.is_obsolete(root), info.zaps_all || info.design == ShadowDesign::Slot);
        assert!(Host::count(&world.host.waits) >= 1, "{}: vCPUs were asked off the root", info.name);
        // The slot may go.
        world.host.set_books([]);
        world.end(&task, &[root]);
    }
}

#[test]
fn obsolete_pages_are_gone_after_a_generation_zap_and_kept_by_the_fourth_version() {
    for (design, kept) in [(ShadowDesign::Gen, 0), (ShadowDesign::GenKept, 24)] {
        let world = World::with_slot(design, 1 << 20);
        let task = world.task();
        let old = world.direct_root(&task);
        // 20 leaf tables, one table of level 2 and one of level 3, and the root; the zapped root is held.
        world.fill(&task, old, 0, 1, 20 * TABLE);
        let pages = world.mmu.counts().pages;
        assert_eq!(pages, 23);
        let slot = Arc::clone(world.mmu.books().find(0, 0).expect("a slot"));
        world.fast_zap(&task, Some(&slot));
        let new = world.direct_root(&task);
        assert_ne!(old, new, "an obsolete root is not given out");
        assert!(world.mmu.is_obsolete(old) && !world.mmu.is_obsolete(new));
        let counts = world.mmu.counts();
        assert_eq!(counts.obsolete, kept.min(pages));
        assert_eq!(counts.zapped_held, u64::from(design == ShadowDesign::Gen));
        assert_eq!(counts.toggles, 1);
        world.end(&task, &[old, new]);
    }
}

#[test]
fn a_zapped_root_that_is_held_is_freed_by_its_last_put() {
    let world = World::with_slot(ShadowDesign::Gen, 1 << 20);
    let task = world.task();
    let root = world.direct_root(&task);
    assert_eq!(world.direct_root(&task), root, "a second vCPU shares it");
    world.fill(&task, root, 0, 1, 3);
    world.fast_zap(&task, None);
    assert_eq!((world.mmu.counts().pages, world.mmu.counts().zapped_held), (1, 1));
    {
        let guard = world.lock.write(&task);
        let info = world.mmu.pages(&guard);
        assert_eq!(info.len(), 1);
        assert!(info[0].invalid && !info[0].listed && info[0].in_hash && info[0].root_count == 2);
    }
    let mut guard = world.lock.write(&task);
    world.mmu.put_root(&mut guard, root);
    assert_eq!((world.mmu.counts().pages, world.pool.is_quarantined(root)), (1, false));
    world.mmu.put_root(&mut guard, root);
    assert_eq!((world.mmu.counts().pages, world.pool.is_quarantined(root)), (0, true));
    assert_eq!(world.mmu.violations(), Vec::<String>::new());
    world.mmu.put_root(&mut guard, root);
    assert_eq!(world.mmu.violations().len(), 1, "a put that nobody owed is told");
}

/// Counts pages zapped between two releases of the lock.
#[derive(Default)]
struct Stretches {
    now: AtomicU64,
    done: Mutex<Vec<u64>>,
}

impl Observer for Stretches {
    fn event(&self, _task: u32, event: &Event) {
        match event {
            Event::ShadowZap { .. } => {
                self.now.fetch_add(1, Relaxed);
            }
            Event::Unlock { shared: false, .. } => {
                let zapped = self.now.swap(0, Relaxed);
                self.done.lock().expect("unpoisoned").push(zapped);
            }
            _ => {}
        }
    }
}

#[test]
fn at_least_a_batch_of_pages_is_zapped_between_two_yields_and_each_check_yields_after_that() {
    for batch in [1, 10, 25] {
        let heard = Arc::new(Stretches::default());
        let world = World::new(Setup { batch, observer: Some(Arc::clone(&heard) as _), ..Setup::default() });
        world.host.set_books([books(0, 0, 1 << 20)]);
        let task = world.task();
        let root = world.direct_root(&task);
        world.fill(&task, root, 0, 1, 100 * TABLE);
        heard.done.lock().expect("unpoisoned").clear();
        // Every check yields: somebody always waits.
        let forced = world.task_with(TaskConfig { force_yield: Some(1), ..TaskConfig::default() });
        world.fast_zap(&forced, None);
        let stretches = heard.done.lock().expect("unpoisoned").clone();
        let (last, all_but_last) = stretches.split_last().expect("a hold");
        // The held root is zapped and counts for nothing, as nothing is freed by it.
        assert_eq!(all_but_last[0], u64::from(batch) + 1);
        assert!(all_but_last[1..].iter().all(|&zapped| zapped == u64::from(batch)), "{stretches:?}");
        assert!(*last <= u64::from(batch));
        assert_eq!(stretches.iter().sum::<u64>(), 103);
        let counts = world.mmu.counts();
        assert_eq!(counts.longest_batch, u64::from(batch));
        assert_eq!(counts.restarts, all_but_last.len() as u64);
        world.end(&task, &[root]);
    }
}

#[test]
fn an_uncontended_walk_of_obsolete_pages_is_one_hold_and_flushes_once() {
    let heard = Arc::new(Stretches::default());
    let world = World::new(Setup { observer: Some(Arc::clone(&heard) as _), ..Setup::default() });
    world.host.set_books([books(0, 0, 1 << 20)]);
    let task = world.task_with(TaskConfig { preempt: Preempt::None, ..TaskConfig::default() });
    let root = world.direct_root(&task);
    world.fill(&task, root, 0, 1, 50 * TABLE);
    heard.done.lock().expect("unpoisoned").clear();
    let flushes = Host::count(&world.host.flushes);
    world.fast_zap(&task, None);
    assert_eq!(heard.done.lock().expect("unpoisoned").len(), 1);
    assert_eq!(Host::count(&world.host.flushes) - flushes, 1);
    assert_eq!(world.mmu.counts().waiting_peak, 0, "one commit, and it frees at once");
    world.end(&task, &[root]);
}

#[test]
fn a_walk_of_obsolete_pages_ends_though_new_pages_come_all_the_time() {
    let world = Arc::new(World::with_slot(ShadowDesign::Gen, 1 << 22));
    let task = world.task();
    let old = world.direct_root(&task);
    world.fill(&task, old, 0, 1, 1000 * TABLE);
    let stop = Arc::new(AtomicBool::new(false));
    let made = Arc::new(AtomicU64::new(0));
    let begun = {
        let mut guard = world.lock.write(&task);
        world.mmu.fast_zap_begin(&mut guard);
        drop(guard);
        let (world, stop, made) = (Arc::clone(&world), Arc::clone(&stop), Arc::clone(&made));
        std::thread::spawn(move || {
            let task = world.task();
            let root = world.direct_root(&task);
            let mut gfn = 1 << 20;
            // A new page of level 1 each, for as long as the walk goes on and there is room.
            while !stop.load(Relaxed) && gfn < 1 << 21 {
                world.fill(&task, root, gfn, 1, 1);
                made.fetch_add(1, Relaxed);
                gfn += TABLE;
            }
            root
        })
    };
    while made.load(Relaxed) < 10 {
        std::thread::sleep(Duration::from_micros(50));
    }
    let before = made.load(Relaxed);
    let mut guard = world.lock.write(&task);
    world.mmu.fast_zap_rest(&mut guard, None);
    // What is left is what was made after the toggle.
    let left = world.mmu.pages(&guard);
    assert!(left.iter().filter(|page| page.table != old).all(|page| !page.obsolete && page.listed));
    assert!(left.len() as u64 > before);
    drop(guard);
    stop.store(true, Relaxed);
    let new = begun.join().expect("no panic");
    let world = Arc::into_inner(world).expect("the thread is gone");
    assert_eq!(world.mmu.counts().obsolete, 0);
    world.end(&task, &[old, new]);
}

#[test]
fn what_a_walk_with_lock_break_has_zapped_is_flushed_before_anybody_else_has_the_lock() {
    /// Leaves changed since the last flush, at each release.
    #[derive(Default)]
    struct Owed {
        changed: AtomicBool,
        late: AtomicBool,
    }
    impl Observer for Owed {
        fn event(&self, _task: u32, event: &Event) {
            match event {
                Event::ShadowLeaf { old, .. } if *old != 1 << 63 => self.changed.store(true, Relaxed),
                Event::ShadowFree { .. } => self.changed.store(false, Relaxed),
                Event::Unlock { .. } if self.changed.load(Relaxed) => self.late.store(true, Relaxed),
                _ => {}
            }
        }
    }
    let owed = Arc::new(Owed::default());
    let world = World::new(Setup {
        design: ShadowDesign::WalkBreak,
        observer: Some(Arc::clone(&owed) as _),
        ..Setup::default()
    });
    world.host.set_books([books(0, 0, 1 << 20)]);
    let task = world.task_with(TaskConfig { force_yield: Some(1), ..TaskConfig::default() });
    let root = world.direct_root(&task);
    world.fill(&task, root, 0, 1, 10 * TABLE);
    world.fast_zap(&task, None);
    assert!(!owed.late.load(Relaxed));
    assert!(Host::count(&world.host.flushes) > 5);
    world.end(&task, &[root]);
}

#[test]
fn dirty_and_accessed_reach_the_host_at_zap_where_the_kernel_does_that() {
    for (profile, expected) in [("6.12", 3 * TABLE), ("6.18", 0)] {
        let world = World::new(Setup { profile, ..Setup::default() });
        world.host.set_books([books(0, 0, 1 << 20)]);
        let task = world.task();
        let root = world.direct_root(&task);
        world.fill(&task, root, 7, 1, 3 * TABLE);
        world.fast_zap(&task, None);
        assert_eq!(Host::count(&world.host.dirty), expected, "{profile}");
        assert_eq!(Host::count(&world.host.accessed), expected, "{profile}");
        world.end(&task, &[root]);
    }
}

#[test]
fn a_zap_whose_slot_has_gone_is_told_and_goes_on() {
    let world = World::with_slot(ShadowDesign::Gen, 1 << 20);
    let task = world.task();
    let root = world.direct_root(&task);
    world.fill(&task, root, 0, 1, 4);
    world.host.set_books([]);
    world.fast_zap(&task, None);
    let told = world.mmu.violations();
    assert_eq!(told.len(), 4, "each leaf looked for its reverse map: {told:?}");
    assert!(told.iter().all(|what| what.starts_with("slot-books-gone")));
    assert_eq!(world.mmu.counts().leaves, [0; 4]);
}
