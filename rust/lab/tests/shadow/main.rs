//! The shadow MMU under the experiments: every scene that makes sense, under every design and both kinds of paging, counted and judged; and what single ones must show. No time is asserted.

mod pairs;

use serde_json::{Value, json};
use tdpmmu_lab::config::{BenchConfig, ShadowCase};
use tdpmmu_lab::scene::{self, Kind, SLOT_CHURN_2013};
use tdpmmu_lab::{Control, LabError, bench};
use tdpmmu_shadow::{ReclaimKind, SHADOW_DESIGNS, ShadowDesign};
use tdpmmu_vm::Paging;

fn try_run(kind: &str, config: &Value) -> Result<Value, LabError> {
    let text = bench::run(kind, &config.to_string(), &json!({}), &Control::silent())?;
    Ok(serde_json::from_str(&text).expect("results are JSON"))
}

fn list(kind: &str, config: &Value, of: &str) -> Vec<Value> {
    let mut result = try_run(kind, config).unwrap_or_else(|error| panic!("{kind} {config}: {error}"));
    match result[of].take() {
        Value::Array(rows) => rows,
        other => panic!("{of} is {other}"),
    }
}

/// The runs alone: the host's limits, which stand around a result, take a second each time.
fn runs(kind: &str, config: Value) -> Vec<Value> {
    let kind = if kind == "zap" { Kind::Zap } else { Kind::Drop };
    let plan = BenchConfig::parse(&config.to_string()).and_then(|c| c.plan(Some(kind))).expect("makes sense");
    let rows =
        bench::rows(kind, &plan, 2, &Control::silent()).unwrap_or_else(|error| panic!("{config}: {error}"));
    match serde_json::to_value(rows) {
        Ok(Value::Array(rows)) => rows,
        other => panic!("rows are {other:?}"),
    }
}

fn usage(kind: &str, config: Value) -> String {
    match try_run(kind, &config) {
        Err(LabError::Usage(message)) => message,
        other => panic!("{kind} {config}: {other:?} is no usage error"),
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

/// Every scene of `kind` that fits, under every shadow design, or each under one of them in turn: complete, counted, nothing leaked, nothing violated.
fn clean(kind: Kind, paging: Paging, in_turn: bool) {
    const MEMORY: u64 = 8 << 20;
    let request = |designs: &[&str], scenes: &[&str]| {
        json!({"memory_bytes": MEMORY, "designs": designs, "paging": paging.name(), "scenes": scenes, "working_set_bytes": MEMORY / 8,
               "churns": 5, "drop_loop": 20, "arrival_ns": 10_000})
    };
    let every: Vec<_> = SHADOW_DESIGNS.iter().map(|d| d.name).collect();
    let plan = BenchConfig::parse(&request(&every, &[]).to_string()).and_then(|c| c.plan(Some(kind)));
    let plan = plan.expect("makes sense");
    let case = ShadowCase { design: ShadowDesign::Gen, paging, reclaim: ReclaimKind::Ipi, quota: None };
    let fitting = scene::of(kind)
        .filter(|s| s.name != SLOT_CHURN_2013 && (s.fits)(&plan).is_ok() && (s.shadow)(&plan, &case).is_ok());
    for (n, scene) in fitting.enumerate() {
        let designs = if in_turn { &every[n % every.len()..][..1] } else { &every[..] };
        let of = runs(kind.name(), request(designs, &[scene.name]));
        let sizes = if scene.scales() { 8 } else { 1 };
        assert_eq!(of.len(), sizes * designs.len(), "{}", scene.name);
        for r in &of {
            let what = format!("{} under {}, {paging:?}: {}", scene.name, r["design"], r["violation_list"]);
            assert_eq!(number(&r["table_pages_leaked"]), 0, "{what}");
            if number(&r["memory_bytes"]) == MEMORY {
                assert_eq!(r["violations"], 0, "{what}");
            }
            assert_eq!(
                [&r["lock_mode"], &r["passes"], &r["ownership"], &r["shadow"]["paging"]],
                [&json!("exclusive"), &json!("-"), &json!("-"), &json!(paging.name())],
                "{what}"
            );
            let left = &r["sptes_mapped_at_return"];
            assert!(left.is_null() || number(left) == 0, "{what}: {left}");
            let tables = number(&r["shadow"]["guest_table_pages"]);
            assert_eq!(tables > 0, paging == Paging::Guest, "{what}: {tables}");
        }
    }
}

#[test]
fn every_scene_is_clean_under_one_shadow_design_in_turn() {
    clean(Kind::Zap, Paging::Direct, true);
    clean(Kind::Zap, Paging::Guest, true);
    clean(Kind::Drop, Paging::Guest, true);
}

#[test]
#[ignore = "the whole matrix: minutes"]
fn every_scene_is_clean_under_every_shadow_design() {
    for paging in [Paging::Direct, Paging::Guest] {
        clean(Kind::Zap, paging, false);
        clean(Kind::Drop, paging, false);
    }
}

#[test]
fn a_guest_is_mapped_by_as_many_leaves_as_under_the_tdp_mmu() {
    for (page, memory, paging, populate) in [
        ("4K", 64u64 << 20, "direct", "bulk"),
        ("4K", 64 << 20, "guest", "fault"),
        ("2M", 1 << 30, "guest", "bulk"),
        ("2M", 1 << 30, "direct", "fault"),
        ("1G", 4 << 30, "guest", "bulk"),
    ] {
        let config = json!({"memory_bytes": memory, "page": page, "designs": ["sync", "shadow-gen"], "paging": paging,
                            "populate": populate, "working_set_bytes": memory / 4, "check": false});
        let both = runs("zap", config);
        let of = |field: &str| [number(&both[0][field]), number(&both[1][field])];
        let what = format!("{page} {paging} {populate}");
        assert_eq!(of("sptes"), [memory / page_bytes(page); 2], "{what}");
        // The vCPUs' current roots are roots of the same tree.
        assert_eq!(number(&both[1]["shadow"]["pages_at_t0"]), number(&both[1]["table_pages"]), "{what}");
        assert!(of("table_pages")[1] <= of("table_pages")[0], "{what}: {:?}", of("table_pages"));
    }
}

fn page_bytes(page: &str) -> u64 {
    match page {
        "4K" => 4 << 10,
        "2M" => 2 << 20,
        _ => 1 << 30,
    }
}

#[test]
fn a_hundred_churns_leave_the_same_under_every_design_and_nothing_behind() {
    for (paging, check) in [("direct", false), ("guest", false), ("direct", true)] {
        let designs = if check || paging == "guest" { "shadow-gen" } else { "shadow" };
        let config = json!({"memory_bytes": 16 << 20, "scenes": "slot-churn", "designs": designs, "paging": paging, "churns": 100,
                            "working_set_bytes": 1 << 20, "check": check});
        for r in runs("zap", config) {
            let what = format!("{} {paging}: {}", r["design"], r["violation_list"]);
            assert_eq!(number(&r["updates"]["count"]), 100, "{what}");
            let violations = if check { json!(0) } else { json!(null) };
            assert_eq!((&r["violations"], &r["table_pages_leaked"]), (&violations, &json!(0)), "{what}");
            // Two working sets of 256 pages; the slot design leaves all of the memory mapped.
            let mapped = if r["design"] == "shadow-slot" { 4096 } else { 512 };
            assert_eq!(number(&r["final"]["sptes"]), mapped, "{what}");
            let toggles = match r["design"].as_str() {
                Some("shadow-gen" | "shadow-gen-kept") => 100,
                _ => 0,
            };
            assert_eq!(number(&r["shadow"]["toggles"]), toggles, "{what}");
        }
    }
}

#[test]
fn what_obsolete_pages_retain_is_followed_over_time() {
    let config =
        json!({"memory_bytes": 256 << 20, "designs": "shadow", "check": false, "working_set_bytes": 1 << 20});
    for r in runs("zap", config) {
        let (design, s) = (&r["design"], &r["shadow"]);
        let series = s["retained_series"].as_array().expect("a series");
        assert!(series.len() >= 3, "{design}: t0, the return, the end: {series:?}");
        assert_eq!(number(&series[0][0]), 0, "{design}");
        assert!(
            series.windows(2).all(|two| number(&two[0][0]) <= number(&two[1][0])),
            "{design}: {series:?}"
        );
        let pages = number(&s["pages_at_t0"]);
        let kept = [number(&s["retained_at_return"]), number(&s["retained_at_end"])];
        match design.as_str() {
            // Nobody has asked for the memory: all of it waits. A root that vCPUs put is freed.
            Some("shadow-gen-kept") => {
                assert!(kept.iter().all(|&kept| kept + 1 >= pages), "{pages} pages: {s}");
                assert_eq!(number(&s["zapped"]), 0, "{s}");
            }
            Some("shadow-slot") => assert_eq!((kept, number(&s["zapped"])), ([0, 0], 0), "{s}"),
            _ => {
                assert_eq!(kept, [0, 0], "{design}: {s}");
                // The root goes with its last put, whenever its vCPU comes to it.
                assert!(number(&s["zapped"]) + 1 >= pages, "{design}: {s}");
            }
        }
    }
}

#[test]
fn a_small_quota_takes_pages_back_and_the_guest_still_runs() {
    let config = json!({"memory_bytes": 256 << 20, "designs": ["shadow-gen", "shadow-gen-kept"], "quota": 96, "populate": "fault",
                        "scenes": "slot-churn", "churns": 5, "working_set_bytes": 64 << 20});
    for r in runs("zap", config) {
        let what = format!("{}: {}", r["design"], r["violation_list"]);
        assert_eq!(r["shadow"]["quota"], 96);
        assert!(number(&r["table_pages"]) <= 96, "{what}: {} at t0", r["table_pages"]);
        assert!(number(&r["sptes"]) < 65_536, "{what}: not all of it fits");
        assert_eq!((&r["violations"], &r["table_pages_leaked"]), (&json!(0), &json!(0)), "{what}");
    }
}

#[test]
fn every_kind_of_reclamation_is_a_run_of_its_own() {
    let config = json!({"memory_bytes": 8 << 20, "designs": ["sync", "shadow-gen"], "reclaim": "all", "working_set_bytes": 1 << 20});
    let all = runs("zap", config);
    let kinds: Vec<_> = all.iter().map(|r| r["shadow"]["reclaim"].as_str().unwrap_or("none")).collect();
    let expected: Vec<_> = std::iter::once("none").chain(ReclaimKind::ALL.map(ReclaimKind::name)).collect();
    assert_eq!(kinds, expected);
    for r in &all {
        assert_eq!(
            (&r["violations"], &r["table_pages_leaked"]),
            (&json!(0), &json!(0)),
            "{}",
            r["violation_list"]
        );
    }
}

#[test]
#[ignore = "the guest maps its 2 GiB again twenty times for each design"]
fn the_scene_of_2013_stands_beside_the_published_figure() {
    let config = json!({"memory_bytes": 8 << 20, "scenes": SLOT_CHURN_2013, "designs": ["shadow-walk", "shadow-gen"], "check": false});
    let both = runs("zap", config);
    for r in &both {
        assert_eq!((number(&r["memory_bytes"]), number(&r["vcpus"])), (2 << 30, 6), "its own guest");
        assert_eq!(number(&r["sptes"]), 524_288);
        assert_eq!(number(&r["cycle_ns"]["count"]), number(&r["updates"]["count"]));
        let p = &r["published"];
        assert_eq!((&p["before_ms"], &p["after_ms"]), (&json!(46.1), &json!(21.6)));
        let (before, after) = (p["our_before_ms"].as_f64(), p["our_after_ms"].as_f64());
        assert_eq!(p["our_ratio"].as_f64(), before.zip(after).map(|(b, a)| a / b));
        assert!(p["our_ratio"].as_f64() > Some(0.0));
        // All of the memory is mapped again before each deletion, as far as tables tell.
        if r["design"] == "shadow-gen" {
            let cycles = number(&r["updates"]["count"]);
            assert!(number(&r["shadow"]["zapped"]) > cycles * 900, "{}", r["shadow"]);
        }
    }
}

#[test]
fn single_operations_run_on_the_shadow_mmu_too() {
    for paging in ["direct", "guest"] {
        for kind in ["populate", "fault"] {
            let config = json!({"memory_bytes": 16 << 20, "designs": "shadow-gen", "paging": paging});
            let rows = list(kind, &config, "rows");
            assert!(rows.len() >= 3, "{kind} {paging}: {rows:?}");
            assert!(
                rows.iter().all(|row| number(&row["count"]) > 0 && row["ns"].as_f64() > Some(0.0)),
                "{rows:?}"
            );
        }
    }
    assert!(usage("dirty", json!({"designs": "shadow-gen"})).contains("about the TDP MMU"));
    assert!(usage("fault", json!({"designs": "shadow"})).contains("one MMU at a time"));
}

#[test]
fn kinds_of_reclamation_are_compared_on_the_same_work() {
    let rows = list("walk", &json!({"memory_bytes": 64 << 20, "reclaim": "all"}), "rows");
    for kind in ReclaimKind::ALL {
        let of = |what: &str| {
            let row = rows.iter().find(|r| r["reclaim"] == kind.name() && r["what"] == what);
            row.unwrap_or_else(|| panic!("no row {what} of {kind}"))
        };
        for what in ["walk", "free", "stalled-free", "stalled-call"] {
            assert!(of(what)["ns"].as_f64() > Some(0.0), "{}", of(what));
            assert_eq!(of(what)["of"], "ipi");
        }
        // A stalled reader costs memory, or time: who frees at once keeps nothing.
        for what in ["waiting", "stalled-waiting"] {
            let row = of(what);
            assert!(row["ns"].is_null(), "{row}");
            if kind.frees_at_once() {
                assert_eq!(row["pages"], 0, "{row}");
            }
        }
        if !kind.frees_at_once() {
            assert!(number(&of("stalled-waiting")["pages"]) > 0, "{}", of("stalled-waiting"));
        }
    }
}

#[test]
fn versus_has_a_row_for_every_guest_and_mmu() {
    let config = json!({"memory_bytes": [32 << 20, 64 << 20], "vcpus": [2], "reps": 1});
    let rows = list("versus", &config, "rows");
    assert_eq!(rows.len(), 2 * 3);
    for three in rows.chunks(3) {
        let names: Vec<_> = three.iter().map(|r| r["mmu"].as_str().expect("a name")).collect();
        assert_eq!(names, ["tdp", "shadow-direct", "shadow-guest"], "in turn");
        let of = |field: &str| [0, 1, 2].map(|n: usize| number(&three[n][field]));
        assert_eq!(of("sptes"), [number(&three[0]["memory_bytes"]) >> 12; 3]);
        let [_, direct, guest] = of("metadata_bytes");
        assert!(guest > direct, "a gfn an entry: {three:?}");
        let [none, some, _] = of("rmap_bytes");
        assert!(none == 0 && some >= of("sptes")[0] * 8, "{three:?}");
        assert_eq!(of("guest_table_bytes").map(|bytes| bytes > 0), [false, false, true]);
        for field in ["fault_ns", "zap_visible_ns", "zap_hold_ns", "zap_total_ns", "zap_cpu_ns", "refault_ns"]
        {
            assert!(three.iter().all(|r| r[field].as_f64() > Some(0.0)), "{field}: {three:?}");
        }
    }
}

#[test]
fn memory_is_refused_with_everything_that_the_shadow_mmu_needs() {
    let limited = |design: &str, paging: &str| {
        // 1 GiB of 4K pages: 2 MiB of tables under the TDP MMU; a word a gfn more here; the guest's own and their gfns.
        let config = json!({"memory_bytes": 1u64 << 30, "designs": design, "paging": paging, "max_memory_bytes": 5u64 << 20});
        try_run("zap", &config)
    };
    match limited("shadow-gen", "guest") {
        Err(LabError::Memory { needed_bytes, .. }) => assert!(needed_bytes > 8 << 20, "{needed_bytes}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn requests_without_sense_say_why() {
    let zap = |config: Value| usage("zap", config);
    assert!(zap(json!({"designs": "sync", "paging": "guest"})).contains("only the shadow MMU has it"));
    assert!(zap(json!({"quota": 100})).contains("quota with design"));
    assert!(zap(json!({"designs": "shadow", "paging": "gust"})).contains("did you mean \"guest\""));
    assert!(zap(json!({"designs": "shadow", "paging": "tdp"})).contains("expected one of direct, guest"));
    assert!(zap(json!({"designs": "shadow-gen", "quota": 63})).contains("at least 64"));
    assert!(zap(json!({"designs": "shadow-gen", "reclaim": "epochs"})).contains("did you mean \"epoch\""));
    assert!(zap(json!({"designs": "shadow-gen", "passes": "root"})).contains("the shadow MMU has no passes"));
    assert!(zap(json!({"designs": "shadow-gen", "ownership": "mmu"})).contains("belongs to the cache"));
    assert!(zap(json!({"designs": "shadow-gne"})).contains("did you mean \"shadow-gen\""));
    assert!(zap(json!({"designs": "shadow-gen", "workers": 2})).contains("no workers"));
    let split =
        json!({"designs": "shadow-gen", "page": "2M", "scenes": "dirty-split", "memory_bytes": 1 << 30});
    assert!(zap(split).contains("nothing is split ahead"));
    assert!(
        zap(json!({"designs": "shadow-gen", "scenes": "huge-page-in-fault"}))
            .contains("nobody tears it down")
    );
    let smm = json!({"designs": "shadow-gen", "paging": "guest", "scenes": "smm-exit"});
    assert!(usage("drop", smm).contains("use paging direct"));
    assert!(usage("versus", json!({"memory_bytes": []})).contains("name at least one"));
    // With designs of both MMUs each takes what is its own.
    let both = json!({"designs": ["sync", "shadow-gen"], "passes": ["root", "1G,root"], "quota": 1000, "memory_bytes": 4 << 20, "check": false});
    let seen: Vec<_> = runs("zap", both).iter().map(|r| r["passes"].as_str().map(String::from)).collect();
    assert_eq!(seen.iter().flatten().collect::<Vec<_>>(), ["root", "1G,root", "-"]);
}
