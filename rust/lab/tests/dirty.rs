//! `bench dirty`: what each phase found and left, by counts. Its times are for people.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde_json::{Value, json};
use tdpmmu_lab::{Control, LabError, bench};

const PAGES: u64 = 4096;

fn ask(config: &Value) -> Result<Value, LabError> {
    let control = Control::new(Arc::new(AtomicBool::new(false)), |_, _| {});
    let text = bench::run("dirty", &config.to_string(), &json!({}), &control)?;
    Ok(serde_json::from_str(&text).expect("JSON"))
}

/// The rows of a 16 MiB guest.
fn rows(mut config: Value) -> Vec<Value> {
    config["memory_bytes"] = json!(PAGES * 4096);
    let result = ask(&config).expect("a result");
    assert_eq!((&result["schema"], &result["experiment"]), (&json!("tdpmmu.micro/1"), &json!("dirty")));
    result["rows"].as_array().expect("rows").clone()
}

fn phase<'r>(rows: &'r [Value], phase: &str) -> &'r Value {
    let found: Vec<_> = rows.iter().filter(|row| row["phase"] == phase).collect();
    assert_eq!(found.len(), 1, "{phase}: {found:?}");
    found[0]
}

/// Leaves of 4K and 2M after a phase.
fn mapped(rows: &[Value], name: &str) -> (u64, u64) {
    let row = phase(rows, name);
    (row["mapped_4k"].as_u64().expect("a count"), row["mapped_2m"].as_u64().expect("a count"))
}

#[test]
fn an_eager_split_leaves_no_huge_page_for_the_writes() {
    let rows = rows(json!({"page": "2M", "eager": "on", "protocols": "get", "densities": [1]}));
    for after in ["enable", "write", "harvest", "rewrite"] {
        assert_eq!(mapped(&rows, after), (PAGES, 0), "{after}");
    }
    let write = phase(&rows, "write");
    assert_eq!((&write["fast_faults"], &write["slow_faults"]), (&json!(PAGES), &json!(0)), "{write}");
    assert_eq!(phase(&rows, "harvest")["count"], PAGES, "each written page once");
}

#[test]
fn without_it_the_first_write_of_each_huge_page_splits() {
    let rows = rows(json!({"page": "2M", "eager": "off", "protocols": "get", "densities": [8]}));
    assert_eq!(mapped(&rows, "enable"), (0, PAGES / 512));
    assert_eq!(mapped(&rows, "write"), (PAGES, 0));
    let write = phase(&rows, "write");
    assert_eq!(write["count"], PAGES / 8);
    assert_eq!(write["slow_faults"], PAGES / 512, "one a huge page; its children are there for the others");
    assert_eq!(write["fast_faults"], PAGES / 8 - PAGES / 512);
    let again = phase(&rows, "rewrite");
    assert_eq!((&again["fast_faults"], &again["slow_faults"]), (&json!(PAGES / 8), &json!(0)));
}
