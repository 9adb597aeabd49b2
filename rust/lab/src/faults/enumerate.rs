//! Allocation failure at every site in turn.
//!
//! **Guarantee.** For a program that allocates N times, N runs fail the k-th allocation alone and N fail the k-th and all after it. In each: the failed act says that there is no page, and no other error; the judges find
//! nothing, nothing leaks; where only one request failed, the same act succeeds when it is made again.
//!
//! **Mechanism.** Each act stands twice in the program, so that what failed is tried again at once in the same VM. All runs follow the default schedule (no preemption but where a task waits), so that the k-th
//! request is the same one in each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tdpmmu_platform::sim::{Schedule, SimConfig, Strategy};
use tdpmmu_platform::{Fault, Faults, Site};
use tdpmmu_vm::VmError;

use super::{Armed, FaultPlan, Injection, Nth};
use crate::program::{Done, JudgeSet, Outcome, Program, run_once};
use crate::{Control, LabError};

/// What an enumeration came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enumeration {
    /// Requests for table pages of the program without faults.
    pub allocations: u64,
    /// The same by the place where they are made.
    pub by_site: BTreeMap<String, u64>,
    /// Runs with a failed allocation.
    pub runs: u64,
    /// Acts that came to a clean error.
    pub refused: u64,
    /// Runs in which the engine did without the page (a huge page that stays whole, a bulk run that takes less).
    pub done_without: u64,
    /// Acts that failed, were made again and succeeded.
    pub retried: u64,
    /// What must not be; empty is the only good answer.
    pub findings: Vec<String>,
}

/// Counts the questions by site, beside what the plan does.
struct Counting {
    armed: Arc<Armed>,
    sites: Mutex<BTreeMap<String, u64>>,
}

impl Faults for Counting {
    fn inject(&self, fault: Fault, site: Site, nth: u64, dice: &mut dyn FnMut(u32) -> u32) -> u32 {
        if fault == Fault::Alloc {
            let mut sites = self.sites.lock().unwrap_or_else(PoisonError::into_inner);
            *sites.entry(site.name().to_owned()).or_default() += 1;
        }
        self.armed.inject(fault, site, nth, dice)
    }
}

/// Every act twice.
fn doubled(program: &Program) -> Program {
    let mut program = program.clone();
    for thread in &mut program.threads {
        thread.acts = thread.acts.iter().flat_map(|act| [act.clone(), act.clone()]).collect();
    }
    program
}

/// One run on the default schedule.
fn run(program: &Program, alloc: Option<Nth>) -> Result<(Outcome, BTreeMap<String, u64>), LabError> {
    let faults = alloc.map(Injection::Alloc).into_iter().collect();
    let plan = FaultPlan::new(faults).map_err(|error| LabError::Usage(error.to_string()))?;
    let counting = Arc::new(Counting { armed: plan.arm(), sites: Mutex::default() });
    let config = SimConfig {
        strategy: Strategy::Replay(Schedule::default()),
        faults: Some(counting.clone()),
        ..SimConfig::default()
    };
    let outcome = run_once(program, config, &JudgeSet::default());
    if let Some(error) = &outcome.refused {
        return Err(LabError::Usage(error.to_string()));
    }
    let sites = std::mem::take(&mut *counting.sites.lock().unwrap_or_else(PoisonError::into_inner));
    Ok((outcome, sites))
}

fn starved(result: &Result<Done, VmError>) -> bool {
    matches!(result, Err(VmError::Pool(_)))
}

/// Fails each allocation of `program` in turn.
///
/// # Errors
/// [`LabError::Usage`] for a program that cannot be run, [`LabError::Cancelled`].
pub fn enumerate(program: &Program, control: &Control) -> Result<Enumeration, LabError> {
    program.check()?;
    let program = doubled(program);
    let (clean, by_site) = run(&program, None)?;
    let allocations = by_site.values().sum();
    let mut sum = Enumeration { allocations, by_site, ..Enumeration::default() };
    if let Some(finding) = clean.finding() {
        sum.findings.push(format!("without a fault: {}: {}", finding.rule, finding.what));
        return Ok(sum);
    }
    for k in 1..=allocations as u32 {
        for which in [Nth::Only(k), Nth::From(k)] {
            control.check()?;
            control.report("allocations", f64::from(k) / allocations as f64);
            let (outcome, _) = run(&program, Some(which))?;
            sum.runs += 1;
            sum.look(&outcome, &Injection::Alloc(which));
        }
    }
    Ok(sum)
}

impl Enumeration {
    fn look(&mut self, outcome: &Outcome, fault: &Injection) {
        if let Some(finding) = outcome.finding() {
            self.findings.push(format!("{fault}: {}: {}", finding.rule, finding.what));
        }
        let failed: Vec<_> = outcome.performed.iter().filter(|done| starved(&done.result)).collect();
        self.refused += failed.len() as u64;
        self.done_without += u64::from(failed.is_empty());
        if matches!(fault, Injection::Alloc(Nth::From(_))) {
            return;
        }
        if failed.len() > 1 {
            self.findings.push(format!("{fault}: one request failed, and {} acts with it", failed.len()));
        }
        for first in failed.iter().filter(|done| done.act % 2 == 0) {
            let again = outcome
                .performed
                .iter()
                .find(|done| done.thread == first.thread && done.act == first.act + 1);
            match again {
                Some(again) if !starved(&again.result) => self.retried += 1,
                Some(again) => {
                    self.findings.push(format!("{fault}: the retry failed too: {:?}", again.result))
                }
                None => self.findings.push(format!("{fault}: act {} was not made again", first.act)),
            }
        }
    }
}
