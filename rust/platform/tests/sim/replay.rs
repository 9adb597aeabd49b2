//! Equal configurations make equal runs; printed schedules replay; failing ones become small.

use std::sync::Arc;

use tdpmmu_platform::{
    Site,
    sim::{self, DfsState, End, Memory, Run, Schedule, SimConfig, Strategy},
};

use crate::{
    busy::{Some3, busy},
    config, lost_update, random, run, two_looks,
};

/// The same on an OS thread of its own.
fn elsewhere(make: impl Fn() -> SimConfig + Send + 'static, program: fn()) -> Run {
    std::thread::spawn(move || run(make(), program)).join().unwrap()
}

fn strategies() -> Vec<Strategy> {
    let mut strategies = vec![
        Strategy::Targeted { first: Site::Mutex, then: Site::RcuGrace, seed: 9 },
        Strategy::Replay("tso 1@3>2 2@4y 0@1>3 1@2h".parse().unwrap()),
        Strategy::Dfs(DfsState::new(2)),
    ];
    for seed in 0..20 {
        strategies.push(Strategy::Random { seed });
        strategies.push(Strategy::Pct { seed, depth: 3, steps: 150 });
    }
    strategies
}

#[test]
fn the_same_configuration_makes_the_same_run_on_any_thread() {
    for strategy in strategies() {
        for memory in [Memory::Sc, Memory::Tso] {
            let strategy = strategy.clone();
            let make = move || SimConfig {
                memory,
                yield_percent: 20,
                record: true,
                faults: Some(Arc::new(Some3)),
                ..config(strategy.clone())
            };
            let (one, two) = (elsewhere(make.clone(), busy), elsewhere(make.clone(), busy));
            assert_eq!(one.end, End::Finished, "{} {:?}", one.schedule, one.violations);
            assert_eq!(one.hash, two.hash, "{:?}", make().strategy);
            assert_eq!(one.schedule, two.schedule);
            assert_eq!(
                (one.steps, one.preemptions, one.log.len()),
                (two.steps, two.preemptions, two.log.len())
            );
            assert_eq!(one.log, two.log);
            // And recording changes nothing.
            let silent = run(SimConfig { record: false, ..make() }, busy);
            assert_eq!(silent.hash, one.hash);
        }
    }
}

#[test]
fn different_seeds_make_different_runs() {
    let mut hashes: Vec<u64> = (0..50).map(|seed| run(random(seed), busy).hash).collect();
    hashes.sort_unstable();
    hashes.dedup();
    assert!(hashes.len() > 45, "{}", hashes.len());
}

#[test]
fn a_printed_schedule_replays_step_by_step() {
    for strategy in strategies() {
        for memory in [Memory::Sc, Memory::Tso] {
            let first = run(
                SimConfig {
                    memory,
                    yield_percent: 20,
                    faults: Some(Arc::new(Some3)),
                    ..config(strategy.clone())
                },
                busy,
            );
            let text = first.schedule.to_string();
            let schedule: Schedule = text.parse().unwrap();
            let again = run(config(Strategy::Replay(schedule)), busy);
            assert_eq!(again.hash, first.hash, "{strategy:?}: {text}\n{}", again.schedule);
            assert_eq!(again.schedule.to_string(), text);
        }
    }
}

#[test]
fn a_minimised_schedule_still_fails_with_fewer_preemptions() {
    for program in [lost_update as fn(), two_looks] {
        let failing = (0..)
            .map(|seed| run(random(seed), program))
            .find(|run| run.end == End::Stopped && run.preemptions > 3)
            .unwrap();
        let small = sim::minimise(&failing.schedule, &mut |schedule| {
            run(config(Strategy::Replay(schedule.clone())), program).failed()
        });
        let rerun = run(config(Strategy::Replay(small.clone())), program);
        assert_eq!(rerun.end, End::Stopped, "{small}");
        assert!(rerun.preemptions < failing.preemptions, "{} -> {small}", failing.schedule);
        assert!(small.len() <= 3, "{small}");
        // Nothing more can be left out.
        for i in 0..small.len() {
            let mut less = small.clone();
            less.turns.remove(i);
            assert!(!run(config(Strategy::Replay(less)), program).failed(), "{small} without turn {i}");
        }
    }
}

#[test]
fn turns_that_cannot_be_taken_are_passed_over() {
    let odd = "sc 0@0>77 5@1>0 0@1~3 1@0>9 0@9h".parse().unwrap();
    assert_eq!(run(config(Strategy::Replay(odd)), busy).end, End::Finished);
}
