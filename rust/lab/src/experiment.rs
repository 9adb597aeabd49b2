//! `bench zap` and `bench drop`: the scenarios, and how their outcomes become results.
//!
//! `zap` is a memslot update under running vCPUs. `drop` is a vCPU that drops the last reference to a big root, beside vCPUs that run on another root; its baseline is
//! the same sequence while somebody else holds the root.

use std::collections::BTreeMap;

use tdpmmu_platform::{Histogram, Histograms, MeterSnapshot, Platform, Real};
use tdpmmu_spte::LockMode;
use tdpmmu_spte::geometry::page_size_name;
use tdpmmu_table::{TABLE_BYTES, TablePool};
use tdpmmu_vm::AccessOutcome;

use crate::LabError;
use crate::config::{AdMix, DesignPlan, Plan, PopulateBy};
use crate::memory::Estimate;
use crate::outcome::{Outcome, ThreadReport};
use crate::result::{
    Attribution, CpuNs, DropLoop, H, LockStats, PopulateResult, RcuResult, Refault, Run, Teardown, UpdateNs,
};
use crate::scenario::{Ad, By, Flag, Mark, Op, Populate, Scenario, Thread, VmSpec, Who, wait};

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A memslot update.
    Zap,
    /// A vCPU drops its root.
    Drop,
}

impl Kind {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Zap => "zap",
            Kind::Drop => "drop",
        }
    }
}

/// Writes of 100 guest accesses.
const WRITE_PERCENT: u8 = 50;
/// Drops of the baseline.
const BASELINE_DROPS: u64 = 200;
/// SPTEs under each root of the drop loop.
const LOOP_SPTES: u64 = 16;
/// Tables beside the guest's own: other roots, working sets under new roots, vCPU caches.
fn spare_tables(plan: &Plan) -> u64 {
    let rebuilt = plan.working_set_pages * u64::from(plan.config.vcpus) / 256 + 64;
    4096 + 32 * u64::from(plan.config.vcpus) + rebuilt
}

fn vm_spec(plan: &Plan, design: &DesignPlan, tables: u64, vcpus: u32, step_ns: bool) -> VmSpec {
    let c = &plan.config;
    VmSpec {
        profile: c.kernel_profile.clone(),
        design: design.info.name.into(),
        passes: design.passes.to_string(),
        ownership: design.ownership.to_string(),
        vcpus: vcpus as usize,
        levels: c.levels,
        memory_bytes: c.memory_bytes,
        level: plan.level,
        max_tables: u32::try_from(tables + spare_tables(plan)).unwrap_or(u32::MAX - 256),
        workers: c.workers,
        preempt: c.preempt.clone(),
        tick_ns: c.tick_ns,
        write_back: plan.write_back,
        step_ns,
        force_yield: None,
    }
}

fn populate(plan: &Plan) -> Option<Populate> {
    let by = match plan.populate {
        PopulateBy::Bulk => By::Bulk,
        PopulateBy::Fault => By::Faults,
    };
    let ad = match plan.ad_mix {
        AdMix::Clean => Ad::Clean,
        AdMix::Accessed => Ad::Accessed,
        AdMix::Dirty => Ad::Dirty,
    };
    Some(Populate { by, ad })
}

fn guest(plan: &Plan) -> Op {
    Op::Guest {
        pages: plan.working_set_pages,
        arrival_ns: plan.config.arrival_ns,
        write_percent: WRITE_PERCENT,
        until: Flag::Refault,
    }
}

/// The scenario of `bench zap`.
pub fn zap_scenario(plan: &Plan, design: &DesignPlan, tables: u64, step_ns: bool) -> Scenario {
    let vcpus = plan.config.vcpus;
    let mut threads: Vec<Thread> = (0..vcpus)
        .map(|id| Thread {
            who: Who::Vcpu(id as usize),
            ops: vec![guest(plan), Op::Touch { pages: plan.working_set_pages }],
        })
        .collect();
    threads.push(Thread {
        who: Who::Caller,
        ops: vec![
            Op::Await { flag: Flag::WarmedUp, count: vcpus },
            Op::SleepMs(20),
            Op::DeleteMemslot,
            Op::AwaitTeardown,
            // Every vCPU gets a chance to fault once under its new root.
            Op::SleepMs(20),
            Op::Raise(Flag::Refault),
        ],
    });
    Scenario {
        name: "memslot-delete".into(),
        vm: vm_spec(plan, design, tables, vcpus, step_ns),
        populate: populate(plan),
        threads,
        seed: plan.config.seed,
    }
}

/// The scenario of `bench drop`.
pub fn drop_scenario(plan: &Plan, design: &DesignPlan, tables: u64, step_ns: bool) -> Scenario {
    let vcpus = plan.config.vcpus;
    let drops = |mark, times| Op::DropRoot { mark, times, sptes: 0 };
    let mut threads = vec![
        Thread {
            who: Who::Vcpu(0),
            ops: vec![
                wait(Flag::HolderReady),
                Op::Await { flag: Flag::WarmedUp, count: vcpus - 1 },
                drops(Mark::Baseline, BASELINE_DROPS),
                Op::Raise(Flag::BaselineDone),
                wait(Flag::HolderGone),
                drops(Mark::Drop, 1),
                Op::Raise(Flag::Dropped),
            ],
        },
        // Holds the big root while the baseline is taken.
        Thread {
            who: Who::Vcpu(vcpus as usize),
            ops: vec![
                Op::Load,
                Op::Raise(Flag::HolderReady),
                wait(Flag::BaselineDone),
                Op::Unload,
                Op::Raise(Flag::HolderGone),
            ],
        },
        Thread {
            who: Who::Caller,
            ops: vec![wait(Flag::Dropped), Op::AwaitTeardown, Op::Raise(Flag::Refault)],
        },
    ];
    threads.extend((1..vcpus).map(|id| Thread {
        who: Who::Vcpu(id as usize),
        ops: vec![Op::SwitchRole, guest(plan), Op::Touch { pages: plan.working_set_pages }],
    }));
    Scenario {
        name: "last-reference-dropped".into(),
        vm: vm_spec(plan, design, tables, vcpus + 1, step_ns),
        populate: populate(plan),
        threads,
        seed: plan.config.seed,
    }
}

/// Many drops of small roots: the percentiles that one big root cannot give.
pub fn drop_loop_scenario(plan: &Plan, design: &DesignPlan) -> Scenario {
    let mut small = plan.clone();
    small.config.memory_bytes = 64 << 20;
    small.level = 1;
    let times = plan.config.drop_loop;
    Scenario {
        name: "drop-loop".into(),
        // A worker that falls behind leaves up to one tree a drop waiting: the backlog is measured, not cut off.
        vm: vm_spec(&small, design, 64 + 5 * times, 2, false),
        populate: None,
        threads: vec![
            Thread {
                who: Who::Vcpu(0),
                ops: vec![
                    Op::DropRoot { mark: Mark::Drop, times, sptes: LOOP_SPTES },
                    Op::Raise(Flag::Dropped),
                    wait(Flag::HolderReady),
                    Op::DropRoot { mark: Mark::Baseline, times, sptes: LOOP_SPTES },
                    Op::Raise(Flag::BaselineDone),
                ],
            },
            Thread {
                who: Who::Vcpu(1),
                ops: vec![
                    wait(Flag::Dropped),
                    Op::Load,
                    Op::Raise(Flag::HolderReady),
                    wait(Flag::BaselineDone),
                ],
            },
        ],
        seed: plan.config.seed,
    }
}

/// What `drop_loop` reports.
pub fn drop_loop(outcome: &Outcome, times: u64) -> DropLoop {
    let h = |mark| outcome.marks.get(&mark).map(H::from).unwrap_or_default();
    DropLoop {
        root_sptes: LOOP_SPTES,
        count: times,
        block_drop_ns: h(Mark::Drop),
        block_baseline_ns: h(Mark::Baseline),
    }
}

fn merged<'a>(meters: impl Iterator<Item = &'a MeterSnapshot>) -> MeterSnapshot {
    let mut sum = MeterSnapshot::default();
    for meter in meters {
        sum.merge(meter);
    }
    sum
}

/// What those who tear down have measured, workers included.
fn paying(kind: Kind, outcome: &Outcome) -> MeterSnapshot {
    let threads = outcome.threads.iter().filter(|t| tears_down(kind, t)).map(|t| &t.meter);
    merged(threads.chain(outcome.workers.iter().map(|w| &w.0)))
}

/// Is this thread part of the teardown?
fn tears_down(kind: Kind, thread: &ThreadReport) -> bool {
    match kind {
        Kind::Zap => thread.who == Who::Caller,
        Kind::Drop => thread.who == Who::Vcpu(0),
    }
}

/// The run's row, and what is wrong with it, if anything is.
pub fn to_run(
    kind: Kind,
    plan: &Plan,
    design: &DesignPlan,
    rep: u32,
    outcome: &Outcome,
    cpus: usize,
) -> Result<Run, LabError> {
    let c = &plan.config;
    let sptes = outcome.at_t0.sptes();
    let empty = Histograms::default();
    let all = merged(outcome.threads.iter().map(|t| &t.meter).chain(outcome.workers.iter().map(|w| &w.0)));
    let paying = paying(kind, outcome);
    let (hist, pay_hist) =
        (all.histograms.as_deref().unwrap_or(&empty), paying.histograms.as_deref().unwrap_or(&empty));
    let worker_cpu: u64 = outcome.workers.iter().map(|w| w.1).sum();
    let op_cpu: u64 = outcome.threads.iter().filter(|t| tears_down(kind, t)).map(|t| t.op_cpu_ns).sum();
    let (caller, vcpu) = if kind == Kind::Zap { (op_cpu, 0) } else { (0, op_cpu) };
    let cpu_ns = CpuNs { caller, vcpu, worker: worker_cpu, rcu: outcome.rcu_cpu_ns };
    let update = outcome.update.map(|t| UpdateNs {
        total: t.total_ns,
        lock_wait: t.lock_wait_ns,
        exclusive_hold: t.exclusive_hold_ns,
        exclusive_total: t.exclusive_total_ns,
        exclusive_longest: t.exclusive_longest_ns,
        kick_wait: t.kick_wait_ns,
        zap: t.zap_ns,
    });
    let mark = |m| outcome.marks.get(&m).map(H::from);
    let drop_ns = mark(Mark::Drop).and_then(|h| h.max).unwrap_or(0);
    let return_ns = update.as_ref().map_or(drop_ns, |u| u.total);
    let teardown = outcome.last_zap_end_ns.map(|zap_end| {
        let free = outcome.last_free_ns.unwrap_or(zap_end);
        Teardown {
            fz_return_ns: return_ns,
            last_spte_unreachable_ns: zap_end,
            last_table_free_ns: free,
            cpus_used: (caller + vcpu + worker_cpu + cpu_ns.rcu) as f64 / free.max(1) as f64,
            cpu_ns,
            entry_writes: paying.entry_writes,
            entry_reads: paying.entry_reads,
            ns_per_spte: paying.walk_cpu_ns as f64 / sptes.max(1) as f64,
            ns_per_entry: paying.walk_cpu_ns as f64 / paying.entry_writes.max(1) as f64,
        }
    });
    let felt: Vec<_> = outcome.threads.iter().filter(|t| !t.felt.access.is_empty()).collect();
    let mut by_outcome = BTreeMap::new();
    let mut access = Histogram::new();
    for kind in AccessOutcome::ALL {
        let mut one = Histogram::new();
        for thread in &felt {
            one.merge(&thread.felt.access[kind as usize]);
        }
        if one.count() > 0 {
            access.merge(&one);
            by_outcome.insert(kind.name(), H::from(&one));
        }
    }
    let since_t0 = |at: u64| Real::ticks_to_ns(at.saturating_sub(outcome.t0));
    let mut block_update = Histogram::new();
    let mut visible = Histogram::new();
    for thread in &felt {
        block_update.merge(&thread.felt.block_update);
        if let Some(at) = thread.felt.visible_at {
            visible.record(since_t0(at));
        }
    }
    let exclusive_drop = kind == Kind::Drop
        && design.info.name == "inline"
        && plan.profile.root_free_lock == LockMode::Exclusive;
    let threads_running = c.vcpus as usize + 1 + usize::from(design.info.name == "async-worker") * c.workers;
    let run = Run {
        design: design.info.name.into(),
        passes: design.passes.to_string(),
        ownership: design.ownership.to_string(),
        lock_mode: if exclusive_drop { "exclusive" } else { "shared" },
        preempt: c.preempt.clone(),
        tick_ns: c.tick_ns,
        kernel_profile: plan.profile.to_string(),
        rep,
        memory_bytes: c.memory_bytes,
        page: page_size_name(plan.level).into(),
        vcpus: c.vcpus,
        overcommit: threads_running > cpus,
        sptes,
        table_pages: outcome.tables_at_t0,
        table_bytes: outcome.tables_at_t0 * TABLE_BYTES as u64,
        ad_mix: c.ad_mix.clone(),
        writeback: c.writeback.clone(),
        written_back_frames: outcome.written_back,
        populated_by: c.populate.clone(),
        extrapolated: false,
        populate: PopulateResult {
            wall_ns: outcome.populate_ns,
            ns_per_spte: outcome.populate_ns as f64 / outcome.populated.max(1) as f64,
            prefault_ns: outcome.prefault_ns,
        },
        update_ns: update,
        block_drop_ns: mark(Mark::Drop),
        block_baseline_ns: mark(Mark::Baseline),
        retained_table_pages: (kind == Kind::Drop).then_some(outcome.retained),
        drop_loop: None,
        block_update_ns: H::from(&block_update),
        visible_ns: H::from(&visible),
        visible_last_ns: felt.iter().filter_map(|t| t.felt.visible_at).max().map(since_t0),
        access_ns: H::from(&access),
        access_ns_by_outcome: by_outcome,
        arrival_ns: c.arrival_ns,
        step_units: H::from(&pay_hist.step_units),
        step_ns: H::default(),
        step_ns_dropped: 0,
        step_ns_dropped_cpu_max: None,
        teardown,
        lock: LockStats {
            read_hold_ns: H::from(&hist.read_hold),
            write_hold_ns: H::from(&hist.write_hold),
            reader_wait_ns: H::from(&hist.reader_wait),
            writer_wait_ns: H::from(&hist.writer_wait),
            handoffs: all.handoffs,
            contended: all.contended,
        },
        rcu: RcuResult {
            flavour: outcome.rcu.flavour.name().to_owned(),
            section_ns: H::from(&pay_hist.rcu_section),
            grace_period_ns: H::from(&outcome.rcu.grace_period_ns),
            backlog_pages_peak: outcome.rcu.backlog_peak,
        },
        queue_ns: outcome.queue.as_ref().map(H::from).unwrap_or_default(),
        refault: Refault { faults: outcome.refaults.0, wall_ns: outcome.refaults.1 },
        attribution: attribution(outcome),
        fit: None,
        yields: paying.yields,
        retries: all.retries,
        kicks: outcome.kicks,
        flushes: outcome.flushes,
        table_pages_freed: outcome.freed,
        table_pages_leaked: outcome.close.tables_leaked,
        pool_peak_pages: outcome.pool_peak,
        pool_cap_hits: outcome.pool_cap_hits,
        overhead_bytes_per_table: TablePool::overhead_bytes_per_table(),
        violations: None,
        violation_list: Vec::new(),
        violations_checked_memory_bytes: None,
    };
    believable(kind, plan, outcome, &paying, &run)?;
    Ok(run)
}

/// A result that cannot be true is an error, not a result.
fn believable(
    kind: Kind,
    plan: &Plan,
    outcome: &Outcome,
    paying: &MeterSnapshot,
    run: &Run,
) -> Result<(), LabError> {
    let fail = |message: String| {
        let partial = serde_json::to_string(run).unwrap_or_default();
        Err(LabError::Check { message, partial })
    };
    let expected = Estimate::new(plan.config.memory_bytes, plan.level, plan.config.levels).sptes;
    if run.sptes != expected {
        return fail(format!("{}: {} SPTEs counted where {expected} were to be", run.design, run.sptes));
    }
    if !outcome.close.is_clean() {
        return fail(format!("{}: the VM did not end clean: {:?}", run.design, outcome.close));
    }
    let switched_out: u64 =
        outcome.threads.iter().filter(|t| tears_down(kind, t)).map(|t| t.switched_out).sum();
    let work = Worked {
        cpu_ns: run.teardown.as_ref().map_or(0, |t| t.cpu_ns.caller),
        tick_ns: plan.config.tick_ns,
        yields: paying.yields,
        contended: paying.contended,
        switched_out,
    };
    if kind == Kind::Zap && work.should_have_yielded() {
        return fail(format!(
            "{}: {work:?}: a long zap beside running vCPUs never gave way to anybody",
            run.design
        ));
    }
    Ok(())
}

/// What a zapping task did beside running vCPUs.
#[derive(Clone, Copy, Debug)]
struct Worked {
    cpu_ns: u64,
    tick_ns: u64,
    yields: u64,
    contended: u64,
    switched_out: u64,
}

impl Worked {
    /// More than four ticks of CPU without a yield, a wait for the lock, or the host taking the CPU away (which
    /// begins a new tick): it did not check as it claims.
    fn should_have_yielded(&self) -> bool {
        self.cpu_ns > 4 * self.tick_ns && self.yields == 0 && self.contended == 0 && self.switched_out == 0
    }
}

fn attribution(outcome: &Outcome) -> Vec<Attribution> {
    let mut rows: Vec<Attribution> = outcome
        .threads
        .iter()
        .map(|t| {
            let role = if t.who == Who::Caller { "caller" } else { "vcpu" };
            let elapsed = Real::ticks_to_ns(t.meter.elapsed_ticks);
            let mut row = Attribution::new(t.name.clone(), role, &t.meter, elapsed);
            row.cpu = t.cpu;
            row.run_delay_ns = t.run_delay_ns;
            row
        })
        .collect();
    for (n, (meter, _)) in outcome.workers.iter().enumerate() {
        let elapsed = Real::ticks_to_ns(meter.elapsed_ticks);
        rows.push(Attribution::new(format!("worker-{n}"), "worker", meter, elapsed));
    }
    // The RCU thread keeps no phases: its CPU time all goes into giving tables back.
    let mut rcu = Attribution::new("tdpmmu-rcu".into(), "rcu", &MeterSnapshot::default(), outcome.rcu_cpu_ns);
    rcu.ns.insert("free", outcome.rcu_cpu_ns);
    rows.push(rcu);
    rows
}

/// The time between two reschedule checks of the tasks that tear down; how many samples a context switch spoilt, and the
/// longest of those.
pub fn step_ns(kind: Kind, outcome: &Outcome) -> (H, u64, u64) {
    let paying = paying(kind, outcome);
    let histogram = crate::bench::summary(paying.histograms.as_deref().map(|h| &h.step_ns));
    (histogram, paying.steps_dropped, paying.longest_dropped_step_cpu_ns)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_zap_that_never_gave_way_is_no_result() {
        let lazy =
            Worked { cpu_ns: 17_000_000, tick_ns: 4_000_000, yields: 0, contended: 0, switched_out: 0 };
        assert!(lazy.should_have_yielded());
        for honest in [
            Worked { yields: 1, ..lazy },
            Worked { contended: 1, ..lazy },
            Worked { switched_out: 1, ..lazy },
            Worked { cpu_ns: 15_000_000, ..lazy },
        ] {
            assert!(!honest.should_have_yielded(), "{honest:?}");
        }
    }
}
