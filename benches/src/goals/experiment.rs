//! Figures of whole experiments, as the laboratory runs them: what a user of `tdpmmu bench` sees.
//!
//! Walks take the minimum over rounds. Drops and steps run beside vCPU threads and are reported with their tails: on a
//! machine with other work a maximum is the scheduler's. A drop is set against the same vCPU dropping an empty root in
//! the same run. `inline` is shown for contrast: the dropping vCPU does the whole teardown.

use serde_json::{Value, json};
use tdpmmu_lab::{Control, bench};

use super::{Basis, Figure, Goal};
use crate::harness::BenchError;

/// Guest of the walks: 512 leaf tables.
const WALKED_BYTES: u64 = 1 << 30;
/// Smallest guest of the experiments with vCPUs: fewer steps have no 99th percentile.
const LEAST_BYTES: u64 = 1 << 30;
/// Largest guest of the experiments with vCPUs.
const MOST_BYTES: u64 = 16 << 30;

/// 512 entries written between two checks, each after it was read; `step_units` counts both.
const TABLE_UNITS: f64 = 1024.0;

fn experiment(kind: &'static str, config: &Value) -> Result<Value, BenchError> {
    let lab = |source| BenchError::Lab { experiment: kind, source };
    let text = bench::run(kind, &config.to_string(), &Value::Null, &Control::silent()).map_err(lab)?;
    serde_json::from_str(&text).map_err(|error| lab(error.into()))
}

/// A number of a result, by its JSON pointer.
fn number(value: &Value, pointer: &str) -> Result<f64, BenchError> {
    let found = value.pointer(pointer).and_then(Value::as_f64);
    found.ok_or_else(|| BenchError::engine(format!("the result has no number at {pointer}")))
}

fn list<'v>(value: &'v Value, name: &str) -> &'v [Value] {
    value.get(name).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn text<'v>(value: &'v Value, name: &str) -> &'v str {
    value.get(name).and_then(Value::as_str).unwrap_or_default()
}

/// Lockless look-ups whose next gfn depends on the last answer.
pub(super) fn walks() -> Result<Vec<Figure>, BenchError> {
    let result = experiment("walk", &json!({ "memory_bytes": WALKED_BYTES }))?;
    let mut out = Vec::new();
    for (tables, goal) in [(8, 15.0), (512, 30.0)] {
        let name = format!("lockless walk, dependent, over {tables} leaf tables");
        let row = list(&result, "rows").iter().find(|row| text(row, "name") == name);
        let row = row.ok_or_else(|| BenchError::engine(format!("no row {name:?} in the walks")))?;
        let count = number(row, "/count")? as u64;
        out.push(Figure::ns(name, number(row, "/ns")?, count).goal(Goal::AtMost(goal)));
    }
    Ok(out)
}

/// How long a vCPU is blocked when it drops its root, a large one and small ones, under three designs.
pub(super) fn drops(memory_bytes: u64) -> Result<Vec<Figure>, BenchError> {
    let result = experiment(
        "drop",
        &json!({
            "memory_bytes": memory_bytes.clamp(LEAST_BYTES, MOST_BYTES),
            "designs": ["async-worker", "sync", "inline"],
            "check": false,
        }),
    )?;
    let mut out = Vec::new();
    for run in list(&result, "runs") {
        let design = text(run, "design");
        let goal = if design == "inline" { Goal::None } else { Goal::AtMost(2.0) };
        for (what, at, field) in
            [("one large root, block max", "", "max"), ("small roots, block p99.9", "/drop_loop", "p999")]
        {
            let block = number(run, &format!("{at}/block_drop_ns/{field}"))?;
            let baseline = number(run, &format!("{at}/block_baseline_ns/{field}"))?;
            let count = number(run, &format!("{at}/block_drop_ns/count"))? as u64;
            let basis = Basis::Own("block_baseline_ns", baseline);
            out.push(Figure::ns(format!("drop, {design}: {what}"), block, count).of(basis).goal(goal));
        }
    }
    Ok(out)
}

/// Work between two reschedule checks under two lists of passes, and what the finer one costs.
pub(super) fn steps(memory_bytes: u64) -> Result<Vec<Figure>, BenchError> {
    let mut out = Vec::new();
    let mut found = Vec::new();
    for passes in ["4K,2M,1G,root", "1G,root"] {
        let fine = passes.starts_with("4K");
        let result = experiment(
            "zap",
            &json!({
                "memory_bytes": memory_bytes.clamp(LEAST_BYTES, MOST_BYTES),
                "designs": ["sync"],
                "passes": passes,
                "check": false,
            }),
        )?;
        let run = list(&result, "runs").first().ok_or_else(|| BenchError::engine("a zap without a run"))?;
        let count = number(run, "/step_units/count")? as u64;
        let timed = number(run, "/step_ns/count")? as u64;
        let (units, longest) = (number(run, "/step_units/max")?, number(run, "/step_ns/max")?);
        let goal = |most| if fine { Goal::AtMost(most) } else { Goal::None };
        let name = |what: &str| format!("{passes}: {what}");
        out.push(
            Figure::ns(name("step_units max, reads + writes"), units, count).unit("").goal(goal(TABLE_UNITS)),
        );
        // A percentile is null where there are too few samples for it, as with the coarse passes; a goal needs it.
        match number(run, "/step_ns/p99") {
            Ok(ns) => out.push(Figure::ns(name("step_ns p99"), ns, timed).goal(goal(5000.0))),
            Err(error) if fine => return Err(error),
            Err(_) => {}
        }
        out.push(Figure::ns(name("step_ns max"), longest, timed));
        found.push((units, longest, number(run, "/update_ns/total")?));
    }
    if let [(units, ns, total), (coarse_units, coarse_ns, coarse_total)] = found[..] {
        let factor =
            |name: &str, value| Figure::ns(format!("1G,root over 4K,2M,1G,root: {name}"), value, 1).unit("x");
        out.push(factor("step_units max", coarse_units / units.max(1.0)));
        out.push(factor("step_ns max", coarse_ns / ns.max(1.0)));
        let price = Figure::ns("price of the finer passes: memslot update, total", total, 1);
        out.push(price.of(Basis::Own("the same with 1G,root", coarse_total)));
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_number_is_named() {
        let error = number(&json!({"a": {"b": 2.5}}), "/a/c").unwrap_err();
        assert!(error.to_string().contains("/a/c"), "{error}");
        assert_eq!(number(&json!({"a": {"b": 2.5}}), "/a/b").unwrap(), 2.5);
    }

    #[test]
    fn an_experiment_that_is_refused_says_why_and_deserves_its_exit_code() {
        let error = experiment("zap", &json!({ "memory_bytes": 1 })).unwrap_err();
        assert!(error.to_string().starts_with("zap: memory=1"), "{error}");
        assert_eq!(error.exit_code(), 2);
    }
}
