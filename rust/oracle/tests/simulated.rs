//! The judge on the simulated platform, where it looks at everything: no false alarm on the sound engine, whatever the schedule; and defects of the engine that only the books of the true order can see.

mod scene;

use scene::{Scene, broken_by, run};
use tdpmmu_mmu::DESIGNS;
use tdpmmu_oracle::Rule;
use tdpmmu_platform::Bug;
use tdpmmu_platform::sim::End;

/// Schedules for each scene of a test.
const SEEDS: u64 = 60;

fn assert_no_alarm(scene: &Scene, seed: u64) {
    let (judge, run) = run(scene, seed, None);
    let found: Vec<String> = judge.violations().iter().map(ToString::to_string).collect();
    assert!(
        found.is_empty() && run.violations.is_empty() && matches!(run.end, End::Finished),
        "{scene:?} seed {seed}: {:?} {:?}\n{}",
        run.end,
        run.violations.first(),
        found.iter().take(6).map(String::as_str).collect::<Vec<_>>().join("\n")
    );
    assert!(judge.events() > 100, "{scene:?} seed {seed}: the judge heard {} events", judge.events());
}

#[test]
fn no_sound_design_is_accused() {
    for design in DESIGNS.iter().filter(|design| !design.flawed) {
        for seed in 0..SEEDS {
            for threads in [scene::DELETION, scene::TWO_ZAPS] {
                assert_no_alarm(&Scene::of(design.name, threads), seed);
            }
        }
    }
}

#[test]
fn dirty_logging_in_either_mode_and_by_rings_is_not_accused() {
    for seed in 0..SEEDS {
        for scene in scene::logging() {
            assert_no_alarm(&scene, seed);
        }
    }
}

#[test]
fn aging_huge_pages_protection_and_smm_are_not_accused() {
    for seed in 0..SEEDS {
        for profile in ["6.1-async", "6.1", "6.12", "7.2"] {
            assert_no_alarm(&Scene::profile(profile, scene::MIXTURE), seed);
            assert_no_alarm(&Scene::profile(profile, scene::SMM), seed);
            assert_no_alarm(&scene::two_roots(profile), seed);
        }
    }
}

#[test]
fn defects_that_only_the_true_order_shows_are_found() {
    let missed: Vec<String> = scene::defects()
        .into_iter()
        .filter_map(|(bug, scene, rules)| {
            let found = broken_by(&scene, bug, 400);
            let seen = found.iter().any(|rule| rules.contains(rule));
            (!seen).then(|| format!("{bug:?}: {found:?}, not one of {rules:?}"))
        })
        .collect();
    assert!(missed.is_empty(), "{missed:#?}");
}

#[test]
fn a_silenced_rule_lets_its_defect_pass() {
    for (bug, scene, rules) in scene::defects() {
        let silent =
            Scene { silenced: Rule::ALL.iter().copied().filter(|r| rules.contains(r)).collect(), ..scene };
        let found = broken_by(&silent, bug, 30);
        assert!(found.iter().all(|rule| !rules.contains(rule)), "{bug:?}: {found:?}");
    }
}

/// The bugs named here exist.
const _: Bug = Bug::B01;
