//! Nothing is left of runs that fail. In a process of its own: its memory is measured.

#[path = "../sim/busy.rs"]
#[allow(dead_code)]
mod busy;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use busy::Counting;
use tdpmmu_platform::{
    Platform, RcuConfig, RcuDomain, Role, Sim, Site, Task, TaskConfig, WorkQueue,
    sim::{self, SimConfig, SimRcu, Strategy},
};

type Body = Box<dyn FnOnce() + Send>;

fn together(bodies: Vec<Body>) {
    let handles: Vec<_> = bodies.into_iter().map(|body| Sim::spawn("t", body).unwrap()).collect();
    for handle in handles {
        handle.join().unwrap();
    }
}

/// A value that counts its kind.
struct Counted(&'static AtomicU64);

impl Counted {
    fn new(alive: &'static AtomicU64) -> Self {
        alive.fetch_add(1, Ordering::SeqCst);
        Counted(alive)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Pages of this process in memory, and its mappings.
fn footprint() -> (u64, usize) {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    (statm.split_whitespace().nth(1).unwrap().parse().unwrap(), maps.lines().count())
}

#[test]
fn ten_thousand_failing_runs_leave_nothing_behind() {
    static ALIVE: AtomicU64 = AtomicU64::new(0);
    let fail = |seed: u64| {
        let how = seed % 4;
        let config =
            SimConfig { strategy: Strategy::Random { seed }, max_steps: 400, ..SimConfig::default() };
        let main = move || {
            let rcu = SimRcu::try_new(Arc::new(Counting::default()), RcuConfig::default()).unwrap();
            let table: Arc<[u64]> = vec![seed; 4096].into();
            let lock = Arc::new(tdpmmu_platform::MmuLock::<Sim>::new());
            let queue =
                Arc::new(WorkQueue::<Sim, Counted>::new("q", 1, |_| Sim::point(Site::QueueRun)).unwrap());
            let body = |n: u64| {
                let (rcu, lock, queue, table) = (rcu.clone(), lock.clone(), queue.clone(), table.clone());
                let mine = Counted::new(&ALIVE);
                Box::new(move || {
                    let task = Task::<Sim>::new(&rcu, "t", Role::Vcpu, TaskConfig::default());
                    queue.queue(Counted::new(&ALIVE));
                    let guard = lock.write(&task);
                    Sim::point(Site::SpteZap);
                    if n == 1 {
                        match how {
                            0 => drop(sim::violation("seeded", table[0].to_string())),
                            1 => panic!("seeded"),
                            2 => rcu.synchronize(),
                            _ => loop {
                                Sim::relax(Site::Spin);
                            },
                        }
                        let _inside = task.rcu_read();
                        // For 2: nobody ever leaves.
                        rcu.synchronize();
                    }
                    drop(guard);
                    drop(mine);
                    queue.flush();
                }) as Body
            };
            together(vec![body(0), body(1), body(2)]);
        };
        sim::run(config, Box::new(main))
    };
    // Allocators and pools settle first.
    for seed in 0..500 {
        let done = fail(seed);
        assert!(done.failed(), "{seed}");
        assert_eq!(done.leaked_tasks, 0, "seed {seed}: {:?}", done.end);
    }
    assert_eq!(ALIVE.load(Ordering::SeqCst), 0);
    let (pages, mappings) = footprint();
    for seed in 500..10_500 {
        assert!(fail(seed).failed());
    }
    assert_eq!(ALIVE.load(Ordering::SeqCst), 0);
    let (pages_after, mappings_after) = footprint();
    // Each run holds 32 KiB of table alone: leaked ones would be 80,000 pages.
    assert!(pages_after < pages + 4_000, "{pages} -> {pages_after} pages");
    assert!(mappings_after < mappings + 20, "{mappings} -> {mappings_after} mappings");
}
