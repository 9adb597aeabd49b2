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

#[test]
fn every_protocol_finds_each_written_page_of_each_size() {
    for (page, level) in [("4K", "mapped_4k"), ("2M", "mapped_2m")] {
        for profile in ["5.15", "6.1", "7.2"] {
            // What was found is checked by the run itself, page by page.
            let rows = rows(
                json!({"page": page, "kernel_profile": profile, "designs": "in-place", "densities": [1, 8, 512]}),
            );
            let protocols: std::collections::BTreeSet<_> =
                rows.iter().map(|row| row["protocol"].as_str().expect("a name")).collect();
            assert_eq!(protocols.len(), 6, "{protocols:?}");
            for row in rows.iter().filter(|row| row["phase"] == "refault") {
                let leaves = if page == "4K" { PAGES } else { PAGES / 512 };
                assert_eq!(
                    row[level], leaves,
                    "after the last phase the guest is mapped as before: {profile}, {row}"
                );
            }
        }
    }
}

#[test]
fn initially_all_set_protects_nothing_before_the_first_clear() {
    let rows = rows(json!({"page": "2M", "eager": "on", "protocols": "init-set", "densities": [8]}));
    assert_eq!(mapped(&rows, "enable"), (0, PAGES / 512), "nothing is split yet");
    assert_eq!(mapped(&rows, "first-clear"), (PAGES, 0));
    assert_eq!(phase(&rows, "first-clear")["count"], PAGES, "every page counts as dirty");
    assert_eq!(phase(&rows, "clear")["count"], PAGES / 8);
}

#[test]
fn hardware_d_bits_cost_no_fault_where_nothing_is_huge() {
    let rows = rows(json!({"protocols": "d-bits", "densities": [1]}));
    for name in ["write", "rewrite"] {
        let row = phase(&rows, name);
        assert_eq!((&row["translated"], &row["fast_faults"]), (&json!(PAGES), &json!(0)), "{row}");
    }
}

#[test]
fn a_full_ring_is_harvested_on_the_way() {
    let mut config = json!({"protocols": "ring", "densities": [1]});
    config["memory_bytes"] = json!(512u64 << 20);
    let result = ask(&config).expect("a result");
    let rows = result["rows"].as_array().expect("rows").clone();
    let pages = 131_072u64;
    let collected = phase(&rows, "collect")["count"].as_u64().expect("a count");
    // A ring of 65,536 less 64 kept back; the page that met the full ring is told again.
    assert_eq!(collected, pages + pages / 65_472, "two rings full, and what was left");
    assert_eq!(phase(&rows, "reset")["count"], collected);
    assert_eq!(phase(&rows, "harvest")["count"], pages, "each page once");
}

#[test]
fn the_end_of_logging_is_as_each_kernel_has_it() {
    let of = |profile: &str| {
        rows(
            json!({"page": "2M", "eager": "off", "protocols": "get", "densities": [1], "kernel_profile": profile}),
        )
    };
    let zapped = of("6.12");
    assert_eq!(mapped(&zapped, "disable"), (0, 0), "tables are zapped");
    assert_eq!(phase(&zapped, "refault")["slow_faults"], PAGES / 512, "and mapped huge by a fault each");
    let recovered = of("7.2");
    assert_eq!(mapped(&recovered, "disable"), (0, PAGES / 512), "huge again at once");
    assert_eq!(
        phase(&recovered, "refault")["fast_faults"],
        PAGES / 512,
        "protected as their first pages were"
    );
    for rows in [zapped, recovered] {
        assert_eq!(phase(&rows, "disable")["count"], PAGES, "entries of the tables that went");
    }
}

#[test]
fn the_end_of_logging_swaps_out_empty_entries_too() {
    let sparse = json!({"page": "2M", "eager": "off", "protocols": "get", "densities": [512], "kernel_profile": "6.1"});
    let rows = rows(sparse);
    assert_eq!(mapped(&rows, "rewrite"), (PAGES / 512, 0), "6.1 zaps the huge leaf, and maps one page of it");
    assert_eq!(phase(&rows, "disable")["count"], PAGES, "but its table has 512 entries");
}

#[test]
fn a_kernel_that_zaps_leaves_leaves_their_tables() {
    // 5.10 has no statistics either: leaves are counted in the tree.
    let old = json!({"page": "2M", "protocols": "get", "densities": [8], "kernel_profile": "5.10", "designs": "in-place"});
    let rows = rows(old);
    assert_eq!(mapped(&rows, "rewrite"), (PAGES / 8, 0));
    assert_eq!(phase(&rows, "disable")["count"], PAGES / 8, "leaves that went");
    assert_eq!(mapped(&rows, "disable"), (0, 0));
    assert_eq!(mapped(&rows, "refault"), (0, PAGES / 512), "huge again, over the tables that were left");
}

#[test]
fn a_ratio_to_a_limit_needs_enough_operations() {
    let rows = rows(json!({"page": "2M", "eager": "off", "protocols": "get", "densities": [1]}));
    assert!(phase(&rows, "enable")["ratio"].is_null(), "eight leaves: fixed costs");
    let write = phase(&rows, "write");
    assert_eq!(write["of"], "cmpxchg_ns + write_ns", "the first writes fill the tables");
    assert_eq!(phase(&rows, "rewrite")["of"], "cmpxchg_ns");
    assert!(write["ratio"].as_f64() > Some(0.0), "{write}");
    assert_eq!(phase(&rows, "total")["total_ns"].as_u64(), {
        let ns = |name| phase(&rows, name)["total_ns"].as_u64();
        Some(ns("enable").expect("ns") + ns("write").expect("ns"))
    });
}
