//! `tdpmmu simulate zap`: hosts that nobody has here, in virtual time.
//!
//! **Guarantee.** The engine that is measured is the engine that is predicted with: same scenario, same runner, same row. What an operation costs was measured on the real platform of this
//! machine, by itself, before (`calibrate.rs`), and stands in the result with its source; no cost was fitted to a zap that is predicted. Given the costs, the same request gives the
//! same runs, bit for bit. How far off the model is, the result says itself: `model_error` has what this machine measured beside what the model said about it, field by field.
//!
//! **Mechanism.** [`tdpmmu_platform::time`] is the machine; tables are held by count ([`tdpmmu_table::uniform`]), so that 12 TiB of 4 KiB pages are a few GiB here.
//!
//! | file | idea |
//! | --- | --- |
//! | `calibrate.rs` | what operations cost, and from what that was measured |
//! | `micro.rs` | the loops that measure it |
//! | `predict.rs` | one case in virtual time |
//! | `error.rs` | predicted against measured |

mod calibrate;
mod error;
mod micro;
mod predict;

use std::collections::BTreeMap;
use std::time::Instant;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tdpmmu_platform::time::{Costs, Machine};
use tdpmmu_spte::closest;

pub use self::calibrate::{Calibration, Price, calibrate};
pub use self::error::{Compared, Measured, ModelError, model_error};
pub use self::predict::{ByCount, Predicted, predict};
use crate::config::{BenchConfig, Plan, one_or_more};
use crate::scene::Kind;
use crate::{Control, LabError};

/// CPUs beside those of the vCPUs: the caller's, and one for a worker or RCU.
const SPARE_CPUS: usize = 2;
/// Most CPUs of a simulated machine.
const MOST_CPUS: usize = 4096;
/// One access a vCPU every so often, up to [`FEW_VCPUS`] of them.
const ARRIVAL_NS: u64 = 20_000;
/// More vCPUs than this share the accesses of so many: a simulated second stays within reach.
const FEW_VCPUS: u64 = 8;
/// What all vCPUs touch together, at most; and each.
const WORKING_SETS: u64 = 2 << 30;
const WORKING_SET: u64 = 64 << 20;

/// What the modelled host keeps for itself.
const HOST_SPARE: u64 = 4 << 30;

/// Guests that every calibrated result is held against.
const ERROR_SIZES: [u64; 3] = [1 << 30, 4 << 30, 16 << 30];

/// The request of `simulate zap`, as JSON. Unknown fields are refused. Units are in the names.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SimulateConfig {
    /// Running vCPUs.
    pub vcpus: u32,
    /// Guest memory.
    pub memory_bytes: u64,
    /// `4K`, `2M` or `1G`.
    pub page: String,
    /// CPUs of the machine; none: one a vCPU, and two.
    pub cpus: Option<usize>,
    /// Zap designs; `all`: every sound one.
    #[serde(deserialize_with = "one_or_more", alias = "designs")]
    pub design: Vec<String>,
    /// Passes, each for a run of its own; none: the design's.
    #[serde(deserialize_with = "one_or_more")]
    pub passes: Vec<String>,
    /// `none`, `voluntary` or `full`, each for a run of its own.
    #[serde(deserialize_with = "one_or_more")]
    pub preempt: Vec<String>,
    /// CPU time after which a task is asked to yield.
    pub tick_ns: u64,
    /// Kernel profile, with changed switches.
    #[serde(alias = "kernel_profile")]
    pub profile: String,
    /// `vcpu` or `mmu`, or the design's.
    pub ownership: Option<String>,
    /// Worker threads of designs that have a queue.
    pub workers: usize,
    /// Seed of the guests' access patterns.
    pub seed: u64,
    /// `clean`, `accessed` or `dirty`.
    pub ad_mix: String,
    /// `none` or `bitmap`.
    pub writeback: String,
    /// One access every so many ns per vCPU; none: 20 us, stretched for more than 8 vCPUs.
    pub arrival_ns: Option<u64>,
    /// Memory that each vCPU touches; none: 64 MiB, of all together at most 2 GiB.
    pub working_set_bytes: Option<u64>,
    /// Prices in ns by name, instead of calibrated ones; those that are missing are calibrated.
    pub costs: BTreeMap<String, f64>,
    /// All prices that are not given are the round figures of the tests: nothing is calibrated.
    pub uncalibrated: bool,
    /// Measure guests of these sizes on this machine, simulate them, and say how far off the model is, for every design and pass list of the request. `null`: 1, 4 and 16 GiB and
    /// the first of them, where prices are calibrated; empty: do not.
    pub error_sizes: Option<Vec<u64>>,
    /// Repetitions of each of these measurements.
    pub error_reps: u32,
}

impl Default for SimulateConfig {
    fn default() -> Self {
        let zap = BenchConfig::default();
        Self {
            vcpus: 416,
            memory_bytes: 12 << 40,
            page: zap.page,
            cpus: None,
            design: vec!["sync".into()],
            passes: Vec::new(),
            preempt: zap.preempt,
            tick_ns: zap.tick_ns,
            profile: zap.kernel_profile,
            ownership: None,
            workers: 1,
            seed: 0,
            ad_mix: zap.ad_mix,
            writeback: zap.writeback,
            arrival_ns: None,
            working_set_bytes: None,
            costs: BTreeMap::new(),
            uncalibrated: false,
            error_sizes: None,
            error_reps: 3,
        }
    }
}

impl SimulateConfig {
    /// Parses a request.
    ///
    /// # Errors
    /// [`LabError::Usage`] for malformed JSON and unknown fields.
    pub fn parse(json: &str) -> Result<Self, LabError> {
        serde_json::from_str(json).map_err(|e| LabError::Usage(format!("simulate configuration: {e}")))
    }

    /// The machine's CPUs.
    pub fn cpus(&self) -> usize {
        self.cpus.unwrap_or(self.vcpus as usize + SPARE_CPUS)
    }

    /// The same request to `bench zap`, checked.
    ///
    /// # Errors
    /// [`LabError::Usage`] naming the value and the rule.
    pub fn plan(&self) -> Result<Plan, LabError> {
        let usage = |text: String| Err(LabError::Usage(text));
        if !(1..=MOST_CPUS).contains(&self.cpus()) {
            return usage(format!("cpus={}: expected 1 to {MOST_CPUS}", self.cpus()));
        }
        if self.error_reps == 0 || self.error_reps > 100 {
            return usage(format!("error_reps={}: expected 1 to 100", self.error_reps));
        }
        let most = (tdpmmu_vm::MAX_HOST_PAGES << 12) - HOST_SPARE;
        for &bytes in std::iter::once(&self.memory_bytes).chain(self.error_sizes.iter().flatten()) {
            if bytes > most {
                return usage(format!(
                    "memory={bytes} bytes: the modelled host backs at most {}",
                    crate::units::bytes(most)
                ));
            }
        }
        for (name, &ns) in &self.costs {
            let mut known = Costs::default();
            if known.row_mut(name).is_none() {
                let names: Vec<&str> = Costs::default().rows().iter().map(|row| row.0).collect();
                let hint =
                    closest(name, &names).map(|c| format!(" (did you mean {c:?}?)")).unwrap_or_default();
                return usage(format!("costs: {name:?} is none of {}{hint}", names.join(", ")));
            }
            if !ns.is_finite() || !(0.0..=1e9).contains(&ns) {
                return usage(format!("costs: {name}={ns}: expected 0 to 1,000,000,000 ns"));
            }
        }
        let vcpus = u64::from(self.vcpus.max(1));
        let stretched = ARRIVAL_NS * vcpus.div_ceil(FEW_VCPUS);
        let page =
            tdpmmu_spte::geometry::parse_page_size(&self.page).map_err(|e| LabError::Usage(e.to_string()))?;
        let unit = tdpmmu_spte::geometry::page_bytes(page);
        let shared = (WORKING_SETS / vcpus).min(WORKING_SET).max(unit) / unit * unit;
        let config = BenchConfig {
            memory_bytes: self.memory_bytes,
            page: self.page.clone(),
            vcpus: self.vcpus,
            designs: self.design.clone(),
            passes: self.passes.clone(),
            preempt: self.preempt.clone(),
            ownership: self.ownership.clone(),
            tick_ns: self.tick_ns,
            kernel_profile: self.profile.clone(),
            seed: self.seed,
            ad_mix: self.ad_mix.clone(),
            writeback: self.writeback.clone(),
            workers: self.workers,
            arrival_ns: self.arrival_ns.unwrap_or(stretched),
            working_set_bytes: Some(self.working_set_bytes.unwrap_or(shared)),
            check: false,
            ..BenchConfig::default()
        };
        let plan = config.plan(Some(Kind::Zap))?;
        if let Some(case) = plan.cases.iter().find(|case| case.shadow.is_some()) {
            let why = "virtual time holds the tables of the TDP MMU by count; the shadow MMU is measured (bench zap)";
            return Err(LabError::Usage(format!("design {}: {why}", case.info.name)));
        }
        Ok(plan)
    }

    /// The same request for its first design, passes and preemption only.
    fn first(&self) -> Self {
        let first = |list: &[String]| list.iter().take(1).cloned().collect();
        let design = match self.design.first().map(String::as_str) {
            // The kernel's of today.
            Some("all") => vec!["sync".into()],
            _ => first(&self.design),
        };
        Self { design, passes: first(&self.passes), preempt: first(&self.preempt), ..self.clone() }
    }

    /// The prices: given, else calibrated, else the tests' own.
    fn calibration(&self, plan: &Plan, control: &Control) -> Result<Calibration, LabError> {
        let names = Costs::default().rows().len();
        let mut calibration = if self.uncalibrated || self.costs.len() == names {
            Calibration::uncalibrated()
        } else {
            calibrate(plan, control)?
        };
        for (name, &ns) in &self.costs {
            calibration.set(name, ns, "given");
        }
        Ok(calibration)
    }
}

/// `simulate zap`: a request as JSON, a result `tdpmmu.simulate/1` as JSON.
///
/// # Errors
/// [`LabError`], by the exit code it deserves.
pub fn command(config_json: &str, control: &Control) -> Result<String, LabError> {
    let config = SimulateConfig::parse(config_json)?;
    Ok(simulate_zap(&config, control)?.to_string())
}

/// Predicts every case of the request.
///
/// # Errors
/// [`LabError`].
pub fn simulate_zap(config: &SimulateConfig, control: &Control) -> Result<Value, LabError> {
    let plan = config.plan()?;
    control.report("calibrating", 0.0);
    let calibration = config.calibration(&plan, control)?;
    let machine = Machine { cpus: config.cpus(), costs: calibration.costs.clone() };
    let mut runs = Vec::new();
    let mut seconds = Vec::new();
    for (done, case) in plan.cases.iter().enumerate() {
        control.check()?;
        control.report(
            &format!("simulating {}, {}", case.info.name, case.passes),
            done as f64 / plan.cases.len() as f64,
        );
        let begun = Instant::now();
        runs.push(predict(&plan, case, 0, &machine, control)?);
        seconds.push(begun.elapsed().as_secs_f64());
    }
    let model_error = match &config.error_sizes {
        None if config.uncalibrated => None,
        None => Some(model_error(&config.first(), &ERROR_SIZES, &calibration, control)?),
        Some(sizes) if sizes.is_empty() => None,
        Some(sizes) => Some(model_error(config, sizes, &calibration, control)?),
    };
    Ok(json!({
        "schema": "tdpmmu.simulate/1",
        "experiment": "zap",
        "host": crate::host::HostInfo::collect(),
        "config": config,
        "seed": config.seed,
        "machine": { "cpus": machine.cpus, "costs_ns": calibration.prices() },
        "limits": calibration.limits,
        "model": MODEL,
        "simulated_in_seconds": seconds,
        "runs": runs,
        "model_error": model_error,
    }))
}

/// What the reader of a result must know about the model.
const MODEL: &[&str] = &[
    "memory is sequentially consistent; entries of tables cost a flat price by kind of access, other words are cache lines that one CPU owns",
    "a leaf table held by count is zapped in one event of 512 times the price where its root is invalid (by_count.whole_tables); all other tables word by word",
    "CPUs are shared fairly from one queue, without affinity; the costs are those of this machine, also where the simulated one has more sockets than it",
];
