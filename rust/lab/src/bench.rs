//! The entry: a kind of experiment and a JSON request in, a JSON result out.

use std::time::SystemTime;

use serde_json::{Value, json};
use tdpmmu_oracle::{Judge, Rules};
use tdpmmu_spte::FormatKind;
use tdpmmu_spte::geometry::page_bytes;

use crate::config::{BenchConfig, Case, Plan};
use crate::experiment;
use crate::export::Export;
use crate::fit::Fit;
use crate::host::HostInfo;
use crate::limits::{self, LimitOptions, Limits};
use crate::result::{BenchResult, H, Run};
use crate::scene::{self, Kind};
use crate::{Control, LabError, micro, run, units, versus};

/// Largest guest of the untimed repetition with oracles: they follow every entry.
const CHECKED_BYTES: u64 = 256 << 20;
/// Sizes of a slope.
pub(crate) const SIZES: u64 = 8;
/// The guest that everybody asks about.
const FLAGSHIP_BYTES: u64 = 64 << 40;

/// Runs `bench KIND`; `build`: what is known about the build, copied into the result.
///
/// # Errors
/// [`LabError`], by the exit code it deserves.
pub fn run(kind: &str, config_json: &str, build: &Value, control: &Control) -> Result<String, LabError> {
    if kind == "versus" {
        return versus::command(config_json, build, control);
    }
    let config = BenchConfig::parse(config_json)?;
    let scenes = match kind {
        "zap" => Some(Kind::Zap),
        "drop" => Some(Kind::Drop),
        _ => None,
    };
    match (scenes, kind) {
        (Some(of), _) => cases(of, &config.plan(scenes)?, build, control),
        (None, "populate" | "fault" | "walk" | "rcu" | "dirty") => {
            micro::run(kind, &config.plan(None)?, build, control)
        }
        (None, other) => Err(LabError::Usage(format!(
            "experiment={other:?}: expected one of zap, drop, populate, fault, walk, rcu, dirty, versus"
        ))),
    }
}

/// The host's limits, or why there are none.
pub(crate) fn measure_limits(control: &Control) -> Result<Limits, LabError> {
    control.check()?;
    control.report("measuring the host's limits", 0.0);
    limits::measure(&LimitOptions::default()).map_err(|e| LabError::Internal(e.to_string()))
}

fn cases(kind: Kind, plan: &Plan, build: &Value, control: &Control) -> Result<String, LabError> {
    for case in &plan.cases {
        let settled = case.scene.settled(plan).config;
        let estimate = case.estimate(plan);
        estimate.check(settled.memory_bytes, &settled.page, settled.max_memory_bytes)?;
    }
    let before = measure_limits(control)?;
    let host = HostInfo::collect();
    let runs = rows(kind, plan, host.cpus, control)?;
    let after = measure_limits(control)?;
    let result = BenchResult {
        schema: "tdpmmu.bench.zap/1",
        experiment: kind.name(),
        host,
        build: build.clone(),
        config: serde_json::to_value(&plan.config)?,
        seed: plan.config.seed,
        limits: before.bracket(&after),
        runs,
    };
    let text = serde_json::to_string(&result)?;
    // What a flawed design violates is its result.
    let bad = |r: &&Run| !r.flawed && r.violations.is_some_and(|n| n > 0);
    if let Some(bad) = result.runs.iter().find(bad) {
        let message = format!(
            "{}: {} violations, the first: {}",
            bad.design,
            bad.violation_list.len(),
            bad.violation_list[0]
        );
        return Err(LabError::Check { message, partial: text });
    }
    Ok(text)
}

/// The runs alone, without the host's limits around them, whatever they violate; `cpus` of this host.
///
/// # Errors
/// As [`run`].
pub fn rows(kind: Kind, plan: &Plan, cpus: usize, control: &Control) -> Result<Vec<Run>, LabError> {
    let mut export = Export::open(&plan.config)?;
    let mut runs: Vec<Run> = Vec::new();
    for case in &plan.cases {
        let first = runs.len();
        let whole = case.scene.settled(plan);
        for mut size in sizes(&whole, case) {
            // Of a slope, one size is checked.
            size.config.check &= size.config.memory_bytes == whole.config.memory_bytes;
            for rep in 0..plan.config.reps {
                control.check()?;
                control.report(&title(kind, &size, case, rep), 0.0);
                runs.push(one(&size, case, rep, cpus, control, &mut export)?);
            }
        }
        if case.scene.scales() {
            scale(&mut runs[first..], plan);
        }
    }
    experiment::publish(&mut runs);
    export.finish(&format!("tdpmmu bench {}, seed {}: times in ns", kind.name(), plan.config.seed))?;
    Ok(runs)
}

/// What progress is shown under.
fn title(kind: Kind, plan: &Plan, case: &Case, rep: u32) -> String {
    let mut text = format!("{} {}", kind.name(), case.scene.name);
    if case.scene.scales() {
        text += &format!(", {}", units::bytes(plan.config.memory_bytes));
    }
    let flawed = if case.info.flawed { " (flawed)" } else { "" };
    text += &format!(" under {}{flawed}, {}", case.info.name, case.passes);
    if plan.config.preempt.len() > 1 {
        text += &format!(", preempt {}", case.preempt_name());
    }
    format!("{text}, repetition {}", rep + 1)
}

/// The sizes at which a case is run: for a slope eight, in equal steps up to all of the memory. That is 2.4 times the work of four that double, and less than
/// half their interval far out: six degrees of freedom instead of two, and points where they tell a line from a bend.
fn sizes(plan: &Plan, case: &Case) -> Vec<Plan> {
    let (whole, steps) = (plan.config.memory_bytes, if case.scene.scales() { SIZES } else { 1 });
    (1..=steps).map(|step| resized(plan, whole / steps * step)).collect()
}

/// The same request for a smaller guest.
fn resized(plan: &Plan, memory_bytes: u64) -> Plan {
    let mut small = plan.clone();
    small.config.memory_bytes = memory_bytes;
    small.working_set_pages = plan.working_set_pages.min(memory_bytes / page_bytes(plan.level));
    small
}

/// Gives the largest size's runs the line through all of `runs`.
fn scale(runs: &mut [Run], plan: &Plan) {
    let drop = runs.iter().all(|r| r.block_drop_ns.is_some());
    let of = if drop { "block_drop_ns.max" } else { "update_ns.total" };
    let value = |r: &Run| match &r.block_drop_ns {
        Some(h) => h.0.max,
        None => r.update_ns.as_ref().map(|u| u.total),
    };
    let points: Vec<_> = runs.iter().filter_map(|r| Some((r.sptes, value(r)?))).collect();
    let at = [(FLAGSHIP_BYTES, FLAGSHIP_BYTES / page_bytes(plan.level))];
    let Some(fit) = Fit::new(of, points, &at) else { return };
    for run in runs.iter_mut().filter(|r| r.memory_bytes == plan.config.memory_bytes) {
        run.fit = Some(fit.clone());
    }
}

fn one(
    plan: &Plan,
    case: &Case,
    rep: u32,
    cpus: usize,
    control: &Control,
    export: &mut Export,
) -> Result<Run, LabError> {
    let scene = case.scene;
    let began = SystemTime::now();
    let outcome = run::run(&scene.scenario(plan, case, false), control, None)?;
    let mut row = experiment::to_run(plan, case, rep, &outcome, cpus)?;
    export.add(&row, &outcome, began)?;
    drop(outcome);
    if scene.is_default() {
        // step_ns comes from a repetition of its own: its clock reads would disturb the first.
        let timed = run::run(&scene.scenario(plan, case, true), control, None)?;
        let (step_ns, dropped, longest) = experiment::step_ns(&timed);
        (row.step_ns, row.step_ns_dropped) = (step_ns, dropped);
        row.step_ns_dropped_cpu_max = (dropped > 0).then_some(longest);
        drop(timed);
        if scene.kind == Kind::Drop && plan.config.drop_loop > 0 {
            let looped = run::run(&scene::drop_loop_scenario(plan, case), control, None)?;
            row.drop_loop = Some(experiment::drop_loop(&looped, plan.config.drop_loop));
        }
    }
    if plan.config.check {
        checked(plan, case, control, &mut row)?;
    }
    Ok(row)
}

/// An untimed repetition on a smaller guest, with every oracle listening.
fn checked(plan: &Plan, case: &Case, control: &Control, row: &mut Run) -> Result<(), LabError> {
    let most = if case.scene.is_default() { CHECKED_BYTES } else { CHECKED_BYTES / 4 };
    // The smallest guest at which the scene makes sense.
    let whole = plan.config.memory_bytes;
    let first = whole.min(most.max(4 * page_bytes(plan.level)));
    let small = std::iter::successors(Some(first), |size| (*size < whole).then(|| (size * 2).min(whole)))
        .map(|size| resized(plan, size))
        .find(|small| (case.scene.fits)(small).is_ok())
        .unwrap_or_else(|| plan.clone());
    let format = plan.profile.format(FormatKind::Npt);
    let judge = Judge::new(Rules::of(&plan.profile, format, case.info.name));
    let outcome = run::run(&case.scene.scenario(&small, case, false), control, Some(judge.clone()))?;
    let mut list: Vec<String> = judge.violations().iter().map(ToString::to_string).collect();
    if judge.events() == 0 {
        list.push("the oracles heard nothing".into());
    }
    list.extend(outcome.close.violations);
    row.violations = Some(list.len() as u64);
    row.violation_list = list;
    row.violations_checked_memory_bytes = Some(small.config.memory_bytes);
    Ok(())
}

/// Percentile summary or an empty one.
pub(crate) fn summary(histogram: Option<&tdpmmu_platform::Histogram>) -> H {
    histogram.map(H::from).unwrap_or_default()
}

/// `tdpmmu info`.
pub fn info(build: &Value) -> String {
    let mut info = crate::host::info(build);
    info["experiments"] = json!(["zap", "drop", "populate", "fault", "walk", "rcu", "dirty", "versus"]);
    info["scenes"] = scene::SCENES
        .iter()
        .map(|s| json!({"name": s.name, "experiment": s.kind.name(), "summary": s.summary, "look_at": s.look_at}))
        .collect();
    info.to_string()
}
