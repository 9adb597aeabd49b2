//! One operation against its limit: populate, fault, walk, rcu. Schema `tdpmmu.micro/1`.
//!
//! Each figure is the minimum over rounds of the mean over many operations, on one thread unless the name says otherwise; `count` says how many operations a round had.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use serde::Serialize;
use serde_json::{Value, json};
use tdpmmu_mmu::{Frame, MapFault, MapOutcome, TdpMmu};
use tdpmmu_platform::{
    NIL, Platform, RcuConfig, RcuDomain, Real, Reclaim, Role as TaskRole, Task, TaskConfig,
};
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_table::TableCache;
use tdpmmu_vm::{AdMix, BulkOptions, FaultOutcome, GuestAccess, Progress, Vcpu, Vm, VmConfig, VmError};

use crate::bench::measure_limits;
use crate::config::Plan;
use crate::host::HostInfo;
use crate::limits::Limits;
use crate::memory::Estimate;
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
    pub of: Option<&'static str>,
    /// Operations in a round.
    pub count: u64,
    /// The goal, in the unit of `ratio` if there is one, else ns.
    pub goal: Option<f64>,
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
    let estimate = Estimate::new(plan.config.memory_bytes, plan.level, plan.config.levels);
    estimate.check(plan.config.memory_bytes, &plan.config.page, plan.config.max_memory_bytes)?;
    let before = measure_limits(control)?;
    let mut bench = Bench { plan, limits: &before, control, rows: Vec::new() };
    match kind {
        "populate" => bench.populate(&estimate)?,
        "fault" => bench.fault()?,
        "walk" => bench.walk(&estimate)?,
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
    fn vm(&self, memory_bytes: u64, level: u8) -> Result<Vm<P>, LabError> {
        let estimate = Estimate::new(memory_bytes, level, self.plan.config.levels);
        let mut config = VmConfig::new(self.plan.profile);
        config.root_level = self.plan.config.levels;
        config.maxphyaddr = if config.root_level == 5 { 52 } else { 48 };
        config.max_tables = u32::try_from(estimate.tables + 8192).unwrap_or(u32::MAX - 256);
        config.max_level = level;
        config.host_pages = (memory_bytes / page_bytes(1)).next_power_of_two().max(1 << 20);
        config.write_back = self.plan.write_back;
        config.task = TaskConfig { attribute: false, ..TaskConfig::default() };
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
        self.rows.push(Row { name, ns, ratio, of: of.map(|o| o.0), count, goal });
        Ok(())
    }

    fn populate(&mut self, estimate: &Estimate) -> Result<(), LabError> {
        let memory = self.plan.config.memory_bytes;
        let level = self.plan.level;
        let pages = memory / page_bytes(1);
        let vm = self.vm(memory, level)?;
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let write = self.limits.one.write_ns;
        let all = self.limits.for_threads(cpus).map_or(write, |l| l.write_ns);
        for (threads, limit) in [(1, write), (cpus, all)] {
            let name = format!("bulk, {threads} thread{}", if threads == 1 { "" } else { "s" });
            let cancel = self.control.flag().clone();
            self.best(name, Some(("write_ns", limit)), Some(1.2), || {
                let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
                vcpu.root().map_err(fail("a root"))?;
                let options = BulkOptions { level, ad: AdMix::Dirty, threads };
                let progress = Progress::default();
                progress.cancel.store(
                    cancel.load(std::sync::atomic::Ordering::Relaxed),
                    std::sync::atomic::Ordering::Relaxed,
                );
                let begin = P::ticks();
                let made =
                    vm.populate_bulk(&mut vcpu, 0..pages, &options, &progress).map_err(fail("bulk"))?;
                let took = P::ticks_to_ns(P::ticks() - begin);
                drop(vcpu);
                empty(&vm)?;
                if made != estimate.sptes {
                    return Err(LabError::Internal(format!(
                        "{made} SPTEs made, {} expected",
                        estimate.sptes
                    )));
                }
                Ok((took, made))
            })?;
        }
        // The map step alone: lock and cache once per 2 MiB, one compare-exchange an SPTE.
        let some = pages.min(1 << 20) / span(level) * span(level);
        let cmpxchg = self.limits.one.cmpxchg_ns;
        let of = Some(("cmpxchg_ns", cmpxchg));
        self.best("map step, a leaf table's run a call", of, Some(1.4), || {
            map_steps(&vm, some, level, true)
        })?;
        self.best("map step, one SPTE a call", of, None, || map_steps(&vm, some, level, false))?;
        let mut first = true;
        self.best("complete faults, first touch of every table", None, None, || {
            if !std::mem::take(&mut first) {
                empty(&vm)?;
            }
            let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
            faults(&mut vcpu, (0..some).step_by(span(level) as usize), true)
        })?;
        clean(&vm)
    }

    fn fault(&mut self) -> Result<(), LabError> {
        let memory = self.plan.config.memory_bytes.max(16 << 20);
        let vm = self.vm(memory, 1)?;
        let pages = memory / page_bytes(1);
        let hot = pages.min(8 * 512);
        for (name, gfns, write, goal) in [
            ("write fault, 8 leaf tables hot", hot, true, Some(50.0)),
            ("read fault, 8 leaf tables hot", hot, false, Some(50.0)),
            ("write fault, random over all memory", pages, true, None),
        ] {
            // Tables once, then only leaves come and go.
            let order: Vec<u64> = if gfns == hot {
                (0..hot).collect()
            } else {
                shuffled(pages, pages.min(1 << 18), self.plan.config.seed)
            };
            {
                let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
                faults(&mut vcpu, order.iter().copied(), true)?;
            }
            let task = vm.task("unmap", TaskRole::Caller);
            self.best(name, None, goal, || {
                zap_leaves(&vm, &task, 0..gfns);
                let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
                faults(&mut vcpu, order.iter().copied(), write)
            })?;
        }
        clean(&vm)
    }

    fn walk(&mut self, estimate: &Estimate) -> Result<(), LabError> {
        let memory = self.plan.config.memory_bytes;
        let pages = memory / page_bytes(1);
        let vm = self.vm(memory, self.plan.level)?;
        let mut vcpu = vm.vcpu(0).map_err(fail("a vCPU"))?;
        let options = BulkOptions { level: self.plan.level, ad: AdMix::Dirty, threads: 0 };
        let made =
            vm.populate_bulk(&mut vcpu, 0..pages, &options, &Progress::default()).map_err(fail("bulk"))?;
        if made != estimate.sptes {
            return Err(LabError::Internal(format!("{made} SPTEs made, {} expected", estimate.sptes)));
        }
        let root = vcpu.root().map_err(fail("a root"))?;
        let mmu = vm.mmu();
        let task = vm.task("walk", TaskRole::Observer);
        let mut sizes = vec![(8 * 512, Some(15.0)), (512 * 512, Some(30.0)), (pages, None)];
        sizes.retain(|s| s.0 <= pages);
        sizes.dedup_by_key(|s| s.0);
        for (gfns, goal) in sizes {
            for (dependent, kind) in [(true, "dependent"), (false, "independent")] {
                let name = format!("lockless walk, {kind}, over {} leaf tables", gfns / 512);
                self.best(name, None, goal.filter(|_| dependent), || {
                    if dependent {
                        walks::<true>(mmu, &task, root, gfns)
                    } else {
                        walks::<false>(mmu, &task, root, gfns)
                    }
                })?;
            }
        }
        drop(task);
        drop(vcpu);
        clean(&vm)
    }

    fn rcu(&mut self) -> Result<(), LabError> {
        const SECTIONS: u64 = 1 << 22;
        const CHAIN: usize = 1 << 16;
        let links: Arc<Links> = Arc::new(Links((0..CHAIN).map(|_| AtomicU32::new(NIL)).collect()));
        let rcu = <P as Platform>::Rcu::new(links.clone(), RcuConfig::default());
        let task = Task::<P>::new(&rcu, "reader", TaskRole::Observer, TaskConfig::default());
        self.best("read section, enter + leave", None, Some(0.5), || {
            let begin = P::ticks();
            for _ in 0..SECTIONS {
                let guard = task.rcu_read();
                // What is read inside must not move out; the guard itself may stay in registers.
                std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
                drop(guard);
            }
            Ok((P::ticks_to_ns(P::ticks() - begin), SECTIONS))
        })?;
        self.best("defer, one at a time, until reclaimed", None, None, || {
            let begin = P::ticks();
            for id in 0..CHAIN {
                rcu.defer(id as u32, &links.0[id], 1);
            }
            rcu.barrier();
            Ok((P::ticks_to_ns(P::ticks() - begin), CHAIN as u64))
        })?;
        self.best("synchronize, no reader inside", None, None, || {
            let begin = P::ticks();
            for _ in 0..100 {
                rcu.synchronize();
            }
            Ok((P::ticks_to_ns(P::ticks() - begin), 100))
        })?;
        let flavour = rcu.stats().flavour.name();
        for row in &mut self.rows {
            row.name = format!("{} ({flavour})", row.name);
        }
        rcu.stop();
        Ok(())
    }
}

/// Walks to pseudo-random gfns; a dependent walk needs the last one's answer to know where to go.
fn walks<const DEPENDENT: bool>(
    mmu: &TdpMmu<P>,
    task: &Task<P>,
    root: u32,
    gfns: u64,
) -> Result<(u64, u64), LabError> {
    const WALKS: u64 = 1 << 20;
    // The largest power of two of gfns: the top bits of one product choose among them, without a division.
    let shift = 64 - gfns.ilog2();
    let (mut at, mut fold) = (0, 0u64);
    let begin = P::ticks();
    for n in 0..WALKS {
        let Some((leaf, _)) = mmu.lookup(task, root, at) else {
            return Err(LabError::Internal(format!("gfn {at:#x} is not mapped")));
        };
        fold ^= leaf.raw();
        let seed = if DEPENDENT { leaf.pfn() + n } else { n };
        at = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> shift;
    }
    black_box(fold);
    Ok((P::ticks_to_ns(P::ticks() - begin), WALKS))
}

struct Links(Vec<AtomicU32>);

impl Reclaim for Links {
    fn reclaim(&self, head: u32) -> usize {
        let (mut at, mut n) = (head, 0);
        while at != NIL {
            at = self.0[at as usize].load(std::sync::atomic::Ordering::Acquire);
            n += 1;
        }
        n
    }
}

fn shuffled(pages: u64, count: u64, seed: u64) -> Vec<u64> {
    let mut random = crate::guest::Random::new(seed);
    let mut seen = std::collections::HashSet::new();
    let mut order = Vec::with_capacity(count as usize);
    while (order.len() as u64) < count {
        let gfn = random.draw() % pages;
        if seen.insert(gfn) {
            order.push(gfn);
        }
    }
    order
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

fn map_steps(vm: &Vm<P>, pages: u64, level: u8, ranges: bool) -> Result<(u64, u64), LabError> {
    let mmu = vm.mmu();
    let task = vm.task("map", TaskRole::Vcpu);
    let mut cache = TableCache::default();
    let pool = |e: tdpmmu_table::PoolError| LabError::Internal(e.to_string());
    let root = mmu.load_root(&task, &mut cache, mmu.root_role(false)).map_err(pool)?;
    let mut count = 0;
    let begin = P::ticks();
    for first in (0..pages).step_by(512 * span(level) as usize) {
        mmu.top_up(&task, &mut cache).map_err(pool)?;
        let mut guard = mmu.lock.read(&task);
        let end = (first + 512 * span(level)).min(pages);
        let fault = |gfn| MapFault {
            gfn,
            as_id: 0,
            frame: Frame::Page { pfn: gfn, writable: true },
            goal_level: level,
            write: true,
            exec: false,
            prefetch: false,
            dirty_tracked: false,
        };
        if ranges {
            count += mmu
                .map_range(&mut guard, &mut cache, root, &fault(first), (end - first) / span(level))
                .map_err(|outcome| LabError::Internal(format!("gfn {first:#x}: {outcome:?}")))?;
            continue;
        }
        for gfn in (first..end).step_by(span(level) as usize) {
            if !matches!(mmu.map(&mut guard, &mut cache, root, &fault(gfn)), MapOutcome::Fixed { .. }) {
                return Err(LabError::Internal(format!("gfn {gfn:#x} was not mapped")));
            }
            count += 1;
        }
    }
    if count != pages / span(level) {
        return Err(LabError::Internal(format!("{count} SPTEs mapped of {}", pages / span(level))));
    }
    let took = P::ticks_to_ns(P::ticks() - begin);
    cache.drain(mmu.pool());
    mmu.put_roots(&task, &[root]);
    drop(task);
    empty(vm)?;
    Ok((took, count))
}

fn zap_leaves(vm: &Vm<P>, task: &Task<P>, gfns: std::ops::Range<u64>) {
    let mut guard = vm.mmu().lock.write(task);
    let mut debt = vm.mmu().unmap(&mut guard, 0, gfns, true);
    vm.mmu().pay(task, &mut debt);
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
