//! Virtual time: the same request is the same result; the engine's counts are those of a real run; what is held by count comes to what it stands for.

use serde_json::{Value, json};
use tdpmmu_lab::{Control, LabError, simulate};

const GIB: u64 = 1 << 30;

fn simulated(config: &Value) -> Value {
    let text = simulate::command(&config.to_string(), &Control::silent()).expect("a simulation");
    serde_json::from_str(&text).expect("JSON")
}

/// Two vCPUs with small working sets, at the tests' own prices.
fn small(memory_bytes: u64, more: &Value) -> Value {
    let mut config = json!({
        "vcpus": 2, "memory_bytes": memory_bytes, "uncalibrated": true, "working_set_bytes": 1 << 20, "arrival_ns": 100_000,
    });
    for (name, value) in more.as_object().expect("an object") {
        config[name] = value.clone();
    }
    config
}

fn run(config: &Value) -> Value {
    simulated(config)["runs"][0].clone()
}

fn number(of: &Value) -> f64 {
    of.as_f64().unwrap_or_else(|| panic!("{of} is no number"))
}

#[test]
fn the_same_request_is_the_same_run_to_the_last_bit() {
    let config = small(GIB, &json!({"design": ["sync", "async-worker"], "seed": 3}));
    let (first, second) = (simulated(&config), simulated(&config));
    assert_eq!(first["runs"].to_string(), second["runs"].to_string());
    assert_eq!(first["runs"].as_array().expect("runs").len(), 2);
    let other = small(GIB, &json!({"design": ["sync", "async-worker"], "seed": 4}));
    assert_ne!(first["runs"].to_string(), simulated(&other)["runs"].to_string());
}

#[test]
fn a_guest_that_is_held_by_count_is_counted_zapped_and_freed_whole() {
    let run = run(&small(32 * GIB, &json!({})));
    let tables = 32 * GIB / (2 << 20);
    assert_eq!(run["sptes"], 32 * GIB / 4096);
    assert_eq!(run["by_count"]["held_peak"], tables);
    // 4 KiB pass, then the tables themselves.
    assert_eq!(run["by_count"]["whole_tables"], 2 * tables);
    assert_eq!((&run["by_count"]["expanded"], &run["table_pages_leaked"]), (&json!(0), &json!(0)));
    assert!(number(&run["table_pages_freed"]) >= tables as f64);
    assert_eq!(run["written_back_frames"], 32 * GIB / 4096);
    assert_eq!(run["teardown"]["entry_writes"].as_u64().expect("a count") / (32 * GIB / 4096), 2);
}

#[test]
fn under_a_valid_root_the_words_go_one_by_one_and_the_pages_go_back() {
    let run = run(&small(64 << 20, &json!({"design": "in-place"})));
    assert_eq!((&run["by_count"]["whole_tables"], &run["by_count"]["expanded"]), (&json!(0), &json!(32)));
    assert_eq!(run["by_count"]["given_back"], 32);
    assert_eq!(run["sptes"], (64 << 20) / 4096);
}

#[test]
fn time_follows_the_work_and_the_prices() {
    let zap = |memory, more: &Value| number(&run(&small(memory, more))["update_ns"]["zap"]);
    let coarse = json!({"passes": "1G,root"});
    let (one, four) = (zap(GIB, &coarse), zap(4 * GIB, &coarse));
    assert!((3.5..4.5).contains(&(four / one)), "{one} ns, {four} ns");
    assert!(zap(GIB, &json!({"passes": "4K,2M,1G,root"})) > 1.8 * one);
    let dear = zap(GIB, &json!({"passes": "1G,root", "costs": {"swap": 13.0}}));
    assert!((1.8..2.2).contains(&(dear / one)), "{one} ns, {dear} ns at twice the price");
}

#[test]
fn vcpus_that_share_cpus_wait_for_them_and_vcpus_of_their_own_do_not() {
    let wait = |cpus: u32| {
        let run = run(&small(GIB, &json!({"vcpus": 6, "cpus": cpus, "working_set_bytes": 64 << 10})));
        let rows = run["attribution"].as_array().expect("rows").clone();
        rows.iter().filter_map(|row| row["run_delay_ns"].as_f64()).sum::<f64>()
    };
    let (few, many) = (wait(2), wait(8));
    assert!(few > 100.0 * many.max(1_000.0), "{few} ns on 2 CPUs, {many} ns on 8");
}

#[test]
fn more_vcpus_than_this_host_has_are_kicked_and_see_the_update() {
    let run = run(&small(GIB, &json!({"vcpus": 64, "working_set_bytes": 64 << 10})));
    assert_eq!(run["kicks"], 64);
    assert_eq!(run["block_update_ns"]["count"], 64);
    assert!(number(&run["visible_ns"]["count"]) > 60.0);
    assert!(number(&run["update_ns"]["kick_wait"]) > 0.0);
}

#[test]
fn what_makes_no_sense_is_refused_with_its_value_and_the_rule() {
    let refused = |more: Value| match simulate::command(&small(GIB, &more).to_string(), &Control::silent()) {
        Err(LabError::Usage(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(refused(json!({"costs": {"swop": 1.0}})).contains("did you mean \"swap\""));
    assert!(refused(json!({"costs": {"swap": -1.0}})).contains("swap=-1"));
    assert!(refused(json!({"cpus": 0})).contains("cpus=0"));
    assert!(refused(json!({"vcpus": 0})).contains("vcpus=0"));
    assert!(refused(json!({"design": "sink"})).contains("sync"));
    assert!(refused(json!({"colour": "red"})).contains("colour"));
    assert!(refused(json!({"error_sizes": [GIB], "error_reps": 0})).contains("error_reps=0"));
}
