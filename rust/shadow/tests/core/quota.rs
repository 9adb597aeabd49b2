//! The page quota: what goes first, what is passed over, and when there is nothing to be had.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::common::{Setup, World, audit::audit, books};
use tdpmmu_platform::TaskConfig;
use tdpmmu_shadow::ShadowDesign;
use tdpmmu_table::PoolError;

const TABLE: u64 = 512;

#[test]
fn pages_that_nobody_holds_go_oldest_first_and_never_too_many() {
    let world = World::new(Setup { quota: 40, ..Setup::default() });
    world.host.set_books([books(0, 0, 1 << 20)]);
    let task = world.task();
    let root = world.direct_root(&task);
    // 33 leaf tables, two above, and the root: four are free.
    world.fill(&task, root, 0, 1, 33 * TABLE);
    let mut guard = world.lock.write(&task);
    let listed = world.mmu.active_pages(&guard);
    assert!(world.mmu.make_pages_available(&mut guard));
    let counts = world.mmu.counts();
    assert_eq!((counts.pages, counts.reclaimed, counts.waiting), (15, 21, 0), "25 are free again");
    let left = world.mmu.active_pages(&guard);
    assert_eq!(left[0], root, "held");
    assert_eq!(left[1..], listed[22..], "the newest stayed");
    assert!(world.mmu.make_pages_available(&mut guard));
    assert_eq!(world.mmu.counts().pages, 15, "enough is enough");
    assert_eq!(audit(&world, &guard), Vec::<String>::new());
    drop(guard);
    world.end(&task, &[root]);
}

#[test]
fn held_roots_alone_leave_no_room_and_that_is_said() {
    let world = World::new(Setup { quota: 2, ..Setup::default() });
    world.host.set_books([books(0, 0, 1 << 20)]);
    let task = world.task();
    let root = world.direct_root(&task);
    let mut cache = world.cache(&task);
    let mut guard = world.lock.write(&task);
    let layout = world.mmu.profile().role_layout;
    let role = layout.tdp_root(5, false, false, false);
    let second = world.mmu.load_root(&mut guard, &mut cache, 0, 0, role).expect("one more");
    assert!(!world.mmu.make_pages_available(&mut guard));
    let refused = world.mmu.load_root(&mut guard, &mut cache, 0, 0, layout.tdp_root(4, false, true, false));
    assert_eq!(refused, Err(PoolError::Exhausted { in_use: 2, cap: 2, wanted: 1 }));
    drop(guard);
    cache.drain(&world.pool);
    world.end(&task, &[root, second]);
}

#[test]
fn kept_obsolete_pages_are_the_first_to_go() {
    let world = World::new(Setup { quota: 60, design: ShadowDesign::GenKept, ..Setup::default() });
    world.host.set_books([books(0, 0, 1 << 20)]);
    let task = world.task();
    let old = world.direct_root(&task);
    world.fill(&task, old, 0, 1, 20 * TABLE);
    world.fast_zap(&task, None);
    let new = world.direct_root(&task);
    world.fill(&task, new, 0, 1, 30 * TABLE);
    assert_eq!(world.mmu.counts().obsolete, 23);
    let mut guard = world.lock.write(&task);
    world.mmu.put_root(&mut guard, old);
    assert_eq!(world.mmu.counts().pages, 56);
    assert!(world.mmu.make_pages_available(&mut guard));
    let counts = world.mmu.counts();
    assert_eq!((counts.obsolete, counts.reclaimed), (2, 21), "not one page of this generation");
    assert_eq!(world.mmu.shrink(&mut guard, 2), 2);
    assert_eq!(world.mmu.counts().obsolete, 0);
    assert_eq!(audit(&world, &guard), Vec::<String>::new());
    drop(guard);
    world.end(&task, &[new]);
}

#[test]
fn what_a_walk_has_zapped_and_not_freed_is_freed_first() {
    let world = Arc::new(World::with_slot(ShadowDesign::Gen, 1 << 21));
    let task = world.task();
    let old = world.direct_root(&task);
    world.fill(&task, old, 0, 1, 2000 * TABLE);
    let stop = Arc::new(AtomicBool::new(false));
    let hungry = {
        let (world, stop) = (Arc::clone(&world), Arc::clone(&stop));
        std::thread::spawn(move || {
            let task = world.task();
            let mut seen = 0u64;
            while !stop.load(Relaxed) {
                let mut guard = world.lock.write(&task);
                let before = world.mmu.counts();
                if before.waiting != 0 {
                    // All of it, for one page asked for; nothing else is zapped for that.
                    assert_eq!(world.mmu.shrink(&mut guard, 1), before.waiting);
                    let after = world.mmu.counts();
                    assert_eq!((after.waiting, after.zapped), (0, before.zapped));
                    seen += 1;
                }
            }
            seen
        })
    };
    let forced = world.task_with(TaskConfig { force_yield: Some(1), ..TaskConfig::default() });
    world.fast_zap(&forced, None);
    stop.store(true, Relaxed);
    let seen = hungry.join().expect("no assertion failed");
    assert!(seen > 0, "two hundred yields, and somebody waits at each");
    let peak = world.mmu.counts().waiting_peak;
    assert!((10..2003).contains(&peak), "{peak}");
    Arc::into_inner(world).expect("the thread is gone").end(&task, &[old]);
}
