//! One operation against its limit: populate, fault, walk, rcu, dirty. Schema `tdpmmu.micro/1`.
//!
//! Each figure is the minimum over rounds of the mean over many operations, on one thread unless the name says otherwise; `count` says how many operations a round had.

mod dirty;
mod fault;
mod populate;
mod rcu;
mod reclaim;
mod walk;

use std::borrow::Cow;

use serde::Serialize;
use serde_json::{Value, json};
use tdpmmu_platform::{Platform, RcuDomain, Real, Role as TaskRole, TaskConfig};
use tdpmmu_spte::LEVEL_4K;
use tdpmmu_spte::geometry::page_bytes;
use tdpmmu_vm::{FaultOutcome, GuestAccess, Vcpu, Vm, VmConfig, VmError};

use self::dirty::DirtyRow;
use self::reclaim::ReclaimRow;
use crate::bench::measure_limits;
use crate::config::{Plan, ShadowCase};
use crate::host::HostInfo;
use crate::limits::Limits;
use crate::memory::Estimate;
use crate::run::build_guest;
use crate::{Control, LabError};

type P = Real;

/// One measured operation.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What.
    pub name: String,
    /// ns an operation.
    pub ns: f64,
    /// `ns` over the limit `of`.
    pub ratio: Option<f64>,
    /// The limit it is compared with.
    pub of: Option<Cow<'static, str>>,
    /// Operations in a round.
    pub count: u64,
    /// The goal, in the unit of `ratio` if there is one, else ns.
    pub goal: Option<f64>,
    /// What only `bench dirty` has.
    #[serde(flatten)]
    pub dirty: Option<DirtyRow>,
    /// What only `bench walk --reclaim` has.
    #[serde(flatten)]
    pub reclaim: Option<ReclaimRow>,
}

const ROUNDS: usize = 5;

struct Bench<'a> {
    plan: &'a Plan,
    limits: &'a Limits,
    control: &'a Control,
    rows: Vec<Row>,
}

fn fail(what: &str) -> impl Fn(VmError) -> LabError + '_ {
    move |error| match error {
        VmError::Cancelled => LabError::Cancelled,
        error => LabError::Internal(format!("{what}: {error}")),
    }
}

/// Runs one of the micro experiments.
pub(crate) fn run(kind: &str, plan: &Plan, build: &Value, control: &Control) -> Result<String, LabError> {
    // Logging dirty pages makes small pages of large ones.
    let level = if kind == "dirty" { LEVEL_4K } else { plan.level };
    let bare = Estimate::new(plan.config.memory_bytes, level, plan.config.levels);
    let gfns = plan.config.memory_bytes / page_bytes(1);
    let estimate = plan.shadow.first().map_or(bare, |case| bare.shadowed(gfns, level, case.shadows_guest()));
    estimate.check(plan.config.memory_bytes, &plan.config.page, plan.config.max_memory_bytes)?;
    if matches!(kind, "dirty" | "rcu") && !plan.shadow.is_empty() {
        return Err(LabError::Usage(format!(
            "bench {kind} is about the TDP MMU: name none of the shadow MMU's designs"
        )));
    }
    let before = measure_limits(control)?;
    let mut bench = Bench { plan, limits: &before, control, rows: Vec::new() };
    match kind {
        "populate" => bench.populate(&estimate)?,
        "fault" => bench.fault()?,
        "walk" if plan.shadow.is_empty() => bench.walk(&estimate)?,
        "walk" => bench.reclaim()?,
        "dirty" => bench.dirty()?,
        _ => bench.rcu()?,
    }
    let rows = bench.rows;
    let limits = before.clone().bracket(&measure_limits(control)?);
    Ok(json!({
        "schema": "tdpmmu.micro/1",
        "experiment": kind,
        "host": HostInfo::collect(),
        "build": build,
        "config": serde_json::to_value(&plan.config)?,
        "seed": plan.config.seed,
        "limits": limits,
        "rows": rows,
    })
    .to_string())
}

impl Bench<'_> {
    /// Under the shadow MMU, if that was asked for.
    fn vm(&self, memory_bytes: u64, level: u8) -> Result<Vm<P>, LabError> {
        match self.plan.shadow.first() {
            None => self.vm_with(memory_bytes, level, level, |_| {}),
            Some(case) => self.shadow_vm(case, memory_bytes, level, |_| {}),
        }
    }

    /// A VM on the shadow MMU; a guest whose tables are shadowed has mapped all of its memory by pages of `level`.
    fn shadow_vm(
        &self,
        case: &ShadowCase,
        memory_bytes: u64,
        level: u8,
        change: impl FnOnce(&mut VmConfig),
    ) -> Result<Vm<P>, LabError> {
        let vm = self.vm_with(memory_bytes, level, level, |config| {
            config.design = Some(case.design.info().name.into());
            config.shadow.paging = case.paging;
            config.shadow.reclaim = case.reclaim;
            config.shadow.quota = case.quota;
            // The guest's own tables.
            config.host_pages += 4 << 18;
            change(config);
        })?;
        if case.shadows_guest() {
            build_guest(&vm, memory_bytes / page_bytes(1), level, self.plan.config.levels)?;
        }
        Ok(vm)
    }

    /// A VM whose host maps pages of `level`, with tables for leaves of `smallest`.
    fn vm_with(
        &self,
        memory_bytes: u64,
        level: u8,
        smallest: u8,
        change: impl FnOnce(&mut VmConfig),
    ) -> Result<Vm<P>, LabError> {
        let estimate = Estimate::new(memory_bytes, smallest, self.plan.config.levels);
        let mut config = VmConfig::new(self.plan.profile);
        config.root_level = self.plan.config.levels;
        config.maxphyaddr = if config.root_level == 5 { 52 } else { 48 };
        config.max_tables = u32::try_from(estimate.tables + 8192).unwrap_or(u32::MAX - 256);
        config.max_level = level;
        config.host_pages = (memory_bytes / page_bytes(1)).next_power_of_two().max(1 << 20);
        config.write_back = self.plan.write_back;
        config.task = TaskConfig { attribute: false, ..TaskConfig::default() };
        change(&mut config);
        let vm = Vm::new(config).map_err(fail("the VM"))?;
        let task = vm.task("setup", TaskRole::Caller);
        vm.add_memory(&task, 0, memory_bytes / page_bytes(1), level).map_err(fail("memslots"))?;
        vm.mmu().pool().prefault(estimate.tables + 4096).map_err(|e| LabError::Internal(e.to_string()))?;
        Ok(vm)
    }

    /// The minimum over rounds of `ns` per operation; `round` returns (ns, operations).
    fn best(
        &mut self,
        name: impl Into<String>,
        of: Option<(&'static str, f64)>,
        goal: Option<f64>,
        mut round: impl FnMut() -> Result<(u64, u64), LabError>,
    ) -> Result<(), LabError> {
        let name = name.into();
        let (mut ns, mut count) = (f64::INFINITY, 0);
        for n in 0..ROUNDS {
            self.control.check()?;
            self.control.report(&name, n as f64 / ROUNDS as f64);
            let (took, operations) = round()?;
            count = operations;
            ns = ns.min(took as f64 / operations.max(1) as f64);
        }
        let ratio = of.map(|(_, limit)| ns / limit);
        self.rows.push(Row {
            name,
            ns,
            ratio,
            of: of.map(|o| o.0.into()),
            count,
            goal,
            dirty: None,
            reclaim: None,
        });
        Ok(())
    }
}

fn faults(
    vcpu: &mut Vcpu<'_, P>,
    gfns: impl Iterator<Item = u64>,
    write: bool,
) -> Result<(u64, u64), LabError> {
    let mut count = 0;
    let begin = P::ticks();
    for gfn in gfns {
        while vcpu.fault(GuestAccess { gfn, write, exec: false }, false).map_err(fail("a fault"))?
            == FaultOutcome::Retry
        {}
        count += 1;
    }
    Ok((P::ticks_to_ns(P::ticks() - begin), count))
}

/// Empties the guest: a fast zap, and the tables back in the pool.
fn empty(vm: &Vm<P>) -> Result<(), LabError> {
    let task = vm.task("empty", TaskRole::Caller);
    vm.fast_zap(&task).map_err(fail("a fast zap"))?;
    {
        let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
        vcpu.enter().map_err(fail("a root"))?;
    }
    vm.mmu().rcu().barrier();
    Ok(())
}

fn clean(vm: &Vm<P>) -> Result<(), LabError> {
    let report = vm.close().map_err(fail("closing"))?;
    if report.is_clean() {
        return Ok(());
    }
    Err(LabError::Check { message: format!("the VM did not end clean: {report:?}"), partial: String::new() })
}
