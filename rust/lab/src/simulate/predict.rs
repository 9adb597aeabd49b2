//! One case in virtual time: the scenario of `bench zap`, its runner, its result.
//!
//! Nothing here knows what a zap costs: the scenario, the runner and the row are those of the real platform ([`crate::run`], [`crate::experiment`]); only the ground is another.

use serde::Serialize;
use tdpmmu_platform::Timed;
use tdpmmu_platform::time::{self, Machine};
use tdpmmu_table::UniformStats;

use crate::config::{Case, Plan};
use crate::result::Run;
use crate::{Control, LabError, experiment, run};

/// How tables were held.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct ByCount {
    /// Leaf tables held by count at most, at a time.
    pub held_peak: u64,
    /// Made real because one of their words was to change.
    pub expanded: u64,
    /// Of these, given back to this host when all of their words had become the same.
    pub given_back: u64,
    /// Whole tables that a pass changed in one event of 512 times the price. The words of every other table went one by one.
    pub whole_tables: u64,
}

impl From<UniformStats> for ByCount {
    fn from(stats: UniformStats) -> Self {
        ByCount {
            held_peak: stats.held_peak,
            expanded: stats.expanded,
            given_back: stats.settled,
            whole_tables: stats.whole,
        }
    }
}

/// A row of the zap schema, and what is peculiar to a simulation.
#[derive(Clone, Debug, Serialize)]
pub struct Predicted {
    /// The row.
    #[serde(flatten)]
    pub run: Run,
    /// CPUs of the simulated machine.
    pub cpus: usize,
    /// Virtual time from the start of the first thread to the end of the VM.
    pub virtual_ns: u64,
    /// Operations paid for.
    pub operations: u64,
    /// Changes from one task to another.
    pub switches: u64,
    /// How the tables were held.
    pub by_count: ByCount,
}

/// Runs `case` on `machine`.
///
/// # Errors
/// As [`run::run`]; a deadlock or panic in virtual time is [`LabError::Internal`].
pub fn predict(
    plan: &Plan,
    case: &Case,
    rep: u32,
    machine: &Machine,
    control: &Control,
) -> Result<Predicted, LabError> {
    let mut scenario = case.scene.scenario(plan, case, false);
    // Timelines of hundreds of threads are not kept.
    (scenario.vm.record, scenario.vm.log) = (false, false);
    let listening = control.clone();
    let (outcome, ran) = time::run(machine, move || run::run_on::<Timed>(&scenario, &listening, None))
        .map_err(|error| LabError::Internal(error.to_string()))?;
    let outcome = outcome?;
    let by_count = outcome.by_count.map(ByCount::from).unwrap_or_default();
    let run = experiment::to_run(plan, case, rep, &outcome, machine.cpus)?;
    Ok(Predicted {
        run,
        cpus: machine.cpus,
        virtual_ns: ran.ns,
        operations: ran.operations,
        switches: ran.switches,
        by_count,
    })
}
