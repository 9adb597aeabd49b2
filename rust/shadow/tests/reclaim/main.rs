//! Each kind of reclamation on the real platform, with threads: nothing is recycled under a walker, and what that costs whom.

mod schedules;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Barrier};

use tdpmmu_platform::{Platform, RcuConfig, RcuDomain, Real, Reclaim, Role, Site, Task, TaskConfig};
use tdpmmu_shadow::{ModeWord, NoMode, ReclaimKind, Reclamation, WalkError, Walker};
use tdpmmu_spte::Spte;
use tdpmmu_table::{DeadChain, PoolConfig, TablePool};

/// A vCPU's mode word: bit 0 reads, the rest numbers the walks.
#[derive(Default)]
struct Word(AtomicU64);

impl ModeWord for Word {
    fn begin_reading<P: Platform>(&self) {
        let word = P::load(&self.0, Site::VcpuMode);
        P::store(&self.0, (word + 2) | 1, Site::VcpuMode);
    }
    fn end_reading<P: Platform>(&self) {
        let word = P::load(&self.0, Site::VcpuMode);
        P::store(&self.0, word & !1, Site::VcpuMode);
    }
}

impl Word {
    /// What a remote flush does with walkers: waits for the walk that it finds.
    fn wait(&self) {
        let seen = self.0.load(Ordering::Acquire);
        while seen & 1 != 0 && self.0.load(Ordering::Acquire) == seen {
            std::thread::yield_now();
        }
    }
}

/// Pages, one link to one of them, and vCPUs.
struct World {
    pool: Arc<TablePool>,
    rcu: Arc<<Real as Platform>::Rcu>,
    reclaim: Reclamation<Real>,
    words: Vec<Word>,
    link: AtomicU64,
}

impl World {
    fn new(kind: ReclaimKind, walkers: usize) -> Self {
        let config = PoolConfig { max_tables: 512, hugepages: false, quarantine: true };
        let pool = Arc::new(TablePool::new(config).expect("a small pool"));
        let back: Arc<dyn Reclaim> = pool.clone();
        let rcu = <Real as Platform>::Rcu::try_new(back, RcuConfig::default()).expect("a thread");
        let reclaim = Reclamation::new(kind, pool.clone(), rcu.clone());
        let words = (0..walkers).map(|_| Word::default()).collect();
        let world = Self { pool, rcu, reclaim, words, link: AtomicU64::new(0) };
        world.link.store(u64::from(world.page()), Ordering::Release);
        world
    }

    fn task(&self, name: &str) -> Task<Real> {
        Task::new(&self.rcu, name, Role::Vcpu, TaskConfig::default())
    }

    fn walker(&self, vcpu: usize) -> Walker<'_, Real, &Word> {
        self.reclaim.walker(Some(&self.words[vcpu])).expect("a vCPU may always walk")
    }

    /// A new page whose entries all hold its own number. Waits while the pool is empty: readers may hold everything.
    fn page(&self) -> u32 {
        loop {
            if let Ok(page) = self.pool.alloc_run(1) {
                self.pool.entries(page).iter().for_each(|e| e.store(u64::from(page), Ordering::Relaxed));
                return page;
            }
            std::thread::yield_now();
        }
    }

    /// Another page takes the place of the linked one, which is freed; returns that.
    fn replace(&self, task: &Task<Real>) -> u32 {
        let new = self.page();
        let old = Real::load(&self.link, Site::SpteRead) as u32;
        // A plain store, as the shadow MMU unlinks.
        Real::store(&self.link, u64::from(new), Site::ShadowZap);
        let mut dead = DeadChain::default();
        dead.push(&self.pool, old);
        self.reclaim.free(task, dead, || self.words.iter().for_each(Word::wait));
        old
    }

    /// Reads the linked page whole.
    fn walk(&self) -> Result<(), String> {
        let page = Real::load(&self.link, Site::ShadowWalk);
        for entry in self.pool.entries(page as u32) {
            let seen = Real::load(entry, Site::ShadowWalk);
            if seen != page {
                return Err(format!("page {page} says {seen:#x} (poison: {})", seen == Spte::POISON));
            }
        }
        Ok(())
    }

    /// Everything must come back.
    fn finish(self) {
        let task = self.task("the end");
        self.reclaim.drain(&task);
        assert_eq!((self.reclaim.waiting(), self.pool.stats().taken), (0, 1), "all but the linked page");
        assert_eq!((self.pool.stats().double_frees, self.pool.overwritten()), (0, vec![]));
        self.rcu.stop();
    }
}

#[test]
fn no_walk_reads_a_recycled_page_while_others_free_in_every_kind() {
    for kind in ReclaimKind::ALL {
        let world = World::new(kind, 2);
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            let (world, stop) = (&world, &stop);
            let walkers: Vec<_> = (0..2)
                .map(|vcpu| {
                    s.spawn(move || {
                        let task = world.task("walker");
                        let walker = world.walker(vcpu);
                        let mut walks = 0u64;
                        while !stop.load(Ordering::Relaxed) || walks == 0 {
                            let section = walker.begin(&task);
                            world.walk().unwrap_or_else(|what| panic!("{kind}: {what}"));
                            drop(section);
                            walks += 1;
                        }
                        walks
                    })
                })
                .collect();
            let task = world.task("freer");
            for _ in 0..500 {
                world.replace(&task);
            }
            stop.store(true, Ordering::Relaxed);
            for walker in walkers {
                assert!(walker.join().expect("a walk met a recycled page") > 0);
            }
        });
        world.finish();
    }
}

/// A reader stands inside while `body` frees, and leaves after that.
fn with_a_reader_inside(kind: ReclaimKind, body: impl FnOnce(&World, &Task<Real>)) -> World {
    let world = World::new(kind, 1);
    let (inside, entered) = channel();
    // Closed when the body is done, or fails.
    let (leave, left) = channel::<()>();
    std::thread::scope(|s| {
        let (world, leave) = (&world, leave);
        s.spawn(move || {
            let task = world.task("reader");
            let walker = world.walker(0);
            let section = walker.begin(&task);
            let page = Real::load(&world.link, Site::ShadowWalk) as u32;
            inside.send(()).expect("somebody waits for it");
            let _ = left.recv();
            let first = Real::load(&world.pool.entries(page)[0], Site::ShadowWalk);
            assert_eq!(first, u64::from(page), "{kind}: the page was recycled under the reader");
            drop(section);
        });
        entered.recv().expect("the reader is inside");
        let task = world.task("freer");
        body(world, &task);
        drop(leave);
    });
    world
}

#[test]
fn who_defers_holds_every_page_that_is_freed_while_one_reader_stays_inside() {
    for kind in [ReclaimKind::Counter, ReclaimKind::Rcu, ReclaimKind::Epoch] {
        let world = with_a_reader_inside(kind, |world, task| {
            for n in 1..=100 {
                let page = world.replace(task);
                assert!(!world.pool.is_quarantined(page), "{kind}");
                assert_eq!(world.reclaim.waiting(), n, "{kind}");
            }
        });
        assert_eq!(world.reclaim.waiting_peak(), 100, "{kind}");
        world.finish();
    }
}

#[test]
fn who_waits_holds_nothing_and_does_not_free_before_the_reader_has_left() {
    for kind in [ReclaimKind::Ipi, ReclaimKind::Membarrier] {
        let world = World::new(kind, 1);
        let (inside, freed) = (Barrier::new(2), AtomicBool::new(false));
        std::thread::scope(|s| {
            let (world, inside, freed) = (&world, &inside, &freed);
            s.spawn(move || {
                let task = world.task("freer");
                inside.wait();
                let page = world.replace(&task);
                freed.store(true, Ordering::Release);
                assert!(world.pool.is_quarantined(page), "{kind}: free when the call returns");
            });
            let task = world.task("reader");
            let walker = world.walker(0);
            let section = walker.begin(&task);
            let page = Real::load(&world.link, Site::ShadowWalk);
            inside.wait();
            // Until the freer has unlinked it, and for a good while after that.
            while Real::load(&world.link, Site::ShadowWalk) == page {
                std::thread::yield_now();
            }
            for _ in 0..500 {
                assert!(!freed.load(Ordering::Acquire), "{kind}: freed under a reader");
                assert_eq!(Real::load(&world.pool.entries(page as u32)[0], Site::ShadowWalk), page);
                std::thread::yield_now();
            }
            drop(section);
        });
        assert_eq!((world.reclaim.waiting(), world.reclaim.waiting_peak()), (0, 0));
        world.finish();
    }
}

#[test]
fn a_vcpu_that_walks_without_pause_holds_nobody_up() {
    for kind in [ReclaimKind::Ipi, ReclaimKind::Membarrier] {
        let world = World::new(kind, 1);
        let stop = AtomicBool::new(false);
        std::thread::scope(|s| {
            let (world, stop) = (&world, &stop);
            s.spawn(move || {
                let task = world.task("walker");
                let walker = world.walker(0);
                while !stop.load(Ordering::Relaxed) {
                    // Inside almost always, but in another walk each time.
                    drop(walker.begin(&task));
                }
            });
            let task = world.task("freer");
            for _ in 0..300 {
                world.replace(&task);
            }
            stop.store(true, Ordering::Relaxed);
        });
        world.finish();
    }
}

#[test]
fn the_counter_defers_only_while_a_reader_is_inside() {
    let world = World::new(ReclaimKind::Counter, 1);
    let (task, reader) = (world.task("freer"), world.task("reader"));
    let page = world.replace(&task);
    assert!(world.pool.is_quarantined(page) && world.reclaim.waiting_peak() == 0);
    let walker = world.walker(0);
    let section = walker.begin(&reader);
    let page = world.replace(&task);
    assert!(!world.pool.is_quarantined(page));
    drop(section);
    let page = world.replace(&task);
    assert!(world.pool.is_quarantined(page), "nobody is inside any more");
    assert_eq!(world.reclaim.waiting_peak(), 1);
    drop((task, reader));
    world.finish();
}

#[test]
fn rcu_and_epochs_defer_although_nobody_reads() {
    for kind in [ReclaimKind::Rcu, ReclaimKind::Epoch] {
        let world = World::new(kind, 0);
        let task = world.task("freer");
        world.replace(&task);
        assert_eq!(world.reclaim.waiting_peak(), 1, "{kind}");
        world.finish();
    }
}

#[test]
fn nothing_is_flushed_nor_freed_for_an_empty_chain() {
    for kind in ReclaimKind::ALL {
        let world = World::new(kind, 0);
        let task = world.task("freer");
        world.reclaim.free(&task, DeadChain::default(), || panic!("a flush for nothing"));
        world.finish();
    }
}

#[test]
fn the_flush_comes_before_the_free_in_every_kind() {
    for kind in ReclaimKind::ALL {
        let world = World::new(kind, 0);
        let task = world.task("freer");
        let page = world.page();
        let mut dead = DeadChain::default();
        dead.push(&world.pool, page);
        let mut flushed = false;
        world.reclaim.free(&task, dead, || {
            flushed = true;
            assert_eq!(world.pool.entries(page)[0].load(Ordering::Relaxed), u64::from(page), "{kind}");
            assert_eq!(world.reclaim.waiting(), 0, "{kind}: not with whoever frees, either");
        });
        assert!(flushed);
        world.finish();
    }
}

#[test]
fn who_is_no_vcpu_may_walk_only_where_no_mode_word_is_needed() {
    for kind in ReclaimKind::ALL {
        let world = World::new(kind, 0);
        let walker = world.reclaim.walker(None::<NoMode>);
        match walker {
            Ok(walker) => {
                assert!(!kind.needs_vcpu());
                let task = world.task("anybody");
                let _section = walker.begin(&task);
                world.walk().expect("nobody frees");
            }
            Err(error) => {
                assert!(kind.needs_vcpu());
                assert_eq!(error, WalkError::NeedsVcpu { kind });
                assert!(error.to_string().contains(kind.name()));
            }
        }
    }
}

#[test]
fn each_kind_is_found_by_its_name_and_a_wrong_one_is_named() {
    for kind in ReclaimKind::ALL {
        assert_eq!(ReclaimKind::parse(kind.name()), Ok(kind));
        assert!(!kind.summary().is_empty());
    }
    let error = ReclaimKind::parse("qsbr").expect_err("no such kind").to_string();
    assert!(error.contains("\"qsbr\"") && ReclaimKind::ALL.iter().all(|kind| error.contains(kind.name())));
}
