//! How far off the model is: what this machine measured, beside what the model says about this machine.
//!
//! Guests of a few sizes, one vCPU (three busy threads on two CPUs would measure the host's scheduler) and two, each zapped on the real platform and in virtual time, with the
//! same scenario. A factor is predicted over measured: 1 is right, 2 is twice too long. The measured value is the median of the repetitions; their spread stands beside it, since no model can be nearer to a
//! measurement than the measurement is to itself.

use serde::Serialize;
use tdpmmu_platform::time::Machine;

use super::{Calibration, SimulateConfig, predict};
use crate::result::Run;
use crate::{Control, LabError, experiment, run};

/// A measured field.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measured {
    /// Smallest of the repetitions.
    pub min: f64,
    /// Their median.
    pub median: f64,
    /// Largest.
    pub max: f64,
}

/// One field of one guest under one setting.
#[derive(Clone, Debug, Serialize)]
pub struct Compared {
    /// The field of the result.
    pub field: &'static str,
    /// Guest.
    pub memory_bytes: u64,
    /// Its vCPUs.
    pub vcpus: u32,
    /// Design.
    pub design: String,
    /// Passes.
    pub passes: String,
    /// On this machine.
    pub measured: Measured,
    /// In virtual time.
    pub predicted: f64,
    /// Predicted over the median measured; null where that is 0.
    pub factor: Option<f64>,
}

/// All of them.
#[derive(Clone, Debug, Serialize)]
pub struct ModelError {
    /// CPUs of this machine, and of the simulated one.
    pub cpus: usize,
    /// Repetitions behind each measured value.
    pub reps: u32,
    /// Guests that this machine's memory does not hold.
    pub left_out: Vec<u64>,
    /// Field by field.
    pub rows: Vec<Compared>,
    /// For each field the geometric mean of its factors, and the worst of them.
    pub fields: Vec<(&'static str, f64, f64)>,
}

type Field = (&'static str, fn(&Run) -> Option<f64>);

fn update(run: &Run, of: fn(&crate::result::UpdateNs) -> u64) -> Option<f64> {
    run.update_ns.as_ref().map(|update| of(update) as f64)
}

/// What is compared.
const FIELDS: &[Field] = &[
    ("update_ns.total", |run| update(run, |u| u.total)),
    ("update_ns.zap", |run| update(run, |u| u.zap)),
    ("update_ns.exclusive_hold", |run| update(run, |u| u.exclusive_hold)),
    ("block_update_ns.max", |run| run.block_update_ns.0.max.map(|ns| ns as f64)),
    ("visible_last_ns", |run| run.visible_last_ns.map(|ns| ns as f64)),
    ("teardown.ns_per_spte", |run| run.teardown.as_ref().map(|t| t.ns_per_spte)),
    ("teardown.cpu_ns.caller", |run| run.teardown.as_ref().map(|t| t.cpu_ns.caller as f64)),
    ("teardown.cpu_ns.rcu", |run| run.teardown.as_ref().map(|t| t.cpu_ns.rcu as f64)),
    ("teardown.last_table_free_ns", |run| run.teardown.as_ref().map(|t| t.last_table_free_ns as f64)),
    ("access_ns.p50", |run| run.access_ns.0.p50.map(|ns| ns as f64)),
    ("access_ns.p99", |run| run.access_ns.0.p99.map(|ns| ns as f64)),
    ("refault.wall_ns", |run| Some(run.refault.wall_ns as f64)),
];

/// Measures and simulates guests of `sizes`.
///
/// # Errors
/// [`LabError`]. A guest that does not fit into this machine's memory is left out, and named.
pub fn model_error(
    config: &SimulateConfig,
    sizes: &[u64],
    calibration: &Calibration,
    control: &Control,
) -> Result<ModelError, LabError> {
    let cpus = std::thread::available_parallelism().map_or(1, |n| n.get());
    let machine = Machine { cpus, costs: calibration.costs.clone() };
    let (mut rows, mut left_out) = (Vec::new(), Vec::new());
    for vcpus in [1, 2] {
        for &memory_bytes in sizes {
            let small = SimulateConfig { vcpus, memory_bytes, cpus: Some(cpus), ..config.clone() };
            let plan = small.plan()?;
            for case in &plan.cases {
                control.check()?;
                let what = format!("{} of {}", case.info.name, crate::units::bytes(memory_bytes));
                if (case.scene.estimate)(&plan).check(memory_bytes, &plan.config.page, None).is_err() {
                    if !left_out.contains(&memory_bytes) {
                        left_out.push(memory_bytes);
                    }
                    continue;
                }
                control.report(&format!("measuring {what}, {vcpus} vCPUs"), 0.0);
                let mut measured = Vec::new();
                for rep in 0..config.error_reps {
                    let outcome = run::run(&case.scene.scenario(&plan, case, false), control, None)?;
                    measured.push(experiment::to_run(&plan, case, rep, &outcome, cpus)?);
                }
                control.report(&format!("simulating {what}, {vcpus} vCPUs"), 0.5);
                let predicted = predict(&plan, case, 0, &machine, control)?.run;
                for (field, of) in FIELDS {
                    let mut all: Vec<f64> = measured.iter().filter_map(of).collect();
                    all.sort_unstable_by(f64::total_cmp);
                    let (Some(&min), Some(&max), Some(predicted)) = (all.first(), all.last(), of(&predicted))
                    else {
                        continue;
                    };
                    let median = all[all.len() / 2];
                    rows.push(Compared {
                        field,
                        memory_bytes,
                        vcpus,
                        design: case.info.name.into(),
                        passes: case.passes.to_string(),
                        measured: Measured { min, median, max },
                        predicted,
                        factor: (median > 0.0).then(|| predicted / median),
                    });
                }
            }
        }
    }
    let fields = FIELDS.iter().filter_map(|&(field, _)| {
        let factors = rows.iter().filter(|row| row.field == field).filter_map(|row| row.factor);
        let logs: Vec<f64> = factors.filter(|factor| *factor > 0.0).map(f64::ln).collect();
        let mean = (logs.iter().sum::<f64>() / logs.len().max(1) as f64).exp();
        let worst = logs.iter().copied().max_by(|a, b| a.abs().total_cmp(&b.abs()))?;
        Some((field, mean, worst.exp()))
    });
    let fields = fields.collect();
    Ok(ModelError { cpus, reps: config.error_reps, left_out, rows, fields })
}
