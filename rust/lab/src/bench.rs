//! The entry: a kind of experiment and a JSON request in, a JSON result out.

use serde_json::{Value, json};
use tdpmmu_oracle::{Judge, Rules};
use tdpmmu_spte::FormatKind;

use crate::config::{BenchConfig, DesignPlan, Plan};
use crate::experiment;
use crate::host::HostInfo;
use crate::limits::{self, LimitOptions, Limits};
use crate::memory::Estimate;
use crate::result::{BenchResult, H, Run};
use crate::scene::{self, Kind};
use crate::{Control, LabError, micro, run};

/// Largest guest of the untimed repetition with oracles: they follow every entry.
const CHECKED_BYTES: u64 = 256 << 20;

/// Runs `bench KIND`; `build`: what is known about the build, copied into the result.
///
/// # Errors
/// [`LabError`], by the exit code it deserves.
pub fn run(kind: &str, config_json: &str, build: &Value, control: &Control) -> Result<String, LabError> {
    let config = BenchConfig::parse(config_json)?;
    let plan = config.plan()?;
    match kind {
        "zap" => designs(Kind::Zap, &plan, build, control),
        "drop" => designs(Kind::Drop, &plan, build, control),
        "populate" | "fault" | "walk" | "rcu" => micro::run(kind, &plan, build, control),
        other => Err(LabError::Usage(format!(
            "experiment={other:?}: expected one of zap, drop, populate, fault, walk, rcu"
        ))),
    }
}

/// The host's limits, or why there are none.
pub(crate) fn measure_limits(control: &Control) -> Result<Limits, LabError> {
    control.check()?;
    control.report("measuring the host's limits", 0.0);
    limits::measure(&LimitOptions::default()).map_err(|e| LabError::Internal(e.to_string()))
}

fn designs(kind: Kind, plan: &Plan, build: &Value, control: &Control) -> Result<String, LabError> {
    let estimate = Estimate::new(plan.config.memory_bytes, plan.level, plan.config.levels);
    estimate.check(plan.config.memory_bytes, &plan.config.page, plan.config.max_memory_bytes)?;
    let before = measure_limits(control)?;
    let host = HostInfo::collect();
    let mut runs = Vec::new();
    for design in &plan.designs {
        for rep in 0..plan.config.reps {
            control.check()?;
            control
                .report(&format!("{} under {}, repetition {}", kind.name(), design.info.name, rep + 1), 0.0);
            runs.push(one(kind, plan, design, rep, estimate.tables, host.cpus, control)?);
        }
    }
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
    if let Some(bad) = result.runs.iter().find(|r| r.violations.is_some_and(|n| n > 0)) {
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

fn scenario(kind: Kind, plan: &Plan, design: &DesignPlan, tables: u64, step_ns: bool) -> crate::Scenario {
    match kind {
        Kind::Zap => scene::zap_scenario(plan, design, tables, step_ns),
        Kind::Drop => scene::drop_scenario(plan, design, tables, step_ns),
    }
}

fn one(
    kind: Kind,
    plan: &Plan,
    design: &DesignPlan,
    rep: u32,
    tables: u64,
    cpus: usize,
    control: &Control,
) -> Result<Run, LabError> {
    let outcome = run::run(&scenario(kind, plan, design, tables, false), tables, control, None)?;
    let mut row = experiment::to_run(kind, plan, design, rep, &outcome, cpus)?;
    drop(outcome);
    // step_ns comes from a repetition of its own: its clock reads would disturb the first.
    let timed = run::run(&scenario(kind, plan, design, tables, true), tables, control, None)?;
    let (step_ns, dropped, longest) = experiment::step_ns(kind, &timed);
    (row.step_ns, row.step_ns_dropped) = (step_ns, dropped);
    row.step_ns_dropped_cpu_max = (dropped > 0).then_some(longest);
    drop(timed);
    if kind == Kind::Drop && plan.config.drop_loop > 0 {
        let scenario = scene::drop_loop_scenario(plan, design);
        // All of the pool is touched first: the loop goes through all of it.
        let looped = run::run(&scenario, u64::from(scenario.vm.max_tables), control, None)?;
        row.drop_loop = Some(experiment::drop_loop(&looped, plan.config.drop_loop));
    }
    if plan.config.check {
        checked(kind, plan, design, control, &mut row)?;
    }
    Ok(row)
}

/// An untimed repetition on a smaller guest, with every oracle listening.
fn checked(
    kind: Kind,
    plan: &Plan,
    design: &DesignPlan,
    control: &Control,
    row: &mut Run,
) -> Result<(), LabError> {
    let mut small = plan.clone();
    let unit = tdpmmu_spte::geometry::page_bytes(plan.level);
    small.config.memory_bytes = small.config.memory_bytes.min(CHECKED_BYTES.max(4 * unit));
    small.working_set_pages = small.working_set_pages.min(small.config.memory_bytes / unit);
    let tables = Estimate::new(small.config.memory_bytes, small.level, small.config.levels).tables;
    let format = plan.profile.format(FormatKind::Npt);
    let judge = Judge::new(Rules::of(&plan.profile, format, design.info.name));
    let outcome =
        run::run(&scenario(kind, &small, design, tables, false), tables, control, Some(judge.clone()))?;
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
    info["experiments"] = json!(["zap", "drop", "populate", "fault", "walk", "rcu"]);
    info.to_string()
}
