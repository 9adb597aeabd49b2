//! The litmus of S1b on the code itself: schedules of few preemptions under x86-TSO, with the barriers and without either.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tdpmmu_platform::sim::{self, DfsState, Memory, SimConfig, Strategy};
use tdpmmu_platform::{Bug, Platform, RcuConfig, RcuDomain, Reclaim, Role, Sim, Site, Task, TaskConfig};
use tdpmmu_shadow::{ModeWord, ReclaimKind, Reclamation};
use tdpmmu_table::{DeadChain, PoolConfig, TablePool};

#[derive(Default)]
struct Word(AtomicU64);

impl ModeWord for Word {
    fn begin_reading<P: Platform>(&self) {
        let word = P::load(&self.0, Site::ReadingMode);
        P::store(&self.0, (word + 2) | 1, Site::ReadingMode);
    }
    fn end_reading<P: Platform>(&self) {
        let word = P::load(&self.0, Site::ReadingMode);
        P::store(&self.0, word & !1, Site::ReadingMode);
    }
}

struct World {
    pool: Arc<TablePool>,
    rcu: Arc<<Sim as Platform>::Rcu>,
    reclaim: Reclamation<Sim>,
    word: Word,
    link: AtomicU64,
}

fn task(world: &World, name: &str) -> Task<Sim> {
    Task::new(&world.rcu, name, Role::Vcpu, TaskConfig::default())
}

fn walk(world: &World) {
    let task = task(world, "walker");
    let walker = world.reclaim.walker(Some(&world.word)).expect("a vCPU");
    let section = walker.begin(&task);
    let page = Sim::load(&world.link, Site::ShadowWalk);
    if page != 0 {
        let seen = Sim::load(&world.pool.entries(page as u32)[0], Site::ShadowWalk);
        if seen != page {
            sim::violation("walk-in-freed-page", format!("page {page} says {seen:#x}"));
        }
    }
    drop(section);
}

fn unlink_and_free(world: &World) {
    let task = task(world, "freer");
    let page = world.link.load(Ordering::Relaxed);
    Sim::store(&world.link, 0, Site::ShadowZap);
    let mut dead = DeadChain::default();
    dead.push(&world.pool, page as u32);
    world.reclaim.free(&task, dead, || {
        let seen = Sim::load(&world.word.0, Site::ReadingMode);
        while seen & 1 != 0 && Sim::load(&world.word.0, Site::ReadingMode) == seen {
            Sim::relax(Site::ReadingMode);
        }
    });
}

fn litmus(kind: ReclaimKind) {
    let world = sim::quiet(|| {
        let pool = TablePool::new(PoolConfig { max_tables: 64, hugepages: false, quarantine: true });
        let pool = Arc::new(pool.expect("a small pool"));
        let page = pool.alloc_run(1).expect("room");
        pool.entries(page)[0].store(u64::from(page), Ordering::Relaxed);
        let back: Arc<dyn Reclaim> = pool.clone();
        let rcu = <Sim as Platform>::Rcu::try_new(back, RcuConfig::default()).expect("a task");
        let reclaim = Reclamation::new(kind, pool.clone(), rcu.clone());
        Arc::new(World { pool, rcu, reclaim, word: Word::default(), link: AtomicU64::new(u64::from(page)) })
    });
    let (walks, frees) = (world.clone(), world.clone());
    let tasks = [
        Sim::spawn("walker", Box::new(move || walk(&walks))),
        Sim::spawn("freer", Box::new(move || unlink_and_free(&frees))),
    ];
    tasks.into_iter().for_each(|task| task.expect("a task").join().expect("no panic"));
    sim::quiet(|| {
        world.reclaim.drain(&task(&world, "the end"));
        if world.pool.stats().taken != 0 || world.reclaim.waiting() != 0 {
            sim::violation("leak", format!("{:?}", world.pool.stats()));
        }
        world.rcu.stop();
    });
}

/// Schedules tried at most: the first are those of few preemptions.
const RUNS: u32 = 2000;

/// Tries the schedules of at most `preemptions`; returns how many there were, and the first that failed.
fn search(kind: ReclaimKind, bug: Option<Bug>, preemptions: u32) -> (u32, Option<String>) {
    let mut next = Some(DfsState::new(preemptions));
    let mut runs = 0;
    while let Some(state) = next.filter(|_| runs < RUNS) {
        let strategy = Strategy::Dfs(state);
        let config = SimConfig { strategy, memory: Memory::Tso, bug, ..SimConfig::default() };
        let run = sim::run(config, Box::new(move || litmus(kind)));
        runs += 1;
        if run.failed() {
            return (runs, Some(format!("{:?} {:?}", run.end, run.violations)));
        }
        next = run.dfs;
    }
    (runs, None)
}

#[test]
fn with_its_barriers_no_kind_lets_a_walker_into_a_freed_page() {
    for kind in ReclaimKind::ALL {
        let (runs, failure) = search(kind, None, 2);
        assert_eq!(failure, None, "{kind}");
        assert!(runs > 10, "{kind}: {runs} schedules are no search");
    }
}

#[test]
fn without_the_walkers_barrier_the_forbidden_outcome_is_found() {
    let (_, failure) = search(ReclaimKind::Ipi, Some(Bug::B44b), 2);
    assert!(failure.is_some_and(|what| what.contains("walk-in-freed-page")));
}

#[test]
fn without_the_freers_barrier_the_forbidden_outcome_is_found() {
    for kind in [ReclaimKind::Ipi, ReclaimKind::Counter] {
        let (_, failure) = search(kind, Some(Bug::B44c), 2);
        assert!(failure.is_some_and(|what| what.contains("walk-in-freed-page")), "{kind}");
    }
}

#[test]
fn where_the_freer_makes_the_walkers_barrier_too_the_walkers_own_is_not_missed() {
    assert_eq!(search(ReclaimKind::Membarrier, Some(Bug::B44b), 2).1, None);
}
