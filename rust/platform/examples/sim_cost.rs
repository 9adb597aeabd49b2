//! What a point, a switch and a run of the simulated platform cost.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::Instant,
};

use tdpmmu_platform::{
    Platform, Sim, Site,
    sim::{self, Memory, SimConfig, Strategy},
};

fn words(tasks: usize, accesses: usize) -> impl FnOnce() + 'static {
    move || {
        let words: Arc<[AtomicU64; 4]> = Arc::default();
        let handles: Vec<_> = (0..tasks)
            .map(|n| {
                let words = words.clone();
                let body = move || {
                    for i in 0..accesses / 2 {
                        let seen = Sim::load(&words[(i + n) % 4], Site::SpteRead);
                        Sim::store(&words[i % 4], seen + 1, Site::SpteInstall);
                    }
                };
                Sim::spawn("t", Box::new(body)).unwrap()
            })
            .collect();
        handles.into_iter().for_each(|handle| handle.join().unwrap());
    }
}

fn main() {
    let strategies = |seed| {
        [
            ("random", Strategy::Random { seed }),
            ("pct", Strategy::Pct { seed, depth: 3, steps: 1_000_000 }),
            ("replay", Strategy::Replay("sc".parse().unwrap())),
        ]
    };
    for memory in [Memory::Sc, Memory::Tso] {
        for (name, strategy) in strategies(1) {
            let config = SimConfig { strategy, memory, max_steps: u64::MAX, ..SimConfig::default() };
            let begin = Instant::now();
            let run = sim::run(config, Box::new(words(3, 1_000_000)));
            let spent = begin.elapsed();
            println!(
                "{memory:?} {name:8} {} points, {} preemptions: {:.0} ns a point, {:.1} M points/s",
                run.steps,
                run.preemptions,
                spent.as_nanos() as f64 / run.steps as f64,
                run.steps as f64 / spent.as_secs_f64() / 1e6
            );
        }
        for (name, _) in strategies(0) {
            let begin = Instant::now();
            let runs = 20_000;
            for seed in 0..runs {
                let strategy = strategies(seed).into_iter().find(|(other, _)| *other == name).unwrap().1;
                sim::run(SimConfig { strategy, memory, ..SimConfig::default() }, Box::new(words(3, 60)));
            }
            println!(
                "{memory:?} {name:8} runs of 180 points: {:.0} a second",
                runs as f64 / begin.elapsed().as_secs_f64()
            );
        }
    }
}
