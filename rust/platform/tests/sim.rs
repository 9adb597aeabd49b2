//! The simulated platform: strategies, memory, blocking, failure.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use tdpmmu_platform::{
    Platform, Sim, Site,
    sim::{self, DfsState, End, Memory, Run, SimConfig, Strategy},
};

fn config(strategy: Strategy) -> SimConfig {
    SimConfig { strategy, ..SimConfig::default() }
}

fn run(config: SimConfig, main: impl FnOnce() + 'static) -> Run {
    sim::run(config, Box::new(main))
}

/// Starts `bodies` as tasks and waits for them.
fn together(bodies: Vec<Box<dyn FnOnce() + Send>>) {
    let handles: Vec<_> =
        bodies.into_iter().enumerate().map(|(i, body)| Sim::spawn(&format!("t{i}"), body).unwrap()).collect();
    for handle in handles {
        handle.join().unwrap();
    }
}

/// Two tasks that add 1 without care.
fn lost_update() {
    let word = Arc::new(AtomicU64::new(0));
    let add = |word: Arc<AtomicU64>| {
        Box::new(move || {
            let seen = Sim::load(&word, Site::SpteRead);
            Sim::store(&word, seen + 1, Site::SpteInstall);
        }) as Box<dyn FnOnce() + Send>
    };
    together(vec![add(word.clone()), add(word.clone())]);
    if word.load(Ordering::SeqCst) != 2 {
        sim::violation("lost-update", "an addition is gone".to_owned());
    }
}

#[test]
fn random_schedules_find_a_lost_update_and_most_do_not_have_it() {
    let failed = (0..200)
        .filter(|seed| run(config(Strategy::Random { seed: *seed }), lost_update).end == End::Stopped)
        .count();
    assert!((10..150).contains(&failed), "{failed}");
}
