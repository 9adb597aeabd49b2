//! The experiments end to end on small guests: complete results, nothing leaked, nothing violated.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tdpmmu_lab::{Control, LabError, bench};
use tdpmmu_mmu::DESIGNS;

fn run(kind: &str, config: Value) -> Value {
    match bench::run(kind, &config.to_string(), &json!({}), &Control::silent()) {
        Ok(text) => serde_json::from_str(&text).expect("results are JSON"),
        Err(error) => panic!("{kind} {config}: {error}"),
    }
}

fn runs(result: &Value) -> &Vec<Value> {
    result["runs"].as_array().expect("a list of runs")
}

#[test]
fn every_design_zaps_every_page_size_and_leaves_nothing() {
    for (page, memory, sptes) in [("4K", 64u64 << 20, 16_384), ("2M", 1 << 30, 512), ("1G", 4 << 30, 4)] {
        let result =
            run("zap", json!({"memory_bytes": memory, "page": page, "working_set_bytes": memory / 4}));
        assert_eq!(result["schema"], "tdpmmu.bench.zap/1");
        let runs = runs(&result);
        let names: Vec<_> = runs.iter().map(|r| r["design"].as_str().expect("a name")).collect();
        let sound: Vec<_> = DESIGNS.iter().filter(|d| !d.flawed).map(|d| d.name).collect();
        assert_eq!(names, sound);
        for r in runs {
            assert_eq!(r["sptes"], sptes, "counted in the tree: {page}");
            assert_eq!(r["table_pages_leaked"], 0);
            assert_eq!(r["violations"], 0, "{}", r["violation_list"]);
            assert_eq!(r["extrapolated"], false);
            assert!(r["update_ns"]["total"].as_u64() > Some(0));
            assert!(r["table_pages_freed"].as_u64() >= Some(1), "{r}");
            assert!(r["refault"]["faults"].as_u64() > Some(0), "the working set came back");
        }
    }
}

#[test]
fn a_drop_tears_down_or_retains_as_the_design_says() {
    let config = json!({"memory_bytes": 64 << 20, "drop_loop": 300, "working_set_bytes": 1 << 20});
    let result = run("drop", config);
    for r in runs(&result) {
        assert_eq!(
            (&r["sptes"], &r["table_pages_leaked"], &r["violations"]),
            (&json!(16_384), &json!(0), &json!(0))
        );
        assert_eq!(r["block_drop_ns"]["count"], 1);
        assert_eq!(r["block_baseline_ns"]["count"], 200);
        assert_eq!(r["drop_loop"]["block_drop_ns"]["count"], 300);
        let retained = r["retained_table_pages"].as_u64().expect("a count");
        match r["design"].as_str() {
            Some("sync" | "async-worker-owned") => {
                assert_eq!(
                    retained,
                    r["table_pages"].as_u64().expect("a count"),
                    "the MMU's reference keeps all"
                );
                assert!(r["teardown"].is_null(), "nothing was torn down");
            }
            _ => {
                assert_eq!(retained, 0);
                assert!(r["teardown"]["entry_writes"].as_u64() >= Some(16_384), "{}", r["teardown"]);
            }
        }
    }
}

#[test]
fn finer_passes_write_leaves_twice_and_bound_the_step() {
    let of = |passes: &str| {
        let config = json!({"memory_bytes": 1u64 << 30, "designs": ["sync"], "passes": passes, "check": false, "vcpus": 1});
        let result = run("zap", config);
        let r = &runs(&result)[0];
        (
            r["step_units"]["max"].as_u64().expect("steps"),
            r["teardown"]["entry_writes"].as_u64().expect("writes"),
        )
    };
    let (fine, coarse) = (of("4K,2M,1G,root"), of("1G,root"));
    assert!(fine.0 <= 1300 && coarse.0 >= 262_144, "{fine:?} {coarse:?}");
    assert!(fine.1 > coarse.1 * 19 / 10, "{fine:?} {coarse:?}");
}

#[test]
fn settings_reach_the_run() {
    let result = run(
        "zap",
        json!({"memory_bytes": 32 << 20, "kernel_profile": "6.1", "designs": ["sync"], "preempt": "none", "levels": 5,
               "populate": "fault", "ad_mix": "dirty", "check": false, "vcpus": 3, "seed": 42}),
    );
    let r = &runs(&result)[0];
    assert_eq!(r["passes"], "1G,root", "6.1.y's own");
    assert_eq!((&r["preempt"], &r["vcpus"], &result["seed"]), (&json!("none"), &json!(3), &json!(42)));
    assert_eq!(r["populated_by"], "fault");
    assert_eq!(r["sptes"], 8192);
    assert!(r["written_back_frames"].as_u64() >= Some(8192), "6.1 writes Dirty back at zap");
}

#[test]
fn phases_of_each_thread_add_up_to_its_time() {
    let result = run("zap", json!({"memory_bytes": 256 << 20, "check": false}));
    for r in runs(&result) {
        let rows = r["attribution"].as_array().expect("rows");
        assert!(rows.len() >= 3, "two vCPUs and a caller at least");
        for row in rows {
            let sum: u64 = row["ns"].as_object().expect("phases").values().filter_map(Value::as_u64).sum();
            let elapsed = row["elapsed_ns"].as_u64().expect("a time");
            assert!(sum.abs_diff(elapsed) <= elapsed / 20, "{row}");
        }
    }
}

#[test]
fn what_the_host_cannot_hold_is_refused_before_anything_is_touched() {
    let begin = Instant::now();
    let error = bench::run(
        "drop",
        r#"{"memory_bytes": 70368744177664, "max_memory_bytes": 1073741824}"#,
        &json!({}),
        &Control::silent(),
    )
    .expect_err("64 TiB in 1 GiB");
    assert!(matches!(&error, LabError::Memory { needed_bytes, .. } if *needed_bytes > 128 << 30), "{error}");
    assert!(error.to_string().contains("128.3 GiB"), "{error}");
    assert!(begin.elapsed() < Duration::from_secs(1), "refused at once");
}

#[test]
fn a_cancelled_run_ends_and_joins_its_threads() {
    let cancel = Arc::new(AtomicBool::new(false));
    let control = Control::new(cancel.clone(), |_, _| {});
    let runner = std::thread::spawn(move || {
        bench::run("zap", r#"{"memory_bytes": 17179869184, "reps": 50}"#, &json!({}), &control)
    });
    std::thread::sleep(Duration::from_millis(1500));
    cancel.store(true, Ordering::Relaxed);
    assert!(matches!(runner.join().expect("no panic"), Err(LabError::Cancelled)));
}

#[test]
fn micro_experiments_report_their_rows_against_the_limits() {
    for (kind, rows) in [("populate", 5), ("fault", 3), ("walk", 2), ("rcu", 3)] {
        let result = run(kind, json!({"memory_bytes": 32 << 20}));
        assert_eq!(result["schema"], "tdpmmu.micro/1");
        let list = result["rows"].as_array().expect("rows");
        assert!(list.len() >= rows, "{kind}: {list:?}");
        for row in list {
            assert!(row["ns"].as_f64() > Some(0.0) && row["count"].as_u64() > Some(0), "{row}");
        }
    }
}

#[test]
fn the_flagship_size_is_really_built_with_large_pages() {
    let config =
        json!({"memory_bytes": 64u64 << 40, "page": "1G", "designs": ["sync"], "check": false, "vcpus": 1});
    let result = run("zap", config);
    let r = &runs(&result)[0];
    assert_eq!((&r["sptes"], &r["table_pages_leaked"]), (&json!(65_536), &json!(0)));
}

#[test]
fn write_backs_and_refaults_are_those_of_the_window() {
    let result = run("zap", json!({"memory_bytes": 64 << 20, "check": false, "working_set_bytes": 4 << 20}));
    for r in runs(&result) {
        assert_eq!(
            r["written_back_frames"], 16_384,
            "each dirty leaf once, none of the VM's end: {}",
            r["design"]
        );
        assert!(r["refault"]["faults"].as_u64() >= Some(2 * 1024), "both working sets: {}", r["refault"]);
    }
    let kept =
        run("drop", json!({"memory_bytes": 64 << 20, "check": false, "designs": ["sync"], "drop_loop": 10}));
    assert_eq!(runs(&kept)[0]["written_back_frames"], 0, "nothing was torn down");
}
