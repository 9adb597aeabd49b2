//! Every scene under every sound design, judged; and what single scenes must show.

use serde_json::{Value, json};
use tdpmmu_lab::config::BenchConfig;
use tdpmmu_lab::scene::{self, Kind, SLOT_CHURN_2013};
use tdpmmu_lab::{Control, LabError, bench};
use tdpmmu_mmu::DESIGNS;

fn try_run(kind: &str, config: &Value) -> Result<Value, LabError> {
    let text = bench::run(kind, &config.to_string(), &json!({}), &Control::silent())?;
    Ok(serde_json::from_str(&text).expect("results are JSON"))
}

fn run(kind: &str, config: Value) -> Vec<Value> {
    let mut result = try_run(kind, &config).unwrap_or_else(|error| panic!("{kind} {config}: {error}"));
    match result["runs"].take() {
        Value::Array(runs) => runs,
        other => panic!("runs is {other}"),
    }
}

fn usage(kind: &str, config: Value) -> String {
    match try_run(kind, &config) {
        Err(LabError::Usage(message)) => message,
        other => panic!("{kind} {config}: {other:?} is no usage error"),
    }
}

/// Designs for whose drops the MMU's own reference stands in.
fn owned(design: &Value) -> bool {
    matches!(design.as_str(), Some("sync" | "async-worker-owned"))
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

/// Scenes of an experiment under all sound designs: complete, counted, nothing leaked, nothing violated.
fn clean(kind: Kind, page: &str, memory: u64, scenes: &[&str]) {
    let mut config = json!({"memory_bytes": memory, "page": page, "scenes": scenes, "working_set_bytes": memory / 8,
                        "churns": 5, "drop_loop": 20, "arrival_ns": 10_000});
    // One scene has a guest of its own, and tests of its own (`shadow/`).
    let plan = BenchConfig::parse(&config.to_string()).and_then(|c| c.plan(Some(kind))).expect("makes sense");
    let all: Vec<_> = scene::of(kind).filter(|one| (one.fits)(&plan).is_ok()).map(|one| one.name).collect();
    let asked: Vec<_> = if scenes == ["all"] {
        all.into_iter().filter(|one| *one != SLOT_CHURN_2013).collect()
    } else {
        scenes.to_vec()
    };
    config["scenes"] = json!(asked);
    let runs = run(kind.name(), config);
    for one in scene::of(kind).filter(|one| scenes.contains(&one.name) || scenes == ["all"]) {
        if one.name == SLOT_CHURN_2013 {
            continue;
        }
        let of: Vec<_> = runs.iter().filter(|r| r["scene"] == one.name).collect();
        let left_out = match one.name {
            "dirty-split" => page == "4K",
            "migrating-vcpu" => {
                of.is_empty() && std::thread::available_parallelism().is_ok_and(|n| n.get() < 2)
            }
            _ => false,
        };
        let sizes = if one.scales() { 8 } else { 1 };
        let expected = if left_out { 0 } else { sizes * DESIGNS.iter().filter(|d| !d.flawed).count() };
        assert_eq!(of.len(), expected, "{} with {page}", one.name);
        for r in of {
            let what = format!("{} under {}: {}", one.name, r["design"], r["violation_list"]);
            assert_eq!(number(&r["table_pages_leaked"]), 0, "{what}");
            let judged = number(&r["memory_bytes"]) == memory;
            assert_eq!(r["violations"], if judged { json!(0) } else { json!(null) }, "{what}");
            assert_eq!(r["flawed"], false, "{what}");
            let left = &r["sptes_mapped_at_return"];
            assert!(left.is_null() || number(left) == 0, "{what}: {left}");
            let fits = r["fit"].is_object();
            assert_eq!(fits, one.scales() && number(&r["memory_bytes"]) == memory, "{what}");
        }
    }
}

#[test]
fn every_scene_of_zap_is_clean_under_every_sound_design() {
    clean(Kind::Zap, "4K", 8 << 20, &["all"]);
}

#[test]
fn every_scene_of_drop_is_clean_under_every_sound_design() {
    clean(Kind::Drop, "4K", 8 << 20, &["all"]);
}

/// The one that needs them, and one of each experiment that does not.
#[test]
fn scenes_with_2m_pages_are_clean_under_every_sound_design() {
    clean(Kind::Zap, "2M", 64 << 20, &["dirty-split", "several-roots"]);
    clean(Kind::Drop, "2M", 64 << 20, &["smm-exit"]);
}

#[test]
fn roots_that_come_and_go_between_fast_zaps_are_followed_in_every_sound_design() {
    let config = json!({"memory_bytes": 8 << 20, "scenes": "churn-and-drop", "churns": 30, "working_set_bytes": 1 << 20,
                        "arrival_ns": 10_000});
    for r in run("zap", config) {
        assert!(number(&r["toggles"]) > 0, "{}", r["design"]);
        assert_eq!(number(&r["updates"]["count"]), 30);
        assert_eq!(r["violations"], 0, "{}: {}", r["design"], r["violation_list"]);
    }
}

#[test]
fn after_a_hundred_churns_every_design_is_in_the_same_state() {
    let runs = run(
        "zap",
        json!({"memory_bytes": 16 << 20, "scenes": "slot-churn", "churns": 100, "working_set_bytes": 1 << 20, "check": false}),
    );
    let last = &runs[0]["final"];
    assert_eq!((&last["sptes"], &last["roots"]), (&json!(512), &json!(1)), "two working sets of 256 pages");
    for r in &runs {
        assert_eq!(number(&r["updates"]["count"]), 100);
        let all = &r["updates"]["update_ns"];
        let first = number(&r["update_ns"]["total"]);
        assert!((number(&all["min"])..=number(&all["max"])).contains(&first), "{first} is one of {all}");
        assert!(number(&r["teardown"]["fz_return_ns"]) >= first, "until the last one has returned");
        assert_eq!(&r["final"], last, "{}", r["design"]);
    }
}

#[test]
fn what_is_mapped_when_an_unfinished_zap_returns_is_a_result() {
    let config =
        json!({"memory_bytes": 1u64 << 30, "designs": "no-second-phase", "working_set_bytes": 1 << 20});
    let runs = run("zap", config);
    let r = &runs[0];
    assert_eq!(r["flawed"], true);
    assert!(number(&r["violations"]) > 0, "the judge sees it in its own repetition: {}", r["violation_list"]);
    assert_eq!(number(&r["table_pages_leaked"]), 0, "all of it is torn down in the end");
}

#[test]
fn sharing_decides_how_much_of_the_guest_is_mapped_again() {
    let mapped = |sharing: &str| {
        let runs = run(
            "zap",
            json!({"memory_bytes": 16 << 20, "designs": "sync", "sharing": sharing, "vcpus": 2, "working_set_bytes": 1 << 20,
                   "check": false}),
        );
        assert_eq!(runs[0]["sharing"], sharing);
        number(&runs[0]["final"]["sptes"])
    };
    assert_eq!([mapped("local"), mapped("pipeline"), mapped("global")], [512, 512, 256]);
}

#[test]
fn logging_splits_before_the_zap_and_a_collapsed_piece_is_torn_down_by_the_vcpu() {
    let memory = 64u64 << 20;
    let config = json!({"memory_bytes": memory, "page": "2M", "scenes": "dirty-split", "check": false, "working_set_bytes": 4 << 20});
    for r in run("zap", config) {
        assert_eq!(number(&r["sptes"]), memory >> 12, "{}: of 4K at t0", r["design"]);
        assert!(number(&r["teardown"]["entry_writes"]) >= memory >> 12, "{}", r["design"]);
        assert!(number(&r["prepare_ns"]) > 0);
    }
    let config = json!({"memory_bytes": memory, "scenes": "huge-page-in-fault", "check": false});
    for r in run("zap", config) {
        // A quarter of the memory in pieces of 2 MiB; each entry of each table, and the leaf that takes its place.
        let pieces = (memory / 4) >> 21;
        assert_eq!(number(&r["blocked_ns"]["count"]), pieces);
        assert_eq!(number(&r["teardown"]["entry_writes"]), pieces * 513, "{}", r["design"]);
        assert_eq!(number(&r["teardown"]["cpu_ns"]["caller"]), 0, "nobody else pays");
        assert!(r.get("update_ns").is_none());
    }
}

#[test]
fn several_roots_and_address_spaces_are_all_torn_down() {
    for (scene, roots) in [("several-roots", 3), ("two-address-spaces", 2)] {
        for r in run(
            "zap",
            json!({"memory_bytes": 16 << 20, "scenes": scene, "check": false, "working_set_bytes": 1 << 20}),
        ) {
            assert_eq!(number(&r["sptes"]), roots * 4096, "{scene}");
            // In place the roots stay valid, and a vCPU that was told to reload may put one before the zap gets to it: then that vCPU zaps it.
            if r["design"] != "in-place" {
                assert!(
                    number(&r["teardown"]["entry_writes"]) >= roots * 4096,
                    "{scene} under {}",
                    r["design"]
                );
            }
        }
    }
}

#[test]
fn a_halted_vcpu_keeps_the_page_of_its_root_and_nothing_else() {
    for r in run("zap", json!({"memory_bytes": 16 << 20, "scenes": "halted-vcpu", "check": false})) {
        // The zap in place leaves roots valid: nothing stale is held.
        let kept = u64::from(r["design"] != "in-place");
        assert_eq!(number(&r["retained_table_pages"]), kept, "{}", r["design"]);
        assert_eq!(number(&r["wake_ns"]["count"]), 1);
        assert_eq!(number(&r["final"]["roots"]), 1, "{}: once awake it uses the new one", r["design"]);
    }
}

#[test]
fn who_waits_is_measured() {
    for r in run("zap", json!({"memory_bytes": 256 << 20, "scenes": "waiting-update", "check": false})) {
        assert_eq!((&r["waiting"]["what"], &r["waiting"]["wait_ns"]["count"]), (&json!("update"), &json!(1)));
    }
    for r in run("zap", json!({"memory_bytes": 256 << 20, "scenes": "waiting-notifier", "check": false})) {
        assert_eq!(r["waiting"]["what"], "notifier");
        assert!(number(&r["waiting"]["wait_ns"]["count"]) >= 1, "{}", r["design"]);
    }
}

#[test]
fn the_end_of_a_vm_writes_every_entry_once_and_says_what_it_took() {
    for r in run("drop", json!({"memory_bytes": 16 << 20, "scenes": "vm-teardown", "check": false})) {
        let (close, teardown) = (&r["close_ns"], &r["teardown"]);
        assert_eq!(number(&close["total"]), number(&close["zap_all"]) + number(&close["rest"]));
        // 4,096 leaves below 8 leaf tables, and four entries above.
        assert!((4096..4200).contains(&number(&teardown["entry_writes"])), "{}: {teardown}", r["design"]);
        assert_eq!(number(&teardown["fz_return_ns"]), number(&close["total"]));
    }
}

#[test]
fn a_dying_vm_gives_a_system_queue_no_work() {
    let config = json!({"memory_bytes": 16 << 20, "scenes": ["cr0-wp", "dying-vm"], "designs": ["all", "system-workqueue"],
                        "check": false, "drop_loop": 0, "vcpus": 1});
    for r in run("drop", config) {
        let (scene, design) = (r["scene"].as_str().expect("a name"), &r["design"]);
        assert_eq!(number(&r["block_drop_ns"]["count"]), 1);
        if owned(design) {
            assert!(r["teardown"].is_null() && number(&r["retained_table_pages"]) > 0, "{scene} {design}");
            continue;
        }
        assert_eq!(number(&r["retained_table_pages"]), 0);
        if design == "system-workqueue" {
            // The vCPU that drops the root zaps it itself once nobody else may.
            let by_vcpu = r["step_units"]["max"].as_u64().unwrap_or(0);
            let worker = number(&r["teardown"]["cpu_ns"]["worker"]);
            assert!(by_vcpu > 0);
            assert_eq!(worker == 0, scene == "dying-vm", "{scene}: {}", r["teardown"]);
        }
    }
}

#[test]
fn a_slope_is_fitted_over_sizes_that_were_built() {
    let config = json!({"memory_bytes": 8 << 20, "scenes": "zap-64t", "designs": "sync", "check": false, "reps": 2, "vcpus": 1});
    for kind in ["zap", "drop"] {
        let runs = run(kind, config.clone());
        let sizes: Vec<_> = runs.iter().map(|r| number(&r["sptes"])).collect();
        let built: Vec<u64> = (1..=8).flat_map(|step| [step * 256; 2]).collect();
        assert_eq!(sizes, built, "{kind}");
        let fit = &runs[15]["fit"];
        let of = if kind == "zap" { "update_ns.total" } else { "block_drop_ns.max" };
        assert_eq!((&fit["of"], &fit["n"]), (&json!(of), &json!(16)));
        let points = fit["points"].as_array().expect("points");
        assert_eq!(points.iter().map(|p| number(&p[0])).collect::<Vec<_>>(), sizes);
        let at = &fit["at"][0];
        assert_eq!((&at["sptes"], &at["extrapolated"]), (&json!(1u64 << 34), &json!(true)));
        assert!(at["ci95"][0].as_f64() <= at["ns"].as_f64() && at["ns"].as_f64() <= at["ci95"][1].as_f64());
        assert!(runs.iter().all(|r| r["extrapolated"] == false), "every run was run");
    }
}

#[test]
fn each_list_makes_runs_of_its_own_and_flags_come_first() {
    let config = json!({"memory_bytes": 16 << 20, "designs": ["inline", "sync"], "passes": ["1G,root", "root"],
                        "preempt": ["none", "full"], "kernel_profile": "6.1", "check": false, "vcpus": 1});
    let runs = run("zap", config);
    let seen: Vec<_> = runs
        .iter()
        .map(|r| [&r["design"], &r["passes"], &r["preempt"]].map(|v| v.as_str().expect("a name")).join(" "))
        .collect();
    assert_eq!(
        seen,
        [
            "inline 1G,root none",
            "inline 1G,root full",
            "inline root none",
            "inline root full",
            "sync 1G,root none",
            "sync 1G,root full",
            "sync root none",
            "sync root full"
        ]
    );
}

#[test]
fn workers_and_their_queue_are_named_where_there_are_any() {
    let config = json!({"memory_bytes": 16 << 20, "designs": ["sync", "async-worker", "second-list-worker"], "workers": 2,
                        "worker_queue": "system", "worker_cpus": [0], "vcpu_cpus": [0], "check": false});
    // CPU 0 may be out of bounds for this process; then that is said.
    let runs = match try_run("zap", &config) {
        Ok(mut result) => result["runs"].take(),
        Err(LabError::Usage(message)) => {
            assert!(message.contains("CPU 0"), "{message}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    for r in runs.as_array().expect("runs") {
        let expected =
            if r["design"] == "sync" { (json!(0), json!(null)) } else { (json!(2), json!("system")) };
        assert_eq!((r["workers"].clone(), r["worker_queue"].clone()), expected, "{}", r["design"]);
    }
}

#[test]
fn requests_without_sense_say_why() {
    assert!(usage("drop", json!({"scenes": "boot"})).contains("belongs to bench zap"));
    assert!(usage("zap", json!({"scenes": "haltd-vcpu"})).contains("did you mean \"halted-vcpu\""));
    assert!(usage("zap", json!({"scenes": "dirty-split"})).contains("would split nothing"));
    let large = json!({"scenes": "huge-page-in-fault", "page": "1G", "memory_bytes": 8u64 << 30});
    assert!(usage("zap", large).contains("no host page is larger"));
    assert!(
        usage("zap", json!({"designs": "sync", "worker_cpus": [0], "memory_bytes": 1 << 20}))
            .contains("no workers")
    );
    assert!(usage("zap", json!({"sharing": "locl"})).contains("did you mean \"local\""));
    assert!(usage("zap", json!({"worker_queue": "mine"})).contains("per-vm, system"));
    assert!(usage("zap", json!({"vcpu_cpus": [100_000]})).contains("CPU 100000"));
    assert!(usage("zap", json!({"churns": 0})).contains("churns=0"));
    assert!(usage("walk", json!({"scenes": "boot"})).contains("only zap and drop have scenes"));
    let json = bench::run("zap", r#"{"scenes": 3}"#, &json!({}), &Control::silent());
    assert!(matches!(json, Err(LabError::Usage(_))), "{json:?}");
}
