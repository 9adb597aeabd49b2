//! `tdpmmu versus`: the TDP MMU against the shadow MMU, for the same guest. Schema `tdpmmu.versus/1`.
//!
//! **Guarantee.** Every row is a run of its own: the same guest, the same memslot update beside the same vCPUs, in one process, the MMUs in turn within each repetition, so that what drifts drifts
//! for all of them. Sizes are counted, times measured, nothing is extrapolated. A run that `bench zap` would not believe is an error here too.
//!
//! **Mechanism.** A row is `bench zap`'s default scene (`run/`, `experiment/`), and faults on a fresh VM of the same kind (`faults.rs`).
//!
//! | `mmu` | the vCPU's addresses | who translates |
//! | --- | --- | --- |
//! | `tdp` | guest-physical | the TDP MMU, under the profile's own zap design |
//! | `shadow-direct` | guest-physical | direct shadow pages (EPT or NPT with tdp_mmu=N, and before 5.11) |
//! | `shadow-guest` | guest-virtual | shadows of the guest's own tables, which are 4-level and there from the start (tdp=0) |

mod faults;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tdpmmu_table::TablePool;

use crate::bench::measure_limits;
use crate::config::{BenchConfig, Plan, one_or_more};
use crate::host::HostInfo;
use crate::result::Run;
use crate::scene::Kind;
use crate::{Control, LabError, experiment, run, units};

/// The shadow MMU's zap design.
const SHADOW: &str = "shadow-gen";

/// The request, as JSON. Unknown fields are refused.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VersusConfig {
    /// Guest sizes.
    pub memory_bytes: Vec<u64>,
    /// `4K`, `2M` or `1G`: the guest's pages and the host's.
    pub page: String,
    /// Numbers of running vCPUs.
    pub vcpus: Vec<u32>,
    /// Repetitions.
    pub reps: u32,
    /// Kernel profile, with changed switches.
    pub kernel_profile: String,
    /// Seed of the guests' access patterns.
    pub seed: u64,
    /// Refuse above this.
    pub max_memory_bytes: Option<u64>,
    /// How freed shadow pages are kept from lockless walkers; none: `ipi`.
    #[serde(deserialize_with = "one_or_more")]
    pub reclaim: Vec<String>,
}

impl Default for VersusConfig {
    fn default() -> Self {
        let zap = BenchConfig::default();
        Self {
            memory_bytes: vec![1 << 30, 4 << 30],
            page: zap.page,
            vcpus: vec![1, 2],
            reps: 1,
            kernel_profile: zap.kernel_profile,
            seed: zap.seed,
            max_memory_bytes: None,
            reclaim: Vec::new(),
        }
    }
}

/// One MMU, one guest, one repetition.
#[derive(Clone, Debug, Serialize)]
pub struct VersusRow {
    /// `tdp`, `shadow-direct` or `shadow-guest`.
    pub mmu: &'static str,
    /// Its zap design.
    pub design: String,
    /// The guest's memory.
    pub memory_bytes: u64,
    /// The guest's pages.
    pub page: String,
    /// Running vCPUs.
    pub vcpus: u32,
    /// Repetition, from 0.
    pub rep: u32,
    /// More threads than CPUs.
    pub overcommit: bool,
    /// Leaves at t0, counted.
    pub sptes: u64,
    /// Tables at t0.
    pub tables_bytes: u64,
    /// What is known about each table: headers; in the shadow MMU also hash, lists and generation, and where a guest's tables are shadowed a gfn an entry.
    pub metadata_bytes: u64,
    /// Reverse maps, parent lists and lpage_info; the TDP MMU has no reverse maps, its lpage_info is not counted.
    pub rmap_bytes: u64,
    /// The guest's own tables, which it has under any MMU but which are read here.
    pub guest_table_bytes: u64,
    /// A complete access that faults, all vCPUs at once on memory of their own: mean.
    pub fault_ns: f64,
    /// From the update's entry until the last vCPU has completed a fault under a new root.
    pub zap_visible_ns: Option<u64>,
    /// First exclusive hold of mmu_lock.
    pub zap_hold_ns: Option<u64>,
    /// The longest of them.
    pub zap_longest_hold_ns: Option<u64>,
    /// The fast-zap call.
    pub zap_call_ns: Option<u64>,
    /// ... until the last table is free.
    pub zap_total_ns: Option<u64>,
    /// CPU time of all who tear down.
    pub zap_cpu_ns: Option<u64>,
    /// From the update's entry until the working sets are mapped again.
    pub refault_ns: Option<u64>,
}

/// An MMU: its name, its zap design (none: the profile's) and its paging.
type Mmu = (&'static str, Option<&'static str>, &'static str);

const MMUS: [Mmu; 3] = [
    ("tdp", None, "direct"),
    ("shadow-direct", Some(SHADOW), "direct"),
    ("shadow-guest", Some(SHADOW), "guest"),
];

impl VersusConfig {
    /// What a row asks of `bench zap`.
    fn request(&self, mmu: Mmu, memory_bytes: u64, vcpus: u32, own: &str) -> BenchConfig {
        let (_, design, paging) = mmu;
        BenchConfig {
            memory_bytes,
            vcpus,
            page: self.page.clone(),
            designs: vec![design.unwrap_or(own).into()],
            paging: paging.into(),
            reclaim: if design.is_some() { self.reclaim.clone() } else { Vec::new() },
            kernel_profile: self.kernel_profile.clone(),
            seed: self.seed,
            check: false,
            max_memory_bytes: self.max_memory_bytes,
            ..BenchConfig::default()
        }
    }

    /// Every row's plan but for the repetition: sizes x vCPUs x MMUs.
    fn plans(&self) -> Result<Vec<(Mmu, Plan)>, LabError> {
        let usage = |what: &str| Err(LabError::Usage(format!("{what}: name at least one")));
        if self.memory_bytes.is_empty() {
            return usage("memory_bytes=[]");
        }
        if self.vcpus.is_empty() {
            return usage("vcpus=[]");
        }
        if self.reps == 0 {
            return Err(LabError::Usage("reps=0: at least one repetition".into()));
        }
        if self.reclaim.len() > 1 || self.reclaim.iter().any(|kind| kind == "all") {
            return Err(LabError::Usage(format!(
                "reclaim={}: one kind (bench walk compares them)",
                self.reclaim.join(",")
            )));
        }
        let own = tdpmmu_spte::KernelProfile::named(&self.kernel_profile)
            .map_err(|e| LabError::Usage(e.to_string()))?
            .design;
        let mut plans = Vec::new();
        for &memory_bytes in &self.memory_bytes {
            for &vcpus in &self.vcpus {
                for mmu in MMUS {
                    let plan = self.request(mmu, memory_bytes, vcpus, own).plan(Some(Kind::Zap))?;
                    plans.push((mmu, plan));
                }
            }
        }
        Ok(plans)
    }
}

/// Runs `versus`; `build`: what is known about the build, copied into the result.
///
/// # Errors
/// [`LabError`], by the exit code it deserves.
pub fn command(config_json: &str, build: &Value, control: &Control) -> Result<String, LabError> {
    let config: VersusConfig = serde_json::from_str(config_json)
        .map_err(|e| LabError::Usage(format!("versus configuration: {e}")))?;
    let plans = config.plans()?;
    for (_, plan) in &plans {
        for case in &plan.cases {
            case.estimate(plan).check(
                plan.config.memory_bytes,
                &plan.config.page,
                config.max_memory_bytes,
            )?;
        }
    }
    let before = measure_limits(control)?;
    let host = HostInfo::collect();
    let mut rows = Vec::new();
    for guest in plans.chunks(MMUS.len()) {
        for rep in 0..config.reps {
            for (mmu, plan) in guest {
                control.check()?;
                control.report(
                    &format!(
                        "{}, {}, {} vCPUs, repetition {}",
                        mmu.0,
                        units::bytes(plan.config.memory_bytes),
                        plan.config.vcpus,
                        rep + 1
                    ),
                    0.0,
                );
                rows.push(one(mmu.0, plan, rep, host.cpus, control)?);
            }
        }
    }
    let limits = before.clone().bracket(&measure_limits(control)?);
    Ok(json!({
        "schema": "tdpmmu.versus/1",
        "host": host,
        "build": build,
        "config": serde_json::to_value(&config)?,
        "seed": config.seed,
        "limits": limits,
        "rows": rows,
    })
    .to_string())
}

fn one(
    mmu: &'static str,
    plan: &Plan,
    rep: u32,
    cpus: usize,
    control: &Control,
) -> Result<VersusRow, LabError> {
    let case = plan.cases.first().ok_or_else(|| LabError::Internal("no case was planned".into()))?;
    let scenario = case.scene.scenario(plan, case, false);
    let fault_ns = faults::mean_ns(&scenario, control)?;
    let outcome = run::run(&scenario, control, None)?;
    let run = experiment::to_run(plan, case, rep, &outcome, cpus)?;
    Ok(row(mmu, &run, fault_ns))
}

fn row(mmu: &'static str, run: &Run, fault_ns: f64) -> VersusRow {
    let (update, teardown, shadow) = (run.update_ns.as_ref(), run.teardown.as_ref(), run.shadow.as_ref());
    let headers = (run.table_pages as f64 * TablePool::overhead_bytes_per_table()) as u64;
    VersusRow {
        mmu,
        design: run.design.clone(),
        memory_bytes: run.memory_bytes,
        page: run.page.clone(),
        vcpus: run.vcpus,
        rep: run.rep,
        overcommit: run.overcommit,
        sptes: run.sptes,
        tables_bytes: run.table_bytes,
        metadata_bytes: shadow.map_or(headers, |s| s.page_bytes + s.gfn_bytes),
        rmap_bytes: shadow.map_or(0, |s| s.list_bytes + s.slot_bytes),
        guest_table_bytes: shadow.map_or(0, |s| s.guest_table_pages * tdpmmu_table::TABLE_BYTES as u64),
        fault_ns,
        zap_visible_ns: run.visible_last_ns,
        zap_hold_ns: update.map(|u| u.exclusive_hold),
        zap_longest_hold_ns: update.map(|u| u.exclusive_longest),
        zap_call_ns: update.map(|u| u.total),
        zap_total_ns: teardown.map(|t| t.last_table_free_ns),
        zap_cpu_ns: teardown.map(|t| t.cpu_ns.caller + t.cpu_ns.vcpu + t.cpu_ns.worker + t.cpu_ns.rcu),
        refault_ns: Some(run.refault.wall_ns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn plans(json: &str) -> Result<usize, LabError> {
        serde_json::from_str::<VersusConfig>(json).expect("well formed").plans().map(|plans| plans.len())
    }

    #[test]
    fn every_guest_meets_every_mmu() {
        assert_eq!(
            plans(r#"{"memory_bytes": [1073741824, 4294967296, 8589934592], "vcpus": [1, 2]}"#).ok(),
            Some(18)
        );
    }

    #[test]
    fn what_makes_no_sense_names_value_and_rule() {
        for (json, said) in [
            (r#"{"memory_bytes": []}"#, "memory_bytes=[]"),
            (r#"{"vcpus": []}"#, "vcpus=[]"),
            (r#"{"reps": 0}"#, "reps=0"),
            (r#"{"reclaim": "all"}"#, "one kind"),
            (r#"{"reclaim": "rcuu"}"#, "did you mean \"rcu\""),
            (r#"{"memory_bytes": [4095]}"#, "multiple of the page size"),
            (r#"{"kernel_profile": "6.99"}"#, "6.99"),
        ] {
            let error = plans(json).expect_err(json).to_string();
            assert!(error.contains(said), "{json}: {error}");
        }
    }
}
