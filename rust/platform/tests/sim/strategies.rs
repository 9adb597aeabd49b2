//! Each strategy finds what it is made to find.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use tdpmmu_platform::{
    Platform, Sim, Site,
    sim::{DfsState, End, Strategy, pct_bound},
};

use crate::{Body, config, lost_update, random, run, together, two_looks, word};

fn failures(runs: u64, strategy: impl Fn(u64) -> Strategy, program: fn()) -> u64 {
    (0..runs).filter(|seed| run(config(strategy(*seed)), program).end == End::Stopped).count() as u64
}

#[test]
fn random_schedules_find_a_lost_update_and_most_do_not_have_it() {
    let failed = failures(400, |seed| Strategy::Random { seed }, lost_update);
    assert!((20..300).contains(&failed), "{failed}");
}

#[test]
fn pct_finds_bugs_of_its_depth_at_least_as_often_as_its_bound_says() {
    for (program, depth) in [(lost_update as fn(), 2), (two_looks, 3)] {
        let sample = run(random(0), program);
        let (tasks, points) = (sample.width, sample.choices.max(1));
        let runs = 3_000;
        let failed = failures(runs, |seed| Strategy::Pct { seed, depth, steps: points }, program);
        let promised = runs as f64 * pct_bound(tasks, points, depth);
        // Four standard deviations of a binomial of that mean.
        assert!(failed as f64 >= promised - 4.0 * promised.sqrt(), "depth {depth}: {failed} of {promised}");
        assert!(failed < runs, "depth {depth}: every run failed");
    }
}

#[test]
fn pct_of_too_small_a_depth_cannot_find_a_bug() {
    // Depth 1 runs one task to its end before the other.
    assert_eq!(failures(500, |seed| Strategy::Pct { seed, depth: 1, steps: 10 }, lost_update), 0);
    assert_eq!(failures(500, |seed| Strategy::Pct { seed, depth: 1, steps: 10 }, two_looks), 0);
}

/// Runs every schedule within the bound; the state at the end, and how many failed at each bound.
fn search(bound: u32, program: impl Fn() + Clone + 'static) -> (DfsState, Vec<u64>) {
    let mut state = DfsState::new(bound);
    let mut failed = vec![0; bound as usize + 1];
    while let Some(next) = state.clone().next() {
        let at = next.bound();
        let result = run(config(Strategy::Dfs(next)), program.clone());
        failed[at as usize] += u64::from(result.failed());
        state = result.dfs.unwrap();
        assert!(state.runs() < 200_000, "the search does not end");
    }
    (state, failed)
}

#[test]
fn depth_first_search_needs_the_preemptions_that_a_bug_takes_and_no_more() {
    let (_, lost) = search(2, lost_update);
    assert_eq!(lost[0], 0, "no preemption, no lost update");
    assert!(lost[1] > 0, "one is enough");
    let (_, looks) = search(3, two_looks);
    assert_eq!(looks[0], 0);
    assert!(looks[1] + looks[2] > 0);
}

#[test]
fn depth_first_search_sees_every_outcome_and_says_that_it_was_all() {
    let outcomes: &'static Mutex<BTreeSet<String>> = Box::leak(Box::default());
    let (state, _) = search(20, move || {
        let order = std::sync::Arc::new(Mutex::new(String::new()));
        let letter = |name: char| {
            let (order, word) = (order.clone(), word());
            Box::new(move || {
                for _ in 0..2 {
                    Sim::point(Site::LockAcquire);
                    order.lock().unwrap_or_else(PoisonError::into_inner).push(name);
                }
                drop(word);
            }) as Body
        };
        together(vec![letter('a'), letter('b'), letter('c')]);
        let order = order.lock().unwrap_or_else(PoisonError::into_inner).clone();
        outcomes.lock().unwrap_or_else(PoisonError::into_inner).insert(order);
    });
    assert!(state.is_exhausted());
    // 6! / (2! 2! 2!)
    assert_eq!(outcomes.lock().unwrap().len(), 90);
}

#[test]
fn a_bound_that_cuts_schedules_off_is_not_called_exhausted() {
    let (state, _) = search(1, two_looks);
    assert!(state.is_done() && !state.is_exhausted());
}

#[test]
fn a_targeted_pair_happens_in_the_order_asked_for() {
    // In most runs, where chance alone has it in few: the reader stands between two writes.
    let aimed = failures(
        200,
        |seed| Strategy::Targeted { first: Site::SpteZap, then: Site::WalkLockless, seed },
        two_looks,
    );
    let unaimed = failures(200, |seed| Strategy::Random { seed }, two_looks);
    assert!(aimed > 2 * unaimed.max(5), "{aimed} against {unaimed}");
}

#[test]
fn sites_say_where_schedules_took_the_cpu_away() {
    let mut sites = run(random(0), lost_update).sites;
    for seed in 1..50 {
        sites.add(&run(random(seed), lost_update).sites);
    }
    assert!(sites.of(Site::SpteRead).forced > 0 && sites.of(Site::SpteInstall).forced > 0, "{sites:?}");
    assert_eq!(sites.of(Site::TlbFlush).passed, 0);
    assert!(sites.never_forced().is_empty(), "{sites:?}");
    let still = run(config(Strategy::Replay("sc".parse().unwrap())), lost_update);
    assert_eq!(still.preemptions, 0);
    assert!(still.sites.never_forced().contains(&Site::SpteInstall));
}
