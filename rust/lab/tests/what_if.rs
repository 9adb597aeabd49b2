//! What if: recorded trees are built again entry for entry, and each design's zap of them is run for real.

use std::path::Path;

use tdpmmu_lab::what_if::{WhatIf, WhatIfOptions, what_if};
use tdpmmu_lab::{Control, LabError};
use tdpmmu_trace::{Input, Replay, ReplayOptions, replay};

fn recording(case: &str) -> Replay {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(case).join("trace.txt.gz");
    let options = ReplayOptions { check: true, shapes: true, ..Default::default() };
    replay(Input::File(path), &options).expect("replays")
}

fn run(replay: &Replay, design: &str) -> WhatIf {
    what_if(replay, &WhatIfOptions::new(design), &Control::silent())
        .unwrap_or_else(|e| panic!("{design}: {e}"))
}

#[test]
fn every_tree_of_a_recording_is_built_again_and_zapped_by_every_sound_design() {
    let replay = recording("6.1/k_nx");
    let expected: Vec<u64> =
        replay.shapes.iter().map(|s| s.roots.iter().map(|r| r.leafs()).sum::<u64>()).collect();
    assert!(expected.iter().sum::<u64>() > 1000, "{expected:?}");
    for design in tdpmmu_mmu::DESIGNS.iter().filter(|d| !d.flawed) {
        let result = run(&replay, design.name);
        let built: Vec<u64> = result.zaps.iter().map(|z| z.sptes).collect();
        assert_eq!(built, expected, "{}", design.name);
        assert_eq!(result.total.zaps as usize, result.zaps.len());
        for zap in &result.zaps {
            let tables: u64 = replay
                .shapes
                .iter()
                .filter(|s| replay.zaps[s.zap].t0_ns == zap.t0_ns)
                .flat_map(|s| &s.roots)
                .map(|r| r.tables)
                .sum();
            assert_eq!(zap.tables, tables, "{}: tables come out as recorded, bare ones too", design.name);
            assert!(zap.recorded_ns > 0 && zap.caller_blocked_ns > 0, "{}: {zap:?}", design.name);
        }
        assert!(result.skipped.iter().any(|s| s.why == "the same in every design"), "{:?}", result.skipped);
    }
}

#[test]
fn a_design_with_a_worker_tears_down_in_the_background_and_one_without_does_not() {
    let replay = recording("6.1/k_nx");
    assert_eq!(run(&replay, "sync").total.background_ns, 0);
    assert!(run(&replay, "async-worker").total.background_ns > 0);
}

#[test]
fn what_a_worker_zapped_is_run_as_the_fast_zap_that_waited_for_it() {
    let replay = recording("6.1-async/i2_teardown_small");
    let result = run(&replay, "sync");
    let told: Vec<_> = result.zaps.iter().map(|z| (z.run_as, z.cause.as_str())).collect();
    assert!(!told.is_empty() && told.iter().any(|t| t.0 == "vm_end"), "{told:?}");
}

#[test]
fn two_address_spaces_are_built_with_their_roots() {
    let replay = recording("7.2/g_roots");
    let result = run(&replay, "sync");
    assert!(result.zaps.iter().any(|z| z.roots == 2), "{:?}", result.zaps);
}

#[test]
fn unknown_names_and_no_repetition_are_usage_errors_that_name_the_value() {
    let replay = recording("6.1/selftest_smm");
    let error = |options: WhatIfOptions| {
        let error = what_if(&replay, &options, &Control::silent()).expect_err("refused");
        assert!(matches!(error, LabError::Usage(_)), "{error:?}");
        error.to_string()
    };
    assert!(error(WhatIfOptions::new("quick")).contains("quick"));
    let sync = || WhatIfOptions::new("sync");
    assert!(error(WhatIfOptions { profile: Some("9.9".to_owned()), ..sync() }).contains("9.9"));
    assert!(error(WhatIfOptions { reps: 0, ..sync() }).contains("reps=0"));
}
