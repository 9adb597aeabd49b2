//! The simulated platform: strategies, memory, blocking, failure, replay.

mod busy;
mod failure;
mod ground;
mod litmus;
mod replay;
mod strategies;

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tdpmmu_platform::{
    Platform, Sim, Site,
    sim::{self, Run, SimConfig, Strategy},
};

type Body = Box<dyn FnOnce() + Send>;

fn config(strategy: Strategy) -> SimConfig {
    SimConfig { strategy, ..SimConfig::default() }
}

fn random(seed: u64) -> SimConfig {
    config(Strategy::Random { seed })
}

fn run(config: SimConfig, main: impl FnOnce() + 'static) -> Run {
    sim::run(config, Box::new(main))
}

/// Starts `bodies` as tasks and waits for them.
fn together(bodies: Vec<Body>) {
    let handles: Vec<_> =
        bodies.into_iter().enumerate().map(|(i, body)| Sim::spawn(&format!("t{i}"), body).unwrap()).collect();
    for handle in handles {
        handle.join().unwrap();
    }
}

/// A word that tasks share.
fn word() -> Arc<AtomicU64> {
    Arc::new(AtomicU64::new(0))
}

/// Two tasks that add 1 without care: wrong if one reads between the other's read and write.
fn lost_update() {
    let word = word();
    let add = |word: Arc<AtomicU64>| {
        Box::new(move || {
            let seen = Sim::load(&word, Site::SpteRead);
            Sim::store(&word, seen + 1, Site::SpteInstall);
        }) as Body
    };
    together(vec![add(word.clone()), add(word.clone())]);
    if word.load(Ordering::SeqCst) != 2 {
        sim::violation("lost-update", "an addition is gone".to_owned());
    }
}

/// Wrong if one task's two reads fall before and after the second write of the other: three orderings.
fn two_looks() {
    let word = word();
    let (writes, reads) = (word.clone(), word);
    together(vec![
        Box::new(move || {
            Sim::store(&writes, 1, Site::SpteInstall);
            Sim::store(&writes, 2, Site::SpteZap);
        }),
        Box::new(move || {
            let first = Sim::load(&reads, Site::SpteRead);
            let second = Sim::load(&reads, Site::WalkLockless);
            if (first, second) == (1, 2) {
                sim::violation("two-looks", "the word changed between two looks".to_owned());
            }
        }),
    ]);
}
