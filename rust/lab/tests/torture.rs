//! Torture, in little: seconds instead of hours. `TDPMMU_STRESS` multiplies the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tdpmmu_lab::faults::FaultPlan;
use tdpmmu_lab::torture::{TortureConfig, TortureReport, torture};
use tdpmmu_lab::{Control, LabError};

fn seconds(short: f64) -> f64 {
    short * std::env::var("TDPMMU_STRESS").ok().and_then(|v| v.parse::<f64>().ok()).unwrap_or(1.0)
}

fn config(time: f64, seed: u64, faults: &str) -> TortureConfig {
    TortureConfig {
        seconds: seconds(time),
        seed: Some(seed),
        run_ms: 60,
        rounds: 2,
        faults: faults.parse().expect(faults),
        ..TortureConfig::default()
    }
}

fn clean(config: &TortureConfig) -> TortureReport {
    let report = torture(config, &Control::silent()).expect("a torture that can be");
    assert!(
        report.violations.is_empty(),
        "{:#?}\nin {:#?}",
        report.violations,
        report.episodes.last().expect("one")
    );
    assert!(report.operations > 0 && report.episodes.iter().any(|episode| episode.quiet_checks > 0));
    report
}

fn struck(report: &TortureReport, fault: &str) -> u64 {
    report.faults.iter().filter(|row| row.fault == fault).map(|row| row.struck).sum()
}

#[test]
fn every_sound_design_lives_through_it_and_every_kind_of_operation_was_made() {
    let report = clean(&config(1.8, 1, "none"));
    let designs: std::collections::BTreeSet<_> = report.episodes.iter().map(|e| e.design.as_str()).collect();
    let sound = tdpmmu_mmu::DESIGNS.iter().filter(|design| !design.flawed).count();
    assert_eq!(designs.len(), sound, "{designs:?}");
    for ground in ["real", "rough"] {
        assert!(
            report.episodes.iter().any(|episode| episode.ground == ground),
            "no episode on {ground} ground"
        );
    }
    assert!(report.episodes.iter().any(|episode| episode.events > 0), "no judge ever listened");
    assert!(report.episodes.iter().any(|episode| episode.events == 0), "there always was a judge in the way");
    for name in [
        "access",
        "fast-zap",
        "delete-slot",
        "create-slot",
        "unmap",
        "age",
        "look-up",
        "drop-root",
        "set-slot-flags",
    ] {
        assert!(
            report.by_operation.get(name).is_some_and(|count| count.done > 0),
            "{name}: {:?}",
            report.by_operation
        );
    }
    assert!(report.proves.failures_per_hour_below.is_some());
    let json = serde_json::to_string(&report).expect("plain data");
    let back: TortureReport = serde_json::from_str(&json).expect("the schema");
    assert_eq!((back.operations, back.by_operation), (report.operations, report.by_operation));
}

#[test]
fn a_defect_of_the_museum_is_found_on_real_threads() {
    // The host's pages of an invalid root are not unmapped: a root dies slowly enough for that on any machine.
    let config = TortureConfig {
        bug: Some("13".into()),
        design: Some("async-worker".into()),
        profile: Some("6.1".into()),
        seconds: 20.0,
        ..config(1.0, 3, "none")
    };
    let report = torture(&config, &Control::silent()).expect("a torture that can be");
    assert!(
        !report.violations.is_empty(),
        "{} operations in {} s found nothing",
        report.operations,
        report.seconds
    );
    assert_eq!(report.proves.failures_per_hour_below, None);
}

#[test]
fn a_cancelled_torture_ends_at_its_next_look() {
    let flag = Arc::new(AtomicBool::new(false));
    let stop = flag.clone();
    // The first report comes as the first VM is made.
    let control = Control::new(flag, move |_, _| stop.store(true, Ordering::Relaxed));
    let report =
        torture(&TortureConfig { seconds: 3600.0, ..TortureConfig::default() }, &control).expect("it ends");
    assert!(report.cancelled && report.episodes.len() <= 1 && report.violations.is_empty(), "{report:?}");
}

#[test]
fn the_same_seed_draws_the_same_machines() {
    let drawn = |seed| {
        let short = TortureConfig { run_ms: 1, rounds: 1, ..config(0.003, seed, "none") };
        let report = torture(&short, &Control::silent()).expect("a torture that can be");
        assert!(report.violations.is_empty(), "{:?}", report.violations);
        report
            .episodes
            .into_iter()
            .take(3)
            .map(|e| (e.design, e.profile, e.machine, e.seed))
            .collect::<Vec<_>>()
    };
    let (one, again, other) = (drawn(5), drawn(5), drawn(6));
    let n = one.len().min(again.len());
    assert_eq!(one[..n], again[..n]);
    assert_ne!(one[0], other[0]);
}

#[test]
fn what_cannot_be_tortured_is_refused_by_name() {
    let refused = |edit: &dyn Fn(&mut TortureConfig)| {
        let mut config = TortureConfig::default();
        edit(&mut config);
        match torture(&config, &Control::silent()) {
            Err(LabError::Usage(text)) => text,
            other => panic!("{other:?}"),
        }
    };
    assert!(refused(&|c| c.seconds = -1.0).contains("seconds = -1"));
    assert!(refused(&|c| c.seconds = f64::NAN).contains("seconds = NaN"));
    assert!(refused(&|c| c.threads = 0).contains("threads = 0"));
    assert!(refused(&|c| c.design = Some("synk".into())).contains("did you mean \"sync\""));
    assert!(refused(&|c| c.profile = Some("9.9".into())).contains("9.9"));
    assert!(refused(&|c| c.bug = Some("99x".into())).contains("99x"));
    assert!(refused(&|c| c.shake = 2000).contains("shake = 2000"));
    let pause: FaultPlan = "pause=guest:7".parse().expect("a plan");
    assert!(refused(&|c| c.faults = pause.clone()).contains("pause=guest:7"));
}

#[test]
fn the_torture_survives_each_fault_that_real_threads_can_have() {
    for (seed, (plan, fault)) in [
        ("alloc=3%", "alloc"),
        ("cmpxchg=10%", "cmpxchg"),
        ("yield=30%", "yield"),
        ("worker=stall", "worker-stall"),
        ("worker=die", "worker-die"),
        ("tlb-delay=100,tlb-merge,tlb-extra", "flush-extra"),
        ("pause=lockless,pause=guest:1", "vcpu-pause"),
    ]
    .into_iter()
    .enumerate()
    {
        let design = if plan.starts_with("worker") { Some("async-worker".into()) } else { None };
        let profile = design.as_ref().map(|_| "6.1-async".to_owned());
        let report =
            clean(&TortureConfig { design, profile, rounds: 1, ..config(0.12, 20 + seed as u64, plan) });
        assert!(struck(&report, fault) > 0, "{plan}: {:?}", report.faults);
        assert_eq!(report.plan, plan);
    }
}

#[test]
fn a_pool_that_ends_early_refuses_and_recovers() {
    let report = clean(&config(0.24, 40, "tables=60"));
    let starved: u64 = report.by_operation.values().map(|count| count.starved).sum();
    assert!(starved > 0, "{:?}", report.by_operation);
}

#[test]
fn a_reader_that_holds_every_grace_period_up_is_named_and_costs_no_more_than_the_pool() {
    let report = clean(&config(0.24, 41, "gp-delay=inf,tables=300"));
    let named: u64 = report.episodes.iter().filter_map(|e| e.stalls.get("rcu-holder")).sum();
    assert!(named > 0, "{:?}", report.episodes);
}

#[test]
fn a_storm_on_mmu_lock_starves_nobody() {
    clean(&config(0.24, 42, "storm=8"));
}
