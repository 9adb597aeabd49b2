//! Allocation failure at every site in turn.
//!
//! **Guarantee.** For a program that allocates N times, N runs fail the k-th allocation alone and N fail the k-th and all after it. In each: the failed act says that there is no page, and no other error; the judges find
//! nothing, nothing leaks; where only one request failed, the same act succeeds when it is made again.
//!
//! **Mechanism.** Each act stands twice in the program, so that what failed is tried again at once in the same VM. All runs follow one schedule, in which nobody is preempted, so that the k-th request is the
//! same one in each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use tdpmmu_platform::sim::{Limits, SimConfig, Strategy};
use tdpmmu_platform::{Fault, Faults, Site};
use tdpmmu_vm::VmError;

use super::{Armed, FaultPlan, Injection, Nth};
use crate::program::{Done, JudgeSet, Outcome, Performed, Program, run_once};
use crate::{Control, LabError};

/// tdpmmu.faults/1: what an enumeration came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enumeration {
    /// `tdpmmu.faults/1`.
    pub schema: String,
    /// Requests for table pages of the program without faults.
    pub sites: u64,
    /// The same by the place where they are made.
    pub by_site: BTreeMap<String, u64>,
    /// Two runs per request: it alone fails, and it with all after it.
    pub runs: Vec<AllocationRun>,
    /// What must not be; empty is the only good answer.
    pub findings: Vec<String>,
    /// No finding.
    pub ok: bool,
}

/// One run with a failed allocation.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AllocationRun {
    /// Which request failed, from 1.
    pub k: u32,
    /// Where it was made.
    pub site: String,
    /// All later requests failed too.
    pub from_here_on: bool,
    /// What the first act that failed was told; `None`: the engine did without the page (a huge page that stays whole).
    pub error: Option<String>,
    /// Acts that failed.
    pub refused: u64,
    /// Table pages that did not come back in the end.
    pub leaked: u64,
    /// The act was made again and succeeded; `None` where all later requests failed, or nothing had to be made again.
    pub retried_ok: Option<bool>,
    /// A clean error, nothing leaked, no rule broken, the retry succeeded.
    pub clean: bool,
}

/// Notes where each request was made, beside what the plan does.
struct Counting {
    armed: Arc<Armed>,
    sites: Mutex<Vec<Site>>,
}

impl Faults for Counting {
    fn inject(&self, fault: Fault, site: Site, nth: u64, dice: &mut dyn FnMut(u32) -> u32) -> u32 {
        if fault == Fault::Alloc {
            self.sites.lock().unwrap_or_else(PoisonError::into_inner).push(site);
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

/// Nobody is preempted; the seed says whose turn it is where a task waits.
fn calm(seed: u64) -> Strategy {
    Strategy::Pct { seed, depth: 1, steps: 1000 }
}

/// One run on the schedule of `seed`.
fn run(program: &Program, alloc: Option<Nth>, seed: Option<u64>) -> Result<(Outcome, Vec<Site>), LabError> {
    let faults = alloc.map(Injection::Alloc).into_iter().collect();
    let plan = FaultPlan::new(faults).map_err(|error| LabError::Usage(error.to_string()))?;
    let counting = Arc::new(Counting { armed: plan.arm(), sites: Mutex::default() });
    let config = SimConfig {
        strategy: calm(seed.unwrap_or(0)),
        faults: Some(counting.clone()),
        // What a length may be is not asked here; the default stands for the program's own limits.
        limits: Limits { rcu_units: u64::MAX - 1, step_units: u64::MAX - 1 },
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
    matches!(result, Err(VmError::Pool(_) | VmError::Host { .. }))
}

/// Fails each allocation of `program` in turn, under a schedule without preemptions; `seed` chooses among these.
///
/// # Errors
/// [`LabError::Usage`] for a program that cannot be run, [`LabError::Cancelled`].
pub fn enumerate(program: &Program, seed: Option<u64>, control: &Control) -> Result<Enumeration, LabError> {
    program.check()?;
    let program = doubled(program);
    let (clean, places) = run(&program, None, seed)?;
    let mut sum = Enumeration {
        schema: "tdpmmu.faults/1".into(),
        sites: places.len() as u64,
        ..Enumeration::default()
    };
    for site in &places {
        *sum.by_site.entry(site.name().to_owned()).or_default() += 1;
    }
    if let Some(finding) = clean.finding() {
        sum.findings.push(format!("without a fault: {}: {}", finding.rule, finding.what));
        return Ok(sum);
    }
    for (n, site) in places.iter().enumerate() {
        let k = n as u32 + 1;
        for which in [Nth::Only(k), Nth::From(k)] {
            control.check()?;
            control.report("allocations", n as f64 / places.len() as f64);
            let (outcome, _) = run(&program, Some(which), seed)?;
            sum.look(&outcome, k, *site, which);
        }
    }
    sum.ok = sum.findings.is_empty();
    Ok(sum)
}

impl Enumeration {
    fn look(&mut self, outcome: &Outcome, k: u32, site: Site, which: Nth) {
        let (fault, before) = (Injection::Alloc(which), self.findings.len());
        if let Some(finding) = outcome.finding() {
            self.findings.push(format!("{fault}: {}: {}", finding.rule, finding.what));
        }
        let failed: Vec<_> = outcome.performed.iter().filter(|done| starved(&done.result)).collect();
        let mut retried_ok = None;
        if let Nth::Only(_) = which {
            if failed.len() > 1 {
                self.findings.push(format!("{fault}: one request failed, and {} acts with it", failed.len()));
            }
            for first in failed.iter().filter(|done| done.act % 2 == 0) {
                let retry = |done: &&Performed| done.thread == first.thread && done.act == first.act + 1;
                let again = outcome.performed.iter().find(retry);
                let ok = again.is_some_and(|again| !starved(&again.result));
                retried_ok = Some(ok);
                if !ok {
                    self.findings.push(format!("{fault}: the retry failed too: {again:?}"));
                }
            }
        }
        self.runs.push(AllocationRun {
            k,
            site: site.name().to_owned(),
            from_here_on: matches!(which, Nth::From(_)),
            error: failed.first().and_then(|done| done.result.as_ref().err()).map(ToString::to_string),
            refused: failed.len() as u64,
            leaked: outcome.close.as_ref().map_or(0, |close| close.tables_leaked),
            retried_ok,
            clean: self.findings.len() == before,
        });
    }
}
