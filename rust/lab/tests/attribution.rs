//! Where the time went: rows that add up, timelines and traces that say the same as the rows.

use std::collections::HashMap;
use std::path::PathBuf;

use serde_json::{Value, json};
use tdpmmu_lab::{Control, bench};
use tdpmmu_trace::perfetto::{
    self,
    schema::{Data, EventType},
};

/// A file in the directory for tests' files, gone at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("tdpmmu-{}-{name}", std::process::id())))
    }

    fn path(&self) -> &str {
        self.0.to_str().expect("a plain name")
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn runs(kind: &str, mut config: Value) -> Vec<Value> {
    for (name, value) in [
        ("memory_bytes", json!(32 << 20)),
        ("working_set_bytes", json!(1 << 20)),
        ("arrival_ns", json!(10_000)),
        ("drop_loop", json!(0)),
        ("churns", json!(4)),
        ("check", json!(false)),
    ] {
        config[name] = value;
    }
    let text = bench::run(kind, &config.to_string(), &json!({}), &Control::silent())
        .unwrap_or_else(|error| panic!("{kind} {config}: {error}"));
    let mut result: Value = serde_json::from_str(&text).expect("results are JSON");
    match result["runs"].take() {
        Value::Array(runs) => runs,
        other => panic!("runs is {other}"),
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().unwrap_or_else(|| panic!("{value} is no count"))
}

fn rows(run: &Value) -> &[Value] {
    run["attribution"].as_array().expect("rows")
}

fn sum(row: &Value) -> u64 {
    row["ns"].as_object().expect("phases").values().map(number).sum()
}

/// Within a twentieth, or two microseconds.
fn near(a: u64, b: u64) -> bool {
    a.abs_diff(b) <= (b / 20).max(2_000)
}

#[test]
fn the_parts_of_each_thread_add_up_and_the_payer_s_whole_is_the_request() {
    for (kind, scenes) in
        [("zap", json!(["memslot-delete", "nx-toggle"])), ("drop", json!(["cr0-wp", "vm-teardown"]))]
    {
        for run in runs(kind, json!({"scenes": scenes})) {
            let what = format!("{} under {}", run["scene"], run["design"]);
            for row in rows(&run) {
                assert!(near(sum(row), number(&row["elapsed_ns"])), "{what}: {row}");
            }
            let roles: Vec<&str> = rows(&run).iter().filter_map(|row| row["role"].as_str()).collect();
            assert!(roles.contains(&"rcu"), "{what}: {roles:?}");
            let request = match (&run["update_ns"]["total"], &run["close_ns"]["total"]) {
                (Value::Null, Value::Null) => number(&run["block_drop_ns"]["max"]),
                (Value::Null, close) => number(close),
                (update, _) => number(update),
            };
            let whole = |row: &&Value| near(number(&row["elapsed_ns"]), request);
            let payers: Vec<&Value> = rows(&run).iter().filter(|row| row["pays"] == true).collect();
            assert!(payers.iter().any(whole), "{what}: {request} ns is nobody's: {payers:?}");
            let series = run["rcu"]["backlog_series"].as_array().expect("a series");
            assert!(series.len() <= 512, "{what}");
            assert_eq!(series.is_empty(), run["table_pages_freed"] == 0, "{what}");
            let peak = series.iter().map(|point| number(&point[1])).max();
            assert!(peak <= run["rcu"]["backlog_pages_peak"].as_u64(), "{what}");
            assert!(run["timeline"].is_null(), "{what}: not asked for");
        }
    }
}

#[test]
fn waiting_for_a_worker_is_queue_delay_and_the_worker_is_who_works() {
    let all = runs("zap", json!({"designs": ["async-worker", "sync"]}));
    let phase = |run: &Value, role: &str, phase: &str| {
        let of = rows(run).iter().filter(|row| row["role"] == role);
        of.map(|row| number(&row["ns"][phase])).sum::<u64>()
    };
    let (worker, sync) = (&all[0], &all[1]);
    assert!(phase(worker, "caller", "queue_delay") > 0);
    assert_eq!(phase(worker, "caller", "spte_work"), 0);
    assert!(phase(worker, "worker", "spte_work") > 0);
    assert_eq!(phase(sync, "caller", "queue_delay"), 0);
    assert!(phase(sync, "caller", "spte_work") > 0);
    for run in &all {
        assert!(phase(run, "rcu", "free") > 0 && phase(run, "rcu", "grace_period") > 0);
    }
}

/// A thread's track: ns by phase, and how many slices.
type Phases = HashMap<String, u64>;

#[test]
fn the_slices_of_a_trace_add_up_to_the_attribution_and_flows_end_where_pages_are_freed() {
    let file = Scratch::new("trace");
    let config =
        json!({"scenes": ["memslot-delete", "slot-churn"], "perfetto": file.path(), "timeline": true});
    let all = runs("zap", config);
    let trace = perfetto::read(&std::fs::read(&file.0).expect("the trace")).expect("protobuf");
    let mut names: HashMap<u64, String> = HashMap::new();
    let mut categories: HashMap<u64, String> = HashMap::new();
    let mut processes: Vec<(u64, String)> = Vec::new();
    let mut threads: HashMap<u64, (u64, String)> = HashMap::new();
    let mut open: HashMap<u64, Vec<(u64, String)>> = HashMap::new();
    let mut sums: HashMap<u64, Phases> = HashMap::new();
    let mut slices: HashMap<u64, u64> = HashMap::new();
    let mut flows: HashMap<u64, Vec<(u64, String)>> = HashMap::new();
    let mut ended: HashMap<u64, String> = HashMap::new();
    for packet in &trace.packet {
        if let Some(data) = &packet.interned_data {
            names.extend(data.event_names.iter().map(|n| (n.iid(), n.name().to_owned())));
            categories.extend(data.event_categories.iter().map(|n| (n.iid(), n.name().to_owned())));
        }
        match packet.data.as_ref().expect("no empty packets") {
            Data::TrackDescriptor(track) => {
                if let Some(process) = &track.process {
                    processes.push((track.uuid(), process.process_name().to_owned()));
                }
                if let Some(thread) = &track.thread {
                    threads.insert(track.uuid(), (track.parent_uuid(), thread.thread_name().to_owned()));
                }
            }
            Data::TrackEvent(event) => {
                let (track, at) = (event.track_uuid(), packet.timestamp());
                let name = event.name_iid.map(|iid| names[&iid].clone()).unwrap_or_default();
                for flow in &event.flow_ids {
                    flows.entry(*flow).or_default().push((at, name.clone()));
                }
                for flow in &event.terminating_flow_ids {
                    assert!(ended.insert(*flow, name.clone()).is_none(), "flow {flow} ends twice");
                    flows.entry(*flow).or_default().push((at, name.clone()));
                }
                match event.r#type() {
                    EventType::SliceBegin => open.entry(track).or_default().push((at, name)),
                    EventType::SliceEnd => {
                        let (begin, name) = open.get_mut(&track).and_then(Vec::pop).expect("a begin");
                        assert!(begin <= at);
                        if threads.contains_key(&track) {
                            *sums.entry(track).or_default().entry(name).or_default() += at - begin;
                            *slices.entry(track).or_default() += 1;
                        }
                    }
                    _ => {}
                }
            }
        }
    }
    assert!(open.values().all(Vec::is_empty), "every slice ends");
    assert_eq!(processes.len(), all.len(), "a process per run");
    for ((process, title), run) in processes.iter().zip(&all) {
        assert!(title.contains(run["design"].as_str().expect("a name")), "{title}");
        for row in rows(run) {
            let of = |(parent, name): &(u64, String)| parent == process && *name == row["thread"];
            let track = threads.iter().find(|(_, thread)| of(thread)).expect("a track per row").0;
            let empty = HashMap::new();
            let seen = sums.get(track).unwrap_or(&empty);
            // A slice is rounded to the ns at both ends; the RCU thread's row comes from counters of its own.
            let own = if row["role"] == "rcu" { number(&row["elapsed_ns"]) / 20 + 20_000 } else { 0 };
            let slack = slices.get(track).copied().unwrap_or(0) + 2 + own;
            for (phase, ns) in row["ns"].as_object().expect("phases") {
                let got = seen.get(phase).copied().unwrap_or(0);
                assert!(
                    got.abs_diff(number(ns)) <= slack,
                    "{title}, {}: {phase} is {got} ns in the trace, {ns} in the result, slack {slack}",
                    row["thread"]
                );
            }
        }
        let tracks = run["timeline"]["tracks"].as_array().expect("a timeline");
        assert_eq!(tracks.len(), rows(run).len(), "a track per row");
        for track in tracks {
            let drawn = track["slices"].as_array().expect("slices");
            assert!(drawn.len() <= 2_000);
            assert!(drawn.iter().all(|s| number(&s[0]) <= number(&s[1])));
        }
    }
    assert!(!flows.is_empty());
    assert_eq!(flows.len(), ended.len(), "every flow ends");
    for (flow, events) in &flows {
        assert!(events.len() >= 2, "flow {flow}: {events:?}");
    }
    let whole = flows.values().filter(|events| {
        let has = |what: &str| events.iter().any(|(_, name)| name.contains(what));
        has("invalidated") && has("zap root") && has("handed to RCU") && has("free")
    });
    assert!(whole.count() >= all.len() / 2, "most roots are followed to their end: {flows:?}");
}

#[test]
fn a_log_has_every_curve_of_the_result() {
    let file = Scratch::new("hlog");
    let all = runs("zap", json!({"designs": ["sync"], "hlog": file.path()}));
    let text = std::fs::read_to_string(&file.0).expect("the log");
    assert!(text.starts_with("#[Histogram log format version 1.3]\n"), "{text}");
    let tags: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("Tag=")?.split(',').next()).collect();
    let curves = all[0]["curves"].as_object().expect("curves");
    assert_eq!(tags.len(), curves.len());
    for field in curves.keys() {
        assert!(tags.iter().any(|tag| tag.ends_with(&format!("/{field}"))), "{field}: {tags:?}");
    }
}

#[test]
fn a_path_that_cannot_be_written_is_refused_before_anything_runs() {
    let config = json!({"memory_bytes": 32 << 20, "perfetto": "/nonexistent/trace"});
    match bench::run("zap", &config.to_string(), &json!({}), &Control::silent()) {
        Err(tdpmmu_lab::LabError::Usage(message)) => {
            assert!(message.contains("/nonexistent/trace"), "{message}")
        }
        other => panic!("{other:?}"),
    }
}
