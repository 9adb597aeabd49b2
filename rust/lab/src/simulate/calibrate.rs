//! What operations cost on this machine, each from a measurement of its own.
//!
//! **Guarantee.** No price comes from a zap beside running vCPUs, which is what is predicted. Each says what it was measured from.
//!
//! **Mechanism.** Words and waits are timed directly (`micro.rs`, [`crate::limits`]). What lies between an operation's words (the code of a fault, of a root's load) is the *difference*: the
//! operation is timed on the real platform and simulated with that price at two values; as the simulated time is linear in the price, the two say which value gives the measured
//! time.

use std::collections::BTreeMap;

use serde::Serialize;
use tdpmmu_platform::Timed;
use tdpmmu_platform::time::{self, Costs, Machine};
use tdpmmu_vm::AdMix as Leaves;

use super::micro;
use crate::config::{AdMix, Plan};
use crate::limits::{self, LimitOptions, Limits};
use crate::scenario::VmSpec;
use crate::{Control, LabError};

/// Spins of a waiter for mmu_lock before it sleeps (`tdpmmu_platform::rwlock`): a spin each for its turn and as head of the queue.
const LOCK_SPINS: f64 = 200.0;
/// Pages of the guests that are zapped to calibrate.
const ZAPPED_PAGES: u64 = 1 << 17;
/// The guest whose faults are timed.
const FAULTED_PAGES: u64 = 1 << 15;
const SPREAD_PAGES: u64 = 1 << 19;

/// One price and where it is from.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Price {
    /// Nanoseconds.
    pub ns: f64,
    /// What was measured.
    pub source: &'static str,
}

/// The prices of a machine.
#[derive(Clone, Debug)]
pub struct Calibration {
    /// The prices.
    pub costs: Costs,
    /// This host's physical limits, from the same calibration.
    pub limits: Option<Limits>,
    sources: BTreeMap<&'static str, &'static str>,
}

impl Calibration {
    /// The round figures of the tests.
    pub fn uncalibrated() -> Self {
        let costs = Costs::default();
        let sources = costs.rows().iter().map(|row| (row.0, "not measured: a round figure")).collect();
        Calibration { costs, limits: None, sources }
    }

    /// Sets a price; `name` is one of [`Costs::rows`].
    pub fn set(&mut self, name: &str, ns: f64, source: &'static str) {
        let known = self.costs.rows().iter().find(|row| row.0 == name).map(|row| row.0);
        if let (Some(known), Some(row)) = (known, self.costs.row_mut(name)) {
            *row = if ns.is_finite() { ns.max(0.0) } else { *row };
            self.sources.insert(known, source);
        }
    }

    /// Every price with its source, by name.
    pub fn prices(&self) -> BTreeMap<&'static str, Price> {
        let source = |name| self.sources.get(name).copied().unwrap_or("");
        self.costs.rows().into_iter().map(|(name, ns)| (name, Price { ns, source: source(name) })).collect()
    }

    /// Sets `name` so that what `simulated` says comes to `measured`: it is linear in the price.
    fn fit(
        &mut self,
        name: &'static str,
        measured: f64,
        source: &'static str,
        simulated: impl Fn(&Costs) -> Result<f64, LabError>,
    ) -> Result<(), LabError> {
        let at = |ns: f64| {
            let mut costs = self.costs.clone();
            if let Some(row) = costs.row_mut(name) {
                *row = ns;
            }
            simulated(&costs)
        };
        const STEP: f64 = 1000.0;
        let (none, some) = (at(0.0)?, at(STEP)?);
        let slope = (some - none) / STEP;
        if slope > 0.0 {
            self.set(name, (measured - none) / slope, source);
        }
        Ok(())
    }
}

/// What a small VM is like; tasks measure, as in the runs.
fn spec(plan: &Plan, pages: u64, design: &str, passes: &str, ownership: &str) -> VmSpec {
    VmSpec {
        profile: plan.config.kernel_profile.clone(),
        design: design.into(),
        passes: passes.into(),
        ownership: ownership.into(),
        shadow: None,
        vcpus: 2,
        levels: plan.config.levels,
        memory_bytes: pages * 4096,
        level: 1,
        max_level: 1,
        smm: false,
        max_tables: (pages / 256 + 4096) as u32,
        workers: 1,
        worker_cpus: Vec::new(),
        worker_queue: None,
        vcpu_cpus: Vec::new(),
        preempt: "full".into(),
        tick_ns: plan.config.tick_ns,
        write_back: plan.write_back,
        step_ns: false,
        force_yield: None,
        record: false,
        log: false,
    }
}

fn in_virtual_time(
    costs: &Costs,
    body: impl FnOnce() -> Result<f64, LabError> + Send + 'static,
) -> Result<f64, LabError> {
    let machine = Machine { cpus: 4, costs: costs.clone() };
    time::run(&machine, body).map_err(|error| LabError::Internal(error.to_string()))?.0
}

/// Measures every price. Takes some seconds.
///
/// # Errors
/// [`LabError::Cancelled`]; [`LabError::Internal`] when the host refuses memory or threads.
pub fn calibrate(plan: &Plan, control: &Control) -> Result<Calibration, LabError> {
    let mut all = Calibration::uncalibrated();
    let told = |n: usize| {
        control.report("calibrating", n as f64 / 8.0);
        control.check()
    };
    told(1)?;
    let options = LimitOptions { threads: vec![1], budget_ms: 600, ..LimitOptions::default() };
    let limits = limits::measure(&options).map_err(|e| LabError::Internal(e.to_string()))?;
    all.set("read", limits.one.read_ns, "limits: loads of consecutive entries");
    all.set("fence", limits.fence_ns, "limits: a store and a fence");
    if let Some(ns) = limits.membarrier_busy_ns.or(limits.membarrier_ns) {
        all.set("membarrier", ns, "limits: membarrier beside a running sibling, median");
    }
    told(2)?;
    all.set("locked", micro::locked(), "an addition to a word of one's own");
    all.set("relax", micro::relax(), "a load and a pause");
    all.set("syscall", micro::syscall(), "a futex wake-up of nobody");
    for (name, ns) in ["cpu_clock", "switch_count", "run_delay"].into_iter().zip(micro::questions()) {
        all.set(name, ns, "a thread's question about itself");
    }
    all.set("spawn", micro::spawn(), "starting a thread, median");
    all.set("transfer", micro::transfer(), "half a round trip of a word between two CPUs");
    let turns = all.costs.relax * LOCK_SPINS;
    all.set("lock_spin", turns, "200 turns of a spinning wait, as the lock makes them");
    told(3)?;
    let (wake, until) = micro::wake();
    let syscall = all.costs.syscall;
    all.set("wake", wake - syscall, "a futex wake-up of one sleeper, median, less that of nobody");
    all.set("wake_latency", until - wake, "from there until the sleeper runs, median");
    let (slice, switch) = micro::sharing();
    all.set("slice", slice, "two busy threads on one CPU: how long one runs, median");
    all.set("switch", switch, "two yielding threads on one CPU: half a turn");
    told(4)?;
    let small = spec(plan, FAULTED_PAGES, "sync", "4K,2M,1G,root", "mmu");
    all.set("walk", micro::walk(&small)?, "a lookup over eight leaf tables, per level");
    all.set("access", micro::access(&small)?, "an access that the TLB answers");
    all.set("section", micro::section(&small)?, "a read section of a task that measures");
    let check = micro::check(&small)?;
    all.set("step", check, "a reschedule check of a task that measures");
    told(5)?;
    let leaves = match plan.ad_mix {
        AdMix::Clean => Leaves::Untouched,
        AdMix::Accessed => Leaves::Clean,
        AdMix::Dirty => Leaves::Dirty,
    };
    let zap = |design: &str, passes: &str, ownership: &str| {
        micro::zap(&spec(plan, ZAPPED_PAGES, design, passes, ownership), ZAPPED_PAGES, leaves)
    };
    let coarse = zap("sync", "1G,root", "mmu")?;
    all.set("swap", coarse.per_spte, "an undisturbed shared zap, 1G,root, of 512 MiB: CPU time per SPTE");
    all.set("free", coarse.free, "the same zap: CPU time of the RCU thread per table");
    told(6)?;
    let fine = zap("sync", "4K,2M,1G,root", "mmu")?;
    let twice = fine.per_spte - all.costs.swap - all.costs.read;
    all.set("cmpxchg", twice, "the same with the finer passes: what they add, less the read");
    let exclusive = zap("in-place", "root", "vcpu")?;
    let store = exclusive.per_spte - all.costs.read;
    all.set("write", store, "an undisturbed exclusive zap of 512 MiB: CPU time per SPTE, less the read");
    told(7)?;
    // Outside of what is fitted: the reload needs no fault, the faults within a table no new table.
    let measured = micro::reload::<tdpmmu_platform::Real>(&small)?;
    let of = small.clone();
    all.fit("root", measured, "a root put and loaded again, less its words", move |costs| {
        let of = of.clone();
        in_virtual_time(costs, move || micro::reload::<Timed>(&of))
    })?;
    all.set("table", 0.0, "");
    let measured = micro::fault::<tdpmmu_platform::Real>(&small, FAULTED_PAGES, 1)?;
    let of = small.clone();
    all.fit("fault", measured, "a slow fault, table there, less its words", move |costs| {
        let of = of.clone();
        in_virtual_time(costs, move || micro::fault::<Timed>(&of, FAULTED_PAGES / 8, 1))
    })?;
    let spread = spec(plan, SPREAD_PAGES, "sync", "4K,2M,1G,root", "mmu");
    let measured = micro::fault::<tdpmmu_platform::Real>(&spread, SPREAD_PAGES, 512)?;
    all.fit("table", measured, "a slow fault that links a table, less one that does not", move |costs| {
        let of = spread.clone();
        in_virtual_time(costs, move || micro::fault::<Timed>(&of, SPREAD_PAGES, 512))
    })?;
    all.limits = Some(limits);
    Ok(all)
}
